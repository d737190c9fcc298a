package borglock

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"farkeep/pusher/borgtest"
)

func options(t *testing.T) Options {
	id, err := HostID(t.Context(), os.Getenv)
	if err != nil {
		t.Fatal(err)
	}
	return Options{HostID: id, Journal: filepath.Join(t.TempDir(), "journal")}
}

func mustShared(t *testing.T, repository string, opt Options) *Lock {
	t.Helper()
	l, err := Shared(t.Context(), repository, opt)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// noLock fails if anything of a lock is left in the repository.
func noLock(t *testing.T, repository string) {
	t.Helper()
	left, err := filepath.Glob(filepath.Join(repository, "lock.*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
}

func deadPID(t *testing.T) int {
	t.Helper()
	c := exec.Command("true")
	if err := c.Run(); err != nil {
		t.Fatal(err)
	}
	return c.Process.Pid
}

func TestHostIDIsBorgs(t *testing.T) {
	r := borgtest.Init(t, t.TempDir(), "r", "none")
	// with-lock shows the lock that borg itself takes, while it holds it.
	out := r.Run(t, "with-lock", r.Path, "ls", filepath.Join(r.Path, exclusiveName))
	e, ok := parseFileName(strings.TrimSpace(out))
	if !ok {
		t.Fatalf("borg's own lock %q does not parse", out)
	}
	if got := options(t).HostID; got != e.Host {
		t.Errorf("HostID = %q, borg says %q", got, e.Host)
	}
}

func TestBorgRespectsOurLock(t *testing.T) {
	r := borgtest.Init(t, t.TempDir(), "r", "none")
	r.Fill(t, 2, 1000)
	l := mustShared(t, r.Path, options(t))
	out, err := r.Command("create", "--lock-wait=0", r.Path+"::a", r.Source).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "Failed to create/acquire the lock") {
		t.Errorf("borg create wrote under our lock: %v\n%s", err, out)
	}
	r.Run(t, "list", r.Path) // a reader goes on
	if err := l.Held(); err != nil {
		t.Error(err)
	}

	// A writer that waits gets in as soon as we leave.
	waiting := r.Command("create", "--lock-wait=60", r.Path+"::a", r.Source)
	if err := waiting.Start(); err != nil {
		t.Fatal(err)
	}
	if err := l.Release(); err != nil {
		t.Error(err)
	}
	if err := waiting.Wait(); err != nil {
		t.Errorf("borg create did not get the lock that we released: %v", err)
	}
	noLock(t, r.Path)
}

func TestWeWaitForBorg(t *testing.T) {
	r := borgtest.Init(t, t.TempDir(), "r", "none")
	fifo := filepath.Join(t.TempDir(), "go")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	// borg holds its exclusive lock until the other end of the pipe is written.
	holder := r.Command("with-lock", r.Path, "cat", fifo)
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	// Opening for writing blocks until cat has opened it: borg has the lock.
	open, err := os.OpenFile(fifo, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}

	opt := options(t)
	_, err = Shared(t.Context(), r.Path, opt)
	var held *HeldError
	if !errors.As(err, &held) || len(held.Holders) != 1 || !held.Alive || held.Holders[0].PID != holder.Process.Pid {
		t.Errorf("Shared under borg's lock: %v", err)
	}
	noJournal(t, opt)

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	opt.Wait = time.Hour
	if _, err := Shared(ctx, r.Path, opt); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled wait: %v", err)
	}

	got := make(chan error, 1)
	go func() {
		opt.Wait = time.Minute
		l, err := Shared(t.Context(), r.Path, opt)
		if err == nil {
			err = l.Release()
		}
		got <- err
	}()
	open.Close()
	if err := holder.Wait(); err != nil {
		t.Error(err)
	}
	if err := <-got; err != nil {
		t.Errorf("lock after borg released it: %v", err)
	}
	noLock(t, r.Path)
	noJournal(t, opt)
}

func noJournal(t *testing.T, opt Options) {
	t.Helper()
	if _, err := os.Stat(opt.Journal); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("journal is still there: %v", err)
	}
}

func TestBorgBreakLock(t *testing.T) {
	r := borgtest.Init(t, t.TempDir(), "r", "none")
	opt := options(t)
	l := mustShared(t, r.Path, opt)
	r.Run(t, "break-lock", r.Path)
	if err := l.Held(); !errors.Is(err, ErrBroken) {
		t.Errorf("Held after break-lock: %v", err)
	}
	if err := l.Release(); !errors.Is(err, ErrBroken) {
		t.Errorf("Release after break-lock: %v", err)
	}
	noLock(t, r.Path)
	noJournal(t, opt)
}

// A pusher that was killed leaves a stale lock, which a real borg recognises.
func TestBorgRemovesTheLockOfADeadPusher(t *testing.T) {
	for _, part := range []string{"roster", "exclusive"} {
		t.Run(part, func(t *testing.T) {
			r := borgtest.Init(t, t.TempDir(), "r", "none")
			e := Entry{Host: options(t).HostID, PID: deadPID(t)}
			if part == "roster" {
				writeRoster(t, r.Path, roster{Shared: []Entry{e}, Exclusive: []Entry{}})
			} else {
				holdExclusive(t, r.Path, e)
			}
			r.Fill(t, 1, 100)
			r.Create(t, "a") // waits one second at most
			noLock(t, r.Path)
		})
	}
}

func writeRoster(t *testing.T, repository string, content roster) {
	t.Helper()
	b, err := json.Marshal(content)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(repository, rosterName), b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func holdExclusive(t *testing.T, repository string, holders ...Entry) {
	t.Helper()
	held := filepath.Join(repository, exclusiveName)
	if err := os.Mkdir(held, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, e := range holders {
		if err := os.WriteFile(filepath.Join(held, e.fileName()), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func TestStale(t *testing.T) {
	opt := options(t)
	ours := func(pid int) Entry { return Entry{Host: opt.HostID, PID: pid} }
	dead, alive := ours(deadPID(t)), ours(os.Getppid())
	elsewhere := Entry{Host: "elsewhere.example@1", PID: dead.PID}
	threaded := Entry{Host: opt.HostID, PID: dead.PID, Thread: 7}
	for _, c := range []struct {
		name      string
		exclusive []Entry
		roster    roster
		free      bool    // the lock can be had
		left      []Entry // shared holders afterwards, without us
	}{
		{name: "nobody", free: true},
		{name: "dead exclusive", exclusive: []Entry{dead}, roster: roster{Exclusive: []Entry{dead}}, free: true},
		{name: "dead shared", roster: roster{Shared: []Entry{dead}}, free: true},
		{name: "living shared", roster: roster{Shared: []Entry{alive}}, free: true, left: []Entry{alive}},
		{name: "shared elsewhere", roster: roster{Shared: []Entry{elsewhere}}, free: true, left: []Entry{elsewhere}},
		{name: "living exclusive", exclusive: []Entry{alive}},
		{name: "exclusive elsewhere", exclusive: []Entry{elsewhere}},
		{name: "thread of a dead process", exclusive: []Entry{threaded}},
		{name: "dead and living", exclusive: []Entry{dead, alive}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			if c.exclusive != nil {
				holdExclusive(t, dir, c.exclusive...)
			}
			writeRoster(t, dir, c.roster)
			l, err := Shared(t.Context(), dir, opt)
			if !c.free {
				var held *HeldError
				if !errors.As(err, &held) {
					t.Fatalf("got %v, want a HeldError", err)
				}
				if names, _ := readNames(filepath.Join(dir, exclusiveName)); len(names) != len(c.exclusive) {
					t.Errorf("took a lock apart that is not stale: left %v", names)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if err := l.Release(); err != nil {
				t.Fatal(err)
			}
			r, err := readRoster(filepath.Join(dir, rosterName))
			if err != nil || len(r.Shared) != len(c.left) || len(c.left) > 0 && r.Shared[0] != c.left[0] {
				t.Errorf("roster afterwards: %+v %v, want shared %v", r, err, c.left)
			}
		})
	}
}

// After a crash of the whole machine the process number may be in use again, and
// borg takes the lock for a living one for ever. The journal knows better.
func TestJournalClearsOurOwnLeftovers(t *testing.T) {
	dir, opt := t.TempDir(), options(t)
	left := Entry{Host: "name-before-the-crash@7", PID: os.Getppid()}
	if err := writeJournal(opt.Journal, []Entry{left}); err != nil {
		t.Fatal(err)
	}
	holdExclusive(t, dir, left)
	writeRoster(t, dir, roster{Shared: []Entry{left}})
	l := mustShared(t, dir, opt)
	if err := l.Release(); err != nil {
		t.Fatal(err)
	}
	noLock(t, dir)
	noJournal(t, opt)
}

func TestEmptyExclusiveFolderIsLeftBehind(t *testing.T) {
	dir, opt := t.TempDir(), options(t)
	holdExclusive(t, dir)
	opt.Wait = time.Minute
	l := mustShared(t, dir, opt)
	if err := l.Release(); err != nil {
		t.Fatal(err)
	}
	noLock(t, dir)
}

func TestUnknownFormsAreLeftAlone(t *testing.T) {
	for name, content := range map[string]string{
		"other fields":   `{"shared": [], "exclusive": [], "future": 1}`,
		"other entries":  `{"shared": [["h", 1]], "exclusive": []}`,
		"absurd process": `{"shared": [["h", -5, 0]], "exclusive": []}`,
		"not a roster":   `[1, 2, 3]`,
	} {
		t.Run(name, func(t *testing.T) {
			dir, opt := t.TempDir(), options(t)
			path := filepath.Join(dir, rosterName)
			if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := Shared(t.Context(), dir, opt); err == nil || !strings.Contains(err.Error(), rosterName) {
				t.Errorf("got %v", err)
			}
			if b, _ := os.ReadFile(path); string(b) != content {
				t.Errorf("roster was changed to %s", b)
			}
			if _, err := os.Stat(filepath.Join(dir, exclusiveName)); !errors.Is(err, fs.ErrNotExist) {
				t.Error("lock.exclusive is left behind")
			}
		})
	}
}

func TestOwnership(t *testing.T) {
	dir, opt := t.TempDir(), options(t)
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root, which CI has")
	}
	if err := os.Chown(dir, 1234, 2345); err != nil {
		t.Fatal(err)
	}
	l := mustShared(t, dir, opt)
	st, err := os.Stat(filepath.Join(dir, rosterName))
	if err != nil {
		t.Fatal(err)
	}
	if sys := st.Sys().(*syscall.Stat_t); sys.Uid != 1234 || sys.Gid != 2345 || st.Mode() != 0o600 {
		t.Errorf("roster belongs to %d:%d, mode %v", sys.Uid, sys.Gid, st.Mode())
	}
	if err := l.Release(); err != nil {
		t.Fatal(err)
	}
}

func TestReadOnly(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("none", dir, "tmpfs", syscall.MS_RDONLY, "size=64k"); err != nil {
		t.Fatal("mount a tmpfs (needs root, which CI has): ", err)
	}
	defer syscall.Unmount(dir, 0)
	if _, err := Shared(t.Context(), dir, options(t)); !errors.Is(err, ErrReadOnly) {
		t.Errorf("got %v", err)
	}
}

func TestCanonical(t *testing.T) {
	hosts := "# 10.0.0.1 box\n127.0.0.1 localhost\n127.0.1.1 box.example.org box # us\nnonsense box\n"
	for name, want := range map[string]string{"box": "box.example.org", "BOX": "box.example.org", "localhost": "localhost", "us": "", "other": ""} {
		if got := canonicalIn([]byte(hosts), name); got != want {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
	}
}

// Whoever owns the repository may swap what was made there a moment ago for a link.
func TestNothingOutsideTheRepositoryIsGivenAway(t *testing.T) {
	outside, repository := t.TempDir(), t.TempDir()
	if err := os.Symlink(outside, filepath.Join(repository, "made")); err != nil {
		t.Fatal(err)
	}
	before, err := os.Stat(outside)
	if err != nil {
		t.Fatal(err)
	}
	o, err := ownerOf(repository)
	if err != nil {
		t.Fatal(err)
	}
	defer o.close()
	o.group = true
	if err := o.create("made/entry", nil); err == nil {
		t.Error("a file was made in another folder")
	}
	if err := o.root.Chmod("made", 0o777); err == nil {
		t.Error("another folder's mode was changed")
	}
	if after, err := os.Stat(outside); err != nil || after.Mode() != before.Mode() {
		t.Errorf("%v, %v", after, err)
	}
	if left, err := os.ReadDir(outside); err != nil || len(left) > 0 {
		t.Errorf("%v, %v", left, err)
	}
}

func FuzzRoster(f *testing.F) {
	f.Add([]byte(`{"exclusive": [["vm@3281355014145", 4711, 0]], "shared": []}`))
	f.Add([]byte(`{"shared": [["a.b@1", 1, 0], ["c@2", 4194304, 15]]}`))
	f.Add([]byte(`{}`))
	f.Add([]byte("\x00\x01"))
	f.Add([]byte(`{"shared": [["a", 1e3, 0]]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parseRoster(b)
		if err != nil {
			return
		}
		// What we write is what we read: nobody's entry is lost or altered.
		dir := t.TempDir()
		path := filepath.Join(dir, rosterName)
		o, err := ownerOf(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer o.close()
		if err := r.write(o); err != nil {
			t.Fatal(err)
		}
		again, err := readRoster(path)
		if err != nil {
			t.Fatalf("our own roster does not parse: %v", err)
		}
		if len(again.Shared) != len(r.Shared) || len(again.Exclusive) != len(r.Exclusive) {
			t.Fatalf("%+v became %+v", r, again)
		}
		for i, e := range r.Shared {
			if again.Shared[i] != e {
				t.Fatalf("%+v became %+v", e, again.Shared[i])
			}
		}
	})
}

func FuzzFileName(f *testing.F) {
	f.Add("vm@3281355014145.4711-0")
	f.Add("a-b.example.org@1.1-ff")
	f.Add("-")
	f.Add("x." + strconv.Itoa(maxPID+1) + "-0")
	f.Fuzz(func(t *testing.T, name string) {
		e, ok := parseFileName(name)
		if !ok {
			return
		}
		if back, ok := parseFileName(e.fileName()); !ok || back != e {
			t.Errorf("%q is %+v, whose name is %q", name, e, e.fileName())
		}
	})
}
