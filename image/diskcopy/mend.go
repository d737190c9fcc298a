package diskcopy

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"farkeep/shared/beneath"
	"farkeep/shared/generations"
	"farkeep/shared/manifest"

	"golang.org/x/sys/unix"
)

// maxMissing bounds the contents that other copies are looked for of.
const maxMissing = 1 << 20

// place is a name on the new disk.
type place struct{ repository, generation, path string }

// mend looks through the new disk for what is missing, puts in what another name
// of the same content has, and tells the rest. It asks the disk and not this run:
// an earlier run may have left things out as well.
func (c *copier) mend(repositories []string) error {
	if c.report.Lost == 0 && c.report.Skipped == 0 {
		return nil
	}
	missing := map[manifest.Sum]place{}
	err := c.eachName(repositories, func(n *name) error {
		if !n.there && n.known && len(missing) < maxMissing {
			missing[n.sum] = place{}
		}
		return nil
	})
	if err != nil {
		return err
	}
	if len(missing) > 0 {
		err := c.eachName(repositories, func(n *name) error {
			if p, ok := missing[n.sum]; ok && n.there && n.known && p == (place{}) {
				missing[n.sum] = place{n.repository, n.g.Name, n.path}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	c.report.Lost = c.lists
	return c.eachName(repositories, func(n *name) error {
		if n.there {
			return nil
		}
		if from := missing[n.sum]; from != (place{}) {
			if err := c.fill(n, from); err != nil {
				return err
			}
			c.report.Found++
			return nil
		}
		c.report.Lost++
		l := Loss{Repository: n.repository, Generation: n.g.Name, Path: n.path, What: c.why[n.repository+"/"+n.g.Name+"/"+n.path]}
		if l.What == "" {
			l.What = "it could not be copied"
		}
		if c.Lost != nil {
			c.Lost(l)
		}
		if n.known && len(c.rot) < generations.MaxRot {
			r := generations.Rot{Repository: n.repository, Path: n.path, Sum: n.sum, What: "lost by the disk before: " + l.What, Generations: []string{n.g.Name}, Found: time.Now()}
			c.rot = append(c.rot, r)
		}
		return nil
	})
}

// name is a file that a generation on the new disk should have.
type name struct {
	*work
	item
	there bool
	dir   *beneath.Dir // the folder, nil when that is missing
	base  string
}

// eachName goes through the lists of all generations on the new disk.
func (c *copier) eachName(repositories []string, each func(*name) error) error {
	plain := *c
	plain.Reader = func(f *os.File) io.Reader { return f }
	for _, r := range repositories {
		list, err := c.dst.List(c.ctx, r)
		if err != nil {
			return err
		}
		for i := range list {
			w := &work{copier: &plain, repository: r, g: &list[i]}
			if err := c.eachNameOf(w, each); err != nil {
				return fmt.Errorf("%s, generation %s: %w", r, list[i].Name, err)
			}
		}
	}
	return nil
}

func (c *copier) eachNameOf(w *work, each func(*name) error) error {
	dir, err := c.dst.OpenGeneration(w.repository, w.g.Name)
	if err != nil {
		return err
	}
	defer dir.Close()
	files, err := dir.Dir(generations.FilesFolder)
	if err != nil {
		return err
	}
	w.stack = []level{{dst: files}}
	defer func() {
		for len(w.stack) > 0 {
			w.leave()
		}
	}()
	take := func(i item) error {
		parent, base := split(i.path)
		for w.stack[len(w.stack)-1].path != parent {
			w.leave()
		}
		top := &w.stack[len(w.stack)-1]
		if i.folder {
			next := level{path: i.path}
			if top.dst != nil {
				next.dst, _ = top.dst.Dir(base)
			}
			w.stack = append(w.stack, next)
			return nil
		}
		n := &name{work: w, item: i, dir: top.dst, base: base}
		if top.dst != nil {
			_, err := top.dst.Stat(base)
			n.there = err == nil
		}
		return each(n)
	}
	// Nothing is said by a list before all of it was seen to be right.
	err = w.eachManifest(dir, true, func(item) error { return nil })
	if err == nil {
		return w.eachManifest(dir, false, take)
	}
	var format *manifest.FormatError
	if !errors.As(err, &format) && !errors.Is(err, errDigest) && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	// Its manifest was lost, which was told: the list for people must do.
	key := w.repository + "/" + w.g.Name + "/" + generations.ManifestFile
	if _, ok := c.why[key]; !ok {
		if err := c.lose(err, Loss{Repository: w.repository, Generation: w.g.Name, Path: generations.ManifestFile}); err != nil {
			return err
		}
	}
	_, err = w.eachSum(dir, func(item) error { return nil })
	var damaged *sumsError
	if !errors.As(err, &damaged) {
		return errors.Join(err, second(w.eachSum(dir, take)))
	}
	if _, ok := c.why[w.repository+"/"+w.g.Name+"/"+generations.SumsFile]; ok {
		return nil
	}
	return c.lose(damaged.err, Loss{Repository: w.repository, Generation: w.g.Name, Path: generations.SumsFile})
}

// fill gives n the file that lies at from.
func (c *copier) fill(n *name, from place) error {
	if n.dir == nil {
		return fmt.Errorf("%s: its folder is missing on the new disk", n.path)
	}
	gen, err := c.dst.OpenGeneration(from.repository, from.generation)
	if err != nil {
		return err
	}
	defer gen.Close()
	parent, base := split(from.path)
	folder, err := gen.Dir(generations.FilesFolder)
	if err == nil && parent != "" {
		top := folder
		folder, err = top.Dir(parent)
		top.Close()
	}
	if err != nil {
		return err
	}
	defer folder.Close()
	if err := c.work.RemoveAll(linkName); err != nil {
		return err
	}
	st, err := folder.Stat(base)
	if err != nil {
		return err
	}
	perm := n.perm
	if perm == 0 {
		perm = st.Mode & 0o777
	}
	err = unix.EMLINK
	if st.Mode&0o777 == perm {
		err = c.work.Link(folder, base, linkName)
	}
	if errors.Is(err, unix.EMLINK) {
		err = c.twin(folder, base, st, perm, n.sum)
	}
	if err != nil {
		return err
	}
	return c.work.Rename(linkName, n.dir, n.base) // durable with everything else, in the end
}

// twin makes a copy under linkName, where a link cannot be.
func (c *copier) twin(from *beneath.Dir, base string, st unix.Stat_t, perm uint32, sum manifest.Sum) error {
	src, _, err := from.Open(base)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, _, err := c.work.OpenWrite(linkName, unix.O_CREAT|unix.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer dst.Close()
	if _, err := io.CopyBuffer(onlyWriter{dst}, onlyReader{src}, c.buf); err != nil {
		return err
	}
	st.Mode = st.Mode&^0o777 | perm
	w := &work{copier: c}
	if err := w.seal(dst, st); err != nil {
		return err
	}
	if err := dst.Sync(); err != nil {
		return err
	}
	if _, err := dst.Seek(0, io.SeekStart); err != nil {
		return err
	}
	return generations.ReadSum(c.ctx, dst, st.Size, sum, c.buf)
}

// noteLost tells the new disk what it lacks: the next push brings what home has.
func (c *copier) noteLost() error { return c.dst.NoteRot(c.rot) }
