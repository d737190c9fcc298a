// Package beneath works with files below a folder, by names that others chose,
// and never leaves it: no symbolic link is followed, no "..", no mount point
// crossed (openat2(2): RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, RESOLVE_NO_XDEV).
//
// os.Root keeps names inside too, but follows the links that it finds there.
// Here a link is an error wherever it stands: whoever had the disk in hand could
// have put it there to swap one file for another. The price is Linux 5.6.
//
// A [Dir] is an open folder. Its methods take one name in that folder, without
// slashes, but for those whose comment says "path". It is safe for concurrent use
// except for Close.
package beneath

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

const resolve = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV

// Dir is an open folder.
type Dir struct {
	fd   int
	name string // for errors
}

// Open opens the folder at path, whose name the caller trusts.
func Open(path string) (*Dir, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	return &Dir{fd: fd, name: path}, nil
}

// Close closes the folder.
func (d *Dir) Close() error {
	if d == nil || d.fd < 0 {
		return nil
	}
	fd := d.fd
	d.fd = -1
	return unix.Close(fd)
}

// Path is the folder's name as it was opened, for messages.
func (d *Dir) Path() string { return d.name }

func (d *Dir) fail(op, name string, err error) error {
	if err == nil {
		return nil
	}
	path := d.name
	if name != "" {
		path += "/" + name
	}
	return &fs.PathError{Op: op, Path: path, Err: err}
}

// one refuses everything but a single name.
func one(name string) error {
	if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") {
		return fmt.Errorf("%w: not the name of one file", fs.ErrInvalid)
	}
	return nil
}

func (d *Dir) openat2(path string, flags int, perm uint32) (int, error) {
	how := unix.OpenHow{Flags: uint64(flags | unix.O_CLOEXEC), Resolve: resolve}
	if flags&unix.O_CREAT != 0 {
		how.Mode = uint64(perm)
	}
	for try := 0; ; try++ {
		fd, err := unix.Openat2(d.fd, path, &how)
		// EAGAIN: a rename somewhere made the kernel unsure; it says to try again.
		if err == unix.EINTR || err == unix.EAGAIN && try < 100 {
			continue
		}
		return fd, err
	}
}

// Dir opens a folder by its path.
func (d *Dir) Dir(path string) (*Dir, error) {
	fd, err := d.openat2(path, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, d.fail("open", path, err)
	}
	return &Dir{fd: fd, name: d.name + "/" + path}, nil
}

// MakeDir makes a folder, if it is not there, and opens it. perm is exact.
func (d *Dir) MakeDir(name string, perm uint32) (sub *Dir, made bool, err error) {
	err = d.Mkdir(name, perm)
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, false, err
	}
	made = err == nil
	sub, err = d.Dir(name)
	return sub, made, err
}

// Mkdir makes a folder that is not there yet. perm is exact, whatever the umask.
func (d *Dir) Mkdir(name string, perm uint32) error {
	if err := one(name); err != nil {
		return d.fail("mkdir", name, err)
	}
	if err := unix.Mkdirat(d.fd, name, perm); err != nil {
		return d.fail("mkdir", name, err)
	}
	return d.Chmod(name, perm)
}

// Open opens a regular file for reading, by its path. Whatever else is there is
// an error, and is not waited for.
func (d *Dir) Open(path string) (*os.File, unix.Stat_t, error) {
	return d.regular(path, unix.O_RDONLY, 0)
}

// OpenWrite opens a regular file for reading and writing; flags are added to
// O_RDWR (O_CREAT, O_EXCL, O_TRUNC, O_APPEND).
func (d *Dir) OpenWrite(name string, flags int, perm uint32) (*os.File, unix.Stat_t, error) {
	if err := one(name); err != nil {
		return nil, unix.Stat_t{}, d.fail("open", name, err)
	}
	return d.regular(name, unix.O_RDWR|flags, perm)
}

func (d *Dir) regular(path string, flags int, perm uint32) (*os.File, unix.Stat_t, error) {
	var st unix.Stat_t
	fd, err := d.openat2(path, flags|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY, perm)
	if err != nil {
		return nil, st, d.fail("open", path, err)
	}
	if err = unix.Fstat(fd, &st); err == nil && st.Mode&unix.S_IFMT != unix.S_IFREG {
		err = errNotRegular
	}
	if err != nil {
		unix.Close(fd)
		return nil, st, d.fail("open", path, err)
	}
	return os.NewFile(uintptr(fd), d.name+"/"+path), st, nil
}

var errNotRegular = errors.New("not a regular file")

// ReadFile reads a regular file of at most limit bytes.
func (d *Dir) ReadFile(name string, limit int64) ([]byte, error) {
	f, _, err := d.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = d.fail("read", name, fmt.Errorf("more than %d bytes", limit))
	}
	return data, err
}

// WriteFile replaces name with data, mode perm, so that a power cut leaves the
// old or the new content (see package atomicfile). adjust, which may be nil, is
// called for the new file before it gets its name.
func (d *Dir) WriteFile(name string, data []byte, perm uint32, adjust func(*os.File) error) error {
	if err := one(name); err != nil {
		return d.fail("write", name, err)
	}
	temp := "." + name + ".new"
	// Left over from an attempt that was cut; one writer at a time is the
	// caller's business.
	if err := d.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, _, err := d.OpenWrite(temp, unix.O_CREAT|unix.O_EXCL, perm)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(data); err != nil {
		return err
	}
	if err := f.Chmod(fs.FileMode(perm)); err != nil {
		return err
	}
	if adjust != nil {
		if err := adjust(f); err != nil {
			return err
		}
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := d.Rename(temp, d, name); err != nil {
		return err
	}
	return d.Sync()
}

// Stat looks at a name without following a link.
func (d *Dir) Stat(name string) (st unix.Stat_t, err error) {
	if err := one(name); err != nil {
		return st, d.fail("stat", name, err)
	}
	err = unix.Fstatat(d.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	return st, d.fail("stat", name, err)
}

// StatSelf looks at the folder itself.
func (d *Dir) StatSelf() (st unix.Stat_t, err error) {
	err = unix.Fstat(d.fd, &st)
	return st, d.fail("stat", "", err)
}

// Link gives the file from/old the further name d/name. A symbolic link is
// linked, not followed; callers Stat first.
func (d *Dir) Link(from *Dir, old, name string) error {
	if err := errors.Join(one(old), one(name)); err != nil {
		return d.fail("link", name, err)
	}
	return d.fail("link", name, unix.Linkat(from.fd, old, d.fd, name, 0))
}

// Rename moves d/name to to/new and replaces what is there.
func (d *Dir) Rename(name string, to *Dir, new string) error {
	if err := errors.Join(one(name), one(new)); err != nil {
		return d.fail("rename", name, err)
	}
	return to.fail("rename", new, unix.Renameat(d.fd, name, to.fd, new))
}

// RenameNew moves d/name to to/new, which must not exist (fs.ErrExist).
func (d *Dir) RenameNew(name string, to *Dir, new string) error {
	if err := errors.Join(one(name), one(new)); err != nil {
		return d.fail("rename", name, err)
	}
	err := unix.Renameat2(d.fd, name, to.fd, new, unix.RENAME_NOREPLACE)
	if err == unix.EINVAL || err == unix.ENOSYS {
		// Some network file systems know only rename(2), which never replaces a
		// folder that holds something; callers hold a lock besides.
		var st unix.Stat_t
		if unix.Fstatat(to.fd, new, &st, unix.AT_SYMLINK_NOFOLLOW) == nil {
			return to.fail("rename", new, unix.EEXIST)
		}
		err = unix.Renameat(d.fd, name, to.fd, new)
	}
	return to.fail("rename", new, err)
}

// Chmod sets the permission bits of a file or folder. A link is an error.
func (d *Dir) Chmod(name string, perm uint32) error {
	fd, err := d.openat2(name, unix.O_PATH|unix.O_NOFOLLOW, 0)
	if err != nil {
		return d.fail("chmod", name, err)
	}
	defer unix.Close(fd)
	// fchmod(2) refuses O_PATH descriptors, the path through /proc does not; it
	// leads to the very inode that was opened.
	return d.fail("chmod", name, unix.Chmod(fmt.Sprintf("/proc/self/fd/%d", fd), perm))
}

// Chown gives a file, folder or link to somebody, without following it.
func (d *Dir) Chown(name string, uid, gid int) error {
	if err := one(name); err != nil {
		return d.fail("chown", name, err)
	}
	return d.fail("chown", name, unix.Fchownat(d.fd, name, uid, gid, unix.AT_SYMLINK_NOFOLLOW))
}

// Remove removes a file or link.
func (d *Dir) Remove(name string) error {
	if err := one(name); err != nil {
		return d.fail("remove", name, err)
	}
	return d.fail("remove", name, unix.Unlinkat(d.fd, name, 0))
}

// RemoveDir removes an empty folder.
func (d *Dir) RemoveDir(name string) error {
	if err := one(name); err != nil {
		return d.fail("remove", name, err)
	}
	return d.fail("remove", name, unix.Unlinkat(d.fd, name, unix.AT_REMOVEDIR))
}

// RemoveAll removes a name and, if it is a folder, what is below. Nothing there
// is no error.
func (d *Dir) RemoveAll(name string) error { return d.removeAll(name, 0, nil) }

// RemoveSlowly is RemoveAll for what is large: before each file and folder it
// calls step, whose error ends it and is returned as it is.
func (d *Dir) RemoveSlowly(name string, step func() error) error { return d.removeAll(name, 0, step) }

// maxDepth bounds the descent of RemoveAll and with it the open folders: no tree
// that Farkeep makes is deeper.
const maxDepth = 200

func (d *Dir) removeAll(name string, depth int, step func() error) error {
	if step != nil {
		if err := step(); err != nil {
			return err
		}
	}
	err := d.Remove(name)
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if !errors.Is(err, unix.EISDIR) {
		return err
	}
	if depth > maxDepth {
		return d.fail("remove", name, fmt.Errorf("folders more than %d deep", maxDepth))
	}
	sub, err := d.Dir(name)
	if err != nil {
		return err
	}
	defer sub.Close()
	if err := sub.clear(depth+1, step); err != nil {
		return err
	}
	return d.RemoveDir(name)
}

// Clear removes everything in the folder.
func (d *Dir) Clear() error { return d.clear(0, nil) }

func (d *Dir) clear(depth int, step func() error) error {
	return d.Each(func(e fs.DirEntry) error { return d.removeAll(e.Name(), depth, step) })
}

// Each calls f for each name in the folder, in no order, with bounded memory. f may
// remove the entry that it is called for.
func (d *Dir) Each(f func(fs.DirEntry) error) error {
	dir, err := d.file()
	if err != nil {
		return err
	}
	defer dir.Close()
	for {
		entries, err := dir.ReadDir(1024)
		for _, e := range entries {
			if err := f(e); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// file opens the folder once more, as os.File, with a position of its own.
func (d *Dir) file() (*os.File, error) {
	fd, err := d.openat2(".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, d.fail("open", "", err)
	}
	return os.NewFile(uintptr(fd), d.name), nil
}

// Sync makes the folder's entries durable.
func (d *Dir) Sync() error { return d.fail("sync", "", unix.Fsync(d.fd)) }

// SyncFS makes everything on the folder's file system durable, and reports
// writes that failed since the folder was opened (Linux 5.8, syncfs(2)).
func (d *Dir) SyncFS() error { return d.fail("sync file system", "", unix.Syncfs(d.fd)) }

// ErrLocked: somebody else holds the lock.
var ErrLocked = errors.New("locked by another process")

// Lock takes an exclusive lock on the folder, or returns an error that wraps
// ErrLocked. It ends with the Dir, at the latest with the process.
func (d *Dir) Lock() error {
	err := unix.Flock(d.fd, unix.LOCK_EX|unix.LOCK_NB)
	if err == unix.EWOULDBLOCK {
		err = ErrLocked
	}
	return d.fail("lock", "", err)
}

// Space is what the file system has left.
type Space struct {
	Total, Free int64 // bytes; Free as a process without privileges sees it
	Block       int64 // bytes of a block
	Inodes      int64 // free; -1 where the file system does not count them
}

// Space asks the file system.
func (d *Dir) Space() (Space, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(d.fd, &st); err != nil {
		return Space{}, d.fail("statfs", "", err)
	}
	block := int64(st.Frsize)
	if block == 0 {
		block = int64(st.Bsize)
	}
	s := Space{Total: int64(st.Blocks) * block, Free: int64(st.Bavail) * block, Block: block, Inodes: int64(st.Ffree)}
	if st.Files == 0 {
		s.Inodes = -1
	}
	return s, nil
}
