package identity

import (
	"crypto/ecdh"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"

	"farkeep/shared/secret"
)

// ErrNotWireGuard means that a text is not a WireGuard key.
var ErrNotWireGuard = errors.New("this is not a WireGuard key (32 bytes in base64)")

// NewWireGuard makes a WireGuard key pair, as wg genkey and wg pubkey do.
func NewWireGuard() (private secret.Text, public string, err error) {
	var k [32]byte
	if _, err := rand.Read(k[:]); err != nil {
		return "", "", fmt.Errorf("make a WireGuard key: %w", err)
	}
	defer clear(k[:])
	// RFC 7748 §5. The function clamps by itself whenever the key is used; a
	// stored key is clamped too because wg genkey's are, and tools compare.
	k[0] &= 248
	k[31] = k[31]&127 | 64
	private = secret.Text(base64.StdEncoding.EncodeToString(k[:]))
	public, err = WireGuardPublic(private)
	return private, public, err
}

// WireGuardPublic computes the public key of a private one.
func WireGuardPublic(private secret.Text) (string, error) {
	raw, err := ParseWireGuard(private.Reveal())
	if err != nil {
		return "", err
	}
	defer clear(raw)
	key, err := ecdh.X25519().NewPrivateKey(raw)
	if err != nil {
		return "", fmt.Errorf("use a WireGuard key: %w", err)
	}
	return base64.StdEncoding.EncodeToString(key.PublicKey().Bytes()), nil
}

// NewPreshared makes a preshared key, as wg genpsk does: a second secret
// between two peers, which keeps recorded traffic shut even to whoever breaks
// the elliptic curve later.
func NewPreshared() (secret.Text, error) {
	var k [32]byte
	if _, err := rand.Read(k[:]); err != nil {
		return "", fmt.Errorf("make a preshared key: %w", err)
	}
	defer clear(k[:])
	return secret.Text(base64.StdEncoding.EncodeToString(k[:])), nil
}

// ParseWireGuard decodes a WireGuard key of any of the three kinds. The error
// is ErrNotWireGuard and never quotes the text, which may be a secret.
func ParseWireGuard(text string) ([]byte, error) {
	// 44 characters exactly: the decoder would skip line ends.
	raw, err := base64.StdEncoding.Strict().DecodeString(text)
	if err != nil || len(raw) != 32 || len(text) != 44 {
		clear(raw)
		return nil, ErrNotWireGuard
	}
	return raw, nil
}
