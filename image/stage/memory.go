package stage

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"farkeep/image/luksfile"
	"farkeep/shared/secret"
	"farkeep/shared/volumekey"
)

// Secrets are what an appliance's memory is searched for.
type Secrets struct {
	Key    []byte // the key server's: it opens a slot of the header
	Volume []byte // the volume key, which that slot guards and the kernel works with
}

// Secrets reads them from the key server's folder and the disk.
func (a *Appliance) Secrets() (Secrets, error) {
	key, err := os.ReadFile(filepath.Join(a.stage.KeyServerSecrets(), "keys", a.LUKS+".key"))
	if err != nil {
		return Secrets{}, err
	}
	header, err := luksfile.Header(a.Disk)
	if err != nil {
		return Secrets{}, err
	}
	volume, err := volumekey.Open(header, secret.New(bytes.Clone(key)))
	if err != nil {
		return Secrets{}, err
	}
	return Secrets{Key: key, Volume: volume.Reveal()}, nil
}

// Memory is how often each of the given bytes lies in the memory of the running
// machine, all of it: kernel, processes, page cache, free pages. The machine
// stands still while its memory is written down.
func (a *Appliance) Memory(ctx context.Context, needles ...[]byte) ([]int, error) {
	path := filepath.Join(a.stage.o.Dir, a.Name+".memory")
	if err := a.Pi.DumpMemory(ctx, path); err != nil {
		return nil, err
	}
	counts, err := Occurrences(ctx, path, needles...)
	return counts, errors.Join(err, os.Remove(path))
}

// block is how much of a file Occurrences looks at in one go, in bytes; longest
// is the longest needle.
const (
	block   = 64 << 10
	longest = 256
)

// Occurrences counts how often each needle occurs in a file, in one pass. Of
// those that overlap one counts. Needles hold no runs of zeros: where a file is
// empty, as most of a machine's memory is, it is not searched.
func Occurrences(ctx context.Context, path string, needles ...[]byte) ([]int, error) {
	for _, needle := range needles {
		if len(needle) < 16 || len(needle) > longest {
			return nil, fmt.Errorf("%d bytes would be found by chance, or not at all", len(needle))
		}
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	counts := make([]int, len(needles))
	buf, empty := make([]byte, longest+block), make([]byte, longest+block)
	for ctx.Err() == nil {
		n, err := io.ReadFull(f, buf[longest:])
		if seen := buf[:longest+n]; !bytes.Equal(seen, empty[:len(seen)]) {
			for i, needle := range needles {
				// What ends in the part that was seen before was counted then.
				for at := longest - len(needle) + 1; at <= len(seen); {
					next := bytes.Index(seen[at:], needle)
					if next < 0 {
						break
					}
					counts[i]++
					at += next + len(needle)
				}
			}
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return counts, nil
		}
		if err != nil {
			return counts, err
		}
		copy(buf, buf[block:]) // the beginning of one that the next block ends
	}
	return counts, ctx.Err()
}

// Forms are the bytes that must not occur where secret must not be known: both
// halves of it, raw and in hexadecimal.
func Forms(secret []byte) [][]byte {
	half := len(secret) / 2
	var forms [][]byte
	for _, part := range [][]byte{secret[:half], secret[half:]} {
		forms = append(forms, part, []byte(hex.EncodeToString(part)))
	}
	return forms
}
