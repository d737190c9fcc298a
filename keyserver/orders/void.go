package orders

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"farkeep/shared/atomicfile"
	"farkeep/shared/settings"
)

// EventUnvoid is on record where a void key was taken again.
const EventUnvoid = "unvoid"

// maxVoid bounds how many keys of one appliance are remembered as void: one goes
// with each card that was lost.
const maxVoid = 64

// VoidKey makes the client key with that fingerprint (SHA256:...) worthless here:
// it gets no session any more. known is whether it was void already.
func (b *Book) VoidKey(o Order, fingerprint string) (known bool, err error) {
	known, err = b.changeVoid(o.Appliance, fingerprint, func(all []string) []string { return append(all, fingerprint) }, true)
	if err != nil || known {
		return known, err
	}
	if err := b.record(EventVoid, o, fingerprint+": "+o.Why); err != nil {
		return false, fmt.Errorf("the SSH key of %s is void, but not on record: %w", o.Appliance, err)
	}
	return false, nil
}

// UnvoidKey takes that back. known is whether it was void.
func (b *Book) UnvoidKey(o Order, fingerprint string) (known bool, err error) {
	void, err := IsVoid(b.Dir, o.Appliance, fingerprint)
	if err != nil || !void {
		return false, err
	}
	if err := b.record(EventUnvoid, o, fingerprint+": "+o.Why); err != nil {
		return true, err
	}
	_, err = b.changeVoid(o.Appliance, fingerprint, func(all []string) []string {
		return slices.DeleteFunc(all, func(f string) bool { return f == fingerprint })
	}, false)
	return true, err
}

// changeVoid changes the list, unless it already is as wanted.
func (b *Book) changeVoid(name, fingerprint string, change func([]string) []string, wanted bool) (already bool, err error) {
	all, err := voided(b.Dir, name)
	if err != nil {
		return false, err
	}
	if slices.Contains(all, fingerprint) == wanted {
		return true, nil
	}
	all = change(all)
	if len(all) > maxVoid {
		all = all[len(all)-maxVoid:]
	}
	text, err := json.Marshal(all)
	if err != nil {
		return false, fmt.Errorf("void the SSH key of %s: %w", name, err)
	}
	if err := os.MkdirAll(filepath.Join(b.Dir, "void"), 0o700); err != nil {
		return false, fmt.Errorf("void the SSH key of %s: %w", name, err)
	}
	return false, atomicfile.Write(voidPath(b.Dir, name), append(text, '\n'), 0o600)
}

// IsVoid reports whether a client key of the appliance was declared void. What
// cannot be read is an error, and a key that it concerns gets no session.
func IsVoid(dir, name, fingerprint string) (bool, error) {
	all, err := voided(dir, name)
	return slices.Contains(all, fingerprint), err
}

func voidPath(dir, name string) string { return filepath.Join(dir, "void", name+".json") }

func voided(dir, name string) (all []string, err error) {
	if !settings.IsName(name) {
		return nil, fmt.Errorf("%q is not the name of an appliance", name)
	}
	text, err := os.ReadFile(voidPath(dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err == nil {
		err = json.Unmarshal(text, &all)
	}
	if err != nil {
		return nil, fmt.Errorf("read which SSH keys of %s are void: %w", name, err)
	}
	return all, nil
}
