package generations

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"farkeep/shared/beneath"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"

	"golang.org/x/sys/unix"
)

// Healing gives a rotten file its bytes back, in every generation that shares
// it. They come from another copy on this disk, or from home: an offer of just
// what the newest generation is, is answered "send" for the rotten files, and its
// commit makes no generation but heals.
//
//	found (NoteRot) ──▶ open ──▶ healed
//	                     │ ▲
//	                     ▼ │ the next offer of another content
//	                    home lacks it
//
// What a file must be is what the generation's own manifest says, whose digest
// must be the one in generation.toml. No bytes with another hash ever get the
// name, wherever they come from, and a file that reads well is left alone: who
// pushes can bring back what was committed and nothing else.
//
// A cut at any instant leaves each name with the old inode or the new one, and
// the file open in the record until all were seen to be good.

// healLink is the name in incoming/<repository>/ under which the new inode waits
// for the rename: nothing that a cut leaves behind lies in a generation.
const healLink = ".heal"

// maxPlaces bounds the names that one walk over the manifests remembers.
const maxPlaces = 100_000

// ErrRotten: the bytes that were read are not those that were committed.
var ErrRotten = errors.New("not what was committed")

// place is one name of a file that should have some hash.
type place struct {
	generation string
	entry      manifest.Entry
	st         unix.Stat_t // Ino 0: nothing is there
}

// OpenGeneration opens a generation's folder for reading.
func (s *Store) OpenGeneration(repository, name string) (*beneath.Dir, error) {
	if err := pushwire.CheckRepository(repository); err != nil {
		return nil, err
	}
	if _, _, err := ParseName(name); err != nil {
		return nil, err
	}
	return s.generations.Dir(repository + "/" + name)
}

// ReadSum reads size bytes from r, through buf, and compares them with sum. An
// error that wraps ErrRotten says what they are instead.
func ReadSum(ctx context.Context, r io.Reader, size int64, sum manifest.Sum, buf []byte) error {
	h := manifest.NewHash()
	n, err := io.CopyBuffer(h, &contextReader{ctx, r}, buf)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		return fmt.Errorf("cannot be read: %w", err)
	case n != size:
		return fmt.Errorf("%w: %d bytes instead of %d", ErrRotten, n, size)
	}
	if got := manifest.SumOf(h); got != sum {
		return fmt.Errorf("%w: its hash is %v instead of %v", ErrRotten, got, sum)
	}
	return nil
}

// Heal gives the rotten files of a repository their bytes back as far as they
// are on the disk, and returns how many files were healed. It needs the
// repository's lock: while a push is under way it returns ErrBusy, and the push's
// commit heals.
func (s *Store) Heal(ctx context.Context, repository string) (int, error) {
	open, err := s.openRot(repository)
	if err != nil {
		return 0, err
	}
	lists, err := s.openSums(repository)
	if err != nil || len(open)+len(lists) == 0 {
		return 0, err
	}
	dir, err := s.makeDir(s.incoming, repository, privatePerm)
	if err != nil {
		return 0, fmt.Errorf("heal %s: %w", repository, err)
	}
	defer dir.Close()
	if err := dir.Lock(); err != nil {
		if errors.Is(err, beneath.ErrLocked) {
			err = ErrBusy
		}
		return 0, fmt.Errorf("heal %s: %w", repository, err)
	}
	var failed []error
	for _, name := range lists {
		if err := s.healSums(ctx, repository, name, dir); err != nil {
			failed = append(failed, fmt.Errorf("heal %s of generation %s of %s: %w", SumsFile, name, repository, err))
		}
	}
	n, err := s.heal(ctx, repository, dir, nil)
	return n, errors.Join(append(failed, err)...)
}

// healSums writes a generation's SUMS.b2 anew, from its manifest.
func (s *Store) healSums(ctx context.Context, repository, name string, dir *beneath.Dir) error {
	g, err := s.Generation(ctx, repository, name)
	if err != nil {
		return err
	}
	gen, err := s.OpenGeneration(repository, name)
	if err != nil {
		return err
	}
	defer gen.Close()
	in, _, err := gen.Open(ManifestFile)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := s.create(dir, healLink, 0o444)
	if err != nil {
		return err
	}
	defer out.Close()
	w := bufio.NewWriterSize(out, 256<<10)
	var line []byte
	for r := manifest.NewReader(in); ; {
		if r.Index()%1024 == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		e, err := r.Next()
		if errors.Is(err, io.EOF) {
			if d := r.Summary().Digest; g.Format == 0 || d != g.Digest {
				return fmt.Errorf("%w: there is no %s to make it from", ErrDamaged, ManifestFile)
			}
			break
		}
		if err != nil {
			return fmt.Errorf("%w: %w", ErrDamaged, err)
		}
		if e.Kind != manifest.File {
			continue
		}
		line = appendSum(line[:0], &e)
		if _, err := w.Write(line); err != nil {
			return err
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	// It keeps its time, where that can be read: a healed generation is what it was.
	if st, err := gen.Stat(SumsFile); err == nil {
		if err := dir.SetTimes(healLink, st.Atim, st.Mtim); err != nil {
			return err
		}
	}
	if err := out.Sync(); err != nil {
		return err
	}
	if err := dir.Rename(healLink, gen, SumsFile); err != nil {
		return err
	}
	if err := gen.Sync(); err != nil {
		return err
	}
	return s.changeRot(func(r *rotRecord) bool {
		changed := false
		for i := range r.Files {
			if f := &r.Files[i]; f.isSums(repository) && slices.Contains(f.Generations, name) {
				f.Healed, changed = s.opt.Now().UTC().Truncate(time.Second), true
			}
		}
		return changed
	})
}

// heal is Heal under the repository's lock; dir is incoming/<repository>, extra
// holds verified files named by their hash and may be nil.
func (s *Store) heal(ctx context.Context, repository string, dir, extra *beneath.Dir) (healed int, err error) {
	open, err := s.openRot(repository)
	if err != nil || len(open) == 0 {
		return 0, err
	}
	list, err := s.List(ctx, repository)
	if err != nil {
		return 0, err
	}
	sums := slices.SortedFunc(maps.Keys(open), func(a, b manifest.Sum) int { return strings.Compare(a.String(), b.String()) })
	portion := max(maxPlaces/(len(list)+1), 1)
	var failed []error
	ends := map[manifest.Sum]outcome{}
	defer func() { err = errors.Join(err, s.settle(repository, ends)) }()
	for part := range slices.Chunk(sums, portion) {
		wanted := map[manifest.Sum][]place{}
		for _, sum := range part {
			wanted[sum] = nil
		}
		home, all, err := s.trace(ctx, repository, list, wanted)
		if err != nil {
			return healed, err
		}
		for _, sum := range part {
			h := &healing{store: s, ctx: ctx, repository: repository, dir: dir, extra: extra, sum: sum, buf: make([]byte, 256<<10)}
			good, err := h.run(wanted[sum])
			if ctx.Err() != nil {
				return healed, ctx.Err()
			}
			if err != nil {
				failed = append(failed, err)
			}
			end := outcome{good: good, places: len(wanted[sum]), all: all, bad: h.bad}
			if home != nil {
				end.digest = home.Digest.String()
				end.atHome = slices.ContainsFunc(wanted[sum], func(p place) bool { return p.generation == home.Name })
			}
			ends[sum] = end
			if len(ends) == maxEnds {
				if err := s.settle(repository, ends); err != nil {
					return healed, err
				}
			}
			if good && end.places > 0 {
				healed++
				s.opt.Log.Info("a rotten file is whole again", "repository", repository, "file", open[sum].Path, "names", end.places, "were_wrong", len(h.bad))
			}
		}
	}
	return healed, errors.Join(failed...)
}

// outcome is how the healing of one hash ended.
type outcome struct {
	good   bool
	places int      // names that should have it
	all    bool     // no generation was left out
	bad    []string // generations in which it was wrong
	digest string   // of the newest generation; "" for none
	atHome bool     // which has it
}

// maxEnds is how many outcomes a cut may cost, which are found again.
const maxEnds = 32

// settle records outcomes, and empties the map.
func (s *Store) settle(repository string, ends map[manifest.Sum]outcome) error {
	if len(ends) == 0 {
		return nil
	}
	defer clear(ends)
	return s.changeRot(func(r *rotRecord) bool {
		changed := false
		for i := range r.Files {
			f := &r.Files[i]
			o, ok := ends[f.Sum]
			if f.Repository != repository || !ok || !f.Open() {
				continue
			}
			was := *f
			switch {
			case o.places == 0 && o.all:
				f.Healed, f.What = s.opt.Now().UTC().Truncate(time.Second), "no generation needs it any more"
			case o.places > 0 && o.good:
				f.Healed = s.opt.Now().UTC().Truncate(time.Second)
			case o.digest != "" && !o.atHome:
				f.Lacking = o.digest
			default:
				f.Lacking = ""
			}
			if len(o.bad) > 0 {
				f.Generations = newestOf(o.bad)
			}
			changed = changed || was.Lacking != f.Lacking || !f.Open() || !slices.Equal(was.Generations, f.Generations)
		}
		return changed
	})
}

// trace finds every name that files with the wanted hashes should have in the
// generations of a repository, and returns the newest generation that it could
// read. One whose list cannot be believed is left out; all says that none was.
func (s *Store) trace(ctx context.Context, repository string, list []Generation, wanted map[manifest.Sum][]place) (home *Generation, all bool, err error) {
	all = true
	for i := range list {
		g := &list[i]
		found, err := s.traceOne(ctx, repository, g, wanted)
		if ctx.Err() != nil {
			return nil, false, ctx.Err()
		}
		if err != nil {
			s.opt.Log.Warn("a generation is left out of the healing", "repository", repository, "generation", g.Name, "err", err)
			all = false
			continue
		}
		for _, p := range found {
			wanted[p.entry.Sum] = append(wanted[p.entry.Sum], p)
		}
		home = g
	}
	return home, all, nil
}

func (s *Store) traceOne(ctx context.Context, repository string, g *Generation, wanted map[manifest.Sum][]place) ([]place, error) {
	if g.Format == 0 {
		return nil, fmt.Errorf("%w: its %s cannot be read", ErrDamaged, TOMLFile)
	}
	dir, err := s.OpenGeneration(repository, g.Name)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	f, _, err := dir.Open(ManifestFile)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var found []place
	for r := manifest.NewReader(f); ; {
		if r.Index()%1024 == 0 && ctx.Err() != nil {
			return nil, ctx.Err()
		}
		e, err := r.Next()
		if errors.Is(err, io.EOF) {
			if d := r.Summary().Digest; d != g.Digest {
				return nil, fmt.Errorf("%w: the digest of its %s is %v, %s says %v", ErrDamaged, ManifestFile, d, TOMLFile, g.Digest)
			}
			break
		}
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
		}
		if e.Kind != manifest.File {
			continue
		}
		if _, ok := wanted[e.Sum]; ok && len(found) < maxPlaces {
			found = append(found, place{generation: g.Name, entry: e})
		}
	}
	for i := range found {
		p := &found[i]
		parent, name := split(p.entry.Path)
		folder, err := openParent(dir, parent)
		if err == nil {
			p.st, err = folder.Stat(name)
			folder.Close()
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) && !errors.Is(err, unix.ELOOP) {
			// It is there or not, the disk cannot say: as good as not.
			s.opt.Log.Warn("a name cannot be looked at", "repository", repository, "generation", g.Name, "file", p.entry.Path, "err", err)
		}
	}
	return found, nil
}

func openParent(generation *beneath.Dir, parent string) (*beneath.Dir, error) {
	if parent == "" {
		return generation.Dir(FilesFolder)
	}
	return generation.Dir(FilesFolder + "/" + parent)
}

// healing is the work on one hash.
type healing struct {
	store      *Store
	ctx        context.Context
	repository string
	dir, extra *beneath.Dir
	sum        manifest.Sum
	buf        []byte

	good map[uint64]place // inodes that were read and are right, with one of their names
	bad  []string         // generations with a name whose inode is not
}

// run makes every place a good file. It reports whether all of them are.
func (h *healing) run(places []place) (bool, error) {
	h.good = map[uint64]place{}
	if err := h.judge(places); err != nil {
		return false, err
	}
	for _, p := range places {
		if _, ok := h.good[p.st.Ino]; !ok && (len(h.bad) == 0 || h.bad[len(h.bad)-1] != p.generation) {
			h.bad = append(h.bad, p.generation)
		}
	}
	changed := false
	for i := range places {
		p := &places[i]
		if _, ok := h.good[p.st.Ino]; ok {
			continue
		}
		ok, err := h.mend(p)
		if err != nil {
			return false, fmt.Errorf("heal %q in generation %s of %s: %w", p.entry.Path, p.generation, h.repository, err)
		}
		if !ok {
			return false, nil // nobody has the bytes
		}
		changed = true
	}
	if !changed {
		return true, nil
	}
	if err := h.dir.SyncFS(); err != nil {
		return false, err
	}
	return h.confirm(places)
}

// judge reads each inode once.
func (h *healing) judge(places []place) error {
	bad := map[uint64]bool{0: true}
	for _, p := range places {
		if _, ok := h.good[p.st.Ino]; ok || bad[p.st.Ino] {
			continue
		}
		if err := h.read(&p); h.ctx.Err() != nil {
			return h.ctx.Err()
		} else if err != nil {
			bad[p.st.Ino] = true
		} else {
			h.good[p.st.Ino] = p
		}
	}
	return nil
}

// read reads a place from the disk, and fails if it is not what it should be.
func (h *healing) read(p *place) error {
	folder, name, err := h.folder(p, false)
	if err != nil {
		return err
	}
	defer folder.Close()
	f, st, err := folder.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	p.st = st
	return h.readFile(f, p.entry.Size)
}

// readFile reads past the page cache as far as the kernel lets it: what is in
// memory says nothing about the disk.
func (h *healing) readFile(f *os.File, size int64) error {
	if err := f.Sync(); err != nil && !errors.Is(err, unix.EROFS) {
		return err // dirty pages cannot be dropped
	}
	unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
	defer unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
	return ReadSum(h.ctx, f, size, h.sum, h.buf)
}

// folder opens the folder of a place; make makes what is missing of it.
func (h *healing) folder(p *place, make bool) (*beneath.Dir, string, error) {
	parent, name := split(p.entry.Path)
	dir, err := h.store.OpenGeneration(h.repository, p.generation)
	if err != nil {
		return nil, "", err
	}
	defer dir.Close()
	folder, err := openParent(dir, parent)
	if err == nil || !make || !errors.Is(err, fs.ErrNotExist) {
		return folder, name, err
	}
	at, err := h.store.makeDir(dir, FilesFolder, folderPerm)
	if err != nil {
		return nil, "", err
	}
	for part := range strings.SplitSeq(parent, "/") {
		if part == "" {
			continue
		}
		next, err := h.store.makeDir(at, part, folderPerm)
		at.Close()
		if err != nil {
			return nil, "", err
		}
		at = next
	}
	return at, name, nil
}

// mend gives p a good inode: one that another generation has, or a new one. It
// reports false when there are no bytes to make one of.
func (h *healing) mend(p *place) (bool, error) {
	if err := h.dir.RemoveAll(healLink); err != nil {
		return false, err
	}
	ok, err := h.prepare(p)
	if err != nil || !ok {
		return false, err
	}
	to, name, err := h.folder(p, true)
	if err != nil {
		return false, err
	}
	defer to.Close()
	if err := h.dir.Rename(healLink, to, name); err != nil {
		return false, err
	}
	if p.st, err = to.Stat(name); err != nil {
		return false, err
	}
	h.good[p.st.Ino] = *p
	return true, nil
}

// prepare puts a good inode with the mode of p under the name healLink.
func (h *healing) prepare(p *place) (bool, error) {
	perm := filePerm(p.entry.Mode)
	for _, g := range h.good {
		from, name, err := h.folder(&g, false)
		if err != nil {
			continue
		}
		st, err := from.Stat(name)
		// As many links as there are by now, which the first look did not know.
		if err == nil && st.Ino == g.st.Ino && st.Mode&0o7777 == perm && st.Nlink < maxLinks {
			if err = h.dir.Link(from, name, healLink); err == nil {
				from.Close()
				return true, nil
			}
		}
		from.Close()
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.EMLINK) {
			return false, err
		}
	}
	if h.extra != nil {
		if ok, err := h.copyOf(h.extra, h.sum.String(), p, perm); ok || err != nil {
			return ok, err
		}
	}
	for _, g := range h.good {
		from, name, err := h.folder(&g, false)
		if err != nil {
			continue
		}
		ok, err := h.copyOf(from, name, p, perm)
		from.Close()
		if ok || err != nil {
			return ok, err
		}
	}
	return false, nil
}

// copyOf makes an inode of its own from a file, hashes what it wrote by reading
// it back, and reports false when the source is not, or not any more, good.
func (h *healing) copyOf(from *beneath.Dir, name string, p *place, perm uint32) (bool, error) {
	src, st, err := from.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer src.Close()
	if st.Size != p.entry.Size {
		return false, nil
	}
	if h.extra == from && st.Nlink == 1 {
		// Uploaded for this: it need not be written twice.
		if h.readFile(src, p.entry.Size) != nil {
			return false, h.ctx.Err()
		}
		if err := finishFile(src, perm, &p.entry); err != nil {
			return false, err
		}
		return true, h.dir.Link(from, name, healLink)
	}
	dst, err := h.store.create(h.dir, healLink, perm)
	if err != nil {
		return false, err
	}
	defer dst.Close()
	sum, err := copyAndHash(h.ctx, dst, src)
	if err != nil {
		return false, err
	}
	if sum != h.sum {
		return false, nil
	}
	if err := finishFile(dst, perm, &p.entry); err != nil {
		return false, err
	}
	if _, err := dst.Seek(0, io.SeekStart); err != nil {
		return false, err
	}
	return true, h.readFile(dst, p.entry.Size)
}

func finishFile(f *os.File, perm uint32, e *manifest.Entry) error {
	if err := f.Chmod(fs.FileMode(perm)); err != nil {
		return err
	}
	return setTime(f, e)
}

// confirm reads what was healed back from the disk, in every generation.
func (h *healing) confirm(places []place) (bool, error) {
	h.good = map[uint64]place{}
	now := slices.Clone(places)
	for i := range now {
		p := &now[i]
		folder, name, err := h.folder(p, false)
		if err != nil {
			return false, err
		}
		p.st, err = folder.Stat(name)
		folder.Close()
		if err != nil {
			return false, err
		}
	}
	if err := h.judge(now); err != nil {
		return false, err
	}
	for _, p := range now {
		if _, ok := h.good[p.st.Ino]; !ok {
			return false, fmt.Errorf("%w after it was healed: %q in generation %s of %s", ErrRotten, p.entry.Path, p.generation, h.repository)
		}
	}
	return true, nil
}

// beginHeal answers an offer of just what the newest generation is, when some of
// its files are rotten. It reports false when there is nothing that this push
// could bring.
func (t *Transaction) beginHeal(ctx context.Context, newest *Generation) (Answer, bool, error) {
	open, err := t.store.openRot(t.req.Repository)
	if err != nil {
		return Answer{}, false, err
	}
	maps.DeleteFunc(open, func(_ manifest.Sum, r Rot) bool { return r.Lacking == newest.Digest.String() })
	if len(open) == 0 {
		return Answer{}, false, nil
	}
	from, err := t.store.OpenGeneration(t.req.Repository, newest.Name)
	if err != nil {
		return Answer{}, false, err
	}
	defer from.Close()
	if err := t.prepare(); err != nil {
		return Answer{}, false, err
	}
	// push.toml first: it is valid only with the MANIFEST of its digest.
	for _, name := range []string{pushFile, ManifestFile} {
		if err := t.dir.RemoveAll(name); err != nil {
			return Answer{}, false, err
		}
	}
	if err := t.dir.Link(from, ManifestFile, ManifestFile); err != nil {
		return Answer{}, false, err
	}
	var random [8]byte
	rand.Read(random[:])
	t.id, t.healing = t.req.Repository+"/"+hex.EncodeToString(random[:]), newest
	answer, err := t.plan(ctx)
	if err != nil || answer.Need == 0 && answer.Kept == 0 {
		t.healing = nil
		if err == nil {
			err = t.lacking(open)
		}
		return Answer{}, false, err
	}
	answer.Heal = true
	return answer, true, nil
}

// lacking records that home does not have these bytes in what it offers.
func (t *Transaction) lacking(sums map[manifest.Sum]Rot) error {
	return t.store.changeRot(func(r *rotRecord) bool {
		changed := false
		for i := range r.Files {
			f := &r.Files[i]
			if _, ok := sums[f.Sum]; ok && f.Repository == t.req.Repository && f.Open() {
				f.Lacking, changed = t.digest.String(), true
			}
		}
		return changed
	})
}

// commitHeal ends a push that heals.
func (t *Transaction) commitHeal(ctx context.Context) (*Generation, error) {
	if err := t.healFrom(ctx); err != nil {
		return nil, err
	}
	t.state = committed
	// Best effort, as after any commit.
	if err := t.discard(); err != nil {
		t.store.opt.Log.Warn("incoming folder cannot be emptied", "repository", t.req.Repository, "err", err)
	}
	return t.healing, nil
}

// healFrom heals with what the push uploaded.
func (t *Transaction) healFrom(ctx context.Context) error {
	objects, err := t.dir.Dir(objectsFolder)
	if err != nil {
		return err
	}
	defer objects.Close()
	t.healed, err = t.store.heal(ctx, t.req.Repository, t.dir, objects)
	return err
}

// Healed is how many rotten files the commit healed; Heals says that the push
// does that and nothing else: no generation comes of it.
func (t *Transaction) Healed() int { return t.healed }

// Heals says that the push brings back rotten files of the newest generation,
// and that no generation will come of it.
func (t *Transaction) Heals() bool { return t.healing != nil }
