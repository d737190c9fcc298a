// Package clock gives a machine without a clock the time, and judges what it is
// told.
//
// It starts from the last known time, asks several NTP sources that must agree,
// and goes on from the last known time when nobody answers within a minute. It
// guarantees that the clock never goes back below what is certain, and that a
// time that cannot be explained by the machine having been off for two days is
// reported until it is plausible or an admin accepts it ([Judge] is that rule).
// NTP is not authenticated: whoever owns the line can shift the time within
// these bounds, and no farther.
//
// The caller runs it before WireGuard (a peer refuses handshakes from a clock
// that went back) and waits for [Keeper.Ready].
package clock

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
)

const (
	// SaveInterval is how often the last known time is saved, and what is added
	// to it when nothing else is known.
	SaveInterval = 10 * time.Minute
	// FallbackAfter is how long Run waits for sources before Ready.
	FallbackAfter = time.Minute
	// ResyncInterval is how often a clock that is set is compared again.
	ResyncInterval = time.Hour
	// doubtInterval takes its place while the sources are not believed.
	doubtInterval = 10 * time.Minute
	// maxSlew is the largest correction that is made without a step.
	maxSlew = 400 * time.Millisecond
)

// Status is what the keeper tells the others.
type Status struct {
	Set    bool   // sources agreed since the start, and the clock was set to what they say
	Source string // who says so; "last known time" or "no known time" without sources; "" before Ready
	Jump   string // "" or what could not be believed; it outlives a reboot
}

// Config is what a Keeper needs.
type Config struct {
	Path    string   // the state file
	Servers []string // host or host:port; empty means DefaultServers
	System  System
	// Query asks one source; nil means Ask.
	Query func(ctx context.Context, source string) (Sample, error)
	Log   *slog.Logger
	// Changed is called after every change of the status, from Run's goroutine.
	Changed func(Status)
}

// Keeper keeps one machine's clock.
type Keeper struct {
	Config
	ready chan struct{}
	kick  chan struct{}

	mu     sync.Mutex // guards the fields below
	known  Knowledge
	at     time.Duration // uptime to which known belongs
	status Status
	hold   map[string]time.Duration // sources that asked for silence, until this uptime
	isDone bool                     // ready is closed
}

// New reads the last known time and, if the clock is behind it or implausibly
// far ahead, sets the clock to it. A state file that cannot be read is reported
// and otherwise as good as none. The only error is a clock that cannot be set.
func New(c Config) (*Keeper, error) {
	if len(c.Servers) == 0 {
		c.Servers = DefaultServers
	}
	if c.Query == nil {
		c.Query = func(ctx context.Context, source string) (Sample, error) { return Ask(ctx, source, c.System.Now) }
	}
	if c.Changed == nil {
		c.Changed = func(Status) {}
	}
	k := &Keeper{Config: c, ready: make(chan struct{}), kick: make(chan struct{}, 1), hold: map[string]time.Duration{}}
	s, err := readState(c.Path)
	if err != nil {
		c.Log.Error("the last known time is lost; starting without it", "err", err)
	}
	k.known = Knowledge{Time: s.Time, Gained: s.Gained, Unsynced: s.Unsynced}
	k.at = c.System.Uptime()
	k.status.Jump = s.Jump

	start := s.Clock
	if start.IsZero() {
		start = Earliest
	}
	// A machine with a battery-backed clock may well be right; it is only an
	// answer to "how long was it off", and only within the usual bounds.
	now := c.System.Now()
	if now.Before(start) || !s.Clock.IsZero() && now.After(start.Add(MaxGain)) {
		if err := c.System.Step(start.Sub(now)); err != nil {
			return nil, err
		}
		c.Log.Info("the clock starts from the last known time", "time", stamp(start))
	}
	return k, nil
}

// Ready is closed when the clock is as good as it gets at the start: sources
// agreed, or FallbackAfter went by.
func (k *Keeper) Ready() <-chan struct{} { return k.ready }

// Wake makes Run ask again at once: the network has just come up.
func (k *Keeper) Wake() {
	select {
	case k.kick <- struct{}{}:
	default:
	}
}

// Status returns the present status.
func (k *Keeper) Status() Status {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.status
}

// Accept is an admin's word that the sources are right: what they agree on next
// is believed, forwards or backwards, and a jump is over then.
func (k *Keeper) Accept() {
	k.mu.Lock()
	k.known = Knowledge{}
	k.mu.Unlock()
	k.Log.Info("an admin accepts the time that the sources agree on next")
	k.Wake()
}

// Run keeps the clock until ctx ends, saves the time a last time and returns.
func (k *Keeper) Run(ctx context.Context) error {
	retry := backoff.NewExponentialBackOff()
	retry.InitialInterval, retry.Multiplier, retry.MaxInterval = time.Second, 2, 15*time.Minute
	fallback := time.NewTimer(FallbackAfter)
	defer fallback.Stop()
	save := time.NewTicker(SaveInterval)
	defer save.Stop()
	next := time.NewTimer(0)
	defer next.Stop()
	for {
		select {
		case <-ctx.Done():
			return k.save()
		case <-fallback.C:
			k.fallBack()
		case <-save.C:
			if err := k.save(); err != nil {
				k.Log.Error("the last known time was not saved", "err", err)
			}
		case <-k.kick:
			retry.Reset()
			next.Reset(0)
		case <-next.C:
			if err := k.sync(ctx); err != nil {
				level := slog.LevelDebug // the line may not be up yet
				if isClosed(k.ready) {
					level = slog.LevelWarn
				}
				if ctx.Err() == nil {
					k.Log.Log(ctx, level, "the clock was not compared", "err", err)
				}
				next.Reset(retry.NextBackOff())
				continue
			}
			retry.Reset()
			interval := ResyncInterval
			if k.Status().Jump != "" {
				interval = doubtInterval
			}
			next.Reset(interval*9/10 + rand.N(interval/5))
		}
	}
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// sync asks the sources once and acts on what they agree on. An answer that is
// not believed is no error: asking again at once would not change it.
func (k *Keeper) sync(ctx context.Context) error {
	sources := k.askable()
	samples, failed := round(ctx, sources, len(k.Servers), k.Query)
	k.mu.Lock()
	for source, err := range failed {
		k.Log.Debug("time source", "source", source, "err", err)
		var hold *holdError
		if errors.As(err, &hold) {
			k.hold[source] = k.System.Uptime() + hold.wait
		}
	}
	k.mu.Unlock()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	offset, agreeing, err := Agree(samples, len(k.Servers))
	if err != nil {
		return fmt.Errorf("compare the clock with %d sources: %w", len(sources), err)
	}
	return k.apply(offset, agreeing)
}

// askable returns the sources that did not ask for silence.
func (k *Keeper) askable() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	var out []string
	for _, source := range k.Servers {
		if k.System.Uptime() >= k.hold[source] {
			out = append(out, source)
		}
	}
	return out
}

func (k *Keeper) apply(offset time.Duration, agreeing int) error {
	k.mu.Lock()
	k.lived()
	now := k.System.Now()
	v := Judge(k.known, now.Add(offset))
	if v.Set {
		shift := k.System.Step
		if offset.Abs() <= maxSlew {
			shift = k.System.Slew
		}
		if err := shift(offset); err != nil {
			k.mu.Unlock()
			return err
		}
		k.status.Set = true
		k.status.Source = fmt.Sprintf("%d of %d sources agree", agreeing, len(k.Servers))
	}
	k.known = v.Next
	switch {
	case v.Jump == "" && k.status.Jump != "":
		k.Log.Info("the time is plausible again")
		k.status.Jump = ""
	case v.Jump != "" && k.status.Jump == "": // the first words for one jump stay
		k.Log.Error("the time jumped; expiry is frozen until it is plausible or an admin accepts it", "jump", v.Jump)
		k.status.Jump = v.Jump
	}
	status := k.status
	k.mu.Unlock()
	if v.Set {
		k.Log.Info("the clock was compared", "offset", offset.Round(time.Microsecond), "agreeing", agreeing, "configured", len(k.Servers))
	}
	// A set clock is worth a write at once: the next start begins there.
	if err := k.save(); err != nil {
		k.Log.Error("the last known time was not saved", "err", err)
	}
	k.Changed(status)
	if v.Set {
		k.markReady()
	} else {
		k.fallBack() // they will not say anything else in this minute
	}
	return nil
}

// fallBack goes on without sources.
func (k *Keeper) fallBack() {
	k.mu.Lock()
	if k.isDone {
		k.mu.Unlock()
		return
	}
	k.lived()
	k.status.Source = "no known time"
	if !k.known.Time.IsZero() {
		k.known = k.known.Guess(SaveInterval)
		if behind := k.known.Time.Sub(k.System.Now()); behind > 0 {
			if err := k.System.Step(behind); err != nil {
				k.Log.Error("the clock could not be set to the last known time", "err", err)
			}
		}
		k.status.Source = "last known time"
	}
	status := k.status
	k.mu.Unlock()
	k.Log.Warn("no time that can be believed; going on without time sources", "source", status.Source)
	k.Changed(status)
	k.markReady()
}

func (k *Keeper) markReady() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.isDone {
		k.isDone = true
		close(k.ready)
	}
}

// lived brings the knowledge up to the present. The caller holds mu.
func (k *Keeper) lived() {
	up := k.System.Uptime()
	k.known = k.known.After(up - k.at)
	k.at = up
}

func (k *Keeper) save() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.lived()
	if k.known.Time.IsZero() {
		return nil // a time that nobody confirmed must not look like knowledge
	}
	return writeState(k.Path, saved{Time: k.known.Time, Gained: k.known.Gained, Unsynced: k.known.Unsynced, Clock: k.System.Now(), Jump: k.status.Jump})
}
