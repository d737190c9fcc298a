// Package moment is time as the key server may trust it: the wall clock, which
// anybody may set, beside the kernel's clock that counts from the boot and that
// nobody can (CLOCK_BOOTTIME, clock_gettime(2); it counts suspension too).
//
// Within one boot, spans are measured by the second clock alone. Across boots
// only the wall clock is left; where it went back nothing is known, and callers
// get the two ends of what is possible.
package moment

import (
	"fmt"
	"math"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Moment is one point in time on one machine. The zero value is "never".
type Moment struct {
	Wall time.Time     `json:"wall"`
	Boot string        `json:"boot,omitempty"` // the machine's boot id, without dashes
	Up   time.Duration `json:"up,omitempty"`   // CLOCK_BOOTTIME, in nanoseconds
}

// Forever is longer than any span that means something.
const Forever = time.Duration(math.MaxInt64)

// slack is how far a wall clock may go back over a reboot and still be called
// right: a machine without a clock of its own starts from the time that it last saved.
const slack = 10 * time.Minute

// Now reads both clocks; wall is the wall clock, usually time.Now.
func Now(wall func() time.Time) (Moment, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return Moment{}, fmt.Errorf("read CLOCK_BOOTTIME: %w", err)
	}
	boot, err := BootID()
	if err != nil {
		return Moment{}, err
	}
	return Moment{Wall: wall().UTC().Round(0), Boot: boot, Up: time.Duration(ts.Nano())}, nil
}

// BootID is the kernel's random name for this boot, 32 hexadecimal digits
// (random(4)).
func BootID() (string, error) {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read the boot id: %w", err)
	}
	id := strings.ReplaceAll(strings.TrimSpace(string(text)), "-", "")
	if len(id) != 32 {
		return "", fmt.Errorf("read the boot id: %q is none", text)
	}
	return id, nil
}

// IsZero reports whether m is "never".
func (m Moment) IsZero() bool { return m.Wall.IsZero() && m.Boot == "" && m.Up == 0 }

// Since returns the least and the most time that can have passed from earlier to
// m. They differ where clocks contradict each other: then the least is 0 and the
// most is Forever.
func (m Moment) Since(earlier Moment) (least, most time.Duration) {
	if m.Boot != "" && m.Boot == earlier.Boot {
		if d := m.Up - earlier.Up; d >= 0 {
			return d, d
		}
		return 0, Forever
	}
	d := m.Wall.Sub(earlier.Wall)
	if d < -slack {
		return 0, Forever
	}
	return max(d, 0), max(d, 0)
}

// Before reports whether less than d has certainly passed since earlier, by every
// clock there is: the wall clock too, also within one boot. It is for permissions
// that end.
func (m Moment) Before(earlier Moment, d time.Duration) bool {
	_, most := m.Since(earlier)
	wall := m.Wall.Sub(earlier.Wall)
	return most < d && wall < d && wall >= -slack
}
