package relay

import (
	"testing"
	"unsafe"
)

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
