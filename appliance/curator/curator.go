// Package curator decides what goes from a disk of generations, and lets it go.
//
// What to keep is package retention's business, how to remove is package
// generations'. Here is whether anything may go at all just now, and the
// records on the disk that no SD card, no time source and nobody at home can
// turn back:
//
//	clock     the latest time that was believed, and how much time has passed
//	floor     the highest floor of each repository that was ever asked for
//	expiry    what went in the last 24 hours, and since when nothing could
//	retiring  the repositories that shall leave, since when
//	room      what each of the last days added
//
// Nothing goes while the clock is unset or in doubt, while somebody reads, and
// while a record cannot be read that could forbid it; nothing of a repository
// with a generation that is suspect. Days and delays count by time that is known
// to have passed, never by the clock alone.
//
// It guarantees that what it removes was decided on before by all of this, one
// generation at a time, counted before it goes, so that a crash loses no count.
// It leaves to its caller when to make a [Curator.Pass], who may ask for what,
// and to tell the operator: what must be told comes by Options.Event and
// [Curator.State].
package curator

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"farkeep/appliance/status"
	"farkeep/shared/generations"
	"farkeep/shared/history"
	"farkeep/shared/retention"
)

// Disk is what a curator needs of a *generations.Store.
type Disk interface {
	Repositories() ([]string, error)
	List(ctx context.Context, repository string) ([]generations.Generation, error)
	Current(ctx context.Context, repository string) (generations.Generation, error)
	Decide(ctx context.Context, repository, name string, d generations.Decision) error
	Remove(ctx context.Context, repository, name string) error
	RemoveRepository(ctx context.Context, repository string) error
	Sweep(ctx context.Context) (int, error)
	Space() (free, reserve, total int64, err error)
	ReadRecord(name string, v any) error
	WriteRecord(name string, v any) error
}

// Options are what a curator must know.
type Options struct {
	History history.Settings
	// Now is the clock. Believed says whether it was set from outside and did not
	// jump. Uptime and Boot are the machine's own count: the time since its start,
	// and a name of that start that no other one has.
	Now      func() time.Time
	Believed func() bool
	Uptime   func() time.Duration
	Boot     string
	// Readers names the keys with which somebody reads generations.
	Readers func() []string
	// Event takes what must be told to the operator once. It must not call back.
	Event func(status.Event)
	Log   *slog.Logger
}

// saveEvery is how old the disk's record of the time may get.
const saveEvery = time.Hour

// Curator is a disk's. Its methods are safe for concurrent use.
type Curator struct {
	disk Disk
	opt  Options

	pass sync.Mutex // held while something goes, or comes back from being rejected

	mu       sync.Mutex // guards the fields below
	clock    clockRecord
	doubt    string // about the time: "" for none
	broken   string // the record that must be put right before anything goes
	saved    time.Duration
	accept   time.Duration // the uptime until which an admin accepts the time
	floors   floorRecord
	noFloor  bool
	expiry   expiryRecord
	retiring retiringRecord
	days     roomRecord
	least    int64 // bytes that thinning keeps free at least
	state    State
}

// State is what is told of a curator, whether its disk is there or not.
type State struct {
	Frozen      []string
	FrozenSince time.Time
	ClockDoubt  string
	Room        *status.Room
	Retiring    []status.Retiring
}

// floorRecord is the record "floor".
type floorRecord struct {
	Repositories map[string]floor `toml:"repositories"`
}

type floor struct {
	Generations int   `toml:"generations"`
	Age         int64 `toml:"age_seconds"`
}

func (f floor) over(r retention.Floor) floor {
	return floor{max(f.Generations, r.Generations), max(f.Age, int64(r.Age/time.Second))}
}

// expiryRecord is the record "expiry".
type expiryRecord struct {
	// FrozenSince is since when no pass could do all of its work; zero: the last
	// one did.
	FrozenSince time.Time `toml:"frozen_since"`
	// Gone is when generations went, in seconds of clockRecord.Passed.
	Gone map[string][]int64 `toml:"gone"`
}

// retiringRecord is the record "retiring".
type retiringRecord struct {
	Repositories map[string]retirement `toml:"repositories"`
}

type retirement struct {
	By     string    `toml:"by"`
	Asked  time.Time `toml:"asked"`
	Passed int64     `toml:"passed_seconds"` // clockRecord.Passed when it was asked for
	After  int64     `toml:"after_seconds"`  // as the settings were then
}

// New reads the disk's records.
func New(ctx context.Context, disk Disk, opt Options) (*Curator, error) {
	c := &Curator{disk: disk, opt: opt}
	uncounted := false
	for _, record := range []struct {
		name string
		v    interface{ sane() bool }
		lost func()
	}{
		{"clock", &c.clock, func() { c.clock, c.broken = clockRecord{}, "clock" }},
		{"floor", &c.floors, func() { c.floors, c.noFloor = floorRecord{}, true }},
		{"expiry", &c.expiry, func() { c.expiry, uncounted = expiryRecord{}, true }},
		// Nothing leaves whose leaving is not on record.
		{"retiring", &c.retiring, func() { c.retiring = retiringRecord{} }},
		{"room", &c.days, func() { c.days = roomRecord{} }},
	} {
		err := disk.ReadRecord(record.name, record.v)
		if err == nil && !record.v.sane() {
			err = errors.New("its numbers make no sense")
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			opt.Log.Error("a record on the disk cannot be read", "record", record.name, "err", err)
			record.lost()
		}
	}
	c.catchUp()
	if c.floors.Repositories == nil {
		c.floors.Repositories = map[string]floor{}
	}
	if c.expiry.Gone == nil {
		c.expiry.Gone = map[string][]int64{}
	}
	if c.retiring.Repositories == nil {
		c.retiring.Repositories = map[string]retirement{}
	}
	if c.clock.Latest.IsZero() && c.broken == "" {
		// A disk that was filled before there were records, or whose record was
		// removed: what was committed last is what it has seen.
		repositories, err := disk.Repositories()
		if err != nil {
			return nil, fmt.Errorf("curator: %w", err)
		}
		for _, name := range repositories {
			list, err := disk.List(ctx, name)
			if err != nil {
				return nil, fmt.Errorf("curator: %w", err)
			}
			for _, g := range list {
				if g.ClockSet && g.Committed.After(c.clock.Latest) {
					c.clock.Latest = g.Committed.UTC()
				}
			}
		}
	}
	c.state.FrozenSince = c.expiry.FrozenSince
	// A disk that takes no more writes can still be read.
	if err := c.Observe(true); err != nil {
		opt.Log.Error("the disk's records", "err", err)
	}
	if uncounted {
		// Today's may have gone already.
		if err := c.count(everything); err != nil {
			opt.Log.Error("the disk's records", "err", err)
		}
	}
	return c, nil
}

// longest bounds every span in a record, in seconds.
const longest = 200 * 365 * day

func plausible(seconds int64) bool { return seconds >= 0 && seconds <= longest }

func (r *clockRecord) sane() bool {
	return plausible(r.Passed) && plausible(r.Ahead) && plausible(r.Uptime)
}

func (r *floorRecord) sane() bool {
	for _, f := range r.Repositories {
		if f.Generations < 0 || !plausible(f.Age) {
			return false
		}
	}
	return true
}

func (r *expiryRecord) sane() bool {
	for _, gone := range r.Gone {
		if slices.ContainsFunc(gone, func(at int64) bool { return !plausible(at) }) {
			return false
		}
	}
	return true
}

func (r *retiringRecord) sane() bool {
	for _, e := range r.Repositories {
		if !plausible(e.Passed) || !plausible(e.After) || e.Asked.IsZero() {
			return false
		}
	}
	return true
}

func (r *roomRecord) sane() bool {
	return !slices.ContainsFunc(r.Days, func(d dayRecord) bool { return d.Day < 0 || d.Day > longest/day || d.Added < 0 || d.First < 0 })
}

// catchUp makes what was counted by a record of the time that is lost begin anew
// with the one that is there: it counts in full, and not for ever.
func (c *Curator) catchUp() {
	for _, gone := range c.expiry.Gone {
		for i := range gone {
			gone[i] = min(gone[i], c.clock.Passed)
		}
	}
	for name, r := range c.retiring.Repositories {
		r.Passed = min(r.Passed, c.clock.Passed)
		c.retiring.Repositories[name] = r
	}
}

// everything stands for all repositories in expiryRecord.Gone.
const everything = "*"

// Observe takes note of the time, on the disk when the record there is older than
// saveEvery or save says so.
func (c *Curator) Observe(save bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.observe(save)
}

func (c *Curator) observe(save bool) error {
	up := c.opt.Uptime()
	at := reading{now: c.opt.Now(), believed: c.opt.Believed(), boot: c.opt.Boot, uptime: up}
	accept := c.accept > up
	switch {
	case c.broken != "" && !(accept && at.believed):
		c.doubt = "the disk's own record of the time cannot be read"
		c.state.ClockDoubt = c.doubt
		return nil
	case c.broken != "":
		c.broken = ""
	}
	next, doubt := c.clock.observe(at, accept)
	c.doubt = doubt
	c.state.ClockDoubt = ""
	if doubt != "" {
		// One that is not set is told of by the part that sets it.
		if at.believed {
			c.state.ClockDoubt = doubt
		}
		return nil
	}
	if accept {
		c.accept = 0
		c.opt.Log.Warn("the time was accepted", "was", c.clock.Latest, "is", next.Latest)
		save = true
	}
	c.clock = next
	if !save && c.saved != 0 && up-c.saved < saveEvery {
		return nil
	}
	c.saved = up
	if err := c.disk.WriteRecord("clock", c.clock); err != nil {
		return fmt.Errorf("the disk's record of the time: %w", err)
	}
	return nil
}

// Believed says whether commit times can be believed by what the disk remembers.
func (c *Curator) Believed() bool { return c.Doubt() == "" }

// Frozen says whether the last pass could not do all of its work.
func (c *Curator) Frozen() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.expiry.FrozenSince.IsZero()
}

// Doubt is why nothing goes by the time, "" for no reason; it takes note of the
// time first.
func (c *Curator) Doubt() string {
	if err := c.Observe(false); err != nil {
		c.opt.Log.Warn("clock", "err", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.doubt
}

// State says what an operator must know.
func (c *Curator) State() State {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.observe(false); err != nil {
		c.opt.Log.Warn("clock", "err", err)
	}
	s := c.state
	s.Frozen = slices.Clone(s.Frozen)
	now := c.opt.Now()
	for _, name := range slices.Sorted(maps.Keys(c.retiring.Repositories)) {
		if len(s.Retiring) < status.MaxRetiring {
			s.Retiring = append(s.Retiring, c.retirement(name, now))
		}
	}
	return s
}

func (c *Curator) retirement(name string, now time.Time) status.Retiring {
	r := c.retiring.Repositories[name]
	after := time.Duration(r.After) * time.Second
	// Whichever is later: so much time by the clock, and so much that passed.
	due := r.Asked.Add(after)
	if passed := now.Add(after - time.Duration(c.clock.Passed-r.Passed)*time.Second); passed.Sub(due) >= time.Minute {
		due = passed.UTC().Truncate(time.Minute)
	}
	return status.Retiring{Repository: name, By: r.By, Asked: r.Asked, Due: due}
}

// Refuse is the error of a push to a repository that is retiring, or nil.
func (c *Curator) Refuse(repository string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.retiring.Repositories[repository]; !ok {
		return nil
	}
	r := c.retirement(repository, c.opt.Now())
	return fmt.Errorf("repository %s is being retired: the key %s asked for it on %s, and it leaves on %s", repository, r.By, stamp(r.Asked), stamp(r.Due))
}

// rules are a repository's, over the floor that the disk remembers.
func (c *Curator) rules(repository string) retention.Rules {
	r := c.opt.History.For(repository)
	f := c.floors.Repositories[repository].over(r.Floor)
	r.Floor = retention.Floor{Generations: f.Generations, Age: time.Duration(f.Age) * time.Second}
	return r
}

// raise remembers floors that are higher than before.
func (c *Curator) raise(repositories []string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.noFloor {
		return nil
	}
	changed := false
	for _, name := range repositories {
		old, known := c.floors.Repositories[name]
		next := old.over(c.opt.History.For(name).Floor)
		if !known || next != old {
			c.floors.Repositories[name] = next
			changed = true
		}
	}
	for name := range c.floors.Repositories {
		if !slices.Contains(repositories, name) {
			delete(c.floors.Repositories, name)
			changed = true
		}
	}
	if !changed {
		return nil
	}
	return c.disk.WriteRecord("floor", c.floors)
}

// items are a repository's generations as package retention wants them.
func (c *Curator) items(ctx context.Context, repository string, list []generations.Generation) ([]retention.Item, error) {
	current, err := c.disk.Current(ctx, repository)
	if err != nil && !errors.Is(err, generations.ErrNone) {
		return nil, err
	}
	times := times(c.opt.Now(), list)
	items := make([]retention.Item, len(list))
	for i, g := range list {
		items[i] = retention.Item{Name: g.Name, Sequence: g.Sequence, Committed: times[i], Rejected: g.Standing == generations.Rejected}
		switch {
		case g.Format == 0:
			items[i].Kept = "unreadable"
		case g.Standing == generations.Suspect:
			items[i].Kept = retention.KeptSuspect
		case g.Name == current.Name:
			items[i].Kept = retention.KeptCurrent
		}
	}
	return items, nil
}

// times are when generations were committed at the latest: a time that was not
// believed when it was written, or lies ahead, or after that of a later
// generation, is that of the next later one, or now. list is in the order of the
// numbers, which no clock can forge.
func times(now time.Time, list []generations.Generation) []time.Time {
	out := make([]time.Time, len(list))
	latest := now
	for i := len(list) - 1; i >= 0; i-- {
		if g := list[i]; g.ClockSet && g.Committed.Before(latest) {
			latest = g.Committed
		}
		out[i] = latest
	}
	return out
}

// Explain says of each generation of a repository whether it stays, why, and when
// it goes, as if nothing was frozen; by name.
func (c *Curator) Explain(ctx context.Context, repository string) (map[string]retention.Decision, error) {
	list, err := c.disk.List(ctx, repository)
	if err != nil {
		return nil, err
	}
	items, err := c.items(ctx, repository, list)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	rules := c.rules(repository)
	rules.PerDay -= c.spent(repository)
	c.mu.Unlock()
	out := map[string]retention.Decision{}
	for _, d := range retention.Plan(c.opt.Now(), rules, items) {
		out[d.Name] = d
	}
	return out, nil
}

// spent is how many generations of a repository went in the last 24 hours.
func (c *Curator) spent(repository string) int {
	if len(c.expiry.Gone[everything]) > 0 && c.clock.Passed-c.expiry.Gone[everything][0] < day {
		return 1 << 20
	}
	n := 0
	for _, at := range c.expiry.Gone[repository] {
		if c.clock.Passed-at < day {
			n++
		}
	}
	return n
}

const day = 24 * 60 * 60 // seconds

// count takes note that a generation of repository goes now.
func (c *Curator) count(repository string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for name, gone := range c.expiry.Gone {
		gone = slices.DeleteFunc(gone, func(at int64) bool { return c.clock.Passed-at >= day })
		if c.expiry.Gone[name] = gone; len(gone) == 0 {
			delete(c.expiry.Gone, name)
		}
	}
	c.expiry.Gone[repository] = append(c.expiry.Gone[repository], c.clock.Passed)
	return c.disk.WriteRecord("expiry", c.expiry)
}

// uncount takes the last one back.
func (c *Curator) uncount(repository string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	gone := c.expiry.Gone[repository]
	c.expiry.Gone[repository] = gone[:max(0, len(gone)-1)]
	return c.disk.WriteRecord("expiry", c.expiry)
}

// cut bounds a text for a status file.
func cut(s string) string {
	if len(s) > status.MaxText {
		return s[:status.MaxText]
	}
	return s
}
