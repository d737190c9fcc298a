package emulate

import (
	"context"
	"fmt"
	"strconv"
	"strings"
)

// Relay says which GPIO line switches the USB disk's power.
type Relay struct {
	Line      int  // BCM number on a Raspberry Pi (0-53), line of the PL061 on a generic machine (0-7)
	ActiveLow bool // a low line closes the relay
	None      bool // no relay: the disk has power whenever the machine has
}

func (r Relay) String() string {
	switch {
	case r.None:
		return "none"
	case r.ActiveLow:
		return fmt.Sprintf("line %d, active low", r.Line)
	}
	return fmt.Sprintf("line %d, active high", r.Line)
}

// line is where a GPIO line can be watched from outside.
type line struct {
	level     uint64 // physical address of the register with the line's level
	levelBit  uint
	direction uint64 // of the register with its direction
	shift     uint
	mask      uint32
	output    uint32 // direction>>shift&mask if it is an output
}

// Register addresses: BCM2835 ARM Peripherals §6.1, at the Pi 3's peripheral base; Arm PL061 (DDI 0190)
// §3.3, at the place where QEMU's virt machine has it. An address of PL061's data register carries the mask of
// the lines that are read.
const (
	bcmSelect = 0x3f200000
	bcmLevel  = 0x3f200034
	pl061Data = 0x9030000 + 0xff<<2
	pl061Dir  = 0x9030400
)

func (m Machine) line(n int) (line, error) {
	switch m {
	case RaspberryPi3:
		if n < 0 || n > 53 {
			return line{}, fmt.Errorf("a Raspberry Pi has no GPIO line %d (0 to 53)", n)
		}
		u := uint64(n)
		return line{
			level: bcmLevel + 4*(u/32), levelBit: uint(n % 32),
			direction: bcmSelect + 4*(u/10), shift: uint(3 * (n % 10)), mask: 7, output: 1,
		}, nil
	case Generic:
		// Line 3 is also the machine's power button; a kernel without gpio-keys leaves it free.
		if n < 0 || n > 7 {
			return line{}, fmt.Errorf("the generic machine has no GPIO line %d (0 to 7)", n)
		}
		return line{
			level: pl061Data, levelBit: uint(n),
			direction: pl061Dir, shift: uint(n), mask: 1, output: 1,
		}, nil
	}
	return line{}, fmt.Errorf("unknown machine %q", m)
}

// monitor runs a command of QEMU's monitor.
type monitor interface {
	Human(ctx context.Context, line string) (string, error)
}

// read says whether the line is an output, and if so whether it is high. The level of a line that is no
// output means nothing: QEMU keeps the last level of a line whose owner has died.
func (l line) read(ctx context.Context, qemu monitor) (driven, high bool, err error) {
	direction, err := peek(ctx, qemu, l.direction)
	if err != nil || direction>>l.shift&l.mask != l.output {
		return false, false, err
	}
	level, err := peek(ctx, qemu, l.level)
	if err != nil {
		return false, false, err
	}
	return true, level>>l.levelBit&1 == 1, nil
}

// peek reads a 32-bit register of the machine.
func peek(ctx context.Context, qemu monitor, address uint64) (uint32, error) {
	answer, err := qemu.Human(ctx, fmt.Sprintf("xp /1wx 0x%x", address))
	if err != nil {
		return 0, err
	}
	return parsePeek(answer, address)
}

// parsePeek reads the monitor's answer to xp, such as "000000003f200034: 0x00020000\r\n".
func parsePeek(answer string, address uint64) (uint32, error) {
	where, what, ok := strings.Cut(strings.TrimSpace(answer), ": 0x")
	at, err := strconv.ParseUint(where, 16, 64)
	if !ok || err != nil || at != address {
		return 0, fmt.Errorf("read register 0x%x: unexpected answer %.80q", address, answer)
	}
	v, err := strconv.ParseUint(what, 16, 32)
	if err != nil {
		return 0, fmt.Errorf("read register 0x%x: unexpected answer %.80q", address, answer)
	}
	return uint32(v), nil
}
