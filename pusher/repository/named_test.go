package repository

import (
	"crypto/sha256"
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"farkeep/shared/contentname"
	"farkeep/shared/hint"
	"farkeep/shared/site"
)

// fakeNamed makes a repository of the layout; nothing in it can be read by anybody.
func fakeNamed(t *testing.T, path string, layout contentname.Layout) {
	t.Helper()
	put := func(name, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
			t.Fatal(err)
		}
		write(t, name, text)
	}
	sum := sha256.Sum256([]byte("a key"))
	put(filepath.Join(path, "keys", hex.EncodeToString(sum[:])), "a key")
	folders := []string{"data", "index", "snapshots"}
	if layout == contentname.Borg2 {
		folders = []string{"packs", "archives", "cache"}
		put(filepath.Join(path, "config", "id"), someID)
		put(filepath.Join(path, "config", "version"), "4")
	} else {
		put(filepath.Join(path, "config"), "encrypted")
	}
	for _, name := range folders {
		if err := os.MkdirAll(filepath.Join(path, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
}

func TestNamed(t *testing.T) {
	for _, layout := range []contentname.Layout{contentname.Restic, contentname.Borg2} {
		t.Run(string(layout), func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "photos")
			fakeNamed(t, path, layout)
			named := &site.Site{Repositories: []site.Repository{{Name: "photos", Path: path}}}
			f := Find(named)
			if len(f.Repositories) != 1 || f.Repositories[0].Layout != layout || f.Repositories[0].What() != string(layout) || f.Repositories[0].Mark == "" {
				t.Fatalf("%+v", f)
			}
			f = Find(&site.Site{Folders: []site.Folder{{Path: dir}}})
			if len(f.Beside) != 1 || !strings.HasPrefix(f.Beside[0].Why, layout.String()) {
				t.Errorf("in a folder of repositories: %+v", f)
			}

			memory := NewMemory(t.TempDir())
			was := Find(named).Repositories[0]
			// Before repositories were recognised, nothing was remembered of them.
			old := was
			old.Layout, old.Mark = "", ""
			if err := memory.Pushed(old, "attic", Push{}); err != nil {
				t.Fatal(err)
			}
			if err := memory.Check(was); err != nil {
				t.Errorf("an older memory: %v", err)
			}
			if err := memory.Pushed(was, "attic", Push{}); err != nil {
				t.Fatal(err)
			}
			if err := memory.Check(Find(named).Repositories[0]); err != nil {
				t.Error(err)
			}
			refused := func(what, want string) {
				t.Helper()
				f := Find(named)
				if len(f.Repositories) != 1 {
					t.Fatalf("%s: %+v", what, f)
				}
				if err := memory.Check(f.Repositories[0]); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(hint.Of(err), "forget photos") {
					t.Errorf("%s: %v", what, err)
				}
			}
			config := filepath.Join(path, "config")
			if layout == contentname.Borg2 {
				config = filepath.Join(config, "id")
			}
			write(t, config, strings.Repeat("ab", 32))
			refused("another repository in its place", "it is another repository")
			if err := os.RemoveAll(filepath.Join(path, "keys")); err != nil {
				t.Fatal(err)
			}
			if err := os.Remove(config); err != nil {
				t.Fatal(err)
			}
			refused("a repository without its beginning", "was "+layout.String()+" and is a plain folder of files now")
		})
	}
	t.Run("damaged id", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "photos")
		fakeNamed(t, path, contentname.Borg2)
		write(t, filepath.Join(path, "config", "id"), "\x00\x01")
		f := Find(&site.Site{Repositories: []site.Repository{{Name: "photos", Path: path}}})
		if len(f.Problems) != 1 || !strings.Contains(f.Problems[0].Err.Error(), "damaged") {
			t.Errorf("%+v", f)
		}
	})
	t.Run("nothing of the kind", func(t *testing.T) {
		path := t.TempDir()
		write(t, filepath.Join(path, "keys"), "a file")
		write(t, filepath.Join(path, "config"), "a file")
		if layout, mark, err := ReadNamed(path); layout != contentname.None || mark != "" || err != nil {
			t.Errorf("%q %q %v", layout, mark, err)
		}
	})
}
