// Package keystore is the folder in which a key server keeps the keys of disks:
// UUID.key, the raw bytes, or UUID.key.age, sealed with age, mode 0600, in a
// folder of mode 0700.
//
// A store is sealed when recipients.txt lies in it: what is added is then sealed
// for those recipients, and a key can be got only after [Store.Use] was given an
// identity.
//
// A key that others could read is refused, not repaired: it may have been read
// already, and a person has to know. A key in memory lies in pages of its own
// that are never swapped out nor dumped (package locked), and is wiped when it
// is released.
package keystore

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"sync/atomic"
	"time"

	"farkeep/keyserver/locked"
	"farkeep/keyserver/seal"
	"farkeep/shared/atomicfile"
	"farkeep/shared/hint"
	"farkeep/shared/keywire"
	"farkeep/shared/secret"
	"farkeep/shared/settings"

	"golang.org/x/sys/unix"
)

var (
	// ErrNoKey means that the store has no key for a disk.
	ErrNoKey = errors.New("there is no key for this disk")
	// ErrSealed means that a key is sealed and no identity is there to open it.
	ErrSealed = errors.New("the key is sealed, and no identity was given to open it")
)

// maxFile bounds a key's file, in bytes: a key, and what age puts around it for
// as many recipients as there can be, post-quantum ones (2 KiB each) included.
const maxFile = keywire.MaxKey + 48<<10

// Store is a folder of keys. It is safe for concurrent use.
type Store struct {
	dir string
	id  atomic.Pointer[seal.Identity]
}

// Open checks the folder.
func Open(dir string) (*Store, error) {
	info, err := os.Stat(dir)
	if errors.Is(err, fs.ErrPermission) {
		return nil, hint.Because(fmt.Errorf("open the keys folder: %w", err), "run it as root, or as the user of the service")
	}
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

// Use opens sealed keys with id from now on. An identity that answers to none
// of the store's recipients is refused.
func (s *Store) Use(id *seal.Identity) error {
	r, sealed, err := s.Recipients()
	if err != nil {
		return err
	}
	if sealed && !slices.ContainsFunc(id.Recipients(), func(name string) bool { return slices.Contains(r.Names(), name) }) {
		return hint.Because(fmt.Errorf("the identity is of %s, and the keys are sealed for %s", strings.Join(id.Recipients(), ", "), strings.Join(r.Names(), ", ")),
			"name another identity, or ask who changed %s", filepath.Join(s.dir, recipientsFile))
	}
	s.id.Store(id)
	return nil
}

// Key is a key in locked memory.
type Key struct {
	secret.Bytes
	memory *locked.Memory
}

// Release wipes the key and gives its memory back. The key is void afterwards.
func (k *Key) Release() {
	if k.memory == nil {
		return
	}
	k.memory.Release()
	k.memory, k.Bytes = nil, secret.Bytes{}
}

// packets is in how many pieces a key is sent, at most.
const packets = 16

// WriteTo sends the key in 16 pieces. The SSH library copies what it sends into a
// buffer that it neither wipes nor gives away, and uses that buffer again for the
// next piece: so what is left behind is the last piece, and not the key.
func (k *Key) WriteTo(w io.Writer) (sent int64, err error) {
	b := k.Reveal()
	size := (len(b) + packets - 1) / packets
	for len(b) > 0 {
		n, err := w.Write(b[:min(size, len(b))])
		sent += int64(n)
		if err != nil {
			return sent, err
		}
		b = b[n:]
	}
	return sent, nil
}

// Get reads the key of a disk; the caller must Release it. The error wraps
// ErrNoKey where there is none, ErrSealed where there is no identity to open it.
func (s *Store) Get(uuid string) (*Key, error) {
	f, err := s.find(uuid)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	// A sealed key is shorter than its file. Most keys take one page.
	memory, err := locked.New(min(f.size, keywire.MaxKey) + 1)
	if err != nil {
		return nil, err
	}
	n, err := s.read(f, memory.Bytes())
	if err != nil {
		memory.Release()
		return nil, fmt.Errorf("read the key of %s: %w", uuid, err)
	}
	return &Key{Bytes: secret.New(memory.Bytes()[:n:n]), memory: memory}, nil
}

// keyFile is an open file of the store that was judged, not read.
type keyFile struct {
	*os.File
	sealed   bool
	size     int
	modified time.Time
}

// read puts the key in f into dst, which is one byte longer than the key can
// be, and returns its length.
func (s *Store) read(f *keyFile, dst []byte) (int, error) {
	if !f.sealed {
		return readExactly(f, dst)
	}
	id := s.id.Load()
	if id == nil {
		return 0, hint.Because(ErrSealed, "name the identity: --identity FILE, or --identity-credential NAME")
	}
	text := make([]byte, f.size+1)
	n, err := readExactly(f, text)
	if err != nil {
		return 0, err
	}
	if n, err = id.Open(dst[:min(len(dst), keywire.MaxKey)], text[:n]); err != nil {
		return 0, err
	}
	if n == 0 {
		return 0, errors.New("the sealed key is empty")
	}
	return n, nil
}

// readExactly reads all of f into dst. A file that grows is noticed.
func readExactly(f *keyFile, dst []byte) (int, error) {
	n, err := io.ReadFull(f, dst[:f.size+1])
	if !errors.Is(err, io.ErrUnexpectedEOF) || n != f.size {
		return 0, errors.New("it changed while it was read")
	}
	return n, nil
}

// find opens the file of a key: the one in clear where both are there, because a
// seal was interrupted.
func (s *Store) find(uuid string) (*keyFile, error) {
	if !settings.IsLUKSUUID(uuid) {
		return nil, fmt.Errorf("%q is not a LUKS UUID", uuid)
	}
	f, err := s.open(keywire.KeyFile(uuid), false)
	if errors.Is(err, fs.ErrNotExist) {
		f, err = s.open(sealedFile(uuid), true)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %s", ErrNoKey, filepath.Join(s.dir, keywire.KeyFile(uuid)))
	}
	if err != nil {
		return nil, fmt.Errorf("open the key of %s: %w", uuid, err)
	}
	return f, nil
}

// open opens a file and judges it without reading it.
func (s *Store) open(name string, sealed bool) (*keyFile, error) {
	path := filepath.Join(s.dir, name)
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	limit := keywire.MaxKey
	if sealed {
		limit = maxFile
	}
	info, err := f.Stat()
	if err == nil {
		err = judge(path, info, limit)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return &keyFile{File: f, sealed: sealed, size: int(info.Size()), modified: info.ModTime()}, nil
}

func judge(path string, info fs.FileInfo, limit int) error {
	switch {
	case !info.Mode().IsRegular():
		return fmt.Errorf("%s is not a regular file", path)
	case info.Mode().Perm()&0o077 != 0:
		return hint.Because(fmt.Errorf("%s has mode %04o: others can read the key", path, info.Mode().Perm()),
			"chmod 600 %s, then ask who may have read it", path)
	case info.Size() == 0:
		return fmt.Errorf("%s is empty", path)
	case info.Size() > int64(limit):
		return fmt.Errorf("%s is longer than %d bytes: not a key", path, limit)
	}
	return nil
}

// CanLock reports whether memory can be locked at all.
func CanLock() error { return locked.Check() }

// Add stores the key of a disk, sealed where the store is. A key that is there
// already is never replaced: the error wraps fs.ErrExist. The caller wipes key.
func (s *Store) Add(uuid string, key secret.Bytes) error {
	if !settings.IsLUKSUUID(uuid) {
		return fmt.Errorf("%q is not a LUKS UUID", uuid)
	}
	if key.Len() < 1 || key.Len() > keywire.MaxKey {
		return fmt.Errorf("a key of %d bytes: 1 to %d are possible", key.Len(), keywire.MaxKey)
	}
	r, sealed, err := s.Recipients()
	if err != nil {
		return err
	}
	if !sealed {
		if err := s.absent(sealedFile(uuid)); err != nil {
			return err
		}
		return atomicfile.Create(s.path(keywire.KeyFile(uuid)), key.Reveal(), 0o600)
	}
	if err := s.absent(keywire.KeyFile(uuid)); err != nil {
		return err
	}
	text, err := r.Seal(key.Reveal())
	if err != nil {
		return err
	}
	return atomicfile.Create(s.path(sealedFile(uuid)), text, 0o600)
}

func (s *Store) path(name string) string { return filepath.Join(s.dir, name) }

func (s *Store) absent(name string) error {
	_, err := os.Lstat(s.path(name))
	switch {
	case err == nil:
		return fmt.Errorf("create %s: %w", s.path(name), fs.ErrExist)
	case errors.Is(err, fs.ErrNotExist):
		return nil
	}
	return err
}

// Entry is one key of the store.
type Entry struct {
	UUID     string
	Sealed   bool
	Modified time.Time
	Err      error // why the key would not be given out; nil for none
}

// List returns the keys, by UUID, and the names of files that are none. Sealed
// keys are not opened.
func (s *Store) List() (keys []Entry, strays []string, err error) {
	files, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, nil, fmt.Errorf("list the keys: %w", err)
	}
	seen := map[string]bool{}
	for _, file := range files {
		uuid, _, ok := parseName(file.Name())
		switch {
		case !ok && file.Name() != recipientsFile:
			strays = append(strays, file.Name())
			continue
		case !ok || seen[uuid]:
			continue
		}
		seen[uuid] = true
		e := Entry{UUID: uuid}
		if f, err := s.find(uuid); err != nil {
			e.Err = err
		} else {
			e.Modified, e.Sealed = f.modified, f.sealed
			f.Close()
		}
		keys = append(keys, e)
	}
	sort.Slice(keys, func(i, j int) bool { return keys[i].UUID < keys[j].UUID })
	return keys, strays, nil
}

// sealedFile is the name of the file that holds a sealed key.
func sealedFile(uuid string) string { return keywire.KeyFile(uuid) + ".age" }

// parseName is the inverse of keywire.KeyFile and sealedFile.
func parseName(name string) (uuid string, sealed, ok bool) {
	name, sealed = strings.CutSuffix(name, ".age")
	uuid, ok = keywire.KeyFileUUID(name)
	return uuid, sealed, ok
}
