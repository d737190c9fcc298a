package peers_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"farkeep/keyserver/peers"
	"farkeep/shared/hint"
	"farkeep/shared/identity"
	"farkeep/shared/site"
	"farkeep/shared/sshverb"

	"golang.org/x/crypto/ssh"
)

// node is one key server of a site in this process.
type node struct {
	name     string
	key      ssh.Signer
	listener net.Listener
	peers    *peers.Peers
	state    string

	mu      sync.Mutex
	revoked map[string]peers.Order
	calls   int
	refuse  error // what Revoke answers instead
}

func (n *node) has(appliance string) (peers.Order, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	o, ok := n.revoked[appliance]
	return o, ok
}

func (n *node) revoke(_ context.Context, _ string, o peers.Order) (bool, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.calls++
	if n.refuse != nil {
		return false, n.refuse
	}
	_, known := n.revoked[o.Appliance]
	if !known {
		n.revoked[o.Appliance] = o
	}
	return known, nil
}

func signer(t testing.TB, name string) ssh.Signer {
	t.Helper()
	private, _, err := identity.New(name)
	if err != nil {
		t.Fatal(err)
	}
	s, err := identity.Signer(private)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// newSite makes key servers that listen and do not yet serve. change adapts
// each one's configuration.
func newSite(t *testing.T, names []string, change func(name string, c *peers.Config)) []*node {
	t.Helper()
	var nodes []*node
	var servers []site.KeyServer
	for _, name := range names {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		n := &node{name: name, key: signer(t, name), listener: l, state: t.TempDir(), revoked: map[string]peers.Order{}}
		nodes = append(nodes, n)
		servers = append(servers, site.KeyServer{Name: name, Address: l.Addr().String(), HostKey: identity.Line(n.key.PublicKey(), name)})
	}
	for _, n := range nodes {
		c := peers.Config{
			Servers: servers, HostKey: n.key, State: n.state, Log: quiet(t),
			Now: time.Now, Revoke: n.revoke, Retry: time.Millisecond, RetryMax: 20 * time.Millisecond, Poll: 5 * time.Millisecond,
		}
		if change != nil {
			change(n.name, &c)
		}
		var err error
		if n.peers, err = peers.New(c); err != nil {
			t.Fatal(err)
		}
	}
	return nodes
}

// quiet logs to the test.
func quiet(t *testing.T) *slog.Logger { return slog.New(slog.NewTextHandler(testLog{t}, nil)) }

type testLog struct{ t *testing.T }

func (l testLog) Write(b []byte) (int, error) {
	l.t.Log(strings.TrimSpace(string(b)))
	return len(b), nil
}

// serve answers on n's listener until the test ends.
func (n *node) serve(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	s := &sshverb.Server{
		HostKey: n.key, Log: quiet(t),
		Authorise: func(key ssh.PublicKey, _ net.Addr) (*ssh.Permissions, error) {
			name, ok := n.peers.Authorise(key)
			if !ok {
				return nil, errors.New("unknown key")
			}
			return &ssh.Permissions{Extensions: map[string]string{"peer": name}}, nil
		},
		Exec: func(ctx context.Context, s *sshverb.Session) error {
			return n.peers.Exec(ctx, s.Permissions.Extensions["peer"], s)
		},
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, n.listener) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// run delivers in the background until the test ends.
func (n *node) run(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); n.peers.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
}

func order(name string) peers.Order {
	return peers.NewOrder(name, "stolen from the attic", "ada", "one", time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC))
}

// outcomes delivers once and returns what came of it, by peer.
func outcomes(t *testing.T, n *node) map[string]error {
	t.Helper()
	got := map[string]error{}
	if err := n.peers.Deliver(t.Context(), func(o peers.Outcome) { got[o.Peer] = o.Err }); err != nil {
		t.Fatal(err)
	}
	return got
}

// eventually waits for a condition that other goroutines bring about.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(2 * time.Minute)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("never came about: %s", what)
		}
		time.Sleep(2 * time.Millisecond) // state of another goroutine, which tells nobody
	}
}

func pending(t *testing.T, n *node) (list []string) {
	t.Helper()
	all, err := n.peers.Pending()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range all {
		list = append(list, p.Peer+" "+p.Order.Appliance)
	}
	slices.Sort(list)
	return list
}

func TestRevocationReachesAll(t *testing.T) {
	nodes := newSite(t, []string{"one", "two", "three"}, nil)
	for _, n := range nodes {
		n.serve(t)
	}
	one := nodes[0]
	if one.peers.Me() != "one" || !slices.Equal(one.peers.Names(), []string{"two", "three"}) {
		t.Fatalf("I am %s, the others are %v", one.peers.Me(), one.peers.Names())
	}
	want := order("attic")
	if err := one.peers.Queue(want); err != nil {
		t.Fatal(err)
	}
	if got := pending(t, one); !slices.Equal(got, []string{"three attic", "two attic"}) {
		t.Errorf("pending: %v", got)
	}
	for peer, err := range outcomes(t, one) {
		if err != nil {
			t.Errorf("%s: %v", peer, err)
		}
	}
	if got := pending(t, one); got != nil {
		t.Errorf("still pending: %v", got)
	}
	for _, n := range nodes[1:] {
		if got, ok := n.has("attic"); !ok || got != want {
			t.Errorf("%s has %+v", n.name, got)
		}
		// Each passes it on to the other, in case the first could not.
		outcomes(t, n)
	}
	for _, n := range nodes[1:] {
		if got := pending(t, n); got != nil {
			t.Errorf("%s: pending: %v", n.name, got)
		}
	}
	if _, ok := one.has("attic"); ok {
		t.Error("the order came back to where it was given")
	}
}

// The first reaches only the second, and is gone then; the third learns all the same.
func TestRevocationIsPassedOn(t *testing.T) {
	nodes := newSite(t, []string{"one", "two", "three"}, nil)
	one, two, three := nodes[0], nodes[1], nodes[2]
	two.serve(t)
	if err := one.peers.Queue(order("attic")); err != nil {
		t.Fatal(err)
	}
	three.listener.Close()
	if got := outcomes(t, one); got["two"] != nil || got["three"] == nil {
		t.Fatalf("outcomes: %v", got)
	}
	l, err := net.Listen("tcp", three.listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	three.listener = l
	three.serve(t)
	two.run(t)
	eventually(t, "the third revokes", func() bool { _, ok := three.has("attic"); return ok })
}

// What could not be delivered is named, survives a restart, and is tried until it is taken.
func TestGoesOnTrying(t *testing.T) {
	var alarms sync.Map
	nodes := newSite(t, []string{"one", "two"}, func(_ string, c *peers.Config) {
		c.Lasting = time.Nanosecond
		c.Alarm = func(p peers.Pending) {
			if _, twice := alarms.LoadOrStore(p.Order.ID, p); twice {
				t.Error("the same alarm twice")
			}
		}
	})
	one, two := nodes[0], nodes[1]
	two.listener.Close()
	want := order("attic")
	if err := one.peers.Queue(want); err != nil {
		t.Fatal(err)
	}
	if got := outcomes(t, one); got["two"] == nil || hint.Code(got["two"]) != hint.ExitUnreachable {
		t.Errorf("outcome: %v", got)
	}
	all, err := one.peers.Pending()
	if err != nil || len(all) != 1 || all[0].Tries != 1 || !strings.Contains(all[0].Error, "connect to") || all[0].Last.IsZero() || all[0].Order != want {
		t.Fatalf("pending: %+v, %v", all, err)
	}
	one.run(t) // of another process, which finds it in the folder
	eventually(t, "a second try", func() bool { all, err := one.peers.Pending(); return err == nil && len(all) == 1 && all[0].Tries > 2 })
	eventually(t, "an alarm", func() bool { _, ok := alarms.Load(want.ID); return ok })
	l, err := net.Listen("tcp", two.listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	two.listener = l
	two.serve(t)
	eventually(t, "the order is taken", func() bool { return len(pending(t, one)) == 0 })
	if got, _ := two.has("attic"); got != want {
		t.Errorf("two has %+v", got)
	}
	// What comes later is sent at once, not when the poll comes round.
	if err := one.peers.Queue(order("shed")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the second order is taken", func() bool { _, ok := two.has("shed"); return ok })
}

func TestWithdraw(t *testing.T) {
	nodes := newSite(t, []string{"one", "two", "three"}, nil)
	one := nodes[0]
	for _, name := range []string{"attic", "shed"} {
		if err := one.peers.Queue(order(name)); err != nil {
			t.Fatal(err)
		}
	}
	from, err := one.peers.Withdraw("attic")
	slices.Sort(from)
	if err != nil || !slices.Equal(from, []string{"three", "two"}) {
		t.Errorf("withdrawn from %v, %v", from, err)
	}
	if got := pending(t, one); !slices.Equal(got, []string{"three shed", "two shed"}) {
		t.Errorf("pending: %v", got)
	}
	if from, err := one.peers.Withdraw("attic"); err != nil || from != nil {
		t.Errorf("withdrawn again from %v, %v", from, err)
	}
}

// What is pending for a key server that is no longer in site.toml goes, and the rest stays.
func TestRemovedPeer(t *testing.T) {
	nodes := newSite(t, []string{"one", "two", "gone"}, nil)
	one := nodes[0]
	for _, n := range nodes[1:] {
		n.listener.Close()
	}
	if err := one.peers.Queue(order("attic")); err != nil {
		t.Fatal(err)
	}
	var err error
	one.peers, err = peers.New(peers.Config{
		Servers: []site.KeyServer{
			{Name: "one", Address: "127.0.0.1:1", HostKey: identity.Line(one.key.PublicKey(), "")},
			{Name: "two", Address: nodes[1].listener.Addr().String(), HostKey: identity.Line(nodes[1].key.PublicKey(), "")},
		},
		HostKey: one.key, State: one.state, Log: quiet(t), Now: time.Now,
	})
	if err != nil {
		t.Fatal(err)
	}
	one.run(t)
	eventually(t, "what nobody will take goes", func() bool { return slices.Equal(pending(t, one), []string{"two attic"}) })
}

// A key server that refuses, or that does not know the appliance, has not taken the order.
func TestRefusedIsNotTaken(t *testing.T) {
	nodes := newSite(t, []string{"one", "two"}, nil)
	one, two := nodes[0], nodes[1]
	two.refuse = &sshverb.Error{Code: hint.ExitRefused, Text: "there is no appliance attic in my site.toml"}
	two.serve(t)
	if err := one.peers.Queue(order("attic")); err != nil {
		t.Fatal(err)
	}
	if got := outcomes(t, one); got["two"] == nil || !strings.Contains(got["two"].Error(), "no appliance attic") {
		t.Errorf("outcome: %v", got)
	}
	two.mu.Lock()
	two.refuse = errors.New("the disk is full")
	two.mu.Unlock()
	if got := outcomes(t, one); got["two"] == nil || strings.Contains(got["two"].Error(), "full") {
		t.Errorf("outcome: %v; what is wrong inside is not the peer's business", got)
	}
	if got := pending(t, one); !slices.Equal(got, []string{"two attic"}) {
		t.Errorf("pending: %v", got)
	}
}

// Nobody but the site's key servers is answered, and they may ask for nothing else.
func TestOnlyRevocation(t *testing.T) {
	nodes := newSite(t, []string{"one", "two"}, nil)
	one, two := nodes[0], nodes[1]
	two.serve(t)
	dial := func(key ssh.Signer) (*sshverb.Client, error) {
		return sshverb.Dial(t.Context(), sshverb.Peer{Address: two.listener.Addr().String(), User: "x", Identity: key, HostKey: two.key.PublicKey()})
	}
	if c, err := dial(signer(t, "stranger")); err == nil {
		c.Close()
		t.Error("a stranger got in")
	}
	if _, ok := two.peers.Authorise(two.key.PublicKey()); ok {
		t.Error("a key server takes its own key for a peer's")
	}
	c, err := dial(one.key)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	long := strings.Repeat("x", 400)
	for _, tt := range []struct{ verb, in string }{
		{"peer-allow attic", ""}, {"allow attic", ""}, {"key 0b6e1f5c-8d1b-4c52-9a57-6a2f0c9d3e11", ""}, {"checkin", ""},
		{"peer-revoke", ""}, {"peer-revoke ../x", ""}, {"peer-revoke attic shed", ""},
		{"peer-revoke attic", "{"}, {"peer-revoke attic", `{"appliance":"shed"}`}, {"peer-revoke attic", `{"id":"x"}`},
		{"peer-revoke attic", `{"reason":"` + long + `"}`}, {"peer-revoke attic", `{"by":"a\u001b[2J"}`}, {"peer-revoke attic", `{"from":"../x"}`},
		{"peer-revoke attic", strings.Repeat(" ", peers.MaxOrder+1)},
	} {
		if _, err := c.Run(t.Context(), tt.verb, strings.NewReader(tt.in), 100); hint.Code(err) != hint.ExitUsage {
			t.Errorf("%s %.40q: %v; want it to be no request", tt.verb, tt.in, err)
		}
	}
	if two.calls != 0 {
		t.Errorf("%d orders were carried out", two.calls)
	}
	// By hand, with a stock ssh and nothing on its standard input.
	out, err := c.Run(t.Context(), "peer-revoke attic", nil, 100)
	if err != nil || string(out) != `{"revoked":"attic","id":""}`+"\n" {
		t.Errorf("got %q, %v", out, err)
	}
	if got, ok := two.has("attic"); !ok || got.From != "one" || got.Reason != "" {
		t.Errorf("two has %+v", got)
	}
}

// A revocation must be on the disk before it is sent: with a folder that cannot
// be written there is none.
func TestQueueFailsLoudly(t *testing.T) {
	nodes := newSite(t, []string{"one", "two"}, nil)
	one := nodes[0]
	if err := os.WriteFile(filepath.Join(one.state, "outgoing"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := one.peers.Queue(order("attic")); err == nil {
		t.Error("queued in a file that is no folder")
	}
	bad := order("attic")
	bad.Appliance = "../../etc/passwd"
	bad.From = "two"
	if err := nodes[1].peers.Queue(bad); !errors.Is(err, peers.ErrBadOrder) {
		t.Errorf("a bad name: %v", err)
	}
}

func TestDamagedQueue(t *testing.T) {
	nodes := newSite(t, []string{"one", "two"}, nil)
	one := nodes[0]
	if err := one.peers.Queue(order("attic")); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(one.state, "outgoing", "two", "attic.json")
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string][]byte{
		"empty": {}, "cut": good[:len(good)/2], "another's": bytes.ReplaceAll(good, []byte("attic"), []byte("shed")), "huge": bytes.Repeat([]byte(" "), 20<<10),
	} {
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := one.peers.Pending(); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// What a power cut leaves of a write is no order.
	if err := os.WriteFile(path, good, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(filepath.Dir(path), ".attic.json.new-1"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := pending(t, one); !slices.Equal(got, []string{"two attic"}) {
		t.Errorf("pending: %v", got)
	}
}

func FuzzParseOrder(f *testing.F) {
	text, err := json.Marshal(order("attic"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add("attic", text)
	f.Add("attic", []byte{})
	f.Add("attic", []byte(`{"appliance":"attic","reason":"\u0007"}`))
	f.Add("", []byte("{}"))
	f.Fuzz(func(t *testing.T, name string, text []byte) {
		o, err := peers.ParseOrder([]string{name}, bytes.NewReader(text))
		if err != nil {
			return
		}
		if o.Appliance != name || len(o.Reason) > peers.MaxText || len(o.By) > peers.MaxText || strings.ContainsFunc(o.Reason+o.By, func(r rune) bool { return r < ' ' || r == 0x7f }) {
			t.Fatalf("accepted: %+v", o)
		}
		// What is accepted can be passed on.
		again, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		same, err := peers.ParseOrder([]string{name}, bytes.NewReader(again))
		if err != nil || !same.Since.Equal(o.Since) || same.ID != o.ID || same.Reason != o.Reason {
			t.Fatalf("%+v became %+v, %v", o, same, err)
		}
	})
}
