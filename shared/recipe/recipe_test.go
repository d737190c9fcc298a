package recipe_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"

	"farkeep/shared/manifest"
	"farkeep/shared/recipe"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
)

func sum(s string) manifest.Sum {
	h := manifest.NewHash()
	io.WriteString(h, s)
	return manifest.SumOf(h)
}

// base is the generation that the tests copy from.
var base = map[string]string{"old/a": "0123456789", "old/b": strings.Repeat("b", 3<<20)}

// shop builds in memory.
type shop struct {
	bytes.Buffer
	half string
}

func (s *shop) Kept(n int64) (io.Reader, error) {
	if int64(len(s.half)) < n {
		return nil, errors.New("not there")
	}
	s.Reset()
	s.WriteString(s.half[:n])
	return strings.NewReader(s.half[:n]), nil
}

func (s *shop) Source(path string) (io.ReaderAt, error) {
	content, ok := base[path]
	if !ok {
		return nil, fmt.Errorf("no file %q", path)
	}
	return strings.NewReader(content), nil
}

// step is one call of an Encoder.
type step func(*recipe.Encoder) error

// pack compresses what comes after it wherever that helps.
func pack(e *recipe.Encoder) error { e.Pack(func() bool { return true }); return nil }

func begin(i int64) step { return func(e *recipe.Encoder) error { return e.File(i) } }
func keep(n int64) step  { return func(e *recipe.Encoder) error { return e.Keep(n) } }
func data(s string) step {
	return func(e *recipe.Encoder) error { _, err := io.WriteString(e, s); return err }
}
func copies(path string, offset, n int64) step {
	return func(e *recipe.Encoder) error { return e.Copy(path, offset, n) }
}
func end(s string) step { return func(e *recipe.Encoder) error { return e.End(sum(s)) } }

func stream(tb testing.TB, steps ...step) []byte {
	tb.Helper()
	var b bytes.Buffer
	e := recipe.NewEncoder(&b)
	for _, s := range steps {
		if err := s(e); err != nil {
			tb.Fatal(err)
		}
	}
	if err := e.Close(); err != nil {
		tb.Fatal(err)
	}
	return b.Bytes()
}

// build builds all files of a stream; files says what was announced for each.
func build(stream []byte, files map[int64]manifest.Entry, half string) (map[int64]string, error) {
	d := recipe.NewDecoder(bytes.NewReader(stream))
	buf := make([]byte, 64<<10)
	got := map[int64]string{}
	for {
		i, err := d.Next()
		if errors.Is(err, io.EOF) {
			return got, nil
		}
		if err != nil {
			return got, err
		}
		want, ok := files[i]
		if !ok {
			return got, fmt.Errorf("file %d was not announced", i)
		}
		s := &shop{half: half}
		if err := recipe.Build(d, want, s, buf); err != nil {
			return got, err
		}
		got[i] = s.String()
	}
}

func announced(content string) manifest.Entry {
	return manifest.Entry{Path: "new", Kind: manifest.File, Size: int64(len(content)), Sum: sum(content)}
}

func TestBuild(t *testing.T) {
	long := strings.Repeat("long", 400_000)
	mixed := "head" + "234" + "mid" + strings.Repeat("b", 1<<20) + "tail"
	resumed := long + "rest"
	s := stream(t,
		begin(0), end(""),
		begin(3), data("he"), data("ad"), copies("old/a", 2, 3), data("mid"), copies("old/b", 7, 1<<20), data("tail"), end(mixed),
		begin(4), copies("old/b", 0, 10), copies("old/b", 100, 1), end("bbbbbbbbbbb"),
		begin(9), keep(int64(len(long))), data("rest"), end(resumed),
		begin(100), data(long), end(long),
	)
	want := map[int64]string{0: "", 3: mixed, 4: "bbbbbbbbbbb", 9: resumed, 100: long}
	files := map[int64]manifest.Entry{}
	for i, content := range want {
		files[i] = announced(content)
	}
	got, err := build(s, files, long+"half of the rest")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	for n := range len(s) {
		if n > 300 && n < len(s)-40 && n%1_000_003 != 0 {
			continue
		}
		if _, err := build(s[:n], files, long); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("cut after %d of %d bytes: %v", n, len(s), err)
		}
	}
}

// A stream with every operation, cut after any of its bytes, is a cut stream:
// what was complete before the cut is right, and nothing else comes out.
func TestCutAtEveryByte(t *testing.T) {
	first, second, third := "kept"+"345"+"new bytes"+"67"+"bb", "", "0123456789"
	s := stream(t,
		begin(0), keep(4), copies("old/a", 3, 3), data("new bytes"), copies("old/a", 6, 2), copies("old/b", 1<<20, 2), end(first),
		begin(1), end(second),
		begin(300), copies("old/a", 0, 10), end(third),
	)
	want := map[int64]string{0: first, 1: second, 300: third}
	files := map[int64]manifest.Entry{}
	for i, content := range want {
		files[i] = announced(content)
	}
	if got, err := build(s, files, "kept and more"); err != nil || !cmp.Equal(want, got) {
		t.Fatalf("the whole stream: %v, %v", got, err)
	}
	for n := range len(s) {
		got, err := build(s[:n], files, "kept and more")
		var format *recipe.FormatError
		if !errors.As(err, &format) || !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("cut after %d of %d bytes: %v", n, len(s), err)
		}
		for i, content := range got {
			if content != want[i] {
				t.Errorf("cut after %d of %d bytes: file %d is %q", n, len(s), i, content)
			}
		}
		if len(got) == len(want) && n < len(s)-2 { // only the end mark, of two bytes, was missing
			t.Errorf("cut after %d of %d bytes: all files came out", n, len(s))
		}
	}
}

// What compresses is packed, what does not is left alone, and all of it comes out.
func TestPacked(t *testing.T) {
	text := strings.Repeat("the quick brown fox jumps over the lazy dog. ", 100_000)
	hard := make([]byte, 5<<20)
	rand.NewChaCha8([32]byte{7}).Read(hard)
	noise := string(hard)
	// One whose first MiB is hard and the rest is text: tried again after a while.
	turns := noise[:1<<20] + strings.Repeat(text, 5)
	want := map[int64]string{0: text, 1: noise, 2: "short", 3: turns, 4: "head" + "012" + text}
	pays := true
	s := stream(t, func(e *recipe.Encoder) error { e.Pack(func() bool { return pays }); return nil },
		begin(0), data(text), end(text), begin(1), data(noise), end(noise), begin(2), data("short"), end("short"),
		begin(3), data(turns), end(turns), begin(4), data("head"), copies("old/a", 0, 3), data(text), end(want[4]),
	)
	files := map[int64]manifest.Entry{}
	for i, content := range want {
		files[i] = announced(content)
	}
	got, err := build(s, files, "")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error("what comes out is not what went in")
	}
	if least, most := len(noise)+16<<20, len(noise)+18<<20; len(s) < least || len(s) > most {
		t.Errorf("a stream of %d bytes; want %d to %d", len(s), least, most)
	}
	pays = false
	if plain := stream(t, func(e *recipe.Encoder) error { e.Pack(func() bool { return pays }); return nil }, begin(0), data(text), end(text)); len(plain) < len(text) {
		t.Errorf("packed although it does not pay: %d bytes of %d", len(plain), len(text))
	}
}

// frame is one zstd frame of s.
func frame(tb testing.TB, s string, opt ...zstd.EOption) string {
	tb.Helper()
	w, err := zstd.NewWriter(nil, opt...)
	if err != nil {
		tb.Fatal(err)
	}
	return string(w.EncodeAll([]byte(s), nil))
}

// packed is the piece of a stream that says it holds n bytes.
func packed(n int, frame string) string {
	b := binary.AppendUvarint([]byte{'P'}, uint64(n))
	return string(binary.AppendUvarint(b, uint64(len(frame)))) + frame
}

// A packed piece makes what it announces, or the stream is refused.
func TestPackedRefuses(t *testing.T) {
	zeros := strings.Repeat("\x00", 1<<20)
	whole := frame(t, zeros)
	// A frame of more than one piece may hold, which does not say so.
	var long bytes.Buffer
	w, err := zstd.NewWriter(&long)
	if err != nil {
		t.Fatal(err)
	}
	for range 64 {
		io.WriteString(w, zeros)
	}
	w.Close()
	skippable := "\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
	tests := []struct{ name, piece, want string }{
		{"more than a frame", packed(1<<20+1, whole), "length 1048577"},
		{"announces less than it has", packed(1<<20-1, whole), "not one zstd frame"},
		{"announces more than it has", packed(1<<20, frame(t, zeros[1:])), "not one zstd frame"},
		{"64 MiB in 6 KB", packed(1<<20, long.String()), "not one zstd frame"},
		{"longer than unpacked", packed(4, frame(t, "abcd")), "packed length"},
		{"no frame", packed(100, "abcdefgh"), "magic"},
		{"nothing", packed(100, ""), "EOF"},
		{"skippable", packed(100, skippable), "not one zstd frame"},
		{"two frames", packed(1<<20, whole+whole), "exceeds"},
		{"half a frame", packed(1<<20, whole[:len(whole)-3]), "EOF"},
		{"cut", packed(1<<20, whole)[:20], "EOF"},
		{"longer than the file", packed(1<<20, whole), "longer than the"},
	}
	for _, tt := range tests {
		d := recipe.NewDecoder(strings.NewReader("FKRECIP1F\x00" + tt.piece))
		if _, err := d.Next(); err != nil {
			t.Fatal(err)
		}
		size := int64(1 << 40)
		if tt.name == "longer than the file" {
			size = 1 << 10
		}
		d.Begin(size)
		_, err := d.Op()
		var format *recipe.FormatError
		if !errors.As(err, &format) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v; want %q", tt.name, err, tt.want)
		}
	}
}

// Unpacking takes the same memory whatever comes, and no more than some MiB.
func TestPackedMemory(t *testing.T) {
	text := strings.Repeat("the quick brown fox jumps over the lazy dog. ", 600_000)
	s := stream(t, pack, begin(0), data(text), end(text))
	files := announced(text)
	buf := make([]byte, 64<<10)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	d := recipe.NewDecoder(bytes.NewReader(s))
	if _, err := d.Next(); err != nil {
		t.Fatal(err)
	}
	if err := recipe.Build(d, files, discard{}, buf); err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	total := after.TotalAlloc - before.TotalAlloc
	t.Logf("%d bytes in %d, %d bytes of memory", len(text), len(s), total)
	if total > 3<<20 {
		t.Errorf("unpacking %d bytes took %d bytes of memory", len(text), total)
	}
}

func TestBuildRefuses(t *testing.T) {
	files := map[int64]manifest.Entry{0: announced("abcdef"), 1: announced("x")}
	tests := []struct {
		name  string
		steps []step
		want  string
	}{
		{"longer than announced", []step{begin(0), data("abcdefg"), end("abcdefg")}, "longer than the 6 bytes"},
		{"longer by a copy", []step{begin(0), copies("old/b", 0, 7), end("")}, "length 7 is more than 6"},
		{"longer in sum", []step{begin(0), copies("old/b", 0, 5), copies("old/b", 0, 5), end("")}, "longer than"},
		{"shorter", []step{begin(0), data("abc"), end("abc")}, "ends after 3 bytes"},
		{"other content", []step{begin(0), data("abcdeX"), end("abcdeX")}, recipe.ErrSum.Error()},
		{"hash of another file", []step{begin(0), data("abcdef"), end("x")}, recipe.ErrSum.Error()},
		{"copy past the end", []step{begin(0), copies("old/a", 8, 6), end("")}, "ends before"},
		{"copy from nowhere", []step{begin(0), copies("none", 0, 6), end("")}, "no file"},
		{"keep what is not there", []step{begin(0), keep(6), end("abcdef")}, "not there"},
		{"a file that nobody asked for", []step{begin(5), end("")}, "not announced"},
	}
	for _, tt := range tests {
		_, err := build(stream(t, tt.steps...), files, "abc")
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v; want %q", tt.name, err, tt.want)
		}
	}
}

func TestDecoderRefuses(t *testing.T) {
	head := "FKRECIP1"
	tests := []struct{ name, data, want string }{
		{"magic", "FKRECIP9", "version"},
		{"frame too long", head + "F\x00D\x81\x80\x40", "length 1048577"},
		{"empty frame", head + "F\x00D\x00", "no bytes"},
		{"empty copy", head + "F\x00C\x01a\x00\x00", "no bytes"},
		{"unknown operation", head + "F\x00X", "not an operation"},
		{"file in a file", head + "F\x00F\x01", "not an operation"},
		{"end in a file", head + "F\x00Z\x01", "not an operation"},
		{"operation outside", head + "D\x01x", "where a file"},
		{"same source without one", head + "F\x00C\x00\x00\x01", "there was none"},
		{"source repeated", head + "F\x00C\x01a\x00\x01C\x01a\x00\x01", "repeated"},
		{"source ../x", head + "F\x00C\x04../x\x00\x01", `part ".."`},
		{"source absolute", head + "F\x00C\x02/x\x00\x01", "absolute"},
		{"source too long", head + "F\x00C\xff\xff\x7f", "path length"},
		{"keep late", head + "F\x00D\x01xK\x01", "after another"},
		{"out of order", head + "F\x03E" + strings.Repeat("s", 32) + "F\x02", "after file"},
		{"twice", head + "F\x03E" + strings.Repeat("s", 32) + "F\x03", "after file"},
		{"index beyond any manifest", head + "F\xff\xff\xff\xff\x7f", "file index"},
		{"count", head + "Z\x01", "announces 1 files"},
		{"varint", head + "F\x80\x00", "shortest"},
	}
	for _, tt := range tests {
		d := recipe.NewDecoder(strings.NewReader(tt.data))
		var err error
		for err == nil {
			if _, err = d.Next(); err != nil {
				break
			}
			size := int64(10)
			if strings.Contains(tt.name, "order") || tt.name == "twice" {
				size = 0
			}
			d.Begin(size)
			for {
				var op recipe.Op
				if op, err = d.Op(); err != nil || op.Kind == recipe.End {
					break
				}
			}
		}
		var format *recipe.FormatError
		if !errors.As(err, &format) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v; want %q", tt.name, err, tt.want)
		}
	}
}

func TestEncoderRefuses(t *testing.T) {
	tests := []struct {
		name  string
		steps []step
	}{
		{"data outside", []step{data("x")}},
		{"file in a file", []step{begin(0), begin(1)}},
		{"out of order", []step{begin(1), end(""), begin(1)}},
		{"keep late", []step{begin(0), data("x"), keep(1)}},
		{"keep nothing", []step{begin(0), keep(0)}},
		{"copy nothing", []step{begin(0), copies("a", 0, 0)}},
		{"copy from ../x", []step{begin(0), copies("../x", 0, 1)}},
		{"negative offset", []step{begin(0), copies("a", -1, 1)}},
		{"negative index", []step{begin(-1)}},
	}
	for _, tt := range tests {
		e := recipe.NewEncoder(io.Discard)
		var err error
		for _, s := range tt.steps {
			if err = s(e); err != nil {
				break
			}
		}
		if err == nil {
			t.Errorf("%s: accepted", tt.name)
		}
		if e.Close() == nil {
			t.Errorf("%s: Close forgets the error", tt.name)
		}
	}
}

// Any file, cut into any operations, comes out as it went in.
func TestRandomRecipes(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 7))
	b := base["old/b"]
	for range 100 {
		var content strings.Builder
		var steps []step
		half := ""
		if r.IntN(3) == 0 {
			half = strings.Repeat("h", 1+r.IntN(100))
			n := 1 + r.IntN(len(half))
			steps = append(steps, keep(int64(n)))
			content.WriteString(half[:n])
		}
		for range r.IntN(6) {
			if r.IntN(2) == 0 {
				piece := strings.Repeat(string(rune('a'+r.IntN(26))), r.IntN(1<<uint(r.IntN(20))))
				steps = append(steps, data(piece))
				content.WriteString(piece)
				continue
			}
			offset, n := r.IntN(len(b)/2), 1+r.IntN(len(b)/2)
			steps = append(steps, copies("old/b", int64(offset), int64(n)))
			content.WriteString(b[offset : offset+n])
		}
		want := content.String()
		all := append([]step{begin(5)}, append(steps, end(want))...)
		got, err := build(stream(t, all...), map[int64]manifest.Entry{5: announced(want)}, half)
		if err != nil || got[5] != want {
			t.Fatalf("%d bytes came out as %d, %v", len(want), len(got[5]), err)
		}
	}
}

// Whatever bytes come, the decoder ends, makes no more than was announced, and what it
// accepts is written again by the encoder as the same operations.
func FuzzDecoder(f *testing.F) {
	f.Add(stream(f, begin(0), end("")), int64(0))
	f.Add(stream(f, begin(1), data("hello"), copies("a/b", 1, 2), copies("a/b", 5, 1), end("x"), begin(2), keep(8), end("y")), int64(8))
	f.Add([]byte("FKRECIP1F\x00D\xff\xff\xff\xff\x0f"), int64(1<<40))
	text := strings.Repeat("hello ", 500)
	f.Add(stream(f, pack, begin(0), data(text), end(text)), int64(len(text)))
	f.Add([]byte("FKRECIP1F\x00"+packed(1<<20, frame(f, strings.Repeat("\x00", 1<<20)))+"E"), int64(1<<20))
	f.Fuzz(func(t *testing.T, in []byte, size int64) {
		if size < 0 {
			return
		}
		first, err := operations(in, size)
		if err != nil {
			return
		}
		var again bytes.Buffer
		e := recipe.NewEncoder(&again)
		for _, o := range first {
			if err := o(e); err != nil {
				t.Fatalf("decoded, but cannot be encoded: %v", err)
			}
		}
		if err := e.Close(); err != nil {
			t.Fatal(err)
		}
		if second, err := operations(again.Bytes(), size); err != nil || len(second) != len(first) {
			t.Fatalf("encoded again: %d operations of %d, %v", len(second), len(first), err)
		}
	})
}

// operations decodes a stream into the encoder's calls that would make it.
func operations(in []byte, size int64) (all []step, err error) {
	d := recipe.NewDecoder(bytes.NewReader(in))
	for {
		i, err := d.Next()
		if errors.Is(err, io.EOF) {
			return all, nil
		}
		if err != nil {
			return nil, err
		}
		d.Begin(size)
		all = append(all, begin(i))
		var made int64
		for {
			op, err := d.Op()
			if err != nil {
				return nil, err
			}
			made += op.Length
			if made > size || op.Length > size {
				panic("more than was announced")
			}
			switch op.Kind {
			case recipe.Keep:
				all = append(all, keep(op.Length))
			case recipe.Copy:
				all = append(all, copies(op.Path, op.Offset, op.Length))
			case recipe.Data:
				s := string(slices.Clone(op.Data))
				all = append(all, func(e *recipe.Encoder) error {
					_, err := io.WriteString(e, s)
					return errors.Join(err, e.Flush())
				})
			case recipe.End:
				all = append(all, func(e *recipe.Encoder) error { return e.End(op.Sum) })
			}
			if op.Kind == recipe.End {
				break
			}
		}
	}
}

func BenchmarkBuild(b *testing.B) {
	content := strings.Repeat("0123456789abcdef", 4<<20)
	s := stream(b, begin(0), data(content), end(content))
	want := announced(content)
	buf := make([]byte, 256<<10)
	b.SetBytes(int64(len(content)))
	for b.Loop() {
		d := recipe.NewDecoder(bytes.NewReader(s))
		if _, err := d.Next(); err != nil {
			b.Fatal(err)
		}
		if err := recipe.Build(d, want, discard{}, buf); err != nil {
			b.Fatal(err)
		}
	}
}

type discard struct{}

func (discard) Write(p []byte) (int, error)        { return len(p), nil }
func (discard) Kept(int64) (io.Reader, error)      { return nil, errors.New("nothing") }
func (discard) Source(string) (io.ReaderAt, error) { return nil, errors.New("nothing") }
