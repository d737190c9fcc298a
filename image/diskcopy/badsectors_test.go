package diskcopy_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"farkeep/image/diskcopy"
	"farkeep/shared/generations"
	gentest "farkeep/shared/generations/generationstest"

	"github.com/google/go-cmp/cmp"
	fusefs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/pelletier/go-toml/v2"
	"golang.org/x/sys/unix"
)

const blockSize = 4096

// dying is a disk with bad sectors: a file on which reads of some blocks are EIO,
// behind a loop device. The kernel's file system meets them as it would on a disk.
type dying struct {
	fusefs.Inode
	image string
	bad   map[int64]bool // blocks
}

var (
	_ fusefs.NodeOnAdder   = (*dying)(nil)
	_ fusefs.NodeOpener    = (*sectors)(nil)
	_ fusefs.NodeReader    = (*sectors)(nil)
	_ fusefs.NodeGetattrer = (*sectors)(nil)
)

func (d *dying) OnAdd(ctx context.Context) {
	d.AddChild("disk", d.NewPersistentInode(ctx, &sectors{disk: d}, fusefs.StableAttr{Mode: fuse.S_IFREG}), false)
}

type sectors struct {
	fusefs.Inode
	disk *dying
}

func (s *sectors) Open(context.Context, uint32) (fusefs.FileHandle, uint32, syscall.Errno) {
	f, err := os.Open(s.disk.image)
	return f, 0, fusefs.ToErrno(err)
}

func (s *sectors) Getattr(_ context.Context, _ fusefs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	info, err := os.Stat(s.disk.image)
	if err == nil {
		out.Mode, out.Size = 0o600, uint64(info.Size())
	}
	return fusefs.ToErrno(err)
}

func (s *sectors) Read(_ context.Context, f fusefs.FileHandle, b []byte, at int64) (fuse.ReadResult, syscall.Errno) {
	for block := at / blockSize; block*blockSize < at+int64(len(b)); block++ {
		if s.disk.bad[block] {
			return nil, syscall.EIO
		}
	}
	n, _ := f.(*os.File).ReadAt(b, at)
	return fuse.ReadResultData(b[:n]), 0
}

// tool runs a program, and returns what it says.
func tool(tb testing.TB, pkg, name string, args ...string) string {
	tb.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		tb.Fatalf("%s (package %s) %s: %v\n%s", name, pkg, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// attach makes a block device of the disk, read-only.
func (d *dying) attach(tb testing.TB) (device string) {
	tb.Helper()
	folder := tb.TempDir()
	never := time.Duration(0)
	o := &fusefs.Options{AttrTimeout: &never, EntryTimeout: &never}
	o.MountOptions = fuse.MountOptions{FsName: "dying", Name: "dying", DirectMountStrict: true, DirectMountFlags: unix.MS_NOSUID | unix.MS_NODEV}
	server, err := fusefs.Mount(folder, d, o)
	if err != nil {
		tb.Fatal("mount by FUSE, as root: ", err)
	}
	tb.Cleanup(func() {
		// Whoever looks at all loop devices just now holds it for a moment longer.
		if err := unix.Unmount(folder, unix.MNT_DETACH); err != nil {
			tb.Error(err)
		}
		server.Wait()
	})
	device = tool(tb, "mount", "losetup", "--read-only", "--find", "--show", folder+"/disk")
	tb.Cleanup(func() { tool(tb, "mount", "losetup", "--detach", device) })
	return device
}

// mountOld mounts a device as docs/disk.md says that a dying disk is mounted.
func mountOld(tb testing.TB, device string) (folder string) {
	tb.Helper()
	folder = tb.TempDir()
	if err := unix.Mount(device, folder, "ext4", unix.MS_RDONLY, "noload"); err != nil {
		tb.Fatalf("mount %s: %v", device, err)
	}
	tb.Cleanup(func() {
		if err := unix.Unmount(folder, 0); err != nil {
			tb.Error(err)
		}
	})
	return folder
}

// places are the blocks of an image, by what lies in them.
type places struct{ data, folders, inodes map[string][]int64 }

// oldImage is the old disk as an image of a file system, and where what lies.
func oldImage(tb testing.TB) (image, tree string, photos []string, where places) {
	tb.Helper()
	tree, photos = oldDisk(tb)
	image = filepath.Join(tb.TempDir(), "disk.img")
	tool(tb, "e2fsprogs", "mke2fs", "-q", "-F", "-t", "ext4", "-N", "4096", "-b", strconv.Itoa(blockSize), "-d", tree, image, "48M")
	where = places{map[string][]int64{}, map[string][]int64{}, map[string][]int64{}}
	folder := mountOld(tb, loop(tb, image))
	var ask strings.Builder
	var asked []string
	err := filepath.WalkDir(folder, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(folder, path)
		info, err := e.Info()
		if err != nil {
			return err
		}
		blocks := extents(tb, path)
		switch {
		case rel == ".", rel == generations.GenerationsFolder, strings.HasPrefix(rel, "lost+found"):
		case e.IsDir():
			where.folders[rel] = blocks
		case len(blocks) > 0:
			where.data[rel] = blocks
		}
		fmt.Fprintf(&ask, "imap <%d>\n", info.Sys().(*syscall.Stat_t).Ino)
		asked = append(asked, rel)
		return nil
	})
	if err != nil {
		tb.Fatal(err)
	}
	cmd := exec.Command("debugfs", "-f", "-", image)
	cmd.Stdin = strings.NewReader(ask.String())
	out, err := cmd.CombinedOutput()
	found := regexp.MustCompile(`located at block (\d+)`).FindAllSubmatch(out, -1)
	if err != nil || len(found) != len(asked) {
		tb.Fatalf("debugfs (package e2fsprogs): %v, %d places of %d inodes\n%.2000s", err, len(found), len(asked), out)
	}
	for i, m := range found {
		n, _ := strconv.ParseInt(string(m[1]), 10, 64)
		where.inodes[asked[i]] = []int64{n}
	}
	// Without these two folders nothing is to be found.
	top, all := where.inodes["."], where.inodes[generations.GenerationsFolder]
	maps.DeleteFunc(where.inodes, func(_ string, at []int64) bool { return at[0] == top[0] || at[0] == all[0] })
	return image, tree, photos, where
}

func loop(tb testing.TB, image string) (device string) {
	tb.Helper()
	device = tool(tb, "mount", "losetup", "--read-only", "--find", "--show", image)
	tb.Cleanup(func() { tool(tb, "mount", "losetup", "--detach", device) })
	return device
}

// extents returns the blocks in which a file or a folder lies (FS_IOC_FIEMAP,
// Documentation/filesystems/fiemap.rst).
func extents(tb testing.TB, path string) (blocks []int64) {
	tb.Helper()
	f, err := os.Open(path)
	if err != nil {
		tb.Fatal(err)
	}
	defer f.Close()
	type extent struct {
		logical, physical, length uint64
		_                         [2]uint64
		flags                     uint32
		_                         [3]uint32
	}
	var m struct {
		start, length              uint64
		flags, mapped, count, zero uint32
		extents                    [64]extent
	}
	m.length, m.count = ^uint64(0), uint32(len(m.extents))
	const fiemap = 0xc020660b
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fiemap, uintptr(unsafe.Pointer(&m))); errno != 0 {
		tb.Fatalf("FIEMAP %s: %v", path, errno)
	}
	for _, e := range m.extents[:m.mapped] {
		for at := uint64(0); at < e.length; at += blockSize {
			blocks = append(blocks, int64((e.physical+at)/blockSize))
		}
	}
	return blocks
}

// verdict is what is left of the tree on the old disk.
type verdict struct {
	good  map[string]bool // paths that are as they were
	whole map[string]bool // generations, repository/name, without any damage
	saved map[string]bool // contents that some file still has
}

// look compares a damaged disk with what was on it, by nothing but reading.
func look(tb testing.TB, tree, disk string) verdict {
	tb.Helper()
	v := verdict{map[string]bool{}, map[string]bool{}, map[string]bool{}}
	home := filepath.Join(tree, generations.GenerationsFolder)
	err := filepath.WalkDir(home, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(home, path)
		parts := strings.SplitN(rel, "/", 3)
		there := filepath.Join(disk, generations.GenerationsFolder, rel)
		good := false
		if e.IsDir() {
			_, err := os.ReadDir(there)
			good = err == nil
		} else {
			want, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			got, err := os.ReadFile(there)
			if good = err == nil && bytes.Equal(got, want); good && len(parts) == 3 && strings.HasPrefix(parts[2], "files/") {
				v.saved[string(want)] = true
			}
		}
		v.good[rel] = good
		if len(parts) > 1 && !strings.HasPrefix(parts[1], ".") {
			generation := parts[0] + "/" + parts[1]
			if was, known := v.whole[generation]; !known || was {
				v.whole[generation] = good
			}
		}
		return nil
	})
	if err != nil {
		tb.Fatal(err)
	}
	return v
}

// salvaged salvages a damaged disk, and judges what came of it: what is lost, as
// "repository/generation/path".
func salvaged(t *testing.T, tree, old string) (lost []string) {
	t.Helper()
	v := look(t, tree, old)
	to := newDisk(t)
	report, err := diskcopy.Copy(t.Context(), old, to, diskcopy.Options{Salvage: true, Lost: func(l diskcopy.Loss) {
		if l.What == "" || l.Repository+l.Path == "" {
			t.Errorf("%+v does not say what or where", l)
		}
		lost = append(lost, path.Join(l.Repository, l.Generation, l.Path))
	}})
	if err != nil {
		t.Fatal(err)
	}
	if report.Lost != int64(len(lost)) {
		t.Errorf("%d are told, %d counted", len(lost), report.Lost)
	}
	named := map[string]bool{}
	for _, l := range lost {
		if named[l] {
			t.Errorf("%s is named twice", l)
		}
		named[l] = true
	}
	// Every file is on the new disk as it was, or is named: itself, or what it lay in.
	damaged := 0
	for rel, good := range v.good {
		want := filepath.Join(tree, generations.GenerationsFolder, rel)
		info, err := os.Lstat(want)
		if err != nil {
			t.Fatal(err)
		}
		if info.IsDir() || filepath.Base(rel) == ".sequence" {
			continue
		}
		if !good {
			damaged++
		}
		is := sameFile(t, want, filepath.Join(to, generations.GenerationsFolder, rel))
		parts := strings.SplitN(rel, "/", 3)
		below, inFiles := strings.CutPrefix(parts[2], "files/")
		name := path.Join(parts[0], parts[1], below)
		_, gone := os.Lstat(filepath.Join(to, generations.GenerationsFolder, parts[0], parts[1]))
		// No list says any more what was in it; or that there was one.
		within := named[parts[0]+"/"+parts[1]+"/files"] || named[parts[0]] && errors.Is(gone, fs.ErrNotExist)
		switch {
		case is && named[name] && below != generations.SumsFile: // which was made anew
			t.Errorf("%s is named, and is there", name)
		case !is && !named[name] && !within:
			t.Errorf("%s is not there, and nobody says so", name)
		case !is && good && inFiles && gone == nil && !within:
			t.Errorf("%s could be read, and is not there", name)
		case !is && inFiles && !within && v.saved[string(content(t, want))]:
			t.Errorf("%s has its content in another place, and is not there", name)
		}
	}
	// What had no damage is whole, by the appliance's own measure and by b2sum.
	s := openStore(t, to)
	defer s.Close()
	whole := 0
	for generation, is := range v.whole {
		if !is {
			continue
		}
		whole++
		repository, name, _ := strings.Cut(generation, "/")
		if r, err := s.Verify(t.Context(), repository, name, nil); err != nil || r.Bad != 0 || r.Files == 0 {
			t.Errorf("%s had no damage: %+v, %v", generation, r, err)
		}
		cmd := exec.Command("b2sum", "-l", "256", "--strict", "--quiet", "-c", generations.SumsFile)
		cmd.Dir = filepath.Join(to, generations.GenerationsFolder, generation)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("b2sum (package coreutils) in %s: %v\n%s", generation, err, out)
		}
	}
	// And it is a disk to go on with.
	for _, repository := range []string{"photos", "docs"} {
		gentest.Push(t, s, repository, gentest.Tree{"after": "after the salvage"})
	}
	t.Logf("%d names of %d could not be read; %d generations of %d without damage; %d losses named, %d names found elsewhere",
		damaged, len(v.good), whole, len(v.whole), len(lost), report.Found)
	slices.Sort(lost)
	return lost
}

func content(tb testing.TB, path string) []byte {
	tb.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		tb.Fatal(err)
	}
	return data
}

func sameFile(tb testing.TB, want, got string) bool {
	tb.Helper()
	data, err := os.ReadFile(got)
	return err == nil && bytes.Equal(data, content(tb, want))
}

// rescue makes an image of a dying disk by the command of docs/disk.md.
func rescue(tb testing.TB, device string) (image string) {
	tb.Helper()
	image = filepath.Join(tb.TempDir(), "old.img")
	tool(tb, "gddrescue", "ddrescue", "-d", device, image, image+".map")
	return image
}

// TestBadSectors: a disk on which the kernel meets bad sectors, in files, lists,
// folders and inodes, is salvaged, directly and by an image of ddrescue.
func TestBadSectors(t *testing.T) {
	image, tree, photos, where := oldImage(t)
	at := func(i int, path string) string { return "generations/photos/" + photos[i] + "/" + path }
	bad := map[int64]bool{}
	hit := func(blocks []int64, i int) {
		t.Helper()
		if len(blocks) == 0 {
			t.Fatal("it lies nowhere")
		}
		bad[blocks[i%len(blocks)]] = true
	}
	hit(where.data[at(0, "files/keep")], 40)     // shared by all
	hit(where.data[at(2, "files/twin/a")], 3)    // tool.x has the content too
	hit(where.data[at(3, "files/day")], 0)       // in one generation
	hit(where.folders[at(3, "files/data/1")], 0) // the generation before has them
	hit(where.data[at(2, "MANIFEST")], 0)        // by SUMS.b2 then
	hit(where.data[at(1, "SUMS.b2")], 0)         // made anew
	want := []string{}
	for i, g := range photos {
		want = append(want, "photos/"+g+"/keep")
		switch i {
		case 1:
			want = append(want, "photos/"+g+"/SUMS.b2")
		case 2:
			want = append(want, "photos/"+g+"/MANIFEST")
		case 3:
			want = append(want, "photos/"+g+"/day")
		}
	}
	slices.Sort(want)
	device := (&dying{image: image, bad: bad}).attach(t)
	t.Run("directly", func(t *testing.T) {
		if diff := cmp.Diff(want, salvaged(t, tree, mountOld(t, device))); diff != "" {
			t.Error(diff)
		}
	})
	t.Run("by ddrescue", func(t *testing.T) {
		if diff := cmp.Diff(want, salvaged(t, tree, mountOld(t, loop(t, rescue(t, device))))); diff != "" {
			t.Error(diff)
		}
	})
}

// TestBadSectorsInLists: where no list says what there should be, the disk's own
// names do, and what is not even known by name is told for the folder that it was in.
func TestBadSectorsInLists(t *testing.T) {
	image, tree, photos, where := oldImage(t)
	g := "generations/photos/" + photos[1]
	bad := map[int64]bool{where.folders["generations/docs"][0]: true}
	for _, list := range []string{"MANIFEST", "SUMS.b2", "generation.toml"} {
		bad[where.data[g+"/"+list][0]] = true
	}
	bad[where.data[g+"/files/day"][0]] = true
	bad[where.data["generations/photos/.sequence"][0]] = true
	bad[where.data[".farkeep/clock.toml"][0]] = true
	old := mountOld(t, (&dying{image: image, bad: bad}).attach(t))
	var want []string
	for _, name := range []string{"MANIFEST", "SUMS.b2", "day", "files", "generation.toml"} {
		want = append(want, "photos/"+photos[1]+"/"+name)
	}
	if diff := cmp.Diff(append([]string{".farkeep/clock.toml", "docs", "docs/.sequence", "photos/.sequence"}, want...), salvaged(t, tree, old)); diff != "" {
		t.Error(diff)
	}
	to := newDisk(t)
	if _, err := diskcopy.Copy(t.Context(), old, to, diskcopy.Options{Salvage: true}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"keep", "twin/b", "data/3/19"} {
		if !sameFile(t, filepath.Join(tree, g, "files", name), filepath.Join(to, g, "files", name)) {
			t.Errorf("%s can be read, and is not on the new disk", name)
		}
	}
	// An ordinary copy of such a disk says so before it begins.
	if _, err := diskcopy.Copy(t.Context(), old, newDisk(t), diskcopy.Options{}); err == nil || !strings.Contains(err.Error(), "docs: its folder cannot be read to its end") {
		t.Error(err)
	}
}

// TestHiddenGenerations: generations whose names are lost come back by docs/disk.md:
// e2fsck on the image hangs them into lost+found, and they say what they are.
func TestHiddenGenerations(t *testing.T) {
	image, tree, _, where := oldImage(t)
	device := (&dying{image: image, bad: map[int64]bool{where.folders["generations/docs"][0]: true}}).attach(t)
	rescued := rescue(t, device)
	if out, err := exec.Command("e2fsck", "-fy", rescued).CombinedOutput(); err != nil {
		if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() > 2 {
			t.Fatalf("e2fsck (package e2fsprogs): %v\n%s", err, out)
		}
	}
	device = tool(t, "mount", "losetup", "--find", "--show", rescued)
	t.Cleanup(func() { tool(t, "mount", "losetup", "--detach", device) })
	folder := t.TempDir()
	if err := unix.Mount(device, folder, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(folder, 0); err != nil {
			t.Error(err)
		}
	})
	hidden, err := filepath.Glob(folder + "/lost+found/*/generation.toml")
	if err != nil || len(hidden) != 5 {
		t.Fatalf("found again: %q, %v", hidden, err)
	}
	for _, list := range hidden {
		var g struct {
			Sequence  int64
			Committed time.Time
		}
		if err := toml.Unmarshal(content(t, list), &g); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Dir(list), filepath.Join(folder, "generations/docs", generations.Name(g.Sequence, g.Committed))); err != nil {
			t.Fatal(err)
		}
	}
	if lost := salvaged(t, tree, folder); len(lost) != 0 {
		t.Errorf("lost: %q", lost)
	}
}

// TestBadSectorsAnywhere: wherever they are, what is not named is whole.
func TestBadSectorsAnywhere(t *testing.T) {
	image, tree, _, where := oldImage(t)
	seed := uint64(time.Now().UnixNano())
	t.Log("seed ", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	kinds := []map[string][]int64{where.data, where.data, where.folders, where.inodes}
	for try := range 3 {
		bad := map[int64]bool{}
		for range 1 + random.IntN(6) {
			kind := kinds[random.IntN(len(kinds))]
			names := slices.Sorted(maps.Keys(kind))
			blocks := kind[names[random.IntN(len(names))]]
			bad[blocks[random.IntN(len(blocks))]] = true
		}
		t.Run(strconv.Itoa(try), func(t *testing.T) {
			device := (&dying{image: image, bad: bad}).attach(t)
			old := mountOld(t, device)
			if try%2 == 1 {
				old = mountOld(t, loop(t, rescue(t, device)))
			}
			if lost := salvaged(t, tree, old); t.Failed() {
				t.Logf("bad blocks %v, lost %q", slices.Sorted(maps.Keys(bad)), lost)
			}
		})
	}
}
