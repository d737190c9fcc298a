package repository

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"farkeep/shared/contentname"

	"golang.org/x/sys/unix"
)

const (
	// maxMark bounds the file that a mark is made of, in bytes; restic's config has 155.
	maxMark = 64 << 10
	// maxKeys bounds the keys that are looked at to find one.
	maxKeys = 1000
)

// ReadNamed looks whether the folder at path is a repository whose files are named
// by their content, and which one: mark is the same as long as it is the same
// repository. It is Borg 2's id; of restic, whose id is encrypted, the hash of its
// config, which is written once and again by "restic migrate".
func ReadNamed(path string) (layout contentname.Layout, mark string, err error) {
	var r contentname.Recognizer
	for _, name := range []string{"config", "config/id", "config/version", "data", "index", "snapshots", "packs"} {
		info, err := os.Lstat(filepath.Join(path, filepath.FromSlash(name)))
		switch {
		case err == nil && (info.IsDir() || info.Mode().IsRegular()):
			r.See(name, info.IsDir())
		case err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTDIR):
			return contentname.None, "", err
		}
	}
	keys, err := firstNames(filepath.Join(path, "keys"), maxKeys)
	if err != nil {
		return contentname.None, "", err
	}
	for _, name := range keys {
		r.See("keys/"+name, false)
	}
	switch layout = r.Layout(); layout {
	case contentname.Restic:
		text, err := readSome(filepath.Join(path, "config"), maxMark)
		if err != nil {
			return layout, "", err
		}
		sum := sha256.Sum256(text)
		mark = hex.EncodeToString(sum[:])
	case contentname.Borg2:
		text, err := readSome(filepath.Join(path, "config", "id"), 2*contentname.IDSize+2)
		if err != nil {
			return layout, "", err
		}
		mark = strings.TrimSpace(string(text))
		if _, err := hex.DecodeString(mark); err != nil || len(mark) != 2*contentname.IDSize {
			return layout, "", fmt.Errorf("%s/config/id is not the id of a Borg 2 repository: it is damaged", path)
		}
	}
	return layout, mark, nil
}

// firstNames are n names of a folder at most, none if there is no such folder.
func firstNames(path string, n int) ([]string, error) {
	d, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(n)
	if errors.Is(err, io.EOF) || errors.Is(err, unix.ENOTDIR) {
		err = nil
	}
	return names, err
}
