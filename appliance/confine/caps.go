package confine

import (
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/psx"
)

// capset makes mask the permitted and effective capabilities of every thread
// and clears the inheritable ones.
func capset(mask [2]uint32) error {
	header := &unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	data := &[2]unix.CapUserData{}
	for i := range data {
		data[i] = unix.CapUserData{Effective: mask[i], Permitted: mask[i]}
	}
	// psx is no system call to the compiler: without pins the stack that holds
	// these could move while their addresses are plain numbers.
	var pins runtime.Pinner
	pins.Pin(header)
	pins.Pin(data)
	defer pins.Unpin()
	_, _, errno := psx.Syscall3(unix.SYS_CAPSET, uintptr(unsafe.Pointer(header)), uintptr(unsafe.Pointer(data)), 0)
	if errno != 0 {
		return fmt.Errorf("confine: set capabilities: %w", errno)
	}
	return nil
}

// capget returns this thread's permitted capabilities. They bound the
// effective ones.
func capget() ([2]uint32, error) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return [2]uint32{}, fmt.Errorf("confine: read capabilities: %w", err)
	}
	return [2]uint32{data[0].Permitted, data[1].Permitted}, nil
}
