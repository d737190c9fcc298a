package restore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"farkeep/pusher/readback"
	"farkeep/shared/hint"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// entry is a file or, with a path that ends in a slash, a folder.
type entry struct {
	path, content string
	mode          uint32
	mtime         int64
}

// memory is a generation in memory, whose source does what a test wants of it.
type memory struct {
	list       []byte
	generation pushwire.Generation
	content    map[string]string
	// answer may change what a read of a file brings, or how it fails.
	answer func(path string, p []byte, off int64) (int, error)
	opens  atomic.Int64 // trees
	reads  atomic.Int64 // bytes
}

func noise(seed byte, n int) string {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	return string(b)
}

func generation(t *testing.T, entries ...entry) *memory {
	t.Helper()
	m := &memory{content: map[string]string{}}
	var all []manifest.Entry
	for _, e := range entries {
		if name, folder := strings.CutSuffix(e.path, "/"); folder {
			all = append(all, manifest.Entry{Path: name, Kind: manifest.Folder, Mode: e.mode, MTime: e.mtime})
			continue
		}
		h := manifest.NewHash()
		io.WriteString(h, e.content)
		all = append(all, manifest.Entry{Path: e.path, Kind: manifest.File, Mode: e.mode, MTime: e.mtime, Size: int64(len(e.content)), Sum: manifest.SumOf(h)})
		m.content[e.path] = e.content
	}
	slices.SortFunc(all, func(a, b manifest.Entry) int { return manifest.ComparePaths(a.Path, b.Path) })
	var out bytes.Buffer
	w := manifest.NewWriter(&out)
	for _, e := range all {
		must(t, w.Add(e))
	}
	sum, err := w.Close()
	must(t, err)
	m.list = out.Bytes()
	m.generation = pushwire.Generation{Repository: "photos", Name: "000001-20260101T000000Z", Digest: sum.Digest.String(), Bytes: sum.Bytes, Entries: sum.Entries, Standing: "good"}
	return m
}

func (m *memory) Name() string               { return "memory" }
func (m *memory) Wake(context.Context) error { return nil }
func (m *memory) Close() error               { return nil }

func (m *memory) Generations(context.Context, string) ([]pushwire.Generation, error) {
	return []pushwire.Generation{m.generation}, nil
}

func (m *memory) Open(context.Context, string, string) (readback.Tree, error) {
	m.opens.Add(1)
	return tree{m}, nil
}

type tree struct{ *memory }

func (m tree) Manifest() (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(m.list)), nil
}
func (m tree) File(path string) (readback.File, error) { return file{m.memory, path}, nil }
func (m tree) Lost() <-chan struct{}                   { return nil }

type file struct {
	m    *memory
	path string
}

func (f file) ReadAt(p []byte, off int64) (int, error) {
	f.m.reads.Add(int64(len(p)))
	if f.m.answer != nil {
		if n, err := f.m.answer(f.path, p, off); n >= 0 {
			return n, err
		}
	}
	return strings.NewReader(f.m.content[f.path]).ReadAt(p, off)
}
func (f file) Close() error { return nil }

func (m *memory) restore(ctx context.Context, to string, paths ...string) (Report, error) {
	return Restore{Source: m, Generation: m.generation, Paths: paths, To: to, GiveUp: time.Nanosecond, Log: slog.New(slog.DiscardHandler)}.Run(ctx)
}

// names lists what is in a folder, with modes.
func names(t *testing.T, dir string) (all []string) {
	t.Helper()
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		info, err := d.Info()
		all = append(all, fmt.Sprintf("%v %s", info.Mode(), strings.TrimPrefix(path, dir+"/")))
		return err
	}))
	return all
}

func TestModesTimesAndParts(t *testing.T) {
	const at = 1_700_000_000_123_456_789
	m := generation(t,
		entry{"a", "one", 0o640, at},
		entry{"closed/", "", 0o500, at},
		entry{"closed/in", "two", 0o400, at},
		entry{"closed/deep/", "", 0o000, at},
		entry{"closed/deep/er", noise(1, 3<<20), 0o000, -at},
		entry{"root-program", "#!", 0o6755, at},
		entry{"sticky/", "", 0o3770, at},
		entry{"odd \\ name\t\xff", "x", 0o600, at},
	)
	dir := t.TempDir()
	_, err := m.restore(t.Context(), dir)
	must(t, err)
	want := []string{"-rw-r----- a", "dr-x------ closed", "d--------- closed/deep", "---------- closed/deep/er", "-r-------- closed/in",
		"-rw------- odd \\ name\t\xff", "-rwxr-xr-x root-program", "dgtrwxrwx--- sticky"}
	if got := names(t, dir); !slices.Equal(got, want) {
		t.Errorf("restored:\n%q, want\n%q", got, want)
	}
	for path, want := range map[string]int64{"a": at, "closed": at, "closed/deep": at, "closed/deep/er": -at} {
		info, err := os.Stat(filepath.Join(dir, path))
		must(t, err)
		if got := info.ModTime().UnixNano(); got != want {
			t.Errorf("%s is of %d, want %d", path, got, want)
		}
	}
	part := t.TempDir()
	_, err = m.restore(t.Context(), part, "closed/deep", "a")
	must(t, err)
	want = []string{"-rw-r----- a", "dr-x------ closed", "d--------- closed/deep", "---------- closed/deep/er"}
	if got := names(t, part); !slices.Equal(got, want) {
		t.Errorf("a part:\n%q, want\n%q", got, want)
	}
	for _, bad := range []string{"none", "closed/deep/e", "../a", "/a", "closed/"} {
		dir := filepath.Join(t.TempDir(), "new")
		if _, err := m.restore(t.Context(), dir, bad); hint.Code(err) != hint.ExitUsage {
			t.Errorf("path %q: %v", bad, err)
		}
	}
}

func TestForeignFolders(t *testing.T) {
	m := generation(t, entry{"a", "one", 0o600, 0}, entry{"b", "two", 0o600, 0})
	other := generation(t, entry{"a", "other", 0o600, 0})
	stop := func(string, []byte, int64) (int, error) {
		return 0, hint.Exit(hint.ExitUnreachable, errors.New("cut"))
	}
	tests := map[string]struct {
		make func(t *testing.T, dir string)
		want string // in the error; "": it goes
	}{
		"empty":      {func(*testing.T, string) {}, ""},
		"new disk":   {func(t *testing.T, dir string) { must(t, os.Mkdir(filepath.Join(dir, "lost+found"), 0o700)) }, ""},
		"not empty":  {func(t *testing.T, dir string) { must(t, os.WriteFile(filepath.Join(dir, "x"), nil, 0o600)) }, `not empty: there is "x"`},
		"same name":  {func(t *testing.T, dir string) { must(t, os.WriteFile(filepath.Join(dir, "a"), nil, 0o600)) }, "not empty"},
		"complete":   {func(t *testing.T, dir string) { _, err := m.restore(t.Context(), dir); must(t, err) }, "not empty"},
		"unfinished": {func(t *testing.T, dir string) { m.answer = stop; m.restore(t.Context(), dir); m.answer = nil }, ""},
		"unfinished other": {func(t *testing.T, dir string) {
			other.answer = stop
			if _, err := other.restore(t.Context(), dir); hint.Code(err) != hint.ExitUnreachable {
				t.Errorf("a source out of reach: %v", err)
			}
		}, "another generation"},
		"unfinished part": {func(t *testing.T, dir string) { m.answer = stop; m.restore(t.Context(), dir, "b"); m.answer = nil }, "other paths"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			tt.make(t, dir)
			before := names(t, dir)
			_, err := m.restore(t.Context(), dir)
			if tt.want == "" {
				must(t, err)
				return
			}
			if hint.Code(err) != hint.ExitUsage || !strings.Contains(err.Error(), tt.want) || hint.Of(err) == "" {
				t.Errorf("error %v, want %q", err, tt.want)
			}
			if after := names(t, dir); !slices.Equal(before, after) {
				t.Errorf("it changed what it refused: %q, then %q", before, after)
			}
		})
	}
	if _, err := m.restore(t.Context(), filepath.Join(t.TempDir(), "no", "parent")); hint.Code(err) != hint.ExitUsage {
		t.Errorf("a folder without a parent: %v", err)
	}
}

// Two restores never work in one folder.
func TestOneAtATime(t *testing.T) {
	m := generation(t, entry{"a", "one", 0o600, 0})
	dir := t.TempDir()
	m.answer = func(string, []byte, int64) (int, error) {
		m.answer = nil
		if _, err := m.restore(t.Context(), dir); err == nil || !strings.Contains(hint.Of(err), "another restore") {
			t.Errorf("a second restore: %v", err)
		}
		return -1, nil
	}
	_, err := m.restore(t.Context(), dir)
	must(t, err)
}

// A source that lies about one file costs that file; and what it says it has
// beyond the list is not even asked for.
func TestLyingSource(t *testing.T) {
	long := noise(1, 3<<20)
	lies := map[string]func(p []byte, off int64) (int, error){
		"other bytes":     func(p []byte, off int64) (int, error) { return copy(p, noise(9, len(p))), nil },
		"one bit":         func(p []byte, off int64) (int, error) { n := copy(p, long[off:]); p[n-1] ^= 1; return n, nil },
		"shorter":         func(p []byte, off int64) (int, error) { return copy(p, long[off:off+1]), io.EOF },
		"nothing":         func([]byte, int64) (int, error) { return 0, io.EOF },
		"nothing, no end": func([]byte, int64) (int, error) { return 0, nil },
		"an error":        func([]byte, int64) (int, error) { return 0, errors.New("bad sector") },
		"denied":          func([]byte, int64) (int, error) { return 0, fs.ErrPermission },
		"wrong at the end": func(p []byte, off int64) (int, error) {
			n := copy(p, long[off:])
			p[n-1] ^= byte(off >> 20)
			return n, nil
		},
	}
	for name, lie := range lies {
		t.Run(name, func(t *testing.T) {
			m := generation(t, entry{"a", "one", 0o600, 0}, entry{"long", long, 0o600, 0}, entry{"z", "two", 0o600, 0})
			m.answer = func(path string, p []byte, off int64) (int, error) {
				if path != "long" {
					return -1, nil
				}
				return lie(p, off)
			}
			dir := t.TempDir()
			report, err := m.restore(t.Context(), dir)
			if hint.Code(err) != hint.ExitPartial || report.Bad != 1 || report.Files != 2 || report.Problems[0].Path != "long" {
				t.Fatalf("%v, %+v", err, report)
			}
			if _, err := os.Lstat(filepath.Join(dir, "long")); !errors.Is(err, fs.ErrNotExist) {
				t.Error("the wrong file has its name")
			}
			// The next attempt, with an honest source, brings it.
			m.answer = nil
			report, err = m.restore(t.Context(), dir)
			must(t, err)
			if report.Kept != 6 || report.Files != 3 {
				t.Errorf("report %+v", report)
			}
		})
	}
}

func TestLyingList(t *testing.T) {
	for name, list := range map[string]func(m *memory) []byte{
		"empty":     func(*memory) []byte { return nil },
		"cut":       func(m *memory) []byte { return m.list[:len(m.list)-1] },
		"longer":    func(m *memory) []byte { return append(slices.Clone(m.list), 0) },
		"of others": func(*memory) []byte { return generation(t, entry{"b", "two", 0o600, 0}).list },
		"no list":   func(*memory) []byte { return []byte(strings.Repeat("../", 1000)) },
	} {
		t.Run(name, func(t *testing.T) {
			m := generation(t, entry{"a", "one", 0o600, 0})
			m.list = list(m)
			dir := t.TempDir()
			if _, err := m.restore(t.Context(), dir); err == nil {
				t.Error("it was believed")
			}
			if _, err := os.Lstat(filepath.Join(dir, "a")); err == nil || m.reads.Load() > 0 {
				t.Error("files were fetched by a wrong list")
			}
		})
	}
}

// Links that somebody planted in the folder of an unfinished restore lead nowhere.
func TestPlantedLinks(t *testing.T) {
	outside := t.TempDir()
	must(t, os.WriteFile(filepath.Join(outside, "victim"), []byte("untouched"), 0o600))
	for name, plant := range map[string]func(dir, state string) error{
		"folder": func(dir, _ string) error { return os.Symlink(outside, filepath.Join(dir, "folder")) },
		"file": func(dir, _ string) error {
			return os.Symlink(filepath.Join(outside, "victim"), filepath.Join(dir, "a"))
		},
		"part": func(_, state string) error {
			return os.Symlink(filepath.Join(outside, "victim"), filepath.Join(state, "0"))
		},
		"manifest": func(_, state string) error {
			return os.Symlink(filepath.Join(outside, "victim"), filepath.Join(state, "MANIFEST"))
		},
		"state": func(dir, state string) error {
			return errors.Join(os.RemoveAll(state), os.Symlink(outside, state))
		},
		"fifo": func(dir, _ string) error { return unix.Mkfifo(filepath.Join(dir, "a"), 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			m := generation(t, entry{"a", "one", 0o600, 0}, entry{"folder/", "", 0o700, 0}, entry{"folder/victim", "gotcha", 0o600, 0})
			dir := t.TempDir()
			must(t, plant(dir, func() string {
				state := filepath.Join(dir, ".farkeep-restore-"+m.generation.Digest[:16])
				must(t, os.Mkdir(state, 0o700))
				return state
			}()))
			_, err := m.restore(t.Context(), dir)
			if err == nil && name != "file" && name != "fifo" {
				t.Error("a link was taken for what it stands for")
			}
			if err == nil {
				if info, err := os.Lstat(filepath.Join(dir, "a")); err != nil || !info.Mode().IsRegular() {
					t.Errorf("a: %v, %v", info, err)
				}
			}
			if list := names(t, outside); len(list) != 1 {
				t.Errorf("outside there is %q", list)
			}
			if got, err := os.ReadFile(filepath.Join(outside, "victim")); err != nil || string(got) != "untouched" {
				t.Errorf("outside: %q, %v", got, err)
			}
		})
	}
}

// tmpfs is a disk of that size.
func tmpfs(t *testing.T, size string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("run this as root: it mounts a tmpfs")
	}
	dir := t.TempDir()
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=700,size="+size))
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

// A disk without room is refused with numbers before anything is fetched; one that
// fills up says so, and the restore goes on when there is room again.
func TestFullDisk(t *testing.T) {
	m := generation(t, entry{"a", noise(1, 3<<20), 0o600, 0}, entry{"b", noise(2, 3<<20), 0o600, 0})
	small := tmpfs(t, "4m")
	_, err := m.restore(t.Context(), small)
	if err == nil || !strings.Contains(err.Error(), "6.00 MiB more are needed") || m.reads.Load() > 0 || hint.Of(err) == "" {
		t.Fatalf("a disk that is too small: %v, after %d bytes", err, m.reads.Load())
	}

	disk := tmpfs(t, "8m")
	ballast := filepath.Join(t.TempDir(), "elsewhere")
	must(t, os.Mkdir(ballast, 0o700))
	m.answer = func(path string, _ []byte, off int64) (int, error) {
		if path == "b" && off > 0 { // meanwhile somebody else takes the room
			os.WriteFile(filepath.Join(disk, ".farkeep-restore-"+m.generation.Digest[:16], "ballast"), make([]byte, 5<<20), 0o600)
		}
		return -1, nil
	}
	_, err = m.restore(t.Context(), disk)
	if !errors.Is(err, unix.ENOSPC) || !strings.Contains(hint.Of(err), "run the same command again") {
		t.Fatalf("a disk that fills up: %v; hint %q", err, hint.Of(err))
	}
	must(t, os.Remove(filepath.Join(disk, ".farkeep-restore-"+m.generation.Digest[:16], "ballast")))
	m.answer = nil
	m.reads.Store(0)
	_, err = m.restore(t.Context(), disk)
	must(t, err)
	if got, err := os.ReadFile(filepath.Join(disk, "b")); err != nil || string(got) != m.content["b"] {
		t.Errorf("b: %d bytes, %v", len(got), err)
	}
	if n := m.reads.Load(); n >= 6<<20 {
		t.Errorf("%d bytes were fetched again", n)
	}
}

// What a power cut left in a half file is not believed.
func TestPrefixThatWasNeverWritten(t *testing.T) {
	m := generation(t, entry{"a", noise(1, 3<<20), 0o600, 0})
	dir := t.TempDir()
	state := filepath.Join(dir, ".farkeep-restore-"+m.generation.Digest[:16])
	must(t, os.Mkdir(state, 0o700))
	must(t, os.WriteFile(filepath.Join(state, "0"), make([]byte, 2<<20), 0o600)) // zeros
	_, err := m.restore(t.Context(), dir)
	must(t, err)
	if got, err := os.ReadFile(filepath.Join(dir, "a")); err != nil || string(got) != m.content["a"] {
		t.Errorf("a: %d bytes, %v", len(got), err)
	}
	if _, err := os.Lstat(state); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("left behind: %v", err)
	}
}

// A restore that is ended leaves at once, and says nothing of a cut line.
func TestCancel(t *testing.T) {
	m := generation(t, entry{"a", noise(1, 3<<20), 0o600, 0})
	ctx, cancel := context.WithCancel(t.Context())
	m.answer = func(string, []byte, int64) (int, error) {
		cancel()
		return 0, hint.Exit(hint.ExitUnreachable, errors.New("closed"))
	}
	if _, err := m.restore(ctx, t.TempDir()); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
