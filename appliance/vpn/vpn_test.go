package vpn

import (
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"farkeep/appliance/network/nettest"
	"farkeep/shared/settings"
	"farkeep/shared/wgtest"

	"github.com/vishvananda/netlink"
	"golang.zx2c4.com/wireguard/conn"
	wgdevice "golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun/netstack"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

// userspace makes the interface with WireGuard's Go implementation, driven
// through the same wgctrl, because the machine that runs the tests may have no
// WireGuard in its kernel. The emulated Pi has.
func userspace(t *testing.T, name string) {
	t.Helper()
	// wgctrl looks for sockets in /var/run/wireguard; this is our mount namespace.
	if err := syscall.Mount("run", "/run", "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Unmount("/run", syscall.MNT_DETACH) })
	wgtest.Interface(t, name, mtu)
}

// home starts the other end of the tunnel, without any interface, and returns
// its port. It echoes one connection after the other on 10.77.0.1:7.
func home(t *testing.T, private wgtypes.Key, peer wgtypes.Key) uint16 {
	t.Helper()
	dev, stack, err := netstack.CreateNetTUN([]netip.Addr{netip.MustParseAddr("10.77.0.1")}, nil, mtu)
	if err != nil {
		t.Fatal(err)
	}
	wg := wgdevice.NewDevice(dev, conn.NewDefaultBind(), wgdevice.NewLogger(wgdevice.LogLevelSilent, ""))
	t.Cleanup(wg.Close)
	if err := wg.IpcSet(fmt.Sprintf("private_key=%s\npublic_key=%s\nallowed_ip=10.77.0.2/32\n", hex.EncodeToString(private[:]), hex.EncodeToString(peer[:]))); err != nil {
		t.Fatal(err)
	}
	if err := wg.Up(); err != nil {
		t.Fatal(err)
	}
	l, err := stack.ListenTCPAddrPort(netip.MustParseAddrPort("10.77.0.1:7"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			io.Copy(c, c)
			c.Close()
		}
	}()
	state, err := wg.IpcGet()
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(state, "listen_port=")
	var port uint16
	if _, err := fmt.Sscan(after, &port); err != nil {
		t.Fatal(err)
	}
	return port
}

func TestTunnel(t *testing.T) {
	userspace(t, "farkeep0")
	homeKey, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	s := testSettings(t)
	own, err := wgtypes.ParseKey(s.PrivateKey.Reveal())
	if err != nil {
		t.Fatal(err)
	}
	port := home(t, homeKey, own.PublicKey())
	s.Peers[0].PublicKey = homeKey.PublicKey().String()
	s.Peers[0].Keepalive = settings.Duration(time.Second)
	s.Peers[0].Endpoints = []string{"127.0.0.1:1", fmt.Sprintf("127.0.0.1:%d", port)}

	// The LAN claims home's very address for itself.
	lan, _ := nettest.Veth(t, "eth0", "far0")
	nettest.Up(t, lan, "192.0.2.50/24")
	claimed := ipNet(netip.MustParsePrefix("10.77.0.1/32"))
	if err := netlink.RouteAdd(&netlink.Route{LinkIndex: lan.Attrs().Index, Dst: &claimed}); err != nil {
		t.Fatal(err)
	}

	run := func(ctx context.Context) (chan []Peer, chan error) {
		states, done := make(chan []Peer, 1), make(chan error, 1)
		go func() {
			tunnel := New(s, slog.New(slog.NewTextHandler(t.Output(), nil)))
			tunnel.turn = 2 * time.Second
			done <- tunnel.Run(ctx, func(p []Peer) {
				select {
				case <-states:
				default:
				}
				states <- p
			})
		}()
		return states, done
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	states, done := run(ctx)
	awaitUp(t, states, done)

	c, err := (&net.Dialer{Timeout: time.Minute}).DialContext(ctx, "tcp", "10.77.0.1:7")
	if err != nil {
		t.Fatal("through the tunnel: ", err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 5)
	if _, err := io.ReadFull(c, buf); err != nil || string(buf) != "hello" {
		t.Errorf("echo: %q, %v", buf, err)
	}
	if got := c.LocalAddr().(*net.TCPAddr).IP.String(); got != "10.77.0.2" {
		t.Errorf("the source address is %s", got)
	}

	// A second run takes the tunnel over as it is, and drops what is no longer configured.
	cancel()
	<-done
	s.Peers[0].AllowedIPs = []netip.Prefix{netip.MustParsePrefix("10.77.0.1/32")}
	again, stop := context.WithTimeout(t.Context(), 3*time.Minute)
	defer stop()
	states, done = run(again)
	awaitUp(t, states, done)
	if _, err := c.Write([]byte("again")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, buf); err != nil || string(buf) != "again" {
		t.Errorf("after the restart: %q, %v", buf, err)
	}
	routes, err := netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: table}, netlink.RT_FILTER_TABLE)
	if err != nil || len(routes) != 2 {
		t.Errorf("routes %v, %v; want one through the tunnel and one that refuses", routes, err)
	}

	// When the interface is gone, nothing for the VPN leaves by the LAN.
	stop()
	<-done
	if err := netlink.LinkDel(nettest.Link(t, "farkeep0")); err != nil {
		t.Fatal(err)
	}
	if got, err := netlink.RouteGet(net.IPv4(10, 77, 0, 1)); err == nil {
		t.Errorf("without the tunnel home is reached by %v", got)
	}
}

func awaitUp(t *testing.T, states chan []Peer, done chan error) {
	t.Helper()
	for {
		select {
		case p := <-states:
			if p[0].Up {
				return
			}
		case err := <-done:
			t.Fatal("the tunnel never came up: ", err)
		}
	}
}

func TestContains(t *testing.T) {
	s := testSettings(t)
	s.Address = netip.MustParsePrefix("10.78.0.2/24")
	for in, want := range map[string]bool{"10.77.0.1": true, "::ffff:10.77.0.9": true, "10.78.0.2": true, "10.78.0.1": false, "192.0.2.1": false, "2001:db8::1": false} {
		if got := Contains(s, netip.MustParseAddr(in)); got != want {
			t.Errorf("%s: %v; want %v", in, got, want)
		}
	}
}

func TestWithoutWireGuard(t *testing.T) {
	// The kernel here may have WireGuard; a name that is taken by another kind of
	// link fails everywhere.
	a, _ := nettest.Veth(t, "farkeep0", "far0")
	nettest.Up(t, a, "")
	err := New(testSettings(t, "192.0.2.1:1"), slog.New(slog.DiscardHandler)).Run(t.Context(), func([]Peer) {})
	if err == nil || !strings.Contains(err.Error(), "farkeep0") {
		t.Errorf("got %v", err)
	}
}
