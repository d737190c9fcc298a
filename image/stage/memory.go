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
	"sync"

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

// block is how much of a file Occurrences looks at in one go, in bytes.
const block = 4 << 20

// Occurrences counts how often each needle occurs in a file. Occurrences that
// overlap count once.
func Occurrences(ctx context.Context, path string, needles ...[]byte) ([]int, error) {
	counts, errs := make([]int, len(needles)), make([]error, len(needles))
	var counting sync.WaitGroup
	for i, needle := range needles {
		if len(needle) < 16 || len(needle) > block {
			return nil, fmt.Errorf("%d bytes would be found by chance, or not at all", len(needle))
		}
		counting.Go(func() { counts[i], errs[i] = occurrences(ctx, path, needle) })
	}
	counting.Wait()
	return counts, errors.Join(errs...)
}

func occurrences(ctx context.Context, path string, needle []byte) (count int, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	buf := make([]byte, len(needle)-1+block)
	kept := 0
	for ctx.Err() == nil {
		n, err := io.ReadFull(f, buf[kept:])
		seen := buf[:kept+n]
		for {
			at := bytes.Index(seen, needle)
			if at < 0 {
				break
			}
			count++
			seen = seen[at+len(needle):]
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return count, nil
		}
		if err != nil {
			return count, err
		}
		kept = copy(buf, seen[max(0, len(seen)-len(needle)+1):]) // the beginning of one that the next block ends
	}
	return count, ctx.Err()
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
