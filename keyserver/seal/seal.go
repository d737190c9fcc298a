// Package seal closes secrets with age (https://age-encryption.org/v1), so that
// a disk which is stolen without its identity says nothing, and so that a stock
// age opens them too: age -d -i IDENTITY UUID.key.age.
//
// What is opened goes into memory that the caller gives, and nowhere else: the
// header is age's own code, the one chunk of payload is opened here, in place.
// Of the identity age keeps one copy in the memory of the Go runtime for as long
// as the process lives, and its arithmetic leaves some behind: whoever can read
// the memory of a running key server can ask it for the keys as well.
package seal

import (
	"bytes"
	"crypto/hkdf"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"farkeep/shared/secret"

	"filippo.io/age"
	"golang.org/x/crypto/chacha20poly1305"
)

const (
	// MaxSealed bounds what Open takes: one chunk of age's payload.
	MaxSealed = 64 << 10
	// MaxHeader bounds the part before the payload, in bytes: some hundred recipients.
	MaxHeader = 64 << 10
	// MaxRecipients bounds for how many one secret is sealed.
	MaxRecipients = 16
	// MaxIdentity bounds an identity file, in bytes.
	MaxIdentity = 64 << 10

	nonceSize = 16
)

// ErrNotForUs means that no identity at hand opens a sealed secret.
var ErrNotForUs = errors.New("it is sealed to somebody else")

// Recipients are the public halves for which secrets are sealed. The zero value
// is nobody.
type Recipients struct {
	names []string
	keys  []age.Recipient
}

// ParseRecipients reads the text of an age recipients file: one "age1..." a
// line, with empty lines and lines that begin with # left out.
func ParseRecipients(text string) (Recipients, error) {
	var r Recipients
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		keys, err := age.ParseRecipients(strings.NewReader(line))
		if err != nil {
			// The error may hold the line, and the line may be an identity.
			return Recipients{}, errors.New("this is no age recipient: age1 and what follows, as age-keygen -y prints it")
		}
		if slices.Contains(r.names, line) {
			continue
		}
		if len(r.names) == MaxRecipients {
			return Recipients{}, fmt.Errorf("more than %d recipients", MaxRecipients)
		}
		r.names, r.keys = append(r.names, line), append(r.keys, keys...)
	}
	if len(r.names) == 0 {
		return Recipients{}, errors.New("there is no recipient in it")
	}
	// The two kinds of age do not go together: one file would be only as strong
	// as the weaker of them.
	pq := 0
	for _, name := range r.names {
		if strings.HasPrefix(name, "age1pq1") {
			pq++
		}
	}
	if pq != 0 && pq != len(r.names) {
		return Recipients{}, errors.New("post-quantum recipients (age1pq1...) and others do not go together")
	}
	return r, nil
}

// Names are the recipients in age's writing.
func (r Recipients) Names() []string { return slices.Clone(r.names) }

// Text is the content of a recipients file.
func (r Recipients) Text() string { return strings.Join(r.names, "\n") + "\n" }

// Seal closes plain, which must be shorter than MaxSealed, for every recipient.
func (r Recipients) Seal(plain []byte) ([]byte, error) {
	if len(r.keys) == 0 {
		return nil, errors.New("seal for nobody")
	}
	if len(plain) >= MaxSealed {
		return nil, fmt.Errorf("seal %d bytes: fewer than %d are possible", len(plain), MaxSealed)
	}
	var sealed bytes.Buffer
	w, err := age.Encrypt(&sealed, r.keys...)
	if err == nil {
		if _, err = w.Write(plain); err == nil {
			err = w.Close()
		}
	}
	if err != nil {
		return nil, fmt.Errorf("seal with age: %w", err)
	}
	return sealed.Bytes(), nil
}

// Identity is the private half. It prints as nothing that matters.
type Identity struct {
	ids   []age.Identity
	names []string // of the recipients that it answers to
}

// Format implements fmt.Formatter for every verb.
func (*Identity) Format(f fmt.State, _ rune) { io.WriteString(f, "[redacted]") }

// New makes an identity, in the form of age-keygen's file, which belongs in a file of
// mode 0600, and its recipient.
func New() (file secret.Bytes, recipient string, err error) {
	id, err := age.GenerateX25519Identity()
	if err != nil {
		return secret.Bytes{}, "", fmt.Errorf("make an age identity: %w", err)
	}
	recipient = id.Recipient().String()
	return secret.New([]byte("# public key: " + recipient + "\n" + id.String() + "\n")), recipient, nil
}

// ParseIdentity reads the text of an age identity file. The caller wipes text.
func ParseIdentity(text secret.Bytes) (*Identity, error) {
	if IsSealed(text.Reveal()) {
		return nil, ErrPassphrase
	}
	if text.Len() > MaxIdentity {
		return nil, fmt.Errorf("an identity file is not longer than %d bytes", MaxIdentity)
	}
	ids, err := age.ParseIdentities(bytes.NewReader(text.Reveal()))
	if err != nil {
		return nil, errors.New("this is no age identity file: a line AGE-SECRET-KEY-1 and what follows, as age-keygen makes it")
	}
	i := &Identity{ids: ids}
	for _, id := range ids {
		switch id := id.(type) {
		case *age.X25519Identity:
			i.names = append(i.names, id.Recipient().String())
		case *age.HybridIdentity:
			i.names = append(i.names, id.Recipient().String())
		}
	}
	return i, nil
}

// Join is both identities in one: what either opens it opens.
func (i *Identity) Join(other *Identity) *Identity {
	return &Identity{ids: slices.Concat(i.ids, other.ids), names: slices.Concat(i.names, other.names)}
}

// Recipients are the public halves of the identity, in age's writing.
func (i *Identity) Recipients() []string { return slices.Clone(i.names) }

// Open opens sealed into dst, which must have room for all of it, and returns
// how many bytes there are. Nothing is written to dst when the seal is broken.
// The error wraps ErrNotForUs where another identity is needed.
func (i *Identity) Open(dst, sealed []byte) (int, error) {
	if len(sealed) > MaxHeader+MaxSealed {
		return 0, fmt.Errorf("open what is sealed: longer than %d bytes", MaxHeader+MaxSealed)
	}
	header, err := age.ExtractHeader(bytes.NewReader(sealed))
	if err != nil {
		return 0, fmt.Errorf("open what is sealed: %w", err)
	}
	fileKey, err := age.DecryptHeader(header, i.ids...)
	var stranger *age.NoIdentityMatchError
	if errors.As(err, &stranger) {
		return 0, fmt.Errorf("open what is sealed: %w", ErrNotForUs)
	}
	if err != nil {
		return 0, fmt.Errorf("open what is sealed: %w", err)
	}
	defer clear(fileKey)
	return openPayload(dst, sealed[len(header):], fileKey)
}

// openPayload opens a payload of one chunk (age-encryption.org/v1, "Payload"):
// a nonce, then ChaCha20-Poly1305 under HKDF-SHA-256(file key, nonce,
// "payload") with a counter of zero and the flag of the last chunk.
func openPayload(dst, payload, fileKey []byte) (int, error) {
	const overhead = nonceSize + chacha20poly1305.Overhead
	size := len(payload) - overhead
	switch {
	case size < 0:
		return 0, errors.New("open what is sealed: it is cut short")
	case size > MaxSealed:
		return 0, fmt.Errorf("open what is sealed: more than %d bytes", MaxSealed)
	case size > len(dst):
		return 0, fmt.Errorf("open what is sealed: %d bytes, and only %d are possible", size, len(dst))
	}
	key, err := hkdf.Key(sha256.New, fileKey, payload[:nonceSize], "payload", chacha20poly1305.KeySize)
	if err != nil {
		return 0, fmt.Errorf("open what is sealed: %w", err)
	}
	defer clear(key)
	chunk, err := chacha20poly1305.New(key)
	if err != nil {
		return 0, fmt.Errorf("open what is sealed: %w", err)
	}
	nonce := make([]byte, chacha20poly1305.NonceSize)
	nonce[len(nonce)-1] = 1
	if _, err := chunk.Open(dst[:0:len(dst)], nonce, payload[nonceSize:], nil); err != nil {
		return 0, errors.New("open what is sealed: it was altered, or is damaged")
	}
	return size, nil
}
