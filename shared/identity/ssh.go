// Package identity makes and reads the keys by which Farkeep's machines know
// each other: Ed25519 SSH identities in the form that OpenSSH writes, and
// WireGuard keys in the form that wg(8) writes.
//
// Private keys are [secret.Text]: they print as "[redacted]". Nothing here
// decides who may do what, and nothing is written to disk.
package identity

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"farkeep/shared/secret"

	"golang.org/x/crypto/ssh"
)

// MaxFile bounds the file of a private key, in bytes. An Ed25519 key takes about 400.
const MaxFile = 16 << 10

var (
	// ErrSealed means that the private key needs its passphrase.
	ErrSealed = errors.New("the private key is sealed with a passphrase")
	// ErrPassphrase means that the passphrase does not open the private key.
	ErrPassphrase = errors.New("wrong passphrase")
	// ErrNotEd25519 means that a key is of another kind. One kind is enough,
	// and it is the one that every OpenSSH since 6.5 has and nobody has to size.
	ErrNotEd25519 = errors.New("only Ed25519 keys are accepted: make one with ssh-keygen -t ed25519")
)

// New makes an SSH identity: the private key as an OpenSSH private key file,
// and the public one as a line of an authorized_keys file, without a newline.
// The comment goes into both.
func New(comment string) (private secret.Text, public string, err error) {
	return newKey(comment, func(key ed25519.PrivateKey) (*pem.Block, error) {
		return ssh.MarshalPrivateKey(key, comment)
	})
}

// NewSealed is New with the private key encrypted under passphrase, so that
// ssh, ssh-add and ssh-keygen ask for it (aes256-ctr, bcrypt KDF).
func NewSealed(comment string, passphrase secret.Bytes) (private secret.Text, public string, err error) {
	if passphrase.Len() == 0 {
		return "", "", errors.New("seal a private key: the passphrase is empty")
	}
	return newKey(comment, func(key ed25519.PrivateKey) (*pem.Block, error) {
		return ssh.MarshalPrivateKeyWithPassphrase(key, comment, passphrase.Reveal())
	})
}

func newKey(comment string, marshal func(ed25519.PrivateKey) (*pem.Block, error)) (secret.Text, string, error) {
	if strings.ContainsAny(comment, "\r\n") {
		return "", "", fmt.Errorf("make an SSH identity: comment %q has more than one line", comment)
	}
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return "", "", fmt.Errorf("make an SSH identity: %w", err)
	}
	defer clear(key)
	block, err := marshal(key)
	if err != nil {
		return "", "", fmt.Errorf("make an SSH identity: %w", err)
	}
	sshPub, err := ssh.NewPublicKey(pub)
	if err != nil {
		return "", "", fmt.Errorf("make an SSH identity: %w", err)
	}
	return secret.Text(pem.EncodeToMemory(block)), Line(sshPub, comment), nil
}

// Line writes a public key as a line of an authorized_keys file, without a newline.
func Line(key ssh.PublicKey, comment string) string {
	line := strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key)))
	if comment != "" {
		line += " " + comment
	}
	return line
}

// Signer parses a private key that has no passphrase. The error wraps ErrSealed
// or ErrNotEd25519 where these are the reason.
func Signer(private secret.Text) (ssh.Signer, error) {
	s, err := ssh.ParsePrivateKey([]byte(private.Reveal()))
	var missing *ssh.PassphraseMissingError
	switch {
	case errors.As(err, &missing):
		return nil, ErrSealed
	case err != nil:
		return nil, fmt.Errorf("this is not an OpenSSH private key: %w", err)
	}
	return onlyEd25519(s)
}

// Unseal parses a private key with its passphrase. The error wraps
// ErrPassphrase when that is wrong.
func Unseal(private secret.Text, passphrase secret.Bytes) (ssh.Signer, error) {
	s, err := ssh.ParsePrivateKeyWithPassphrase([]byte(private.Reveal()), passphrase.Reveal())
	switch {
	case err != nil && strings.Contains(err.Error(), "decryption password incorrect"):
		return nil, ErrPassphrase
	case err != nil:
		return nil, fmt.Errorf("this is not a sealed OpenSSH private key: %w", err)
	}
	return onlyEd25519(s)
}

func onlyEd25519(s ssh.Signer) (ssh.Signer, error) {
	if s.PublicKey().Type() != ssh.KeyAlgoED25519 {
		return nil, fmt.Errorf("%s key: %w", s.PublicKey().Type(), ErrNotEd25519)
	}
	return s, nil
}

// ReadPrivate reads the file of a private key and refuses one that others than
// its owner may read, as ssh does.
func ReadPrivate(path string) (secret.Text, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", fmt.Errorf("read identity %s: %w", path, err)
	}
	if !info.Mode().IsRegular() {
		return "", fmt.Errorf("read identity %s: not a regular file", path)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return "", fmt.Errorf("read identity %s: mode %04o lets others read it: chmod 600 %s", path, info.Mode().Perm(), path)
	}
	text, err := io.ReadAll(io.LimitReader(f, MaxFile+1))
	if err != nil {
		return "", fmt.Errorf("read identity %s: %w", path, err)
	}
	if len(text) > MaxFile {
		return "", fmt.Errorf("read identity %s: longer than %d bytes, which no private key is", path, MaxFile)
	}
	return secret.Text(text), nil
}

// ReadSigner is ReadPrivate and Signer together.
func ReadSigner(path string) (ssh.Signer, error) {
	private, err := ReadPrivate(path)
	if err != nil {
		return nil, err
	}
	s, err := Signer(private)
	if err != nil {
		return nil, fmt.Errorf("read identity %s: %w", path, err)
	}
	return s, nil
}

// ParsePublic parses one public key in authorized_keys form: Ed25519, on a
// token (sk-ssh-ed25519) or not, one line, no options.
func ParsePublic(line string) (ssh.PublicKey, error) {
	key, _, options, rest, err := ssh.ParseAuthorizedKey([]byte(line))
	if err != nil || len(options) > 0 || len(bytes.TrimSpace(rest)) > 0 {
		return nil, errors.New("this is not an SSH public key (ssh-ed25519 AAAA...)")
	}
	if t := key.Type(); t != ssh.KeyAlgoED25519 && t != ssh.KeyAlgoSKED25519 {
		return nil, fmt.Errorf("%s key: %w", t, ErrNotEd25519)
	}
	return key, nil
}

// SamePublic reports whether two lines hold the same public key, whatever
// their comments say. It is false when either does not parse.
func SamePublic(a, b string) bool {
	ka, errA := ParsePublic(a)
	kb, errB := ParsePublic(b)
	return errA == nil && errB == nil && bytes.Equal(ka.Marshal(), kb.Marshal())
}

// Fingerprint is how a public key is shown to people: "SHA256:...", as ssh
// and ssh-keygen -l print it.
func Fingerprint(key ssh.PublicKey) string { return ssh.FingerprintSHA256(key) }
