package luksdisk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"farkeep/image/luksfile"
	"farkeep/shared/atomicfile"
	"farkeep/shared/hint"
	"farkeep/shared/keywire"
	"farkeep/shared/luksheader"
	"farkeep/shared/secret"
)

// Suffixes of key files in the key servers' folders, neither of which a key server
// takes for a key.
const (
	// NewSuffix marks a key that a disk is being given. As long as such a file is
	// there the change is not finished, and is taken up by the next Rekey.
	NewSuffix = ".new"
	// OldSuffix marks the key before, which opens older backups of the header.
	OldSuffix = ".old"
)

// Rekeyed is a disk whose key servers have another key now.
type Rekeyed struct {
	UUID        string
	Fingerprint string   // of the new header: the SHA-256 of its backup
	Slot        int      // the new key's
	Killed      []int    // slots that were wiped
	OtherSlots  []int    // slots of neither the key servers nor the operator, left alone
	KeyFiles    []string // of the key servers, with the new key
	OldKeys     []string // what opened the killed slot; needed by nobody but older header backups
	Backup      string   // of the new header, in place of the old one
}

// RekeyRequest says what is changed.
type RekeyRequest struct {
	Request
	// Recovery authorises the change. Its slot is never touched.
	Recovery secret.Bytes
	// Slot is the one whose key is to go; -1 finds it: the slot that the key in the
	// key servers' folders opens, or the only one besides the recovery key's.
	Slot int
}

// Rekey gives the key servers another key for an appliance's disk. The data are
// not touched, and neither is the recovery key's slot.
//
//	new key durable in the folders, as UUID.key.new
//	  ── added to the header, in a slot of its own
//	  ── opens the disk: asked of cryptsetup, and of our own reading
//	  ── old slot wiped
//	  ── header backed up, in place of the old backup
//	  ── fingerprint in site.toml
//	  ── UUID.key becomes UUID.key.old, UUID.key.new becomes UUID.key
//
// At every instant the recovery key opens the disk, and so does a key in the
// folders: the old one until its slot is wiped, the new one from when it was
// added. A Rekey that was cut is finished by the next.
func Rekey(ctx context.Context, r RekeyRequest) (*Rekeyed, error) {
	c, err := r.prepare(ctx)
	if err != nil {
		return nil, err
	}
	defer c.wipe()
	if err := r.Confirm(c.target); err != nil {
		return nil, err
	}
	for _, step := range []struct {
		what string
		do   func(context.Context) error
	}{
		{"keeping the new key in the key servers' folders", c.keepNew},
		{"adding the new key to the header", c.add},
		{"checking that the new key opens the disk", c.check},
		{"wiping the old key's slot", c.kill},
		{"backing up the header", c.backup},
		{"putting the new key in the old one's place", c.place},
	} {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		r.Progress("%s", step.what)
		if err := step.do(ctx); err != nil {
			return nil, hint.Because(err, "the disk opens with its recovery key as before; run the same command again, it goes on from here")
		}
	}
	return &c.done, nil
}

// change is one Rekey under way.
type change struct {
	RekeyRequest
	target   *Target
	recovery int          // slot
	old      secret.Bytes // the key in the folders; empty if they have none
	fresh    secret.Bytes
	done     Rekeyed
}

func (c *change) wipe() {
	c.old.Wipe()
	c.fresh.Wipe()
}

// prepare looks at everything and changes nothing.
func (r RekeyRequest) prepare(ctx context.Context) (_ *change, err error) {
	a, t, err := r.find()
	if err != nil {
		return nil, err
	}
	h, err := luksfile.Header(t.Path)
	if err != nil {
		return nil, err
	}
	if h.Damage != "" {
		return nil, hint.Because(fmt.Errorf("%s: %s", t.Path, h.Damage), "cryptsetup repair %s", t.Path)
	}
	if h.UUID != a.LUKS {
		return nil, hint.Exit(hint.ExitUsage, hint.Because(fmt.Errorf("%s is the LUKS volume %s, and %s has %q", t.Path, h.UUID, a.Name, a.LUKS), "farkeep-image disk adopt takes a disk in"))
	}
	c := &change{RekeyRequest: r, target: t, done: Rekeyed{UUID: h.UUID, KeyFiles: r.Site.KeyFiles(h.UUID), Backup: filepath.Join(r.Site.OperatorDir(), BackupFile(h.UUID))}}
	defer func() {
		if err != nil {
			c.wipe()
		}
	}()
	if c.recovery, err = slotOf(ctx, t.Path, h, r.Recovery); err != nil {
		if errors.Is(err, luksfile.ErrWrongKey) {
			err = hint.Exit(hint.ExitUsage, hint.Because(fmt.Errorf("the recovery key does not open %s", t.Path), "it is %s in the operator's folder, or in the bundle", RecoveryKeyFile(h.UUID)))
		}
		return nil, err
	}
	if err := c.readKeys(); err != nil {
		return nil, err
	}
	if r.Slot >= 0 && r.Slot == c.recovery {
		return nil, hint.Exit(hint.ExitUsage, fmt.Errorf("slot %d is the recovery key's, which this never touches", r.Slot))
	}
	return c, nil
}

// slotOf finds the slot that key opens.
func slotOf(ctx context.Context, path string, h *luksheader.Header, key secret.Bytes) (int, error) {
	for _, s := range h.Slots {
		err := luksfile.TestSlot(ctx, path, s.ID, key)
		if err == nil || !errors.Is(err, luksfile.ErrWrongKey) {
			return s.ID, err
		}
	}
	return -1, luksfile.ErrWrongKey
}

// readKeys finds the keys in the folders: the old one, and the new one of a Rekey
// that was cut.
func (c *change) readKeys() error {
	for _, path := range c.done.KeyFiles {
		for _, k := range []struct {
			path string
			key  *secret.Bytes
		}{{path + NewSuffix, &c.fresh}, {path, &c.old}} {
			key, err := readKey(k.path)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return err
			}
			if k.key.Len() == 0 {
				*k.key = key
				continue
			}
			same := bytes.Equal(key.Reveal(), k.key.Reveal())
			key.Wipe()
			// While the last step was under way one folder may have the new key already.
			if !same && (k.key == &c.fresh || c.fresh.Len() == 0) {
				return hint.Because(fmt.Errorf("%s differs from the same key in another key server's folder", k.path), "find out which of them opens the disk (cryptsetup open --test-passphrase), and make them alike")
			}
		}
	}
	if c.fresh.Len() > 0 {
		return nil
	}
	for _, path := range c.done.KeyFiles {
		if exists(path + OldSuffix) {
			return hint.Exit(hint.ExitUsage, hint.Because(fmt.Errorf("%s is left of an earlier change", path+OldSuffix),
				"once the appliance has opened its disk with the newer key, and the bundle was made anew, nobody needs it: remove it"))
		}
	}
	var err error
	c.fresh, err = newKey()
	return err
}

func readKey(path string) (secret.Bytes, error) {
	f, err := os.Open(path)
	if err != nil {
		return secret.Bytes{}, err
	}
	defer f.Close()
	key, err := secret.ReadAll(f, keywire.MaxKey)
	if err != nil {
		return secret.Bytes{}, fmt.Errorf("read %s: %w", path, err)
	}
	if key.Len() == 0 {
		return secret.Bytes{}, fmt.Errorf("%s is empty", path)
	}
	return key, nil
}

func (c *change) keepNew(context.Context) error {
	for _, path := range c.done.KeyFiles {
		if there, err := readKey(path); err == nil {
			placed := bytes.Equal(there.Reveal(), c.fresh.Reveal())
			there.Wipe()
			if placed {
				continue // the last step of a Rekey that was cut came as far as this
			}
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return err
		}
		if err := atomicfile.Create(path+NewSuffix, c.fresh.Reveal(), 0o600); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return nil
}

func (c *change) add(ctx context.Context) error {
	h, err := luksfile.Header(c.Path)
	if err != nil {
		return err
	}
	_, err = slotOf(ctx, c.Path, h, c.fresh)
	if !errors.Is(err, luksfile.ErrWrongKey) {
		return err // added already
	}
	return luksfile.AddKey(ctx, c.Path, c.Recovery, c.fresh)
}

func (c *change) check(ctx context.Context) error {
	h, err := luksfile.Header(c.Path)
	if err != nil {
		return err
	}
	if c.done.Slot, err = slotOf(ctx, c.Path, h, c.fresh); err != nil {
		return fmt.Errorf("the new key does not open %s: %w", c.Path, err)
	}
	if c.done.Slot == c.recovery {
		return fmt.Errorf("%s: slot %d opens with the new and the recovery key", c.Path, c.recovery)
	}
	v, err := luksfile.Open(c.Path, c.fresh, false)
	if err != nil {
		return fmt.Errorf("the new key does not open %s: %w", c.Path, err)
	}
	defer v.Close()
	if _, ok := ext4Size(v); !ok {
		return fmt.Errorf("%s: with the new key its file system cannot be read", c.Path)
	}
	return nil
}

func (c *change) kill(ctx context.Context) error {
	h, err := luksfile.Header(c.Path)
	if err != nil {
		return err
	}
	c.done.OtherSlots = nil
	for _, s := range h.Slots {
		if s.ID != c.recovery && s.ID != c.done.Slot {
			c.done.OtherSlots = append(c.done.OtherSlots, s.ID)
		}
	}
	slot, err := c.victim(ctx, h)
	if err != nil || slot < 0 {
		return err
	}
	if err := luksfile.KillSlot(ctx, c.Path, slot, c.Recovery); err != nil {
		return err
	}
	c.done.Killed = append(c.done.Killed, slot)
	c.done.OtherSlots = slices.DeleteFunc(c.done.OtherSlots, func(s int) bool { return s == slot })
	for _, key := range []secret.Bytes{c.fresh, c.Recovery} {
		if err := luksfile.TestKey(ctx, c.Path, key); err != nil {
			return fmt.Errorf("after slot %d was wiped: %w", slot, err)
		}
	}
	return nil
}

// victim is the slot whose key is to go; -1 if it is gone.
func (c *change) victim(ctx context.Context, h *luksheader.Header) (int, error) {
	others := c.done.OtherSlots
	if c.Slot >= 0 {
		if !slices.Contains(others, c.Slot) {
			return -1, nil
		}
		return c.Slot, nil
	}
	if c.old.Len() > 0 && !bytes.Equal(c.old.Reveal(), c.fresh.Reveal()) {
		slot, err := slotOf(ctx, c.Path, h, c.old)
		if errors.Is(err, luksfile.ErrWrongKey) {
			err, slot = nil, -1 // wiped already
		}
		return slot, err
	}
	switch len(others) {
	case 0:
		return -1, nil
	case 1:
		return others[0], nil
	}
	return -1, hint.Exit(hint.ExitUsage, hint.Because(fmt.Errorf("%s has the key slots %v besides the recovery key's, and the old key is not in the key servers' folders: which one goes?", c.Path, others), "say it: --slot %d", others[0]))
}

func (c *change) backup(context.Context) error {
	h, err := luksfile.Header(c.Path)
	if err != nil {
		return err
	}
	c.done.Fingerprint = h.Fingerprint()
	// The old backup is not kept: with it, the old key would open the disk for ever
	// (cryptsetup-luksHeaderBackup(8)).
	if err := atomicfile.Write(c.done.Backup, h.Canonical(), 0o600); err != nil {
		return err
	}
	return c.Site.SetLUKSHeader(c.Appliance, c.done.Fingerprint)
}

func (c *change) place(ctx context.Context) error {
	for _, path := range c.done.KeyFiles {
		there, err := readKey(path)
		placed := err == nil && bytes.Equal(there.Reveal(), c.fresh.Reveal())
		there.Wipe()
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if !placed {
			if err == nil {
				// A second name first: at no instant does the folder lack the old key
				// before it has the new one.
				if err := os.Link(path, path+OldSuffix); err != nil && !errors.Is(err, fs.ErrExist) {
					return err
				}
			}
			if err := os.Rename(path+NewSuffix, path); err != nil {
				return err
			}
		} else if err := os.Remove(path + NewSuffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := atomicfile.SyncDir(filepath.Dir(path)); err != nil {
			return err
		}
		if exists(path + OldSuffix) {
			c.done.OldKeys = append(c.done.OldKeys, path+OldSuffix)
		}
	}
	return nil
}
