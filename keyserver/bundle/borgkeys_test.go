package bundle

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"farkeep/keyserver/runbook"
	"farkeep/shared/site"

	"github.com/google/go-cmp/cmp"
)

// TestKeysAreBorgs: what we export without Borg is what borg key export writes, on
// paper too, wherever a repository has its key. TestKeysFromAnotherMachine has the other kinds.
func TestKeysAreBorgs(t *testing.T) {
	kinds := map[string]string{
		"authenticated": runbook.KeyInRepository, "keyfile-blake2": runbook.KeyFile, "none": runbook.KeyNone,
	}
	var repositories []string
	for kind := range kinds {
		repositories = append(repositories, kind+"="+kind)
	}
	slices.Sort(repositories)
	h := newHome(t, append(repositories, "tree", "elsewhere")...)
	check(t, os.MkdirAll(filepath.Join(h.dir, "srv/tree/folder"), 0o700))
	s, err := site.Read(filepath.Join(h.site, "site.toml"))
	check(t, err)
	v := Look(s, "", []string{h.keys, h.dir, filepath.Join(h.dir, "nowhere")})
	defer v.Wipe()
	n, strangers := v.named()
	if strangers != 0 {
		t.Errorf("%d keys of nobody", strangers)
	}
	got := map[string]string{}
	for _, r := range n.repositories {
		got[r.Name] = r.Key
		if want := kinds[r.Name] == runbook.KeyFile || kinds[r.Name] == runbook.KeyInRepository; want != (len(r.Keys) == 1) {
			t.Errorf("%s has the keys %v", r.Name, r.Keys)
		}
	}
	kinds["tree"], kinds["elsewhere"] = runbook.KeyNoBorg, runbook.KeyUnknown
	if diff := cmp.Diff(kinds, got); diff != "" {
		t.Errorf("-want +found\n%s", diff)
	}
	for _, f := range n.files {
		name := strings.TrimSuffix(filepath.Base(f.name), filepath.Ext(f.name))
		theirs := filepath.Join(h.dir, "export")
		tool(t, h.dir, "borg", "key", "export", "srv/"+name, theirs)
		if !bytes.Equal(read(t, theirs), f.data) {
			t.Errorf("%s: ours and borg's are not the same:\n%s\n%s", name, f.data, read(t, theirs))
		}
		key, err := ParseBorgKey(f.data)
		check(t, err)
		paper, err := key.Paper()
		check(t, err)
		tool(t, h.dir, "borg", "key", "export", "--paper", "srv/"+name, theirs)
		_, want, _ := strings.Cut(string(read(t, theirs)), "\n\n")
		if paper.Reveal() != want {
			t.Errorf("%s on paper: ours and borg's are not the same:\n%s\n%s", name, paper.Reveal(), want)
		}
	}
	// Without its key file the user is told.
	h.keys = filepath.Join(h.dir, "empty")
	check(t, os.Mkdir(h.keys, 0o700))
	_, r := h.create(t, Clear, "bundle")
	if want := []string{"keyfile-blake2"}; !slices.Equal(r.Unreadable, want) || !slices.Equal(r.Unknown, []string{"elsewhere"}) {
		t.Errorf("unreadable %v, unknown %v", r.Unreadable, r.Unknown)
	}
	if got := problems(t, h, filepath.Join(h.dir, "bundle"), nil); len(got) != 1 || !strings.Contains(got[0], "needs a key file that is not in the bundle") {
		t.Errorf("verify: %q", got)
	}
}

// TestKeysFromAnotherMachine: borg-keys there, --borg-keys here.
func TestKeysFromAnotherMachine(t *testing.T) {
	h := newHome(t, "letters=keyfile", "photos=repokey")
	s, err := site.Read(filepath.Join(h.site, "site.toml"))
	check(t, err)
	carried := filepath.Join(h.dir, "carried")
	there := Look(s, "", []string{h.keys})
	check(t, there.Write(carried))
	if err := there.Write(carried); err == nil {
		t.Error("a folder that is there was written into")
	}
	// On the laptop there are no repositories.
	check(t, os.Rename(filepath.Join(h.dir, "srv"), filepath.Join(h.dir, "burned")))
	h.keys = carried
	path, r := h.create(t, Clear, "bundle")
	if len(r.Unreadable)+len(r.Unknown) > 0 {
		t.Errorf("unreadable %v, unknown %v", r.Unreadable, r.Unknown)
	}
	tool(t, h.dir, "borg", "key", "export", "burned/photos", "export")
	if !bytes.Equal(read(t, filepath.Join(h.dir, "export")), read(t, filepath.Join(path, keysFolder, "photos.repokey"))) {
		t.Error("the key of photos is not what borg exports")
	}
	for name, was := range map[string]string{"letters.keyfile": "letters.keyfile", "photos.repokey": "photos.repokey"} {
		if !bytes.Equal(read(t, filepath.Join(path, keysFolder, name)), read(t, filepath.Join(carried, was))) {
			t.Errorf("%s has changed on the way", name)
		}
	}
	// An inventory of somebody else's making names nothing outside.
	write(t, filepath.Join(carried, InventoryFile), []byte("[[repository]]\nname = \"../../x\"\nkey = \"none\"\n[[repository]]\nname = \"letters\"\nkey = \"keyfile\"\nkeys = [\"/etc/passwd\"]\n"))
	v := Look(s, "", []string{carried})
	for _, one := range v.Repositories {
		if one.Name == "../../x" || len(one.Keys) > 0 {
			t.Errorf("taken: %+v", one)
		}
	}
}

func FuzzParseBorgKey(f *testing.F) {
	f.Add([]byte("BORG_KEY " + strings.Repeat("ab", 32) + "\naGVsbG8=\n"))
	f.Add([]byte("BORG_KEY x\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		key, err := ParseBorgKey(text)
		if err != nil {
			return
		}
		paper, err := key.Paper()
		if err != nil {
			t.Fatal(err)
		}
		// Its lines, put together again, are the key.
		var blob strings.Builder
		for line := range strings.Lines(paper.Reveal()) {
			number, rest, _ := strings.Cut(line, ": ")
			if strings.Trim(number, " 0123456789") == "" {
				data, _, _ := strings.Cut(rest, " - ")
				blob.WriteString(strings.ReplaceAll(data, " ", ""))
			}
		}
		_, body, _ := strings.Cut(string(text), "\n")
		want, err := unwrap(body)
		if err != nil || blob.String() != toHex(want) {
			t.Errorf("printed %s for %x", blob.String(), want)
		}
	})
}

func toHex(b []byte) string {
	const digits = "0123456789abcdef"
	var out strings.Builder
	for _, c := range b {
		out.WriteByte(digits[c>>4])
		out.WriteByte(digits[c&15])
	}
	return out.String()
}
