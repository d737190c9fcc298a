package kmod

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The kernel's own messages: writing "add" to a device's uevent file makes it
// announce the device again, as udevadm trigger does.
func TestHotplugHearsTheKernel(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("this test needs root, to ask the kernel for a message")
	}
	files, err := filepath.Glob("/sys/devices/virtual/*/*/uevent")
	if err != nil || len(files) == 0 {
		t.Fatalf("no virtual device in /sys: %v", err)
	}
	h, err := Listen()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(files[0], []byte("add"), 0o200); err != nil {
		t.Fatal(err)
	}
	// The subscription wakes at least every second.
	buf := make([]byte, 64<<10)
	for limit := time.Now().Add(20 * time.Second); ; {
		n, _, err := unix.Recvfrom(h.fd, buf, 0)
		if action, _ := parseEvent(buf[:max(n, 0)]); err == nil && action == "add" {
			break
		}
		if time.Now().After(limit) {
			t.Fatalf("no message: %v", err)
		}
	}
	// Watch ends with its context, and closes the subscription.
	l, _ := loader(t, t.TempDir(), nil)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := h.Watch(ctx, l); err != nil {
		t.Error(err)
	}
	if _, _, err := unix.Recvfrom(h.fd, buf, unix.MSG_DONTWAIT); !errors.Is(err, unix.EBADF) {
		t.Errorf("still subscribed: %v", err)
	}
}
