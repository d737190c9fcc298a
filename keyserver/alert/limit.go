package alert

import (
	"slices"
	"strings"
	"time"
)

// How many mails there may be. The aim is twofold: whoever can make this server
// write mails cannot drown a person in them, and cannot hide a thing behind
// another. So every appliance and kind has a place of its own, what is new comes
// before what is repeated, and nothing is dropped: what gets no mail of its own
// stands in the next summary.
const (
	window = 24 * time.Hour
	// firstsPerDay bounds the mails about an appliance and kind that was quiet
	// for a day; firstsPerAppliance is one appliance's share of them, so that the
	// other half is left for the others.
	firstsPerDay       = 20
	firstsPerAppliance = 10
	// repeatsPerDay bounds further mails about the same appliance and kind.
	repeatsPerDay = 6
	// firstGap and lastGap are how long an appliance and kind rests after it was
	// told about; the gap doubles while it goes on.
	firstGap = time.Hour
	lastGap  = 24 * time.Hour
	// A summary of what is new waits summaryDelay, to gather, and comes at most
	// every summaryGap; one of repetitions alone every repeatSummaryGap.
	summaryDelay     = 10 * time.Minute
	summaryGap       = time.Hour
	repeatSummaryGap = 6 * time.Hour
	// maxPairs bounds memory. A site of 300 appliances cannot reach it; beyond,
	// events are counted by kind alone.
	maxPairs = 4096
)

// pair is one appliance and kind.
type pair struct {
	Told time.Time     `json:"told,omitzero"` // last, by a mail of its own or in a summary
	Gap  time.Duration `json:"gap,omitempty"` // from Told
	// What was not told yet: how often, since when, and the last of it.
	Count int       `json:"count,omitempty"`
	Since time.Time `json:"since,omitzero"`
	Last  *Event    `json:"last,omitempty"`
}

// mailed is one mail about one event.
type mailed struct {
	At        time.Time `json:"at"`
	Appliance string    `json:"appliance,omitempty"`
	First     bool      `json:"first,omitempty"`
}

// limiter decides what becomes a mail. It has no clock and does no I/O; its
// fields are what survives a restart.
type limiter struct {
	Pairs   map[string]*pair `json:"pairs"`
	Mails   []mailed         `json:"mails"`            // of the last day
	Summary time.Time        `json:"summary,omitzero"` // the last one
	Seen    time.Time        `json:"seen,omitzero"`    // when this was looked at last

	settled bool      // all pairs were looked at since the start
	cleaned time.Time // and when
}

func newLimiter() *limiter { return &limiter{Pairs: map[string]*pair{}} }

func pairName(appliance, kind string) string { return kind + " " + appliance }

func (l *limiter) pair(ev Event) *pair {
	name := pairName(ev.Appliance, ev.Kind)
	p := l.Pairs[name]
	if p == nil && len(l.Pairs) >= maxPairs {
		name = pairName("", ev.Kind)
		p = l.Pairs[name]
	}
	if p == nil {
		p = &pair{}
		l.Pairs[name] = p
	}
	return p
}

// take reports whether ev gets a mail of its own now. If not, it is kept for the
// next summary.
func (l *limiter) take(ev Event, now time.Time) bool {
	l.settle(now)
	p := l.pair(ev)
	first := p.quiet(now)
	var ok bool
	if first {
		all, own := l.count(true, ev.Appliance)
		ok = all < firstsPerDay && own < firstsPerAppliance
	} else {
		all, _ := l.count(false, ev.Appliance)
		ok = all < repeatsPerDay && now.Sub(p.Told) >= p.Gap
	}
	if !ok || p.Count > 0 { // what waits for the summary is told in its order
		l.keep(p, ev, 1)
		return false
	}
	p.tell(now)
	l.Mails = append(l.Mails, mailed{At: now, Appliance: ev.Appliance, First: first})
	return true
}

// giveBack undoes take for an event whose mail could not be queued.
func (l *limiter) giveBack(ev Event) {
	p := l.pair(ev)
	p.Told, p.Gap = time.Time{}, 0
	l.keep(p, ev, 1)
}

func (l *limiter) keep(p *pair, ev Event, count int) {
	if p.Count == 0 {
		p.Since = ev.At
	}
	p.Count += count
	p.Last = &ev
}

// quiet reports whether this was not told about for a day.
func (p *pair) quiet(now time.Time) bool { return p.Told.IsZero() || now.Sub(p.Told) >= window }

func (p *pair) tell(now time.Time) {
	if p.quiet(now) || p.Gap == 0 {
		p.Gap = firstGap
	} else {
		p.Gap = min(2*p.Gap, lastGap)
	}
	p.Told, p.Count, p.Since, p.Last = now, 0, time.Time{}, nil
}

// count is how many mails of this sort there were in the last day, in all and
// about one appliance.
func (l *limiter) count(first bool, appliance string) (all, own int) {
	for _, m := range l.Mails {
		if m.First == first {
			all++
			if m.Appliance == appliance {
				own++
			}
		}
	}
	return all, own
}

// settle forgets what is over, and moves times that lie in the future, which a
// clock that was set back has left: they would silence everything until then.
func (l *limiter) settle(now time.Time) {
	l.Mails = slices.DeleteFunc(l.Mails, func(m mailed) bool { return now.Sub(m.At) >= window })
	if l.settled && !now.Before(l.Seen) && now.Sub(l.cleaned) < time.Hour {
		l.Seen = now
		return
	}
	l.settled, l.Seen, l.cleaned = true, now, now
	past := func(t *time.Time) {
		if t.After(now) {
			*t = now
		}
	}
	past(&l.Summary)
	for i := range l.Mails {
		past(&l.Mails[i].At)
	}
	for name, p := range l.Pairs {
		past(&p.Told)
		past(&p.Since)
		if p.Count == 0 && now.Sub(p.Told) >= 2*window {
			delete(l.Pairs, name)
		}
	}
}

// untold is one line of a summary.
type untold struct {
	Event
	Count int
	Since time.Time
	pair  string
}

// summary returns everything that was not told yet, if it is time for it.
func (l *limiter) summary(now time.Time) []untold {
	l.settle(now)
	due := false
	for _, p := range l.Pairs {
		switch {
		case p.Count == 0:
		case p.quiet(now):
			due = due || now.Sub(p.Since) >= summaryDelay && now.Sub(l.Summary) >= summaryGap
		default:
			due = due || now.Sub(p.Told) >= p.Gap && now.Sub(l.Summary) >= repeatSummaryGap
		}
	}
	if !due {
		return nil
	}
	var all []untold
	for name, p := range l.Pairs {
		if p.Count > 0 {
			u := untold{*p.Last, p.Count, p.Since, name}
			if name != pairName(u.Appliance, u.Kind) {
				u.Event = Event{Kind: u.Kind, At: u.At} // of several appliances
			}
			all = append(all, u)
		}
	}
	slices.SortFunc(all, func(a, b untold) int {
		if c := strings.Compare(a.Appliance, b.Appliance); c != 0 {
			return c
		}
		return strings.Compare(a.Kind, b.Kind)
	})
	return all
}

// summarised notes that a summary of these is on its way. What was raised since
// it was made stays for the next.
func (l *limiter) summarised(lines []untold, now time.Time) {
	l.Summary = now
	for _, u := range lines {
		p := l.Pairs[u.pair]
		if p == nil {
			continue
		}
		left, last := p.Count-u.Count, p.Last
		p.tell(now)
		if left > 0 {
			p.Count, p.Since, p.Last = left, now, last
		}
	}
}
