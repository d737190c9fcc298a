package luksfile

import (
	"context"
	"crypto/aes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"

	"farkeep/shared/luksheader"
	"farkeep/shared/secret"
	"farkeep/shared/volumekey"

	"golang.org/x/crypto/xts"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"lukechampine.com/adiantum"
)

// Volume is an opened LUKS2 volume. Offsets are those of the data, 0 being its
// beginning, and must be multiples of the sector size, as lengths must be. It
// is safe for concurrent use.
type Volume struct {
	Header *luksheader.Header
	f      *os.File
	key    secret.Bytes
}

// Open opens the volume in the file or device at path with a key of one of its
// slots. The error wraps ErrWrongKey when the key opens none.
func Open(path string, key secret.Bytes, writable bool) (*Volume, error) {
	h, err := Header(path)
	if err != nil {
		return nil, err
	}
	master, err := volumekey.Open(h, key)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	flag := os.O_RDONLY
	if writable {
		flag = os.O_RDWR
	}
	f, err := os.OpenFile(path, flag, 0)
	if err != nil {
		master.Wipe()
		return nil, err
	}
	return &Volume{Header: h, f: f, key: master}, nil
}

// Size is the length of the data, in bytes.
func (v *Volume) Size() int64 { return v.Header.DataSize }

// Close wipes the key and closes the file. What was written is durable only
// after Sync.
func (v *Volume) Close() error {
	v.key.Wipe()
	return v.f.Close()
}

// Sync makes durable what was written.
func (v *Volume) Sync() error { return v.f.Sync() }

// crypt encrypts or decrypts b, whole sectors, in place; at is where they lie.
type crypt func(b []byte, at int64)

// crypts returns functions of their own for each goroutine: the ciphers keep state.
func (v *Volume) crypts() (encrypt, decrypt crypt, err error) {
	size := v.Header.SectorSize
	each := func(do func(sector []byte, number uint64)) crypt {
		return func(b []byte, at int64) {
			for i := 0; i < len(b); i += size {
				// plain64 counts in units of 512 bytes, whatever the sector size
				// (Linux, Documentation/admin-guide/device-mapper/dm-crypt.rst).
				do(b[i:i+size], uint64(at+int64(i))/512)
			}
		}
	}
	switch Cipher(v.Header.Cipher) {
	case AES:
		c, err := xts.NewCipher(aes.NewCipher, v.key.Reveal())
		if err != nil {
			return nil, nil, err
		}
		return each(func(b []byte, n uint64) { c.Encrypt(b, b, n) }), each(func(b []byte, n uint64) { c.Decrypt(b, b, n) }), nil
	case Adiantum:
		c := adiantum.New20(v.key.Reveal())
		tweak := make([]byte, 32)
		return each(func(b []byte, n uint64) {
				binary.LittleEndian.PutUint64(tweak, n)
				c.Encrypt(b, tweak)
			}), each(func(b []byte, n uint64) {
				binary.LittleEndian.PutUint64(tweak, n)
				c.Decrypt(b, tweak)
			}), nil
	default:
		return nil, nil, fmt.Errorf("cipher %s", v.Header.Cipher)
	}
}

func (v *Volume) inside(n int, at int64) error {
	size := int64(v.Header.SectorSize)
	if at < 0 || at%size != 0 || int64(n)%size != 0 || at+int64(n) > v.Size() {
		return fmt.Errorf("%d bytes at %d: not whole sectors of %d in a volume of %d", n, at, size, v.Size())
	}
	return nil
}

// ReadAt reads and decrypts.
func (v *Volume) ReadAt(b []byte, at int64) (int, error) {
	if err := v.inside(len(b), at); err != nil {
		return 0, err
	}
	if _, err := v.f.ReadAt(b, v.Header.DataOffset+at); err != nil {
		return 0, fmt.Errorf("read the volume at %d: %w", at, err)
	}
	_, decrypt, err := v.crypts()
	if err != nil {
		return 0, err
	}
	decrypt(b, at)
	return len(b), nil
}

// chunk is how much one goroutine encrypts at a time, in bytes.
const chunk = 1 << 20

// copyExtents hands every chunk of from's data extents in [0, size) to a worker;
// each worker has a buffer, filled from from at base+at, and its own state.
func copyExtents(ctx context.Context, from *os.File, base, size int64, worker func() (func(b []byte, at int64) error, error)) error {
	workers := make([]func([]byte, int64) error, runtime.GOMAXPROCS(0))
	for i := range workers {
		var err error
		if workers[i], err = worker(); err != nil {
			return err
		}
	}
	group, ctx := errgroup.WithContext(ctx)
	type piece struct {
		at int64
		n  int
	}
	pieces := make(chan piece)
	for _, do := range workers {
		group.Go(func() error {
			buf := make([]byte, chunk)
			for p := range pieces {
				b := buf[:p.n]
				n, err := from.ReadAt(b, base+p.at)
				if err != nil && !errors.Is(err, io.EOF) {
					return fmt.Errorf("read %s at %d: %w", from.Name(), base+p.at, err)
				}
				clear(b[n:])
				if err := do(b, p.at); err != nil {
					return err
				}
			}
			return nil
		})
	}
	group.Go(func() error {
		defer close(pieces)
		for at := int64(0); at < size; {
			start, end, err := extent(from, base+at, base+size)
			if err != nil {
				return err
			}
			// Sectors are never cut.
			start, end = (start-base)/SectorSize*SectorSize, (end-base+SectorSize-1)/SectorSize*SectorSize
			end = min(end, size)
			for at = start; at < end; at += chunk {
				select {
				case pieces <- piece{at, int(min(chunk, end-at))}:
				case <-ctx.Done():
					return ctx.Err()
				}
			}
			at = end
		}
		return nil
	})
	return group.Wait()
}

// extent finds the next stretch of f, at or after at and before limit, that is
// not a hole; devices and file systems that know no holes are one stretch.
func extent(f *os.File, at, limit int64) (start, end int64, err error) {
	start, err = unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		return limit, limit, nil
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
		return at, limit, nil
	case err != nil:
		return 0, 0, fmt.Errorf("find the data in %s: %w", f.Name(), err)
	}
	end, err = unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE)
	if err != nil {
		return 0, 0, fmt.Errorf("find the data in %s: %w", f.Name(), err)
	}
	return min(start, limit), min(end, limit), nil
}

// writeFrom encrypts everything that a sparse plain file holds into the volume.
func (v *Volume) writeFrom(ctx context.Context, plain *os.File) error {
	err := copyExtents(ctx, plain, 0, v.Size(), func() (func([]byte, int64) error, error) {
		encrypt, _, err := v.crypts()
		return func(b []byte, at int64) error {
			encrypt(b, at)
			if _, err := v.f.WriteAt(b, v.Header.DataOffset+at); err != nil {
				return fmt.Errorf("write the volume at %d: %w", at, err)
			}
			return nil
		}, err
	})
	if err != nil {
		return err
	}
	return v.Sync()
}

// Decrypt opens the volume at path with key and writes its data, in clear, to a
// new file, mode 0600, on which e2fsck, debugfs and mount work. What is a hole
// in the encrypted file is a hole in the plain one.
func Decrypt(ctx context.Context, path string, key []byte, plain string) (err error) {
	v, err := Open(path, secret.New(key), false)
	if err != nil {
		return fmt.Errorf("decrypt: %w", err)
	}
	defer v.Close()
	out, err := os.OpenFile(plain, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("decrypt %s: %w", path, err)
	}
	defer func() {
		err = errors.Join(err, out.Close())
		if err != nil {
			os.Remove(plain)
			err = fmt.Errorf("decrypt %s: %w", path, err)
		}
	}()
	if err := out.Truncate(v.Size()); err != nil {
		return err
	}
	return copyExtents(ctx, v.f, v.Header.DataOffset, v.Size(), func() (func([]byte, int64) error, error) {
		_, decrypt, err := v.crypts()
		return func(b []byte, at int64) error {
			if isZero(b) {
				return nil // never written: no cipher gives zeros
			}
			decrypt(b, at)
			_, err := out.WriteAt(b, at)
			return err
		}, err
	})
}

func isZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}
