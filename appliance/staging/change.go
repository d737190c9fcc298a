package staging

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"strings"
	"sync"
	"time"

	"farkeep/shared/beneath"
	"farkeep/shared/manifest"

	"github.com/pkg/sftp"
	"golang.org/x/sys/unix"
)

// change does f, which changes names or attributes, unless a commit is under way.
func (t *tree) change(s *Session, f func() error) error {
	t.names.Lock()
	defer t.names.Unlock()
	if err := t.countLocked(s.ctx); err != nil {
		return err
	}
	t.mu.Lock()
	committing := t.committing
	t.mu.Unlock()
	if committing {
		return errCommitting
	}
	if err := f(); err != nil {
		return err
	}
	t.touch(s)
	return nil
}

// touch takes note that a session changes the copy.
func (t *tree) touch(s *Session) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.changed[s] = time.Now()
}

// parent opens the folder in which a path, checked by manifest.CheckPath, lies.
func (t *tree) parent(rel string) (dir *beneath.Dir, name string, closing func(), err error) {
	at, name := split(rel)
	if at == "" {
		return t.files, name, func() {}, nil
	}
	dir, err = t.files.Dir(at)
	if err != nil {
		return nil, "", nil, err
	}
	return dir, name, func() { dir.Close() }, nil
}

func (t *tree) stat(rel string) (unix.Stat_t, error) {
	dir, name, closing, err := t.parent(rel)
	if err != nil {
		return unix.Stat_t{}, err
	}
	defer closing()
	return dir.Stat(name)
}

// own gives dir/name a file of its own, with the first keep bytes, if it shares
// one, and lets it be written if a commit took that away. It returns what is there
// then.
func (t *tree) own(s *Session, dir *beneath.Dir, name string, st unix.Stat_t, keep int64) (unix.Stat_t, error) {
	if !shared(&st) {
		if !readOnly(&st) {
			return st, nil
		}
		if err := dir.Chmod(name, shownMode(&st)); err != nil {
			return st, err
		}
		return dir.Stat(name)
	}
	if err := t.grow(s.ctx, &s.peer, keep); err != nil {
		return st, err
	}
	if err := t.copyFile(s.ctx, dir, dir, name, &st, keep); err != nil {
		t.shrink(keep)
		return st, err
	}
	return dir.Stat(name)
}

func (t *tree) shrink(n int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.bytes = max(t.bytes-n, 0)
}

// writer is a handle that is open for writing, or for both. It writes to a file
// that had no other name when it was opened; the only thing that gives it one is
// a commit, and that waits for every writer to be closed.
type writer struct {
	t      *tree
	s      *Session
	ino    uint64
	node   *node
	floor  int64 // opened for appending: what was there before is not written to
	holder func()

	mu   sync.RWMutex // held shared while bytes are read and written: Close waits for them
	file *os.File     // nil once closed
}

// openWrite opens a file for writing, as flags say, and makes it if they say so.
func (t *tree) openWrite(s *Session, rel string, flags sftp.FileOpenFlags, perm uint32) (w *writer, err error) {
	err = t.change(s, func() error {
		dir, name, closing, err := t.parent(rel)
		if err != nil {
			return err
		}
		defer closing()
		w, err = t.openWriteIn(s, dir, name, flags, perm)
		return err
	})
	return w, err
}

func (t *tree) openWriteIn(s *Session, dir *beneath.Dir, name string, flags sftp.FileOpenFlags, perm uint32) (*writer, error) {
	st, err := dir.Stat(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if !flags.Creat {
			return nil, err
		}
		if err := t.admit(); err != nil {
			return nil, err
		}
		f, _, err := dir.OpenWrite(name, unix.O_CREAT|unix.O_EXCL, 0o600)
		if err != nil {
			return nil, err
		}
		t.add(1)
		if err := f.Chmod(fs.FileMode(perm)); err != nil {
			f.Close()
			return nil, err
		}
		return t.write(s, f, flags)
	case err != nil:
		return nil, err
	case flags.Creat && flags.Excl:
		return nil, fs.ErrExist
	case st.Mode&unix.S_IFMT == unix.S_IFDIR:
		return nil, unix.EISDIR
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return nil, errLinks
	}
	keep := st.Size
	if flags.Trunc {
		keep = 0
	}
	if st, err = t.own(s, dir, name, st, keep); err != nil {
		return nil, err
	}
	if st.Mode&0o200 == 0 {
		return nil, fs.ErrPermission // as on any server; whoever runs this may be root
	}
	f, _, err := dir.OpenWrite(name, 0, 0)
	if err != nil {
		return nil, err
	}
	return t.write(s, f, flags)
}

// write makes a handle of an open file.
func (t *tree) write(s *Session, f *os.File, flags sftp.FileOpenFlags) (*writer, error) {
	var st unix.Stat_t
	err := unix.Fstat(int(f.Fd()), &st)
	if err == nil && st.Nlink != 1 {
		// Nothing that was opened by its name comes here with two names. This is the
		// last door before bytes are written, so it looks again.
		err = deny("the file is part of a generation")
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	t.mu.Lock()
	n := t.nodes[st.Ino]
	if n == nil {
		n = &node{size: st.Size}
		t.nodes[st.Ino] = n
	}
	n.refs++
	t.writers++
	t.mu.Unlock()
	w := &writer{t: t, s: s, file: f, ino: st.Ino, node: n}
	if flags.Trunc {
		if err := w.truncate(0); err != nil {
			return nil, errors.Join(err, w.Close())
		}
	} else if flags.Append {
		w.floor = st.Size
	}
	return w, nil
}

// resize takes note of a size, and asks for the room of what is more.
func (w *writer) resize(size int64) (old int64, err error) {
	w.node.mu.Lock()
	defer w.node.mu.Unlock()
	old = w.node.size
	switch {
	case size > old:
		if err := w.t.grow(w.s.ctx, &w.s.peer, size-old); err != nil {
			return old, err
		}
	case size < old:
		w.t.shrink(old - size)
	}
	w.node.size = size
	return old, nil
}

// truncate sets the length of the file.
func (w *writer) truncate(size int64) error {
	old, err := w.resize(size)
	if err != nil {
		return err
	}
	if err := w.file.Truncate(size); err != nil {
		w.resize(old)
		return err
	}
	return nil
}

// WriteAt implements io.WriterAt. With SFTP's append flag, too, the peer says where
// (draft-ietf-secsh-filexfer-02, section 6.3): clients keep several writes on their
// way, which may be carried out in any order.
func (w *writer) WriteAt(p []byte, offset int64) (int, error) {
	w.mu.RLock()
	defer w.mu.RUnlock()
	if w.file == nil {
		return 0, fs.ErrClosed
	}
	if offset < w.floor {
		return 0, refuse("opened to append, asked to write before the end")
	}
	if err := validSize(uint64(offset) + uint64(len(p))); err != nil {
		return 0, err
	}
	end := offset + int64(len(p))
	w.node.mu.Lock()
	if n := end - w.node.size; n > 0 {
		if err := w.t.grow(w.s.ctx, &w.s.peer, n); err != nil {
			w.node.mu.Unlock()
			w.s.complain(err)
			return 0, answer(err)
		}
		w.node.size = end
	}
	w.node.mu.Unlock()
	n, err := w.file.WriteAt(p, offset)
	if err != nil {
		w.s.note("Write", w.file.Name(), err)
		w.s.complain(answer(err))
		return n, answer(err)
	}
	return n, nil
}

// ReadAt implements io.ReaderAt, for handles that were opened for both.
func (w *writer) ReadAt(p []byte, offset int64) (int, error) {
	w.mu.RLock()
	defer w.mu.RUnlock()
	if w.file == nil {
		return 0, fs.ErrClosed
	}
	return w.file.ReadAt(p, offset)
}

// Close closes the handle. When it returned, nothing is written by it any more.
func (w *writer) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.file == nil {
		return nil
	}
	var st unix.Stat_t
	statErr := unix.Fstat(int(w.file.Fd()), &st)
	err := w.file.Close()
	w.file = nil
	if w.holder != nil {
		w.holder()
	}
	t, n := w.t, w.node
	t.mu.Lock()
	defer t.mu.Unlock()
	t.changed[w.s] = time.Now()
	t.writers--
	if n.refs--; n.refs == 0 {
		delete(t.nodes, w.ino)
		n.mu.Lock()
		switch {
		case n.gone:
			t.bytes = max(t.bytes-n.size, 0)
		case statErr == nil:
			t.bytes = max(t.bytes+st.Size-n.size, 0) // a write may have failed half-way
		}
		n.mu.Unlock()
	}
	t.signal()
	return err
}

// signal wakes whoever waits for writers and sessions to go. t.mu is held.
func (t *tree) signal() {
	close(t.free)
	t.free = make(chan struct{})
}

// setAttributes does what a setstat asks for. What would change nothing breaks no
// link.
func (t *tree) setAttributes(s *Session, rel string, flags sftp.FileAttrFlags, a *sftp.FileStat) error {
	return t.change(s, func() error {
		dir, name, closing, err := t.parent(rel)
		if err != nil {
			return err
		}
		defer closing()
		st, err := dir.Stat(name)
		if err != nil {
			return err
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			return setFolder(dir, name, flags, a)
		case unix.S_IFREG:
			return t.setFile(s, dir, name, st, flags, a)
		}
		return errLinks
	})
}

func times(a *sftp.FileStat) (read, written unix.Timespec) {
	return unix.Timespec{Sec: int64(a.Atime)}, unix.Timespec{Sec: int64(a.Mtime)}
}

func setFolder(dir *beneath.Dir, name string, flags sftp.FileAttrFlags, a *sftp.FileStat) error {
	if flags.Size {
		return unix.EISDIR
	}
	if flags.Permissions {
		if err := dir.Chmod(name, folderMode(a.Mode)); err != nil {
			return err
		}
	}
	if flags.Acmodtime {
		read, written := times(a)
		return dir.SetTimes(name, read, written)
	}
	if flags.UidGid && !flags.Permissions {
		return errOwners
	}
	return nil
}

var errOwners = deny("owners are not kept")

func (t *tree) setFile(s *Session, dir *beneath.Dir, name string, st unix.Stat_t, flags sftp.FileAttrFlags, a *sftp.FileStat) error {
	if flags.Size {
		if err := validSize(a.Size); err != nil {
			return err
		}
	}
	size := flags.Size && int64(a.Size) != st.Size
	mode := flags.Permissions && a.Mode&0o777 != shownMode(&st)
	// SFTP's times are whole seconds.
	written := flags.Acmodtime && int64(a.Mtime) != st.Mtim.Sec
	if !size && !mode && !written {
		if flags.UidGid && !flags.Size && !flags.Permissions && !flags.Acmodtime {
			return errOwners
		}
		return nil
	}
	keep := st.Size
	if size {
		keep = min(keep, int64(a.Size))
	}
	st, err := t.own(s, dir, name, st, keep)
	if err != nil {
		return err
	}
	if shared(&st) {
		return deny("the file is part of a generation") // own said otherwise: look again, do nothing
	}
	if size && st.Size != int64(a.Size) {
		if st.Mode&0o200 == 0 {
			return fs.ErrPermission
		}
		f, _, err := dir.OpenWrite(name, 0, 0)
		if err != nil {
			return err
		}
		w, err := t.write(s, f, sftp.FileOpenFlags{})
		if err != nil {
			return err
		}
		if err := errors.Join(w.truncate(int64(a.Size)), w.Close()); err != nil {
			return err
		}
	}
	if mode {
		if err := dir.Chmod(name, a.Mode&0o777); err != nil {
			return err
		}
	}
	if flags.Acmodtime && (size || written) {
		read, written := times(a)
		return dir.SetTimes(name, read, written)
	}
	return nil
}

func (t *tree) mkdir(s *Session, rel string, perm uint32) error {
	return t.change(s, func() error {
		if err := t.admit(); err != nil {
			return err
		}
		dir, name, closing, err := t.parent(rel)
		if err != nil {
			return err
		}
		defer closing()
		if err := dir.Mkdir(name, folderMode(perm)); err != nil {
			return err
		}
		t.add(1)
		return nil
	})
}

func (t *tree) rmdir(s *Session, rel string) error {
	return t.change(s, func() error {
		dir, name, closing, err := t.parent(rel)
		if err != nil {
			return err
		}
		defer closing()
		if err := dir.RemoveDir(name); err != nil {
			return err
		}
		t.add(-1)
		return nil
	})
}

func (t *tree) remove(s *Session, rel string) error {
	return t.change(s, func() error {
		dir, name, closing, err := t.parent(rel)
		if err != nil {
			return err
		}
		defer closing()
		st, err := dir.Stat(name)
		if err != nil {
			return err
		}
		if err := dir.Remove(name); err != nil {
			return err
		}
		t.drop(&st)
		return nil
	})
}

// rename moves a file or folder; with replace, a file that is in the way goes.
func (t *tree) rename(s *Session, from, to string, replace bool) error {
	return t.change(s, func() error {
		src, oldName, closing, err := t.parent(from)
		if err != nil {
			return err
		}
		defer closing()
		dst, newName, closing, err := t.parent(to)
		if err != nil {
			return err
		}
		defer closing()
		st, err := src.Stat(oldName)
		if err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT == unix.S_IFDIR && (strings.Count(to, "/") > strings.Count(from, "/") || len(to) > len(from)) {
			if err := t.mayMove(s.ctx, src, oldName, to); err != nil {
				return err
			}
		}
		old, err := dst.Stat(newName)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return src.RenameNew(oldName, dst, newName)
		case err != nil:
			return err
		case from == to:
			return nil
		case !replace:
			return fs.ErrExist
		case old.Ino == st.Ino && st.Mode&unix.S_IFMT == unix.S_IFREG:
			// rename(2) does nothing with two names of one file. Here they are two files
			// to the peer.
			if err := src.Remove(oldName); err != nil {
				return err
			}
			t.drop(&st)
			return nil
		}
		if err := src.Rename(oldName, dst, newName); err != nil {
			return err
		}
		t.drop(&old)
		return nil
	})
}

// mayMove checks that what lies in a folder has a place below its new name.
func (t *tree) mayMove(ctx context.Context, src *beneath.Dir, name, to string) error {
	dir, err := src.Dir(name)
	if err != nil {
		return err
	}
	defer dir.Close()
	levels, length, err := deepest(ctx, dir, 0)
	if err != nil {
		return err
	}
	return fitsBelow(to, levels, length)
}

// check is manifest.CheckPath for a path below a repository.
func check(rel string) error { return manifest.CheckPath(rel) }
