package part

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// MountPoint says whether something is mounted on path (statx(2),
// STATX_ATTR_MOUNT_ROOT, Linux 5.8). A path that is not there is an error that
// wraps fs.ErrNotExist; a disk that is gone may answer with EIO.
func MountPoint(path string) (bool, error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_NO_AUTOMOUNT, unix.STATX_BASIC_STATS, &st); err != nil {
		return false, fmt.Errorf("look at %s: %w", path, err)
	}
	return st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0, nil
}
