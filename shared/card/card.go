// Package card describes the SD card that an appliance boots from: where its
// partitions lie, what its files are called and by which words the kernel is
// told which card and which slot it came from. The image builder writes it,
// the appliance reads it, and neither may change it alone: cards that were
// flashed years ago must go on working.
//
//	number  content   file system  holds
//	1       selector  FAT32        farkeep.toml, autoboot.txt, bootcode.bin, README.txt, farkeep-error.txt
//	2       slot A    FAT32        GPU firmware, kernel, device trees, initramfs
//	3       slot B    FAT32        the same for the other version
//	4       state     ext4         last known time, heartbeats, mail queue, logs
package card

import (
	"bytes"
	"fmt"
	"strings"
)

// Signature is the MBR disk signature of every Farkeep card. The kernel shows
// it as the partition UUIDs 4661726b-01 to 4661726b-04 ("Fark" in ASCII), so
// that the appliance finds its own card whatever else is plugged in.
const Signature uint32 = 0x4661726b

// Partition numbers, as in /dev/mmcblk0pN.
const (
	Selector = 1
	SlotA    = 2
	SlotB    = 3
	State    = 4
)

const mib = 1 << 20

// TotalSize is the size of the image in bytes. It is a power of two, because
// QEMU's SD card takes nothing else.
const TotalSize int64 = 512 * mib

// Partition is one entry of the card's partition table.
type Partition struct {
	Number int
	Name   string // "selector", "slot A", "slot B", "state"
	Label  string // the file system's label
	Type   byte   // the MBR type: 0x0c (FAT32, LBA) or 0x83 (Linux)
	Start  int64  // bytes from the beginning of the card
	Size   int64  // bytes
}

// Partitions is the card's layout in order. Slot A and slot B are 120 MiB
// apart: less than the 128 MiB that every zstd decoder looks back without being
// asked to, so a second slot with the same content costs nothing in a
// compressed image.
func Partitions() []Partition {
	return []Partition{
		{Selector, "selector", "FARKEEP", 0x0c, 4 * mib, 60 * mib},
		{SlotA, "slot A", "FARKEEP-A", 0x0c, 64 * mib, 120 * mib},
		{SlotB, "slot B", "FARKEEP-B", 0x0c, 184 * mib, 120 * mib},
		{State, "state", "FARKEEP-STATE", 0x83, 304 * mib, 208 * mib},
	}
}

// Files on the selector partition.
const (
	SettingsFile = "farkeep.toml"
	ErrorFile    = "farkeep-error.txt" // written by the appliance when it cannot use the settings or the board
	ReadmeFile   = "README.txt"
	AutobootFile = "autoboot.txt"  // tells the boot loader which slot to boot
	ContentsFile = "contents.toml" // what the image is made of
	BootcodeFile = "bootcode.bin"  // second stage of the Pi 3 and Zero 2 W, whose ROM looks for it here
)

// SettingsNames are the names under which the settings are looked for, best
// first. Windows' Notepad appends .txt and hides that it did.
func SettingsNames() []string { return []string{SettingsFile, SettingsFile + ".txt"} }

// Files in a slot.
const (
	KernelFile    = "vmlinuz"
	InitramfsFile = "initramfs.zst"
	CmdlineFile   = "cmdline.txt"
	ConfigFile    = "config.txt"
	RelayFile     = "relay.txt" // included by config.txt; see RelayConfig
)

// Slot names one of the two boot slots.
type Slot string

// The slots.
const (
	A Slot = "a"
	B Slot = "b"
)

// Partition returns the slot's partition number, 0 for an unknown slot.
func (s Slot) Partition() int {
	switch s {
	case A:
		return SlotA
	case B:
		return SlotB
	}
	return 0
}

// Other returns the slot that s is not.
func (s Slot) Other() Slot {
	if s == A {
		return B
	}
	return A
}

// Command-line words. The kernel passes on what it does not know itself.
const (
	wordCard = "farkeep.card="
	wordSlot = "farkeep.slot="
)

// CommandLineWords returns the words that tell the appliance which card and
// slot it was booted from.
func CommandLineWords(s Slot) string {
	return fmt.Sprintf("%s%08x %s%s", wordCard, Signature, wordSlot, s)
}

// ParseCommandLine finds Farkeep's words in a kernel command line
// (/proc/cmdline). signature is eight lower-case hexadecimal digits; both
// results are empty where a word is missing or malformed, as on a machine that
// was not booted from a card. The last word wins, as in the kernel.
func ParseCommandLine(text string) (signature string, slot Slot) {
	for word := range strings.FieldsSeq(text) {
		if v, ok := strings.CutPrefix(word, wordCard); ok && isSignature(v) {
			signature = v
		}
		if v, ok := strings.CutPrefix(word, wordSlot); ok && Slot(v).Partition() != 0 {
			slot = Slot(v)
		}
	}
	return signature, slot
}

func isSignature(s string) bool {
	if len(s) != 8 {
		return false
	}
	for _, c := range s {
		if !strings.ContainsRune("0123456789abcdef", c) {
			return false
		}
	}
	return true
}

// PartitionUUID returns what the kernel calls a partition of the card with the
// given signature (PARTUUID in uevent files of /sys/class/block).
func PartitionUUID(signature string, number int) string {
	return fmt.Sprintf("%s-%02x", signature, number)
}

// sector is the size of a file that is replaced by writing one sector in
// place: an SD card writes a sector whole or not at all, so such a file is
// never half old and half new.
const sector = 512

// AutobootConfig returns the content of autoboot.txt for a card that boots
// slot s. It is exactly 512 bytes, which is also the most that the boot loader
// reads, so switching slots is one sector written in place.
//
// Source: Raspberry Pi documentation, config_txt/autoboot.adoc.
func AutobootConfig(s Slot) []byte {
	return pad(fmt.Sprintf("[all]\ntryboot_a_b=1\nboot_partition=%d\n[tryboot]\nboot_partition=%d\n",
		s.Partition(), s.Other().Partition()))
}

// RelayConfig returns the content of a slot's relay.txt, which makes the boot
// loader drive the relay's line to its idle level (disk off) seconds before
// Linux runs. It is exactly 512 bytes: see AutobootConfig. A negative line
// means that there is no relay.
//
// Source: Raspberry Pi documentation, config_txt/gpio.adoc.
func RelayConfig(line int, activeHigh bool) []byte {
	if line < 0 {
		return pad("# no relay\n")
	}
	idle := "dh"
	if activeHigh {
		idle = "dl"
	}
	return pad(fmt.Sprintf("# the relay's idle level until the appliance takes over\ngpio=%d=op,%s\n", line, idle))
}

// pad fills text with comment lines up to one sector. The boot loader reads
// lines of at most 98 characters, hence several short ones.
func pad(text string) []byte {
	out := []byte(text)
	for len(out) < sector {
		n := min(sector-len(out), 64)
		if n == 1 {
			out = append(out, '\n')
			break
		}
		out = append(out, '#')
		out = append(out, bytes.Repeat([]byte{'.'}, n-2)...)
		out = append(out, '\n')
	}
	return out
}

// Board is a machine that the image boots on.
type Board struct {
	Name       string // for people
	Compatible string // the first entry of the root node's "compatible" in its device tree
	DTB        string // file name in a slot; empty where the machine brings its own
}

// SupportedBoards lists every machine that the image is built and checked for.
func SupportedBoards() []Board {
	return []Board{
		{"Raspberry Pi 3 Model B", "raspberrypi,3-model-b", "bcm2837-rpi-3-b.dtb"},
		{"Raspberry Pi 3 Model B+", "raspberrypi,3-model-b-plus", "bcm2837-rpi-3-b-plus.dtb"},
		{"Raspberry Pi 3 Model A+", "raspberrypi,3-model-a-plus", "bcm2837-rpi-3-a-plus.dtb"},
		{"Raspberry Pi 4 Model B", "raspberrypi,4-model-b", "bcm2711-rpi-4-b.dtb"},
		{"Raspberry Pi Zero 2 W", "raspberrypi,model-zero-2-w", "bcm2837-rpi-zero-2-w.dtb"},
		{"generic arm64 virtual machine", "linux,dummy-virt", ""},
	}
}

// RefusedDTBs names the device trees of boards that start Linux but are not
// supported. They are in a slot so that the appliance runs far enough to say so.
func RefusedDTBs() []string {
	return []string{"bcm2711-rpi-400.dtb", "bcm2711-rpi-cm4-io.dtb", "bcm2837-rpi-cm3-io3.dtb"}
}

// FindBoard returns the supported board that a device tree's root "compatible"
// names. compatible is the property as the kernel shows it in
// /proc/device-tree/compatible: strings that each end in a NUL byte.
func FindBoard(compatible []byte) (Board, bool) {
	for name := range bytes.SplitSeq(compatible, []byte{0}) {
		for _, b := range SupportedBoards() {
			if string(name) == b.Compatible {
				return b, true
			}
		}
	}
	return Board{}, false
}
