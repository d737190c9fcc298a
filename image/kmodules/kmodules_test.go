package kmodules

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/ulikunitz/xz"

	"farkeep/shared/modname"
)

// kernel is a small modules directory in the shape that depmod leaves.
func kernel(t *testing.T, change map[string]string) Source {
	t.Helper()
	files := map[string]string{
		"modules.dep": `kernel/fs/ext4/ext4.ko.xz: kernel/fs/jbd2/jbd2.ko.xz kernel/fs/mbcache.ko.xz
kernel/fs/jbd2/jbd2.ko.xz:
kernel/fs/mbcache.ko.xz:
kernel/crypto/crc32c_generic.ko.xz:
kernel/drivers/usb/phy/phy-generic.ko.xz: kernel/drivers/usb/core/usbcore.ko.xz
kernel/drivers/usb/core/usbcore.ko.xz:
kernel/drivers/usb/storage/usb-storage.ko.xz: kernel/drivers/usb/core/usbcore.ko.xz
kernel/sound/soc.ko.xz:
`,
		"modules.alias": `# Aliases extracted from modules themselves.
alias fs-ext4 ext4
alias crypto-crc32c crc32c_generic
alias of:N*T*Cusb-nop-xceiv phy_generic
alias of:N*T*Cusb-nop-xceivC* phy_generic
alias usb:v*p*d*dc*dsc*dp*ic08isc06ip50in* usb_storage
alias a soc card soc
`,
		"modules.softdep": `# Soft dependencies extracted from modules themselves.
softdep ext4 pre: crypto-crc32c
softdep jbd2 pre: crypto-crc32c post: gone-from-this-kernel
`,
		"modules.builtin":         "kernel/drivers/pinctrl/bcm/pinctrl-bcm2835.ko\n",
		"modules.builtin.modinfo": "pinctrl_bcm2835.license=GPL\x00pl031.alias=amba:d*\x00bcm2835_pm.author=E\x00",
	}
	for name, text := range change {
		files[name] = text
	}
	dir := t.TempDir()
	for name, text := range files {
		write(t, filepath.Join(dir, name), []byte(text))
	}
	for line := range strings.Lines(files["modules.dep"]) {
		name, _, _ := strings.Cut(line, ":")
		var b bytes.Buffer
		w, err := xz.NewWriter(&b)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte("code of " + modname.Canonical(name))); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, name), b.Bytes())
	}
	return Dir(dir)
}

func write(t *testing.T, name string, data []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, data, 0o644); err != nil {
		t.Fatal(err)
	}
}

func load(t *testing.T, s Source) *Index {
	t.Helper()
	ix, err := Load(s)
	if err != nil {
		t.Fatal(err)
	}
	return ix
}

func TestClosure(t *testing.T) {
	ix := load(t, kernel(t, nil))
	for _, tt := range []struct {
		name        string
		roots, want []string
	}{
		{"hard and soft dependencies", []string{"ext4"}, []string{"crc32c_generic", "ext4", "jbd2", "mbcache"}},
		{"by alias, dash for underscore", []string{"phy-generic"}, []string{"phy_generic", "usbcore"}},
		{"by modalias", []string{"usb:v1234p5678d0100dc00dsc00dp00ic08isc06ip50in00"}, []string{"usb_storage", "usbcore"}},
		{"built in", []string{"pinctrl-bcm2835", "bcm2835_pm"}, []string{}},
		{"nothing", nil, []string{}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := ix.Closure(tt.roots)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
	if _, err := ix.Closure([]string{"ext4", "gone"}); err == nil || !strings.Contains(err.Error(), "nothing provides gone") {
		t.Errorf("a root that nothing provides: %v", err)
	}
}

func TestFilesAreAModulesDirectoryAgain(t *testing.T) {
	ix := load(t, kernel(t, nil))
	modules, err := ix.Closure([]string{"ext4", "phy_generic"})
	if err != nil {
		t.Fatal(err)
	}
	files, err := ix.Files(modules)
	if err != nil {
		t.Fatal(err)
	}
	small := load(t, Memory(files))
	again, err := small.Closure([]string{"ext4", "of:NTCusb-nop-xceiv"})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(modules, again); diff != "" {
		t.Error(diff)
	}
	data, err := Memory(files)("kernel/fs/ext4/ext4.ko")
	if err != nil || string(data) != "code of ext4" {
		t.Errorf("module %q, %v", data, err)
	}
	if m, _ := small.Lookup("usb_storage"); m != nil {
		t.Errorf("a module that was not asked for is there: %v", m)
	}
	if _, b := small.Lookup("amba:d1"); !slices.Equal(b, []string{"pl031"}) {
		t.Errorf("built-in drivers got lost: %v", b)
	}
	if _, err := ix.Files([]string{"ext4"}); err == nil || !strings.Contains(err.Error(), "left out") {
		t.Errorf("a module without its dependencies: %v", err)
	}
}

func TestLoadRefuses(t *testing.T) {
	for _, tt := range []struct{ name, file, text, want string }{
		{"no colon", "modules.dep", "kernel/a.ko\n", "modules.dep:1"},
		{"outside", "modules.dep", "../a.ko:\n", "not a dependency"},
		{"twice", "modules.dep", "a/x-y.ko:\nb/x_y.ko:\n", "twice"},
		{"alias", "modules.alias", "alias x\n", "not an alias"},
		{"softdep", "modules.softdep", "softdep x\n", "not a soft dependency"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			base := kernel(t, nil)
			_, err := Load(func(name string) ([]byte, error) {
				if name == tt.file {
					return []byte(tt.text), nil
				}
				return base(name)
			})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v does not say %q", err, tt.want)
			}
		})
	}
	if _, err := Load(Memory(nil)); err == nil {
		t.Error("an empty directory is a modules directory")
	}
}
