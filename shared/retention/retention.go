// Package retention decides which generations stay and which may go. It is
// pure: no clock, no disk, the same answer for the same question.
//
// The rules are those of borg prune, word for word, so that a user's
// --keep-within=10d --keep-weekly=4 --keep-monthly=12 --keep-yearly=-1 means the
// same here (Borg 1.2, "borg prune"; all days are UTC). Two things are not
// Borg's: a floor below which no rule reaches, and a bound on how many go in a
// day, so that neither a rule written wrong nor a clock thrown into the future
// empties a history.
//
// Left to the caller: whether anything may go at all just now, counting what
// went in the last 24 hours, and the removing.
package retention

import (
	"cmp"
	"container/heap"
	"fmt"
	"slices"
	"time"
)

// Policy is what to keep, in the words of borg prune --keep-*. A number of 0
// makes no rule, -1 keeps one of every period there ever was.
type Policy struct {
	Within                                 time.Duration
	Hourly, Daily, Weekly, Monthly, Yearly int
}

// Floor is what no policy reaches: the newest Generations, and everything that
// is younger than Age.
type Floor struct {
	Generations int
	Age         time.Duration
}

// Rules are one repository's. The zero value lets nothing go.
type Rules struct {
	Policy
	Floor
	// PerDay is how many may go in 24 hours. A caller that let some go already
	// takes them off before it asks again; 0 or less: nothing goes.
	PerDay int
}

// Values of Item.Kept that mean something here; any other text pins as well.
const (
	// KeptSuspect pins a generation that nobody has judged. It takes no place of
	// a good one: no rule and no floor counts it.
	KeptSuspect = "suspect"
	// KeptCurrent pins the generation that the next push is compared with.
	KeptCurrent = "current"
)

// WaitsForItsDay is why an item stays that no rule keeps any more: more went, or
// goes, in these 24 hours than Rules.PerDay lets.
const WaitsForItsDay = "expire_per_day"

// Item is one generation.
type Item struct {
	Name      string
	Sequence  int64     // orders items that were committed at the same instant, and says which is the newest
	Committed time.Time // an item without one stays: its age is not known
	Kept      string    // the reason that pins it, "" for none
	// Rejected items count for no rule and no floor; they go once they are older
	// than Floor.Age.
	Rejected bool
}

// Decision is about one item.
type Decision struct {
	Name string
	Keep bool
	// Why it stays: what pins it, the rule as borg prune --list names it
	// ("weekly #3", "yearly[oldest] #2"), "newest", "floor", "no commit time", or
	// WaitsForItsDay. Why it goes: "no rule" or "rejected".
	Why string
	// Goes is when it goes if nothing new comes: now for what goes now, zero for
	// what stays.
	Goes time.Time
}

// forever is later than any clock; it never leaves the package.
var forever = time.Unix(1<<40, 0)

// Plan decides about all items, in any order, and answers oldest first. It never
// lets go of what is pinned, of the floor, of the newest item, or of more than
// r.PerDay items. Removing what it lets go, all or a part, changes nothing about
// the others: asked again at the same instant it plans the rest.
//
// The cost is n log n, forecast included: about 20 ms for 10,000 items.
func Plan(now time.Time, r Rules, items []Item) []Decision {
	entries := examine(now, r, items)
	goes := schedule(now, r.PerDay, entries)
	decisions := make([]Decision, len(entries))
	for i := range entries {
		e := &entries[i]
		d := Decision{Name: e.item.Name, Keep: true, Why: e.why, Goes: goes[i]}
		if !e.until.After(now) {
			d.Keep = d.Goes.IsZero() || d.Goes.After(now)
			if d.Keep {
				d.Why = WaitsForItsDay
			}
		}
		decisions[i] = d
	}
	return decisions
}

// schedule says when each entry goes, zero for those that stay: as soon as
// nothing keeps it, the oldest first, and never more than perDay in 24 hours.
func schedule(now time.Time, perDay int, entries []entry) []time.Time {
	goes := make([]time.Time, len(entries))
	if perDay <= 0 {
		return goes
	}
	var going []int // positions, those first that are let go first
	for i := range entries {
		if entries[i].until.Before(forever) {
			going = append(going, i)
		}
	}
	slices.SortStableFunc(going, func(a, b int) int { return entries[a].until.Compare(entries[b].until) })
	var due positions // negative, so that the oldest is on top
	var gone []time.Time
	for at := now; len(going) > 0 || len(due) > 0; {
		if len(due) == 0 {
			at = later(at, entries[going[0]].until)
		}
		if k := len(gone) - perDay; k >= 0 {
			at = later(at, gone[k].Add(24*time.Hour))
		}
		for len(going) > 0 && !entries[going[0]].until.After(at) {
			heap.Push(&due, -going[0])
			going = going[1:]
		}
		goes[-heap.Pop(&due).(int)] = at
		gone = append(gone, at)
	}
	return goes
}

// Thin names what to let go next to make room on a full disk, beyond what the
// policy lets go: nothing pinned, nothing of the floor, not the newest, and
// nothing when r.PerDay is 0. What Plan would let go comes first, oldest first.
// Then comes the loss that is felt least: the item whose next newer neighbour is
// nearest, measured by the item's age, so that days of last week go before
// months of last year, and of equal ones the oldest.
func Thin(now time.Time, r Rules, items []Item) (name string, ok bool) {
	if r.PerDay <= 0 {
		return "", false
	}
	entries := examine(now, r, items)
	least := 0.0
	for i := range entries {
		e := &entries[i]
		if !e.until.After(now) {
			return e.item.Name, true
		}
		if e.held.After(now) || i+1 == len(entries) {
			continue
		}
		age := now.Sub(e.item.Committed)
		loss := float64(entries[i+1].item.Committed.Sub(e.item.Committed)) / float64(max(age, 1))
		if !ok || loss < least {
			name, ok, least = e.item.Name, true, loss
		}
	}
	return name, ok
}

// entry is an item and what is known about it.
type entry struct {
	item  Item
	why   string    // it stays, or goes
	held  time.Time // no policy lets it go before: pins, floor, newest
	until time.Time // it stays until then
}

// examine finds out for every item why it stays and until when, oldest first.
func examine(now time.Time, r Rules, items []Item) []entry {
	entries := make([]entry, len(items))
	for i, item := range items {
		entries[i].item = item
	}
	slices.SortStableFunc(entries, func(a, b entry) int {
		return cmp.Or(a.item.Committed.Compare(b.item.Committed), cmp.Compare(a.item.Sequence, b.item.Sequence))
	})
	var counted []*entry // by the rules, newest first
	for i := len(entries) - 1; i >= 0; i-- {
		e := &entries[i]
		if !e.item.Rejected && e.item.Kept != KeptSuspect && !e.item.Committed.IsZero() {
			counted = append(counted, e)
		}
	}
	ladder(now, r.Policy, counted)
	for i := range entries {
		e := &entries[i]
		switch {
		case e.item.Rejected:
			e.why = "rejected"
		case e.why == "":
			e.why = "no rule"
		}
		e.hold(now, e.item.Committed.Add(r.Floor.Age), "floor")
		if e.item.Committed.IsZero() {
			e.hold(now, forever, "no commit time")
		}
	}
	hold := func(some []*entry, n int, why string) {
		bySequence := slices.Clone(some)
		slices.SortFunc(bySequence, func(a, b *entry) int { return cmp.Compare(b.item.Sequence, a.item.Sequence) })
		for _, e := range bySequence[:min(max(n, 0), len(bySequence))] {
			e.hold(now, forever, why)
		}
	}
	all := make([]*entry, len(entries))
	for i := range entries {
		all[i] = &entries[i]
	}
	// The newest by number, which no clock can forge: of all, and of the good ones.
	hold(all, 1, "newest")
	hold(counted, 1, "newest")
	hold(counted, r.Floor.Generations, "floor")
	for i := range entries {
		if e := &entries[i]; e.item.Kept != "" {
			e.hold(now, forever, e.item.Kept)
			e.why = e.item.Kept
		}
	}
	return entries
}

// hold keeps e until t, and gives the reason if it has no other one.
func (e *entry) hold(now, t time.Time, why string) {
	if !e.until.After(now) && t.After(now) {
		e.why = why
	}
	e.held = later(e.held, t)
	e.until = later(e.until, t)
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// ladder applies the policy to entries, which come newest first, as borg prune
// would: it sets why and until of those that a rule keeps, until of the others to
// now.
//
// "Within" comes first, then each rule of periods looks at what the rules before
// it left. Each takes the newest of every period, newest period first, until it
// has its number; a period whose newest is kept already is not counted. A rule
// that cannot fill its number keeps the oldest of all as well, so that histories
// grow into a policy.
//
// The future needs no second look at everything. With nothing new, only "within"
// changes: it loses its oldest, which the next rule then takes or not, and what
// it takes may push out its own oldest, for the rule after to take. Once let go,
// an item never returns. So each item climbs down the ladder once.
func ladder(now time.Time, p Policy, entries []*entry) {
	if len(entries) == 0 {
		return
	}
	rungs := rungsOf(p, entries)
	// offer hands an entry down and returns the one that no rung keeps, or -1.
	offer := func(i int) int {
		for r := range rungs {
			if i = rungs[r].take(i); i < 0 {
				break
			}
		}
		return i
	}
	within := 0
	for i, e := range entries {
		e.until = forever
		if p.Within > 0 && now.Before(e.item.Committed.Add(p.Within)) {
			within++ // the entries are sorted: all that follow are older
			e.why = fmt.Sprintf("within #%d", within)
			continue
		}
		if out := offer(i); out >= 0 {
			entries[out].until = now
		}
	}
	for r := range rungs {
		rungs[r].name(entries)
	}
	for i := within - 1; i >= 0; i-- {
		if out := offer(i); out >= 0 {
			entries[out].until = entries[i].item.Committed.Add(p.Within)
		}
	}
}
