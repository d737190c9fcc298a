package gentle

import (
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// The whole process is changed for good, so the test runs in one of its own.
func TestIdle(t *testing.T) {
	if os.Getenv("GENTLE_TEST") == "" {
		c := exec.Command(os.Args[0], "-test.run=^TestIdle$")
		c.Env = append(os.Environ(), "GENTLE_TEST=1")
		if out, err := c.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	if err := Idle(); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir("/proc/self/task")
	if err != nil || len(entries) < 2 {
		t.Fatalf("%d threads, %v", len(entries), err)
	}
	for _, e := range entries {
		tid, _ := strconv.Atoi(e.Name())
		got, _, errno := unix.Syscall(unix.SYS_IOPRIO_GET, ioprioWhoProcess, uintptr(tid), 0)
		if errno != 0 || got>>ioprioClassShift != ioprioClassIdle {
			t.Errorf("thread %d has I/O priority %#x, %v", tid, got, errno)
		}
		stat, err := os.ReadFile("/proc/self/task/" + e.Name() + "/stat")
		if err != nil {
			t.Fatal(err)
		}
		// proc_pid_stat(5): field 19 is the nice value; the name in field 2 may hold spaces.
		fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		if fields[16] != "19" {
			t.Errorf("thread %d has nice value %s", tid, fields[16])
		}
	}
}
