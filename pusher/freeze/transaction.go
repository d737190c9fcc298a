package freeze

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"farkeep/shared/borgsegment"
)

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
		if _, ok := borgsegment.Number(folder.Name()); !ok || !folder.IsDir() {
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
			n, ok := borgsegment.Number(file.Name())
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
				all = append(all, segment{int64(n), filepath.Join("data", folder.Name(), file.Name()), info})
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
		if n, ok := borgsegment.Number(digits); ok && int64(n) > newest {
			if info, err := e.Info(); err == nil && info.Size() > 0 {
				newest = int64(n)
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
			ok, err := isCommitted(filepath.Join(repository, s.path), borgsegment.EndsWithCommit)
			if err != nil {
				return 0, err
			}
			if ok {
				return index, nil
			}
			break
		}
		ok, err := isCommitted(filepath.Join(repository, s.path), borgsegment.IsCommitted)
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

// isCommitted applies one of borg's rules to a segment file:
// [borgsegment.EndsWithCommit], or the full one, [borgsegment.IsCommitted], which
// reads the whole segment and is needed after a crash alone.
func isCommitted(path string, rule func(io.ReaderAt, int64) (bool, error)) (bool, error) {
	f, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return false, err
	}
	ok, err := rule(f, info.Size())
	if err != nil {
		err = fmt.Errorf("read %s: %w", path, err)
	}
	return ok, err
}
