package disk

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"farkeep/appliance/consent"
	"farkeep/appliance/part"
	"farkeep/appliance/scrub"
	"farkeep/appliance/spawn"
	"farkeep/appliance/status"
	"farkeep/appliance/unlock"
	"farkeep/shared/keywire"
	"farkeep/shared/luksheader"
	"farkeep/shared/secret"
	"farkeep/shared/settings"

	"github.com/anatol/devmapper.go"
	"golang.org/x/sys/unix"
)

// mappingName is the name of the opened disk for the device mapper.
const mappingName = "farkeep"

// linux is the System of a real machine.
type linux struct {
	env        *part.Env
	uuid       string
	identity   secret.Text
	keyServers []settings.KeyServer
	target     string // mount point
	owner      int    // uid and gid of the keeper
	sys        string // "/sys"
	log        *slog.Logger

	// met is how many errors the file system had met when it was mounted.
	met int
	// corrected: e2fsck changed it, and nobody was told yet.
	corrected bool
}

// notDisks are block devices that never are the disk: made by the kernel out
// of others, or of memory.
var notDisks = []string{"dm-", "loop", "ram", "zram", "md", "nbd", "sr"}

// Find reads the beginning of every block device. There is no udev whose
// links could tell.
func (l *linux) Find(uuid string) (Device, error) {
	entries, err := os.ReadDir(filepath.Join(l.sys, "class/block"))
	if err != nil {
		return Device{}, fmt.Errorf("list block devices: %w", err)
	}
	for _, e := range entries {
		name := e.Name()
		if slices.ContainsFunc(notDisks, func(p string) bool { return strings.HasPrefix(name, p) }) {
			continue
		}
		node := filepath.Join("/dev", strings.ReplaceAll(name, "!", "/"))
		f, err := os.Open(node)
		if err != nil {
			continue // gone again, or without a medium
		}
		got, err := luksheader.Identify(f)
		f.Close()
		if err == nil && got == uuid {
			return l.describe(name, node)
		}
	}
	return Device{}, errNotFound
}

func (l *linux) describe(name, node string) (Device, error) {
	d := Device{Name: name, Node: node, Disk: name}
	dir := filepath.Join(l.sys, "class/block", name)
	if _, err := os.Stat(filepath.Join(dir, "partition")); err == nil {
		real, err := filepath.EvalSymlinks(dir)
		if err != nil {
			return Device{}, fmt.Errorf("whole disk of %s: %w", name, err)
		}
		d.Disk = filepath.Base(filepath.Dir(real))
	}
	seq, err := os.ReadFile(filepath.Join(l.sys, "class/block", d.Disk, "diskseq"))
	if err != nil {
		return Device{}, fmt.Errorf("appearance of %s: %w", name, err)
	}
	d.Seq = strings.TrimSpace(string(seq))
	return d, nil
}

// Present asks sysfs, which never blocks on the disk.
func (l *linux) Present(dev Device) bool {
	seq, err := os.ReadFile(filepath.Join(l.sys, "class/block", dev.Disk, "diskseq"))
	return err == nil && strings.TrimSpace(string(seq)) == dev.Seq
}

// Mapping finds our mapping by name and makes sure that it is of our disk. One
// without a table, left by a child that was killed at the wrong moment, is
// removed.
func (l *linux) Mapping() (string, error) {
	info, err := devmapper.InfoByName(mappingName)
	if isNoMapping(err) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	want := fmt.Sprintf("CRYPT-LUKS2-%s-%s", strings.ReplaceAll(l.uuid, "-", ""), mappingName)
	if info.UUID != want {
		return "", fmt.Errorf("there is a mapping %s of something else (%s): remove it with dmsetup remove %s", mappingName, info.UUID, mappingName)
	}
	if info.Flags&unix.DM_ACTIVE_PRESENT_FLAG == 0 || info.Flags&unix.DM_SUSPEND_FLAG != 0 {
		return "", l.Unmap(false)
	}
	return fmt.Sprintf("/dev/dm-%d", unix.Minor(info.DevNo)), nil
}

func (l *linux) Unlock(ctx context.Context, dev Device, tokens map[string]keywire.Token, refused []string) (unlock.Result, error) {
	var r unlock.Result
	err := spawn.Run(ctx, l.env, part.Unlock, unlock.Brief{
		Identity: l.identity, KeyServers: l.keyServers, UUID: l.uuid, Device: dev.Node, Mapping: mappingName,
		Tokens: tokens, Refused: refused, Claims: consent.Machine(l.log),
	}, &r)
	if err != nil {
		return unlock.Result{}, &failure{ErrorUnlock, err}
	}
	return r, nil
}

func (l *linux) Consent(ctx context.Context, r consent.Round) (consent.Result, error) {
	m := consent.Machine(l.log)
	r.Claims.Boot, r.Claims.Serial, r.Claims.Up = m.Boot, m.Serial, m.Up
	var got consent.Result
	err := spawn.Run(ctx, l.env, part.Consent, consent.Brief{Identity: l.identity, KeyServers: l.keyServers, Round: r}, &got)
	return got, err
}

func (l *linux) NeedsCheck(node string, now time.Time) (Care, string, error) {
	f, err := os.Open(node)
	if err != nil {
		return CareFull, "", err
	}
	defer f.Close()
	s, err := readSuperblock(f)
	if err != nil {
		return CareFull, "", &failure{status.ErrorFileSystem, err}
	}
	care, why := s.needs(now)
	return care, why, nil
}

func (l *linux) Check(ctx context.Context, node string, full bool) error {
	check := fsck{log: l.log, programs: fsckPrograms, quiet: progressEvery}
	corrected, err := check.run(ctx, node, full)
	if errors.Is(err, errUnopened) && ctx.Err() == nil {
		// A rotten superblock. The same lies at the beginning of the second block
		// group too, and e2fsck -p takes that one only when it is told to.
		l.log.Warn("trying the copy of the superblock", "err", err)
		corrected, err = check.run(ctx, node, true, "-b", "32768", "-B", "4096")
	}
	if err == nil && corrected {
		l.corrected = true
	}
	return err
}

func (l *linux) Mount(node string) error {
	if err := os.MkdirAll(l.target, 0o755); err != nil {
		return err
	}
	// noatime: reading history must not write to it. The rest is ext4's default:
	// data=ordered and a commit every five seconds, because every commit of a
	// generation syncs explicitly.
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_NOATIME
	if err := unix.Mount(node, l.target, "ext4", flags, "errors=remount-ro"); err != nil {
		return &failure{status.ErrorFileSystem, fmt.Errorf("%s on %s: %w", node, l.target, err)}
	}
	if _, l.met, _ = l.ext4(); l.met > 0 {
		l.log.Warn("the file system remembers errors that e2fsck did not clear", "errors", l.met)
	}
	if err := l.own(); err != nil {
		return errors.Join(&failure{status.ErrorFileSystem, err}, l.Unmount())
	}
	return nil
}

// own gives the top of the disk to the keeper. A disk that was filled at home
// by another user comes with folders of root's: those in which the keeper makes
// new entries, and no others, are given to it. Everything else stays as it was.
func (l *linux) own() error {
	root, err := os.OpenRoot(l.target)
	if err != nil {
		return err
	}
	defer root.Close()
	give := []string{".", "generations", "incoming", ".heartbeat", ".farkeep", ".farkeep/going", ".farkeep/judge", "staging"}
	if repositories, err := fs.ReadDir(root.FS(), "generations"); err == nil {
		for _, r := range repositories {
			if r.IsDir() {
				give = append(give, "generations/"+r.Name())
			}
		}
	}
	for _, name := range give {
		info, err := root.Lstat(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("owner of %s on the disk: %w", name, err)
		}
		st, ok := info.Sys().(*syscall.Stat_t)
		if info.IsDir() && ok && int(st.Uid) == l.owner {
			continue
		}
		if info.IsDir() {
			err = root.Lchown(name, l.owner, l.owner)
		}
		if err != nil {
			return fmt.Errorf("owner of %s on the disk: %w", name, err)
		}
	}
	if l.corrected {
		// What e2fsck did to names and content is for the sums to say.
		if err := scrub.Corrected(root, l.owner); err != nil {
			return err
		}
		l.corrected = false
	}
	return root.Chmod(".", 0o755)
}

// Mounted reads the mount table, which does not touch the disk.
func (l *linux) Mounted() (bool, error) {
	fields, err := l.mountLine()
	return fields != nil, err
}

// mountLine is our mount's line of the mount table, in fields; nil if there is
// none.
func (l *linux) mountLine() ([]string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		// proc_pid_mountinfo(5): the fifth field is the mount point. Ours has no
		// characters that would be escaped.
		if fields := strings.Fields(lines.Text()); len(fields) > 9 && fields[4] == l.target {
			return fields, nil
		}
	}
	return nil, lines.Err()
}

// ext4 asks the kernel how the mounted file system is, without touching the
// disk: its mount options, and how many errors it has met since the last check.
func (l *linux) ext4() (options []string, errors int, err error) {
	fields, err := l.mountLine()
	if err != nil || fields == nil {
		return nil, 0, err
	}
	// The last three fields: type, source, options of the file system itself.
	n := len(fields)
	options = strings.Split(fields[n-1], ",")
	text, err := os.ReadFile(filepath.Join(l.sys, "fs/ext4", filepath.Base(fields[n-2]), "errors_count"))
	if err != nil {
		return options, 0, err
	}
	errors, err = strconv.Atoi(strings.TrimSpace(string(text)))
	return options, errors, err
}

// sound says whether ext4 works on. After an error it takes no more writes: up
// to Linux 6.12 it was then read-only for statfs(2) too, later ones only say
// "emergency_ro" in the mount table.
func (l *linux) sound() error {
	options, met, err := l.ext4()
	switch {
	case slices.Contains(options, "ro"), slices.Contains(options, "emergency_ro"):
		return &failure{status.ErrorFileSystem, errors.New("the file system found an error and went read-only")}
	case slices.Contains(options, "shutdown"):
		return &failure{status.ErrorHung, errors.New("the file system was shut down")}
	case err != nil:
		return fmt.Errorf("how the file system is: %w", err)
	case met > l.met:
		return &failure{status.ErrorFileSystem, fmt.Errorf("the file system has met %d errors", met-l.met)}
	}
	return nil
}

// Healthy reads the LUKS header past the page cache: only then does the answer
// come from the disk. A disk that was pulled out still accepts writes for a
// while.
func (l *linux) Healthy(dev Device) error {
	var st unix.Statfs_t
	if err := unix.Statfs(l.target, &st); err != nil {
		return &failure{status.ErrorHung, fmt.Errorf("the file system: %w", err)}
	}
	if err := l.sound(); err != nil {
		return err
	}
	fd, err := unix.Open(dev.Node, unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return &failure{status.ErrorHung, fmt.Errorf("open %s: %w", dev.Node, err)}
	}
	defer unix.Close(fd)
	page, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	defer unix.Munmap(page)
	if n, err := unix.Pread(fd, page, 0); err != nil || n != len(page) {
		return &failure{status.ErrorHung, fmt.Errorf("read %s: %d bytes, %w", dev.Node, n, orEOF(err))}
	}
	return nil
}

func orEOF(err error) error {
	if err == nil {
		return unix.EIO
	}
	return err
}

func (l *linux) Space() (total, free int64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(l.target, &st); err != nil {
		return 0, 0, err
	}
	return int64(st.Blocks) * st.Bsize, int64(st.Bavail) * st.Bsize, nil
}

func (l *linux) Sync() error {
	return l.onMount(func(fd int) error { return unix.Syncfs(fd) })
}

func (l *linux) onMount(do func(fd int) error) error {
	fd, err := unix.Open(l.target, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return do(fd)
}

func (l *linux) Unmount() error {
	err := unix.Unmount(l.target, unix.UMOUNT_NOFOLLOW)
	if errors.Is(err, unix.EINVAL) {
		return nil // not mounted
	}
	return err
}

// Abandon shuts ext4 down: from then on every access fails at once, also on a
// disk that answers nothing. What cannot be unmounted is detached.
func (l *linux) Abandon(flush bool) error {
	const (
		ioctlShutdown = 0x8004587d // EXT4_IOC_SHUTDOWN, fs/ext4/ext4.h
		logFlush      = 1          // EXT4_GOING_FLAGS_LOGFLUSH
		noLogFlush    = 2          // EXT4_GOING_FLAGS_NOLOGFLUSH
	)
	flags := uint32(noLogFlush)
	if flush {
		flags = logFlush
	}
	if mounted, err := l.Mounted(); err == nil && !mounted {
		return nil // the folder below must not be taken for the disk
	}
	shutdown := l.onMount(func(fd int) error {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), ioctlShutdown, uintptr(unsafe.Pointer(&flags)))
		if errno != 0 {
			return os.NewSyscallError("shut the file system down", errno)
		}
		return nil
	})
	if shutdown != nil {
		l.log.Warn("the disk", "err", shutdown)
	}
	if err := l.Unmount(); err == nil {
		return nil
	}
	return unix.Unmount(l.target, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
}

// isNoMapping: no mapping of that name, no device mapper in the kernel, or its
// module not loaded yet.
func isNoMapping(err error) bool {
	return errors.Is(err, unix.ENXIO) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV)
}

func (l *linux) Unmap(later bool) error {
	if !later {
		err := devmapper.Remove(mappingName)
		if isNoMapping(err) {
			return nil
		}
		return err
	}
	// devmapper.go's Remove cannot say "deferred".
	control, err := os.OpenFile("/dev/mapper/control", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer control.Close()
	arg := unix.DmIoctl{Version: [3]uint32{4, 0, 0}, Data_size: unix.SizeofDmIoctl, Data_start: unix.SizeofDmIoctl, Flags: unix.DM_DEFERRED_REMOVE}
	copy(arg.Name[:], mappingName)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, control.Fd(), unix.DM_DEV_REMOVE, uintptr(unsafe.Pointer(&arg)))
	runtime.KeepAlive(&arg)
	if errno != 0 && errno != unix.ENXIO {
		return os.NewSyscallError("dm remove, deferred", errno)
	}
	return nil
}

func (l *linux) Flush(dev Device, stop bool) error {
	return flushDisk(filepath.Join("/dev", dev.Disk), stop)
}
