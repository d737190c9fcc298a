package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"farkeep/pusher/borgtest"
)

// peakVariable names a file to which the program of the tests writes, at its end,
// how much memory it had at most, in bytes.
const peakVariable = "FARKEEP_TEST_PEAK"

func notePeak() {
	path := os.Getenv(peakVariable)
	if path == "" {
		return
	}
	text, err := os.ReadFile("/proc/self/status")
	if err == nil {
		m := regexp.MustCompile(`VmHWM:\s+(\d+) kB`).FindSubmatch(text)
		err = os.WriteFile(path, append(m[1], "000"...), 0o600)
	}
	if err != nil {
		panic(err)
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
	r := borgtest.NewLarge(t, filepath.Join(dir, "home"), segments, chunks/segments)
	push := func(what string) (out string) {
		t.Helper()
		peak := filepath.Join(dir, "peak")
		c := exec.CommandContext(t.Context(), program, "push", "--site", filepath.Join(dir, "site.toml"), "--state", state)
		c.Env = append(os.Environ(), peakVariable+"="+peak)
		var said bytes.Buffer
		c.Stderr = &said
		began := time.Now()
		table, err := c.Output()
		if err != nil {
			t.Fatalf("%s: %v\n%s", what, err, said.Bytes())
		}
		text, err := os.ReadFile(peak)
		if err != nil {
			t.Fatal(err)
		}
		got, err := strconv.Atoi(string(text))
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: %d MB at most, %.1f s of CPU, %.1f s\n%s", what, got/1e6, (c.ProcessState.UserTime() + c.ProcessState.SystemTime()).Seconds(), time.Since(began).Seconds(), table)
		if limit := peakBase + peakChunk*chunks; got > limit {
			t.Errorf("%s of %d chunks: %d bytes of memory, and %d are allowed", what, chunks, got, limit)
		}
		return said.String()
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
	moved := chunks / 2 * 9 / 10 * borgtest.ChunkData

	push("first push")
	push("unchanged")
	r.Compact(t, 3)
	if n := copied(push("half of it moved")); n < moved {
		t.Errorf("%d bytes were copied; %d were moved", n, moved)
	}
	if err := os.RemoveAll(filepath.Join(state, "base")); err != nil {
		t.Fatal(err)
	}
	if n := copied(push("notes lost, unchanged")); n != 0 {
		t.Errorf("%d bytes were copied of nothing", n)
	}
	r.Compact(t, 3)
	if n := copied(push("half of it moved, with the notes made anew")); n < moved/2 {
		t.Errorf("%d bytes were copied; %d were moved", n, moved)
	}
	if err := os.RemoveAll(filepath.Join(state, "base")); err != nil {
		t.Fatal(err)
	}
	r.Compact(t, 3)
	said := push("half of it moved, with the notes lost")
	if n := copied(said); n != 0 || !strings.Contains(said, "was not noted") {
		t.Errorf("%d bytes were copied with no notes:\n%s", n, said)
	}
}
