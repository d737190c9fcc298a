package base

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/bits"
	"os"
	"slices"

	"farkeep/shared/borgsegment"
	"farkeep/shared/manifest"
)

// minCopy is the shortest range that is worth a copy, which costs about 10 bytes
// of the stream, and a seek of the target's disk: in bytes.
const minCopy = 64

// Step builds a part of a file: a range of a file of the base, or new bytes.
type Step struct {
	Path   string // in the base; "" means new bytes
	Offset int64  // in Path
	Length int64
}

// Plan knows where the base has what the files to send consist of.
type Plan struct {
	memory     *Memory
	target     string
	repository string
	wanted     []uint64 // fingerprints, sorted
	begins     []uint32 // where in wanted those begin whose first bits are the number
	shift      int      // how far right the first bits are
	places     []place  // of each of them
	files      []string // of places
	kept       map[string]keptFile
	entries    *borgsegment.Reader
}

// place is where the base has an entry: offset in files[file-1]; file 0: nowhere.
type place struct{ file, offset uint32 }

type keptFile struct {
	path string
	size int64
	sum  manifest.Sum
}

// Plan looks for the entries of the files to send, which needed yields in the
// manifest's order and open opens, in what is remembered of the generation with
// that digest. It is nil, without an error, when that is not remembered.
func (m *Memory) Plan(ctx context.Context, target, repository string, digest manifest.Sum, needed func(yield func(manifest.Entry) error) error, open func(path string) (*os.File, error)) (*Plan, error) {
	r, err := openFile(m.path(target, repository))
	if errors.Is(err, fs.ErrNotExist) {
		m.log.Info("what the target holds was not noted: nothing is copied there", "repository", repository, "target", target)
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer r.close()
	if r.digest != digest {
		m.log.Info("what was noted is of another generation than the target's newest: nothing is copied there", "repository", repository, "target", target)
		return nil, nil
	}
	p := &Plan{memory: m, target: target, repository: repository, kept: map[string]keptFile{}, entries: borgsegment.NewReader(borgsegment.Headers)}
	if err := needed(func(e manifest.Entry) error { return p.want(ctx, e, open) }); err != nil {
		return nil, err
	}
	p.sort()
	for n := r.next(); n != nil; n = r.next() {
		if err := ctx.Err(); err != nil {
			return nil, context.Cause(ctx)
		}
		if n.tag == tagKept {
			p.kept[kind(n.path)] = keptFile{n.path, n.size, n.sum}
			continue
		}
		used := false
		n.each(func(print uint64, offset int64) {
			at, ok := p.search(print)
			if !ok || p.places[at].file != 0 || offset > 1<<32-1 {
				return
			}
			if !used {
				used = true
				p.files = append(p.files, n.path)
			}
			p.places[at] = place{uint32(len(p.files)), uint32(offset)}
		})
	}
	return p, r.drain()
}

// maxBegins bounds the table of beginnings: 4 MB of it.
const maxBegins = 20 // bits

// sort makes what is wanted fit to be searched. Each of millions of entries of the
// base is looked for, and most in vain: the table tells where to look at once.
func (p *Plan) sort() {
	slices.Sort(p.wanted)
	p.wanted = slices.Compact(p.wanted)
	p.places = make([]place, len(p.wanted))
	width := min(bits.Len(uint(len(p.wanted))), maxBegins)
	p.shift = 64 - width
	p.begins = make([]uint32, 1<<width+1)
	for _, print := range p.wanted {
		p.begins[print>>p.shift+1]++
	}
	for i := range p.begins[1:] {
		p.begins[i+1] += p.begins[i]
	}
}

// search finds where in wanted a fingerprint is.
func (p *Plan) search(print uint64) (at int, ok bool) {
	first := print >> p.shift
	begin := int(p.begins[first])
	at, ok = slices.BinarySearch(p.wanted[begin:p.begins[first+1]], print)
	return begin + at, ok
}

// want collects the fingerprints of a segment that is to be sent.
func (p *Plan) want(ctx context.Context, e manifest.Entry, open func(string) (*os.File, error)) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if !isSegment(e.Path) {
		return nil
	}
	f, err := open(e.Path)
	if err != nil {
		return err
	}
	defer f.Close()
	p.entries.Reset(f, e.Size)
	var entry borgsegment.Entry
	for p.entries.Next(&entry) && len(p.wanted) < maxWanted {
		if worth(&entry) {
			p.wanted = append(p.wanted, fingerprint(&entry))
		}
	}
	return ignoreFormat(p.entries.Err())
}

// worth reports whether an entry is worth a copy.
func worth(e *borgsegment.Entry) bool { return e.Tag == borgsegment.Put && e.Size >= minCopy }

func ignoreFormat(err error) error {
	var format *borgsegment.FormatError
	if errors.As(err, &format) {
		return nil
	}
	return err
}

func (p *Plan) find(e *borgsegment.Entry) (place, bool) {
	at, ok := p.search(fingerprint(e))
	if !ok || p.places[at].file == 0 {
		return place{}, false
	}
	return p.places[at], true
}

// Steps tells how to build the file e, which f holds. The steps' lengths sum up
// to its size.
func (p *Plan) Steps(e manifest.Entry, f *os.File) ([]Step, error) {
	var s steps
	var err error
	switch {
	case isSegment(e.Path):
		err = p.segment(&s, e, f)
	case isKept(e.Path):
		err = p.version(&s, e, f)
	}
	if err != nil {
		return nil, fmt.Errorf("compare %s with what the target holds: %w", e.Path, err)
	}
	s.fresh(e.Size - s.length)
	return s.list, nil
}

// steps gathers steps and joins neighbours.
type steps struct {
	list   []Step
	length int64
}

func (s *steps) add(path string, offset, n int64) {
	if n <= 0 {
		return
	}
	s.length += n
	if last := len(s.list) - 1; last >= 0 && s.list[last].Path == path && (path == "" || s.list[last].Offset+s.list[last].Length == offset) {
		s.list[last].Length += n
		return
	}
	s.list = append(s.list, Step{path, offset, n})
}

func (s *steps) fresh(n int64) { s.add("", 0, n) }

// segment finds the runs of entries that lie in the base as they lie here.
func (p *Plan) segment(s *steps, e manifest.Entry, f *os.File) error {
	p.entries.Reset(f, e.Size)
	var entry borgsegment.Entry
	for p.entries.Next(&entry) {
		at, ok := place{}, false
		if worth(&entry) {
			at, ok = p.find(&entry)
		}
		if !ok {
			continue // new bytes up to the next copy
		}
		s.fresh(entry.Offset - s.length)
		s.add(p.files[at.file-1], int64(at.offset), int64(entry.Size))
	}
	// Behind what is no entry everything is new bytes.
	return ignoreFormat(p.entries.Err())
}

// version compares a file with the version of it that the base has. Borg's index
// is a hash table: what did not change stays where it was, so the same places are
// compared. Its hints move a little, and are looked through for what moved.
func (p *Plan) version(s *steps, e manifest.Entry, f *os.File) error {
	old, ok := p.kept[kind(e.Path)]
	if !ok || e.Size > MaxKept {
		return nil
	}
	was, err := os.Open(p.memory.kept(p.target, p.repository, old.sum))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer was.Close()
	if info, err := was.Stat(); err != nil || info.Size() != old.size {
		return err
	}
	if e.Size == old.size || kind(e.Path) == "index" || max(e.Size, old.size) > maxMoved {
		return samePlaces(s, old.path, io.NewSectionReader(was, 0, old.size), io.NewSectionReader(f, 0, e.Size))
	}
	return movedPlaces(s, old.path, io.NewSectionReader(was, 0, old.size), io.NewSectionReader(f, 0, e.Size))
}

// samePlaces copies the ranges that are alike at the same offset, of minRun bytes
// or more.
func samePlaces(s *steps, path string, was, is io.Reader) error {
	const minRun = 16 // a copy of the previous path is 8 bytes
	a, b := make([]byte, 256<<10), make([]byte, 256<<10)
	var at, run int64 // where a and b lie; the length of the run that ends there
	flush := func(end int64) {
		if run >= minRun {
			s.fresh(end - run - s.length)
			s.add(path, end-run, run)
		}
		run = 0
	}
	for {
		n, err := io.ReadFull(was, a)
		k, err2 := io.ReadFull(is, b)
		for i := 0; i < min(n, k); {
			if a[i] == b[i] {
				same := alike(a[i:n], b[i:k])
				run += int64(same)
				i += same
				continue
			}
			flush(at + int64(i))
			i++
		}
		at += int64(min(n, k))
		for _, err := range []error{err, err2} {
			if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
				return err
			}
		}
		if n < len(a) || k < len(b) {
			flush(at)
			return nil
		}
	}
}

// alike is how many bytes a and b have in common at their beginning.
func alike(a, b []byte) int {
	n, limit := 0, min(len(a), len(b))
	for n+64 <= limit && bytes.Equal(a[n:n+64], b[n:n+64]) {
		n += 64
	}
	for n < limit && a[n] == b[n] {
		n++
	}
	return n
}

const (
	// maxMoved bounds files that are looked through for what moved, in bytes: both
	// are held in memory.
	maxMoved = 32 << 20
	// grain is the length of the pieces that are looked for.
	grain = 32
	// factor of the rolling hash: odd, and otherwise of no meaning.
	factor = 0x9e3779b97f4a7c15
)

// sized is a reader that knows how much it has.
type sized interface {
	io.Reader
	Size() int64
}

func readAll(r sized) ([]byte, error) {
	b := make([]byte, r.Size())
	_, err := io.ReadFull(r, b)
	return b, err
}

// pieces finds the pieces of grain bytes that old consists of: a hash table of
// their numbers, at most half full.
type pieces struct {
	old   []byte
	table []uint32 // number of the piece, from 1; 0: none
	shift int
}

func newPieces(old []byte) *pieces {
	p := &pieces{old: old, shift: 64}
	n := 1
	for ; n < 2*(len(old)/grain)+2; n *= 2 {
		p.shift--
	}
	p.table = make([]uint32, n)
	for i := 0; i+grain <= len(old); i += grain {
		piece := old[i : i+grain]
		if slot, taken := p.slot(roll(piece), piece); !taken {
			p.table[slot] = uint32(i/grain) + 1
		}
	}
	return p
}

// slot is where piece, whose hash is h, is or would be.
func (p *pieces) slot(h uint64, piece []byte) (slot int, taken bool) {
	for slot = int(h * factor >> p.shift); p.table[slot] != 0; slot = (slot + 1) % len(p.table) {
		if bytes.Equal(p.at(slot), piece) {
			return slot, true
		}
	}
	return slot, false
}

func (p *pieces) at(slot int) []byte {
	i := int(p.table[slot]-1) * grain
	return p.old[i : i+grain]
}

// movedPlaces copies what is found anywhere in the old version, in pieces of
// grain bytes that are then extended (the idea of rsync's algorithm, with the old
// bytes at hand).
func movedPlaces(s *steps, path string, was, is sized) error {
	old, err := readAll(was)
	if err != nil {
		return err
	}
	now, err := readAll(is)
	if err != nil {
		return err
	}
	pieces := newPieces(old)
	out := uint64(1) // factor to the power of grain-1: the weight of the byte that leaves
	for range grain - 1 {
		out *= factor
	}
	h, valid := uint64(0), false
	for i := 0; i+grain <= len(now); {
		if !valid {
			h, valid = roll(now[i:i+grain]), true
		}
		slot, found := pieces.slot(h, now[i:i+grain])
		if !found {
			if i+grain < len(now) {
				h = (h-uint64(now[i])*out)*factor + uint64(now[i+grain])
			}
			i++
			continue
		}
		start, at := i, int(pieces.table[slot]-1)*grain
		for start > int(s.length) && at > 0 && old[at-1] == now[start-1] {
			start, at = start-1, at-1
		}
		n := alike(old[at:], now[start:])
		s.fresh(int64(start) - s.length)
		s.add(path, int64(at), int64(n))
		i, valid = start+n, false
	}
	return nil
}

func roll(p []byte) (h uint64) {
	for _, b := range p {
		h = h*factor + uint64(b)
	}
	return h
}
