package fat

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var when = time.Date(2026, 3, 4, 5, 6, 8, 0, time.UTC)

func sample() []File {
	return []File{
		{"BOOTCODE.BIN", bytes.Repeat([]byte("boot"), 3000)},
		{"autoboot.txt", []byte("boot_partition=2\n")},
		{"farkeep.toml", []byte("name = \"vault\"\n")},
		{"bcm2837-rpi-3-b.dtb", bytes.Repeat([]byte{7}, 30001)},
		{"bcm2837-rpi-3-b-plus.dtb", []byte("b+")},
		{"a name of more than two entries, so that the order matters.txt", []byte("x")},
		{"empty", nil},
		{"exactlythirty", []byte("13 characters: no terminator in the long name")},
	}
}

func volume() Volume {
	return Volume{Label: "FARKEEP", Serial: 0x12345678, Time: when, Size: 40 << 20, Offset: 4 << 20}
}

func format(t *testing.T, v Volume, files []File) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "volume")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(v.Size); err != nil {
		t.Fatal(err)
	}
	if err := Format(f, v, files); err != nil {
		t.Fatal(err)
	}
	return name
}

func open(t *testing.T, name string) *FS {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	s, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	v, err := Open(f, s.Size())
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// tool runs a program of the packages dosfstools and mtools, which the tests
// need: our volumes must please the programs that everybody else uses.
func tool(t *testing.T, pkg, name string, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Fatalf("install the package %s: %v", pkg, err)
	}
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "MTOOLS_SKIP_CHECK=0", "LC_ALL=C.UTF-8")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return string(out)
}

func TestOtherToolsReadWhatWeWrite(t *testing.T) {
	name := format(t, volume(), sample())
	tool(t, "dosfstools", "fsck.vfat", "-n", "-V", name)
	dir := t.TempDir()
	tool(t, "mtools", "mcopy", "-n", "-i", name, "::/*", dir)
	for _, f := range sample() {
		got, err := os.ReadFile(filepath.Join(dir, f.Name))
		if err != nil || !bytes.Equal(got, f.Data) {
			t.Errorf("mcopy reads %s differently: %d bytes, %v", f.Name, len(got), err)
		}
	}
	if label := tool(t, "mtools", "mlabel", "-s", "-i", name, "::"); !strings.Contains(label, "FARKEEP") {
		t.Errorf("mlabel says %q", label)
	}
}

func TestWeReadWhatWeWrite(t *testing.T) {
	v := open(t, format(t, volume(), sample()))
	if v.Label != "FARKEEP" || !v.Time.Equal(when) {
		t.Errorf("label %q of %v", v.Label, v.Time)
	}
	var names []string
	for _, f := range sample() {
		names = append(names, f.Name)
		got, err := v.ReadFile(strings.ToUpper(f.Name))
		if err != nil || !bytes.Equal(got, f.Data) {
			t.Errorf("%s: %d bytes, %v; want %d", f.Name, len(got), err, len(f.Data))
		}
	}
	if diff := cmp.Diff(names, v.Names()); diff != "" {
		t.Error(diff)
	}
	if _, err := v.ReadFile("missing"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing file: %v", err)
	}
}

func TestWeReadWhatOtherToolsWrite(t *testing.T) {
	name := filepath.Join(t.TempDir(), "volume")
	if err := os.WriteFile(name, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(name, 64<<20); err != nil {
		t.Fatal(err)
	}
	tool(t, "dosfstools", "mkfs.vfat", "-F", "32", "-n", "FARKEEP", name)
	src := filepath.Join(t.TempDir(), "farkeep.toml.txt")
	want := bytes.Repeat([]byte("line\r\n"), 500)
	if err := os.WriteFile(src, want, 0o600); err != nil {
		t.Fatal(err)
	}
	tool(t, "mtools", "mmd", "-i", name, "::/System Volume Information")
	tool(t, "mtools", "mcopy", "-i", name, src, "::/Farkeep.toml.txt")
	tool(t, "mtools", "mcopy", "-i", name, src, "::/gone.txt")
	tool(t, "mtools", "mdel", "-i", name, "::/gone.txt")
	tool(t, "mtools", "mcopy", "-i", name, src, "::/lower.txt") // 8.3 in lower case: no long name
	v := open(t, name)
	if diff := cmp.Diff([]string{"Farkeep.toml.txt", "lower.txt"}, v.Names()); diff != "" {
		t.Error(diff)
	}
	if got, err := v.ReadFile("farkeep.toml.txt"); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

func TestSameInputSameBytes(t *testing.T) {
	a, err := os.ReadFile(format(t, volume(), sample()))
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(format(t, volume(), sample()))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a, b) {
		t.Error("two volumes of the same files differ")
	}
}

func TestLocateFindsTheSector(t *testing.T) {
	name := format(t, volume(), sample())
	v := open(t, name)
	offset, size, err := v.Locate("autoboot.txt")
	if err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if got := string(raw[offset : offset+int64(size)]); got != "boot_partition=2\n" {
		t.Errorf("at %d lies %q", offset, got)
	}
	if _, _, err := v.Locate("empty"); err == nil {
		t.Error("an empty file has a place")
	}
}

func TestFormatRefuses(t *testing.T) {
	with := func(change func(*Volume)) Volume {
		v := volume()
		change(&v)
		return v
	}
	for _, tt := range []struct {
		name  string
		v     Volume
		files []File
		want  string
	}{
		{"too small", with(func(v *Volume) { v.Size = 16 << 20 }), nil, "too small"},
		{"odd size", with(func(v *Volume) { v.Size++ }), nil, "multiple of 512"},
		{"label", with(func(v *Volume) { v.Label = "farkeep" }), nil, "upper-case"},
		{"year", with(func(v *Volume) { v.Time = time.Unix(0, 0) }), nil, "cannot be written"},
		{"slash", volume(), []File{{"a/b", nil}}, "a/b"},
		{"dot dot", volume(), []File{{"..", nil}}, ".."},
		{"no name", volume(), []File{{"", nil}}, `""`},
		{"umlaut", volume(), []File{{"ä", nil}}, "cannot be written"},
		{"twice", volume(), []File{{"a.txt", nil}, {"A.TXT", nil}}, "two files"},
		{"full", volume(), []File{{"big", make([]byte, 41<<20)}}, "do not fit"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := Format(discard{}, tt.v, tt.files)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v does not say %q", err, tt.want)
			}
		})
	}
}

type discard struct{}

func (discard) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }

func TestManySimilarNamesStayApart(t *testing.T) {
	var files []File
	for i := range 40 {
		files = append(files, File{fmt.Sprintf("bcm2837-rpi-%02d.dtb", i), []byte{byte(i)}})
	}
	name := format(t, volume(), files)
	tool(t, "dosfstools", "fsck.vfat", "-n", name)
	v := open(t, name)
	for i, f := range files {
		if got, err := v.ReadFile(f.Name); err != nil || len(got) != 1 || got[0] != byte(i) {
			t.Errorf("%s holds %v, %v", f.Name, got, err)
		}
	}
}

// FuzzOpen damages a volume's head. Whatever it then says, reading ends, stays
// within the file and returns exactly as many bytes as an entry claims.
func FuzzOpen(f *testing.F) {
	var head sparse
	if err := Format(&head, volume(), sample()[:3]); err != nil {
		f.Fatal(err)
	}
	f.Add(uint32(13), byte(0))         // sectors per cluster
	f.Add(uint32(36), byte(1))         // FAT size
	f.Add(uint32(44), byte(200))       // root cluster
	f.Add(uint32(32*512+8), byte(2))   // the root directory's chain becomes a loop
	f.Add(uint32(32*512+20), byte(5))  // a file's chain becomes a loop
	f.Add(uint32(len(head)), byte(32)) // beyond what is written
	f.Fuzz(func(t *testing.T, at uint32, value byte) {
		damaged := bytes.Clone(head)
		damaged[int(at)%len(damaged)] = value
		v, err := Open(bytes.NewReader(damaged), volume().Size)
		if err != nil {
			return
		}
		for _, name := range v.Names() {
			data, err := v.ReadFile(name)
			if e, ferr := v.find(name); err == nil && (ferr != nil || len(data) != int(e.size)) {
				t.Errorf("%q: %d bytes, the entry says %d", name, len(data), e.size)
			}
			if offset, _, err := v.Locate(name); err == nil && (offset < 0 || offset >= volume().Size) {
				t.Errorf("%q lies at %d", name, offset)
			}
		}
	})
}

// sparse is a file in memory that is as long as what was written.
type sparse []byte

func (s *sparse) WriteAt(p []byte, off int64) (int, error) {
	if grow := int(off) + len(p) - len(*s); grow > 0 {
		*s = append(*s, make([]byte, grow)...)
	}
	return copy((*s)[off:], p), nil
}
