// Package luksheader reads and judges the header of a LUKS2 disk before any
// other code acts on it.
//
// Whoever finds or returns a disk may have written its header, so it is hostile
// input: [Check] accepts one only when every size, count, offset and name in it
// lies within what Farkeep can open, and hands out plain values that need no
// further checks. It reads at most [MaxArea] bytes and opens no key slot.
//
// LUKS2 keeps two copies of its metadata. One intact copy is enough: Check
// falls back to the other, says so in [Header.Damage], and never writes to the
// disk. [Header.Canonical] is a copy of the whole header area, in memory, in
// which both copies are good; a reader that knows only the primary copy, as
// luks.go does, can be given that.
//
// Format: "LUKS2 On-Disk Format Specification", version 1.1.2, section numbers
// of which are cited here.
package luksheader

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"
)

// Limits of the format (section 2) and our own.
const (
	binarySize = 4096     // the binary part of one copy; JSON fills the rest
	minCopy    = 16 << 10 // smallest size of one copy
	maxCopy    = 4 << 20
	// MaxArea bounds both copies and the key slots together, in bytes:
	// cryptsetup's own limit for key slots (128 MiB) is far above its default
	// (16 MiB), and the appliance holds the area in memory.
	MaxArea = 32 << 20
)

// Offsets in the binary part of a copy (section 2.1).
const (
	offVersion   = 6
	offSize      = 8
	offSequence  = 16
	offLabel     = 24
	offAlgorithm = 72
	offUUID      = 168
	offOffset    = 256
	offChecksum  = 448
	lenChecksum  = 64
)

var (
	magicPrimary   = []byte("LUKS\xba\xbe")
	magicSecondary = []byte("SKUL\xba\xbe")
	uuidPattern    = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)
)

var (
	// ErrNotLUKS means that there is no LUKS header at all.
	ErrNotLUKS = errors.New("no LUKS header")
	// ErrDamaged means that neither copy of the header is intact.
	ErrDamaged = errors.New("LUKS header damaged")
	// ErrUnsupported means that the header is intact, but describes a disk
	// that Farkeep does not open: LUKS1, another cipher, a pending re-encryption.
	ErrUnsupported = errors.New("LUKS header not supported")
)

// Header is a checked LUKS2 header.
type Header struct {
	UUID     string
	Label    string
	Sequence uint64 // grows with every change of the metadata

	Cipher     string // "aes-xts-plain64" or "xchacha20,aes-adiantum-plain64"
	SectorSize int    // encryption sector, bytes
	DataOffset int64  // where the encrypted data begins, bytes
	DataSize   int64  // its length, bytes
	KeySize    int    // length of the volume key, bytes

	Slots  []Slot // usable key slots, by number
	Digest Digest // recognises the volume key

	// Damage says what is wrong with the copy of the metadata that was not
	// used; "" when both are good and alike. Such a disk opens, but its owner
	// should run "cryptsetup repair" before the other copy goes too.
	Damage string

	area      []byte // as on the disk
	canonical []byte
}

// Slot is one key slot that opens the data.
type Slot struct {
	ID int
	// KDF is "pbkdf2", "argon2i" or "argon2id".
	KDF        string
	Hash       string // pbkdf2: "sha256" or "sha512"
	Iterations int    // pbkdf2
	Time       int    // argon2: passes
	MemoryKiB  int    // argon2
	Lanes      int    // argon2
	Salt       []byte

	Priority int // 0 ignore, 1 normal, 2 first

	AFHash      string // hash of the anti-forensic splitter, always 4000 stripes
	AreaOffset  int64
	AreaSize    int64
	AreaKeySize int // aes-xts-plain64 key of the area, bytes
}

// Digest is the salted hash by which a volume key is recognised.
type Digest struct {
	Hash       string
	Iterations int
	Salt       []byte
	Sum        []byte
}

// Identify returns the UUID that a LUKS header, intact or not, claims to have:
// of the primary copy, or of the first secondary copy found where the primary's
// magic is gone. It is cheap, trusts nothing else, and serves to find a disk
// among others. ErrNotLUKS when there is none.
func Identify(r io.ReaderAt) (string, error) {
	head := make([]byte, 512)
	if err := readFull(r, head, 0); err != nil {
		return "", err
	}
	if bytes.Equal(head[:6], magicPrimary) {
		if uuid := text(head[offUUID : offUUID+40]); uuidPattern.MatchString(uuid) {
			return uuid, nil
		}
	}
	for at := int64(minCopy); at <= maxCopy; at *= 2 {
		if err := readFull(r, head, at); err != nil {
			break
		}
		if !bytes.Equal(head[:6], magicSecondary) {
			continue
		}
		if uuid := text(head[offUUID : offUUID+40]); uuidPattern.MatchString(uuid) {
			return uuid, nil
		}
	}
	return "", ErrNotLUKS
}

// Check reads the header at the start of r, a disk of size bytes, and judges
// it. Errors wrap ErrNotLUKS, ErrDamaged or ErrUnsupported, or come from r.
func Check(r io.ReaderAt, size int64) (*Header, error) {
	first, firstErr := readCopy(r, 0, size, magicPrimary)
	second, secondErr := readSecondary(r, size, first)
	good, damage := first, ""
	switch {
	case first == nil && second == nil:
		if errors.Is(firstErr, ErrUnsupported) || errors.Is(firstErr, ErrNotLUKS) && errors.Is(secondErr, ErrNotLUKS) {
			return nil, firstErr
		}
		return nil, fmt.Errorf("%w: primary copy: %w; secondary copy: %w", ErrDamaged, firstErr, secondErr)
	case first == nil:
		good, damage = second, fmt.Sprintf("primary copy: %v", firstErr)
	case second == nil:
		damage = fmt.Sprintf("secondary copy: %v", secondErr)
	case sequence(second) > sequence(first):
		good, damage = second, "primary copy is older than the secondary"
	case sequence(second) < sequence(first):
		damage = "secondary copy is older than the primary"
	case !sameContent(first, second):
		damage = "the two copies differ"
	}
	return parse(r, size, good, damage)
}

// readSecondary finds the secondary copy: behind the primary, or, where that is
// damaged and its word for its own size worth nothing, at one of the nine
// places that the format allows (section 2.2).
func readSecondary(r io.ReaderAt, size int64, primary []byte) ([]byte, error) {
	if primary != nil {
		return readCopy(r, int64(len(primary)), size, magicSecondary)
	}
	worst := ErrNotLUKS
	for at := int64(minCopy); at <= maxCopy; at *= 2 {
		c, err := readCopy(r, at, size, magicSecondary)
		switch {
		case err == nil && int64(len(c)) == at:
			return c, nil
		case err == nil:
			worst = fmt.Errorf("size %d at offset %d", len(c), at)
		case !errors.Is(err, ErrNotLUKS):
			worst = err
		}
	}
	return nil, worst
}

// readCopy reads one copy of the metadata and checks what protects it against
// accident: magic, version, size, place, checksum. Its errors, those of a bad
// sector included, condemn this copy only.
func readCopy(r io.ReaderAt, at, size int64, magic []byte) ([]byte, error) {
	if at+minCopy > size {
		return nil, ErrNotLUKS
	}
	head := make([]byte, binarySize)
	if err := readFull(r, head, at); err != nil {
		return nil, err
	}
	if !bytes.Equal(head[:6], magic) {
		return nil, ErrNotLUKS
	}
	if v := binary.BigEndian.Uint16(head[offVersion:]); v == 1 {
		return nil, fmt.Errorf("%w: this is LUKS1; only LUKS2 is opened", ErrUnsupported)
	} else if v != 2 {
		return nil, fmt.Errorf("version %d", v)
	}
	n := binary.BigEndian.Uint64(head[offSize:])
	if n < minCopy || n > maxCopy || n&(n-1) != 0 {
		return nil, fmt.Errorf("size %d", n)
	}
	if at+int64(n) > size {
		return nil, fmt.Errorf("size %d reaches past the disk's end", n)
	}
	if place := binary.BigEndian.Uint64(head[offOffset:]); place != uint64(at) {
		return nil, fmt.Errorf("written for offset %d", place)
	}
	if alg := text(head[offAlgorithm : offAlgorithm+32]); alg != "sha256" {
		return nil, fmt.Errorf("checksum algorithm %q", alg)
	}
	copied := make([]byte, n)
	if err := readFull(r, copied, at); err != nil {
		return nil, err
	}
	if !bytes.Equal(checksum(copied), copied[offChecksum:offChecksum+lenChecksum]) {
		return nil, errors.New("checksum does not match")
	}
	return copied, nil
}

// Seal computes and stores the checksum of one copy of the metadata, as
// whoever changed it must.
func Seal(metadata []byte) {
	copy(metadata[offChecksum:offChecksum+lenChecksum], checksum(metadata))
}

// checksum is what the checksum field must hold: SHA-256 over the copy with
// that field zeroed, padded with zeros (section 2.1).
func checksum(metadata []byte) []byte {
	h := sha256.New()
	h.Write(metadata[:offChecksum])
	h.Write(make([]byte, lenChecksum))
	h.Write(metadata[offChecksum+lenChecksum:])
	return append(h.Sum(nil), make([]byte, lenChecksum-sha256.Size)...)
}

func sequence(metadata []byte) uint64 {
	return binary.BigEndian.Uint64(metadata[offSequence:])
}

// sameContent compares what both copies must share: identity and JSON, not
// magic, place, salt and checksum.
func sameContent(a, b []byte) bool {
	return len(a) == len(b) &&
		bytes.Equal(a[offLabel:offAlgorithm+32], b[offLabel:offAlgorithm+32]) &&
		bytes.Equal(a[offUUID:offOffset], b[offUUID:offOffset]) &&
		bytes.Equal(a[binarySize:], b[binarySize:])
}

// Fingerprint is the hexadecimal SHA-256 of the header area as it lies on the
// disk: what "sha256sum" says of a file made by "cryptsetup luksHeaderBackup".
func (h *Header) Fingerprint() string {
	sum := sha256.Sum256(h.area)
	return hex.EncodeToString(sum[:])
}

// Canonical returns the header area, both copies and the key slots, with both
// copies good: as it lies on the disk if Damage is "". The caller must not
// change it. It holds no secret but what any LUKS header holds.
func (h *Header) Canonical() []byte { return h.canonical }

// canonicalArea puts the good copy into both places of area's duplicate.
func canonicalArea(area, good []byte) []byte {
	out := bytes.Clone(area)
	n := len(good)
	for i, magic := range [][]byte{magicPrimary, magicSecondary} {
		c := out[i*n : (i+1)*n]
		copy(c, good)
		copy(c, magic)
		binary.BigEndian.PutUint64(c[offOffset:], uint64(i*n))
		Seal(c)
	}
	return out
}

// text reads a NUL-padded field; a byte that is no printable ASCII voids it.
func text(field []byte) string {
	s, _, _ := strings.Cut(string(field), "\x00")
	for _, c := range []byte(s) {
		if c < ' ' || c > '~' {
			return ""
		}
	}
	return s
}

func readFull(r io.ReaderAt, b []byte, at int64) error {
	n, err := r.ReadAt(b, at)
	if n == len(b) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: the disk ends within it", ErrNotLUKS)
	}
	return fmt.Errorf("read LUKS header at byte %d: %w", at, err)
}
