package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"farkeep/appliance/benchtest"

	"golang.org/x/sys/unix"
)

func must(b testing.TB, err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

// await waits until ok, for half a minute at most.
func await(b testing.TB, what string, ok func() bool) {
	b.Helper()
	for limit := time.Now().Add(2 * time.Minute); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(limit) {
			b.Fatalf("%s: that did not happen within two minutes", what)
		}
	}
}

// benchDir makes a folder that every user may enter.
func benchDir(b testing.TB) string {
	b.Helper()
	if os.Geteuid() != 0 {
		b.Fatal("run this as root: it mounts a tmpfs, and the appliance's parts get users of their own")
	}
	dir := b.TempDir()
	for d := dir; d != "/" && d != os.TempDir(); d = filepath.Dir(d) {
		must(b, os.Chmod(d, 0o755))
	}
	return dir
}

func mountTmpfs(b testing.TB, dir, size string) {
	b.Helper()
	must(b, os.MkdirAll(dir, 0o755))
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=755,size="+size); err != nil {
		b.Fatalf("mount a tmpfs on %s: %v", dir, err)
	}
	b.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
}

// mountExt4 mounts an empty ext4 of so many MiB. Its image lies in memory: what is
// compared is programs, not disks, and yet with the work that a file system makes.
// Writing the image is the work of a kernel thread, which is on nobody's account.
func mountExt4(b testing.TB, dir string, mib int64) {
	b.Helper()
	memory := dir + ".memory"
	mountTmpfs(b, memory, fmt.Sprintf("%dm", mib+mib/8))
	must(b, os.MkdirAll(dir, 0o755))
	image := filepath.Join(memory, "ext4")
	must(b, os.WriteFile(image, nil, 0o600))
	must(b, os.Truncate(image, mib<<20))
	for _, cmd := range [][]string{
		{"mke2fs", "-q", "-t", "ext4", "-i", "8192", "-E", "lazy_itable_init=0,lazy_journal_init=0", image},
		{"mount", "-t", "ext4", "-o", "loop", image, dir},
	} {
		if out, err := exec.Command(cmd[0], cmd[1:]...).CombinedOutput(); err != nil {
			b.Fatalf("%s (Debian packages e2fsprogs, mount): %v\n%s", cmd, err, out)
		}
	}
	b.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			b.Errorf("unmount %s: %v", dir, err)
		}
	})
}

// settle writes out what file systems still hold back, so that nobody's turn pays
// for the one before.
func settle(b testing.TB, dirs ...string) {
	b.Helper()
	for _, dir := range dirs {
		f, err := os.Open(dir)
		must(b, err)
		must(b, unix.Syncfs(int(f.Fd())))
		must(b, f.Close())
	}
}

// measure runs the client and charges it for its descendants. The servers run
// before and after; what they, and those of their descendants that have ended by then,
// used meanwhile is the server's share.
func measure(b testing.TB, cmd *exec.Cmd, servers ...int) (benchtest.Cost, string) {
	b.Helper()
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	before := cpuOf(b, servers)
	start := time.Now()
	must(b, cmd.Start())
	// Memory is sampled, since what processes share is known only while they live;
	// and not often, since looking takes half a millisecond.
	stop, sampled := make(chan struct{}), make(chan struct{})
	var client, server int64
	go func() {
		defer close(sampled)
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for {
			client, server = max(client, memory(cmd.Process.Pid)), max(server, memory(servers...))
			select {
			case <-stop:
				return
			case <-tick.C:
			}
		}
	}()
	err := cmd.Wait()
	c := benchtest.Cost{Wall: time.Since(start)}
	close(stop)
	<-sampled
	if err != nil {
		b.Fatalf("%s: %v\n%s%s", cmd, err, out.Bytes(), errOut.Bytes())
	}
	await(b, "the server's children end", func() bool {
		return !slices.ContainsFunc(servers, func(pid int) bool { return len(children(pid)) > 0 })
	})
	c.ClientCPU = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	c.ServerCPU = cpuOf(b, servers) - before
	c.ClientPeak, c.ServerPeak = client, server
	return c, out.String()
}

// cpuOf adds up what the processes and their ended children have used
// (proc(5), /proc/pid/stat, fields 14 to 17, in ticks of 10 ms).
func cpuOf(b testing.TB, pids []int) (sum time.Duration) {
	b.Helper()
	for _, pid := range pids {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		must(b, err)
		// The name, field 2, may hold anything but ends at the last parenthesis.
		fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
		for _, f := range fields[11:15] {
			n, err := strconv.ParseInt(f, 10, 64)
			must(b, err)
			sum += time.Duration(n) * 10 * time.Millisecond
		}
	}
	return sum
}

// memory is how many bytes the processes and their descendants hold now; a page
// that n processes share counts for an nth in each (proc(5), smaps_rollup).
func memory(pids ...int) (sum int64) {
	for _, pid := range pids {
		// An error is a process that has ended.
		text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		if _, rest, found := strings.Cut(string(text), "\nPss:"); found {
			var kib int64
			if _, err := fmt.Sscanf(rest, "%d kB", &kib); err == nil {
				sum += kib << 10
			}
		}
		sum += memory(children(pid)...)
	}
	return sum
}

// children are the processes that the first thread of pid started.
func children(pid int) (pids []int) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return nil
	}
	for _, f := range strings.Fields(string(text)) {
		if n, err := strconv.Atoi(f); err == nil {
			pids = append(pids, n)
		}
	}
	return pids
}

// sums are what b2sum says of the files below dir, sorted by path.
func sums(b testing.TB, dir string) string {
	b.Helper()
	var names []string
	must(b, fs.WalkDir(os.DirFS(dir), ".", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			names = append(names, path)
		}
		return err
	}))
	if len(names) == 0 {
		b.Fatalf("%s is empty", dir)
	}
	slices.Sort(names)
	cmd := exec.Command("xargs", "-0", "b2sum", "-l", "256", "--")
	cmd.Dir, cmd.Stdin = dir, strings.NewReader(strings.Join(names, "\x00"))
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		b.Fatalf("b2sum in %s: %v: %s", dir, err, exit.Stderr)
	}
	must(b, err)
	return string(out)
}

// sameFiles fails the benchmark unless both folders hold the same files.
func sameFiles(b testing.TB, want, dir string) {
	b.Helper()
	if got := sums(b, dir); got != want {
		b.Fatalf("%s does not hold what the source holds: %d and %d bytes of sums", dir, len(got), len(want))
	}
}

// sameGeneration is sameFiles for a generation, whose own list must hold too.
func sameGeneration(b testing.TB, want, dir string) {
	b.Helper()
	sameFiles(b, want, filepath.Join(dir, "files"))
	cmd := exec.Command("b2sum", "-l", "256", "--quiet", "-c", "SUMS.b2")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		b.Fatalf("%s in %s: %v\n%s", cmd, dir, err, out)
	}
}
