package logbook

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// Of the log file: each at most FileSize bytes, the current one and its
// predecessors .1 to .3.
const (
	FileSize  = 1 << 20
	FileCount = 4
	// syncEvery is how old a line may grow before it is on the disk. Warnings
	// are synced at once.
	syncEvery = 30 * time.Second
)

// FileName is the log's name in its folder.
const FileName = "farkeep.log"

// ToFile appends lines to dir/farkeep.log, rotated, readable by group gid.
func (b *Book) ToFile(dir string, gid int) error {
	f := &file{path: filepath.Join(dir, FileName), gid: gid}
	if err := f.open(); err != nil {
		return err
	}
	b.attach(f.write, f.close)
	return nil
}

// file is used by one goroutine. A disk that fails is tried again with the
// next line; the other destinations have the lines meanwhile.
type file struct {
	path   string
	gid    int
	f      *os.File
	size   int64
	synced time.Time
}

func (f *file) open() error {
	out, err := os.OpenFile(f.path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o640)
	if err != nil {
		return fmt.Errorf("log file: %w", err)
	}
	info, err := out.Stat()
	if err == nil && os.Getuid() == 0 {
		err = errors.Join(out.Chown(0, f.gid), out.Chmod(0o640))
	}
	if err != nil {
		out.Close()
		return fmt.Errorf("log file: %w", err)
	}
	f.f, f.size = out, info.Size()
	return nil
}

func (f *file) write(r record) {
	if f.f != nil && f.size+int64(len(r.json))+1 > FileSize {
		f.rotate()
	}
	if f.f == nil && f.open() != nil {
		return
	}
	n, err := f.f.Write(append(r.json, '\n'))
	f.size += int64(n)
	if err == nil && (r.level > 0 || r.at.Sub(f.synced) > syncEvery) {
		f.synced = r.at
		err = f.f.Sync()
	}
	if err != nil {
		f.close()
	}
}

func (f *file) close() {
	if f.f == nil {
		return
	}
	// There is nowhere left to report that the log itself cannot be written.
	_ = f.f.Sync()
	_ = f.f.Close()
	f.f = nil
}

func (f *file) rotate() {
	f.close()
	for i := FileCount - 1; i > 0; i-- {
		from := f.path
		if i > 1 {
			from = fmt.Sprintf("%s.%d", f.path, i-1)
		}
		if err := os.Rename(from, fmt.Sprintf("%s.%d", f.path, i)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			// Rather lose old lines than fill the partition.
			_ = os.Truncate(f.path, 0)
			return
		}
	}
}

// Read copies the newest lines of the log in dir to w, oldest first, at most
// limit bytes, beginning with a whole line.
func Read(w io.Writer, dir string, limit int64) error {
	path := filepath.Join(dir, FileName)
	names := []string{path}
	for i := 1; i < FileCount; i++ {
		names = append(names, fmt.Sprintf("%s.%d", path, i))
	}
	// Newest first, until the limit is reached; then out in the other order.
	var parts [][]byte
	for _, name := range names {
		data, err := tail(name, limit)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("log file: %w", err)
		}
		parts = append(parts, data)
		if limit -= int64(len(data)); limit <= 0 {
			break
		}
	}
	for i := len(parts) - 1; i >= 0; i-- {
		if _, err := w.Write(parts[i]); err != nil {
			return err
		}
	}
	return nil
}

// tail returns the last limit bytes of a file, from a line's beginning.
func tail(name string, limit int64) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, err
	}
	from := max(0, size-limit)
	data := make([]byte, size-from)
	n, err := f.ReadAt(data, from)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	data = data[:n]
	if from > 0 {
		for i, c := range data {
			if c == '\n' {
				return data[i+1:], nil
			}
		}
		return nil, nil
	}
	return data, nil
}
