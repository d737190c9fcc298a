package freeze

import (
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"farkeep/pusher/borglock"
	"farkeep/pusher/borgtest"
)

func options(t testing.TB) borglock.Options {
	id, err := borglock.HostID(t.Context(), os.Getenv)
	if err != nil {
		t.Fatal(err)
	}
	return borglock.Options{HostID: id, Wait: 10 * time.Second}
}

func take(t testing.TB, r *borgtest.Repository) *Freeze {
	t.Helper()
	f, err := Take(t.Context(), r.Path, options(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { thaw(t, f) })
	return f
}

func thaw(t testing.TB, f *Freeze) map[string]Times {
	t.Helper()
	moved, err := f.Thaw()
	if err != nil {
		t.Error(err)
	}
	for _, left := range []string{Folder, "lock.exclusive", "lock.roster"} {
		if _, err := os.Lstat(filepath.Join(f.repository, left)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is left behind: %v", left, err)
		}
	}
	return moved
}

// copyOf copies the picture, and nothing but the picture, as a push would.
func copyOf(t *testing.T, f *Freeze) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), "copy")
	err := filepath.WalkDir(f.Root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(f.Root, path)
		if name != "." && !f.Includes(name) {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		if d.IsDir() {
			return os.Mkdir(filepath.Join(to, name), 0o700)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(to, name), b, 0o600)
	})
	if err != nil {
		t.Fatal(err)
	}
	return to
}

// initSmall makes a repository with small segments, so that there are many.
func initSmall(t *testing.T, encryption string) *borgtest.Repository {
	r := borgtest.Init(t, t.TempDir(), "r", encryption)
	r.Set(t, "max_segment_size", "300000")
	return r
}

func TestPictureIsTheRepository(t *testing.T) {
	for _, encryption := range []string{"none", "repokey"} {
		t.Run(encryption, func(t *testing.T) {
			t.Parallel()
			r := initSmall(t, encryption)
			r.Fill(t, 6, 200_000)
			r.Create(t, "one")
			r.Fill(t, 3, 200_000)
			r.Create(t, "two")

			f := take(t, r)
			if f.Held || f.Locked <= 0 {
				t.Fatalf("not linked: %+v", f)
			}
			before := copyOf(t, f)
			kept := filepath.Join(t.TempDir(), "source")
			if out, err := exec.Command("cp", "-a", r.Source, kept).CombinedOutput(); err != nil {
				t.Fatalf("%s", out)
			}

			// Borg goes on: it writes, deletes and moves, and is not held up.
			r.Fill(t, 3, 200_000)
			r.Create(t, "three")
			r.Run(t, "delete", r.Path+"::one")
			r.Run(t, "compact", "--threshold=0", r.Path)

			after := copyOf(t, f)
			if out, err := exec.Command("diff", "-r", before, after).CombinedOutput(); err != nil {
				t.Errorf("the picture changed:\n%s", out)
			}
			r.Verify(t, after, map[string]string{"two": kept})
			thaw(t, f)
			r.Run(t, "check", r.Path)
		})
	}
}

// A borg that was killed leaves segments whose numbers the next one uses again.
func TestUncommittedSegmentsAreLeftOut(t *testing.T) {
	t.Parallel()
	r := initSmall(t, "none")
	r.Fill(t, 2, 200_000)
	r.Create(t, "one")
	committedBefore, err := listSegments(r.Path)
	if err != nil {
		t.Fatal(err)
	}
	cutCreate(t, r)
	all, err := listSegments(r.Path)
	if err != nil {
		t.Fatal(err)
	}
	if len(all) <= len(committedBefore) {
		t.Fatal("borg wrote no segment before it was killed: the test tests nothing")
	}
	f := take(t, r)
	in, err := listSegments(f.Root)
	if err != nil {
		t.Fatal(err)
	}
	if last := in[len(in)-1].number; len(in) != len(committedBefore) || last != f.Transaction || last != committedBefore[len(committedBefore)-1].number {
		t.Errorf("picture has %d segments up to %d, committed are %d", len(in), last, len(committedBefore))
	}
	r.Verify(t, copyOf(t, f), map[string]string{"one": r.Source})
}

// cutCreate starts a borg create, lets it write some segments, and kills it.
func cutCreate(t *testing.T, r *borgtest.Repository) {
	t.Helper()
	c := r.Command("create", r.Path+"::cut", "-")
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	// Borg reads on only when it has stored what it read, but for one buffer of 8
	// MiB: when this write returns, whole segments are on the disk.
	b := make([]byte, 24<<20)
	rand.NewChaCha8([32]byte{9}).Read(b)
	if _, err := in.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := c.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	c.Wait()
}

// Between a commit and its index there is an instant in which borg can be cut.
// Its next run takes the commit for done, and so do we.
func TestCommitWithoutIndex(t *testing.T) {
	t.Parallel()
	r := initSmall(t, "none")
	r.Fill(t, 2, 200_000)
	r.Create(t, "one")
	old := t.TempDir()
	index, err := newestIndex(r.Path)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range indexNames(index) {
		b, err := os.ReadFile(filepath.Join(r.Path, name))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(old, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	r.Fill(t, 2, 200_000)
	r.Create(t, "two")
	newer, err := newestIndex(r.Path)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range indexNames(newer) {
		if err := os.Remove(filepath.Join(r.Path, name)); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range indexNames(index) {
		b, _ := os.ReadFile(filepath.Join(old, name))
		if err := os.WriteFile(filepath.Join(r.Path, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	f := take(t, r)
	if f.Transaction != newer {
		t.Errorf("picture is of transaction %d, want %d", f.Transaction, newer)
	}
	r.Verify(t, copyOf(t, f), map[string]string{"two": r.Source})
}

func TestDamaged(t *testing.T) {
	t.Parallel()
	r := initSmall(t, "none")
	r.Fill(t, 2, 200_000)
	r.Create(t, "one")
	segments, err := listSegments(r.Path)
	if err != nil {
		t.Fatal(err)
	}
	last := filepath.Join(r.Path, segments[len(segments)-1].path)
	if err := os.Truncate(last, segments[len(segments)-1].info.Size()-1); err != nil {
		t.Fatal(err)
	}
	_, err = Take(t.Context(), r.Path, options(t))
	if !errors.Is(err, ErrDamaged) {
		t.Errorf("got %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(r.Path, "lock.*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	if _, err := os.Lstat(filepath.Join(r.Path, Folder)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("freeze is left behind: %v", err)
	}
}

func mount(t *testing.T, dir string, flags uintptr) {
	t.Helper()
	if err := syscall.Mount("none", dir, "tmpfs", flags, "size=64m"); err != nil {
		t.Fatal("mount a tmpfs (needs root, which CI has): ", err)
	}
	t.Cleanup(func() { syscall.Unmount(dir, syscall.MNT_DETACH) })
}

// A data folder on another file system: no hard links, so the lock is held.
func TestHeld(t *testing.T) {
	t.Parallel()
	r := initSmall(t, "none")
	mount(t, filepath.Join(r.Path, "data"), 0)
	r = reinit(t, r)
	r.Fill(t, 2, 200_000)
	r.Create(t, "one")
	cutCreate(t, r)
	f := take(t, r)
	if !f.Held || !strings.Contains(f.Why, "cross-device") {
		t.Fatalf("%+v", f)
	}
	if err := f.Check(); err != nil {
		t.Error(err)
	}
	if out, err := r.Command("create", "--lock-wait=0", r.Path+"::two", r.Source).CombinedOutput(); err == nil {
		t.Errorf("borg wrote while the lock was to be held:\n%s", out)
	}
	r.Verify(t, copyOf(t, f), map[string]string{"one": r.Source})
	r.Run(t, "break-lock", r.Path)
	if err := f.Check(); !errors.Is(err, borglock.ErrBroken) {
		t.Errorf("Check after break-lock: %v", err)
	}
	if _, err := f.Thaw(); !errors.Is(err, borglock.ErrBroken) {
		t.Errorf("Thaw after break-lock: %v", err)
	}
}

// reinit makes a new repository whose data folder is the mounted one.
func reinit(t *testing.T, old *borgtest.Repository) *borgtest.Repository {
	r := initSmall(t, "none")
	if out, err := exec.Command("cp", "-a", r.Path+"/.", old.Path).CombinedOutput(); err != nil {
		t.Fatalf("%s", out)
	}
	r.Path = old.Path
	return r
}

func TestReadOnly(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	mount(t, dir, 0)
	r := borgtest.Init(t, dir, "r", "none")
	r.Fill(t, 2, 1000)
	r.Create(t, "one")
	if err := syscall.Mount("none", dir, "", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	f := take(t, r)
	if !f.Held || f.Check() != nil {
		t.Errorf("%+v %v", f, f.Check())
	}
	r.Verify(t, copyOf(t, f), map[string]string{"one": r.Source})
}

func TestLeftoverOfACrash(t *testing.T) {
	t.Parallel()
	r := initSmall(t, "none")
	r.Fill(t, 2, 200_000)
	r.Create(t, "one")
	crashed := take(t, r)
	frozen := map[string]int64{} // as a cache would know the files
	for name := range crashed.was {
		info, err := os.Lstat(filepath.Join(crashed.Root, name))
		if err != nil {
			t.Fatal(err)
		}
		_, frozen[name] = inodeOf(info)
	}
	if _, err := Take(t.Context(), r.Path, options(t)); err == nil || !strings.Contains(err.Error(), "another pusher") {
		t.Errorf("second freeze of the same repository: %v", err)
	}
	crashed.folder.Close() // what the kernel does when a process dies
	if err := os.WriteFile(filepath.Join(crashed.Root, "garbage"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r.Fill(t, 1, 200_000)
	r.Create(t, "two")
	f := take(t, r)
	r.Verify(t, copyOf(t, f), map[string]string{"two": r.Source})
	known := 0
	for name, was := range f.was {
		if t, ok := frozen[name]; ok && strings.HasPrefix(name, "data/") {
			known++
			if t != was {
				known = -1 << 20
			}
		}
	}
	if known <= 0 {
		t.Errorf("change times were not carried over the crash: %d", known)
	}
	crashed.folder = nil
}

// Change times follow a file through freezing and thawing, and break when
// somebody else touches it.
func TestTimes(t *testing.T) {
	t.Parallel()
	r := initSmall(t, "none")
	r.Fill(t, 2, 200_000)
	r.Create(t, "one")
	f := take(t, r)
	changed := map[string]int64{}
	for name := range f.was {
		info, err := os.Lstat(filepath.Join(f.Root, name))
		if err != nil {
			t.Fatal(err)
		}
		_, changed[name] = inodeOf(info)
	}
	moved := thaw(t, f)
	if len(moved) != len(changed) || len(moved) == 0 {
		t.Errorf("thaw speaks of %d files, frozen were %d", len(moved), len(changed))
	}
	again := take(t, r)
	for name, m := range moved {
		if m.Before != changed[name] {
			t.Errorf("%s: changed at %d while frozen, thaw says %d", name, changed[name], m.Before)
		}
		if again.Was(name) != m.After {
			t.Errorf("%s: thawed at %d, next freeze saw %d", name, m.After, again.Was(name))
		}
	}
}

func TestLockThatIsNeverReleased(t *testing.T) {
	t.Parallel()
	r := initSmall(t, "none")
	held := filepath.Join(r.Path, "lock.exclusive")
	if err := os.MkdirAll(held, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(held, "elsewhere@1.17-0"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	opt := options(t)
	opt.Wait = 30 * time.Millisecond
	_, err := Take(t.Context(), r.Path, opt)
	var h *borglock.HeldError
	if !errors.As(err, &h) || !strings.Contains(err.Error(), "process 17 of elsewhere@1") {
		t.Errorf("got %v", err)
	}
	if _, err := os.Lstat(filepath.Join(r.Path, Folder)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("freeze is left behind: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Take(ctx, r.Path, opt); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}
