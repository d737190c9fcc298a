package manifest

import (
	"bufio"
	"errors"
	"fmt"
	"io"
)

// Reader reads a manifest and checks everything that the format promises. It
// holds one entry, whatever the length. Its errors are of type *FormatError,
// but for those of the underlying reader, which they wrap.
type Reader struct {
	r      *bufio.Reader
	l      ledger
	offset int64
	path   []byte
	rest   [MaxPath]byte
	err    error
}

// NewReader reads the manifest that r holds, to the end of r.
func NewReader(r io.Reader) *Reader {
	return &Reader{r: bufio.NewReaderSize(r, 64<<10), l: newLedger()}
}

// Next returns the next entry, or io.EOF after the last one, when digest,
// counts and the end of the input were found right. Every error is final.
func (m *Reader) Next() (Entry, error) {
	if m.err != nil {
		return Entry{}, m.err
	}
	start := m.offset
	e, err := m.next()
	if err != nil {
		m.err = err
		if !errors.Is(err, errEnd) {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			m.err = &FormatError{Entry: m.l.Entries, Offset: start, Err: err}
		} else {
			m.err = io.EOF
		}
		return Entry{}, m.err
	}
	return e, nil
}

// Index is the index of the entry that Next returned last; -1 before the first.
func (m *Reader) Index() int64 { return m.l.Entries - 1 }

// Summary describes the manifest. It is complete once Next returned io.EOF;
// before that Digest is zero and the counts are those so far.
func (m *Reader) Summary() Summary { return m.l.Summary }

// errEnd tells the manifest's proper end from the end of its bytes.
var errEnd = errors.New("end of manifest")

func (m *Reader) next() (e Entry, err error) {
	if m.offset == 0 {
		var head [len(magic)]byte
		if err := m.full(head[:]); err != nil {
			return e, err
		}
		if string(head[:]) != magic {
			return e, fmt.Errorf("%q is not a manifest of a version that is known here (%s)", head[:], magic)
		}
	}
	tag, err := m.readByte()
	if err != nil {
		return e, err
	}
	if tag == tagEnd {
		return e, m.end()
	}
	if e, err = m.entry(Kind(tag)); err != nil {
		return e, err
	}
	return e, m.l.add(&e)
}

// entry reads what follows an entry's kind.
func (m *Reader) entry(kind Kind) (e Entry, err error) {
	if kind != File && kind != Folder {
		return e, fmt.Errorf("kind %q is neither file nor folder", byte(kind))
	}
	e.Kind = kind
	if e.Path, err = m.readPath(); err != nil {
		return e, err
	}
	mode, err := m.uvarint(MaxMode, "mode")
	if err != nil {
		return e, err
	}
	e.Mode = uint32(mode)
	zigzag, err := m.uvarint(1<<64-1, "modification time")
	if err != nil {
		return e, err
	}
	e.MTime = int64(zigzag>>1) ^ -int64(zigzag&1)
	if e.Kind == File {
		size, err := m.uvarint(MaxFileSize, "size")
		if err != nil {
			return e, err
		}
		e.Size = int64(size)
		if err := m.full(e.Sum[:]); err != nil {
			return e, err
		}
	}
	return e, nil
}

func (m *Reader) readPath() (string, error) {
	shared, err := m.uvarint(uint64(len(m.path)), "shared length")
	if err != nil {
		return "", err
	}
	length, err := m.uvarint(MaxPath-shared, "path length")
	if err != nil {
		return "", err
	}
	if length == 0 {
		return "", errors.New("the path adds nothing to the one before")
	}
	if err := m.full(m.rest[:length]); err != nil {
		return "", err
	}
	if int(shared) < len(m.path) && m.path[shared] == m.rest[0] {
		return "", errors.New("the path shares more with the one before than it says")
	}
	m.path = append(m.path[:shared], m.rest[:length]...)
	return string(m.path), nil
}

func (m *Reader) end() error {
	entries, err := m.uvarint(MaxEntries, "number of entries")
	if err != nil {
		return err
	}
	bytes, err := m.uvarint(MaxBytes, "number of bytes")
	if err != nil {
		return err
	}
	var digest Sum
	if err := m.full(digest[:]); err != nil {
		return err
	}
	if int64(entries) != m.l.Entries || int64(bytes) != m.l.Bytes {
		return fmt.Errorf("the end announces %d entries and %d bytes, there are %d and %d", entries, bytes, m.l.Entries, m.l.Bytes)
	}
	if s := m.l.finish(); s.Digest != digest {
		return fmt.Errorf("%w: %v, announced %v", ErrDigest, s.Digest, digest)
	}
	if _, err := m.r.ReadByte(); err == nil {
		return errors.New("bytes after the end")
	} else if !errors.Is(err, io.EOF) {
		return err
	}
	return errEnd
}

func (m *Reader) readByte() (byte, error) {
	b, err := m.r.ReadByte()
	if err == nil {
		m.offset++
	}
	return b, err
}

func (m *Reader) full(p []byte) error {
	n, err := io.ReadFull(m.r, p)
	m.offset += int64(n)
	return err
}

// uvarint reads a varint of at most limit.
func (m *Reader) uvarint(limit uint64, what string) (uint64, error) {
	v, err := ReadUvarint(m.readByte)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", what, err)
	}
	if v > limit {
		return 0, fmt.Errorf("%s %d is more than %d", what, v, limit)
	}
	return v, nil
}

// ReadUvarint reads an unsigned varint as encoding/binary writes it, and refuses
// any but the shortest encoding, so that one value has one. It reads no byte too many.
func ReadUvarint(next func() (byte, error)) (uint64, error) {
	var v uint64
	for shift := 0; ; shift += 7 {
		b, err := next()
		if err != nil {
			return 0, err
		}
		if shift == 63 && b > 1 {
			return 0, errors.New("an integer of more than 64 bits")
		}
		v |= uint64(b&0x7f) << shift
		if b >= 0x80 {
			continue
		}
		if b == 0 && shift > 0 {
			return 0, errors.New("an integer that is not encoded in the shortest way")
		}
		return v, nil
	}
}
