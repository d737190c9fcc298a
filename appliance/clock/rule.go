package clock

import (
	"fmt"
	"time"
)

const (
	// MaxGain is how much time may come from outside without having been lived
	// through before it is no longer simply believed (design: 48 h).
	MaxGain = 48 * time.Hour
	// refund is how long the machine must run to make good one unit of that. It
	// is the speed at which a liar who owns the line for ever can turn the clock:
	// a day in four.
	refund = 4
	// MaxSet is the farthest step that is carried out at all. A box that was off
	// for longer is prepared anew; a lie of that size would let every
	// certificate expire, and so silence the appliance's own alarms.
	MaxSet = 366 * 24 * time.Hour
)

// Earliest is before any appliance ran: an earlier time is never true.
var Earliest = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// Knowledge is what the appliance holds true about the time without asking
// anybody.
type Knowledge struct {
	// Time is the last time that was believed, plus the time that the machine
	// ran since. Zero: nothing is known yet.
	Time time.Time
	// Gained is how much of Time came from outside without being lived through:
	// the machine was off, or somebody lies. Running makes it good again, but
	// slowly, so that many small lies are found like one large one.
	Gained time.Duration
	// Unsynced is how long the machine ran since sources last agreed: the
	// oscillator's error grows with it.
	Unsynced time.Duration
}

// After returns what is known when the machine has run for another d.
func (k Knowledge) After(d time.Duration) Knowledge {
	if d <= 0 || k.Time.IsZero() {
		return k
	}
	return Knowledge{Time: k.Time.Add(d), Gained: max(0, k.Gained-d/refund), Unsynced: k.Unsynced + d}
}

// tolerance is how far the true time may lie before the certain one: 500 ppm
// for the oscillator, and a little for the line.
func (k Knowledge) tolerance() time.Duration {
	return min(5*time.Second+k.Unsynced/2000, time.Hour)
}

// Floor is the earliest time that is believed to be possible.
func (k Knowledge) Floor() time.Time { return k.Time.Add(-k.Gained - k.tolerance()) }

// Verdict is what follows from a time that the sources agree on.
type Verdict struct {
	Set  bool      // set the clock to it
	Jump string    // "" when it is plausible; else what is wrong with it, and expiry stays frozen
	Next Knowledge // what is known from now on
}

// Judge is the one rule by which a time from outside is believed:
//
//	nothing known                          believed, unless before Earliest
//	before the floor                       not set, frozen: the clock never goes back below what is certain
//	up to the known time                   believed: what was gained without being lived through is given back
//	up to 48 h of gains in all             believed: the machine was off for a while
//	up to 366 days                         set, frozen: TLS wants it if it is true, but it changes nothing that is known
//	farther                                not set, frozen
//
// It keeps no state of its own: a jump ends by itself as soon as the sources
// agree on a plausible time, or when an admin accepts the time (Keeper.Accept).
func Judge(k Knowledge, t time.Time) Verdict {
	if k.Time.IsZero() {
		if t.Before(Earliest) {
			return Verdict{Jump: fmt.Sprintf("the time sources say %s, before this software existed; not set", stamp(t)), Next: k}
		}
		return Verdict{Set: true, Next: Knowledge{Time: t}}
	}
	gain := t.Sub(k.Time)
	switch {
	case t.Before(k.Floor()):
		return Verdict{Jump: fmt.Sprintf("the time sources say %s, %s before the last known time %s; not set", stamp(t), span(-gain), stamp(k.Time)), Next: k}
	case k.Gained+gain <= MaxGain:
		return Verdict{Set: true, Next: Knowledge{Time: t, Gained: max(0, k.Gained+gain)}}
	case gain <= MaxSet:
		return Verdict{Set: true, Jump: fmt.Sprintf("the time sources say %s, %s after the last known time %s; set, not trusted", stamp(t), span(gain), stamp(k.Time)), Next: k}
	default:
		return Verdict{Jump: fmt.Sprintf("the time sources say %s, %s after the last known time %s; not set", stamp(t), span(gain), stamp(k.Time)), Next: k}
	}
}

// Guess is what is assumed when no sources answer at the start: the last known
// time was saved up to interval before the power went.
func (k Knowledge) Guess(interval time.Duration) Knowledge {
	if k.Time.IsZero() {
		return k
	}
	k.Time = k.Time.Add(interval)
	k.Gained = min(k.Gained+interval, MaxGain)
	return k
}

func stamp(t time.Time) string { return t.UTC().Format("2006-01-02 15:04 UTC") }

func span(d time.Duration) string {
	if d >= 72*time.Hour {
		return fmt.Sprintf("%d days", d/(24*time.Hour))
	}
	return d.Round(time.Second).String()
}
