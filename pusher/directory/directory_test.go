package directory

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"farkeep/pusher/target"
	"farkeep/pusher/target/targettest"
	"farkeep/shared/hint"
)

func TestTarget(t *testing.T) {
	targettest.Run(t, func(t *testing.T) target.Target {
		return New(Config{Name: "disk", Path: t.TempDir(), Pusher: "home"})
	})
}

func TestFolderIsGone(t *testing.T) {
	missing := New(Config{Name: "disk", Path: filepath.Join(t.TempDir(), "no")})
	if err := missing.Wake(t.Context()); err == nil || !strings.Contains(hint.Of(err), "mount") {
		t.Errorf("missing folder: %v", err)
	}
	// An empty mount point that held generations before.
	dir := t.TempDir()
	unmounted := New(Config{Name: "disk", Path: dir, Used: true})
	if err := unmounted.Wake(t.Context()); err == nil || !strings.Contains(err.Error(), "has none now") {
		t.Errorf("empty mount point: %v", err)
	}
	if _, err := New(Config{Name: "disk", Path: dir}).Status(t.Context()); err == nil {
		t.Error("status of an empty folder")
	}
	if left, _ := os.ReadDir(dir); len(left) > 0 {
		t.Errorf("made %v in a folder that was refused", left)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := New(Config{Name: "disk", Path: file}).Wake(t.Context()); err == nil {
		t.Error("a file was taken for a folder")
	}
}

// A disk that was prepared for an appliance stays the appliance's.
func TestOwner(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root, which CI has")
	}
	dir := t.TempDir()
	if err := os.Chown(dir, 902, 902); err != nil {
		t.Fatal(err)
	}
	d := New(Config{Name: "disk", Path: dir})
	defer d.Close()
	if err := d.Wake(t.Context()); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) == 0 {
		t.Fatal(entries, err)
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		if uid := info.Sys().(*syscall.Stat_t).Uid; uid != 902 {
			t.Errorf("%s belongs to %d", e.Name(), uid)
		}
	}
}
