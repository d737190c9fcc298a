package curator

import (
	"fmt"
	"time"
)

// How far the appliance's clock may be from what the disk remembers before
// nothing expires.
const (
	// MaxBack: clocks are corrected by a little, never set back by more.
	MaxBack = 5 * time.Minute
	// MaxForward: beyond what the machine is known to have been running. A disk
	// that lay still for longer needs an admin's accept-clock.
	MaxForward = 48 * time.Hour
	// maxOff is how much of a time without power counts as passed, at most.
	maxOff = 24 * time.Hour
	// leak is how many hours must pass for the clock to have been right by one
	// hour more than before: small corrections of years do not add up to a jump.
	leak = 24
)

// reading is what the appliance's clocks show at one moment.
type reading struct {
	now      time.Time
	believed bool          // now was set from outside, and did not jump
	boot     string        // names the machine's start
	uptime   time.Duration // since then; no clock setting moves it
}

// clockRecord is the record "clock": the disk's own memory of time. A new SD card
// has none of it, and no time source can turn it back.
type clockRecord struct {
	// Latest is the latest time that was believed.
	Latest time.Time `toml:"latest"`
	// Passed is how much time is known to have passed since the record began:
	// running time by the machine's own count, off time by the clock, at most
	// maxOff each. In seconds.
	Passed int64 `toml:"passed_seconds"`
	// Ahead is by how much the clock went faster than the machine's own count
	// while it ran, less what leaked. In seconds.
	Ahead int64 `toml:"ahead_seconds"`
	// Boot and Uptime are the machine's own count when Latest was taken.
	Boot   string `toml:"boot"`
	Uptime int64  `toml:"uptime_seconds"`
}

func (r clockRecord) passed() time.Duration { return time.Duration(r.Passed) * time.Second }

// observe takes note of a reading. It returns the record as it is then and "",
// or the record unchanged and why the time is in doubt: nothing may expire by it.
// accept takes the time as it is.
func (r clockRecord) observe(at reading, accept bool) (clockRecord, string) {
	if !at.believed {
		return r, "the clock is not set, or it jumped"
	}
	next := clockRecord{Latest: at.now.UTC().Truncate(time.Second), Boot: at.boot, Uptime: int64(at.uptime / time.Second)}
	if r.Latest.IsZero() {
		return next, ""
	}
	delta := at.now.Sub(r.Latest)
	var ran, off time.Duration
	if r.Boot == at.boot && at.boot != "" {
		ran = max(0, at.uptime-time.Duration(r.Uptime)*time.Second)
	} else { // all of this start's running time is later than Latest
		ran = at.uptime
		off = min(max(0, delta-ran), MaxForward)
	}
	ahead := max(0, time.Duration(r.Ahead)*time.Second-ran/leak)
	excess := max(0, delta-ran-off) + ahead
	switch {
	case accept:
		excess = 0
	case delta < -MaxBack:
		return r, fmt.Sprintf("the clock shows %s, and this disk has seen %s already", stamp(at.now), stamp(r.Latest))
	case delta-ran > MaxForward, excess > MaxForward:
		return r, fmt.Sprintf("the clock shows %s, more than %d hours later than the %s that this disk has seen can explain", stamp(at.now), MaxForward/time.Hour, stamp(r.Latest))
	}
	if !accept && r.Latest.After(next.Latest) {
		next.Latest = r.Latest // a small correction backwards
	}
	next.Passed = r.Passed + int64((ran+min(off, maxOff))/time.Second)
	next.Ahead = int64(excess / time.Second)
	return next, ""
}

func stamp(t time.Time) string { return t.UTC().Format("2006-01-02 15:04 UTC") }
