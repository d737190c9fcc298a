package restore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"

	"farkeep/pusher/readback"
	"farkeep/pusher/target"
	"farkeep/shared/beneath"
	"farkeep/shared/manifest"
)

const (
	// filesAtOnce hides the round trips that each small file costs.
	filesAtOnce = 24
	// Of files larger than large, few at once: the disk at the other end has one arm.
	large       = 2 << 20
	largeAtOnce = 2
	// A file is asked for in chunks, of which ahead are on their way: together as
	// much as an SSH channel holds. inFlight bounds those of all files, in bytes.
	chunkSize = 512 << 10
	ahead     = 4
	inFlight  = 8 << 20
)

// partName is the name of a file that is not complete.
func partName(index int64) string { return strconv.FormatInt(index, 10) }

// content makes every folder and file, as far as the run has not done so.
func (r *run) content(ctx context.Context, tree readback.Tree, list *os.File) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(filesAtOnce)
	f := &fetcher{
		tree: tree, flying: semaphore.NewWeighted(inFlight),
		buffers: sync.Pool{New: func() any { b := make([]byte, chunkSize); return &b }},
		arrived: func(n int64) {
			if r.Lane != nil {
				r.Lane.Add(n)
			}
			select {
			case r.moved <- struct{}{}:
			default:
			}
		},
	}
	arms := make(chan struct{}, largeAtOnce)
	err := r.each(list, func(index int64, e manifest.Entry) error {
		if e.Kind == manifest.Folder {
			return r.folder(e)
		}
		if r.done.has(index) {
			return ctx.Err()
		}
		leave := func() {}
		if e.Size > large {
			select {
			case arms <- struct{}{}:
				leave = func() { <-arms }
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		group.Go(func() error {
			defer leave()
			return r.file(ctx, f, index, e)
		})
		return ctx.Err()
	})
	// An error of the group cancelled ctx and so ended the walk as well.
	if err := group.Wait(); err != nil {
		return err
	}
	return err
}

// folder makes a folder in which the run may write, whatever its mode shall be.
func (r *run) folder(e manifest.Entry) error {
	parent, name, err := r.parent(e.Path)
	if err != nil {
		return err
	}
	defer r.leave(parent)
	sub, made, err := parent.MakeDir(name, 0o700)
	if err != nil {
		return err
	}
	sub.Close()
	if made {
		return nil
	}
	return parent.Chmod(name, 0o700)
}

// file brings one file to its place.
func (r *run) file(ctx context.Context, f *fetcher, index int64, e manifest.Entry) error {
	parent, name, err := r.parent(e.Path)
	if err != nil {
		return err
	}
	defer r.leave(parent)
	kept, err := r.there(ctx, f, parent, name, e)
	if err != nil {
		return err
	}
	if !kept {
		err := r.fetch(ctx, f, parent, name, index, e)
		var bad *badError
		if errors.As(err, &bad) {
			r.report.bad(e.Path, bad.err)
			r.Log.Error("not restored", "path", e.Path, "err", bad.err)
			r.done.add(index)
			return nil
		}
		if err != nil {
			return err
		}
	}
	r.report.good(e.Size, kept)
	r.done.add(index)
	return nil
}

// there reports whether the file is in its place, with the right content.
func (r *run) there(ctx context.Context, f *fetcher, parent *beneath.Dir, name string, e manifest.Entry) (bool, error) {
	file, st, err := parent.Open(name)
	if err != nil || st.Size != e.Size {
		if err == nil {
			file.Close()
		}
		return false, nil // whatever it is, fetch replaces it, or says why it cannot
	}
	defer file.Close()
	h, count := manifest.NewHash(), &tally{f: f}
	if err := f.copy(ctx, h, file, e.Size, count); err != nil {
		return false, err
	}
	if manifest.SumOf(h) != e.Sum {
		count.undo()
		return false, nil
	}
	return true, dress(parent, name, e)
}

// dress gives a file its mode and time. The bits that lend a program its owner's
// rights are not restored: no list from elsewhere shall plant one.
func dress(d *beneath.Dir, name string, e manifest.Entry) error {
	at := unix.NsecToTimespec(e.MTime)
	return errors.Join(d.SetTimes(name, at, at), d.Chmod(name, e.Mode&^(unix.S_ISUID|unix.S_ISGID)))
}

// badError is about one file of the generation; the rest can go on.
type badError struct{ err error }

func (b *badError) Error() string { return b.err.Error() }
func (b *badError) Unwrap() error { return b.err }

// fetch completes the file at index and gives it its name.
func (r *run) fetch(ctx context.Context, f *fetcher, parent *beneath.Dir, name string, index int64, e manifest.Entry) error {
	part, st, err := r.state.OpenWrite(partName(index), unix.O_CREAT, 0o600)
	if err != nil {
		return err
	}
	defer part.Close()
	have := st.Size
	if have > e.Size {
		have = 0
	}
	count := &tally{f: f}
	for {
		if err := part.Truncate(have); err != nil {
			return err
		}
		h := manifest.NewHash()
		err := f.copy(ctx, h, io.NewSectionReader(part, 0, have), have, count)
		if err == nil {
			err = f.fetch(ctx, e.Path, io.MultiWriter(h, io.NewOffsetWriter(part, have)), have, e.Size, count)
		}
		if err != nil {
			count.undo()
			return err
		}
		sum := manifest.SumOf(h)
		if sum == e.Sum {
			break
		}
		count.undo()
		if have > 0 { // a power cut may have left what was never written
			have = 0
			continue
		}
		if err := r.state.Remove(partName(index)); err != nil {
			return err
		}
		return &badError{fmt.Errorf("%s sent other bytes than those that were pushed: their hash is %v instead of %v", r.Source.Name(), sum, e.Sum)}
	}
	if err := dress(r.state, partName(index), e); err != nil {
		return err
	}
	return r.state.Rename(partName(index), parent, name)
}

// fetcher reads files of a tree.
type fetcher struct {
	tree    readback.Tree
	flying  *semaphore.Weighted
	buffers sync.Pool
	arrived func(n int64) // may be negative: what was counted was for nothing
}

// tally counts what one file brings to the whole.
type tally struct {
	f *fetcher
	n int64
}

func (t *tally) add(n int) {
	t.n += int64(n)
	t.f.arrived(int64(n))
}

func (t *tally) undo() {
	t.f.arrived(-t.n)
	t.n = 0
}

// copy hashes n bytes that are there already.
func (f *fetcher) copy(ctx context.Context, to io.Writer, from io.Reader, n int64, count *tally) error {
	buf := f.buffers.Get().(*[]byte)
	defer f.buffers.Put(buf)
	for n > 0 {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		b := (*buf)[:min(n, chunkSize)]
		if _, err := io.ReadFull(from, b); err != nil {
			return err
		}
		to.Write(b)
		count.add(len(b))
		n -= int64(len(b))
	}
	return nil
}

type chunk struct {
	buf  *[]byte
	n    int
	err  error
	done chan struct{}
}

// fetch writes the bytes of a file from offset off to size to w, in order, while
// it asks for those that follow.
func (f *fetcher) fetch(ctx context.Context, path string, w io.Writer, off, size int64, count *tally) (err error) {
	if off == size {
		return nil
	}
	file, err := f.tree.File(path)
	if err != nil {
		return ofFile(ctx, err)
	}
	defer file.Close()
	var queue []*chunk
	free := func(c *chunk) {
		f.buffers.Put(c.buf)
		f.flying.Release(int64(c.n))
	}
	defer func() {
		for _, c := range queue {
			<-c.done
			free(c)
		}
	}()
	asked := off
	for off < size {
		for asked < size && len(queue) < ahead {
			n := min(size-asked, chunkSize)
			// Whoever holds a chunk never waits for another: all would, for each other.
			if !f.flying.TryAcquire(n) {
				if len(queue) > 0 {
					break
				}
				if err := f.flying.Acquire(ctx, n); err != nil {
					return err
				}
			}
			c := &chunk{buf: f.buffers.Get().(*[]byte), n: int(n), done: make(chan struct{})}
			queue = append(queue, c)
			go func(at int64) {
				defer close(c.done)
				got, err := file.ReadAt((*c.buf)[:c.n], at)
				switch {
				case got == c.n:
				case errors.Is(err, io.EOF):
					c.err = &badError{fmt.Errorf("it ends after %d of %d bytes", at+int64(got), size)}
				case err == nil:
					c.err = &badError{io.ErrNoProgress}
				default:
					c.err = ofFile(ctx, err)
				}
			}(asked)
			asked += n
		}
		c := queue[0]
		<-c.done
		if c.err != nil {
			return c.err
		}
		queue = queue[1:]
		_, err := w.Write((*c.buf)[:c.n])
		free(c)
		if err != nil {
			return err
		}
		off += int64(c.n)
		count.add(c.n)
	}
	return nil
}

// ofFile makes an error of a tree that is about one file a badError.
func ofFile(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if target.Temporary(err) {
		return err
	}
	return &badError{err}
}

// indexes is a set of manifest indexes.
type indexes struct{ words []atomic.Uint64 }

func newIndexes(n int64) *indexes { return &indexes{make([]atomic.Uint64, (n+63)/64)} }

func (s *indexes) has(i int64) bool { return s.words[i/64].Load()>>(i%64)&1 == 1 }

func (s *indexes) add(i int64) { s.words[i/64].Or(1 << (i % 64)) }

// shared is a Report that several goroutines write.
type shared struct {
	mu sync.Mutex
	Report
}

func (s *shared) get() Report {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.Report
}

func (s *shared) good(size int64, kept bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.Files++
	s.Bytes += size
	if kept {
		s.Kept += size
	}
}

func (s *shared) bad(path string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.Bad++
	if len(s.Problems) < MaxBad {
		s.Problems = append(s.Problems, Problem{path, err})
	}
}
