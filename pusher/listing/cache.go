package listing

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"

	"farkeep/shared/atomicfile"
	"farkeep/shared/manifest"
)

// The cache is a file of records in the order of a manifest, so that a walk and
// the cache are merged in one pass and neither is held in memory:
//
//	"FKCACHE2"
//	record: 'F' shared length rest size mtime ctime inode day sum
//	        day: days since 1970, when all of it was read last
//	end:    'E' blake2b-256 of everything before the sum
//
// It is nobody's but ours; it is checked because a disk may rot, not because of
// enemies: whoever can write it can write the repositories.
const (
	cacheMagic  = "FKCACHE2"
	cacheRecord = 'F'
	cacheEnd    = 'E'
)

// identity is what the file system says of a file's content without reading it.
type identity struct {
	size, mtime, ctime int64
	inode              uint64
}

type record struct {
	path string
	identity
	sum  manifest.Sum
	read int64 // the day, since 1970, on which all of it was read last
}

// errCache says that a cache is not one, or not a whole one.
var errCache = errors.New("the hash cache is damaged")

// cacheReader reads a cache that [checkCache] has found whole.
type cacheReader struct {
	r    *bufio.Reader
	path []byte
}

// openCache opens the cache at path, nil for none. A cache that is damaged
// counts as none: its sums are worth nothing.
func openCache(path string) (*os.File, *cacheReader, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	if err := checkCache(f); err != nil {
		f.Close()
		return nil, nil, err
	}
	var head [len(cacheMagic)]byte
	if _, err := f.ReadAt(head[:], 0); err != nil || string(head[:]) != cacheMagic {
		f.Close()
		return nil, nil, errors.Join(err, errCache)
	}
	if _, err := f.Seek(int64(len(cacheMagic)), io.SeekStart); err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, &cacheReader{r: bufio.NewReaderSize(f, 64<<10)}, nil
}

// checkCache reads all of f and checks its sum.
func checkCache(f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	body := info.Size() - int64(len(manifest.Sum{}))
	if body < int64(len(cacheMagic)+1) {
		return errCache
	}
	h := manifest.NewHash()
	in := bufio.NewReaderSize(f, 256<<10)
	if _, err := io.CopyN(h, in, body); err != nil {
		return err
	}
	var sum manifest.Sum
	if _, err := io.ReadFull(in, sum[:]); err != nil {
		return err
	}
	if sum != manifest.SumOf(h) {
		return errCache
	}
	return nil
}

// next returns the next record, io.EOF after the last.
func (c *cacheReader) next() (record, error) {
	r, err := c.read()
	if errors.Is(err, io.ErrUnexpectedEOF) {
		err = errCache
	}
	return r, err
}

func (c *cacheReader) read() (r record, err error) {
	tag, err := c.r.ReadByte()
	if err != nil {
		return r, errCache
	}
	if tag == cacheEnd {
		return r, io.EOF
	}
	if tag != cacheRecord {
		return r, errCache
	}
	var v [7]uint64
	for i := range 2 {
		if v[i], err = binary.ReadUvarint(c.r); err != nil {
			return r, errCache
		}
	}
	if v[0] > uint64(len(c.path)) || v[1] > manifest.MaxPath-v[0] {
		return r, errCache
	}
	c.path = append(c.path[:v[0]], make([]byte, v[1])...)
	if _, err := io.ReadFull(c.r, c.path[v[0]:]); err != nil {
		return r, errCache
	}
	r.path = string(c.path)
	for i := 2; i < 7; i++ {
		if v[i], err = binary.ReadUvarint(c.r); err != nil {
			return r, errCache
		}
	}
	r.identity = identity{int64(v[2]), int64(v[3]), int64(v[4]), v[5]}
	r.read = int64(v[6])
	if _, err := io.ReadFull(c.r, r.sum[:]); err != nil {
		return r, errCache
	}
	return r, nil
}

// cacheWriter writes a cache beside the old one and puts it in its place at the end.
type cacheWriter struct {
	path string
	f    *os.File
	w    *bufio.Writer
	h    hash.Hash
	last string
	buf  []byte
	err  error
}

func newCache(path string) (*cacheWriter, error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".new-*")
	if err != nil {
		return nil, err
	}
	c := &cacheWriter{path: path, f: f, h: manifest.NewHash()}
	c.w = bufio.NewWriterSize(io.MultiWriter(f, c.h), 64<<10)
	_, c.err = c.w.WriteString(cacheMagic)
	return c, nil
}

func (c *cacheWriter) add(r record) {
	if c.err != nil {
		return
	}
	shared := 0
	for shared < len(r.path) && shared < len(c.last) && r.path[shared] == c.last[shared] {
		shared++
	}
	b := append(c.buf[:0], cacheRecord)
	b = binary.AppendUvarint(b, uint64(shared))
	b = binary.AppendUvarint(b, uint64(len(r.path)-shared))
	b = append(b, r.path[shared:]...)
	for _, v := range []uint64{uint64(r.size), uint64(r.mtime), uint64(r.ctime), r.inode, uint64(r.read)} {
		b = binary.AppendUvarint(b, v)
	}
	b = append(b, r.sum[:]...)
	c.last, c.buf = r.path, b
	_, c.err = c.w.Write(b)
}

// commit makes the cache durable in its place.
func (c *cacheWriter) commit() error {
	defer c.discard()
	if c.err == nil {
		c.err = c.w.WriteByte(cacheEnd)
	}
	if c.err == nil {
		c.err = c.w.Flush()
	}
	if c.err == nil {
		_, c.err = c.f.Write(c.h.Sum(nil))
	}
	if c.err == nil {
		c.err = c.f.Sync()
	}
	if c.err == nil {
		c.err = os.Rename(c.f.Name(), c.path)
	}
	if c.err != nil {
		return fmt.Errorf("write hash cache %s: %w", c.path, c.err)
	}
	return atomicfile.SyncDir(filepath.Dir(c.path))
}

// discard removes what was not committed.
func (c *cacheWriter) discard() {
	c.f.Close()
	os.Remove(c.f.Name())
}

// Moved tells the cache at path that the change times of files have moved without
// their contents: moved returns, for a file's path, the change times before and
// after. A cache that knows another time for the file is left as it is about it.
func Moved(path string, moved func(name string) (before, after int64, ok bool)) error {
	f, old, err := openCache(path)
	if old == nil {
		return err
	}
	defer f.Close()
	c, err := newCache(path)
	if err != nil {
		return err
	}
	for {
		r, err := old.next()
		if errors.Is(err, io.EOF) {
			return c.commit()
		}
		if err != nil {
			c.discard()
			return err
		}
		if before, after, ok := moved(r.path); ok && before == r.ctime {
			r.ctime = after
		}
		c.add(r)
	}
}

// lookup steps through a cache in the order of the paths that are asked for.
type lookup struct {
	cache *cacheReader
	head  record
	valid bool
	err   error
}

func (l *lookup) advance() {
	l.valid = false
	if l.cache == nil || l.err != nil {
		return
	}
	r, err := l.cache.next()
	if err != nil {
		l.cache = nil
		if !errors.Is(err, io.EOF) {
			l.err = err
		}
		return
	}
	l.head, l.valid = r, true
}

// find returns the record of path, which comes after every path asked for before.
func (l *lookup) find(path string) (record, bool) {
	for l.valid && manifest.ComparePaths(l.head.path, path) < 0 {
		l.advance()
	}
	if !l.valid || l.head.path != path {
		return record{}, false
	}
	return l.head, true
}
