package server_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"farkeep/keyserver/alert"
	"farkeep/keyserver/audit"
	"farkeep/keyserver/keystore"
	"farkeep/keyserver/moment"
	"farkeep/keyserver/orders"
	"farkeep/keyserver/place"
	"farkeep/keyserver/policy"
	"farkeep/keyserver/server"
	"farkeep/shared/hint"
	"farkeep/shared/identity"
	"farkeep/shared/keywire"
	"farkeep/shared/secret"
	"farkeep/shared/site"
	"farkeep/shared/sshverb"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"
)

const (
	atticDisk = "0b6e1f5c-8d1b-4c52-9a57-6a2f0c9d3e11"
	shedDisk  = "11111111-2222-3333-4444-555555555555"
)

// fixture is a key server with two appliances, attic and shed.
type fixture struct {
	t        testing.TB
	dir      string // the state folder
	keysDir  string
	site     *site.Site
	keys     *keystore.Store
	policies *policy.Store
	key      []byte // attic's
	host     ssh.Signer
	attic    secret.Text // private keys, as OpenSSH files
	shed     secret.Text
	stranger secret.Text
	log      *logBuffer
	address  string

	mu    sync.Mutex
	now   time.Time
	token map[string]keywire.Token // by private key: what that appliance has kept
	told  []alert.Event
	seen  []server.Observation
	where map[string]place.Sighting // by appliance
	voids map[string]bool           // by appliance
	hold  func(context.Context)     // called while a request waits for its place; nil: nothing
	heard chan server.Observation   // told of each request; nil: nobody
}

type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// moment is the fixture's time on a machine that runs since the epoch.
func (f *fixture) moment() (moment.Moment, error) {
	now := f.clock()
	return moment.Moment{Wall: now, Boot: strings.Repeat("0b", 16), Up: time.Duration(now.UnixNano())}, nil
}

func (f *fixture) place(ctx context.Context, a site.Appliance, _ netip.Addr) place.Sighting {
	if f.hold != nil {
		f.hold(ctx)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.where[a.Name]
}

func (f *fixture) alert(ev alert.Event) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.told = append(f.told, ev)
}

// alerts are the kinds that were raised since the last call.
func (f *fixture) alerts() (kinds []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, ev := range f.told {
		kinds = append(kinds, ev.Kind)
	}
	f.told = nil
	return kinds
}

func (f *fixture) observe(o server.Observation) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.seen = append(f.seen, o)
	if f.heard != nil {
		f.heard <- o
	}
}

func (f *fixture) void(name, _ string) (bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.voids[name], nil
}

// book carries out orders as the command line does.
func (f *fixture) book() *orders.Book {
	f.t.Helper()
	records, err := audit.Open(f.dir, f.clock)
	f.check(err)
	return &orders.Book{Dir: f.dir, Policy: f.policies, Audit: records, Now: f.moment}
}

func (f *fixture) revoke(name string) {
	f.t.Helper()
	_, err := f.book().Revoke(orders.Order{Appliance: name, By: "ada", Why: "stolen"})
	f.check(err)
}

func (f *fixture) clock() time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.now
}

func (f *fixture) advance(d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.now = f.now.Add(d)
}

func prepare(t testing.TB) *fixture {
	t.Helper()
	f := &fixture{t: t, dir: t.TempDir(), log: &logBuffer{}, now: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC),
		token: map[string]keywire.Token{}, where: map[string]place.Sighting{}, voids: map[string]bool{}}
	f.keysDir = filepath.Join(t.TempDir(), "keys")
	f.check(os.Mkdir(f.keysDir, 0o700))
	var err error
	f.keys, err = keystore.Open(f.keysDir)
	f.check(err)
	f.policies = policy.Open(f.dir)
	// Every byte value that could trip a text protocol is in it.
	f.key = make([]byte, keywire.NewKey)
	_, err = rand.Read(f.key)
	f.check(err)
	copy(f.key, "\x00\r\n\xff\x04\x03~.")
	f.check(f.keys.Add(atticDisk, secret.New(bytes.Clone(f.key))))

	newKey := func(comment string) (secret.Text, string) {
		private, public, err := identity.New(comment)
		f.check(err)
		return private, public
	}
	hostPrivate, _ := newKey("key server")
	f.host, err = identity.Signer(hostPrivate)
	f.check(err)
	var atticPublic, shedPublic string
	f.attic, atticPublic = newKey("attic")
	f.shed, shedPublic = newKey("shed")
	f.stranger, _ = newKey("stranger")
	f.site = &site.Site{Name: "home", Appliances: []site.Appliance{
		{Name: "attic", ClientKey: atticPublic, LUKS: atticDisk, VPNAddress: netip.MustParseAddr("10.77.0.2")},
		{Name: "shed", ClientKey: shedPublic, LUKS: shedDisk},
	}}
	f.site.SetDefaults()
	return f
}

func (f *fixture) check(err error) {
	f.t.Helper()
	if err != nil {
		f.t.Fatal(err)
	}
}

func (f *fixture) start(limits sshverb.Limits) {
	f.t.Helper()
	records, err := audit.Open(f.dir, f.clock)
	f.check(err)
	last, err := orders.LastOrders(f.dir)
	f.check(err)
	s, err := server.New(server.Config{
		Site: f.site, HostKey: f.host, Keys: f.keys, Policy: f.policies, Audit: records,
		Log: slog.New(slog.NewTextHandler(f.log, nil)), Now: f.clock, Moment: f.moment, Limits: limits,
		Place: f.place, Alert: f.alert, Observe: f.observe, Void: f.void,
	}, last)
	f.check(err)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	f.check(err)
	f.address = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	f.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			f.t.Errorf("serve: %v", err)
		}
		if _, err := audit.Verify(f.dir); err != nil {
			f.t.Errorf("the audit log afterwards: %v", err)
		}
	})
}

func (f *fixture) dial(private secret.Text) (*sshverb.Client, error) {
	f.t.Helper()
	signer, err := identity.Signer(private)
	f.check(err)
	return sshverb.Dial(f.t.Context(), sshverb.Peer{Address: f.address, User: "ks", Identity: signer, HostKey: f.host.PublicKey()})
}

// ask sends one request over a connection of its own, with the token that the
// appliance has kept, and keeps the one that comes.
func (f *fixture) ask(private secret.Text, request string) ([]byte, error) {
	f.t.Helper()
	out, token, err := f.exchange(private, f.with(private, request))
	if token != "" {
		f.mu.Lock()
		f.token[private.Reveal()] = token
		f.mu.Unlock()
	}
	return out, err
}

// with puts the token that was kept behind a request that has none.
func (f *fixture) with(private secret.Text, request string) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	token := f.token[private.Reveal()]
	verb, _, _ := strings.Cut(request, " ")
	words := strings.Count(request, " ")
	if token != "" && (verb == "checkin" && words == 0 || (verb == "key" || verb == "lease") && words == 1) {
		request += " " + token.Reveal()
	}
	return request
}

// exchange sends one request as it is.
func (f *fixture) exchange(private secret.Text, request string) (out []byte, token keywire.Token, err error) {
	f.t.Helper()
	c, err := f.dial(private)
	if err != nil {
		return nil, "", err
	}
	defer c.Close()
	d, err := c.Start(f.t.Context(), request)
	if err != nil {
		return nil, "", err
	}
	d.Stdin.Close()
	out, err = io.ReadAll(io.LimitReader(d.Stdout, keywire.MaxKey+1))
	f.check(err)
	err = d.Wait()
	return out, keywire.ParseTokenLine(d.Stderr()), err
}

// last is the last record of the audit log.
func (f *fixture) last() (r audit.Record) {
	f.t.Helper()
	f.check(audit.Read(f.dir, func(_ []byte, one audit.Record) error { r = one; return nil }))
	return r
}

// refused checks that a request was refused and how it is on record.
func (f *fixture) refused(private secret.Text, request string, code int, reason string) {
	f.t.Helper()
	out, err := f.ask(private, request)
	if err == nil || hint.Code(err) != code {
		f.t.Fatalf("%s: %v (exit %d); want exit %d", request, err, hint.Code(err), code)
	}
	if len(out) > 0 {
		f.t.Errorf("%s: refused, and yet %d bytes came", request, len(out))
	}
	if r := f.last(); !strings.Contains(r.Reason, reason) || r.Decision == "granted" {
		f.t.Errorf("%s: on record is %+v; want the reason %q", request, r, reason)
	}
}

func (f *fixture) silentAboutKeys() {
	f.t.Helper()
	places := f.log.String()
	f.check(filepath.WalkDir(f.dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		text, err := os.ReadFile(path)
		places += string(text)
		return err
	}))
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, token := range f.token {
		if strings.Contains(places, token.Reveal()) {
			f.t.Error("a token is in the log or in the state folder")
		}
	}
	for _, form := range []string{string(f.key), fmt.Sprintf("%x", f.key), string(f.key[8:40])} {
		if strings.Contains(places, form) {
			f.t.Error("the key is in the log or in the state folder")
		}
	}
}

func TestGrants(t *testing.T) {
	f := prepare(t)
	f.start(sshverb.Limits{})
	out, err := f.ask(f.attic, "key "+atticDisk)
	if err != nil || !bytes.Equal(out, f.key) {
		t.Fatalf("key: %d bytes, %v", len(out), err)
	}
	if r := f.last(); r.Event != "key" || r.Decision != "granted" || r.Appliance != "attic" || r.UUID != atticDisk || !strings.HasPrefix(r.Remote, "127.0.0.1:") || !strings.HasPrefix(r.Identity, "SHA256:") {
		t.Errorf("on record: %+v", r)
	}
	out, err = f.ask(f.attic, "lease "+atticDisk)
	if lease, perr := keywire.ParseLease(out); err != nil || perr != nil || lease != keywire.NewLease(24*time.Hour) {
		t.Errorf("lease: %q, %v, %v", out, err, perr)
	}
	out, err = f.ask(f.shed, "checkin")
	if c, perr := keywire.ParseCheckin(out); err != nil || perr != nil || c.Appliance != "shed" {
		t.Errorf("checkin: %q, %v, %v", out, err, perr)
	}
	h, err := f.policies.Read("attic")
	if err != nil || len(h.Keys) != 1 || !h.LastKey.Wall.Equal(f.clock()) {
		t.Errorf("state: %+v, %v", h, err)
	}
	f.silentAboutKeys()
}

func TestRefusals(t *testing.T) {
	f := prepare(t)
	f.site.Appliances[0].KeyPolicy.KeysPerDay = 2
	f.start(sshverb.Limits{})
	f.refused(f.shed, "key "+atticDisk, hint.ExitRefused, policy.ReasonForeignDisk)
	f.refused(f.attic, "lease "+shedDisk, hint.ExitRefused, policy.ReasonForeignDisk)
	f.refused(f.attic, "key 99999999-2222-3333-4444-555555555555", hint.ExitRefused, policy.ReasonForeignDisk)
	f.refused(f.shed, "key "+shedDisk, hint.ExitFailure, keystore.ErrNoKey.Error())
	f.refused(f.attic, "key", hint.ExitUsage, "malformed")
	f.refused(f.attic, "key ../../etc/passwd", hint.ExitUsage, "malformed")
	f.refused(f.attic, "key "+strings.ToUpper(atticDisk), hint.ExitUsage, "malformed")
	f.refused(f.attic, "status", hint.ExitUsage, "malformed")
	f.refused(f.attic, "key "+strings.Repeat("a", 3000), hint.ExitUsage, "malformed")

	if _, err := f.ask(f.stranger, "checkin"); hint.Code(err) != hint.ExitRefused {
		t.Errorf("a stranger: %v", err)
	}
	if r := f.last(); r.Event != "connect" || r.Reason != "unknown SSH key" || r.Appliance != "" {
		t.Errorf("on record about a stranger: %+v", r)
	}

	for range 2 {
		if _, err := f.ask(f.attic, "key "+atticDisk); err != nil {
			t.Fatal(err)
		}
	}
	f.refused(f.attic, "key "+atticDisk, hint.ExitRefused, policy.ReasonTooOften)
	f.advance(24 * time.Hour)
	if _, err := f.ask(f.attic, "key "+atticDisk); err != nil {
		t.Errorf("a day later: %v", err)
	}
	f.silentAboutKeys()
}

// What a refused peer is told does not depend on why.
func TestRefusalsLookAlike(t *testing.T) {
	f := prepare(t)
	f.start(sshverb.Limits{})
	_, foreign := f.ask(f.shed, "key "+atticDisk)
	f.revoke("attic")
	_, revoked := f.ask(f.attic, "key "+atticDisk)
	f.site.Appliances[1].KeyPolicy.Source = "vpn"
	_, place := f.ask(f.shed, "key "+shedDisk)
	for _, err := range []error{foreign, revoked, place} {
		var told *sshverb.Error
		if !errors.As(err, &told) || told.Text != "refused" || told.Hint != "" || told.Code != hint.ExitRefused {
			t.Errorf("the peer learns %v", err)
		}
	}
}

// An appliance that gave up waiting has asked again by then, and shown a newer
// token: what it gave up is not judged any more.
func TestGivenUp(t *testing.T) {
	f := prepare(t)
	waits := make(chan struct{})
	f.heard = make(chan server.Observation, 1)
	f.hold = func(ctx context.Context) {
		close(waits)
		<-ctx.Done()
	}
	f.start(sshverb.Limits{})
	before, err := f.policies.Read("attic")
	f.check(err)
	c, err := f.dial(f.attic)
	f.check(err)
	_, err = c.Start(t.Context(), "key "+atticDisk)
	f.check(err)
	<-waits
	c.Close()
	if o := <-f.heard; o.Verdict != "failed" {
		t.Errorf("it was %s", o.Verdict)
	}
	after, err := f.policies.Read("attic")
	f.check(err)
	if d := cmp.Diff(before, after); d != "" {
		t.Errorf("something was counted: -before +after\n%s", d)
	}
}

func TestRevokedWhileServing(t *testing.T) {
	f := prepare(t)
	f.start(sshverb.Limits{})
	if _, err := f.ask(f.attic, "key "+atticDisk); err != nil {
		t.Fatal(err)
	}
	f.revoke("attic")
	for _, request := range []string{"key " + atticDisk, "lease " + atticDisk, "checkin"} {
		f.refused(f.attic, request, hint.ExitRefused, policy.ReasonRevoked)
	}
	f.check(f.book().Allow(orders.Order{Appliance: "attic", By: "ada", Why: "found"}))
	if _, err := f.ask(f.attic, "key "+atticDisk); err != nil {
		t.Errorf("allowed again: %v", err)
	}
}

func TestRevocationOutlivesItsFile(t *testing.T) {
	f := prepare(t)
	records, err := audit.Open(f.dir, f.clock)
	f.check(err)
	_, err = records.Append(audit.Record{Event: "revoke", Decision: "done", Appliance: "attic", Reason: "stolen"})
	f.check(err)
	// Its standing is lost, shed's came back from an old copy that says enabled.
	f.check(f.policies.Update("shed", func(s policy.State) (policy.State, error) {
		s.Standing = policy.Standing{State: policy.Enabled, Since: f.clock()}
		return s, nil
	}))
	_, err = records.Append(audit.Record{Event: "revoke", Decision: "done", Appliance: "shed", Reason: "stolen too"})
	f.check(err)
	f.start(sshverb.Limits{})
	f.refused(f.attic, "key "+atticDisk, hint.ExitRefused, policy.ReasonRevoked)
	f.refused(f.shed, "checkin", hint.ExitRefused, policy.ReasonRevoked)
}

func TestDamagedStandingMeansNo(t *testing.T) {
	f := prepare(t)
	f.start(sshverb.Limits{})
	f.check(os.WriteFile(filepath.Join(f.dir, "appliances", "attic.json"), []byte("{"), 0o600))
	f.refused(f.attic, "key "+atticDisk, hint.ExitFailure, "attic.json")
	f.check(os.Remove(filepath.Join(f.dir, "appliances", "attic.json")))
	f.refused(f.attic, "key "+atticDisk, hint.ExitRefused, policy.ReasonNoStanding)
}

// One damaged state costs that appliance its key, also over a restart, and no other.
func TestDamagedStateStopsOneAppliance(t *testing.T) {
	f := prepare(t)
	f.check(f.keys.Add(shedDisk, secret.New(bytes.Clone(f.key))))
	f.check(os.MkdirAll(filepath.Join(f.dir, "appliances"), 0o700))
	f.check(os.WriteFile(filepath.Join(f.dir, "appliances", "attic.json"), []byte("{"), 0o600))
	f.start(sshverb.Limits{})
	if kinds := f.alerts(); !slices.Equal(kinds, []string{alert.StateUnreadable}) {
		t.Errorf("alerts: %v", kinds)
	}
	f.refused(f.attic, "key "+atticDisk, hint.ExitFailure, "attic.json")
	if out, err := f.ask(f.shed, "key "+shedDisk); err != nil || !bytes.Equal(out, f.key) {
		t.Error(err)
	}
}

func TestLooseKeyFileMeansNo(t *testing.T) {
	f := prepare(t)
	f.start(sshverb.Limits{})
	f.check(os.Chmod(filepath.Join(f.keysDir, keywire.KeyFile(atticDisk)), 0o640))
	f.refused(f.attic, "key "+atticDisk, hint.ExitFailure, "mode 0640")
}

// No key without a record: a full disk, played by a small tmpfs.
func TestNoKeyWhenTheDiskIsFull(t *testing.T) {
	f := prepare(t)
	f.dir = filepath.Join(t.TempDir(), "state")
	f.check(os.Mkdir(f.dir, 0o700))
	if err := unix.Mount("tmpfs", f.dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatalf("mount a small tmpfs (the tests run as root): %v", err)
	}
	t.Cleanup(func() { f.check(unix.Unmount(f.dir, unix.MNT_DETACH)) })
	f.policies = policy.Open(f.dir)
	f.start(sshverb.Limits{})
	if _, err := f.ask(f.attic, "key "+atticDisk); err != nil {
		t.Fatal(err)
	}
	filler, err := os.Create(filepath.Join(f.dir, "filler"))
	f.check(err)
	for err == nil {
		_, err = filler.Write(make([]byte, 4096))
	}
	f.check(filler.Close())
	// The rest of the audit log's last page may take a few records more.
	for range 40 {
		var out []byte
		if out, err = f.ask(f.attic, "key "+atticDisk); err != nil {
			if len(out) > 0 || hint.Code(err) != hint.ExitFailure {
				t.Errorf("%d bytes came with %v", len(out), err)
			}
			break
		}
	}
	if err == nil {
		t.Fatal("keys were given out on a full disk")
	}
	f.check(os.Remove(filler.Name()))
	if _, err := f.ask(f.attic, "key "+atticDisk); err != nil {
		t.Errorf("with room again: %v", err)
	}
}

// A flood of equal refusals is counted, not written one by one.
func TestFloodDoesNotFillTheDisk(t *testing.T) {
	f := prepare(t)
	f.start(sshverb.Limits{})
	for range 100 {
		if _, err := f.ask(f.shed, "key "+atticDisk); hint.Code(err) != hint.ExitRefused {
			t.Fatal(err)
		}
	}
	count := func() (refused, repeated, more int) {
		f.check(audit.Read(f.dir, func(_ []byte, r audit.Record) error {
			switch {
			case r.Event == "repeated":
				repeated, more = repeated+1, more+r.Count
			case r.Appliance == "shed" && r.Decision == "refused":
				refused++
			}
			return nil
		}))
		return refused, repeated, more
	}
	if refused, repeated, _ := count(); refused != 20 || repeated != 0 {
		t.Errorf("%d refusals written, %d counts", refused, repeated)
	}
	f.advance(time.Hour)
	f.refused(f.shed, "key "+atticDisk, hint.ExitRefused, policy.ReasonForeignDisk)
	if refused, repeated, more := count(); refused != 21 || repeated != 1 || more != 80 {
		t.Errorf("%d refusals, %d counts, of %d more", refused, repeated, more)
	}
}

func TestConcurrentRequestsAreCountedOneByOne(t *testing.T) {
	f := prepare(t)
	f.site.Appliances[0].KeyPolicy.KeysPerDay = 5
	f.start(sshverb.Limits{})
	var granted int
	var mu sync.Mutex
	var g sync.WaitGroup
	for range 12 {
		g.Go(func() {
			out, err := f.ask(f.attic, "key "+atticDisk)
			mu.Lock()
			defer mu.Unlock()
			if err == nil && bytes.Equal(out, f.key) {
				granted++
			}
		})
	}
	g.Wait()
	if granted != 5 {
		t.Errorf("%d keys were given out; 5 are allowed", granted)
	}
}

// A peer that connects and says nothing, or too little, loses its place; one
// address cannot take them all.
func TestConnectionsAreBounded(t *testing.T) {
	f := prepare(t)
	f.start(sshverb.Limits{Handshake: 2 * time.Second})
	var open []net.Conn
	for range 40 {
		conn, err := net.Dial("tcp", f.address)
		f.check(err)
		defer conn.Close()
		open = append(open, conn)
	}
	served := 0
	for _, conn := range open {
		f.check(conn.SetReadDeadline(time.Now().Add(time.Minute)))
		b := make([]byte, 16)
		if n, _ := conn.Read(b); n > 0 {
			served++
		}
	}
	if served != 16 {
		t.Errorf("%d connections of one address were served; want 16", served)
	}
	// Reading on to the end waits for the handshake's bound, not for a guess.
	for _, conn := range open {
		if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error("a silent connection was kept")
		}
	}
	if _, err := f.ask(f.attic, "checkin"); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// TestOpenSSH shows that a machine with nothing of ours can use the server.
func TestOpenSSH(t *testing.T) {
	sshPath, err := exec.LookPath("ssh")
	if err != nil {
		t.Fatal("ssh is missing: apt install openssh-client")
	}
	f := prepare(t)
	f.start(sshverb.Limits{})
	version, err := exec.Command(sshPath, "-V").CombinedOutput()
	f.check(err)
	t.Logf("%s", bytes.TrimSpace(version))

	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		f.check(os.WriteFile(path, []byte(text), 0o600))
		return path
	}
	_, port, err := net.SplitHostPort(f.address)
	f.check(err)
	hosts := write("known_hosts", fmt.Sprintf("[127.0.0.1]:%s %s\n", port, identity.Line(f.host.PublicKey(), "")))
	run := func(id string, words ...string) (stdout, stderr []byte, code int) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, sshPath, append([]string{"-F", "/dev/null", "-T", "-i", id, "-o", "IdentitiesOnly=yes",
			"-o", "UserKnownHostsFile=" + hosts, "-o", "StrictHostKeyChecking=yes", "-o", "BatchMode=yes", "-p", port, "ks@127.0.0.1"}, words...)...)
		var out, diag bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &diag
		err := cmd.Run()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
		return out.Bytes(), diag.Bytes(), cmd.ProcessState.ExitCode()
	}
	attic, shed, stranger := write("attic", f.attic.Reveal()), write("shed", f.shed.Reveal()), write("stranger", f.stranger.Reveal())

	// The token of each grant goes with the next request, and the key alone is on
	// standard output.
	var token keywire.Token
	claims := []string{"boot=" + strings.Repeat("0a", 16), "serial=10000000deadbeef", "up=99", "slots=2"}
	for n, words := range [][]string{{"key", atticDisk}, {"key", atticDisk, "TOKEN"}, append([]string{"key", atticDisk, "TOKEN"}, claims...), {"key", atticDisk + " TOKEN slots=2"}} {
		for i := range words {
			words[i] = strings.ReplaceAll(words[i], "TOKEN", token.Reveal())
		}
		out, diag, code := run(attic, words...)
		next := keywire.ParseTokenLine(string(diag))
		if code != 0 || !bytes.Equal(out, f.key) || next == "" || next == token || string(diag) != keywire.TokenLine(next) {
			t.Fatalf("key, time %d: exit %d, %d bytes, %q", n, code, len(out), diag)
		}
		token = next
	}
	if out, diag, code := run(attic, "lease", atticDisk, token.Reveal()); code != 0 || string(out) != `{"seconds":86400,"renew":300}`+"\n" || len(diag) > 0 {
		t.Errorf("lease: exit %d, %q, %q", code, out, diag)
	}
	if out, _, code := run(attic, "checkin", token.Reveal(), "up=100"); code != 0 || string(out) != `{"appliance":"attic"}`+"\n" {
		t.Errorf("checkin: exit %d, %q", code, out)
	}
	if out, _, code := run(attic, "dark", atticDisk); code != 0 || string(out) != `{"appliance":"attic"}`+"\n" {
		t.Errorf("dark: exit %d, %q", code, out)
	}
	// A copy of the card knows an older token only.
	if out, diag, code := run(attic, "key", atticDisk, keywire.NewToken().Reveal()); code != hint.ExitRefused || len(out) > 0 || string(diag) != "refused\n" {
		t.Errorf("another token: exit %d, %d bytes, %q", code, len(out), diag)
	}
	if kinds := f.alerts(); !slices.Equal(kinds, []string{alert.Dark, alert.TokenMismatch}) {
		t.Errorf("alerts: %v", kinds)
	}
	if out, diag, code := run(shed, "key", atticDisk); code != hint.ExitRefused || len(out) > 0 || string(diag) != "refused\n" {
		t.Errorf("another appliance's key: exit %d, %d bytes, %q", code, len(out), diag)
	}
	if out, diag, code := run(stranger, "key", atticDisk); code != 255 || len(out) > 0 || !bytes.Contains(diag, []byte("Permission denied (publickey)")) {
		t.Errorf("a stranger: exit %d, %d bytes, %q", code, len(out), diag)
	}
	if out, _, code := run(attic, "sh -c 'cat /etc/passwd'"); code != hint.ExitUsage || len(out) > 0 {
		t.Errorf("a command: exit %d, %q", code, out)
	}
	if out, _, code := run(attic); code != hint.ExitUsage || len(out) > 0 {
		t.Errorf("a shell: exit %d, %q", code, out)
	}
	f.revoke("attic")
	if out, diag, code := run(attic, "key", atticDisk); code != hint.ExitRefused || len(out) > 0 || string(diag) != "refused\n" {
		t.Errorf("revoked: exit %d, %d bytes, %q", code, len(out), diag)
	}
	f.silentAboutKeys()
}

// BenchmarkKey is one appliance's opening: connection, handshake, decision,
// history and audit record on the disk, key.
func BenchmarkKey(b *testing.B) {
	f := prepare(b)
	f.site.Appliances[0].KeyPolicy.KeysPerDay = 48
	f.start(sshverb.Limits{})
	for b.Loop() {
		if out, err := f.ask(f.attic, "key "+atticDisk); err != nil || !bytes.Equal(out, f.key) {
			b.Fatal(err)
		}
		f.advance(time.Hour)
	}
}

// BenchmarkKeysAtOnce is what comes back together after a power cut.
func BenchmarkKeysAtOnce(b *testing.B) {
	f := prepare(b)
	f.site.Appliances[0].KeyPolicy.KeysPerDay = 1 << 30
	f.start(sshverb.Limits{})
	b.SetParallelism(4)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := f.ask(f.attic, "key "+atticDisk); err != nil {
				b.Error(err)
				return
			}
			f.advance(time.Hour)
		}
	})
}
