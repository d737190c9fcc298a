package freeze

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// The segment format of Borg 1.x (borg's repository.py, class LoggedIO): a magic,
// then entries of crc32, size, tag, and, but for a commit, a 32-byte key; size
// counts the whole entry, crc32 covers all of it but itself. Little endian.
const (
	segmentMagic = "BORG_SEG"
	headerSize   = 9
	keySize      = 32
	tagPut       = 0
	tagDelete    = 1
	tagCommit    = 2
	// maxEntry is more than borg's MAX_OBJECT_SIZE, which is 20 MiB and some bytes.
	maxEntry = 64 << 20
)

// commitEntry is how the last entry of a transaction looks, always.
var commitEntry = func() []byte {
	b := make([]byte, headerSize)
	binary.LittleEndian.PutUint32(b[4:], headerSize)
	b[8] = tagCommit
	binary.LittleEndian.PutUint32(b, crc32.ChecksumIEEE(b[4:]))
	return b
}()

// ErrDamaged says that the repository is not in a state that borg itself would
// accept, so that a picture of it would be worth nothing.
var ErrDamaged = errors.New("the repository is damaged")

// segment is one segment file that is not empty. Borg counts an empty one as
// deleted.
type segment struct {
	number int64
	path   string // below the repository
	info   fs.FileInfo
}

// listSegments returns the segments in ascending order. A file that vanishes
// meanwhile is left out.
func listSegments(repository string) ([]segment, error) {
	var all []segment
	folders, err := os.ReadDir(filepath.Join(repository, "data"))
	if err != nil {
		return nil, err
	}
	for _, folder := range folders {
		if _, ok := number(folder.Name()); !ok || !folder.IsDir() {
			continue
		}
		files, err := os.ReadDir(filepath.Join(repository, "data", folder.Name()))
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			return nil, err
		}
		for _, file := range files {
			n, ok := number(file.Name())
			if !ok || !file.Type().IsRegular() {
				continue
			}
			info, err := file.Info()
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return nil, err
			}
			if info.Size() > 0 {
				all = append(all, segment{n, filepath.Join("data", folder.Name(), file.Name()), info})
			}
		}
	}
	slices.SortFunc(all, func(a, b segment) int { return int(a.number - b.number) })
	for i := 1; i < len(all); i++ {
		if all[i].number == all[i-1].number {
			return nil, fmt.Errorf("%w: segment %d lies in two places", ErrDamaged, all[i].number)
		}
	}
	return all, nil
}

// number reads a segment's number, or a data folder's, or a transaction's.
func number(name string) (int64, bool) {
	if len(name) > 1 && name[0] == '0' || strings.TrimLeft(name, "0123456789") != "" {
		return 0, false
	}
	n, err := strconv.ParseInt(name, 10, 32) // borg's segment numbers have 32 bits
	return n, err == nil
}

// newestIndex is the transaction of the newest index file, -1 for none. Borg
// ignores an empty one.
func newestIndex(repository string) (int64, error) {
	names, err := os.ReadDir(repository)
	if err != nil {
		return 0, err
	}
	newest := int64(-1)
	for _, e := range names {
		digits, ok := strings.CutPrefix(e.Name(), "index.")
		if !ok || !e.Type().IsRegular() {
			continue
		}
		if n, ok := number(digits); ok && n > newest {
			if info, err := e.Info(); err == nil && info.Size() > 0 {
				newest = n
			}
		}
	}
	return newest, nil
}

// committed finds the last committed segment: everything up to it is final,
// everything after it will be deleted and its numbers used again by the next
// writer. index is the transaction of the newest index file, -1 for none; as long
// as no borg was cut between writing a commit and writing its index, the result
// is index.
//
// It must be called under the lock.
func committed(repository string, segments []segment, index int64) (int64, error) {
	for _, s := range slices.Backward(segments) {
		if s.number < index {
			break
		}
		if s.number == index {
			// Borg wrote this index after this commit: that it is there is enough.
			ok, err := endsWithCommit(filepath.Join(repository, s.path))
			if err != nil {
				return 0, err
			}
			if ok {
				return index, nil
			}
			break
		}
		ok, err := isCommitted(filepath.Join(repository, s.path))
		if err != nil {
			return 0, err
		}
		if ok {
			return s.number, nil
		}
	}
	if index >= 0 {
		return 0, fmt.Errorf("%w: there is an index.%d, but no commit in segment %d or after it", ErrDamaged, index, index)
	}
	return -1, nil
}

func endsWithCommit(path string) (bool, error) {
	f, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return false, err
	}
	if info.Size() < int64(len(segmentMagic)+headerSize) {
		return false, nil
	}
	var head [len(segmentMagic)]byte
	var tail [headerSize]byte
	if _, err := f.ReadAt(head[:], 0); err != nil {
		return false, err
	}
	if _, err := f.ReadAt(tail[:], info.Size()-headerSize); err != nil {
		return false, err
	}
	return string(head[:]) == segmentMagic && string(tail[:]) == string(commitEntry), nil
}

// isCommitted applies borg's full rule: the segment ends with a commit, every
// entry is whole, and no commit is followed by anything else. Only segments after
// the newest index are read like this, which there are after a crash alone.
func isCommitted(path string) (bool, error) {
	if ok, err := endsWithCommit(path); !ok || err != nil {
		return false, err
	}
	f, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	return scanSegment(bufio.NewReaderSize(f, 1<<20))
}

// scanSegment reports whether r holds a well-formed segment that ends in a
// commit. An error is one of reading.
func scanSegment(r io.Reader) (bool, error) {
	var head [len(segmentMagic)]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return false, short(err)
	}
	if string(head[:]) != segmentMagic {
		return false, nil
	}
	sum := crc32.NewIEEE()
	seen := false
	for {
		var header [headerSize]byte
		if _, err := io.ReadFull(r, header[:]); err != nil {
			if errors.Is(err, io.EOF) {
				return seen, nil
			}
			return false, short(err)
		}
		size := int64(binary.LittleEndian.Uint32(header[4:]))
		tag := header[8]
		switch {
		case size > maxEntry:
			return false, nil
		case tag == tagCommit && size != headerSize,
			tag == tagPut && size < headerSize+keySize,
			tag == tagDelete && size != headerSize+keySize,
			tag > tagCommit:
			return false, nil
		case seen && tag != tagCommit:
			return false, nil
		}
		sum.Reset()
		sum.Write(header[4:])
		if _, err := io.CopyN(sum, r, size-headerSize); err != nil {
			return false, short(err)
		}
		if sum.Sum32() != binary.LittleEndian.Uint32(header[:]) {
			return false, nil
		}
		seen = tag == tagCommit
	}
}

// short turns the end of the bytes, which makes a segment uncommitted, into no error.
func short(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return nil
	}
	return err
}
