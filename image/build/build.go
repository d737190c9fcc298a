// Package build makes the card image: it fetches Debian's kernel, the boot
// firmware and e2fsck, picks the modules that the supported boards need, packs
// them with the appliance into an initramfs and lays everything out on a card.
// It refuses to finish an image that lacks a driver for a supported board. The
// same packages and the same appliance give the same bytes.
package build

import (
	"context"
	"crypto/sha256"
	"debug/elf"
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

	"github.com/pelletier/go-toml/v2"
	"golang.org/x/sys/unix"

	"farkeep/image/debian"
	"farkeep/image/fat"
	"farkeep/image/fdt"
	"farkeep/image/hardware"
	"farkeep/image/initramfs"
	"farkeep/image/kmodules"
	"farkeep/image/sdcard"
	"farkeep/shared/atomicfile"
	"farkeep/shared/card"
	"farkeep/shared/hint"
)

// What is taken from Debian.
const (
	release      = "trixie"
	architecture = "arm64"
	kernelMeta   = "linux-image-arm64"
	kernelPrefix = "linux-image-"
)

// Files in the appliance's initramfs that the appliance reads.
const (
	// ModuleList names the modules to load first, one per line, in order.
	ModuleList = "etc/farkeep-modules"
	// FsckPath is e2fsck, statically linked.
	FsckPath = "sbin/e2fsck"
)

// Options says what to build.
type Options struct {
	Appliance string // path of a linux/arm64 farkeep-appliance
	Out       string // the image
	Contents  string // list of contents to write beside it; "" for none
	Cache     string // directory for downloads, kept between runs
	Mirror    debian.Mirror
	Update    bool // look for newer packages even if the cache has some
	Compress  bool // also write Out + ".xz"
	Log       *slog.Logger
}

// Contents is contents.toml: what an image is made of.
type Contents struct {
	Format    int       `toml:"format"`
	Kernel    string    `toml:"kernel"` // version, as in uname -r
	Time      time.Time `toml:"time"`   // of the kernel package, and of every file in the image
	Boards    []string  `toml:"boards"`
	Appliance string    `toml:"appliance_sha256"`
	Packages  []Package `toml:"package"`
	Modules   []string  `toml:"modules"`
	Files     []File    `toml:"file"` // of slot A; slot B differs in cmdline.txt only
}

// Package is a Debian package that the image was made from.
type Package struct {
	Name         string `toml:"name"`
	Version      string `toml:"version"`
	Architecture string `toml:"architecture"`
	SHA256       string `toml:"sha256"`
}

// File is a file of a boot slot.
type File struct {
	Name   string `toml:"name"`
	Size   int    `toml:"size"`
	SHA256 string `toml:"sha256"`
}

// Result says what was made.
type Result struct {
	Contents   Contents
	Image      string
	Compressed string // "" if not asked for
	SlotBytes  int64  // content of one slot
	Initramfs  int64  // bytes, compressed
}

// Build makes an image.
func Build(ctx context.Context, o Options) (Result, error) {
	appliance, err := readAppliance(o.Appliance)
	if err != nil {
		return Result{}, err
	}
	for _, tool := range []struct{ name, pkg string }{{"depmod", "kmod"}, {"mke2fs", "e2fsprogs"}} {
		if err := debian.Tool(tool.name, tool.pkg); err != nil {
			return Result{}, err
		}
	}
	unlock, err := lock(ctx, o.Cache, o.Log)
	if err != nil {
		return Result{}, err
	}
	defer unlock()
	t, packages, when, err := fetch(ctx, o)
	if err != nil {
		return Result{}, err
	}
	slot, modules, err := t.slot(appliance, when, o.Log)
	if err != nil {
		return Result{}, err
	}
	contents := Contents{
		Format: 1, Kernel: t.version, Time: when, Appliance: sum(appliance),
		Packages: packages, Modules: modules,
	}
	for _, b := range card.SupportedBoards() {
		contents.Boards = append(contents.Boards, b.Name)
	}
	r := Result{Image: o.Out}
	for _, f := range slot {
		contents.Files = append(contents.Files, File{f.Name, len(f.Data), sum(f.Data)})
		r.SlotBytes += int64(len(f.Data))
		if f.Name == card.InitramfsFile {
			r.Initramfs = int64(len(f.Data))
		}
	}
	list, err := toml.Marshal(contents)
	if err != nil {
		return Result{}, fmt.Errorf("list of contents: %w", err)
	}
	r.Contents = contents
	bootcode, err := t.read("usr/lib/raspi-firmware/bootcode.bin")
	if err != nil {
		return Result{}, err
	}
	o.Log.Info("writing the image", "path", o.Out)
	err = sdcard.Write(ctx, o.Out, sdcard.Content{
		Selector: []fat.File{
			// The ROM of a Pi 3 reads bootcode.bin before anything else understands FAT: it lies first.
			{Name: card.BootcodeFile, Data: bootcode},
			{Name: card.AutobootFile, Data: card.AutobootConfig(card.A)},
			{Name: card.ReadmeFile, Data: []byte(strings.ReplaceAll(readme, "\n", "\r\n"))},
			{Name: card.ContentsFile, Data: list},
		},
		SlotA: withCommandLine(slot, card.A),
		SlotB: withCommandLine(slot, card.B),
		Time:  when,
	})
	if err != nil {
		return Result{}, err
	}
	if o.Contents != "" {
		if err := atomicfile.Write(o.Contents, list, 0o644); err != nil {
			return Result{}, err
		}
	}
	if o.Compress {
		r.Compressed = o.Out + ".xz"
		o.Log.Info("compressing the image", "path", r.Compressed)
		return r, sdcard.Compress(ctx, o.Out, r.Compressed)
	}
	return r, nil
}

func sum(data []byte) string {
	h := sha256.Sum256(data)
	return hex.EncodeToString(h[:])
}

// readAppliance makes sure that the program can run as PID 1 of the image: an
// arm64 executable that needs no dynamic linker.
func readAppliance(path string) ([]byte, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, hint.Because(fmt.Errorf("read the appliance: %w", err),
			"build it with: CGO_ENABLED=0 GOOS=linux GOARCH=arm64 go build -trimpath -o farkeep-appliance-arm64 ./appliance")
	}
	bad := func(what string) error {
		return hint.Because(fmt.Errorf("%s: %s", path, what),
			"the appliance must be a static linux/arm64 program: CGO_ENABLED=0 GOOS=linux GOARCH=arm64 go build")
	}
	f, err := elf.Open(path)
	if err != nil {
		return nil, bad("not an ELF program")
	}
	defer f.Close()
	if f.Machine != elf.EM_AARCH64 || f.Class != elf.ELFCLASS64 {
		return nil, bad(fmt.Sprintf("built for %v, not for arm64", f.Machine))
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return nil, bad("linked dynamically")
		}
	}
	return data, nil
}

// maxWait is how long a build waits for another one that uses the same cache.
const maxWait = 30 * time.Minute

// lock keeps a second build from changing the cache under the first one's feet.
func lock(ctx context.Context, cache string, log *slog.Logger) (unlock func(), err error) {
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return nil, fmt.Errorf("cache directory: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(cache, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cache directory: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, maxWait)
	defer cancel()
	for said := false; ; said = true {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", cache, err)
		}
		if !said {
			log.Info("waiting for another build to finish", "cache", cache)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, hint.Because(fmt.Errorf("wait for another build that uses %s: %w", cache, ctx.Err()), "name another folder with --cache")
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// fetch downloads the packages and unpacks them, unless both is done already.
func fetch(ctx context.Context, o Options) (*tree, []Package, time.Time, error) {
	none := func(err error) (*tree, []Package, time.Time, error) { return nil, nil, time.Time{}, err }
	archive, err := debian.Open(ctx, filepath.Join(o.Cache, "debian-"+release), o.Mirror, release, architecture, o.Log)
	if err != nil {
		return none(err)
	}
	if o.Update {
		if err := archive.Update(ctx); err != nil {
			return none(err)
		}
	}
	packages, files, err := download(ctx, archive)
	if err != nil && !o.Update && ctx.Err() == nil {
		// A security update has replaced what the kept lists name, and the mirror forgot the old version.
		o.Log.Info("the kept package lists are out of date", "error", err)
		if err := archive.Update(ctx); err != nil {
			return none(err)
		}
		packages, files, err = download(ctx, archive)
	}
	if err != nil {
		return none(err)
	}
	var out []Package
	digests := sha256.New()
	for _, p := range packages {
		out = append(out, Package{p.Name, p.Version, p.Architecture, p.SHA256})
		fmt.Fprintln(digests, p.SHA256)
	}
	when, err := debian.BuildTime(files[0])
	if err != nil {
		return none(err)
	}
	root := filepath.Join(o.Cache, unpackedPrefix+hex.EncodeToString(digests.Sum(nil)[:8]))
	if _, err := os.Stat(root); errors.Is(err, fs.ErrNotExist) {
		if err := unpack(ctx, archive, files, root, o.Log); err != nil {
			return none(err)
		}
	}
	version, err := kernelVersion(root)
	if err != nil {
		return none(err)
	}
	return &tree{root: root, version: version}, out, when, nil
}

const unpackedPrefix = "unpacked-"

// unpack makes root, complete with depmod's files, in place of the trees of
// older packages. Unpacking and depmod take most of a first build's time.
func unpack(ctx context.Context, archive *debian.Archive, files []string, root string, log *slog.Logger) error {
	old, err := filepath.Glob(filepath.Join(filepath.Dir(root), unpackedPrefix+"*"))
	if err != nil {
		return fmt.Errorf("unpack packages: %w", err)
	}
	for _, dir := range old {
		if err := os.RemoveAll(dir); err != nil {
			return fmt.Errorf("remove older packages: %w", err)
		}
	}
	log.Info("unpacking the packages and indexing the modules")
	work := root + ".part"
	if err := os.RemoveAll(work); err != nil { // of a build that was cut
		return fmt.Errorf("unpack packages: %w", err)
	}
	if err := os.Mkdir(work, 0o755); err != nil {
		return fmt.Errorf("unpack packages: %w", err)
	}
	for _, file := range files {
		if err := archive.Unpack(ctx, file, work); err != nil {
			return err
		}
	}
	if err := depmod(ctx, work); err != nil {
		return err
	}
	if err := os.Rename(work, root); err != nil {
		return fmt.Errorf("unpack packages: %w", err)
	}
	return nil
}

// download takes the kernel that the meta package stands for, so exactly one;
// it comes first.
func download(ctx context.Context, archive *debian.Archive) ([]debian.Package, []string, error) {
	kernel, err := archive.Resolve(ctx, kernelMeta, kernelPrefix)
	if err != nil {
		return nil, nil, err
	}
	packages := []debian.Package{kernel}
	for _, name := range []string{"raspi-firmware", "e2fsck-static"} {
		p, err := archive.Find(ctx, name)
		if err != nil {
			return nil, nil, err
		}
		packages = append(packages, p)
	}
	var files []string
	for _, p := range packages {
		file, err := archive.Fetch(ctx, p)
		if err != nil {
			return nil, nil, err
		}
		files = append(files, file)
	}
	return packages, files, nil
}

// tree is the unpacked packages.
type tree struct {
	root    string
	version string // of the kernel
}

func (t *tree) read(name string) ([]byte, error) {
	data, err := os.ReadFile(filepath.Join(t.root, name))
	if err != nil {
		return nil, fmt.Errorf("unpacked packages: %w", err)
	}
	return data, nil
}

func kernelVersion(root string) (string, error) {
	kernels, err := filepath.Glob(filepath.Join(root, "boot", "vmlinuz-*"))
	if err != nil || len(kernels) != 1 {
		return "", fmt.Errorf("the kernel package holds %d kernels, not one", len(kernels))
	}
	return strings.TrimPrefix(filepath.Base(kernels[0]), "vmlinuz-"), nil
}

// depmod checks the kernel's configuration and indexes its modules.
func depmod(ctx context.Context, root string) error {
	version, err := kernelVersion(root)
	if err != nil {
		return err
	}
	config, err := os.ReadFile(filepath.Join(root, "boot", "config-"+version))
	if err != nil {
		return fmt.Errorf("unpacked packages: %w", err)
	}
	for _, option := range []string{"CONFIG_RD_ZSTD=y", "CONFIG_DEVTMPFS=y", "CONFIG_GPIO_CDEV=y", "CONFIG_SECURITY_LANDLOCK=y"} {
		if !strings.Contains("\n"+string(config), "\n"+option+"\n") {
			return fmt.Errorf("kernel %s lacks %s, which the appliance needs", version, option)
		}
	}
	// depmod wants lib/modules; since trixie the package has usr/lib/modules.
	if _, err := os.Lstat(filepath.Join(root, "lib")); errors.Is(err, fs.ErrNotExist) {
		if err := os.Symlink("usr/lib", filepath.Join(root, "lib")); err != nil {
			return fmt.Errorf("unpacked packages: %w", err)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "depmod", "-b", root, version)
	cmd.WaitDelay = time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("depmod: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}

// slot makes the files of a boot slot, all but cmdline.txt.
func (t *tree) slot(appliance []byte, when time.Time, log *slog.Logger) ([]fat.File, []string, error) {
	kernel, err := t.read("boot/vmlinuz-" + t.version)
	if err != nil {
		return nil, nil, err
	}
	index, err := kmodules.Load(kmodules.Dir(filepath.Join(t.root, "lib", "modules", t.version)))
	if err != nil {
		return nil, nil, err
	}
	dtbDir := filepath.Join("usr/lib/linux-image-"+t.version, "broadcom")
	var dtbs []fat.File
	trees := map[string][]fdt.Node{}
	var all [][]fdt.Node
	for _, b := range card.SupportedBoards() {
		if b.DTB == "" {
			continue
		}
		data, err := t.read(filepath.Join(dtbDir, b.DTB))
		if err != nil {
			return nil, nil, fmt.Errorf("%s: %w", b.Name, err)
		}
		if trees[b.Compatible], err = fdt.Parse(data); err != nil {
			return nil, nil, fmt.Errorf("%s: %w", b.Name, err)
		}
		all = append(all, trees[b.Compatible])
		dtbs = append(dtbs, fat.File{Name: b.DTB, Data: data})
	}
	// Boards that are near enough to start Linux get their tree too, so that the
	// appliance can say on the card that the board is not supported.
	for _, name := range card.RefusedDTBs() {
		data, err := t.read(filepath.Join(dtbDir, name))
		if err != nil {
			return nil, nil, err
		}
		dtbs = append(dtbs, fat.File{Name: name, Data: data})
	}
	names, err := hardware.Modules(index, all)
	if err != nil {
		return nil, nil, err
	}
	modules, err := index.Files(names)
	if err != nil {
		return nil, nil, err
	}
	packed, err := t.initramfs(appliance, modules, when)
	if err != nil {
		return nil, nil, err
	}
	// The check asks the files that go into the image, not the ones that they were picked from.
	inImage, err := kmodules.Load(kmodules.Memory(modules))
	if err != nil {
		return nil, nil, err
	}
	for _, b := range card.SupportedBoards() {
		if _, err := hardware.Check(b, trees[b.Compatible], inImage, kernel); err != nil {
			return nil, nil, fmt.Errorf("the image would not work on every board: %w", err)
		}
	}
	log.Info("picked the kernel modules", "kernel", t.version, "modules", len(names), "initramfs_bytes", len(packed))

	files := []fat.File{
		{Name: card.ConfigFile, Data: []byte(configText)},
		{Name: card.RelayFile, Data: card.RelayConfig(-1, false)},
	}
	for _, name := range []string{"start.elf", "fixup.dat", "start4.elf", "fixup4.dat"} {
		data, err := t.read("usr/lib/raspi-firmware/" + name)
		if err != nil {
			return nil, nil, err
		}
		files = append(files, fat.File{Name: name, Data: data})
	}
	files = append(files, dtbs...)
	return append(files,
		fat.File{Name: card.KernelFile, Data: kernel},
		fat.File{Name: card.InitramfsFile, Data: packed}), names, nil
}

func (t *tree) initramfs(appliance []byte, modules []kmodules.File, when time.Time) ([]byte, error) {
	fsck, err := t.read("usr/sbin/e2fsck.static")
	if err != nil {
		return nil, err
	}
	var r initramfs.Tree
	var errs []error
	for _, dir := range []string{"dev", "etc", "media", "mnt", "proc", "run", "state", "sys", "var"} {
		errs = append(errs, r.Dir(dir, 0o755))
	}
	errs = append(errs,
		r.Dir("tmp", 0o1777),
		r.Char("dev/console", 0o600, 5, 1),
		r.Char("dev/null", 0o666, 1, 3),
		r.File("init", 0o755, appliance),
		r.File(FsckPath, 0o755, fsck),
		r.File(ModuleList, 0o644, []byte(strings.Join(hardware.AlwaysLoaded(), "\n")+"\n")),
	)
	for _, m := range modules {
		errs = append(errs, r.File("lib/modules/"+t.version+"/"+m.Path, 0o644, m.Data))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return r.Compress(when)
}

func withCommandLine(slot []fat.File, s card.Slot) []fat.File {
	line := commandLine + " " + card.CommandLineWords(s) + "\n"
	return append([]fat.File{{Name: card.CmdlineFile, Data: []byte(line)}}, slot...)
}
