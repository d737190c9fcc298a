package manifest

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// A delta makes a manifest out of another one that both sides have:
//
//	"FKDELTA1" digest sum         of the old manifest: its digest, and the
//	                              BLAKE2b-256 of its bytes
//	'K' n                         keep the next n entries of the old one
//	'S' n                         skip n of them
//	'D' or 'F' ...                a new entry, as in a manifest, its path whole
//	'Z'                           the end, of the old one too
//
// n is 1 or more. The sum is there because the digest does not cover modification
// times, which are kept as well.
const (
	// DeltaMagic begins a delta; no manifest begins with it.
	DeltaMagic = "FKDELTA1"

	tagKeep = 'K'
	tagSkip = 'S'
	tagLast = 'Z'
)

// ErrDelta is wrapped when a delta is none, or does not fit the old manifest.
var ErrDelta = errors.New("not a delta of the manifest that is here")

// WriteDelta writes to w how to make the manifest new out of old. It reads old
// twice.
func WriteDelta(w io.Writer, old io.ReadSeeker, new io.Reader) error {
	sum, digest, err := identify(old)
	if err != nil {
		return err
	}
	if _, err := old.Seek(0, io.SeekStart); err != nil {
		return err
	}
	d := &deltaWriter{w: bufio.NewWriterSize(w, 64<<10)}
	d.w.WriteString(DeltaMagic) // bufio keeps the first error for Flush
	d.w.Write(digest[:])
	d.w.Write(sum[:])
	was, is := NewReader(old), NewReader(new)
	var o, n Entry
	left, err := advance(was, &o)
	if err != nil {
		return err
	}
	for {
		more, err := advance(is, &n)
		if err != nil {
			return err
		}
		if !more {
			break
		}
		for left && ComparePaths(o.Path, n.Path) < 0 {
			d.run(tagSkip)
			if left, err = advance(was, &o); err != nil {
				return err
			}
		}
		switch {
		case left && o == n:
			d.run(tagKeep)
		case left && o.Path == n.Path:
			d.run(tagSkip)
			d.entry(&n)
		default:
			d.entry(&n)
			continue
		}
		if left, err = advance(was, &o); err != nil {
			return err
		}
	}
	// What is left of the old one is skipped by the end.
	d.flush()
	d.w.WriteByte(tagLast)
	return d.w.Flush()
}

// identify returns the BLAKE2b-256 of a manifest's bytes, and its digest.
func identify(r io.Reader) (sum, digest Sum, err error) {
	h := NewHash()
	m := NewReader(io.TeeReader(r, h))
	for err == nil {
		_, err = m.Next()
	}
	if !errors.Is(err, io.EOF) {
		return sum, digest, err
	}
	return SumOf(h), m.Summary().Digest, nil
}

type deltaWriter struct {
	w   *bufio.Writer
	tag byte // of the run under way
	n   uint64
	buf []byte
}

func (d *deltaWriter) run(tag byte) {
	if d.tag != tag {
		d.flush()
		d.tag = tag
	}
	d.n++
}

func (d *deltaWriter) flush() {
	if d.n > 0 {
		d.w.Write(binary.AppendUvarint(append(d.buf[:0], d.tag), d.n))
		d.n = 0
	}
}

func (d *deltaWriter) entry(e *Entry) {
	d.flush()
	d.buf = appendEntry(d.buf[:0], e, 0)
	d.w.Write(d.buf)
}

// ApplyDelta reads a delta to its end and writes the manifest that it makes to w.
// open opens the old one; an error of it is returned as it is. ApplyDelta holds one
// entry. Everything that a delta may have wrong is an error that wraps ErrDelta,
// and what was written is then no manifest.
func ApplyDelta(w io.Writer, delta io.Reader, open func(digest Sum) (io.ReadCloser, error)) (Summary, error) {
	r := NewReader(delta) // for its integers and entries
	var head [len(DeltaMagic)]byte
	var digest, sum Sum
	for _, p := range [][]byte{head[:], digest[:], sum[:]} {
		if err := r.full(p); err != nil {
			return Summary{}, bad(unexpected(err))
		}
	}
	if string(head[:]) != DeltaMagic {
		return Summary{}, bad(fmt.Errorf("%q is not a delta of a version that is known here", head[:]))
	}
	f, err := open(digest)
	if err != nil {
		return Summary{}, err
	}
	defer f.Close()
	h := NewHash()
	old, out := NewReader(io.TeeReader(f, h)), NewWriter(w)
	for {
		tag, err := r.readByte()
		if err != nil {
			return Summary{}, bad(unexpected(err))
		}
		switch tag {
		case tagKeep, tagSkip:
			n, err := r.uvarint(MaxEntries, "run")
			if err == nil && n == 0 {
				err = errors.New("a run of nothing")
			}
			for ; err == nil && n > 0; n-- {
				var e Entry
				if e, err = old.Next(); err == nil && tag == tagKeep {
					err = out.Add(e)
				}
			}
			if err != nil {
				return Summary{}, bad(unexpected(err))
			}
		case tagLast:
			if _, err := r.readByte(); !errors.Is(err, io.EOF) {
				return Summary{}, bad(errors.New("bytes after the end"))
			}
			for err == nil {
				_, err = old.Next()
			}
			if !errors.Is(err, io.EOF) {
				return Summary{}, bad(err)
			}
			if SumOf(h) != sum {
				return Summary{}, bad(errors.New("the old manifest has other bytes"))
			}
			return out.Close()
		default:
			r.path = r.path[:0]
			e, err := r.entry(Kind(tag))
			if err == nil {
				err = out.Add(e)
			}
			if err != nil {
				return Summary{}, bad(unexpected(err))
			}
		}
	}
}

func bad(err error) error { return fmt.Errorf("%w: %w", ErrDelta, err) }
