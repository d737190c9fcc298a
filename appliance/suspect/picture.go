package suspect

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"farkeep/shared/borgsegment"
	"farkeep/shared/generations"
	"farkeep/shared/manifest"
)

// side says which of the two generations something lies in.
type side uint8

const (
	inOld side = 1 << iota
	inNew
)

// id names a segment's content: half of its BLAKE2b-256, which is more than
// anybody can find a second content for.
type id [16]byte

// segment is a segment file of one generation or of both. A number whose content
// changed is two of them, the old one first. 48 bytes: a repository has one for
// each 500 MB.
type segment struct {
	number, folder uint32
	size           int64
	id             id
	where          side
}

func (s *segment) path() string { return fmt.Sprintf("data/%d/%d", s.folder, s.number) }

// maxSegments bounds the segments of both generations together.
const maxSegments = 1 << 20

// picture is what the manifests say of two Borg repositories.
type picture struct {
	segments []segment // by number, old before new
	config   bool      // the new one has a config file
	// The transaction of the newest index, and the last one that is committed; -1: none.
	oldIndex, newIndex int64
	oldMark, newMark   int64
}

// look reads the manifests.
func look(ctx context.Context, c *generations.Candidate) (*picture, error) {
	p := &picture{oldIndex: -1, newIndex: -1}
	err := diff(ctx, c, func(d manifest.Change) error {
		switch d.Relation {
		case manifest.Unchanged:
			return p.entry(&d.New, inOld|inNew)
		case manifest.Gone:
			return p.entry(&d.Old, inOld)
		case manifest.New:
			return p.entry(&d.New, inNew)
		}
		return errors.Join(p.entry(&d.Old, inOld), p.entry(&d.New, inNew))
	})
	if err != nil {
		return nil, err
	}
	slices.SortFunc(p.segments, func(a, b segment) int {
		return cmp.Or(cmp.Compare(a.number, b.number), cmp.Compare(a.where, b.where))
	})
	return p, nil
}

// diff compares the manifests of the current generation, if there is one, and of
// the candidate.
func diff(ctx context.Context, c *generations.Candidate, step func(manifest.Change) error) error {
	var old *manifest.Reader
	if c.Current != nil {
		r, closer, err := c.Old()
		if err != nil {
			return err
		}
		defer closer.Close()
		old = r
	}
	new, closer, err := c.New()
	if err != nil {
		return err
	}
	defer closer.Close()
	n := 0
	return manifest.Diff(old, new, func(d manifest.Change) error {
		if n++; n%4096 == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		return step(d)
	})
}

func (p *picture) entry(e *manifest.Entry, where side) error {
	if e.Kind != manifest.File || e.Size == 0 {
		return nil // borg counts an empty segment as deleted
	}
	if n, ok := borgsegment.PathNumber(e.Path); ok {
		folder, _, _ := strings.Cut(strings.TrimPrefix(e.Path, "data/"), "/")
		f, _ := borgsegment.Number(folder)
		if len(p.segments) == maxSegments {
			return fmt.Errorf("more than %d segments", maxSegments)
		}
		p.segments = append(p.segments, segment{number: n, folder: f, size: e.Size, id: id(e.Sum[:len(id{})]), where: where})
		return nil
	}
	if where&inNew != 0 && e.Path == "config" {
		p.config = true
	}
	if digits, ok := strings.CutPrefix(e.Path, "index."); ok {
		if n, ok := borgsegment.Number(digits); ok {
			if where&inOld != 0 {
				p.oldIndex = max(p.oldIndex, int64(n))
			}
			if where&inNew != 0 {
				p.newIndex = max(p.newIndex, int64(n))
			}
		}
	}
	return nil
}

// committed finds the last committed segment of one generation, by borg's rule: that
// of its newest index, or a later one that holds a whole transaction. What lies
// after it belongs to a run that was killed, and the next one uses its numbers
// again. A folder that the pusher froze has nothing after it; what a stock sftp
// client uploaded may have.
func (p *picture) committed(ctx context.Context, where side, index int64, open func(string) (*os.File, error)) (int64, error) {
	for _, s := range slices.Backward(p.segments) {
		if s.where&where == 0 {
			continue
		}
		if int64(s.number) <= index {
			break
		}
		ok, err := check(ctx, &s, open, borgsegment.IsCommitted)
		if err != nil {
			return 0, err
		}
		if ok {
			return int64(s.number), nil
		}
	}
	return index, nil
}

// reader stops reading when ctx ends: a segment has gigabytes, and the disk must be
// let go of in seconds.
type reader struct {
	ctx  context.Context
	file *os.File
}

func (r reader) ReadAt(p []byte, offset int64) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.file.ReadAt(p, offset)
}

// check applies a rule to a segment's file.
func check(ctx context.Context, s *segment, open func(string) (*os.File, error), rule func(io.ReaderAt, int64) (bool, error)) (bool, error) {
	f, err := open(s.path())
	if err != nil {
		return false, err
	}
	defer f.Close()
	ok, err := rule(reader{ctx, f}, s.size)
	if err != nil {
		err = fmt.Errorf("read %s: %w", s.path(), err)
	}
	return ok, err
}

// trim forgets the segments that are not committed.
func (p *picture) trim() {
	kept := p.segments[:0]
	for _, s := range p.segments {
		if int64(s.number) > p.oldMark {
			s.where &^= inOld
		}
		if int64(s.number) > p.newMark {
			s.where &^= inNew
		}
		if s.where != 0 {
			kept = append(kept, s)
		}
	}
	p.segments = kept
}

// has counts the segments and their bytes in one generation.
func (p *picture) has(where side) (n, bytes int64) {
	for i := range p.segments {
		if p.segments[i].where&where != 0 {
			n++
			bytes += p.segments[i].size
		}
	}
	return n, bytes
}
