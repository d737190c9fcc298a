//go:build vm

package emulate_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"farkeep/image/emulate"
	"farkeep/image/emulate/emulatetest"
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
			{"active high", emulate.Relay{Line: line}, "low,pause:100,nodisk,high,disk,low,nodisk,high,disk",
				[]bool{true, false, true}},
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

// A line whose owner has died and that the kernel has let go of drives nothing, whatever level it had.
func TestReleasedLineOpensRelay(t *testing.T) {
	pi := boot(t, emulate.Config{
		Machine: emulate.RaspberryPi3, Relay: emulate.Relay{Line: 17}, Append: "pinctrl_bcm2835.persist_gpio_outputs=N",
	}, 17, "high,disk,release,nodisk")
	wait(t, pi, "guest: done 4 nodisk")
	if err := pi.WaitDisk(t.Context(), false); err != nil {
		t.Error(err)
	}
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
		pi := boot(t, cfg, line, "high,write:ONCE,card:GONE-WITH-THE-POWER")
		wait(t, pi, "guest: done 3 card:GONE-WITH-THE-POWER")
		if err := pi.CutPower(); err != nil {
			t.Fatal(err)
		}
		if ending, _ := pi.Wait(); ending != emulate.PowerCut {
			t.Errorf("the machine ended by %q", ending)
		}
		if _, err := pi.WaitLine(t.Context(), regexp.MustCompile("never printed")); err == nil || !strings.Contains(err.Error(), "power cut") {
			t.Errorf("waiting for a line of a dead machine: %v", err)
		}
		cfg = pi.Config()
		if e := pi.RelayEvents(); len(e) != 2 || !e[0].Closed || e[1].Closed {
			t.Errorf("the relay did %v, and not: close, open for want of power", e)
		}
		if contains(t, cfg.Image, "GONE-WITH-THE-POWER") {
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
		wait(t, pi, "guest: done 2 disk")

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

// boot copies the image, makes a disk, and starts a machine whose guest does steps.
func boot(t *testing.T, cfg emulate.Config, line int, steps string) *emulate.Pi {
	t.Helper()
	dir := t.TempDir()
	cfg.Image, cfg.Disk = filepath.Join(dir, "sd.img"), filepath.Join(dir, "usb.img")
	if out, err := exec.Command("cp", "--sparse=always", image(t), cfg.Image).CombinedOutput(); err != nil {
		t.Fatalf("copy the image: %v: %s", err, out)
	}
	if err := os.WriteFile(cfg.Disk, append([]byte(mark), make([]byte, 1<<20-len(mark))...), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg.Append = fmt.Sprintf("%s guest.line=%d guest.steps=%s", cfg.Append, line, steps)
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
	ctx, cancel := context.WithTimeout(t.Context(), 6*time.Minute)
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

// image builds, once, an image as it would be flashed, with the guest program in the appliance's place.
func image(t *testing.T) string {
	t.Helper()
	built.Do(func() {
		if built.dir, built.err = os.MkdirTemp("", "farkeep-emulate-test-"); built.err == nil {
			built.path, built.err = emulatetest.BuildImage(t.Context(), built.dir)
		}
	})
	if built.err != nil {
		t.Fatal(built.err)
	}
	return built.path
}

var built struct {
	sync.Once
	dir, path string
	err       error
}

func TestMain(m *testing.M) {
	code := m.Run()
	os.RemoveAll(built.dir)
	os.Exit(code)
}
