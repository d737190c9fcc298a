package kmod

import (
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"farkeep/shared/modname"
)

// tree is a small modules folder with everything that real ones have.
func tree() fstest.MapFS {
	file := func(s string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(s)} }
	return fstest.MapFS{
		"modules.dep": file(`kernel/fs/ext4/ext4.ko.xz: kernel/fs/mbcache.ko kernel/fs/jbd2/jbd2.ko
kernel/fs/mbcache.ko:
kernel/fs/jbd2/jbd2.ko:
kernel/crypto/crc32c_generic.ko:
kernel/drivers/usb/storage/usb-storage.ko: kernel/drivers/scsi/scsi_mod.ko kernel/lib/scsi-common.ko
kernel/drivers/usb/storage/uas.ko: kernel/drivers/usb/storage/usb-storage.ko kernel/drivers/scsi/scsi_mod.ko kernel/lib/scsi-common.ko
kernel/drivers/scsi/scsi_mod.ko: kernel/lib/scsi-common.ko
kernel/lib/scsi-common.ko:
kernel/drivers/scsi/sd_mod.ko: kernel/drivers/scsi/scsi_mod.ko
kernel/a.ko: kernel/b.ko
kernel/b.ko: kernel/a.ko
`),
		"modules.alias": file(`# Aliases extracted from modules themselves.
alias usb:v*p*d*dc*dsc*dp*ic08isc06ip50in* usb_storage
alias usb:v*p*d*dc*dsc*dp*ic08isc06ip62in* uas
alias scsi:t-0x00* sd_mod
alias fs-ext4 ext4
alias crypto-crc32c crc32c_generic
alias snd: with a space usb_storage
`),
		"modules.softdep": file("softdep ext4 pre: crypto-crc32c\nsoftdep usb_storage post: sd_mod missing-module\n"),
		"modules.builtin": file("kernel/lib/crc16.ko\n"),
	}
}

func index(t *testing.T) *Index {
	t.Helper()
	ix, err := ReadIndex(tree())
	if err != nil {
		t.Fatal(err)
	}
	return ix
}

func names(files []string) []string {
	var out []string
	for _, f := range files {
		out = append(out, modname.Canonical(f))
	}
	return out
}

func TestOrder(t *testing.T) {
	ix := index(t)
	for _, tt := range []struct {
		module string
		want   []string
	}{
		{"ext4", []string{"crc32c_generic", "jbd2", "mbcache", "ext4"}},
		{"usb-storage", []string{"scsi_common", "scsi_mod", "usb_storage", "sd_mod"}},
		{"uas", []string{"scsi_common", "scsi_mod", "usb_storage", "sd_mod", "uas"}},
		{"crc16", nil}, // built in
		{"a", []string{"b", "a"}},
	} {
		got, err := ix.Order(tt.module)
		if err != nil {
			t.Errorf("%s: %v", tt.module, err)
		}
		if diff := cmp.Diff(tt.want, names(got)); diff != "" {
			t.Errorf("%s: %s", tt.module, diff)
		}
	}
	if _, err := ix.Order("nonesuch"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}

func TestLookup(t *testing.T) {
	ix := index(t)
	for modalias, want := range map[string][]string{
		"usb:v0781p5581d0100dc00dsc00dp00ic08isc06ip50in00": {"usb_storage"},
		"usb:v0781p5581d0100dc00dsc00dp00ic08isc06ip62in00": {"uas"},
		"usb:v0781p5581d0100dc00dsc00dp00ic09isc00ip00in00": nil,
		"scsi:t-0x00":       {"sd_mod"},
		"usb-storage":       {"usb_storage"}, // a module's own name
		"snd: with a space": {"usb_storage"},
		"":                  nil,
	} {
		if diff := cmp.Diff(want, ix.Lookup(modalias)); diff != "" {
			t.Errorf("%s: %s", modalias, diff)
		}
	}
}

func TestBadIndexes(t *testing.T) {
	for name, content := range map[string]string{
		"modules.dep":     "no colon here\n",
		"modules.alias":   "alias onlyone\n",
		"modules.softdep": "softdep x\n",
	} {
		bad := tree()
		bad[name] = &fstest.MapFile{Data: []byte(content)}
		if _, err := ReadIndex(bad); err == nil || !strings.Contains(err.Error(), name+": line 1: ") {
			t.Errorf("%s: %v", name, err)
		}
	}
	escaping := tree()
	escaping["modules.dep"] = &fstest.MapFile{Data: []byte("../../etc/passwd:\n")}
	if _, err := ReadIndex(escaping); err == nil {
		t.Error("a file outside the modules folder was accepted")
	}
	for _, name := range []string{"modules.dep", "modules.alias"} {
		missing := tree()
		delete(missing, name)
		if _, err := ReadIndex(missing); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("without %s: %v", name, err)
		}
	}
	optional := tree()
	delete(optional, "modules.softdep")
	delete(optional, "modules.builtin")
	if _, err := ReadIndex(optional); err != nil {
		t.Error(err)
	}
}

// loader records what would be loaded and answers as told.
func loader(t *testing.T, sys string, answers map[string]error) (*Loader, *[]string) {
	t.Helper()
	var loaded []string
	l := newLoader(index(t), "/m", sys, slog.New(slog.DiscardHandler), func(file string) error {
		loaded = append(loaded, modname.Canonical(path.Base(file)))
		return answers[modname.Canonical(path.Base(file))]
	})
	return l, &loaded
}

func TestLoad(t *testing.T) {
	l, loaded := loader(t, "", map[string]error{"jbd2": unix.EEXIST, "mbcache": unix.ENODEV})
	for range 2 { // the second time nothing is left to do
		if err := l.Load("ext4"); err != nil {
			t.Error(err)
		}
	}
	if want := []string{"crc32c_generic", "jbd2", "mbcache", "ext4"}; !slices.Equal(*loaded, want) {
		t.Errorf("loaded %v", *loaded)
	}
	l, loaded = loader(t, "", map[string]error{"jbd2": unix.EINVAL})
	err := l.Load("ext4")
	if !errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), "load module jbd2") {
		t.Errorf("got %v", err)
	}
	if !slices.Contains(*loaded, "ext4") {
		t.Error("a failed dependency kept the module from being tried")
	}
}

func TestLoadList(t *testing.T) {
	file := filepath.Join(t.TempDir(), "list")
	if err := os.WriteFile(file, []byte("# first\nsd_mod\nnonesuch\nmbcache\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	l, loaded := loader(t, "", nil)
	n, err := l.LoadList(file)
	if n != 3 || err == nil || !strings.Contains(err.Error(), "module nonesuch") {
		t.Errorf("%d, %v", n, err)
	}
	if want := []string{"scsi_common", "scsi_mod", "sd_mod", "mbcache"}; !slices.Equal(*loaded, want) {
		t.Errorf("loaded %v", *loaded)
	}
	if _, err := l.LoadList(file + ".missing"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}

// A device that appears because its bus was loaded is found as well.
func TestColdplug(t *testing.T) {
	root := t.TempDir()
	device := func(name, modalias string) {
		dir := filepath.Join(root, "devices", name)
		if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, "modalias"), []byte(modalias+"\n"), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	device("usb1/1-1", "usb:v0781p5581d0100dc00dsc00dp00ic08isc06ip62in00")
	device("usb1/1-2", "usb:v0781p5581d0100dc00dsc00dp00ic09isc00ip00in00")
	var loaded []string
	l := newLoader(index(t), "/m", root, slog.New(slog.DiscardHandler), func(file string) error {
		name := modname.Canonical(path.Base(file))
		loaded = append(loaded, name)
		if name == "uas" {
			device("usb1/1-1/host0/target", "fs-ext4")
		}
		return nil
	})
	n, err := l.Coldplug(t.Context(), false)
	if n != 3 || err != nil {
		t.Errorf("%d kinds, %v", n, err)
	}
	if !slices.Contains(loaded, "uas") || !slices.Contains(loaded, "ext4") {
		t.Errorf("loaded %v", loaded)
	}
}

func TestParseEvent(t *testing.T) {
	msg := "add@/devices/usb1\x00ACTION=add\x00DEVPATH=/devices/usb1\x00MODALIAS=usb:v1=2\x00SEQNUM=1\x00"
	if action, modalias := parseEvent([]byte(msg)); action != "add" || modalias != "usb:v1=2" {
		t.Errorf("%q %q", action, modalias)
	}
	if action, modalias := parseEvent([]byte("libudev\x00\xfe\xed")); action != "" || modalias != "" {
		t.Errorf("%q %q", action, modalias)
	}
}

func FuzzIndex(f *testing.F) {
	for _, file := range tree() {
		f.Add(string(file.Data), string(file.Data), "usb:v1")
	}
	f.Fuzz(func(t *testing.T, dep, alias, modalias string) {
		fsys := tree()
		fsys["modules.dep"] = &fstest.MapFile{Data: []byte(dep)}
		fsys["modules.alias"] = &fstest.MapFile{Data: []byte(alias)}
		ix, err := ReadIndex(fsys)
		if err != nil {
			return
		}
		for _, module := range append(ix.Lookup(modalias), "ext4", "a") {
			files, err := ix.Order(module)
			if err != nil {
				continue
			}
			seen := map[string]bool{}
			for _, file := range files {
				if !fs.ValidPath(file) || seen[file] {
					t.Errorf("order of %s: %q", module, files)
				}
				seen[file] = true
			}
		}
	})
}
