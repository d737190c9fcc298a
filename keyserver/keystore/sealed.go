package keystore

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"farkeep/keyserver/locked"
	"farkeep/keyserver/seal"
	"farkeep/shared/atomicfile"
	"farkeep/shared/hint"
	"farkeep/shared/keywire"

	"golang.org/x/sys/unix"
)

// recipientsFile makes a store a sealed one: an age recipients file.
const recipientsFile = "recipients.txt"

// Recipients are those for whom the store is sealed; ok is false where it is not.
func (s *Store) Recipients() (r seal.Recipients, ok bool, err error) {
	f, err := os.OpenFile(s.path(recipientsFile), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return seal.Recipients{}, false, nil
	}
	if err != nil {
		return seal.Recipients{}, false, fmt.Errorf("read for whom the keys are sealed: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, seal.MaxIdentity))
	if err == nil {
		r, err = seal.ParseRecipients(string(text))
	}
	if err != nil {
		return seal.Recipients{}, false, fmt.Errorf("read for whom the keys are sealed: %s: %w", s.path(recipientsFile), err)
	}
	return r, true, nil
}

// Seal seals every key for r, and whatever is added from now on. Each sealed
// key is opened again and compared before the one in clear goes: the identity in
// use ([Store.Use] with one of r's, joined with the old one where the store is
// sealed already) has to open it. Interrupted, it can be done again. It returns how
// many keys were sealed.
//
// The file in clear is overwritten before it is removed. Flash memory, a journal
// and a backup may keep it all the same: a key that ever lay in clear on a disk is
// known to whoever holds that disk.
func (s *Store) Seal(r seal.Recipients) (int, error) {
	id := s.id.Load()
	if id == nil {
		return 0, hint.Because(errors.New("seal the keys: no identity to open them with"), "name it with --identity: what nobody can open must not replace what somebody can")
	}
	keys, _, err := s.List()
	if err != nil {
		return 0, err
	}
	for _, k := range keys { // before anything is changed
		if k.Err != nil {
			return 0, k.Err
		}
	}
	// First, so that a key that is added meanwhile is sealed.
	if err := atomicfile.Write(s.path(recipientsFile), []byte(r.Text()), 0o600); err != nil {
		return 0, err
	}
	for n, k := range keys {
		if err := s.sealOne(k.UUID, r, id); err != nil {
			return n, fmt.Errorf("seal the key of %s: %w", k.UUID, err)
		}
	}
	return len(keys), nil
}

func (s *Store) sealOne(uuid string, r seal.Recipients, id *seal.Identity) error {
	key, err := s.Get(uuid)
	if err != nil {
		return err
	}
	defer key.Release()
	text, err := r.Seal(key.Reveal())
	if err != nil {
		return err
	}
	if err := opens(id, text, key); err != nil {
		return err
	}
	if err := atomicfile.Write(s.path(sealedFile(uuid)), text, 0o600); err != nil {
		return err
	}
	return s.removeClear(uuid)
}

// opens proves that id opens text, and that it is the key.
func opens(id *seal.Identity, text []byte, key *Key) error {
	memory, err := locked.New(keywire.MaxKey)
	if err != nil {
		return err
	}
	defer memory.Release()
	n, err := id.Open(memory.Bytes(), text)
	if err != nil {
		return err
	}
	if !bytes.Equal(memory.Bytes()[:n], key.Reveal()) {
		return errors.New("what was sealed is not the key")
	}
	return nil
}

// gone is the name under which a key in clear is overwritten: under its own, a
// power cut in between would leave a key of zeros.
func gone(uuid string) string { return "." + keywire.KeyFile(uuid) + ".gone" }

// removeClear overwrites and removes a key in clear, if there is one, and what an
// interrupted removal left.
func (s *Store) removeClear(uuid string) error {
	err := os.Rename(s.path(keywire.KeyFile(uuid)), s.path(gone(uuid)))
	if err == nil {
		err = atomicfile.SyncDir(s.dir)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(s.path(gone(uuid)), os.O_WRONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err == nil {
		_, err = f.Write(make([]byte, info.Size()))
	}
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("overwrite the key in clear: %w", err)
	}
	if err := os.Remove(s.path(gone(uuid))); err != nil {
		return err
	}
	return atomicfile.SyncDir(s.dir)
}

// Unseal puts every key in clear again, and removes the store's recipients. Each
// key in clear is read again and compared before the sealed one goes. It returns
// how many keys were unsealed.
func (s *Store) Unseal() (int, error) {
	keys, _, err := s.List()
	if err != nil {
		return 0, err
	}
	for n, k := range keys {
		if k.Err != nil {
			return n, k.Err
		}
		if err := s.unsealOne(k.UUID); err != nil {
			return n, fmt.Errorf("unseal the key of %s: %w", k.UUID, err)
		}
	}
	if err := os.Remove(s.path(recipientsFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return len(keys), err
	}
	return len(keys), atomicfile.SyncDir(s.dir)
}

func (s *Store) unsealOne(uuid string) error {
	key, err := s.Get(uuid)
	if err != nil {
		return err
	}
	defer key.Release()
	if err := atomicfile.Write(s.path(keywire.KeyFile(uuid)), key.Reveal(), 0o600); err != nil {
		return err
	}
	again, err := s.Get(uuid) // the one in clear comes first
	if err != nil {
		return err
	}
	defer again.Release()
	if !bytes.Equal(again.Reveal(), key.Reveal()) {
		return errors.New("what was written is not the key")
	}
	if err := os.Remove(s.path(sealedFile(uuid))); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return atomicfile.SyncDir(s.dir)
}
