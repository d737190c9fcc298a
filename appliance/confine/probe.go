package confine

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// result is one probe's outcome.
type result struct {
	name    string
	skipped string // why it was not tried
	err     error  // what was possible that must not be
}

func (r result) String() string {
	switch {
	case r.err != nil:
		return r.name + ":OPEN"
	case r.skipped != "":
		return r.name + ":" + r.skipped
	}
	return r.name + ":held"
}

// probe tries what the profile forbids. Every attempt is one that does no harm
// if it succeeds, because then this process ends at once.
func (p Profile) probe(abi int) []result {
	var out []result
	add := func(name, skipped string, try func() error) {
		r := result{name: name, skipped: skipped}
		if skipped == "" {
			if err := try(); err != nil {
				r.err = fmt.Errorf("probe %s: %w", name, err)
			}
		}
		out = append(out, r)
	}
	when := func(ok bool, reason string) string {
		if ok {
			return ""
		}
		return reason
	}

	add("root", when(p.UID != 0, "allowed"), func() error {
		_, _, errno := syscall.RawSyscall(unix.SYS_SETRESUID, 0, 0, 0)
		return refused(errno, unix.EPERM)
	})
	add("caps", "", func() error {
		got, err := capget()
		if err != nil {
			return err
		}
		var want [2]uint32
		for _, c := range p.Caps {
			want[c/32] |= 1 << (c % 32)
		}
		if got != want {
			return fmt.Errorf("capabilities are %x, not %x", got, want)
		}
		return nil
	})
	add("no-new-privileges", "", func() error {
		n, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)
		if err != nil || n != 1 {
			return fmt.Errorf("not set: %d, %v", n, err)
		}
		return nil
	})

	landlocked := func(need int, covered bool) string {
		switch {
		case p.Mounts || covered:
			return "allowed"
		case abi < need:
			return "kernel-lacks-it"
		}
		return ""
	}
	// Every user may read the root folder; only Landlock forbids it.
	add("read", landlocked(1, p.covers("/", p.Read, p.Write)), func() error {
		fd, err := unix.Open("/", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err == nil {
			unix.Close(fd)
		}
		return refused(err, unix.EACCES)
	})
	add("write", landlocked(1, p.covers("/tmp", p.Write)), func() error {
		const dir = "/tmp/.farkeep-probe"
		err := unix.Mkdir(dir, 0o700)
		if err == nil {
			unix.Rmdir(dir)
		}
		return refused(err, unix.EACCES, unix.ENOENT)
	})
	add("network", when(p.Network == NoNetwork, "allowed"), func() error {
		return refused(connect(unix.SOCK_DGRAM, [4]byte{192, 0, 2, 1}, 9), unix.ENETUNREACH)
	})
	tcp := landlocked(4, p.Network != TCPPorts)
	add("tcp", tcp, func() error {
		return refused(connect(unix.SOCK_STREAM, [4]byte{127, 0, 0, 1}, 1), unix.EACCES)
	})
	add("mptcp", "", func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, protoMPTCP)
		if err == nil {
			unix.Close(fd)
		}
		return refused(err, unix.EPROTONOSUPPORT)
	})

	// Without the filter these would answer EFAULT, ENOENT or a number: their
	// arguments are such that they can do nothing.
	add("mount", when(!p.Mounts, "allowed"), func() error {
		_, _, errno := syscall.RawSyscall6(unix.SYS_MOUNT, 0, 0, 0, 0, 0, 0)
		return refused(errno, unix.EPERM)
	})
	add("exec", when(!p.Exec, "allowed"), func() error {
		_, _, errno := syscall.RawSyscall(unix.SYS_EXECVE, 0, 0, 0)
		return refused(errno, unix.EPERM)
	})
	add("clock", when(!p.Clock, "allowed"), func() error {
		_, _, errno := syscall.RawSyscall(unix.SYS_CLOCK_SETTIME, unix.CLOCK_REALTIME, 0, 0)
		return refused(errno, unix.EPERM)
	})
	add("calls", "", func() error {
		_, _, errno := syscall.RawSyscall(unix.SYS_PERSONALITY, 0xffffffff, 0, 0)
		return refused(errno, unix.EPERM)
	})
	return out
}

// covers says whether one of the folders in lists contains path.
func (p Profile) covers(path string, lists ...[]string) bool {
	for _, list := range lists {
		for _, dir := range list {
			if rel, err := filepath.Rel(dir, path); err == nil && rel != ".." && !strings.HasPrefix(rel, "../") {
				return true
			}
		}
	}
	return false
}

// refused turns the outcome of an attempt into nil if it was refused in one of
// the ways that the protection has.
func refused(err error, how ...unix.Errno) error {
	if errno, ok := err.(syscall.Errno); err == nil || ok && errno == 0 {
		return errors.New("it is possible")
	}
	for _, e := range how {
		if errors.Is(err, e) {
			return nil
		}
	}
	return fmt.Errorf("refused by something else: %w", err)
}

func connect(kind int, addr [4]byte, port int) error {
	fd, err := unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Connect(fd, &unix.SockaddrInet4{Port: port, Addr: addr})
}
