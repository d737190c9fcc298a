package luksheader

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
)

// Bounds on the JSON metadata. What the format leaves open is bounded by what a
// Raspberry Pi can carry out: an iteration count or a memory size from the disk
// must not be able to stall or starve it.
const (
	maxSlots       = 32         // LUKS2's own limit
	maxIterations  = 50_000_000 // about a minute of a Pi 3's time
	minIterations  = 1000       // cryptsetup's minimum
	maxMemoryKiB   = 4 << 20    // cryptsetup's own limit
	stripes        = 4000
	areaAlignment  = 4096
	maxSalt        = 128
	ciphersAllowed = "aes-xts-plain64 and xchacha20,aes-adiantum-plain64"
)

// keySizes are the volume key lengths that each accepted cipher has, in bytes.
var keySizes = map[string][]int{
	"aes-xts-plain64":                {32, 64},
	"xchacha20,aes-adiantum-plain64": {32},
}

var hashSizes = map[string]int{"sha1": 20, "sha256": 32, "sha512": 64}

var knownFlags = []string{"allow-discards", "same-cpu-crypt", "submit-from-crypt-cpus", "no-read-workqueue", "no-write-workqueue"}

// number is a 64-bit value, written as a decimal string (section 3.1).
type number string

func (n number) value() (int64, error) {
	v, err := strconv.ParseInt(string(n), 10, 64)
	if err != nil || v < 0 || strconv.FormatInt(v, 10) != string(n) {
		return 0, fmt.Errorf("%q is not a size", string(n))
	}
	return v, nil
}

type metadata struct {
	Keyslots map[string]keyslot         `json:"keyslots"`
	Tokens   map[string]json.RawMessage `json:"tokens"`
	Segments map[string]segment         `json:"segments"`
	Digests  map[string]digest          `json:"digests"`
	Config   struct {
		JSONSize     number          `json:"json_size"`
		KeyslotsSize number          `json:"keyslots_size"`
		Flags        []string        `json:"flags"`
		Requirements json.RawMessage `json:"requirements"`
	} `json:"config"`
}

type keyslot struct {
	Type    string `json:"type"`
	KeySize int    `json:"key_size"`
	AF      struct {
		Type    string `json:"type"`
		Stripes int    `json:"stripes"`
		Hash    string `json:"hash"`
	} `json:"af"`
	Area struct {
		Type       string `json:"type"`
		Encryption string `json:"encryption"`
		KeySize    int    `json:"key_size"`
		Offset     number `json:"offset"`
		Size       number `json:"size"`
	} `json:"area"`
	KDF struct {
		Type       string `json:"type"`
		Salt       []byte `json:"salt"`
		Hash       string `json:"hash"`
		Iterations int    `json:"iterations"`
		Time       int    `json:"time"`
		Memory     int    `json:"memory"`
		Cpus       int    `json:"cpus"`
	} `json:"kdf"`
	Priority *int `json:"priority"`
}

type segment struct {
	Type       string          `json:"type"`
	Offset     number          `json:"offset"`
	Tweak      number          `json:"iv_tweak"`
	Size       string          `json:"size"`
	Encryption string          `json:"encryption"`
	SectorSize int             `json:"sector_size"`
	Integrity  json.RawMessage `json:"integrity"`
	Flags      []string        `json:"flags"`
}

type digest struct {
	Type       string   `json:"type"`
	Keyslots   []string `json:"keyslots"`
	Segments   []string `json:"segments"`
	Hash       string   `json:"hash"`
	Iterations int      `json:"iterations"`
	Salt       []byte   `json:"salt"`
	Digest     []byte   `json:"digest"`
}

func unsupported(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrUnsupported, fmt.Sprintf(format, args...))
}

// parse judges an intact copy's content and reads the whole header area.
func parse(r io.ReaderAt, size int64, good []byte, damage string) (*Header, error) {
	h := &Header{
		UUID:     text(good[offUUID : offUUID+40]),
		Label:    text(good[offLabel : offLabel+48]),
		Sequence: binary.BigEndian.Uint64(good[offSequence:]),
		Damage:   damage,
	}
	if !uuidPattern.MatchString(h.UUID) {
		return nil, unsupported("%q is not a UUID", h.UUID)
	}
	m, err := decode(good[binarySize:])
	if err != nil {
		return nil, err
	}
	areaEnd, err := m.checkConfig(int64(len(good)))
	if err != nil {
		return nil, err
	}
	if err := m.readSegment(h, areaEnd, size); err != nil {
		return nil, err
	}
	if err := m.readDigest(h); err != nil {
		return nil, err
	}
	if err := m.readSlots(h, int64(2*len(good)), areaEnd); err != nil {
		return nil, err
	}
	h.area = make([]byte, areaEnd)
	if err := readFull(r, h.area, 0); err != nil {
		return nil, err
	}
	h.canonical = h.area
	if damage != "" {
		h.canonical = canonicalArea(h.area, good)
	}
	return h, nil
}

// decode reads the JSON area: one object, then zeros to its end (section 3).
func decode(area []byte) (*metadata, error) {
	end := bytes.IndexByte(area, 0)
	if end < 0 {
		return nil, unsupported("the JSON area has no end")
	}
	for _, b := range area[end:] {
		if b != 0 {
			return nil, unsupported("there is something behind the JSON object")
		}
	}
	m := &metadata{}
	if err := json.Unmarshal(area[:end], m); err != nil {
		return nil, unsupported("JSON: %v", err)
	}
	return m, nil
}

// checkConfig returns where the header area ends, in bytes.
func (m *metadata) checkConfig(copySize int64) (int64, error) {
	js, err := m.Config.JSONSize.value()
	if err != nil || js != copySize-binarySize {
		return 0, unsupported("json_size %q", m.Config.JSONSize)
	}
	ks, err := m.Config.KeyslotsSize.value()
	if err != nil || ks%areaAlignment != 0 || ks > MaxArea-2*copySize {
		return 0, unsupported("keyslots_size %q; at most %d is accepted", m.Config.KeyslotsSize, MaxArea-2*copySize)
	}
	if q := string(m.Config.Requirements); q != "" && q != "null" && q != "{}" && q != `{"mandatory":[]}` {
		return 0, unsupported("the disk has requirements %.80s: finish or abort its re-encryption with cryptsetup first", q)
	}
	for _, f := range m.Config.Flags {
		if !slices.Contains(knownFlags, f) {
			return 0, unsupported("flag %.40q", f)
		}
	}
	if len(m.Tokens) > maxSlots {
		return 0, unsupported("%d tokens", len(m.Tokens))
	}
	return 2*copySize + ks, nil
}

func (m *metadata) readSegment(h *Header, areaEnd, size int64) error {
	s, ok := m.Segments["0"]
	if !ok || len(m.Segments) != 1 {
		return unsupported("%d segments; one, number 0, is accepted", len(m.Segments))
	}
	if s.Type != "crypt" || s.Integrity != nil || len(s.Flags) > 0 {
		return unsupported("segment of type %.40q, with integrity or flags", s.Type)
	}
	sizes, ok := keySizes[s.Encryption]
	if !ok {
		return unsupported("cipher %.60q; %s are accepted", s.Encryption, ciphersAllowed)
	}
	if s.SectorSize < 512 || s.SectorSize > 4096 || s.SectorSize&(s.SectorSize-1) != 0 {
		return unsupported("sector size %d", s.SectorSize)
	}
	if t, err := s.Tweak.value(); err != nil || t != 0 {
		return unsupported("iv_tweak %.40q; 0 is accepted", string(s.Tweak))
	}
	offset, err := s.Offset.value()
	if err != nil || offset%areaAlignment != 0 || offset < areaEnd || offset >= size {
		return unsupported("data at %.40q of %d bytes", string(s.Offset), size)
	}
	length := (size - offset) / int64(s.SectorSize) * int64(s.SectorSize)
	if s.Size != "dynamic" {
		fixed, err := number(s.Size).value()
		if err != nil || fixed == 0 || fixed%int64(s.SectorSize) != 0 || fixed > length {
			return unsupported("data size %.40q of %d bytes", s.Size, size)
		}
		length = fixed
	}
	if length == 0 {
		return unsupported("no room for data on %d bytes", size)
	}
	h.Cipher, h.SectorSize, h.DataOffset, h.DataSize = s.Encryption, s.SectorSize, offset, length
	// The volume key's length is that of every slot; readSlots checks it.
	for _, k := range m.Keyslots {
		if slices.Contains(sizes, k.KeySize) {
			h.KeySize = k.KeySize
			break
		}
	}
	if h.KeySize == 0 {
		return unsupported("no key slot holds a key for %s", s.Encryption)
	}
	return nil
}

// readDigest finds the one digest that guards the segment.
func (m *metadata) readDigest(h *Header) error {
	if len(m.Digests) > maxSlots {
		return unsupported("%d digests", len(m.Digests))
	}
	found := 0
	for _, d := range m.Digests {
		if !slices.Contains(d.Segments, "0") {
			continue
		}
		found++
		if d.Type != "pbkdf2" || d.Iterations < minIterations || d.Iterations > maxIterations {
			return unsupported("digest of type %.40q with %d iterations", d.Type, d.Iterations)
		}
		// cryptsetup stores as many bytes as the hash has; luks.go slices by
		// this length without asking.
		if n := hashSizes[d.Hash]; n == 0 || len(d.Digest) != n || len(d.Salt) == 0 || len(d.Salt) > maxSalt {
			return unsupported("digest %.40q of %d bytes, salt of %d", d.Hash, len(d.Digest), len(d.Salt))
		}
		if !slices.Equal(d.Segments, []string{"0"}) {
			return unsupported("a digest for %d segments", len(d.Segments))
		}
		h.Digest = Digest{Hash: d.Hash, Iterations: d.Iterations, Salt: d.Salt, Sum: d.Digest}
	}
	if found != 1 {
		return unsupported("%d digests guard the data; one is accepted", found)
	}
	return nil
}

// readSlots collects the slots that open the segment; slots bound to nothing
// are checked as well, and left out.
func (m *metadata) readSlots(h *Header, areaStart, areaEnd int64) error {
	if len(m.Keyslots) > maxSlots {
		return unsupported("%d key slots", len(m.Keyslots))
	}
	for _, name := range slices.Sorted(maps.Keys(m.Keyslots)) {
		id, err := number(name).value()
		if err != nil || id >= maxSlots {
			return unsupported("key slot %.40q", name)
		}
		s, err := m.Keyslots[name].check(int(id), areaStart, areaEnd)
		if err != nil {
			return err
		}
		if !m.opensData(name) {
			continue
		}
		if k := m.Keyslots[name].KeySize; k != h.KeySize || !slices.Contains(keySizes[h.Cipher], k) {
			return unsupported("key slot %d holds %d key bytes, which %s does not take", id, k, h.Cipher)
		}
		h.Slots = append(h.Slots, s)
	}
	slices.SortFunc(h.Slots, func(a, b Slot) int { return a.ID - b.ID })
	for _, d := range m.Digests {
		for _, name := range d.Keyslots {
			if _, ok := m.Keyslots[name]; !ok {
				return unsupported("a digest names key slot %.40q, which is not there", name)
			}
		}
	}
	if len(h.Slots) == 0 {
		return unsupported("no key slot opens the data")
	}
	return nil
}

func (m *metadata) opensData(slot string) bool {
	for _, d := range m.Digests {
		if slices.Contains(d.Segments, "0") && slices.Contains(d.Keyslots, slot) {
			return true
		}
	}
	return false
}

func (k keyslot) check(id int, areaStart, areaEnd int64) (Slot, error) {
	bad := func(format string, args ...any) (Slot, error) {
		return Slot{}, unsupported("key slot %d: %s", id, fmt.Sprintf(format, args...))
	}
	if k.Type != "luks2" {
		return bad("type %.40q", k.Type)
	}
	// 512-byte sectors: luks.go and cryptsetup encrypt the area in those.
	if k.KeySize < 16 || k.KeySize > 64 || k.KeySize*stripes%512 != 0 {
		return bad("key of %d bytes", k.KeySize)
	}
	if k.AF.Type != "luks1" || k.AF.Stripes != stripes || hashSizes[k.AF.Hash] == 0 {
		return bad("splitter %.40q, hash %.40q, %d stripes", k.AF.Type, k.AF.Hash, k.AF.Stripes)
	}
	if k.Area.Type != "raw" || k.Area.Encryption != "aes-xts-plain64" || k.Area.KeySize != 32 && k.Area.KeySize != 64 {
		return bad("area %.40q in %.40q, key of %d bytes", k.Area.Type, k.Area.Encryption, k.Area.KeySize)
	}
	offset, err := k.Area.Offset.value()
	if err != nil {
		return bad("area offset: %v", err)
	}
	length, err := k.Area.Size.value()
	if err != nil {
		return bad("area size: %v", err)
	}
	if offset%areaAlignment != 0 || length%areaAlignment != 0 || offset < areaStart || length < int64(k.KeySize*stripes) || length > areaEnd || offset > areaEnd-length {
		return bad("area of %d bytes at %d does not fit between %d and %d", length, offset, areaStart, areaEnd)
	}
	kdf := k.KDF
	if len(kdf.Salt) == 0 || len(kdf.Salt) > maxSalt {
		return bad("salt of %d bytes", len(kdf.Salt))
	}
	s := Slot{
		ID: id, KDF: kdf.Type, Salt: kdf.Salt, Priority: 1,
		AFHash: k.AF.Hash, AreaOffset: offset, AreaSize: length, AreaKeySize: k.Area.KeySize,
	}
	if k.Priority != nil {
		s.Priority = *k.Priority
	}
	if s.Priority < 0 || s.Priority > 2 {
		return bad("priority %d", s.Priority)
	}
	switch kdf.Type {
	case "pbkdf2":
		if kdf.Hash != "sha256" && kdf.Hash != "sha512" || kdf.Iterations < minIterations || kdf.Iterations > maxIterations {
			return bad("pbkdf2 with %.40q, %d iterations", kdf.Hash, kdf.Iterations)
		}
		s.Hash, s.Iterations = kdf.Hash, kdf.Iterations
	case "argon2i", "argon2id":
		if kdf.Time < 1 || kdf.Time > 1_000_000 || kdf.Memory < 8 || kdf.Memory > maxMemoryKiB || kdf.Cpus < 1 || kdf.Cpus > 16 {
			return bad("%s with %d passes, %d KiB, %d lanes", kdf.Type, kdf.Time, kdf.Memory, kdf.Cpus)
		}
		s.Time, s.MemoryKiB, s.Lanes = kdf.Time, kdf.Memory, kdf.Cpus
	default:
		return bad("key derivation %.40q", kdf.Type)
	}
	return s, nil
}
