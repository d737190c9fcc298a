package generations

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"time"

	"farkeep/shared/beneath"
	"farkeep/shared/manifest"
	"farkeep/shared/tomlfile"

	"golang.org/x/sys/unix"
)

// empty removes going/entry. One at a time does that.
func (s *Store) empty(ctx context.Context, entry string) error {
	select {
	case s.emptying <- struct{}{}:
		defer func() { <-s.emptying }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	// Another process as well: two would count what is freed twice.
	lock, err := s.private.Dir(goingFolder)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := lock.Lock(); err != nil {
		return err
	}
	e := &emptier{s: s, ctx: ctx, since: time.Now()}
	if _, _, ok := goingGeneration(entry); ok {
		if err := e.generation(entry); err != nil {
			return err
		}
	}
	if err := s.going.RemoveSlowly(entry, e.step); err != nil {
		return err
	}
	return s.going.Sync()
}

// emptier removes a folder in going/, with rests.
type emptier struct {
	s     *Store
	ctx   context.Context
	since time.Time // of the last rest
}

// A stretch of work, and the rests after it, in stretches: a push has the right of
// way, and without one the window in which the disk has power is not for ever.
// Removing names is work for the journal, of which a disk does only so much beside
// an upload.
const (
	workStretch = 40 * time.Millisecond
	idleRest    = 1
	pushRest    = 4
	longRest    = 2 * time.Second
)

// step is called before each name that is removed.
func (e *emptier) step() error {
	if e.ctx.Err() != nil {
		return context.Cause(e.ctx)
	}
	took := time.Since(e.since)
	if took < e.s.stretch {
		return nil
	}
	e.s.mu.Lock()
	rest := took * idleRest
	if len(e.s.promised) > 0 {
		rest = took * pushRest
	}
	e.s.mu.Unlock()
	err := e.s.rest(e.ctx, min(rest, longRest))
	e.since = time.Now()
	return err
}

// rest waits, but not longer than ctx lasts.
func rest(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// progress is how far the emptying of a generation has come.
type progress struct {
	Next  int64 `toml:"next"`  // the first entry of the manifest that is not counted yet
	Freed int64 `toml:"freed"` // bytes of the files before it that had no other name
}

// countUnit is for how many files progress is noted, which costs two syncs. It is
// noted before they are removed, and what it covers is removed again after a cut
// without being counted again.
const countUnit = 4096

// generation removes the files of a generation, counts what that frees, and
// settles what it leaves.
func (e *emptier) generation(entry string) error {
	dir, err := e.s.going.Dir(entry)
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) || errors.Is(err, fs.ErrNotExist) {
		return nil // no folder: whatever it is, it is just removed
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	repository, name, _ := goingGeneration(entry)
	g, err := readIn(dir, repository, name)
	if err != nil {
		return nil // settled, or it never counted: just remove it
	}
	var done progress
	if text, err := dir.ReadFile(progressFile, maxTOML); err == nil {
		if tomlfile.Parse(progressFile, text, &done) != nil || done.Next < 0 || done.Freed < 0 {
			done = progress{}
		}
	}
	if err := e.files(dir, &done); err != nil {
		return err
	}
	if err := dir.RemoveSlowly(FilesFolder, e.step); err != nil {
		return err
	}
	if err := e.s.inherit(e.ctx, &g, done.Freed); err != nil {
		return err
	}
	// What says how much it was charged with goes first of the rest: without it
	// nothing is settled again.
	return dir.RemoveAll(TOMLFile)
}

// files removes what the manifest lists. What is not as listed, or was put there by
// somebody, is left for the one who removes the whole folder.
func (e *emptier) files(dir *beneath.Dir, done *progress) error {
	files, err := dir.Dir(FilesFolder)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // removed before the cut
	}
	if err != nil {
		e.s.opt.Log.Warn("an expired generation has no files", "folder", dir.Path(), "err", err)
		return nil
	}
	defer files.Close()
	f, _, err := dir.Open(ManifestFile)
	if err != nil {
		return e.unlisted(dir, err)
	}
	defer f.Close()
	list := manifest.NewReader(f)
	u := &batchOfNames{files: files}
	defer u.close()
	for {
		entry, err := list.Next()
		if err != nil && !errors.Is(err, io.EOF) {
			if err := e.removeBatch(dir, u, done); err != nil {
				return err
			}
			return e.unlisted(dir, err)
		}
		if errors.Is(err, io.EOF) {
			return e.removeBatch(dir, u, done)
		}
		if entry.Kind != manifest.File {
			continue
		}
		if len(u.names) >= e.s.unit || len(u.names) > 0 && u.names[0].index < done.Next && list.Index() >= done.Next {
			// What was counted before a cut is gone before anything else is counted: an
			// inode that has a name on either side is counted with the last.
			if err := e.removeBatch(dir, u, done); err != nil {
				return err
			}
		}
		u.names = append(u.names, listed{entry.Path, list.Index()})
	}
}

// unlisted takes over when the manifest cannot be read: everything below files/ is
// removed without counting. What it leaves to its successor is then the most that
// it can be, so that nobody gets room for free by damage.
func (e *emptier) unlisted(dir *beneath.Dir, cause error) error {
	e.s.opt.Log.Warn("the list of an expired generation is damaged: what it frees is not counted", "folder", dir.Path(), "err", cause)
	return nil
}

// batchOfNames are files of one generation, in the order of its manifest.
type batchOfNames struct {
	files *beneath.Dir
	names []listed

	parent string // the folder that is open
	dir    *beneath.Dir
	opened bool
}

type listed struct {
	path  string
	index int64
}

// in opens the folder of path, nil for none, and returns the last part of path.
func (u *batchOfNames) in(path string) (*beneath.Dir, string) {
	parent, name := split(path)
	if !u.opened || parent != u.parent {
		u.close()
		u.parent, u.opened = parent, true
		u.dir = u.files
		if parent != "" {
			u.dir, _ = u.files.Dir(parent)
		}
	}
	return u.dir, name
}

func (u *batchOfNames) close() {
	if u.dir != u.files {
		u.dir.Close()
	}
	u.dir, u.opened = nil, false
}

// removeBatch counts what a batch frees, notes it, and removes the files.
func (e *emptier) removeBatch(dir *beneath.Dir, u *batchOfNames, done *progress) error {
	if len(u.names) == 0 {
		return nil
	}
	type inode struct {
		names, links uint64
		size         int64
	}
	inodes := map[uint64]inode{}
	for _, l := range u.names {
		if l.index < done.Next {
			continue
		}
		if err := e.step(); err != nil {
			return err
		}
		folder, name := u.in(l.path)
		if folder == nil {
			continue
		}
		if st, err := folder.Stat(name); err == nil && st.Mode&unix.S_IFMT == unix.S_IFREG {
			i := inodes[st.Ino]
			inodes[st.Ino] = inode{i.names + 1, uint64(st.Nlink), st.Size}
		}
	}
	next := u.names[len(u.names)-1].index + 1
	if next > done.Next {
		for _, i := range inodes {
			if i.names == i.links {
				done.Freed += i.size
			}
		}
		done.Next = next
		err := e.s.writeTOML(dir, progressFile, done, 0o600)
		if err != nil && !full(err) {
			return err
		}
		// On a full disk it goes on all the same: this is what makes room.
	}
	for _, l := range u.names {
		if err := e.step(); err != nil {
			return err
		}
		folder, name := u.in(l.path)
		if folder == nil {
			continue
		}
		if err := folder.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.EISDIR) {
			return err
		}
	}
	u.names = u.names[:0]
	return nil
}

func full(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }
