// Package keystore is the folder in which a key server keeps the keys of disks:
// UUID.key, the raw bytes, mode 0600, in a folder of mode 0700.
//
// A key that others could read is refused, not repaired: it may have been read
// already, and a person has to know. A key in memory lies in pages of its own
// that are never swapped out nor dumped, and is wiped when it is released. What
// the SSH library copies while it sends a key is beyond that.
package keystore

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"time"

	"farkeep/shared/atomicfile"
	"farkeep/shared/hint"
	"farkeep/shared/keywire"
	"farkeep/shared/secret"
	"farkeep/shared/settings"

	"golang.org/x/sys/unix"
)

// ErrNoKey means that the store has no key for a disk.
var ErrNoKey = errors.New("there is no key for this disk")

// Store is a folder of keys. It is safe for concurrent use.
type Store struct{ dir string }

// Open checks the folder.
func Open(dir string) (*Store, error) {
	info, err := os.Stat(dir)
	if err != nil {
		return nil, hint.Because(fmt.Errorf("open the keys folder: %w", err), "make it: install -d -m 0700 %s", dir)
	}
	if !info.IsDir() {
		return nil, fmt.Errorf("open the keys folder: %s is not a folder", dir)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, hint.Because(fmt.Errorf("the keys folder %s has mode %04o: others can look into it", dir, info.Mode().Perm()),
			"chmod 700 %s, then ask who may have read the keys", dir)
	}
	return &Store{dir: dir}, nil
}

// Key is a key in locked memory.
type Key struct {
	secret.Bytes
	pages []byte
}

// Release wipes the key and gives its memory back. The key is void afterwards.
func (k *Key) Release() {
	if k.pages == nil {
		return
	}
	clear(k.pages)
	// Munmap unlocks as well. Neither can fail on pages that we mapped ourselves.
	_ = unix.Munmap(k.pages)
	k.pages, k.Bytes = nil, secret.Bytes{}
}

// Get reads the key of a disk; the caller must Release it. The error wraps
// ErrNoKey where there is none.
func (s *Store) Get(uuid string) (*Key, error) {
	f, size, err := s.open(uuid)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	pages, err := lockedPages()
	if err != nil {
		return nil, err
	}
	k := &Key{pages: pages}
	// One byte of room more than the file had: a file that grows is noticed.
	n, err := io.ReadFull(f, pages[:size+1])
	if !errors.Is(err, io.ErrUnexpectedEOF) || n != size {
		k.Release()
		return nil, fmt.Errorf("read the key of %s: it changed while it was read", uuid)
	}
	k.Bytes = secret.New(pages[:size:size])
	return k, nil
}

// open opens a key's file and judges it without reading it.
func (s *Store) open(uuid string) (*os.File, int, error) {
	if !settings.IsLUKSUUID(uuid) {
		return nil, 0, fmt.Errorf("%q is not a LUKS UUID", uuid)
	}
	path := filepath.Join(s.dir, keywire.KeyFile(uuid))
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, fmt.Errorf("%w: %s", ErrNoKey, path)
	}
	if err != nil {
		return nil, 0, fmt.Errorf("open the key of %s: %w", uuid, err)
	}
	info, err := f.Stat()
	if err == nil {
		err = judge(path, info)
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, int(info.Size()), nil
}

func judge(path string, info fs.FileInfo) error {
	switch {
	case !info.Mode().IsRegular():
		return fmt.Errorf("%s is not a regular file", path)
	case info.Mode().Perm()&0o077 != 0:
		return hint.Because(fmt.Errorf("%s has mode %04o: others can read the key", path, info.Mode().Perm()),
			"chmod 600 %s, then ask who may have read it", path)
	case info.Size() == 0:
		return fmt.Errorf("%s is empty", path)
	case info.Size() > keywire.MaxKey:
		return fmt.Errorf("%s is longer than %d bytes: not a key", path, keywire.MaxKey)
	}
	return nil
}

// lockedPages returns memory for one key that is neither swapped nor dumped.
func lockedPages() ([]byte, error) {
	page := os.Getpagesize()
	size := (keywire.MaxKey + 1 + page - 1) / page * page
	pages, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("get memory for a key: %w", err)
	}
	if err := unix.Mlock(pages); err != nil {
		_ = unix.Munmap(pages)
		return nil, hint.Because(fmt.Errorf("keep a key out of swap: %w", err), "allow the service to lock memory: LimitMEMLOCK=8M in its unit")
	}
	if err := unix.Madvise(pages, unix.MADV_DONTDUMP); err != nil {
		_ = unix.Munmap(pages)
		return nil, fmt.Errorf("keep a key out of core dumps: %w", err)
	}
	return pages, nil
}

// CanLock reports whether memory can be locked at all.
func CanLock() error {
	pages, err := lockedPages()
	if err != nil {
		return err
	}
	return unix.Munmap(pages)
}

// Add stores the key of a disk. A key that is there already is never replaced:
// the error wraps fs.ErrExist. The caller wipes key.
func (s *Store) Add(uuid string, key secret.Bytes) error {
	if !settings.IsLUKSUUID(uuid) {
		return fmt.Errorf("%q is not a LUKS UUID", uuid)
	}
	if key.Len() < 1 || key.Len() > keywire.MaxKey {
		return fmt.Errorf("a key of %d bytes: 1 to %d are possible", key.Len(), keywire.MaxKey)
	}
	return atomicfile.Create(filepath.Join(s.dir, keywire.KeyFile(uuid)), key.Reveal(), 0o600)
}

// Entry is one file of the store.
type Entry struct {
	UUID     string
	Modified time.Time
	Err      error // why the key would not be given out; nil for none
}

// List returns the keys, by UUID, and the names of files that are none.
func (s *Store) List() (keys []Entry, strays []string, err error) {
	files, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, nil, fmt.Errorf("list the keys: %w", err)
	}
	for _, file := range files {
		uuid, ok := keywire.KeyFileUUID(file.Name())
		if !ok {
			strays = append(strays, file.Name())
			continue
		}
		e := Entry{UUID: uuid}
		f, _, err := s.open(uuid)
		if err != nil {
			e.Err = err
		} else {
			if info, err := f.Stat(); err == nil {
				e.Modified = info.ModTime()
			}
			f.Close()
		}
		keys = append(keys, e)
	}
	sort.Slice(keys, func(i, j int) bool { return keys[i].UUID < keys[j].UUID })
	return keys, strays, nil
}
