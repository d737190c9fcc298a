package recipe

import (
	"errors"
	"fmt"
	"io"

	"farkeep/shared/manifest"
)

// Workshop is where Build builds one file.
type Workshop interface {
	// Write appends to the file. It must not keep p.
	io.Writer
	// Kept returns a reader over the first n bytes of the half-built file, and
	// makes Write append after them. An error means that they are not there.
	Kept(n int64) (io.Reader, error)
	// Source opens a file of the base generation. It stays valid until the next
	// call; closing is up to the Workshop.
	Source(path string) (io.ReaderAt, error)
}

// ErrSum is wrapped when a file that was built does not have the hash that was
// announced for it.
var ErrSum = errors.New("the file does not have the hash that was announced")

// Build carries out the recipe of the file that d.Next announced: it writes
// exactly want.Size bytes and checks their hash against want.Sum. On any error what
// was written is worth nothing but as the beginning of a later attempt.
// buf is scratch space for copies, 64 KiB or more.
func Build(d *Decoder, want manifest.Entry, w Workshop, buf []byte) error {
	d.Begin(want.Size)
	h := newHashing(want.Size)
	defer h.close()
	for {
		op, err := d.Op()
		if err != nil {
			return err
		}
		switch op.Kind {
		case Keep:
			r, err := w.Kept(op.Length)
			if err != nil {
				return fmt.Errorf("keep %d bytes of file %d: %w", op.Length, d.last, err)
			}
			if err := hashAll(h, r, op.Length, buf); err != nil {
				return fmt.Errorf("keep %d bytes of file %d: %w", op.Length, d.last, err)
			}
		case Copy:
			src, err := w.Source(op.Path)
			if err != nil {
				return fmt.Errorf("copy into file %d: %w", d.last, err)
			}
			if err := copyRange(io.MultiWriter(h, w), src, op, buf); err != nil {
				return fmt.Errorf("copy %d bytes at %d of %q into file %d: %w", op.Length, op.Offset, op.Path, d.last, err)
			}
		case Data:
			h.beside(op.Data)
			if _, err := w.Write(op.Data); err != nil {
				return err
			}
		case End:
			if got := h.sum(); got != want.Sum || op.Sum != want.Sum {
				return fmt.Errorf("%w: file %d (%q) came out as %v, the upload says %v, the offer %v", ErrSum, d.last, want.Path, got, op.Sum, want.Sum)
			}
			return nil
		}
	}
}

// errShort is wrapped when a source has fewer bytes than a copy wants.
var errShort = errors.New("it ends before")

func copyRange(dst io.Writer, src io.ReaderAt, op Op, buf []byte) error {
	for offset, left := op.Offset, op.Length; left > 0; {
		n, err := src.ReadAt(buf[:min(left, int64(len(buf)))], offset)
		if n == 0 {
			if errors.Is(err, io.EOF) {
				return errShort
			}
			return err
		}
		if _, err := dst.Write(buf[:n]); err != nil {
			return err
		}
		offset, left = offset+int64(n), left-int64(n)
	}
	return nil
}

func hashAll(h io.Writer, r io.Reader, n int64, buf []byte) error {
	got, err := io.CopyBuffer(h, io.LimitReader(r, n), buf)
	if err == nil && got != n {
		err = errShort
	}
	return err
}
