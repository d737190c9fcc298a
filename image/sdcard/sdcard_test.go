package sdcard

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"farkeep/image/fat"
	"farkeep/shared/card"
	"farkeep/shared/hint"
)

var when = time.Date(2026, 3, 4, 5, 6, 8, 0, time.UTC)

func content() Content {
	slot := func(s card.Slot) []fat.File {
		return []fat.File{
			{Name: card.CmdlineFile, Data: []byte(card.CommandLineWords(s))},
			{Name: card.RelayFile, Data: card.RelayConfig(-1, false)},
			{Name: card.KernelFile, Data: bytes.Repeat([]byte("kernel"), 50000)},
		}
	}
	return Content{
		Selector: []fat.File{
			{Name: card.BootcodeFile, Data: []byte("bootcode")},
			{Name: card.AutobootFile, Data: card.AutobootConfig(card.A)},
		},
		SlotA: slot(card.A), SlotB: slot(card.B), Time: when,
	}
}

func write(t *testing.T) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "farkeep.img")
	if err := Write(context.Background(), name, content()); err != nil {
		t.Fatal(err)
	}
	return name
}

// sum is a digest of a file's length and of what is not zero in it; hashing
// the empty parts of a card would take most of the tests' time.
func sum(t *testing.T, name string) [32]byte {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	buf, zeros := make([]byte, block), make([]byte, block)
	for at := int64(0); ; at += block {
		n, err := io.ReadFull(f, buf)
		if n > 0 && !bytes.Equal(buf[:n], zeros[:n]) {
			fmt.Fprintf(h, "%d %x\n", at, sha256.Sum256(buf[:n]))
		}
		if err != nil {
			fmt.Fprintf(h, "%d", at+int64(n))
			return [32]byte(h.Sum(nil))
		}
	}
}

func read(t *testing.T, img string, partition int, name string) []byte {
	t.Helper()
	f, err := os.Open(img)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	v, err := OpenPartition(f, partition)
	if err != nil {
		t.Fatal(err)
	}
	data, err := v.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func run(t *testing.T, pkg string, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath(args[0]); err != nil {
		t.Fatalf("install the package %s: %v", pkg, err)
	}
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v\n%s", args, err, out)
	}
	return string(out)
}

func TestImageIsReproducibleAndSound(t *testing.T) {
	a, b := write(t), write(t)
	if sum(t, a) != sum(t, b) {
		t.Error("the same content gives different images")
	}
	// Every partition pleases its own checker.
	for _, p := range card.Partitions() {
		part := filepath.Join(t.TempDir(), "part")
		run(t, "coreutils", "dd", "if="+a, "of="+part, "bs=4M", "status=none", "conv=sparse",
			"skip="+strconv.FormatInt(p.Start>>22, 10), "count="+strconv.FormatInt(p.Size>>22, 10))
		if p.Number == card.State {
			run(t, "e2fsprogs", "e2fsck", "-fn", part)
			if out := run(t, "e2fsprogs", "dumpe2fs", "-h", part); !strings.Contains(out, p.Label) {
				t.Errorf("the state partition has no label %s", p.Label)
			}
			continue
		}
		run(t, "dosfstools", "fsck.vfat", "-n", part)
	}
	s, err := os.Stat(a)
	if err != nil {
		t.Fatal(err)
	}
	if s.Size() != card.TotalSize {
		t.Errorf("the image has %d bytes", s.Size())
	}
}

func TestPartitionTable(t *testing.T) {
	b := masterBootRecord()
	le := binary.LittleEndian
	if len(b) != 512 || b[510] != 0x55 || b[511] != 0xaa || le.Uint32(b[440:]) != card.Signature {
		t.Fatalf("no boot record: %x", b[432:])
	}
	for i, p := range card.Partitions() {
		e := b[446+16*i : 462+16*i]
		if e[0] != 0 || e[4] != p.Type || int64(le.Uint32(e[8:]))*512 != p.Start || int64(le.Uint32(e[12:]))*512 != p.Size {
			t.Errorf("%s: entry %x", p.Name, e)
		}
	}
}

func TestPersonalise(t *testing.T) {
	from := write(t)
	before := sum(t, from)
	p := Personal{Settings: []byte("name = \"vault\"\n"), RelayLine: 17, RelayActiveHigh: true}
	one, two := filepath.Join(t.TempDir(), "vault.img"), filepath.Join(t.TempDir(), "vault.img")
	for _, to := range []string{one, two} {
		if err := Personalise(context.Background(), from, to, p); err != nil {
			t.Fatal(err)
		}
	}
	if sum(t, from) != before {
		t.Error("the image that was read has changed")
	}
	if sum(t, one) != sum(t, two) {
		t.Error("the same settings give different images")
	}
	if got := read(t, one, card.Selector, card.SettingsFile); !bytes.Equal(got, p.Settings) {
		t.Errorf("settings %q", got)
	}
	for _, slot := range []int{card.SlotA, card.SlotB} {
		if got := read(t, one, slot, card.RelayFile); !bytes.Equal(got, card.RelayConfig(17, true)) {
			t.Errorf("slot %d: relay.txt %q", slot, got)
		}
		if got := read(t, one, slot, card.KernelFile); len(got) != 300000 {
			t.Errorf("slot %d: the kernel has %d bytes", slot, len(got))
		}
	}
	if got := read(t, one, card.Selector, card.AutobootFile); !bytes.Equal(got, card.AutobootConfig(card.A)) {
		t.Errorf("autoboot.txt %q", got)
	}
	s, err := os.Stat(one)
	if err != nil {
		t.Fatal(err)
	}
	if s.Mode().Perm() != 0o600 {
		t.Errorf("an image with an appliance's keys has mode %v", s.Mode())
	}

	// Again, from a personal image: the old settings are gone.
	three := filepath.Join(t.TempDir(), "other.img")
	p = Personal{Settings: []byte("name = \"other\"\n"), RelayLine: -1}
	if err := Personalise(context.Background(), one, three, p); err != nil {
		t.Fatal(err)
	}
	if err := Personalise(context.Background(), from, two, p); err != nil {
		t.Fatal(err)
	}
	if sum(t, three) != sum(t, two) {
		t.Error("something of the first appliance is left in the second one's image")
	}
}

func TestPersonaliseRefuses(t *testing.T) {
	from := write(t)
	other := filepath.Join(t.TempDir(), "other.img")
	if err := os.WriteFile(other, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	to := filepath.Join(t.TempDir(), "to.img")
	cancelled, cancel := context.WithCancel(context.Background())
	cancel()
	for _, tt := range []struct {
		name     string
		ctx      context.Context
		from, to string
		want     string
	}{
		{"onto itself", context.Background(), from, from, "the image itself"},
		{"not an image", context.Background(), other, to, "not a Farkeep card image"},
		{"missing", context.Background(), to, to, "open image"},
		{"no such folder", context.Background(), from, filepath.Join(to, "x"), "write"},
		{"interrupted", cancelled, from, to, "canceled"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := Personalise(tt.ctx, tt.from, tt.to, Personal{Settings: []byte("x"), RelayLine: -1})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v does not say %q", err, tt.want)
			}
			if _, err := os.Stat(to); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("something was left behind: %v", err)
			}
		})
	}
	left, err := os.ReadDir(filepath.Dir(to))
	if err != nil || len(left) != 0 {
		t.Errorf("temporary files are left: %v, %v", left, err)
	}
}

func TestPersonaliseFolder(t *testing.T) {
	dir := t.TempDir()
	err := PersonaliseFolder(dir, []byte("x"))
	if err == nil || hint.Of(err) == "" {
		t.Errorf("any folder is a boot partition: %v", err)
	}
	for name, text := range map[string]string{
		card.AutobootFile: "boot_partition=2\n", "farkeep.toml.txt": "old", card.ErrorFile: "old error", card.ReadmeFile: "stays",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := PersonaliseFolder(dir, []byte("name = 1\n")); err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		data, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		got[e.Name()] = string(data)
	}
	want := map[string]string{card.AutobootFile: "boot_partition=2\n", card.SettingsFile: "name = 1\n", card.ReadmeFile: "stays"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// The build's test, which takes longer, unpacks what Compress makes.
func TestCompressLeavesNothingBehindOnFailure(t *testing.T) {
	to := filepath.Join(t.TempDir(), "x.img.xz")
	if err := Compress(context.Background(), filepath.Join(t.TempDir(), "missing"), to); err == nil {
		t.Error("a missing image was compressed")
	}
	if left, err := os.ReadDir(filepath.Dir(to)); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}
