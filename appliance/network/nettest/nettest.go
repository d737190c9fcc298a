// Package nettest runs a package's tests in a network namespace of their own,
// so that they can have real links, addresses and routes.
package nettest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"farkeep/shared/mountnstest"

	"github.com/vishvananda/netlink"
)

const inside = "FARKEEP_TEST_NETNS"

// Main is a TestMain: it runs the test binary again in a new network and mount
// namespace (which needs root) and returns its exit code.
func Main(m *testing.M) int {
	if os.Getenv(inside) != "" {
		if err := prepare(); err != nil {
			fmt.Fprintln(os.Stderr, "prepare the network namespace:", err)
			return 1
		}
		return m.Run()
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS,
		Pdeathsig:  syscall.SIGKILL,
	}
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.ExitCode()
	default:
		fmt.Fprintln(os.Stderr, "these tests need root, for a network namespace:", err)
		return 1
	}
}

func prepare() error {
	if err := mountnstest.Private(); err != nil {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}

// Veth makes a pair of links that ends with the test; both are down.
func Veth(t testing.TB, name, peer string) (a, b netlink.Link) {
	t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: peer}); err != nil {
		t.Fatal("make a veth pair: ", err)
	}
	a, b = Link(t, name), Link(t, peer)
	t.Cleanup(func() { netlink.LinkDel(a) }) // it may be gone already
	return a, b
}

// Link finds a link by its name.
func Link(t testing.TB, name string) netlink.Link {
	t.Helper()
	l, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// Up brings a link up, with an address if that is not "".
func Up(t testing.TB, l netlink.Link, address string) {
	t.Helper()
	if address != "" {
		a, err := netlink.ParseAddr(address)
		if err != nil {
			t.Fatal(err)
		}
		if err := netlink.AddrAdd(l, a); err != nil {
			t.Fatal(err)
		}
	}
	if err := netlink.LinkSetUp(l); err != nil {
		t.Fatal(err)
	}
}
