package luksfile_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"farkeep/image/luksfile"
	"farkeep/shared/secret"
	"farkeep/shared/volumekey"

	"github.com/anatol/devmapper.go"
	"github.com/anatol/luks.go"
)

const uuid = "b64e6fbb-11a0-42e1-b7f1-32adde77f805"

func tool(t testing.TB, pkg, name string, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		name = "/usr/sbin/" + name
	}
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s (Debian package %s): %v\n%s", name, strings.Join(args, " "), pkg, err, out)
	}
	return string(out)
}

func newKey() secret.Bytes {
	b := make([]byte, 64)
	rand.Read(b)
	return secret.New(b)
}

func newDisk(t testing.TB, size int64, fill bool) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if fill {
		b := make([]byte, size)
		rand.Read(b)
		if _, err := f.Write(b); err != nil {
			t.Fatal(err)
		}
		return path
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return path
}

func blocks(t testing.TB, path string) int64 {
	t.Helper()
	out := tool(t, "coreutils", "stat", "-c", "%b", path)
	var n int64
	if _, err := fmt.Sscan(out, &n); err != nil {
		t.Fatal(err)
	}
	return n * 512
}

// TestPrepared makes disks, full of an earlier owner's bytes or sparse, and lets
// the stock tools judge them.
func TestPrepared(t *testing.T) {
	for _, c := range []luksfile.Cipher{luksfile.AES, luksfile.Adiantum} {
		for _, fill := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s filled %v", c, fill), func(t *testing.T) {
				t.Parallel()
				ctx := t.Context()
				path := newDisk(t, 48<<20, fill)
				first, second := newKey(), newKey()
				h, err := luksfile.Format(ctx, path, uuid, c, first, second)
				if err != nil {
					t.Fatal(err)
				}
				if h.UUID != uuid || h.Cipher != string(c) || h.SectorSize != 4096 || len(h.Slots) != 2 || h.Slots[0].Iterations != 1000 || h.Damage != "" {
					t.Errorf("header: %s %s %d, %d slots, %s", h.UUID, h.Cipher, h.SectorSize, len(h.Slots), h.Damage)
				}
				dump := tool(t, "cryptsetup-bin", "cryptsetup", "luksDump", path)
				for _, want := range []string{"cipher: " + string(c), "sector: 4096", "PBKDF:      pbkdf2", "  0: luks2", "  1: luks2"} {
					if !strings.Contains(dump, want) {
						t.Errorf("luksDump does not say %q:\n%s", want, dump)
					}
				}
				if err := luksfile.MakeFileSystem(ctx, path, first, 0); err != nil {
					t.Fatal(err)
				}
				for i, key := range []secret.Bytes{first, second} {
					if err := luksfile.TestKey(ctx, path, key); err != nil {
						t.Errorf("key %d: %v", i, err)
					}
					unseal(t, path, i, key)
				}
				if err := luksfile.TestKey(ctx, path, newKey()); err == nil {
					t.Error("any key opens the disk")
				}
				plain := filepath.Join(t.TempDir(), "plain")
				if err := luksfile.Decrypt(ctx, path, second.Reveal(), plain); err != nil {
					t.Fatal(err)
				}
				tool(t, "e2fsprogs", "e2fsck", "-fn", plain)
				tool(t, "e2fsprogs", "debugfs", "-R", "stats", plain)
				features := tool(t, "e2fsprogs", "dumpe2fs", "-h", plain)
				for _, want := range []string{"metadata_csum", "dir_index", "Reserved block count:     0", "Remount read-only", "Filesystem volume name:   farkeep", "Inode size:	          256", "Block size:               4096"} {
					if !strings.Contains(features, want) {
						t.Errorf("dumpe2fs does not say %q:\n%s", want, features)
					}
				}
				for _, unwanted := range []string{"orphan_file", "metadata_csum_seed"} {
					if strings.Contains(features, unwanted) {
						t.Errorf("%s keeps older Linuxes out", unwanted)
					}
				}
				if !fill {
					if n := blocks(t, path); n > 24<<20 {
						t.Errorf("a new disk takes %d bytes", n)
					}
					if n := blocks(t, plain); n > 16<<20 {
						t.Errorf("a new plain file takes %d bytes", n)
					}
				}
			})
		}
	}
}

// unseal opens slot i with the library that the appliance uses, which compares
// the volume key with its digest.
func unseal(t *testing.T, path string, slot int, key secret.Bytes) {
	t.Helper()
	dev, err := luks.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	v, err := dev.UnsealVolume(slot, key.Reveal())
	if err != nil {
		t.Errorf("luks.go, slot %d: %v", slot, err)
		return
	}
	if v.StorageOffset != luksfile.DataOffset || v.StorageSectorSize != luksfile.SectorSize {
		t.Errorf("luks.go: data at %d, sectors of %d", v.StorageOffset, v.StorageSectorSize)
	}
}

// TestSectors compares our AES sectors with another implementation of dm-crypt.
func TestSectors(t *testing.T) {
	path := newDisk(t, 40<<20, true)
	key := newKey()
	h, err := luksfile.Format(t.Context(), path, uuid, luksfile.AES, key, newKey())
	if err != nil {
		t.Fatal(err)
	}
	v, err := luksfile.Open(path, key, false)
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	master, err := volumekey.Open(h, key)
	if err != nil {
		t.Fatal(err)
	}
	other, err := devmapper.OpenUserspaceVolume(os.O_RDONLY, 0, devmapper.CryptTable{
		Length: uint64(h.DataSize), BackendDevice: path, BackendOffset: uint64(h.DataOffset),
		Encryption: h.Cipher, Key: master.Reveal(), SectorSize: uint64(h.SectorSize),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	for _, at := range []int64{0, 4096, 1 << 20, 20 << 20} {
		a, b := make([]byte, 64<<10), make([]byte, 64<<10)
		if _, err := v.ReadAt(a, at); err != nil {
			t.Fatal(err)
		}
		if _, err := other.ReadAt(b, at); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(a, b) {
			t.Errorf("data at %d differs", at)
		}
	}
	for _, at := range []int64{-4096, 100, h.DataSize} {
		if _, err := v.ReadAt(make([]byte, 4096), at); err == nil {
			t.Errorf("read at %d", at)
		}
	}
}

func TestAddKey(t *testing.T) {
	path := newDisk(t, 40<<20, false)
	ctx := t.Context()
	first, third := newKey(), secret.New([]byte("a passphrase of a person\n"))
	if _, err := luksfile.Format(ctx, path, uuid, luksfile.Adiantum, first, newKey()); err != nil {
		t.Fatal(err)
	}
	if err := luksfile.AddKey(ctx, path, newKey(), third); err == nil || strings.Contains(err.Error(), string(third.Reveal())) {
		t.Errorf("with a wrong key: %v", err)
	}
	if err := luksfile.AddKey(ctx, path, first, third); err != nil {
		t.Fatal(err)
	}
	if err := luksfile.TestKey(ctx, path, third); err != nil {
		t.Error(err)
	}
	h, err := luksfile.Header(path)
	if err != nil || len(h.Slots) != 3 || h.Cipher != string(luksfile.Adiantum) {
		t.Errorf("%d slots, %s, %v", len(h.Slots), h.Cipher, err)
	}
	if _, err := luksfile.Open(path, newKey(), false); !errors.Is(err, luksfile.ErrWrongKey) {
		t.Errorf("with a wrong key: %v", err)
	}
	// Argon2 slots, which people's own disks have, are understood as well.
	keyFile := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(keyFile, first.Reveal(), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, kdf := range []string{"argon2i", "argon2id"} {
		tool(t, "cryptsetup-bin", "cryptsetup", "luksConvertKey", "-q", "--keyslot-cipher", "aes-xts-plain64", "--keyslot-key-size", "512", "--pbkdf", kdf, "--pbkdf-memory", "32768", "--pbkdf-force-iterations", "4", "--pbkdf-parallel", "2", "--key-file", keyFile, path)
		v, err := luksfile.Open(path, first, false)
		if err != nil {
			t.Errorf("%s: %v", kdf, err)
			continue
		}
		v.Close()
	}
}

func TestDecryptRefuses(t *testing.T) {
	path := newDisk(t, 40<<20, false)
	key := newKey()
	if _, err := luksfile.Format(t.Context(), path, uuid, luksfile.AES, key, newKey()); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	plain := filepath.Join(dir, "plain")
	if err := luksfile.Decrypt(t.Context(), path, []byte("wrong"), plain); !errors.Is(err, luksfile.ErrWrongKey) {
		t.Errorf("wrong key: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := luksfile.MakeFileSystem(ctx, path, key, 0); err == nil {
		t.Error("cancelled, and made")
	}
	if err := os.WriteFile(plain, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := luksfile.Decrypt(t.Context(), path, key.Reveal(), plain); !errors.Is(err, os.ErrExist) {
		t.Errorf("over a file: %v", err)
	}
	if b, err := os.ReadFile(plain); string(b) != "mine" {
		t.Errorf("the file is %q, %v", b, err)
	}
}

// The journal and the inodes of the disks that people buy.
func TestFileSystemOfLargeDisk(t *testing.T) {
	path := newDisk(t, 4<<40, false)
	key := newKey()
	if _, err := luksfile.Format(t.Context(), path, uuid, luksfile.AES, key, newKey()); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	if err := luksfile.MakeFileSystem(t.Context(), path, key, 0); err != nil {
		t.Fatal(err)
	}
	t.Logf("4 TiB: %v, %d MB written", time.Since(begin).Round(time.Millisecond), blocks(t, path)>>20)
	v, err := luksfile.Open(path, key, false)
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	super := make([]byte, 4096)
	if _, err := v.ReadAt(super, 0); err != nil {
		t.Fatal(err)
	}
	inodes := new(big.Int).SetBytes([]byte{super[1027], super[1026], super[1025], super[1024]}).Int64()
	if inodes < 60_000_000 || inodes > 70_000_000 {
		t.Errorf("%d inodes", inodes)
	}
}

func BenchmarkMake(b *testing.B) {
	for _, c := range []luksfile.Cipher{luksfile.AES, luksfile.Adiantum} {
		b.Run(string(c), func(b *testing.B) {
			key := newKey()
			for b.Loop() {
				path := newDisk(b, 4<<30, false)
				if _, err := luksfile.Format(b.Context(), path, uuid, c, key, newKey()); err != nil {
					b.Fatal(err)
				}
				if err := luksfile.MakeFileSystem(b.Context(), path, key, 0); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
