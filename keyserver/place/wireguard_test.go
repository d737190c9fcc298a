package place_test

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"farkeep/keyserver/moment"
	"farkeep/keyserver/place"
	"farkeep/shared/wgtest"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.zx2c4.com/wireguard/conn"
	wgdevice "golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun/netstack"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// namespace makes a network namespace that lives as long as the test.
func namespace(t *testing.T) netns.NsHandle {
	t.Helper()
	var ns netns.NsHandle
	err := onThread(func() (err error) {
		ns, err = netns.New() // and enters it; the thread ends with this function
		return err
	})
	if err != nil {
		t.Fatalf("make a network namespace (the tests run as root): %v", err)
	}
	t.Cleanup(func() { ns.Close() })
	return ns
}

// onThread runs f on a thread of its own, which ends with it.
func onThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked
		done <- f()
	}()
	return <-done
}

func in(t *testing.T, ns netns.NsHandle, f func() error) {
	t.Helper()
	err := onThread(func() error {
		if err := netns.Set(ns); err != nil {
			return err
		}
		return f()
	})
	if err != nil {
		t.Fatal(err)
	}
}

// bound opens its sockets in a namespace, whichever goroutine asks for them.
type bound struct {
	conn.Bind
	ns netns.NsHandle
}

func (b bound) Open(port uint16) (receive []conn.ReceiveFunc, actual uint16, err error) {
	err = onThread(func() error {
		if err := netns.Set(b.ns); err != nil {
			return err
		}
		receive, actual, err = b.Bind.Open(port)
		return err
	})
	return receive, actual, err
}

// wireguard starts WireGuard's Go implementation in a namespace, driven through
// the same wgctrl as the kernel's, which the machine that runs the tests may lack.
func wireguard(t *testing.T, ns netns.NsHandle, address, config string) *wgdevice.Device {
	t.Helper()
	var wg *wgdevice.Device
	in(t, ns, func() error {
		dev, _, err := netstack.CreateNetTUN([]netip.Addr{netip.MustParseAddr(address)}, nil, 1420)
		if err != nil {
			return err
		}
		wg = wgdevice.NewDevice(dev, bound{conn.NewDefaultBind(), ns}, wgdevice.NewLogger(wgdevice.LogLevelSilent, ""))
		return errors.Join(wg.IpcSet(config), wg.Up())
	})
	t.Cleanup(wg.Close)
	return wg
}

func address(link, cidr string, add bool) error {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return err
	}
	a, err := netlink.ParseAddr(cidr)
	if err != nil {
		return err
	}
	if !add {
		return netlink.AddrDel(l, a)
	}
	if err := errors.Join(netlink.AddrAdd(l, a), netlink.LinkSetUp(l)); err != nil {
		return err
	}
	_, all, _ := net.ParseCIDR("0.0.0.0/0")
	return netlink.RouteReplace(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: all, Src: a.IP, Scope: netlink.SCOPE_LINK})
}

// TestWireGuard follows a peer whose line gets another address, with a real
// WireGuard between two network namespaces, from the part that runs as root to
// the key server's reader.
func TestWireGuard(t *testing.T) {
	home, away := namespace(t), namespace(t)
	in(t, home, func() error {
		veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "wan0"}, PeerName: "wan1"}
		if err := netlink.LinkAdd(veth); err != nil {
			return err
		}
		far, err := netlink.LinkByName("wan1")
		if err != nil {
			return err
		}
		return errors.Join(netlink.LinkSetNsFd(far, int(away)), address("wan0", "192.0.2.1/32", true))
	})
	in(t, away, func() error { return address("wan1", "84.150.1.2/32", true) })

	homeKey, attic, shed := key(t), key(t), key(t)
	name := fmt.Sprintf("farkeep%d", time.Now().UnixNano()%1_000_000_000)
	wg := wireguard(t, home, "10.77.0.1", fmt.Sprintf("private_key=%s\npublic_key=%s\nallowed_ip=10.77.0.2/32\npublic_key=%s\nallowed_ip=10.77.0.3/32\n",
		hexa(homeKey), hexa(attic.PublicKey()), hexa(shed.PublicKey())))
	wgtest.Control(t, name, wg)
	state, err := wg.IpcGet()
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(state, "listen_port=")
	var port uint16
	if _, err := fmt.Sscan(after, &port); err != nil {
		t.Fatal(err)
	}
	wireguard(t, away, "10.77.0.2", fmt.Sprintf("private_key=%s\npublic_key=%s\nallowed_ip=10.77.0.1/32\nendpoint=192.0.2.1:%d\npersistent_keepalive_interval=1\n",
		hexa(attic), hexa(homeKey.PublicKey()), port))

	look, err := place.OpenWireGuard()
	if err != nil {
		t.Fatal(err)
	}
	defer look.Close()
	path := filepath.Join(t.TempDir(), "run", "endpoints.json")
	now := func() (moment.Moment, error) { return moment.Now(time.Now) }
	watch := &place.Watch{
		// The machine may have interfaces of its own: only this test's peers count.
		Looks: []place.Look{{Source: place.SourceWireGuard, Observe: func(context.Context) ([]place.Observation, error) { return look.Observe() }}},
		Path:  path, Every: 100 * time.Millisecond, Now: now, Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- watch.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()

	reader := place.NewReader(path, now)
	await := func(network string, visits int) place.Sighting {
		t.Helper()
		var s place.Sighting
		var err error
		for deadline := time.Now().Add(60 * time.Second); time.Now().Before(deadline); {
			if s, err = reader.Look(ctx, place.SourceWireGuard, netip.MustParseAddr("10.77.0.2")); err == nil && s.Here().Network.Name == network && len(s.Trail) == visits {
				return s
			}
		}
		t.Fatalf("attic never was in %s: %+v, %v", network, s, err)
		return s
	}
	s := await("84.150.0.0/16", 1)
	if s.Peer != attic.PublicKey().String() || s.Source != place.SourceWireGuard || s.Flaps || s.Here().Endpoint.Addr() != netip.MustParseAddr("84.150.1.2") {
		t.Errorf("attic: %+v", s)
	}
	if s, err := reader.Look(ctx, place.SourceWireGuard, netip.MustParseAddr("10.77.0.3")); err != nil || s.Known() || s.Peer != shed.PublicKey().String() {
		t.Errorf("shed, which was never heard: %+v, %v", s, err)
	}
	if s, err := reader.Look(ctx, place.SourceWireGuard, netip.MustParseAddr("10.77.0.9")); err != nil || s.Peer != "" {
		t.Errorf("nobody's address: %+v, %v", s, err)
	}

	// The line gets another address.
	in(t, away, func() error {
		return errors.Join(address("wan1", "91.20.1.2/32", true), address("wan1", "84.150.1.2/32", false))
	})
	s = await("91.20.0.0/16", 2)
	if gap := s.Trail[1].First - s.Trail[0].Last; gap < 0 || gap > time.Minute || s.Trail[0].Network.Name != "84.150.0.0/16" {
		t.Errorf("after a reconnection: %+v", s)
	}
	if age, err := reader.Age(); err != nil || age > 30*time.Second {
		t.Errorf("age %v, %v", age, err)
	}
}

func key(t *testing.T) wgtypes.Key {
	t.Helper()
	k, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func hexa(k wgtypes.Key) string { return hex.EncodeToString(k[:]) }
