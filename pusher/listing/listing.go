// Package listing makes the manifest of a folder: what is in it, and the
// BLAKE2b-256 of every file.
//
// A cache spares the reading of files that the file system says are the same as
// last time: same path, size, modification and change time (ctime), and inode. The
// change time cannot be set by programs, so that a file whose content was altered
// and whose modification time was put back is still read again. Walk, cache and
// manifest have one order and are merged as streams: memory does not grow with the
// number of files.
//
// What the file system cannot say is that a disk gives back other bytes than were
// written. With [Options.Reread] every file is read again once in that time, and
// one that has changed without a trace is an error ([ErrRotten]): else the first
// full reading would make a new generation out of it.
//
// Only regular files and folders are listed; [Skipped] counts the rest. A file
// that cannot be read is an error: a mirror that lacks it must not pass for one.
// A file that changes while it is read is read again, some times.
package listing

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"farkeep/shared/hint"
	"farkeep/shared/manifest"
)

const (
	// ahead is how many entries the walk may be ahead of the manifest while files
	// are hashed.
	ahead = 1024
	// attempts is how often a file that changes under the reader is read.
	attempts = 3
	// tick is more than the coarseness of file times: what was written less than
	// a tick ago may be written again without a trace.
	tick = 50 * time.Millisecond
	// workers hash at the same time. More only make a hard disk seek.
	workers = 2
	// statAhead is how many names of a folder are looked at in one go, by statWorkers
	// at the same time.
	statAhead   = 256
	statWorkers = 4
	// hashBuffer is what is read at once.
	hashBuffer = 256 << 10
)

// Options tune [Write].
type Options struct {
	// Cache is the cache's file, which is read if it is there and written anew, also
	// when the listing is cut short; "" for none.
	Cache string
	// Include says which files and folders belong to the listing, by their paths
	// below the root; nil means all.
	Include func(name string) bool
	// Was gives the change time (nanoseconds since 1970) that a file had before the
	// caller itself changed it, 0 if it did not; nil means it never did.
	Was func(name string) int64
	// Reread is the longest time that the cache's word is taken for a file without
	// reading it, in whole days; 0: for ever. Files take turns: each is read once
	// between half of it and all of it.
	Reread time.Duration
	Now    func() time.Time // nil: time.Now
	// Check returns what is to judge the content of a file as it is read, nil for
	// nothing; nil means that no content is judged.
	Check func(name string) Check
	// Read is called with the bytes read for hashing, from several goroutines; may
	// be nil.
	Read func(n int)
	Log  *slog.Logger
}

// Check judges the content of one file, which is written to it; the error of Err
// says what is wrong with it.
type Check interface {
	io.Writer
	Err() error
}

// Skipped are the things that no generation can hold: symbolic links, devices,
// sockets, pipes.
type Skipped struct {
	Count int64
	First string // path below the root
	Kind  string // of the first: "symbolic link", ...
}

// Result is what a listing came to.
type Result struct {
	manifest.Summary
	Hashed      int64 // files that were read
	HashedBytes int64
	Skipped     Skipped
}

// ErrRotten is wrapped for a file that has other bytes than it had, although
// nothing wrote to it.
var ErrRotten = errors.New("its bytes changed, and nothing wrote to it")

// A WrongError names files whose content [Options.Check] did not find good. The
// cache does not take them, so that the next listing reads them again.
type WrongError struct {
	Count int64
	First []Wrong // the first of them, 16 at most
}

// Wrong is a file whose content is not good.
type Wrong struct {
	Path string
	Sum  manifest.Sum // of the content that it has
	Err  error        // what Check says
}

// maxWrong bounds WrongError.First.
const maxWrong = 16

func (e *WrongError) Error() string {
	one := fmt.Sprintf("%s: %v", e.First[0].Path, e.First[0].Err)
	if e.Count == 1 {
		return one
	}
	return fmt.Sprintf("%d files have not the content that they should have; the first is %s", e.Count, one)
}

// ErrChanging is wrapped for a file that never stayed still while it was read.
var ErrChanging = errors.New("it changes while it is read")

// Write writes the manifest of the folder root to w.
func Write(ctx context.Context, root string, w io.Writer, opt Options) (Result, error) {
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	if opt.Now == nil {
		opt.Now = time.Now
	}
	l := &lister{opt: opt, today: days(opt.Now()), items: make(chan *item, ahead), jobs: make(chan *item, ahead)}
	r, err := l.run(ctx, root, w)
	if err != nil {
		return r, fmt.Errorf("list %s: %w", root, err)
	}
	return r, nil
}

type lister struct {
	opt   Options
	root  *os.Root
	items chan *item // in the manifest's order
	jobs  chan *item // those that must be hashed
	cache lookup
	skip  Skipped
	wrong WrongError
	today int64
}

// item is one entry on its way from the walk to the manifest.
type item struct {
	entry  manifest.Entry
	id     identity
	cached bool          // entry.Sum is from the cache
	read   int64         // the day on which all of it was read last
	known  *record       // what the cache has of a file that is read again; nil for none
	done   chan struct{} // closed when the fields below are set; nil for what needs no hashing
	gone   bool          // it vanished
	racy   bool          // it was written too recently to be told from its next version
	wrong  error         // why Check does not find it good
	err    error
}

func (l *lister) run(ctx context.Context, root string, w io.Writer) (result Result, err error) {
	if l.root, err = os.OpenRoot(root); err != nil {
		return result, err
	}
	defer l.root.Close()
	var out *cacheWriter
	if l.opt.Cache != "" {
		f, reader, err := openCache(l.opt.Cache)
		if err != nil {
			l.opt.Log.Warn("cannot use the hash cache: every file is read", "cache", l.opt.Cache, "err", err)
		}
		if f != nil {
			defer f.Close()
		}
		l.cache.cache = reader
		l.cache.advance()
		if out, err = newCache(l.opt.Cache); err != nil {
			return result, fmt.Errorf("write hash cache: %w", err)
		}
		defer out.discard()
	}

	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		defer close(l.jobs)
		defer close(l.items)
		d, err := openFolder(unix.AT_FDCWD, root)
		if err != nil {
			return &fs.PathError{Op: "open", Path: root, Err: err}
		}
		return l.walk(ctx, d, "")
	})
	for range workers {
		group.Go(func() error {
			buf := make([]byte, hashBuffer)
			for i := range l.jobs {
				l.hash(ctx, i, buf)
				close(i.done)
			}
			return nil
		})
	}
	m := manifest.NewWriter(w)
	group.Go(func() error { return l.write(ctx, m, out, &result) })
	err = group.Wait()
	if err == nil {
		result.Summary, err = m.Close()
	}
	if err == nil && l.wrong.Count > 0 {
		err = &l.wrong
	}
	result.Skipped = l.skip
	if out == nil {
		return result, err
	}
	// A listing that was cut keeps what it has hashed, and what it did not reach.
	for i := range l.items {
		switch {
		case i.cached || i.done != nil && i.err == nil && !i.gone && !i.racy && i.wrong == nil:
			out.add(i.record())
		case i.known != nil && i.err != nil:
			out.add(*i.known)
		}
	}
	for l.cache.valid && (out.last == "" || manifest.ComparePaths(out.last, l.cache.head.path) < 0) {
		if err != nil {
			out.add(l.cache.head)
		}
		l.cache.advance()
	}
	if l.cache.err != nil {
		l.opt.Log.Warn("hash cache", "cache", l.opt.Cache, "err", l.cache.err)
	}
	return result, errors.Join(err, out.commit())
}

// write takes the items in order.
func (l *lister) write(ctx context.Context, m *manifest.Writer, out *cacheWriter, result *Result) error {
	for i := range l.items {
		if i.done != nil {
			select {
			case <-i.done:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			if i.err != nil {
				if out != nil && i.known != nil {
					out.add(*i.known) // or the next listing would take it for a new file
				}
				return i.err
			}
			if i.gone {
				continue
			}
			result.Hashed++
			result.HashedBytes += i.entry.Size
			if i.wrong != nil {
				l.wrong.add(i)
			}
		}
		if err := m.Add(i.entry); err != nil {
			if errors.Is(err, manifest.ErrPath) {
				err = hint.Because(err, "rename it, or leave it out")
			}
			return err
		}
		if out != nil && i.entry.Kind == manifest.File && !i.racy && i.wrong == nil {
			out.add(i.record())
		}
	}
	return ctx.Err()
}

func (e *WrongError) add(i *item) {
	e.Count++
	if len(e.First) < maxWrong {
		e.First = append(e.First, Wrong{i.entry.Path, i.entry.Sum, i.wrong})
	}
}

func openFolder(at int, name string) (*os.File, error) {
	fd, err := unix.Openat(at, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// walk lists the open folder d, whose path below the root is prefix with a slash
// at its end, or "". It opens every folder below from its parent: no symbolic link
// that somebody puts in its place leads out.
func (l *lister) walk(ctx context.Context, d *os.File, prefix string) error {
	names, err := d.Readdirnames(-1)
	defer d.Close()
	if err != nil {
		return &fs.PathError{Op: "read", Path: prefix, Err: err}
	}
	if l.opt.Include != nil {
		names = slices.DeleteFunc(names, func(name string) bool { return !l.opt.Include(prefix + name) })
	}
	slices.Sort(names)
	var stats []statResult
	for i, name := range names {
		if err := ctx.Err(); err != nil {
			return err
		}
		if i%statAhead == 0 {
			stats = statAll(int(d.Fd()), names[i:min(i+statAhead, len(names))], stats)
		}
		path, st := prefix+name, stats[i%statAhead].Stat_t
		if err := stats[i%statAhead].err; err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			return &fs.PathError{Op: "stat", Path: path, Err: err}
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			sub, err := openFolder(int(d.Fd()), name)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return &fs.PathError{Op: "open", Path: path, Err: err}
			}
			folder := &item{entry: manifest.Entry{Path: path, Kind: manifest.Folder, Mode: uint32(st.Mode) & manifest.MaxMode, MTime: st.Mtim.Nano()}}
			if err := l.emit(ctx, folder); err != nil {
				sub.Close()
				return err
			}
			if err := l.walk(ctx, sub, path+"/"); err != nil {
				return err
			}
		case unix.S_IFREG:
			if err := l.file(ctx, path, &st); err != nil {
				return err
			}
		default:
			l.skip.Count++
			if l.skip.Count == 1 {
				l.skip.First, l.skip.Kind = path, kindOf(st.Mode)
			}
		}
	}
	return nil
}

// statResult is what the file system says of a name, or why not.
type statResult struct {
	unix.Stat_t
	err error
}

// statAll looks at names in the folder at, several at the same time: it is what an
// unchanged folder costs, and a disk serves many such requests better than one by
// one. It returns the results in into's memory.
func statAll(at int, names []string, into []statResult) []statResult {
	into = slices.Grow(into[:0], len(names))[:len(names)]
	look := func(from, to int) {
		for i := from; i < to; i++ {
			into[i].err = unix.Fstatat(at, names[i], &into[i].Stat_t, unix.AT_SYMLINK_NOFOLLOW)
		}
	}
	const share = statAhead / statWorkers
	var all sync.WaitGroup
	for from := share; from < len(names); from += share {
		all.Go(func() { look(from, min(from+share, len(names))) })
	}
	look(0, min(share, len(names)))
	all.Wait()
	return into
}

func kindOf(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFLNK:
		return "symbolic link"
	case unix.S_IFSOCK:
		return "socket"
	case unix.S_IFIFO:
		return "pipe"
	default:
		return "device"
	}
}

func days(t time.Time) int64 { return t.Unix() / (24 * 3600) }

// due reports whether a file that is as the cache says is to be read all the same:
// at the latest after Reread, half of that at the earliest, and on which day in
// between depends on its name, so that each day has its share.
func (l *lister) due(known *record) bool {
	if l.opt.Reread <= 0 {
		return false
	}
	span := int64(l.opt.Reread / (24 * time.Hour))
	h := fnv.New64a()
	io.WriteString(h, known.path)
	age := l.today - known.read
	return age < 0 || age >= span-int64(h.Sum64()%uint64(span/2+1))
}

func (i *item) record() record { return record{i.entry.Path, i.id, i.entry.Sum, i.read} }

func identityOf(st *unix.Stat_t) identity {
	return identity{st.Size, st.Mtim.Nano(), st.Ctim.Nano(), st.Ino}
}

func (i *item) from(st *unix.Stat_t) {
	i.id = identityOf(st)
	i.entry.Mode, i.entry.MTime, i.entry.Size = uint32(st.Mode)&manifest.MaxMode, i.id.mtime, i.id.size
}

func (l *lister) file(ctx context.Context, path string, st *unix.Stat_t) error {
	i := &item{entry: manifest.Entry{Path: path, Kind: manifest.File}}
	i.from(st)
	if known, ok := l.cache.find(path); ok {
		now := i.id
		if l.opt.Was != nil && known.ctime != now.ctime {
			if was := l.opt.Was(path); was != 0 {
				now.ctime = was
			}
		}
		if known.identity == now {
			i.entry.Sum, i.cached, i.read = known.sum, true, known.read
			if l.due(&known) {
				i.cached, i.known = false, &known
			}
		}
	}
	if !i.cached {
		i.done = make(chan struct{})
		l.jobs <- i // the workers take jobs to the end, even when all is cancelled
	}
	return l.emit(ctx, i)
}

// emit hands an item to the manifest, unless that has failed.
func (l *lister) emit(ctx context.Context, i *item) error {
	select {
	case l.items <- i:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// hash reads the file until it finds the same file before and after.
func (l *lister) hash(ctx context.Context, i *item, buf []byte) {
	for range attempts {
		begun := time.Now()
		before, after, err := l.hashOnce(ctx, i, buf)
		if err != nil {
			i.gone = errors.Is(err, fs.ErrNotExist)
			i.err = err
			if i.gone {
				i.err = nil
			}
			return
		}
		if identityOf(before) == identityOf(after) {
			if i.known != nil && i.wrong == nil && i.id == identityOf(after) && i.entry.Sum != i.known.sum {
				i.err = hint.Because(fmt.Errorf("read %s: %w", i.entry.Path, ErrRotten),
					"check the disk (smartctl -a) and the file: restore it from a generation, or touch it if it is meant to be so")
				return
			}
			i.from(after)
			i.read = l.today
			i.racy = i.id.mtime > begun.Add(-tick).UnixNano()
			return
		}
	}
	i.err = hint.Because(fmt.Errorf("read %s: %w", i.entry.Path, ErrChanging), "push when nothing writes to it, or from a snapshot")
}

func (l *lister) hashOnce(ctx context.Context, i *item, buf []byte) (before, after *unix.Stat_t, err error) {
	// O_NONBLOCK: should a pipe have taken the file's place, do not wait for its writer.
	f, err := l.root.OpenFile(i.entry.Path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	before, after = &unix.Stat_t{}, &unix.Stat_t{}
	if err := unix.Fstat(int(f.Fd()), before); err != nil {
		return nil, nil, err
	}
	if before.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, nil, fmt.Errorf("read %s: %w", i.entry.Path, ErrChanging)
	}
	h := manifest.NewHash()
	var check Check
	if l.opt.Check != nil {
		check = l.opt.Check(i.entry.Path)
	}
	// No more than was there at first, and one byte to see that it grew: somebody
	// may append faster than we read.
	in := io.LimitReader(f, before.Size+1)
	for {
		if err := ctx.Err(); err != nil {
			return nil, nil, err
		}
		n, err := in.Read(buf)
		h.Write(buf[:n])
		if check != nil {
			check.Write(buf[:n])
		}
		if l.opt.Read != nil && n > 0 {
			l.opt.Read(n)
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, nil, err
		}
	}
	if err := unix.Fstat(int(f.Fd()), after); err != nil {
		return nil, nil, err
	}
	i.entry.Sum = manifest.SumOf(h)
	if i.wrong = nil; check != nil {
		i.wrong = check.Err()
	}
	return before, after, nil
}
