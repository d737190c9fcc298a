package boot

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"farkeep/shared/hint"
	"farkeep/shared/tomlfile"

	"github.com/google/go-cmp/cmp"
)

func TestParseWords(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want Words
	}{
		{"", Words{}},
		{"console=ttyS1,115200 quiet farkeep.card=4661726b farkeep.slot=b", Words{Card: "4661726b", Slot: "b"}},
		{"farkeep.log=debug farkeep.watchdog=softdog", Words{Debug: true, Watchdog: "softdog"}},
		{"farkeep.log=quiet farkeep.card=XYZ farkeep.slot=c", Words{}},
		{"farkeep.watchdog=softdog farkeep.watchdog=none", Words{Watchdog: "none"}}, // the last wins
	} {
		if diff := cmp.Diff(tt.want, ParseWords(tt.in)); diff != "" {
			t.Errorf("%q: %s", tt.in, diff)
		}
	}
}

func TestStepsAreDataAndTellWhatFailed(t *testing.T) {
	var log bytes.Buffer
	var expected time.Duration
	m := &Machine{Log: slog.New(slog.NewTextHandler(&log, nil)), Expect: func(d time.Duration) { expected = d }}
	var done []string
	step := func(name string, required bool, err error) Step {
		return Step{name, required, "", time.Second, func(context.Context, *Machine) error {
			done = append(done, name)
			return err
		}}
	}
	broken := errors.New("broken")
	err := Run(t.Context(), m, []Step{step("a", true, nil), step("b", false, broken), step("c", true, broken), step("d", true, nil)})
	var failed *Error
	if !errors.As(err, &failed) || failed.Step != "c" || !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	}
	if expected != time.Second+stepSlack {
		t.Errorf("the watchdog expects a sign within %v", expected)
	}
	if want := []string{"a", "b", "c"}; !slices.Equal(done, want) {
		t.Errorf("done %v", done)
	}
	if want := []string{"b: broken"}; !slices.Equal(m.Problems, want) {
		t.Errorf("problems %q", m.Problems)
	}
	for _, want := range []string{"step=a", "step=b", "step=c", "took="} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("the log lacks %s: %s", want, log.String())
		}
	}
}

func TestStepsHaveTheirTime(t *testing.T) {
	m := &Machine{Log: slog.New(slog.DiscardHandler), Expect: func(time.Duration) {}}
	err := Run(t.Context(), m, []Step{{"slow", true, "", time.Millisecond, func(ctx context.Context, _ *Machine) error {
		<-ctx.Done()
		return ctx.Err()
	}}})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}

func TestPrint(t *testing.T) {
	var out bytes.Buffer
	if err := Print(&out, Steps()); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != len(Steps()) {
		t.Errorf("%d lines for %d steps", len(lines), len(Steps()))
	}
	seen := map[string]bool{}
	for _, s := range Steps() {
		if seen[s.Name] || s.About == "" || s.Timeout == 0 || s.do == nil {
			t.Errorf("step %+v", s)
		}
		seen[s.Name] = true
	}
}

// machine makes a /sys and /dev with the given disks: name → signature.
func machine(t *testing.T, disks map[string]uint32, partitions ...string) string {
	t.Helper()
	root := t.TempDir()
	write := func(path string, data []byte) {
		full := filepath.Join(root, path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(full), 0o755), os.WriteFile(full, data, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	for name, signature := range disks {
		sector := make([]byte, 512)
		binary.LittleEndian.PutUint32(sector[440:], signature)
		sector[510], sector[511] = 0x55, 0xaa
		write("dev/"+name, sector)
		write("sys/class/block/"+name+"/size", nil)
		for _, p := range partitions {
			part := name + p
			if strings.HasPrefix(name, "mmcblk") {
				part = name + "p" + p
			}
			write("sys/class/block/"+name+"/"+part+"/partition", []byte(p+"\n"))
			write("sys/class/block/"+part+"/partition", []byte(p+"\n"))
			write("dev/"+part, sector) // a partition that looks like a disk
		}
	}
	return root
}

func TestFindCard(t *testing.T) {
	const ours, other = 0x4661726b, 0x12345678
	all := []string{"1", "2", "3", "4"}
	for _, tt := range []struct {
		name       string
		disks      map[string]uint32
		partitions []string
		disk       string
		err        error
	}{
		{"a card", map[string]uint32{"mmcblk0": ours, "sda": other}, all, "mmcblk0", nil},
		{"a stick with a copied signature", map[string]uint32{"mmcblk1": ours, "sda": ours}, all, "mmcblk1", nil},
		{"a virtual machine", map[string]uint32{"vda": ours}, all, "vda", nil},
		{"nothing", nil, nil, "", fs.ErrNotExist},
		{"only others", map[string]uint32{"sda": other}, all, "", fs.ErrNotExist},
		{"its table is not read yet", map[string]uint32{"mmcblk0": ours}, []string{"1"}, "", fs.ErrNotExist},
	} {
		t.Run(tt.name, func(t *testing.T) {
			root := machine(t, tt.disks, tt.partitions...)
			c, err := FindCard(root, "4661726b")
			if c.Disk != tt.disk || !errors.Is(err, tt.err) {
				t.Fatalf("%+v, %v", c, err)
			}
			if err != nil {
				return
			}
			separator := ""
			if strings.HasPrefix(tt.disk, "mmcblk") {
				separator = "p"
			}
			dev := filepath.Join(root, "dev", tt.disk+separator)
			if c.Selector != dev+"1" || c.State != dev+"4" {
				t.Errorf("%+v", c)
			}
		})
	}
}

func TestReadSettingsExplains(t *testing.T) {
	dir := t.TempDir()
	_, err := ReadSettings(dir)
	if !errors.Is(err, fs.ErrNotExist) || !strings.Contains(hint.Of(err), "site init") {
		t.Errorf("without settings: %v, hint %q", err, hint.Of(err))
	}
	// As Windows leaves it: other capitals, another ending, a byte order mark.
	if err := os.WriteFile(filepath.Join(dir, "Farkeep.TOML.txt"), []byte("\xef\xbb\xbfname = \"attic\"\r\nnmae = 1\r\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	_, err = ReadSettings(dir)
	var bad *tomlfile.Error
	if !errors.As(err, &bad) || bad.Line != 2 || bad.File != "Farkeep.TOML.txt" || !strings.Contains(hint.Of(err), "Farkeep.TOML.txt") {
		t.Errorf("got %v, hint %q", err, hint.Of(err))
	}
	// The proper name goes before it; a folder of that name does not.
	if err := os.WriteFile(filepath.Join(dir, "farkeep.toml"), make([]byte, tomlfile.MaxSize+10), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err = ReadSettings(dir); !errors.As(err, &bad) || bad.File != "farkeep.toml" || !strings.Contains(bad.Text, "larger than") {
		t.Errorf("got %v", err)
	}
}

func TestMountsGiveAwayLittle(t *testing.T) {
	for _, m := range mountTable() {
		if m.flags&safe != safe && m.target != "/dev" {
			t.Errorf("%s is mounted with more than it needs", m.target)
		}
	}
}
