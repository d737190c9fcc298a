package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// endVariable names a file to which the program of the tests writes, at its end,
// what it was like.
const endVariable = "FARKEEP_TEST_END"

// end is what a process was like when it ended.
type end struct {
	Peak    int `json:"peak"` // the most memory that it had, in bytes
	Nice    int `json:"nice"`
	IOClass int `json:"io_class"` // ioprio_get(2): 0 none, 3 idle
}

func noteEnd() {
	path := os.Getenv(endVariable)
	if path == "" {
		return
	}
	err := func() error {
		text, err := os.ReadFile("/proc/self/status")
		if err != nil {
			return err
		}
		var e end
		if e.Peak, err = strconv.Atoi(string(regexp.MustCompile(`VmHWM:\s+(\d+) kB`).FindSubmatch(text)[1])); err != nil {
			return err
		}
		e.Peak <<= 10
		// The system call gives 20 minus the nice value (getpriority(2)).
		nice, err := unix.Getpriority(unix.PRIO_PROCESS, 0)
		if err != nil {
			return err
		}
		e.Nice = 20 - nice
		priority, _, errno := unix.Syscall(unix.SYS_IOPRIO_GET, 1, 0, 0)
		if errno != 0 {
			return errno
		}
		e.IOClass = int(priority >> 13)
		out, err := json.Marshal(e)
		if err != nil {
			return err
		}
		return os.WriteFile(path, out, 0o600)
	}()
	if err != nil {
		panic(err)
	}
}

// ended runs the pusher to its end, which must be a good one.
func ended(t *testing.T, args ...string) (e end, c *exec.Cmd, stdout, stderr []byte) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "end")
	c = exec.CommandContext(t.Context(), program, args...)
	c.Env = append(os.Environ(), endVariable+"="+path)
	var said bytes.Buffer
	c.Stderr = &said
	stdout, err := c.Output()
	if err != nil {
		t.Fatalf("%v: %v\n%s", args, err, said.Bytes())
	}
	text, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(text, &e)
	}
	if err != nil {
		t.Fatal(err)
	}
	return e, c, stdout, said.Bytes()
}

// A push stays behind every other process unless it is told not to.
func TestPriority(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, name := range []string{"papers", "disk"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "papers", "a"), []byte("a"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := writeSite(dir, fmt.Sprintf("[[repository]]\nname = \"papers\"\npath = %q\n[[directory_target]]\nname = \"disk\"\npath = %q\n", filepath.Join(dir, "papers"), filepath.Join(dir, "disk"))); err != nil {
		t.Fatal(err)
	}
	push := []string{"push", "--site", filepath.Join(dir, "site.toml"), "--state", filepath.Join(dir, "state")}
	if e, _, _, _ := ended(t, push...); e.Nice != 19 || e.IOClass != 3 {
		t.Errorf("by itself: nice %d, I/O class %d", e.Nice, e.IOClass)
	}
	mine, err := unix.Getpriority(unix.PRIO_PROCESS, 0)
	if err != nil {
		t.Fatal(err)
	}
	if e, _, _, _ := ended(t, append(push, "--priority", "normal")...); e.Nice != 20-mine || e.IOClass == 3 {
		t.Errorf("normal: nice %d, I/O class %d; the test has nice %d", e.Nice, e.IOClass, 20-mine)
	}
}

// What the pusher may have in memory: so much, and so much for each chunk of the
// repository. For 3 million chunks, 4 TB as borg makes them, that is less than 256 MB.
const (
	peakBase  = 45_000_000
	peakChunk = 65
)

// TestMemory pushes a repository of many chunks to a folder, where the one process
// also does what an appliance's keeper would: the first push, the next, one after a
// compaction that moved half of it, and those with the notes lost.
// FARKEEP_CHUNKS=3000000 is the long form.
func TestMemory(t *testing.T) {
	chunks, segments := 150_000, 400
	if text, long := os.LookupEnv("FARKEEP_CHUNKS"); long {
		var err error
		if chunks, err = strconv.Atoi(text); err != nil || chunks < 1000 {
			t.Fatalf("FARKEEP_CHUNKS=%q is no number of chunks", text)
		}
		segments = chunks / 375
	}
	t.Parallel()
	dir := t.TempDir()
	disk, state := filepath.Join(dir, "disk"), filepath.Join(dir, "state")
	if err := os.Mkdir(disk, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := writeSite(dir, fmt.Sprintf("[[repository]]\nname = \"home\"\npath = %q\n[[directory_target]]\nname = \"disk\"\npath = %q\n", filepath.Join(dir, "home"), disk)); err != nil {
		t.Fatal(err)
	}
	r := newLarge(t, filepath.Join(dir, "home"), segments, chunks/segments)
	push := func(what string) (out string) {
		t.Helper()
		began := time.Now()
		e, c, table, said := ended(t, "push", "--site", filepath.Join(dir, "site.toml"), "--state", state)
		t.Logf("%s: %d MB at most, %.1f s of CPU, %.1f s\n%s", what, e.Peak/1e6, (c.ProcessState.UserTime() + c.ProcessState.SystemTime()).Seconds(), time.Since(began).Seconds(), table)
		if limit := peakBase + peakChunk*chunks; e.Peak > limit {
			t.Errorf("%s of %d chunks: %d bytes of memory, and %d are allowed", what, chunks, e.Peak, limit)
		}
		return string(said)
	}
	copied := func(said string) (n int) {
		t.Helper()
		m := regexp.MustCompile(`msg=pushed .* copied=(\d+)`).FindStringSubmatch(said)
		if m == nil {
			t.Fatalf("nothing was pushed:\n%s", said)
		}
		n, _ = strconv.Atoi(m[1])
		return n
	}
	moved := chunks / 2 * 9 / 10 * chunkData

	push("first push")
	push("unchanged")
	r.compact(t, 3)
	if n := copied(push("half of it moved")); n < moved {
		t.Errorf("%d bytes were copied; %d were moved", n, moved)
	}
	if err := os.RemoveAll(filepath.Join(state, "base")); err != nil {
		t.Fatal(err)
	}
	if n := copied(push("notes lost, unchanged")); n != 0 {
		t.Errorf("%d bytes were copied of nothing", n)
	}
	r.compact(t, 3)
	if n := copied(push("half of it moved, with the notes made anew")); n < moved/2 {
		t.Errorf("%d bytes were copied; %d were moved", n, moved)
	}
	if err := os.RemoveAll(filepath.Join(state, "base")); err != nil {
		t.Fatal(err)
	}
	r.compact(t, 3)
	said := push("half of it moved, with the notes lost")
	if n := copied(said); n != 0 || !strings.Contains(said, "was not noted") {
		t.Errorf("%d bytes were copied with no notes:\n%s", n, said)
	}
}
