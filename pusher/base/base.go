// Package base remembers what a target's newest generation of a Borg repository
// holds, so that a push can say "copy it from there" instead of sending it again:
// Borg's compaction moves chunks into new segment files, and its index is written
// anew by each run.
//
// For each target and repository [Memory] keeps one file: of every segment the
// entries' sizes and fingerprints, 10 to 12 bytes each, and which index, hints and
// integrity files the generation has. The latter are kept whole, as hard links
// where several targets have the same. [Memory.Plan] compares them with the files of
// the next push and gives, for every file, the steps that build it.
//
// Nothing here has to be true. A fingerprint that fits by accident, or a file that
// rotted, makes the target build a file with another hash than the manifest's,
// which it refuses ([farkeep/shared/recipe.Build]); the push then goes on without
// copies. What is lost is made anew after the next commit, from the repository's
// own entry headers. No passphrase is needed for any of it.
//
// Memory does not grow with the repository but with what is to be sent: 16 bytes
// for each of its entries, and the entries of one segment. The notes are read once
// for a plan and once to make the next.
package base

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"farkeep/shared/borgsegment"
	"farkeep/shared/manifest"
)

// Limits. A repository of 4 TB has about 3 million chunks.
const (
	// maxWanted bounds the entries of the files to send that are looked for, at 16
	// bytes of memory each; what comes after them is sent whole.
	maxWanted = 8 << 20
	// maxNotes bounds what is noted of one segment, in bytes: the entries of 20
	// million chunks. Of a segment with more nothing is noted.
	maxNotes = 256 << 20
	// MaxKept bounds a file that is kept whole, in bytes: Borg's index of 20
	// million chunks.
	MaxKept = 1 << 30
)

// The file of a target, in the order of the manifest:
//
//	"FKBASE01" digest                      of the generation's manifest
//	segment: 'S' path size sum entries     path: its length, and its bytes
//	         and for each entry            fingerprint (8 bytes, little endian) size
//	kept:    'P' path size sum             its content is kept/SUM
//	end:     'E' blake2b-256 of everything before the sum
//
// Integers are unsigned varints.
const (
	magic      = "FKBASE01"
	tagSegment = 'S'
	tagKept    = 'P'
	tagEnd     = 'E'
)

// errDamaged says that a file of ours is not one, or not a whole one.
var errDamaged = errors.New("the notes on what the target holds are damaged")

// Memory is a folder of notes:
//
//	DIR/REPOSITORY/TARGET.base     what the target's newest generation holds
//	DIR/REPOSITORY/TARGET.manifest its manifest
//	DIR/REPOSITORY/kept/TARGET/SUM its index, hints and integrity files
//
// One process at a time may write it; its methods may be called concurrently.
type Memory struct {
	dir string
	log *slog.Logger
	mu  sync.Mutex // one Remember at a time: it looks at the notes of all targets
}

// Open names the folder; it is made when something is first written.
func Open(dir string, log *slog.Logger) *Memory { return &Memory{dir: dir, log: log} }

func (m *Memory) path(target, repository string) string {
	return filepath.Join(m.dir, repository, target+".base")
}

func (m *Memory) kept(target, repository string, sum manifest.Sum) string {
	return filepath.Join(m.dir, repository, "kept", target, sum.String())
}

// Forget drops what is remembered of a target's generation.
func (m *Memory) Forget(target, repository string) error {
	return forget(m.path(target, repository))
}

func forget(path string) error {
	err := os.Remove(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// Remember notes that target's newest generation of repository has the content of
// list, a manifest with that digest, whose files open gives. Of segments that
// were noted before, for this target or one that has the same generation, nothing
// is read; of new ones the headers. open must give the files as they were listed.
func (m *Memory) Remember(ctx context.Context, target, repository string, digest manifest.Sum, list io.ReadSeeker, open func(path string) (*os.File, error)) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("note what %s holds of %s: %w", target, repository, err)
		}
	}()
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := os.MkdirAll(filepath.Dir(m.kept(target, repository, digest)), 0o700); err != nil {
		return err
	}
	old, err := openFile(m.path(target, repository))
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case errors.Is(err, errDamaged):
		m.log.Warn("made anew", "repository", repository, "target", target, "err", err)
	case err != nil:
		return err
	default:
		defer old.close()
		if old.digest == digest {
			if err := old.drain(); err == nil {
				return nil
			}
			m.log.Warn("made anew", "repository", repository, "target", target, "err", old.err)
			old = nil
		}
	}
	if other := m.same(target, repository, digest); other != nil {
		defer other.close()
		old = other
	}
	err = m.write(ctx, target, repository, digest, list, open, old)
	if errors.Is(err, errDamaged) {
		m.log.Warn("made anew", "repository", repository, "target", target, "err", err)
		if _, err := list.Seek(0, io.SeekStart); err != nil {
			return err
		}
		err = m.write(ctx, target, repository, digest, list, open, nil)
	}
	return err
}

// same opens the notes on another target, whichever, that has the generation with
// that digest; nil if there is none.
func (m *Memory) same(target, repository string, digest manifest.Sum) *reader {
	paths, err := filepath.Glob(filepath.Join(m.dir, repository, "*.base"))
	if err != nil {
		return nil
	}
	for _, path := range paths {
		if path == m.path(target, repository) {
			continue
		}
		if r, err := openFile(path); err == nil {
			if r.digest == digest {
				return r
			}
			r.close()
		}
	}
	return nil
}

// write makes the notes anew; what old has of the segments of list, it is spared
// to read. It is errDamaged if that was not to be trusted.
func (m *Memory) write(ctx context.Context, target, repository string, digest manifest.Sum, list io.Reader, open func(path string) (*os.File, error), old *reader) error {
	w, err := m.create(target, repository, digest)
	if err != nil {
		return err
	}
	defer w.discard()
	kept := map[string]bool{}
	before := old.next() // nil: none any more
	in := manifest.NewReader(list)
	entries := borgsegment.NewReader(borgsegment.Headers)
	for {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		e, err := in.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if e.Kind != manifest.File {
			continue
		}
		for before != nil && manifest.ComparePaths(before.path, e.Path) < 0 {
			before = old.next()
		}
		switch {
		case isKept(e.Path) && e.Size <= MaxKept:
			if err := m.keep(target, repository, e, open); err != nil {
				return err
			}
			kept[e.Sum.String()] = true
			w.kept(e)
		case !isSegment(e.Path):
		case before != nil && before.path == e.Path && before.size == e.Size && before.sum == e.Sum && before.tag == tagSegment:
			w.segment(e, before.notes)
		default:
			notes, err := read(entries, e, open)
			if err != nil {
				return err
			}
			w.segment(e, notes)
		}
	}
	// Only at the end of them it is known that what they had was right.
	if err := old.drain(); err != nil {
		return err
	}
	if err := w.commit(); err != nil {
		return err
	}
	return m.sweep(target, repository, kept)
}

// read notes the entries of a segment; none of what is no segment.
func read(entries *borgsegment.Reader, e manifest.Entry, open func(string) (*os.File, error)) (notes []byte, err error) {
	f, err := open(e.Path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	entries.Reset(f, e.Size)
	var entry borgsegment.Entry
	for entries.Next(&entry) && len(notes) <= maxNotes {
		notes = binary.LittleEndian.AppendUint64(notes, fingerprint(&entry))
		notes = binary.AppendUvarint(notes, uint64(entry.Size))
	}
	var format *borgsegment.FormatError
	if errors.As(entries.Err(), &format) || len(notes) > maxNotes {
		return nil, nil
	}
	return notes, entries.Err()
}

// fingerprint stands for an entry with all its bytes: two with the same key, size
// and CRC are the same, or a hash finds out. It is FNV-1a, as hash/fnv has it.
func fingerprint(e *borgsegment.Entry) uint64 {
	var b [borgsegment.KeyedSize]byte
	binary.LittleEndian.PutUint32(b[:], e.CRC)
	binary.LittleEndian.PutUint32(b[4:], e.Size)
	b[8] = byte(e.Tag)
	copy(b[borgsegment.HeaderSize:], e.Key[:])
	h := uint64(14695981039346656037)
	for _, c := range b {
		h = (h ^ uint64(c)) * 1099511628211
	}
	return h
}

func isSegment(path string) bool {
	_, ok := borgsegment.PathNumber(path)
	return ok
}

// kind is what a file of a repository's top folder is a version of: "index" for
// "index.12"; "" for all others.
func kind(path string) string {
	name, number, ok := strings.Cut(path, ".")
	if _, isNumber := borgsegment.Number(number); !ok || !isNumber {
		return ""
	}
	switch name {
	case "index", "hints", "integrity":
		return name
	}
	return ""
}

func isKept(path string) bool { return kind(path) != "" }

// keep gives target a file's content in kept/, unless it has it.
func (m *Memory) keep(target, repository string, e manifest.Entry, open func(string) (*os.File, error)) error {
	to := m.kept(target, repository, e.Sum)
	if info, err := os.Stat(to); err == nil && info.Size() == e.Size {
		return nil
	}
	others, err := filepath.Glob(m.kept("*", repository, e.Sum))
	if err != nil {
		return err
	}
	for _, other := range others {
		if info, err := os.Stat(other); err == nil && info.Size() == e.Size && os.Link(other, to) == nil {
			return nil
		}
	}
	in, err := open(e.Path)
	if err != nil {
		return err
	}
	defer in.Close()
	return replace(to, io.LimitReader(in, e.Size))
}

// sweep removes what is kept of target's generations before.
func (m *Memory) sweep(target, repository string, used map[string]bool) error {
	folder := filepath.Dir(m.kept(target, repository, manifest.Sum{}))
	kept, err := os.ReadDir(folder)
	if err != nil {
		return err
	}
	for _, k := range kept {
		if !used[k.Name()] {
			if err := forget(filepath.Join(folder, k.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// note is one record of a target's file.
type note struct {
	tag   byte
	path  string
	size  int64
	sum   manifest.Sum
	notes []byte // of a segment: fingerprints and sizes; valid until the next record
}

// each calls visit for each entry of a segment, with its place; false at the
// first that makes no sense.
func (n *note) each(visit func(fingerprint uint64, offset int64)) bool {
	offset := int64(len(borgsegment.Magic))
	for b := n.notes; len(b) > 0; {
		if len(b) < 9 {
			return false
		}
		print := binary.LittleEndian.Uint64(b)
		size, used := binary.Uvarint(b[8:])
		if used <= 0 || size > borgsegment.MaxEntry || offset+int64(size) > n.size {
			return false
		}
		visit(print, offset)
		offset += int64(size)
		b = b[8+used:]
	}
	return true
}

// reader reads a target's file once, from its beginning to its end, where it turns
// out whether its sum is right. All methods but close do nothing on a nil reader.
type reader struct {
	path   string
	f      *os.File
	r      *bufio.Reader
	h      hash.Hash
	size   int64 // of the file
	digest manifest.Sum
	buf    []byte
	n      note
	ended  bool
	err    error // once ended: nil, or what is wrong with the file
}

func openFile(path string) (*reader, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	r := &reader{path: path, f: f, h: manifest.NewHash()}
	if err := r.head(); err != nil {
		f.Close()
		return nil, err
	}
	return r, nil
}

func (r *reader) damaged() error { return fmt.Errorf("%s: %w", r.path, errDamaged) }

func (r *reader) head() error {
	info, err := r.f.Stat()
	if err != nil {
		return err
	}
	r.size = info.Size()
	r.r = bufio.NewReaderSize(io.TeeReader(io.NewSectionReader(r.f, 0, r.body()), r.h), 256<<10)
	var head [len(magic)]byte
	if _, err := io.ReadFull(r.r, head[:]); err != nil || string(head[:]) != magic {
		return r.damaged()
	}
	if _, err := io.ReadFull(r.r, r.digest[:]); err != nil {
		return r.damaged()
	}
	return nil
}

// body is how much of the file the sum covers, in bytes.
func (r *reader) body() int64 { return max(0, r.size-int64(len(manifest.Sum{}))) }

func (r *reader) close() { r.f.Close() }

// next returns the next record; nil at the end, and after it. What it returns is
// bounded, and to be trusted only once drain has found the sum right.
func (r *reader) next() *note {
	if r == nil || r.ended {
		return nil
	}
	tag, err := r.r.ReadByte()
	if err == nil && (tag == tagSegment || tag == tagKept) && r.record(tag) {
		return &r.n
	}
	r.ended = true
	var sum manifest.Sum
	if tag == tagEnd && err == nil {
		if _, err = r.r.ReadByte(); errors.Is(err, io.EOF) {
			_, err = r.f.ReadAt(sum[:], r.body())
		} else {
			err = errDamaged
		}
	}
	if err != nil || tag != tagEnd || sum != manifest.SumOf(r.h) {
		r.err = r.damaged()
	}
	return nil
}

// drain reads what is left, and tells whether all of it was whole.
func (r *reader) drain() error {
	for r.next() != nil {
	}
	if r == nil {
		return nil
	}
	return r.err
}

func (r *reader) record(tag byte) bool {
	r.n = note{tag: tag}
	length, ok := r.uvarint(manifest.MaxPath)
	if !ok {
		return false
	}
	path := make([]byte, length)
	if _, err := io.ReadFull(r.r, path); err != nil || manifest.CheckPath(string(path)) != nil {
		return false
	}
	r.n.path = string(path)
	if r.n.size, ok = r.uvarint(manifest.MaxFileSize); !ok {
		return false
	}
	if _, err := io.ReadFull(r.r, r.n.sum[:]); err != nil {
		return false
	}
	if tag == tagKept {
		return true
	}
	if length, ok = r.uvarint(min(maxNotes, r.size)); !ok {
		return false
	}
	if int64(cap(r.buf)) < length {
		r.buf = make([]byte, length)
	}
	r.n.notes = r.buf[:length]
	_, err := io.ReadFull(r.r, r.n.notes)
	return err == nil
}

func (r *reader) uvarint(limit int64) (int64, bool) {
	v, err := manifest.ReadUvarint(r.r.ReadByte)
	return int64(v), err == nil && v <= uint64(limit)
}

// writer makes a target's file anew.
type writer struct {
	to  string
	f   *os.File
	h   hash.Hash
	w   *bufio.Writer
	buf []byte
}

func (m *Memory) create(target, repository string, digest manifest.Sum) (*writer, error) {
	to := m.path(target, repository)
	f, err := os.CreateTemp(filepath.Dir(to), ".new-*")
	if err != nil {
		return nil, err
	}
	w := &writer{to: to, f: f, h: manifest.NewHash()}
	w.w = bufio.NewWriterSize(io.MultiWriter(f, w.h), 64<<10)
	w.w.WriteString(magic) // bufio keeps the first error for Flush
	w.w.Write(digest[:])
	return w, nil
}

func (w *writer) head(tag byte, e manifest.Entry) {
	b := append(w.buf[:0], tag)
	b = binary.AppendUvarint(b, uint64(len(e.Path)))
	b = append(b, e.Path...)
	b = binary.AppendUvarint(b, uint64(e.Size))
	w.buf = append(b, e.Sum[:]...)
	w.w.Write(w.buf)
}

func (w *writer) kept(e manifest.Entry) { w.head(tagKept, e) }

func (w *writer) segment(e manifest.Entry, notes []byte) {
	w.head(tagSegment, e)
	w.buf = binary.AppendUvarint(w.buf[:0], uint64(len(notes)))
	w.w.Write(w.buf)
	w.w.Write(notes)
}

// commit puts the file into its place. It is not synced: after a power cut the
// file before it, a damaged one or none is there, and each of them will do.
func (w *writer) commit() error {
	w.w.WriteByte(tagEnd)
	if err := w.w.Flush(); err != nil {
		return err
	}
	sum := manifest.SumOf(w.h)
	if _, err := w.f.Write(sum[:]); err != nil {
		return err
	}
	if err := w.f.Close(); err != nil {
		return err
	}
	err := os.Rename(w.f.Name(), w.to)
	w.f = nil
	return err
}

func (w *writer) discard() {
	if w.f != nil {
		w.f.Close()
		os.Remove(w.f.Name())
	}
}
