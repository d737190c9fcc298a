package keeper

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"farkeep/appliance/curator"
	"farkeep/appliance/part"
	"farkeep/appliance/status"
	"farkeep/shared/generations"
	"farkeep/shared/hint"

	"golang.org/x/sys/unix"
)

// curateEvery is how long after a pass of the curator the next one begins while
// the disk is mounted; others follow commits and decisions.
const (
	curateEvery = time.Hour
	lookEvery   = 10 * time.Second // at the clock
)

// bootID is the kernel's name for this start of the machine as the supervisor
// tells it; without one, every start of the keeper counts as the machine's, which
// makes time pass more slowly and never faster.
func bootID(env *part.Env) string {
	if boot, err := status.Read[status.Boot](env.Paths.Boot()); err == nil && boot != nil && boot.BootID != "" {
		return boot.BootID
	}
	return rand.Text()
}

// uptime is CLOCK_BOOTTIME: it goes on whatever happens to the wall clock.
func uptime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

func (k *Keeper) newCurator(store *generations.Store) (*curator.Curator, error) {
	return curator.New(context.Background(), store, curator.Options{
		History: k.brief.History, Now: k.env.Now, Believed: k.clockSet, Uptime: k.uptime, Boot: k.boot,
		Readers: k.readers, Event: k.event, Log: k.env.Log,
	})
}

// curatorNow is the mounted disk's, for verbs that have entered.
func (k *Keeper) curatorNow() *curator.Curator {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.curator
}

// believed says whether commit times can be believed: by the network part's
// clock, and by what the disk remembers.
func (k *Keeper) believed() bool {
	cur := k.curatorNow()
	return k.clockSet() && (cur == nil || cur.Believed())
}

func (k *Keeper) event(e status.Event) {
	e.ID = rand.Text()
	k.env.Log.Warn("decided", "what", e.Kind, "by", e.By, "repository", e.Repository, "generation", e.Generation, "words", e.Text)
	k.known.note(func(l *ledger) {
		l.Events = append(l.Events, e)
		l.Events = slices.Delete(l.Events, 0, max(0, len(l.Events)-status.MaxEvents))
	})
	k.changed()
}

// curateInTime begins a pass when the last one is long ago, or when the time came
// into doubt or out of it since the last look.
func (k *Keeper) curateInTime() {
	k.mu.Lock()
	cur := k.curator
	ready := k.store != nil && !k.closing && !k.passed.IsZero()
	due := ready && time.Since(k.passed) >= curateEvery
	look := ready && time.Since(k.looked) >= lookEvery
	if look {
		k.looked = time.Now()
	}
	k.mu.Unlock()
	if look {
		doubt := cur.Doubt()
		k.mu.Lock()
		due = due || (doubt == "") != (k.doubt == "")
		k.doubt = doubt
		k.mu.Unlock()
	}
	if due {
		k.background.Go(k.curate)
	}
}

// curate makes a pass of the curator, and another one if that is asked for
// meanwhile.
func (k *Keeper) curate() {
	k.mu.Lock()
	if k.passing {
		k.again = true
		k.mu.Unlock()
		return
	}
	k.passing = true
	k.mu.Unlock()
	for {
		k.pass()
		k.mu.Lock()
		if !k.again {
			k.passing = false
			k.mu.Unlock()
			return
		}
		k.again = false
		k.mu.Unlock()
	}
}

func (k *Keeper) pass() {
	ctx, store, leave, err := k.enter(context.Background())
	if err != nil {
		return // the disk is wanted back, or so busy that the next pass is early enough
	}
	defer leave()
	k.mu.Lock()
	cur := k.curator
	k.passed = time.Now()
	k.mu.Unlock()
	if err := cur.Pass(ctx); err != nil && ctx.Err() == nil {
		k.env.Log.Error("history", "err", err)
	}
	state := cur.State()
	k.known.note(func(l *ledger) { l.State, l.Curated = state, k.env.Now().UTC() })
	if err := k.known.refresh(ctx, store); err != nil && ctx.Err() == nil {
		k.env.Log.Error("the disk's generations cannot be listed", "err", err)
	}
	if err := k.report(true); err != nil {
		k.env.Log.Warn("status", "err", err)
	}
}

// readers are the keys with which somebody reads generations at the moment.
func (k *Keeper) readers() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	var names []string
	for _, name := range k.reading {
		if !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// tellHistory adds what is remembered of history to the status.
func (k *Keeper) tellHistory(s *status.Keeper) {
	if cur := k.curatorNow(); cur != nil {
		state := cur.State() // which locks, as note does
		k.known.note(func(l *ledger) { l.State = state })
	}
	k.known.tell(s)
	k.tellScrub(s)
}

// stays refuses pushes to a repository that is leaving.
func (c *call) stays(repository string) error {
	err := c.curatorNow().Refuse(repository)
	return hint.Exit(hint.ExitRefused, hint.Because(err, "if it should stay, an admin key says so: ssh APPLIANCE keep %s", repository))
}

// tooSoon refuses a push that would make a generation too shortly after the last
// one of the same key and repository: by the commit times on the disk, and by
// this process's own count, which no clock setting moves.
func (c *call) tooSoon(ctx context.Context, store *generations.Store, repository string) error {
	interval := c.brief.History.CommitInterval.Std()
	if interval <= 0 {
		return nil
	}
	left := time.Duration(0)
	c.mu.Lock()
	if last, ok := c.commits[repository+" "+c.args.Key]; ok {
		left = interval - time.Since(last)
	}
	c.mu.Unlock()
	newest, err := store.Newest(ctx, repository)
	switch {
	case errors.Is(err, generations.ErrNone):
	case err != nil:
		return err
	case newest.Pusher == c.args.Key && c.believed():
		if age := c.env.Now().Sub(newest.Committed); age >= 0 {
			left = max(left, interval-age)
		}
	}
	if left <= 0 {
		return nil
	}
	err = fmt.Errorf("push %s: its last generation is younger than %s", repository, c.brief.History.CommitInterval)
	return hint.Exit(hint.ExitUnreachable, hint.Because(err, "try again in %s; commit_interval in the appliance's farkeep.toml is the shortest time between two", left.Round(time.Second)))
}

// committed takes note of a commit, for tooSoon.
func (c *call) committed(repository string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for name, at := range c.commits {
		if time.Since(at) > c.brief.History.CommitInterval.Std() {
			delete(c.commits, name)
		}
	}
	c.commits[repository+" "+c.args.Key] = time.Now()
	c.background.Go(c.curate)
}

// maxHolders is how many generations an error about room names.
const maxHolders = 5

// whoHolds adds to an error about room which generations hold most, as far as the
// key may know.
func (c *call) whoHolds(ctx context.Context, store *generations.Store, err error) error {
	var space *generations.SpaceError
	var quota *generations.QuotaError
	if !errors.As(err, &space) && !errors.As(err, &quota) {
		return err
	}
	all, listErr := store.Holdings(ctx)
	if listErr != nil {
		c.log.Warn("what generations hold is not known", "err", listErr)
		return err
	}
	all = slices.DeleteFunc(all, func(h generations.Holding) bool { return !c.sees(h.Repository) })
	slices.SortStableFunc(all, func(a, b generations.Holding) int { return int(max(-1, min(1, b.Bytes-a.Bytes))) })
	var words []string
	for _, h := range all[:min(len(all), maxHolders)] {
		words = append(words, fmt.Sprintf("%s %s %d bytes", h.Repository, h.Generation, h.Bytes))
	}
	if len(words) == 0 {
		return err
	}
	return fmt.Errorf("%w; of %d generations the most is held by: %s", err, len(all), strings.Join(words, ", "))
}
