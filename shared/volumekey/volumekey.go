// Package volumekey opens a key slot of a LUKS2 header: what cryptsetup does
// before it hands the volume key to the kernel, for those who have no kernel to
// hand it to, or no disk but a copy of its header.
//
// The header must have been judged by package luksheader, which bounds what its
// slots may cost.
package volumekey

import (
	"bytes"
	"crypto/aes"
	"crypto/pbkdf2"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"

	"farkeep/shared/luksheader"
	"farkeep/shared/secret"

	"golang.org/x/crypto/argon2"
	"golang.org/x/crypto/xts"
)

// ErrWrongKey means that a key opens none of a volume's slots.
var ErrWrongKey = errors.New("the key opens none of the key slots")

var hashes = map[string]func() hash.Hash{"sha1": sha1.New, "sha256": sha256.New, "sha512": sha512.New}

// Open recovers the volume key from the header's slots with the key of one of
// them: "LUKS2 On-Disk Format Specification", section 4; the splitter is
// LUKS1's ("LUKS1 On-Disk Format Specification", section 2.4).
// The caller wipes it. The error wraps ErrWrongKey.
//
// The appliance has luks.go for this, which keeps the volume key to itself.
func Open(h *luksheader.Header, key secret.Bytes) (secret.Bytes, error) {
	for _, s := range h.Slots {
		candidate, err := unlockSlot(h, s, key)
		if err != nil {
			return secret.Bytes{}, fmt.Errorf("key slot %d: %w", s.ID, err)
		}
		sum, err := pbkdf2.Key(hashes[h.Digest.Hash], string(candidate.Reveal()), h.Digest.Salt, h.Digest.Iterations, len(h.Digest.Sum))
		if err != nil {
			return secret.Bytes{}, fmt.Errorf("key slot %d: %w", s.ID, err)
		}
		if bytes.Equal(sum, h.Digest.Sum) {
			return candidate, nil
		}
		candidate.Wipe()
	}
	return secret.Bytes{}, ErrWrongKey
}

const stripes = 4000

func unlockSlot(h *luksheader.Header, s luksheader.Slot, key secret.Bytes) (secret.Bytes, error) {
	var areaKey []byte
	switch s.KDF {
	case "pbkdf2":
		var err error
		if areaKey, err = pbkdf2.Key(hashes[s.Hash], string(key.Reveal()), s.Salt, s.Iterations, s.AreaKeySize); err != nil {
			return secret.Bytes{}, err
		}
	case "argon2i":
		areaKey = argon2.Key(key.Reveal(), s.Salt, uint32(s.Time), uint32(s.MemoryKiB), uint8(s.Lanes), uint32(s.AreaKeySize))
	default:
		areaKey = argon2.IDKey(key.Reveal(), s.Salt, uint32(s.Time), uint32(s.MemoryKiB), uint8(s.Lanes), uint32(s.AreaKeySize))
	}
	defer clear(areaKey)
	c, err := xts.NewCipher(aes.NewCipher, areaKey)
	if err != nil {
		return secret.Bytes{}, err
	}
	// The area has sectors of 512 bytes, numbered from its own beginning.
	n := h.KeySize * stripes
	split := bytes.Clone(h.Canonical()[s.AreaOffset : s.AreaOffset+int64(n)])
	defer clear(split)
	for i := 0; i < n; i += 512 {
		c.Decrypt(split[i:i+512], split[i:i+512], uint64(i/512))
	}
	return merge(split, h.KeySize, hashes[s.AFHash]()), nil
}

// merge undoes the anti-forensic split: each stripe is XORed in, and all but
// the last diffused.
func merge(split []byte, size int, h hash.Hash) secret.Bytes {
	out := make([]byte, size)
	for i := range stripes {
		for j := range out {
			out[j] ^= split[i*size+j]
		}
		if i < stripes-1 {
			diffuse(out, h)
		}
	}
	return secret.New(out)
}

// diffuse replaces each piece of b, as long as a hash, by the hash of its number
// and itself.
func diffuse(b []byte, h hash.Hash) {
	var number [4]byte
	for i := 0; i*h.Size() < len(b); i++ {
		piece := b[i*h.Size() : min((i+1)*h.Size(), len(b))]
		h.Reset()
		binary.BigEndian.PutUint32(number[:], uint32(i))
		h.Write(number[:])
		h.Write(piece)
		copy(piece, h.Sum(nil))
	}
}
