package torture

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"farkeep/image/emulate"
	"farkeep/image/luksfile"
	"farkeep/image/stage"
	"farkeep/image/torture/faulty"
	"farkeep/image/torture/service"
	"farkeep/image/torture/witness"

	"golang.org/x/sys/unix"
)

// CutPlan says how much.
type CutPlan struct {
	Machine emulate.Machine
	Cuts    int
	Until   time.Time // no cut begins after that; zero: no limit
	Faults  int       // how often the disk fails or vanishes under the running machine, in turns
	Image   string    // a built image; "" builds one
}

// bootWithin is how long a machine may take from power on to an open disk and a
// push: seconds on an idle host, minutes on one that does ten other things.
const bootWithin = 10 * time.Minute

// faults of a disk under a running machine.
const (
	faultVanish     fault = "disk vanishes while mounted"
	faultReadError  fault = "disk cannot read (EIO)"
	faultWriteError fault = "disk cannot write (EIO)"
)

// cutBench is an emulated appliance under torture.
type cutBench struct {
	Options
	Figures
	plan  CutPlan
	stage *stage.Stage
	pi    *stage.Appliance
	disk  *faulty.Disk
	home  *home
	seen  witness.Witness
	// pushed is what push after push has brought, by repository: the last must be
	// there after any cut.
	pushed map[string]map[string][sha256.Size]byte
}

// Cut cuts the power of an emulated appliance at random instants and returns the
// figures. The error says what did not hold.
func Cut(ctx context.Context, o Options, plan CutPlan) (_ *Figures, err error) {
	b := &cutBench{Options: o, plan: plan, pushed: map[string]map[string][sha256.Size]byte{}}
	var mu sync.Mutex
	b.stage, err = stage.New(ctx, stage.Options{
		Dir: o.Dir, Bin: o.Bin, Image: plan.Image, Out: &together{mu: &mu, w: o.Log}, Console: &together{mu: &mu, w: o.Log}, Log: o.Stage, HeartbeatAge: 24 * time.Hour,
	})
	if err != nil {
		return &b.Figures, err
	}
	defer func() {
		if b.disk != nil {
			err = errors.Join(err, b.stage.Close(), b.disk.Close())
			return
		}
		err = errors.Join(err, b.stage.Close())
	}()
	if err := b.prepare(ctx); err != nil {
		return &b.Figures, err
	}
	if err := b.run(ctx); err != nil {
		return &b.Figures, fmt.Errorf("seed %d: %w", o.Seed, err)
	}
	return &b.Figures, nil
}

// together lets several sources write into one writer.
type together struct {
	mu *sync.Mutex
	w  io.Writer
}

func (t *together) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.w.Write(p)
}

func (b *cutBench) prepare(ctx context.Context) (err error) {
	if b.home, err = newHome(ctx, filepath.Join(b.Dir, "home"), draw(b.Seed, 3)); err != nil {
		return err
	}
	for _, r := range b.home.repositories() {
		if _, err := b.stage.Run(ctx, "farkeep-image", "site", "add", "repository", r[0], r[1], "--dir", b.stage.Site); err != nil {
			return err
		}
	}
	if err := b.stage.BuildImage(ctx); err != nil {
		return err
	}
	line := 5
	if b.plan.Machine == emulate.RaspberryPi3 {
		line = 17
	}
	b.pi, err = b.stage.Add(ctx, stage.Cast{Name: "barn", Machine: b.plan.Machine, DiskSize: 160 << 20, Relay: emulate.Relay{Line: line}, Window: "24h", Settings: manyKeys})
	if err != nil {
		return err
	}
	b.pi.DiskServer = filepath.Join(b.Dir, "disk.sock")
	if b.disk, err = faulty.Open(b.pi.Disk, b.pi.DiskServer); err != nil {
		return err
	}
	return b.stage.OpenHome(ctx)
}

// manyKeys lets the key server give a key for every cut: it would stop at 48 a day.
func manyKeys(site string) string {
	return strings.Replace(site, "keys_per_day = 48\n", "keys_per_day = 1440\n", 1)
}

func (b *cutBench) say(format string, args ...any) { fmt.Fprintf(b.Out, format+"\n", args...) }

func (b *cutBench) run(ctx context.Context) error {
	r := draw(b.Seed, 4)
	begin := time.Now()
	cuts, faults := 0, 0
	for ; cuts < b.plan.Cuts && (b.plan.Until.IsZero() || time.Now().Before(b.plan.Until)); cuts++ {
		if err := b.boot(ctx); err != nil {
			return fmt.Errorf("cut %d: %w", cuts+1, err)
		}
		if faults < b.plan.Faults {
			f := []fault{faultVanish, faultWriteError, faultReadError}[faults%3]
			faults++
			if err := b.fault(ctx, r, f); err != nil {
				return fmt.Errorf("before cut %d: %s: %w", cuts+1, f, err)
			}
		}
		when, err := b.cut(ctx, r)
		if err != nil {
			return fmt.Errorf("cut %d: %w", cuts+1, err)
		}
		lost, err := b.look(ctx, r)
		if err != nil {
			return fmt.Errorf("after cut %d (%s): %w", cuts+1, when, err)
		}
		b.Add("power cuts", 1)
		b.Add("power cuts "+when, 1)
		b.Add("writes that the disk's cache lost", lost)
		b.say("%s: cut %d %s; %d writes lost in the disk's cache", time.Since(begin).Round(time.Second), cuts+1, when, lost)
	}
	// In the end it comes up once more, takes what was interrupted, and closes.
	if err := b.boot(ctx); err != nil {
		return fmt.Errorf("after the last cut: %w", err)
	}
	if _, err := b.pi.SSH(ctx, "home/pusher/ssh_key", "sleep"); err != nil {
		return err
	}
	dark, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	if err := b.pi.Pi.WaitDisk(dark, false); err != nil {
		return err
	}
	if err := b.pi.CutPower(); err != nil {
		return err
	}
	if _, err := b.look(ctx, r); err != nil {
		return fmt.Errorf("after it was closed in order: %w", err)
	}
	f := b.seen.Figures()
	b.Set("flushes that reached the disk", b.disk.Figures().Flushes)
	b.Set("requests that the disk refused", b.disk.Figures().Refused)
	b.Set("generations that stayed", f.Generations)
	b.Set("MiB read to compare", int(f.Bytes>>20))
	b.Set("committed bytes lost", 0)
	b.Took("the whole run", time.Since(begin))
	return nil
}

// boot switches it on and waits until what was interrupted is there.
func (b *cutBench) boot(ctx context.Context) error {
	start := time.Now()
	if err := b.pi.Boot(ctx); err != nil {
		return err
	}
	wait, cancel := context.WithTimeoutCause(ctx, bootWithin, fmt.Errorf("%v are over", bootWithin))
	defer cancel()
	if _, err := b.pi.Mounted(wait); err != nil {
		return err
	}
	b.Took("power on to open disk", time.Since(start))
	start = time.Now()
	failures, err := keepPushing(wait, b.push)
	if err != nil {
		return err
	}
	b.Took("interrupted push, brought to its end", time.Since(start))
	b.Add("pushes that were tried again", failures)
	b.Add("pushes that went through", 1)
	return b.note()
}

func (b *cutBench) push(ctx context.Context) error {
	_, err := b.stage.Push(ctx)
	return err
}

// note remembers what a push that went through has brought.
func (b *cutBench) note() error {
	for _, name := range []string{borgName, plainName} {
		sums, err := b.home.sums(name)
		if err != nil {
			return err
		}
		b.pushed[name] = sums
	}
	return nil
}

// cut cuts the power at a random instant: in a push, after one, or while nothing
// happens, soon after which it is said when.
func (b *cutBench) cut(ctx context.Context, r *rand.Rand) (when string, err error) {
	when = pick(r, []weighted[string]{{14, "in a push"}, {3, "right after a push"}, {3, "while it opened its disk"}})
	longest := map[emulate.Machine]time.Duration{emulate.Generic: 2500 * time.Millisecond, emulate.RaspberryPi3: 15 * time.Second}[b.plan.Machine]
	instant := within(r, longest)
	if when == "while it opened its disk" {
		// The machine is told to close its disk and is woken again.
		if _, err := b.pi.SSH(ctx, "home/pusher/ssh_key", "sleep"); err != nil {
			return when, err
		}
		if _, err := b.pi.SSH(ctx, "home/pusher/ssh_key", "wake"); err != nil {
			return when, err
		}
		time.Sleep(2 * instant)
		return when, b.off()
	}
	if err := b.change(ctx, r); err != nil {
		return when, err
	}
	before, err := b.stage.Sent(b.pi.Name)
	if err != nil {
		return when, err
	}
	pushing, stop := context.WithCancel(ctx)
	defer stop()
	done := make(chan error, 1)
	go func() { done <- b.push(pushing) }()
	switch when {
	case "right after a push":
		if err := <-done; err == nil {
			if err := b.note(); err != nil {
				return when, err
			}
		}
		done <- nil
		time.Sleep(instant / 50) // milliseconds: before the kernel's own commit of the journal
	default:
		// The clock starts when the push does: once it has sent its offer.
		for limit := time.Now().Add(30 * time.Second); time.Now().Before(limit); time.Sleep(5 * time.Millisecond) {
			now, err := b.stage.Sent(b.pi.Name)
			if err != nil {
				return when, err
			}
			if now-before > 6_000 {
				break
			}
		}
		time.Sleep(instant)
	}
	err = b.off()
	stop()
	if pushed := <-done; pushed == nil && when == "in a push" {
		when = "when a push had just ended"
		err = errors.Join(err, b.note())
	}
	return when, err
}

// change makes something to push.
func (b *cutBench) change(ctx context.Context, r *rand.Rand) error {
	if r.IntN(2) == 0 {
		if err := b.home.day(ctx); err != nil {
			return err
		}
	}
	return b.home.plain()
}

// off cuts the power of the machine and of its disk.
func (b *cutBench) off() error {
	err := b.pi.CutPower()
	b.disk.Unused()
	return err
}

// look mends the disk as the appliance does, and looks at it from outside.
func (b *cutBench) look(ctx context.Context, r *rand.Rand) (lost int, err error) {
	if lost, err = b.disk.PowerCut(r); err != nil {
		return lost, err
	}
	plain, at := filepath.Join(b.Dir, "plain"), filepath.Join(b.Dir, "look")
	defer os.Remove(plain)
	key, err := os.ReadFile(filepath.Join(b.stage.KeyServerSecrets(), "keys", b.pi.LUKS+".key"))
	if err != nil {
		return lost, err
	}
	if err := luksfile.Decrypt(ctx, b.pi.Disk, key, plain); err != nil {
		return lost, err
	}
	// -p is what the appliance does after a power cut; its code 1 says that it
	// mended something, which a replayed journal does not count as.
	if out, err := service.Tool(ctx, "e2fsprogs", "e2fsck", "-p", plain); err != nil {
		return lost, fmt.Errorf("the journal left something to mend: %w", err)
	} else if strings.Contains(out, "recovering journal") {
		b.Add("journals replayed", 1)
	}
	if _, err := service.Tool(ctx, "e2fsprogs", "e2fsck", "-f", "-n", plain); err != nil {
		return lost, err
	}
	if err := os.MkdirAll(at, 0o700); err != nil {
		return lost, err
	}
	if _, err := service.Tool(ctx, "mount", "mount", "-o", "loop,ro", plain, at); err != nil {
		return lost, err
	}
	defer func() { err = errors.Join(err, unix.Unmount(at, 0)) }()
	generations := filepath.Join(at, "generations")
	if err := b.seen.Look(ctx, generations); err != nil {
		return lost, err
	}
	for name, want := range b.pushed {
		if err := b.holds(ctx, generations, name, want); err != nil {
			return lost, err
		}
	}
	return lost, nil
}

// holds says whether one of the generations of a repository is what was pushed
// last: the newest, or the one before if the push that was cut had committed.
func (b *cutBench) holds(ctx context.Context, generations, name string, want map[string][sha256.Size]byte) error {
	ids, err := witness.List(generations)
	if err != nil {
		return err
	}
	var why error
	for i := len(ids) - 1; i >= 0; i-- {
		if ids[i].Repository() != name {
			continue
		}
		g, err := witness.Read(ctx, filepath.Join(generations, string(ids[i]), "files"))
		if err != nil {
			return err
		}
		if err := same(name, want, g); err == nil {
			return nil
		} else if why == nil {
			why = err
		}
	}
	return fmt.Errorf("what was committed last of %s is not on the disk: %w", name, errors.Join(why, errors.New("no generation holds it")))
}

// fault makes the disk of the running machine fail, takes the cause away, and
// expects the machine to come back by itself.
func (b *cutBench) fault(ctx context.Context, r *rand.Rand, f fault) error {
	if err := b.home.plain(); err != nil {
		return err
	}
	pushed := make(chan error, 1)
	pushing, stop := context.WithTimeout(ctx, 20*time.Second)
	defer stop()
	go func() { pushed <- b.push(pushing) }()
	time.Sleep(within(r, 1500*time.Millisecond))
	switch f {
	case faultVanish:
		if err := b.pi.Pi.UnplugDisk(ctx); err != nil {
			return err
		}
	case faultWriteError:
		b.disk.Fail(faulty.Fault{Writes: true, From: luksfile.DataOffset})
	case faultReadError:
		b.disk.Fail(faulty.Fault{Reads: true, From: luksfile.DataOffset})
	}
	err := <-pushed
	b.say("%s: the push in the meantime ended with: %.200v", f, err)
	b.pi.Pi.PlugDisk()
	b.disk.Fail(faulty.Fault{})
	if err == nil {
		if err := b.note(); err != nil {
			return err
		}
	}
	if err := b.home.plain(); err != nil {
		return err
	}
	wait, cancel := context.WithTimeoutCause(ctx, bootWithin, fmt.Errorf("%v are over", bootWithin))
	defer cancel()
	start := time.Now()
	if _, err := keepPushing(wait, b.push); err != nil {
		return err
	}
	b.Add("fault: "+string(f), 1)
	b.Took("from the end of a fault to the next push that went through", time.Since(start))
	return b.note()
}
