package confine

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// protoMPTCP is IPPROTO_MPTCP. Landlock's TCP rules do not see such sockets,
// and Go's net.Listen asks for them first; it falls back to TCP.
const protoMPTCP = 262

// Offsets in struct seccomp_data (linux/seccomp.h), little-endian.
const (
	offNumber = 0
	offArch   = 4
	offArg0   = 16
	offArg2   = 32
)

// never lists system calls that no part needs: they change the kernel, look
// into other processes, or have been a way out of sandboxes again and again.
func never() []uint32 {
	return []uint32{
		unix.SYS_PTRACE, unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV, unix.SYS_PIDFD_GETFD, unix.SYS_KCMP,
		unix.SYS_KEXEC_LOAD, unix.SYS_KEXEC_FILE_LOAD, unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE, unix.SYS_DELETE_MODULE,
		unix.SYS_BPF, unix.SYS_PERF_EVENT_OPEN, unix.SYS_USERFAULTFD,
		unix.SYS_IO_URING_SETUP, unix.SYS_IO_URING_ENTER, unix.SYS_IO_URING_REGISTER,
		unix.SYS_ADD_KEY, unix.SYS_REQUEST_KEY, unix.SYS_KEYCTL,
		unix.SYS_SETNS, unix.SYS_UNSHARE, unix.SYS_CHROOT, unix.SYS_PIVOT_ROOT,
		unix.SYS_OPEN_BY_HANDLE_AT, unix.SYS_SWAPON, unix.SYS_SWAPOFF, unix.SYS_ACCT, unix.SYS_QUOTACTL,
		unix.SYS_REBOOT, unix.SYS_PERSONALITY, unix.SYS_SETHOSTNAME, unix.SYS_SETDOMAINNAME, unix.SYS_SYSLOG,
	}
}

// What single profiles may do and the others not.
func mountCalls() []uint32 {
	return []uint32{
		unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_MOVE_MOUNT, unix.SYS_OPEN_TREE, unix.SYS_MOUNT_SETATTR,
		unix.SYS_FSOPEN, unix.SYS_FSCONFIG, unix.SYS_FSMOUNT, unix.SYS_FSPICK,
	}
}

func execCalls() []uint32 { return []uint32{unix.SYS_EXECVE, unix.SYS_EXECVEAT} }

func clockCalls() []uint32 {
	return []uint32{unix.SYS_CLOCK_SETTIME, unix.SYS_SETTIMEOFDAY, unix.SYS_ADJTIMEX, unix.SYS_CLOCK_ADJTIME}
}

// filter returns the seccomp program (seccomp(2)) of a profile: a list of what
// is refused with EPERM. It is no list of what is allowed: Go's runtime changes
// what it calls, and a part that dies on a kernel or Go update is worse here
// than a wider filter behind uid, namespaces and Landlock.
func (p Profile) filter() []unix.SockFilter {
	denied := never()
	if !p.Mounts {
		denied = append(denied, mountCalls()...)
	}
	if !p.Exec {
		denied = append(denied, execCalls()...)
	}
	if !p.Clock {
		denied = append(denied, clockCalls()...)
	}
	load := func(offset uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset}
	}
	equal := func(k uint32, yes, no uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: k, Jt: yes, Jf: no}
	}
	ret := func(k uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: k}
	}
	refuse := func(e unix.Errno) unix.SockFilter { return ret(unix.SECCOMP_RET_ERRNO | uint32(e)) }

	prog := []unix.SockFilter{
		// Numbers mean something else under another architecture's calls.
		load(offArch), equal(auditArch, 1, 0), ret(unix.SECCOMP_RET_KILL_PROCESS),
		load(offNumber),
		// amd64's x32 calls have this bit; arm64 has no numbers that high.
		{Code: unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K, K: 0x40000000, Jf: 1}, refuse(unix.ENOSYS),
	}
	for _, nr := range denied {
		prog = append(prog, equal(nr, 0, 1), refuse(unix.EPERM))
	}
	return append(prog,
		// A user namespace gives every capability inside it. clone3 hides its
		// flags behind a pointer; programs fall back to clone.
		equal(unix.SYS_CLONE3, 0, 1), refuse(unix.ENOSYS),
		equal(unix.SYS_CLONE, 0, 4), load(offArg0),
		unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K, K: unix.CLONE_NEWUSER, Jf: 1}, refuse(unix.EPERM),
		ret(unix.SECCOMP_RET_ALLOW),
		equal(unix.SYS_SOCKET, 0, 3), load(offArg2),
		equal(protoMPTCP, 0, 1), refuse(unix.EPROTONOSUPPORT),
		ret(unix.SECCOMP_RET_ALLOW),
	)
}

// filterCalls installs the filter on all threads.
func (p Profile) filterCalls() error {
	prog := p.filter()
	fprog := unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}
	r, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&fprog)))
	if errno != 0 {
		return fmt.Errorf("confine: filter system calls: %w", errno)
	}
	if r != 0 {
		return fmt.Errorf("confine: filter system calls: thread %d does not take the filter", r)
	}
	return nil
}
