package network

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"farkeep/appliance/clock"
	"farkeep/appliance/clock/clocktest"
	"farkeep/appliance/dhcp"
	"farkeep/appliance/dhcp/dhcptest"
	"farkeep/appliance/localcall"
	"farkeep/appliance/network/nettest"
	"farkeep/appliance/part"
	"farkeep/appliance/status"
	"farkeep/shared/settings"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const asPart = "FARKEEP_TEST_PART"

func TestMain(m *testing.M) {
	if os.Getenv(asPart) != "" {
		os.Exit(runAsPart())
	}
	os.Exit(nettest.Main(m))
}

// runAsPart is the child of TestUnprivileged: the part as the supervisor starts it.
func runAsPart() int {
	env, err := part.Attach(part.Network, os.Stderr)
	if err == nil {
		err = Run(context.Background(), env)
	}
	fmt.Fprintln(os.Stderr, err)
	return 1
}

var served = dhcptest.Behaviour{
	Self: net.IPv4(192, 0, 2, 1), Address: net.IPv4(192, 0, 2, 50), Mask: net.CIDRMask(24, 32),
	Router: net.IPv4(192, 0, 2, 1), Resolvers: []net.IP{net.IPv4(192, 0, 2, 1)}, Lease: time.Hour,
}

func at(ip net.IP, b dhcptest.Behaviour) dhcptest.Behaviour { b.Address = ip; return b }

var testVPN = settings.VPN{
	Interface: "farkeep0", Address: netip.MustParsePrefix("10.77.0.2/24"),
	Peers: []settings.Peer{{Name: "home", AllowedIPs: []netip.Prefix{netip.MustParsePrefix("10.77.0.0/24")}}},
}

// startLAN runs a lan until the test ends and returns its resolvers' file.
func startLAN(t *testing.T, b Brief) string {
	t.Helper()
	resolv := filepath.Join(t.TempDir(), "resolv.conf")
	l := newLAN(b, "/sys", resolv, slog.New(slog.NewTextHandler(t.Output(), nil)))
	ctx, cancel := context.WithCancel(t.Context())
	changes := watchLinks(ctx, l.log)
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer l.wait()
		for ctx.Err() == nil {
			if err := l.reconcile(ctx); err != nil {
				l.log.Error("links", "err", err)
			}
			select {
			case <-ctx.Done():
			case <-changes:
			case <-time.After(statusInterval):
			}
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
	return resolv
}

// eventually waits for a state of the kernel or of a file, which no event
// announces to a test.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); !is(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("never: ", what)
		}
	}
}

func addresses(name string) []string {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return nil
	}
	found, err := netlink.AddrList(link, netlink.FAMILY_V4)
	if err != nil {
		return nil
	}
	var out []string
	for _, a := range found {
		out = append(out, a.IPNet.String())
	}
	return out
}

func gateway(t *testing.T) string {
	t.Helper()
	routes, err := netlink.RouteList(nil, netlink.FAMILY_V4)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range routes {
		if r.Dst == nil || r.Dst.IP.IsUnspecified() {
			return r.Gw.String()
		}
	}
	return ""
}

func has(name, address string) func() bool {
	return func() bool { return slices.Equal(addresses(name), []string{address}) }
}

func content(path string) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return string(data)
}

func TestCableAndLease(t *testing.T) {
	resolv := startLAN(t, Brief{Network: settings.Network{Interface: "eth0"}, VPN: testVPN})

	// The card comes after the start.
	near, far := nettest.Veth(t, "eth0", "far0")
	nettest.Up(t, far, "192.0.2.1/24")
	server := dhcptest.Start(t, "far0", served)
	eventually(t, "the offered address", has("eth0", "192.0.2.50/24"))
	eventually(t, "the gateway", func() bool { return gateway(t) == "192.0.2.1" })
	eventually(t, "the resolver", func() bool {
		return content(resolv) == "nameserver 192.0.2.1\noptions timeout:3 attempts:2\n"
	})
	link := nettest.Link(t, "eth0")
	found, err := netlink.AddrList(link, netlink.FAMILY_V4)
	if err != nil || len(found) != 1 || found[0].ValidLft < 3500 || found[0].ValidLft > 3600 {
		t.Errorf("addresses %+v, %v; want one that the kernel drops in an hour", found, err)
	}

	// The cable is pulled: the address stays. It comes back in another network.
	down(t, far)
	eventually(t, "no carrier", func() bool { return nettest.Link(t, "eth0").Attrs().RawFlags&unix.IFF_LOWER_UP == 0 })
	eventually(t, "no route by a dead link", func() bool { return gateway(t) == "" })
	if !has("eth0", "192.0.2.50/24")() {
		t.Errorf("without a cable the addresses are %v", addresses("eth0"))
	}
	moved := at(net.IPv4(192, 0, 2, 99), served)
	moved.Resolvers = []net.IP{net.IPv4(192, 0, 2, 7), net.IPv4(10, 77, 0, 1)}
	server.Set(moved)
	nettest.Up(t, far, "")
	eventually(t, "the new address alone", has("eth0", "192.0.2.99/24"))
	eventually(t, "a default route", func() bool { return gateway(t) == "192.0.2.1" })
	eventually(t, "the new resolver, and not the one inside the VPN", func() bool {
		return content(resolv) == "nameserver 192.0.2.7\noptions timeout:3 attempts:2\n"
	})

	// The card is pulled out: what it brought is forgotten.
	if err := netlink.LinkDel(near); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the last resolvers", func() bool { return strings.HasPrefix(content(resolv), "nameserver 9.9.9.9\n") })
}

func down(t *testing.T, l netlink.Link) {
	t.Helper()
	if err := netlink.LinkSetDown(l); err != nil {
		t.Fatal(err)
	}
}

func TestTheLANWantsTheVPNsAddress(t *testing.T) {
	for _, tt := range []struct {
		name string
		b    dhcptest.Behaviour
	}{
		{"address", at(net.IPv4(10, 77, 0, 1), served)},
		{"router", func() dhcptest.Behaviour { b := served; b.Router = net.IPv4(10, 77, 0, 1); return b }()},
	} {
		t.Run(tt.name, func(t *testing.T) {
			near, far := nettest.Veth(t, "eth0", "far0")
			nettest.Up(t, near, "")
			nettest.Up(t, far, "192.0.2.1/24")
			server := dhcptest.Start(t, "far0", tt.b)
			startLAN(t, Brief{Network: settings.Network{Interface: "eth0"}, VPN: testVPN})
			eventually(t, "an offer", func() bool { return len(server.Messages()) > 0 })
			server.Set(at(net.IPv4(192, 0, 2, 50), served))
			eventually(t, "the offer that is usable", has("eth0", "192.0.2.50/24"))
		})
	}
}

func TestFixedAddress(t *testing.T) {
	near, far := nettest.Veth(t, "eth0", "far0")
	nettest.Up(t, near, "198.51.100.4/24")
	nettest.Up(t, far, "192.0.2.1/24")
	resolv := startLAN(t, Brief{Network: settings.Network{
		Interface: "eth0", Address: netip.MustParsePrefix("192.0.2.9/24"), Gateway: netip.MustParseAddr("192.0.2.1"),
		Resolvers: []netip.Addr{netip.MustParseAddr("2001:db8::53")},
	}})
	eventually(t, "the fixed address", has("eth0", "192.0.2.9/24"))
	eventually(t, "the gateway", func() bool { return gateway(t) == "192.0.2.1" })
	eventually(t, "the resolver", func() bool { return strings.HasPrefix(content(resolv), "nameserver 2001:db8::53\n") })
	if found, err := netlink.AddrList(near, netlink.FAMILY_V4); err != nil || found[0].ValidLft != 0xffffffff && found[0].ValidLft != -1 && found[0].ValidLft != 0 {
		t.Errorf("a fixed address ends after %d s, %v", found[0].ValidLft, err)
	}
}

func TestApplyAndRemove(t *testing.T) {
	near, far := nettest.Veth(t, "eth0", "far0")
	nettest.Up(t, near, "")
	nettest.Up(t, far, "")
	l := newLAN(Brief{}, "/sys", filepath.Join(t.TempDir(), "resolv.conf"), slog.New(slog.DiscardHandler))
	changes := 0
	l.changed = func() { changes++ }
	prefix := netip.MustParsePrefix
	for _, tt := range []struct {
		name  string
		lease dhcp.Lease
		gw    string
		news  bool
	}{
		{"first", dhcp.Lease{Address: prefix("192.0.2.50/24"), Gateway: netip.MustParseAddr("192.0.2.1"), Valid: time.Hour}, "192.0.2.1", true},
		{"renewed", dhcp.Lease{Address: prefix("192.0.2.50/24"), Gateway: netip.MustParseAddr("192.0.2.1"), Valid: 2 * time.Hour}, "192.0.2.1", false},
		{"another address of the same network", dhcp.Lease{Address: prefix("192.0.2.51/24"), Gateway: netip.MustParseAddr("192.0.2.1"), Valid: time.Hour}, "192.0.2.1", true},
		{"another gateway", dhcp.Lease{Address: prefix("192.0.2.51/24"), Gateway: netip.MustParseAddr("192.0.2.2"), Valid: time.Hour}, "192.0.2.2", true},
		{"one address, and a gateway elsewhere", dhcp.Lease{Address: prefix("203.0.113.7/32"), Gateway: netip.MustParseAddr("198.51.100.1"), Valid: time.Hour}, "198.51.100.1", true},
		{"no gateway", dhcp.Lease{Address: prefix("192.0.2.51/24"), Valid: time.Hour}, "", true},
	} {
		before := changes
		if err := l.apply(near, tt.lease); err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		if got := addresses("eth0"); !slices.Equal(got, []string{tt.lease.Address.String()}) || gateway(t) != tt.gw || (changes != before) != tt.news {
			t.Errorf("%s: addresses %v, gateway %s, news %v", tt.name, got, gateway(t), changes != before)
		}
	}
	last := dhcp.Lease{Address: prefix("192.0.2.51/24"), Gateway: netip.MustParseAddr("192.0.2.1")}
	if err := l.apply(near, last); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time the kernel was faster
		if err := remove(near, last); err != nil || len(addresses("eth0")) != 0 || gateway(t) != "" {
			t.Errorf("%v; addresses %v, gateway %s", err, addresses("eth0"), gateway(t))
		}
	}
}

func TestResolvers(t *testing.T) {
	a := func(s ...string) (out []netip.Addr) {
		for _, x := range s {
			out = append(out, netip.MustParseAddr(x))
		}
		return out
	}
	l := newLAN(Brief{Network: settings.Network{Resolvers: a("192.0.2.1", "192.0.2.2")}, VPN: testVPN}, "/sys", filepath.Join(t.TempDir(), "r"), slog.New(slog.DiscardHandler))
	l.leases[3] = lease("192.0.2.3", "192.0.2.4")
	l.leases[2] = lease("192.0.2.1", "10.77.0.1", "192.0.2.5")
	want := a("192.0.2.1", "192.0.2.2", "192.0.2.5")
	if got := l.resolvers(); !slices.Equal(got, want) {
		t.Errorf("got %v; want %v", got, want)
	}
}

// system is a clock that nothing sets.
type system struct {
	mu    sync.Mutex
	shift time.Duration
}

func (*system) Now() time.Time        { return time.Now().Round(0) }
func (*system) Uptime() time.Duration { return clock.Kernel{}.Uptime() }
func (s *system) Slew(d time.Duration) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.shift += d
	return nil
}
func (s *system) Step(d time.Duration) error { return s.Slew(d) }

func folders(t *testing.T) part.Paths {
	t.Helper()
	dir, err := os.MkdirTemp("", "network") // and not t.TempDir, which other uids cannot enter
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	p := part.Paths{Run: filepath.Join(dir, "run"), State: filepath.Join(dir, "state"), Media: filepath.Join(dir, "media")}
	for _, d := range []string{p.RunDir(part.Network), p.StateDir(part.Network)} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

func readStatus(t *testing.T, p part.Paths) status.Network {
	t.Helper()
	s, err := status.Read[status.Network](p.Status(part.Network))
	if err != nil {
		t.Fatal(err)
	}
	if s == nil {
		return status.Network{}
	}
	return *s
}

func TestFirmware(t *testing.T) {
	near, far := nettest.Veth(t, "eth0", "far0")
	nettest.Up(t, near, "")
	nettest.Up(t, far, "192.0.2.1/24")
	dhcptest.Start(t, "far0", served)
	sys := t.TempDir()
	sensor := filepath.Join(sys, "class/hwmon/hwmon0")
	if err := os.MkdirAll(sensor, 0o755); err != nil {
		t.Fatal(err)
	}
	write := func(name, value string) {
		if err := os.WriteFile(filepath.Join(sensor, name), []byte(value+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("name", "rpi_volt")
	write("in0_lcrit_alarm", "0")

	paths := folders(t)
	b := Brief{
		Network: settings.Network{Interface: "eth0"}, VPN: testVPN,
		Clock: settings.Clock{Servers: []string{clocktest.Start(t, clocktest.Behaviour{}).Address, clocktest.Start(t, clocktest.Behaviour{}).Address}},
	}
	env, err := part.New(part.Header{Name: part.Network, Host: "attic", Paths: paths, Firmware: true}, b, slog.New(slog.NewTextHandler(t.Output(), nil)), nil)
	if err != nil {
		t.Fatal(err)
	}
	if b, err = part.Brief[Brief](env); err != nil {
		t.Fatal(err)
	}
	n := &network{env: env, brief: b, sys: sys, system: &system{}}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- n.run(ctx) }()
	eventually(t, "address and clock in the status", func() bool {
		s := readStatus(t, paths)
		return s.ClockSet && slices.Contains(s.Addresses, "192.0.2.50/24") && s.Interface == "eth0" && s.Carrier
	})
	if s := readStatus(t, paths); s.VPNUp || s.Undervoltage || s.ClockJump != "" || s.Updated.IsZero() {
		t.Errorf("status %+v", s)
	}
	write("in0_lcrit_alarm", "1")
	eventually(t, "undervoltage in the status", func() bool { return readStatus(t, paths).Undervoltage })
	call := func(verb string) error {
		return localcall.Call(t.Context(), paths.Socket(part.Network), verb, nil, nil)
	}
	if err := call(verbAcceptClock); err != nil {
		t.Error(err)
	}
	if err := call("sing"); err == nil || !strings.Contains(err.Error(), "not a verb") {
		t.Errorf("got %v", err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(paths.StateDir(part.Network), "clock")); err != nil {
		t.Error("the last known time was not saved: ", err)
	}
}

// The part has its own uid and two capabilities for the network, no more.
func TestUnprivileged(t *testing.T) {
	near, far := nettest.Veth(t, "eth0", "far0")
	nettest.Up(t, near, "198.51.100.4/24")
	nettest.Up(t, far, "192.0.2.1/24")
	dhcptest.Start(t, "far0", served)
	paths := folders(t)
	for _, d := range []string{paths.RunDir(part.Network), paths.StateDir(part.Network)} {
		if err := os.Chown(d, part.NetworkUID, part.NetworkUID); err != nil {
			t.Fatal(err)
		}
	}
	brief, send, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{asPart + "=1"}
	cmd.Stderr = t.Output()
	cmd.ExtraFiles = []*os.File{brief}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Credential:  &syscall.Credential{Uid: part.NetworkUID, Gid: part.NetworkUID},
		AmbientCaps: []uintptr{unix.CAP_NET_ADMIN, unix.CAP_NET_RAW},
		Pdeathsig:   syscall.SIGKILL,
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	brief.Close()
	b := Brief{Network: settings.Network{Interface: "eth0"}, Clock: settings.Clock{Servers: []string{"127.0.0.1:9"}}, VPN: testVPN}
	if err := part.Send(send, part.Header{Name: part.Network, Host: "attic", Paths: paths, Firmware: true}, b); err != nil {
		t.Fatal(err)
	}
	send.Close()
	eventually(t, "the offered address alone", has("eth0", "192.0.2.50/24"))
	eventually(t, "the gateway", func() bool { return gateway(t) == "192.0.2.1" })
	eventually(t, "the status", func() bool { return slices.Contains(readStatus(t, paths).Addresses, "192.0.2.50/24") })
}

func TestService(t *testing.T) {
	near, _ := nettest.Veth(t, "farkeep0", "far0")
	lan, _ := nettest.Veth(t, "eth0", "far1")
	nettest.Up(t, lan, "192.0.2.50/24")
	paths := folders(t)
	env, err := part.New(part.Header{Name: part.Network, Host: "attic", Paths: paths}, Brief{VPN: settings.VPN{Interface: "farkeep0"}}, slog.New(slog.NewTextHandler(t.Output(), nil)), nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- Run(ctx, env) }()
	eventually(t, "the address", func() bool { return slices.Contains(readStatus(t, paths).Addresses, "192.0.2.50/24") })
	if readStatus(t, paths).VPNUp {
		t.Error("the VPN is up before its interface")
	}
	nettest.Up(t, near, "10.77.0.2/24")
	eventually(t, "the VPN up", func() bool { return readStatus(t, paths).VPNUp })
	if s := readStatus(t, paths); cmp.Diff([]string{"192.0.2.50/24"}, s.Addresses) != "" || s.Interface != "eth0" {
		t.Errorf("status %+v", s)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func lease(resolvers ...string) dhcp.Lease {
	var l dhcp.Lease
	for _, r := range resolvers {
		l.Resolvers = append(l.Resolvers, netip.MustParseAddr(r))
	}
	return l
}
