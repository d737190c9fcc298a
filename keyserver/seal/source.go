package seal

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"

	"farkeep/keyserver/locked"
	"farkeep/shared/hint"
	"farkeep/shared/secret"

	"golang.org/x/sys/unix"
)

// Source says where the identity of a key server comes from. Several are joined.
type Source struct {
	Files []string
	// Credentials are names in Directory, which is what systemd calls
	// $CREDENTIALS_DIRECTORY (systemd.exec(5), LoadCredential= and
	// LoadCredentialEncrypted=; the latter can be sealed to a TPM).
	Credentials []string
	Directory   string
	// Passphrase is asked when an identity is sealed with one; what it returns is
	// wiped. nil refuses.
	Passphrase func(file string) (secret.Bytes, error)
}

// Load reads the identity, nil where none is named.
func (s Source) Load() (*Identity, error) {
	var all *Identity
	add := func(path string, credential bool) error {
		id, err := s.load(path, credential)
		if err != nil {
			return fmt.Errorf("read the identity %s: %w", path, err)
		}
		if all != nil {
			id = all.Join(id)
		}
		all = id
		return nil
	}
	for _, path := range s.Files {
		if err := add(path, false); err != nil {
			return nil, err
		}
	}
	for _, name := range s.Credentials {
		path, err := Credential(s.Directory, name)
		if err == nil {
			err = add(path, true)
		}
		if err != nil {
			return nil, err
		}
	}
	return all, nil
}

func (s Source) load(path string, credential bool) (*Identity, error) {
	text, release, err := read(path, credential)
	if err != nil {
		return nil, err
	}
	defer release()
	id, err := ParseIdentity(secret.New(text))
	if !errors.Is(err, ErrPassphrase) {
		return id, err
	}
	if s.Passphrase == nil {
		return nil, err
	}
	words, err := s.Passphrase(path)
	if err != nil {
		return nil, err
	}
	defer words.Wipe()
	p, err := NewPassphrase(words)
	if err != nil {
		return nil, err
	}
	return p.Unseal(text)
}

var credentialName = regexp.MustCompile(`^[A-Za-z0-9_-][A-Za-z0-9._-]{0,254}$`)

// Credential is the path of a credential that systemd gave the service.
func Credential(directory, name string) (string, error) {
	if !credentialName.MatchString(name) {
		return "", fmt.Errorf("%q is not the name of a credential", name)
	}
	if directory == "" {
		return "", hint.Because(fmt.Errorf("credential %s: there is no CREDENTIALS_DIRECTORY", name),
			"this works in a service of systemd with LoadCredential=%s:FILE or LoadCredentialEncrypted=", name)
	}
	return filepath.Join(directory, name), nil
}

// ReadCredential reads a secret that systemd gave the service, without the end of
// its line. The caller wipes it.
func ReadCredential(directory, name string) (secret.Bytes, error) {
	path, err := Credential(directory, name)
	if err != nil {
		return secret.Bytes{}, err
	}
	text, release, err := read(path, true)
	if err != nil {
		return secret.Bytes{}, fmt.Errorf("read the credential %s: %w", name, err)
	}
	defer release()
	return secret.New(append([]byte(nil), TrimLine(text)...)), nil
}

// TrimLine is b without one newline at its end.
func TrimLine(b []byte) []byte {
	if n := len(b); n > 0 && b[n-1] == '\n' {
		b = b[:n-1]
		if n > 1 && b[n-2] == '\r' {
			b = b[:n-2]
		}
	}
	return b
}

// read reads a small secret file into locked memory, which release gives back.
func read(path string, credential bool) (text []byte, release func(), err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, nil, err
	}
	if err := private(info, credential); err != nil {
		return nil, nil, err
	}
	memory, err := locked.New(MaxIdentity + 1)
	if err != nil {
		return nil, nil, err
	}
	n, err := io.ReadFull(f, memory.Bytes())
	switch {
	case err == nil:
		memory.Release()
		return nil, nil, fmt.Errorf("longer than %d bytes", MaxIdentity)
	case !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF):
		memory.Release()
		return nil, nil, err
	}
	return memory.Bytes()[:n], memory.Release, nil
}

// private refuses a file that others can read. systemd gives a service its
// credentials by an access control list, whose mask shows as the group's right to read.
func private(info fs.FileInfo, credential bool) error {
	others := fs.FileMode(0o077)
	if credential {
		others = 0o037
	}
	switch {
	case !info.Mode().IsRegular():
		return errors.New("it is not a regular file")
	case info.Mode().Perm()&others != 0:
		return hint.Because(fmt.Errorf("it has mode %04o: others can read it", info.Mode().Perm()), "chmod 600, then ask who may have read it")
	}
	return nil
}
