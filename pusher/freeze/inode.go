package freeze

import (
	"io/fs"
	"syscall"
)

// inodeOf returns a file's inode number and change time, in nanoseconds since 1970.
func inodeOf(info fs.FileInfo) (inode uint64, changed int64) {
	st := info.Sys().(*syscall.Stat_t) // os fills it so on Linux, always
	return st.Ino, st.Ctim.Nano()
}
