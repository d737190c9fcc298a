package server

import (
	"context"
	"fmt"
	"log/slog"
	"sort"
	"sync"
	"time"

	"farkeep/keyserver/audit"
	"farkeep/shared/keywire"
)

const (
	// repeatWindow and repeatLimit bound what a peer can make the audit log
	// grow by: of the same event with the same outcome, this many are written
	// in full in each window; the others are counted, and the count is written.
	repeatWindow = time.Hour
	repeatLimit  = 20
)

// witness writes decisions to the audit log and keeps a flood of equal ones
// from filling the disk, which would stop the service: without a record there
// is no key.
type witness struct {
	log  *slog.Logger
	to   *audit.Log
	now  func() time.Time
	mu   sync.Mutex
	seen map[sameness]*repeats
}

// sameness is what makes two records equal. Every part is from a small set of
// ours, never a peer's text: so the map is bounded by the site's size.
type sameness struct{ event, decision, appliance string }

type repeats struct {
	since time.Time
	count int          // in this window
	left  int          // of these, not written
	last  audit.Record // the last one not written
}

func newWitness(to *audit.Log, log *slog.Logger, now func() time.Time) *witness {
	return &witness{log: log, to: to, now: now, seen: map[sameness]*repeats{}}
}

// record puts r on record; when it returns an error nothing may be granted. It
// does not hold the lock while it writes: records of many peers that come at once are made
// durable together.
func (w *witness) record(r audit.Record) error {
	// A key that is given away is always written: the policy bounds how many
	// there can be.
	if r.Event == string(keywire.Key) && r.Decision == "granted" {
		return w.append(r)
	}
	for _, due := range w.due(r) {
		if err := w.append(due); err != nil {
			return err
		}
	}
	return nil
}

// due is what has to be written when r has happened: r, nothing, or first the count
// of those that were not written.
func (w *witness) due(r audit.Record) (records []audit.Record) {
	w.mu.Lock()
	defer w.mu.Unlock()
	id := sameness{r.Event, r.Decision, r.Appliance}
	now := w.now()
	p := w.seen[id]
	if p == nil || now.Sub(p.since) >= repeatWindow || now.Before(p.since) {
		records = p.settle()
		p = &repeats{since: now}
		w.seen[id] = p
	}
	p.count++
	if p.count > repeatLimit {
		p.left++
		p.last = r
		return records
	}
	return append(records, r)
}

// settle is the record of how many records a finished window left out, if any.
func (p *repeats) settle() []audit.Record {
	if p == nil || p.left == 0 {
		return nil
	}
	r := p.last
	r.Reason = fmt.Sprintf("%s %s, %d more since %s; the last: %s", r.Event, r.Decision, p.left, p.since.UTC().Format(time.RFC3339), r.Reason)
	r.Event, r.Count = "repeated", p.left
	p.left = 0
	return []audit.Record{r}
}

// run writes the count of every flood soon after its window, also when nothing of
// its kind follows, and what is still open when ctx ends.
func (w *witness) run(ctx context.Context) {
	tick := time.NewTicker(repeatWindow / 6)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			w.flush(func(*repeats) bool { return true })
			return
		case <-tick.C:
			now := w.now()
			w.flush(func(p *repeats) bool { return now.Sub(p.since) >= repeatWindow || now.Before(p.since) })
		}
	}
}

// flush writes the counts of those windows that are over.
func (w *witness) flush(over func(*repeats) bool) {
	w.mu.Lock()
	var open []*repeats
	for _, p := range w.seen {
		if over(p) {
			open = append(open, p)
		}
	}
	sort.Slice(open, func(i, j int) bool { return open[i].since.Before(open[j].since) })
	var records []audit.Record
	for _, p := range open {
		records = append(records, p.settle()...)
	}
	w.mu.Unlock()
	for _, r := range records {
		if err := w.append(r); err != nil {
			w.log.Error("the audit log could not be completed", "err", err)
		}
	}
}

// append writes one record, and its head to the log: a second witness, on
// whichever machine collects that.
func (w *witness) append(r audit.Record) error {
	head, err := w.to.Append(r)
	if err != nil {
		w.log.Error("audit", "event", r.Event, "decision", r.Decision, "appliance", r.Appliance, "reason", r.Reason, "remote", r.Remote, "err", err)
		return err
	}
	w.log.Info("audit", "event", r.Event, "decision", r.Decision, "appliance", r.Appliance, "reason", r.Reason, "remote", r.Remote, "head", head)
	return nil
}
