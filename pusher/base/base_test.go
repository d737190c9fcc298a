package base

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"farkeep/shared/borgsegment"
	"farkeep/shared/manifest"
)

// entry encodes one entry of a segment.
func entry(tag borgsegment.Tag, key byte, data []byte) []byte {
	size := borgsegment.HeaderSize
	if tag != borgsegment.Commit {
		size += borgsegment.KeySize + len(data)
	}
	b := make([]byte, 9, size)
	binary.LittleEndian.PutUint32(b[4:], uint32(size))
	b[8] = byte(tag)
	if tag != borgsegment.Commit {
		b = append(b, bytes.Repeat([]byte{key}, borgsegment.KeySize)...)
		b = append(b, data...)
	}
	binary.LittleEndian.PutUint32(b, crc32.ChecksumIEEE(b[4:]))
	return b
}

func segment(entries ...[]byte) []byte {
	return append([]byte(borgsegment.Magic), slices.Concat(entries...)...)
}

// tree is a repository in a folder.
type tree struct {
	t    testing.TB
	root *os.Root
	dir  string
}

func newTree(t testing.TB, files map[string][]byte) *tree {
	r := &tree{t: t, dir: t.TempDir()}
	var err error
	if r.root, err = os.OpenRoot(r.dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.root.Close() })
	for name, content := range files {
		path := filepath.Join(r.dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

func (r *tree) open(path string) (*os.File, error) { return r.root.Open(path) }

// list is the tree's manifest, and its entries.
func (r *tree) list() (raw []byte, digest manifest.Sum, all []manifest.Entry) {
	r.t.Helper()
	err := fs.WalkDir(r.root.FS(), ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == "." {
			return err
		}
		e := manifest.Entry{Kind: manifest.Folder, Path: path, Mode: 0o700}
		if !d.IsDir() {
			content, err := os.ReadFile(filepath.Join(r.dir, path))
			if err != nil {
				return err
			}
			h := manifest.NewHash()
			h.Write(content)
			e = manifest.Entry{Kind: manifest.File, Path: path, Mode: 0o600, Size: int64(len(content)), Sum: manifest.SumOf(h)}
		}
		all = append(all, e)
		return nil
	})
	if err != nil {
		r.t.Fatal(err)
	}
	slices.SortFunc(all, func(a, b manifest.Entry) int { return manifest.ComparePaths(a.Path, b.Path) })
	var out bytes.Buffer
	w := manifest.NewWriter(&out)
	for _, e := range all {
		if err := w.Add(e); err != nil {
			r.t.Fatal(err)
		}
	}
	s, err := w.Close()
	if err != nil {
		r.t.Fatal(err)
	}
	return out.Bytes(), s.Digest, all
}

func (r *tree) remember(m *Memory, target string) manifest.Sum {
	r.t.Helper()
	raw, digest, _ := r.list()
	if err := m.Remember(r.t.Context(), target, "photos", digest, bytes.NewReader(raw), r.open); err != nil {
		r.t.Fatal(err)
	}
	return digest
}

// plan plans to send every file of r to a target that has digest.
func (r *tree) plan(m *Memory, digest manifest.Sum) *Plan {
	r.t.Helper()
	_, _, all := r.list()
	p, err := m.Plan(r.t.Context(), "vault", "photos", digest, func(yield func(manifest.Entry) error) error {
		for _, e := range all {
			if e.Kind == manifest.File {
				if err := yield(e); err != nil {
					return err
				}
			}
		}
		return nil
	}, r.open)
	if err != nil {
		r.t.Fatal(err)
	}
	return p
}

// build carries out the steps of a file of r, with base, and returns the result
// and how much of it was new.
func (r *tree) build(p *Plan, path string, base *tree) (got []byte, fresh int64) {
	r.t.Helper()
	f, err := r.open(path)
	if err != nil {
		r.t.Fatal(err)
	}
	defer f.Close()
	info, _ := f.Stat()
	steps, err := p.Steps(manifest.Entry{Kind: manifest.File, Path: path, Size: info.Size()}, f)
	if err != nil {
		r.t.Fatal(err)
	}
	for _, s := range steps {
		piece := make([]byte, s.Length)
		from, at := f, int64(len(got))
		if s.Path != "" {
			if from, err = base.open(s.Path); err != nil {
				r.t.Fatal(err)
			}
			defer from.Close()
			at = s.Offset
		} else {
			fresh += s.Length
		}
		if _, err := from.ReadAt(piece, at); err != nil {
			r.t.Fatalf("%+v: %v", s, err)
		}
		got = append(got, piece...)
	}
	return got, fresh
}

func (r *tree) mustBuild(p *Plan, path string, base *tree, fresh int64) {
	r.t.Helper()
	want, err := os.ReadFile(filepath.Join(r.dir, path))
	if err != nil {
		r.t.Fatal(err)
	}
	got, n := r.build(p, path, base)
	if !bytes.Equal(got, want) || n != fresh {
		r.t.Errorf("%s: %d bytes, right: %v; %d are new, want %d", path, len(got), bytes.Equal(got, want), n, fresh)
	}
}

func memory(t testing.TB) *Memory { return Open(t.TempDir(), slog.New(slog.DiscardHandler)) }

func random(seed uint64, n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}).Read(b)
	return b
}

func TestMovedChunks(t *testing.T) {
	a, b, c, d := random(1, 5000), random(2, 7000), random(3, 900), random(4, 3000)
	put := func(key byte, data []byte) []byte { return entry(borgsegment.Put, key, data) }
	commit := entry(borgsegment.Commit, 0, nil)
	was := newTree(t, map[string][]byte{
		"data/0/1": segment(put(1, a), put(2, b), put(3, c), commit),
		"data/0/2": segment(put(4, d), put(1, a), commit),
		"config":   []byte("[repository]\n"),
	})
	m := memory(t)
	digest := was.remember(m, "vault")
	moved := segment(put(2, b), put(3, c), entry(borgsegment.Delete, 9, nil), put(5, random(5, 4000)), put(4, d))
	is := newTree(t, map[string][]byte{
		"data/0/4":  moved,
		"data/0/5":  segment(put(1, a), put(1, d)), // a known chunk; an old key with other data
		"data/0/6":  []byte("no segment at all, but a file in its place"),
		"data/0/7":  moved[:len(moved)-100], // cut
		"config":    []byte("[repository]\n# another\n"),
		"data/0/8":  {},
		"data/0/10": segment(commit),
	})
	p := is.plan(m, digest)
	if p == nil {
		t.Fatal("there is no plan")
	}
	is.mustBuild(p, "data/0/4", was, 8+41+41+4000)
	is.mustBuild(p, "data/0/5", was, 8+41+3000)
	is.mustBuild(p, "data/0/6", was, 42)
	is.mustBuild(p, "data/0/7", was, 8+41+41+4000+41+3000-100)
	is.mustBuild(p, "data/0/8", was, 0)
	is.mustBuild(p, "data/0/10", was, 17)
	is.mustBuild(p, "config", was, 23)
	// b and c lie beside each other, there and here: one copy.
	f, _ := is.open("data/0/4")
	defer f.Close()
	steps, err := p.Steps(manifest.Entry{Path: "data/0/4", Size: int64(len(moved))}, f)
	want := []Step{{"", 0, 8}, {"data/0/1", 8 + 5041, 7041 + 941}, {"", 0, 41 + 4041}, {"data/0/2", 8, 3041}}
	if err != nil || !slices.Equal(steps, want) {
		t.Errorf("%+v, %v; want %+v", steps, err, want)
	}
	// Another generation than the one that is remembered.
	if p := is.plan(m, manifest.Sum{1}); p != nil {
		t.Error("a plan for a generation that nobody remembers")
	}
	if err := m.Forget("vault", "photos"); err != nil {
		t.Fatal(err)
	}
	if p := is.plan(m, digest); p != nil {
		t.Error("a plan after Forget")
	}
	if err := m.Forget("vault", "photos"); err != nil {
		t.Errorf("forgotten twice: %v", err)
	}
}

// Versions of the index are compared place by place, those of the hints wherever
// their pieces went.
func TestVersions(t *testing.T) {
	index, hints := random(1, 600_000), random(2, 50_000)
	was := newTree(t, map[string][]byte{"index.5": index, "hints.5": hints, "integrity.5": []byte("{5}"), "data/0/1": segment()})
	m := memory(t)
	digest := was.remember(m, "vault")

	changed := bytes.Clone(index)
	copy(changed[100:], random(3, 40))
	copy(changed[262_140:], random(4, 8)) // over the border of what is read at once
	changed[599_999] ^= 1
	is := newTree(t, map[string][]byte{
		"index.7": changed, "integrity.7": []byte("{7}"),
		"hints.7": slices.Concat(hints[:20_000], random(5, 100), hints[20_010:40_000], hints[30_000:]),
	})
	p := is.plan(m, digest)
	is.mustBuild(p, "index.7", was, 40+8+1)
	is.mustBuild(p, "integrity.7", was, 3)
	is.mustBuild(p, "hints.7", was, 100)

	// A version that is longer, shorter, or gone.
	for name, content := range map[string][]byte{"longer": append(bytes.Clone(index), random(6, 1000)...), "shorter": index[:1000], "none": {}} {
		is := newTree(t, map[string][]byte{"index.9": content})
		is.mustBuild(is.plan(m, digest), "index.9", was, max(0, int64(len(content)-len(index))))
		_ = name
	}
	folder := filepath.Join(m.dir, "photos", "kept", "vault")
	kept, err := os.ReadDir(folder)
	if err != nil || len(kept) != 3 {
		t.Fatal(kept, err)
	}
	if err := os.RemoveAll(folder); err != nil {
		t.Fatal(err)
	}
	is.mustBuild(p, "index.7", was, 600_000)
}

// Whatever two versions are, the steps make the one out of the other.
func TestAnyVersions(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	for i := range 300 {
		old := random(r.Uint64(), r.IntN(3000))
		if r.IntN(3) == 0 {
			old = bytes.Repeat([]byte{byte(r.IntN(2))}, r.IntN(500)) // the same piece over and over
		}
		now := bytes.Clone(old)
		for range r.IntN(6) {
			at := r.IntN(len(now) + 1)
			switch r.IntN(3) {
			case 0:
				now = slices.Insert(now, at, random(r.Uint64(), r.IntN(80))...)
			case 1:
				now = slices.Delete(now, at, min(len(now), at+r.IntN(80)))
			default:
				copy(now[at:], random(r.Uint64(), r.IntN(80)))
			}
		}
		for name, compare := range map[string]func(*steps, string, sized, sized) error{
			"same":  func(s *steps, path string, was, is sized) error { return samePlaces(s, path, was, is) },
			"moved": movedPlaces,
		} {
			var s steps
			if err := compare(&s, "old", bytes.NewReader(old), bytes.NewReader(now)); err != nil {
				t.Fatal(err)
			}
			s.fresh(int64(len(now)) - s.length)
			var got []byte
			for _, step := range s.list {
				if step.Path == "" {
					got = append(got, now[len(got):len(got)+int(step.Length)]...)
				} else {
					got = append(got, old[step.Offset:step.Offset+step.Length]...)
				}
			}
			if !bytes.Equal(got, now) {
				t.Fatalf("%d, %s places: %d bytes of %d old ones became other %d", i, name, len(now), len(old), len(got))
			}
		}
	}
}

// What is noted of old segments is carried over without reading them again, and
// what no target needs any more goes.
func TestRememberAgain(t *testing.T) {
	files := map[string][]byte{"index.1": random(1, 1000)}
	for i := range 20 {
		files[fmt.Sprintf("data/0/%d", i)] = segment(entry(borgsegment.Put, byte(i), random(uint64(i), 100)))
	}
	was := newTree(t, files)
	m := memory(t)
	was.remember(m, "vault")
	was.remember(m, "nas")

	delete(files, "index.1")
	delete(files, "data/0/3")
	files["index.2"] = random(2, 1000)
	files["data/0/4"] = segment(entry(borgsegment.Put, 77, random(77, 100))) // the same size, another content
	files["data/0/20"] = segment(entry(borgsegment.Put, 78, random(78, 100)))
	is := newTree(t, files)
	raw, digest, _ := is.list()
	var read []string
	err := m.Remember(t.Context(), "vault", "photos", digest, bytes.NewReader(raw), func(path string) (*os.File, error) {
		read = append(read, path)
		return is.open(path)
	})
	slices.Sort(read)
	if want := []string{"data/0/20", "data/0/4", "index.2"}; err != nil || !slices.Equal(read, want) {
		t.Errorf("read %v, %v; want %v", read, err, want)
	}
	kept := func(target string) []os.FileInfo {
		files, err := filepath.Glob(filepath.Join(m.dir, "photos", "kept", target, "*"))
		if err != nil || len(files) != 1 {
			t.Errorf("kept for %s: %v, %v", target, files, err)
		}
		var all []os.FileInfo
		for _, f := range files {
			info, err := os.Stat(f)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, info)
		}
		return all
	}
	if os.SameFile(kept("vault")[0], kept("nas")[0]) {
		t.Error("the NAS still has the old index, and the new one is kept for it")
	}
	// What one target has need not be read for another.
	raw, digest, _ = is.list()
	if err := m.Remember(t.Context(), "nas", "photos", digest, bytes.NewReader(raw), func(path string) (*os.File, error) {
		return nil, fmt.Errorf("%s is read", path)
	}); err != nil {
		t.Error(err)
	}
	if !os.SameFile(kept("vault")[0], kept("nas")[0]) {
		t.Error("the same index is kept twice")
	}
	// What was carried over is what reading it again gives.
	fresh := memory(t)
	is.remember(fresh, "vault")
	a, err := os.ReadFile(m.path("vault", "photos"))
	b, err2 := os.ReadFile(fresh.path("vault", "photos"))
	if err != nil || err2 != nil || !bytes.Equal(a, b) {
		t.Errorf("carried over: %d bytes, read anew: %d; %v, %v", len(a), len(b), err, err2)
	}
}

// Damaged notes are told from whole ones, and made anew.
func TestDamage(t *testing.T) {
	r := newTree(t, map[string][]byte{"index.1": random(1, 100), "data/0/1": segment(entry(borgsegment.Put, 1, random(1, 300)))})
	m := memory(t)
	digest := r.remember(m, "vault")
	whole, err := os.ReadFile(m.path("vault", "photos"))
	if err != nil {
		t.Fatal(err)
	}
	for i := range whole {
		bad := bytes.Clone(whole)
		bad[i] ^= 0x10
		if err := os.WriteFile(m.path("vault", "photos"), bad, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := drained(m.path("vault", "photos")); !errors.Is(err, errDamaged) {
			t.Fatalf("byte %d: %v", i, err)
		}
	}
	for n := range whole {
		if err := os.WriteFile(m.path("vault", "photos"), whole[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := drained(m.path("vault", "photos")); !errors.Is(err, errDamaged) {
			t.Fatalf("%d bytes: %v", n, err)
		}
	}
	// Damage of which the beginning knows nothing is found while they are carried over.
	changed := newTree(t, map[string][]byte{"data/0/1": segment(entry(borgsegment.Put, 1, random(1, 300))), "data/0/2": segment()})
	bad := bytes.Clone(whole)
	bad[len(bad)-40] ^= 1
	if err := os.WriteFile(m.path("vault", "photos"), bad, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Plan(t.Context(), "vault", "photos", digest, func(func(manifest.Entry) error) error { return nil }, r.open); !errors.Is(err, errDamaged) {
		t.Errorf("a plan with damaged notes: %v", err)
	}
	changed.remember(m, "vault")
	fresh := memory(t)
	changed.remember(fresh, "vault")
	if a, b := mustRead(t, m.path("vault", "photos")), mustRead(t, fresh.path("vault", "photos")); !bytes.Equal(a, b) {
		t.Errorf("after damage: %d bytes; read anew: %d", len(a), len(b))
	}
	if err := os.WriteFile(m.path("vault", "photos"), bad, 0o600); err != nil {
		t.Fatal(err)
	}
	r.remember(m, "vault")
	if p := r.plan(m, digest); p == nil {
		t.Error("the notes were not made anew")
	}
	if again, err := os.ReadFile(m.path("vault", "photos")); err != nil || !bytes.Equal(again, whole) {
		t.Errorf("made anew they are %d bytes, not %d; %v", len(again), len(whole), err)
	}
}

// drained reads notes to their end.
func drained(path string) (*reader, error) {
	r, err := openFile(path)
	if err != nil {
		return nil, err
	}
	defer r.close()
	return r, r.drain()
}

func mustRead(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// FuzzRead reads notes whose sum is right and whose content is anything.
func FuzzRead(f *testing.F) {
	r := newTree(f, map[string][]byte{"index.1": random(1, 100), "data/0/1": segment(entry(borgsegment.Put, 1, random(1, 300)))})
	m := memory(f)
	r.remember(m, "vault")
	whole, err := os.ReadFile(m.path("vault", "photos"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole[:len(whole)-32])
	f.Add([]byte(magic))
	path := filepath.Join(f.TempDir(), "notes")
	f.Fuzz(func(t *testing.T, body []byte) {
		h := manifest.NewHash()
		h.Write(body)
		sum := manifest.SumOf(h)
		if err := os.WriteFile(path, append(bytes.Clone(body), sum[:]...), 0o600); err != nil {
			t.Fatal(err)
		}
		r, err := openFile(path)
		if err != nil {
			return
		}
		defer r.close()
		defer func() {
			if err := os.WriteFile(path, append(bytes.Clone(body), make([]byte, 32)...), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := drained(path); !errors.Is(err, errDamaged) {
				t.Fatalf("with another sum: %v", err)
			}
		}()
		seen := 0
		for n := r.next(); n != nil; n = r.next() {
			if seen += len(n.notes) + 1; seen > len(body) {
				t.Fatalf("%d bytes of notes in a file of %d", seen, len(body))
			}
			last := int64(-1)
			n.each(func(_ uint64, offset int64) {
				if offset < last || offset > n.size {
					t.Fatalf("an entry at %d, after %d, in a segment of %d", offset, last, n.size)
				}
				last = offset
			})
		}
	})
}

// BenchmarkPlan is a day of a repository of 4 TB: 3 million chunks, of which a
// compaction moved 100,000.
func BenchmarkPlan(b *testing.B) {
	m := memory(b)
	const segments, chunks = 8000, 375
	w := func() manifest.Sum {
		if err := os.MkdirAll(filepath.Join(m.dir, "photos", "kept"), 0o700); err != nil {
			b.Fatal(err)
		}
		w, err := m.create("vault", "photos", manifest.Sum{1})
		if err != nil {
			b.Fatal(err)
		}
		r := rand.New(rand.NewPCG(1, 0))
		for i := range segments {
			var notes []byte
			size := int64(8)
			for range chunks {
				n := 1_000_000 + r.Int64N(600_000)
				notes = binary.LittleEndian.AppendUint64(notes, r.Uint64())
				notes = binary.AppendUvarint(notes, uint64(n))
				size += n
			}
			w.segment(manifest.Entry{Path: fmt.Sprintf("data/%d/%d", i/1000, i), Size: size}, notes)
		}
		if err := w.commit(); err != nil {
			b.Fatal(err)
		}
		return manifest.Sum{1}
	}()
	info, _ := os.Stat(m.path("vault", "photos"))
	b.ReportMetric(float64(info.Size())/1e6, "MB-notes")
	r := newTree(b, map[string][]byte{"data/9/9999": func() []byte {
		var all [][]byte
		for i := range 100_000 {
			e := entry(borgsegment.Put, byte(i), fmt.Appendf(nil, "%030d", i))
			all = append(all, e)
		}
		return segment(all...)
	}()})
	for b.Loop() {
		if p := r.plan(m, w); p == nil || len(p.wanted) < 90_000 {
			b.Fatal("no plan")
		}
	}
	b.ReportMetric(float64(info.Size())/1e6, "MB-notes")
}
