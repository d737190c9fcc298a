package manifest

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/bits"
)

// Set is a set of entry indexes of one manifest: one bit for each entry, so that
// ten million entries cost 1.2 MB. A Set is not safe for concurrent changes.
type Set struct {
	words  []uint64
	length int64 // entries in the manifest
	count  int64
}

// NewSet returns an empty set over a manifest of n entries.
func NewSet(n int64) *Set {
	return &Set{words: make([]uint64, (n+63)/64), length: n}
}

// Add puts index i into the set. An index outside the manifest is an error of
// the caller and panics.
func (s *Set) Add(i int64) {
	if i < 0 || i >= s.length {
		panic(fmt.Sprintf("manifest: index %d of %d entries", i, s.length))
	}
	bit := uint64(1) << (i % 64)
	if s.words[i/64]&bit == 0 {
		s.words[i/64] |= bit
		s.count++
	}
}

// Remove takes index i out of the set.
func (s *Set) Remove(i int64) {
	if s.Has(i) {
		s.words[i/64] &^= 1 << (i % 64)
		s.count--
	}
}

// Has reports whether i is in the set; it is false outside the manifest.
func (s *Set) Has(i int64) bool {
	return i >= 0 && i < s.length && s.words[i/64]&(1<<(i%64)) != 0
}

// Len is the number of indexes in the set.
func (s *Set) Len() int64 { return s.count }

// Entries is the number of entries of the manifest that the set is about.
func (s *Set) Entries() int64 { return s.length }

// All yields the indexes in ascending order.
func (s *Set) All() iter.Seq[int64] {
	return func(yield func(int64) bool) {
		for w, word := range s.words {
			for ; word != 0; word &= word - 1 {
				if !yield(int64(w)*64 + int64(bits.TrailingZeros64(word))) {
					return
				}
			}
		}
	}
}

// WriteTo writes the set as runs: for each, varints of the distance from the end
// of the run before and of the run's length, which is at least 1; 0 0 at the end.
func (s *Set) WriteTo(w io.Writer) (int64, error) {
	b := bufio.NewWriter(w)
	var written int64
	var start, next, done int64 = -1, -1, 0
	run := func(first, length int64) {
		buf := binary.AppendUvarint(binary.AppendUvarint(nil, uint64(first-done)), uint64(length))
		n, _ := b.Write(buf) // bufio keeps the error for Flush
		written += int64(n)
		done = first + length
	}
	for i := range s.All() {
		if i == next {
			next++
			continue
		}
		if start >= 0 {
			run(start, next-start)
		}
		start, next = i, i+1
	}
	if start >= 0 {
		run(start, next-start)
	}
	n, _ := b.Write([]byte{0, 0})
	return written + int64(n), b.Flush()
}

// ReadSet reads what WriteTo wrote, for a manifest of n entries. It reads no byte
// too many, and refuses runs that are empty, that touch or that pass n.
func ReadSet(r io.ByteReader, n int64) (*Set, error) {
	s := NewSet(n)
	var done int64
	for first := true; ; first = false {
		gap, err := ReadUvarint(r.ReadByte)
		if err != nil {
			return nil, fmt.Errorf("read set of entries: %w", unexpected(err))
		}
		length, err := ReadUvarint(r.ReadByte)
		if err != nil {
			return nil, fmt.Errorf("read set of entries: %w", unexpected(err))
		}
		if gap == 0 && length == 0 {
			return s, nil
		}
		if length == 0 || gap == 0 && !first {
			return nil, errors.New("read set of entries: an empty run, or two that touch")
		}
		if gap > uint64(n-done) || length > uint64(n-done)-gap {
			return nil, fmt.Errorf("read set of entries: a run of %d, %d after %d, in a manifest of %d entries", length, gap, done, n)
		}
		for i := done + int64(gap); i < done+int64(gap+length); i++ {
			s.Add(i)
		}
		done += int64(gap + length)
	}
}

func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
