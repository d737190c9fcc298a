package retention

import (
	"container/heap"
	"fmt"
	"math"
	"slices"
	"time"
)

// rung is one rule of periods. It holds the positions of what it keeps, in a
// list of entries that is sorted newest first: a higher position is older.
type rung struct {
	rule     string
	n        int    // at most so many; math.MaxInt for all
	first    []bool // by position: the newest of its period
	kept     positions
	last     int // the position of the oldest entry of all
	fallback bool
	oldest   bool // the last entry is kept although it is not first in its period
}

// rungsOf makes the rules of p, in the order in which Borg applies them.
func rungsOf(p Policy, entries []*entry) []rung {
	var rungs []rung
	for _, rule := range []struct {
		name   string
		n      int
		period func(time.Time) int64
	}{
		{"hourly", p.Hourly, func(t time.Time) int64 { return floorDiv(t.Unix(), 3600) }},
		{"daily", p.Daily, func(t time.Time) int64 { return floorDiv(t.Unix(), 86400) }},
		// 1970 began on a Thursday; weeks begin on Monday (ISO 8601).
		{"weekly", p.Weekly, func(t time.Time) int64 { return floorDiv(t.Unix()+3*86400, 7*86400) }},
		{"monthly", p.Monthly, func(t time.Time) int64 { return int64(t.UTC().Year())*12 + int64(t.UTC().Month()) }},
		{"yearly", p.Yearly, func(t time.Time) int64 { return int64(t.UTC().Year()) }},
	} {
		if rule.n == 0 {
			continue
		}
		r := rung{rule: rule.name, n: rule.n, first: make([]bool, len(entries)), last: len(entries) - 1, fallback: rule.n > 0}
		if rule.n < 0 {
			r.n = math.MaxInt
		}
		before := int64(math.MinInt64)
		for i, e := range entries {
			period := rule.period(e.item.Committed)
			r.first[i] = period != before
			before = period
		}
		rungs = append(rungs, r)
	}
	return rungs
}

// take is offered the entry at position i, and returns the position of the entry
// that it does not keep in turn, or -1.
func (r *rung) take(i int) int {
	if !r.first[i] {
		if i == r.last && r.fallback && len(r.kept) < r.n {
			r.oldest = true
			return -1
		}
		return i
	}
	heap.Push(&r.kept, i)
	switch {
	case len(r.kept) > r.n:
		return heap.Pop(&r.kept).(int)
	case len(r.kept) == r.n && r.oldest:
		r.oldest = false // the number is filled without it
		return r.last
	}
	return -1
}

// name writes the rule and the number to what the rung keeps, as borg prune
// --list does.
func (r *rung) name(entries []*entry) {
	kept := slices.Sorted(slices.Values(r.kept))
	for k, i := range kept {
		entries[i].why = fmt.Sprintf("%s #%d", r.rule, k+1)
	}
	if r.oldest {
		entries[r.last].why = fmt.Sprintf("%s[oldest] #%d", r.rule, len(kept)+1)
	}
}

// positions is a heap with the highest position, the oldest entry, on top.
type positions []int

func (p positions) Len() int           { return len(p) }
func (p positions) Less(i, j int) bool { return p[i] > p[j] }
func (p positions) Swap(i, j int)      { p[i], p[j] = p[j], p[i] }
func (p *positions) Push(x any)        { *p = append(*p, x.(int)) }
func (p *positions) Pop() any {
	last := len(*p) - 1
	x := (*p)[last]
	*p = (*p)[:last]
	return x
}

// floorDiv rounds down, also before 1970.
func floorDiv(a, b int64) int64 {
	q := a / b
	if a%b < 0 {
		q--
	}
	return q
}
