//go:build vm

package main

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"farkeep/image/build"
	"farkeep/image/debian"
	"farkeep/image/emulate"
	"farkeep/image/sdcard"
	"farkeep/shared/card"
	"farkeep/shared/settings"
)

// buildImage makes an image of this very program, with its test parts.
func buildImage(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	bin := filepath.Join(dir, "farkeep-appliance-arm64")
	cmd := exec.Command("go", "build", "-tags", "vm", "-trimpath", "-ldflags=-s -w", "-o", bin, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=arm64")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	mirror := debian.Mirror{Archive: os.Getenv("FARKEEP_APT_MIRROR")}
	if mirror.Archive == "" {
		var err error
		if mirror, err = debian.FindMirror(os.DirFS("/etc/apt")); err != nil {
			t.Fatalf("%v: set FARKEEP_APT_MIRROR", err)
		}
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	image := filepath.Join(dir, "farkeep.img")
	if _, err := build.Build(t.Context(), build.Options{
		Appliance: bin, Out: image, Cache: filepath.Join(cache, "farkeep"), Mirror: mirror,
		Log: slog.New(slog.DiscardHandler),
	}); err != nil {
		t.Fatal(err)
	}
	return image
}

func personalise(t *testing.T, image string, text []byte) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), "personal.img")
	if err := sdcard.Personalise(t.Context(), image, out, sdcard.Personal{Settings: text, RelayLine: -1}); err != nil {
		t.Fatal(err)
	}
	return out
}

// start boots an image; its console is the test's log if the test fails.
func start(t *testing.T, cfg emulate.Config) *emulate.Pi {
	t.Helper()
	var console bytes.Buffer
	cfg.Console = &console
	if cfg.Machine == emulate.RaspberryPi3 {
		cfg.Append = "farkeep.watchdog=softdog " + cfg.Append
	}
	pi, err := emulate.Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := pi.CutPower(); err != nil {
			t.Error(err)
		}
		if t.Failed() || testing.Verbose() {
			t.Logf("console:\n%s", console.String())
		}
	})
	return pi
}

func wait(t *testing.T, pi *emulate.Pi, pattern string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 6*time.Minute)
	defer cancel()
	line, err := pi.WaitLine(ctx, regexp.MustCompile(pattern))
	if err != nil {
		t.Fatalf("waiting for %q: %v", pattern, err)
	}
	return line
}

func TestFirmware(t *testing.T) {
	image := buildImage(t)
	good := testSettings(t)
	t.Run("Raspberry Pi 3B", func(t *testing.T) {
		pi := start(t, emulate.Config{Machine: emulate.RaspberryPi3, Image: personalise(t, image, good)})
		allUp(t, pi, "Software Watchdog")
		survivesPanic(t, pi)
		findsHang(t, pi)
		onlyTestPartsEnded(t, pi)
	})
	t.Run("generic machine", func(t *testing.T) {
		cfg := relayed(t, image, good)
		pi := start(t, cfg)
		closesOnce(t, pi)
		allUp(t, pi, "i6300ESB timer")
		survivesPanic(t, pi)
		onlyTestPartsEnded(t, pi)
	})
	t.Run("restart", func(t *testing.T) { restarts(t, personalise(t, image, good)) })
	t.Run("bad settings", func(t *testing.T) { badSettings(t, image, good) })
}

// allUp waits until every part runs and is confined, and every probe held.
func allUp(t *testing.T, pi *emulate.Pi, watchdog string) {
	t.Helper()
	wait(t, pi, `watchdog armed identity="`+watchdog)
	if line := wait(t, pi, `booted.* problems=\d`); !strings.Contains(line, "problems=0") {
		t.Error(line)
	}
	wait(t, pi, `all parts are up`)
	for _, p := range parts() {
		if !p.child {
			wait(t, pi, p.name+`: confined uid=\d`)
		}
	}
	for _, l := range pi.LastLines(500) {
		if strings.Contains(l, ":OPEN") || strings.Contains(l, "lacks-it") {
			t.Error(l)
		}
	}
}

// relayed is a machine that switches its disk, a blank one, by an active-low
// relay: the kind that a line which is driven without a thought closes.
func relayed(t *testing.T, image string, good []byte) emulate.Config {
	t.Helper()
	s, err := settings.Parse("farkeep.toml", good)
	if err != nil {
		t.Fatal(err)
	}
	const line = 5
	s.Disk.Relay = settings.Relay{Driver: "gpio", Line: line, Active: "low"}
	s.Disk.Window.Length = settings.Duration(24 * time.Hour)
	text, err := s.Render()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cfg := emulate.Config{
		Machine: emulate.Generic, Image: filepath.Join(dir, "personal.img"), Disk: filepath.Join(dir, "disk.img"),
		Relay: emulate.Relay{Line: line, ActiveLow: true},
	}
	if err := os.WriteFile(cfg.Disk, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := sdcard.Personalise(t.Context(), image, cfg.Image, sdcard.Personal{Settings: text.Reveal(), RelayLine: line}); err != nil {
		t.Fatal(err)
	}
	return cfg
}

// closesOnce: the relay is open until the disk part closes it, and then stays
// closed. This is package relay's line code on a kernel.
func closesOnce(t *testing.T, pi *emulate.Pi) {
	t.Helper()
	wait(t, pi, `watchdog armed`) // the parts start after it
	early, attached := pi.RelayEvents(), pi.DiskAttached()
	// This test may have been kept waiting while the machine went on.
	late := slices.ContainsFunc(pi.LastLines(500), func(l string) bool { return strings.Contains(l, "disk: confined") })
	if !late && (len(early) > 0 || attached) {
		t.Errorf("the relay moved before the disk part ran: %v", early)
	}
	wait(t, pi, `disk: confined`)
	ctx, cancel := context.WithTimeout(t.Context(), 6*time.Minute)
	defer cancel()
	if err := pi.WaitDisk(ctx, true); err != nil {
		t.Fatal(err)
	}
	if all := pi.RelayEvents(); len(all) != 1 || !all[0].Closed {
		t.Errorf("the relay did %v, want one closing", all)
	}
}

// survivesPanic: a part that panics takes nobody with it, and its stack is in
// the log.
func survivesPanic(t *testing.T, pi *emulate.Pi) {
	t.Helper()
	wait(t, pi, `panics: .*(nil pointer|SIGSEGV)`)
	wait(t, pi, `panics: goroutine \d+`)
	wait(t, pi, `part ended; it will be started again child=panics`)
	pi.Mark()
	wait(t, pi, `panics: confined`)
}

func findsHang(t *testing.T, pi *emulate.Pi) {
	t.Helper()
	wait(t, pi, `part is silent; its stacks follow child=hangs`)
	wait(t, pi, `hangs: SIGQUIT`)
	wait(t, pi, `part ended; it will be started again child=hangs`)
}

// restarts: a machine that is told to restart stops its parts in order and
// leaves a clean state partition, which the next boot finds.
func restarts(t *testing.T, image string) {
	pi := start(t, emulate.Config{Machine: emulate.Generic, Image: image, Append: "farkeep.test=restart", FollowRestarts: true})
	wait(t, pi, `booted.* first_boot=true`)
	wait(t, pi, `stopped child=mail how="exit status 0"`)
	wait(t, pi, `stopped child=network how="exit status 0"`)
	wait(t, pi, `supervisor: shutting down`)
	wait(t, pi, `booted.* first_boot=false`)
	if err := pi.CutPower(); err != nil {
		t.Fatal(err)
	}
	// The log of the first boot is on the card to its end.
	f, err := os.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := card.Partitions()[card.State-1]
	state := filepath.Join(t.TempDir(), "state.ext4")
	out, err := os.Create(state)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, io.NewSectionReader(f, p.Start, p.Size)); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
	log, err := exec.Command("debugfs", "-R", "cat /log/farkeep.log", state).Output()
	if err != nil {
		t.Fatalf("debugfs (package e2fsprogs): %v", err)
	}
	for _, want := range []string{`"msg":"confined"`, `"msg":"shutting down"`} {
		if !bytes.Contains(log, []byte(want)) {
			t.Errorf("the log on the card lacks %s", want)
		}
	}
}

func onlyTestPartsEnded(t *testing.T, pi *emulate.Pi) {
	t.Helper()
	for _, l := range pi.LastLines(2000) {
		if strings.Contains(l, "part ended") && !strings.Contains(l, "child=panics") && !strings.Contains(l, "child=hangs") {
			t.Error(l)
		}
	}
}

// Whoever pulls the card out finds what is wrong on it, and after the
// correction it is gone.
func badSettings(t *testing.T, image string, good []byte) {
	bad := bytes.Replace(good, []byte("[mail]"), []byte("[mail]\nsevrer = 1"), 1)
	if bytes.Equal(bad, good) {
		t.Fatal("the settings have no [mail]")
	}
	img := personalise(t, image, bad)
	pi := start(t, emulate.Config{Machine: emulate.RaspberryPi3, Image: img})
	wait(t, pi, `this machine cannot work.*sevrer.*led_blinks=2`)
	wait(t, pi, `the error is on the boot partition`)
	if err := pi.CutPower(); err != nil {
		t.Fatal(err)
	}
	text := string(errorFile(t, img))
	if !regexp.MustCompile(`farkeep\.toml:\d+: .*sevrer: unknown key`).MatchString(text) || !strings.Contains(text, "\r\n") {
		t.Errorf("error file: %q", text)
	}

	fixed := personalise(t, img, good)
	pi = start(t, emulate.Config{Machine: emulate.Generic, Image: fixed})
	wait(t, pi, `all parts are up`)
	if err := pi.CutPower(); err != nil {
		t.Fatal(err)
	}
	if left := errorFile(t, fixed); left != nil {
		t.Errorf("the error file is still there: %s", left)
	}
}

func errorFile(t *testing.T, image string) []byte {
	t.Helper()
	f, err := os.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	selector, err := sdcard.OpenPartition(f, card.Selector)
	if err != nil {
		t.Fatal(err)
	}
	text, err := selector.ReadFile(card.ErrorFile)
	if err != nil {
		return nil
	}
	return text
}
