// Command guest is the whole userland of the emulator's own tests: it runs as process 1 of an emulated
// machine and does what the kernel word guest.steps tells it, printing a line to the serial console for
// each step. It is no part of any image.
//
// Steps are separated by commas:
//
//	high, low   drive the GPIO line guest.line
//	release     let go of the line, as when the process that held it dies
//	disk        wait for a USB disk and print how it begins
//	nodisk      wait until no USB disk is there
//	write:TEXT  write TEXT to the beginning of the USB disk, durably
//	card:TEXT   write TEXT to the last sector of the card, not durably
//	pause:MS    wait
//	date        print the year
//	restart     restart the machine
//	off         switch the machine off
//
// After the last step it waits for ever. Any error ends the machine.
package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

func main() {
	if err := run(); err != nil {
		say("error: %v", err)
		_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	}
	for {
		time.Sleep(time.Hour)
	}
}

func say(format string, args ...any) { fmt.Printf("guest: "+format+"\n", args...) }

func run() error {
	for _, m := range []struct{ kind, dir string }{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}} {
		if err := os.MkdirAll(m.dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.kind, m.dir, m.kind, 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", m.dir, err)
		}
	}
	if err := loadModules(); err != nil {
		return err
	}
	b, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	var steps []string
	g := &gpio{fd: -1}
	for _, word := range strings.Fields(string(b)) {
		if v, ok := strings.CutPrefix(word, "guest.steps="); ok {
			steps = strings.Split(v, ",")
		}
		if v, ok := strings.CutPrefix(word, "guest.line="); ok {
			n, err := strconv.ParseUint(v, 10, 32)
			if err != nil {
				return err
			}
			g.line = uint32(n)
		}
	}
	say("ready")
	for i, step := range steps {
		if err := do(g, step); err != nil {
			return fmt.Errorf("%s: %w", step, err)
		}
		say("done %d %s", i+1, step)
	}
	return nil
}

func do(g *gpio, step string) error {
	verb, arg, _ := strings.Cut(step, ":")
	switch verb {
	case "high":
		return g.set(1)
	case "low":
		return g.set(0)
	case "release":
		err := unix.Close(g.fd)
		g.fd = -1
		return err
	case "disk":
		f, err := openDisk(wait("/sys/block/sd?", true))
		if err != nil {
			return err
		}
		defer f.Close()
		begin := make([]byte, 16)
		if _, err := f.Read(begin); err != nil {
			return err
		}
		say("disk begins with %q", bytes.TrimRight(begin, "\x00"))
	case "nodisk":
		wait("/sys/block/sd?", false)
	case "write":
		f, err := openDisk(wait("/sys/block/sd?", true))
		if err != nil {
			return err
		}
		defer f.Close()
		if _, err := f.WriteString(arg); err != nil {
			return err
		}
		return f.Sync()
	case "card":
		pattern := "/sys/block/mmcblk?"
		if m, _ := filepath.Glob("/sys/block/vda"); len(m) > 0 {
			pattern = "/sys/block/vda"
		}
		f, err := openDisk(wait(pattern, true))
		if err != nil {
			return err
		}
		if _, err := f.Seek(-512, 2); err != nil {
			return err
		}
		// Left open, because closing a block device for the last time writes it back.
		left = append(left, f)
		_, err = f.WriteString(arg)
		return err
	case "pause":
		ms, err := strconv.Atoi(arg)
		if err != nil {
			return err
		}
		time.Sleep(time.Duration(ms) * time.Millisecond)
	case "date":
		say("year %d", time.Now().UTC().Year())
	case "restart":
		return unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	case "off":
		return unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	default:
		return errors.New("unknown step")
	}
	return nil
}

// left are files that stay open to the end.
var left []*os.File

// wait returns the last part of the first path that matches pattern, once one does, or once none does.
func wait(pattern string, there bool) string {
	for {
		m, err := filepath.Glob(pattern)
		if err == nil && len(m) > 0 == there {
			if there {
				return filepath.Base(m[0])
			}
			return ""
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// openDisk opens a block device, which may be listed a moment before it can be opened.
func openDisk(name string) (*os.File, error) {
	for {
		f, err := os.OpenFile("/dev/"+name, os.O_RDWR, 0)
		if !errors.Is(err, unix.ENXIO) && !errors.Is(err, os.ErrNotExist) {
			return f, err
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// modules are what the steps need: USB and its disks, the card, power-off.
var modules = []string{"phy_generic", "bcm2835_rng", "bcm2835_wdt", "bcm2835", "dwc2", "usb_storage", "sd_mod",
	"mmc_block", "virtio_blk", "xhci_pci"}

// loadModules loads modules, each after those that modules.dep names for it.
func loadModules() error {
	lists, err := filepath.Glob("/lib/modules/*/modules.dep")
	if err != nil || len(lists) != 1 {
		return fmt.Errorf("find modules.dep: %q, %v", lists, err)
	}
	b, err := os.ReadFile(lists[0])
	if err != nil {
		return err
	}
	paths, needs := map[string]string{}, map[string][]string{}
	name := func(path string) string {
		return strings.ReplaceAll(strings.TrimSuffix(filepath.Base(path), ".ko"), "-", "_")
	}
	for line := range strings.Lines(string(b)) {
		path, rest, _ := strings.Cut(line, ":")
		paths[name(path)] = filepath.Join(filepath.Dir(lists[0]), path)
		needs[name(path)] = strings.Fields(rest)
	}
	var load func(module string) error
	load = func(module string) error {
		path, ok := paths[module]
		if !ok {
			return nil // loaded, or built in
		}
		delete(paths, module)
		for _, need := range needs[module] {
			if err := load(name(need)); err != nil {
				return err
			}
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		err = unix.FinitModule(int(f.Fd()), "", 0)
		if err != nil && !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("load %s: %w", path, err)
		}
		return nil
	}
	for _, module := range modules {
		if err := load(module); err != nil {
			return err
		}
	}
	return nil
}

// gpio drives one line over the kernel's GPIO character device (include/uapi/linux/gpio.h, version 2).
type gpio struct {
	line uint32
	fd   int
}

type chipInfo struct {
	name, label [32]byte
	lines       uint32
}

type lineAttribute struct {
	id, padding uint32
	value       uint64
	mask        uint64
}

type lineRequest struct {
	offsets    [64]uint32
	consumer   [32]byte
	flags      uint64
	attributes uint32
	padding    [5]uint32
	attribute  [10]lineAttribute
	lines      uint32
	buffer     uint32
	padding2   [5]uint32
	fd         int32
}

type lineValues struct{ bits, mask uint64 }

const (
	getChipInfo    = 0x8044b401
	getLine        = 0xc250b407
	setValues      = 0xc010b40f
	flagOutput     = 1 << 3
	attributeValue = 2
)

func (g *gpio) set(level uint64) error {
	if g.fd >= 0 {
		return ioctl(g.fd, setValues, unsafe.Pointer(&lineValues{level, 1}))
	}
	chip, err := openChip()
	if err != nil {
		return err
	}
	defer unix.Close(chip)
	// Level and direction in one request: no pulse.
	r := lineRequest{lines: 1, flags: flagOutput, attributes: 1}
	r.offsets[0] = g.line
	copy(r.consumer[:], "guest")
	r.attribute[0] = lineAttribute{id: attributeValue, value: level, mask: 1}
	if err := ioctl(chip, getLine, unsafe.Pointer(&r)); err != nil {
		return fmt.Errorf("request line %d: %w", g.line, err)
	}
	g.fd = int(r.fd)
	return nil
}

func openChip() (int, error) {
	paths, err := filepath.Glob("/dev/gpiochip*")
	if err != nil {
		return -1, err
	}
	for _, path := range paths {
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return -1, fmt.Errorf("open %s: %w", path, err)
		}
		var info chipInfo
		if err := ioctl(fd, getChipInfo, unsafe.Pointer(&info)); err != nil {
			return -1, fmt.Errorf("%s: %w", path, err)
		}
		label := unix.ByteSliceToString(info.label[:])
		if label == "pinctrl-bcm2835" || strings.HasSuffix(label, ".pl061") {
			return fd, nil
		}
		unix.Close(fd)
	}
	return -1, fmt.Errorf("no GPIO chip of a Pi or of the generic machine among %q", paths)
}

func ioctl(fd int, request uintptr, arg unsafe.Pointer) error {
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg)); e != 0 {
		return syscall.Errno(e)
	}
	return nil
}
