package keysource

import (
	"fmt"

	"farkeep/shared/hint"

	"golang.org/x/sys/unix"
)

// Confine keeps the memory of this process, which is about to hold keys, out of
// swap, core dumps and debuggers.
func Confine() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("forbid core dumps: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("forbid debuggers: %w", err)
	}
	// On fault: Go reserves far more address space than it ever touches.
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT); err != nil {
		return hint.Because(fmt.Errorf("lock memory: %w", err), "the service needs CAP_IPC_LOCK or LimitMEMLOCK=infinity")
	}
	return nil
}
