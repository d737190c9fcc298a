package manifest_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"farkeep/shared/manifest"

	"github.com/google/go-cmp/cmp"
)

func file(path string) manifest.Entry {
	return manifest.Entry{Path: path, Kind: manifest.File, Mode: 0o644, MTime: 1, Size: 3, Sum: manifest.Sum{1}}
}

func folder(path string) manifest.Entry {
	return manifest.Entry{Path: path, Kind: manifest.Folder, Mode: 0o755}
}

func encode(tb testing.TB, entries ...manifest.Entry) ([]byte, manifest.Summary) {
	tb.Helper()
	var b bytes.Buffer
	w := manifest.NewWriter(&b)
	for _, e := range entries {
		if err := w.Add(e); err != nil {
			tb.Fatal(err)
		}
	}
	s, err := w.Close()
	if err != nil {
		tb.Fatal(err)
	}
	return b.Bytes(), s
}

func decode(data []byte) (entries []manifest.Entry, s manifest.Summary, err error) {
	r := manifest.NewReader(bytes.NewReader(data))
	for {
		e, err := r.Next()
		if errors.Is(err, io.EOF) {
			return entries, r.Summary(), nil
		}
		if err != nil {
			return entries, manifest.Summary{}, err
		}
		entries = append(entries, e)
	}
}

func TestCheckPath(t *testing.T) {
	deep := strings.Repeat("d/", manifest.MaxDepth-1)
	tests := []struct {
		path string
		why  string // "" is accepted
	}{
		{"a", ""}, {"a/b.c/-d", ""}, {"...", ""}, {"..a", ""}, {".hidden", ""}, {"with space", ""}, {`back\slash`, ""},
		{"\xff\xfe", ""}, {"tab\there", ""}, {"cr\r", ""}, {"-rf", ""}, {deep + "f", ""},
		{strings.Repeat("n", 255), ""},
		{"", "empty"}, {"/", "absolute"}, {"/etc/passwd", "absolute"}, {"a//b", "empty part"}, {"a/", "empty part"},
		{".", `part "."`}, {"..", `part ".."`}, {"../x", `part ".."`}, {"a/../b", `part ".."`}, {"a/.", `part "."`}, {"./a", `part "."`},
		{"a\x00b", "NUL"}, {"a\nb", "newline"},
		{strings.Repeat("n", 256), "256 bytes"}, {deep + "d/f", "deep"}, {strings.Repeat("n/", 2048), "4096 bytes"},
	}
	for _, tt := range tests {
		err := manifest.CheckPath(tt.path)
		switch {
		case tt.why == "" && err != nil:
			t.Errorf("%.40q is refused: %v", tt.path, err)
		case tt.why != "" && (!errors.Is(err, manifest.ErrPath) || !strings.Contains(err.Error(), tt.why)):
			t.Errorf("%.40q: %v; want an error about %q", tt.path, err, tt.why)
		case len(fmt.Sprint(err)) > 500:
			t.Errorf("%.40q: the error has %d bytes", tt.path, len(err.Error()))
		}
	}
}

// The order must be that of a walk which sorts every folder's names: that is how
// the pusher lists without holding the list.
func TestOrderIsThatOfAWalk(t *testing.T) {
	root := t.TempDir()
	for _, p := range []string{"a", "a.b", "a-/x", "b/c/d", "b/c.d", "b-c", "b!", "b0", "z/\x01", "z\x02", "\xff/1"} {
		full := filepath.Join(root, p)
		if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(full, nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	var walked []string
	err := filepath.WalkDir(root, func(path string, _ os.DirEntry, err error) error {
		if path != root {
			walked = append(walked, strings.TrimPrefix(path, root+"/"))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	sorted := slices.SortedFunc(slices.Values(walked), manifest.ComparePaths)
	if diff := cmp.Diff(walked, sorted); diff != "" {
		t.Errorf("walk and order differ (-walk +order):\n%s", diff)
	}
}

func TestRoundTrip(t *testing.T) {
	entries := []manifest.Entry{
		folder("a"), file("a/b"), folder("a/c"), file("a/c/d"), file("a!"), folder("empty"),
		{Path: "max", Kind: manifest.File, Mode: manifest.MaxMode, MTime: -1 << 63, Size: manifest.MaxFileSize, Sum: manifest.Sum{0xff}},
		{Path: "z", Kind: manifest.File, MTime: 1<<63 - 1},
	}
	data, written := encode(t, entries...)
	got, read, err := decode(data)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(entries, got); diff != "" {
		t.Errorf("entries changed (-written +read):\n%s", diff)
	}
	if written != read || read.Entries != 8 || read.Files != 5 || read.Bytes != manifest.MaxFileSize+9 {
		t.Errorf("summaries: written %+v, read %+v", written, read)
	}
	if _, s := encode(t); s.Entries != 0 || s.Digest == (manifest.Sum{}) {
		t.Errorf("the empty manifest: %+v", s)
	}
}

func TestDigestIsOfContent(t *testing.T) {
	base := []manifest.Entry{folder("a"), file("a/b")}
	_, want := encode(t, base...)
	change := func(what string, same bool, f func(e []manifest.Entry)) {
		e := slices.Clone(base)
		f(e)
		if _, got := encode(t, e...); (got.Digest == want.Digest) != same {
			t.Errorf("%s: digest equal %v; want %v", what, !same, same)
		}
	}
	change("times", true, func(e []manifest.Entry) { e[0].MTime, e[1].MTime = 7, 8 })
	change("name", false, func(e []manifest.Entry) { e[1].Path = "a/c" })
	change("mode of a file", false, func(e []manifest.Entry) { e[1].Mode = 0o600 })
	change("mode of a folder", false, func(e []manifest.Entry) { e[0].Mode = 0o700 })
	change("size", false, func(e []manifest.Entry) { e[1].Size = 4 })
	change("sum", false, func(e []manifest.Entry) { e[1].Sum[31] = 1 })
	change("kind", false, func(e []manifest.Entry) { e[1] = folder("a/b") })

	// Written down once and for all: another implementation must find the same.
	out, err := exec.Command("sh", "-c", `printf 'farkeep manifest 1\n' | b2sum -l 256`).Output()
	if err != nil {
		t.Fatal("b2sum (package coreutils): ", err)
	}
	if _, s := encode(t); !strings.HasPrefix(string(out), s.Digest.String()) {
		t.Errorf("the empty manifest's digest is %v, b2sum says %s", s.Digest, out)
	}
}

func TestWhatIsNoManifest(t *testing.T) {
	tests := []struct {
		name    string
		entries []manifest.Entry
		want    string
	}{
		{"not sorted", []manifest.Entry{file("b"), file("a")}, "not in order"},
		{"twice", []manifest.Entry{file("a"), file("a")}, "twice"},
		{"folder and file", []manifest.Entry{folder("a"), file("a")}, "twice"},
		{"file as a folder", []manifest.Entry{file("a"), file("a/b")}, "which is a file"},
		{"folder not listed", []manifest.Entry{file("a/b")}, "not listed"},
		{"folder not listed, deep", []manifest.Entry{folder("a"), file("a/b"), file("a/c/d")}, "not listed"},
		{"folder left and entered again", []manifest.Entry{folder("a"), file("a/x"), file("a-"), file("a/y")}, "not in order"},
		{"path", []manifest.Entry{file("../x")}, `part ".."`},
		{"absolute", []manifest.Entry{file("/x")}, "absolute"},
		{"mode", []manifest.Entry{{Path: "a", Kind: manifest.File, Mode: 0o10000}}, "permission bits"},
		{"size", []manifest.Entry{{Path: "a", Kind: manifest.File, Size: manifest.MaxFileSize + 1}}, "size"},
		{"negative size", []manifest.Entry{{Path: "a", Kind: manifest.File, Size: -1}}, "size"},
		{"link", []manifest.Entry{{Path: "a", Kind: 'L'}}, "neither file nor folder"},
		{"folder with size", []manifest.Entry{{Path: "a", Kind: manifest.Folder, Size: 1}}, "neither size nor sum"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := manifest.NewWriter(io.Discard)
			var err error
			for _, e := range tt.entries {
				err = w.Add(e)
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v; want %q", err, tt.want)
			}
			if _, closeErr := w.Close(); closeErr == nil {
				t.Error("Close forgets the error")
			}
		})
	}
}

// The same rules must hold for bytes that no Writer would write.
func TestReaderRefuses(t *testing.T) {
	good, _ := encode(t, folder("a"), file("a/b"))
	head := "FKMANIF1"
	sum := strings.Repeat("s", 32)
	entry := func(shared, length byte, rest string) string {
		return "F" + string([]byte{shared, length}) + rest + "\x01\x00\x00" + sum
	}
	tests := []struct{ name, data, want string }{
		{"nothing", "", "unexpected EOF"},
		{"magic", "FKMANIF2", "version"},
		{"kind", head + "L", "neither file nor folder"},
		{"shared too long", head + entry(1, 1, "a"), "shared length"},
		{"shared too short", head + entry(0, 2, "ab") + entry(0, 2, "ac"), "shares more"},
		{"adds nothing", head + entry(0, 2, "ab") + entry(1, 0, ""), "adds nothing"},
		{"dot dot", head + entry(0, 4, "../x"), `part ".."`},
		{"absolute", head + entry(0, 2, "/x"), "absolute"},
		{"long varint", head + "F\x80\x00\x01a", "shortest"},
		{"varint over 64 bits", head + "F\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "64 bits"},
		{"path length", head + "F\x00\xff\xff\xff\x7f", "path length"},
		{"mode", head + "F\x00\x01a\xff\x7f", "mode"},
		{"size", head + "F\x00\x01a\x01\x00\xff\xff\xff\xff\xff\xff\x7f", "size"},
		{"counts", head + "E\x01\x00" + sum, "announces 1 entries"},
		{"digest", head + "E\x00\x00" + sum, manifest.ErrDigest.Error()},
		{"bytes after the end", string(good) + "x", "after the end"},
		{"10^9 entries", head + "E\x80\x94\xeb\xdc\x03\x00" + sum, "number of entries"},
	}
	for _, tt := range tests {
		_, _, err := decode([]byte(tt.data))
		var format *manifest.FormatError
		if !errors.As(err, &format) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v; want %q", tt.name, err, tt.want)
		}
	}
	for n := range good {
		if _, _, err := decode(good[:n]); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("cut after %d of %d bytes: %v", n, len(good), err)
		}
	}
	for i := range good {
		bad := slices.Clone(good)
		bad[i] ^= 1
		// Modification times alone are not under the digest.
		if entries, s, err := decode(bad); err == nil && (len(entries) != 2 || entries[0].MTime == 0 && entries[1].MTime == 1) {
			t.Errorf("a flipped bit at byte %d is not found: %+v", i, s)
		}
	}
}

func TestErrorSaysWhere(t *testing.T) {
	data, _ := encode(t, file("a"), file("b"), file("c"))
	r := manifest.NewReader(bytes.NewReader(data[:len(data)-40]))
	var err error
	for err == nil {
		_, err = r.Next()
	}
	var format *manifest.FormatError
	if !errors.As(err, &format) || format.Entry != 2 || format.Offset != 8+2*(1+2+1+2+1+1+32) {
		t.Errorf("%v; want entry 2 and its place", err)
	}
}

func TestDiff(t *testing.T) {
	changed := file("d/changed")
	changed.Size = 9
	touched := file("touched")
	touched.MTime, touched.Mode = 5, 0o600
	old := []manifest.Entry{folder("d"), file("d/changed"), file("d/gone"), file("kind"), file("same"), file("touched"), folder("was"), file("was/in")}
	new := []manifest.Entry{file("appeared"), folder("d"), changed, folder("kind"), file("kind/in"), file("same"), touched}
	want := []string{"New appeared 0", "Unchanged d 1", "Changed d/changed 2", "Gone d/gone -1", "Changed kind 3", "New kind/in 4",
		"Unchanged same 5", "Unchanged touched 6", "Gone was -1", "Gone was/in -1"}
	a, _ := encode(t, old...)
	b, _ := encode(t, new...)
	names := map[manifest.Relation]string{manifest.Unchanged: "Unchanged", manifest.Changed: "Changed", manifest.New: "New", manifest.Gone: "Gone"}
	steps := func(old, new *manifest.Reader) (got []string, err error) {
		err = manifest.Diff(old, new, func(c manifest.Change) error {
			path := c.New.Path
			if c.Relation == manifest.Gone {
				path = c.Old.Path
			}
			got = append(got, fmt.Sprintf("%s %s %d", names[c.Relation], path, c.Index))
			return nil
		})
		return got, err
	}
	reader := func(b []byte) *manifest.Reader { return manifest.NewReader(bytes.NewReader(b)) }
	got, err := steps(reader(a), reader(b))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("steps (-want +got):\n%s", diff)
	}
	got, err = steps(nil, reader(b))
	if err != nil || len(got) != len(new) || !strings.HasPrefix(got[0], "New ") {
		t.Errorf("against nothing: %v, %v", got, err)
	}
	var side *manifest.SideError
	if _, err := steps(reader(a[:20]), reader(b)); !errors.As(err, &side) || !side.Old {
		t.Errorf("a damaged old manifest: %v", err)
	}
	if _, err := steps(reader(a), reader(b[:20])); !errors.As(err, &side) || side.Old {
		t.Errorf("a damaged new manifest: %v", err)
	}
}

func TestSet(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for _, n := range []int64{0, 1, 63, 64, 65, 1000} {
		for range 50 {
			s := manifest.NewSet(n)
			want := map[int64]bool{}
			for i := range n {
				if r.IntN(3) > 0 {
					s.Add(i)
					want[i] = true
				}
			}
			for i := range n {
				if r.IntN(10) == 0 {
					s.Remove(i)
					delete(want, i)
				}
			}
			var b bytes.Buffer
			written, err := s.WriteTo(&b)
			if err != nil || written != int64(b.Len()) {
				t.Fatalf("wrote %d, says %d, %v", b.Len(), written, err)
			}
			b.WriteString("rest")
			got, err := manifest.ReadSet(&b, n)
			if err != nil || b.String() != "rest" {
				t.Fatalf("read: %v, left over %q", err, b.String())
			}
			if got.Len() != int64(len(want)) || s.Len() != got.Len() {
				t.Fatalf("%d indexes; want %d", got.Len(), len(want))
			}
			last := int64(-1)
			for i := range got.All() {
				if !want[i] || i <= last {
					t.Fatalf("index %d after %d, wanted %v", i, last, want[i])
				}
				last = i
			}
		}
	}
	if s := manifest.NewSet(8); s.Has(-1) || s.Has(8) {
		t.Error("a set has what is outside of its manifest")
	}
}

func TestReadSetRefuses(t *testing.T) {
	for _, data := range []string{"", "\x00", "\x01", "\x05\x00\x00\x00", "\x08\x01\x00\x00", "\x00\x09\x00\x00", "\x00\x01\x00\x01\x00\x00",
		"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\x02\x00\x00", "\x01\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\x00\x00", "\x80\x00\x01\x00\x00"} {
		if s, err := manifest.ReadSet(strings.NewReader(data), 8); err == nil {
			t.Errorf("%q was read as %d indexes", data, s.Len())
		}
	}
}

// What a Reader accepts, a Writer writes again byte for byte.
func FuzzReader(f *testing.F) {
	for _, entries := range [][]manifest.Entry{
		nil, {file("a")}, {folder("a"), file("a/b"), file("a-")}, {folder("x"), folder("x/y"), folder("x/y/z"), file("x/y/z/\xff")},
	} {
		data, _ := encode(f, entries...)
		f.Add(data)
		f.Add(data[:len(data)-1])
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		entries, s, err := decode(data)
		if err != nil {
			return
		}
		again, s2 := encode(t, entries...)
		if !bytes.Equal(again, data) || s != s2 {
			t.Errorf("accepted, but written differently: %x", again)
		}
		for _, e := range entries {
			if err := manifest.CheckPath(e.Path); err != nil || !filepath.IsLocal(e.Path) {
				t.Errorf("accepted the path %q: %v", e.Path, err)
			}
		}
	})
}

// What passes the door stays below the folder that it is joined to.
func FuzzCheckPath(f *testing.F) {
	for _, s := range []string{"a/b", "../x", "a/../../x", "/x", "a//b", "."} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, path string) {
		if manifest.CheckPath(path) != nil {
			return
		}
		if joined := filepath.Join("/root", path); joined != "/root/"+path || !filepath.IsLocal(path) {
			t.Errorf("%q was accepted and leads to %q", path, joined)
		}
	})
}

func FuzzSet(f *testing.F) {
	f.Add([]byte("\x00\x00"), int64(8))
	f.Add([]byte("\x01\x02\x01\x01\x00\x00"), int64(8))
	f.Fuzz(func(t *testing.T, data []byte, n int64) {
		if n < 0 || n > 1<<16 {
			return
		}
		r := bytes.NewReader(data)
		s, err := manifest.ReadSet(r, n)
		if err != nil {
			return
		}
		var b bytes.Buffer
		if _, err := s.WriteTo(&b); err != nil || !bytes.Equal(b.Bytes(), data[:len(data)-r.Len()]) {
			t.Errorf("read %x, wrote %x, %v", data, b.Bytes(), err)
		}
	})
}
