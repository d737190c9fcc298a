// Package stockdebian plays the live stick of somebody who never heard of
// Farkeep: a stock Debian with cryptsetup, Borg, e2fsprogs, age and OpenSSH, in an
// emulated PC. Kernel, modules, programs and their configuration are Debian's own,
// fetched and verified by apt and set up by dpkg. Ours are the first process, which
// mounts, starts udev and gives a root shell on a terminal, and the initramfs that
// leads to it: systemd and Debian's own initramfs take a minute of an emulated
// processor, and these take ten seconds. So nothing here shows that a unit of
// systemd works.
//
// Make builds the stick's disk image, once; Boot starts a machine with it, and with
// whatever disks are put on; Machine.Run pastes commands into its shell. What
// the machine writes, to the stick or to a disk, is gone with it unless the disk
// was put on for writing.
//
// It needs root, mmdebstrap, qemu-system-x86 and e2fsprogs. There is no use of KVM.
package stockdebian

import (
	"bytes"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"farkeep/image/debian"
	"farkeep/image/initramfs"
	"farkeep/image/kmodules"
	"farkeep/shared/hint"
)

// Release is the Debian on the stick.
const Release = "trixie"

// packages are what docs/recovery.md tells a user to have, and what a Debian that
// boots has anyway, and for a home that is rebuilt. busybox-static serves our initramfs.
var packages = []string{
	"linux-image-amd64", "udev", "kmod", "iproute2", "busybox-static",
	"cryptsetup", "borgbackup", "e2fsprogs", "age", "gddrescue", "openssh-client", "wireguard-tools", "nftables",
}

//go:embed guest/init
var guestInit []byte

//go:embed guest/hands
var guestHands []byte

//go:embed guest/initramfs
var guestInitramfs []byte

// Stick is a stick's content, ready to boot.
type Stick struct {
	Image     string // ext4, read-only for machines
	Kernel    string
	Initramfs string
	Packages  string // a list of what is installed, "name version" in each line
}

const (
	imageSize = "1500M" // sparse; about 400 MB are written
	maxWait   = 20 * time.Minute
)

// Make builds a stick below the folder cache, unless one of the same recipe lies
// there already: then nothing is downloaded. It takes about a minute and 150 MB of
// downloads.
func Make(ctx context.Context, cache string, mirror debian.Mirror, log *slog.Logger) (*Stick, error) {
	recipe := sha256.New()
	for _, part := range append([]string{Release, imageSize, string(guestInit), string(guestHands), string(guestInitramfs)}, packages...) {
		fmt.Fprintf(recipe, "%d %s\n", len(part), part)
	}
	dir := filepath.Join(cache, "stockdebian-"+hex.EncodeToString(recipe.Sum(nil)[:8]))
	s := &Stick{filepath.Join(dir, "stick.ext4"), filepath.Join(dir, "vmlinuz"), filepath.Join(dir, "initramfs"), filepath.Join(dir, "packages")}
	unlock, err := lock(ctx, cache)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if _, err := os.Stat(dir); err == nil {
		return s, nil
	}
	if os.Geteuid() != 0 {
		return nil, hint.Because(errors.New("a stock Debian is set up by dpkg, which needs root"), "run this as root")
	}
	for _, tool := range []struct{ name, pkg string }{{"mmdebstrap", "mmdebstrap"}, {"mke2fs", "e2fsprogs"}} {
		if err := debian.Tool(tool.name, tool.pkg); err != nil {
			return nil, err
		}
	}
	// Sticks of older recipes, and what a killed run left.
	old, err := filepath.Glob(filepath.Join(cache, "stockdebian-*"))
	if err != nil {
		return nil, err
	}
	for _, o := range old {
		if err := os.RemoveAll(o); err != nil {
			return nil, fmt.Errorf("remove an older stick: %w", err)
		}
	}
	log.Info("making a stock Debian", "release", Release)
	part := dir + ".part"
	if err := os.MkdirAll(part, 0o700); err != nil {
		return nil, err
	}
	defer os.RemoveAll(part)
	if err := makeStick(ctx, part, mirror); err != nil {
		return nil, fmt.Errorf("make a stock Debian: %w", err)
	}
	return s, os.Rename(part, dir)
}

// lock keeps two runs from making the same stick.
func lock(ctx context.Context, cache string) (func(), error) {
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(cache, "stockdebian.lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, maxWait)
	defer cancel()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("wait for another run that makes a stock Debian (it holds %s): %w", f.Name(), ctx.Err())
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func makeStick(ctx context.Context, dir string, mirror debian.Mirror) error {
	root := filepath.Join(dir, "root")
	args := []string{
		"--mode=root", "--variant=minbase", "--format=directory", "--architectures=amd64", "--quiet",
		`--aptopt=Acquire::Languages "none"`, `--aptopt=Acquire::Retries "3"`,
		"--include=" + strings.Join(packages, ","),
		Release, root, "deb " + mirror.Archive + " " + Release + " main",
	}
	if mirror.Security != "" {
		args = append(args, "deb "+mirror.Security+" "+Release+"-security main")
	}
	if err := run(ctx, "mmdebstrap", args...); err != nil {
		return hint.Because(err, "see whether the mirror %s can be reached", mirror.Archive)
	}
	list, err := exec.CommandContext(ctx, "dpkg-query", "--admindir="+filepath.Join(root, "var/lib/dpkg"), "-W", "-f", "${Package} ${Version}\n").Output()
	if err != nil {
		return fmt.Errorf("list the packages: %w", err)
	}
	own := filepath.Join(root, "usr/local/lib/farkeep")
	if err := os.Mkdir(own, 0o755); err != nil {
		return err
	}
	if err := errors.Join(
		os.WriteFile(filepath.Join(dir, "packages"), list, 0o600),
		os.WriteFile(filepath.Join(own, "init"), guestInit, 0o755),
		os.WriteFile(filepath.Join(own, "hands"), guestHands, 0o644),
		os.WriteFile(filepath.Join(root, "etc/hostname"), []byte("stick\n"), 0o644),
	); err != nil {
		return err
	}
	if err := writeInitramfs(root, filepath.Join(dir, "initramfs")); err != nil {
		return err
	}
	kernel, err := one(filepath.Join(root, "boot/vmlinuz-*"))
	if err != nil {
		return err
	}
	if err := os.Rename(kernel, filepath.Join(dir, "vmlinuz")); err != nil {
		return err
	}
	// No journal: nobody keeps what is written to it.
	if err := run(ctx, "mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", root, filepath.Join(dir, "stick.ext4"), imageSize); err != nil {
		return err
	}
	return os.RemoveAll(root)
}

// writeInitramfs makes the archive that mounts the stick: busybox and the modules
// for a virtio disk and ext4.
func writeInitramfs(root, path string) error {
	modules, err := one(filepath.Join(root, "usr/lib/modules/*"))
	if err != nil {
		return err
	}
	index, err := kmodules.Load(kmodules.Dir(modules))
	if err != nil {
		return err
	}
	names, err := index.Closure([]string{"virtio_blk", "virtio_pci", "ext4", "crc32c"})
	if err != nil {
		return err
	}
	files, err := index.Files(names)
	if err != nil {
		return err
	}
	busybox, err := os.ReadFile(filepath.Join(root, "usr/bin/busybox"))
	if err != nil {
		return err
	}
	var tree initramfs.Tree
	err = errors.Join(tree.Dir("proc", 0o755), tree.Dir("dev", 0o755), tree.Dir("root", 0o755),
		tree.Char("dev/console", 0o600, 5, 1),
		tree.File("bin/busybox", 0o755, busybox), tree.File("init", 0o755, guestInitramfs))
	for _, f := range files {
		err = errors.Join(err, tree.File("lib/modules/"+filepath.Base(modules)+"/"+f.Path, 0o644, f.Data))
	}
	if err != nil {
		return err
	}
	// Uncompressed: an emulated processor is slow at it.
	var archive bytes.Buffer
	if err := tree.Write(&archive, time.Unix(0, 0)); err != nil {
		return err
	}
	return os.WriteFile(path, archive.Bytes(), 0o600)
}

// MemoryStick makes an image, at path, of a stick with FAT on it, as every system
// reads and writes them, and puts the content of a folder on it. It needs the
// packages dosfstools and mtools.
func MemoryStick(ctx context.Context, folder, path string) error {
	for _, tool := range []struct{ name, pkg string }{{"mkfs.vfat", "dosfstools"}, {"mcopy", "mtools"}} {
		if err := debian.Tool(tool.name, tool.pkg); err != nil {
			return err
		}
	}
	entries, err := os.ReadDir(folder)
	if err != nil {
		return err
	}
	copying := []string{"-Q", "-s", "-i", path}
	for _, e := range entries {
		copying = append(copying, filepath.Join(folder, e.Name()))
	}
	var size int64
	err = filepath.WalkDir(folder, func(_ string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		info, err := e.Info()
		if err == nil {
			size += info.Size() + 64<<10 // more than its last cluster
		}
		return err
	})
	if err != nil {
		return err
	}
	if err := run(ctx, "mkfs.vfat", "-C", path, fmt.Sprint(size>>10+64<<10)); err != nil {
		return err
	}
	return run(ctx, "mcopy", append(copying, "::")...)
}

func one(pattern string) (string, error) {
	found, err := filepath.Glob(pattern)
	if err == nil && len(found) != 1 {
		err = fmt.Errorf("%s: %d files, expected one: %w", pattern, len(found), fs.ErrInvalid)
	}
	if err != nil {
		return "", err
	}
	return found[0], nil
}

func run(ctx context.Context, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8", "DEBIAN_FRONTEND=noninteractive")
	cmd.WaitDelay = 5 * time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		return fmt.Errorf("%s: %w: %s", name, err, strings.Join(lines[max(0, len(lines)-5):], "; "))
	}
	return nil
}
