package kmod

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"farkeep/shared/modname"
)

// Loader loads modules, each file at most once.
type Loader struct {
	ix     *Index
	dir    string // the modules folder
	sys    string // normally /sys
	log    *slog.Logger
	insert func(file string) error

	mu    sync.Mutex // guards the fields below; held while loading
	tried map[string]error
	asked map[string]bool // modaliases that were looked up
}

// NewLoader returns a loader for the running kernel's modules, which lie in
// root/lib/modules/<release>; root is normally "/".
func NewLoader(root string, log *slog.Logger) (*Loader, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return nil, fmt.Errorf("kernel modules: ask for the kernel's release: %w", err)
	}
	dir := filepath.Join(root, "lib/modules", unix.ByteSliceToString(u.Release[:]))
	ix, err := ReadIndex(os.DirFS(dir))
	if err != nil {
		return nil, err
	}
	return newLoader(ix, dir, filepath.Join(root, "sys"), log, insert), nil
}

func newLoader(ix *Index, dir, sys string, log *slog.Logger, insert func(string) error) *Loader {
	return &Loader{ix: ix, dir: dir, sys: sys, log: log, insert: insert, tried: map[string]error{}, asked: map[string]bool{}}
}

// insert asks the kernel to load one file (finit_module(2)).
func insert(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	flags := 0
	if !strings.HasSuffix(file, ".ko") {
		flags = unix.MODULE_INIT_COMPRESSED_FILE
	}
	return unix.FinitModule(int(f.Fd()), "", flags)
}

// Load loads a module with its dependencies. Errors of dependencies do not
// stop it: the kernel says soon enough whether the module can do without.
func (l *Loader) Load(module string) error {
	files, err := l.ix.Order(module)
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	var errs []error
	for _, file := range files {
		err, done := l.tried[file]
		if !done {
			err = l.insert(filepath.Join(l.dir, file))
			// ENODEV: its hardware is not here, as with drivers of other boards.
			if errors.Is(err, unix.EEXIST) || errors.Is(err, unix.ENODEV) {
				err = nil
			}
			l.tried[file] = err
			l.log.Debug("module", "name", modname.Canonical(file), "err", err)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("load module %s: %w", modname.Canonical(file), err))
		}
	}
	return errors.Join(errs...)
}

// LoadList loads the modules that a file names, one a line, in their order. It
// returns how many there are and the errors of those that did not load;
// modules of other boards' hardware are none.
func (l *Loader) LoadList(file string) (int, error) {
	f, err := os.Open(file)
	if err != nil {
		return 0, fmt.Errorf("kernel modules: %w", err)
	}
	defer f.Close()
	n := 0
	var errs []error
	err = eachLine(f, func(line string) error {
		n++
		if err := l.Load(line); err != nil {
			errs = append(errs, err)
		}
		return nil
	})
	return n, errors.Join(append(errs, err)...)
}

// loadFor loads what fits a modalias, once. Devices that no module of the image is for are the rule: most of a board's.
func (l *Loader) loadFor(modalias string) {
	l.mu.Lock()
	known := l.asked[modalias]
	if len(l.asked) < maxEntries {
		l.asked[modalias] = true
	}
	l.mu.Unlock()
	if known {
		return
	}
	for _, module := range l.ix.Lookup(modalias) {
		if err := l.Load(module); err != nil {
			l.log.Warn("module for a device does not load", "module", module, "device", modalias, "err", err)
		}
	}
}

// maxRounds bounds Coldplug: controllers make buses, whose devices are
// controllers of further buses.
const maxRounds = 6

// Coldplug loads the modules for all devices that are there. What appears by
// that is left to Watch if somebody is watching, and looked for here if not. It
// returns how many kinds of devices it met.
func (l *Loader) Coldplug(ctx context.Context, watched bool) (int, error) {
	seen := map[string]bool{}
	for range maxRounds {
		before := len(seen)
		err := filepath.WalkDir(filepath.Join(l.sys, "devices"), func(path string, d fs.DirEntry, err error) error {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			// Devices vanish while one looks.
			if err != nil || d.IsDir() || d.Name() != "modalias" {
				return nil
			}
			modalias, err := readAttribute(path)
			if err == nil && modalias != "" && !seen[modalias] {
				seen[modalias] = true
				l.loadFor(modalias)
			}
			return nil
		})
		if err != nil {
			return len(seen), fmt.Errorf("kernel modules: look at the devices: %w", err)
		}
		if watched || len(seen) == before {
			break
		}
	}
	return len(seen), nil
}

func readAttribute(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, 4096))
	return strings.TrimSpace(string(data)), err
}

// Hotplug is a subscription to the kernel's messages about devices.
type Hotplug struct{ fd int }

// Listen subscribes. Subscribe before Coldplug, so that no device falls between
// them.
func Listen() (*Hotplug, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return nil, fmt.Errorf("device messages: %w", err)
	}
	fail := func(err error) (*Hotplug, error) {
		unix.Close(fd)
		return nil, fmt.Errorf("device messages: %w", err)
	}
	// Group 1 is the kernel's own; programs cannot send to it without privileges.
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		return fail(err)
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 1<<20); err != nil {
		return fail(err)
	}
	// Wakes the reader so that it sees its context end.
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 1}); err != nil {
		return fail(err)
	}
	return &Hotplug{fd}, nil
}

// Watch loads modules for devices that appear, until ctx ends, and closes the
// subscription.
func (h *Hotplug) Watch(ctx context.Context, l *Loader) error {
	defer unix.Close(h.fd)
	buf := make([]byte, 64<<10)
	for ctx.Err() == nil {
		n, from, err := unix.Recvfrom(h.fd, buf, 0)
		switch {
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ENOBUFS):
			// Messages were lost: look at everything again.
			if _, err := l.Coldplug(ctx, false); err != nil && ctx.Err() == nil {
				l.log.Warn("devices may have been missed", "err", err)
			}
			continue
		case err != nil:
			return fmt.Errorf("device messages: %w", err)
		}
		if sender, ok := from.(*unix.SockaddrNetlink); !ok || sender.Pid != 0 {
			continue // not from the kernel
		}
		if action, modalias := parseEvent(buf[:n]); action == "add" && modalias != "" {
			l.loadFor(modalias)
		}
	}
	return nil
}

// parseEvent finds the two fields of a device message that matter. A message
// is "action@devpath" and then KEY=value strings, each ending in a NUL byte.
func parseEvent(msg []byte) (action, modalias string) {
	for field := range bytes.SplitSeq(msg, []byte{0}) {
		key, value, ok := bytes.Cut(field, []byte{'='})
		if !ok {
			continue
		}
		switch string(key) {
		case "ACTION":
			action = string(value)
		case "MODALIAS":
			modalias = string(value)
		}
	}
	return action, modalias
}
