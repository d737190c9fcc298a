package main

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"farkeep/pusher/borgtest"
	"farkeep/pusher/borgtest/household"
)

// makeSegments writes 512 MiB that do not compress, in files from 16 to 64 MiB.
func makeSegments(b testing.TB, dir string) (size int64) {
	b.Helper()
	folder := filepath.Join(dir, "data", "0")
	must(b, os.MkdirAll(folder, 0o755))
	for i, mib := range []int64{64, 16, 48, 32, 64, 64, 24, 64, 56, 64, 16} {
		f, err := os.Create(filepath.Join(folder, fmt.Sprint(i)))
		must(b, err)
		n, err := io.CopyN(f, rand.Reader, mib<<20)
		must(b, err)
		must(b, f.Close())
		size += n
	}
	return size
}

// makeSmall writes 500 files of 20 KB.
func makeSmall(b testing.TB, dir string) (size int64) {
	b.Helper()
	for i := range 500 {
		content := make([]byte, 20_000)
		rand.Read(content)
		must(b, os.WriteFile(filepath.Join(dir, fmt.Sprintf("%05d", i)), content, 0o644))
		size += int64(len(content))
	}
	return size
}

// makeMany writes so many files into 100 folders.
func makeMany(b testing.TB, dir string, files int) {
	b.Helper()
	for i := range files {
		folder := filepath.Join(dir, fmt.Sprintf("%03d", i%100))
		if i < 100 {
			must(b, os.Mkdir(folder, 0o755))
		}
		must(b, os.WriteFile(filepath.Join(folder, fmt.Sprintf("%08d", i)), fmt.Append(nil, "content of ", i), 0o644))
	}
}

// makeRepository writes a Borg repository of 512 MiB: its own files, and segments
// that do not compress.
func makeRepository(b testing.TB, dir string) (size int64) {
	b.Helper()
	r := borgtest.Init(b, filepath.Dir(dir), filepath.Base(dir), "repokey")
	r.Set(b, "max_segment_size", fmt.Sprint(segmentSize))
	r.Fill(b, 8, 64<<20)
	r.Create(b, "all")
	return treeSize(b, dir)
}

// segmentSize is how long borg's segments become: 500 MiB by itself, here an eighth
// of that, as is the repository of what one has.
const segmentSize = 64 << 20

func treeSize(b testing.TB, dir string) (size int64) {
	b.Helper()
	must(b, filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		size += info.Size()
		return err
	}))
	return size
}

// A state is a repository at one moment.
type state struct {
	folder string // the Borg repository, or the plain files
	want   string // b2sum of what is in it
	restic string // a restic repository of the same backups; "" where there is none
	backed string // b2sum of what the newest of them is of
	small  bool   // chunks are a 128th of what they usually are
}

// resticPassword opens every restic repository of the bench.
const resticPassword = "correct horse battery staple"

// resticTool is a restic command without a network, for the making of sources.
func resticTool(b testing.TB, cache, dir string, args ...string) {
	b.Helper()
	cmd := exec.Command("restic", append([]string{"--cache-dir", cache, "--quiet"}, args...)...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "RESTIC_PASSWORD="+resticPassword, "RESTIC_FROM_PASSWORD="+resticPassword)
	if out, err := cmd.CombinedOutput(); err != nil {
		b.Fatalf("restic %s (Debian package restic): %v\n%s", args, err, out)
	}
}

// plain is a state without repositories.
func plain(b testing.TB, dir string) state { return state{folder: dir, want: sums(b, dir)} }

// makeFirst is a repository of so many MiB, as Borg and as restic keep the same
// random files.
func makeFirst(b testing.TB, dir string, mib int) state {
	b.Helper()
	s := state{folder: filepath.Join(dir, "borg"), restic: filepath.Join(dir, "restic")}
	files := filepath.Join(dir, "files")
	must(b, os.MkdirAll(files, 0o755))
	r := borgtest.Init(b, dir, "borg", "repokey")
	r.Set(b, "max_segment_size", fmt.Sprint(segmentSize))
	r.Source = files
	r.Fill(b, 8, mib<<20/8)
	r.Create(b, "all")
	s.want, s.backed = sums(b, s.folder), sums(b, files)
	cache := filepath.Join(dir, "restic-cache")
	resticTool(b, cache, files, "init", "--repo", s.restic)
	resticTool(b, cache, files, "backup", "--repo", s.restic, ".")
	must(b, os.RemoveAll(files))
	must(b, os.RemoveAll(cache))
	return s
}

// makeDays lives with a household for so many days, and returns three states of
// its repositories: the last of these days; the day after it, a normal one; and the
// day after that, on which much was deleted, all history but the newest archive
// too, so that borg moves most of what is left into new segments. Files that are in
// several states are the same inodes: no program's cache is misled.
//
// The household is a hundredth of a real one, and so are borg's segments and
// chunks, as in the other simulations of this project.
func makeDays(b testing.TB, dir string, days int, who occupants) (states []state) {
	b.Helper()
	files, work, cache := filepath.Join(dir, "files"), filepath.Join(dir, "work"), filepath.Join(dir, "restic-cache")
	must(b, os.MkdirAll(work, 0o755))
	must(b, who.moveIn(files))
	r := borgtest.Init(b, work, "borg", "repokey")
	r.Source = files
	r.Set(b, "max_segment_size", fmt.Sprint(who.segments()))
	restic := filepath.Join(work, "restic")
	resticTool(b, cache, files, "init", "--repo", restic)
	date := household.Start
	backup := func(keep ...string) {
		r.Run(b, "create", "--chunker-params="+householdChunks, "--timestamp", date.Format("2006-01-02T15:04:05"), r.Path+"::"+date.Format(time.DateOnly), files)
		r.Run(b, append(append([]string{"prune"}, keep...), r.Path)...)
		r.Run(b, "compact", r.Path)
		date = date.AddDate(0, 0, 1)
	}
	keepState := func(retire ...string) {
		resticTool(b, cache, files, "backup", "--repo", restic, ".")
		if len(retire) > 0 {
			resticTool(b, cache, files, append([]string{"forget", "--repo", restic, "--prune"}, retire...)...)
		}
		s := state{folder: filepath.Join(dir, fmt.Sprint("borg-", len(states))), restic: filepath.Join(dir, fmt.Sprint("restic-", len(states))), backed: sums(b, files), small: true}
		for from, to := range map[string]string{r.Path: s.folder, restic: s.restic} {
			if out, err := exec.Command("cp", "-al", from, to).CombinedOutput(); err != nil {
				b.Fatalf("cp: %v\n%s", err, out)
			}
		}
		s.want = sums(b, s.folder)
		states = append(states, s)
	}
	daily := []string{"--keep-daily=4", "--keep-weekly=2"}
	for day := range days {
		if day > 0 {
			must(b, who.live())
		}
		backup(daily...)
	}
	keepState()
	must(b, who.live())
	backup(daily...)
	keepState()
	must(b, who.clearOut(files))
	must(b, who.live())
	backup("--keep-last=1")
	keepState("--keep-last=1")
	for _, d := range []string{files, work, cache} {
		must(b, os.RemoveAll(d))
	}
	return states
}

// householdChunks are borg's chunks, a 128th of their usual size.
const householdChunks = "buzhash,13,17,14,4095"

// occupants are whose files are backed up.
type occupants interface {
	moveIn(dir string) error
	// live makes a day's changes.
	live() error
	// clearOut deletes every other picture.
	clearOut(dir string) error
	// segments is the greatest size of borg's, in bytes.
	segments() int
}

// family is the household of the simulations, 60 MB.
type family struct{ *household.Household }

func (f *family) moveIn(dir string) (err error) {
	f.Household, err = household.New(dir, 1)
	return err
}
func (f *family) live() error   { return f.Next() }
func (f *family) segments() int { return 5_000_000 }
func (f *family) clearOut(dir string) error {
	pictures, err := filepath.Glob(filepath.Join(dir, "photos", "*", "*.jpg"))
	return errors.Join(err, halve(pictures))
}

// single has 20 files of 30 KB, and two more every day.
type single struct {
	dir   string
	files int
}

func (s *single) moveIn(dir string) error {
	s.dir = dir
	return errors.Join(os.MkdirAll(dir, 0o755), s.add(20))
}
func (s *single) live() error   { return s.add(2) }
func (s *single) segments() int { return 100_000 }
func (s *single) clearOut(dir string) error {
	all, err := filepath.Glob(filepath.Join(dir, "*"))
	return errors.Join(err, halve(all))
}

func (s *single) add(n int) error {
	for range n {
		content := make([]byte, 30_000)
		rand.Read(content)
		if err := os.WriteFile(filepath.Join(s.dir, fmt.Sprintf("%05d", s.files)), content, 0o644); err != nil {
			return err
		}
		s.files++
	}
	return nil
}

func halve(names []string) error {
	for i := 0; i < len(names); i += 2 {
		if err := os.Remove(names[i]); err != nil {
			return err
		}
	}
	return nil
}
