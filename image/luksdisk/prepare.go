package luksdisk

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"farkeep/image/luksfile"
	"farkeep/image/siteinit"
	"farkeep/shared/atomicfile"
	"farkeep/shared/hint"
	"farkeep/shared/keywire"
	"farkeep/shared/luksheader"
	"farkeep/shared/secret"
	"farkeep/shared/site"
)

// Request says which disk is for whom.
type Request struct {
	Site      *siteinit.Dir
	Appliance string
	Path      string
	Board     string // "" means the appliance's, from site.toml
	// BytesPerInode of the new file system; 0 chooses by size.
	BytesPerInode int64
	// Confirm is asked before anything is changed, and says no by an error.
	Confirm func(*Target) error
	// Progress is told what is being done.
	Progress func(format string, args ...any)
}

// Prepared is a disk that is ready to travel.
type Prepared struct {
	UUID        string
	Cipher      luksfile.Cipher
	Fingerprint string   // of the header: the SHA-256 of its backup
	KeyFiles    []string // of the key servers
	RecoveryKey string   // file in the operator's folder
	Backup      string   // of the header, in the operator's folder
	OtherSlots  []int    // adopted disks: slots that were there before
	Warnings    []string
}

// CipherFor is the cipher that suits a board: Adiantum for those whose
// processors lack AES instructions.
func CipherFor(board string) luksfile.Cipher {
	switch board {
	case "pi3", "pi4", "zero2w":
		return luksfile.Adiantum
	}
	return luksfile.AES
}

// RecoveryKeyFile is the name, in the operator's folder, of the second key.
func RecoveryKeyFile(uuid string) string { return uuid + ".recovery.key" }

// BackupFile is the name, in the operator's folder, of the header backup, for
// cryptsetup luksHeaderRestore.
func BackupFile(uuid string) string { return uuid + ".luks-header" }

func (r *Request) appliance() (*site.Appliance, error) {
	a, ok := r.Site.Site().Appliance(r.Appliance)
	if !ok {
		return nil, hint.Exit(hint.ExitUsage, hint.Because(fmt.Errorf("%s has no appliance %q", r.Site.SitePath(), r.Appliance), "farkeep-image site show --dir %s lists them; site add appliance adds one", r.Site.Path()))
	}
	return a, nil
}

// find names the appliance, and the disk if it may be changed.
func (r *Request) find() (*site.Appliance, *Target, error) {
	a, err := r.appliance()
	if err != nil {
		return nil, nil, err
	}
	t, err := Inspect(r.Path)
	if err != nil {
		return nil, nil, err
	}
	return a, t, t.Refuse()
}

func (r *Request) board(a *site.Appliance) string {
	if r.Board != "" {
		return r.Board
	}
	return a.Board
}

// Prepare erases the disk and makes it an appliance's.
func Prepare(ctx context.Context, r Request) (*Prepared, error) {
	a, t, err := r.find()
	if err != nil {
		return nil, err
	}
	if t.Size < luksfile.MinSize {
		return nil, hint.Because(fmt.Errorf("%s has %s; %s is the least", t.Path, Size(t.Size), Size(luksfile.MinSize)), "a file grows with truncate -s 1G %s", t.Path)
	}
	if err := r.Confirm(t); err != nil {
		return nil, err
	}
	p := &Prepared{UUID: newUUID(), Cipher: CipherFor(r.board(a))}
	keys, err := r.newKeys(p)
	if err != nil {
		return nil, err
	}
	defer keys.wipe()
	r.Progress("encrypting %s for %s (%s)", t.Path, r.board(a), p.Cipher)
	if err := erase(t); err != nil {
		return nil, err
	}
	if _, err := luksfile.Format(ctx, t.Path, p.UUID, p.Cipher, keys.server, keys.recovery); err != nil {
		return nil, err
	}
	r.Progress("making an ext4 file system of %s", Size(t.Size-luksfile.DataOffset))
	if err := luksfile.MakeFileSystem(ctx, t.Path, keys.server, r.BytesPerInode); err != nil {
		return nil, err
	}
	return p, r.finish(ctx, p, keys)
}

// Adopt gives an encrypted disk that somebody has the key of to an appliance.
// It adds two key slots and changes nothing else.
func Adopt(ctx context.Context, r Request, existing secret.Bytes) (*Prepared, error) {
	a, t, err := r.find()
	if err != nil {
		return nil, err
	}
	h, err := luksfile.Header(t.Path)
	if err != nil {
		if errors.Is(err, luksheader.ErrUnsupported) {
			err = hint.Because(err, "such a disk cannot be adopted; cryptsetup convert --type luks2 turns LUKS1 into LUKS2")
		}
		return nil, err
	}
	p := &Prepared{UUID: h.UUID, Cipher: luksfile.Cipher(h.Cipher)}
	if h.Damage != "" {
		return nil, hint.Because(fmt.Errorf("%s: %s", t.Path, h.Damage), "cryptsetup repair %s", t.Path)
	}
	if exists(filepath.Join(r.Site.OperatorDir(), RecoveryKeyFile(h.UUID))) {
		return nil, hint.Because(fmt.Errorf("%s was adopted already: there is %s", t.Path, RecoveryKeyFile(h.UUID)), "if that failed half-way, remove its files from the operator's and the key servers' folders, and its last two key slots with cryptsetup luksKillSlot")
	}
	if err := checkAdoptable(t.Path, existing); err != nil {
		return nil, err
	}
	for _, s := range h.Slots {
		p.OtherSlots = append(p.OtherSlots, s.ID)
	}
	if want := CipherFor(r.board(a)); p.Cipher != want && want == luksfile.Adiantum {
		p.Warnings = append(p.Warnings, fmt.Sprintf("the disk is encrypted with %s, which a %s does slowly (about 70 MB/s at best); a disk prepared anew would have %s", p.Cipher, r.board(a), want))
	}
	if h.SectorSize < luksfile.SectorSize {
		p.Warnings = append(p.Warnings, fmt.Sprintf("the disk has encryption sectors of %d bytes; %d would be quicker", h.SectorSize, luksfile.SectorSize))
	}
	if err := r.Confirm(t); err != nil {
		return nil, err
	}
	keys, err := r.newKeys(p)
	if err != nil {
		return nil, err
	}
	defer keys.wipe()
	r.Progress("adding two key slots to %s", t.Path)
	for _, key := range []secret.Bytes{keys.server, keys.recovery} {
		if err := luksfile.AddKey(ctx, t.Path, existing, key); err != nil {
			return nil, err
		}
	}
	return p, r.finish(ctx, p, keys)
}

// checkAdoptable opens the disk with the key that its owner gave, and looks for
// the file system that the appliance can mount.
func checkAdoptable(path string, existing secret.Bytes) error {
	v, err := luksfile.Open(path, existing, false)
	if errors.Is(err, luksfile.ErrWrongKey) {
		return hint.Exit(hint.ExitUsage, hint.Because(err, "a key file is taken byte by byte, its newline included; a passphrase is one line"))
	}
	if err != nil {
		return err
	}
	defer v.Close()
	size, ok := ext4Size(v)
	switch {
	case !ok:
		return hint.Because(fmt.Errorf("%s holds no ext4 file system", path), "the appliance mounts ext4 directly inside the encryption: no partitions, no volume groups; \"disk prepare\" makes such a disk, and erases this one")
	case size > v.Size():
		return fmt.Errorf("%s: its file system is larger (%s) than the disk (%s)", path, Size(size), Size(v.Size()))
	}
	return nil
}

// keys are the two keys of a disk.
type keys struct{ server, recovery secret.Bytes }

// newKeys makes the keys of p and puts them where they belong.
func (r *Request) newKeys(p *Prepared) (*keys, error) {
	k := &keys{}
	for _, key := range []*secret.Bytes{&k.server, &k.recovery} {
		var err error
		if *key, err = newKey(); err != nil {
			k.wipe()
			return nil, err
		}
	}
	if err := r.store(p, k); err != nil {
		k.wipe()
		return nil, err
	}
	return k, nil
}

func newKey() (secret.Bytes, error) {
	b := make([]byte, keywire.NewKey)
	rand.Read(b)
	key := secret.New(b)
	// A laptop may refuse: it is asked to keep more in memory than it locks.
	if err := key.Lock(); err != nil {
		key.Wipe()
		return secret.Bytes{}, err
	}
	return key, nil
}

func (k *keys) wipe() {
	k.server.Wipe()
	k.recovery.Wipe()
}

// store writes the keys into the operator's and the key servers' folders.
func (r *Request) store(p *Prepared, k *keys) error {
	p.RecoveryKey = filepath.Join(r.Site.OperatorDir(), RecoveryKeyFile(p.UUID))
	if err := atomicfile.Create(p.RecoveryKey, k.recovery.Reveal(), 0o600); err != nil {
		return err
	}
	var err error
	p.KeyFiles, err = r.Site.StoreKey(p.UUID, k.server)
	return err
}

// finish reads back what was made, backs the header up, and tells the site.
func (r *Request) finish(ctx context.Context, p *Prepared, k *keys) error {
	r.Progress("checking both keys and the file system")
	h, err := luksfile.Header(r.Path)
	if err != nil {
		return err
	}
	if h.UUID != p.UUID || h.Cipher != string(p.Cipher) {
		return fmt.Errorf("%s: read back as %s, %s", r.Path, h.UUID, h.Cipher)
	}
	for name, key := range map[string]secret.Bytes{"key server's": k.server, "recovery": k.recovery} {
		if err := luksfile.TestKey(ctx, r.Path, key); err != nil {
			return fmt.Errorf("the %s key does not open %s: %w", name, r.Path, err)
		}
		v, err := luksfile.Open(r.Path, key, false)
		if err != nil {
			return fmt.Errorf("the %s key does not open %s: %w", name, r.Path, err)
		}
		_, ok := ext4Size(v)
		v.Close()
		if !ok {
			return fmt.Errorf("%s: the file system cannot be read back", r.Path)
		}
	}
	p.Fingerprint = h.Fingerprint()
	p.Backup = filepath.Join(r.Site.OperatorDir(), BackupFile(p.UUID))
	// What cryptsetup luksHeaderBackup would write, byte for byte.
	if err := atomicfile.Create(p.Backup, h.Canonical(), 0o600); err != nil {
		return err
	}
	if err := r.Site.SetLUKS(r.Appliance, p.UUID); err != nil {
		return err
	}
	return r.Site.SetLUKSHeader(r.Appliance, p.Fingerprint)
}

// erase removes what could be taken for the disk's content later: the marks of
// file systems and partition tables at both ends.
func erase(t *Target) error {
	f, err := os.OpenFile(t.Path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	zeros := make([]byte, 1<<20)
	for _, at := range []int64{0, t.Size - int64(len(zeros))} {
		if _, err := f.WriteAt(zeros, at); err != nil {
			return fmt.Errorf("erase %s at %d: %w", t.Path, at, err)
		}
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("erase %s: %w", t.Path, err)
	}
	return nil
}

// newUUID is a random UUID (RFC 9562, version 4).
func newUUID() string {
	var b [16]byte
	rand.Read(b[:])
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%08x-%04x-%04x-%04x-%012x", binary.BigEndian.Uint32(b[:]), b[4:6], b[6:8], b[8:10], b[10:])
}
