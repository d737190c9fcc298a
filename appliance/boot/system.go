package boot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"farkeep/appliance/kmod"

	"golang.org/x/sys/unix"
)

// Words are the kernel command line's words for the appliance.
type Words struct {
	Card     string // farkeep.card: the card's signature, eight hexadecimal digits
	Slot     string // farkeep.slot: a or b
	Debug    bool   // farkeep.log=debug
	Watchdog string // farkeep.watchdog: softdog, none, or "" for the best one
}

type mount struct {
	source, target, kind string
	flags                uintptr
	data                 string
	perm                 os.FileMode
}

func mountTable() []mount {
	const safe = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	return []mount{
		{"proc", "/proc", "proc", safe, "", 0o555},
		{"sysfs", "/sys", "sysfs", safe, "", 0o555},
		// Before anything else there: devtmpfs makes /dev/mapper/control and /dev/dm-N by itself.
		{"devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=0755", 0o755},
		// The largest things here are the parts' status files.
		{"tmpfs", "/run", "tmpfs", safe, "mode=0755,size=16m", 0o755},
		{"tmpfs", "/tmp", "tmpfs", safe, "mode=1777,size=16m", 0o777},
	}
}

func mounts(context.Context, *Machine) error {
	for _, t := range mountTable() {
		if err := os.MkdirAll(t.target, t.perm); err != nil {
			return fmt.Errorf("make %s: %w", t.target, err)
		}
		// EBUSY: the kernel mounted it already (devtmpfs.mount).
		if err := unix.Mount(t.source, t.target, t.kind, t.flags, t.data); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", t.target, err)
		}
	}
	return nil
}

func words(_ context.Context, m *Machine) error {
	text, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return fmt.Errorf("kernel words: %w", err)
	}
	m.Words = ParseWords(string(text))
	return nil
}

func loopback(context.Context, *Machine) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("bring up lo: %w", err)
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return fmt.Errorf("bring up lo: %w", err)
	}
	req.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req); err != nil {
		return fmt.Errorf("bring up lo: %w", err)
	}
	return nil
}

// settingsTable are the kernel settings, and why.
func settingsTable() [][2]string {
	return [][2]string{
		{"kernel/panic", "10"}, // seconds until the restart
		{"kernel/panic_on_oops", "1"},
		{"kernel/kptr_restrict", "2"},
		{"kernel/dmesg_restrict", "1"},
		{"kernel/unprivileged_bpf_disabled", "1"},
		{"kernel/sysrq", "0"}, // the relative's keyboard is no console
		{"kernel/core_pattern", "|/bin/false"},
		{"kernel/yama/ptrace_scope", "2"},
		{"fs/protected_hardlinks", "1"},
		{"fs/protected_symlinks", "1"},
		{"fs/protected_fifos", "2"},
		{"fs/protected_regular", "2"},
		{"fs/suid_dumpable", "0"},
		{"net/ipv4/ip_forward", "0"},
		{"net/ipv6/conf/all/forwarding", "0"},
		// Loose: replies to what the VPN's peers send may leave by another interface.
		{"net/ipv4/conf/all/rp_filter", "2"},
		{"net/ipv4/conf/all/accept_redirects", "0"},
		{"net/ipv4/conf/all/send_redirects", "0"},
		{"net/ipv4/conf/all/accept_source_route", "0"},
		{"net/ipv6/conf/all/accept_redirects", "0"},
		{"net/ipv4/tcp_syncookies", "1"},
	}
}

func sysctls(context.Context, *Machine) error {
	var errs []error
	for _, s := range settingsTable() {
		// What a kernel does not have needs no setting.
		if err := sysctl(s[0], s[1]); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func sysctl(name, value string) error {
	f, err := os.OpenFile(filepath.Join("/proc/sys", name), os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("set %s: %w", name, err)
	}
	// One write, newline included: printk_devkmsg insists on it.
	_, err = f.WriteString(value + "\n")
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("set %s to %s: %w", name, value, err)
	}
	return nil
}

// modulesFile is in the initramfs: what to load before looking at devices.
const modulesFile = "/etc/farkeep-modules"

func modules(_ context.Context, m *Machine) error {
	loader, err := kmod.NewLoader("/", m.Log)
	if err != nil {
		return err
	}
	m.Loader = loader
	n, err := loader.LoadList(modulesFile)
	m.Log.Info("modules loaded", "listed", n)
	return err
}

func devices(ctx context.Context, m *Machine) error {
	if m.Loader == nil {
		return errors.New("the kernel's modules could not be read")
	}
	hotplug, listenErr := kmod.Listen()
	if listenErr == nil {
		go func() {
			if err := hotplug.Watch(m.ctx, m.Loader); err != nil {
				m.Log.Error("new devices are not noticed any more", "err", err)
			}
		}()
	}
	n, err := m.Loader.Coldplug(ctx, listenErr == nil)
	m.Log.Info("devices looked at", "kinds", n)
	return errors.Join(listenErr, err)
}

// randomness waits for the kernel's random number generator. All of Go's
// cryptography would block on it, without a word.
func randomness(ctx context.Context, _ *Machine) error {
	var b [1]byte
	for {
		_, err := unix.Getrandom(b[:], unix.GRND_NONBLOCK)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("ask for randomness: %w", err)
		}
		select {
		case <-ctx.Done():
			return errors.New("the kernel has no randomness: is the module of the board's generator missing?")
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func hostName(_ context.Context, m *Machine) error {
	if err := unix.Sethostname([]byte(m.Settings.Name)); err != nil {
		return fmt.Errorf("set the host name: %w", err)
	}
	return nil
}

// BootID is the kernel's random name for this boot.
func BootID() string {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return string(bytes.TrimSpace(id))
}

// Uptime is the time since the machine's start, whatever the clock did.
func Uptime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

// cut returns what follows prefix in the last of words that has it.
func cut(words []string, prefix string) string {
	out := ""
	for _, w := range words {
		if v, ok := strings.CutPrefix(w, prefix); ok {
			out = v
		}
	}
	return out
}
