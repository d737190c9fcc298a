package contentname

import (
	"crypto/sha256"
	"encoding/hex"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"lukechampine.com/blake3"
)

const someID = "57d6c1d52ce76a836b532b0e42e677dec6af9fca3673db511279358828a21ed6"

func TestClaim(t *testing.T) {
	for _, c := range []struct {
		layout Layout
		path   string
		role   Role
		ok     bool
	}{
		{Restic, "config", Identity, false},
		{Restic, "data/57/" + someID, Pack, true},
		{Restic, "data/58/" + someID, Other, false},
		{Restic, "data/" + someID, Other, false},
		{Restic, "data/57/" + strings.ToUpper(someID), Other, false},
		{Restic, "data/57/" + someID + ".locked", Other, false},
		{Restic, "data/57/" + someID[:63], Other, false},
		{Restic, "data/57/", Other, false},
		{Restic, "data/57/x/" + someID, Other, false},
		{Restic, "index/" + someID, Index, true},
		{Restic, "snapshots/" + someID, Snapshot, true},
		{Restic, "keys/" + someID, Key, true},
		{Restic, "locks/" + someID, Other, false},
		{Restic, "archives/" + someID, Other, false},
		{Restic, "packs/57/" + someID, Other, false},
		{Restic, someID, Other, false},
		{Borg2, "packs/57/" + someID, Pack, true},
		{Borg2, "packs/" + someID, Other, false},
		{Borg2, "data/57/" + someID, Other, false},
		{Borg2, "index/" + someID, Index, true},
		{Borg2, "keys/" + someID, Key, true},
		{Borg2, "keys/repokey", Key, false},
		{Borg2, "archives/" + someID, Snapshot, false},
		{Borg2, "snapshots/" + someID, Other, false},
		{Borg2, "config/id", Identity, false},
		{Borg2, "config/manifest", Other, false},
		{Borg2, "cache/checked-packs", Other, false},
		{None, "data/57/" + someID, Other, false},
		{None, "keys/" + someID, Other, false},
	} {
		id, role, ok := c.layout.Claim(c.path)
		if ok != c.ok || role != c.role && (ok || role != Key) || ok && id.String() != someID {
			t.Errorf("%s %s: %v, %v, %v", c.layout, c.path, id, role, ok)
		}
	}
}

func TestPassing(t *testing.T) {
	for path, want := range map[string]Layout{
		"locks/" + someID:                                "both",
		"data/57/" + someID + "-tmp-123":                 Restic,
		"index/" + someID + "-restic-temp-a1b2":          Restic,
		"snapshots/" + someID + ".rest-server-temp-4711": Restic,
		"packs/57/abc.tmp":                               Borg2,
		"packs/57/temp-" + someID:                        Borg2,
		"data/57/" + someID:                              None,
		"packs/57/" + someID:                             None,
		"data/57/" + someID + ".locked":                  None,
		"data/57/" + someID[:60] + "-tmp-1":              None,
		"photos/" + someID + "-tmp-1":                    None,
		"config":                                         None,
		"locks":                                          None,
		"data/57/" + strings.Repeat("g", 64) + "-tmp-1":  None,
	} {
		for _, l := range []Layout{Restic, Borg2, None} {
			if got := l.Passing(path); got != (l != None && (want == l || want == "both")) {
				t.Errorf("%s %s: %v", l, path, got)
			}
		}
	}
}

// The names that the real restic gives, in both versions of its repositories.
func TestRestic(t *testing.T) {
	if _, err := exec.LookPath("restic"); err != nil {
		t.Fatal("restic is missing: install the Debian package restic")
	}
	for _, version := range []string{"1", "2"} {
		dir := t.TempDir()
		repo := filepath.Join(dir, "repo")
		for _, args := range [][]string{
			{"init", "--repository-version", version},
			{"backup", "--quiet", "contentname.go"},
		} {
			c := exec.Command("restic", append(args, "--repo", repo)...)
			c.Env = append(os.Environ(), "RESTIC_PASSWORD=secret", "RESTIC_CACHE_DIR="+filepath.Join(dir, "cache"))
			if out, err := c.CombinedOutput(); err != nil {
				t.Fatalf("restic %v: %v\n%s", args, err, out)
			}
		}
		var r Recognizer
		var files []string
		err := filepath.WalkDir(repo, func(path string, d os.DirEntry, err error) error {
			name, _ := filepath.Rel(repo, path)
			r.See(name, d.IsDir())
			if !d.IsDir() {
				files = append(files, name)
			}
			return err
		})
		if err != nil || r.Layout() != Restic {
			t.Fatalf("version %s is taken for %q: %v", version, r.Layout(), err)
		}
		roles := map[Role]int{}
		for _, name := range files {
			content, err := os.ReadFile(filepath.Join(repo, name))
			if err != nil {
				t.Fatal(err)
			}
			_, role, ok := Restic.Claim(name)
			roles[role]++
			if ok == (name == "config") || Restic.Passing(name) {
				t.Errorf("version %s: %s: %v, %v", version, name, role, ok)
			}
			if !ok {
				continue
			}
			for i := range 2 {
				content[len(content)/2] ^= byte(i) // first as it is, then not
				c := Restic.NewCheck(name)
				c.Write(content[:len(content)/3])
				c.Write(content[len(content)/3:])
				if c.OK() != (i == 0) {
					t.Errorf("version %s: %s: %v with %d bits of another", version, name, c.OK(), i)
				}
			}
		}
		for _, role := range []Role{Pack, Index, Key, Snapshot, Identity} {
			if roles[role] == 0 {
				t.Errorf("version %s: no file has role %v: %v", version, role, files)
			}
		}
	}
}

// A tree as Borg 2's documents describe it; its betas are not installed anywhere.
func TestBorg2(t *testing.T) {
	var r Recognizer
	for _, folder := range []string{"archives", "cache", "config", "index", "keys", "locks", "packs", "packs/57"} {
		r.See(folder, true)
	}
	for _, name := range []string{"config/readme", "config/id", "config/version", "config/manifest", "packs/57/" + someID} {
		r.See(name, false)
	}
	if r.Layout() != Borg2 {
		t.Fatalf("it is taken for %q", r.Layout())
	}
	content := []byte("BORG_OBJ and what follows")
	old, new := sha256.Sum256(content), blake3.Sum256(content)
	for i, sum := range [][32]byte{old, new} {
		name := hex.EncodeToString(sum[:])
		path := "packs/" + name[:2] + "/" + name
		for _, c := range []struct {
			check *Check
			want  bool
		}{{Borg2.NewCheck(path), true}, {Borg2.NewCheck(path, i), true}, {Borg2.NewCheck(path, 1-i), false}} {
			c.check.Write(content)
			if c.check.OK() != c.want {
				t.Errorf("named by hash %d: %v", i, c.check.OK())
			}
			c.check.Write([]byte("!"))
			if c.check.OK() {
				t.Errorf("named by hash %d: a longer content passes", i)
			}
		}
	}
	if Borg2.NewCheck("archives/"+someID) != nil {
		t.Error("a MAC is checked as a hash")
	}
}

func TestNotRecognized(t *testing.T) {
	restic := []string{"config", "data/", "index/", "snapshots/", "keys/" + someID}
	borg2 := []string{"config/id", "config/version", "packs/"}
	for _, tree := range [][]string{restic, borg2} {
		for i := range tree {
			var r Recognizer
			for k, name := range tree {
				if k != i {
					path, folder := strings.CutSuffix(name, "/")
					r.See(path, folder)
				}
			}
			if r.Layout() != None {
				t.Errorf("without %s it is still %s", tree[i], r.Layout())
			}
		}
	}
	// A Borg 1 repository, and Borg 2's betas before packs.
	for _, tree := range [][]string{
		{"README", "config", "data/", "data/0/", "data/0/1", "index.1", "hints.1", "nonce"},
		{"config/", "config/id", "config/version", "config/manifest", "data/", "data/57/", "data/57/d6/" + someID, "keys/", "keys/repokey", "archives/"},
	} {
		var r Recognizer
		for _, name := range tree {
			path, folder := strings.CutSuffix(name, "/")
			r.See(path, folder)
		}
		if r.Layout() != None {
			t.Errorf("%v is taken for %q", tree, r.Layout())
		}
	}
}

func FuzzClaim(f *testing.F) {
	for _, path := range []string{"config", "data/57/" + someID, "packs/57/" + someID, "index/" + someID, "data//", "data/5", "keys/", ""} {
		f.Add(path)
	}
	f.Fuzz(func(t *testing.T, path string) {
		for _, l := range []Layout{None, Restic, Borg2} {
			id, role, ok := l.Claim(path)
			if ok && (l == None || role == Other || !strings.HasSuffix(path, "/"+id.String())) {
				t.Errorf("%s %q claims %v as %v", l, path, id, role)
			}
			if ok && l.Path(role, id) != path {
				t.Errorf("%s %q is said to lie at %q", l, path, l.Path(role, id))
			}
			if ok && l.Passing(path) {
				t.Errorf("%s %q is both named by its content and of the moment", l, path)
			}
			if ok != (l.NewCheck(path) != nil) {
				t.Errorf("%s %q: a check and a claim differ", l, path)
			}
		}
	})
}

func BenchmarkCheck(b *testing.B) {
	data := make([]byte, 16<<20)
	for _, c := range []struct {
		name   string
		layout Layout
		path   string
		only   []int
	}{
		{"restic", Restic, "data/57/" + someID, nil},
		{"borg2-sha256", Borg2, "packs/57/" + someID, []int{0}},
		{"borg2-blake3", Borg2, "packs/57/" + someID, []int{1}},
		{"borg2-both", Borg2, "packs/57/" + someID, nil},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.SetBytes(int64(len(data)))
			for b.Loop() {
				check := c.layout.NewCheck(c.path, c.only...)
				check.Write(data)
				check.OK()
			}
		})
	}
}
