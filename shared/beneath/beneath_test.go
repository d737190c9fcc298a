package beneath_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"farkeep/shared/beneath"

	"golang.org/x/sys/unix"
)

// setup makes a folder with files, and links that lead out of it and about in it.
func setup(t *testing.T) (*beneath.Dir, string) {
	t.Helper()
	root, outside := t.TempDir(), t.TempDir()
	must(t, os.WriteFile(filepath.Join(outside, "secret"), []byte("secret"), 0o600))
	must(t, os.MkdirAll(filepath.Join(root, "d/e"), 0o755))
	must(t, os.WriteFile(filepath.Join(root, "d/e/file"), []byte("content"), 0o644))
	must(t, os.Symlink(outside, filepath.Join(root, "out")))
	must(t, os.Symlink("d", filepath.Join(root, "in")))
	must(t, os.Symlink(filepath.Join(outside, "secret"), filepath.Join(root, "link")))
	must(t, os.Symlink("e", filepath.Join(root, "d/f")))
	must(t, unix.Mkfifo(filepath.Join(root, "pipe"), 0o644))
	d, err := beneath.Open(root)
	must(t, err)
	t.Cleanup(func() {
		d.Close()
		if data, err := os.ReadFile(filepath.Join(outside, "secret")); err != nil || string(data) != "secret" {
			t.Errorf("outside: %q, %v", data, err)
		}
		if left, _ := os.ReadDir(outside); len(left) != 1 {
			t.Errorf("outside there is %v", left)
		}
		if info, err := os.Stat(filepath.Join(outside, "secret")); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("outside: mode %v, %v", info.Mode(), err)
		}
	})
	return d, root
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestNothingLeadsOut(t *testing.T) {
	d, _ := setup(t)
	for _, path := range []string{"out/secret", "link", "in/e/file", "d/f/file", "../x", "/etc/passwd", "d/../../x", "pipe", "d", "none", ""} {
		if f, _, err := d.Open(path); err == nil {
			f.Close()
			t.Errorf("%q was opened", path)
		}
	}
	for _, path := range []string{"out", "in", "d/f", "..", "/", "/etc", "link", "d/e/file", "d/../../x"} {
		if sub, err := d.Dir(path); err == nil {
			sub.Close()
			t.Errorf("%q was opened as a folder", path)
		}
	}
	for _, name := range []string{"link", "out", "pipe", "d", "d/new", "..", ".", ""} {
		if f, _, err := d.OpenWrite(name, unix.O_CREAT, 0o600); err == nil {
			f.Close()
			t.Errorf("%q was opened for writing", name)
		}
	}
	for _, name := range []string{"link", "out"} {
		if err := d.Chmod(name, 0o777); err == nil {
			t.Errorf("chmod followed %q", name)
		}
	}
	for _, name := range []string{"d/new", "..", ".", "", "a\x00b"} {
		for what, err := range map[string]error{
			"mkdir": d.Mkdir(name, 0o755), "remove": d.Remove(name), "removeall": d.RemoveAll(name), "link": d.Link(d, "link", name),
			"rename": d.Rename("pipe", d, name), "rename new": d.RenameNew("pipe", d, name), "chown": d.Chown(name, 0, 0),
			"write": d.WriteFile(name, nil, 0o600, nil),
		} {
			if !errors.Is(err, fs.ErrInvalid) {
				t.Errorf("%s %q: %v; want fs.ErrInvalid", what, name, err)
			}
		}
	}
	f, st, err := d.Open("d/e/file")
	if err != nil || st.Size != 7 {
		t.Fatal(st.Size, err)
	}
	f.Close()
}

func TestWriteFileReplaces(t *testing.T) {
	d, root := setup(t)
	for _, content := range []string{"old", "new and longer", ""} {
		must(t, d.WriteFile("state", []byte(content), 0o640, nil))
		got, err := d.ReadFile("state", 100)
		if err != nil || string(got) != content {
			t.Errorf("%q, %v; want %q", got, err, content)
		}
	}
	// A link in the way is replaced, not followed; so is the temporary file's name.
	must(t, os.Symlink(filepath.Join(root, "out/secret"), filepath.Join(root, ".link.new")))
	must(t, d.WriteFile("link", []byte("mine"), 0o600, nil))
	if got, err := d.ReadFile("link", 100); err != nil || string(got) != "mine" {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := d.ReadFile("link", 3); err == nil || !strings.Contains(err.Error(), "more than 3") {
		t.Errorf("over the limit: %v", err)
	}
	broken := errors.New("broken")
	if err := d.WriteFile("state", []byte("x"), 0o600, func(*os.File) error { return broken }); !errors.Is(err, broken) {
		t.Errorf("adjust: %v", err)
	}
	if got, _ := d.ReadFile("state", 100); string(got) != "" {
		t.Errorf("a failed write left %q", got)
	}
}

func TestRenameNewReplacesNothing(t *testing.T) {
	d, root := setup(t)
	must(t, os.Mkdir(filepath.Join(root, "empty"), 0o755))
	for _, name := range []string{"empty", "link", "out", "pipe"} {
		if err := d.RenameNew("d", d, name); !errors.Is(err, fs.ErrExist) {
			t.Errorf("rename onto %s: %v; want fs.ErrExist", name, err)
		}
	}
	must(t, d.RenameNew("d", d, "moved"))
	sub, err := d.Dir("moved/e")
	must(t, err)
	sub.Close()
}

func TestRemoveAllDoesNotFollow(t *testing.T) {
	d, root := setup(t)
	must(t, os.Symlink(filepath.Join(root, "out"), filepath.Join(root, "d/e/out")))
	for _, name := range []string{"d", "out", "in", "none"} {
		must(t, d.RemoveAll(name))
	}
	deep := "deep" + strings.Repeat("/x", 300)
	must(t, os.MkdirAll(filepath.Join(root, deep), 0o755))
	if err := d.RemoveAll("deep"); err == nil || !strings.Contains(err.Error(), "deep") {
		t.Errorf("folders without end: %v", err)
	}
	must(t, os.RemoveAll(filepath.Join(root, "deep")))
	must(t, d.Clear())
	if left, _ := os.ReadDir(root); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

func TestLock(t *testing.T) {
	d, root := setup(t)
	must(t, d.Lock())
	other, err := beneath.Open(root)
	must(t, err)
	defer other.Close()
	if err := other.Lock(); !errors.Is(err, beneath.ErrLocked) {
		t.Errorf("a second lock: %v", err)
	}
	d.Close()
	must(t, other.Lock())
}

func TestEachSeesEveryName(t *testing.T) {
	root := t.TempDir()
	for i := range 3000 {
		must(t, os.WriteFile(filepath.Join(root, "f"+strings.Repeat("x", i%50)+string(rune('a'+i%26))+string(rune(0x4e00+i))), nil, 0o600))
	}
	d, err := beneath.Open(root)
	must(t, err)
	defer d.Close()
	seen := map[string]bool{}
	must(t, d.Each(func(e fs.DirEntry) error {
		seen[e.Name()] = true
		return d.Remove(e.Name())
	}))
	if len(seen) != 3000 {
		t.Errorf("%d names; want 3000", len(seen))
	}
	stop := errors.New("stop")
	must(t, os.WriteFile(filepath.Join(root, "one"), nil, 0o600))
	if err := d.Each(func(fs.DirEntry) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("an error of the caller: %v", err)
	}
}
