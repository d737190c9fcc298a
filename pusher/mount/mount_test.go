package mount

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"farkeep/pusher/readback"
	"farkeep/shared/hint"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"
)

// memory is a generation in memory. answer may change what a read brings.
type memory struct {
	list    []byte
	content map[string]string
	answer  func(path string, p []byte, off int64)
	opens   atomic.Int64
	open    atomic.Int64 // files that are open now
	most    atomic.Int64
}

func generation(t *testing.T, content map[string]string) (*memory, pushwire.Generation) {
	t.Helper()
	m := &memory{content: content}
	var all []manifest.Entry
	for path, text := range content {
		if name, folder := strings.CutSuffix(path, "/"); folder {
			all = append(all, manifest.Entry{Path: name, Kind: manifest.Folder, Mode: 0o700, MTime: 1e9})
			continue
		}
		h := manifest.NewHash()
		io.WriteString(h, text)
		all = append(all, manifest.Entry{Path: path, Kind: manifest.File, Mode: 0o600, MTime: 2e9, Size: int64(len(text)), Sum: manifest.SumOf(h)})
	}
	slices.SortFunc(all, func(a, b manifest.Entry) int { return manifest.ComparePaths(a.Path, b.Path) })
	var out bytes.Buffer
	w := manifest.NewWriter(&out)
	for _, e := range all {
		if err := w.Add(e); err != nil {
			t.Fatal(err)
		}
	}
	sum, err := w.Close()
	if err != nil {
		t.Fatal(err)
	}
	m.list = out.Bytes()
	return m, pushwire.Generation{Repository: "photos", Name: "000001-20260101T000000Z", Digest: sum.Digest.String()}
}

func (m *memory) Manifest() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(m.list)), nil }
func (m *memory) Lost() <-chan struct{}            { return nil }
func (m *memory) Close() error                     { return nil }

func (m *memory) File(path string) (readback.File, error) {
	m.opens.Add(1)
	now := m.open.Add(1)
	for most := m.most.Load(); now > most && !m.most.CompareAndSwap(most, now); most = m.most.Load() {
	}
	return &file{m, path}, nil
}

type file struct {
	m    *memory
	path string
}

func (f *file) ReadAt(p []byte, off int64) (int, error) {
	n, err := strings.NewReader(f.m.content[f.path]).ReadAt(p, off)
	if f.m.answer != nil {
		f.m.answer(f.path, p[:n], off)
	}
	return n, err
}

func (f *file) Close() error {
	f.m.open.Add(-1)
	return nil
}

func noise(n int) string {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{1}).Read(b)
	return string(b)
}

func cached(t *testing.T, m *memory, g pushwire.Generation, bytes int64) *cache {
	t.Helper()
	x, err := readIndex(m, g)
	if err != nil {
		t.Fatal(err)
	}
	c := newCache(t.Context(), m, x, bytes, slog.New(slog.DiscardHandler))
	t.Cleanup(c.fetches.Wait)
	return c
}

// find walks from the top, as the kernel does.
func find(t *testing.T, x *index, path string) int32 {
	t.Helper()
	at := int32(0)
	for name := range strings.SplitSeq(path, "/") {
		next, ok := x.child(at, name)
		if !ok {
			t.Fatalf("there is no %q in %q", name, x.path(at))
		}
		at = next
	}
	return at
}

func TestIndex(t *testing.T) {
	content := map[string]string{"a/": "", "a/b": "1", "a.b": "2", "a!": "3", "a/c/": "", "a/c/d/": "", "a/c/d/e": "4", "b": "5", "a0": "6", "z/": "", "\xff": "7"}
	m, g := generation(t, content)
	x, err := readIndex(m, g)
	if err != nil {
		t.Fatal(err)
	}
	for path, text := range content {
		path = strings.TrimSuffix(path, "/")
		at := find(t, x, path)
		if n := x.nodes[at]; x.path(at) != path || n.size != int64(len(text)) {
			t.Errorf("%q is %q with %d bytes", path, x.path(at), n.size)
		}
	}
	for _, none := range []string{"", "a/b", "aa", "0", "..", "."} {
		if _, ok := x.child(0, none); ok {
			t.Errorf("there is a %q", none)
		}
	}
	if len(x.nodes) != len(content)+1 {
		t.Errorf("%d nodes for %d names", len(x.nodes), len(content))
	}
	g.Digest = strings.Repeat("0", 64)
	if _, err := readIndex(m, g); err == nil {
		t.Error("another list than the announced one was shown")
	}
}

// Whatever is read, in whatever order and by whatever pieces, is what was pushed;
// the cache stays within its bound.
func TestReadsAnywhere(t *testing.T) {
	content := map[string]string{"long": noise(40*blockSize + 77), "empty": "", "one": "1", "block": noise(blockSize)}
	m, g := generation(t, content)
	c := cached(t, m, g, 0)
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 1))
	for range 300 {
		for path, text := range content {
			off := r.Int64N(int64(len(text)) + 10)
			p := make([]byte, 1+r.IntN(3*blockSize))
			n, err := c.read(t.Context(), find(t, c.index, path), p, off, r.Int64N(4))
			want := text[min(off, int64(len(text))):min(off+int64(len(p)), int64(len(text)))]
			if err != nil || string(p[:n]) != want {
				t.Fatalf("seed %d: %s at %d: %d bytes, want %d: %v", seed, path, off, n, len(want), err)
			}
		}
	}
	if n := len(c.blocks); n > c.limit || n != c.order.Len() {
		t.Errorf("%d blocks are kept, %d in order, at most %d should be", n, c.order.Len(), c.limit)
	}
	if m.opens.Load() > 3 {
		t.Errorf("3 files were opened %d times", m.opens.Load())
	}
}

// A file that is read to its end in order is compared; small ones always.
func TestWrongBytes(t *testing.T) {
	content := map[string]string{"small": "what was pushed", "long": noise(10*blockSize + 5), "good": noise(5 * blockSize)}
	m, g := generation(t, content)
	m.answer = func(path string, p []byte, off int64) {
		if path == "small" || path == "long" && off == 7*blockSize {
			p[1] ^= 1
		}
	}
	c := cached(t, m, g, DefaultCache)
	whole := func(path string, ahead int64) error {
		at, size := find(t, c.index, path), int64(len(content[path]))
		for off := int64(0); off < size; off += blockSize {
			if _, err := c.read(t.Context(), at, make([]byte, blockSize), off, ahead); err != nil {
				return err
			}
		}
		return nil
	}
	for _, ahead := range []int64{0, 4} {
		for path, want := range map[string]error{"small": errWrong, "long": errWrong, "good": nil} {
			if err := whole(path, ahead); !errors.Is(err, want) {
				t.Errorf("%s, %d blocks ahead: %v, want %v", path, ahead, err, want)
			}
		}
	}
}

// The files that stay open at the other end are bounded.
func TestOpenFilesAreBounded(t *testing.T) {
	content := map[string]string{}
	for i := range 4 * maxIdle {
		content[fmt.Sprint(i)] = "text"
	}
	m, g := generation(t, content)
	c := cached(t, m, g, DefaultCache)
	for path := range content {
		if n, err := c.read(t.Context(), find(t, c.index, path), make([]byte, 10), 0, 0); err != nil || n != 4 {
			t.Fatalf("%d, %v", n, err)
		}
	}
	c.fetches.Wait()
	if open, most := m.open.Load(), m.most.Load(); open > maxIdle || most > maxIdle+2 {
		t.Errorf("%d files are open, %d were at a time", open, most)
	}
}

// Who goes away does not wait.
func TestReadIsInterrupted(t *testing.T) {
	m, g := generation(t, map[string]string{"a": "text"})
	free := make(chan struct{})
	m.answer = func(string, []byte, int64) { <-free }
	c := cached(t, m, g, DefaultCache)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.read(ctx, find(t, c.index, "a"), make([]byte, 4), 0, 0); !errors.Is(err, context.Canceled) {
		t.Errorf("an interrupted read: %v", err)
	}
	close(free)
}

// Without FUSE the error says what to do, and names the way that needs none.
func TestPossible(t *testing.T) {
	none := func(string) (string, error) { return "", exec.ErrNotFound }
	some := func(name string) (string, error) { return "/bin/" + name, nil }
	device := filepath.Join(t.TempDir(), "none")
	for _, err := range []error{possible(device, true, some), possible("/dev/null", false, none)} {
		if h := hint.Of(err); err == nil || !strings.Contains(h, "farkeep-pusher restore") || !strings.Contains(h, "modprobe fuse") && !strings.Contains(h, "apt install fuse3") {
			t.Errorf("%v; hint %q", err, h)
		}
	}
	if err := errors.Join(possible("/dev/null", true, none), possible("/dev/null", false, some)); err != nil {
		t.Error(err)
	}
}
