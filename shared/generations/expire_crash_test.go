package generations_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"farkeep/shared/generations"

	"golang.org/x/sys/unix"
)

// pushAndExpire pushes day after day and expires one of the older generations each
// time that there are more than four. It says what it is about to do, and what is
// done: "+NAME" committed, "-NAME" goes, "!NAME" is gone.
func pushAndExpire(dir string) error {
	ctx := context.Background()
	s, err := generations.Open(dir, generations.Options{Reserve: 1})
	if err != nil {
		return err
	}
	s.CountEvery(5)
	// Most of the time goes into the emptying, where the cuts shall be.
	s.RestWith(time.Nanosecond, func(context.Context, time.Duration) error {
		time.Sleep(time.Millisecond)
		return nil
	})
	for {
		if _, err := s.Sweep(ctx); err != nil {
			return err
		}
		list, err := s.List(ctx, "photos")
		if err != nil {
			return err
		}
		day := int64(1)
		if len(list) > 0 {
			if day, err = dayOf(dir, list[len(list)-1].Name); err != nil {
				return err
			}
			day++
		}
		if err := pushDay(ctx, s, day); err != nil { // says the name
			return err
		}
		if len(list) < 4 {
			continue
		}
		g := list[int(day*day)%(len(list)-1)]
		fmt.Println("-" + g.Name)
		if err := s.Remove(ctx, "photos", g.Name); err != nil {
			return err
		}
		fmt.Println("!" + g.Name)
	}
}

// checkExpiry checks from outside what a cut of pushAndExpire left: what is there
// is what was pushed, what was committed and not to go is there, what is gone stays
// so. Then it sweeps, checks the charges, and pushes on.
func checkExpiry(t *testing.T, dir string, said []string) (expired int) {
	t.Helper()
	must := map[string]bool{}
	for _, line := range said {
		switch line[0] {
		case '-':
			delete(must, line[1:]) // may be there, or not
		case '!':
			expired++
			if _, err := os.Lstat(filepath.Join(dir, "generations/photos", line[1:])); err == nil {
				t.Errorf("%s was expired, and is back", line[1:])
			}
		default:
			must[line] = true
		}
	}
	check := func() (last int64, names []string) {
		t.Helper()
		entries, err := os.ReadDir(filepath.Join(dir, "generations/photos"))
		if err != nil && len(must) > 0 {
			t.Fatal(err)
		}
		for _, e := range entries {
			if strings.HasPrefix(e.Name(), ".") {
				continue
			}
			day, err := dayOf(dir, e.Name())
			if err != nil {
				t.Error(err)
				continue
			}
			compare(t, dir, "photos", e.Name(), dayTree(day))
			names, last = append(names, e.Name()), max(last, day)
		}
		for name := range must {
			if !slices.Contains(names, name) {
				t.Errorf("%s was committed, and is gone", name)
			}
		}
		return last, names
	}
	check()
	s, err := generations.Open(dir, generations.Options{Reserve: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := s.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left := going(t, dir); len(left) > 0 {
		t.Errorf("left in going/: %v", left)
	}
	if _, err := os.Lstat(filepath.Join(dir, "incoming/photos/generation")); err == nil {
		t.Error("a commit that was cut has left its links")
	}
	last, before := check()
	checkCharges(t, dir, s, "photos")
	name, _ := push(t, s, "photos", dayTree(last+1))
	compare(t, dir, "photos", name, dayTree(last+1))
	checkCharges(t, dir, s, "photos")
	if len(before) > 0 {
		if n, _, _ := generations.ParseName(name); name <= slices.Max(before) {
			t.Errorf("number %d comes after %s", n, slices.Max(before))
		}
	}
	return expired
}

// Killed at any instant while it expires, a process leaves every other generation
// as it was, and the sweep finishes its work to the byte.
func TestExpiryKilledAtAnyInstant(t *testing.T) {
	const kills = 15
	dir := t.TempDir()
	seed := uint64(time.Now().UnixNano())
	r := rand.New(rand.NewPCG(seed, 3))
	t.Logf("seed %d", seed)
	var said []string
	left := 0
	for i := range kills {
		c := startCrasher(t, dir, crashExpire+"=1")
		if i%3 > 0 {
			said = append(said, c.await(t, "-")...)
		}
		time.Sleep(time.Duration(r.Int64N(int64(150 * time.Millisecond)))) // the instant is what is random here
		said = append(said, c.kill(t)...)
		if entries, err := os.ReadDir(filepath.Join(dir, ".farkeep/going")); err == nil && len(entries) > 0 {
			left++
		}
		if r.IntN(3) == 0 { // else the next process finds what this one left
			checkExpiry(t, dir, said)
		}
	}
	n := checkExpiry(t, dir, said)
	t.Logf("%d kills, %d of them within an expiry, %d generations expired in full", kills, left, n)
	if left == 0 {
		t.Error("no kill hit an expiry: the test proves little")
	}
}

// The same with the power.
func TestExpiryPowerCut(t *testing.T) {
	within, n := 0, 0
	cutPower(t, 6, "-", []string{crashExpire + "=1"}, func(image string, said []string) {
		disk := t.TempDir()
		tool(t, "mount", "mount", "-o", "loop", image, disk)
		mounted := true
		defer func() {
			if mounted {
				unix.Unmount(disk, unix.MNT_DETACH)
			}
		}()
		if entries, err := os.ReadDir(filepath.Join(disk, ".farkeep/going")); err == nil && len(entries) > 0 {
			within++
		}
		n = checkExpiry(t, disk, said)
		unmount(t, disk, image)
		mounted = false
		tool(t, "e2fsprogs", "e2fsck", "-fn", image)
	})
	t.Logf("%d cuts were within an expiry; %d generations expired in full", within, n)
}

// fuse is a context that ends at the nth time that somebody looks at it: a cut at
// a place that a seed brings back.
type fuse struct {
	context.Context
	left int
	done chan struct{}
}

func newFuse(n int) *fuse { return &fuse{context.Background(), n, make(chan struct{})} }

func (f *fuse) Err() error {
	if f.left--; f.left == 0 {
		close(f.done)
	}
	if f.left <= 0 {
		return context.Canceled
	}
	return nil
}

func (f *fuse) Done() <-chan struct{} { return f.done }

// world is a store under random work, and what it should hold.
type world struct {
	t    *testing.T
	r    *rand.Rand
	dir  string
	s    *generations.Store
	held map[string]map[string]tree // by repository and generation
	now  map[string]tree            // at home
	day  int
}

func (w *world) open() {
	w.t.Helper()
	if w.s != nil {
		w.s.Close()
	}
	s, err := generations.Open(w.dir, generations.Options{Reserve: 1, Judge: suspecting})
	if err != nil {
		w.t.Fatal(err)
	}
	s.CountEvery(1 + w.r.IntN(4))
	w.s = s
}

// change makes a random next day of a repository.
func (w *world) change(repository string) tree {
	w.day++
	next := tree{}
	if now, ok := w.now[repository]; ok {
		next = now.clone()
	}
	next.add("day", fmt.Sprint(w.day))
	paths := slices.Sorted(maps.Keys(next))
	for range w.r.IntN(4) {
		path := fmt.Sprintf("%d/%d", w.r.IntN(4), w.r.IntN(12))
		switch w.r.IntN(5) {
		case 0:
			next.add(path, "") // many are the same
		case 1:
			if other := next[paths[w.r.IntN(len(paths))]]; !other.folder {
				next.add(path, other.content)
			}
		case 2:
			if f, ok := next[path]; ok && !f.folder {
				f.mode ^= 0o100
				next[path] = f
			}
		case 3:
			delete(next, path)
		default:
			next.add(path, noise(uint64(w.day), 1+w.r.IntN(2000)))
		}
	}
	delete(next, "odd")
	if w.r.IntN(6) == 0 {
		next.add("odd", fmt.Sprint(w.day))
	}
	return next
}

func (w *world) push(repository string) {
	w.t.Helper()
	next := w.change(repository)
	answer, tx, err := begin(w.t, w.s, repository, next)
	if err != nil {
		w.t.Fatal(err)
	}
	defer tx.Close()
	if w.r.IntN(4) == 0 {
		if _, err := upload(w.t, tx, next, answer, w.r.IntN(3000)); err != nil {
			return // cut
		}
	} else if _, err := upload(w.t, tx, next, answer, -1); err != nil {
		w.t.Fatal(err)
	}
	var ctx context.Context = w.t.Context()
	if w.r.IntN(4) == 0 {
		ctx = newFuse(1 + w.r.IntN(30))
	}
	name, err := tx.Commit(ctx)
	if errors.Is(err, context.Canceled) {
		return
	}
	if err != nil {
		w.t.Fatal(err)
	}
	if w.held[repository] == nil {
		w.held[repository] = map[string]tree{}
	}
	w.held[repository][name], w.now[repository] = next, next
}

// remove expires any generation, cut short now and then.
func (w *world) remove(repository string) {
	w.t.Helper()
	names := slices.Sorted(maps.Keys(w.held[repository]))
	if len(names) == 0 {
		return
	}
	name := names[w.r.IntN(len(names))]
	var ctx context.Context = w.t.Context()
	if w.r.IntN(2) == 0 {
		ctx = newFuse(1 + w.r.IntN(80))
	}
	err := w.s.Remove(ctx, repository, name)
	_, gone := os.Lstat(filepath.Join(w.dir, "generations", repository, name))
	switch {
	case err == nil:
		delete(w.held[repository], name)
	case errors.Is(err, generations.ErrKept) && gone == nil:
	case errors.Is(err, context.Canceled):
		if gone != nil {
			delete(w.held[repository], name)
		}
	default:
		w.t.Fatal(err)
	}
}

func (w *world) check(bytes bool) {
	w.t.Helper()
	for repository, generations := range w.held {
		list, err := w.s.List(w.t.Context(), repository)
		if err != nil {
			w.t.Fatal(err)
		}
		if got, want := names(list), strings.Join(slices.Sorted(maps.Keys(generations)), " "); got != want {
			w.t.Fatalf("%s has %s; want %s", repository, got, want)
		}
		if bytes {
			for name, want := range generations {
				compare(w.t, w.dir, repository, name, want)
			}
		}
		if len(going(w.t, w.dir)) == 0 {
			checkCharges(w.t, w.dir, w.s, repository)
		}
	}
}

// Whatever is pushed, expired, cut short and swept, in whatever order: what is
// there is bit for bit what was pushed, and every byte is charged once.
func TestRandomHistories(t *testing.T) {
	for range 3 {
		seed := rand.Uint64()
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			w := &world{t: t, r: rand.New(rand.NewPCG(seed, 4)), dir: tmpfs(t, "64m"), held: map[string]map[string]tree{}, now: map[string]tree{}}
			w.open()
			defer func() { w.s.Close() }()
			for range 150 {
				repository := []string{"photos", "docs"}[w.r.IntN(2)]
				switch w.r.IntN(12) {
				case 0:
					w.open() // as after a crash: nothing is remembered
				case 1:
					var ctx context.Context = t.Context()
					if w.r.IntN(2) == 0 {
						ctx = newFuse(1 + w.r.IntN(100))
					}
					if _, err := w.s.Sweep(ctx); err != nil && !errors.Is(err, context.Canceled) {
						t.Fatal(err)
					}
				case 2:
					list, err := w.s.List(t.Context(), repository)
					if err != nil {
						t.Fatal(err)
					}
					for _, g := range list {
						if g.Standing == generations.Suspect {
							d := generations.Decision{Standing: []generations.Standing{generations.Accepted, generations.Rejected}[w.r.IntN(2)], By: "admin"}
							if err := w.s.Decide(t.Context(), repository, g.Name, d); err != nil {
								t.Fatal(err)
							}
						}
					}
				case 3, 4, 5, 6:
					w.remove(repository)
				default:
					w.push(repository)
				}
				w.check(false)
				if t.Failed() {
					return
				}
			}
			if _, err := w.s.Sweep(t.Context()); err != nil {
				t.Fatal(err)
			}
			if left := going(t, w.dir); len(left) > 0 {
				t.Errorf("left in going/: %v", left)
			}
			w.check(true)
		})
	}
}
