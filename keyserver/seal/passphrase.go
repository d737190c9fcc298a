package seal

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	"farkeep/shared/secret"

	"filippo.io/age"
	"filippo.io/age/armor"
)

var (
	// ErrPassphrase means that an identity file is sealed with a passphrase.
	ErrPassphrase = errors.New("the identity is sealed with a passphrase")
	// ErrWrongPassphrase means that the passphrase is another one.
	ErrWrongPassphrase = errors.New("the passphrase is wrong")
)

const (
	intro = "age-encryption.org/v1\n"
	// workFactor is scrypt's, as a power of two: about a second and 256 MiB on a
	// laptop, a few seconds on a Pi.
	workFactor = 18
	// maxWorkFactor bounds what opening a file may cost: 1 GiB of memory.
	maxWorkFactor = 20
)

// IsSealed reports whether text is an age file, and not an identity in clear.
func IsSealed(text []byte) bool {
	return bytes.HasPrefix(text, []byte(intro)) || bytes.HasPrefix(bytes.TrimLeft(text, "\r\n\t "), []byte(armor.Header))
}

// Passphrase seals streams with a passphrase. Wipe is the caller's.
type Passphrase struct {
	words secret.Bytes
	work  int
}

// NewPassphrase takes the passphrase as it was typed, without the line's end.
func NewPassphrase(words secret.Bytes) (Passphrase, error) {
	if words.Len() == 0 {
		return Passphrase{}, errors.New("the passphrase is empty")
	}
	if words.Len() > 1024 {
		return Passphrase{}, errors.New("the passphrase is longer than 1024 bytes")
	}
	return Passphrase{words: words, work: workFactor}, nil
}

// Writer seals what is written to it; Close completes it.
func (p Passphrase) Writer(w io.Writer) (io.WriteCloser, error) {
	r, err := age.NewScryptRecipient(string(p.words.Reveal()))
	if err != nil {
		return nil, fmt.Errorf("seal with a passphrase: %w", err)
	}
	r.SetWorkFactor(p.work)
	return age.Encrypt(w, r)
}

// Reader opens an age file, in armour or not. The error wraps
// ErrWrongPassphrase.
func (p Passphrase) Reader(r io.Reader) (io.Reader, error) {
	id, err := age.NewScryptIdentity(string(p.words.Reveal()))
	if err != nil {
		return nil, fmt.Errorf("open with a passphrase: %w", err)
	}
	id.SetMaxWorkFactor(maxWorkFactor)
	return open(r, id)
}

// Writer seals what is written to it for the recipients; Close completes it.
func (r Recipients) Writer(w io.Writer) (io.WriteCloser, error) {
	if len(r.keys) == 0 {
		return nil, errors.New("seal for nobody")
	}
	return age.Encrypt(w, r.keys...)
}

// Reader opens an age file, in armour or not, through the memory of the Go
// runtime: for commands that end soon. The error wraps ErrNotForUs.
func (i *Identity) Reader(r io.Reader) (io.Reader, error) { return open(r, i.ids...) }

func open(r io.Reader, ids ...age.Identity) (io.Reader, error) {
	r, err := dearmour(r)
	if err != nil {
		return nil, err
	}
	plain, err := age.Decrypt(r, ids...)
	var stranger *age.NoIdentityMatchError
	switch {
	case errors.As(err, &stranger):
		if _, words := ids[0].(*age.ScryptIdentity); words {
			if len(stranger.StanzaTypes) == 1 && stranger.StanzaTypes[0] == "scrypt" {
				return nil, ErrWrongPassphrase
			}
			return nil, fmt.Errorf("%w: not with a passphrase", ErrNotForUs)
		}
		return nil, ErrNotForUs
	case err != nil:
		return nil, fmt.Errorf("open an age file: %w", err)
	}
	return plain, nil
}

func dearmour(r io.Reader) (io.Reader, error) {
	start := make([]byte, len(armor.Header))
	n, err := io.ReadFull(r, start)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("open an age file: %w", err)
	}
	all := io.MultiReader(bytes.NewReader(start[:n]), r)
	if string(start[:n]) == armor.Header {
		return armor.NewReader(all), nil
	}
	return all, nil
}

// Unseal opens an identity file that is sealed with a passphrase, as age -p
// makes it.
func (p Passphrase) Unseal(file []byte) (*Identity, error) {
	r, err := p.Reader(bytes.NewReader(file))
	if err != nil {
		return nil, err
	}
	text, err := secret.ReadAll(r, MaxIdentity)
	if err != nil {
		return nil, fmt.Errorf("open the identity: %w", err)
	}
	defer text.Wipe()
	return ParseIdentity(text)
}

// SealFile is file, sealed with the passphrase.
func (p Passphrase) SealFile(file secret.Bytes) ([]byte, error) {
	var sealed bytes.Buffer
	w, err := p.Writer(&sealed)
	if err == nil {
		if _, err = w.Write(file.Reveal()); err == nil {
			err = w.Close()
		}
	}
	if err != nil {
		return nil, fmt.Errorf("seal with a passphrase: %w", err)
	}
	return sealed.Bytes(), nil
}
