package base

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"farkeep/shared/manifest"
)

// KeepManifest keeps the manifest in the file list, of which target made a
// generation. With made false target only said that its newest generation has that
// content: its manifest may have other times, and what is kept stays if it fits.
func (m *Memory) KeepManifest(target, repository, list string, made bool) error {
	to := m.manifest(target, repository)
	if !made && digestOf(to) == digestOf(list) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
		return err
	}
	in, err := os.Open(list)
	if err != nil {
		return err
	}
	defer in.Close()
	if err := replace(to, in); err != nil {
		return fmt.Errorf("keep the manifest that %s has of %s: %w", target, repository, err)
	}
	return nil
}

// Kept is the digest of the manifest that KeepManifest kept; zero: there is none.
func (m *Memory) Kept(target, repository string) manifest.Sum {
	return digestOf(m.manifest(target, repository))
}

// ForgetManifest drops what KeepManifest kept.
func (m *Memory) ForgetManifest(target, repository string) error {
	return forget(m.manifest(target, repository))
}

// Delta gives the delta that makes the manifest in the file list out of the one
// with the digest base, hex, of which target has a generation. It is nil, without
// an error, when that is not kept, or when a delta would be no shorter. scratch is
// a folder for a file that lives as long as it is open.
func (m *Memory) Delta(target, repository, base, list, scratch string) (io.ReadCloser, error) {
	path := m.manifest(target, repository)
	if digest := digestOf(path); base == "" || digest.String() != base {
		return nil, nil
	}
	old, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer old.Close()
	new, err := os.Open(list)
	if err != nil {
		return nil, err
	}
	defer new.Close()
	delta, err := os.CreateTemp(scratch, "delta-*")
	if err != nil {
		return nil, err
	}
	err = errors.Join(os.Remove(delta.Name()), manifest.WriteDelta(delta, old, new))
	if err != nil {
		delta.Close()
		return nil, fmt.Errorf("compare the manifest with the one that %s has of %s: %w", target, repository, err)
	}
	size, err := delta.Seek(0, io.SeekCurrent)
	if info, err2 := new.Stat(); err != nil || err2 != nil || size >= info.Size() {
		delta.Close()
		return nil, errors.Join(err, err2)
	}
	if _, err := delta.Seek(0, io.SeekStart); err != nil {
		delta.Close()
		return nil, err
	}
	return delta, nil
}

func (m *Memory) manifest(target, repository string) string {
	return filepath.Join(m.dir, repository, target+".manifest")
}

// digestOf reads the digest at the end of a manifest; zero for what is none. That
// the rest is as the digest says is found by whoever reads it.
func digestOf(path string) (s manifest.Sum) {
	f, err := os.Open(path)
	if err != nil {
		return s
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil || info.Size() < int64(len(s)) {
		return s
	}
	if _, err := f.ReadAt(s[:], info.Size()-int64(len(s))); err != nil {
		return manifest.Sum{}
	}
	return s
}

// replace puts what r gives into the file to. It is not synced, as nothing here is.
func replace(to string, r io.Reader) error {
	f, err := os.CreateTemp(filepath.Dir(to), ".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = io.Copy(f, r)
	if closed := f.Close(); err == nil {
		err = closed
	}
	if err != nil {
		return err
	}
	return os.Rename(f.Name(), to)
}
