package bootloader

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"farkeep/image/fat"
	"farkeep/shared/card"
)

const configText = `# what the image builder writes
arm_64bit=1
upstream_kernel=1
kernel=vmlinuz
initramfs initramfs.zst followkernel
include relay.txt
[pi5]
kernel=not-for-this-board
[all]
`

// slotFiles are a whole slot, whose files name the slot.
func slotFiles(s card.Slot) map[string]string {
	return map[string]string{
		card.ConfigFile:       configText,
		card.RelayFile:        string(card.RelayConfig(17, true)),
		card.CmdlineFile:      "quiet " + card.CommandLineWords(s) + "\r\nsecond line\n",
		card.KernelFile:       "kernel " + string(s),
		card.InitramfsFile:    "initramfs " + string(s),
		"bcm2837-rpi-3-b.dtb": "tree " + string(s),
	}
}

// write makes a card with these files on its partitions.
func write(t *testing.T, partitions map[int]map[string]string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "sd.img")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(card.TotalSize); err != nil {
		t.Fatal(err)
	}
	mbr := make([]byte, 512)
	mbr[510], mbr[511] = 0x55, 0xaa
	for _, p := range card.Partitions() {
		files, ok := partitions[p.Number]
		if !ok {
			continue
		}
		entry := mbr[446+16*(p.Number-1):]
		entry[4] = p.Type
		binary.LittleEndian.PutUint32(entry[8:], uint32(p.Start/512))
		binary.LittleEndian.PutUint32(entry[12:], uint32(p.Size/512))
		var list []fat.File
		for name, text := range files {
			list = append(list, fat.File{Name: name, Data: []byte(text)})
		}
		v := fat.Volume{Label: p.Label, Time: time.Unix(1e9, 0), Size: p.Size, Offset: p.Start}
		if err := fat.Format(at{f, p.Start}, v, list); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := f.WriteAt(mbr, 0); err != nil {
		t.Fatal(err)
	}
	return path
}

type at struct {
	f      *os.File
	offset int64
}

func (w at) WriteAt(b []byte, off int64) (int, error) { return w.f.WriteAt(b, w.offset+off) }

func whole(autoboot string) map[int]map[string]string {
	return map[int]map[string]string{
		card.Selector: {card.AutobootFile: autoboot},
		card.SlotA:    slotFiles(card.A),
		card.SlotB:    slotFiles(card.B),
	}
}

func TestLoadChoosesSlot(t *testing.T) {
	onA := string(card.AutobootConfig(card.A))
	for _, c := range []struct {
		name     string
		autoboot string
		tryboot  bool
		want     card.Slot
	}{
		{"slot A", onA, false, card.A},
		{"slot B", string(card.AutobootConfig(card.B)), false, card.B},
		{"trial of the other slot", onA, true, card.B},
		{"Windows line ends, comments", "# x\r\n[all]\r\nboot_partition=3 # b\r\n", false, card.B},
		{"the last line wins", "boot_partition=2\nboot_partition=3\n", false, card.B},
		{"section for nothing", "boot_partition=2\n[none]\nboot_partition=3\n", false, card.A},
		{"unknown filter", "boot_partition=2\n[serial=1234]\nboot_partition=3\n", false, card.A},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := write(t, whole(c.autoboot))
			for _, board := range []Board{Pi3B, Generic} {
				b, err := Load(path, board, c.tryboot)
				if err != nil {
					t.Fatal(err)
				}
				s := string(c.want)
				if b.Partition != c.want.Partition() || string(b.Kernel) != "kernel "+s || string(b.Initramfs) != "initramfs "+s {
					t.Errorf("%s boots partition %d with %q, %q", board, b.Partition, b.Kernel, b.Initramfs)
				}
				if want := "quiet " + card.CommandLineWords(c.want); b.CommandLine != want {
					t.Errorf("%s: command line %q, want %q", board, b.CommandLine, want)
				}
				tree, lines := "tree "+s, map[int]bool{17: false}
				if board == Generic {
					tree, lines = "", nil
				}
				if string(b.DeviceTree) != tree || !maps.Equal(b.GPIO, lines) {
					t.Errorf("%s: device tree %q, lines %v", board, b.DeviceTree, b.GPIO)
				}
			}
		})
	}
}

func TestLoadWithoutSelector(t *testing.T) {
	b, err := Load(write(t, map[int]map[string]string{card.Selector: slotFiles(card.A)}), Pi3B, false)
	if err != nil || b.Partition != card.Selector {
		t.Errorf("a card with one partition: %+v, %v", b, err)
	}
}

func TestLoadErrors(t *testing.T) {
	without := func(name string) map[int]map[string]string {
		p := whole("boot_partition=2\n")
		delete(p[card.SlotA], name)
		return p
	}
	for _, c := range []struct {
		name       string
		partitions map[int]map[string]string
		want       string
	}{
		{"no such partition", whole("boot_partition=7\n"), "autoboot.txt: boot_partition=7"},
		{"no number", whole("boot_partition=b\n"), "boot_partition=b"},
		{"not a boot partition", whole("boot_partition=4\n"), "partition 4"},
		{"open bracket", whole("[all\n"), "line 1"},
		{"no config", without(card.ConfigFile), "config.txt"},
		{"no kernel", without(card.KernelFile), "kernel: fat"},
		{"no initramfs", without(card.InitramfsFile), "initramfs: fat"},
		{"no device tree", without("bcm2837-rpi-3-b.dtb"), "device tree: fat"},
		{"no include", without(card.RelayFile), "line 6: include relay.txt"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := Load(write(t, c.partitions), Pi3B, false); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
	t.Run("no image", func(t *testing.T) {
		if _, err := Load(filepath.Join(t.TempDir(), "none"), Pi3B, false); !errors.Is(err, fs.ErrNotExist) {
			t.Error(err)
		}
	})
	for name, content := range map[string][]byte{
		"too short": []byte("x"), "no partition table": make([]byte, 4096),
		"partition beyond the end": append(append(make([]byte, 446), 0, 0, 0, 0, 12, 0, 0, 0, 255, 255, 255, 127, 1, 0, 0, 0), append(make([]byte, 48), 0x55, 0xaa)...),
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "sd.img")
			if err := os.WriteFile(path, content, 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := Load(path, Pi3B, false); err == nil {
				t.Error("booted")
			}
		})
	}
}

func TestSettings(t *testing.T) {
	loop := func(string) ([]byte, error) { return []byte("include self.txt\n"), nil }
	for _, c := range []struct {
		name, text string
		include    func(string) ([]byte, error)
		values     map[string]string
		gpio       map[int]bool
		err        string
	}{
		{name: "filters of two kinds must both hold", text: "[pi3]\na=1\n[tryboot]\na=2\n[all]\nb=1\n",
			values: map[string]string{"a": "1", "b": "1"}},
		{name: "filters of one kind replace each other", text: "[pi4]\na=1\n[pi3]\na=2\n[pi02]\na=3\n",
			values: map[string]string{"a": "2"}},
		{name: "this partition", text: "[partition=2]\na=1\n[partition=3]\na=2\n", values: map[string]string{"a": "1"}},
		{name: "gpio", text: "gpio=17=op,dl\ngpio=4,20-21=op,dh\ngpio=5=ip,pu\ngpio=20=ip\n", gpio: map[int]bool{17: false, 4: true, 21: true}},
		{name: "gpio of nothing", text: "gpio=17\n", err: "want LINES=FUNCTIONS"},
		{name: "gpio of too much", text: "gpio=0-1000000000=op\n", err: "no such lines"},
		{name: "endless include", text: "include self.txt\n", include: loop, err: "cannot include"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := &settings{facts: facts{Pi3B, false, 2}, include: c.include}
			err := s.parse([]byte(c.text))
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Errorf("%v, want %q", err, c.err)
				}
				return
			}
			if err != nil || !maps.Equal(s.values, c.values) || !maps.Equal(s.gpio, c.gpio) {
				t.Errorf("%v, %v, %v; want %v, %v", s.values, s.gpio, err, c.values, c.gpio)
			}
		})
	}
}

// Whatever lies on the card, reading settings ends, and what it returns is within bounds.
func FuzzSettings(f *testing.F) {
	f.Add([]byte(configText))
	f.Add(card.AutobootConfig(card.B))
	f.Add(card.RelayConfig(4, false))
	f.Add([]byte("[pi3]\n[none]\ngpio=0-57=op,dh\nboot_partition=-1"))
	f.Fuzz(func(t *testing.T, text []byte) {
		s := &settings{facts: facts{Pi3B, false, 2}, include: func(string) ([]byte, error) { return bytes.ToLower(text), nil }}
		if len(text) > 4096 || s.parse(text) != nil {
			return
		}
		if n, err := s.bootPartition(1); err == nil && (n < 1 || n > card.State) {
			t.Errorf("chooses partition %d", n)
		}
		for line := range s.gpio {
			if line < 0 || line > maxGPIOLine {
				t.Errorf("drives line %d", line)
			}
		}
	})
}
