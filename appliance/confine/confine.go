// Package confine takes from a part everything that it does not need.
//
// The supervisor's half ([Profile.Attr]) makes the child with its own user id,
// its capabilities and, for parts without network, empty namespaces. The
// child's half ([Enter]), called before the part's own code, adds what a process
// can only do to itself: no new privileges, resource limits, Landlock, a system
// call filter. Then every protection is probed: the child tries what it must
// not be able to do, and does not go on if it can.
//
// It cannot confine what it does not know of: a part's profile is as good as
// the table in package main that states it.
package confine

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"syscall"

	"github.com/landlock-lsm/go-landlock/landlock"
	ll "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/psx"
)

// Network is how much of the network a part has.
type Network int

// The networks.
const (
	NoNetwork    Network = iota // an empty network namespace
	TCPPorts                    // the machine's network; TCP to and on named ports only
	WholeNetwork                // the machine's network
)

func (n Network) String() string {
	return [...]string{"none", "ports", "all"}[n]
}

// Profile is what one part may do. The zero value may do next to nothing, as
// root: set UID.
type Profile struct {
	UID    uint32 // and the same group id
	Groups []uint32
	// Caps are the capabilities that the part keeps: as ambient ones, or for
	// UID 0 as the only ones left.
	Caps    []uintptr
	Network Network
	Bind    []uint16 // TCPPorts: ports to listen on
	Connect []uint16 // TCPPorts: ports to connect to

	// Mounts allows mount(2) and its kin. Landlock forbids them to whoever it
	// confines, so such a part has no Landlock and Read and Write mean nothing.
	Mounts bool
	Exec   bool // may start programs
	Clock  bool // may set the clock

	// Read and Write are the folders and files that the part may use, Write for
	// reading as well. What is missing at the start is left out.
	Read, Write []string
	// Devices are folders and files whose devices the part may also steer (ioctl).
	Devices []string
}

// Attr is how the supervisor makes the child.
func (p Profile) Attr() *syscall.SysProcAttr {
	attr := &syscall.SysProcAttr{
		Setsid: true, // no signal of a terminal reaches it
		// Parts share no System V or POSIX message queues.
		Cloneflags: unix.CLONE_NEWIPC,
	}
	if p.Network == NoNetwork {
		attr.Cloneflags |= unix.CLONE_NEWNET
	}
	if p.UID != 0 {
		attr.Credential = &syscall.Credential{Uid: p.UID, Gid: p.UID, Groups: p.Groups}
		attr.AmbientCaps = p.Caps
	}
	return attr
}

// landlockABI is the version whose protections the profiles use: files and
// links (1, 2), truncation (3), TCP (4), device ioctls (5), abstract sockets and
// signals (6). Debian's 6.12 has 6.
const landlockABI = 6

// maxFiles bounds open descriptors; the receiver's sessions need the most.
const maxFiles = 4096

// Enter confines this process for good and probes the result. With strict, as
// in firmware, whose kernel is known, a protection that the kernel lacks is an
// error; otherwise it is logged and the part goes on without it.
func Enter(p Profile, strict bool, log *slog.Logger) error {
	if err := limits(); err != nil {
		return err
	}
	if p.UID == 0 {
		if err := dropCaps(p.Caps); err != nil {
			return err
		}
	}
	if _, _, errno := psx.Syscall6(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0); errno != 0 {
		return fmt.Errorf("confine: no new privileges: %w", errno)
	}
	abi, err := ll.LandlockGetABIVersion()
	if err != nil {
		abi = 0
	}
	if !p.Mounts {
		if abi < landlockABI {
			err := fmt.Errorf("confine: the kernel's Landlock has version %d, version %d is needed", abi, landlockABI)
			if strict {
				return err
			}
			log.Warn("confinement is weaker than it should be", "err", err)
		}
		if err := p.landlock(strict); err != nil {
			return err
		}
	}
	if err := p.filterCalls(); err != nil {
		return err
	}
	results := p.probe(min(abi, landlockABI))
	var failed []error
	words := make([]string, 0, len(results))
	for _, r := range results {
		words = append(words, r.String())
		if r.err != nil {
			failed = append(failed, r.err)
		}
	}
	files := fmt.Sprintf("landlock %d", min(abi, landlockABI))
	if p.Mounts {
		files = "all"
	}
	log.Info("confined", "uid", os.Getuid(), "caps", capNames(p.Caps), "network", p.Network.String(),
		"files", files, "probes", strings.Join(words, " "))
	if err := errors.Join(failed...); err != nil {
		return fmt.Errorf("confine: a protection does not hold: %w", err)
	}
	return nil
}

// limits bounds what a part may take, and keeps its memory out of core files
// and out of reach of other processes of its user.
func limits() error {
	for _, l := range []struct {
		name     string
		resource int
		value    uint64
	}{
		{"core files", unix.RLIMIT_CORE, 0},
		{"open files", unix.RLIMIT_NOFILE, maxFiles},
		// For all processes of a user, threads included; each part has its own user.
		{"threads", unix.RLIMIT_NPROC, 1024},
	} {
		if err := unix.Setrlimit(l.resource, &unix.Rlimit{Cur: l.value, Max: l.value}); err != nil {
			return fmt.Errorf("confine: limit %s: %w", l.name, err)
		}
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("confine: forbid core dumps: %w", err)
	}
	return nil
}

// dropCaps leaves root with the given capabilities alone, also across execve.
func dropCaps(keep []uintptr) error {
	var mask [2]uint32
	for _, c := range keep {
		mask[c/32] |= 1 << (c % 32)
	}
	held, err := capget()
	if err != nil {
		return err
	}
	// The child of a confined part (unlock, of disk) has no right to shrink its
	// bounding set, which is the parent's already. No new privileges, set next,
	// keeps a program that it started from getting more than it has itself.
	inherits := held[0]&(1<<unix.CAP_SETPCAP) == 0
	for c := uintptr(0); c <= unix.CAP_LAST_CAP && !inherits; c++ {
		if mask[c/32]&(1<<(c%32)) != 0 {
			continue
		}
		_, _, errno := psx.Syscall6(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, c, 0, 0, 0, 0)
		if errno != 0 && errno != unix.EINVAL { // EINVAL: newer than this kernel
			return fmt.Errorf("confine: drop capability %d: %w", c, errno)
		}
	}
	return capset(mask)
}

// capNames lists capabilities for the log.
func capNames(caps []uintptr) string {
	known := map[uintptr]string{
		unix.CAP_NET_ADMIN: "net_admin", unix.CAP_NET_RAW: "net_raw", unix.CAP_NET_BIND_SERVICE: "net_bind_service",
		unix.CAP_SYS_TIME: "sys_time", unix.CAP_SYS_ADMIN: "sys_admin", unix.CAP_SYS_RAWIO: "sys_rawio",
		unix.CAP_CHOWN: "chown", unix.CAP_DAC_OVERRIDE: "dac_override", unix.CAP_FOWNER: "fowner", unix.CAP_FSETID: "fsetid",
		unix.CAP_KILL: "kill", unix.CAP_MKNOD: "mknod", unix.CAP_IPC_LOCK: "ipc_lock", unix.CAP_SYS_RESOURCE: "sys_resource",
	}
	if len(caps) == 0 {
		return "none"
	}
	var names []string
	for _, c := range caps {
		name, ok := known[c]
		if !ok {
			name = fmt.Sprint(c)
		}
		names = append(names, name)
	}
	return strings.Join(names, ",")
}

func (p Profile) landlock(strict bool) error {
	cfg := landlock.V6
	if p.Network == WholeNetwork {
		cfg.HandledAccessNet = 0 // TCP is not restricted then
	}
	if !strict {
		cfg = cfg.BestEffort()
	}
	if err := cfg.Restrict(p.rules()...); err != nil {
		return fmt.Errorf("confine: landlock: %w", err)
	}
	return nil
}

func (p Profile) rules() []landlock.Rule {
	var rules []landlock.Rule
	add := func(paths []string, dir, file func(...string) landlock.FSRule) {
		for _, path := range paths {
			info, err := os.Stat(path)
			switch {
			case err != nil: // not there: nothing to allow
			case info.IsDir():
				rules = append(rules, dir(path))
			default:
				rules = append(rules, file(path))
			}
		}
	}
	add(p.Read, landlock.RODirs, landlock.ROFiles)
	// Refer: the keeper links unchanged files from one generation into the next.
	add(p.Write, func(s ...string) landlock.FSRule { return landlock.RWDirs(s...).WithRefer() }, landlock.RWFiles)
	add(p.Devices, func(s ...string) landlock.FSRule { return landlock.RWDirs(s...).WithIoctlDev() },
		func(s ...string) landlock.FSRule { return landlock.RWFiles(s...).WithIoctlDev() })
	for _, port := range p.Bind {
		rules = append(rules, landlock.BindTCP(port))
	}
	for _, port := range p.Connect {
		rules = append(rules, landlock.ConnectTCP(port))
	}
	return rules
}
