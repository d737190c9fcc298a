// Package luksfile makes and reads LUKS2 volumes without the kernel's help: no
// device mapper, no loop device, no root for plain files. It works on files and
// on block devices alike, so that the disk of a demonstration and the disk that
// travels are made by the same code.
//
// The header is cryptsetup's own work. The volume's sectors are encrypted here,
// as dm-crypt would: aes-xts-plain64 by golang.org/x/crypto/xts, and
// xchacha20,aes-adiantum-plain64 by lukechampine.com/adiantum. A file system is
// made by mke2fs in a sparse plain file, and what it wrote is encrypted into
// place; where mke2fs wrote nothing, nothing is written.
//
// Keys reach cryptsetup through pipes. They are in no argument, no environment
// and no file.
package luksfile

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"

	"farkeep/shared/hint"
	"farkeep/shared/luksheader"
	"farkeep/shared/secret"
)

// Cipher is how a volume's sectors are encrypted.
type Cipher string

// The ciphers. AES is quick on processors with instructions for it, and five
// times slower than Adiantum on those without, as in Pi 3, Pi 4 and Zero 2 W.
const (
	AES      Cipher = "aes-xts-plain64"
	Adiantum Cipher = "xchacha20,aes-adiantum-plain64"
)

const (
	// SectorSize is the encryption sector of the volumes that Format makes, in
	// bytes: a page, so that Adiantum, which works on whole sectors, has least
	// overhead, and as large as modern disks' own sectors.
	SectorSize = 4096
	// DataOffset is where their data begins, in bytes: cryptsetup's default,
	// which leaves room for its largest metadata.
	DataOffset = 16 << 20
	// keyslotsSize is much less than cryptsetup's default of 16 MiB: the
	// appliance reads the whole header area at every opening. It holds eight
	// slots of a 512-bit key.
	keyslotsSize = 2 << 20
	// MinSize is the smallest volume that Format makes, in bytes.
	MinSize = DataOffset + 16<<20
	// iterations is cryptsetup's minimum. PBKDF2 slows down guessing, and a key
	// of 64 random bytes cannot be guessed; on a Pi, more would only be a delay.
	iterations = 1000
	// label helps a person who runs blkid.
	label = "farkeep"
)

// light are the arguments for a key slot of a random key. The slot's own cipher
// is AES whatever the volume's is: that one is always there.
var light = []string{"--pbkdf", "pbkdf2", "--pbkdf-force-iterations", fmt.Sprint(iterations), "--hash", "sha256",
	"--keyslot-cipher", string(AES), "--keyslot-key-size", "512"}

// Format writes a LUKS2 header with key slots for two keys, 0 for the first and
// 1 for the second, onto the file or device at path, whose content it destroys.
func Format(ctx context.Context, path, uuid string, c Cipher, first, second secret.Bytes) (*luksheader.Header, error) {
	bits := "512"
	if c == Adiantum {
		// Adiantum takes 256 bits. The header is made for AES with as many, and
		// then says Adiantum: cryptsetup makes volumes only with ciphers that the
		// running kernel has, and the key slots are the same for both.
		bits = "256"
	}
	args := append([]string{"luksFormat", "--batch-mode", "--type", "luks2", "--uuid", uuid, "--label", label,
		"--cipher", string(AES), "--key-size", bits, "--sector-size", fmt.Sprint(SectorSize),
		"--luks2-keyslots-size", fmt.Sprint(keyslotsSize), "--offset", fmt.Sprint(DataOffset / 512),
		"--key-slot", "0", "--key-file", "/dev/fd/3"}, light...)
	if err := cryptsetup(ctx, []secret.Bytes{first}, append(args, path)...); err != nil {
		return nil, err
	}
	if c == Adiantum {
		if err := setCipher(path, AES, Adiantum); err != nil {
			return nil, err
		}
	}
	if err := AddKey(ctx, path, first, second); err != nil {
		return nil, err
	}
	return Header(path)
}

// AddKey gives key a slot of its own, in a volume that existing opens.
func AddKey(ctx context.Context, path string, existing, key secret.Bytes) error {
	args := append([]string{"luksAddKey", "--batch-mode", "--key-file", "/dev/fd/3"}, light...)
	return cryptsetup(ctx, []secret.Bytes{existing, key}, append(args, path, "/dev/fd/4")...)
}

// TestKey asks cryptsetup whether key opens the volume.
func TestKey(ctx context.Context, path string, key secret.Bytes) error {
	return cryptsetup(ctx, []secret.Bytes{key}, "open", "--test-passphrase", "--key-file", "/dev/fd/3", path)
}

// TestSlot asks cryptsetup whether key opens one key slot of the volume. The error
// wraps ErrWrongKey when it does not.
func TestSlot(ctx context.Context, path string, slot int, key secret.Bytes) error {
	return cryptsetup(ctx, []secret.Bytes{key}, "open", "--test-passphrase", "--key-slot", fmt.Sprint(slot), "--key-file", "/dev/fd/3", path)
}

// KillSlot wipes a key slot. authority must open another one: cryptsetup asks.
func KillSlot(ctx context.Context, path string, slot int, authority secret.Bytes) error {
	return cryptsetup(ctx, []secret.Bytes{authority}, "luksKillSlot", "--batch-mode", "--key-file", "/dev/fd/3", path, fmt.Sprint(slot))
}

// wrongKey is cryptsetup's exit code for a key that opens nothing
// (cryptsetup(8), "RETURN CODES").
const wrongKey = 2

// cryptsetup runs cryptsetup with keys on descriptors from 3 on.
func cryptsetup(ctx context.Context, keys []secret.Bytes, args ...string) error {
	program, err := exec.LookPath("cryptsetup")
	if err != nil {
		return hint.Because(errors.New("cryptsetup is missing"), "apt install cryptsetup-bin")
	}
	cmd := exec.CommandContext(ctx, program, args...)
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	// C: its messages are compared with nothing, but shown to people who search for them.
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var writers []*os.File
	closeAll := func(files []*os.File) {
		for _, f := range files {
			f.Close()
		}
	}
	defer func() { closeAll(writers) }()
	for range keys {
		r, w, err := os.Pipe()
		if err != nil {
			closeAll(cmd.ExtraFiles)
			return fmt.Errorf("run cryptsetup: %w", err)
		}
		cmd.ExtraFiles = append(cmd.ExtraFiles, r)
		writers = append(writers, w)
	}
	err = cmd.Start()
	closeAll(cmd.ExtraFiles)
	if err != nil {
		return fmt.Errorf("run cryptsetup: %w", err)
	}
	for i, key := range keys {
		// Keys are shorter than a pipe is deep (PIPE_BUF at the least, 64 KiB on
		// Linux): this cannot block. A cryptsetup that ended early shows below.
		if _, err := writers[i].Write(key.Reveal()); err != nil {
			break
		}
		writers[i].Close()
	}
	closeAll(writers)
	err = cmd.Wait()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == wrongKey {
		return fmt.Errorf("cryptsetup %s: %w: %s", args[0], ErrWrongKey, strings.Join(strings.Fields(said.String()), " "))
	}
	if err != nil {
		return fmt.Errorf("cryptsetup %s: %w: %s", args[0], err, strings.Join(strings.Fields(said.String()), " "))
	}
	return nil
}

// Header reads and checks the header of a file or device.
func Header(path string) (*luksheader.Header, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, fmt.Errorf("size of %s: %w", path, err)
	}
	h, err := luksheader.Check(f, size)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return h, nil
}

// setCipher changes the segment's cipher in both copies of the metadata. The
// key slots, which have a cipher of their own, stay.
func setCipher(path string, from, to Cipher) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	const copySize = 16 << 10 // what luksFormat makes unless told otherwise
	area := make([]byte, 2*copySize)
	if _, err := f.ReadAt(area, 0); err != nil {
		return fmt.Errorf("set the cipher of %s: %w", path, err)
	}
	for i := range 2 {
		metadata := area[i*copySize : (i+1)*copySize]
		json := metadata[4096:]
		segments := bytes.Index(json, []byte(`"segments":`))
		if segments < 0 {
			return fmt.Errorf("set the cipher of %s: no segments in its metadata", path)
		}
		old := []byte(`"encryption":"` + string(from) + `"`)
		at := bytes.Index(json[segments:], old)
		end := bytes.IndexByte(json, 0)
		if at < 0 || end < 0 || end+len(to)-len(from) >= len(json) {
			return fmt.Errorf("set the cipher of %s: it is not %s", path, from)
		}
		at += segments
		changed := bytes.Join([][]byte{json[:at], []byte(`"encryption":"` + string(to) + `"`), json[at+len(old) : end]}, nil)
		copy(json, changed)
		luksheader.Seal(metadata)
	}
	if _, err := f.WriteAt(area, 0); err != nil {
		return fmt.Errorf("set the cipher of %s: %w", path, err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("set the cipher of %s: %w", path, err)
	}
	return nil
}
