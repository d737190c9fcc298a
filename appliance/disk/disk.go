// Package disk opens the encrypted disk when it is wanted and makes it dark
// again: power, key, file system, and all the way back.
//
//	       relay on, found         key             check, mount
//	┌─────┐ ──────────▶ ┌─────────┐ ──▶ ┌──────────┐ ────────▶ ┌─────────┐
//	│ off │             │ powered │     │ unlocked │           │ mounted │
//	└─────┘ ◀────────── └─────────┘     └──────────┘           └─────────┘
//	   ▲     stop, relay      │ error        │ error                │ vanished, hung,
//	   │     off, gone        ▼              ▼                      ▼ read-only
//	   │                 ┌──────────────────────────────────────────────┐
//	   ├──────────────── │ failed: tried again, ever more slowly,       │
//	   │   not wanted    │ for as long as the disk is wanted            │
//	   │                 └──────────────────────────────────────────────┘
//	   │                 ┌──────────────────────────────────────────────┐
//	   └──────────────── │ closing: sessions ended, synced, unmounted,  │ ◀── mounted,
//	                     │ mapping removed, disk flushed and stopped    │     not wanted
//	                     └──────────────────────────────────────────────┘
//
// The disk is wanted within its daily window, after "wake" (until it was idle
// for a while), and not after "sleep" (until the next window or "wake"). The
// window is judged only by a clock that is set.
//
// An open disk lives by a lease: the key servers are asked for their consent
// again and again. When one refuses, or none consents in time, the disk is
// closed in order, whoever uses it, and stays dark until consent is back: after a
// refusal that of the very server that refused, also over restarts. See lease.go.
//
// A disk that fails while it is open fails closed: the file system is shut down
// without another write, the mapping removed, the power cut; then it is opened
// again, with a full check of the file system. A part that was killed finds the
// disk as it left it and goes on from there.
//
// The package promises that nothing that a dying disk does blocks it: every
// call that may touch the disk has a bound. What a call that never returns
// leaves behind is a stuck thread, which ends when the power cut makes the
// kernel give up.
package disk

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"farkeep/appliance/consent"
	"farkeep/appliance/relay"
	"farkeep/appliance/status"
	"farkeep/appliance/tokens"
	"farkeep/appliance/unlock"
	"farkeep/shared/keywire"
	"farkeep/shared/settings"

	"github.com/cenkalti/backoff/v5"
)

// Kinds of errors, besides those of package status.
const (
	// ErrorRelay: the relay cannot be driven, or did not cut the power.
	ErrorRelay = "relay"
	// ErrorUnlock: the part unlock did not do its work; the disk is not to blame.
	ErrorUnlock = "unlock"
)

// The part's own bounds and paces.
const (
	appearTimeout  = 40 * time.Second // relay on to disk found: large disks spin up in 10 to 25 s
	appearPoll     = 200 * time.Millisecond
	goneTimeout    = 15 * time.Second // relay off to disk gone
	unlockTimeout  = 3 * time.Minute  // one attempt over all key servers
	checkTimeout   = 24 * time.Hour   // e2fsck of a large, full, slow disk
	mountTimeout   = 5 * time.Minute  // a journal may have to be replayed
	syncTimeout    = 5 * time.Minute
	stepTimeout    = time.Minute // everything that should take no time
	healthTimeout  = 2 * time.Minute
	releaseTimeout = 15 * time.Second // of each neighbour
	unmountTries   = 20
	unmapTries     = 20
	busyPause      = 500 * time.Millisecond

	tick           = time.Second
	healthInterval = 15 * time.Second
	reportInterval = time.Minute

	// wakePatience is how long "wake" goes on trying to open a disk that fails.
	wakePatience = 10 * time.Minute
	// stableAfter is how long a disk must stay mounted until earlier failures
	// no longer slow down the next attempt.
	stableAfter = 10 * time.Minute
	retryFirst  = 2 * time.Second
	retryMax    = 5 * time.Minute
	// retryAsk bounds the wait when only the key is missing: asking costs
	// nothing, and the disk spins meanwhile.
	retryAsk = 30 * time.Second
	// refusedFactor stretches the wait after a refusal, which starts and stops
	// the disk each time: a quarter of an hour in the end. "wake" does not wait.
	refusedFactor = 3
)

// Device is a block device that carries the disk's LUKS header.
type Device struct {
	Name string // "sda1"
	Node string // "/dev/sda1"
	Disk string // the whole disk: "sda"
	Seq  string // the kernel's number for this appearance of the disk, never used twice
}

// System is what the part does to the machine. Calls may block on a dead disk;
// the caller bounds them. Methods are not called concurrently, except that a
// call may still be stuck when the next is made.
type System interface {
	// Find looks for the LUKS header with this UUID; errNotFound if no disk has it.
	Find(uuid string) (Device, error)
	// Present says whether dev is still the disk that Find found.
	Present(dev Device) bool
	// Mapping returns the node of our mapping; "" if there is none.
	Mapping() (node string, err error)
	// Unlock makes the mapping. tokens are what the key servers are shown; refused
	// those that have to grant, if any.
	Unlock(ctx context.Context, dev Device, tokens map[string]keywire.Token, refused []string) (unlock.Result, error)
	// Consent asks the key servers once.
	Consent(ctx context.Context, r consent.Round) (consent.Result, error)
	// Check repairs what e2fsck repairs unasked, and what leaves nothing to choose;
	// full looks at everything, even if the file system says that it is clean.
	Check(ctx context.Context, node string, full bool) error
	// NeedsCheck says what care the file system wants before it is mounted, and
	// why. now is zero while the clock is unset.
	NeedsCheck(node string, now time.Time) (care Care, why string, err error)
	Mount(node string) error
	Mounted() (bool, error)
	// Healthy reads from the disk itself, and fails if the file system went
	// read-only.
	Healthy(dev Device) error
	Space() (total, free int64, err error)
	Sync() error
	// Unmount fails with EBUSY while files are open.
	Unmount() error
	// Abandon takes the file system away from whoever uses it; flush writes
	// what the kernel still holds, without it nothing is written any more.
	Abandon(flush bool) error
	// Unmap removes the mapping, and with it the key from the kernel; later
	// means as soon as nobody uses it. No mapping is no error.
	Unmap(later bool) error
	// Flush makes the disk write its cache; stop spins it down as well.
	Flush(dev Device, stop bool) error
}

// Neighbours are the parts that use the disk.
type Neighbours interface {
	// Attach tells them that the disk is mounted.
	Attach(ctx context.Context) error
	// Release makes them close every file on it.
	Release(ctx context.Context) error
}

// Memory remembers over restarts that the file system must be checked.
type Memory interface {
	CheckWanted() bool
	WantCheck(bool) error
}

// Config is what a Disk needs.
type Config struct {
	UUID      string
	Window    settings.Window
	IdleClose time.Duration
	// OpenRelay takes the relay, turned on or off as the disk was found.
	OpenRelay  func(on bool) (relay.Switch, error)
	System     System
	Neighbours Neighbours
	Memory     Memory
	// Servers are the key servers' names by host key, Book what is remembered of them.
	Servers map[string]string
	Book    *tokens.Book
	// Boottime is CLOCK_BOOTTIME. Leases go by it: suspension counts, and whoever
	// sets the clock wins nothing.
	Boottime func() time.Duration
	// ClockSet says whether the wall clock can be believed.
	ClockSet func() bool
	// VPNUp says whether key servers can be reached. When they can again, an
	// attempt that waits is made at once.
	VPNUp  func() bool
	Alive  func()
	Report func(status.Disk)
	// Before is what an earlier run since power-on reported last: a failure goes
	// on failing since then, and an open disk has the header it was opened with.
	Before status.Disk
	Log    *slog.Logger
}

// Disk is the state machine.
type Disk struct {
	cfg    Config
	relay  relay.Switch // set before the first transition
	poke   chan struct{}
	askNow chan struct{} // makes watch look again at once
	asking chan struct{} // held while key servers are asked: they never see two tokens in the wrong order

	mu         sync.Mutex // guards the fields below
	now        status.Disk
	device     Device
	node       string
	poweredAt  time.Time // monotonic; zero without power
	attached   bool      // the keeper knows that the disk is mounted
	healthAt   time.Time // monotonic: the last look after a mounted disk
	damage     string    // of the LUKS header
	holds      int
	lastUse    time.Time // monotonic: mounted, woken, or a hold ended
	wakeUntil  time.Time // monotonic: how long "wake" keeps trying
	asleepFrom time.Time // the window's start at "sleep", zero outside
	asleep     bool
	stopping   bool
	bound      time.Time          // until when the step under way may take; zero between steps
	cancelOpen context.CancelFunc // calls off the opening under way
	lease
}

// New makes a state machine; Run runs it.
func New(cfg Config) *Disk {
	b := cfg.Before
	d := &Disk{cfg: cfg, poke: make(chan struct{}, 1), askNow: make(chan struct{}, 1), asking: make(chan struct{}, 1), now: status.Disk{
		State: status.DiskOff, Since: time.Now(),
		Error: b.Error, ErrorKind: b.ErrorKind, FailingSince: b.FailingSince,
		HeaderDigest: b.HeaderDigest, TotalBytes: b.TotalBytes, FreeBytes: b.FreeBytes,
	}}
	d.recall(b)
	return d
}

// failure is an error with its kind.
type failure struct {
	kind string
	err  error
}

func (f *failure) Error() string { return f.err.Error() }
func (f *failure) Unwrap() error { return f.err }

func failed(kind, format string, args ...any) error {
	return &failure{kind, fmt.Errorf(format, args...)}
}

// errNotFound is Find's answer when no disk has the UUID.
var errNotFound = errors.New("no disk has this LUKS UUID")

// Run opens and closes the disk until ctx ends, then closes it and returns.
func (d *Disk) Run(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() {
		d.mu.Lock()
		d.stopping = true
		d.mu.Unlock()
		d.wake()
	})()
	done := make(chan error, 1)
	go func() { done <- d.drive(ctx) }()
	watching, stopWatch := context.WithCancel(ctx)
	watched := make(chan struct{})
	go func() { defer close(watched); d.watch(watching) }()
	defer func() { stopWatch(); <-watched }()
	ticker := time.NewTicker(tick)
	defer ticker.Stop()
	for reported := time.Now(); ; {
		select {
		case err := <-done:
			return err
		case <-ticker.C:
		}
		d.mu.Lock()
		// A step that is past its own bound is a hang of ours: the supervisor
		// may start this part anew.
		overdue := !d.bound.IsZero() && time.Since(d.bound) > stepTimeout
		d.expireLocked()
		if d.cancelOpen != nil && !d.wantedLocked(time.Now()) {
			d.cancelOpen()
		}
		d.mu.Unlock()
		if !overdue {
			d.cfg.Alive()
		}
		if time.Since(reported) >= reportInterval {
			d.report()
			reported = time.Now()
		}
	}
}

// drive makes one transition after the other, for ever.
func (d *Disk) drive(ctx context.Context) error {
	// Two paces: attempts that fail, and disks that open and then fail. The
	// latter must not be slowed down by a VPN that took its time, nor start
	// afresh with every opening.
	attempts, drops := newPace(), newPace()
	if err := d.adopt(); err != nil {
		d.fail(err)
		return err // the supervisor tries again, with its own back-off
	}
	for {
		var err error
		pace := attempts
		wanted, mounted := d.wanted(), d.mounted()
		switch {
		case !wanted && !d.dark():
			err = d.close()
		case !wanted:
			d.rest()
			if ctx.Err() != nil {
				return d.relay.Close()
			}
		case wanted && !mounted:
			err = d.open(ctx)
			if err == nil {
				attempts.Reset()
			} else if kindOf(err) == status.ErrorRefused {
				// Only a person at home can undo that: dark until the next attempt.
				err = errors.Join(err, d.close())
			}
		case wanted:
			pace = drops
			if err = d.health(); err != nil {
				err = errors.Join(err, d.dropDisk(err))
			} else if time.Since(d.since()) > stableAfter {
				drops.Reset()
			}
		}
		wait := tick
		if err != nil && !errors.Is(err, context.Canceled) {
			d.fail(err)
			wait = pace.NextBackOff()
			if kindOf(err) == status.ErrorRefused {
				wait *= refusedFactor // each attempt starts the disk
			}
			if kindOf(err) == status.ErrorUnreachable && wait > retryAsk {
				wait = retryAsk - rand.N(retryAsk/3)
			}
			d.cfg.Log.Error("disk", "err", err, "kind", kindOf(err), "again_in", wait.Round(time.Second))
			if ctx.Err() != nil {
				return errors.Join(err, d.relay.Close())
			}
		}
		if d.pause(wait, wanted) {
			attempts.Reset()
		}
	}
}

func newPace() *backoff.ExponentialBackOff {
	b := &backoff.ExponentialBackOff{InitialInterval: retryFirst, RandomizationFactor: 0.3, Multiplier: 1.7, MaxInterval: retryMax}
	b.Reset()
	return b
}

// pause waits, until the disk is wanted no more or anew, or until somebody
// called "wake" or the VPN came up: then it returns true.
func (d *Disk) pause(wait time.Duration, wanted bool) (woken bool) {
	until, reachable := time.Now().Add(wait), d.cfg.VPNUp()
	for time.Now().Before(until) && d.wanted() == wanted {
		if !reachable && d.cfg.VPNUp() {
			return true
		}
		select {
		case <-d.poke:
			return true
		case <-time.After(min(tick, time.Until(until))):
		}
	}
	return false
}

// bounded does something that a dead disk may block for ever. After the bound
// it is given up, though not ended.
func (d *Disk) bounded(bound time.Duration, what string, do func() error) error {
	d.mu.Lock()
	d.bound = time.Now().Add(bound)
	d.mu.Unlock()
	defer func() {
		d.mu.Lock()
		d.bound = time.Time{}
		d.mu.Unlock()
	}()
	done := make(chan error, 1)
	go func() { done <- do() }()
	timer := time.NewTimer(bound)
	defer timer.Stop()
	select {
	case err := <-done:
		if err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		return nil
	case <-timer.C:
		return failed(status.ErrorHung, "%s: no answer within %v", what, bound)
	}
}

func kindOf(err error) string {
	var f *failure
	if errors.As(err, &f) {
		return f.kind
	}
	return status.ErrorHung
}
