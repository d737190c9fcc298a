package luksheader

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

const diskSize = 20 << 20

// format makes a disk with the real cryptsetup and returns its path.
func format(t testing.TB, args ...string) string {
	t.Helper()
	dir := t.TempDir()
	key := filepath.Join(dir, "key")
	path := filepath.Join(dir, "disk")
	if err := os.WriteFile(key, bytes.Repeat([]byte("k"), 64), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, diskSize); err != nil {
		t.Fatal(err)
	}
	common := []string{"luksFormat", "-q", "--type", "luks2", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", key}
	cryptsetup(t, append(append(common, args...), path)...)
	return path
}

func cryptsetup(t testing.TB, args ...string) {
	t.Helper()
	if out, err := exec.Command("cryptsetup", args...).CombinedOutput(); err != nil {
		t.Fatalf("cryptsetup %s (Debian package cryptsetup-bin): %v\n%s", strings.Join(args, " "), err, out)
	}
}

// describe leaves out the area, which fills screens.
func describe(h *Header) string {
	if h == nil {
		return "nothing"
	}
	short := *h
	short.area, short.canonical = nil, nil
	return fmt.Sprintf("%+v", short)
}

// disk is a disk of diskSize bytes of which all but the beginning is zero.
type disk []byte

func (d disk) ReadAt(p []byte, off int64) (int, error) {
	clear(p)
	if off < int64(len(d)) {
		copy(p, d[off:])
	}
	if rest := diskSize - off; rest < int64(len(p)) {
		return int(max(rest, 0)), io.EOF
	}
	return len(p), nil
}

func read(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestCheckAcceptsCryptsetup(t *testing.T) {
	for _, tc := range []struct {
		name string
		args []string
		want Header
	}{
		{"defaults", []string{"--label", "farkeep", "--sector-size", "512"}, Header{Cipher: "aes-xts-plain64", KeySize: 64, SectorSize: 512, DataOffset: 16 << 20, DataSize: 4 << 20, Label: "farkeep"}},
		{"ours", []string{"--key-size", "256", "--sector-size", "4096", "--luks2-keyslots-size", "2m", "--offset", "32768"}, Header{Cipher: "aes-xts-plain64", KeySize: 32, SectorSize: 4096, DataOffset: 16 << 20, DataSize: 4 << 20}},
		{"large metadata", []string{"--luks2-metadata-size", "64k", "--luks2-keyslots-size", "4m", "--sector-size", "512"}, Header{Cipher: "aes-xts-plain64", KeySize: 64, SectorSize: 512, DataOffset: 5 << 20, DataSize: 15 << 20}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := format(t, tc.args...)
			data := read(t, path)
			h, err := Check(bytes.NewReader(data), diskSize)
			if err != nil {
				t.Fatal(err)
			}
			if h.Cipher != tc.want.Cipher || h.KeySize != tc.want.KeySize || h.SectorSize != tc.want.SectorSize || h.DataSize != diskSize-h.DataOffset || h.Label != tc.want.Label || h.Damage != "" {
				t.Errorf("got %s", describe(h))
			}
			if len(h.Slots) != 1 || h.Slots[0].KDF != "pbkdf2" || h.Slots[0].Iterations != 1000 {
				t.Errorf("slots %+v", h.Slots)
			}
			backup := filepath.Join(t.TempDir(), "header")
			cryptsetup(t, "luksHeaderBackup", "--header-backup-file", backup, path)
			if sum := sha256.Sum256(read(t, backup)); hex.EncodeToString(sum[:]) != h.Fingerprint() {
				t.Errorf("fingerprint is not the SHA-256 of luksHeaderBackup's file")
			}
			uuid, err := exec.Command("cryptsetup", "luksUUID", path).Output()
			if err != nil || strings.TrimSpace(string(uuid)) != h.UUID {
				t.Errorf("UUID %q, cryptsetup says %q, %v", h.UUID, uuid, err)
			}
			if id, err := Identify(bytes.NewReader(data)); id != h.UUID || err != nil {
				t.Errorf("Identify: %q, %v", id, err)
			}
		})
	}
}

// TestDamage flips bits in every part of both copies. One copy must always do;
// two damaged ones must always be refused.
func TestDamage(t *testing.T) {
	intact := read(t, format(t, "--luks2-keyslots-size", "2m"))
	good, err := Check(bytes.NewReader(intact), diskSize)
	if err != nil {
		t.Fatal(err)
	}
	places := map[string]int{
		"magic": 0, "version": 7, "size": 13, "sequence": 23, "label": 30, "algorithm": 75,
		"salt": 110, "uuid": 170, "offset": 262, "padding": 300, "checksum": 450, "behind checksum": 600,
		"json": 4096, "json middle": 4300, "json end": 16383,
	}
	flip := func(at ...int) []byte {
		b := bytes.Clone(intact)
		for _, a := range at {
			b[a] ^= 0x10
		}
		return b
	}
	for name, at := range places {
		for copyName, offset := range map[string]int{"primary": 0, "secondary": 16384} {
			t.Run(copyName+" "+name, func(t *testing.T) {
				h, err := Check(bytes.NewReader(flip(offset+at)), diskSize)
				if err != nil {
					t.Fatal(err)
				}
				if !strings.HasPrefix(h.Damage, copyName) {
					t.Errorf("damage %q does not name the %s copy", h.Damage, copyName)
				}
				if h.UUID != good.UUID || !bytes.Equal(h.Digest.Sum, good.Digest.Sum) {
					t.Error("read something else from the other copy")
				}
				again, err := Check(disk(h.Canonical()), diskSize)
				if err != nil || again.Damage != "" || again.UUID != good.UUID {
					t.Errorf("canonical area: %v, %s", err, describe(again))
				}
			})
		}
		t.Run("both "+name, func(t *testing.T) {
			h, err := Check(bytes.NewReader(flip(at, 16384+at)), diskSize)
			if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrNotLUKS) {
				t.Fatalf("got %s, %v", describe(h), err)
			}
		})
	}
	t.Run("uuid survives a lost primary", func(t *testing.T) {
		b := bytes.Clone(intact)
		clear(b[:16384])
		if id, err := Identify(bytes.NewReader(b)); id != good.UUID || err != nil {
			t.Errorf("%q, %v", id, err)
		}
	})
}

// badSector fails every read that touches one sector, as a failing disk does.
type badSector struct {
	io.ReaderAt
	at int64
}

func (b badSector) ReadAt(p []byte, off int64) (int, error) {
	if off <= b.at && b.at < off+int64(len(p)) {
		return 0, syscall.EIO
	}
	return b.ReaderAt.ReadAt(p, off)
}

func TestBadSectors(t *testing.T) {
	intact := read(t, format(t, "--luks2-keyslots-size", "2m"))
	for _, at := range []int64{0, 8192, 16384, 20000} {
		_, err := Check(badSector{bytes.NewReader(intact), at}, diskSize)
		if !errors.Is(err, syscall.EIO) {
			t.Errorf("bad sector at %d: %v; the area's fingerprint cannot be known", at, err)
		}
	}
}

// header builds a sealed pair of copies around json, for what cryptsetup would
// never write.
func header(json string) []byte {
	b := make([]byte, 2*minCopy)
	for i, magic := range [][]byte{magicPrimary, magicSecondary} {
		c := b[i*minCopy : (i+1)*minCopy]
		copy(c, magic)
		binary.BigEndian.PutUint16(c[offVersion:], 2)
		binary.BigEndian.PutUint64(c[offSize:], minCopy)
		binary.BigEndian.PutUint64(c[offSequence:], 3)
		copy(c[offAlgorithm:], "sha256")
		copy(c[offUUID:], "b64e6fbb-11a0-42e1-b7f1-32adde77f805")
		binary.BigEndian.PutUint64(c[offOffset:], uint64(i*minCopy))
		copy(c[binarySize:], json)
		Seal(c)
	}
	return b
}

const sample = `{"keyslots":{"0":{"type":"luks2","key_size":32,"af":{"type":"luks1","stripes":4000,"hash":"sha256"},` +
	`"area":{"type":"raw","offset":"32768","size":"131072","encryption":"aes-xts-plain64","key_size":32},` +
	`"kdf":{"type":"pbkdf2","hash":"sha256","iterations":1000,"salt":"Qt+ZDHuoGuU041O5l9VuN4pDxRrDZ6lddV2wSwsXACY="}}},` +
	`"tokens":{},"segments":{"0":{"type":"crypt","offset":"16777216","size":"dynamic","iv_tweak":"0","encryption":"xchacha20,aes-adiantum-plain64","sector_size":4096}},` +
	`"digests":{"0":{"type":"pbkdf2","keyslots":["0"],"segments":["0"],"hash":"sha256","iterations":1000,` +
	`"salt":"3FZoVxg7XbFkFC2xX9fvGD6UpPOz7M+PDI7AnJZPioM=","digest":"kRQqVctiZOrZZ3idV5yfNcYqLghi44SmKqEH5rWhyEo="}},` +
	`"config":{"json_size":"12288","keyslots_size":"2097152"}}`

func TestMetadata(t *testing.T) {
	if h, err := Check(disk(header(sample)), diskSize); err != nil || h.Cipher != "xchacha20,aes-adiantum-plain64" || h.Damage != "" {
		t.Fatalf("the sample itself: %s, %v", describe(h), err)
	}
	long := strings.Repeat("9", 300)
	var many []string
	for i := range 40 {
		many = append(many, fmt.Sprintf(`"%d":{}`, i))
	}
	for _, tc := range []struct{ name, old, new string }{
		{"no JSON", sample, ""},
		{"not JSON", sample, "["},
		{"null", sample, "null"},
		{"truncated", `}}}`, ""},
		{"no end", sample, sample + strings.Repeat(" ", minCopy-binarySize-len(sample))},
		{"something behind", sample, sample + "\x00x"},
		{"two objects", sample, sample + "{}"},
		{"cipher", "xchacha20,aes-adiantum-plain64", "cipher_null-ecb"},
		{"cipher xts with odd key", `"encryption":"xchacha20,aes-adiantum-plain64"`, `"encryption":"aes-cbc-plain64"`},
		{"sector size 0", `"sector_size":4096`, `"sector_size":0`},
		{"sector size odd", `"sector_size":4096`, `"sector_size":1536`},
		{"sector size huge", `"sector_size":4096`, `"sector_size":65536`},
		{"integrity", `"iv_tweak":"0"`, `"iv_tweak":"0","integrity":{"type":"hmac(sha256)"}`},
		{"tweak", `"iv_tweak":"0"`, `"iv_tweak":"8"`},
		{"data in the header", `"16777216"`, `"4096"`},
		{"data past the end", `"16777216"`, `"1099511627776"`},
		{"data offset negative", `"16777216"`, `"-4096"`},
		{"data offset long", `"16777216"`, `"` + long + `"`},
		{"data offset unaligned", `"16777216"`, `"16777217"`},
		{"data size lies", `"dynamic"`, `"1099511627776"`},
		{"data size 0", `"dynamic"`, `"0"`},
		{"data size not a number", `"dynamic"`, `"1e6"`},
		{"second segment", `"segments":{`, `"segments":{"1":{"type":"linear"},`},
		{"no segment", `"segments":{"0"`, `"segments":{"7"`},
		{"segment type", `"type":"crypt"`, `"type":"linear"`},
		{"key size 0", `"key_size":32,"af"`, `"key_size":0,"af"`},
		{"key size huge", `"key_size":32,"af"`, `"key_size":1073741824,"af"`},
		{"key size negative", `"key_size":32,"af"`, `"key_size":-32,"af"`},
		{"key size other", `"key_size":32,"af"`, `"key_size":64,"af"`},
		{"stripes", `"stripes":4000`, `"stripes":1`},
		{"af hash", `"stripes":4000,"hash":"sha256"`, `"stripes":4000,"hash":"md5"`},
		{"area in the metadata", `"offset":"32768"`, `"offset":"0"`},
		{"area past the slots", `"offset":"32768"`, `"offset":"2097152"`},
		{"area overflow", `"size":"131072"`, `"size":"9223372036854771712"`},
		{"area too small", `"size":"131072"`, `"size":"4096"`},
		{"area cipher", `"size":"131072","encryption":"aes-xts-plain64"`, `"size":"131072","encryption":"aes-ecb"`},
		{"area key", `"encryption":"aes-xts-plain64","key_size":32`, `"encryption":"aes-xts-plain64","key_size":33`},
		{"kdf", `"kdf":{"type":"pbkdf2"`, `"kdf":{"type":"scrypt"`},
		{"kdf hash", `"kdf":{"type":"pbkdf2","hash":"sha256"`, `"kdf":{"type":"pbkdf2","hash":"whirlpool"`},
		{"iterations few", `"hash":"sha256","iterations":1000,"salt":"Qt`, `"hash":"sha256","iterations":1,"salt":"Qt`},
		{"iterations huge", `"hash":"sha256","iterations":1000,"salt":"Qt`, `"hash":"sha256","iterations":4294967295,"salt":"Qt`},
		{"argon2 memory", `"kdf":{"type":"pbkdf2","hash":"sha256","iterations":1000`, `"kdf":{"type":"argon2id","time":4,"memory":4294967295,"cpus":4`},
		{"argon2 no lanes", `"kdf":{"type":"pbkdf2","hash":"sha256","iterations":1000`, `"kdf":{"type":"argon2id","time":4,"memory":65536,"cpus":0`},
		{"salt not base64", `"salt":"Qt+`, `"salt":"*t+`},
		{"salt empty", `"salt":"Qt+ZDHuoGuU041O5l9VuN4pDxRrDZ6lddV2wSwsXACY="`, `"salt":""`},
		{"digest longer than its hash", `"digest":"kRQq`, `"digest":"kRQqkRQqkRQqkRQq`},
		{"digest empty", `"digest":"kRQqVctiZOrZZ3idV5yfNcYqLghi44SmKqEH5rWhyEo="`, `"digest":""`},
		{"digest hash", `"segments":["0"],"hash":"sha256"`, `"segments":["0"],"hash":"sha3-512"`},
		{"digest iterations", `"hash":"sha256","iterations":1000,"salt":"3F`, `"hash":"sha256","iterations":2147483647,"salt":"3F`},
		{"digest of no segment", `"segments":["0"]`, `"segments":[]`},
		{"digest of two segments", `"segments":["0"]`, `"segments":["0","1"]`},
		{"digest names a lost slot", `"keyslots":["0"]`, `"keyslots":["0","9"]`},
		{"digest names no slot", `"keyslots":["0"]`, `"keyslots":[]`},
		{"40 slots", `"keyslots":{"0"`, `"keyslots":{` + strings.Join(many[1:], ",") + `,"0"`},
		{"40 digests", `"digests":{"0"`, `"digests":{` + strings.Join(many[1:], ",") + `,"0"`},
		{"slot number", `"keyslots":{"0":`, `"keyslots":{"00":`},
		{"slot number 99", `"keyslots":{"0":`, `"keyslots":{"99":`},
		{"json_size lies", `"json_size":"12288"`, `"json_size":"4096"`},
		{"keyslots_size lies", `"keyslots_size":"2097152"`, `"keyslots_size":"134217728"`},
		{"keyslots_size unaligned", `"keyslots_size":"2097152"`, `"keyslots_size":"2097151"`},
		{"requirements", `"config":{`, `"config":{"requirements":{"mandatory":["online-reencrypt-v2"]},`},
		{"flags", `"config":{`, `"config":{"flags":["future"],`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if !strings.Contains(sample, tc.old) {
				t.Fatalf("the sample has no %q", tc.old)
			}
			h, err := Check(disk(header(strings.Replace(sample, tc.old, tc.new, 1))), diskSize)
			if !errors.Is(err, ErrUnsupported) {
				t.Errorf("got %s, %v", describe(h), err)
			}
		})
	}
}

func TestOtherDisks(t *testing.T) {
	luks1 := make([]byte, 4<<20)
	copy(luks1, "LUKS\xba\xbe\x00\x01")
	older := header(sample)
	binary.BigEndian.PutUint64(older[offSequence:], 2)
	Seal(older[:minCopy])
	for _, tc := range []struct {
		name string
		disk []byte
		want error
	}{
		{"empty", nil, ErrNotLUKS},
		{"zeros", make([]byte, 8<<20), ErrNotLUKS},
		{"short", []byte("LUKS\xba\xbe\x00\x02"), ErrNotLUKS},
		{"cut after one copy", header(sample)[:minCopy], nil},
		{"LUKS1", luks1, ErrUnsupported},
	} {
		h, err := Check(bytes.NewReader(tc.disk), int64(len(tc.disk)))
		if err == nil || tc.want != nil && !errors.Is(err, tc.want) {
			t.Errorf("%s: %s, %v", tc.name, describe(h), err)
		}
	}
	h, err := Check(disk(older), diskSize)
	if err != nil || h.Damage == "" || h.Sequence != 3 {
		t.Errorf("an older primary: %s, %v", describe(h), err)
	}
}

// FuzzMetadata gives hostile JSON, behind valid checksums, to Check. What it
// accepts must lie within the disk, and its canonical area must mean the same.
func FuzzMetadata(f *testing.F) {
	f.Add([]byte(sample))
	f.Add([]byte(strings.Replace(sample, "pbkdf2", "argon2id", 1)))
	f.Add([]byte(`{"keyslots":{},"segments":{"0":{}},"digests":{}}`))
	f.Fuzz(func(t *testing.T, json []byte) {
		if len(json) > minCopy-binarySize {
			return
		}
		h, err := Check(disk(header(string(json))), diskSize)
		if err != nil {
			return
		}
		if h.DataOffset < int64(len(h.area)) || h.DataOffset+h.DataSize > diskSize || h.DataSize%int64(h.SectorSize) != 0 {
			t.Fatalf("data outside the disk: %s", describe(h))
		}
		for _, s := range h.Slots {
			if s.AreaOffset < 2*minCopy || s.AreaOffset+s.AreaSize > int64(len(h.area)) || s.AreaSize < int64(h.KeySize*stripes) {
				t.Fatalf("slot outside the area: %+v", s)
			}
		}
		again, err := Check(disk(h.Canonical()), diskSize)
		if err != nil || again.UUID != h.UUID || again.Damage != "" || len(again.Slots) != len(h.Slots) {
			t.Fatalf("canonical area: %s, %v", describe(again), err)
		}
	})
}

// FuzzCheck mutates both copies as they lie on the disk. Nothing may be
// accepted unless one copy carries a valid checksum.
func FuzzCheck(f *testing.F) {
	f.Add(header(sample)[:2*minCopy])
	f.Add(header(sample)[:minCopy])
	f.Fuzz(func(t *testing.T, area []byte) {
		h, err := Check(disk(area[:min(len(area), 1<<20)]), diskSize)
		if err != nil {
			return
		}
		c := h.Canonical()
		if !bytes.Equal(checksum(c[:len(c)/2][:minCopy]), c[offChecksum:offChecksum+lenChecksum]) && !bytes.Equal(c[:6], magicPrimary) {
			t.Fatal("accepted without a valid copy")
		}
	})
}
