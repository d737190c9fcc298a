package siteinit

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"farkeep/shared/atomicfile"
	"farkeep/shared/hint"
	"farkeep/shared/identity"
	"farkeep/shared/keywire"
	"farkeep/shared/secret"

	"golang.org/x/crypto/ssh"
)

// create writes a secret that must not exist yet.
func (d *Dir) create(name string, text secret.Text, r *Report) error {
	path := filepath.Join(d.path, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("make a folder for %s: %w", path, err)
	}
	if err := atomicfile.Create(path, []byte(text.Reveal()), 0o600); err != nil {
		return err
	}
	r.Made = append(r.Made, name)
	return nil
}

// read returns the text of a secret, "" when there is none.
func (d *Dir) read(name string) (secret.Text, error) {
	text, err := identity.ReadPrivate(filepath.Join(d.path, name))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	return text, err
}

// ssh returns the public half of the SSH identity in name, which it makes where
// there is none.
func (d *Dir) ssh(name, comment string, r *Report) (public string, err error) {
	text, err := d.read(name)
	if err != nil {
		return "", err
	}
	if text == "" {
		private, public, err := identity.New(comment)
		if err != nil {
			return "", err
		}
		return public, d.create(name, private, r)
	}
	s, err := identity.Signer(text)
	if err != nil {
		return "", fmt.Errorf("read identity %s: %w", filepath.Join(d.path, name), err)
	}
	return identity.Line(s.PublicKey(), comment), nil
}

// sealed is ssh for a private key under a passphrase. The public half stands in
// clear in OpenSSH's format, so that no later run has to ask.
func (d *Dir) sealed(name, comment string, passphrase func() (secret.Bytes, error), r *Report) (public string, err error) {
	text, err := d.read(name)
	if err != nil {
		return "", err
	}
	if text == "" {
		if passphrase == nil {
			return "", errors.New("make the admin key: nobody to ask for its passphrase")
		}
		p, err := passphrase()
		if err != nil {
			return "", err
		}
		defer p.Wipe()
		private, public, err := identity.NewSealed(comment, p)
		if err != nil {
			return "", err
		}
		return public, d.create(name, private, r)
	}
	_, err = ssh.ParsePrivateKey([]byte(text.Reveal()))
	var missing *ssh.PassphraseMissingError
	if !errors.As(err, &missing) || missing.PublicKey == nil {
		return "", hint.Because(fmt.Errorf("the admin key %s is not sealed with a passphrase", filepath.Join(d.path, name)), "seal it: ssh-keygen -p -f %s", filepath.Join(d.path, name))
	}
	return identity.Line(missing.PublicKey, comment), nil
}

// wireGuard returns the public half of the WireGuard key in name, which it
// makes where there is none.
func (d *Dir) wireGuard(name string, r *Report) (public string, err error) {
	text, err := d.read(name)
	if err != nil {
		return "", err
	}
	if text == "" {
		private, public, err := identity.NewWireGuard()
		if err != nil {
			return "", err
		}
		return public, d.create(name, private+"\n", r)
	}
	public, err = identity.WireGuardPublic(secret.Text(strings.TrimSpace(text.Reveal())))
	if err != nil {
		return "", fmt.Errorf("read %s: %w", filepath.Join(d.path, name), err)
	}
	return public, nil
}

// preshared makes the preshared key in name where there is none.
func (d *Dir) preshared(name string, r *Report) error {
	text, err := d.read(name)
	if err != nil || text != "" {
		return err
	}
	key, err := identity.NewPreshared()
	if err != nil {
		return err
	}
	return d.create(name, key+"\n", r)
}

// line returns a secret of one line. It must exist.
func (d *Dir) line(name string) (secret.Text, error) {
	text, err := d.read(name)
	if err == nil && text == "" {
		err = lost(filepath.Join(d.path, name))
	}
	return secret.Text(strings.TrimRight(text.Reveal(), "\r\n")), err
}

// lost is the error for an identity that site.toml names and the folder lacks.
func lost(path string) error {
	return hint.Because(fmt.Errorf("the identity %s is missing, and site.toml names it", path),
		"bring it back from a copy; to give up this identity, remove its entry from site.toml, and the machine will have to be set up anew")
}

// verify checks that the identity in name is the one that site.toml knows.
func (d *Dir) verify(name, public string) error {
	path := filepath.Join(d.path, name)
	text, err := d.read(name)
	if err != nil {
		return err
	}
	if text == "" {
		return lost(path)
	}
	s, err := identity.Signer(text)
	if err != nil {
		return fmt.Errorf("read identity %s: %w", path, err)
	}
	if !identity.SamePublic(public, identity.Line(s.PublicKey(), "")) {
		return hint.Because(fmt.Errorf("the identity %s is %s, not the one in site.toml", path, identity.Fingerprint(s.PublicKey())),
			"one of the two was changed by hand: bring back the right one from a copy")
	}
	return nil
}

// writeDerived writes a file that follows from others, if it differs.
func (d *Dir) writeDerived(name string, text []byte, mode fs.FileMode, r *Report) error {
	path := filepath.Join(d.path, name)
	old, err := os.ReadFile(path)
	exists := err == nil
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read %s: %w", path, err)
	}
	defer clear(old)
	if exists && bytes.Equal(old, text) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("make a folder for %s: %w", path, err)
	}
	if err := atomicfile.Write(path, text, mode); err != nil {
		return err
	}
	if exists {
		r.Changed = append(r.Changed, name)
	} else {
		r.Made = append(r.Made, name)
	}
	return nil
}

// sameKey checks that the key file at path holds key.
func sameKey(path string, key secret.Bytes) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	there, err := secret.ReadAll(f, keywire.MaxKey)
	if err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	defer there.Wipe()
	if !bytes.Equal(there.Reveal(), key.Reveal()) {
		return hint.Because(fmt.Errorf("%s holds another key already", path), "a disk's key is not replaced in passing: move the old file away if you are sure that nothing needs it")
	}
	return nil
}
