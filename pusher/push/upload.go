package push

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"farkeep/pusher/base"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"
	"farkeep/shared/recipe"
)

// upload is the recipe stream of the files that a target needs.
type upload struct {
	ctx    context.Context
	dir    *os.Root // where the files are
	list   *list
	set    *manifest.Set // of the manifest's entries: those that are needed
	resume []pushwire.Partial
	plan   *base.Plan // what the target has of them; nil: nothing
	// careful compares every file with its hash in the list as it is read. Without
	// it the target alone does that.
	careful bool
	sent    func(n int64) // new bytes that went out
	spared  func(n int64) // of them, that did not because they were compressed
	copied  func(n int64) // bytes that the target has
	times   *uploading
	pack    bool // compress what it pays for
}

// write writes the stream.
func (u *upload) write(w io.Writer) error {
	kept := map[int64]int64{}
	for _, p := range u.resume {
		kept[p.Index] = p.Have
	}
	defer u.times.c.spend(&u.times.making)()
	enc := recipe.NewEncoder(w)
	if u.pack {
		enc.Pack(u.times.pays)
	}
	defer func() { u.spared(enc.Spared()) }()
	buf := make([]byte, 256<<10)
	err := u.needed(func(index int64, e manifest.Entry) error {
		return u.file(enc, e, index, min(kept[index], e.Size), buf)
	})
	if err != nil {
		return err
	}
	return enc.Close()
}

// needed calls do for each needed file, in the order of the manifest.
func (u *upload) needed(do func(index int64, e manifest.Entry) error) error {
	in, err := u.list.open()
	if err != nil {
		return err
	}
	defer in.Close()
	m := manifest.NewReader(in)
	for left := u.set.Len(); left > 0; {
		e, err := m.Next()
		if errors.Is(err, io.EOF) {
			return errors.New("the target asks for files that were not offered")
		}
		if err != nil {
			return err
		}
		if !u.set.Has(m.Index()) {
			continue
		}
		if e.Kind != manifest.File {
			return fmt.Errorf("the target asks for %q, which is a folder", e.Path)
		}
		left--
		if err := do(m.Index(), e); err != nil {
			return err
		}
	}
	return nil
}

// opener opens files of a list whose folder is dir.
func opener(dir *os.Root) func(path string) (*os.File, error) {
	return func(path string) (*os.File, error) { return open(dir, path) }
}

func open(dir *os.Root, path string) (*os.File, error) {
	// O_NONBLOCK: should a pipe have taken the file's place, do not wait for its writer.
	f, err := dir.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, &ChangedError{path}
	}
	return f, err
}

// file writes the recipe of one file, of which the target has the first keep bytes.
func (u *upload) file(enc *recipe.Encoder, e manifest.Entry, index, keep int64, buf []byte) error {
	f, err := open(u.dir, e.Path)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() || info.Size() != e.Size {
		return &ChangedError{e.Path}
	}
	steps := []base.Step{{Length: e.Size}}
	if u.plan != nil {
		if steps, err = u.plan.Steps(e, f); err != nil {
			return err
		}
	}
	if err := enc.File(index); err != nil {
		return err
	}
	if keep > 0 {
		if err := enc.Keep(keep); err != nil {
			return err
		}
	}
	var h hash.Hash
	if u.careful {
		h = manifest.NewHash()
		if err := u.read(f, 0, keep, h, buf, func([]byte) error { return nil }); err != nil {
			return changed(err, e)
		}
	}
	at := int64(0)
	for _, s := range steps {
		begin, end := max(at, keep), at+s.Length
		skip := begin - at
		at = end
		if begin >= end {
			continue
		}
		if s.Path != "" {
			if err := enc.Copy(s.Path, s.Offset+skip, end-begin); err != nil {
				return err
			}
			u.copied(end - begin)
			continue
		}
		err := u.read(f, begin, end, h, buf, func(p []byte) error {
			_, err := enc.Write(p)
			u.sent(int64(len(p)))
			return err
		})
		if err != nil {
			return changed(err, e)
		}
	}
	// The other side would find it too; here it can be named for what it is.
	if h != nil && manifest.SumOf(h) != e.Sum {
		return &ChangedError{e.Path}
	}
	return enc.End(e.Sum)
}

// read hands on what is from begin to end in f, piece by piece, and hashes it
// where h is not nil.
func (u *upload) read(f *os.File, begin, end int64, h hash.Hash, buf []byte, do func([]byte) error) error {
	for begin < end {
		if u.ctx.Err() != nil {
			return context.Cause(u.ctx)
		}
		read := u.times.c.spend(&u.times.source)
		n, err := f.ReadAt(buf[:min(int64(len(buf)), end-begin)], begin)
		read()
		if h != nil {
			h.Write(buf[:n])
		}
		if err := do(buf[:n]); err != nil {
			return err
		}
		if begin += int64(n); err != nil && begin < end {
			return err
		}
	}
	return nil
}

// changed names the file that ended before its size.
func changed(err error, e manifest.Entry) error {
	if errors.Is(err, io.EOF) {
		return &ChangedError{e.Path}
	}
	return err
}
