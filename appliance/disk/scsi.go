package disk

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// SCSI commands (SBC-3 5.18 SYNCHRONIZE CACHE (10), SPC/SBC-3 5.17 START STOP
// UNIT), sent through the sg driver's ioctl, which works on any SCSI disk and
// so on any USB disk: Linux, include/scsi/sg.h.
const (
	ioctlSG        = 0x2285 // SG_IO
	sgNoTransfer   = -1     // SG_DXFER_NONE
	commandTimeout = 30 * time.Second
)

type sgHeader struct {
	InterfaceID    int32 // 'S'
	Direction      int32
	CommandLen     uint8
	SenseMax       uint8
	IovecCount     uint16
	TransferLen    uint32
	Transfer       uintptr
	Command        *byte
	Sense          *byte
	TimeoutMillis  uint32
	Flags          uint32
	PackID         int32
	UserPtr        uintptr
	Status         uint8
	MaskedStatus   uint8
	MessageStatus  uint8
	SenseWritten   uint8
	HostStatus     uint16
	DriverStatus   uint16
	Residual       int32
	DurationMillis uint32
	Info           uint32
}

// flushDisk makes a whole disk write its cache and, with stop, park its heads
// and spin down, so that cutting its power is not an emergency.
func flushDisk(node string, stop bool) error {
	f, err := os.Open(node)
	if err != nil {
		return err
	}
	defer f.Close()
	flush := [10]byte{0x35}
	err = sgCommand(f, flush[:])
	if stop {
		// Byte 4, bit 0 (START) clear: stop.
		err = errors.Join(err, sgCommand(f, make6(0x1b)))
	}
	if err != nil {
		return fmt.Errorf("flush and stop %s: %w", node, err)
	}
	return nil
}

func make6(op byte) []byte { return []byte{op, 0, 0, 0, 0, 0} }

func sgCommand(f *os.File, command []byte) error {
	var sense [32]byte
	h := &sgHeader{
		InterfaceID: 'S', Direction: sgNoTransfer,
		CommandLen: uint8(len(command)), Command: &command[0],
		SenseMax: uint8(len(sense)), Sense: &sense[0],
		TimeoutMillis: uint32(commandTimeout / time.Millisecond),
	}
	// The kernel follows pointers inside the header, which Go does not know of.
	var pin runtime.Pinner
	pin.Pin(&command[0])
	pin.Pin(&sense[0])
	defer pin.Unpin()
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), ioctlSG, uintptr(unsafe.Pointer(h)))
	if errno != 0 {
		return os.NewSyscallError(fmt.Sprintf("SCSI command %#02x", command[0]), errno)
	}
	if h.Status != 0 || h.HostStatus != 0 || h.DriverStatus&^8 != 0 {
		return fmt.Errorf("SCSI command %#02x: status %#x, host %#x, sense % x", command[0], h.Status, h.HostStatus, sense[:min(h.SenseWritten, 8)])
	}
	return nil
}
