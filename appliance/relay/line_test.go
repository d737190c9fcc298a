package relay

import (
	"testing"
	"unsafe"
)

// What these tests cannot do is move a line: that needs a kernel with a GPIO chip,
// which a machine that builds Farkeep does not have. The emulated ones have:
// package main's TestFirmware (build tag vm) watches an active-low relay from
// outside while the disk part takes its line and closes it, image/stage and
// image/demo switch real disks with it. Package relay's other tests, and the
// suite of relaytest, run over a pin in memory: they prove the switch, not the
// line.

// TestABI compares the structs with the sizes that the kernel's ioctl numbers
// carry (ioctl(2): bits 16 to 29).
func TestABI(t *testing.T) {
	for name, tc := range map[string]struct {
		request uintptr
		size    uintptr
	}{
		"chip info": {ioctlChipInfo, unsafe.Sizeof(chipInfo{})},
		"line info": {ioctlLineInfo, unsafe.Sizeof(lineInfo{})},
		"get line":  {ioctlGetLine, unsafe.Sizeof(lineRequest{})},
		"values":    {ioctlSetValues, unsafe.Sizeof(lineValues{})},
	} {
		if want := tc.request >> 16 & 0x3fff; tc.size != want {
			t.Errorf("%s: %d bytes, the kernel expects %d", name, tc.size, want)
		}
	}
}
