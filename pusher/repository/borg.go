package repository

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// maxConfig bounds a Borg repository's config file, in bytes. With a key in it, it
// has less than 2000.
const maxConfig = 256 << 10

// ErrNotBorg says that a folder is no Borg 1.x repository, and does not look as
// if it had been one.
var ErrNotBorg = errors.New("not a Borg 1.x repository")

// BorgConfig is what the pusher needs of a Borg repository's config file.
type BorgConfig struct {
	ID      string // 64 hexadecimal digits, small
	Version int
}

// ParseBorgConfig reads a config file as Python's configparser does, but for
// what borg never writes: sections in brackets, "key = value" or "key: value"
// lines, indented lines that continue a value, lines that begin with # or ; as
// comments. Keys count in any case.
func ParseBorgConfig(text []byte) (BorgConfig, error) {
	var c BorgConfig
	if len(text) > maxConfig {
		return c, fmt.Errorf("config is larger than %d bytes", maxConfig)
	}
	section, seen := "", map[string]string{}
	lines := bufio.NewScanner(bytes.NewReader(text))
	lines.Buffer(nil, maxConfig+1)
	for lines.Scan() {
		line := lines.Text()
		trimmed := strings.TrimSpace(line)
		switch {
		case trimmed == "", trimmed[0] == '#', trimmed[0] == ';':
		case line[0] == ' ' || line[0] == '\t':
			// The continuation of a value: only the key's, which is none of ours.
		case trimmed[0] == '[':
			section = strings.TrimSuffix(strings.TrimPrefix(trimmed, "["), "]")
		case section == "repository":
			i := strings.IndexAny(line, "=:")
			if i < 0 {
				return c, fmt.Errorf("config: %.40q is no setting", line)
			}
			key := strings.ToLower(strings.TrimSpace(line[:i]))
			if _, twice := seen[key]; twice {
				return c, fmt.Errorf("config: %.40q is set twice", key)
			}
			seen[key] = strings.TrimSpace(line[i+1:])
		}
	}
	if err := lines.Err(); err != nil {
		return c, fmt.Errorf("config: %w", err)
	}
	if len(seen) == 0 {
		return c, fmt.Errorf("%w: config has no [repository]", ErrNotBorg)
	}
	if _, err := fmt.Sscanf(seen["version"], "%d", &c.Version); err != nil || fmt.Sprint(c.Version) != seen["version"] {
		return c, fmt.Errorf("config: version %.40q is no number", seen["version"])
	}
	c.ID = strings.ToLower(seen["id"])
	if id, err := hex.DecodeString(c.ID); err != nil || len(id) != 32 {
		return c, fmt.Errorf("config: id %.80q does not have 64 hexadecimal digits", seen["id"])
	}
	return c, nil
}

// ReadBorg reads the config of the Borg 1.x repository in folder path. The error
// wraps [ErrNotBorg] for a folder that is something else altogether; other errors
// are about a repository that is not as it should be.
func ReadBorg(path string) (BorgConfig, error) {
	text, err := readSome(filepath.Join(path, "config"), maxConfig)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, errNotRegular) {
		if borgReadme(path) {
			return BorgConfig{}, fmt.Errorf("%s has borg's README but no config: it is damaged, or was never completed", path)
		}
		return BorgConfig{}, fmt.Errorf("%s: %w", path, ErrNotBorg)
	}
	if err != nil {
		return BorgConfig{}, err
	}
	c, err := ParseBorgConfig(text)
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
