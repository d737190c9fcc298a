package beneath

import "golang.org/x/sys/unix"

// SetTimes sets when a file or folder was last read and written. Of a link it
// sets the link's own times. unix.UTIME_OMIT as nanoseconds leaves one as it is.
func (d *Dir) SetTimes(name string, read, written unix.Timespec) error {
	if err := one(name); err != nil {
		return d.fail("set the times of", name, err)
	}
	return d.fail("set the times of", name, unix.UtimesNanoAt(d.fd, name, []unix.Timespec{read, written}, unix.AT_SYMLINK_NOFOLLOW))
}
