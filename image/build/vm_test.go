//go:build vm

package build

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"farkeep/image/debian"
	"farkeep/image/fdt"
	"farkeep/image/hardware"
	"farkeep/image/kmodules"
	"farkeep/image/sdcard"
	"farkeep/shared/card"
	"farkeep/shared/modname"
)

// options are those of a build with a small program in the appliance's place.
func options(t *testing.T) Options {
	t.Helper()
	mirror := debian.Mirror{Archive: os.Getenv("FARKEEP_APT_MIRROR")}
	if mirror.Archive == "" {
		var err error
		if mirror, err = debian.FindMirror(os.DirFS("/etc/apt")); err != nil {
			t.Fatalf("%v: set FARKEEP_APT_MIRROR", err)
		}
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	return Options{
		Appliance: program(t, "arm64"),
		Out:       filepath.Join(t.TempDir(), "farkeep.img"),
		Cache:     filepath.Join(cache, "farkeep"),
		Mirror:    mirror,
		Log:       slog.New(slog.NewTextHandler(testWriter{t}, nil)),
	}
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

// program compiles one that does nothing.
func program(t *testing.T, arch string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "main.go"), []byte("package main\n\nfunc main() {}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(dir, "program")
	cmd := exec.Command("go", "build", "-trimpath", "-o", out, filepath.Join(dir, "main.go"))
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch)
	if msg, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, msg)
	}
	return out
}

func digest(t *testing.T, name string) string {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

// maxCompressed is the aim for the image with the real appliance, which adds
// about 8 MB to what is measured here.
const maxCompressed = 40_000_000

func TestImage(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Minute)
	defer cancel()
	o := options(t)
	o.Compress = true
	o.Contents = filepath.Join(t.TempDir(), "contents.toml")
	start := time.Now()
	r, err := Build(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("first build took %v; slot %d bytes, initramfs %d", time.Since(start).Round(time.Second), r.SlotBytes, r.Initramfs)

	t.Run("same inputs, same bytes", func(t *testing.T) {
		again := o
		again.Out, again.Compress, again.Contents = filepath.Join(t.TempDir(), "again.img"), false, ""
		start := time.Now()
		if _, err := Build(ctx, again); err != nil {
			t.Fatal(err)
		}
		t.Logf("second build took %v", time.Since(start).Round(time.Second))
		if a, b := digest(t, o.Out), digest(t, again.Out); a != b {
			t.Errorf("two builds differ: %s, %s", a, b)
		}
	})

	t.Run("compressed", func(t *testing.T) {
		s, err := os.Stat(r.Compressed)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("compressed: %d bytes", s.Size())
		if s.Size() > maxCompressed {
			t.Errorf("compressed image of %d bytes; the aim is %d", s.Size(), maxCompressed)
		}
		cmd := exec.Command("xz", "--decompress", "--stdout", r.Compressed)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		h := sha256.New()
		if _, err := io.Copy(h, out); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprintf("%x", h.Sum(nil)); got != digest(t, o.Out) {
			t.Error("the compressed image is another one")
		}
	})

	t.Run("list of contents", func(t *testing.T) {
		text, err := os.ReadFile(o.Contents)
		if err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(o.Out)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		selector, err := sdcard.OpenPartition(f, card.Selector)
		if err != nil {
			t.Fatal(err)
		}
		onCard, err := selector.ReadFile(card.ContentsFile)
		if err != nil || string(onCard) != string(text) {
			t.Errorf("the list on the card is another one: %v", err)
		}
		for number, want := range map[int]string{card.SlotA: "farkeep.slot=a", card.SlotB: "farkeep.slot=b"} {
			slot, err := sdcard.OpenPartition(f, number)
			if err != nil {
				t.Fatal(err)
			}
			line, err := slot.ReadFile(card.CmdlineFile)
			if err != nil || !strings.Contains(string(line), want) {
				t.Errorf("slot %d: command line %q, %v", number, line, err)
			}
			for _, file := range r.Contents.Files {
				data, err := slot.ReadFile(file.Name)
				if err != nil || sum(data) != file.SHA256 {
					t.Errorf("slot %d: %s is not what the list says: %v", number, file.Name, err)
				}
			}
		}
		var packages []string
		for _, p := range r.Contents.Packages {
			packages = append(packages, p.Name)
			if len(p.SHA256) != 64 || p.Version == "" {
				t.Errorf("package %+v", p)
			}
		}
		if len(packages) != 3 {
			t.Errorf("packages %v", packages)
		}
	})
}

// unpacked is a tree of the real packages with its index.
func unpacked(t *testing.T) (*tree, *kmodules.Index, []byte) {
	t.Helper()
	x, _, _, err := fetch(context.Background(), options(t))
	if err != nil {
		t.Fatal(err)
	}
	ix, err := kmodules.Load(kmodules.Dir(filepath.Join(x.root, "lib/modules", x.version)))
	if err != nil {
		t.Fatal(err)
	}
	kernel, err := x.read("boot/vmlinuz-" + x.version)
	if err != nil {
		t.Fatal(err)
	}
	return x, ix, kernel
}

// deviceTree returns a board's tree: from the kernel package, or QEMU's own.
func deviceTree(t *testing.T, x *tree, b card.Board) []fdt.Node {
	t.Helper()
	var blob []byte
	var err error
	if b.DTB != "" {
		blob, err = x.read("usr/lib/linux-image-" + x.version + "/broadcom/" + b.DTB)
	} else {
		out := filepath.Join(t.TempDir(), "virt.dtb")
		cmd := exec.Command("qemu-system-aarch64", "-M", "virt,dumpdtb="+out, "-cpu", "cortex-a53", "-display", "none", "-nic", "none")
		if msg, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("ask QEMU (package qemu-system-arm) for its device tree: %v\n%s", err, msg)
		}
		blob, err = os.ReadFile(out)
	}
	if err != nil {
		t.Fatal(err)
	}
	nodes, err := fdt.Parse(blob)
	if err != nil {
		t.Fatal(err)
	}
	return nodes
}

// Every board's own device tree is asked what the board has, and the modules
// that go into the image are asked who drives it. Then each module in turn is
// taken away: what a board needs must be missed.
func TestEveryBoardIsDriven(t *testing.T) {
	x, ix, kernel := unpacked(t)
	var trees [][]fdt.Node
	byBoard := map[string][]fdt.Node{}
	for _, b := range card.SupportedBoards() {
		nodes := deviceTree(t, x, b)
		if !slices.Contains(nodes[0].Compatible, b.Compatible) {
			t.Errorf("%s: its device tree calls it %v, not %s", b.Name, nodes[0].Compatible, b.Compatible)
		}
		byBoard[b.Compatible] = nodes
		if b.DTB != "" {
			trees = append(trees, nodes)
		}
	}
	modules, err := hardware.Modules(ix, trees)
	if err != nil {
		t.Fatal(err)
	}
	files, err := ix.Files(modules)
	if err != nil {
		t.Fatal(err)
	}
	image, err := kmodules.Load(kmodules.Memory(files))
	if err != nil {
		t.Fatal(err)
	}
	needed := map[string]bool{}
	for _, b := range card.SupportedBoards() {
		drivers, err := hardware.Check(b, byBoard[b.Compatible], image, kernel)
		if err != nil {
			t.Errorf("%v", err)
		}
		for _, d := range drivers {
			t.Logf("%s: %s: %s: modules %v, built in %v", b.Name, d.Function, d.Device, d.Modules, d.Builtin)
			if len(d.Builtin) == 0 && len(d.Modules) == 1 {
				needed[d.Modules[0]] = true
			}
		}
	}
	if len(needed) < 15 {
		t.Errorf("only %d modules are needed by name: the check has gone blind", len(needed))
	}
	for module := range needed {
		without, err := kmodules.Load(withoutModule(files, module))
		if err != nil {
			t.Fatal(err)
		}
		missed := false
		for _, b := range card.SupportedBoards() {
			_, err := hardware.Check(b, byBoard[b.Compatible], without, kernel)
			missed = missed || err != nil
		}
		if !missed {
			t.Errorf("nobody misses %s", module)
		}
	}
}

// withoutModule is the image's modules directory with one module gone.
func withoutModule(files []kmodules.File, module string) kmodules.Source {
	all := kmodules.Memory(files)
	return func(name string) ([]byte, error) {
		data, err := all(name)
		if name != "modules.dep" && name != "modules.alias" {
			return data, err
		}
		var kept []string
		for line := range strings.Lines(string(data)) {
			file, _, isDep := strings.Cut(line, ":")
			if name == "modules.dep" && isDep && modname.Canonical(file) == module || name == "modules.alias" && strings.HasSuffix(line, " "+module+"\n") {
				continue
			}
			kept = append(kept, line)
		}
		return []byte(strings.Join(kept, "")), err
	}
}

func TestBuildRefusesOtherPrograms(t *testing.T) {
	o := options(t)
	for name, want := range map[string]string{
		program(t, "amd64"): "not for arm64",
		os.DevNull:          "not an ELF program",
		"/missing":          "read the appliance",
	} {
		o.Appliance = name
		if _, err := Build(context.Background(), o); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v does not say %q", name, err, want)
		}
	}
}
