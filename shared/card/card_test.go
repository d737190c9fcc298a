package card

import (
	"bytes"
	"testing"
)

func TestPartitionsFillTheCardWithoutOverlap(t *testing.T) {
	if TotalSize&(TotalSize-1) != 0 {
		t.Errorf("total size %d is no power of two: QEMU refuses it", TotalSize)
	}
	var end int64
	for i, p := range Partitions() {
		if p.Number != i+1 {
			t.Errorf("%s has number %d at place %d", p.Name, p.Number, i)
		}
		if p.Start < end || p.Start < 1<<20 {
			t.Errorf("%s begins at %d, before %d", p.Name, p.Start, end)
		}
		if p.Start%(4<<20) != 0 || p.Size%(4<<20) != 0 {
			t.Errorf("%s is not aligned to 4 MiB, the erase blocks of SD cards", p.Name)
		}
		if len(p.Label) > 11 && p.Type == 0x0c {
			t.Errorf("label %s is too long for FAT", p.Label)
		}
		end = p.Start + p.Size
	}
	if end != TotalSize {
		t.Errorf("the partitions end at %d of %d", end, TotalSize)
	}
	if d := Partitions()[SlotB-1].Start - Partitions()[SlotA-1].Start; d >= 128<<20 {
		t.Errorf("the slots are %d bytes apart: compressors with a window of 128 MiB do not see that they are alike", d)
	}
}

func TestParseCommandLine(t *testing.T) {
	for _, tt := range []struct {
		line, signature string
		slot            Slot
	}{
		{"console=ttyS1 quiet " + CommandLineWords(A), "4661726b", A},
		{CommandLineWords(B) + "\n", "4661726b", B},
		{"", "", ""},
		{"farkeep.slot=c farkeep.card=4661726B", "", ""},
		{"farkeep.card=4661726", "", ""},
		{"xfarkeep.slot=a", "", ""},
		{"farkeep.slot=a farkeep.slot=b", "", B},
	} {
		signature, slot := ParseCommandLine(tt.line)
		if signature != tt.signature || slot != tt.slot {
			t.Errorf("ParseCommandLine(%q) = %q, %q; want %q, %q", tt.line, signature, slot, tt.signature, tt.slot)
		}
	}
}

func TestPartitionUUID(t *testing.T) {
	signature, _ := ParseCommandLine(CommandLineWords(A))
	if got := PartitionUUID(signature, State); got != "4661726b-04" {
		t.Errorf("PartitionUUID = %s", got)
	}
}

// The boot loader reads at most 512 bytes of autoboot.txt and 98 characters of
// a line of config.txt, and a file of one sector is replaced in one write.
func TestConfigFilesAreOneSector(t *testing.T) {
	for name, text := range map[string][]byte{
		"autoboot a": AutobootConfig(A),
		"autoboot b": AutobootConfig(B),
		"no relay":   RelayConfig(-1, true),
		"relay":      RelayConfig(17, true),
		"relay low":  RelayConfig(4, false),
	} {
		if len(text) != 512 {
			t.Errorf("%s has %d bytes", name, len(text))
		}
		if !bytes.HasSuffix(text, []byte("\n")) {
			t.Errorf("%s does not end in a line end", name)
		}
		for line := range bytes.Lines(text) {
			if len(line) > 98 {
				t.Errorf("%s has a line of %d bytes", name, len(line))
			}
		}
	}
	for _, tt := range []struct {
		text []byte
		want string
	}{
		{AutobootConfig(A), "[all]\ntryboot_a_b=1\nboot_partition=2\n[tryboot]\nboot_partition=3\n"},
		{AutobootConfig(B), "[all]\ntryboot_a_b=1\nboot_partition=3\n[tryboot]\nboot_partition=2\n"},
		{RelayConfig(17, true), "\ngpio=17=op,dl\n"},
		{RelayConfig(17, false), "\ngpio=17=op,dh\n"},
	} {
		if !bytes.Contains(tt.text, []byte(tt.want)) {
			t.Errorf("%q lacks %q", tt.text, tt.want)
		}
	}
	if bytes.Contains(RelayConfig(-1, true), []byte("gpio=")) {
		t.Error("without a relay a line is driven")
	}
}

func TestFindBoard(t *testing.T) {
	for _, tt := range []struct{ compatible, want string }{
		{"raspberrypi,3-model-b\x00brcm,bcm2837\x00", "Raspberry Pi 3 Model B"},
		{"raspberrypi,3-model-b-plus\x00brcm,bcm2837\x00", "Raspberry Pi 3 Model B+"},
		{"linux,dummy-virt\x00", "generic arm64 virtual machine"},
		{"raspberrypi,5-model-b\x00brcm,bcm2712\x00", ""},
		{"raspberrypi,400\x00brcm,bcm2711\x00", ""},
		{"", ""},
	} {
		b, ok := FindBoard([]byte(tt.compatible))
		if b.Name != tt.want || ok != (tt.want != "") {
			t.Errorf("FindBoard(%q) = %q, %v", tt.compatible, b.Name, ok)
		}
	}
}

func TestSlots(t *testing.T) {
	if A.Other() != B || B.Other() != A || A.Partition() != SlotA || B.Partition() != SlotB || Slot("x").Partition() != 0 {
		t.Error("the slots are mixed up")
	}
}
