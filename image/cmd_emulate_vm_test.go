//go:build vm

package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"farkeep/image/emulate/emulatetest"
	"farkeep/shared/hint"
)

// The command as a person uses it: boot, unplug and plug the disk, cut the power, end it.
func TestEmulate(t *testing.T) {
	dir := t.TempDir()
	image, err := emulatetest.BuildImage(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	disk := filepath.Join(dir, "usb.img")
	if err := os.WriteFile(disk, append([]byte("FARKEEPDISK"), make([]byte, 1<<20-11)...), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	orders, say := io.Pipe()
	console := &lineAwaiter{lines: make(chan string, 10_000)}
	var diagnostics bytes.Buffer
	code := make(chan int, 1)
	go func() {
		code <- run(ctx, []string{"emulate", "--image", image, "--disk", disk, "--machine", "virt", "--no-relay",
			"--append", "guest.steps=disk,nodisk,disk"},
			&Env{Stdin: orders, Stdout: console, Stderr: &diagnostics, Getenv: os.Getenv})
	}()
	console.await(t, "guest: done 1 disk")
	fmt.Fprintln(say, "unplug")
	console.await(t, "guest: done 2 nodisk")
	fmt.Fprintln(say, "plug")
	console.await(t, "guest: done 3 disk")
	fmt.Fprintln(say, "cut")
	console.await(t, "guest: ready")
	console.await(t, "guest: done 1 disk")
	cancel() // Ctrl-C
	if c := <-code; c != hint.ExitOK {
		t.Errorf("exit %d", c)
	}
	for _, want := range []string{"the image has no farkeep.toml", "relay: none", "power cut", "switching the machine off"} {
		if !strings.Contains(diagnostics.String(), want) {
			t.Errorf("stderr does not say %q:\n%s", want, diagnostics.String())
		}
	}
	after, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(before, after) {
		t.Error("the image has been written to")
	}
}

// lineAwaiter takes a console's lines, each in one Write.
type lineAwaiter struct{ lines chan string }

func (l *lineAwaiter) Write(b []byte) (int, error) {
	l.lines <- string(b)
	return len(b), nil
}

func (l *lineAwaiter) await(t *testing.T, text string) {
	t.Helper()
	limit := time.After(20 * time.Minute) // it may have to wait for its turn
	for {
		select {
		case line := <-l.lines:
			t.Log(strings.TrimSuffix(line, "\n"))
			if strings.Contains(line, text) {
				return
			}
		case <-limit:
			t.Fatalf("the console does not say %q", text)
		}
	}
}
