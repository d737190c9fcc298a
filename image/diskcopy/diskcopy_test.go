package diskcopy_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"farkeep/image/diskcopy"
	"farkeep/shared/generations"
	gentest "farkeep/shared/generations/generationstest"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// copyFolders makes a copy of a test's program copy, for a parent that kills it.
const copyFolders = "FARKEEP_TEST_COPY_FOLDERS"

func TestMain(m *testing.M) {
	if folders := os.Getenv(copyFolders); folders != "" {
		from, to, _ := strings.Cut(folders, ":")
		if _, err := diskcopy.Copy(context.Background(), from, to, diskcopy.Options{Pace: time.Millisecond}); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	code := m.Run()
	if template != "" {
		os.RemoveAll(filepath.Dir(template))
	}
	os.Exit(code)
}

// keeperUID owns the files of these tests' old disks.
const keeperUID = 902

func openStore(tb testing.TB, dir string) *generations.Store {
	tb.Helper()
	if os.Getuid() != 0 {
		tb.Fatal("this test gives files to another user: run it as root")
	}
	s, err := generations.Open(dir, generations.Options{Reserve: 1, Shared: true, Owner: &generations.Owner{UID: keeperUID, GID: keeperUID}})
	if err != nil {
		tb.Fatal(err)
	}
	return s
}

// oldDisk is a store with two repositories: files that stay, change, move, go,
// twins, executables, and a hole where generations expired.
func oldDisk(tb testing.TB) (dir string, photos []string) {
	tb.Helper()
	once.Do(func() { fillOldDisk(tb) })
	dir = filepath.Join(tb.TempDir(), "disk")
	if out, err := exec.Command("cp", "-a", template, dir).CombinedOutput(); err != nil {
		tb.Fatalf("%v\n%s", err, out)
	}
	return dir, slices.Clone(templatePhotos)
}

var (
	once           sync.Once
	template       string
	templatePhotos []string
)

func fillOldDisk(tb testing.TB) {
	tb.Helper()
	base, err := os.MkdirTemp("", "diskcopy")
	if err != nil {
		tb.Fatal(err)
	}
	dir := filepath.Join(base, "disk")
	if err := os.Mkdir(dir, 0o711); err != nil {
		tb.Fatal(err)
	}
	var photos []string
	if err := errors.Join(os.Chmod(dir, 0o711), os.Chown(dir, keeperUID, keeperUID)); err != nil {
		tb.Fatal(err)
	}
	s := openStore(tb, dir)
	defer s.Close()
	for day := range 5 {
		t := gentest.Tree{
			"keep": gentest.Noise(1, 400_000), "twin/a": gentest.Noise(2, 50_000), "twin/b": gentest.Noise(2, 50_000),
			"tool.x": gentest.Noise(2, 50_000), "day": fmt.Sprint("day ", day), "empty": "", `odd\name` + "\r": "odd",
		}
		for i := range 20 {
			t[fmt.Sprintf("data/%d/%d", i/5, i)] = gentest.Noise(uint64(10+i+day/3*3*i), 10_000+i)
		}
		photos = append(photos, gentest.Push(tb, s, "photos", t))
		gentest.Push(tb, s, "docs", gentest.Tree{"text": fmt.Sprint("text ", day), "copy": gentest.Noise(uint64(10+3), 10_003)})
	}
	if err := os.RemoveAll(filepath.Join(dir, "generations/photos", photos[1])); err != nil {
		tb.Fatal(err)
	}
	if err := errors.Join(s.Heartbeat("borg", time.Now(), "all is well\n"), s.WriteRecord("clock", map[string]int{"latest": 7})); err != nil {
		tb.Fatal(err)
	}
	for _, junk := range []string{"incoming/photos/objects/x", "staging/photos/home/y", ".farkeep/going/photos--1/z", ".farkeep/judge/photos/w"} {
		path := filepath.Join(dir, junk)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte("not to be copied"), 0o600)); err != nil {
			tb.Fatal(err)
		}
	}
	template, templatePhotos = dir, slices.Delete(photos, 1, 2)
}

// picture is everything that a copy must keep: kind, mode, owner, time, content,
// and which names are one inode.
func picture(tb testing.TB, dir string) map[string]string {
	tb.Helper()
	all := map[string]string{}
	first := map[uint64]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, path)
		top, rest, _ := strings.Cut(rel, "/")
		if top == "staging" || top == ".copying" || top == "incoming" && rest != "" ||
			top == ".farkeep" && (strings.HasPrefix(rest, "going") || strings.HasPrefix(rest, "judge")) {
			return nil
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		line := fmt.Sprintf("%o %d:%d", st.Mode, st.Uid, st.Gid)
		if d.Type().IsRegular() {
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			if first[st.Ino] == "" {
				first[st.Ino] = rel
			}
			line += fmt.Sprintf(" %d %x same as %s", len(data), data[:min(len(data), 64)], first[st.Ino])
			if strings.Contains(rel, "/files/") {
				line += fmt.Sprint(" ", st.Mtim.Nano())
			}
		}
		all[rel] = line
		return nil
	})
	if err != nil {
		tb.Fatal(err)
	}
	return all
}

func newDisk(tb testing.TB) string {
	tb.Helper()
	dir := tb.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "lost+found"), 0o700); err != nil {
		tb.Fatal(err)
	}
	return dir
}

// same compares two disks from outside, and lets b2sum check the new one.
func same(tb testing.TB, from, to string) {
	tb.Helper()
	got := picture(tb, to)
	delete(got, "lost+found")
	if diff := cmp.Diff(picture(tb, from), got); diff != "" {
		tb.Error(diff)
	}
	checkSums(tb, to)
}

func checkSums(tb testing.TB, to string) {
	tb.Helper()
	lists, err := filepath.Glob(filepath.Join(to, "generations/*/*/SUMS.b2"))
	if err != nil || len(lists) == 0 {
		tb.Fatal(lists, err)
	}
	for _, list := range lists {
		cmd := exec.Command("b2sum", "-l", "256", "--strict", "--quiet", "-c", generations.SumsFile)
		cmd.Dir = filepath.Dir(list)
		if out, err := cmd.CombinedOutput(); err != nil {
			tb.Errorf("b2sum (package coreutils) in %s: %v\n%s", cmd.Dir, err, out)
		}
	}
}

// TestCopy: the new disk is the old one, and takes the next push.
func TestCopy(t *testing.T) {
	from, _ := oldDisk(t)
	to := newDisk(t)
	report, err := diskcopy.Copy(t.Context(), from, to, diskcopy.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if report.Generations != 9 || report.Of != 9 || report.Lost != 0 || report.Links == 0 {
		t.Errorf("%+v", report)
	}
	same(t, from, to)
	s := openStore(t, to)
	defer s.Close()
	name := gentest.Push(t, s, "photos", gentest.Tree{"keep": gentest.Noise(1, 400_000), "new": "new"})
	if !strings.HasPrefix(name, "000006-") {
		t.Errorf("the next generation is %s", name)
	}
	if r, err := s.Verify(t.Context(), "photos", name, nil); err != nil || r.Bad != 0 {
		t.Errorf("%+v, %v", r, err)
	}
	if inode(t, filepath.Join(to, "generations/photos", name, "files/keep")) != inode(t, filepath.Join(to, "generations/photos", oldest(t, s), "files/keep")) {
		t.Error("the next generation shares nothing with the copied ones")
	}
}

func oldest(tb testing.TB, s *generations.Store) string {
	tb.Helper()
	list, err := s.List(tb.Context(), "photos")
	if err != nil {
		tb.Fatal(err)
	}
	return list[0].Name
}

func inode(tb testing.TB, path string) uint64 {
	tb.Helper()
	info, err := os.Lstat(path)
	if err != nil {
		tb.Fatal(err)
	}
	return info.Sys().(*syscall.Stat_t).Ino
}

// TestCopyResumes: killed at random instants, the copy goes on, and is the same.
func TestCopyResumes(t *testing.T) {
	from, _ := oldDisk(t)
	to := newDisk(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	seed := uint64(time.Now().UnixNano())
	t.Log("seed ", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	killed := 0
	for try := 0; ; try++ {
		cmd := exec.Command(self)
		cmd.Env = append(os.Environ(), copyFolders+"="+from+":"+to)
		var said strings.Builder
		cmd.Stderr = &said
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if try < 12 {
			time.AfterFunc(time.Duration(20+random.IntN(250))*time.Millisecond, func() { cmd.Process.Signal(unix.SIGKILL) })
		}
		err := cmd.Wait()
		if err == nil {
			break
		}
		if strings.Contains(said.String(), "no copy that was cut") {
			break // the one before was killed when all was done
		}
		if said.Len() > 0 {
			t.Fatal(said.String())
		}
		killed++
	}
	t.Log("killed ", killed)
	same(t, from, to)
}

// failing reads as a disk that cannot read some files, by the end of their names.
func failing(bad ...string) func(*os.File) io.Reader {
	return func(f *os.File) io.Reader {
		for _, end := range bad {
			if strings.HasSuffix(f.Name(), end) {
				return io.MultiReader(io.LimitReader(f, 100), broken{f.Name()})
			}
		}
		return f
	}
}

type broken struct{ name string }

func (b broken) Read([]byte) (int, error) {
	return 0, &fs.PathError{Op: "read", Path: b.name, Err: unix.EIO}
}

func rewrite(tb testing.TB, path string, change func([]byte) []byte) {
	tb.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		tb.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		tb.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(change(data)); err != nil {
		tb.Fatal(err)
	}
}

func flip(at int) func([]byte) []byte {
	return func(b []byte) []byte { b[(at+len(b))%len(b)] ^= 4; return b }
}

// TestCopyStopsAtDamage: an ordinary copy does not leave anything out silently.
func TestCopyStopsAtDamage(t *testing.T) {
	for name, damage := range map[string]func(tb testing.TB, generation string) func(*os.File) io.Reader{
		"a wrong bit": func(tb testing.TB, g string) func(*os.File) io.Reader {
			rewrite(tb, g+"/files/keep", flip(9))
			return nil
		},
		"a missing file": func(tb testing.TB, g string) func(*os.File) io.Reader { os.Remove(g + "/files/day"); return nil },
		"an unreadable":  func(tb testing.TB, g string) func(*os.File) io.Reader { return failing("/keep") },
		"a wrong list":   func(tb testing.TB, g string) func(*os.File) io.Reader { rewrite(tb, g+"/SUMS.b2", flip(9)); return nil },
		"no manifest": func(tb testing.TB, g string) func(*os.File) io.Reader {
			rewrite(tb, g+"/MANIFEST", flip(50))
			return nil
		},
		"no description":  func(tb testing.TB, g string) func(*os.File) io.Reader { os.Remove(g + "/generation.toml"); return nil },
		"a missing place": func(tb testing.TB, g string) func(*os.File) io.Reader { os.RemoveAll(g + "/files/twin"); return nil },
	} {
		t.Run(name, func(t *testing.T) {
			from, photos := oldDisk(t)
			to := newDisk(t)
			reader := damage(t, filepath.Join(from, "generations/photos", photos[0]))
			_, err := diskcopy.Copy(t.Context(), from, to, diskcopy.Options{Reader: reader})
			if err == nil || !strings.Contains(err.Error(), photos[0]) {
				t.Errorf("the copy ended with %v", err)
			}
			if _, err := os.Stat(filepath.Join(to, "generations/photos", photos[0])); err == nil {
				t.Error("the damaged generation is on the new disk")
			}
		})
	}
}

// TestSalvage: everything that can be read is on the new disk, what another copy
// has too, the rest is named, and nothing else is.
func TestSalvage(t *testing.T) {
	from, photos := oldDisk(t)
	at := func(i int, path string) string { return filepath.Join(from, "generations/photos", photos[i], path) }
	rewrite(t, at(0, "files/keep"), flip(77))                          // shared by all: lost
	rewrite(t, at(2, "files/twin/a"), flip(0))                         // twins in one inode; tool.x has the content too
	rewrite(t, at(3, "files/day"), func([]byte) []byte { return nil }) // in one generation
	rewrite(t, at(1, "SUMS.b2"), flip(3))                              // made anew
	rewrite(t, at(2, "MANIFEST"), flip(60))                            // by SUMS.b2 then
	if err := os.RemoveAll(at(3, "files/data/1")); err != nil {        // of the last; the one before has it
		t.Fatal(err)
	}
	reader := failing("/data/0/3") // of the first two docs has the content
	to := newDisk(t)
	var lost []string
	report, err := diskcopy.Copy(t.Context(), from, to, diskcopy.Options{Salvage: true, Reader: reader, Lost: func(l diskcopy.Loss) {
		if l.What == "" {
			t.Errorf("%+v has no reason", l)
		}
		generation := slices.Index(photos, l.Generation)
		lost = append(lost, fmt.Sprintf("%s %d %s", l.Repository, generation, l.Path))
	}})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(lost)
	want := []string{
		"photos 0 keep", "photos 1 SUMS.b2", "photos 1 keep", "photos 2 MANIFEST", "photos 2 data/0/3", "photos 2 keep",
		"photos 3 data/0/3", "photos 3 day", "photos 3 keep",
	}
	if diff := cmp.Diff(want, lost); diff != "" {
		t.Error(diff)
	}
	if report.Lost != int64(len(want)) || report.Found == 0 {
		t.Errorf("%+v", report)
	}
	// What is there is right, by the tool that everybody has.
	for i := range photos {
		cmd := exec.Command("b2sum", "-l", "256", "--quiet", "--ignore-missing", "-c", generations.SumsFile)
		cmd.Dir = filepath.Join(to, "generations/photos", photos[i])
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("b2sum in %s: %v\n%s", cmd.Dir, err, out)
		}
	}
	// The next push heals what home still has, in the generations before.
	s := openStore(t, to)
	defer s.Close()
	files, open, err := s.Rotten()
	if err != nil || open == 0 {
		t.Fatalf("the new disk knows of %d lost files: %+v, %v", open, files, err)
	}
	gentest.Push(t, s, "photos", gentest.Tree{"keep": gentest.Noise(1, 400_000)})
	for i := range photos {
		if i == 2 {
			continue // its manifest is lost, and with it the right to be healed
		}
		r, err := s.Verify(t.Context(), "photos", photos[i], nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range r.Problems {
			if p.Path == "keep" {
				t.Errorf("%s: %+v", photos[i], p)
			}
		}
	}
	if fi, err := os.Stat(filepath.Join(to, ".farkeep/rot.toml")); err != nil || fi.Sys().(*syscall.Stat_t).Uid != keeperUID {
		t.Errorf("the keeper cannot read what is lost: %v", err)
	}
}

// TestSalvageIsACopy: a disk without a fault is salvaged as it is copied.
func TestSalvageIsACopy(t *testing.T) {
	from, _ := oldDisk(t)
	to := newDisk(t)
	report, err := diskcopy.Copy(t.Context(), from, to, diskcopy.Options{Salvage: true})
	if err != nil || report.Lost != 0 {
		t.Fatalf("%+v, %v", report, err)
	}
	same(t, from, to)
}

// TestRefuses: mistakes change nothing.
func TestRefuses(t *testing.T) {
	from, _ := oldDisk(t)
	other, _ := oldDisk(t)
	inside := filepath.Join(from, "generations", "to")
	full := t.TempDir()
	if err := errors.Join(os.Mkdir(inside, 0o755), os.WriteFile(filepath.Join(full, "letter"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	before := maps.Clone(picture(t, other))
	for _, tt := range []struct{ name, from, to, want string }{
		{"the same", from, from, "same folder"},
		{"inside", from, inside, "in the other"},
		{"around", inside, from, "in the other"},
		{"not empty", from, full, "letter"},
		{"a store", from, other, "holds"},
		{"no store", full, newDisk(t), "generations"},
		{"nowhere", from, filepath.Join(full, "nowhere"), "no such file"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := diskcopy.Copy(t.Context(), tt.from, tt.to, diskcopy.Options{}); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
	if diff := cmp.Diff(before, picture(t, other)); diff != "" {
		t.Error(diff)
	}
}

// TestFullDisk: a disk that is too small ends a copy and a salvage, clearly.
func TestFullDisk(t *testing.T) {
	from, _ := oldDisk(t)
	to := t.TempDir()
	if err := unix.Mount("tmpfs", to, "tmpfs", 0, "size=600k"); err != nil {
		t.Fatal("mount a tmpfs: ", err)
	}
	t.Cleanup(func() { unix.Unmount(to, unix.MNT_DETACH) })
	for _, salvage := range []bool{false, true} {
		if _, err := diskcopy.Copy(t.Context(), from, to, diskcopy.Options{Salvage: salvage}); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("salvage %v: %v", salvage, err)
		}
	}
}
