package vpn

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"farkeep/shared/secret"
	"farkeep/shared/settings"

	"github.com/google/go-cmp/cmp"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// fake is WireGuard as seen by wgctrl: it makes a handshake when a peer has an
// endpoint at which somebody answers.
type fake struct {
	mu      sync.Mutex
	answers map[string]bool // endpoints at which home is
	device  wgtypes.Device
	pointed []string // endpoints in the order in which they were set
	removed int
	broken  error
}

func (f *fake) ConfigureDevice(_ string, c wgtypes.Config) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.broken != nil {
		return f.broken
	}
	for _, p := range c.Peers {
		i := slices.IndexFunc(f.device.Peers, func(q wgtypes.Peer) bool { return q.PublicKey == p.PublicKey })
		switch {
		case p.Remove:
			f.removed++
			if i >= 0 {
				f.device.Peers = slices.Delete(f.device.Peers, i, i+1)
			}
			continue
		case i < 0 && p.UpdateOnly:
			continue
		case i < 0:
			f.device.Peers = append(f.device.Peers, wgtypes.Peer{PublicKey: p.PublicKey})
			i = len(f.device.Peers) - 1
		}
		if p.Endpoint != nil {
			f.device.Peers[i].Endpoint = p.Endpoint
			f.pointed = append(f.pointed, p.Endpoint.String())
		}
	}
	return nil
}

func (f *fake) Device(string) (*wgtypes.Device, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.broken != nil {
		return nil, f.broken
	}
	// Rekeys as WireGuard does with a keepalive: every two minutes.
	for i, p := range f.device.Peers {
		if p.Endpoint != nil && f.answers[p.Endpoint.String()] && time.Since(p.LastHandshakeTime) > 2*time.Minute {
			f.device.Peers[i].LastHandshakeTime = time.Now().Round(0)
		}
	}
	d := f.device
	d.Peers = slices.Clone(d.Peers)
	return &d, nil
}

func (f *fake) home(endpoints ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.answers = map[string]bool{}
	for _, e := range endpoints {
		f.answers[e] = true
	}
}

func (f *fake) tried() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.pointed)
}

var names = map[string][]netip.Addr{
	"home.example": {netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("198.51.100.1")},
	"evil.example": {netip.MustParseAddr("10.77.0.1"), netip.IPv4Unspecified(), netip.MustParseAddr("ff02::1")},
}

func resolve(_ context.Context, host string) ([]netip.Addr, error) {
	if a, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{a}, nil
	}
	if host == "dynamic.example" { // a line that gets a new address each hour
		return []netip.Addr{netip.AddrFrom4([4]byte{198, 51, 100, byte(time.Now().Hour())})}, nil
	}
	if a := names[host]; a != nil {
		return a, nil
	}
	return nil, errors.New("no such name")
}

func testSettings(t *testing.T, endpoints ...string) settings.VPN {
	t.Helper()
	key, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	home, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	return settings.VPN{
		Interface: "farkeep0", PrivateKey: secret.Text(key.String()), Address: netip.MustParsePrefix("10.77.0.2/24"),
		Peers: []settings.Peer{{
			Name: "home", PublicKey: home.PublicKey().String(), Endpoints: endpoints, Keepalive: settings.Duration(25 * time.Second),
			AllowedIPs: []netip.Prefix{netip.MustParsePrefix("10.77.0.0/24")},
		}},
	}
}

// tend runs a tunnel over the fake inside a synctest bubble.
func tend(t *testing.T, f *fake, s settings.VPN) (up func() bool) {
	t.Helper()
	tun := New(s, slog.New(slog.DiscardHandler))
	tun.resolve = resolve
	if err := tun.configure(f); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var mu sync.Mutex
	var last []Peer
	done := make(chan error)
	go func() {
		done <- tun.tend(ctx, f, func(p []Peer) { mu.Lock(); defer mu.Unlock(); last = p })
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return func() bool {
		mu.Lock()
		defer mu.Unlock()
		return len(last) == 1 && last[0].Up
	}
}

func TestEndpointsInTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fake{}
		up := tend(t, f, testSettings(t, "192.168.1.9:51820", "home.example:51820", "unknown.example:1", "evil.example:51820"))
		f.home("198.51.100.1:51820")
		time.Sleep(30 * time.Second)
		want := []string{"192.168.1.9:51820", "[2001:db8::1]:51820", "198.51.100.1:51820"}
		if diff := cmp.Diff(want, f.tried()); diff != "" || !up() {
			t.Errorf("up %v\n%s", up(), diff)
		}
		// A tunnel that works is left alone.
		time.Sleep(24 * time.Hour)
		if len(f.tried()) != 3 || !up() {
			t.Errorf("up %v, tried %v", up(), f.tried())
		}
		// Home moves to another address: found within a few minutes.
		f.home("192.168.1.9:51820")
		time.Sleep(handshakeMax + time.Minute)
		if !up() {
			t.Errorf("home has moved; tried %v", f.tried())
		}
	})
}

func TestNamesAreResolvedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fake{}
		up := tend(t, f, testSettings(t, "dynamic.example:51820"))
		// Home is found wherever its name leads, hours after the first look.
		time.Sleep(3*time.Hour + 30*time.Minute)
		f.home("198.51.100.3:51820")
		time.Sleep(2*longestTurn + resolveTime)
		if !up() {
			t.Errorf("tried %v", f.tried())
		}
	})
}

func TestNobodyAnswersForADay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fake{}
		tend(t, f, testSettings(t, "192.168.1.9:51820", "home.example:51820"))
		time.Sleep(24 * time.Hour)
		if n := len(f.tried()); n < 24*60/2 || n > 24*60*2 {
			t.Errorf("%d endpoints tried in a day", n)
		}
	})
}

func TestARestartLeavesALivingTunnelAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fake{}
		s := testSettings(t, "192.168.1.9:51820")
		key, _ := wgtypes.ParseKey(s.Peers[0].PublicKey)
		f.device.Peers = []wgtypes.Peer{
			{PublicKey: key, LastHandshakeTime: time.Now().Add(-time.Minute), Endpoint: &net.UDPAddr{IP: net.IPv4(198, 51, 100, 9), Port: 7}},
			{PublicKey: wgtypes.Key{1}},
		}
		f.home("198.51.100.9:7")
		up := tend(t, f, s)
		time.Sleep(10 * time.Minute)
		if !up() || len(f.tried()) != 0 || f.removed != 1 {
			t.Errorf("up %v, tried %v, removed %d", up(), f.tried(), f.removed)
		}
	})
}

func TestAgeIgnoresTheWallClock(t *testing.T) {
	r := newRotation(settings.Peer{}, firstTurn, resolve, func(netip.Addr) bool { return false })
	// The handshake happened while the clock was years ahead or behind.
	for _, wall := range []time.Time{time.Now().AddDate(3, 0, 0), time.Now().AddDate(2, 0, 0)} {
		if !r.observe(wall) {
			t.Errorf("a new handshake at %v does not count", wall)
		}
	}
	if r = newRotation(settings.Peer{}, firstTurn, resolve, nil); r.observe(time.Now().Add(-time.Hour)) || r.observe(time.Time{}) {
		t.Error("an old handshake that an earlier process left counts")
	}
}

func TestKeysStayOutOfErrors(t *testing.T) {
	s := testSettings(t, "192.168.1.9:1")
	good := s.PrivateKey.Reveal()
	s.PrivateKey = secret.Text(good[:20])
	err := New(s, slog.New(slog.DiscardHandler)).configure(&fake{})
	if err == nil || strings.Contains(err.Error(), good[:8]) {
		t.Errorf("got %v", err)
	}
	s.PrivateKey = secret.Text(good)
	if err := New(s, slog.New(slog.DiscardHandler)).configure(&fake{broken: os.ErrPermission}); !errors.Is(err, os.ErrPermission) {
		t.Errorf("got %v", err)
	}
}
