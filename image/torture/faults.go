package torture

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// cause makes a fault happen; undo takes its cause away, not its consequences.
//
// Writes that fail are package faulty's, under the emulated machine. A loop device
// whose backing file system is full cannot play them: it answers a write that it
// carried out in part as if all of it were done (seen on Linux 6.18).
func (b *killBench) cause(_ context.Context, f fault) (undo func() error, err error) {
	switch f {
	case faultFull:
		// Somebody else took the room; the keeper's own reserve is all that is left.
		return fill(filepath.Join(b.svc.Disk(), "ballast"))
	case faultReadOnly:
		// The kernel's own switch for testing that: it marks the file system as
		// damaged, and errors=remount-ro does the rest.
		name := filepath.Join("/sys/fs/ext4", filepath.Base(b.svc.Loop), "trigger_fs_error")
		if err := os.WriteFile(name, []byte("torture"), 0o200); err != nil {
			return nil, fmt.Errorf("make a file system error: %w", err)
		}
		return func() error { return nil }, nil
	}
	return nil, fmt.Errorf("unknown fault %q", f)
}

// fill takes all the room of a file system.
func fill(path string) (undo func() error, err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	for step := int64(1 << 20); step >= 4096; step /= 4 {
		for {
			size, err := f.Seek(0, 2)
			if err != nil {
				return nil, err
			}
			if err = unix.Fallocate(int(f.Fd()), 0, size, step); errors.Is(err, unix.ENOSPC) {
				break
			} else if err != nil {
				return nil, fmt.Errorf("fill %s: %w", path, err)
			}
			if _, err := f.Seek(size+step, 0); err != nil {
				return nil, err
			}
			if err := f.Truncate(size + step); err != nil {
				return nil, err
			}
		}
	}
	return func() error { return os.Remove(path) }, nil
}
