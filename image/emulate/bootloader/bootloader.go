// Package bootloader plays the part of a Raspberry Pi's boot loader that an emulator leaves out: it
// reads an SD image, chooses the boot slot that its boot selector names, and takes kernel, initramfs,
// device tree and command line out of that slot's FAT partition.
//
// What it hands over is byte for byte what lies in the image, so what boots in an emulator is what would
// be flashed. It understands the part of autoboot.txt and config.txt that names files, with the
// conditional filters of the documentation
// (https://www.raspberrypi.com/documentation/computers/config_txt.html), and tells which GPIO lines it would drive.
// It does not set clocks or LEDs, does not load overlays, and does not check that the GPU's own firmware
// files are there.
//
// The image is opened for reading only. Sizes are bounded, so a damaged image ends in an error.
package bootloader

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"farkeep/image/fat"
	"farkeep/shared/card"
)

// Board is the machine for which config.txt is read.
type Board string

const (
	// Pi3B reads the sections [all] and [pi3], and wants a device tree.
	Pi3B Board = "pi3"
	// Generic stands for a virtual machine, which no section of config.txt names: it reads [all] alone,
	// and the emulator makes its device tree.
	Generic Board = "generic"
)

// maxText bounds text files, in bytes. Package fat bounds the others.
const maxText = 64 << 10

// Boot is what the boot loader starts.
type Boot struct {
	Partition   int    // of the slot, counted from 1
	Kernel      []byte // a raw or gzipped arm64 Image
	Initramfs   []byte // nil if the slot has none
	DeviceTree  []byte // nil for Generic
	CommandLine string // one line, as the kernel is to see it

	// Names of the files in the slot, for people.
	KernelName, InitramfsName, DeviceTreeName string

	// GPIO holds the levels (true: high) of the lines that a Pi's boot loader drives before the kernel runs.
	GPIO map[int]bool
}

// Load reads the boot files of the image at path for board. If tryboot is true it behaves as after a
// reboot with the one-shot tryboot flag set: the [tryboot] sections hold too.
func Load(path string, board Board, tryboot bool) (*Boot, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	boot, err := load(f, board, tryboot)
	if err != nil {
		return nil, fmt.Errorf("boot from %s: %w", path, err)
	}
	return boot, nil
}

func load(image io.ReaderAt, board Board, tryboot bool) (*Boot, error) {
	first, err := open(image, card.Selector)
	if err != nil {
		return nil, err
	}
	slot := card.Selector
	auto, err := readText(first, card.AutobootFile)
	switch {
	case err == nil:
		s := &settings{facts: facts{board, tryboot, card.Selector}}
		if err := s.parse(auto); err != nil {
			return nil, fmt.Errorf("partition %d: %s: %w", card.Selector, card.AutobootFile, err)
		}
		if slot, err = s.bootPartition(card.Selector); err != nil {
			return nil, fmt.Errorf("partition %d: %s: %w", card.Selector, card.AutobootFile, err)
		}
	case !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("partition %d: %w", card.Selector, err)
	}
	volume := first
	if slot != card.Selector {
		if volume, err = open(image, slot); err != nil {
			return nil, fmt.Errorf("%s chooses partition %d: %w", card.AutobootFile, slot, err)
		}
	}
	boot, err := loadSlot(volume, facts{board, tryboot, slot})
	if err != nil {
		return nil, fmt.Errorf("partition %d: %w", slot, err)
	}
	return boot, nil
}

// open opens the FAT volume in primary partition n, counted from 1. It goes by the partition table, as a Pi
// does, and not by the layout that the table ought to describe.
func open(image io.ReaderAt, n int) (*fat.FS, error) {
	var mbr [512]byte
	if _, err := image.ReadAt(mbr[:], 0); err != nil {
		return nil, fmt.Errorf("read the partition table: %w", err)
	}
	if mbr[510] != 0x55 || mbr[511] != 0xaa {
		return nil, errors.New("it has no partition table: it does not look like an SD image")
	}
	entry := mbr[446+16*(n-1):][:16]
	start := int64(binary.LittleEndian.Uint32(entry[8:])) * 512
	size := int64(binary.LittleEndian.Uint32(entry[12:])) * 512
	if size == 0 {
		return nil, fmt.Errorf("there is no partition %d", n)
	}
	volume, err := fat.Open(io.NewSectionReader(image, start, size), size)
	if err != nil {
		return nil, fmt.Errorf("open partition %d: %w", n, err)
	}
	return volume, nil
}

// loadSlot takes the boot files out of a slot's volume.
func loadSlot(volume *fat.FS, f facts) (*Boot, error) {
	text, err := readText(volume, card.ConfigFile)
	if err != nil {
		return nil, fmt.Errorf("%w (not a boot slot?)", err)
	}
	s := &settings{facts: f, include: func(name string) ([]byte, error) { return readText(volume, name) }}
	if err := s.parse(text); err != nil {
		return nil, fmt.Errorf("%s: %w", card.ConfigFile, err)
	}
	prefix := s.value("os_prefix", "")
	boot := &Boot{Partition: f.partition}

	boot.KernelName = prefix + s.value("kernel", "kernel8.img")
	if boot.Kernel, err = volume.ReadFile(boot.KernelName); err != nil {
		return nil, fmt.Errorf("kernel: %w", err)
	}
	if name := s.value("initramfs", ""); name != "" {
		boot.InitramfsName = prefix + name
		if boot.Initramfs, err = volume.ReadFile(boot.InitramfsName); err != nil {
			return nil, fmt.Errorf("initramfs: %w", err)
		}
	}
	if f.board == Pi3B {
		boot.GPIO = s.gpio
		// The downstream name, unless config.txt asks for the names of the mainline kernel.
		name := "bcm2710-rpi-3-b.dtb"
		if s.value("upstream_kernel", "0") == "1" {
			name = "bcm2837-rpi-3-b.dtb"
		}
		boot.DeviceTreeName = prefix + s.value("device_tree", name)
		if boot.DeviceTree, err = volume.ReadFile(boot.DeviceTreeName); err != nil {
			return nil, fmt.Errorf("device tree: %w", err)
		}
	}
	line, err := readText(volume, prefix+s.value("cmdline", card.CmdlineFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	// Like the boot loader: the first line only.
	first, _, _ := strings.Cut(string(line), "\n")
	boot.CommandLine = strings.TrimSpace(first)
	return boot, nil
}

func readText(volume *fat.FS, name string) ([]byte, error) {
	b, err := volume.ReadFile(name)
	if err != nil {
		return nil, err
	}
	if len(b) > maxText {
		return nil, fmt.Errorf("%s has more than %d bytes", name, maxText)
	}
	return b, nil
}
