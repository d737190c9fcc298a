package diskuse_test

import (
	"crypto/sha256"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"farkeep/image/diskuse"
	"farkeep/pusher/borgtest"
	"farkeep/pusher/borgtest/household"
	"farkeep/shared/retention"

	"github.com/google/go-cmp/cmp"
)

// recorder lives a household's days with a real Borg repository, and writes down
// which segment files there are each night.
type recorder struct {
	t       *testing.T
	house   *household.Household
	repo    *borgtest.Repository
	compact int // every so many days
	seen    map[string]file
	next    int
	record  diskuse.Recording
}

type file struct {
	inode uint64
	mtime time.Time
	size  int64
	sum   [sha256.Size]byte
	id    int
}

// newRecorder makes the household and the repository of day 0. Everything is some
// 3,000 times smaller than in a household with 200 GB, so that a year takes
// minutes: chunks are 16 KiB and not 2 MiB, segments 256 KiB and not 500 MB. What
// counts for the mirror stays: how many segments there are, and how many chunks
// in each.
func newRecorder(t *testing.T, seed uint64, compact int) *recorder {
	t.Helper()
	dir := t.TempDir()
	r := &recorder{t: t, repo: borgtest.Init(t, dir, "repo", "repokey"), compact: compact, seen: map[string]file{}}
	r.repo.Set(t, "max_segment_size", fmt.Sprint(256<<10))
	var err error
	if r.house, err = household.New(r.repo.Source, seed); err != nil {
		t.Fatal(err)
	}
	r.night()
	return r
}

// day lives one more day.
func (r *recorder) day() {
	r.t.Helper()
	if err := r.house.Next(); err != nil {
		r.t.Fatal(err)
	}
	r.night()
}

// night makes the backup as the manual of Borg shows it, and notes the files.
func (r *recorder) night() {
	r.t.Helper()
	at := r.house.Date().Add(2 * time.Hour)
	r.repo.Run(r.t, "create", "--chunker-params=buzhash,13,17,14,4095", "--timestamp="+at.Format("2006-01-02T15:04:05"),
		r.repo.Path+"::"+at.Format("2006-01-02"), r.repo.Source)
	r.repo.Run(r.t, "prune", "--keep-daily=7", "--keep-weekly=4", "--keep-monthly=6", r.repo.Path)
	if r.house.Day()%r.compact == r.compact-1 {
		r.repo.Run(r.t, "compact", r.repo.Path)
	}
	r.note()
}

// note writes down the segment files. Borg's index and hints, which are written
// anew at each commit, are left out: they grow with the number of chunks, of which
// a small household with small chunks has as many as a large one with large ones.
func (r *recorder) note() {
	r.t.Helper()
	now := map[string]file{}
	var day diskuse.Day
	err := filepath.WalkDir(filepath.Join(r.repo.Path, "data"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		f := file{inode: info.Sys().(*syscall.Stat_t).Ino, mtime: info.ModTime(), size: info.Size()}
		old, there := r.seen[path]
		if there && old.inode == f.inode && old.mtime.Equal(f.mtime) && old.size == f.size {
			f = old
		} else {
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			f.sum = sha256.Sum256(data)
			if there && old.sum == f.sum {
				f.id = old.id
			} else {
				f.id = r.next
				r.next++
				day.Added = append(day.Added, diskuse.File{ID: f.id, Bytes: f.size})
			}
		}
		now[path] = f
		return nil
	})
	if err != nil {
		r.t.Fatal(err)
	}
	for path, old := range r.seen {
		if f, there := now[path]; !there || f.id != old.id {
			day.Removed = append(day.Removed, old.id)
		}
	}
	r.seen = now
	r.record.Days = append(r.record.Days, day)
}

// mirror is what an appliance makes of the recorder's nights: a folder for each
// generation, and unchanged files as hard links to the generation before.
type mirror struct {
	t     *testing.T
	dir   string
	rules retention.Rules
	items []retention.Item
	last  map[string]file
}

func (m *mirror) night(r *recorder) (disk int64, generations int) {
	m.t.Helper()
	must := func(err error) {
		m.t.Helper()
		if err != nil {
			m.t.Fatal(err)
		}
	}
	n := len(r.record.Days) - 1
	name := func(n int) string { return filepath.Join(m.dir, fmt.Sprint(n)) }
	for path, f := range r.seen {
		rel, err := filepath.Rel(r.repo.Path, path)
		must(err)
		to := filepath.Join(name(n), rel)
		must(os.MkdirAll(filepath.Dir(to), 0o755))
		if old, there := m.last[path]; there && old.id == f.id {
			must(os.Link(filepath.Join(name(n-1), rel), to))
			continue
		}
		data, err := os.ReadFile(path)
		must(err)
		must(os.WriteFile(to, data, 0o644))
	}
	m.last = r.seen
	now := r.house.Date().Add(150 * time.Minute)
	m.items = append(m.items, retention.Item{Name: fmt.Sprint(n), Sequence: int64(n + 1), Committed: now})
	for _, d := range retention.Plan(now, m.rules, m.items) {
		if !d.Keep {
			must(os.RemoveAll(filepath.Join(m.dir, d.Name)))
			m.items = slices.DeleteFunc(m.items, func(i retention.Item) bool { return i.Name == d.Name })
		}
	}
	inodes := map[uint64]bool{}
	must(filepath.WalkDir(m.dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if inode := info.Sys().(*syscall.Stat_t).Ino; !inodes[inode] {
			inodes[inode] = true
			disk += info.Size()
		}
		return nil
	}))
	return disk, len(m.items)
}

// TestRealBorg lives some days of a household with a real Borg, mirrors each night
// with real hard links, and compares what the disk holds with what the model says,
// to the byte. With FARKEEP_SIMULATE=300 it lives so many days, for two habits of
// compaction, and writes the recordings that come with the program.
func TestRealBorg(t *testing.T) {
	text, long := os.LookupEnv("FARKEEP_SIMULATE")
	days, habits := 9, map[string]int{"daily": 1}
	if long {
		if _, err := fmt.Sscan(text, &days); err != nil || days < 1 {
			t.Fatalf("FARKEEP_SIMULATE=%q is no number of days", text)
		}
		habits["weekly"] = 7
	}
	for name, compact := range habits {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRecorder(t, 1, compact)
			m := &mirror{t: t, dir: t.TempDir(), rules: retention.Rules{
				Policy: retention.Policy{Within: 36 * time.Hour, Daily: 2, Weekly: 1}, Floor: retention.Floor{Generations: 2}, PerDay: 2,
			}}
			type state struct {
				Disk        int64
				Generations int
			}
			var got, want []state
			for night := range days + 1 {
				if night > 0 {
					r.day()
				}
				disk, generations := m.night(r)
				got = append(got, state{disk, generations})
				if long && night%10 == 0 {
					t.Logf("day %d: %d files", night, len(r.seen))
				}
			}
			// Through its text, as the program reads it.
			var b strings.Builder
			if err := r.record.Write(&b); err != nil {
				t.Fatal(err)
			}
			read, err := diskuse.Parse(b.String())
			if err != nil {
				t.Fatal(err)
			}
			for _, n := range read.Simulate(m.rules) {
				want = append(want, state{n.Disk, n.Generations})
			}
			if d := cmp.Diff(want, got); d != "" {
				t.Errorf("-model +disk:\n%s", d)
			}
			if last := got[len(got)-1]; last.Generations < 3 || last.Generations > 6 {
				t.Errorf("%d generations are left: the test shows nothing", last.Generations)
			}
			if long {
				if err := os.WriteFile(filepath.Join("recordings", name+".txt"), []byte(b.String()), 0o644); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}
