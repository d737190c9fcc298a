package bundle

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"farkeep/shared/atomicfile"
	"farkeep/shared/hint"
)

// writeFolder lays the files out in a new folder, all or none: they are written
// beside it, synced, and renamed. With replace an older bundle gives way. No mode
// is set after the fact, because a stick that Windows reads too knows none.
func (c *Contents) writeFolder(folder string, replace bool) (err error) {
	return inPlaceOf(folder, replace, func(new string) error {
		for _, name := range c.Names() {
			if err := c.files[name].write(filepath.Join(new, filepath.FromSlash(name))); err != nil {
				return err
			}
		}
		return nil
	})
}

// inPlaceOf fills a new folder and puts it where folder shall be.
func inPlaceOf(folder string, replace bool, fill func(new string) error) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("write %s: %w", folder, err)
		}
	}()
	if folder, err = filepath.Abs(folder); err != nil {
		return err
	}
	parent := filepath.Dir(folder)
	switch entries, err := os.ReadDir(folder); {
	case errors.Is(err, fs.ErrNotExist):
		replace = false
	case err != nil:
		return err
	case device(folder) != device(parent):
		// The keys would be written beside it, onto another disk.
		return hint.Because(errors.New("a disk is mounted there"), "name a new folder on it: %s", filepath.Join(folder, Folder))
	case len(entries) == 0:
		replace = false
	case !replace:
		return hint.Because(errors.New("there is something already"), "name a folder that is not there yet; an older bundle gives way with --replace")
	case !isBundleFolder(folder):
		return hint.Because(errors.New("what is there is no bundle"), "it is not replaced: name another folder")
	}
	temporary := "." + filepath.Base(folder) + ".new-"
	new, err := os.MkdirTemp(parent, temporary)
	if err != nil {
		return err
	}
	defer os.RemoveAll(new)
	if err := fill(new); err != nil {
		return err
	}
	if err := syncFolders(new); err != nil {
		return err
	}
	if replace {
		old := new + ".old"
		if err := os.Rename(folder, old); err != nil {
			return err
		}
		if err := os.Rename(new, folder); err != nil {
			return errors.Join(err, os.Rename(old, folder))
		}
	} else {
		if err := os.Remove(folder); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := os.Rename(new, folder); err != nil {
			return err
		}
	}
	if err := atomicfile.SyncDir(parent); err != nil {
		return err
	}
	return sweep(parent, temporary)
}

// sweep removes what attempts that were killed have left beside the folder, the older
// bundle included: it holds keys, and something better stands in its place now.
func sweep(parent, temporary string) error {
	entries, err := os.ReadDir(parent)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() && strings.HasPrefix(e.Name(), temporary) {
			if err := os.RemoveAll(filepath.Join(parent, e.Name())); err != nil {
				return err
			}
		}
	}
	return atomicfile.SyncDir(parent)
}

// isBundleFolder reports whether a folder was made by this package.
func isBundleFolder(folder string) bool {
	_, err := os.Lstat(filepath.Join(folder, startFile))
	return err == nil
}

// write makes the file's folder and the file, durably.
func (f *File) write(path string) (err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	mode := fs.FileMode(0o600)
	if isTool(f.Name) {
		mode = 0o700
	}
	out, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	if err := f.copyTo(out); err != nil {
		return err
	}
	return out.Sync()
}

// copyTo writes the file's bytes, and refuses when they are not those of its sum any more.
func (f *File) copyTo(w io.Writer) error {
	if f.From == "" {
		_, err := w.Write(f.Data)
		return err
	}
	in, err := os.Open(f.From)
	if err != nil {
		return err
	}
	defer in.Close()
	sum, n, err := sumOf(io.TeeReader(io.LimitReader(in, f.Size+1), w))
	if err != nil {
		return err
	}
	if n != f.Size || sum != f.Sum {
		return fmt.Errorf("%s changed while it was copied", f.From)
	}
	return nil
}

// syncFolders makes the entries of a folder and of all below it durable.
func syncFolders(root string) error {
	return filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.IsDir() {
			return err
		}
		return atomicfile.SyncDir(path)
	})
}

// writeTar writes the files as a tar archive below Folder.
func (c *Contents) writeTar(w io.Writer, made time.Time) error {
	out := tar.NewWriter(w)
	for _, name := range c.Names() {
		f := c.files[name]
		mode := int64(0o600)
		if isTool(name) {
			mode = 0o700
		}
		if err := out.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: Folder + "/" + name, Size: f.Size, Mode: mode, ModTime: made, Format: tar.FormatPAX}); err != nil {
			return err
		}
		if err := f.copyTo(out); err != nil {
			return err
		}
	}
	return out.Close()
}
