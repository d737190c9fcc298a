package repository

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"farkeep/shared/borgconfig"

	"golang.org/x/sys/unix"
)

// ErrNotBorg says that a folder is no Borg 1.x repository, and does not look as
// if it had been one.
var ErrNotBorg = errors.New("not a Borg 1.x repository")

// ReadBorg reads the config of the Borg 1.x repository in folder path. The error
// wraps [ErrNotBorg] for a folder that is something else altogether; other errors
// are about a repository that is not as it should be.
func ReadBorg(path string) (borgconfig.Config, error) {
	text, err := readSome(filepath.Join(path, "config"), borgconfig.MaxSize)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, errNotRegular) {
		if borgReadme(path) {
			return borgconfig.Config{}, fmt.Errorf("%s has borg's README but no config: it is damaged, or was never completed", path)
		}
		return borgconfig.Config{}, fmt.Errorf("%s: %w", path, ErrNotBorg)
	}
	if err != nil {
		return borgconfig.Config{}, err
	}
	c, err := borgconfig.Parse(text)
	if err != nil {
		if !borgReadme(path) {
			err = ErrNotBorg
		}
		return c, fmt.Errorf("%s: %w", path, err)
	}
	if c.Version != 1 {
		return c, fmt.Errorf("%s: %w, but one of format %d", path, ErrNotBorg, c.Version)
	}
	if info, err := os.Lstat(filepath.Join(path, "data")); err != nil || !info.IsDir() {
		return c, fmt.Errorf("%s is a Borg repository without its data folder", path)
	}
	return c, nil
}

// borgReadme reports whether the folder's README says that borg made it.
func borgReadme(path string) bool {
	head, err := readSome(filepath.Join(path, "README"), 100)
	return err == nil && (bytes.Contains(head, []byte("Borg Backup repository")) || bytes.Contains(head, []byte("Borg repository")))
}

var errNotRegular = errors.New("not a regular file")

// readSome reads the first limit+1 bytes of a regular file at most.
func readSome(path string, limit int64) ([]byte, error) {
	// O_NONBLOCK: whoever finds a pipe there must not wait for its other end.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: %w", path, errNotRegular)
	}
	return io.ReadAll(io.LimitReader(f, limit+1))
}
