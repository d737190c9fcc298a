package part

import (
	"os"

	"golang.org/x/sys/unix"
)

// inherited returns descriptor fd if it is a pipe that somebody gave to this
// process, and nil otherwise. The kind matters: without an inherited
// descriptor there the Go runtime has put one of its own in that place.
func inherited(fd int, name string) *os.File {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFIFO {
		return nil
	}
	unix.CloseOnExec(fd)
	return os.NewFile(uintptr(fd), name)
}
