package board_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"farkeep/appliance/board"
	"farkeep/shared/card"
	"farkeep/shared/hint"
)

func write(t *testing.T, root, path, content string) {
	t.Helper()
	full := filepath.Join(root, path)
	if err := errors.Join(os.MkdirAll(filepath.Dir(full), 0o755), os.WriteFile(full, []byte(content), 0o644)); err != nil {
		t.Fatal(err)
	}
}

func TestCheck(t *testing.T) {
	for _, tt := range []struct{ compatible, name, err string }{
		{"raspberrypi,3-model-b\x00brcm,bcm2837\x00", "Raspberry Pi 3 Model B", ""},
		{"linux,dummy-virt\x00", "generic arm64 virtual machine", ""},
		{"raspberrypi,5-model-b\x00brcm,bcm2712\x00", "", `this board is a "raspberrypi,5-model-b", which this image does not support`},
		{"", "", "no device tree"},
	} {
		root := t.TempDir()
		if tt.compatible != "" {
			write(t, root, "proc/device-tree/compatible", tt.compatible)
		}
		b, err := board.Check(root)
		if b.Name != tt.name || (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%q: %v, %v", tt.compatible, b, err)
		}
		if err != nil && !strings.Contains(hint.Of(err), "Raspberry Pi 4") {
			t.Errorf("no hint which boards would do: %q", hint.Of(err))
		}
	}
}

func TestBlink(t *testing.T) {
	root := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	if err := board.Blink(ctx, root, board.BadSettings); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a LED: %v", err)
	}
	write(t, root, "sys/class/leds/ACT/trigger", "mmc0")
	write(t, root, "sys/class/leds/ACT/brightness", "")
	blinked := make(chan error, 1)
	go func() { blinked <- board.Blink(ctx, root, board.BadSettings) }()
	for on := ""; on != "1"; {
		b, err := os.ReadFile(filepath.Join(root, "sys/class/leds/ACT/brightness"))
		if err != nil {
			t.Fatal(err)
		}
		on = string(b)
		time.Sleep(time.Millisecond)
	}
	cancel()
	if err := <-blinked; err != nil {
		t.Error(err)
	}
	trigger, _ := os.ReadFile(filepath.Join(root, "sys/class/leds/ACT/trigger"))
	brightness, _ := os.ReadFile(filepath.Join(root, "sys/class/leds/ACT/brightness"))
	if string(trigger) != "none" || string(brightness) != "0" {
		t.Errorf("trigger %q, brightness %q", trigger, brightness)
	}
}

func TestErrorFile(t *testing.T) {
	dir := t.TempDir()
	text := board.ErrorText("v1", hint.Because(errors.New("farkeep.toml:7: name: missing"), "write one"))
	if strings.Count(string(text), "\n") != strings.Count(string(text), "\r\n") {
		t.Error("a line does not end in CRLF")
	}
	for _, want := range []string{"farkeep.toml:7: name: missing", "write one", "v1"} {
		if !strings.Contains(string(text), want) {
			t.Errorf("%q is missing in %s", want, text)
		}
	}
	if board.HasError(dir) {
		t.Error("an error file in an empty folder")
	}
	for range 2 {
		if err := board.WriteError(dir, text); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := os.ReadFile(filepath.Join(dir, card.ErrorFile)); err != nil || string(got) != string(text) {
		t.Errorf("%q, %v", got, err)
	}
	if !board.HasError(dir) {
		t.Error("the error file is not seen")
	}
	for range 2 {
		if err := board.ClearError(dir); err != nil {
			t.Error(err)
		}
	}
	if board.HasError(dir) {
		t.Error("the error file is still there")
	}
}
