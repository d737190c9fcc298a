package scrub_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"farkeep/appliance/scrub"
	"farkeep/shared/generations"
	"farkeep/shared/generations/generationstest"

	"golang.org/x/sys/unix"
)

const every = 30 * 24 * time.Hour

// bench is a store, a clock that only the scrub's waiting moves, and an account
// of what was read.
type bench struct {
	testing.TB
	dir   string
	store *generations.Store
	cfg   scrub.Config

	mu   sync.Mutex // guards the fields below
	now  time.Time
	read map[uint64]int64 // bytes by inode
	all  int64
	fail func(f *os.File, offset int64) error
	// at is called with the bytes that were read so far.
	at   func(all int64)
	last scrub.Progress
}

func newBench(tb testing.TB) *bench {
	tb.Helper()
	b := &bench{TB: tb, dir: tb.TempDir(), now: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), read: map[uint64]int64{}}
	b.open()
	return b
}

func (b *bench) clock() time.Time {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.now
}

func (b *bench) pass(d time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.now = b.now.Add(d)
}

// open opens the store, again after a restart.
func (b *bench) open() {
	b.Helper()
	if b.store != nil {
		b.store.Close()
	}
	s, err := generations.Open(b.dir, generations.Options{Reserve: 1, Now: b.clock})
	if err != nil {
		b.Fatal(err)
	}
	b.store = s
	b.cfg = scrub.Config{
		Store: s, Every: every, Now: b.clock,
		Sleep: func(ctx context.Context, d time.Duration) error {
			b.pass(d)
			return ctx.Err()
		},
		Reader: func(f *os.File) io.Reader { return &watched{b: b, f: f} },
		Report: func(p scrub.Progress) {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.last = p
		},
	}
	b.Cleanup(func() { s.Close() })
}

// watched counts what is read of a file, and fails where the disk does.
type watched struct {
	b  *bench
	f  *os.File
	at int64
}

func (w *watched) Read(p []byte) (int, error) {
	w.b.mu.Lock()
	fail, at := w.b.fail, w.b.at
	w.b.mu.Unlock()
	if fail != nil {
		if err := fail(w.f, w.at); err != nil {
			return 0, &os.PathError{Op: "read", Path: w.f.Name(), Err: err}
		}
	}
	n, err := w.f.Read(p)
	w.at += int64(n)
	if strings.Contains(w.f.Name(), "/"+generations.FilesFolder+"/") || w.b.files(w.f) {
		var st unix.Stat_t
		unix.Fstat(int(w.f.Fd()), &st)
		w.b.mu.Lock()
		w.b.read[st.Ino] += int64(n)
		w.b.all += int64(n)
		all := w.b.all
		w.b.mu.Unlock()
		if at != nil {
			at(all)
		}
	}
	return n, err
}

func (b *bench) files(f *os.File) bool { return filepath.Base(filepath.Dir(f.Name())) == "files" }

// round runs the scrub until a whole round ended.
func (b *bench) round() {
	b.Helper()
	if err := b.until(func(p scrub.Progress) bool { return !p.Running && !p.LastFull.IsZero() }); !errors.Is(err, context.Canceled) {
		b.Fatal(err)
	}
}

// until runs the scrub until a report says so.
func (b *bench) until(enough func(scrub.Progress) bool) error {
	ctx, cancel := context.WithCancel(b.Context())
	defer cancel()
	report := b.cfg.Report
	defer func() { b.cfg.Report = report }()
	b.cfg.Report = func(p scrub.Progress) {
		report(p)
		if enough(p) {
			cancel()
		}
	}
	return scrub.Run(ctx, b.cfg)
}

func (b *bench) path(repository, generation, path string) string {
	return filepath.Join(b.dir, generations.GenerationsFolder, repository, generation, path)
}

func (b *bench) damage(path string, change func([]byte) []byte) {
	b.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		b.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(change(data)); err != nil {
		b.Fatal(err)
	}
}

// rotten lists what waits to be healed as "repository/path: generations".
func (b *bench) rotten() (list []string) {
	b.Helper()
	files, _, err := b.store.Rotten()
	if err != nil {
		b.Fatal(err)
	}
	for _, f := range files {
		if f.Open() {
			var short []string
			for _, g := range f.Generations {
				short = append(short, strings.TrimLeft(g[:6], "0"))
			}
			list = append(list, fmt.Sprintf("%s/%s: %s", f.Repository, f.Path, strings.Join(short, " ")))
		}
	}
	slices.Sort(list)
	return list
}

func (b *bench) want(want ...string) {
	b.Helper()
	if got := b.rotten(); !slices.Equal(got, want) {
		b.Errorf("rotten:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// history makes 5 generations of photos and 2 of docs.
func (b *bench) history() (photos, docs []string) {
	b.Helper()
	for day := range 5 {
		t := generationstest.Tree{"keep": generationstest.Noise(1, 400_000), "twin/a": generationstest.Noise(2, 50_000), "twin/b": generationstest.Noise(2, 50_000), "day": fmt.Sprint("day ", day)}
		for i := range 20 {
			t[fmt.Sprintf("data/%d/%d", i/5, i)] = generationstest.Noise(uint64(10+i+day/3*3*i), 10_000+i)
		}
		photos = append(photos, generationstest.Push(b.TB, b.store, "photos", t))
		if day%3 == 0 {
			docs = append(docs, generationstest.Push(b.TB, b.store, "docs", generationstest.Tree{"text": fmt.Sprint("text ", day), "empty": ""}))
		}
	}
	return photos, docs
}

// inodes returns the size of every inode below generations/*/*/files.
func (b *bench) inodes() map[uint64]int64 {
	b.Helper()
	sizes := map[uint64]int64{}
	err := filepath.Walk(filepath.Join(b.dir, generations.GenerationsFolder), func(path string, info os.FileInfo, err error) error {
		if err == nil && info.Mode().IsRegular() && strings.Contains(path, "/files/") {
			sizes[info.Sys().(*syscall.Stat_t).Ino] = info.Size()
		}
		return err
	})
	if err != nil {
		b.Fatal(err)
	}
	return sizes
}

// TestEveryInodeOnce: a round reads every inode, and none twice.
func TestEveryInodeOnce(t *testing.T) {
	b := newBench(t)
	b.history()
	b.round()
	want := b.inodes()
	for ino, size := range want {
		if b.read[ino] != size {
			t.Errorf("inode %d: %d bytes were read of %d", ino, b.read[ino], size)
		}
	}
	b.want()
	if p := b.last; p.Running || p.Done != 1 || p.Overdue || p.LastFull.IsZero() {
		t.Errorf("%+v", p)
	}
}

// TestFindsEverything: each kind of damage is found, named with all generations
// that share it, and nothing else is.
func TestFindsEverything(t *testing.T) {
	flip := func(at int) func([]byte) []byte {
		return func(d []byte) []byte { d[(at+len(d))%len(d)] ^= 1; return d }
	}
	for _, tt := range []struct {
		name   string
		damage func(b *bench, photos, docs []string)
		want   []string
	}{
		{"bits", func(b *bench, photos, docs []string) {
			b.damage(b.path("photos", photos[0], "files/keep"), flip(399_999))
			b.damage(b.path("photos", photos[4], "files/data/3/19"), flip(0))
			b.damage(b.path("docs", docs[1], "files/text"), flip(2))
		}, []string{"docs/text: 2", "photos/data/3/19: 4 5", "photos/keep: 1 2 3 4 5"}},
		{"twins", func(b *bench, photos, docs []string) {
			b.damage(b.path("photos", photos[0], "files/twin/b"), flip(7))
		}, []string{"photos/twin/a: 1 2 3 4 5"}},
		{"truncated", func(b *bench, photos, docs []string) {
			b.damage(b.path("photos", photos[1], "files/keep"), func(d []byte) []byte { return d[:100] })
		}, []string{"photos/keep: 1 2 3 4 5"}},
		{"missing in the middle is healed from the others", func(b *bench, photos, docs []string) {
			if err := os.Remove(b.path("photos", photos[2], "files/keep")); err != nil {
				b.Fatal(err)
			}
		}, nil},
		{"missing where nobody else has it", func(b *bench, photos, docs []string) {
			if err := os.Remove(b.path("photos", photos[2], "files/day")); err != nil {
				b.Fatal(err)
			}
		}, []string{"photos/day: 3"}},
		{"unreadable", func(b *bench, photos, docs []string) {
			b.fail = func(f *os.File, offset int64) error {
				if strings.HasSuffix(f.Name(), "/data/1/7") && strings.Contains(f.Name(), photos[0]) {
					return unix.EIO
				}
				return nil
			}
			// What the kernel cannot read in a test is wrong instead for the healing.
			b.damage(b.path("photos", photos[0], "files/data/1/7"), flip(1))
		}, []string{"photos/data/1/7: 1 2 3"}},
		{"lists", func(b *bench, photos, docs []string) {
			b.damage(b.path("photos", photos[1], generations.SumsFile), flip(3))
			b.damage(b.path("photos", photos[2], generations.ManifestFile), flip(100))
			b.damage(b.path("docs", docs[0], generations.TOMLFile), flip(-3))
		}, []string{"docs/generation.toml: 1", "photos/MANIFEST: 3"}}, // SUMS.b2 is made anew
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t)
			tt.damage(b, first(b.history()), second(b))
			b.open() // nothing is remembered from the pushes
			b.round()
			b.want(tt.want...)
		})
	}
}

func first(photos, _ []string) []string { return photos }

func second(b *bench) (docs []string) {
	b.Helper()
	list, err := b.store.List(b.Context(), "docs")
	if err != nil {
		b.Fatal(err)
	}
	for _, g := range list {
		docs = append(docs, g.Name)
	}
	return docs
}

// TestAVanishedDiskIsNoRot: when nothing can be read any more, nothing is said
// about files, and the scrub ends with an error.
func TestAVanishedDiskIsNoRot(t *testing.T) {
	b := newBench(t)
	b.history()
	gone := false
	b.at = func(all int64) {
		if all > 500_000 {
			b.mu.Lock()
			gone = true
			b.mu.Unlock()
		}
	}
	b.fail = func(*os.File, int64) error {
		b.mu.Lock()
		defer b.mu.Unlock()
		if gone {
			return unix.EIO
		}
		return nil
	}
	err := scrub.Run(t.Context(), b.cfg)
	if !errors.Is(err, scrub.ErrVanished) {
		t.Errorf("the scrub ended with %v", err)
	}
	b.want()
	gone, b.at = false, nil
	b.open()
	b.round()
	b.want()
}

// TestResumes: stopped after every few kilobytes, the scrub goes on where it was,
// in the middle of a long file too.
func TestResumes(t *testing.T) {
	b := newBench(t)
	long := generationstest.Noise(9, 40<<20)
	generationstest.Push(t, b.store, "big", generationstest.Tree{"a": generationstest.Noise(1, 1000), "long": long, "z": generationstest.Noise(2, 1000)})
	photos, _ := b.history()
	b.damage(b.path("photos", photos[3], "files/keep"), func(d []byte) []byte { d[1]++; return d })
	longInode := inode(t, b.path("big", "000001-20260101T000000Z", "files/long"))
	stops := 0
	for !b.finished() {
		ctx, cancel := context.WithCancel(t.Context())
		limit := b.all + 11<<20
		if stops > 4 {
			limit = b.all + 650_000
		}
		b.at = func(all int64) {
			if all > limit {
				cancel()
			}
		}
		cfg := b.cfg
		cfg.Report = func(p scrub.Progress) {
			b.cfg.Report(p)
			if !p.Running && !p.LastFull.IsZero() {
				cancel()
			}
		}
		if err := scrub.Run(ctx, cfg); !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		cancel()
		b.open()
		if stops++; stops > 100 {
			t.Fatal("it does not get on")
		}
	}
	if stops < 5 {
		t.Errorf("it was stopped %d times, which proves nothing", stops)
	}
	b.want("photos/keep: 1 2 3 4 5")
	if n := b.read[longInode]; n > int64(len(long))*2 {
		t.Errorf("of the long file's %d bytes %d were read", len(long), n)
	}
	for ino, size := range b.inodes() {
		if b.read[ino] < size {
			t.Errorf("inode %d: %d bytes were read of %d", ino, b.read[ino], size)
		}
	}
}

// TestCorrected: after e2fsck corrected the file system everything is read anew,
// at once, and that once.
func TestCorrected(t *testing.T) {
	b := newBench(t)
	b.history()
	b.round()
	root, err := os.OpenRoot(b.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	if err := scrub.Corrected(root, os.Getuid()); err != nil {
		t.Fatal(err)
	}
	read, begun := b.all, b.clock()
	b.open()
	b.round()
	if b.all != 2*read {
		t.Errorf("%d bytes were read, and after the correction %d", read, b.all-read)
	}
	if wait := b.last.Started.Sub(begun); wait < 0 || wait > time.Minute {
		t.Errorf("the round began %v after the correction", wait)
	}
	// The next run knows: nothing is due.
	b.open()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	due := b.clock().Add(every / 8)
	b.cfg.Sleep = func(ctx context.Context, d time.Duration) error {
		if b.pass(d); b.clock().After(due) {
			cancel()
		}
		return ctx.Err()
	}
	if err := scrub.Run(ctx, b.cfg); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if b.all != 2*read {
		t.Errorf("%d bytes were read again for the same correction", b.all-2*read)
	}
}

// finished says whether the record on the disk knows of a whole round.
func (b *bench) finished() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return !b.last.Running && !b.last.LastFull.IsZero()
}

func inode(tb testing.TB, path string) uint64 {
	tb.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		tb.Fatal(err)
	}
	return st.Ino
}

// TestGenerationsComeAndGo: what expires or arrives during a round makes no
// finding, and nothing that stays is missed.
func TestGenerationsComeAndGo(t *testing.T) {
	b := newBench(t)
	photos, _ := b.history()
	b.damage(b.path("photos", photos[4], "files/day"), func(d []byte) []byte { d[1]++; return d })
	var once sync.Once
	b.at = func(all int64) {
		if all < 450_000 {
			return
		}
		once.Do(func() {
			// The first is being read, the second is the base of the third.
			for _, name := range photos[:2] {
				if err := os.RemoveAll(filepath.Dir(b.path("photos", name, "x"))); err != nil {
					t.Error(err)
				}
			}
			generationstest.Push(t, b.store, "photos", generationstest.Tree{"new": generationstest.Noise(77, 30_000), "keep": generationstest.Noise(1, 400_000)})
		})
	}
	b.round()
	b.want("photos/day: 5")
	for ino, size := range b.inodes() {
		if b.read[ino] < size {
			t.Errorf("inode %d: %d bytes were read of %d", ino, b.read[ino], size)
		}
	}
}

// TestPausesForPushes: while somebody needs the disk nothing is read, and the
// status says why.
func TestPausesForPushes(t *testing.T) {
	b := newBench(t)
	b.history()
	busy, polls := "", 0
	var before int64
	b.at = func(all int64) {
		if all > 300_000 && busy == "" && polls == 0 {
			busy, before = "a push is at work", all
		}
	}
	b.cfg.Busy = func() string {
		if busy != "" {
			if polls++; polls == 20 {
				if b.all != before || b.last.Paused != busy {
					t.Errorf("read %d bytes while busy; paused: %q", b.all-before, b.last.Paused)
				}
				busy = ""
			}
		}
		return busy
	}
	b.round()
	if polls != 20 || b.last.Paused != "" {
		t.Errorf("asked %d times, paused: %q", polls, b.last.Paused)
	}
}

// TestPace: a round takes about three quarters of its time, whether the disk is
// always open or an hour a night, and the next one begins when the time is over.
func TestPace(t *testing.T) {
	for _, tt := range []struct {
		name string
		open time.Duration // a day
	}{{"always open", 24 * time.Hour}, {"two hours a night", 2 * time.Hour}} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t)
			b.cfg.Every = 8 * 24 * time.Hour
			generationstest.Push(t, b.store, "photos", generationstest.Tree{"a": generationstest.Noise(1, 3<<20), "b": generationstest.Noise(2, 2<<20)})
			begun := b.clock()
			night := begun
			for !b.finished() {
				ctx, cancel := context.WithCancel(t.Context())
				cfg := b.cfg
				cfg.Sleep = func(ctx context.Context, d time.Duration) error {
					b.pass(d)
					if b.clock().Sub(night) >= tt.open {
						cancel()
					}
					return ctx.Err()
				}
				cfg.Report = func(p scrub.Progress) {
					b.cfg.Report(p)
					if !p.Running && !p.LastFull.IsZero() {
						cancel()
					}
				}
				if err := scrub.Run(ctx, cfg); !errors.Is(err, context.Canceled) {
					t.Fatal(err)
				}
				cancel()
				if b.finished() {
					break
				}
				night = night.Add(24 * time.Hour)
				b.pass(night.Sub(b.clock()))
			}
			took := b.clock().Sub(begun)
			if took > b.cfg.Every {
				t.Errorf("a round took %v of %v", took, b.cfg.Every)
			}
		})
	}
}

// TestOverdue: a round that could not be read in time is said to be overdue, and
// the next one begins at once.
func TestOverdue(t *testing.T) {
	b := newBench(t)
	b.history()
	polls, overdue := 0, false
	b.cfg.Busy = func() string {
		if polls++; polls < 40 {
			b.pass(every / 30)
			overdue = overdue || b.last.Overdue
			return "a push is at work"
		}
		return ""
	}
	b.round()
	if !overdue {
		t.Error("it never said that it is overdue")
	}
	if b.last.Overdue {
		t.Error("it is still overdue")
	}
}

// TestNever: no scrub reads nothing.
func TestNever(t *testing.T) {
	b := newBench(t)
	b.history()
	b.cfg.Every = 0
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := scrub.Run(ctx, b.cfg); !errors.Is(err, context.Canceled) || b.all != 0 {
		t.Errorf("%v, read %d bytes", err, b.all)
	}
}
