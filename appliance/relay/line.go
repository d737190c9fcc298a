package relay

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
	"periph.io/x/conn/v3/gpio"
	"periph.io/x/conn/v3/physic"
)

// The kernel's GPIO character device, second ABI: include/uapi/linux/gpio.h and
// Documentation/userspace-api/gpio/chardev.rst. x/sys/unix does not have it.
const (
	ioctlChipInfo  = 0x8044b401 // GPIO_GET_CHIPINFO_IOCTL
	ioctlLineInfo  = 0xc100b405 // GPIO_V2_GET_LINEINFO_IOCTL
	ioctlGetLine   = 0xc250b407 // GPIO_V2_GET_LINE_IOCTL
	ioctlSetValues = 0xc010b40f // GPIO_V2_LINE_SET_VALUES_IOCTL

	flagOutput       = 1 << 3 // GPIO_V2_LINE_FLAG_OUTPUT
	attrOutputValues = 2      // GPIO_V2_LINE_ATTR_ID_OUTPUT_VALUES
)

type chipInfo struct {
	Name, Label [32]byte
	Lines       uint32
}

type lineAttribute struct {
	ID, _ uint32
	Value uint64
}

type lineInfo struct {
	Name, Consumer  [32]byte
	Offset, NumAttr uint32
	Flags           uint64
	Attrs           [10]lineAttribute
	_               [4]uint32
}

type lineConfig struct {
	Flags   uint64
	NumAttr uint32
	_       [5]uint32
	Attrs   [10]struct {
		Attr lineAttribute
		Mask uint64
	}
}

type lineRequest struct {
	Offsets   [64]uint32
	Consumer  [32]byte
	Config    lineConfig
	NumLines  uint32
	EventSize uint32
	_         [5]uint32
	FD        int32
}

type lineValues struct{ Bits, Mask uint64 }

// chips are the labels of the chips that carry the header's lines on the boards
// that we know, in the order in which they are tried: Pi 3 and Zero 2 W, Pi 4,
// and the PL061 of QEMU's generic machine.
var chips = []string{"pinctrl-bcm2835", "pinctrl-bcm2711", "9030000.pl061"}

// Line is one line of a GPIO chip. It implements gpio.PinOut. The kernel knows
// it as an output from the first Out until Halt.
type Line struct {
	chip   string // device node
	label  string
	offset uint32

	mu sync.Mutex // guards fd
	fd int        // of the line request; -1 before the first Out
}

var _ gpio.PinOut = (*Line)(nil)

// FindLine finds a line by its chip's label; "" means whichever known chip is
// there. It does not touch the line.
func FindLine(label string, offset int) (*Line, error) {
	nodes, err := filepath.Glob("/dev/gpiochip*")
	if err != nil {
		return nil, err
	}
	slices.Sort(nodes)
	wanted := chips
	if label != "" {
		wanted = []string{label}
	}
	var seen []string
	for _, want := range wanted {
		for _, node := range nodes {
			info, err := readChip(node)
			if err != nil {
				return nil, err
			}
			name := unix.ByteSliceToString(info.Label[:])
			if name != want {
				seen = append(seen, name)
				continue
			}
			if offset < 0 || uint32(offset) >= info.Lines {
				return nil, fmt.Errorf("GPIO chip %s has lines 0 to %d, not %d", name, info.Lines-1, offset)
			}
			return &Line{chip: node, label: name, offset: uint32(offset), fd: -1}, nil
		}
	}
	slices.Sort(seen)
	return nil, fmt.Errorf("no GPIO chip %s; there is %s", strings.Join(wanted, " or "), orNone(slices.Compact(seen)))
}

func orNone(s []string) string {
	if len(s) == 0 {
		return "none"
	}
	return strings.Join(s, ", ")
}

func readChip(node string) (*chipInfo, error) {
	info := &chipInfo{}
	err := onChip(node, func(fd int) error { return ioctl(fd, ioctlChipInfo, unsafe.Pointer(info)) })
	if err != nil {
		return nil, fmt.Errorf("read GPIO chip %s: %w", node, err)
	}
	return info, nil
}

func onChip(node string, do func(fd int) error) error {
	fd, err := unix.Open(node, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	return errors.Join(do(fd), unix.Close(fd))
}

// IsOutput says whether the line is an output now, whoever made it one.
func (l *Line) IsOutput() (bool, error) {
	info := &lineInfo{Offset: l.offset}
	err := onChip(l.chip, func(fd int) error { return ioctl(fd, ioctlLineInfo, unsafe.Pointer(info)) })
	if err != nil {
		return false, fmt.Errorf("read %s: %w", l, err)
	}
	return info.Flags&flagOutput != 0, nil
}

// Out makes the line an output at level v, in one step, or changes its level.
func (l *Line) Out(v gpio.Level) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	var bits uint64
	if v {
		bits = 1
	}
	if l.fd >= 0 {
		if err := ioctl(l.fd, ioctlSetValues, unsafe.Pointer(&lineValues{Bits: bits, Mask: 1})); err != nil {
			return fmt.Errorf("set %s: %w", l, err)
		}
		return nil
	}
	req := &lineRequest{NumLines: 1}
	req.Offsets[0] = l.offset
	copy(req.Consumer[:], "farkeep disk power")
	// Direction and value go together: an output request without a value would
	// drive the line low first, which closes an active-low relay.
	req.Config.Flags = flagOutput
	req.Config.NumAttr = 1
	req.Config.Attrs[0].Attr = lineAttribute{ID: attrOutputValues, Value: bits}
	req.Config.Attrs[0].Mask = 1
	err := onChip(l.chip, func(fd int) error { return ioctl(fd, ioctlGetLine, unsafe.Pointer(req)) })
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("take %s: another driver or program has it: %w", l, err)
	}
	if err != nil {
		return fmt.Errorf("take %s: %w", l, err)
	}
	l.fd = int(req.FD)
	unix.CloseOnExec(l.fd)
	return nil
}

// PWM is not what a relay is for.
func (l *Line) PWM(gpio.Duty, physic.Frequency) error {
	return errors.New("a relay line has no PWM")
}

// Halt gives the line back to the kernel.
func (l *Line) Halt() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fd < 0 {
		return nil
	}
	err := unix.Close(l.fd)
	l.fd = -1
	return err
}

// String names chip and line.
func (l *Line) String() string { return fmt.Sprintf("GPIO line %d of %s", l.offset, l.label) }

// Name implements pin.Pin.
func (l *Line) Name() string { return l.String() }

// Number is the line's offset in its chip: the BCM number on a Raspberry Pi.
func (l *Line) Number() int { return int(l.offset) }

// Function implements pin.Pin.
func (l *Line) Function() string { return "Out" }

func ioctl(fd int, request uintptr, arg unsafe.Pointer) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg))
	runtime.KeepAlive(arg)
	if errno != 0 {
		return os.NewSyscallError("ioctl", errno)
	}
	return nil
}
