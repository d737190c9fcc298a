// Package manifest is the list of everything in a repository at one moment: the
// offer that the pusher makes, and the MANIFEST that lies in each generation.
//
// A manifest holds regular files (path, size, mode, modification time,
// BLAKE2b-256) and folders (path, mode, modification time), each path once, every
// folder before its content, in the order of [ComparePaths]. [Writer] and
// [Reader] stream: neither holds more than one entry, so a million files need no
// more memory than one. There is exactly one encoding of a list, and Reader
// refuses every other, so that bytes that were read and written again are the
// same bytes. [Diff] compares two manifests in one pass.
//
// The format (integers are unsigned LEB128 varints of encoding/binary, minimal):
//
//	"FKMANIF1"                                         magic and version
//	entry: 'D' path mode mtime                         a folder
//	entry: 'F' path mode mtime size sum                a file
//	end:   'E' entries bytes digest                    and then nothing
//
//	path:   shared length rest     shared: as many bytes as the path has in common
//	                               with the entry before; length >= 1: of the rest
//	mode:   permission bits, 07777 at most
//	mtime:  nanoseconds since 1970, zigzag
//	sum:    32 bytes
//	digest: 32 bytes; see [Summary]
//
// The digest names the content of a repository. It is BLAKE2b-256 over
// "farkeep manifest 1\n" and, for each entry, kind, length of path, path, mode
// and, for a file, size and sum, encoded as above; modification times are not in
// it, so that a touched file makes no generation.
//
// A caller gets no promise about names beyond [CheckPath]: two paths may differ in
// case alone, or not be UTF-8.
package manifest

import (
	"bufio"
	"encoding"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"strings"

	"golang.org/x/crypto/blake2b"
)

// Limits of a manifest. A sum of sizes up to MaxBytes cannot overflow an int64.
const (
	MaxEntries  = 10_000_000
	MaxFileSize = 16 << 40 // ext4's own limit with 4 KiB blocks
	MaxBytes    = 1 << 60
	MaxMode     = 0o7777
	// MaxEntry is the most bytes that one entry takes in the format.
	MaxEntry = 1 + 2 + 2 + MaxPath + 2 + 10 + 7 + len(Sum{})
)

const (
	magic       = "FKMANIF1"
	digestLabel = "farkeep manifest 1\n"
	tagEnd      = 'E'
)

// Sum is a BLAKE2b-256, as `b2sum -l 256` prints it.
type Sum [blake2b.Size256]byte

// String is the sum in hexadecimal.
func (s Sum) String() string { return hex.EncodeToString(s[:]) }

// MarshalText implements encoding.TextMarshaler.
func (s Sum) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *Sum) UnmarshalText(text []byte) error {
	if len(text) != 2*len(s) {
		return fmt.Errorf("a sum has %d hexadecimal digits, this one %d", 2*len(s), len(text))
	}
	if _, err := hex.Decode(s[:], text); err != nil {
		return fmt.Errorf("%.64q is not a sum: %w", text, err)
	}
	return nil
}

var (
	_ encoding.TextMarshaler   = Sum{}
	_ encoding.TextUnmarshaler = (*Sum)(nil)
)

// NewHash returns the hash that makes a Sum.
func NewHash() hash.Hash {
	h, err := blake2b.New256(nil)
	if err != nil {
		panic(err) // only a key that is too long is refused, and there is none
	}
	return h
}

// SumOf takes the sum out of a hash made by NewHash.
func SumOf(h hash.Hash) (s Sum) {
	h.Sum(s[:0])
	return s
}

// Kind tells files from folders.
type Kind byte

// The kinds of entries.
const (
	File   Kind = 'F'
	Folder Kind = 'D'
)

// Entry is one file or folder.
type Entry struct {
	Path  string
	Kind  Kind
	Mode  uint32 // permission bits at the source, MaxMode at most
	MTime int64  // nanoseconds since 1970; not part of the digest
	Size  int64  // bytes; 0 for a folder
	Sum   Sum    // of the content; zero for a folder
}

// SameContent reports whether both entries are files with the same bytes.
func (e *Entry) SameContent(o *Entry) bool {
	return e.Kind == File && o.Kind == File && e.Size == o.Size && e.Sum == o.Sum
}

// Summary describes a whole manifest.
type Summary struct {
	Digest  Sum
	Entries int64 // files and folders
	Files   int64
	Bytes   int64 // sum of the files' sizes
}

// FormatError says what is wrong with a manifest, and where.
type FormatError struct {
	Entry  int64 // index of the entry, from 0
	Offset int64 // bytes before the entry
	Err    error
}

func (e *FormatError) Error() string {
	return fmt.Sprintf("manifest entry %d, at byte %d: %v", e.Entry, e.Offset, e.Err)
}

// Unwrap returns the cause.
func (e *FormatError) Unwrap() error { return e.Err }

// ErrDigest is wrapped when a manifest does not have the digest that it claims.
var ErrDigest = errors.New("the digest does not match the entries")

// ledger holds the rules that reader and writer share, and the digest.
type ledger struct {
	sum      hash.Hash
	buf      []byte
	previous Entry
	Summary
}

func newLedger() ledger {
	l := ledger{sum: NewHash()}
	io.WriteString(l.sum, digestLabel)
	return l
}

// add checks that e may follow the entries so far, and counts it.
func (l *ledger) add(e *Entry) error {
	if l.Entries == MaxEntries {
		return fmt.Errorf("more than %d entries", MaxEntries)
	}
	if err := CheckPath(e.Path); err != nil {
		return err
	}
	if e.Mode > MaxMode {
		return fmt.Errorf("%s: mode %#o holds more than permission bits", quote(e.Path), e.Mode)
	}
	switch e.Kind {
	case File:
		if e.Size < 0 || e.Size > MaxFileSize {
			return fmt.Errorf("%s: size %d is not between 0 and %d", quote(e.Path), e.Size, int64(MaxFileSize))
		}
		if l.Bytes+e.Size > MaxBytes {
			return fmt.Errorf("%s: more than %d bytes in all", quote(e.Path), int64(MaxBytes))
		}
	case Folder:
		if e.Size != 0 || e.Sum != (Sum{}) {
			return fmt.Errorf("%s: a folder has neither size nor sum", quote(e.Path))
		}
	default:
		return fmt.Errorf("%s: kind %q is neither file nor folder", quote(e.Path), byte(e.Kind))
	}
	if err := l.checkPlace(e.Path); err != nil {
		return err
	}
	l.previous.Path, l.previous.Kind = e.Path, e.Kind
	l.Entries++
	l.Bytes += e.Size
	if e.Kind == File {
		l.Files++
	}
	b := append(l.buf[:0], byte(e.Kind))
	b = binary.AppendUvarint(b, uint64(len(e.Path)))
	b = append(b, e.Path...)
	b = binary.AppendUvarint(b, uint64(e.Mode))
	if e.Kind == File {
		b = binary.AppendUvarint(b, uint64(e.Size))
		b = append(b, e.Sum[:]...)
	}
	l.sum.Write(b)
	l.buf = b
	return nil
}

// checkPlace checks the order, and that the parent is a folder of this
// manifest. Because every entry before passed the same check, all proper parents
// of the previous path are folders, and no others can still be open.
func (l *ledger) checkPlace(path string) error {
	last := l.previous.Path
	if l.Entries > 0 {
		switch c := ComparePaths(last, path); {
		case c == 0:
			return fmt.Errorf("%s is listed twice", quote(path))
		case c > 0:
			return fmt.Errorf("%s comes after %s: not in order", quote(path), quote(last))
		}
	}
	i := strings.LastIndexByte(path, '/')
	if i < 0 {
		return nil
	}
	parent := path[:i]
	if last == parent && l.previous.Kind == Folder {
		return nil
	}
	if len(last) > i && last[i] == '/' && last[:i] == parent {
		return nil
	}
	if last == parent {
		return fmt.Errorf("%s lies in %s, which is a file", quote(path), quote(parent))
	}
	return fmt.Errorf("%s lies in a folder that is not listed", quote(path))
}

func (l *ledger) finish() Summary {
	l.Digest = SumOf(l.sum)
	return l.Summary
}

func commonPrefix(a, b string) int {
	n := min(len(a), len(b))
	i := 0
	for i < n && a[i] == b[i] {
		i++
	}
	return i
}

// Writer writes a manifest. It must be closed; what was written before Close is
// no manifest yet.
type Writer struct {
	w   *bufio.Writer
	l   ledger
	buf []byte
	err error
}

// NewWriter starts a manifest on w. It buffers; Close flushes.
func NewWriter(w io.Writer) *Writer {
	m := &Writer{w: bufio.NewWriterSize(w, 64<<10), l: newLedger()}
	_, m.err = m.w.WriteString(magic)
	return m
}

// Add writes one entry. The first error is final: every later call returns it.
func (m *Writer) Add(e Entry) error {
	if m.err != nil {
		return m.err
	}
	index, previous := m.l.Entries, m.l.previous.Path
	if err := m.l.add(&e); err != nil {
		m.err = fmt.Errorf("write manifest entry %d: %w", index, err)
		return m.err
	}
	m.buf = appendEntry(m.buf[:0], &e, commonPrefix(previous, e.Path))
	_, m.err = m.w.Write(m.buf)
	return m.err
}

// appendEntry encodes e, whose path has its first shared bytes in common with the
// entry before.
func appendEntry(b []byte, e *Entry, shared int) []byte {
	b = append(b, byte(e.Kind))
	b = binary.AppendUvarint(b, uint64(shared))
	b = binary.AppendUvarint(b, uint64(len(e.Path)-shared))
	b = append(b, e.Path[shared:]...)
	b = binary.AppendUvarint(b, uint64(e.Mode))
	b = binary.AppendVarint(b, e.MTime)
	if e.Kind == File {
		b = binary.AppendUvarint(b, uint64(e.Size))
		b = append(b, e.Sum[:]...)
	}
	return b
}

// Close ends the manifest and returns what it holds. It does not close the
// underlying writer.
func (m *Writer) Close() (Summary, error) {
	if m.err != nil {
		return Summary{}, m.err
	}
	s := m.l.finish()
	b := append(m.buf[:0], tagEnd)
	b = binary.AppendUvarint(b, uint64(s.Entries))
	b = binary.AppendUvarint(b, uint64(s.Bytes))
	b = append(b, s.Digest[:]...)
	if _, m.err = m.w.Write(b); m.err == nil {
		m.err = m.w.Flush()
	}
	if m.err != nil {
		return Summary{}, m.err
	}
	m.err = errors.New("write to a manifest that was closed")
	return s, nil
}
