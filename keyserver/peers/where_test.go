package peers_test

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"farkeep/keyserver/moment"
	"farkeep/keyserver/peers"
	"farkeep/keyserver/place"
	"farkeep/shared/hint"
	"farkeep/shared/sshverb"

	"golang.org/x/crypto/ssh"
)

var atticInVPN = netip.MustParseAddr("10.77.0.2")

// sees is a VPN that has one peer.
func sees(t *testing.T, key string) func(context.Context, string, netip.Addr) (place.Sighting, error) {
	return func(_ context.Context, source string, from netip.Addr) (place.Sighting, error) {
		now, err := moment.Now(time.Now)
		if err != nil || source != place.SourceWireGuard || from != atticInVPN {
			return place.Sighting{}, err
		}
		at := netip.MustParseAddrPort("84.150.1.2:40000")
		return place.Sighting{Boot: now.Boot, Source: source, Peer: key, Trail: []place.Visit{
			{Network: place.NetworkOf(at.Addr()), Endpoint: at, First: now.Up - time.Minute, Last: now.Up - time.Second},
		}}, nil
	}
}

// A key server that sees no places asks the others: who knows is believed, who is
// away, silent, blind or confused delays nobody who has an answer.
func TestWhere(t *testing.T) {
	nodes := newSite(t, []string{"cabin", "home", "blind", "confused", "dead", "silent"}, func(name string, c *peers.Config) {
		c.Connect = time.Minute // so that only WhereWait ends the waiting for who says nothing
		switch name {
		case "home":
			c.Place = sees(t, "attic's")
		case "confused":
			c.Place = func(context.Context, string, netip.Addr) (place.Sighting, error) {
				return place.Sighting{}, errors.New("no file")
			}
		}
	})
	cabin, home, blind, confused := nodes[0].peers, nodes[1], nodes[2], nodes[3]
	nodes[4].listener.Close()
	home.serve(t)
	blind.serve(t)
	confused.serve(t) // and silent listens, takes connections, and says nothing
	if err := cabin.Blind(); err != nil {
		t.Errorf("nobody asked yet: %v", err)
	}
	began := time.Now()
	seen, err := cabin.Where(t.Context(), place.SourceWireGuard, atticInVPN)
	if err != nil || seen.Peer != "attic's" || seen.Here().Network.Name != "84.150.0.0/16" {
		t.Errorf("got %+v, %v", seen, err)
	}
	if took := time.Since(began); took >= peers.WhereWait {
		t.Errorf("who says nothing kept everybody waiting for %v", took)
	}
	if now, err := moment.Now(time.Now); err != nil || seen.Boot != now.Boot || now.Up-seen.Here().Last < time.Second {
		t.Errorf("%+v at %+v, %v", seen, now, err)
	}
	if err := cabin.Blind(); err != nil {
		t.Error(err)
	}
}

func TestWhereNobodyKnows(t *testing.T) {
	answers := func(name string, c *peers.Config) { c.Connect = 2 * time.Second }
	nodes := newSite(t, []string{"cabin", "blind", "dead"}, answers)
	nodes[2].listener.Close()
	nodes[1].serve(t)
	cabin := nodes[0].peers
	if seen, err := cabin.Where(t.Context(), place.SourceWireGuard, atticInVPN); err != nil || seen.Known() || cabin.Blind() != nil {
		t.Errorf("one answers, and knows nothing: %+v, %v, %v", seen, err, cabin.Blind())
	}

	nodes = newSite(t, []string{"cabin", "dead"}, answers)
	nodes[1].listener.Close()
	cabin = nodes[0].peers
	if seen, err := cabin.Where(t.Context(), place.SourceWireGuard, atticInVPN); err == nil || seen.Known() || !strings.Contains(err.Error(), "ask the key server dead where 10.77.0.2 is") || cabin.Blind() == nil {
		t.Errorf("nobody answers: %+v, %v, %v", seen, err, cabin.Blind())
	}
	if _, err := newSite(t, []string{"alone"}, nil)[0].peers.Where(t.Context(), place.SourceWireGuard, atticInVPN); err == nil {
		t.Error("there is nobody to ask")
	}
	// Another machine under the address of one that knows.
	nodes = newSite(t, []string{"cabin", "home"}, func(name string, c *peers.Config) {
		c.Place = sees(t, "attic's")
		if name == "home" {
			c.HostKey = signer(t, "impostor")
		}
	})
	nodes[1].key = signer(t, "impostor")
	nodes[1].serve(t)
	if seen, err := nodes[0].peers.Where(t.Context(), place.SourceWireGuard, atticInVPN); err == nil || seen.Known() {
		t.Errorf("an impostor was believed: %+v, %v", seen, err)
	}
}

// A peer that answers with what no VPN says is not believed.
func TestWhereLies(t *testing.T) {
	nodes := newSite(t, []string{"cabin", "liar"}, nil)
	cabin, liar := nodes[0].peers, nodes[1]
	var lie atomic.Pointer[string]
	s := &sshverb.Server{
		HostKey: liar.key, Log: quiet(t),
		Authorise: func(ssh.PublicKey, net.Addr) (*ssh.Permissions, error) { return &ssh.Permissions{}, nil },
		Exec: func(_ context.Context, s *sshverb.Session) error {
			_, err := s.Stdout.Write([]byte(*lie.Load()))
			return err
		},
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx, liar.listener) }()
	defer func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	for _, text := range []string{"", "{", strings.Repeat("x", 2*place.MaxTold), `{"source":"wireguard","peer":"k","trail":[{"network":{"name":"84.150.0.0/16"},"endpoint":"91.20.1.2:1","first":9,"last":3}]}`} {
		lie.Store(&text)
		if seen, err := cabin.Where(t.Context(), place.SourceWireGuard, atticInVPN); err == nil || seen.Known() {
			t.Errorf("%.40q was believed: %+v", text, seen)
		}
	}
}

func TestWhatIsNoQuestion(t *testing.T) {
	nodes := newSite(t, []string{"one", "two"}, func(_ string, c *peers.Config) { c.Place = sees(t, "attic's") })
	nodes[1].serve(t)
	c, err := sshverb.Dial(t.Context(), sshverb.Peer{Address: nodes[1].listener.Addr().String(), User: "x", Identity: nodes[0].key, HostKey: nodes[1].key.PublicKey()})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, verb := range []string{"peer-place", "peer-place 10.77.0.2", "peer-place attic wireguard", "peer-place 10.77.0.2/24 wireguard", "peer-place 10.77.0.2 carrier", "peer-place 10.77.0.2 wireguard x"} {
		if out, err := c.Run(t.Context(), verb, nil, place.MaxTold); hint.Code(err) != hint.ExitUsage {
			t.Errorf("%s: %q, %v", verb, out, err)
		}
	}
	// By hand, with a stock ssh: of who is unknown it tells nothing.
	for _, verb := range []string{"peer-place 10.77.0.3 wireguard", "peer-place fd77::3 wireguard", "peer-place 10.77.0.2 tailscale"} {
		if out, err := c.Run(t.Context(), verb, nil, place.MaxTold); err != nil || string(out) != "{}\n" {
			t.Errorf("%s: %q, %v", verb, out, err)
		}
	}
}
