package generations

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"farkeep/shared/beneath"
	"farkeep/shared/hint"
	"farkeep/shared/pushwire"

	"golang.org/x/sys/unix"
)

// How a generation goes:
//
//	generations/photos/000042-…/
//	        │  one rename, then fsync of both folders: from here on it is gone
//	        ▼
//	.farkeep/going/photos--000042-…/
//	        │  its files are removed in the order of its MANIFEST, slowly; .progress
//	        │  says how far, and how many bytes were freed
//	        ▼
//	generations/photos/.moved    what it leaves to its successor, see account.go
//	        │  the rest is removed
//	        ▼
//	nothing
//
// A cut at any instant leaves it whole in its place, or in going/, where the next
// Sweep goes on. No step looks into another generation, or changes a file: what is
// shared only loses a name.
const (
	goingFolder  = "going"
	progressFile = ".progress"
)

// goingName is the folder of a generation in going/.
func goingName(repository, name string) string { return repository + "--" + name }

// goingGeneration takes such a name apart; it reports false for what is no
// generation.
func goingGeneration(entry string) (repository, name string, ok bool) {
	i := strings.LastIndex(entry, "--")
	if i < 0 {
		return "", "", false
	}
	repository, name = entry[:i], entry[i+2:]
	_, _, err := ParseName(name)
	return repository, name, err == nil && pushwire.CheckRepository(repository) == nil
}

// listGoing returns what is in going/, sorted: of one repository oldest first.
func (s *Store) listGoing() ([]string, error) {
	var names []string
	err := s.going.Each(func(e fs.DirEntry) error {
		names = append(names, e.Name())
		return nil
	})
	slices.Sort(names)
	return names, err
}

func (s *Store) readGoing(entry string) (Generation, error) {
	repository, name, ok := goingGeneration(entry)
	if !ok {
		return Generation{}, fmt.Errorf("%q is not a generation", entry)
	}
	dir, err := s.going.Dir(entry)
	if err != nil {
		return Generation{}, err
	}
	defer dir.Close()
	return readIn(dir, repository, name)
}

// Remove expires a generation: it is renamed away, which is durable when anything
// else happens, and then emptied so slowly that the disk can serve others. When
// ctx ends meanwhile, or the power goes, Sweep goes on; the generation is gone
// nonetheless.
//
// Nothing here asks whether it is time. What Remove refuses is what no policy may
// do. ErrKept: the current generation, the last one that can be read, one that is
// suspect and undecided. ErrHeld: one that a push builds on or that is being read;
// a later attempt may succeed.
func (s *Store) Remove(ctx context.Context, repository, name string) error {
	err := s.remove(ctx, repository, name)
	if err == nil {
		err = s.empty(ctx, goingName(repository, name))
	}
	if err != nil {
		return fmt.Errorf("expire generation %.64s of %.200s: %w", name, repository, err)
	}
	return nil
}

func (s *Store) remove(ctx context.Context, repository, name string) error {
	if err := pushwire.CheckRepository(repository); err != nil {
		return err
	}
	home, err := s.generations.Dir(repository)
	if err != nil {
		return err
	}
	defer home.Close()
	if _, err := s.List(ctx, repository); err != nil { // what takes long on a cold disk, before the gate
		return err
	}
	// From the check to the rename no other may go, nor begin to be used.
	s.gate.Lock()
	defer s.gate.Unlock()
	list, err := s.List(ctx, repository)
	if err != nil {
		return err
	}
	if err := mayGo(list, name); err != nil {
		return err
	}
	if err := s.keepSequence(home, list[len(list)-1].Sequence); err != nil {
		return err
	}
	if err := s.sendOff(home, repository, name); err != nil {
		return err
	}
	return errors.Join(s.going.Sync(), home.Sync())
}

// mayGo refuses what no policy may remove.
func mayGo(list []Generation, name string) error {
	i := slices.IndexFunc(list, func(g Generation) bool { return g.Name == name })
	if i < 0 {
		return fmt.Errorf("there is no generation %.64q", name)
	}
	if c := current(list); c != nil && c.Name == name {
		return fmt.Errorf("%w: it is the current one", ErrKept)
	}
	if list[i].Standing == Suspect {
		return hint.Because(fmt.Errorf("%w: it is suspect, and nobody has decided about it", ErrKept), "accept or reject it with the admin key")
	}
	if !slices.ContainsFunc(list, func(g Generation) bool { return g.Format != 0 && g.Name != name }) {
		return fmt.Errorf("%w: no other can be read", ErrKept)
	}
	return nil
}

// sendOff renames a generation into going/. s.gate is held.
func (s *Store) sendOff(home *beneath.Dir, repository, name string) error {
	if s.held[repository+"/"+name] > 0 {
		return fmt.Errorf("generation %s is %w", name, ErrHeld)
	}
	err := home.RenameNew(name, s.going, goingName(repository, name))
	if errors.Is(err, fs.ErrPermission) {
		err = hint.Because(err, "the disk's files belong to another user: as root, give the folder generations to the user that owns the disk's top folder, with chown -R")
	}
	if err != nil {
		return err
	}
	s.mu.Lock()
	delete(s.known[repository], name)
	s.mu.Unlock()
	return nil
}

// RemoveRepository removes all generations of a repository, suspect ones as well,
// its staging copy and what was uploaded of a push: retirement alone may ask for
// that. A cut leaves the newest generations; repeat it. It returns an error that
// wraps fs.ErrNotExist when there is nothing of that name,
// and ErrBusy or ErrHeld while it is in use. The numbers of a repository that
// comes again under that name go on.
func (s *Store) RemoveRepository(ctx context.Context, repository string) error {
	gone, err := s.removeRepository(ctx, repository)
	for _, entry := range gone {
		if err == nil {
			err = s.empty(ctx, entry)
		}
	}
	if err != nil {
		return fmt.Errorf("remove repository %.200s: %w", repository, err)
	}
	return nil
}

func (s *Store) removeRepository(ctx context.Context, repository string) (gone []string, err error) {
	if err := pushwire.CheckRepository(repository); err != nil {
		return nil, err
	}
	s.gate.Lock()
	defer s.gate.Unlock()
	for key := range s.held {
		if strings.HasPrefix(key, repository+"/") {
			return nil, fmt.Errorf("generation %s is %w", key, ErrHeld)
		}
	}
	if there, err := s.anything(repository); err != nil || !there {
		return nil, errors.Join(err, fmt.Errorf("nothing of it is here: %w", fs.ErrNotExist))
	}
	// No push begins while this is open.
	lock, err := s.makeDir(s.incoming, repository, privatePerm)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	if err := lock.Lock(); err != nil {
		if errors.Is(err, beneath.ErrLocked) {
			err = ErrBusy
		}
		return nil, err
	}
	home, err := s.generations.Dir(repository)
	if err == nil {
		defer home.Close()
		gone, err = s.sendAllOff(ctx, home, repository)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return gone, errors.Join(err, s.going.Sync())
	}
	for _, path := range []string{GenerationsFolder, StagingFolder, PrivateFolder + "/" + judgeFolder, IncomingFolder} {
		entry, err := s.discard(path, repository)
		if err != nil {
			return gone, errors.Join(err, s.going.Sync())
		}
		if entry != "" {
			gone = append(gone, entry)
		}
	}
	s.mu.Lock()
	delete(s.known, repository)
	s.mu.Unlock()
	return gone, s.going.Sync()
}

// anything reports whether the store has a folder for a repository.
func (s *Store) anything(repository string) (bool, error) {
	for _, path := range []string{GenerationsFolder, IncomingFolder, StagingFolder} {
		dir, err := s.root.Dir(path)
		if err == nil {
			_, err = dir.Stat(repository)
			dir.Close()
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return err == nil, err
		}
	}
	return false, nil
}

// sendAllOff renames all generations of a repository away, oldest first.
func (s *Store) sendAllOff(ctx context.Context, home *beneath.Dir, repository string) (gone []string, err error) {
	list, err := s.List(ctx, repository)
	if err != nil {
		return nil, err
	}
	last, err := s.lastSequence(ctx, home, repository)
	if err != nil {
		return nil, err
	}
	if err := s.retireNumber(repository, last); err != nil {
		return nil, err
	}
	for _, g := range list {
		if ctx.Err() != nil {
			return gone, context.Cause(ctx)
		}
		if err := s.sendOff(home, repository, g.Name); err != nil {
			return gone, err
		}
		gone = append(gone, goingName(repository, g.Name))
	}
	return gone, nil
}

// discard renames folder/repository into going/, if it is there, to be removed
// without any account. It returns the name there.
func (s *Store) discard(folder, repository string) (entry string, err error) {
	from, err := s.root.Dir(folder)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	defer from.Close()
	entry = discardName(repository, folder[strings.LastIndexByte(folder, '/')+1:])
	err = from.RenameNew(repository, s.going, entry)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	return entry, from.Sync()
}

func discardName(repository, what string) string {
	var random [4]byte
	rand.Read(random[:])
	return goingName(repository, what+"-"+hex.EncodeToString(random[:]))
}

// MaxIdle is how long what was uploaded waits for the rest of its push.
const MaxIdle = 30 * 24 * time.Hour

// Sweep removes what nobody needs any more, as slowly as Remove does: generations
// that were expired but not emptied, what a commit that was cut has left, uploads
// that were not gone on with for MaxIdle, and the folders of pushes that came to
// nothing. It returns how many folders it removed; without work it is cheap. What
// it cannot remove it leaves, goes on with the rest, and tells in the error.
func (s *Store) Sweep(ctx context.Context) (int, error) {
	errs := []error{s.sweepIncoming(ctx)}
	names, err := s.listGoing()
	errs = append(errs, err)
	n := 0
	for _, entry := range names {
		err := s.empty(ctx, entry)
		if ctx.Err() != nil {
			return n, context.Cause(ctx)
		}
		if err == nil {
			n++
		}
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return n, fmt.Errorf("sweep the disk: %w", err)
	}
	return n, nil
}

// sweepIncoming sends off what pushes have left behind.
func (s *Store) sweepIncoming(ctx context.Context) error {
	var names []string
	err := s.incoming.Each(func(e fs.DirEntry) error {
		names = append(names, e.Name())
		return nil
	})
	errs := []error{err}
	for _, name := range names {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if pushwire.CheckRepository(name) == nil {
			errs = append(errs, s.sweepPush(name))
		}
	}
	return errors.Join(errs...)
}

func (s *Store) sweepPush(repository string) error {
	// Asked before the gate is taken: whoever answers may wait for somebody who
	// closes a push, which takes the gate.
	clockSet := s.opt.ClockSet()
	s.gate.Lock()
	defer s.gate.Unlock()
	dir, err := s.incoming.Dir(repository)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := dir.Lock(); err != nil {
		if errors.Is(err, beneath.ErrLocked) {
			return nil // it is at work
		}
		return err
	}
	idle := false
	if clockSet {
		if idle, err = s.idle(dir); err != nil {
			return err
		}
	}
	if idle {
		s.opt.Log.Info("an upload that was not gone on with is discarded", "repository", repository)
		_, err := s.discard(IncomingFolder, repository)
		return err
	}
	if _, err := dir.Stat(stagingFolder); err == nil {
		// Its links would keep what is expired later.
		if err := dir.RenameNew(stagingFolder, s.going, discardName(repository, "commit")); err != nil {
			return err
		}
	}
	return s.sweepName(dir, repository)
}

// sweepName forgets the name of a repository whose first push came to nothing, as
// it counts for MaxRepositories. Only folders without content go.
func (s *Store) sweepName(dir *beneath.Dir, repository string) error {
	err := s.generations.RemoveDir(repository)
	if errors.Is(err, unix.ENOTEMPTY) {
		return nil // it has generations
	}
	for _, name := range []string{objectsFolder, buildingFolder} {
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			err = dir.RemoveDir(name)
		}
	}
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		err = s.incoming.RemoveDir(repository)
	}
	if errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// idle reports whether nothing was done to an upload for MaxIdle.
func (s *Store) idle(dir *beneath.Dir) (bool, error) {
	// Every offer makes and removes a name in here, every upload in the others.
	st, err := dir.StatSelf()
	if err != nil {
		return false, err
	}
	last := st.Mtim.Nano()
	empty := true
	for _, name := range []string{objectsFolder, buildingFolder, pushFile, ManifestFile} {
		if st, err := dir.Stat(name); err == nil {
			last, empty = max(last, st.Mtim.Nano()), false
		}
	}
	return !empty && s.opt.Now().Sub(time.Unix(0, last)) > MaxIdle, nil
}
