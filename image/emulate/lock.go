package emulate

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// Turn waits, for as long as patience says, until there is a CPU for one more emulated machine on this host, and
// returns the function that gives the turn back. It is for machines that other packages start; Start takes its own.
func Turn(ctx context.Context, patience time.Duration, log *slog.Logger) (func(), error) {
	return turn(ctx, lockPaths(), patience, log)
}

// turn waits until one of the locks is free, and returns the function that gives it back.
//
// Without a hardware accelerator an emulated machine takes a whole CPU. More machines than CPUs slow each other
// until time limits inside the guests strike (USB enumeration, DHCP, watchdog), and a test fails for no
// reason of its own. "go test" runs packages side by side, so the packages cannot arrange it among
// themselves. The kernel drops the lock of a process that dies.
func turn(ctx context.Context, paths []string, patience time.Duration, log *slog.Logger) (func(), error) {
	deadline := time.Now().Add(patience)
	for told := false; ; told = true {
		for _, path := range paths {
			release, err := tryLock(path)
			if err != nil || release != nil {
				return release, err
			}
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("another emulated machine on this host did not end within %s (it holds %s)", patience, paths[0])
		}
		if !told {
			log.Info("waiting for another emulated machine on this host to end", "lock", paths[0])
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for another emulated machine to end: %w", ctx.Err())
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// tryLock takes a lock, if it is free.
func tryLock(path string) (release func(), err error) {
	f, err := openLock(path)
	if err != nil {
		return nil, err
	}
	switch err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err {
	case nil:
		return func() { f.Close() }, nil
	case unix.EWOULDBLOCK, unix.EINTR:
		f.Close()
		return nil, nil
	default:
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
}

// openLock opens the lock file, which users of one host share. It does not create what exists: in a sticky
// folder the kernel refuses O_CREAT on another user's file (fs.protected_regular).
func openLock(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		f, err = os.OpenFile(path, os.O_RDONLY|os.O_CREATE|unix.O_NOFOLLOW, 0o644)
	}
	if err != nil {
		return nil, fmt.Errorf("open the emulator's lock file: %w", err)
	}
	return f, nil
}

// lockPaths has a lock for each CPU.
func lockPaths() []string {
	paths := []string{filepath.Join(os.TempDir(), "farkeep-emulate.lock")}
	for i := 1; i < runtime.NumCPU(); i++ {
		paths = append(paths, filepath.Join(os.TempDir(), fmt.Sprintf("farkeep-emulate-%d.lock", i)))
	}
	return paths
}
