// Package gentle makes the process one that others do not notice: the lowest
// CPU priority, and disk access only when nobody else wants any (ioprio_set(2),
// class idle; it counts with the I/O schedulers that know priorities, BFQ for one).
package gentle

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

const (
	ioprioWhoProcess = 1
	ioprioClassIdle  = 3
	ioprioClassShift = 13
	lowestPriority   = 19
)

// passes bounds how often the threads are gone through.
const passes = 10

// Idle lowers the priority of every thread of the process. Threads started later
// inherit it from the thread that starts them.
func Idle() error {
	done := map[int]bool{}
	// Linux keeps both priorities for each thread. One that was started during a
	// pass, by a thread not reached yet, is found by the next.
	for range passes {
		entries, err := os.ReadDir("/proc/self/task")
		if err != nil {
			return fmt.Errorf("list the threads of this process: %w", err)
		}
		fresh := false
		for _, e := range entries {
			tid, err := strconv.Atoi(e.Name())
			if err != nil || done[tid] {
				continue
			}
			if err := idle(tid); err != nil {
				return err
			}
			done[tid], fresh = true, true
		}
		if !fresh {
			return nil
		}
	}
	return nil
}

func idle(tid int) error {
	if err := unix.Setpriority(unix.PRIO_PROCESS, tid, lowestPriority); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("lower the CPU priority: %w", err)
	}
	_, _, errno := unix.Syscall(unix.SYS_IOPRIO_SET, ioprioWhoProcess, uintptr(tid), ioprioClassIdle<<ioprioClassShift)
	if errno != 0 && errno != unix.ESRCH {
		return fmt.Errorf("lower the I/O priority: %w", errno)
	}
	return nil
}
