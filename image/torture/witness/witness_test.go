package witness_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"farkeep/image/torture/witness"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// history makes two generations that share one inode.
func history(t *testing.T) (root string) {
	t.Helper()
	root = filepath.Join(t.TempDir(), "generations")
	one, two := filepath.Join(root, "photos", "000001-x", "files"), filepath.Join(root, "photos", "000002-x", "files")
	must(t, os.MkdirAll(one, 0o755))
	must(t, os.MkdirAll(two, 0o755))
	must(t, os.WriteFile(filepath.Join(one, "a"), []byte("the same"), 0o444))
	must(t, os.Link(filepath.Join(one, "a"), filepath.Join(two, "a")))
	must(t, os.WriteFile(filepath.Join(two, "b"), []byte("only here"), 0o444))
	must(t, os.WriteFile(filepath.Join(root, "photos", ".sequence"), []byte("2"), 0o644))
	return root
}

// A check that cannot fail proves nothing: every deliberate break is found, and
// named by its generation.
func TestEveryBreakIsFound(t *testing.T) {
	for _, tt := range []struct {
		name, want string
		do         func(t *testing.T, root string)
	}{
		{"nothing", "", func(*testing.T, string) {}},
		{"a further generation", "", func(t *testing.T, root string) {
			must(t, os.MkdirAll(filepath.Join(root, "music", "000001-x"), 0o755))
		}},
		{"the store's own files", "", func(t *testing.T, root string) {
			must(t, os.WriteFile(filepath.Join(root, "photos", ".sequence"), []byte("3"), 0o644))
		}},
		{"one bit, size and time as before", `photos/000001-x: "files/a" has other bytes`, func(t *testing.T, root string) {
			path := filepath.Join(root, "photos/000001-x/files/a")
			info, err := os.Stat(path)
			must(t, err)
			must(t, os.WriteFile(path, []byte("the sane"), 0o444))
			must(t, os.Chtimes(path, time.Time{}, info.ModTime()))
		}},
		{"the same break in the generation that links to it", "photos/000002-x: ", func(t *testing.T, root string) {
			must(t, os.WriteFile(filepath.Join(root, "photos/000001-x/files/a"), []byte("the sane"), 0o444))
		}},
		{"cut short", `"files/b" has other bytes (4, were 9)`, func(t *testing.T, root string) {
			must(t, os.Truncate(filepath.Join(root, "photos/000002-x/files/b"), 4))
		}},
		{"removed", `"files/b" is gone`, func(t *testing.T, root string) {
			must(t, os.Remove(filepath.Join(root, "photos/000002-x/files/b")))
		}},
		{"added", `"files/c" was added`, func(t *testing.T, root string) {
			must(t, os.WriteFile(filepath.Join(root, "photos/000002-x/files/c"), nil, 0o444))
		}},
		{"writable", `"files/b" is `, func(t *testing.T, root string) {
			must(t, os.Chmod(filepath.Join(root, "photos/000002-x/files/b"), 0o666))
		}},
		{"another owner", `"files/b" is `, func(t *testing.T, root string) {
			must(t, os.Lchown(filepath.Join(root, "photos/000002-x/files/b"), 903, 903))
		}},
		{"another time", `"files/b" is `, func(t *testing.T, root string) {
			must(t, os.Chtimes(filepath.Join(root, "photos/000002-x/files/b"), time.Time{}, time.Unix(1, 0)))
		}},
		{"a link in its place", `"files/b" has other bytes`, func(t *testing.T, root string) {
			path := filepath.Join(root, "photos/000002-x/files/b")
			must(t, os.Remove(path))
			must(t, os.Symlink("/etc/passwd", path))
		}},
		{"renamed", "photos/000002-x is gone: nothing may go", func(t *testing.T, root string) {
			must(t, os.Rename(filepath.Join(root, "photos/000002-x"), filepath.Join(root, "photos/000003-x")))
		}},
		{"a repository gone", "photos/000001-x is gone", func(t *testing.T, root string) {
			must(t, os.RemoveAll(filepath.Join(root, "photos")))
		}},
		{"everything gone", "photos/000002-x is gone", func(t *testing.T, root string) { must(t, os.RemoveAll(root)) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			root := history(t)
			var w witness.Witness
			must(t, w.Look(t.Context(), root))
			if n := w.Figures().Generations; n != 2 {
				t.Fatalf("%d generations are remembered", n)
			}
			tt.do(t, root)
			err := w.Look(t.Context(), root)
			if tt.want == "" {
				must(t, err)
				return
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("found: %v; want %q", err, tt.want)
			}
		})
	}
}

func TestOnlyWhatMayGoGoes(t *testing.T) {
	root := history(t)
	w := witness.Witness{MayGo: func(gone witness.ID, there []witness.ID) error {
		if len(there) != 2 {
			t.Errorf("there were %q", there)
		}
		if gone.Repository() != "photos" || gone.Name() != "000001-x" {
			return errors.New("the policy keeps it")
		}
		return nil
	}}
	must(t, w.Look(t.Context(), root))
	must(t, os.RemoveAll(filepath.Join(root, "photos/000001-x")))
	must(t, w.Look(t.Context(), root))
	if f := w.Figures(); f.Gone != 1 || f.Generations != 1 {
		t.Errorf("figures: %+v", f)
	}
	must(t, os.Rename(filepath.Join(root, "photos/000002-x"), filepath.Join(root, "photos/.hidden")))
	w.MayGo = func(witness.ID, []witness.ID) error { return errors.New("the policy keeps it") }
	if err := w.Look(t.Context(), root); err == nil || !strings.Contains(err.Error(), "photos/000002-x is gone: the policy keeps it") {
		t.Errorf("found: %v", err)
	}
}

// What lies outside is counted once, and what a generation holds too is not.
func TestOutside(t *testing.T) {
	root := history(t)
	disk := filepath.Dir(root)
	objects := filepath.Join(disk, "incoming", "photos", "objects")
	must(t, os.MkdirAll(objects, 0o755))
	must(t, os.Link(filepath.Join(root, "photos/000002-x/files/b"), filepath.Join(objects, "linked")))
	must(t, os.WriteFile(filepath.Join(objects, "orphan"), make([]byte, 1<<20), 0o644))
	must(t, os.Link(filepath.Join(objects, "orphan"), filepath.Join(objects, "again")))
	got, err := witness.Outside(disk)
	must(t, err)
	if n := got["incoming"]; n < 1<<20 || n > 1<<20+8192 {
		t.Errorf("outside lie %v", got)
	}
}
