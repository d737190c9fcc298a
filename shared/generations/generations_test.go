package generations_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"farkeep/shared/generations"
)

func TestPushChangeAndConfirm(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, generations.Options{})
	if _, err := s.Newest(t.Context(), "photos"); !errors.Is(err, generations.ErrNone) {
		t.Errorf("newest of nothing: %v", err)
	}

	first := tree{}.add("config", "[repository]\n").add("data/0/1", noise(1, 3<<20)).add("data/0/2", noise(2, 100)).
		add("empty", "").add("also empty", "").add(`odd \ name`, "x").add("cr\rhere", "y").add("bytes \xff\xfe", "z")
	first["hollow"] = file{folder: true, mode: 0o750}
	one, got := push(t, s, "photos", first)
	if got.Files != 8 {
		t.Errorf("the first push uploaded %d files; want all 8", got.Files)
	}
	compare(t, dir, "photos", one, first)

	if name, got := push(t, s, "photos", first); name != one || got.Files != 0 {
		t.Errorf("the same again: generation %s, %d files uploaded; want %s confirmed", name, got.Files, one)
	}

	second := tree{}
	for path, f := range first {
		second[path] = f
	}
	delete(second, "data/0/2")
	second.add("data/0/3", noise(3, 50)).add("config", "[repository]\nid = 1\n")
	two, got := push(t, s, "photos", second)
	if got.Files != 2 {
		t.Errorf("the second push uploaded %d files; want the 2 that changed", got.Files)
	}
	compare(t, dir, "photos", one, first)
	compare(t, dir, "photos", two, second)

	list, err := s.List(t.Context(), "photos")
	if err != nil || names(list) != one+" "+two {
		t.Errorf("generations are %s, %v", names(list), err)
	}
	if g := list[1]; g.NewFiles != 2 || g.Base != one || g.Sequence != 2 || g.Pusher != "home" || g.Files != 8 {
		t.Errorf("generation.toml says %+v", g)
	}
	inode := func(name string) uint64 {
		return inodeOf(t, filepath.Join(dir, "generations/photos", name, "files/data/0/1"))
	}
	if inode(one) != inode(two) {
		t.Error("an unchanged file is stored twice")
	}
	left, err := os.ReadDir(filepath.Join(dir, "incoming/photos"))
	if err != nil || len(left) != 0 {
		t.Errorf("after a commit incoming/ holds %v, %v", left, err)
	}
	for _, name := range []string{one, two} {
		r, err := s.Verify(t.Context(), "photos", name, nil)
		if err != nil || r.Bad != 0 || r.Files != 8 {
			t.Errorf("verify %s: %+v, %v", name, r, err)
		}
	}
}
