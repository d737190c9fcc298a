// Package diskuse says how much disk a history takes: how many times the size of
// the repositories an appliance's disk should have for the rules that were chosen.
//
// The figures are not guessed. They come from recordings of 300 days of nightly
// borg create, prune and compact on a household's files (see docs/retention.md), in which every segment file that came or went is noted. For
// any rules [Recording.Simulate] walks through those nights, commits a generation
// each, lets go what package retention lets go, and adds up what is on the disk.
// That takes milliseconds, so that the answer is for the very rules asked for.
//
// How good the figures are: the model's own arithmetic is exact (a test mirrors a
// real Borg repository with real hard links and compares to the byte). Another
// household has other habits; see [Estimate].
package diskuse

import (
	_ "embed"
	"fmt"
	"maps"
	"slices"
	"time"

	"farkeep/shared/retention"
)

//go:embed recordings/daily.txt
var daily string

//go:embed recordings/weekly.txt
var weekly string

// Recordings are the two that come with the program: of a Borg server that
// compacts every night, and of one that compacts every seventh.
func Recordings() (everyNight, everyWeek *Recording, err error) {
	if everyNight, err = Parse(daily); err != nil {
		return nil, nil, fmt.Errorf("recording of daily compaction: %w", err)
	}
	if everyWeek, err = Parse(weekly); err != nil {
		return nil, nil, fmt.Errorf("recording of weekly compaction: %w", err)
	}
	return everyNight, everyWeek, nil
}

// Night is the disk after a night's commit and expiry, in bytes.
type Night struct {
	Repository  int64 // at home
	Disk        int64 // all generations, each file once
	New         int64 // what the commit added
	Generations int
}

// begin is the night of day 0: a Saturday, so that weeks and months begin on
// different days of the recording.
var begin = time.Date(2025, time.March, 1, 2, 30, 0, 0, time.UTC)

// Simulate commits a generation every night, lets go what the rules let go, and
// says after each night what is on the disk.
func (r *Recording) Simulate(rules retention.Rules) []Night {
	sizes := map[int]int64{}      // of every file that some generation has, or home
	links := map[int]int{}        // how many generations have it
	home := map[int]bool{}        // the files of the repository
	content := map[string][]int{} // the files of a generation
	var items []retention.Item
	var nights []Night
	var disk, repository int64
	for d, day := range r.Days {
		now := begin.AddDate(0, 0, d)
		n := Night{}
		for _, id := range day.Removed {
			delete(home, id)
			repository -= sizes[id]
		}
		for _, f := range day.Added {
			home[f.ID], sizes[f.ID] = true, f.Bytes
			repository += f.Bytes
			n.New += f.Bytes
		}
		disk += n.New
		name := fmt.Sprint(d)
		content[name] = slices.Collect(maps.Keys(home))
		for id := range home {
			links[id]++
		}
		items = append(items, retention.Item{Name: name, Sequence: int64(d + 1), Committed: now})
		for _, decision := range retention.Plan(now, rules, items) {
			if decision.Keep {
				continue
			}
			for _, id := range content[decision.Name] {
				if links[id]--; links[id] == 0 {
					disk -= sizes[id]
				}
			}
			delete(content, decision.Name)
			items = slices.DeleteFunc(items, func(i retention.Item) bool { return i.Name == decision.Name })
		}
		n.Repository, n.Disk, n.Generations = repository, disk, len(items)
		nights = append(nights, n)
	}
	return nights
}

// Use sums up nights as multiples of the repository's size in the same night.
type Use struct {
	Least, Average, Peak float64 // from the night of settled on, when a history has its usual depth
	WorstDay             float64 // the most that one night added, the first one not counted
	Generations          int     // after the last night
}

// settled is the night from which on a history counts as grown: the rules of days
// and weeks are full, months go on.
const settled = 100

// Sum sums up.
func Sum(nights []Night) Use {
	var u Use
	count := 0
	for d, n := range nights {
		if n.Repository == 0 {
			continue
		}
		times := float64(n.Disk) / float64(n.Repository)
		if d > 0 {
			u.WorstDay = max(u.WorstDay, float64(n.New)/float64(n.Repository))
		}
		u.Generations = n.Generations
		if d < min(settled, len(nights)/2) {
			continue
		}
		if count == 0 {
			u.Least = times
		}
		count++
		u.Least, u.Peak = min(u.Least, times), max(u.Peak, times)
		u.Average += times
	}
	if count > 0 {
		u.Average /= float64(count)
	}
	return u
}

// Growth is what a year adds to a household's data, and so the room that a disk
// needs for it.
const Growth = 1.2

// Estimate is how many times the size of a repository rules want of a disk.
type Estimate struct {
	Peak     float64 // the newest generation and history, at their largest
	WorstDay float64 // what the appliance keeps free for it
}

// For estimates by the less favourable of the two recordings. The figure is for
// the first year of a repository of Borg that gets something new every night; one
// that is pushed once a week wants less. Its error is that of the household: the
// two recordings, which differ in nothing but how often Borg compacts, are up to
// 0.3 of the repository's size apart, and another household may be as far from
// both. That is what the larger of the two, at its peak, and the fifth for growth
// are for.
func For(rules retention.Rules) (Estimate, error) {
	everyNight, everyWeek, err := Recordings()
	if err != nil {
		return Estimate{}, err
	}
	a, b := Sum(everyNight.Simulate(rules)), Sum(everyWeek.Simulate(rules))
	return Estimate{Peak: max(a.Peak, b.Peak), WorstDay: max(a.WorstDay, b.WorstDay)}, nil
}

// Factor is the size of the disk, as a multiple of the repository's size now.
func (e Estimate) Factor() float64 { return (e.Peak + e.WorstDay) * Growth }
