package borgsegment

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"farkeep/pusher/borgtest"
)

// entry makes an entry with a body that follows its header.
func entry(tag Tag, body []byte) []byte {
	b := make([]byte, HeaderSize, HeaderSize+len(body))
	binary.LittleEndian.PutUint32(b[4:], uint32(HeaderSize+len(body)))
	b[8] = byte(tag)
	b = append(b, body...)
	binary.LittleEndian.PutUint32(b, crc32.ChecksumIEEE(b[4:]))
	return b
}

func key(n byte) []byte { return bytes.Repeat([]byte{n}, KeySize) }

func read(mode Mode, b []byte) (all []Entry, err error) {
	r := NewReader(mode)
	r.Reset(bytes.NewReader(b), int64(len(b)))
	var e Entry
	for r.Next(&e) {
		all = append(all, e)
	}
	return all, r.Err()
}

func TestReader(t *testing.T) {
	parts := [][]byte{
		[]byte(Magic),
		entry(Put, append(key(1), make([]byte, 3*checkedBuffer)...)),
		entry(Put, append(key(2), "data"...)),
		entry(Delete, key(1)),
		entry(Put, key(3)),
		entry(Commit, nil),
	}
	b := bytes.Join(parts, nil)
	for _, mode := range []Mode{Headers, Checked} {
		all, err := read(mode, b)
		if err != nil || len(all) != 5 {
			t.Fatalf("mode %d: %d entries, %v", mode, len(all), err)
		}
		at := int64(len(Magic))
		for i, e := range all {
			raw := parts[i+1]
			if e.Offset != at || int(e.Size) != len(raw) || e.CRC != crc32.ChecksumIEEE(raw[4:]) || e.End() != at+int64(len(raw)) {
				t.Errorf("mode %d, entry %d: %+v", mode, i, e)
			}
			if e.Tag != Commit && !bytes.Equal(e.Key[:], raw[HeaderSize:KeyedSize]) {
				t.Errorf("mode %d, entry %d: key %x", mode, i, e.Key)
			}
			if offset, n := e.Data(); e.Tag == Put && !bytes.Equal(b[offset:offset+n], raw[KeyedSize:]) || e.Tag != Put && n != 0 {
				t.Errorf("mode %d, entry %d: data at %d, %d bytes", mode, i, offset, n)
			}
			at = e.End()
		}
	}
}

func TestReaderRefuses(t *testing.T) {
	put := entry(Put, append(key(1), make([]byte, 100)...))
	wrong := slices.Clone(put)
	wrong[60] ^= 1
	huge := slices.Clone(put)
	binary.LittleEndian.PutUint32(huge[4:], MaxEntry+1)
	short := slices.Clone(put)
	binary.LittleEndian.PutUint32(short[4:], KeyedSize-1)
	magic := []byte(Magic)
	for _, c := range []struct {
		name    string
		in      [][]byte
		offset  int64
		want    string
		checked bool // only mode Checked can see it
	}{
		{name: "nothing", want: "a segment does not have 0 bytes"},
		{name: "no magic", in: [][]byte{put}, want: "does not begin with BORG_SEG"},
		{name: "attic", in: [][]byte{[]byte(atticMagic), put}, want: "Attic"},
		{name: "half a header", in: [][]byte{magic, put[:5]}, offset: 8, want: "5 bytes are left"},
		{name: "half a key", in: [][]byte{magic, put, put[:20]}, offset: 149, want: "a PUT of 141 bytes, and only 20 are left"},
		{name: "cut data", in: [][]byte{magic, put[:100]}, offset: 8, want: "only 100 are left"},
		{name: "huge", in: [][]byte{magic, huge}, offset: 8, want: "larger than borg makes them"},
		{name: "short put", in: [][]byte{magic, short}, offset: 8, want: "a PUT of 40 bytes"},
		{name: "size 0", in: [][]byte{magic, make([]byte, 50)}, offset: 8, want: "a PUT of 0 bytes"},
		{name: "long delete", in: [][]byte{magic, entry(Delete, make([]byte, KeySize+1))}, offset: 8, want: "a DELETE of 42 bytes"},
		{name: "long commit", in: [][]byte{magic, entry(Commit, []byte{1})}, offset: 8, want: "a COMMIT of 10 bytes"},
		{name: "PUT2", in: [][]byte{magic, entry(3, make([]byte, 60))}, offset: 8, want: "tag 3"},
		{name: "wrong CRC", in: [][]byte{magic, put, wrong}, offset: 149, want: "CRC", checked: true},
	} {
		for _, mode := range []Mode{Headers, Checked} {
			_, err := read(mode, bytes.Join(c.in, nil))
			if c.checked && mode == Headers {
				if err != nil {
					t.Errorf("%s: seen without reading the data: %v", c.name, err)
				}
				continue
			}
			var format *FormatError
			if !errors.As(err, &format) || format.Offset != c.offset || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s, mode %d: %v", c.name, mode, err)
			}
		}
	}
}

// failing reads n bytes and then fails.
type failing struct {
	r   io.ReaderAt
	n   int64
	err error
}

func (f failing) ReadAt(p []byte, off int64) (int, error) {
	if off >= f.n {
		return 0, f.err
	}
	n, err := f.r.ReadAt(p[:min(int64(len(p)), f.n-off)], off)
	if err == nil && n < len(p) {
		err = f.err
	}
	return n, err
}

func TestErrorsOfReading(t *testing.T) {
	b := bytes.Join([][]byte{[]byte(Magic), entry(Put, append(key(1), make([]byte, 2*checkedBuffer)...)), entry(Commit, nil)}, nil)
	broken := errors.New("input/output error")
	r := NewReader(Checked)
	var e Entry
	r.Reset(failing{bytes.NewReader(b), 100_000, broken}, int64(len(b)))
	if r.Next(&e) || !errors.Is(r.Err(), broken) || !strings.Contains(r.Err().Error(), "at byte 100000") {
		t.Errorf("%v", r.Err())
	}
	// A file that was cut while it was read is no segment.
	r.Reset(failing{bytes.NewReader(b), 100_000, io.EOF}, int64(len(b)))
	var format *FormatError
	if r.Next(&e) || !errors.As(r.Err(), &format) || format.Offset != 100_000 {
		t.Errorf("%v", r.Err())
	}
	if r.Next(&e) {
		t.Error("went on after an error")
	}
	r.Reset(bytes.NewReader(b), MaxSize+1)
	if r.Next(&e) || !errors.As(r.Err(), &format) {
		t.Errorf("larger than any: %v", r.Err())
	}
	// The reader is as good as new for the next one.
	r.Reset(bytes.NewReader(b), int64(len(b)))
	n := 0
	for r.Next(&e) {
		n++
	}
	if n != 2 || r.Err() != nil {
		t.Errorf("%d entries, %v", n, r.Err())
	}
}

func TestIsCommitted(t *testing.T) {
	put := entry(Put, append(key(0), make([]byte, 100)...))
	del := entry(Delete, key(0))
	bad := slices.Clone(put)
	bad[60] ^= 1
	magic, end := []byte(Magic), commit[:]
	for _, c := range []struct {
		name string
		in   [][]byte
		want bool
		ends bool // what the cheap rule says, where it differs
	}{
		{name: "commit alone", in: [][]byte{magic, end}, want: true},
		{name: "put, delete, commit", in: [][]byte{magic, put, del, end}, want: true},
		{name: "two commits", in: [][]byte{magic, end, end}, want: true},
		{name: "no magic", in: [][]byte{put, end}},
		{name: "nothing"},
		{name: "magic alone", in: [][]byte{magic}},
		{name: "no commit", in: [][]byte{magic, put}},
		{name: "something after the commit", in: [][]byte{magic, end, put}},
		{name: "commit between", in: [][]byte{magic, end, put, end}, ends: true},
		{name: "wrong sum", in: [][]byte{magic, bad, end}, ends: true},
		{name: "cut entry that ends like a commit", in: [][]byte{magic, put[:50], end}, ends: true},
		{name: "short put", in: [][]byte{magic, entry(Put, nil), end}, ends: true},
		{name: "long commit", in: [][]byte{magic, entry(Commit, []byte{1})}},
		{name: "unknown tag", in: [][]byte{magic, entry(7, nil), end}, ends: true},
	} {
		b := bytes.Join(c.in, nil)
		if got, err := IsCommitted(bytes.NewReader(b), int64(len(b))); err != nil || got != c.want {
			t.Errorf("%s: got %v, %v", c.name, got, err)
		}
		if got, err := EndsWithCommit(bytes.NewReader(b), int64(len(b))); err != nil || got != (c.want || c.ends) {
			t.Errorf("%s: ends with a commit: got %v, %v", c.name, got, err)
		}
	}
}

func TestNumber(t *testing.T) {
	for name, want := range map[string]uint32{"0": 0, "17": 17, "4294967295": 4294967295} {
		if got, ok := Number(name); !ok || got != want {
			t.Errorf("%s: %d %v", name, got, ok)
		}
		if got, ok := PathNumber("data/3/" + name); !ok || got != want {
			t.Errorf("data/3/%s: %d %v", name, got, ok)
		}
	}
	for _, name := range []string{"", "01", "-1", "+1", "1.tmp", "a", "99999999999", "1 ", "1/2"} {
		if _, ok := Number(name); ok {
			t.Errorf("%q is no number of borg's", name)
		}
		if _, ok := PathNumber("data/0/" + name); ok {
			t.Errorf("data/0/%q is no segment of borg's", name)
		}
	}
	for _, path := range []string{"data/0", "data/x/1", "0/1", "index.5", "old/data/0/1"} {
		if _, ok := PathNumber(path); ok {
			t.Errorf("%q is no segment of borg's", path)
		}
	}
}

// What borg itself writes is read whole, and both modes see the same.
func TestRealBorg(t *testing.T) {
	r := borgtest.Init(t, t.TempDir(), "repo", "repokey")
	for i := range 3 {
		r.Fill(t, 5, 100_000)
		r.Create(t, fmt.Sprint("a", i))
	}
	r.Run(t, "delete", r.Path+"::a0")
	r.Run(t, "compact", r.Path)
	names, err := filepath.Glob(filepath.Join(r.Path, "data", "*", "*"))
	if err != nil || len(names) < 4 {
		t.Fatalf("%d segments, %v", len(names), err)
	}
	tags := map[Tag]int{}
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		quick, err := read(Headers, b)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		full, err := read(Checked, b)
		if err != nil || !slices.Equal(quick, full) {
			t.Errorf("%s: the modes differ: %v", name, err)
		}
		for _, e := range full {
			tags[e.Tag]++
			if e.Tag == Put && e.Key == Manifest {
				tags[99]++
			}
		}
	}
	if tags[Put] < 15 || tags[Commit] < 1 || tags[99] < 1 {
		t.Errorf("entries by tag: %v", tags)
	}
}

func TestNextDoesNotAllocate(t *testing.T) {
	var b bytes.Buffer
	b.WriteString(Magic)
	for range 1000 {
		b.Write(entry(Put, append(key(7), make([]byte, 200)...)))
	}
	src := bytes.NewReader(b.Bytes())
	for _, mode := range []Mode{Headers, Checked} {
		r := NewReader(mode)
		if n := testing.AllocsPerRun(10, func() {
			var e Entry
			for r.Reset(src, int64(b.Len())); r.Next(&e); {
			}
			if r.Err() != nil {
				t.Error(r.Err())
			}
		}); n > 1 {
			t.Errorf("mode %d: %v allocations for 1000 entries", mode, n)
		}
	}
}

// Whatever the bytes: the modes agree on the entries as far as both go, the
// entries lie end to end from the magic to the end of the file, and what Checked
// accepts can be put together again from its entries.
func FuzzReader(f *testing.F) {
	put := entry(Put, append(key(1), "some data"...))
	f.Add([]byte(Magic))
	f.Add(slices.Concat([]byte(Magic), commit[:]))
	f.Add(slices.Concat([]byte(Magic), put, entry(Delete, key(1)), commit[:]))
	f.Add(slices.Concat([]byte(Magic), put[:30]))
	f.Add(slices.Concat([]byte(Magic), entry(3, make([]byte, 40))))
	f.Add([]byte(atticMagic + "........."))
	f.Fuzz(func(t *testing.T, b []byte) {
		quick, quickErr := read(Headers, b)
		full, fullErr := read(Checked, b)
		if fullErr == nil && quickErr != nil {
			t.Fatalf("whole, but its headers are not: %v", quickErr)
		}
		if len(full) > len(quick) || !slices.Equal(full, quick[:len(full)]) {
			t.Fatalf("checked %+v, headers %+v", full, quick)
		}
		at := int64(len(Magic))
		for _, e := range quick {
			if e.Offset != at || e.Size < HeaderSize {
				t.Fatalf("%+v does not begin at %d", e, at)
			}
			at = e.End()
		}
		if quickErr == nil && at != int64(len(b)) {
			t.Fatalf("whole, but %d bytes of %d were read", at, len(b))
		}
		if fullErr == nil {
			again := []byte(Magic)
			for _, e := range full {
				again = append(again, entry(e.Tag, b[e.Offset+HeaderSize:e.End()])...)
			}
			if !bytes.Equal(again, b) {
				t.Fatal("another segment has the same entries")
			}
		}
		ok, err := IsCommitted(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			t.Fatalf("bytes in memory cannot fail to be read: %v", err)
		}
		if ok && (fullErr != nil || !bytes.HasSuffix(b, commit[:])) {
			t.Fatal("committed, but not whole, or without a commit at the end")
		}
	})
}

// A segment as borg makes them: 500 MB in chunks of 1.5 MB on average would take
// too long to write here, so that there are 64 MB of them.
func BenchmarkReader(b *testing.B) {
	path := filepath.Join(b.TempDir(), "17")
	random := rand.New(rand.NewPCG(1, 2))
	var all bytes.Buffer
	all.WriteString(Magic)
	entries := 0
	for all.Len() < 64<<20 {
		data := make([]byte, KeySize+random.IntN(3<<20))
		all.Write(entry(Put, data))
		entries++
	}
	if err := os.WriteFile(path, all.Bytes(), 0o644); err != nil {
		b.Fatal(err)
	}
	for name, mode := range map[string]Mode{"headers": Headers, "checked": Checked} {
		b.Run(name, func(b *testing.B) {
			f, err := os.Open(path)
			if err != nil {
				b.Fatal(err)
			}
			defer f.Close()
			r := NewReader(mode)
			b.SetBytes(int64(all.Len()))
			b.ReportAllocs()
			for b.Loop() {
				var e Entry
				n := 0
				for r.Reset(f, int64(all.Len())); r.Next(&e); {
					n++
				}
				if r.Err() != nil || n != entries {
					b.Fatal(n, r.Err())
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(entries), "ns/entry")
		})
	}
}
