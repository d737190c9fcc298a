package listing

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"farkeep/shared/hint"
	"farkeep/shared/manifest"
)

func write(t testing.TB, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	old := time.Now().Add(-time.Hour) // not racy
	if err := os.Chtimes(path, old, old); err != nil {
		t.Fatal(err)
	}
}

func list(t testing.TB, root string, opt Options) (Result, []manifest.Entry) {
	t.Helper()
	var b bytes.Buffer
	r, err := Write(t.Context(), root, &b, opt)
	if err != nil {
		t.Fatal(err)
	}
	var all []manifest.Entry
	m := manifest.NewReader(&b)
	for {
		e, err := m.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, e)
	}
	if m.Summary() != r.Summary {
		t.Errorf("summary %+v, manifest says %+v", r.Summary, m.Summary())
	}
	return r, all
}

func sum(s string) manifest.Sum {
	h := manifest.NewHash()
	io.WriteString(h, s)
	return manifest.SumOf(h)
}

func TestList(t *testing.T) {
	root := t.TempDir()
	write(t, filepath.Join(root, "a/b"), "one")
	write(t, filepath.Join(root, "a.b"), "two")
	write(t, filepath.Join(root, "a/c/d"), "")
	write(t, filepath.Join(root, "left/out"), "x")
	write(t, filepath.Join(root, "odd \xff name"), "three")
	if err := os.Chmod(filepath.Join(root, "a"), 0o1750); err != nil {
		t.Fatal(err)
	}
	for _, link := range []string{"link", "z"} {
		if err := os.Symlink("/etc/passwd", filepath.Join(root, link)); err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Mkfifo(filepath.Join(root, "pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	r, got := list(t, root, Options{Include: func(name string) bool { return name != "left" }})
	var names []string
	for _, e := range got {
		names = append(names, fmt.Sprintf("%c %s %o %d", e.Kind, e.Path, e.Mode, e.Size))
		if e.Kind == manifest.File {
			content, err := os.ReadFile(filepath.Join(root, e.Path))
			if err != nil || e.Sum != sum(string(content)) {
				t.Errorf("%s: sum %v, %v", e.Path, e.Sum, err)
			}
		}
	}
	want := []string{"D a 750 0", "F a/b 644 3", "D a/c 755 0", "F a/c/d 644 0", "F a.b 644 3", "F odd \xff name 644 5"}
	if d := cmp.Diff(want, names); d != "" {
		t.Error(d)
	}
	if r.Skipped != (Skipped{3, "link", "symbolic link"}) {
		t.Errorf("skipped: %+v", r.Skipped)
	}
}

func TestCache(t *testing.T) {
	root := t.TempDir()
	opt := Options{Cache: filepath.Join(t.TempDir(), "cache")}
	for i := range 50 {
		write(t, filepath.Join(root, fmt.Sprintf("d%d/f%02d", i%3, i)), strings.Repeat("x", i))
	}
	first, before := list(t, root, opt)
	if first.Hashed != 50 {
		t.Errorf("hashed %d files", first.Hashed)
	}
	again, after := list(t, root, opt)
	if again.Hashed != 0 || again.Summary != first.Summary {
		t.Errorf("unchanged: read %d files again", again.Hashed)
	}
	if d := cmp.Diff(before, after); d != "" {
		t.Error(d)
	}

	// Same size, modification time put back: the change time gives it away.
	victim := filepath.Join(root, "d1/f10")
	write(t, victim, strings.Repeat("y", 10))
	if err := os.Remove(filepath.Join(root, "d1/f13")); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(root, "d0/new"), "new")
	changed, _ := list(t, root, opt)
	if changed.Hashed != 2 || changed.Digest == first.Digest || changed.Files != 50 {
		t.Errorf("after three changes: %+v", changed)
	}

	// A change time that the caller moved is none.
	info, err := os.Stat(victim)
	if err != nil {
		t.Fatal(err)
	}
	was := info.Sys().(*syscall.Stat_t).Ctim.Nano()
	if err := os.Link(victim, victim+".link"); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(victim + ".link"); err != nil {
		t.Fatal(err)
	}
	info, _ = os.Stat(victim)
	now := info.Sys().(*syscall.Stat_t).Ctim.Nano()
	told := opt
	told.Was = func(name string) int64 {
		if name == "d1/f10" {
			return was
		}
		return 0
	}
	if r, _ := list(t, root, told); r.Hashed != 0 {
		t.Errorf("a moved change time: read %d files", r.Hashed)
	}
	if now == was {
		t.Fatal("linking did not move the change time: the test tests nothing")
	}
	// Without being told it is a change, and Moved tells the cache for good.
	if err := Moved(opt.Cache, func(name string) (int64, int64, bool) { return now, was, name == "d1/f10" }); err != nil {
		t.Fatal(err)
	}
	if r, _ := list(t, root, opt); r.Hashed != 1 {
		t.Errorf("cache that was told another time: read %d files", r.Hashed)
	}
}

// Files that nothing wrote to are read again in their turn, and one whose bytes
// changed all the same is named, again and again, until somebody does something.
func TestReread(t *testing.T) {
	root := t.TempDir()
	for i := range 60 {
		write(t, filepath.Join(root, fmt.Sprintf("f%02d", i)), strings.Repeat("x", i))
	}
	day := 0
	opt := Options{
		Cache: filepath.Join(t.TempDir(), "cache"), Reread: 20 * 24 * time.Hour,
		Now: func() time.Time { return time.Unix(2e9, 0).Add(time.Duration(day) * 24 * time.Hour) },
	}
	if first, _ := list(t, root, opt); first.Hashed != 60 {
		t.Errorf("hashed %d files", first.Hashed)
	}
	total, busy := int64(0), int64(0)
	for day = 1; day <= 20; day++ {
		r, _ := list(t, root, opt)
		if day < 10 && r.Hashed != 0 {
			t.Errorf("day %d: read %d files again", day, r.Hashed)
		}
		total += r.Hashed
		busy = max(busy, r.Hashed)
	}
	if total < 60 || total > 80 || busy > 20 {
		t.Errorf("%d files were read again in 20 days, %d of them on one", total, busy)
	}

	// The disk gives back something else: the cache knows another sum than the file has.
	victim := filepath.Join(root, "f33")
	f, old, err := openCache(opt.Cache)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	c, err := newCache(opt.Cache)
	if err != nil {
		t.Fatal(err)
	}
	for r, err := old.next(); err == nil; r, err = old.next() {
		if r.path == "f33" {
			r.sum = sum("what was written")
		}
		c.add(r)
	}
	if err := c.commit(); err != nil {
		t.Fatal(err)
	}
	day += 20
	for range 3 {
		_, err := Write(t.Context(), root, io.Discard, opt)
		if !errors.Is(err, ErrRotten) || !strings.Contains(err.Error(), victim[len(root)+1:]) || !strings.Contains(hint.Of(err), "smartctl") {
			t.Fatalf("got %v", err)
		}
	}
	// A clock that went back reads more, never less.
	day = -100
	if _, err := Write(t.Context(), root, io.Discard, opt); !errors.Is(err, ErrRotten) {
		t.Errorf("with a clock that went back: %v", err)
	}
	old2 := time.Now().Add(-time.Hour)
	if err := os.Chtimes(victim, old2, old2); err != nil {
		t.Fatal(err)
	}
	if _, err := Write(t.Context(), root, io.Discard, opt); err != nil {
		t.Errorf("somebody touched it: %v", err)
	}
}

func TestDamagedCacheIsNoCache(t *testing.T) {
	root := t.TempDir()
	opt := Options{Cache: filepath.Join(t.TempDir(), "cache")}
	write(t, filepath.Join(root, "a"), "1")
	write(t, filepath.Join(root, "b"), "2")
	want, _ := list(t, root, opt)
	good, err := os.ReadFile(opt.Cache)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i <= len(good); i += 7 {
		bad := bytes.Clone(good)
		if i == len(good) {
			bad = nil
		} else {
			bad[i] ^= 0x10
		}
		for _, content := range [][]byte{bad, good[:i]} {
			if bytes.Equal(content, good) {
				continue
			}
			if err := os.WriteFile(opt.Cache, content, 0o600); err != nil {
				t.Fatal(err)
			}
			r, _ := list(t, root, opt)
			if r.Digest != want.Digest || r.Hashed != 2 {
				t.Fatalf("damaged at %d: %+v", i, r)
			}
		}
	}
}

func TestFreshFilesAreNotCached(t *testing.T) {
	root := t.TempDir()
	opt := Options{Cache: filepath.Join(t.TempDir(), "cache")}
	if err := os.WriteFile(filepath.Join(root, "a"), []byte("1"), 0o600); err != nil {
		t.Fatal(err)
	}
	future := time.Now().Add(time.Hour)
	if err := os.Chtimes(filepath.Join(root, "a"), future, future); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if r, _ := list(t, root, opt); r.Hashed != 1 {
			t.Errorf("a file that may change without a trace was not read")
		}
	}
}

// A listing that is cut keeps the work it has done.
func TestCutListing(t *testing.T) {
	root := t.TempDir()
	opt := Options{Cache: filepath.Join(t.TempDir(), "cache")}
	const n = 3000
	for i := range n {
		write(t, filepath.Join(root, fmt.Sprintf("f%04d", i)), "x")
	}
	ctx, cancel := context.WithCancel(t.Context())
	read := 0
	cut := opt
	done := make(chan struct{}, 1)
	cut.Read = func(int) {
		select {
		case done <- struct{}{}:
			read++
			if read == n/2 {
				cancel()
			}
			<-done
		default: // the other worker
		}
	}
	if _, err := Write(ctx, root, io.Discard, cut); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	second, _ := list(t, root, opt)
	if second.Hashed == 0 || second.Hashed > n*3/4 {
		t.Errorf("after a cut in the middle %d of %d files were read again", second.Hashed, n)
	}
	// Everything is cached now. A cut before the first file loses none of it.
	ctx, cancel = context.WithCancel(t.Context())
	cancel()
	if _, err := Write(ctx, root, io.Discard, opt); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	if r, _ := list(t, root, opt); r.Hashed != 0 {
		t.Errorf("a cut at once lost %d files of the cache", r.Hashed)
	}
}

func TestErrors(t *testing.T) {
	t.Run("missing root", func(t *testing.T) {
		if _, err := Write(t.Context(), filepath.Join(t.TempDir(), "no"), io.Discard, Options{}); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("impossible name", func(t *testing.T) {
		root := t.TempDir()
		write(t, filepath.Join(root, "new\nline"), "x")
		if _, err := Write(t.Context(), root, io.Discard, Options{}); !errors.Is(err, manifest.ErrPath) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("full disk", func(t *testing.T) {
		root := t.TempDir()
		write(t, filepath.Join(root, "a"), "x")
		if _, err := Write(t.Context(), root, failing{}, Options{}); !errors.Is(err, errFull) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("ever changing", func(t *testing.T) {
		root := t.TempDir()
		path := filepath.Join(root, "log")
		write(t, path, "x")
		opt := Options{Read: func(int) {
			f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
			if err == nil {
				f.WriteString("more")
				f.Close()
			}
		}}
		if _, err := Write(t.Context(), root, io.Discard, opt); !errors.Is(err, ErrChanging) {
			t.Errorf("got %v", err)
		}
	})
}

var errFull = errors.New("full")

type failing struct{}

func (failing) Write([]byte) (int, error) { return 0, errFull }

// Root reads everything, so the test of an unreadable file runs as nobody.
func TestUnreadable(t *testing.T) {
	if root := os.Getenv("LISTING_TEST_ROOT"); root != "" {
		_, err := Write(t.Context(), root, io.Discard, Options{})
		if !errors.Is(err, os.ErrPermission) || !strings.Contains(err.Error(), "secret") {
			t.Errorf("got %v", err)
		}
		return
	}
	root := t.TempDir()
	for dir := root; dir != "/"; dir = filepath.Dir(dir) {
		os.Chmod(dir, 0o755)
	}
	write(t, filepath.Join(root, "open"), "x")
	write(t, filepath.Join(root, "secret"), "x")
	if err := os.Chmod(filepath.Join(root, "secret"), 0o000); err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(t.TempDir(), "test")
	b, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	for dir := filepath.Dir(binary); dir != "/"; dir = filepath.Dir(dir) {
		os.Chmod(dir, 0o755)
	}
	if err := os.WriteFile(binary, b, 0o755); err != nil {
		t.Fatal(err)
	}
	c := exec.Command(binary, "-test.run=^TestUnreadable$")
	c.Env = append(os.Environ(), "LISTING_TEST_ROOT="+root)
	c.Dir = root
	c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if out, err := c.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

func FuzzCache(f *testing.F) {
	dir := f.TempDir()
	root := filepath.Join(dir, "root")
	write(f, filepath.Join(root, "a/b"), "1")
	write(f, filepath.Join(root, "a.b"), "2")
	path := filepath.Join(dir, "cache")
	if _, err := Write(f.Context(), root, io.Discard, Options{Cache: path}); err != nil {
		f.Fatal(err)
	}
	seed, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed[len(cacheMagic) : len(seed)-32])
	f.Add([]byte{cacheEnd})
	f.Add([]byte{cacheRecord, 0, 255, 255, 255, 255, 15})
	f.Fuzz(func(t *testing.T, body []byte) {
		// Even with a right sum, records are bounded and in a form that we write.
		c := &cacheReader{r: bufio.NewReader(bytes.NewReader(body))}
		for {
			r, err := c.next()
			if err != nil {
				if !errors.Is(err, io.EOF) && !errors.Is(err, errCache) {
					t.Fatal(err)
				}
				return
			}
			if len(r.path) > manifest.MaxPath {
				t.Fatalf("a path of %d bytes", len(r.path))
			}
		}
	})
}
