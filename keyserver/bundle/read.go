package bundle

import (
	"archive/tar"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"farkeep/keyserver/seal"
	"farkeep/shared/atomicfile"
	"farkeep/shared/hint"
	"farkeep/shared/secret"
)

// sealedEnd is what the name of a sealed bundle ends in.
const sealedEnd = ".tar.age"

// Open reads the bundle at path: a folder, a sealed file, or a folder with one
// sealed file in it. The passphrase is asked for a sealed one only.
func Open(path string, passphrase func() (secret.Bytes, error)) (*Contents, error) {
	sealed, err := findSealed(path)
	if err != nil {
		return nil, err
	}
	if sealed == "" {
		return readFolder(path)
	}
	words, err := passphrase()
	if err != nil {
		return nil, err
	}
	defer words.Wipe()
	f, err := os.Open(sealed)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	c, err := readSealed(f, words)
	if errors.Is(err, seal.ErrWrongPassphrase) {
		err = hint.Because(err, "capitals, the keyboard's language, a blank at the end")
	}
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", sealed, err)
	}
	return c, nil
}

// findSealed is the sealed file that path is or holds, "" for a bundle in clear.
func findSealed(path string) (string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	if !info.IsDir() {
		return path, nil
	}
	if _, err := os.Lstat(filepath.Join(path, manifestFile)); err == nil {
		return "", nil
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return "", err
	}
	var found []string
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), sealedEnd) && e.Type().IsRegular() {
			found = append(found, filepath.Join(path, e.Name()))
		}
	}
	if len(found) != 1 {
		return "", hint.Because(fmt.Errorf("%w: %s has no %s and %d sealed files", ErrFormat, path, manifestFile, len(found)), "name the bundle's folder, or the file that ends in %s", sealedEnd)
	}
	return found[0], nil
}

func readSealed(r io.Reader, words secret.Bytes) (*Contents, error) {
	p, err := seal.NewPassphrase(words)
	if err != nil {
		return nil, err
	}
	plain, err := p.Reader(r)
	if err != nil {
		return nil, err
	}
	return readTar(plain)
}

// readTar reads what writeTar wrote, or somebody made look like it.
func readTar(r io.Reader) (*Contents, error) {
	c := newContents()
	in := tar.NewReader(r)
	for {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			// To the very end, so that an archive that was cut is found.
			if _, err := io.Copy(io.Discard, io.LimitReader(r, 1<<20)); err != nil {
				c.Wipe()
				return nil, fmt.Errorf("%w: %w", ErrFormat, err)
			}
			return c, nil
		}
		if err != nil {
			c.Wipe()
			return nil, fmt.Errorf("%w: %w", ErrFormat, err)
		}
		name, below := strings.CutPrefix(h.Name, Folder+"/")
		if h.Typeflag == tar.TypeDir && (below || strings.TrimSuffix(h.Name, "/") == Folder) {
			continue
		}
		if !below || h.Typeflag != tar.TypeReg {
			c.Wipe()
			return nil, fmt.Errorf("%w: %.200q does not belong into it", ErrFormat, h.Name)
		}
		if err := c.take(name, h.Size, in); err != nil {
			c.Wipe()
			return nil, err
		}
	}
}

// readFolder reads a bundle in clear. Links and other odd files are refused.
func readFolder(path string) (*Contents, error) {
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	c := newContents()
	err = fs.WalkDir(root.FS(), ".", func(name string, e fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case e.IsDir():
			return nil
		case !e.Type().IsRegular():
			return fmt.Errorf("%w: %s is no regular file", ErrFormat, name)
		}
		f, err := root.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		info, err := f.Stat()
		if err != nil {
			return err
		}
		if !info.Mode().IsRegular() {
			return fmt.Errorf("%w: %s is no regular file", ErrFormat, name)
		}
		return c.take(name, info.Size(), f)
	})
	if err != nil {
		c.Wipe()
		return nil, fmt.Errorf("read the bundle %s: %w", path, err)
	}
	return c, nil
}

// Unseal unpacks a sealed bundle into a new folder: what age and tar do, for who
// has neither. Nothing is there before all of it was checked.
func Unseal(path, folder string, passphrase func() (secret.Bytes, error)) error {
	sealed, err := findSealed(path)
	if err != nil {
		return err
	}
	if sealed == "" {
		return fmt.Errorf("%s is not sealed: use it as it is", path)
	}
	words, err := passphrase()
	if err != nil {
		return err
	}
	defer words.Wipe()
	f, err := os.Open(sealed)
	if err != nil {
		return err
	}
	defer f.Close()
	p, err := seal.NewPassphrase(words)
	if err != nil {
		return err
	}
	plain, err := p.Reader(f)
	if err != nil {
		return fmt.Errorf("open %s: %w", sealed, err)
	}
	return inPlaceOf(folder, false, func(new string) error {
		in := tar.NewReader(plain)
		seen := newContents()
		for {
			h, err := in.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				return fmt.Errorf("%w: %w", ErrFormat, err)
			}
			name, below := strings.CutPrefix(h.Name, Folder+"/")
			if !below || h.Typeflag != tar.TypeReg {
				return fmt.Errorf("%w: %.200q does not belong into it", ErrFormat, h.Name)
			}
			if err := seen.unpack(name, h.Size, in, new); err != nil {
				return err
			}
		}
		if problems := seen.checkSums(); len(problems) > 0 {
			return errors.Join(problems...)
		}
		return atomicfile.SyncDir(new)
	})
}

// unpack writes a file below folder, and keeps its sum, and of SHA256SUMS the text.
func (c *Contents) unpack(name string, size int64, r io.Reader, folder string) error {
	if err := c.check(name, size); err != nil {
		return err
	}
	path := filepath.Join(folder, filepath.FromSlash(name))
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	mode := fs.FileMode(0o600)
	if isTool(name) {
		mode = 0o700
	}
	out, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	defer out.Close()
	h := sha256.New()
	n, err := io.Copy(io.MultiWriter(out, h), io.LimitReader(r, size))
	if err != nil || n != size {
		return fmt.Errorf("%w: %s ends early: %w", ErrFormat, name, errors.Join(err, io.ErrUnexpectedEOF))
	}
	if err := out.Sync(); err != nil {
		return err
	}
	f := &File{Name: name, Size: size}
	h.Sum(f.Sum[:0])
	if name == sumsFile {
		if f.Data, err = os.ReadFile(path); err != nil {
			return err
		}
	}
	c.files[name], c.total = f, c.total+size
	return nil
}

func sumOf(r io.Reader) (sum [sha256.Size]byte, n int64, err error) {
	h := sha256.New()
	n, err = io.Copy(h, r)
	h.Sum(sum[:0])
	return sum, n, err
}
