package main

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"farkeep/shared/borgsegment"
)

// large is a repository of very many chunks that no borg made: its segments, their
// entries and the names of its files are as borg makes them, but a chunk has only
// chunkData bytes, and index and hints are noise of the right length. Farkeep cannot
// tell; what it needs of memory and time depends on how many there are, not on
// how long they are.
type large struct {
	Path string
	// Each is how many chunks a segment has.
	Each int

	segments [][]uint64 // the chunks of each segment; nil for one that is gone
	chunk    uint64     // the last one that was made
	index    []byte
}

// chunkData is the length of a chunk of a [large], in bytes.
const chunkData = 40

// newLarge makes one with so many segments in a new folder path.
func newLarge(t testing.TB, path string, segments, each int) *large {
	t.Helper()
	l := &large{Path: path, Each: each}
	for name, content := range map[string]string{
		"README": "This is a Borg Backup repository.\n",
		"config": "[repository]\nversion = 1\nsegments_per_dir = 1000\nmax_segment_size = 524288000\nid = " + fmt.Sprintf("%064x", 1) + "\n",
	} {
		if err := os.MkdirAll(filepath.Join(path, "data"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(path, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	l.grow(t, segments)
	l.commit(t)
	return l
}

// grow adds segments of new chunks.
func (l *large) grow(t testing.TB, segments int) {
	for range segments {
		chunks := make([]uint64, l.Each)
		for i := range chunks {
			l.chunk++
			chunks[i] = l.chunk
		}
		l.add(t, chunks)
	}
}

// Compact is a day on which borg drops one chunk of ten from every second segment,
// moves the others of them into new segments, and adds some segments of new chunks.
func (l *large) compact(t testing.TB, segments int) {
	t.Helper()
	var moved []uint64
	for n := 0; n < len(l.segments); n += 2 {
		if l.segments[n] == nil {
			continue
		}
		for i, c := range l.segments[n] {
			if i%10 != 0 {
				moved = append(moved, c)
			}
		}
		l.segments[n] = nil
		if err := os.Remove(l.file(n)); err != nil {
			t.Fatal(err)
		}
	}
	for len(moved) > 0 {
		n := min(l.Each, len(moved))
		l.add(t, moved[:n:n])
		moved = moved[n:]
	}
	l.grow(t, segments)
	l.commit(t)
}

func (l *large) file(n int) string {
	return filepath.Join(l.Path, "data", fmt.Sprint(n/1000), fmt.Sprint(n))
}

// add writes a segment.
func (l *large) add(t testing.TB, chunks []uint64) {
	t.Helper()
	path := l.file(len(l.segments))
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	b := []byte(borgsegment.Magic)
	for _, c := range chunks {
		var e [borgsegment.KeyedSize + chunkData]byte
		binary.LittleEndian.PutUint32(e[4:], uint32(len(e)))
		r := rand.NewPCG(c, 0)
		for i := borgsegment.HeaderSize; i+8 <= len(e); i += 8 {
			binary.LittleEndian.PutUint64(e[i:], r.Uint64())
		}
		binary.LittleEndian.PutUint32(e[:], crc32.ChecksumIEEE(e[4:]))
		b = append(b, e[:]...)
	}
	l.write(t, path, b)
	l.segments = append(l.segments, chunks)
}

// write writes a file that is old enough to be cached by a listing.
func (l *large) write(t testing.TB, path string, content []byte) {
	t.Helper()
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	old := time.Now().Add(-time.Hour)
	if err := os.Chtimes(path, old, old); err != nil {
		t.Fatal(err)
	}
}

// commit ends a transaction: a segment with a commit, and the files of its number.
func (l *large) commit(t testing.TB) {
	t.Helper()
	for _, name := range []string{"index", "hints", "integrity"} {
		old, err := filepath.Glob(filepath.Join(l.Path, name+".*"))
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range old {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}
	}
	number := len(l.segments)
	var end [borgsegment.HeaderSize]byte
	binary.LittleEndian.PutUint32(end[4:], borgsegment.HeaderSize)
	end[8] = byte(borgsegment.Commit)
	binary.LittleEndian.PutUint32(end[:], crc32.ChecksumIEEE(end[4:]))
	path := l.file(number)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	l.write(t, path, append([]byte(borgsegment.Magic), end[:]...))
	l.segments = append(l.segments, []uint64{})

	// Borg's index has 40 bytes for a chunk and is at most 93 % full; on such a day a
	// tenth of it changes.
	random := rand.New(rand.NewPCG(l.chunk, 1))
	if want := int(l.chunk) * 43; len(l.index) < want {
		more := make([]byte, want-len(l.index))
		for i := 0; i+8 <= len(more); i += 8 {
			binary.LittleEndian.PutUint64(more[i:], random.Uint64())
		}
		l.index = append(l.index, more...)
	}
	for range len(l.index) / 400 {
		at := random.IntN(len(l.index)/40) * 40
		binary.LittleEndian.PutUint64(l.index[at+32:], random.Uint64())
	}
	l.write(t, filepath.Join(l.Path, fmt.Sprintf("index.%d", number)), l.index)
	f, err := os.Create(filepath.Join(l.Path, fmt.Sprintf("hints.%d", number)))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := bufio.NewWriter(f)
	for n, chunks := range l.segments {
		if chunks != nil {
			fmt.Fprintf(w, "%06d:%04d,", n, len(chunks))
		}
	}
	// What was deleted and not compacted yet is named there, too.
	for range l.chunk / 20 {
		fmt.Fprintf(w, "%016x%016x%016x%016x", random.Uint64(), random.Uint64(), random.Uint64(), random.Uint64())
	}
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	l.write(t, filepath.Join(l.Path, fmt.Sprintf("integrity.%d", number)), fmt.Appendf(nil, "{%d}", number))
}
