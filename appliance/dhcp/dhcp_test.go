package dhcp

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

	"farkeep/appliance/dhcp/dhcptest"
	"farkeep/appliance/network/nettest"

	"github.com/google/go-cmp/cmp"
	"github.com/insomniacslk/dhcp/dhcpv4"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

var good = dhcptest.Behaviour{
	Self:      net.IPv4(192, 0, 2, 1),
	Address:   net.IPv4(192, 0, 2, 50),
	Mask:      net.CIDRMask(24, 32),
	Router:    net.IPv4(192, 0, 2, 1),
	Resolvers: []net.IP{net.IPv4(192, 0, 2, 1)},
	Lease:     time.Hour,
}

var goodLease = Lease{
	Address:   netip.MustParsePrefix("192.0.2.50/24"),
	Gateway:   netip.MustParseAddr("192.0.2.1"),
	Resolvers: []netip.Addr{netip.MustParseAddr("192.0.2.1")},
	Server:    netip.MustParseAddr("192.0.2.1"),
	Renew:     30 * time.Minute, Rebind: 3150 * time.Second, Valid: time.Hour,
}

func equateAddrs() cmp.Option {
	return cmp.Options{cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })}
}

func TestParse(t *testing.T) {
	change := func(f func(*dhcptest.Behaviour)) dhcptest.Behaviour { b := good; f(&b); return b }
	lease := func(f func(*Lease)) Lease { l := goodLease; f(&l); return l }
	for _, tt := range []struct {
		name string
		b    dhcptest.Behaviour
		want Lease
		err  string
	}{
		{"good", good, goodLease, ""},
		{"no router, no resolvers", change(func(b *dhcptest.Behaviour) { b.Router, b.Resolvers = nil, nil }),
			lease(func(l *Lease) { l.Gateway, l.Resolvers = netip.Addr{}, nil }), ""},
		{"a lease of seconds is a minute", change(func(b *dhcptest.Behaviour) { b.Lease = 3 * time.Second }),
			lease(func(l *Lease) { l.Valid, l.Rebind, l.Renew = time.Minute, 52500*time.Millisecond, 30*time.Second }), ""},
		{"a lease of 136 years is a week", change(func(b *dhcptest.Behaviour) { b.Lease = 0xffffffff * time.Second }),
			lease(func(l *Lease) { l.Valid, l.Rebind, l.Renew = maxLease, maxLease*7/8, maxLease/2 }), ""},
		{"T1 after the end", change(func(b *dhcptest.Behaviour) { b.Renew = 2 * time.Hour }), goodLease, ""},
		{"T1 of the server", change(func(b *dhcptest.Behaviour) { b.Renew = 10 * time.Minute }),
			lease(func(l *Lease) { l.Renew = 10 * time.Minute }), ""},
		{"too many resolvers, and bad ones", change(func(b *dhcptest.Behaviour) {
			b.Resolvers = []net.IP{net.IPv4(127, 0, 0, 1), net.IPv4(192, 0, 2, 7), net.IPv4(192, 0, 2, 7), net.IPv4(192, 0, 2, 8), net.IPv4(192, 0, 2, 9), net.IPv4(192, 0, 2, 10)}
		}), lease(func(l *Lease) {
			l.Resolvers = []netip.Addr{netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("192.0.2.8"), netip.MustParseAddr("192.0.2.9")}
		}), ""},
		{"point to point", change(func(b *dhcptest.Behaviour) { b.Mask = net.CIDRMask(32, 32) }),
			lease(func(l *Lease) { l.Address = netip.MustParsePrefix("192.0.2.50/32") }), ""},
		{"loopback", change(func(b *dhcptest.Behaviour) { b.Address = net.IPv4(127, 0, 0, 1) }), Lease{}, "not a host's address"},
		{"no address", change(func(b *dhcptest.Behaviour) { b.Address = net.IPv4zero }), Lease{}, "not a host's address"},
		{"multicast", change(func(b *dhcptest.Behaviour) { b.Address = net.IPv4(224, 0, 0, 1) }), Lease{}, "not a host's address"},
		{"the broadcast address", change(func(b *dhcptest.Behaviour) { b.Address = net.IPv4(192, 0, 2, 255) }), Lease{}, "the network's own"},
		{"the network's address", change(func(b *dhcptest.Behaviour) { b.Address = net.IPv4(192, 0, 2, 0) }), Lease{}, "the network's own"},
		{"the whole internet as one LAN", change(func(b *dhcptest.Behaviour) { b.Mask = net.CIDRMask(0, 32) }), Lease{}, "subnet mask"},
		{"a mask with holes", change(func(b *dhcptest.Behaviour) { b.Mask = net.IPv4Mask(255, 0, 255, 0) }), Lease{}, "subnet mask"},
		{"itself as router", change(func(b *dhcptest.Behaviour) { b.Router = b.Address }), Lease{}, "cannot be one"},
		{"no server identifier", change(func(b *dhcptest.Behaviour) { b.Self = net.IPv4zero }), Lease{}, "server identifier"},
		{"no lease time", change(func(b *dhcptest.Behaviour) { b.Lease = 0 }), Lease{}, "no lease time"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			request, err := dhcpv4.NewDiscovery(net.HardwareAddr{2, 0, 0, 0, 0, 1})
			if err != nil {
				t.Fatal(err)
			}
			m, err := dhcptest.Answer(request, dhcpv4.MessageTypeAck, tt.b)
			if err != nil {
				t.Fatal(err)
			}
			got, err := parse(m)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("got %v; want %q", err, tt.err)
				}
				return
			}
			if diff := cmp.Diff(tt.want, got, equateAddrs()); err != nil || diff != "" {
				t.Errorf("%v\n%s", err, diff)
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	request, err := dhcpv4.NewDiscovery(net.HardwareAddr{2, 0, 0, 0, 0, 1})
	if err != nil {
		f.Fatal(err)
	}
	m, err := dhcptest.Answer(request, dhcpv4.MessageTypeAck, good)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(m.ToBytes())
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := dhcpv4.FromBytes(data)
		if err != nil {
			return
		}
		l, err := parse(m)
		if err != nil {
			return
		}
		if l.Renew <= 0 || l.Renew > l.Rebind || l.Rebind >= l.Valid || l.Valid > maxLease || len(l.Resolvers) > maxResolvers ||
			l.Address.Bits() < 8 || l.Address.Addr().IsLoopback() || l.Gateway == l.Address.Addr() {
			t.Errorf("%+v", l)
		}
	})
}

// server is an exchanger whose answers the test makes.
type server struct {
	mu     sync.Mutex
	answer func(renew, anyServer bool) (Lease, error)
	asked  []string // "acquire", "renew" or "rebind", and when
	start  time.Time
	had    []netip.Addr
}

func (s *server) note(what string) func(renew, anyServer bool) (Lease, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked = append(s.asked, what)
	return s.answer
}

func (s *server) acquire(_ context.Context, had netip.Addr) (Lease, error) {
	answer := s.note("acquire")
	s.mu.Lock()
	s.had = append(s.had, had)
	s.mu.Unlock()
	return answer(false, false)
}

func (s *server) renew(_ context.Context, _ Lease, anyServer bool) (Lease, error) {
	what := "renew"
	if anyServer {
		what = "rebind"
	}
	return s.note(what)(true, anyServer)
}

func TestLifeOfALease(t *testing.T) {
	silent := errors.New("no answer")
	for _, tt := range []struct {
		name   string
		answer func(renew, anyServer bool) (Lease, error)
		run    time.Duration
		asked  []string // distinct kinds, in order
		lost   int
	}{
		{"renewed for ever", func(bool, bool) (Lease, error) { return goodLease, nil }, 12 * time.Hour, []string{"acquire", "renew"}, 0},
		{"the server is gone", func(renew, _ bool) (Lease, error) {
			if renew {
				return Lease{}, silent
			}
			return goodLease, nil
		}, 61 * time.Minute, []string{"acquire", "renew", "rebind", "acquire"}, 1},
		{"another server knows it", func(renew, anyServer bool) (Lease, error) {
			if renew && !anyServer {
				return Lease{}, silent
			}
			return goodLease, nil
		}, 12 * time.Hour, []string{"acquire", "renew", "rebind", "renew", "rebind"}, 0},
		{"refused at the renewal", func(renew, _ bool) (Lease, error) {
			if renew {
				return Lease{}, errRefused
			}
			return goodLease, nil
		}, 31 * time.Minute, []string{"acquire", "renew", "acquire"}, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &server{answer: tt.answer, start: time.Now()}
				applied, lost := 0, 0
				c := Config{Interface: "eth0", Log: slog.New(slog.DiscardHandler),
					Apply: func(Lease) error { applied++; return nil },
					Lost:  func(Lease) { lost++ }}
				ctx, cancel := context.WithTimeout(t.Context(), tt.run)
				defer cancel()
				c.run(ctx, s)
				kinds := slices.Compact(slices.Clone(s.asked))
				if len(kinds) > len(tt.asked) {
					kinds = kinds[:len(tt.asked)]
				}
				if diff := cmp.Diff(tt.asked, kinds); diff != "" || lost != tt.lost || applied == 0 {
					t.Errorf("lost %d, applied %d\n%s", lost, applied, diff)
				}
				if len(s.asked) > int(tt.run/time.Minute) {
					t.Errorf("%d requests in %v", len(s.asked), tt.run)
				}
				if tt.lost > 0 && s.had[len(s.had)-1] != goodLease.Address.Addr() {
					t.Error("the address that was had is not asked for again")
				}
			})
		})
	}
}

func TestNobodyAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &server{answer: func(bool, bool) (Lease, error) { return Lease{}, errors.New("no answer") }}
		ctx, cancel := context.WithTimeout(t.Context(), 24*time.Hour)
		defer cancel()
		Config{Log: slog.New(slog.DiscardHandler)}.run(ctx, s)
		if n := len(s.asked); n < 24*60/3 || n > 24*60*3 {
			t.Errorf("asked %d times in a day", n)
		}
	})
}

// keep runs the real thing against a real server over a veth pair and returns
// what it applied.
func keep(t *testing.T, b dhcptest.Behaviour, accept func(Lease) error) (chan Lease, chan Lease, *dhcptest.Server) {
	t.Helper()
	client, far := nettest.Veth(t, "eth0", "far0")
	nettest.Up(t, client, "")
	nettest.Up(t, far, "192.0.2.1/24")
	s := dhcptest.Start(t, "far0", b)
	applied, lost := make(chan Lease, 16), make(chan Lease, 16)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		Run(ctx, Config{Interface: "eth0", Accept: accept, Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
			Apply: func(l Lease) error { applied <- l; return nil },
			Lost:  func(l Lease) { lost <- l }})
	}()
	t.Cleanup(func() { cancel(); <-done })
	return applied, lost, s
}

func TestRealServer(t *testing.T) {
	applied, _, s := keep(t, good, nil)
	select {
	case got := <-applied:
		if diff := cmp.Diff(goodLease, got, equateAddrs()); diff != "" {
			t.Error(diff)
		}
	case <-time.After(time.Minute):
		t.Fatal("no lease; the server saw ", s.Messages())
	}
	// The same exchange, as a renewal.
	w := &wire{name: "eth0", accept: func(Lease) error { return nil }}
	moved := good
	moved.Lease = 2 * time.Hour
	s.Set(moved)
	for _, anyServer := range []bool{false, true} {
		if l, err := w.renew(t.Context(), goodLease, anyServer); err != nil || l.Valid != 2*time.Hour {
			t.Errorf("renew: %+v, %v", l, err)
		}
	}
	moved.Refuse = true
	s.Set(moved)
	if _, err := w.renew(t.Context(), goodLease, false); !errors.Is(err, errRefused) {
		t.Errorf("refused: %v", err)
	}
	if _, err := w.acquire(t.Context(), netip.Addr{}); !errors.Is(err, errRefused) {
		t.Errorf("refused: %v", err)
	}
}

func TestOfferThatTheCallerRefuses(t *testing.T) {
	refused := make(chan Lease, 16)
	applied, _, _ := keep(t, good, func(l Lease) error {
		select {
		case refused <- l:
		default:
		}
		return errors.New("that is the VPN's")
	})
	<-refused
	select {
	case l := <-applied:
		t.Errorf("applied %+v", l)
	default:
	}
}
