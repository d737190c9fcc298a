package siteinit_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// TestFirewall loads home's rules into a network namespace that stands for home
// and tries every way in and through. A bridge stands for the WireGuard
// interface: the rules know it by its name only, and each appliance routes
// everything to home, as a WireGuard peer does.
func TestFirewall(t *testing.T) {
	if _, err := exec.LookPath("nft"); err != nil {
		t.Fatal("nft is missing: apt install nftables")
	}
	d := complete(t)
	_, err := d.AddKeyServer("second", netip.MustParseAddrPort("192.168.77.7:4022"))
	check(t, err)
	_, err = d.AddPusher("tower")
	check(t, err)
	w := newWorld(t)
	w.in("home", func() error {
		rules := filepath.Join(d.Path(), "home", "wireguard", "farkeep.nft")
		for range 2 { // loading them again replaces them
			if out, err := exec.Command("nft", "-f", rules).CombinedOutput(); err != nil {
				return fmt.Errorf("nft -f: %w: %s", err, out)
			}
		}
		return nil
	})
	for _, at := range []struct{ host, address string }{
		{"home", "10.77.0.1:4022"}, {"home", "10.77.0.1:22"}, {"home", "192.168.77.1:4022"}, {"home", "192.168.77.1:80"},
		{"attic", "10.77.0.2:22"}, {"attic", "10.77.0.2:80"}, {"shed", "10.77.0.3:22"}, {"tower", "10.77.0.4:22"}, {"lan", "192.168.77.7:4022"}, {"lan", "192.168.77.7:22"},
	} {
		w.listen(at.host, at.address)
	}
	var g sync.WaitGroup
	defer g.Wait()
	for _, tt := range []struct {
		from, to string
		open     bool
	}{
		{"attic", "10.77.0.1:4022", true},    // the key server at home
		{"attic", "192.168.77.7:4022", true}, // the key server behind home
		{"attic", "10.77.0.1:22", false},     // home's own SSH
		{"attic", "192.168.77.1:4022", false},
		{"attic", "192.168.77.1:80", false}, // home's other address
		{"attic", "192.168.77.7:22", false}, // the rest of the LAN
		{"attic", "10.77.0.3:22", false},    // another appliance
		{"shed", "10.77.0.2:22", false},
		{"home", "10.77.0.2:22", true}, // home pushes
		{"home", "10.77.0.3:22", true},
		{"tower", "10.77.0.2:22", true}, // a further pusher pushes
		{"tower", "10.77.0.3:22", true},
		{"tower", "10.77.0.2:80", false},
		{"tower", "10.77.0.1:4022", false}, // no key for it
		{"tower", "192.168.77.7:4022", false},
		{"tower", "10.77.0.1:22", false},
		{"attic", "10.77.0.4:22", false},
		{"lan", "10.77.0.2:22", false}, // nobody else at home does
		{"lan", "10.77.0.1:22", true},  // what is no appliance is none of these rules' business
	} {
		g.Go(func() {
			// What is dropped is not answered: a second is for ever on a veth.
			patience := time.Second
			if tt.open {
				patience = 20 * time.Second
			}
			err := w.dial(tt.from, tt.to, patience)
			if tt.open && err != nil {
				t.Errorf("%s cannot reach %s: %v", tt.from, tt.to, err)
			}
			if !tt.open && err == nil {
				t.Errorf("%s reaches %s", tt.from, tt.to)
			}
		})
	}
}

// world is a few network namespaces: home with the bridge "farkeep" to attic,
// shed and the pusher tower, and with a LAN.
type world struct {
	t  *testing.T
	ns map[string]netns.NsHandle
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, ns: map[string]netns.NsHandle{}}
	for _, name := range []string{"home", "attic", "shed", "tower", "lan"} {
		w.ns[name] = newNamespace(t)
	}
	w.in("home", func() error {
		bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "farkeep"}}
		if err := errors.Join(netlink.LinkAdd(bridge), os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0)); err != nil {
			return err
		}
		for i, peer := range []string{"attic", "shed", "lan", "tower"} {
			veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: fmt.Sprint("port", i)}, PeerName: "eth0"}
			if peer != "lan" {
				veth.MasterIndex = bridge.Index
			}
			if err := netlink.LinkAdd(veth); err != nil {
				return err
			}
			far, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			if err := errors.Join(netlink.LinkSetNsFd(far, int(w.ns[peer])), netlink.LinkSetUp(veth)); err != nil {
				return err
			}
		}
		return errors.Join(
			address("farkeep", "10.77.0.1/32"), address("port2", "192.168.77.1/24"), address("lo", "127.0.0.1/8"),
			route("farkeep", "10.77.0.2/32", ""), route("farkeep", "10.77.0.3/32", ""), route("farkeep", "10.77.0.4/32", ""),
		)
	})
	for name, own := range map[string]string{"attic": "10.77.0.2/32", "shed": "10.77.0.3/32", "tower": "10.77.0.4/32"} {
		w.in(name, func() error {
			return errors.Join(address("eth0", own), route("eth0", "10.77.0.1/32", ""), route("eth0", "0.0.0.0/0", "10.77.0.1"))
		})
	}
	w.in("lan", func() error {
		return errors.Join(address("eth0", "192.168.77.7/24"), route("eth0", "0.0.0.0/0", "192.168.77.1"))
	})
	return w
}

func newNamespace(t *testing.T) netns.NsHandle {
	t.Helper()
	var ns netns.NsHandle
	var err error
	onThread(func() {
		// New enters the namespace too; the thread ends with this function.
		ns, err = netns.New()
	})
	if err != nil {
		t.Fatalf("make a network namespace (the tests run as root): %v", err)
	}
	t.Cleanup(func() { ns.Close() })
	return ns
}

// onThread runs f on a thread of its own that ends with it.
func onThread(f func()) {
	done := make(chan struct{})
	go func() {
		runtime.LockOSThread() // never unlocked: the runtime ends the thread
		defer close(done)
		f()
	}()
	<-done
}

func (w *world) in(name string, f func() error) {
	w.t.Helper()
	if err := w.try(name, f); err != nil {
		w.t.Fatalf("in %s: %v", name, err)
	}
}

func (w *world) try(name string, f func() error) (err error) {
	onThread(func() {
		if err = netns.Set(w.ns[name]); err == nil {
			err = f()
		}
	})
	return err
}

func address(link, cidr string) error {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return err
	}
	a, err := netlink.ParseAddr(cidr)
	if err != nil {
		return err
	}
	return errors.Join(netlink.AddrAdd(l, a), netlink.LinkSetUp(l))
}

func route(link, to, via string) error {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return err
	}
	_, dst, err := net.ParseCIDR(to)
	if err != nil {
		return err
	}
	r := &netlink.Route{LinkIndex: l.Attrs().Index, Dst: dst, Scope: netlink.SCOPE_LINK}
	if via != "" {
		r.Gw, r.Scope = net.ParseIP(via), netlink.SCOPE_UNIVERSE
	}
	return netlink.RouteAdd(r)
}

// listen accepts connections at address in one namespace until the test ends.
func (w *world) listen(name, at string) {
	w.t.Helper()
	w.in(name, func() error {
		l, err := net.Listen("tcp4", at)
		if err != nil {
			return err
		}
		w.t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				c.Close()
			}
		}()
		return nil
	})
}

func (w *world) dial(name, to string, patience time.Duration) error {
	return w.try(name, func() error {
		c, err := net.DialTimeout("tcp4", to, patience)
		if err == nil {
			c.Close()
		}
		return err
	})
}
