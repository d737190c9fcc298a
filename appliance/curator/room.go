package curator

import (
	"context"
	"slices"
	"time"

	"farkeep/appliance/room"
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
	First int64 `toml:"first"` // bytes of those
	Free  int64 `toml:"free"`  // bytes, at the day's last look
}

const keepDays = 60

// What thinning keeps free where no day of the last weeks says more: a share of the
// disk, in bytes at most. Without it a disk that took no push for weeks, because it
// was full, would count as one that needs no room.
const (
	leastShare = 50
	maxLeast   = 4 << 30
)

// measure finds out how much room there is, and writes down today's.
func (c *Curator) measure(ctx context.Context) error {
	free, reserve, total, err := c.disk.Space()
	if err != nil {
		return err
	}
	repositories, err := c.disk.Repositories()
	if err != nil {
		return err
	}
	now := c.opt.Now()
	added := map[int64]dayRecord{}
	for _, name := range repositories {
		list, err := c.disk.List(ctx, name)
		if err != nil {
			return err
		}
		add(added, times(now, list), list)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.least = min(total/leastShare, maxLeast)
	if c.doubt != "" {
		// Days that a thrown clock invents are not written down.
		forecast := c.days.forecast(now, free, reserve)
		forecast.FullOn = time.Time{}
		c.state.Room = &forecast
		return nil
	}
	changed := c.days.note(dayOf(now), free, added)
	forecast := c.days.forecast(now, free, reserve)
	c.state.Room = &forecast
	if !changed {
		return nil
	}
	return c.disk.WriteRecord("room", c.days)
}

func dayOf(t time.Time) int64 { return t.Unix() / day }

// add sums up what a repository's generations added on each day.
func add(added map[int64]dayRecord, at []time.Time, list []generations.Generation) {
	for i, g := range list {
		sum := added[dayOf(at[i])]
		if g.Sequence == 1 {
			sum.First += g.NewBytes + g.Overhead
		} else {
			sum.Added += g.NewBytes + g.Overhead
		}
		added[dayOf(at[i])] = sum
	}
}

// note takes today's look, and says whether it is worth writing down.
func (r *roomRecord) note(today, free int64, added map[int64]dayRecord) (changed bool) {
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
		d := &r.Days[i]
		if a := added[d.Day]; a.Added > d.Added || a.First > d.First {
			d.Added, d.First = max(d.Added, a.Added), max(d.First, a.First)
			changed = true
		}
	}
	if over := len(r.Days) - keepDays; over > 0 {
		r.Days = slices.Delete(r.Days, 0, over)
	}
	return changed
}

// forecast says how much room there is beside the reserve, and when it is used up
// but for one worst day.
func (r roomRecord) forecast(now time.Time, free, reserve int64) status.Room {
	samples := make([]room.Sample, len(r.Days))
	for i, d := range r.Days {
		samples[i] = room.Sample{At: startOf(d.Day), Free: d.Free, New: d.Added, First: d.First}
	}
	// By whole days, and free is what is left beside the disk's own reserve.
	out := room.Forecast(startOf(dayOf(now)), samples, free, 0)
	out.Reserve = reserve
	return out
}

func startOf(d int64) time.Time { return time.Unix(d*day, 0).UTC() }
