// Package luksdisk prepares the disk that goes with an appliance, on the
// operator's laptop or at home: it encrypts a disk, or takes in one that is
// encrypted already, and puts each key where it belongs.
//
// It erases nothing that is in use, and nothing before the caller agreed to
// what [Inspect] found. The first key goes to the key servers' folders, the
// second, with a backup of the header, to the operator's folder, and no key
// anywhere else. Keys are stored before the disk depends on them, so that an
// interruption costs a key without a disk, never a disk without a key.
package luksdisk

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"farkeep/shared/hint"

	"golang.org/x/sys/unix"
)

// Target is a disk, a partition or a file, as it was found.
type Target struct {
	Path    string
	Device  bool   // a block device, not a file
	Size    int64  // bytes
	Model   string // "" for a file, and where the kernel knows none
	Serial  string
	Bus     string // "usb", "sata", "mmc", ...
	Content string // what lies at its beginning
	Parts   []Part
	// Uses says what the running system does with it: a mount point, swap, a
	// mapping. Such a target is refused.
	Uses []string
}

// Part is a partition of a disk.
type Part struct {
	Name    string
	Size    int64
	Content string
}

// Name is what a person types to agree: the model, or the file's name.
func (t *Target) Name() string {
	if t.Model != "" {
		return t.Model
	}
	return filepath.Base(t.Path)
}

// host is where the running system describes itself; tests have their own.
type host struct{ sys, proc, dev string }

var running = host{"/sys", "/proc", "/dev"}

// Inspect looks at path and changes nothing.
func Inspect(path string) (*Target, error) { return running.inspect(path) }

func (h host) inspect(path string) (*Target, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	t := &Target{Path: path}
	switch mode := info.Mode(); {
	case mode.IsRegular():
	case mode.Type() == fs.ModeDevice:
		t.Device = true
	default:
		return nil, fmt.Errorf("%s is neither a disk nor a file (%s)", path, mode.Type())
	}
	if t.Size, err = f.Seek(0, io.SeekEnd); err != nil {
		return nil, fmt.Errorf("size of %s: %w", path, err)
	}
	if t.Content, err = probe(f); err != nil {
		return nil, fmt.Errorf("look into %s: %w", path, err)
	}
	if !t.Device {
		t.Uses, err = h.loops(path, info)
		return t, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, fmt.Errorf("look at %s: %w", path, err)
	}
	return t, h.describe(t, fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev)))
}

// describe fills in what sysfs knows of the block device with that number.
func (h host) describe(t *Target, number string) error {
	dir, err := filepath.EvalSymlinks(filepath.Join(h.sys, "dev/block", number))
	if err != nil {
		return fmt.Errorf("%s is not known to the kernel: %w", t.Path, err)
	}
	whole := dir
	if exists(filepath.Join(dir, "partition")) {
		whole = filepath.Dir(dir)
	}
	t.Model = strings.Join(strings.Fields(read(filepath.Join(whole, "device/vendor"))+" "+read(filepath.Join(whole, "device/model"))), " ")
	if t.Model == "" {
		t.Model = read(filepath.Join(whole, "device/name")) // SD cards
	}
	t.Serial = read(filepath.Join(whole, "device/serial"))
	if t.Serial == "" {
		t.Serial = printable(strings.TrimSpace(vpdSerial(filepath.Join(whole, "device/vpd_pg80"))))
	}
	t.Bus = bus(whole)

	devices := []string{dir}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		sub := filepath.Join(dir, e.Name())
		if !exists(filepath.Join(sub, "partition")) {
			continue
		}
		devices = append(devices, sub)
		p := Part{Name: e.Name()}
		if f, err := os.Open(filepath.Join(h.dev, e.Name())); err == nil {
			p.Size, _ = f.Seek(0, io.SeekEnd)
			p.Content, _ = probe(f)
			f.Close()
		}
		t.Parts = append(t.Parts, p)
	}
	for _, d := range devices {
		uses, err := h.uses(d)
		if err != nil {
			return err
		}
		t.Uses = append(t.Uses, uses...)
	}
	// Last the kernel's own word, which covers what nobody listed.
	if len(t.Uses) == 0 {
		fd, err := unix.Open(t.Path, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
		if errors.Is(err, unix.EBUSY) {
			t.Uses = append(t.Uses, "something else has it open exclusively")
		} else if err == nil {
			unix.Close(fd)
		}
	}
	return nil
}

// uses lists what the system does with one block device, given its folder in sysfs.
func (h host) uses(dir string) ([]string, error) {
	name, number := filepath.Base(dir), read(filepath.Join(dir, "dev"))
	var uses []string
	mounts, err := lines(filepath.Join(h.proc, "self/mountinfo"))
	if err != nil {
		return nil, err
	}
	for _, m := range mounts {
		// proc_pid_mountinfo(5): the third field is the device, the fifth the mount point.
		if f := strings.Fields(m); len(f) > 4 && f[2] == number {
			uses = append(uses, fmt.Sprintf("%s is mounted on %s", name, f[4]))
		}
	}
	swaps, err := lines(filepath.Join(h.proc, "swaps"))
	if err != nil {
		return nil, err
	}
	for _, s := range swaps {
		if f := strings.Fields(s); len(f) > 0 && f[0] == filepath.Join("/dev", name) {
			uses = append(uses, name+" is swap")
		}
	}
	holders, err := os.ReadDir(filepath.Join(dir, "holders"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, holder := range holders {
		label := holder.Name()
		if mapping := read(filepath.Join(dir, "holders", label, "dm/name")); mapping != "" {
			label = mapping
		}
		uses = append(uses, fmt.Sprintf("%s is part of %s (a mapping, RAID or volume group)", name, label))
	}
	return uses, nil
}

// loops says whether a file is behind a loop device.
func (h host) loops(path string, info fs.FileInfo) ([]string, error) {
	files, err := filepath.Glob(filepath.Join(h.sys, "block/loop*/loop/backing_file"))
	if err != nil {
		return nil, err
	}
	var uses []string
	for _, f := range files {
		if behind, err := os.Stat(read(f)); err == nil && os.SameFile(behind, info) {
			uses = append(uses, fmt.Sprintf("%s is behind /dev/%s", filepath.Base(path), filepath.Base(filepath.Dir(filepath.Dir(f)))))
		}
	}
	return uses, nil
}

// Refuse returns why t must not be touched, nil if it may be.
func (t *Target) Refuse() error {
	if len(t.Uses) == 0 {
		return nil
	}
	return hint.Because(fmt.Errorf("%s is in use: %s", t.Path, strings.Join(t.Uses, ", ")), "unmount or close it first, if it really is the disk that you mean")
}

// Describe writes what a person should know before t is erased.
func (t *Target) Describe(w io.Writer) {
	kind := "file"
	if t.Device {
		kind = "disk"
		if t.Bus != "" {
			kind = t.Bus + " disk"
		}
	}
	fmt.Fprintf(w, "  %-8s %s\n  %-8s %s\n", kind+":", t.Path, "size:", Size(t.Size))
	for _, row := range [][2]string{{"model:", t.Model}, {"serial:", t.Serial}} {
		if row[1] != "" {
			fmt.Fprintf(w, "  %-8s %s\n", row[0], row[1])
		}
	}
	fmt.Fprintf(w, "  %-8s %s\n", "content:", t.Content)
	for _, p := range t.Parts {
		fmt.Fprintf(w, "  %-8s %s, %s, %s\n", "", p.Name, Size(p.Size), p.Content)
	}
}

// bus guesses how a disk is attached from its place in the device tree.
func bus(dir string) string {
	for _, b := range []struct{ part, name string }{{"/usb", "USB"}, {"/ata", "SATA"}, {"/nvme", "NVMe"}, {"/mmc", "SD card"}, {"/virtio", "virtual"}} {
		if strings.Contains(dir, b.part) {
			return b.name
		}
	}
	return ""
}

// vpdSerial reads SCSI's unit serial number page: four bytes, then the number.
func vpdSerial(path string) string {
	b, err := os.ReadFile(path)
	if err != nil || len(b) < 4 {
		return ""
	}
	return string(b[4:])
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// read returns a small text file's content, "" if there is none. What a disk
// says of itself is made safe for a terminal.
func read(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return printable(strings.TrimSpace(string(b)))
}

func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return -1
		}
		return r
	}, s)
}

func lines(path string) ([]string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var all []string
	s := bufio.NewScanner(f)
	for s.Scan() {
		all = append(all, s.Text())
	}
	return slices.Clip(all), s.Err()
}

// Size writes a number of bytes for people, as disks are sold: in powers of ten.
func Size(n int64) string {
	units := []string{"bytes", "kB", "MB", "GB", "TB", "PB"}
	v, i := float64(n), 0
	for v >= 1000 && i < len(units)-1 {
		v /= 1000
		i++
	}
	if i == 0 {
		return fmt.Sprintf("%d bytes", n)
	}
	return fmt.Sprintf("%.3g %s", v, units[i])
}
