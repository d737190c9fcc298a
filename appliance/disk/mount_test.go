package disk

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"farkeep/appliance/status"

	"golang.org/x/sys/unix"
)

// TestMount mounts a real ext4 file system as the part does, and tries what a
// disk that somebody else filled must not be able to do.
func TestMount(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("this test mounts a file system: run it as root")
	}
	loop := strings.TrimSpace(tool(t, "mount", "losetup", "--find", "--show", fileSystem(t)))
	t.Cleanup(func() { tool(t, "mount", "losetup", "--detach", loop) })
	const keeper = 902
	l := &linux{target: filepath.Join(t.TempDir(), "media", "disk"), owner: keeper, log: slog.New(slog.DiscardHandler)}
	if err := l.Mount(loop); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Unmount(); err != nil {
			t.Error(err)
		}
		if still, err := l.Mounted(); still || err != nil {
			t.Errorf("after Unmount it is mounted: %v, %v", still, err)
		}
	})
	if mounted, err := l.Mounted(); !mounted || err != nil {
		t.Errorf("after Mount it is mounted: %v, %v", mounted, err)
	}
	if got := uid(t, l.target); got != keeper {
		t.Errorf("the disk's top belongs to %d", got)
	}

	var st unix.Statfs_t
	if err := unix.Statfs(l.target, &st); err != nil {
		t.Fatal(err)
	}
	for name, flag := range map[string]int64{
		"nosuid": unix.ST_NOSUID, "nodev": unix.ST_NODEV, "noexec": unix.ST_NOEXEC, "noatime": unix.ST_NOATIME,
	} {
		if st.Flags&flag == 0 {
			t.Errorf("it is mounted without %s", name)
		}
	}
	// A damaged file system must not be written to any further.
	if options := superOptions(t, l.target); !slices.Contains(options, "errors=remount-ro") {
		t.Errorf("the file system's options are %v", options)
	}

	program := filepath.Join(l.target, "program")
	if err := os.WriteFile(program, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := exec.Command(program).Run(); !errors.Is(err, unix.EACCES) {
		t.Errorf("a program on the disk: %v, want %v", err, unix.EACCES)
	}
	null := filepath.Join(l.target, "null")
	if err := unix.Mknod(null, unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))); err != nil {
		t.Fatal(err)
	}
	if f, err := os.Open(null); !errors.Is(err, unix.EACCES) {
		f.Close()
		t.Errorf("a device on the disk: %v, want %v", err, unix.EACCES)
	}
}

// TestFileSystemError: whatever the kernel's way to say it (statfs did until
// Linux 6.12), a file system that met an error is found within one look, e2fsck
// mends it, and the next mount is a sound one.
func TestFileSystemError(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("this test mounts a file system: run it as root")
	}
	loop := strings.TrimSpace(tool(t, "mount", "losetup", "--find", "--show", fileSystem(t)))
	t.Cleanup(func() { tool(t, "mount", "losetup", "--detach", loop) })
	l := &linux{target: filepath.Join(t.TempDir(), "media", "disk"), owner: 902, sys: "/sys", log: slog.New(slog.DiscardHandler)}
	dev := Device{Node: loop}
	look := func(wantSound bool) {
		t.Helper()
		if err := l.Healthy(dev); (err == nil) != wantSound {
			t.Errorf("sound %v: %v", wantSound, err)
		} else if err != nil && kindOf(err) != status.ErrorFileSystem {
			t.Errorf("it is an error of kind %q: %v", kindOf(err), err)
		}
	}
	if err := l.Mount(loop); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Unmount() })
	look(true)
	if err := os.WriteFile(filepath.Join("/sys/fs/ext4", filepath.Base(loop), "trigger_fs_error"), []byte("test"), 0o200); err != nil {
		t.Fatal(err)
	}
	look(false)
	if err := os.WriteFile(filepath.Join(l.target, "x"), nil, 0o600); !errors.Is(err, unix.EROFS) {
		t.Errorf("it takes writes after an error: %v", err)
	}
	if err := l.Unmount(); err != nil {
		t.Fatal(err)
	}
	if care, why, err := l.NeedsCheck(loop, time.Time{}); care != CareFull || err != nil {
		t.Errorf("needs a check: %v, %q, %v", care, why, err)
	}
	if err := l.Check(t.Context(), loop, true); err != nil {
		t.Fatal(err)
	}
	if care, why, err := l.NeedsCheck(loop, time.Time{}); care != CareNone || err != nil {
		t.Errorf("needs a check after one: %v, %q, %v", care, why, err)
	}
	if err := l.Mount(loop); err != nil {
		t.Fatal(err)
	}
	look(true)
}

// TestRemovalsCutByAnError: an error in the middle of removals leaves a list of
// orphans that e2fsck -p stops at. It is mended without a person; nothing but what
// was being removed is gone, and the scrub is told.
func TestRemovalsCutByAnError(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("this test mounts a file system: run it as root")
	}
	loop := strings.TrimSpace(tool(t, "mount", "losetup", "--find", "--show", fileSystem(t)))
	t.Cleanup(func() { tool(t, "mount", "losetup", "--detach", loop) })
	var log strings.Builder
	l := &linux{target: filepath.Join(t.TempDir(), "media", "disk"), owner: 902, sys: "/sys", log: slog.New(slog.NewTextHandler(&log, nil))}
	if err := l.Mount(loop); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Unmount() })
	if err := os.Mkdir(filepath.Join(l.target, ".farkeep"), 0o700); err != nil {
		t.Fatal(err)
	}
	content := []byte(strings.Repeat("content", 20_000))
	open := []*os.File{}
	for i := range 5 {
		f, err := os.Create(filepath.Join(l.target, fmt.Sprint("going", i)))
		if err == nil {
			_, err = f.Write(content)
		}
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, f)
	}
	if err := os.WriteFile(filepath.Join(l.target, "stays"), content, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, f := range open {
		if err := os.Remove(f.Name()); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Sync(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join("/sys/fs/ext4", filepath.Base(loop), "trigger_fs_error"), []byte("test"), 0o200); err != nil {
		t.Fatal(err)
	}
	for _, f := range open {
		f.Close()
	}
	if err := l.Unmount(); err != nil {
		t.Fatal(err)
	}
	if err := l.Check(t.Context(), loop, true); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(log.String(), "corrupted orphan linked list") {
		t.Errorf("e2fsck -p stopped at nothing, so nothing was mended: %s", log.String())
	}
	if err := l.Mount(loop); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(l.target, "stays")); string(got) != string(content) {
		t.Errorf("a file that nobody removed: %d bytes, %v", len(got), err)
	}
	if found, err := os.ReadDir(filepath.Join(l.target, "lost+found")); len(found) > 0 || err != nil {
		t.Errorf("lost+found: %v, %v", found, err)
	}
	note := filepath.Join(l.target, ".farkeep", "corrected.toml")
	if got := uid(t, note); got != 902 {
		t.Errorf("the note belongs to %d", got)
	}
	first, _ := os.ReadFile(note)
	for _, full := range []bool{false, true} {
		if err := l.Unmount(); err != nil {
			t.Fatal(err)
		}
		if err := l.Check(t.Context(), loop, full); err != nil {
			t.Fatal(err)
		}
		if err := l.Mount(loop); err != nil {
			t.Fatal(err)
		}
	}
	if now, _ := os.ReadFile(note); string(now) != string(first) {
		t.Error("a check that corrects nothing is noted as a correction")
	}
}

// superOptions are a mount's options of the file system itself
// (proc_pid_mountinfo(5): the last field).
func superOptions(t *testing.T, target string) []string {
	t.Helper()
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(table)) {
		if f := strings.Fields(line); f[4] == target {
			return strings.Split(f[len(f)-1], ",")
		}
	}
	t.Fatalf("%s is not mounted", target)
	return nil
}
