package emulate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// registers is a machine of which only registers are left.
type registers map[uint64]uint32

func (r registers) Human(_ context.Context, line string) (string, error) {
	var address uint64
	if _, err := fmt.Sscanf(line, "xp /1wx 0x%x", &address); err != nil {
		return "", fmt.Errorf("%q: %w", line, err)
	}
	return fmt.Sprintf("%016x: 0x%08x\r\n", address, r[address]), nil
}

func TestLineLevel(t *testing.T) {
	const sel, level = 0x3f200000, 0x3f200034
	for _, c := range []struct {
		name         string
		machine      Machine
		line         int
		registers    registers
		driven, high bool
	}{
		{"input", RaspberryPi3, 17, registers{level: 1 << 17}, false, false},
		{"output low", RaspberryPi3, 17, registers{sel + 4: 1 << 21}, true, false},
		{"output high", RaspberryPi3, 17, registers{sel + 4: 1 << 21, level: 1 << 17}, true, true},
		{"alternate function", RaspberryPi3, 17, registers{sel + 4: 4 << 21, level: 1 << 17}, false, false},
		{"other lines", RaspberryPi3, 17, registers{sel + 4: 0o1111111111 &^ (7 << 21), level: ^uint32(1 << 17)}, false, false},
		{"second bank", RaspberryPi3, 47, registers{sel + 16: 1 << 21, level + 4: 1 << 15}, true, true},
		{"PL061 input", Generic, 5, registers{0x90303fc: 0xff}, false, false},
		{"PL061 low", Generic, 5, registers{0x9030400: 1 << 5, 0x90303fc: 0xdf}, true, false},
		{"PL061 high", Generic, 5, registers{0x9030400: 1 << 5, 0x90303fc: 1 << 5}, true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			l, err := c.machine.line(c.line)
			if err != nil {
				t.Fatal(err)
			}
			driven, high, err := l.read(t.Context(), c.registers)
			if err != nil || driven != c.driven || high != c.high {
				t.Errorf("driven %v, high %v, %v", driven, high, err)
			}
		})
	}
	for _, n := range []int{-1, 54} {
		if _, err := RaspberryPi3.line(n); err == nil {
			t.Errorf("a Pi has line %d", n)
		}
	}
	for _, n := range []int{-1, 8} {
		if _, err := Generic.line(n); err == nil {
			t.Errorf("a generic machine has line %d", n)
		}
	}
}

func TestParsePeek(t *testing.T) {
	for _, answer := range []string{"", "unknown command\r\n", "000000003f200034: Cannot access memory\r\n", "000000003f200038: 0x00000000\r\n",
		"000000003f200034: 0x1ffffffff\r\n", "000000003f200034 0x00000001\r\n"} {
		if v, err := parsePeek(answer, bcmLevel); err == nil {
			t.Errorf("%q is taken for %#x", answer, v)
		}
	}
}

func FuzzParsePeek(f *testing.F) {
	f.Add("000000003f200034: 0x00020000\r\n")
	f.Add("3f200034: 0xffffffff")
	f.Fuzz(func(t *testing.T, answer string) {
		v, err := parsePeek(answer, bcmLevel)
		if err != nil {
			return
		}
		if !strings.Contains(strings.ToLower(answer), strings.TrimLeft(fmt.Sprintf("%x", v), "0")) {
			t.Errorf("%q is taken for %#x", answer, v)
		}
	})
}

func TestConsole(t *testing.T) {
	var copied strings.Builder
	c := newConsole(&copied)
	w := &lineWriter{add: c.add}
	fmt.Fprint(w, "one\r\ntw")
	fmt.Fprint(w, "o\nthree")
	find := func(re string) (string, error) {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		return c.wait(ctx, regexp.MustCompile(re))
	}
	if line, err := find("^t"); err != nil || line != "two" {
		t.Errorf("%q, %v", line, err)
	}
	// Lines that have come already count, whatever was waited for before.
	if line, err := find("^one$"); err != nil || line != "one" {
		t.Errorf("%q, %v", line, err)
	}
	if _, err := find("three"); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "two") {
		t.Errorf("a line that has not ended: %v", err)
	}
	c.setMark()
	found := make(chan string, 1)
	go func() {
		line, _ := c.wait(t.Context(), regexp.MustCompile("o|e"))
		found <- line
	}()
	w.end()
	if line := <-found; line != "three" {
		t.Errorf("after the mark came %q", line)
	}
	if copied.String() != "one\ntwo\nthree\n" {
		t.Errorf("copied %q", copied.String())
	}

	fmt.Fprint(w, strings.Repeat("x", maxLine+10), "\n")
	if line := c.tail(2)[0]; len(line) > maxLine {
		t.Errorf("a line of %d bytes", len(line))
	}
	for range maxLines + 5 {
		c.add("noise")
	}
	if n := len(c.tail(2 * maxLines)); n != maxLines {
		t.Errorf("keeps %d lines", n)
	}
	c.end(errors.New("it is off"))
	if _, err := find("never"); err == nil || !strings.Contains(err.Error(), "it is off") {
		t.Errorf("after the end: %v", err)
	}
	if line, err := find("noise"); err != nil || line != "noise" {
		t.Errorf("an old line after the end: %q, %v", line, err)
	}
}

func TestConsoleWakesWaiter(t *testing.T) {
	c := newConsole(nil)
	failed := make(chan error, 1)
	go func() {
		_, err := c.wait(t.Context(), regexp.MustCompile("x"))
		failed <- err
	}()
	c.end(errors.New("power cut"))
	if err := <-failed; err == nil || !strings.Contains(err.Error(), "power cut") || !strings.Contains(err.Error(), "console is empty") {
		t.Error(err)
	}
}

func TestStartRefuses(t *testing.T) {
	dir := t.TempDir()
	file := func(name string, size int64) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, size); err != nil {
			t.Fatal(err)
		}
		return path
	}
	image := file("sd.img", 1<<20)
	for _, c := range []struct {
		name string
		cfg  Config
		want string
	}{
		{"machine", Config{Machine: "raspi5", Image: image}, `machine "raspi5": use "raspi3b" or "virt"`},
		{"no image", Config{Machine: Generic, Image: filepath.Join(dir, "none")}, "SD image"},
		{"odd image", Config{Machine: RaspberryPi3, Image: file("odd.img", 3<<20), Relay: Relay{None: true}}, "truncate -s 4194304"},
		{"odd disk", Config{Machine: Generic, Image: image, Disk: file("usb.img", 1000)}, "1000 bytes"},
		{"no disk", Config{Machine: Generic, Image: image, Disk: filepath.Join(dir, "none")}, "USB disk image"},
		{"line", Config{Machine: RaspberryPi3, Image: image, Relay: Relay{Line: 60}}, "no GPIO line 60"},
		{"clock", Config{Machine: RaspberryPi3, Image: image, RTC: time.Unix(1e9, 0)}, "starts in 1970"},
		{"nothing to boot", Config{Machine: Generic, Image: image, Concurrent: true}, "no partition table"},
	} {
		t.Run(c.name, func(t *testing.T) {
			pi, err := Start(t.Context(), c.cfg)
			if err == nil {
				pi.CutPower()
				t.Fatal("started")
			}
			if !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
}

func TestArguments(t *testing.T) {
	f := files{kernel: "K", initramfs: "I", deviceTree: "D", commandLine: "quiet"}
	pi := arguments(&Config{
		Machine: RaspberryPi3, Image: "a,b.img", Disk: "usb.img",
		HostForward: []Forward{{HostPort: 8022, GuestPort: 22}, {UDP: true, HostPort: 8123, GuestPort: 123}},
	}, f)
	for _, want := range [][]string{
		{"-accel", "tcg,thread=single"}, {"-M", "raspi3b"}, {"-smp", "4"}, {"-m", "1G"}, {"-dtb", "D"}, {"-initrd", "I"},
		{"-drive", "if=sd,file=a,,b.img,format=raw,cache=unsafe"},
		{"-netdev", "user,id=net,hostfwd=tcp:127.0.0.1:8022-:22,hostfwd=udp:127.0.0.1:8123-:123"},
	} {
		i := slices.Index(pi, want[0])
		if !slices.Contains(pi, want[1]) || i < 0 {
			t.Errorf("no %q in %q", want, pi)
		}
	}
	if slices.ContainsFunc(pi, func(a string) bool { return strings.Contains(a, "thread=multi") }) {
		t.Error("raspi3b with thread=multi")
	}
	virt := arguments(&Config{Machine: Generic, Image: "sd.img", RTC: time.Date(2031, 2, 3, 4, 5, 6, 0, time.UTC)}, files{kernel: "K"})
	if !slices.Contains(virt, "base=2031-02-03T04:05:06") || slices.Contains(virt, "-dtb") || slices.Contains(virt, "-blockdev") {
		t.Errorf("virt: %q", virt)
	}
}

func TestTurn(t *testing.T) {
	dir := t.TempDir()
	path := []string{filepath.Join(dir, "lock"), filepath.Join(dir, "lock-1")}
	log := slog.New(slog.DiscardHandler)
	first, err := turn(t.Context(), path, time.Second, log)
	if err != nil {
		t.Fatal(err)
	}
	other, err := turn(t.Context(), path, time.Second, log)
	if err != nil {
		t.Fatal(err)
	}
	defer other()
	if _, err := turn(t.Context(), path, 0, log); err == nil || !strings.Contains(err.Error(), "another emulated machine") {
		t.Errorf("three in two places: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := turn(ctx, path, time.Hour, log); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("waiting without patience: %v", err)
	}
	first()
	second, err := turn(t.Context(), path, time.Second, log)
	if err != nil {
		t.Fatal(err)
	}
	second()
	// A link in a folder that everybody may write to leads nowhere.
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(path[0], link); err != nil {
		t.Fatal(err)
	}
	if _, err := turn(t.Context(), []string{link}, 0, log); err == nil {
		t.Error("followed a symbolic link")
	}
}
