package hometunnel_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"farkeep/image/hometunnel"
	"farkeep/shared/identity"
	"farkeep/shared/secret"
)

var (
	homeAddress = netip.MustParseAddr("10.77.0.1")
	piAddress   = netip.MustParseAddr("10.77.0.2")
)

// pair is home, and a peer that plays the appliance: it knows home's endpoint and speaks first.
func pair(t *testing.T) (home, pi *hometunnel.Home, piKey string) {
	t.Helper()
	homePrivate, homePublic := keys(t)
	piPrivate, piKey := keys(t)
	shared, err := identity.NewPreshared()
	if err != nil {
		t.Fatal(err)
	}
	home = start(t, hometunnel.Config{
		PrivateKey: homePrivate, Address: homeAddress,
		Peers: []hometunnel.Peer{{
			PublicKey: piKey, PresharedKey: shared, AllowedIPs: []netip.Prefix{netip.PrefixFrom(piAddress, 32)},
		}},
	})
	pi = start(t, hometunnel.Config{
		PrivateKey: piPrivate, Address: piAddress,
		Peers: []hometunnel.Peer{{
			PublicKey: homePublic, PresharedKey: shared, AllowedIPs: []netip.Prefix{netip.PrefixFrom(homeAddress, 32)},
			Endpoint:  netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), home.Port()),
			Keepalive: time.Second,
		}},
	})
	return home, pi, piKey
}

func keys(t *testing.T) (secret.Text, string) {
	t.Helper()
	private, public, err := identity.NewWireGuard()
	if err != nil {
		t.Fatal(err)
	}
	return private, public
}

func start(t *testing.T, cfg hometunnel.Config) *hometunnel.Home {
	t.Helper()
	cfg.Logger = slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
	h, err := hometunnel.Start(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	return h
}

func TestBothWays(t *testing.T) {
	home, pi, piKey := pair(t)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	if err := home.WaitHandshake(ctx, piKey, time.Time{}); err != nil {
		t.Fatal(err)
	}
	peers, err := home.Peers()
	if err != nil || len(peers) != 1 || !strings.HasPrefix(peers[0].Endpoint, "127.0.0.1:") {
		t.Errorf("home knows %+v, %v", peers, err)
	}
	for _, c := range []struct {
		name       string
		from, to   *hometunnel.Home
		address    string
		listenHost string
	}{
		{"home to appliance", home, pi, "10.77.0.2:22", ""},
		{"appliance to home", pi, home, "10.77.0.1:7022", "10.77.0.1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, port, _ := net.SplitHostPort(c.address)
			l, err := c.to.Listen("tcp", net.JoinHostPort(c.listenHost, port))
			if err != nil {
				t.Fatal(err)
			}
			go echo(l)
			conn, err := c.from.DialContext(ctx, "tcp", c.address)
			if err != nil {
				t.Fatal(err)
			}
			roundTrip(t, conn, 3<<20)
			if err := l.Close(); err != nil {
				t.Error(err)
			}
			if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
				t.Errorf("accept on a closed listener: %v", err)
			}
		})
	}
}

// Separate programs on the host: a server reached from the VPN, and a client that reaches into it.
func TestForwardAndExpose(t *testing.T) {
	home, pi, _ := pair(t)
	server, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	go echo(server)
	if err := home.Forward(7022, server.Addr().String()); err != nil {
		t.Fatal(err)
	}
	in, err := pi.Listen("tcp", ":22")
	if err != nil {
		t.Fatal(err)
	}
	go echo(in)
	at, err := home.Expose("127.0.0.1:0", netip.AddrPortFrom(piAddress, 22))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()

	a, err := pi.DialContext(ctx, "tcp", "10.77.0.1:7022")
	if err != nil {
		t.Fatal(err)
	}
	roundTrip(t, a, 100_000)
	b, err := net.Dial("tcp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	roundTrip(t, b, 100_000)

	// Close ends what goes through.
	c, err := net.Dial("tcp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if err := home.Close(); err != nil {
		t.Error(err)
	}
	if n, err := c.Read(make([]byte, 1)); err == nil {
		t.Errorf("read %d bytes through a closed tunnel", n)
	}
	if _, err := net.Dial("tcp", at.String()); err == nil {
		t.Error("the exposed port is open after Close")
	}
	if err := home.Forward(7023, "127.0.0.1:1"); err == nil {
		t.Error("a closed home forwards")
	}
}

func TestRefuses(t *testing.T) {
	private, _ := keys(t)
	_, public := keys(t)
	good := hometunnel.Config{PrivateKey: private, Address: homeAddress, Peers: []hometunnel.Peer{{PublicKey: public}}}
	for _, c := range []struct {
		name  string
		spoil func(*hometunnel.Config)
		want  string
	}{
		{"no address", func(c *hometunnel.Config) { c.Address = netip.Addr{} }, "address in the VPN is missing"},
		{"private key", func(c *hometunnel.Config) { c.PrivateKey = "c2hvcnQ=" }, "private key: this is not a WireGuard key"},
		{"public key", func(c *hometunnel.Config) { c.Peers = []hometunnel.Peer{{PublicKey: "x"}} }, "peer 1: public key"},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := good
			c.spoil(&cfg)
			h, err := hometunnel.Start(cfg)
			if err == nil {
				h.Close()
				t.Fatal("started")
			}
			if !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "c2hvcnQ=") {
				t.Errorf("%v, want %q and no key", err, c.want)
			}
		})
	}

	h := start(t, good)
	if _, err := h.DialContext(t.Context(), "udp", "10.77.0.2:53"); err == nil {
		t.Error("dialled UDP")
	}
	if _, err := h.DialContext(t.Context(), "tcp", "pi.example:22"); err == nil {
		t.Error("dialled a name")
	}
	if _, err := h.Expose("0.0.0.0:0", netip.AddrPortFrom(piAddress, 22)); err == nil || !strings.Contains(err.Error(), "loopback") {
		t.Errorf("exposed to the whole network: %v", err)
	}
	// Two homes cannot share a port, and the second one says which.
	second := good
	second.ListenPort = h.Port()
	if _, err := hometunnel.Start(second); err == nil || !strings.Contains(err.Error(), "UDP port") {
		t.Errorf("two homes on one port: %v", err)
	}
	// Nobody has spoken yet: dialling waits, as long as it may.
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := h.DialContext(ctx, "tcp", "10.77.0.2:22"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("dial before the first handshake: %v", err)
	}
	if err := h.WaitHandshake(ctx, public, time.Time{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("wait for a handshake that does not come: %v", err)
	}
}

func echo(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			io.Copy(c, c)
			if h, ok := c.(interface{ CloseWrite() error }); ok {
				h.CloseWrite()
			}
		}()
	}
}

// roundTrip sends size bytes, ends its direction, and wants all of them back.
func roundTrip(t *testing.T, c net.Conn, size int) {
	t.Helper()
	defer c.Close()
	sent := make([]byte, size)
	rand.Read(sent)
	go func() {
		c.Write(sent)
		c.(interface{ CloseWrite() error }).CloseWrite()
	}()
	c.SetReadDeadline(time.Now().Add(2 * time.Minute))
	got, err := io.ReadAll(c)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, sent) {
		t.Fatalf("sent %d bytes, %d other ones came back", len(sent), len(got))
	}
}
