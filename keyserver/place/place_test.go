package place_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"farkeep/keyserver/moment"
	"farkeep/keyserver/place"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

const boot = "0123456789abcdef0123456789abcdef"

var atVPN = netip.MustParseAddr("10.77.0.2")

func TestNetworkOf(t *testing.T) {
	for address, want := range map[string]string{
		"84.150.1.2":           "84.150.0.0/16",
		"::ffff:84.150.1.2":    "84.150.0.0/16",
		"100.64.3.4":           "100.64.0.0/16",
		"192.168.1.7":          "192.168.1.0/24",
		"10.1.2.3":             "10.1.2.0/24",
		"127.0.0.1":            "127.0.0.0/24",
		"169.254.1.1":          "169.254.1.0/24",
		"2003:e1:7f00:1::2":    "2003:e1::/32",
		"fd12:3456:789a:1::2":  "fd12:3456:789a::/48",
		"fe80::1%eth0":         "fe80::/48",
		"2001:db8:ffff:ffff::": "2001:db8::/32",
	} {
		n := place.NetworkOf(netip.MustParseAddr(address))
		if n.Name != want || !n.Valid() {
			t.Errorf("%s: %+v, valid %v; want %s", address, n, n.Valid(), want)
		}
	}
	if n := place.NetworkOf(netip.Addr{}); n != (place.Network{}) || n.Valid() || n.Same(n) || n.String() != "unknown" {
		t.Errorf("no address: %+v", n)
	}
	a, b := place.NetworkOf(netip.MustParseAddr("84.150.1.2")), place.NetworkOf(netip.MustParseAddr("91.20.1.2"))
	if a.Same(b) || !a.Same(a) {
		t.Error("networks are told apart by name")
	}
	a.AS, b.AS = 3320, 3320
	if !a.Same(b) || a.String() != "84.150.0.0/16 (AS3320)" {
		t.Errorf("%s and %s have one AS", a, b)
	}
	for _, bad := range []string{"", "84.150.1.2", "84.150.1.2/16", "relay:", "relay:FRA", "relay:a b", "relay:" + strings.Repeat("a", 33), "fe80::%eth0/64"} {
		if (place.Network{Name: bad}).Valid() {
			t.Errorf("%q is a network", bad)
		}
	}
}

// trail writes a peer's visits as "network first-last", in seconds.
func trail(s place.Sighting) (all []string) {
	for _, v := range s.Trail {
		all = append(all, fmt.Sprintf("%s %d-%d", v.Network, v.First/time.Second, v.Last/time.Second))
	}
	return all
}

func TestRecorder(t *testing.T) {
	type look struct {
		at       int // seconds
		endpoint string
		received uint64
	}
	const home, homeAgain, away, third = "84.150.1.2:1000", "84.150.9.9:7", "91.20.1.2:1000", "46.80.1.2:5"
	toAndFro := func(n int) (looks []look) {
		looks = append(looks, look{1, home, 1})
		for i := range n {
			looks = append(looks, look{2 + i*20, []string{home, away}[i%2], uint64(2 + i)})
		}
		return looks
	}
	for _, tt := range []struct {
		name  string
		looks []look
		want  []string
		flaps bool
	}{
		{"never heard", []look{{1, "", 0}, {2, "", 0}}, nil, false},
		{"an endpoint of which nothing comes", []look{{1, home, 0}, {2, home, 0}}, nil, false},
		{"what came before the first look says nothing", []look{{1, home, 500}, {2, home, 500}}, nil, false},
		{"heard", []look{{1, home, 500}, {2, home, 501}}, []string{"84.150.0.0/16 2-2"}, false},
		{"heard, then silent", []look{{1, home, 1}, {2, home, 2}, {3, home, 3}, {4, home, 3}, {90, home, 3}}, []string{"84.150.0.0/16 2-3"}, false},
		{"another address of the network", []look{{1, home, 1}, {2, home, 2}, {60, homeAgain, 3}}, []string{"84.150.0.0/16 2-60"}, false},
		{"another network", []look{{1, home, 1}, {2, home, 2}, {60, away, 3}, {70, away, 4}}, []string{"84.150.0.0/16 2-2", "91.20.0.0/16 60-70"}, false},
		{"the interface was made anew", []look{{1, home, 900}, {2, home, 901}, {5, home, 0}, {6, home, 20}}, []string{"84.150.0.0/16 2-6"}, false},
		{"there and back", []look{{1, home, 1}, {2, home, 2}, {3, away, 3}, {4, home, 4}}, []string{"84.150.0.0/16 2-2", "91.20.0.0/16 3-3", "84.150.0.0/16 4-4"}, false},
		{"to and fro", toAndFro(6), []string{"84.150.0.0/16 2-2", "91.20.0.0/16 22-22", "84.150.0.0/16 42-42", "91.20.0.0/16 62-62", "84.150.0.0/16 82-82", "91.20.0.0/16 102-102"}, true},
		{"to and fro, once", toAndFro(3), []string{"84.150.0.0/16 2-2", "91.20.0.0/16 22-22", "84.150.0.0/16 42-42"}, false},
		{"to and fro, an hour ago", append(toAndFro(6), look{3700, away, 99}), []string{"84.150.0.0/16 2-2", "91.20.0.0/16 22-22", "84.150.0.0/16 42-42", "91.20.0.0/16 62-62", "84.150.0.0/16 82-82", "91.20.0.0/16 102-3700"}, false},
		{"three lines, each once", []look{{1, home, 1}, {2, home, 2}, {3, away, 3}, {4, third, 4}}, []string{"84.150.0.0/16 2-2", "91.20.0.0/16 3-3", "46.80.0.0/16 4-4"}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := place.NewRecorder(boot, place.File{}, nil)
			var f place.File
			for _, l := range tt.looks {
				endpoint, _ := netip.ParseAddrPort(l.endpoint)
				f = r.Observe(time.Duration(l.at)*time.Second, []place.Observation{{Source: place.SourceWireGuard, Peer: "k", Allowed: []netip.Prefix{netip.PrefixFrom(atVPN, 32)}, Endpoint: endpoint, Received: l.received}})
				f = reread(t, f)
				r = place.NewRecorder(boot, f, nil) // it may be restarted at any time
			}
			s := f.Sighting(place.SourceWireGuard, atVPN)
			if diff := cmp.Diff(tt.want, trail(s)); diff != "" || s.Flaps != tt.flaps {
				t.Errorf("flaps %v\n%s", s.Flaps, diff)
			}
		})
	}
}

func TestTwoSendersBehindOneAddressTranslator(t *testing.T) {
	r := place.NewRecorder(boot, place.File{}, nil)
	var f place.File
	for i := range 12 {
		f = r.Observe(time.Duration(i)*25*time.Second, []place.Observation{{Source: place.SourceWireGuard, Peer: "k", Allowed: []netip.Prefix{netip.PrefixFrom(atVPN, 32)},
			Endpoint: netip.MustParseAddrPort(fmt.Sprintf("84.150.1.2:%d", 1000+i%2)), Received: uint64(i + 1)}})
	}
	if s := f.Sighting(place.SourceWireGuard, atVPN); !s.Flaps || len(s.Trail) != 1 {
		t.Errorf("%+v flaps %v", trail(s), s.Flaps)
	}
}

// Tailscale tries several paths of one machine.
func TestTailscalePathsAreOneSender(t *testing.T) {
	r := place.NewRecorder(boot, place.File{}, nil)
	var f place.File
	for i := range 12 {
		f = r.Observe(time.Duration(i)*25*time.Second, []place.Observation{{Source: place.SourceTailscale, Peer: "k", Allowed: []netip.Prefix{netip.PrefixFrom(atVPN, 32)},
			Endpoint: netip.MustParseAddrPort(fmt.Sprintf("84.150.1.2:%d", 1000+i%2)), Received: uint64(i + 1)}})
	}
	if s := f.Sighting(place.SourceTailscale, atVPN); s.Flaps {
		t.Errorf("%+v flaps", trail(s))
	}
}

func TestAnotherBootKnowsNothing(t *testing.T) {
	r := place.NewRecorder(boot, place.File{}, nil)
	o := place.Observation{Source: place.SourceWireGuard, Peer: "k", Allowed: []netip.Prefix{netip.PrefixFrom(atVPN, 32)}, Endpoint: netip.MustParseAddrPort("84.150.1.2:1")}
	for i := range 3 {
		o.Received = uint64(i)
		r.Observe(time.Duration(i)*time.Second, []place.Observation{o})
	}
	f := r.Observe(3*time.Second, []place.Observation{o})
	other := place.NewRecorder(strings.Repeat("f", 32), f, nil).Observe(time.Second, []place.Observation{o})
	if s := other.Sighting(place.SourceWireGuard, atVPN); s.Known() {
		t.Errorf("%+v", s.Trail)
	}
	// A VPN that does not answer is not one without peers.
	quiet := place.NewRecorder(boot, f, nil).Observe(time.Minute, nil, place.SourceWireGuard)
	if s := quiet.Sighting(place.SourceWireGuard, atVPN); !s.Known() || s.Here().Last > 3*time.Second {
		t.Errorf("%+v", s.Trail)
	}
	if gone := place.NewRecorder(boot, f, nil).Observe(time.Minute, nil); len(gone.Peers) != 0 {
		t.Errorf("a peer that is gone is there: %+v", gone.Peers)
	}
}

func reread(t testing.TB, f place.File) place.File {
	t.Helper()
	path := filepath.Join(t.TempDir(), "endpoints.json")
	if err := f.Write(path); err != nil {
		t.Fatal(err)
	}
	g, err := place.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

func TestWhoseAddress(t *testing.T) {
	f := place.File{Version: 1, Boot: boot, Taken: time.Minute, Peers: []place.Peer{
		{Source: place.SourceWireGuard, Peer: "home", Allowed: []netip.Prefix{netip.MustParsePrefix("10.77.0.0/24")}},
		{Source: place.SourceWireGuard, Peer: "attic", Allowed: []netip.Prefix{netip.MustParsePrefix("10.77.0.2/32"), netip.MustParsePrefix("fd00::2/128")}},
		{Source: place.SourceTailscale, Peer: "nodekey:1", Allowed: []netip.Prefix{netip.MustParsePrefix("100.64.0.2/32")}},
	}}
	for _, tt := range []struct{ source, from, want string }{
		{"wireguard", "10.77.0.2", "attic"}, {"wireguard", "::ffff:10.77.0.2", "attic"}, {"wireguard", "fd00::2", "attic"}, {"wireguard", "10.77.0.3", "home"},
		{"wireguard", "100.64.0.2", ""}, {"tailscale", "100.64.0.2", "nodekey:1"}, {"tailscale", "10.77.0.2", ""}, {"", "10.77.0.2", ""},
	} {
		if s := f.Sighting(tt.source, netip.MustParseAddr(tt.from)); s.Peer != tt.want {
			t.Errorf("%s %s: %q; want %q", tt.source, tt.from, s.Peer, tt.want)
		}
	}
	if s := f.Sighting("wireguard", netip.Addr{}); s.Peer != "" {
		t.Errorf("no address: %+v", s)
	}
}

const status = `{
  "Version": "1.90.1", "BackendState": "Running", "Self": {"PublicKey": "nodekey:00", "CurAddr": "", "RxBytes": 0},
  "Peer": {
    "nodekey:aa": {"ID": "n1", "PublicKey": "nodekey:aa", "HostName": "attic", "TailscaleIPs": ["100.64.0.2", "fd7a:115c:a1e0::2"], "Addrs": ["203.0.113.9:41641"],
      "CurAddr": "84.150.1.2:41641", "Relay": "fra", "PeerRelay": "", "RxBytes": 1234, "TxBytes": 99, "Online": true},
    "nodekey:bb": {"PublicKey": "nodekey:bb", "TailscaleIPs": ["100.64.0.3"], "CurAddr": "", "Relay": "nyc", "RxBytes": 7},
    "nodekey:cc": {"PublicKey": "nodekey:cc", "TailscaleIPs": ["100.64.0.4"], "CurAddr": "", "Relay": "nyc", "PeerRelay": "192.0.2.1:7:vni:1", "RxBytes": 7},
    "nodekey:dd": {"PublicKey": "nodekey:dd", "TailscaleIPs": null, "CurAddr": "[2003:e1::1]:5", "Relay": "", "RxBytes": 0},
    "nodekey:ee": {"PublicKey": "nodekey:another", "CurAddr": "84.150.1.2:41641", "RxBytes": 1},
    "nodekey:ff": {"PublicKey": "nodekey:ff", "CurAddr": "somewhere", "RxBytes": 1},
    "nodekey:11": null
  }
}`

func TestTailscale(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "tailscaled.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	answer := status
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/localapi/v0/status" || r.Host != "local-tailscaled.sock" {
			http.NotFound(w, r)
			return
		}
		fmt.Fprint(w, answer)
	})}
	go srv.Serve(l)
	defer srv.Close()
	ts := place.OpenTailscale(socket)
	got, err := ts.Observe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := []place.Observation{
		{Source: "tailscale", Peer: "nodekey:aa", Allowed: []netip.Prefix{netip.MustParsePrefix("100.64.0.2/32"), netip.MustParsePrefix("fd7a:115c:a1e0::2/128")}, Endpoint: netip.MustParseAddrPort("84.150.1.2:41641"), Received: 1234},
		{Source: "tailscale", Peer: "nodekey:bb", Allowed: []netip.Prefix{netip.MustParsePrefix("100.64.0.3/32")}, Relay: "nyc", Received: 7},
		{Source: "tailscale", Peer: "nodekey:cc", Allowed: []netip.Prefix{netip.MustParsePrefix("100.64.0.4/32")}, Relay: "peer", Received: 7},
		{Source: "tailscale", Peer: "nodekey:dd", Endpoint: netip.MustParseAddrPort("[2003:e1::1]:5")},
	}
	if diff := cmp.Diff(want, got, cmpopts.SortSlices(func(a, b place.Observation) bool { return a.Peer < b.Peer }), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }), cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
	answer = `{"BackendState":"Stopped","Peer":{"nodekey:aa":{"PublicKey":"nodekey:aa","CurAddr":"84.150.1.2:41641"}}}`
	if got, err := ts.Observe(t.Context()); err != nil || len(got) != 0 {
		t.Errorf("stopped: %v, %v", got, err)
	}
	for _, bad := range []string{"", "{}", "[]", `{"BackendState":"Running","Peer":[]}`, `{"BackendState":"Running"`, strings.Repeat(" ", 9<<20)} {
		answer = bad
		if got, err := ts.Observe(t.Context()); err == nil {
			t.Errorf("%.30q: %v", bad, got)
		}
	}
	srv.Close()
	if _, err := ts.Observe(t.Context()); err == nil {
		t.Error("nobody answers, and peers are known")
	}
}

func TestTable(t *testing.T) {
	table, err := place.ParseTable(strings.NewReader("# a comment\n84.128.0.0\t84.191.255.255\t3320\tDE\tDTAG Internet service provider operations\r\n1.0.0.0\t1.0.0.255\t0\tNone\tNot routed\n" +
		"2003::\t2003:1fff:ffff:ffff:ffff:ffff:ffff:ffff\t3320\tDE\tDTAG\n198.51.100.0/24 AS64496\n203.0.113.0/24 64497\n0.0.0.1\t0.0.0.1\t1\n\n"))
	if err != nil || table.Len() != 5 {
		t.Fatal(err)
	}
	for address, want := range map[string]uint32{
		"84.128.0.0": 3320, "84.191.255.255": 3320, "84.127.255.255": 0, "84.192.0.0": 0, "::ffff:84.150.0.1": 3320, "1.0.0.1": 0, "2003:e1::1": 3320, "2004::": 0,
		"198.51.100.255": 64496, "198.51.101.0": 0, "203.0.113.0": 64497, "0.0.0.1": 1, "0.0.0.0": 0, "255.255.255.255": 0, "::": 0, "::1": 0, "2003:e1::1%eth0": 3320,
	} {
		if as := table.AS(netip.MustParseAddr(address)); as != want {
			t.Errorf("%s is announced by %d; want %d", address, as, want)
		}
	}
	if table.AS(netip.Addr{}) != 0 || (&place.Table{}).AS(atVPN) != 0 {
		t.Error("nothing is announced by somebody")
	}
	for _, bad := range []string{
		"1.0.0.0\t2.0.0.0", "x", "1.0.0.0/8", "1.0.0.0/8 x", "1.0.0.1/8 5", "2.0.0.0\t1.0.0.0\t5", "1.0.0.0\t::1\t5", "1.0.0.0\t1.0.0.255\t-1", "1.0.0.0\t1.0.0.255\t4294967296",
		"1.0.0.0/8 5\n1.2.0.0/16 6", "1.0.0.0\t1.0.0.9\t5\n1.0.0.9\t1.0.0.10\t5", strings.Repeat("1", 5000), "fe80::%eth0\tfe80::1%eth0\t5",
	} {
		if table, err := place.ParseTable(strings.NewReader(bad)); err == nil {
			t.Errorf("%.40q: %+v", bad, table)
		}
	}
}

// TestReader asks for a look that is taken after the question, whatever lies there.
func TestReader(t *testing.T) {
	path := filepath.Join(t.TempDir(), "endpoints.json")
	at := moment.Moment{Boot: boot, Up: time.Hour}
	reader := place.NewReader(path, func() (moment.Moment, error) { return at, nil })
	f := place.File{Version: 1, Boot: boot, Taken: time.Hour, Peers: []place.Peer{{Source: place.SourceWireGuard, Peer: "k", Allowed: []netip.Prefix{netip.PrefixFrom(atVPN, 32)}}}}
	write := func(f place.File) {
		t.Helper()
		if err := f.Write(path); err != nil {
			t.Fatal(err)
		}
	}
	now, cancel := context.WithCancel(t.Context())
	cancel() // nobody waits
	look := func() (place.Sighting, error) { return reader.Look(now, place.SourceWireGuard, atVPN) }
	if s, err := look(); !errors.Is(err, os.ErrNotExist) || s.Peer != "" {
		t.Errorf("no file: %+v, %v", s, err)
	}
	write(f)
	if s, err := look(); err != nil || s.Peer != "k" {
		t.Errorf("a look from just now: %+v, %v", s, err)
	}
	at.Up += time.Second
	if s, err := look(); err == nil || s.Peer != "" {
		t.Errorf("a look from before: %+v", s)
	}
	f.Taken += 2 * time.Second
	write(f)
	if s, err := look(); err != nil || s.Peer != "k" {
		t.Errorf("a new look: %+v, %v", s, err)
	}
	f.Boot = strings.Repeat("e", 32)
	write(f)
	if s, err := look(); err == nil || s.Peer != "" {
		t.Errorf("another boot's look: %+v", s)
	}
	if _, err := reader.Age(); err == nil {
		t.Error("another boot's look has an age")
	}
	if err := os.WriteFile(path, []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	if s, err := look(); err == nil || s.Peer != "" {
		t.Errorf("garbage: %+v", s)
	}
}

// TestWatch goes on when one of two VPNs does not answer, and when a table that
// was good is replaced by a bad one.
func TestWatch(t *testing.T) {
	dir := t.TempDir()
	path, table := filepath.Join(dir, "run", "endpoints.json"), filepath.Join(dir, "table")
	if err := os.WriteFile(table, []byte("84.128.0.0/10 3320\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	looks := make(chan int)
	n := 0
	w := &place.Watch{
		Path: path, Table: table, Every: time.Millisecond, Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
		Now: func() (moment.Moment, error) {
			n++
			return moment.Moment{Boot: boot, Up: time.Duration(n) * time.Second}, nil
		},
		Looks: []place.Look{
			{Source: place.SourceTailscale, Observe: func(context.Context) ([]place.Observation, error) { return nil, errors.New("not running") }},
			{Source: place.SourceWireGuard, Observe: func(context.Context) ([]place.Observation, error) {
				select {
				case looks <- n:
				case <-ctx.Done():
				}
				return []place.Observation{{Source: place.SourceWireGuard, Peer: "k", Allowed: []netip.Prefix{netip.PrefixFrom(atVPN, 32)}, Endpoint: netip.MustParseAddrPort("84.150.1.2:1"), Received: uint64(n)}}, nil
			}},
		},
	}
	done := make(chan error)
	go func() { done <- w.Run(ctx) }()
	for range 3 {
		<-looks
	}
	if err := os.WriteFile(table, []byte("nonsense, and longer\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		<-looks
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	f, err := place.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if s := f.Sighting(place.SourceWireGuard, atVPN); s.Here().Network != (place.Network{Name: "84.150.0.0/16", AS: 3320}) {
		t.Errorf("%+v", s)
	}
	var out bytes.Buffer
	w.Looks = w.Looks[1:]
	if err := w.Once(t.Context(), &out); err != nil || !strings.Contains(out.String(), "wireguard k [10.77.0.2/32]: 84.150.1.2:1 in 84.150.0.0/16") {
		t.Errorf("%q, %v", out.String(), err)
	}
}

func FuzzFile(f *testing.F) {
	r := place.NewRecorder(boot, place.File{}, nil)
	var file place.File
	for i := range 9 {
		file = r.Observe(time.Duration(i)*time.Second, []place.Observation{
			{Source: place.SourceWireGuard, Peer: "k", Allowed: []netip.Prefix{netip.PrefixFrom(atVPN, 32)}, Endpoint: netip.MustParseAddrPort([]string{"84.150.1.2:1", "[2003:e1::1]:2"}[i%2]), Received: uint64(i)},
			{Source: place.SourceTailscale, Peer: "nodekey:a", Relay: "fra", Received: uint64(i)},
		})
	}
	text, err := json.Marshal(file)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte(`{"version":1,"boot":"` + boot + `","taken":1,"peers":[]}`))
	f.Add([]byte(`{"version":2}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		file, err := place.ParseFile(text)
		if err != nil {
			return
		}
		again, err := json.Marshal(file)
		if err != nil {
			t.Fatal(err)
		}
		same, err := place.ParseFile(again)
		if err != nil {
			t.Fatalf("what was read cannot be read again: %v", err)
		}
		if third, _ := json.Marshal(same); !bytes.Equal(third, again) {
			t.Errorf("%s\n%s", again, third)
		}
		for _, p := range file.Peers {
			for _, v := range p.Trail {
				if v.Last > file.Taken || v.First > v.Last || !v.Network.Valid() {
					t.Errorf("a visit that makes no sense: %+v", v)
				}
			}
			for _, a := range p.Allowed {
				if s := file.Sighting(p.Source, a.Addr()); s.Peer == "" {
					t.Errorf("%v is nobody's", a)
				}
			}
		}
	})
}

func FuzzTailscale(f *testing.F) {
	f.Add([]byte(status))
	f.Add([]byte(`{"BackendState":"Running","Peer":{}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		all, err := place.ParseTailscale(text)
		if err != nil {
			return
		}
		r := place.NewRecorder(boot, place.File{}, nil)
		r.Observe(time.Second, all)
		for i := range all {
			all[i].Received++
		}
		file := r.Observe(2*time.Second, all)
		out, err := json.Marshal(file)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := place.ParseFile(out); err != nil {
			t.Errorf("what Tailscale said makes a file that cannot be read: %v", err)
		}
	})
}

func FuzzTable(f *testing.F) {
	f.Add("84.128.0.0\t84.191.255.255\t3320\tDE\tDTAG\n198.51.100.0/24 AS64496\n2003::/19 3320\n", "84.150.1.2")
	f.Add("0.0.0.0/0 1\n::/0 2\n", "::1")
	f.Fuzz(func(t *testing.T, text, address string) {
		table, err := place.ParseTable(strings.NewReader(text))
		a, bad := netip.ParseAddr(address)
		if err != nil || bad != nil {
			return
		}
		as := table.AS(a)
		if as != 0 && !strings.Contains(text, fmt.Sprint(as)) && !strings.Contains(text, "0") {
			t.Errorf("%v is announced by %d, of which the table does not speak", a, as)
		}
		if table.Len() == 0 && as != 0 {
			t.Errorf("an empty table says %d", as)
		}
	})
}

// BenchmarkFile is what a look at 500 peers costs each side.
func BenchmarkFile(b *testing.B) {
	r := place.NewRecorder(boot, place.File{}, nil)
	var file place.File
	for i := range 4 {
		var all []place.Observation
		for n := range 500 {
			all = append(all, place.Observation{Source: place.SourceWireGuard, Peer: fmt.Sprintf("%044d", n), Allowed: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 77, byte(n >> 8), byte(n)}), 32)},
				Endpoint: netip.AddrPortFrom(netip.AddrFrom4([4]byte{84, byte(150 + i%2), 1, 1}), uint16(1000+n)), Received: uint64(i)})
		}
		file = r.Observe(time.Duration(i)*time.Second, all)
	}
	path := filepath.Join(b.TempDir(), "endpoints.json")
	b.Run("write", func(b *testing.B) {
		for b.Loop() {
			if err := file.Write(path); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("read", func(b *testing.B) {
		for b.Loop() {
			if _, err := place.ReadFile(path); err != nil {
				b.Fatal(err)
			}
		}
	})
}
