package receiver

import (
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"farkeep/appliance/network/nettest"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// TestMain gives the tests a network namespace of their own: they make links.
func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

// TestBoundToItsInterface runs the receiver on one of two links, as on the VPN's
// beside the LAN's, with a neighbour in a namespace of its own at the far end of
// each. The one on the LAN must not reach it by any address of this machine, not
// by the VPN's either: Linux answers for each of its addresses on every link.
// A listener on all links shows that every one of these ways is open otherwise.
func TestBoundToItsInterface(t *testing.T) {
	vpn := newNeighbour(t, "vpn", "10.77.0.2/24", "10.77.0.9/24")
	lan := newNeighbour(t, "lan", "192.0.2.2/24", "192.0.2.9/24")
	lan.route(t, "10.77.0.2/32")
	vpn.route(t, "192.0.2.2/32")
	b := startOn(t, "vpn")
	_, receivers, err := net.SplitHostPort(b.address)
	must(t, err)
	everywhere, err := net.Listen("tcp", ":0")
	must(t, err)
	defer everywhere.Close()
	go func() {
		for {
			c, err := everywhere.Accept()
			if err != nil {
				return
			}
			fmt.Fprint(c, "SSH-2.0-everywhere\r\n")
			c.Close()
		}
	}()
	_, open, err := net.SplitHostPort(everywhere.Addr().String())
	must(t, err)

	for _, tt := range []struct {
		from    *neighbour
		address string
		answers bool
	}{
		{vpn, "10.77.0.2", true},
		{vpn, "192.0.2.2", true}, // by whatever address: what counts is the link
		{lan, "192.0.2.2", false},
		{lan, "10.77.0.2", false},
	} {
		if banner, err := tt.from.dial(net.JoinHostPort(tt.address, open)); !strings.HasPrefix(banner, "SSH-2.0-everywhere") {
			t.Fatalf("from %s there is no way to %s: %q, %v", tt.from.name, tt.address, banner, err)
		}
		banner, err := tt.from.dial(net.JoinHostPort(tt.address, receivers))
		if tt.answers && !strings.HasPrefix(banner, "SSH-2.0-") {
			t.Errorf("from %s by %s: %q, %v", tt.from.name, tt.address, banner, err)
		}
		if !tt.answers && err == nil {
			t.Errorf("the receiver answers %s by %s: %q", tt.from.name, tt.address, banner)
		}
	}
	// Nor does it answer this machine's own loopback.
	if c, err := net.DialTimeout("tcp", net.JoinHostPort("127.0.0.1", receivers), time.Second); err == nil {
		c.Close()
		t.Error("the receiver answers on the loopback interface")
	}
}

// neighbour is a network namespace at the far end of a link of this one.
type neighbour struct {
	name string // of the link, here
	ns   netns.NsHandle
	far  string // the link's far end
}

func newNeighbour(t *testing.T, name, here, there string) *neighbour {
	t.Helper()
	n := &neighbour{name: name, ns: newNamespace(t), far: "far-" + name}
	near, far := nettest.Veth(t, name, n.far)
	nettest.Up(t, near, here)
	must(t, netlink.LinkSetNsFd(far, int(n.ns)))
	must(t, n.in(func() error {
		link, err := netlink.LinkByName(n.far)
		if err != nil {
			return err
		}
		a, err := netlink.ParseAddr(there)
		if err != nil {
			return err
		}
		return errors.Join(netlink.AddrAdd(link, a), netlink.LinkSetUp(link))
	}))
	return n
}

// route sends what is for to over the link.
func (n *neighbour) route(t *testing.T, to string) {
	t.Helper()
	must(t, n.in(func() error {
		link, err := netlink.LinkByName(n.far)
		if err != nil {
			return err
		}
		_, dst, err := net.ParseCIDR(to)
		if err != nil {
			return err
		}
		return netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: dst})
	}))
}

// dial connects from the namespace and returns what the other side says first.
func (n *neighbour) dial(address string) (banner string, err error) {
	err = n.in(func() error {
		c, err := net.DialTimeout("tcp", address, 30*time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		buf := make([]byte, 64)
		c.SetDeadline(time.Now().Add(30 * time.Second))
		got, err := c.Read(buf)
		banner = string(buf[:got])
		return err
	})
	return banner, err
}

// in runs do on a thread that is in the namespace. The thread ends with it.
func (n *neighbour) in(do func() error) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: nobody else gets this thread
		if err := netns.Set(n.ns); err != nil {
			result <- err
			return
		}
		result <- do()
	}()
	return <-result
}

func newNamespace(t *testing.T) netns.NsHandle {
	t.Helper()
	type made struct {
		ns  netns.NsHandle
		err error
	}
	result := make(chan made)
	go func() {
		runtime.LockOSThread()
		ns, err := netns.New()
		result <- made{ns, err}
	}()
	m := <-result
	must(t, m.err)
	t.Cleanup(func() { m.ns.Close() })
	return m.ns
}
