package torture

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"farkeep/image/torture/service"
	"farkeep/image/torture/witness"
	"farkeep/shared/retention"
	"farkeep/shared/settings"
)

// Bounds of what is expected.
const (
	// backWithin is how long the appliance may take to be there again.
	backWithin = 90 * time.Second
	// pushedWithin is how long a push may be retried after a misfortune.
	pushedWithin = 3 * time.Minute
	// orphans is what may lie outside of generations after a push went through
	// undisturbed, in bytes: records and counters, no content.
	orphans = 1 << 20
)

// victims are the processes that are killed, by how much each has to do with the
// disk.
var victims = []weighted[string]{
	{9, "keeper"}, {5, "receiver"}, {4, "disk"}, {3, service.Supervisor}, {1, "deadman"}, {1, "mail"}, {1, "network"},
}

// A fault is what happens to the disk besides kills.
type fault string

const (
	faultFull     fault = "disk full"
	faultReadOnly fault = "file system error, read-only"
)

// killBench is a service under torture.
type killBench struct {
	Options
	Figures
	svc  *service.Service
	home *home
	seen *witness.Witness
	push []string // the pusher's command line

	rules retention.Rules

	mu sync.Mutex // guards Figures and Out between the pusher and the killer
}

// KillPlan says how much.
type KillPlan struct {
	Kills  int           // 0: until For is over
	For    time.Duration // 0: until all kills are done
	Least  int           // with For: so many must have met their part, however long that takes
	Faults int           // how often the disk fails, in turns
}

// Kill kills the appliance's processes and returns the figures. The error says
// what did not hold.
func Kill(ctx context.Context, o Options, plan KillPlan) (_ *Figures, err error) {
	b := &killBench{Options: o}
	var policy settings.Appliance
	expiry(&policy)
	b.rules = policy.History.For(plainName)
	b.seen = &witness.Witness{MayGo: b.mayGo}
	b.svc, err = service.Start(ctx, service.Options{Dir: o.Dir, Bin: o.Bin, DiskSize: diskSize, Settings: expiry, Log: o.Log, InMemory: true})
	if err != nil {
		return &b.Figures, err
	}
	defer func() { err = errors.Join(err, b.svc.Close()) }()
	if b.home, err = newHome(ctx, filepath.Join(o.Dir, "home"), draw(o.Seed, 1)); err != nil {
		return &b.Figures, err
	}
	flags, err := b.svc.Site(filepath.Join(o.Dir, "site"), b.home.repositories()...)
	if err != nil {
		return &b.Figures, err
	}
	b.push = append([]string{"push", "--priority", "normal"}, flags...)
	if err := b.run(ctx, plan); err != nil {
		return &b.Figures, fmt.Errorf("seed %d: %w", o.Seed, err)
	}
	return &b.Figures, nil
}

// diskSize is small, so that expiry has something to do and e2fsck little.
const diskSize = 192 << 20

// expiry lets generations go within seconds. Nothing that the plain files do is
// suspect: they change at random.
func expiry(a *settings.Appliance) {
	a.History = settings.DefaultHistory()
	h := &a.History
	h.Within, h.Hourly, h.Daily, h.Weekly, h.Monthly, h.Yearly = settings.Duration(20*time.Second), 2, 2, 0, 0, 0
	h.FloorGenerations, h.FloorAge, h.ExpirePerDay = 3, settings.Duration(10*time.Second), 1000
	h.CommitInterval, h.ScrubEvery = 0, settings.Duration(time.Minute)
	h.VanishPercent, h.ChangePercent = 100, 100
}

// mayGo: only what the policy lets go may be gone.
func (b *killBench) mayGo(gone witness.ID, there []witness.ID) error {
	var items []retention.Item
	for _, id := range there {
		if id.Repository() != gone.Repository() {
			continue
		}
		at, err := time.Parse("20060102T150405Z", id.Name()[max(0, len(id.Name())-16):])
		if err != nil {
			return err
		}
		items = append(items, retention.Item{Name: id.Name(), Sequence: int64(len(items)), Committed: at})
	}
	for _, d := range retention.Plan(time.Now().Add(time.Second), b.rules, items) {
		if d.Name == gone.Name() && d.Keep {
			return fmt.Errorf("the policy keeps it: %s", d.Why)
		}
	}
	return nil
}

func (b *killBench) say(format string, args ...any) {
	b.mu.Lock()
	defer b.mu.Unlock()
	fmt.Fprintf(b.Out, format+"\n", args...)
}

func (b *killBench) count(what string, n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.Add(what, n)
}

func (b *killBench) took(what string, d time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.Took(what, d)
}

func (b *killBench) run(ctx context.Context, plan KillPlan) error {
	r := draw(b.Seed, 2)
	begin := time.Now()
	kills, faults := 0, 0
	for round := 0; ; round++ {
		if plan.For > 0 && time.Since(begin) > plan.For && b.Count("kills") >= plan.Least || plan.Kills > 0 && kills >= plan.Kills {
			break
		}
		if round%4 == 0 {
			if err := b.home.day(ctx); err != nil {
				return err
			}
		}
		n := 1 + r.IntN(5)
		if plan.Kills > 0 {
			n = min(n, plan.Kills-kills)
		}
		kills += n
		if err := b.round(ctx, r, n); err != nil {
			return fmt.Errorf("round %d: %w", round, err)
		}
		due := plan.Faults > 0 && (plan.Kills > 0 && faults < plan.Faults*kills/plan.Kills || plan.Kills == 0 && faults < plan.Faults)
		if due {
			f := []fault{faultFull, faultReadOnly}[faults%2]
			faults++
			if err := b.fault(ctx, f); err != nil {
				return fmt.Errorf("round %d: %s: %w", round, f, err)
			}
		}
		if round%10 == 0 {
			b.say("%s: %d kills, %d faults, %d generations made", time.Since(begin).Round(time.Second), kills, faults, b.Count("pushes that went through"))
		}
	}
	for ; faults < plan.Faults; faults++ {
		f := []fault{faultFull, faultReadOnly}[faults%2]
		if err := b.fault(ctx, f); err != nil {
			return fmt.Errorf("%s: %w", f, err)
		}
	}
	if err := b.svc.Stop(); err != nil {
		return fmt.Errorf("stop in order: %w", err)
	}
	if err := b.svc.CheckFileSystem(ctx); err != nil {
		return err
	}
	f := b.seen.Figures()
	b.Set("generations that stayed", f.Generations)
	b.Set("generations that expired, each as the policy says", f.Gone)
	b.Set("MiB read to compare", int(f.Bytes>>20))
	b.Set("committed bytes lost", 0)
	b.Took("the whole run", time.Since(begin))
	return nil
}

// round pushes and uploads all the time while n processes are killed, and then
// looks at everything in peace.
func (b *killBench) round(ctx context.Context, r *rand.Rand, n int) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	done := make(chan error, 1)
	go func() { done <- b.kills(ctx, r, n) }()
	for {
		if err := b.pushThrough(ctx); err != nil {
			return errors.Join(err, b.settled(cancel, done))
		}
		if err := b.stockThrough(ctx); err != nil {
			return errors.Join(err, b.settled(cancel, done))
		}
		select {
		case err := <-done:
			if err != nil {
				return err
			}
			return b.quiet(ctx)
		default:
		}
		if err := b.home.plain(); err != nil {
			return err
		}
	}
}

// settled waits for the killer, whose error explains more than the pusher's.
func (b *killBench) settled(cancel context.CancelCauseFunc, done <-chan error) error {
	cancel(errors.New("a push did not go through"))
	return <-done
}

func (b *killBench) kills(ctx context.Context, r *rand.Rand, n int) error {
	for range n {
		victim, wait := pick(r, victims), within(r, 400*time.Millisecond)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
		there, err := b.svc.Kill(victim)
		if err != nil {
			return fmt.Errorf("kill %s: %w", victim, err)
		}
		if !there {
			continue
		}
		b.count("killed: "+victim, 1)
		b.count("kills", 1)
		if err := b.back(ctx, "back after a kill"); err != nil {
			return fmt.Errorf("after %s was killed: %w", victim, err)
		}
	}
	return nil
}

// back waits until the appliance is there again and compares its history.
func (b *killBench) back(ctx context.Context, what string) error {
	start := time.Now()
	wait, cancel := context.WithTimeoutCause(ctx, backWithin, fmt.Errorf("%v are over", backWithin))
	defer cancel()
	if err := b.svc.AwaitOpen(wait); err != nil {
		return err
	}
	b.took(what, time.Since(start))
	return b.seen.Look(ctx, b.svc.Generations())
}

// pushThrough pushes until it succeeds, and compares what arrived with home.
func (b *killBench) pushThrough(ctx context.Context) error {
	limit, cancel := context.WithTimeoutCause(ctx, pushedWithin, fmt.Errorf("%v are over", pushedWithin))
	defer cancel()
	failures, err := keepPushing(limit, b.pushOnce)
	b.count("pushes that were cut and tried again", failures)
	if err != nil {
		return err
	}
	b.count("pushes that went through", 1)
	for _, name := range []string{borgName, plainName} {
		if err := b.home.arrived(ctx, b.svc.Generations(), name); err != nil {
			return err
		}
	}
	return nil
}

func (b *killBench) pushOnce(ctx context.Context) error {
	cmd := exec.CommandContext(ctx, filepath.Join(b.Bin, "farkeep-pusher"), b.push...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 10 * time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("farkeep-pusher push: %w\n%s", err, bytes.TrimSpace(out))
	}
	return nil
}

// quiet looks at a disk on which nothing happens: everything is what it was, and
// nothing has grown besides.
func (b *killBench) quiet(ctx context.Context) error {
	if err := b.home.plain(); err != nil {
		return err
	}
	if err := b.pushThrough(ctx); err != nil {
		return err
	}
	if err := b.seen.Look(ctx, b.svc.Generations()); err != nil {
		return err
	}
	outside, err := witness.Outside(b.svc.Disk())
	if err != nil {
		return err
	}
	var sum int64
	for _, n := range outside {
		sum += n
	}
	b.mu.Lock()
	b.Set("most bytes outside of generations", max(b.Count("most bytes outside of generations"), int(sum)))
	b.mu.Unlock()
	if sum > orphans {
		return fmt.Errorf("%d bytes lie outside of generations: %v", sum, outside)
	}
	return nil
}

// fault makes the disk fail in the middle of a push, undoes the cause, and
// expects the rest to happen by itself.
func (b *killBench) fault(ctx context.Context, f fault) error {
	b.say("fault: %s", f)
	if err := b.home.plain(); err != nil {
		return err
	}
	pushed := make(chan error, 1)
	go func() { pushed <- b.pushOnce(ctx) }()
	undo, err := b.cause(ctx, f)
	if err != nil {
		return errors.Join(err, <-pushed)
	}
	// Whether this push was quicker, was refused or was cut is all the same.
	first := <-pushed
	if first == nil && f != faultReadOnly {
		if err := b.home.plain(); err != nil {
			return err
		}
		first = b.pushOnce(ctx)
	}
	if f == faultFull && first == nil {
		return errors.New("a push was taken by a full disk")
	}
	if err := undo(); err != nil {
		return err
	}
	b.count("fault: "+string(f), 1)
	if err := b.back(ctx, "back after a fault of the disk"); err != nil {
		return err
	}
	return b.quiet(ctx)
}
