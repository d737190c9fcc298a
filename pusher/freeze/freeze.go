// Package freeze takes a consistent, private picture of a Borg 1.x repository in
// seconds, to be listed and uploaded for hours while borg goes on.
//
// Segments, once committed, never change; index, hints and integrity files are
// replaced by rename, never rewritten. So a hard link to each is a picture that
// costs no space. What changes under its own name (config, nonce, README,
// transactions) is small and copied. Everything happens below
// REPOSITORY/.farkeep-freeze, on the same file system by construction, mode 0700,
// where borg does not look. Most links are made before borg's lock is taken; under
// the lock only the difference is made good, so that the lock is held for a
// moment.
//
// A picture holds the segments up to the last committed one and not those that a
// running or killed borg left after it. It is, bit for bit, a repository that borg
// accepts.
//
// Where hard links are impossible the picture is the repository itself, and the
// lock is held until [Freeze.Thaw]; Held says so. Before a push from such a
// picture is committed, [Freeze.Check] must find it unharmed. A linked picture
// needs no such check beyond the sums of its files: borg older than 1.1.18 and
// 1.2.0 truncate a segment before they delete it, through all its links, and the
// upload then finds another content than the manifest says.
package freeze

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"farkeep/pusher/borglock"
	"farkeep/shared/hint"
)

// Folder is the name of the freeze's folder in its repository.
const Folder = ".farkeep-freeze"

// maxSmall bounds the files that are copied, in bytes. The largest, an
// append-only repository's list of transactions, takes 60 bytes for each.
const maxSmall = 64 << 20

// permissions are the mode bits that a manifest records.
const permissions = fs.ModePerm | fs.ModeSetuid | fs.ModeSetgid | fs.ModeSticky

// longLock is the time under the lock that is worth a warning: borg gives up
// after one second unless it is told otherwise.
const longLock = 2 * time.Second

// small are the files that change under their own name.
var small = []string{"README", "config", "nonce", "transactions"}

// Freeze is the picture of one repository.
type Freeze struct {
	// Root is the folder to list and upload from: the freeze's own, or, when Held,
	// the repository itself.
	Root string
	// Held says that borg's lock is held until Thaw; Why says why.
	Held bool
	Why  string
	// Transaction is the last committed one that the picture holds, -1 for none.
	Transaction int64
	// Locked is how long borg's lock was held; 0 while it still is.
	Locked time.Duration

	repository string
	dir        *os.Root // the repository: no symbolic link in it leads out
	opt        borglock.Options
	log        *slog.Logger
	folder     *os.File // flocked; nil when Held
	lock       *borglock.Lock
	names      map[string]bool  // when Held: the files that belong to the picture
	was        map[string]int64 // when not Held: change times before we linked
	carried    map[uint64]Times // change times of inodes that a crashed run's leftovers moved
}

// Times are the change times (nanoseconds since 1970) of a file before and after
// a link to it was removed.
type Times struct{ Before, After int64 }

// Take freezes the Borg repository in folder repository. opt says how its lock is
// taken. The caller must Thaw the result, whatever happens.
func Take(ctx context.Context, repository string, opt borglock.Options) (*Freeze, error) {
	f := &Freeze{repository: repository, opt: opt, log: opt.Log, was: map[string]int64{}}
	if f.log == nil {
		f.log = slog.New(slog.DiscardHandler)
	}
	err := f.take(ctx)
	if err != nil {
		_, thaw := f.Thaw()
		return nil, fmt.Errorf("freeze %s: %w", repository, errors.Join(err, thaw))
	}
	return f, nil
}

func (f *Freeze) take(ctx context.Context) (err error) {
	if f.dir, err = os.OpenRoot(f.repository); err != nil {
		return err
	}
	err = f.open()
	if err == nil {
		// The first look: what is there now will mostly be there under the lock. A
		// segment of a transaction that is not committed yet may come along; the
		// second look sorts it out.
		var segments []segment
		segments, err = listSegments(f.repository)
		if err == nil {
			err = f.link(ctx, segments, false)
		}
	}
	if err != nil {
		if !impossible(err) {
			return err
		}
		return f.hold(ctx, err)
	}

	if f.lock, err = borglock.Shared(ctx, f.repository, f.opt); err != nil {
		return waitHint(err, f.repository)
	}
	start := time.Now()
	err = f.settle(ctx)
	if err == nil {
		err = f.lock.Held()
	}
	released := f.lock.Release()
	f.lock = nil
	f.Locked = time.Since(start)
	if f.Locked > longLock {
		f.log.Warn("borg's lock was held for long", "repository", f.repository, "seconds", f.Locked.Seconds())
	}
	return errors.Join(err, released)
}

// waitHint tells a person what to do about a lock that was not to be had.
func waitHint(err error, repository string) error {
	var held *borglock.HeldError
	switch {
	case !errors.As(err, &held):
		return err
	case held.Alive:
		return hint.Because(err, "a borg is at work; push again when it is done, or raise push.lock_wait in site.toml")
	default:
		return hint.Because(err, `if that borg no longer runs anywhere, run "borg break-lock %s"`, repository)
	}
}

// settle makes the picture exact. It runs under the lock.
func (f *Freeze) settle(ctx context.Context) error {
	segments, index, last, err := look(f.repository)
	if err != nil {
		return err
	}
	if last != index {
		f.log.Warn("borg was cut before it wrote its index; the picture is what its next run will start from", "repository", f.repository, "index", index, "committed", last)
	}
	f.Transaction = last
	segments = upTo(segments, last)
	if err := f.link(ctx, segments, true); err != nil {
		return err
	}
	for _, name := range small {
		if err := f.copySmall(name); err != nil {
			return err
		}
	}
	for _, name := range indexNames(index) {
		err := f.linkOne(name, nil)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// look reads the repository's state. It must run under the lock to mean anything.
func look(repository string) (segments []segment, index, last int64, err error) {
	if index, err = newestIndex(repository); err != nil {
		return nil, 0, 0, err
	}
	if segments, err = listSegments(repository); err != nil {
		return nil, 0, 0, err
	}
	last, err = committed(repository, segments, index)
	if errors.Is(err, ErrDamaged) {
		err = hint.Because(err, `run "borg check %s"; nothing was pushed, and the generations that exist are as they were`, repository)
	}
	return segments, index, last, err
}

func upTo(segments []segment, last int64) []segment {
	n, _ := slices.BinarySearchFunc(segments, last+1, func(s segment, n int64) int { return int(s.number - n) })
	return segments[:n]
}

func indexNames(transaction int64) []string {
	if transaction < 0 {
		return nil
	}
	return []string{
		fmt.Sprintf("hints.%d", transaction),
		fmt.Sprintf("index.%d", transaction),
		fmt.Sprintf("integrity.%d", transaction),
	}
}

// open makes the freeze's folder, new and empty.
func (f *Freeze) open() error {
	f.Root = filepath.Join(f.repository, Folder)
	if err := f.dir.Mkdir(Folder, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		if errors.Is(err, fs.ErrPermission) && !errors.Is(err, unix.EPERM) {
			return hint.Because(err, "borg's lock and the freeze need write access to the repository: run the pusher as root, or as the repository's owner")
		}
		return err
	}
	d, err := f.dir.OpenFile(Folder, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	// The lock tells a freeze in use from one that a crash left behind. On a file
	// system that cannot lock a folder (NFS) the pusher's own lock must do.
	if err := unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		d.Close()
		return fmt.Errorf("%s is in use by another pusher", f.Root)
	}
	f.folder = d
	if err := d.Chmod(0o700); err != nil {
		return err
	}
	left, err := f.empty()
	if err != nil {
		return err
	}
	if len(left) > 0 {
		f.log.Info("removed what an earlier push left frozen", "repository", f.repository, "files", len(left))
	}
	f.carried = map[uint64]Times{}
	for _, l := range left {
		f.carried[l.inode] = l.Times
	}
	return nil
}

// link brings the linked segments to exactly these. strict, a segment that has
// vanished is an error: under the lock none can.
func (f *Freeze) link(ctx context.Context, segments []segment, strict bool) error {
	want := make(map[string]bool, len(segments))
	for _, s := range segments {
		want[s.path] = true
	}
	// What was linked and is gone, or has become another file, goes first.
	for name := range f.was {
		if !want[name] {
			if err := f.dir.Remove(filepath.Join(Folder, name)); err != nil {
				return err
			}
			delete(f.was, name)
		}
	}
	for _, s := range segments {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := f.linkOne(s.path, s.info); err != nil {
			if !strict && errors.Is(err, fs.ErrNotExist) {
				continue
			}
			return err
		}
	}
	return nil
}

// linkOne links one file, unless that is done already, and notes its change time
// from before. info may be nil.
func (f *Freeze) linkOne(name string, info fs.FileInfo) error {
	to := filepath.Join(Folder, name)
	if info == nil {
		var err error
		if info, err = f.dir.Lstat(name); err != nil {
			return err
		}
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%w: %s is not a regular file", ErrDamaged, name)
	}
	if _, done := f.was[name]; done {
		have, err := f.dir.Lstat(to)
		if err != nil {
			return err
		}
		if os.SameFile(have, info) {
			return nil
		}
		if err := f.dir.Remove(to); err != nil {
			return err
		}
		delete(f.was, name)
	}
	inode, changed := inodeOf(info)
	err := f.dir.Link(name, to)
	if errors.Is(err, fs.ErrNotExist) {
		if err := f.makeFolder(filepath.Dir(name)); err != nil {
			return err
		}
		err = f.dir.Link(name, to)
	}
	if err != nil {
		return err
	}
	if t, ok := f.carried[inode]; ok && t.After == changed {
		changed = t.Before
	}
	f.was[name] = changed
	return nil
}

// makeFolder makes a folder like the source's, and those above it.
func (f *Freeze) makeFolder(name string) error {
	if name == "." {
		return nil
	}
	if err := f.makeFolder(filepath.Dir(name)); err != nil {
		return err
	}
	info, err := f.dir.Lstat(name)
	if err != nil {
		return err
	}
	to := filepath.Join(Folder, name)
	if err := f.dir.Mkdir(to, 0o700); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return nil
		}
		return err
	}
	return f.dir.Chmod(to, info.Mode()&permissions|0o700)
}

func (f *Freeze) copySmall(name string) error {
	in, err := f.dir.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%w: %s is not a regular file", ErrDamaged, in.Name())
	}
	to := filepath.Join(Folder, name)
	out, err := f.dir.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	n, err := io.Copy(out, io.LimitReader(in, maxSmall+1))
	if err != nil {
		return err
	}
	if n > maxSmall {
		return fmt.Errorf("%s is larger than %d bytes", in.Name(), int64(maxSmall))
	}
	if err := out.Chmod(info.Mode() & permissions); err != nil {
		return err
	}
	if err := out.Close(); err != nil {
		return err
	}
	return f.dir.Chtimes(to, time.Time{}, info.ModTime())
}

// impossible reports whether err says that there can be no hard links here.
func impossible(err error) bool {
	for _, e := range []error{unix.EXDEV, unix.EPERM, unix.EMLINK, unix.EOPNOTSUPP, unix.ENOSYS, unix.EROFS} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// hold takes the lock and keeps it: the picture is the repository itself.
func (f *Freeze) hold(ctx context.Context, why error) error {
	if err := f.remove(); err != nil && !errors.Is(err, unix.EROFS) {
		return err
	}
	f.Root, f.Held, f.Why = f.repository, true, why.Error()
	var err error
	f.lock, err = borglock.Shared(ctx, f.repository, f.opt)
	switch {
	case errors.Is(err, borglock.ErrReadOnly):
		// Nobody on this host can write. Another host may, if this is its file
		// system; Check finds that out.
		if _, err := f.dir.Lstat("lock.exclusive"); err == nil {
			return fmt.Errorf("the file system is read-only here, and another host writes to the repository")
		}
		f.Why = "the file system is read-only"
		f.lock = nil
	case err != nil:
		return waitHint(err, f.repository)
	}
	segments, index, last, err := look(f.repository)
	if err != nil {
		return err
	}
	f.Transaction = last
	f.was, f.names = nil, map[string]bool{}
	for _, s := range upTo(segments, last) {
		f.names[s.path] = true
		f.names[filepath.Dir(s.path)] = true
	}
	f.names["data"] = true
	for _, name := range slices.Concat(small, indexNames(index)) {
		f.names[name] = true
	}
	return nil
}

// Includes reports whether the file or folder name, a path below Root, belongs to
// the picture.
func (f *Freeze) Includes(name string) bool { return !f.Held || f.names[name] }

// Was returns the change time (nanoseconds since 1970) that the file at name, a
// path below Root, had before freezing changed it: a link changes it. 0 if
// freezing did not.
func (f *Freeze) Was(name string) int64 { return f.was[name] }

// Check reports whether a picture that is Held is still what it was: to be asked
// after the upload, before the commit.
func (f *Freeze) Check() error {
	if !f.Held {
		return nil
	}
	if f.lock != nil {
		return f.lock.Held()
	}
	_, _, last, err := look(f.repository)
	if err == nil && last != f.Transaction {
		err = fmt.Errorf("another host wrote to the repository %s during the upload", f.repository)
	}
	return err
}

// Thaw removes the picture and gives back the lock. It returns the change times
// of the files that it unlinked, by their paths below Root, for those who know
// files by their change times. Thaw may be called again.
func (f *Freeze) Thaw() (map[string]Times, error) {
	var err error
	if f.lock != nil {
		err = f.lock.Release()
		f.lock = nil
	}
	moved := map[string]Times{}
	if f.folder != nil {
		left, gone := f.empty()
		for _, l := range left {
			if _, linked := f.was[l.name]; linked {
				moved[l.name] = l.Times
			}
		}
		err = errors.Join(err, gone, f.remove())
	}
	if f.dir != nil {
		err = errors.Join(err, f.dir.Close())
		f.dir = nil
	}
	if err != nil {
		err = fmt.Errorf("thaw %s: %w", f.repository, err)
	}
	return moved, err
}

func (f *Freeze) remove() error {
	if f.folder == nil {
		return nil
	}
	_, err := f.empty()
	if err == nil {
		err = f.dir.Remove(Folder)
	}
	// Only now: whoever waits for the flock must not find half a freeze.
	f.folder.Close()
	f.folder = nil
	return err
}

// removed is a file that was unlinked from a freeze.
type removed struct {
	name  string
	inode uint64
	Times
}

// empty removes everything in the freeze's folder and returns the files.
func (f *Freeze) empty() ([]removed, error) {
	var files []removed
	var folders []string
	err := fs.WalkDir(f.dir.FS(), Folder, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if path != Folder {
				folders = append(folders, path)
				return f.dir.Chmod(path, 0o700)
			}
			return nil
		}
		r, err := f.unlink(path)
		if err != nil {
			return err
		}
		r.name = strings.TrimPrefix(path, Folder+"/")
		files = append(files, r)
		return nil
	})
	if err != nil {
		return files, err
	}
	for _, path := range slices.Backward(folders) {
		if err := f.dir.Remove(path); err != nil {
			return files, err
		}
	}
	return files, nil
}

// unlink removes a file and looks at its inode before and after. A file that
// cannot be opened is removed without a look.
func (f *Freeze) unlink(path string) (r removed, err error) {
	file, err := f.dir.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return r, f.dir.Remove(path)
	}
	defer file.Close()
	before, err := file.Stat()
	if err != nil {
		return r, err
	}
	if err := f.dir.Remove(path); err != nil {
		return r, err
	}
	after, err := file.Stat()
	if err != nil {
		return r, err
	}
	r.inode, r.Before = inodeOf(before)
	_, r.After = inodeOf(after)
	return r, nil
}
