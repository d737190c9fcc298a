// Package board is what a person without a screen sees of the appliance: which
// machine it runs on, its activity LED, and the error file on the card's boot
// partition, which any computer can read.
package board

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"farkeep/shared/card"
	"farkeep/shared/hint"
)

// Check says which machine this is. root is normally "/". A machine that the
// image was not built for is an error, whose text is for its owner.
func Check(root string) (card.Board, error) {
	data, err := os.ReadFile(filepath.Join(root, "proc/device-tree/compatible"))
	if errors.Is(err, fs.ErrNotExist) {
		// Virtual machines that boot by ACPI have no device tree.
		return card.Board{}, unsupported("this machine has no device tree")
	}
	if err != nil {
		return card.Board{}, fmt.Errorf("ask which board this is: %w", err)
	}
	if b, ok := card.FindBoard(data); ok {
		return b, nil
	}
	name, _, _ := bytes.Cut(data, []byte{0})
	return card.Board{}, unsupported(fmt.Sprintf("this board is a %.60q", name))
}

func unsupported(what string) error {
	var names []string
	for _, b := range card.SupportedBoards() {
		names = append(names, b.Name)
	}
	return hint.Because(fmt.Errorf("%s, which this image does not support", what),
		"put the card into one of these: %s", strings.Join(names, ", "))
}

// Pattern is what the LED says: so many short blinks, a pause, again.
type Pattern int

// The patterns. docs/appliance.md shows them to users.
const (
	BadSettings      Pattern = 2 // farkeep.toml is missing or wrong
	UnsupportedBoard Pattern = 3
	BootFailed       Pattern = 4 // anything else that keeps it from working
)

// The LED's rhythm.
const (
	blinkOn  = 200 * time.Millisecond
	blinkOff = 300 * time.Millisecond
	pause    = 1500 * time.Millisecond
)

// Blink blinks the board's activity LED until ctx ends. A board without one is
// an error wrapping fs.ErrNotExist.
func Blink(ctx context.Context, root string, p Pattern) error {
	led, err := activityLED(root)
	if err != nil {
		return err
	}
	// The card's activity would blink in between.
	if err := set(led, "trigger", "none"); err != nil {
		return err
	}
	on := func(v string, d time.Duration) error {
		if err := set(led, "brightness", v); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
		case <-time.After(d):
		}
		return nil
	}
	for ctx.Err() == nil {
		for range p {
			if err := errors.Join(on("1", blinkOn), on("0", blinkOff)); err != nil {
				return err
			}
		}
		if err := on("0", pause); err != nil {
			return err
		}
	}
	return nil
}

// activityLED finds the green LED: "ACT" today, "led0" on older kernels.
func activityLED(root string) (string, error) {
	for _, pattern := range []string{"*ACT*", "*act*", "led0"} {
		found, err := filepath.Glob(filepath.Join(root, "sys/class/leds", pattern))
		if err != nil {
			return "", fmt.Errorf("find the LED: %w", err)
		}
		if len(found) > 0 {
			return found[0], nil
		}
	}
	return "", fmt.Errorf("find the LED: %w", fs.ErrNotExist)
}

func set(led, attribute, value string) error {
	// Attributes exist; O_CREATE in sysfs is an error.
	f, err := os.OpenFile(filepath.Join(led, attribute), os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("set the LED: %w", err)
	}
	defer f.Close()
	if _, err := f.WriteString(value); err != nil {
		return fmt.Errorf("set the LED: %w", err)
	}
	return nil
}

// ErrorText is the content of farkeep-error.txt: plain ASCII where it can be,
// with line ends that every Windows program shows.
func ErrorText(version string, err error) []byte {
	var b strings.Builder
	b.WriteString("Farkeep could not start from this card.\n\n")
	fmt.Fprintf(&b, "What is wrong:\n  %v\n\n", err)
	if h := hint.Of(err); h != "" {
		fmt.Fprintf(&b, "What to do:\n  %s\n\n", h)
	}
	b.WriteString("Then put the card back and switch the power off and on.\n")
	fmt.Fprintf(&b, "This file goes away by itself at the next good start.\n\n(farkeep-appliance %s)\n", version)
	return []byte(strings.ReplaceAll(b.String(), "\n", "\r\n"))
}

// WriteError puts the error file into the mounted boot partition dir, unless it
// says the same already: cards wear out. FAT knows no atomic replacement that
// is worth its name for a file that only people read, so it is written in place.
func WriteError(dir string, text []byte) (err error) {
	path := filepath.Join(dir, card.ErrorFile)
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, text) {
		return nil
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o644)
	if err != nil {
		return fmt.Errorf("write the error file: %w", err)
	}
	_, err = f.Write(text)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("write the error file: %w", err)
	}
	return nil
}

// HasError says whether an error file lies in dir.
func HasError(dir string) bool {
	_, err := os.Lstat(filepath.Join(dir, card.ErrorFile))
	return err == nil
}

// ClearError removes the error file from dir, where it may be missing.
func ClearError(dir string) error {
	if err := os.Remove(filepath.Join(dir, card.ErrorFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the error file: %w", err)
	}
	return nil
}
