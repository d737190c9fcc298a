package luksdisk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"farkeep/shared/luksheader"
)

// magics are the marks by which file systems and volumes are known; what they
// are is libblkid's knowledge, which is not everywhere.
var magics = []struct {
	at    int64
	bytes string
	what  string
}{
	{3, "NTFS    ", "NTFS (Windows)"},
	{3, "EXFAT   ", "exFAT"},
	{0, "XFSB", "XFS"},
	{0x10040, "_BHRfS_M", "Btrfs"},
	{54, "FAT1", "FAT"},
	{82, "FAT32", "FAT32"},
	{32, "NXSB", "APFS (Apple)"},
	{1024, "H+", "HFS+ (Apple)"},
	{1024, "HX", "HFS+ (Apple)"},
	{4086, "SWAPSPACE2", "swap"},
	{0x218, "LVM2 001", "LVM volume"},
	{0x18, "LVM2 001", "LVM volume"},
	{4096, "\xfc\x4e\x2b\xa9", "Linux RAID"},
	{0x8001, "CD001", "ISO 9660"},
	{0x400, "\x10\x20\xf5\xf2", "F2FS"},
	{3, "-FVE-FS-", "BitLocker (Windows, encrypted)"},
}

// probe says what lies on a disk or partition, by its first bytes. It knows
// what people have on disks that they reach for by mistake.
func probe(r io.ReaderAt) (string, error) {
	head := make([]byte, 0x11000)
	n, err := r.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return "", err
	}
	head = head[:n]
	if uuid, err := luksheader.Identify(r); err == nil {
		return "LUKS (encrypted), UUID " + uuid, nil
	}
	if at(head, 1024+0x38, "\x53\xef") {
		s := head[1024:]
		label, last := field(s, 0x78, 16), field(s, 0x88, 64)
		text := "ext2/3/4"
		if label != "" {
			text += fmt.Sprintf(", label %q", label)
		}
		if last != "" {
			text += fmt.Sprintf(", last mounted on %s", last)
		}
		return text, nil
	}
	for _, m := range magics {
		if at(head, m.at, m.bytes) {
			return m.what, nil
		}
	}
	switch {
	case at(head, 512, "EFI PART"), at(head, 4096, "EFI PART"):
		return "a GPT partition table", nil
	case at(head, 510, "\x55\xaa"):
		return "an MBR partition table or a boot sector", nil
	case len(bytes.Trim(head, "\x00")) == 0:
		return "nothing (zeros)", nil
	}
	return "unknown data", nil
}

func at(head []byte, offset int64, want string) bool {
	return int64(len(head)) >= offset+int64(len(want)) && string(head[offset:offset+int64(len(want))]) == want
}

func field(b []byte, offset, length int) string {
	if len(b) < offset+length {
		return ""
	}
	text, _, _ := bytes.Cut(b[offset:offset+length], []byte{0})
	return printable(string(text))
}

// ext4Size returns the length in bytes of the ext4 file system that begins at
// r's beginning, and false if there is none.
func ext4Size(r io.ReaderAt) (int64, bool) {
	b := make([]byte, 4096)
	if _, err := r.ReadAt(b, 0); err != nil || !at(b, 1024+0x38, "\x53\xef") {
		return 0, false
	}
	s := b[1024:]
	shift := binary.LittleEndian.Uint32(s[0x18:])
	if shift > 6 {
		return 0, false
	}
	blocks := int64(binary.LittleEndian.Uint32(s[4:]))
	if binary.LittleEndian.Uint32(s[0x60:])&0x80 != 0 { // 64bit
		blocks |= int64(binary.LittleEndian.Uint32(s[0x150:])) << 32
	}
	return blocks << (10 + shift), true
}
