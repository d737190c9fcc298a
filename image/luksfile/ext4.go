package luksfile

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"farkeep/shared/hint"
	"farkeep/shared/secret"
)

// features are named one by one, so that neither the version nor the
// configuration of this machine's mke2fs decides what a stranger's Linux must
// understand: all of them are older than Linux 3.18 (2014).
var features = []string{
	"none",
	"has_journal",   // whole after a power cut
	"dir_index",     // folders with a hundred thousand entries
	"dir_nlink",     // and with more than 65,000 folders in them
	"extent",        // large files in few pieces
	"64bit",         // beyond 16 TiB
	"flex_bg",       // metadata lies together: fewer seeks, quicker e2fsck
	"sparse_super",  // fewer copies of the superblock
	"large_file",    //
	"huge_file",     //
	"extra_isize",   // times with nanoseconds
	"filetype",      // listing a folder reads no inodes
	"ext_attr",      //
	"metadata_csum", // a disk that nobody looks at must notice its own rot
	"resize_inode",  // the partition may grow
}

const (
	mebi = 1 << 20
	gibi = 1 << 30
)

// ext4Options are mke2fs's arguments for a file system of size bytes, made for
// few large files, many names for each (hard links need no inode, folders do),
// and slow disks.
func ext4Options(size, bytesPerInode int64) []string {
	// A large journal takes a commit's flood of link counts without stalling,
	// but up to a quarter of it is held in memory, and it is replayed at a
	// start: mke2fs's own 1 GiB is too much for a board with 512 MB.
	journal := min(max(size/64, 4*mebi), 128*mebi) / mebi
	return []string{
		"-t", "ext4", "-q", "-F",
		"-b", "4096", "-I", "256",
		"-O", strings.Join(features, ","),
		"-i", fmt.Sprint(bytesPerInode),
		"-J", fmt.Sprintf("size=%d", journal),
		"-m", "0", // nothing set aside for root: the appliance keeps its own reserve
		"-e", "remount-ro",
		"-L", label,
		// Inode tables are not written but by the kernel, when it first mounts:
		// hours less for a large disk. discard would tell mke2fs that unwritten
		// blocks read as zeros, which they do not through a cipher.
		"-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0",
	}
}

// BytesPerInode is the default ratio for a file system of size bytes. One inode
// costs 256 bytes: on large disks, which hold Borg's segments of 500 MB, mke2fs's
// usual 16 KiB would waste 1.6 % of the disk and much of e2fsck's time.
func BytesPerInode(size int64) int64 {
	if size >= 256*gibi {
		return 64 << 10
	}
	return 16 << 10
}

// MakeFileSystem makes an empty ext4 file system in the volume at path.
// bytesPerInode 0 means BytesPerInode.
func MakeFileSystem(ctx context.Context, path string, key secret.Bytes, bytesPerInode int64) (err error) {
	program, err := lookUp("mke2fs")
	if err != nil {
		return hint.Because(errors.New("mke2fs is missing"), "apt install e2fsprogs")
	}
	v, err := Open(path, key, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.Close()) }()
	if bytesPerInode == 0 {
		bytesPerInode = BytesPerInode(v.Size())
	}
	// It holds an empty file system, and nothing secret.
	dir, err := os.MkdirTemp("", "farkeep-ext4-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	plain, err := os.OpenFile(filepath.Join(dir, "plain"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer plain.Close()
	if err := plain.Truncate(v.Size()); err != nil {
		return fmt.Errorf("make a sparse file of %d bytes in %s: %w", v.Size(), dir, err)
	}
	cmd := exec.CommandContext(ctx, program, append(ext4Options(v.Size(), bytesPerInode), plain.Name())...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "MKE2FS_CONFIG=/dev/null")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("mke2fs: %w: %s", err, strings.Join(strings.Fields(string(out)), " "))
	}
	return v.writeFrom(ctx, plain)
}

// lookUp finds a program that Debian keeps where only root looks.
func lookUp(name string) (string, error) {
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	return exec.LookPath(filepath.Join("/usr/sbin", name))
}
