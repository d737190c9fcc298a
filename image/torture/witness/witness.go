// Package witness remembers from outside what committed generations are, and
// finds every difference later.
//
// It looks at the folder generations/ of a disk as a stranger would, with
// nothing of Farkeep's own code: every name below a generation, its kind, mode,
// owner, size and time, and the SHA-256 of every byte. An inode is read once
// however many generations link to it. Names that were added count as much as
// names that are gone. What it cannot see is what a cache hides from all
// readers; after a power cut the caller hands it the disk itself.
package witness

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Entry is one name of a generation.
type Entry struct {
	Mode fs.FileMode
	UID  uint32
	Size int64
	Time int64 // modification, ns; 0 for folders, which a heal may touch
	Sum  [sha256.Size]byte
	Link string // target, of a symbolic link: there should be none
}

// Generation is everything below a generation's folder, by path.
type Generation map[string]Entry

// ID names a generation: "repository/name".
type ID string

// Repository is the repository's part of the name.
func (id ID) Repository() string {
	repository, _, _ := strings.Cut(string(id), "/")
	return repository
}

// Name is the generation's part of the name.
func (id ID) Name() string {
	_, name, _ := strings.Cut(string(id), "/")
	return name
}

// Witness remembers generations. Its methods may be called from several
// goroutines.
type Witness struct {
	// MayGo says whether a generation that is gone was allowed to go, all those
	// that were there at the last look or at this one being given; nil: none may.
	MayGo func(gone ID, there []ID) error

	mu    sync.Mutex // guards the fields below
	known map[ID]Generation
	gone  int
	read  int64
}

// Figures is what a witness has seen so far.
type Figures struct {
	Generations int   // remembered
	Gone        int   // that were allowed to go
	Bytes       int64 // read from disks
}

// Figures returns them.
func (w *Witness) Figures() Figures {
	w.mu.Lock()
	defer w.mu.Unlock()
	return Figures{Generations: len(w.known), Gone: w.gone, Bytes: w.read}
}

// Known returns what is remembered of a generation.
func (w *Witness) Known(id ID) (Generation, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	g, ok := w.known[id]
	return g, ok
}

// IDs returns the generations that are remembered, sorted.
func (w *Witness) IDs() []ID {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Sorted(maps.Keys(w.known))
}

// Look reads every generation below root, which is the folder "generations" of a
// disk, compares those that are remembered, and remembers the others. A
// generation that expires while it is read is not a difference if it may go.
// The error holds every difference.
func (w *Witness) Look(ctx context.Context, root string) error {
	names, err := List(root)
	if err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.known == nil {
		w.known = map[ID]Generation{}
	}
	before := slices.Sorted(maps.Keys(w.known))
	sums := map[inode][sha256.Size]byte{}
	var differences []error
	for _, id := range names {
		now, err := w.read1(ctx, filepath.Join(root, string(id)), sums)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if _, still := os.Lstat(filepath.Join(root, string(id))); still != nil {
			// One rename took it away while it was read.
			names = slices.DeleteFunc(slices.Clone(names), func(n ID) bool { return n == id })
			continue
		}
		if err != nil {
			differences = append(differences, fmt.Errorf("%s: %w", id, err))
			continue
		}
		old, ok := w.known[id]
		if !ok {
			w.known[id] = now
			continue
		}
		if err := Compare(old, now); err != nil {
			differences = append(differences, fmt.Errorf("%s: %w", id, err))
		}
	}
	gone := slices.DeleteFunc(before, func(id ID) bool { return slices.Contains(names, id) })
	if len(gone) == 0 {
		return errors.Join(differences...)
	}
	// What goes while this looks may make room for what came while this looked.
	later, err := List(root)
	if err != nil {
		return errors.Join(append(differences, err)...)
	}
	all := union(union(gone, names), later)
	for _, id := range gone {
		err := errors.New("nothing may go")
		if w.MayGo != nil {
			err = w.MayGo(id, all)
		}
		if err != nil {
			differences = append(differences, fmt.Errorf("%s is gone: %w", id, err))
			continue
		}
		delete(w.known, id)
		w.gone++
	}
	return errors.Join(differences...)
}

// Forget drops what is remembered of a generation, whose change was meant.
func (w *Witness) Forget(id ID) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.known, id)
}

func union(a, b []ID) []ID {
	all := slices.Concat(a, b)
	slices.Sort(all)
	return slices.Compact(all)
}

// List names the generations below root, sorted. Names that begin with a dot
// are the store's own.
func List(root string) ([]ID, error) {
	var all []ID
	repositories, err := os.ReadDir(root)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for _, r := range repositories {
		if !r.IsDir() || strings.HasPrefix(r.Name(), ".") {
			continue
		}
		names, err := os.ReadDir(filepath.Join(root, r.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, n := range names {
			if !strings.HasPrefix(n.Name(), ".") {
				all = append(all, ID(r.Name()+"/"+n.Name()))
			}
		}
	}
	slices.Sort(all)
	return all, nil
}

// Read reads one generation's folder.
func Read(ctx context.Context, folder string) (Generation, error) {
	var w Witness
	return w.read1(ctx, folder, map[inode][sha256.Size]byte{})
}

type inode struct {
	dev, ino uint64
}

func (w *Witness) read1(ctx context.Context, folder string, sums map[inode][sha256.Size]byte) (Generation, error) {
	g := Generation{}
	err := filepath.WalkDir(folder, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		st, ok := info.Sys().(*syscall.Stat_t)
		if !ok {
			return fmt.Errorf("%s: no stat", path)
		}
		name, err := filepath.Rel(folder, path)
		if err != nil {
			return err
		}
		e := Entry{Mode: info.Mode(), UID: st.Uid}
		switch {
		case info.Mode().IsRegular():
			e.Size, e.Time = info.Size(), info.ModTime().UnixNano()
			id := inode{st.Dev, st.Ino}
			sum, ok := sums[id]
			if !ok {
				if sum, err = w.sum(path); err != nil {
					return err
				}
				sums[id] = sum
			}
			e.Sum = sum
		case info.Mode()&fs.ModeSymlink != 0:
			if e.Link, err = os.Readlink(path); err != nil {
				return err
			}
		}
		g[name] = e
		return nil
	})
	return g, err
}

func (w *Witness) sum(path string) (sum [sha256.Size]byte, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return sum, err
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.Copy(h, f)
	w.read += n
	if err != nil {
		return sum, fmt.Errorf("read %s: %w", path, err)
	}
	h.Sum(sum[:0])
	return sum, nil
}

// Compare says in which names two generations differ: the first eight.
func Compare(old, now Generation) error {
	var all []error
	for _, name := range slices.Sorted(maps.Keys(old)) {
		is, ok := now[name]
		switch was := old[name]; {
		case !ok:
			all = append(all, fmt.Errorf("%q is gone", name))
		case is.Sum != was.Sum || is.Size != was.Size:
			all = append(all, fmt.Errorf("%q has other bytes (%d, were %d)", name, is.Size, was.Size))
		case is != was:
			all = append(all, fmt.Errorf("%q is %+v, was %+v", name, is, was))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(now)) {
		if _, ok := old[name]; !ok {
			all = append(all, fmt.Errorf("%q was added", name))
		}
	}
	const most = 8
	if len(all) > most {
		all = append(all[:most], fmt.Errorf("and %d more", len(all)-most))
	}
	return errors.Join(all...)
}

// Outside is what lies on a disk besides its generations, in bytes, by the first
// name below root: what may grow without anybody noticing. Files that a
// generation has too (a link is the same inode) are not counted.
func Outside(root string) (map[string]int64, error) {
	kept := map[inode]bool{}
	out := map[string]int64{}
	walk := func(dir string, f func(inode, int64)) error {
		err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil // it went while it was looked at
			}
			if err != nil {
				return err
			}
			info, err := d.Info()
			if err != nil || !info.Mode().IsRegular() {
				return nil
			}
			if st, ok := info.Sys().(*syscall.Stat_t); ok {
				f(inode{st.Dev, st.Ino}, st.Blocks*512)
			}
			return nil
		})
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	if err := walk(filepath.Join(root, "generations"), func(i inode, _ int64) { kept[i] = true }); err != nil {
		return nil, err
	}
	top, err := os.ReadDir(root)
	if err != nil {
		return nil, err
	}
	seen := map[inode]bool{}
	for _, d := range top {
		if d.Name() == "generations" || d.Name() == "lost+found" {
			continue
		}
		if err := walk(filepath.Join(root, d.Name()), func(i inode, n int64) {
			if !kept[i] && !seen[i] {
				seen[i] = true
				out[d.Name()] += n
			}
		}); err != nil {
			return nil, err
		}
	}
	return out, nil
}
