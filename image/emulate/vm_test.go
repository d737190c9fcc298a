//go:build vm

package emulate_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"farkeep/image/emulate"
	"farkeep/image/fat"
	"farkeep/image/initramfs"
	"farkeep/image/kmodules"
	"farkeep/shared/card"
)

// mark is how the test's USB disk begins.
const mark = "FARKEEPDISK"

// both runs a test on each machine, with a GPIO line that it has.
func both(t *testing.T, test func(t *testing.T, m emulate.Machine, line int)) {
	t.Run("raspi3b", func(t *testing.T) { test(t, emulate.RaspberryPi3, 17) })
	t.Run("virt", func(t *testing.T) { test(t, emulate.Generic, 5) })
}

func TestRelaySwitchesDisk(t *testing.T) {
	both(t, func(t *testing.T, m emulate.Machine, line int) {
		for _, c := range []struct {
			name   string
			relay  emulate.Relay
			steps  string
			events []bool
		}{
			{"active high", emulate.Relay{Line: line}, "low,pause:100,nodisk,high,disk,low,nodisk,high,disk,release,nodisk",
				[]bool{true, false, true, false}},
			{"active low", emulate.Relay{Line: line, ActiveLow: true}, "high,pause:100,nodisk,low,disk,high,nodisk,off",
				[]bool{true, false}},
		} {
			t.Run(c.name, func(t *testing.T) {
				pi := boot(t, emulate.Config{Machine: m, Relay: c.relay}, line, c.steps)
				if pi.DiskAttached() {
					t.Error("the disk is attached before the guest has closed the relay")
				}
				steps := strings.Split(c.steps, ",")
				last := steps[len(steps)-1]
				// The last step before the end has printed its line.
				wait(t, pi, fmt.Sprintf("guest: done %d", len(steps)-1))
				if last == "off" {
					if ending, err := pi.Wait(); ending != emulate.GuestOff || err != nil {
						t.Errorf("the machine ended by %q, %v; want %q", ending, err, emulate.GuestOff)
					}
				} else {
					wait(t, pi, fmt.Sprintf("guest: done %d %s", len(steps), last))
				}
				wait(t, pi, "guest: disk begins with \""+mark+"\"")
				var got []bool
				for _, e := range pi.RelayEvents() {
					got = append(got, e.Closed)
				}
				if !slices.Equal(got, c.events) {
					t.Errorf("the relay closed and opened as %v, want %v", got, c.events)
				}
			})
		}
	})
}

func TestDiskWithoutRelay(t *testing.T) {
	both(t, func(t *testing.T, m emulate.Machine, line int) {
		ctx := t.Context()
		pi := boot(t, emulate.Config{Machine: m, Relay: emulate.Relay{None: true}}, line, "disk,nodisk,disk,date")
		if !pi.DiskAttached() {
			t.Error("a disk that nothing switches is not attached from the beginning")
		}
		wait(t, pi, "guest: done 1 disk")
		if err := pi.UnplugDisk(ctx); err != nil {
			t.Fatal(err)
		}
		wait(t, pi, "guest: done 2 nodisk")
		pi.PlugDisk()
		wait(t, pi, "guest: done 3 disk")
		year := wait(t, pi, "guest: year")
		if old := strings.HasSuffix(year, "year 1970"); old != (m == emulate.RaspberryPi3) {
			t.Errorf("%s: a Pi starts in 1970, a generic machine in the present", year)
		}
		dump := filepath.Join(t.TempDir(), "memory")
		if err := pi.DumpMemory(ctx, dump); err != nil {
			t.Fatal(err)
		}
		// The guest has read the disk's beginning into its memory.
		if !contains(t, dump, mark) {
			t.Errorf("the memory does not hold what the guest has read")
		}
		if err := pi.PowerOff(ctx); err != nil {
			t.Fatal(err)
		}
		if ending, _ := pi.Wait(); ending != emulate.SwitchedOff {
			t.Errorf("the machine ended by %q", ending)
		}
	})
}

func TestPowerCut(t *testing.T) {
	both(t, func(t *testing.T, m emulate.Machine, line int) {
		cfg := emulate.Config{Machine: m, Relay: emulate.Relay{Line: line}}
		pi := boot(t, cfg, line, "high,write:ONCE,card:LOST")
		wait(t, pi, "guest: done 3 card:LOST")
		if err := pi.CutPower(); err != nil {
			t.Fatal(err)
		}
		if ending, _ := pi.Wait(); ending != emulate.PowerCut {
			t.Errorf("the machine ended by %q", ending)
		}
		if _, err := pi.WaitLine(t.Context(), regexp.MustCompile("never printed")); err == nil || !strings.Contains(err.Error(), "power cut") {
			t.Errorf("waiting for a line of a dead machine: %v", err)
		}
		cfg.Image, cfg.Disk = pi.Files()
		if contains(t, cfg.Image, "LOST") {
			t.Error("the card holds what the guest had not yet written back")
		}
		// The relay of a Pi without power is open, and so it is at its next boot.
		again := start(t, cfg)
		if again.DiskAttached() {
			t.Error("the disk is attached after a power cut")
		}
		wait(t, again, "guest: done 1 high")
		wait(t, again, "guest: done 2 write:ONCE")
		if !contains(t, cfg.Disk, "ONCE") {
			t.Error("the disk has lost what the guest had written durably")
		}
	})
}

func TestRestarts(t *testing.T) {
	both(t, func(t *testing.T, m emulate.Machine, line int) {
		cfg := emulate.Config{Machine: m, Relay: emulate.Relay{Line: line}, FollowRestarts: true}
		pi := boot(t, cfg, line, "high,disk,restart")
		wait(t, pi, "guest: done 2 disk")
		if err := pi.WaitDisk(t.Context(), false); err != nil {
			t.Fatal(err)
		}
		pi.Mark()
		wait(t, pi, "guest: done disk")

		cfg.FollowRestarts = false
		if err := pi.CutPower(); err != nil {
			t.Fatal(err)
		}
		pi = boot(t, cfg, line, "restart")
		if ending, err := pi.Wait(); ending != emulate.GuestReset || err != nil {
			t.Errorf("the machine ended by %q, %v", ending, err)
		}
	})
}

// boot makes an image whose guest does steps, and a disk, and starts a machine with them.
func boot(t *testing.T, cfg emulate.Config, line int, steps string) *emulate.Pi {
	t.Helper()
	cfg.Image = makeImage(t, fmt.Sprintf("quiet cryptomgr.notests guest.line=%d guest.steps=%s", line, steps))
	cfg.Disk = filepath.Join(t.TempDir(), "usb.img")
	if err := os.WriteFile(cfg.Disk, append([]byte(mark), make([]byte, 1<<20-len(mark))...), 0o600); err != nil {
		t.Fatal(err)
	}
	return start(t, cfg)
}

func start(t *testing.T, cfg emulate.Config) *emulate.Pi {
	t.Helper()
	cfg.Logger = slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
	cfg.Console = t.Output()
	begin := time.Now()
	pi, err := emulate.Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { pi.CutPower() })
	wait(t, pi, "guest: ready")
	t.Logf("ready after %s", time.Since(begin).Round(100*time.Millisecond))
	return pi
}

func wait(t *testing.T, pi *emulate.Pi, text string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	line, err := pi.WaitLine(ctx, regexp.MustCompile(regexp.QuoteMeta(text)))
	if err != nil {
		t.Fatal(err)
	}
	return line
}

// contains says whether the file holds text, without reading it into memory whole.
func contains(t *testing.T, file, text string) bool {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	buf := make([]byte, 4<<20)
	keep := 0
	for {
		n, err := f.Read(buf[keep:])
		if bytes.Contains(buf[:keep+n], []byte(text)) {
			return true
		}
		if err != nil {
			return false
		}
		end := keep + n
		keep = min(end, len(text)-1)
		copy(buf, buf[end-keep:end])
	}
}

// makeImage makes a card with a selector that chooses slot A, whose initramfs is the guest program.
func makeImage(t *testing.T, commandLine string) string {
	t.Helper()
	kernel, deviceTree, archive := bootFiles(t)
	image := filepath.Join(t.TempDir(), "sd.img")
	f, err := os.Create(image)
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
		entry := mbr[446+16*(p.Number-1):]
		entry[4] = p.Type
		binary.LittleEndian.PutUint32(entry[8:], uint32(p.Start/512))
		binary.LittleEndian.PutUint32(entry[12:], uint32(p.Size/512))
		var files []fat.File
		switch p.Number {
		case card.Selector:
			files = []fat.File{{Name: card.AutobootFile, Data: card.AutobootConfig(card.A)}}
		case card.SlotA:
			files = []fat.File{
				{Name: card.ConfigFile, Data: []byte("arm_64bit=1\nupstream_kernel=1\nkernel=vmlinuz\ninitramfs initramfs.zst followkernel\n")},
				{Name: card.CmdlineFile, Data: []byte(commandLine + "\n")},
				{Name: card.KernelFile, Data: kernel},
				{Name: card.InitramfsFile, Data: archive},
				{Name: "bcm2837-rpi-3-b.dtb", Data: deviceTree},
			}
		default:
			continue
		}
		v := fat.Volume{Label: p.Label, Time: time.Unix(1e9, 0), Size: p.Size, Offset: p.Start}
		if err := fat.Format(offsetWriter{f, p.Start}, v, files); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := f.WriteAt(mbr, 0); err != nil {
		t.Fatal(err)
	}
	return image
}

type offsetWriter struct {
	f      *os.File
	offset int64
}

func (w offsetWriter) WriteAt(b []byte, at int64) (int, error) { return w.f.WriteAt(b, w.offset+at) }

// bootFiles builds the guest program into an initramfs with the modules that it needs.
func bootFiles(t *testing.T) (kernel, deviceTree, archive []byte) {
	t.Helper()
	root := os.DirFS(os.Getenv("FARKEEP_TEST_KERNEL"))
	read := func(pattern string) []byte {
		t.Helper()
		m, err := fs.Glob(root, pattern)
		if err != nil || len(m) != 1 {
			t.Fatalf("%s: found %q, %v", pattern, m, err)
		}
		b, err := fs.ReadFile(root, m[0])
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	kernel = read("boot/vmlinuz-*")
	deviceTree = read("usr/lib/linux-image-*/broadcom/bcm2837-rpi-3-b.dtb")

	binary := filepath.Join(t.TempDir(), "guest")
	build := exec.Command("go", "build", "-o", binary, "farkeep/image/emulate/internal/guest")
	build.Env = append(os.Environ(), "GOOS=linux", "GOARCH=arm64", "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", build, err, out)
	}
	program, err := os.ReadFile(binary)
	if err != nil {
		t.Fatal(err)
	}

	versions, err := fs.Glob(root, "usr/lib/modules/*")
	if err != nil || len(versions) != 1 {
		t.Fatalf("kernel versions: %q, %v", versions, err)
	}
	dir, err := fs.Sub(root, versions[0])
	if err != nil {
		t.Fatal(err)
	}
	index, err := kmodules.Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	modules, err := index.Closure([]string{"phy_generic", "bcm2835_rng", "bcm2835_wdt", "bcm2835", "dwc2", "usb_storage", "sd_mod",
		"virtio_blk", "xhci_pci", "mmc_block"})
	if err != nil {
		t.Fatal(err)
	}
	reduced, err := index.Files(modules)
	if err != nil {
		t.Fatal(err)
	}
	var tree initramfs.Tree
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(tree.File("init", 0o755, program))
	must(tree.Char("dev/console", 0o600, 5, 1))
	for _, f := range reduced {
		if strings.HasSuffix(f.Path, ".ko") {
			must(tree.File("modules/"+path.Base(f.Path), 0o644, f.Data))
		}
	}
	archive, err = tree.Compress(time.Unix(1e9, 0))
	must(err)
	return kernel, deviceTree, archive
}
