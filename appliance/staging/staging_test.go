package staging

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"farkeep/shared/generations"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"

	"github.com/google/go-cmp/cmp"
	"github.com/pkg/sftp"
	"golang.org/x/sys/unix"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// bench is a disk with a store, and what the keeper does around the staging copies.
type bench struct {
	dir   string
	store *generations.Store
	area  *Area

	mu    sync.Mutex
	words []string // what was said to people
}

func newBench(t testing.TB) *bench {
	t.Helper()
	return openBench(t, tmpfs(t, "128m")) // every commit syncs its file system
}

func openBench(t testing.TB, dir string) *bench {
	t.Helper()
	store, err := generations.Open(dir, generations.Options{Shared: true, Reserve: 1})
	must(t, err)
	t.Cleanup(func() { store.Close() })
	return &bench{dir: dir, store: store, area: New(dir, store, slog.New(slog.DiscardHandler))}
}

// peer is a key that may use every repository, and exists for /photos.
func (b *bench) peer(key string) Peer {
	return Peer{
		Key: key, Sees: func(string) bool { return true }, Named: []string{"photos"},
		Say: func(text string) {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.words = append(b.words, text)
		},
		// No test waits for a connection to be quiet but the one that is about that.
		CommitQuiet: time.Nanosecond, CommitSettle: time.Millisecond,
	}
}

func (b *bench) said() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return strings.Join(b.words, "\n")
}

// client connects. What it returns ends the connection, and waits for that.
func (b *bench) client(t testing.TB, p Peer) (*sftp.Client, func()) {
	t.Helper()
	ours, theirs := net.Pipe()
	done := make(chan error, 1)
	go func() { done <- b.area.Serve(context.Background(), p, theirs) }()
	c, err := sftp.NewClientPipe(ours, ours)
	if err != nil {
		t.Fatal(err, <-done)
	}
	hangUp := sync.OnceFunc(func() {
		ours.Close()
		c.Close()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	t.Cleanup(hangUp)
	return c, hangUp
}

// commit does what the keeper's verb does.
func (b *bench) commit(t testing.TB, p Peer, repository string) (name string, same bool, err error) {
	t.Helper()
	ctx := t.Context()
	f, err := b.area.Freeze(ctx, p, repository)
	if err != nil {
		return "", false, err
	}
	defer f.Release()
	answer, tx, err := b.store.Begin(ctx, f.Request())
	if err != nil {
		return "", false, err
	}
	name, same = answer.Generation, tx == nil
	if tx != nil {
		defer tx.Close()
		if name, err = b.push(ctx, tx, f); err != nil {
			return "", false, errors.Join(err, tx.Abort(ctx), f.Undo(ctx))
		}
	}
	g, err := b.store.Generation(ctx, repository, name)
	if err != nil {
		return "", false, err
	}
	return name, same, f.Committed(ctx, g)
}

func (b *bench) push(ctx context.Context, tx *generations.Transaction, f *Frozen) (string, error) {
	if err := f.Adopt(ctx, tx, false); err != nil {
		return "", err
	}
	list, err := f.List()
	if err != nil {
		return "", err
	}
	defer list.Close()
	answer, err := tx.TakeManifest(ctx, list)
	if err != nil {
		return "", err
	}
	if answer.Need != 0 {
		return "", fmt.Errorf("%d files are missing", answer.Need)
	}
	return tx.Commit(ctx)
}

func (b *bench) mustCommit(t testing.TB, p Peer, repository string) string {
	t.Helper()
	name, _, err := b.commit(t, p, repository)
	must(t, err)
	return name
}

func (b *bench) generation(repository, name string) string {
	return filepath.Join(b.dir, generations.GenerationsFolder, repository, name, generations.FilesFolder)
}

func (b *bench) copy(repository, key string) string {
	return filepath.Join(b.dir, Folder, repository, key, filesFolder)
}

// committed is one file of history as the disk has it.
type committed struct {
	Inode uint64
	Sum   [32]byte
	Mode  uint32
	MTime int64
	Size  int64
}

// witness is history as it was: every file that was ever committed, by path.
type witness map[string]committed

// look adds what is there now, and fails if anything that was there is not as it was.
func (w witness) look(t testing.TB, b *bench) {
	t.Helper()
	now := witness{}
	root := filepath.Join(b.dir, generations.GenerationsFolder)
	must(t, filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Base(p) == ".sequence" {
			return err
		}
		data, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, p)
		now[rel] = committed{st.Ino, sha256.Sum256(data), st.Mode, st.Mtim.Nano(), st.Size}
		return nil
	}))
	for p, was := range w {
		if now[p] != was {
			t.Fatalf("%s was committed as %+v, and is %+v", p, was, now[p])
		}
	}
	maps.Copy(w, now)
}

// put writes a file as clients do.
func put(t testing.TB, c *sftp.Client, name, text string) {
	t.Helper()
	must(t, c.MkdirAll(path.Dir(name)))
	f, err := c.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC)
	must(t, err)
	_, err = io.WriteString(f, text)
	must(t, errors.Join(err, f.Close()))
}

// treeOf is what lies below a folder, folders with a slash at their end.
func treeOf(t testing.TB, dir string) map[string]string {
	t.Helper()
	got := map[string]string{}
	must(t, filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == dir {
			return err
		}
		rel, _ := filepath.Rel(dir, p)
		if d.IsDir() {
			got[rel+"/"] = ""
			return nil
		}
		data, err := os.ReadFile(p)
		got[rel] = string(data)
		return err
	}))
	return got
}

// TestNothingTouchesHistory does to shared files, one by one, everything that SFTP
// can ask for.
func TestNothingTouchesHistory(t *testing.T) {
	then := time.Unix(1_500_000_000, 0)
	for _, tt := range []struct {
		name string
		do   func(t *testing.T, c *sftp.Client)
		want map[string]string // of the next generation, where it differs: "" is gone
	}{
		{"write into it", func(t *testing.T, c *sftp.Client) {
			f, err := c.OpenFile("/photos/a", os.O_WRONLY)
			must(t, err)
			_, err = f.WriteAt([]byte("X"), 1)
			must(t, errors.Join(err, f.Close()))
		}, map[string]string{"a": "oXe of two"}},
		{"open for both, write nothing", func(t *testing.T, c *sftp.Client) {
			f, err := c.OpenFile("/photos/a", os.O_RDWR)
			must(t, err)
			got, err := io.ReadAll(f)
			must(t, errors.Join(err, f.Close()))
			if string(got) != "one of two" {
				t.Errorf("read %q", got)
			}
		}, nil},
		{"truncate at opening", func(t *testing.T, c *sftp.Client) { put(t, c, "/photos/a", "short") }, map[string]string{"a": "short"}},
		{"truncate by setstat", func(t *testing.T, c *sftp.Client) { must(t, c.Truncate("/photos/a", 3)) }, map[string]string{"a": "one"}},
		{"grow by setstat", func(t *testing.T, c *sftp.Client) { must(t, c.Truncate("/photos/a", 12)) }, map[string]string{"a": "one of two\x00\x00"}},
		{"truncate an open handle", func(t *testing.T, c *sftp.Client) {
			f, err := c.OpenFile("/photos/a", os.O_WRONLY)
			must(t, err)
			must(t, errors.Join(f.Truncate(3), f.Close()))
		}, map[string]string{"a": "one"}},
		{"append", func(t *testing.T, c *sftp.Client) {
			f, err := c.OpenFile("/photos/a", os.O_WRONLY|os.O_APPEND)
			must(t, err)
			_, err = f.WriteAt([]byte("!"), 10)
			must(t, errors.Join(err, f.Close()))
		}, map[string]string{"a": "one of two!"}},
		{"times", func(t *testing.T, c *sftp.Client) { must(t, c.Chtimes("/photos/a", then, then)) }, nil},
		{"mode", func(t *testing.T, c *sftp.Client) { must(t, c.Chmod("/photos/a", 0o600)) }, nil},
		{"mode of a folder", func(t *testing.T, c *sftp.Client) { must(t, c.Chmod("/photos/d", 0o500)) }, nil},
		{"remove", func(t *testing.T, c *sftp.Client) { must(t, c.Remove("/photos/a")) }, map[string]string{"a": ""}},
		{"rename over another", func(t *testing.T, c *sftp.Client) { must(t, c.PosixRename("/photos/a", "/photos/d/b")) },
			map[string]string{"a": "", "d/b": "one of two"}},
		{"rename over the same content", func(t *testing.T, c *sftp.Client) { must(t, c.PosixRename("/photos/a", "/photos/twin")) },
			map[string]string{"a": ""}},
		{"rename, then write", func(t *testing.T, c *sftp.Client) {
			must(t, c.Rename("/photos/a", "/photos/z"))
			f, err := c.OpenFile("/photos/z", os.O_WRONLY)
			must(t, err)
			_, err = f.Write([]byte("ONE"))
			must(t, errors.Join(err, f.Close()))
		}, map[string]string{"a": "", "z": "ONE of two"}},
		{"rename its folder", func(t *testing.T, c *sftp.Client) { must(t, c.Rename("/photos/d", "/photos/e")) },
			map[string]string{"d/": "", "d/b": "", "e/": "", "e/b": "two"}},
		{"write to one of two names", func(t *testing.T, c *sftp.Client) { put(t, c, "/photos/twin", "other") }, map[string]string{"twin": "other"}},
		{"handles that stay open while it is replaced", func(t *testing.T, c *sftp.Client) {
			first, err := c.OpenFile("/photos/a", os.O_WRONLY)
			must(t, err)
			second, err := c.OpenFile("/photos/a", os.O_WRONLY)
			must(t, err)
			must(t, c.PosixRename("/photos/d/b", "/photos/a"))
			_, err = first.Write([]byte("lost"))
			must(t, err)
			_, err = second.Write([]byte("lost as well"))
			must(t, errors.Join(err, first.Close(), second.Close()))
		}, map[string]string{"d/b": "", "a": "two"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t)
			p := b.peer("home")
			c, hangUp := b.client(t, p)
			put(t, c, "/photos/a", "one of two")
			put(t, c, "/photos/twin", "one of two")
			put(t, c, "/photos/d/b", "two")
			before := map[string]string{"a": "one of two", "twin": "one of two", "d/": "", "d/b": "two"}
			first := b.mustCommit(t, p, "photos")
			w := witness{}
			w.look(t, b)
			if diff := cmp.Diff(before, treeOf(t, b.generation("photos", first))); diff != "" {
				t.Fatal(diff)
			}

			tt.do(t, c)
			w.look(t, b)
			second := b.mustCommit(t, p, "photos")
			w.look(t, b)
			want := maps.Clone(before)
			for name, text := range tt.want {
				if text == "" && !strings.HasSuffix(name, "/") || before[name] == "" && strings.HasSuffix(name, "/") && name == "d/" {
					delete(want, name)
				} else {
					want[name] = text
				}
			}
			if diff := cmp.Diff(want, treeOf(t, b.generation("photos", second))); diff != "" {
				t.Error(diff)
			}
			// The same again, to what the second generation shares.
			if tt.want == nil {
				tt.do(t, c)
				w.look(t, b)
			}
			hangUp()
			b.accounts(t, "photos", "home")
		})
	}
}

// accounts checks what is remembered of a copy against the disk.
func (b *bench) accounts(t testing.TB, repository, key string) {
	t.Helper()
	id := treeID{repository, key}
	b.area.mu.Lock()
	tr := b.area.trees[id]
	b.area.mu.Unlock()
	if tr == nil || !tr.known {
		return
	}
	var entries, bytes int64
	must(t, filepath.WalkDir(b.copy(repository, key), func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == b.copy(repository, key) {
			return err
		}
		entries++
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		if !d.IsDir() && st.Nlink == 1 {
			bytes += st.Size
		}
		return nil
	}))
	if tr.entries != entries || tr.bytes != bytes || tr.writers != 0 || len(tr.nodes) != 0 || len(tr.changed) != 0 {
		t.Errorf("the copy holds %d entries and %d bytes of its own; remembered are %d and %d, %d writers, %d open files, %d sessions", entries, bytes, tr.entries, tr.bytes, tr.writers, len(tr.nodes), len(tr.changed))
	}
}

// A new copy is the current generation, link by link, and the copy of one key is
// none of another's business.
func TestCopyBeginsFromHistory(t *testing.T) {
	b := newBench(t)
	home, shed := b.peer("home"), b.peer("shed")
	c, _ := b.client(t, home)
	put(t, c, "/photos/d/a", "one")
	put(t, c, "/photos/b", "two")
	name := b.mustCommit(t, home, "photos")
	w := witness{}
	w.look(t, b)

	other, _ := b.client(t, shed)
	if list, err := other.ReadDir("/"); err != nil || len(list) != 1 || list[0].Name() != "photos" {
		t.Errorf("top: %v, %v", list, err)
	}
	if _, err := os.Stat(b.copy("photos", "shed")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a copy was made before somebody wanted it: %v", err)
	}
	if list, err := other.ReadDir("/photos"); err != nil || len(list) != 2 {
		t.Errorf("photos: %v, %v", list, err)
	}
	for _, file := range []string{"d/a", "b"} {
		var theirs, history unix.Stat_t
		must(t, errors.Join(unix.Lstat(filepath.Join(b.copy("photos", "shed"), file), &theirs), unix.Lstat(filepath.Join(b.generation("photos", name), file), &history)))
		if theirs.Ino != history.Ino {
			t.Errorf("%s is not shared with history", file)
		}
	}
	put(t, other, "/photos/b", "theirs")
	w.look(t, b)
	if got := treeOf(t, b.copy("photos", "home")); got["b"] != "two" {
		t.Errorf("another key's copy changed: %v", got)
	}
	if _, same, err := b.commit(t, home, "photos"); !same || err != nil {
		t.Errorf("nothing changed: %v, %v", same, err)
	}
}

// A copy whose making was cut goes on where it stopped, unless there is a newer
// generation.
func TestCutBeginning(t *testing.T) {
	b := newBench(t)
	p := b.peer("home")
	c, hangUp := b.client(t, p)
	for i := range 50 {
		put(t, c, fmt.Sprintf("/photos/%d/%d", i%7, i), fmt.Sprint(i))
	}
	name := b.mustCommit(t, p, "photos")
	want := treeOf(t, b.generation("photos", name))
	hangUp()
	for _, base := range []string{name, "something else"} {
		home := filepath.Dir(b.copy("photos", "shed"))
		must(t, os.RemoveAll(home))
		must(t, os.MkdirAll(filepath.Join(home, newFolder, "0"), 0o700))
		must(t, os.WriteFile(filepath.Join(home, baseFile), []byte(base), 0o600))
		must(t, os.Link(filepath.Join(b.generation("photos", name), "0", "0"), filepath.Join(home, newFolder, "0", "0")))
		if base != name {
			must(t, os.WriteFile(filepath.Join(home, newFolder, "old"), nil, 0o600))
		}
		again := openBench(t, b.dir)
		c, hangUp := again.client(t, again.peer("shed"))
		_, err := c.ReadDir("/photos")
		must(t, err)
		if diff := cmp.Diff(want, treeOf(t, again.copy("photos", "shed"))); diff != "" {
			t.Errorf("begun from %q: %s", base, diff)
		}
		hangUp()
	}
}

// A file that is open for writing is never committed: the handle would lead into
// history.
func TestCommitWhileWriting(t *testing.T) {
	b := newBench(t)
	p := b.peer("home")
	c, _ := b.client(t, p)
	put(t, c, "/photos/a", "one")
	f, err := c.OpenFile("/photos/a", os.O_WRONLY)
	must(t, err)
	if _, _, err := b.commit(t, p, "photos"); !errors.Is(err, ErrWriting) || !strings.Contains(err.Error(), "1 files are open for writing") {
		t.Errorf("commit of a file that is being written: %v", err)
	}
	must(t, f.Close())
	// A client between two files is still uploading.
	slow := p
	slow.CommitQuiet, slow.CommitSettle = time.Hour, time.Millisecond
	if _, _, err := b.commit(t, slow, "photos"); !errors.Is(err, ErrWriting) || !strings.Contains(err.Error(), "changed something") {
		t.Errorf("commit under a client that is busy: %v", err)
	}
	name := b.mustCommit(t, p, "photos")
	w := witness{}
	w.look(t, b)

	// And during a commit nobody writes.
	frozen, err := b.area.Freeze(t.Context(), p, "photos")
	must(t, err)
	for what, err := range map[string]error{
		"open":   func() error { _, err := c.OpenFile("/photos/a", os.O_WRONLY); return err }(),
		"create": func() error { _, err := c.Create("/photos/x"); return err }(),
		"rename": c.Rename("/photos/a", "/photos/x"), "remove": c.Remove("/photos/a"), "mkdir": c.Mkdir("/photos/x"),
		"truncate": c.Truncate("/photos/a", 0), "chmod": c.Chmod("/photos/a", 0o600),
	} {
		if err == nil || !strings.Contains(err.Error(), "is being committed") {
			t.Errorf("%s during a commit: %v", what, err)
		}
	}
	if _, _, err := b.commit(t, p, "photos"); !errors.Is(err, ErrWriting) {
		t.Errorf("a second commit at once: %v", err)
	}
	if err := b.area.Discard(t.Context(), p, "photos"); !errors.Is(err, ErrWriting) {
		t.Errorf("abort during a commit: %v", err)
	}
	if _, err := c.ReadDir("/photos"); err != nil {
		t.Errorf("reading during a commit: %v", err)
	}
	frozen.Release()
	put(t, c, "/photos/a", "two")
	w.look(t, b)
	if got := treeOf(t, b.generation("photos", name)); got["a"] != "one" {
		t.Errorf("history: %v", got)
	}
}

// Clients that write as fast as they can, and commits between them: no bytes of
// theirs ever reach a committed file.
func TestWritersAndCommitsAtOnce(t *testing.T) {
	b := newBench(t)
	p := b.peer("home")
	p.CommitSettle = 20 * time.Millisecond
	setup, hangUp := b.client(t, p)
	for i := range 8 {
		put(t, setup, fmt.Sprintf("/photos/%d", i), strings.Repeat("x", 100_000))
	}
	hangUp()
	b.mustCommit(t, p, "photos")
	w := witness{}
	w.look(t, b)
	var stop atomic.Bool
	var writers sync.WaitGroup
	for n := range 3 {
		c, _ := b.client(t, p)
		writers.Go(func() {
			for i := 0; !stop.Load(); i++ {
				name := fmt.Sprintf("/photos/%d", (i+n)%8)
				f, err := c.OpenFile(name, os.O_WRONLY)
				if err != nil {
					continue // being committed, or replaced
				}
				f.WriteAt([]byte(strings.Repeat("y", 50_000)), int64(i%50_000))
				if i%3 == 0 {
					c.PosixRename(name, fmt.Sprintf("/photos/%d", (i+n+1)%8))
				}
				f.Close()
			}
		})
	}
	done := 0
	for limit := time.Now().Add(5 * time.Second); done < 10 && (done == 0 || time.Now().Before(limit)); {
		_, _, err := b.commit(t, p, "photos")
		switch {
		case err == nil:
			done++
		case !errors.Is(err, ErrWriting):
			t.Errorf("commit: %v", err)
			done = 10
		}
		w.look(t, b)
	}
	stop.Store(true)
	writers.Wait()
	w.look(t, b)
}

func TestRefusals(t *testing.T) {
	b := newBench(t)
	p := b.peer("home")
	p.Sees = func(name string) bool { return name == "photos" || name == "docs" }
	c, _ := b.client(t, p)
	put(t, c, "/photos/a", "one")
	b.mustCommit(t, p, "photos")
	must(t, c.Mkdir("/docs"))
	secret := b.peer("other")
	o, _ := b.client(t, secret)
	put(t, o, "/secret/a", "theirs")
	b.mustCommit(t, secret, "secret")
	w := witness{}
	w.look(t, b)
	// Somebody who had the disk in hand put links into the copy.
	outside := filepath.Join(t.TempDir(), "outside")
	must(t, os.WriteFile(outside, []byte("outside"), 0o644))
	copied := b.copy("photos", "home")
	must(t, os.Symlink(outside, copied+"/link"))
	must(t, os.Symlink(filepath.Dir(outside), copied+"/dir"))
	must(t, unix.Mkfifo(copied+"/pipe", 0o600))

	create := func(name string) error { _, err := c.Create(name); return err }
	open := func(name string) error { _, err := c.Open(name); return err }
	for _, tt := range []struct {
		name string
		err  error
		want string
	}{
		{"a link", c.Symlink("/photos/a", "/photos/l"), "permission denied"},
		{"a hard link", c.Link("/photos/a", "/photos/h"), "permission denied"},
		{"into the top", create("/x"), "not exist"},
		{"into another's repository", create("/secret/x"), "not exist"},
		{"another's file", open("/secret/a"), "not exist"},
		{"a repository of another name", c.Mkdir("/mine"), "not exist"},
		{"no name", c.Mkdir("/.hidden"), "not exist"},
		{"out by dots", create("/photos/../../etc/x"), "not exist"},
		{"remove the repository", c.RemoveDirectory("/photos"), "permission denied"},
		{"rename the repository", c.Rename("/photos", "/docs/p"), "permission denied"},
		{"from one to another", c.Rename("/photos/a", "/docs/a"), "another"},
		{"over it, without replace", c.Rename("/photos/a", "/photos/link"), "something of that name"},
		{"a newline", create("/photos/a\nb"), "newline"},
		{"a long name", create("/photos/" + strings.Repeat("n", 256)), "256 bytes"},
		{"too deep", c.Mkdir("/photos" + strings.Repeat("/d", manifest.MaxDepth+1)), "deep"},
		{"a file as a folder", create("/photos/a/b"), "not exist"},
		{"a folder as a file", create("/docs"), "permission denied"},
		{"not empty", func() error { must(t, c.MkdirAll("/photos/f/g")); return c.RemoveDirectory("/photos/f") }(), "not empty"},
		{"write through a planted link", create("/photos/link"), "permission denied"},
		{"read through a planted link", open("/photos/link"), "permission denied"},
		{"below a planted link", open("/photos/dir/outside"), "permission denied"},
		{"a planted pipe", open("/photos/pipe"), ""},
		{"change a planted link", c.Chmod("/photos/link", 0o777), "permission denied"},
		{"an owner", c.Chown("/photos/a", 0, 0), "permission denied"},
		{"more than a file can be", c.Truncate("/photos/a", 1<<62), "bytes"},
		{"a hole larger than the disk", c.Truncate("/photos/a", 15<<40), "no space left"},
	} {
		if tt.err == nil || !strings.Contains(tt.err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, tt.err, tt.want)
		}
	}
	for _, want := range []string{"links are not kept", "the folders at the top are the repositories", "a link or a mount in the path", "owners are not kept"} {
		if !strings.Contains(b.said(), want) {
			t.Errorf("nobody was told %q, but:\n%s", want, b.said())
		}
	}
	if data, err := os.ReadFile(outside); string(data) != "outside" || err != nil {
		t.Errorf("outside: %q, %v", data, err)
	}
	if list, err := c.ReadDir("/"); err != nil || len(list) != 2 || list[0].Name() != "docs" || list[1].Name() != "photos" {
		t.Errorf("a key that may use photos and docs sees %v, %v", list, err)
	}
	if _, _, err := b.commit(t, p, "photos"); err == nil || !strings.Contains(err.Error(), "neither a file nor a folder") {
		t.Errorf("commit of planted things: %v", err)
	}
	w.look(t, b)
}

// A folder cannot be moved to where what lies in it would be too deep for any list.
func TestMovesStayShallow(t *testing.T) {
	b := newBench(t)
	p := b.peer("home")
	c, _ := b.client(t, p)
	deep := "/photos/x" + strings.Repeat("/d", 60)
	must(t, c.MkdirAll(deep))
	must(t, c.MkdirAll("/photos/y"+strings.Repeat("/e", 50)))
	if err := c.Rename("/photos/x", "/photos/y"+strings.Repeat("/e", 50)+"/x"); err == nil || !strings.Contains(err.Error(), "too deep") {
		t.Errorf("moved to depth 112: %v", err)
	}
	must(t, c.Rename("/photos/x", "/photos/y/x"))
	b.mustCommit(t, p, "photos")
}

// What is open at once, and how many connect, is bounded.
func TestBounds(t *testing.T) {
	b := newBench(t)
	p := b.peer("home")
	c, hangUp := b.client(t, p)
	put(t, c, "/photos/a", "one")
	var open []*sftp.File
	for range MaxOpen {
		f, err := c.Open("/photos/a")
		must(t, err)
		open = append(open, f)
	}
	if _, err := c.OpenFile("/photos/a", os.O_WRONLY); err == nil || !strings.Contains(err.Error(), "open already") {
		t.Errorf("one file too many: %v", err)
	}
	must(t, open[0].Close())
	f, err := c.OpenFile("/photos/a", os.O_WRONLY)
	must(t, err)
	must(t, f.Close())
	for range MaxPerKey - 1 {
		b.client(t, p)
	}
	ours, theirs := net.Pipe()
	defer ours.Close()
	if err := b.area.Serve(t.Context(), p, theirs); err == nil || !strings.Contains(err.Error(), "too many sftp connections") {
		t.Errorf("one connection too many: %v", err)
	}
	hangUp()
	b.client(t, p)
}

// The key's quota counts its generations and its copies; what is refused leaves
// the copy usable.
func TestQuota(t *testing.T) {
	b := newBench(t)
	p := b.peer("home")
	p.Quota = 1 << 20
	c, _ := b.client(t, p)
	put(t, c, "/photos/a", strings.Repeat("a", 400_000))
	b.mustCommit(t, p, "photos")
	put(t, c, "/docs/b", strings.Repeat("b", 400_000))
	f, err := c.Create("/docs/c")
	must(t, err)
	if _, err := f.Write(make([]byte, 400_000)); err == nil || !strings.Contains(err.Error(), "disk quota exceeded: key home") {
		t.Errorf("over the quota: %v", err)
	}
	must(t, f.Close())
	if !strings.Contains(b.said(), "disk quota exceeded: key home may have 1048576 bytes") {
		t.Errorf("said: %s", b.said())
	}
	must(t, c.Remove("/docs/c"))
	// Breaking a link needs room too.
	put(t, c, "/docs/d", strings.Repeat("d", 100_000))
	if err := c.Chmod("/photos/a", 0o600); err == nil || !strings.Contains(err.Error(), "quota") {
		t.Errorf("a copy of a shared file, over the quota: %v", err)
	}
	vfs, err := c.StatVFS("/docs")
	must(t, err)
	if vfs.TotalSpace() > 1<<20 || vfs.FreeSpace() > 200_000 {
		t.Errorf("df: %d of %d bytes", vfs.FreeSpace(), vfs.TotalSpace())
	}
	must(t, c.Remove("/docs/b"))
	must(t, c.Chmod("/photos/a", 0o600))
	b.mustCommit(t, p, "docs")

	// Another run of the keeper counts the same from the disk, whatever comes first.
	again := openBench(t, b.dir)
	c, _ = again.client(t, p)
	if err := c.Chmod("/docs/d", 0o600); err != nil {
		t.Errorf("a copy of a shared file, within the quota: %v", err)
	}
	f, err = c.Create("/photos/more")
	must(t, err)
	if _, err := f.Write(make([]byte, 400_000)); err == nil || !strings.Contains(err.Error(), "quota") {
		t.Errorf("over the quota after a restart: %v", err)
	}
	must(t, f.Close())
}

// tmpfs mounts a file system of that size; a sync of it costs nothing.
func tmpfs(t testing.TB, size string) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("this test mounts a tmpfs: run it as root")
	}
	dir := t.TempDir()
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size))
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

// A disk that is full answers in words, and history stays as it is.
func TestDiskFull(t *testing.T) {
	b := openBench(t, tmpfs(t, "4m"))
	p := b.peer("home")
	c, hangUp := b.client(t, p)
	put(t, c, "/photos/a", strings.Repeat("a", 1<<20))
	b.mustCommit(t, p, "photos")
	w := witness{}
	w.look(t, b)
	f, err := c.Create("/photos/b")
	must(t, err)
	if _, err := f.ReadFrom(io.LimitReader(zeros{}, 8<<20)); err == nil || !strings.Contains(err.Error(), "no space left") {
		t.Errorf("8 MiB onto a disk of 4: %v", err)
	}
	f.Close()
	if !strings.Contains(b.said(), "no space left on the appliance's disk") || !strings.Contains(b.said(), "nothing is deleted to make room") {
		t.Errorf("said: %s", b.said())
	}
	w.look(t, b)
	must(t, c.Remove("/photos/b"))
	put(t, c, "/photos/b", strings.Repeat("b", 1<<20))
	b.mustCommit(t, p, "photos")
	w.look(t, b)
	hangUp()
	b.accounts(t, "photos", "home")
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// A connection that asks for nothing ends, and its files are closed: a client that
// is gone must not keep a repository from being committed.
func TestSilentPeer(t *testing.T) {
	b := newBench(t)
	p := b.peer("home")
	// A machine that is busy may be the one that is silent.
	for p.IdleTimeout = 50 * time.Millisecond; ; p.IdleTimeout *= 2 {
		c, _ := b.client(t, p)
		_, err := c.Create("/photos/a")
		c.Wait() // the other side hangs up
		if err == nil {
			break
		}
	}
	if !strings.Contains(b.said(), "nothing was asked for") {
		t.Errorf("said: %s", b.said())
	}
	b.mustCommit(t, b.peer("home"), "photos")
}

// Modes and times of a generation are the client's, and what was never touched keeps
// those of its first push.
func TestModesAndTimes(t *testing.T) {
	b := newBench(t)
	p := b.peer("home")
	c, _ := b.client(t, p)
	then := time.Unix(1_400_000_000, 0)
	put(t, c, "/photos/run", "#!")
	put(t, c, "/photos/secret", "s")
	must(t, errors.Join(c.Chmod("/photos/run", 0o755), c.Chtimes("/photos/run", then, then), c.Chmod("/photos/secret", 0)))
	if _, err := c.Open("/photos/secret"); err != nil && os.Getuid() == 0 {
		t.Logf("read of a file without rights: %v", err)
	}
	if _, err := c.OpenFile("/photos/secret", os.O_WRONLY); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("write to a file without rights: %v", err)
	}
	first := b.mustCommit(t, p, "photos")
	modes := func(name string) map[string]manifest.Entry {
		g, err := b.store.Generation(t.Context(), "photos", name)
		must(t, err)
		tree, err := b.store.Tree(g)
		must(t, err)
		defer tree.Close()
		list, closing, err := tree.List()
		must(t, err)
		defer closing()
		all := map[string]manifest.Entry{}
		for {
			e, err := list.Next()
			if errors.Is(err, io.EOF) {
				return all
			}
			must(t, err)
			all[e.Path] = e
		}
	}
	got := modes(first)
	if e := got["run"]; e.Mode != 0o755 || e.MTime != then.UnixNano() {
		t.Errorf("run: %+v", e)
	}
	if e := got["secret"]; e.Mode != 0 {
		t.Errorf("secret: %+v", e)
	}
	put(t, c, "/photos/new", "n")
	if e := modes(b.mustCommit(t, p, "photos")); e["secret"].Mode != 0 || e["run"].Mode != 0o755 || e["new"].Mode != 0o644 {
		t.Errorf("a day later: %+v", e)
	}
}

// A file whose generations have expired is the client's again: commits made it
// read-only, and it must not stay so.
func TestExpiredFilesCanBeWritten(t *testing.T) {
	b := newBench(t)
	p, other := b.peer("home"), b.peer("other")
	c, _ := b.client(t, p)
	put(t, c, "/photos/a", "one")
	put(t, c, "/photos/b", "two")
	first := b.mustCommit(t, p, "photos")
	d, _ := b.client(t, other)
	put(t, d, "/photos/a", "of another key")
	must(t, d.Remove("/photos/b"))
	second := b.mustCommit(t, other, "photos")
	must(t, b.store.Remove(t.Context(), "photos", first))
	for name, flags := range map[string]int{"/photos/a": os.O_WRONLY | os.O_TRUNC, "/photos/b": os.O_RDWR} {
		if info, err := c.Stat(name); err != nil || info.Mode().Perm() != 0o644 {
			t.Errorf("%s is shown as %v, %v", name, info, err)
		}
		f, err := c.OpenFile(name, flags)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if _, err := f.Write([]byte("new")); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		must(t, f.Close())
	}
	if got := treeOf(t, b.generation("photos", second)); got["a"] != "of another key" {
		t.Errorf("history: %v", got)
	}
}

// A commit that is cut after files were adopted loses no mode and no byte, and the
// next one succeeds.
func TestCutCommit(t *testing.T) {
	for _, tt := range []struct {
		name string
		cut  func(t *testing.T, b *bench, tx *generations.Transaction, f *Frozen)
	}{
		{"power", func(t *testing.T, b *bench, tx *generations.Transaction, f *Frozen) {}},
		{"power, after the list", func(t *testing.T, b *bench, tx *generations.Transaction, f *Frozen) {
			list, err := f.List()
			must(t, err)
			defer list.Close()
			_, err = tx.TakeManifest(t.Context(), list)
			must(t, err)
		}},
		{"refused", func(t *testing.T, b *bench, tx *generations.Transaction, f *Frozen) {
			must(t, errors.Join(tx.Abort(t.Context()), f.Undo(t.Context())))
			var st unix.Stat_t
			must(t, unix.Lstat(b.copy("photos", "home")+"/secret", &st))
			if st.Mode&0o777 != 0o600 || st.Nlink != 1 {
				t.Errorf("after a commit that was refused: mode %o, %d names", st.Mode&0o777, st.Nlink)
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t)
			p := b.peer("home")
			c, hangUp := b.client(t, p)
			put(t, c, "/photos/secret", "s")
			put(t, c, "/photos/other", "o")
			must(t, c.Chmod("/photos/secret", 0o600))
			hangUp()
			f, err := b.area.Freeze(t.Context(), p, "photos")
			must(t, err)
			_, tx, err := b.store.Begin(t.Context(), f.Request())
			must(t, err)
			must(t, f.Adopt(t.Context(), tx, false))
			tt.cut(t, b, tx, f)
			must(t, tx.Close())
			f.Release()

			again := openBench(t, b.dir)
			c, hangUp = again.client(t, p)
			put(t, c, "/photos/other", "written after the cut")
			hangUp()
			name := again.mustCommit(t, p, "photos")
			if diff := cmp.Diff(map[string]string{"secret": "s", "other": "written after the cut"}, treeOf(t, again.generation("photos", name))); diff != "" {
				t.Error(diff)
			}
			g, err := again.store.Generation(t.Context(), "photos", name)
			must(t, err)
			tree, err := again.store.Tree(g)
			must(t, err)
			defer tree.Close()
			list, closing, err := tree.List()
			must(t, err)
			defer closing()
			for {
				e, err := list.Next()
				if errors.Is(err, io.EOF) {
					break
				}
				must(t, err)
				if e.Path == "secret" && e.Mode != 0o600 {
					t.Errorf("secret has mode %o", e.Mode)
				}
			}
			report, err := again.store.Verify(t.Context(), "photos", name, nil)
			must(t, err)
			if report.Bad != 0 {
				t.Errorf("%+v", report.Problems)
			}
		})
	}
}

func TestKinds(t *testing.T) {
	b := newBench(t)
	p := b.peer("home")
	c, _ := b.client(t, p)
	id := strings.Repeat("ab", 32)
	put(t, c, "/photos/config", "[repository]\nversion = 1\nid = "+id+"\n")
	for _, want := range []pushwire.Offer{{Kind: pushwire.KindFiles}, {Kind: pushwire.KindBorg1, RepositoryID: id}} {
		f, err := b.area.Freeze(t.Context(), p, "photos")
		must(t, err)
		if got := f.Request().Offer; got.Kind != want.Kind || got.RepositoryID != want.RepositoryID {
			t.Errorf("%+v, want %+v", got, want)
		}
		f.Release()
		must(t, c.MkdirAll("/photos/data"))
	}
}

// Discard leaves nothing, and the copies of others alone.
func TestDiscard(t *testing.T) {
	b := newBench(t)
	p, q := b.peer("home"), b.peer("shed")
	c, hangUp := b.client(t, p)
	put(t, c, "/photos/a", "one")
	d, _ := b.client(t, q)
	put(t, d, "/photos/b", "two")
	if err := b.area.Discard(t.Context(), p, "photos"); !errors.Is(err, ErrWriting) || !strings.Contains(err.Error(), "1 connections") {
		t.Errorf("a client has it open: %v", err)
	}
	hangUp()
	must(t, b.area.Discard(t.Context(), p, "photos"))
	if err := b.area.Discard(t.Context(), p, "photos"); err == nil {
		t.Error("discarded twice")
	}
	if _, _, err := b.commit(t, p, "photos"); !errors.Is(err, errNoCopy) {
		t.Errorf("commit of nothing: %v", err)
	}
	names, err := os.ReadDir(filepath.Join(b.dir, Folder, "photos"))
	if err != nil || len(names) != 1 || names[0].Name() != "shed" {
		t.Errorf("left: %v, %v", names, err)
	}
	c, _ = b.client(t, p)
	if list, err := c.ReadDir("/photos"); err != nil || len(list) != 0 {
		t.Errorf("the next copy: %v, %v", list, err)
	}
	if got := treeOf(t, b.copy("photos", "shed")); !slices.Contains(slices.Collect(maps.Keys(got)), "b") {
		t.Errorf("the other key's copy: %v", got)
	}
}

// A file that rotted in history and was healed there is not committed anew with its
// rotten bytes, because the copy still had the old inode.
func TestRotStaysOutOfHistory(t *testing.T) {
	b := newBench(t)
	p := b.peer("home")
	c, hangUp := b.client(t, p)
	put(t, c, "/photos/d/a", "good bytes")
	put(t, c, "/photos/b", "other")
	name := b.mustCommit(t, p, "photos")
	hangUp()
	history := filepath.Join(b.generation("photos", name), "d", "a")
	info, err := os.Stat(history)
	must(t, err)
	must(t, os.WriteFile(history+".healed", []byte("good bytes"), 0o644))
	must(t, errors.Join(os.Chmod(history+".healed", info.Mode()), os.Chtimes(history+".healed", info.ModTime(), info.ModTime())))
	f, err := os.OpenFile(history, os.O_WRONLY, 0) // the inode that the copy shares
	must(t, err)
	_, err = f.WriteString("gxxd")
	must(t, errors.Join(err, f.Close(), os.Chtimes(history, info.ModTime(), info.ModTime()), os.Rename(history+".healed", history)))

	if again, same, err := b.commit(t, p, "photos"); err != nil || !same || again != name {
		t.Errorf("committed as %s, the same: %v, %v", again, same, err)
	}
	if got := treeOf(t, b.copy("photos", "home")); got["d/a"] != "good bytes" {
		t.Errorf("the copy: %v", got)
	}
	b.accounts(t, "photos", "home")
}
