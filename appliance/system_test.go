package main

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"farkeep/appliance/boot"
	"farkeep/appliance/part"

	"golang.org/x/sys/unix"
)

func TestHealthy(t *testing.T) {
	s := &system{}
	if err := s.healthy(); err != nil {
		t.Errorf("before anything began: %v", err)
	}
	s.beat()
	if err := s.healthy(); err != nil {
		t.Errorf("after a beat: %v", err)
	}
	s.expect(-time.Second)
	if err := s.healthy(); err == nil || !strings.Contains(err.Error(), "stuck") {
		t.Errorf("a second late: %v", err)
	}
}

// A part that keeps failing restarts the machine, but never in a loop.
func TestRestartsAreRare(t *testing.T) {
	if boot.Uptime() < failingAfter {
		t.Logf("this machine is up for %v: only the refusals are tested", boot.Uptime())
	}
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "supervisor"), 0o700); err != nil {
		t.Fatal(err)
	}
	s := &system{log: slog.New(slog.DiscardHandler), header: part.Header{Firmware: true, Paths: part.Paths{State: dir}}}
	remember := func(at time.Time) {
		if err := os.WriteFile(s.restartFile(), []byte(at.Format(time.RFC3339)+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, at := range map[string]time.Time{"an hour ago": time.Now().Add(-time.Hour), "in the future, by this clock": time.Now().Add(1000 * time.Hour)} {
		remember(at)
		if s.mayRestart() {
			t.Errorf("restarted although the last restart was %s", name)
		}
	}
	remember(time.Now().Add(-2 * restartPause))
	want := boot.Uptime() > failingAfter
	if got := s.mayRestart(); got != want {
		t.Errorf("two days later: %v", got)
	}
	if s.mayRestart() {
		t.Error("twice")
	}
	s.header.Firmware = false
	remember(time.Now().Add(-2 * restartPause))
	if s.mayRestart() {
		t.Error("a service restarts the machine")
	}
}

// A supervisor that comes back finds the disk mounted: its top stays the keeper's.
func TestMountedDiskKeepsItsOwner(t *testing.T) {
	dir := t.TempDir()
	paths := part.Paths{Run: filepath.Join(dir, "run"), State: filepath.Join(dir, "state"), Media: filepath.Join(dir, "media")}
	s := &system{header: part.Header{Paths: paths}}
	if err := s.makeFolders(); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", paths.Disk(), "tmpfs", 0, fmt.Sprintf("mode=711,uid=%d", part.KeeperUID)); err != nil {
		t.Fatalf("mount (as root): %v", err)
	}
	defer unix.Unmount(paths.Disk(), unix.MNT_DETACH)
	if err := s.makeFolders(); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(paths.Disk(), &st); err != nil || st.Uid != part.KeeperUID || st.Mode&0o777 != 0o711 {
		t.Errorf("the disk's top: user %d, mode %o, %v", st.Uid, st.Mode, err)
	}
}
