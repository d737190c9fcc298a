package staging

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"time"

	"farkeep/shared/beneath"
	"farkeep/shared/borgconfig"
	"farkeep/shared/generations"
	"farkeep/shared/hint"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"

	"golang.org/x/sys/unix"
)

// ErrWriting is wrapped when a copy cannot be committed or discarded because
// somebody works on it.
var ErrWriting = errors.New("somebody is uploading to it")

// Frozen is a copy that nobody can change, for a commit. Its use:
//
//	Freeze ── Request ── Store.Begin ─┬─ "same" ─────────────────────────────── Release
//	                                  └─ "send-manifest" ── Adopt ── TakeManifest(List)
//	                                        ── Commit ── Committed, or Undo ─── Release
type Frozen struct {
	t     *tree
	peer  Peer
	offer pushwire.Offer
	// hashed are the entries of the list that are not the base's.
	hashed bitmap
}

// bitmap is a set of indexes that grows.
type bitmap []uint64

func (b *bitmap) add(i int64) {
	for int64(len(*b)) <= i/64 {
		*b = append(*b, 0)
	}
	(*b)[i/64] |= 1 << (i % 64)
}

func (b bitmap) has(i int64) bool { return i/64 < int64(len(b)) && b[i/64]&(1<<(i%64)) != 0 }

// Freeze keeps everybody from changing the copy of a repository, and lists it.
// Files that are still the same inode as in the newest generation have the hash
// that its MANIFEST says; all others are read. The caller must Release it.
//
// It is refused, with an error that wraps ErrWriting, while a file is open for
// writing, and while a connection is there that changed something a moment ago.
func (a *Area) Freeze(ctx context.Context, p Peer, repository string) (*Frozen, error) {
	t, err := a.enter(ctx, treeID{repository, p.Key}, false)
	if err != nil {
		if errors.Is(err, errNoCopy) {
			err = hint.Exit(hint.ExitRefused, hint.Because(err, "upload to /%s first, with the same key", repository))
		}
		return nil, err
	}
	if err := t.freeze(ctx, &p); err != nil {
		t.leave()
		return nil, fmt.Errorf("%s: %w", repository, err)
	}
	f := &Frozen{t: t, peer: p}
	if err := t.sync(); err != nil {
		f.Release()
		return nil, err
	}
	if err := f.walk(ctx); err != nil {
		f.Release()
		return nil, fmt.Errorf("list the staging copy of %s: %w", repository, err)
	}
	return f, nil
}

// sync writes everything out before it is hashed, also what an earlier keeper was
// killed over. When that fails, nobody knows
// which of the client's bytes the disk has, and the kernel tells only once: the
// copy is not committed any more. A keeper that is killed before forgets it; what
// is committed then is what the disk has.
func (t *tree) sync() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.failed == nil {
		t.failed = t.home.SyncFS()
	}
	if t.failed == nil {
		return nil
	}
	return hint.Because(fmt.Errorf("%s: the disk failed while the staging copy was written: %w", t.repository, t.failed), "discard the copy (ssh APPLIANCE abort %s) and upload again", t.repository)
}

// freeze waits a little for those who are about to end.
func (t *tree) freeze(ctx context.Context, p *Peer) error {
	quiet, wait := p.CommitQuiet, p.CommitSettle
	if quiet == 0 {
		quiet = Quiet
	}
	if wait == 0 {
		wait = settle
	}
	limit := time.NewTimer(wait)
	defer limit.Stop()
	for late := false; ; {
		t.names.Lock()
		t.mu.Lock()
		why, free := t.why(quiet), t.free
		if why == nil {
			t.committing = true
		}
		t.mu.Unlock()
		t.names.Unlock()
		if why == nil {
			return nil
		}
		if late {
			return hint.Exit(hint.ExitUnreachable, hint.Because(why, "commit when the upload has ended; what was uploaded stays"))
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-free:
		case <-limit.C:
			late = true
		}
	}
}

// why says why the copy cannot be frozen now; nil if it can. t.mu is held.
func (t *tree) why(quiet time.Duration) error {
	if t.committing {
		return fmt.Errorf("%w: another commit of it is under way", ErrWriting)
	}
	if t.writers > 0 {
		return fmt.Errorf("%w: %d files are open for writing", ErrWriting, t.writers)
	}
	for _, at := range t.changed {
		if since := time.Since(at); since < quiet {
			return fmt.Errorf("%w: a connection that is still open changed something %v ago", ErrWriting, since.Round(time.Second))
		}
	}
	return nil
}

// Release lets everybody write again.
func (f *Frozen) Release() {
	f.t.mu.Lock()
	f.t.committing = false
	f.t.signal()
	f.t.mu.Unlock()
	f.t.leave()
}

// Request is the push of the copy.
func (f *Frozen) Request() generations.Request {
	return generations.Request{Repository: f.t.repository, Offer: f.offer, Pusher: f.t.key, Quota: f.quota()}
}

// quota leaves out what the key's other copies hold.
func (f *Frozen) quota() int64 {
	if f.peer.Quota == 0 {
		return 0
	}
	return max(f.peer.Quota-f.t.area.held(f.t.key)+f.t.held(), 1)
}

// List is the manifest of the copy.
func (f *Frozen) List() (io.ReadCloser, error) {
	file, _, err := f.t.home.Open(listFile)
	return file, err
}

// Adopt gives the push what it needs of the copy: the files that were hashed; with
// all, every file, for a base that turned out to be damaged.
func (f *Frozen) Adopt(ctx context.Context, tx *generations.Transaction, all bool) error {
	// A power cut must find the list, which says what modes the files had before
	// they are taken. Their bytes are on the disk since Freeze.
	if err := f.t.home.SyncFS(); err != nil {
		return err
	}
	adopter, err := tx.Adopter()
	if err != nil {
		return err
	}
	defer adopter.Close()
	return f.each(ctx, all, func(dir *beneath.Dir, name string, e *manifest.Entry) error { return adopter.Add(dir, name, e) })
}

// each calls do for the files of the list that were hashed, or for all.
func (f *Frozen) each(ctx context.Context, all bool, do func(dir *beneath.Dir, name string, e *manifest.Entry) error) error {
	file, err := f.List()
	if err != nil {
		return err
	}
	defer file.Close()
	list := manifest.NewReader(file)
	at := folders{root: f.t.files}
	defer at.close()
	for {
		e, err := list.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if e.Kind != manifest.File || !all && !f.hashed.has(list.Index()) {
			continue
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		parent, name := split(e.Path)
		dir, err := at.open(parent)
		if err != nil {
			return err
		}
		if err := do(dir, name, &e); err != nil {
			return err
		}
	}
}

// Undo gives files their modes back after a push that was given up with
// Transaction.Abort. A file that is still shared keeps the mode of history.
func (f *Frozen) Undo(ctx context.Context) error {
	return f.each(ctx, true, func(dir *beneath.Dir, name string, e *manifest.Entry) error {
		st, err := dir.Stat(name)
		if err != nil || shared(&st) || st.Mode&0o777 == e.Mode {
			return err
		}
		return dir.Chmod(name, e.Mode)
	})
}

// Committed takes note that the copy is the generation g now, or was already:
// what has the same bytes and the same time to the second becomes one file with
// the generation's, so that it is neither stored twice nor read again. A file that
// was only touched stays as it is: to its client it is another one.
func (f *Frozen) Committed(ctx context.Context, g generations.Generation) error {
	f.t.area.forgetUsage(f.t.key)
	tree, err := f.t.area.store.Tree(g)
	if err != nil {
		return err
	}
	defer tree.Close()
	own := folders{root: tree.Files}
	defer own.close()
	var alone int64
	err = f.each(ctx, false, func(dir *beneath.Dir, name string, e *manifest.Entry) error {
		mine, err := dir.Stat(name)
		if err != nil {
			return err
		}
		parent, _ := split(e.Path)
		from, err := own.open(parent)
		if err != nil {
			return err
		}
		theirs, err := from.Stat(name)
		if err != nil {
			return err
		}
		if mine.Ino != theirs.Ino && mine.Size == theirs.Size && mine.Mtim.Sec == theirs.Mtim.Sec {
			err := f.t.relink(from, dir, name)
			if !errors.Is(err, unix.EMLINK) {
				return err
			}
		}
		if !shared(&mine) {
			alone += mine.Size
		}
		return nil
	})
	if err != nil {
		return err
	}
	f.t.mu.Lock()
	defer f.t.mu.Unlock()
	f.t.bytes, f.t.allowance = alone, 0
	f.t.known, f.t.entries = true, f.offer.Entries
	return nil
}

// Discard removes the copy of a repository; the next access begins a new one from
// the current generation. It is refused, with an error that wraps ErrWriting, while
// a connection uses the copy.
func (a *Area) Discard(ctx context.Context, p Peer, repository string) error {
	t, err := a.enter(ctx, treeID{repository, p.Key}, false)
	if err != nil {
		if errors.Is(err, errNoCopy) {
			err = hint.Exit(hint.ExitRefused, err)
		}
		return err
	}
	defer t.leave()
	if err := t.freeze(ctx, &p); err != nil {
		return fmt.Errorf("%s: %w", repository, err)
	}
	defer func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.committing = false
		t.signal()
	}()
	t.opening.Lock()
	defer t.opening.Unlock()
	if t.users > 1 {
		err := fmt.Errorf("%s: %w: %d connections have its staging copy open", repository, ErrWriting, t.users-1)
		return hint.Exit(hint.ExitUnreachable, hint.Because(err, "end them first"))
	}
	// The name goes first: half of a copy must not look like one.
	if err := t.home.Rename(filesFolder, t.home, newFolder); err != nil {
		return err
	}
	if err := t.home.Remove(baseFile); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := t.home.Clear(); err != nil {
		return err
	}
	t.mu.Lock()
	t.known, t.entries, t.bytes, t.allowance = false, 0, 0, 0
	t.failed = nil
	t.mu.Unlock()
	top, err := a.open(false)
	if err != nil {
		return err
	}
	defer top.Close()
	repositoryDir, err := top.Dir(repository)
	if err != nil {
		return err
	}
	defer repositoryDir.Close()
	if err := repositoryDir.RemoveAll(p.Key); err != nil {
		return err
	}
	// Another key may have a copy of the same repository.
	if err := top.RemoveDir(repository); err != nil && !errors.Is(err, unix.ENOTEMPTY) {
		return err
	}
	return nil
}

// walk lists the copy.
func (f *Frozen) walk(ctx context.Context) error {
	out, _, err := f.t.home.OpenWrite(newList, unix.O_CREAT|unix.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	w := &walker{f: f, ctx: ctx, out: manifest.NewWriter(out), buf: make([]byte, 256<<10)}
	defer w.close()
	if err := w.openBase(); err != nil {
		return err
	}
	if err := w.openLast(); err != nil {
		return err
	}
	var top *beneath.Dir
	if w.tree != nil {
		top = w.tree.Files
	}
	if err := w.folder(f.t.files, top, ""); err != nil {
		return err
	}
	sum, err := w.out.Close()
	if err != nil {
		return err
	}
	if err := f.t.home.Rename(newList, f.t.home, listFile); err != nil {
		return err
	}
	kind, id := kindOf(f.t.files)
	f.offer = pushwire.Offer{Digest: sum.Digest.String(), Entries: sum.Entries, Bytes: sum.Bytes, Kind: kind, RepositoryID: id}
	return nil
}

// kindOf looks whether the copy is a Borg 1 repository.
func kindOf(files *beneath.Dir) (kind, id string) {
	text, err := files.ReadFile("config", borgconfig.MaxSize)
	if err != nil {
		return pushwire.KindFiles, ""
	}
	config, err := borgconfig.Parse(text)
	if err != nil || config.Version != 1 {
		return pushwire.KindFiles, ""
	}
	if st, err := files.Stat("data"); err != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return pushwire.KindFiles, ""
	}
	return pushwire.KindBorg1, config.ID
}

// walker makes the list.
type walker struct {
	f   *Frozen
	ctx context.Context
	out *manifest.Writer
	buf []byte

	tree    *generations.Tree // the newest generation; nil for none
	base    cursor            // its list
	last    cursor            // the copy's own list of its last commit
	closers []func() error
	index   int64
}

func (w *walker) close() {
	for _, c := range w.closers {
		c()
	}
}

// openBase opens the newest generation whose list can be read.
func (w *walker) openBase() error {
	area := w.f.t.area
	all, err := area.store.List(w.ctx, w.f.t.repository)
	if err != nil {
		return err
	}
	for _, g := range slices.Backward(all) {
		if g.Format == 0 {
			continue
		}
		tree, err := area.store.Tree(g)
		if err != nil {
			area.log.Error("a generation cannot be opened: its files are read again", "repository", g.Repository, "generation", g.Name, "err", err)
			return nil
		}
		w.closers = append(w.closers, tree.Close)
		list, closing, err := tree.List()
		if err != nil {
			area.log.Error("a generation's list cannot be read: its files are read again", "repository", g.Repository, "generation", g.Name, "err", err)
			return nil
		}
		w.closers = append(w.closers, closing)
		w.tree, w.base = tree, cursor{list: list}
		return nil
	}
	return nil
}

func (w *walker) openLast() error {
	file, _, err := w.f.t.home.Open(listFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	w.closers = append(w.closers, file.Close)
	w.last = cursor{list: manifest.NewReader(file)}
	return nil
}

// cursor finds paths in a list, asked for in the list's order. A list that turns
// out to be damaged has nothing from there on.
type cursor struct {
	list *manifest.Reader // nil: at its end
	now  manifest.Entry   // Path "": not read yet
}

func (c *cursor) find(path string) *manifest.Entry {
	for c.list != nil {
		if c.now.Path != "" {
			order := manifest.ComparePaths(c.now.Path, path)
			if order == 0 {
				return &c.now
			}
			if order > 0 {
				return nil
			}
		}
		next, err := c.list.Next()
		if err != nil {
			c.list = nil
			break
		}
		c.now = next
	}
	return nil
}

// folder lists what lies in dir, whose path is prefix with a slash at its end, or
// "". base is its twin in the base, nil for none.
func (w *walker) folder(dir, base *beneath.Dir, prefix string) error {
	var names []string
	err := dir.Each(func(e fs.DirEntry) error {
		names = append(names, e.Name())
		return nil
	})
	if err != nil {
		return err
	}
	slices.Sort(names)
	for _, name := range names {
		if w.ctx.Err() != nil {
			return context.Cause(w.ctx)
		}
		st, err := dir.Stat(name)
		if err != nil {
			return err
		}
		path := prefix + name
		old := w.base.find(path)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			e := manifest.Entry{Path: path, Kind: manifest.Folder, Mode: uint32(st.Mode) & 0o777, MTime: st.Mtim.Nano()}
			if old != nil && old.Kind == manifest.Folder && folderMode(old.Mode) == e.Mode {
				e.Mode = old.Mode
			}
			if err := w.add(e); err != nil {
				return err
			}
			if err := w.into(dir, base, name, path, old); err != nil {
				return err
			}
		case unix.S_IFREG:
			if err := w.file(dir, base, name, path, &st, old); err != nil {
				return err
			}
		default:
			return fmt.Errorf("%q is neither a file nor a folder", path)
		}
	}
	return nil
}

func (w *walker) into(dir, base *beneath.Dir, name, path string, old *manifest.Entry) error {
	sub, err := dir.Dir(name)
	if err != nil {
		return err
	}
	defer sub.Close()
	var subBase *beneath.Dir
	if base != nil && old != nil && old.Kind == manifest.Folder {
		if subBase, err = base.Dir(name); err != nil {
			subBase = nil // damaged there: its files are read here
		} else {
			defer subBase.Close()
		}
	}
	return w.folder(sub, subBase, path+"/")
}

func (w *walker) add(e manifest.Entry) error {
	w.index++
	return w.out.Add(e)
}

func (w *walker) file(dir, base *beneath.Dir, name, path string, st *unix.Stat_t, old *manifest.Entry) error {
	last := w.last.find(path)
	if base != nil && old != nil && old.Kind == manifest.File && old.Size == st.Size && shared(st) {
		if there, err := base.Stat(name); err == nil && there.Ino == st.Ino && there.Dev == st.Dev {
			return w.add(*old)
		}
	}
	e := manifest.Entry{Path: path, Kind: manifest.File, Mode: shownMode(st), MTime: st.Mtim.Nano(), Size: st.Size}
	if shared(st) && last != nil && last.Kind == manifest.File && last.Size == st.Size {
		// A commit that was cut gave it the mode of history. What the client had set
		// is in the list of that commit.
		e.Mode = last.Mode
	}
	sum, err := w.hash(dir, name, st)
	if err != nil {
		return err
	}
	if base != nil && old != nil && sum != old.Sum && leftBehind(st, old) {
		// History's file rotted and was healed, by a new inode; this name kept the old
		// one. What the client put there is what was committed.
		w.f.t.area.log.Error("a file of a staging copy is rotten and is linked anew", "repository", w.f.t.repository, "key", w.f.t.key, "file", path)
		if err := w.f.t.relink(base, dir, name); err != nil {
			return err
		}
		return w.add(*old)
	}
	e.Sum = sum
	w.f.hashed.add(w.index)
	return w.add(e)
}

// leftBehind says whether a file was a generation's once: it has the mode of a
// committed file, and size and time, to the nanosecond, of the one that history has
// under its path. With other bytes than that, it is nothing that a client wrote.
func leftBehind(st *unix.Stat_t, old *manifest.Entry) bool {
	return old.Kind == manifest.File && st.Size == old.Size && st.Mtim.Nano() == old.MTime && uint32(st.Mode)&0o777 == 0o444|old.Mode&0o111
}

// relink gives the name in the copy the file of that name in from.
func (t *tree) relink(from, dir *beneath.Dir, name string) error {
	work, _, err := t.home.MakeDir(workFolder, 0o700)
	if err != nil {
		return err
	}
	defer work.Close()
	const temp = "same"
	if err := work.RemoveAll(temp); err != nil {
		return err
	}
	if err := work.Link(from, name, temp); err != nil {
		return err
	}
	return work.Rename(temp, dir, name)
}

func (w *walker) hash(dir *beneath.Dir, name string, st *unix.Stat_t) (sum manifest.Sum, err error) {
	f, before, err := w.openToRead(dir, name, st)
	if err != nil {
		return sum, err
	}
	defer f.Close()
	// What the disk has counts, not what memory has of it: Freeze has synced it.
	unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
	h := manifest.NewHash()
	var read int64
	for {
		if w.ctx.Err() != nil {
			return sum, context.Cause(w.ctx)
		}
		n, err := f.Read(w.buf)
		h.Write(w.buf[:n])
		read += int64(n)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return sum, err
		}
	}
	if read != st.Size || before.Ino != st.Ino {
		return sum, fmt.Errorf("%s changes while it is read, which nothing here does", f.Name())
	}
	return manifest.SumOf(h), nil
}

// openToRead opens a file even if its client made it unreadable.
func (w *walker) openToRead(dir *beneath.Dir, name string, st *unix.Stat_t) (f *os.File, before unix.Stat_t, err error) {
	if st.Mode&0o400 != 0 || shared(st) {
		return dir.Open(name)
	}
	mode := uint32(st.Mode) & 0o777
	if err := dir.Chmod(name, mode|0o400); err != nil {
		return nil, before, err
	}
	f, before, err = dir.Open(name)
	return f, before, errors.Join(err, dir.Chmod(name, mode))
}
