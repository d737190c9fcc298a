package curator

import (
	"context"
	"slices"
	"time"

	"farkeep/appliance/status"
	"farkeep/shared/generations"
)

// roomRecord is the record "room": the last days on which the disk was seen,
// oldest first, keepDays at most.
type roomRecord struct {
	Days []dayRecord `toml:"days"`
}

type dayRecord struct {
	Day   int64 `toml:"day"`   // since 1970, UTC
	Added int64 `toml:"added"` // bytes of that day's generations, first ones of repositories not counted
	Free  int64 `toml:"free"`  // bytes, at the day's last look
}

const (
	keepDays = 60
	// recent is the days that the forecast goes by.
	recent = 30
	// enough is how many days of looking at what is free say more than what was added.
	enough = 7
)

// measure finds out how much room there is, and writes down today's.
func (c *Curator) measure(ctx context.Context) error {
	free, reserve, _, err := c.disk.Space()
	if err != nil {
		return err
	}
	repositories, err := c.disk.Repositories()
	if err != nil {
		return err
	}
	now := c.opt.Now()
	added, began := map[int64]int64{}, int64(0)
	for _, name := range repositories {
		list, err := c.disk.List(ctx, name)
		if err != nil {
			return err
		}
		add(added, &began, times(now, list), list)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.doubt != "" {
		// Days that a thrown clock invents are not written down.
		room := c.days.forecast(now, free, reserve, began)
		room.FullOn = time.Time{}
		c.state.Room = &room
		return nil
	}
	changed := c.days.note(dayOf(now), free, added)
	room := c.days.forecast(now, free, reserve, began)
	c.state.Room = &room
	if !changed {
		return nil
	}
	return c.disk.WriteRecord("room", c.days)
}

func dayOf(t time.Time) int64 { return t.Unix() / day }

// add sums up what a repository's generations added on each day, and moves began
// to the day of its first one if that is later: filling a disk for the first
// time is no pace.
func add(added map[int64]int64, began *int64, at []time.Time, list []generations.Generation) {
	for i, g := range list {
		if g.Sequence == 1 {
			*began = max(*began, dayOf(at[i]))
			continue
		}
		added[dayOf(at[i])] += g.NewBytes + g.Overhead
	}
}

// note takes today's look, and says whether it is worth writing down.
func (r *roomRecord) note(today, free int64, added map[int64]int64) (changed bool) {
	i, found := slices.BinarySearchFunc(r.Days, today, func(d dayRecord, day int64) int { return int(d.Day - day) })
	if !found {
		r.Days = slices.Insert(r.Days, i, dayRecord{Day: today, Free: free})
		changed = true
	}
	if r.Days[i].Free != free {
		r.Days[i].Free = free
		changed = true
	}
	for i := range r.Days {
		// What expired since is not listed any more.
		if d := &r.Days[i]; added[d.Day] > d.Added {
			d.Added = added[d.Day]
			changed = true
		}
	}
	if over := len(r.Days) - keepDays; over > 0 {
		r.Days = slices.Delete(r.Days, 0, over)
	}
	return changed
}

// forecast says how much room there is and when it is used up, one worst day kept
// in reserve. began is the day since which it was filled at its usual pace.
func (r roomRecord) forecast(now time.Time, free, reserve, began int64) status.Room {
	room := status.Room{Free: free, Reserve: reserve}
	today := dayOf(now)
	var first *dayRecord
	var sum int64
	for i := range r.Days {
		d := &r.Days[i]
		if d.Day <= today-recent || d.Day > today {
			continue
		}
		room.WorstDay = max(room.WorstDay, d.Added)
		sum += d.Added
		if first == nil && d.Day >= began {
			first = d
		}
	}
	if first == nil {
		return room
	}
	if span := today - first.Day; span >= enough {
		room.PerDay = (first.Free - free) / span
	} else {
		room.PerDay = sum / max(1, min(recent, today-began+1))
	}
	const limit = 50 * 365
	left := max(0, free-room.WorstDay)
	if room.PerDay > 0 && left/room.PerDay < limit {
		room.FullOn = time.Unix((today+left/room.PerDay)*day, 0).UTC()
	}
	return room
}
