package disk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"farkeep/appliance/localcall"
	"farkeep/appliance/part"
	"farkeep/appliance/status"
	"farkeep/shared/hint"
	"farkeep/shared/settings"

	"golang.org/x/sys/unix"
)

func tool(t *testing.T, pkg, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s (Debian package %s): %v\n%s", name, strings.Join(args, " "), pkg, err, out)
	}
	return string(out)
}

// fileSystem makes an ext4 file system in a file.
func fileSystem(t *testing.T) string {
	t.Helper()
	image := filepath.Join(t.TempDir(), "ext4")
	tool(t, "e2fsprogs", "mke2fs", "-q", "-t", "ext4", "-F", "-b", "4096", "-J", "size=4", image, "160M") // two block groups
	return image
}

func TestNeedsCheck(t *testing.T) {
	now := time.Now()
	tune := func(args ...string) func(*testing.T, string) {
		return func(t *testing.T, image string) { tool(t, "e2fsprogs", "tune2fs", append(args, image)...) }
	}
	set := func(command string) func(*testing.T, string) {
		return func(t *testing.T, image string) { debugfs(t, image, command) }
	}
	for _, tc := range []struct {
		name    string
		prepare func(t *testing.T, image string)
		now     time.Time
		care    Care
		why     string
	}{
		{"new", func(*testing.T, string) {}, now, CareNone, ""},
		{"marked with errors", set("ssv state 3"), now, CareFull, "errors"},
		{"error count", set("ssv error_count 4"), now, CareFull, "errors"},
		{"a journal to replay", set("feature needs_recovery"), now, CareReplay, "not unmounted in order"},
		{"a journal to replay, and errors", func(t *testing.T, image string) {
			debugfs(t, image, "feature needs_recovery")
			debugfs(t, image, "ssv error_count 4")
		}, now, CareFull, "errors"},
		{"not clean", set("ssv state 0"), now, CareFull, "not marked clean"},
		{"mounted often", tune("-C", "500"), now, CareFull, "500 times"},
		{"checked long ago", tune("-T", "20200101"), now, CareFull, "2020-01-0"},
		{"checked long ago, clock unset", tune("-T", "20200101"), time.Time{}, CareNone, ""},
		{"checked in the future", func(*testing.T, string) {}, time.Unix(0, 0), CareNone, ""},
		{"damaged superblock", func(t *testing.T, image string) {
			f, err := os.OpenFile(image, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if _, err := f.WriteAt([]byte("rot"), superblockAt+0x250); err != nil {
				t.Fatal(err)
			}
		}, now, CareFull, "checksum"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			image := fileSystem(t)
			tc.prepare(t, image)
			l := &linux{log: slog.New(slog.DiscardHandler)}
			care, why, err := l.NeedsCheck(image, tc.now)
			if err != nil || care != tc.care || (tc.why == "") != (why == "") || !strings.Contains(why, tc.why) {
				t.Fatalf("%v, %q, %v; want %v, %q", care, why, err, tc.care, tc.why)
			}
			if care == CareNone {
				return
			}
			// What needs care needs none afterwards.
			if err := l.Check(t.Context(), image, care == CareFull); err != nil {
				t.Fatal(err)
			}
			if care, why, err := l.NeedsCheck(image, tc.now); care != CareNone || err != nil {
				t.Errorf("after the check: %v, %q, %v", care, why, err)
			}
		})
	}
	t.Run("no file system", func(t *testing.T) {
		empty := filepath.Join(t.TempDir(), "empty")
		if err := os.WriteFile(empty, make([]byte, 8192), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, _, err := (&linux{}).NeedsCheck(empty, now); kindOf(err) != status.ErrorFileSystem {
			t.Errorf("%v", err)
		}
	})
}

func debugfs(t *testing.T, image, command string) {
	t.Helper()
	tool(t, "e2fsprogs", "debugfs", "-w", "-R", command, image)
}

func TestFsck(t *testing.T) {
	var log strings.Builder
	check := fsck{log: slog.New(slog.NewTextHandler(&log, nil)), programs: fsckPrograms}
	t.Run("clean", func(t *testing.T) {
		image := fileSystem(t)
		for _, full := range []bool{false, true} {
			if corrected, err := check.run(t.Context(), image, full); corrected || err != nil {
				t.Errorf("full %v: %v, %v", full, corrected, err)
			}
		}
		if !strings.Contains(log.String(), "clean") {
			t.Errorf("log: %s", log.String())
		}
	})
	t.Run("corrected", func(t *testing.T) {
		image := fileSystem(t)
		debugfs(t, image, "ssv free_blocks_count 5")
		debugfs(t, image, "ssv state 2")
		if corrected, err := check.run(t.Context(), image, true); !corrected || err != nil {
			t.Error(corrected, err)
		}
		if out := tool(t, "e2fsprogs", "e2fsck", "-fn", image); strings.Contains(out, "wrong") {
			t.Errorf("not corrected: %s", out)
		}
	})
	t.Run("not there", func(t *testing.T) {
		if _, err := check.run(t.Context(), filepath.Join(t.TempDir(), "gone"), false); err == nil {
			t.Error("no error")
		}
	})
	t.Run("no e2fsck", func(t *testing.T) {
		_, err := fsck{log: check.log, programs: []string{"/nonexistent"}}.run(t.Context(), fileSystem(t), false)
		if kindOf(err) != status.ErrorFileSystem || !strings.Contains(err.Error(), "e2fsprogs") {
			t.Errorf("%v", err)
		}
	})
	t.Run("cancelled", func(t *testing.T) {
		slow := filepath.Join(t.TempDir(), "e2fsck")
		if err := os.WriteFile(slow, []byte("#!/bin/sh\nexec sleep 600\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if _, err := (fsck{log: check.log, programs: []string{slow}}).run(ctx, "x", false); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
	})
}

func TestProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		c := fsck{log: slog.New(slog.NewTextHandler(&log, nil)), quiet: progressEvery}
		r, w := io.Pipe()
		go func() {
			io.WriteString(w, "garbage\n1 2 0 x\n")
			for pass := 1; pass <= 2; pass++ {
				for i := range 101 {
					fmt.Fprintf(w, "%d %d 100 /dev/dm-0\n", pass, i)
					time.Sleep(time.Second)
				}
			}
			w.Close()
		}()
		c.progress(r)
		if n := strings.Count(log.String(), "\n"); n < 18 || n > 20 {
			t.Errorf("%d lines in 202 seconds: %s", n, log.String())
		}
	})
}

func TestOwn(t *testing.T) {
	dir := t.TempDir()
	const keeper = 902
	for _, name := range []string{"generations/photos/000001-20261105T030000Z/files", "incoming", ".farkeep/going", "other/deep"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	outside := t.TempDir()
	if err := os.Symlink(outside, filepath.Join(dir, ".heartbeat")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, filepath.Join(dir, "generations", "link")); err != nil {
		t.Fatal(err)
	}
	l := &linux{target: dir, owner: keeper}
	for range 2 {
		if err := l.own(); err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range map[string]uint32{
		".": keeper, "generations": keeper, "generations/photos": keeper, "incoming": keeper,
		".farkeep": keeper, ".farkeep/going": keeper,
		"generations/photos/000001-20261105T030000Z": 0, "other": 0, "other/deep": 0,
	} {
		if got := uid(t, filepath.Join(dir, name)); got != want {
			t.Errorf("%s belongs to %d, want %d", name, got, want)
		}
	}
	if got := uid(t, outside); got != 0 {
		t.Errorf("a link on the disk gave away %s to %d", outside, got)
	}
}

func uid(t *testing.T, path string) uint32 {
	t.Helper()
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Uid
}

func TestMounted(t *testing.T) {
	for target, want := range map[string]bool{"/": true, "/proc": true, "/no/such/mount": false, t.TempDir(): false} {
		if got, err := (&linux{target: target}).Mounted(); got != want || err != nil {
			t.Errorf("%s: %v, %v", target, got, err)
		}
	}
}

// Whatever is not mounted must not be shut down in its place.
func TestAbandonNothing(t *testing.T) {
	l := &linux{target: t.TempDir(), log: slog.New(slog.DiscardHandler)}
	if err := l.Abandon(false); err != nil {
		t.Error(err)
	}
	if err := l.Unmount(); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(filepath.Join(l.target, "still"), nil, 0o600); err != nil {
		t.Errorf("the root file system was shut down: %v", err)
	}
}

// Without a device mapper there is no mapping, and removing it is no error.
func TestNoDeviceMapper(t *testing.T) {
	if _, err := os.Stat("/dev/mapper/control"); err == nil {
		t.Log("this machine has a device mapper; the mapping is looked for in it")
	}
	l := &linux{uuid: "b64e6fbb-11a0-42e1-b7f1-32adde77f805", log: slog.New(slog.DiscardHandler)}
	if node, err := l.Mapping(); node != "" || err != nil {
		t.Errorf("%q, %v", node, err)
	}
	if err := l.Unmap(false); err != nil {
		t.Error(err)
	}
}

func TestFindNothing(t *testing.T) {
	l := &linux{sys: "/sys"}
	if dev, err := l.Find("00000000-0000-0000-0000-000000000000"); !errors.Is(err, errNotFound) {
		t.Errorf("%+v, %v", dev, err)
	}
	if l.Present(Device{Name: "sdz", Disk: "sdz", Seq: "1"}) {
		t.Error("a disk that is not there is present")
	}
}

// The kernel's sg_io_hdr is 88 bytes on 64-bit machines (include/scsi/sg.h).
func TestSCSIHeader(t *testing.T) {
	if n := unsafe.Sizeof(sgHeader{}); n != 88 {
		t.Errorf("%d bytes", n)
	}
	plain := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(plain, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := flushDisk(plain, true); !errors.Is(err, unix.ENOTTY) {
		t.Errorf("a file that is no disk: %v", err)
	}
}

func TestCheckFile(t *testing.T) {
	f := checkFile(filepath.Join(t.TempDir(), "check-wanted"))
	for _, want := range []bool{false, true, true, false, false} {
		if err := f.WantCheck(want); err != nil {
			t.Fatal(err)
		}
		if f.CheckWanted() != want {
			t.Errorf("want %v", want)
		}
	}
}

// TestPart runs the part itself as far as a machine without its disk goes:
// calls are answered, the status is written, and it ends in order.
func TestPart(t *testing.T) {
	dir := t.TempDir()
	paths := part.Paths{Run: filepath.Join(dir, "run"), State: filepath.Join(dir, "state"), Media: filepath.Join(dir, "media")}
	for _, p := range []string{paths.RunDir(part.Disk), paths.StateDir(part.Disk)} {
		if err := os.MkdirAll(p, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	brief := Brief{Disk: settings.Disk{LUKS: "00000000-0000-0000-0000-000000000000", Relay: settings.Relay{Driver: "none"}, IdleClose: settings.Duration(time.Minute)}}
	env, err := part.New(part.Header{Name: part.Disk, Paths: paths, Firmware: true}, brief, slog.New(slog.NewTextHandler(t.Output(), nil)), nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- Run(ctx, env) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		if s, err := status.Read[status.Disk](paths.Status(part.Disk)); err != nil || s == nil || s.State != status.DiskPowered {
			t.Errorf("status in the end: %+v, %v", s, err)
		}
	}()
	socket := paths.Socket(part.Disk)
	deadline := time.Now().Add(time.Minute)
	for {
		// The socket's file is there a moment before somebody listens.
		if c, err := net.Dial("unix", socket); err == nil {
			c.Close()
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("no socket")
		}
		time.Sleep(time.Millisecond)
	}
	var s status.Disk
	if err := localcall.Call(ctx, socket, VerbSleep, nil, &s); err != nil {
		t.Errorf("sleep: %v", err)
	}
	// By this code a push knows that waking helps; any other one would end it.
	if err := localcall.Call(ctx, socket, VerbHold, nil, nil); err == nil || !strings.Contains(err.Error(), "not open") || hint.Code(err) != hint.ExitUnreachable {
		t.Errorf("hold: %v, code %d", err, hint.Code(err))
	}
	if err := localcall.Call(ctx, socket, "format", nil, nil); err == nil {
		t.Error("an unknown verb was accepted")
	}
	if err := localcall.Call(ctx, socket, VerbWake, map[string]int{"now": 1}, nil); err == nil {
		t.Error("unknown arguments were accepted")
	}
	if err := localcall.Call(ctx, socket, VerbWake, nil, &s); err != nil || s.State == "" {
		t.Errorf("wake: %+v, %v", s, err)
	}
}
