package generations

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"farkeep/shared/beneath"
	"farkeep/shared/manifest"

	"golang.org/x/sys/unix"
)

// An Adopter makes a push of files that lie on the store's own disk already, next
// to the generations (the staging copies of stock clients): each becomes an
// object of the push by a hard link, in place of an upload. The order is
//
//	Begin ── "send-manifest" ── Adopter: Add, Add, ..., Close ── TakeManifest ── Commit
//
// so that the plan finds the objects there, asks for nothing, and needs no room
// for what is on the disk already.
type Adopter struct {
	t       *Transaction
	objects *beneath.Dir
}

// Adopter begins an adoption. It must be closed.
func (t *Transaction) Adopter() (*Adopter, error) {
	if t.state != offered {
		return nil, errors.New("adopt files outside an offer")
	}
	objects, err := t.dir.Dir(objectsFolder)
	if err != nil {
		return nil, err
	}
	return &Adopter{t, objects}, nil
}

// Close ends the adoption.
func (a *Adopter) Close() error { return a.objects.Close() }

// Add takes the file from/name, whose content has the sum that e says, as an
// object of the push. The caller has hashed it, has made it durable (syncfs) and
// keeps everybody from writing to it until the push ended; whoever writes to a
// file with more than one link breaks the link first.
//
// A file that has no other name gets the mode of a committed file. One that has,
// because it is part of a generation, is not touched.
func (a *Adopter) Add(from *beneath.Dir, name string, e *manifest.Entry) error {
	if err := a.add(from, name, e); err != nil {
		return fmt.Errorf("push %s: adopt %q: %w", a.t.req.Repository, e.Path, err)
	}
	return nil
}

func (a *Adopter) add(from *beneath.Dir, name string, e *manifest.Entry) error {
	st, err := from.Stat(name)
	if err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size != e.Size {
		return fmt.Errorf("%w: it is not the file that was hashed", ErrDamaged)
	}
	object := e.Sum.String()
	if there, err := a.objects.Stat(object); err == nil {
		if there.Mode&unix.S_IFMT == unix.S_IFREG && there.Size == e.Size {
			return nil // the same content under another name, or from an attempt that was cut
		}
		if err := a.objects.RemoveAll(object); err != nil {
			return err
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if perm := filePerm(e.Mode); st.Nlink == 1 && st.Mode&0o7777 != perm {
		if err := from.Chmod(name, perm); err != nil {
			return err
		}
	}
	err = a.objects.Link(from, name, object)
	if errors.Is(err, unix.EMLINK) {
		return a.copy(from, name, object, e)
	}
	return err
}

// copy makes the object of a file that can have no more links.
func (a *Adopter) copy(from *beneath.Dir, name, object string, e *manifest.Entry) error {
	src, _, err := from.Open(name)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := a.t.store.create(a.objects, object, 0o600)
	if err != nil {
		return err
	}
	defer dst.Close()
	sum, err := copyAndHash(context.Background(), dst, src)
	if err == nil && sum != e.Sum {
		err = fmt.Errorf("%w: its content is not what was hashed", ErrDamaged)
	}
	if err == nil {
		err = dst.Sync()
	}
	if err != nil {
		return errors.Join(err, a.objects.Remove(object))
	}
	return nil
}

// Used is how much of a key's quota its generations and pushes under way take,
// in bytes.
func (s *Store) Used(ctx context.Context, pusher string) (int64, error) {
	return s.stored(ctx, pusher, "")
}

// Room is what the disk has left for others than the pushes under way: bytes
// beside the reserve and beside what those pushes may still write, and inodes (-1
// where the file system does not count them).
func (s *Store) Room() (bytes, inodes int64, err error) {
	free, _, _, err := s.Space()
	if err != nil {
		return 0, 0, err
	}
	space, err := s.root.Space()
	if err != nil {
		return 0, 0, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range s.promised {
		free -= n
	}
	return max(free, 0), space.Inodes, nil
}

// A Tree is a generation that is open for reading.
type Tree struct {
	Generation Generation
	Files      *beneath.Dir // its files/
	dir        *beneath.Dir
}

// Tree opens a generation. The caller must Close it.
func (s *Store) Tree(g Generation) (*Tree, error) {
	dir, err := s.generations.Dir(g.Repository + "/" + g.Name)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	files, err := dir.Dir(FilesFolder)
	if err != nil {
		dir.Close()
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return &Tree{Generation: g, Files: files, dir: dir}, nil
}

// List reads the generation's manifest from its beginning. closing must be called.
func (t *Tree) List() (list *manifest.Reader, closing func() error, err error) {
	f, _, err := t.dir.Open(ManifestFile)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return manifest.NewReader(f), f.Close, nil
}

// Close closes the generation.
func (t *Tree) Close() error { return errors.Join(t.Files.Close(), t.dir.Close()) }

// firstUse reports whether the generation that is put together had no file of
// that content until now. The count of an object's links does not say so: one that
// was adopted has further names from the start.
func (a *assembly) firstUse(sum manifest.Sum) (bool, error) {
	if a.taken == nil {
		list, err := listObjects(a.objects)
		if err != nil {
			return false, err
		}
		a.taken = list
	}
	i, ok := a.taken.find(sum)
	if !ok || a.taken.wanted[i] {
		return !ok, nil
	}
	a.taken.wanted[i] = true
	return true, nil
}
