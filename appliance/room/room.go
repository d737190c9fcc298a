// Package room foretells from the last weeks when a disk is full. It is pure: the
// caller looks at the disk once a day and keeps the samples.
//
// The forecast is a straight line, and says so by what it leaves out: it knows
// nothing of what will expire beyond what expired lately, nor of a holiday's
// photographs. Where it errs, it rather errs towards an early date.
package room

import (
	"math"
	"slices"
	"time"

	"farkeep/appliance/status"
)

// Sample is a day's last look at the disk.
type Sample struct {
	At   time.Time
	Free int64 // bytes
	// New and First are what the day's generations added, in bytes: First what was
	// the first generation of its repository, New all others. Filling a disk for the
	// first time is no habit, and counts for no pace and no worst day.
	New, First int64
}

const (
	// Window is how far back samples count.
	Window = 30 * 24 * time.Hour
	// enough is the span from which on what is free tells the pace better than what
	// was added, for it knows what expired as well.
	enough = 7 * 24 * time.Hour
	// horizon is how far ahead a date means anything.
	horizon = 10 * 365 * 24 * time.Hour
)

// Forecast says what one day may need, what a day takes on average, and when the
// disk is full: when what is free has shrunk to the reserve, and the reserve is at
// least the worst day of the window. free is that of now, samples are in any
// order; those from the future or from before the window do not count.
//
// PerDay is how fast free space shrank over the window. The span between two looks
// in which it shrank least, or grew most, is left out: a repository that was
// retired promises no room that a later day will give again. While the samples
// span less than a week it is the mean of what was added. It is negative while the
// disk is emptying. FullOn is zero when the disk does not fill up within ten years,
// or nothing is known yet, and now when it is full.
func Forecast(now time.Time, samples []Sample, free, reserve int64) status.Room {
	var recent []Sample
	for _, s := range samples {
		if age := now.Sub(s.At); age >= 0 && age < Window {
			recent = append(recent, s)
		}
	}
	slices.SortFunc(recent, func(a, b Sample) int { return a.At.Compare(b.At) })
	room := status.Room{Free: free, Reserve: reserve}
	for _, s := range recent {
		room.WorstDay = max(room.WorstDay, s.New)
	}
	room.Reserve = max(reserve, room.WorstDay)
	room.PerDay = pace(now, recent, free)

	spare := free - room.Reserve
	if spare <= 0 {
		room.FullOn = now
		return room
	}
	// In days first: a span of nanoseconds may not hold it.
	if room.PerDay > 0 && spare/room.PerDay < int64(horizon/(24*time.Hour)) {
		room.FullOn = now.Add(time.Duration(float64(spare) / float64(room.PerDay) * float64(24*time.Hour)))
	}
	return room
}

// pace is what a day takes, in bytes.
func pace(now time.Time, recent []Sample, free int64) int64 {
	if len(recent) == 0 {
		return 0
	}
	first := recent[0].At
	if now.Sub(first) < enough {
		var sum int64
		for _, s := range recent {
			sum += s.New
		}
		return sum / (1 + int64(now.Sub(first)/(24*time.Hour)))
	}
	looks := append(slices.Clone(recent), Sample{At: now, Free: free})
	total, days := 0.0, now.Sub(first).Hours()/24
	best, bestTotal, bestDays := math.Inf(1), 0.0, 0.0
	for i, b := range looks[1:] {
		a := looks[i]
		taken, span := float64(a.Free-b.First-b.Free), b.At.Sub(a.At).Hours()/24
		total += taken
		if span > 0 && taken/span < best {
			best, bestTotal, bestDays = taken/span, taken, span
		}
	}
	if days-bestDays < 1 {
		return int64(total / days) // one span is all there is
	}
	return int64((total - bestTotal) / (days - bestDays))
}
