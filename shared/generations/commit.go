package generations

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"farkeep/shared/beneath"
	"farkeep/shared/hint"
	"farkeep/shared/manifest"

	"golang.org/x/sys/unix"
)

// The modes that files get on the disk. Files of several generations are one
// inode, so nobody may write them, and whether they can be executed is all that is
// kept of the source's mode: no set-user-id bit, nothing that only some may read
// (the disk is encrypted, and its top folder decides who comes in). The mode at
// the source is in MANIFEST, for whoever restores.
const folderPerm = 0o755

func filePerm(mode uint32) uint32 { return 0o444 | mode&0o111 }

// Commit makes the generation: everything is linked or moved into a staging
// folder, the whole is made durable, and one rename puts it among the
// generations. It returns the generation's name. An error leaves the upload as it
// was; a wrong or missing file of the newest generation, met while it was linked,
// wraps ErrDamaged, and the next offer asks for that file anew.
func (t *Transaction) Commit(ctx context.Context) (string, error) {
	g, err := t.commit(ctx)
	if err != nil {
		if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
			err = hint.Because(err, "the disk filled up during the commit; every generation is intact: make room, then push again")
		}
		return "", fmt.Errorf("commit %s: %w", t.req.Repository, err)
	}
	return g.Name, nil
}

func (t *Transaction) commit(ctx context.Context) (*Generation, error) {
	if t.state != planned {
		return nil, fmt.Errorf("%w: offer it again and upload what is asked for", ErrIncomplete)
	}
	if n := t.missing.Len(); n > 0 {
		return nil, fmt.Errorf("%w: %d files are missing", ErrIncomplete, n)
	}
	t.state = used
	if t.healing != nil {
		return t.commitHeal(ctx)
	}
	home, err := t.store.makeDir(t.store.generations, t.req.Repository, folderPerm)
	if err != nil {
		return nil, err
	}
	defer home.Close()
	if err := t.dir.RemoveAll(stagingFolder); err != nil {
		return nil, err
	}
	staging, err := t.store.makeDir(t.dir, stagingFolder, folderPerm)
	if err != nil {
		return nil, err
	}
	defer staging.Close()

	a := &assembly{t: t, ctx: ctx, staging: staging, distrust: map[manifest.Sum]bool{}}
	err = a.run()
	a.close()
	if len(a.distrust) > 0 {
		err = errors.Join(t.distrust(a.distrust), hint.Because(err, "push again: what is damaged is sent anew, and earlier generations should be verified"))
	}
	if err != nil {
		return nil, err
	}
	verdict, err := t.judge(ctx, staging)
	if err != nil {
		return nil, err
	}
	sequence, err := t.nextSequence(ctx, home)
	if err != nil {
		return nil, err
	}
	g := t.describe(sequence, a, verdict)
	if err := t.store.writeTOML(staging, TOMLFile, g, 0o444); err != nil {
		return nil, err
	}
	// Data, links, folders: everything below staging, in one go.
	if err := t.dir.SyncFS(); err != nil {
		return nil, err
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if err := t.dir.RenameNew(stagingFolder, home, g.Name); err != nil {
		return nil, err
	}
	t.state = committed
	if err := errors.Join(home.Sync(), t.store.generations.Sync()); err != nil {
		return nil, err
	}
	t.store.remember(*g)
	if err := t.healFrom(ctx); err != nil {
		// The new generation has the bytes: they heal the others another time.
		t.store.opt.Log.Error("rotten files of earlier generations are not healed yet", "repository", t.req.Repository, "err", err)
	}
	// Best effort: what stays is removed by the next push.
	if err := t.discard(); err != nil {
		t.store.opt.Log.Warn("incoming folder cannot be emptied", "repository", t.req.Repository, "err", err)
	}
	return g, nil
}

func (t *Transaction) describe(sequence int64, a *assembly, v Verdict) *Generation {
	h := t.req.Offer
	now := t.store.opt.Now().UTC().Truncate(1e9)
	return &Generation{
		Name: Name(sequence, now), Format: 1, Repository: t.req.Repository, Sequence: sequence,
		Committed: now, ClockSet: t.store.opt.ClockSet(), Pusher: t.req.Pusher,
		RepositoryID: h.RepositoryID, Kind: h.Kind, Digest: t.digest,
		Entries: h.Entries, Files: a.files, Bytes: h.Bytes, NewFiles: a.newFiles, NewBytes: a.newBytes, Overhead: t.overhead,
		Base: t.base.Name, Push: t.id, Suspect: v.Suspect, Reasons: v.Reasons,
	}
}

// nextSequence takes a number that was never used, also not by a generation that
// is gone, and makes sure that it never is again.
func (t *Transaction) nextSequence(ctx context.Context, home *beneath.Dir) (int64, error) {
	last, err := t.store.lastSequence(ctx, home, t.req.Repository)
	if err != nil {
		return 0, err
	}
	return last + 1, t.store.writeSequence(home, last+1)
}

// Committed returns the generation that the push of that id made, however long
// ago, so that a commit whose answer was lost can be repeated.
func (s *Store) Committed(ctx context.Context, id string) (Generation, bool) {
	repository, err := PushRepository(id)
	if err != nil {
		return Generation{}, false
	}
	list, err := s.List(ctx, repository)
	if err != nil {
		return Generation{}, false
	}
	for _, g := range list {
		if g.Push == id {
			return g, true
		}
	}
	return Generation{}, false
}

// assembly puts a generation together in the staging folder.
type assembly struct {
	t       *Transaction
	ctx     context.Context
	staging *beneath.Dir
	objects *beneath.Dir
	copies  *beneath.Dir // building/, where nothing is built any more
	sums    *bufio.Writer
	line    []byte

	// The folders from files/ to the current one, in the staging folder and, as
	// far as they are there, in the base.
	stack []level

	files, newFiles, newBytes int64
	distrust                  map[manifest.Sum]bool
	taken                     *objectList     // marks the objects that the generation has, see firstUse
	spilled                   map[string]bool // copies that spill made
}

type level struct {
	path     string // "" for files/ itself
	dir, old *beneath.Dir
	noOld    bool // the base has no such folder
}

func (a *assembly) close() {
	for _, l := range a.stack {
		l.dir.Close()
		l.old.Close()
	}
	a.objects.Close()
	a.copies.Close()
}

func (a *assembly) run() (err error) {
	if a.objects, err = a.t.dir.Dir(objectsFolder); err != nil {
		return err
	}
	if a.copies, err = a.t.dir.Dir(buildingFolder); err != nil {
		return err
	}
	files, err := a.t.store.makeDir(a.staging, FilesFolder, folderPerm)
	if err != nil {
		return err
	}
	a.stack = append(a.stack, level{dir: files, noOld: true})
	var old *manifest.Reader
	if a.t.base.Name != "" {
		base, err := a.t.store.generations.Dir(a.t.req.Repository + "/" + a.t.base.Name)
		if err != nil {
			return err
		}
		defer base.Close()
		if a.stack[0].old, err = base.Dir(FilesFolder); err != nil {
			return err
		}
		a.stack[0].noOld = false
		r, closer, err := a.t.openManifest(base)
		if err != nil {
			return err
		}
		defer closer.Close()
		old = r
	}
	new, closer, err := a.t.openManifest(a.t.dir)
	if err != nil {
		return err
	}
	defer closer.Close()
	sums, err := a.t.store.create(a.staging, SumsFile, 0o444)
	if err != nil {
		return err
	}
	defer sums.Close()
	a.sums = bufio.NewWriterSize(sums, 256<<10)
	if err := manifest.Diff(old, new, a.step); err != nil {
		return err
	}
	if len(a.distrust) > 0 {
		return fmt.Errorf("%w: %d files of generation %s are missing or wrong", ErrDamaged, len(a.distrust), a.t.base.Name)
	}
	if err := a.t.matches(new.Summary()); err != nil {
		return err
	}
	if err := a.sums.Flush(); err != nil {
		return err
	}
	// The list itself: incoming/'s copy is never written to again, only replaced.
	return a.staging.Link(a.t.dir, ManifestFile, ManifestFile)
}

func (a *assembly) step(c manifest.Change) error {
	if c.Relation == manifest.Gone {
		return nil
	}
	if c.Index%1024 == 0 && a.ctx.Err() != nil {
		return a.ctx.Err()
	}
	e := &c.New
	name, err := a.enter(e.Path)
	if err != nil {
		return err
	}
	top := &a.stack[len(a.stack)-1]
	if e.Kind == manifest.Folder {
		dir, err := a.t.store.makeDir(top.dir, name, folderPerm)
		if err != nil {
			return err
		}
		a.stack = append(a.stack, level{path: e.Path, dir: dir, noOld: top.noOld || c.Relation != manifest.Unchanged})
		return nil
	}
	a.files++
	a.line = appendSum(a.line[:0], e)
	if _, err := a.sums.Write(a.line); err != nil {
		return err
	}
	if c.Relation == manifest.Unchanged && !a.t.distrusted[e.Sum] {
		return a.share(top, name, e)
	}
	return a.take(top, name, e)
}

// enter goes to the folder that holds path, which is open because a manifest
// lists folders before their content, and returns the last part of path.
func (a *assembly) enter(path string) (name string, err error) {
	parent, name := split(path)
	for {
		top := &a.stack[len(a.stack)-1]
		if top.path == parent {
			return name, nil
		}
		if len(a.stack) == 1 {
			return "", fmt.Errorf("%w: %q before its folder", ErrOffer, path)
		}
		top.dir.Close()
		top.old.Close()
		a.stack = a.stack[:len(a.stack)-1]
	}
}

// oldFolder opens the base's twin of the current folder, when it is first needed.
func (a *assembly) oldFolder() *beneath.Dir {
	top := &a.stack[len(a.stack)-1]
	if top.old != nil || top.noOld {
		return top.old
	}
	// The folders above may not have been needed: ask by the whole path.
	old, err := a.stack[0].old.Dir(top.path)
	if err != nil {
		top.noOld = true
		return nil
	}
	top.old = old
	return old
}

// share gives the new generation an unchanged file of the base.
func (a *assembly) share(top *level, name string, e *manifest.Entry) error {
	old := a.oldFolder()
	if old == nil {
		return a.doubt(e, "its folder cannot be opened")
	}
	st, err := old.Stat(name)
	if err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size != e.Size {
		return a.doubt(e, "it is missing, or not a file of the right size")
	}
	perm := filePerm(e.Mode)
	if st.Mode&0o7777 != perm {
		return a.spill(top, name, old, name, perm, e)
	}
	err = unix.EMLINK
	if st.Nlink < maxLinks {
		err = top.dir.Link(old, name, name)
	}
	if errors.Is(err, unix.EMLINK) {
		// No plan has asked how many names each inode has.
		if err := a.t.more(a.ctx, e.Size, a.spilled[spillName(e, perm)]); err != nil {
			return err
		}
		return a.spill(top, name, old, name, perm, e)
	}
	if errors.Is(err, unix.EPERM) {
		err = hint.Because(err, "the disk's files belong to another user, and this system protects hard links (fs.protected_hardlinks): as root, give the folder generations to the user that owns the disk's top folder, with chown -R")
	}
	return err
}

// doubt notes that the base does not have e as it should.
func (a *assembly) doubt(e *manifest.Entry, why string) error {
	a.t.store.opt.Log.Error("a file of a generation is damaged", "repository", a.t.req.Repository, "generation", a.t.base.Name, "file", e.Path, "why", why)
	a.distrust[e.Sum] = true
	if len(a.distrust) >= maxDistrust {
		return fmt.Errorf("%w: %d files of generation %s and maybe more are missing or wrong", ErrDamaged, len(a.distrust), a.t.base.Name)
	}
	return nil
}

// take gives the new generation an uploaded file.
func (a *assembly) take(top *level, name string, e *manifest.Entry) error {
	object := e.Sum.String()
	f, st, err := a.objects.Open(object)
	if err != nil {
		return err
	}
	defer f.Close()
	if st.Size != e.Size {
		return fmt.Errorf("%w: the uploaded %q has %d bytes, not %d", ErrDamaged, e.Path, st.Size, e.Size)
	}
	perm := filePerm(e.Mode)
	a.newFiles++
	first, err := a.firstUse(e.Sum)
	if err != nil {
		return err
	}
	// One link is the object, one may be a staging copy; more are generations, and
	// what they have is not paid for again.
	if st.Nlink == 1 || first && st.Nlink == 2 {
		a.newBytes += e.Size
	}
	// What has a second name is not touched: the name may be a generation's, if the
	// object is left from an adoption that was cut. Adopter has set the mode already.
	if st.Nlink == 1 {
		if err := f.Chmod(fs.FileMode(perm)); err != nil {
			return err
		}
		if err := setTime(f, e); err != nil {
			return err
		}
		return top.dir.Link(a.objects, object, name)
	}
	// The same content under a second name of this generation, or known from another.
	if st.Mode&0o7777 == perm && st.Nlink < maxLinks {
		err := top.dir.Link(a.objects, object, name)
		if !errors.Is(err, unix.EMLINK) {
			return err
		}
	}
	return a.spill(top, name, a.objects, object, perm, e)
}

func setTime(f *os.File, e *manifest.Entry) error {
	ts := unix.NsecToTimespec(e.MTime)
	if err := unix.UtimesNanoAt(int(f.Fd()), "", []unix.Timespec{ts, ts}, unix.AT_EMPTY_PATH); err != nil {
		return fmt.Errorf("set the time of %s: %w", f.Name(), err)
	}
	return nil
}

// spillName is the name of a copy that spill made, which the next plan removes.
func spillName(e *manifest.Entry, perm uint32) string { return fmt.Sprintf("%v.%o", e.Sum, perm) }

// spill gives the new generation a file by copying from/old, where a link cannot
// be: too many links already, or another mode. Further files that need the same
// copy share it. It hashes what it copies.
func (a *assembly) spill(top *level, name string, from *beneath.Dir, old string, perm uint32, e *manifest.Entry) error {
	copied := spillName(e, perm)
	if a.spilled[copied] {
		err := top.dir.Link(a.copies, copied, name)
		if !errors.Is(err, unix.EMLINK) {
			return err
		}
	}
	if a.spilled == nil {
		a.spilled = map[string]bool{}
	}
	src, _, err := from.Open(old)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := a.t.store.create(a.copies, copied, perm)
	if err != nil {
		return err
	}
	defer dst.Close()
	sum, err := copyAndHash(a.ctx, dst, src)
	if err != nil {
		return fmt.Errorf("copy %s: %w", src.Name(), err)
	}
	if sum != e.Sum {
		return a.doubt(e, "its content does not have its hash")
	}
	a.newBytes += e.Size
	a.spilled[copied] = true
	if err := setTime(dst, e); err != nil {
		return err
	}
	return top.dir.Link(a.copies, copied, name)
}
