// Package borgsegment reads the segment files of Borg 1.x repositories: their
// entries' headers, which no passphrase protects, and, when asked to, every byte
// for its CRC.
//
// The format, as Borg 1.0 to 1.4 write it (borg's repository.py, class LoggedIO;
// numbers little endian):
//
//	"BORG_SEG"
//	PUT:    crc32 size tag=0 key data     size: of the whole entry, 41 bytes at least
//	DELETE: crc32 size tag=1 key          size = 41
//	COMMIT: crc32 size tag=2              size = 9
//
// crc32 (IEEE) covers the entry from size to its end; key has 32 bytes. The tag 3
// (PUT2) exists in Borg 2's betas alone, whose repositories Borg 1.x does not
// open: here it is an error like every other tag.
//
// A [Reader] guarantees that it never holds more than its buffer, that it ends,
// whatever the bytes are, and that a segment that it read without error consists
// of whole entries from the magic to the very end of the file. It leaves to
// callers what the entries mean together: which of several PUTs of a key counts,
// and which segments are committed, but for [EndsWithCommit] and [IsCommitted].
package borgsegment

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"strconv"
	"strings"
)

// Sizes of the format, in bytes.
const (
	Magic      = "BORG_SEG"
	HeaderSize = 9 // crc32, size, tag: a whole COMMIT
	KeySize    = 32
	// KeyedSize is the header of a PUT, and a whole DELETE.
	KeyedSize = HeaderSize + KeySize
	// MaxEntry is more than any borg wrote: 20 MiB since 1.0.7, and the list of an
	// archive with millions of files could be larger before.
	MaxEntry = 64 << 20
	// MaxSize is more than a segment can have: borg's index has 32 bits for the place
	// of an entry in it.
	MaxSize = 1<<32 + MaxEntry
)

const atticMagic = "ATTICSEG"

// Tag says what an entry does.
type Tag byte

// The tags.
const (
	Put    Tag = 0 // gives a key its data
	Delete Tag = 1 // takes a key away
	Commit Tag = 2 // everything before it is final
)

func (t Tag) String() string {
	switch t {
	case Put:
		return "PUT"
	case Delete:
		return "DELETE"
	case Commit:
		return "COMMIT"
	}
	return "tag " + strconv.Itoa(int(t))
}

// Key names an object of the repository. The one of 32 zero bytes is the manifest:
// the table of archives.
type Key [KeySize]byte

// Manifest is the key of the table of archives.
var Manifest Key

// Entry is one entry's header.
type Entry struct {
	Offset int64  // of the entry in the file
	Size   uint32 // of the entry in bytes, header included
	CRC    uint32 // as the header has it
	Tag    Tag
	Key    Key // zero for a COMMIT
}

// Data is where a PUT's data lies in the file; size is 0 for the other tags.
func (e *Entry) Data() (offset, size int64) {
	if e.Tag != Put {
		return e.Offset + int64(e.Size), 0
	}
	return e.Offset + KeyedSize, int64(e.Size) - KeyedSize
}

// End is the offset of what follows the entry.
func (e *Entry) End() int64 { return e.Offset + int64(e.Size) }

// FormatError says where a file stops being a segment, and why.
type FormatError struct {
	Offset int64 // of the entry, or of the magic
	What   string
}

func (e *FormatError) Error() string { return fmt.Sprintf("at byte %d: %s", e.Offset, e.What) }

// Mode says how much of a segment is read.
type Mode byte

// The modes.
const (
	// Headers reads the entries' headers and seeks over the data.
	Headers Mode = iota
	// Checked reads everything, in order, and compares the CRCs.
	Checked
)

// A data-heavy segment has a header each megabyte or two: in mode Headers a read
// of more than a page would be for nothing.
const (
	headerBuffer  = 4 << 10
	checkedBuffer = 256 << 10
)

// Reader goes through the entries of a segment, in their order:
//
//	r := borgsegment.NewReader(borgsegment.Headers)
//	r.Reset(file, size)
//	for r.Next(&entry) {
//		...
//	}
//	err := r.Err()
//
// One Reader reads any number of segments; none of its methods but NewReader
// allocates, but for errors. It is not safe for concurrent use.
type Reader struct {
	mode   Mode
	src    io.ReaderAt
	size   int64
	offset int64 // of the next entry
	err    error

	buf      []byte
	at       int64 // where buf lies in the file
	have     int   // how much of buf is valid
	header   [KeyedSize]byte
	finished bool
}

// NewReader returns a Reader that has nothing to read yet.
func NewReader(mode Mode) *Reader {
	n := headerBuffer
	if mode == Checked {
		n = checkedBuffer
	}
	return &Reader{mode: mode, buf: make([]byte, n), finished: true}
}

// Reset begins a segment of size bytes.
func (r *Reader) Reset(src io.ReaderAt, size int64) {
	r.src, r.size, r.offset, r.err = src, size, 0, nil
	r.at, r.have, r.finished = 0, 0, false
}

// Err is why Next returned false: nil at the end of a whole segment, a
// [*FormatError], or an error of reading, which tells the offset.
func (r *Reader) Err() error { return r.err }

// Next reads the next entry into e. It returns false at the end and at the first
// error; e is then undefined.
func (r *Reader) Next(e *Entry) bool {
	if r.finished {
		return false
	}
	if r.offset == 0 && !r.magic() {
		return r.stop(r.err)
	}
	if r.offset == r.size {
		return r.stop(nil)
	}
	if err := r.next(e); err != nil {
		return r.stop(err)
	}
	return true
}

func (r *Reader) stop(err error) bool {
	r.finished, r.err = true, err
	return false
}

func (r *Reader) bad(format string, args ...any) error {
	return &FormatError{Offset: r.offset, What: fmt.Sprintf(format, args...)}
}

func (r *Reader) magic() bool {
	if r.size < int64(len(Magic)) || r.size > MaxSize {
		r.err = r.bad("a segment does not have %d bytes", r.size)
		return false
	}
	head := r.header[:len(Magic)]
	if r.err = r.fill(head, 0); r.err != nil {
		return false
	}
	switch {
	case string(head) == atticMagic:
		r.err = r.bad("a segment of Attic, which borg has not converted")
	case string(head) != Magic:
		r.err = r.bad("does not begin with %s", Magic)
	}
	r.offset = int64(len(Magic))
	return r.err == nil
}

func (r *Reader) next(e *Entry) error {
	left := r.size - r.offset
	if left < HeaderSize {
		return r.bad("%d bytes are left, fewer than a header has", left)
	}
	head := r.header[:min(left, KeyedSize)]
	if err := r.fill(head, r.offset); err != nil {
		return err
	}
	e.Offset = r.offset
	e.CRC = binary.LittleEndian.Uint32(head)
	e.Size = binary.LittleEndian.Uint32(head[4:])
	e.Tag = Tag(head[8])
	e.Key = Key{}
	switch {
	case e.Tag > Commit:
		return r.bad("%s is none that borg 1.x writes", e.Tag)
	case e.Size > MaxEntry:
		return r.bad("a %s of %d bytes is larger than borg makes them", e.Tag, e.Size)
	case e.Tag == Commit && e.Size != HeaderSize,
		e.Tag == Delete && e.Size != KeyedSize,
		e.Tag == Put && e.Size < KeyedSize:
		return r.bad("a %s of %d bytes", e.Tag, e.Size)
	case int64(e.Size) > left:
		return r.bad("a %s of %d bytes, and only %d are left", e.Tag, e.Size, left)
	}
	if e.Tag != Commit {
		copy(e.Key[:], head[HeaderSize:])
	}
	if r.mode == Checked {
		sum, err := r.sum(r.offset+4, int64(e.Size)-4)
		if err != nil {
			return err
		}
		if sum != e.CRC {
			return r.bad("the CRC of a %s of %d bytes does not match", e.Tag, e.Size)
		}
	}
	r.offset += int64(e.Size)
	return nil
}

// fill copies the bytes at offset to p, which is no longer than the buffer and
// lies inside of the file.
func (r *Reader) fill(p []byte, offset int64) error {
	if offset < r.at || offset+int64(len(p)) > r.at+int64(r.have) {
		if err := r.load(offset, len(p)); err != nil {
			return err
		}
	}
	copy(p, r.buf[offset-r.at:])
	return nil
}

// load reads a buffer from offset on, least bytes of it at least.
func (r *Reader) load(offset int64, least int) error {
	r.at, r.have = offset, 0
	want := int(min(int64(len(r.buf)), r.size-offset))
	for r.have < least {
		n, err := r.src.ReadAt(r.buf[r.have:want], offset+int64(r.have))
		r.have += n
		switch {
		case r.have >= least:
		case errors.Is(err, io.EOF):
			return &FormatError{Offset: offset + int64(r.have), What: "the file ends here, before its size"}
		case err != nil:
			return fmt.Errorf("at byte %d: %w", offset+int64(r.have), err)
		case n == 0:
			return fmt.Errorf("at byte %d: %w", offset+int64(r.have), io.ErrNoProgress)
		}
	}
	return nil
}

// sum is the CRC of n bytes from offset on.
func (r *Reader) sum(offset, n int64) (sum uint32, err error) {
	for n > 0 {
		if offset < r.at || offset >= r.at+int64(r.have) {
			if err := r.load(offset, 1); err != nil {
				return 0, err
			}
		}
		p := r.buf[offset-r.at : r.have]
		p = p[:min(int64(len(p)), n)]
		sum = crc32.Update(sum, crc32.IEEETable, p)
		offset += int64(len(p))
		n -= int64(len(p))
	}
	return sum, nil
}

// commit is how the last entry of a transaction looks, always.
var commit = func() (b [HeaderSize]byte) {
	binary.LittleEndian.PutUint32(b[4:], HeaderSize)
	b[8] = byte(Commit)
	binary.LittleEndian.PutUint32(b[:], crc32.ChecksumIEEE(b[4:]))
	return b
}()

// EndsWithCommit reports whether src, of size bytes, begins as a segment and ends
// with a COMMIT. It reads nothing between. An error is one of reading.
func EndsWithCommit(src io.ReaderAt, size int64) (bool, error) {
	if size < int64(len(Magic))+HeaderSize {
		return false, nil
	}
	var head [len(Magic)]byte
	var tail [HeaderSize]byte
	if _, err := src.ReadAt(head[:], 0); err != nil {
		return false, err
	}
	if n, err := src.ReadAt(tail[:], size-HeaderSize); n < len(tail) && err != nil {
		return false, err
	}
	return string(head[:]) == Magic && tail == commit, nil
}

// IsCommitted applies borg's full rule: the segment ends with a COMMIT, every
// entry is whole and has its CRC, and nothing but COMMITs follows a COMMIT. An
// error is one of reading.
func IsCommitted(src io.ReaderAt, size int64) (bool, error) {
	if ok, err := EndsWithCommit(src, size); !ok || err != nil {
		return false, err
	}
	r := NewReader(Checked)
	r.Reset(src, size)
	var e Entry
	seen := false
	for r.Next(&e) {
		if seen && e.Tag != Commit {
			return false, nil
		}
		seen = e.Tag == Commit
	}
	var format *FormatError
	if errors.As(r.Err(), &format) {
		return false, nil
	}
	return seen, r.Err()
}

// Number reads the number in the name of a segment, of a folder of segments, or
// in the ending of an index: decimal, no leading zeros, at most 32 bits.
func Number(name string) (uint32, bool) {
	if len(name) > 1 && name[0] == '0' || strings.TrimLeft(name, "0123456789") != "" {
		return 0, false
	}
	n, err := strconv.ParseUint(name, 10, 32)
	return uint32(n), err == nil
}

// PathNumber reads the number of the segment at path, which is relative to its
// repository: data/FOLDER/NUMBER.
func PathNumber(path string) (uint32, bool) {
	rest, ok := strings.CutPrefix(path, "data/")
	folder, name, slash := strings.Cut(rest, "/")
	if !ok || !slash {
		return 0, false
	}
	if _, ok := Number(folder); !ok {
		return 0, false
	}
	return Number(name)
}
