package staging

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"path"
	"strings"
	"sync"
	"time"

	"farkeep/shared/beneath"
	"farkeep/shared/generations"
	"farkeep/shared/manifest"

	"golang.org/x/sys/unix"
)

// The names in the folder of a copy.
const (
	filesFolder = "files"
	newFolder   = "files.new"
	workFolder  = "work"
	baseFile    = "base"
	listFile    = "MANIFEST"
	newList     = "MANIFEST.new"
)

// tree is one staging copy.
//
//	        Freeze, when nobody writes
//	open ─────────────────────────────▶ committing
//	  ▲  changes, write handles              │  reads only
//	  └──────────────────────────────────────┘  Release
type tree struct {
	area *Area
	treeID

	opening sync.Mutex // guards users and the folders; held while the copy is made
	users   int
	home    *beneath.Dir // open while there are users
	files   *beneath.Dir

	// names is held by whoever changes names, attributes or links, so that what was
	// looked at is still so when it is changed.
	names sync.Mutex

	mu         sync.Mutex // guards the fields below
	committing bool
	writers    int                    // open write handles
	nodes      map[uint64]*node       // what they write to, by inode
	changed    map[*Session]time.Time // by sessions that are there, when last
	failed     error                  // of a sync: what the disk has is not known
	free       chan struct{}          // closed and made anew whenever a writer or a session goes
	known      bool                   // entries and bytes were counted
	entries    int64
	bytes      int64 // of files that have no other name
	allowance  int64 // bytes that were found to fit, and are not used yet
	temps      int64
}

// node is a file that somebody writes to.
type node struct {
	refs int // guarded by the tree's mu
	gone bool

	mu   sync.Mutex
	size int64
}

func (t *tree) enter(ctx context.Context, begin bool) error {
	t.opening.Lock()
	defer t.opening.Unlock()
	if t.users == 0 {
		if err := t.open(ctx, begin); err != nil {
			t.close()
			return err
		}
	}
	t.users++
	return nil
}

func (t *tree) leave() {
	t.opening.Lock()
	defer t.opening.Unlock()
	t.users--
	if t.users == 0 {
		// The kernel tells of a write that failed only those who had the disk open.
		t.sync()
		t.close()
	}
}

func (t *tree) close() {
	t.files.Close()
	t.home.Close()
	t.files, t.home = nil, nil
}

func (t *tree) open(ctx context.Context, begin bool) (err error) {
	top, err := t.area.open(begin)
	if err != nil {
		return err
	}
	defer top.Close()
	if begin {
		repository, made, err := top.MakeDir(t.repository, 0o700)
		if err != nil {
			return err
		}
		defer repository.Close()
		if made {
			// A key that may use every name must not fill the disk with names.
			if err := room(top); err != nil {
				return errors.Join(err, top.RemoveDir(t.repository))
			}
		}
		if t.home, _, err = repository.MakeDir(t.key, 0o700); err != nil {
			return err
		}
	} else if t.home, err = top.Dir(t.repository + "/" + t.key); err != nil {
		return err
	}
	if _, err := t.home.Stat(filesFolder); errors.Is(err, fs.ErrNotExist) {
		if !begin {
			return fmt.Errorf("%s: %w", t.repository, errNoCopy)
		}
		if err := t.begin(ctx); err != nil {
			return fmt.Errorf("make a staging copy of %s: %w", t.repository, err)
		}
	}
	// What lies there was on its way when the power went.
	if err := t.home.RemoveAll(workFolder); err != nil {
		return err
	}
	t.files, err = t.home.Dir(filesFolder)
	return err
}

// room refuses one repository too many in staging/.
func room(top *beneath.Dir) error {
	n := 0
	if err := top.Each(func(fs.DirEntry) error { n++; return nil }); err != nil {
		return err
	}
	if n > MaxCopies {
		return refuse("there are staging copies of %d repositories already, which is the most", MaxCopies)
	}
	return nil
}

// begin makes the copy: a hard link of every file of the current generation, in
// the order of its manifest, with the memory of one entry. A link is a name in a
// folder and nothing else, some microseconds each. If it is cut, the next attempt
// goes on with what is there, unless the current generation is another one by then.
func (t *tree) begin(ctx context.Context) error {
	current, err := t.area.store.Current(ctx, t.repository)
	if err != nil && !errors.Is(err, generations.ErrNone) {
		return err
	}
	begun, err := t.home.ReadFile(baseFile, 256)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if string(begun) != current.Name || err != nil {
		if err := t.home.RemoveAll(newFolder); err != nil {
			return err
		}
		if err := t.home.WriteFile(baseFile, []byte(current.Name), 0o600, nil); err != nil {
			return err
		}
	}
	start := time.Now()
	files, _, err := t.home.MakeDir(newFolder, 0o700)
	if err != nil {
		return err
	}
	defer files.Close()
	var entries int64
	if current.Name != "" {
		if entries, err = t.link(ctx, current, files); err != nil {
			return err
		}
	}
	if err := t.home.RenameNew(newFolder, t.home, filesFolder); err != nil {
		return err
	}
	t.area.log.Info("a staging copy begins", "repository", t.repository, "key", t.key, "base", current.Name, "entries", entries, "seconds", time.Since(start).Seconds())
	t.mu.Lock()
	defer t.mu.Unlock()
	t.known, t.entries, t.bytes = true, entries, 0
	return nil
}

func (t *tree) link(ctx context.Context, base generations.Generation, to *beneath.Dir) (int64, error) {
	from, err := t.area.store.Tree(base)
	if err != nil {
		return 0, err
	}
	defer from.Close()
	list, closing, err := from.List()
	if err != nil {
		return 0, err
	}
	defer closing()
	source, target := folders{root: from.Files}, folders{root: to}
	defer source.close()
	defer target.close()
	for {
		e, err := list.Next()
		if errors.Is(err, io.EOF) {
			return list.Summary().Entries, nil
		}
		if err != nil {
			return 0, err
		}
		if list.Index()%512 == 0 && ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		parent, name := split(e.Path)
		dst, err := target.open(parent)
		if err != nil {
			return 0, err
		}
		if e.Kind == manifest.Folder {
			err = dst.Mkdir(name, folderMode(e.Mode))
		} else {
			err = t.linkFile(ctx, &source, dst, parent, name)
		}
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return 0, err
		}
	}
}

func (t *tree) linkFile(ctx context.Context, source *folders, dst *beneath.Dir, parent, name string) error {
	src, err := source.open(parent)
	if err != nil {
		return err
	}
	err = dst.Link(src, name, name)
	if !errors.Is(err, unix.EMLINK) {
		return err
	}
	// The file has as many names as the file system can count.
	st, err := src.Stat(name)
	if err != nil {
		return err
	}
	return t.copyFile(ctx, src, dst, name, &st, st.Size)
}

// copyFile makes to/name a file of its own with the first keep bytes of from/name
// and its time, whatever is called so there now.
func (t *tree) copyFile(ctx context.Context, from, to *beneath.Dir, name string, st *unix.Stat_t, keep int64) error {
	work, _, err := t.home.MakeDir(workFolder, 0o700)
	if err != nil {
		return err
	}
	defer work.Close()
	t.mu.Lock()
	t.temps++
	temp := fmt.Sprintf("%d", t.temps)
	t.mu.Unlock()
	dst, _, err := work.OpenWrite(temp, unix.O_CREAT|unix.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer dst.Close()
	err = func() error {
		if keep > 0 {
			src, _, err := from.Open(name)
			if err != nil {
				return err
			}
			defer src.Close()
			for left := keep; left > 0; {
				// In pieces, so that a disk that is wanted back is not waited for.
				n, err := io.CopyN(dst, src, min(left, copyPiece))
				if err != nil {
					return err
				}
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
				left -= n
			}
		}
		if err := dst.Chmod(fs.FileMode(shownMode(st))); err != nil {
			return err
		}
		if err := work.SetTimes(temp, st.Atim, st.Mtim); err != nil {
			return err
		}
		return work.Rename(temp, to, name)
	}()
	if err != nil {
		return errors.Join(err, work.RemoveAll(temp))
	}
	return nil
}

const copyPiece = 8 << 20

// folders opens folders by their path and keeps the last one open: lists come
// sorted by folder.
type folders struct {
	root *beneath.Dir
	path string
	dir  *beneath.Dir
}

func (f *folders) open(path string) (*beneath.Dir, error) {
	if path == "" {
		return f.root, nil
	}
	if f.dir != nil && f.path == path {
		return f.dir, nil
	}
	f.close()
	dir, err := f.root.Dir(path)
	if err != nil {
		return nil, err
	}
	f.path, f.dir = path, dir
	return dir, nil
}

func (f *folders) close() {
	if f.dir != nil {
		f.dir.Close()
		f.dir = nil
	}
}

func split(p string) (parent, name string) {
	i := strings.LastIndexByte(p, '/')
	if i < 0 {
		return "", p
	}
	return p[:i], p[i+1:]
}

// shared says whether a file has a second name: then it may be part of history,
// and nobody may write to it.
func shared(st *unix.Stat_t) bool { return st.Nlink > 1 }

// shownMode is the mode that a file has for the peer. On the disk, committed
// files are read-only; for the peer they are what they would be after a write.
func shownMode(st *unix.Stat_t) uint32 {
	mode := uint32(st.Mode) & 0o777
	if st.Mode&unix.S_IFMT == unix.S_IFREG && (shared(st) || readOnly(st)) {
		mode = 0o644 | mode&0o111
	}
	return mode
}

// readOnly says whether a file has the mode that commits give. A file of the
// copy's own has it after a commit that was killed, or when the generations that
// shared it have expired.
func readOnly(st *unix.Stat_t) bool {
	return st.Mode&unix.S_IFMT == unix.S_IFREG && st.Mode&0o666 == 0o444
}

// folderMode is the mode of a folder on the disk: the keeper must get in.
func folderMode(mode uint32) uint32 { return mode&0o777 | 0o700 }

// count finds out how much there is, once. What is counted later is kept up to
// date.
func (t *tree) count(ctx context.Context) error {
	// Whoever holds names of one copy and counts all of a key's does not wait here for
	// another who does: both have counted their own.
	t.mu.Lock()
	known := t.known
	t.mu.Unlock()
	if known {
		return nil
	}
	t.names.Lock()
	defer t.names.Unlock()
	return t.countLocked(ctx)
}

func (t *tree) countLocked(ctx context.Context) error {
	t.mu.Lock()
	known := t.known
	t.mu.Unlock()
	if known {
		return nil
	}
	var entries, bytes int64
	err := each(ctx, t.files, 0, func(_ *beneath.Dir, _ string, st *unix.Stat_t) error {
		entries++
		if st.Mode&unix.S_IFMT == unix.S_IFREG && !shared(st) {
			bytes += st.Size
		}
		return nil
	})
	if err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.known, t.entries, t.bytes = true, entries, bytes
	return nil
}

// each calls f for everything below dir, folders before their content, in no
// order.
func each(ctx context.Context, dir *beneath.Dir, depth int, f func(dir *beneath.Dir, name string, st *unix.Stat_t) error) error {
	if depth > 2*manifest.MaxDepth {
		return refuse("folders more than %d deep", 2*manifest.MaxDepth)
	}
	return dir.Each(func(e fs.DirEntry) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		st, err := dir.Stat(e.Name())
		if err != nil {
			return err
		}
		if err := f(dir, e.Name(), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR {
			return err
		}
		sub, err := dir.Dir(e.Name())
		if err != nil {
			return err
		}
		defer sub.Close()
		return each(ctx, sub, depth+1, f)
	})
}

// held is what the copy holds alone, in bytes, and what it may take without
// asking.
func (t *tree) held() int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.bytes + t.allowance
}

// step is how much a copy may grow between two looks at quota and disk, in bytes.
const step = 8 << 20

// minInodes is what new files must leave.
const minInodes = 1024

// grow asks for n bytes more, n not negative.
func (t *tree) grow(ctx context.Context, p *Peer, n int64) error {
	t.mu.Lock()
	if t.allowance >= n {
		t.allowance -= n
		t.bytes += n
		t.mu.Unlock()
		return nil
	}
	n -= t.allowance // taken below, with the rest
	t.bytes += t.allowance
	taken := t.allowance
	t.allowance = 0
	t.mu.Unlock()
	extra, err := t.fits(ctx, p, n)
	t.mu.Lock()
	defer t.mu.Unlock()
	if err != nil {
		t.bytes -= taken
		return err
	}
	t.bytes += n
	t.allowance += extra
	return nil
}

// fits checks n bytes more against the quota and the disk, and says how much
// would fit besides, step at most.
func (t *tree) fits(ctx context.Context, p *Peer, n int64) (extra int64, err error) {
	room, _, err := t.area.store.Room()
	if err != nil {
		return 0, err
	}
	_, _, total, err := t.area.store.Space()
	if err != nil {
		return 0, err
	}
	// Files with holes take no room now. They could not all be filled.
	if all := t.area.held(""); n > room || n > total-all {
		return 0, refuse("no space left on the appliance's disk: %d bytes are free beside its reserve; nothing is deleted to make room", room)
	}
	slack := room
	if p.Quota > 0 {
		if err := t.area.countAll(ctx, p.Key); err != nil {
			return 0, err
		}
		used, err := t.area.usedBy(ctx, p.Key)
		if err != nil {
			return 0, err
		}
		staged := t.area.held(p.Key)
		if slack = p.Quota - used - staged; n > slack {
			return 0, refuse("disk quota exceeded: key %s may have %d bytes, its generations have %d and its staging copies %d", p.Key, p.Quota, used, staged)
		}
	}
	return min(step, slack-n, room-n), nil
}

// admit asks for one file or folder more. t.names is held.
func (t *tree) admit() error {
	t.mu.Lock()
	entries := t.entries
	t.mu.Unlock()
	if entries >= MaxEntries {
		return refuse("the staging copy has %d files and folders already, which is the most", entries)
	}
	bytes, inodes, err := t.area.store.Room()
	if err != nil {
		return err
	}
	if bytes == 0 || inodes >= 0 && inodes < minInodes {
		return refuse("no space left on the appliance's disk: %d bytes and %d inodes are free beside its reserve; nothing is deleted to make room", bytes, inodes)
	}
	return nil
}

func (t *tree) add(entries int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.entries += entries
}

// drop takes note that a file lost the name that it had here.
func (t *tree) drop(st *unix.Stat_t) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.entries--
	if st.Mode&unix.S_IFMT != unix.S_IFREG || shared(st) {
		return
	}
	if n := t.nodes[st.Ino]; n != nil {
		n.gone = true // it takes its room until it is closed
		return
	}
	t.bytes = max(t.bytes-st.Size, 0)
}

// deepest is how many levels, and bytes of path, lie below a folder.
func deepest(ctx context.Context, dir *beneath.Dir, level int) (levels, length int, err error) {
	if level > manifest.MaxDepth {
		return 0, 0, refuse("folders more than %d deep", manifest.MaxDepth)
	}
	err = dir.Each(func(e fs.DirEntry) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		l, n := 1, 1+len(e.Name())
		if e.IsDir() {
			sub, err := dir.Dir(e.Name())
			if err != nil {
				return err
			}
			defer sub.Close()
			subLevels, subLength, err := deepest(ctx, sub, level+1)
			if err != nil {
				return err
			}
			l, n = l+subLevels, n+subLength
		}
		levels, length = max(levels, l), max(length, n)
		return nil
	})
	return levels, length, err
}

// fitsBelow says whether what lies below a folder can lie below to.
func fitsBelow(to string, levels, length int) error {
	if levels+1+strings.Count(to, "/") > manifest.MaxDepth || len(to)+length > manifest.MaxPath {
		return fmt.Errorf("%w: what lies in %.100q would get too deep", manifest.ErrPath, path.Base(to))
	}
	return nil
}

// validSize refuses what no manifest can hold.
func validSize(n uint64) error {
	if n > manifest.MaxFileSize || n > math.MaxInt64 {
		return refuse("a file of %d bytes: %d are the most", n, int64(manifest.MaxFileSize))
	}
	return nil
}
