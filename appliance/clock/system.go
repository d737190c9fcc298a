package clock

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// System is the machine's clock, as far as it is needed here.
type System interface {
	// Now is the wall clock.
	Now() time.Time
	// Uptime grows by one second a second, whatever happens to the wall clock.
	Uptime() time.Duration
	// Step moves the wall clock by d at once.
	Step(d time.Duration) error
	// Slew moves it by d, at most half a second, without a jump.
	Slew(d time.Duration) error
}

// Kernel is the kernel's clock. Step and Slew need CAP_SYS_TIME.
type Kernel struct{}

// Now implements System. The result has no monotonic reading: differences
// between two of them are differences of the wall clock.
func (Kernel) Now() time.Time { return time.Now().Round(0) }

// Uptime implements System: CLOCK_BOOTTIME.
func (Kernel) Uptime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0 // cannot happen on Linux since 2.6.39
	}
	return time.Duration(ts.Nano())
}

// The modes of adjtimex(2) that x/sys/unix does not name.
const (
	adjSetOffset        = 0x0100
	adjNano             = 0x2000
	adjOffsetSingleShot = 0x8001
)

// Step implements System: relative, so that nothing is lost between reading the
// clock and setting it.
func (Kernel) Step(d time.Duration) error {
	sec := d / time.Second
	nsec := d % time.Second
	if nsec < 0 { // adjtimex(2): tv_usec is never negative
		sec, nsec = sec-1, nsec+time.Second
	}
	tx := unix.Timex{Modes: adjSetOffset | adjNano}
	tx.Time.Sec, tx.Time.Usec = int64(sec), int64(nsec)
	if _, err := unix.Adjtimex(&tx); err != nil {
		return fmt.Errorf("step the clock by %v: %w", d, err)
	}
	return nil
}

// Slew implements System.
func (Kernel) Slew(d time.Duration) error {
	tx := unix.Timex{Modes: adjOffsetSingleShot, Offset: d.Microseconds()}
	if _, err := unix.Adjtimex(&tx); err != nil {
		return fmt.Errorf("slew the clock by %v: %w", d, err)
	}
	return nil
}

// Synchronised reports whether something keeps the kernel's clock synchronised,
// as timedatectl reads it (adjtimex(2), TIME_ERROR and STA_UNSYNC).
func Synchronised() (bool, error) {
	var tx unix.Timex
	state, err := unix.Adjtimex(&tx)
	if err != nil {
		return false, fmt.Errorf("read the clock's state: %w", err)
	}
	return trusted || state != unix.TIME_ERROR && tx.Status&unix.STA_UNSYNC == 0, nil
}
