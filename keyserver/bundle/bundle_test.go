package bundle

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"farkeep/keyserver/runbook"
	"farkeep/shared/secret"
	"farkeep/shared/site"
)

func words() (secret.Bytes, error) {
	return secret.New([]byte("six words that nobody ever guesses")), nil
}

func wrongWords() (secret.Bytes, error) { return secret.New([]byte("another passphrase")), nil }

// problems opens and verifies a bundle, and returns what was found in one line each.
func problems(t *testing.T, h *home, path string, live map[string]string) []string {
	t.Helper()
	c, err := Open(path, words)
	if err != nil {
		return []string{err.Error()}
	}
	defer c.Wipe()
	v, err := c.Verify(h.site, live)
	if err != nil {
		return []string{err.Error()}
	}
	var all []string
	for _, p := range v.Problems {
		all = append(all, p.Error())
	}
	return all
}

func TestCreateAndVerify(t *testing.T) {
	h := newHome(t, "photos=repokey", "letters=keyfile-blake2", "pictures=none", "elsewhere")
	path, r := h.create(t, Clear, "bundle")
	if len(r.Unreadable) > 0 || !slices.Equal(r.Unknown, []string{"elsewhere"}) {
		t.Errorf("unreadable %v, unknown %v", r.Unreadable, r.Unknown)
	}
	if got := problems(t, h, path, nil); len(got) > 0 {
		t.Errorf("a new bundle has problems: %q", got)
	}
	// Nothing but what its owner may read, and each file as SHA256SUMS says.
	check(t, filepath.WalkDir(path, func(name string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err == nil && info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v", name, info.Mode())
		}
		return err
	}))
	tool(t, path, "sha256sum", "--quiet", "--strict", "-c", sumsFile)
	s, err := site.Read(filepath.Join(h.site, "site.toml"))
	check(t, err)
	if !s.Bundle.Created.Equal(noon) || s.Bundle.Stale(atticDisk, r.Manifest.Disks[0].Header) != "" {
		t.Errorf("site.toml says %+v", s.Bundle)
	}
	if string(read(t, filepath.Join(path, "site/site.toml"))) != string(read(t, filepath.Join(h.site, "site.toml"))) {
		t.Error("the bundle has another site.toml")
	}
	for _, secretText := range []string{RunbookFile, startFile, manifestFile} {
		if bytes.Contains(read(t, filepath.Join(path, secretText)), []byte("0007 0e15")) {
			t.Errorf("%s holds a key", secretText)
		}
	}

	at := func(name string) string { return filepath.Join(path, name) }
	flip := func(name string) func() {
		return func() {
			b := read(t, at(name))
			b[len(b)/2] ^= 1
			write(t, at(name), b)
		}
	}
	// sumsAgain makes the sums fit, as an enemy would.
	sumsAgain := func(do func()) func() {
		return func() {
			do()
			out := tool(t, path, "sh", "-c", "find . -type f ! -name SHA256SUMS | sed 's,^./,,' | sort | xargs sha256sum")
			write(t, at(sumsFile), []byte(out))
		}
	}
	h.format(t, filepath.Join(h.dir, "other.img"), atticDisk, "other")
	for _, tt := range []struct {
		name string
		do   func()
		live map[string]string
		want string
	}{
		{"key damaged", flip("disks/" + atticDisk + ".recovery.key"), nil, "is damaged or was changed"},
		{"key damaged, sums right", sumsAgain(flip("disks/" + atticDisk + ".recovery.key")), nil, "opens none of the key slots"},
		{"header of another disk", sumsAgain(func() {
			write(t, at("disks/"+atticDisk+".luks-header"), read(t, filepath.Join(h.dir, "other", atticDisk+".luks-header")))
		}), nil, "opens none of the key slots"},
		{"another disk altogether", sumsAgain(func() {
			for _, end := range []string{".luks-header", ".recovery.key"} {
				write(t, at("disks/"+atticDisk+end), read(t, filepath.Join(h.dir, "other", atticDisk+end)))
			}
		}), nil, "its header is not the one that bundle.toml names"},
		{"header cut", sumsAgain(func() { check(t, os.Truncate(at("disks/"+atticDisk+".luks-header"), 40000)) }), nil, "the disk of attic: "},
		{"file gone", func() { check(t, os.Remove(at("site/home/pusher/ssh_key"))) }, nil, `"site/home/pusher/ssh_key" is missing`},
		{"file added", func() { write(t, at("tools/linux-amd64/farkeep-keyserver"), []byte("x")) }, nil, "somebody put it there"},
		{"link", func() { check(t, os.Symlink("/etc/passwd", at("site/x"))) }, nil, "site/x is no regular file"},
		{"runbook of another hand", sumsAgain(func() { write(t, at(RunbookFile), append(read(t, at(RunbookFile)), "rm -rf /\n"...)) }), nil, "the runbook is not what this site"},
		{"borg key damaged", sumsAgain(func() { write(t, at("borg-keys/letters.keyfile"), []byte("BORG_KEY x\n")) }), nil, "the Borg key borg-keys/letters.keyfile: not a key file"},
		{"borg key of another", sumsAgain(func() { write(t, at("borg-keys/letters.keyfile"), read(t, at("borg-keys/photos.repokey"))) }), nil, "it is of another repository"},
		{"no manifest", func() { check(t, os.Remove(at(manifestFile))) }, nil, "not a bundle that can be used"},
		{"live header differs", func() {}, map[string]string{atticDisk: strings.Repeat("ab", 32)}, "attic: the header in the bundle is not the live one"},
		{"live header is it", func() {}, map[string]string{atticDisk: r.Manifest.Disks[0].Header}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			check(t, os.RemoveAll(path))
			o := h.options(Clear, "bundle")
			_, err := Create(o)
			check(t, err)
			tt.do()
			got := problems(t, h, path, tt.live)
			if tt.want == "" && len(got) > 0 || tt.want != "" && !strings.Contains(strings.Join(got, "\n"), tt.want) {
				t.Errorf("found %q; want %q", got, tt.want)
			}
		})
	}

	// The site goes on, and the bundle stays behind.
	check(t, os.RemoveAll(path))
	_, err = Create(h.options(Clear, "bundle"))
	check(t, err)
	before := read(t, filepath.Join(h.site, "site.toml"))
	for name, tt := range map[string]struct {
		do, undo func()
		want     string
	}{
		"a new identity": {func() { write(t, filepath.Join(h.site, "home/wireguard/farkeep.conf"), []byte("new")) }, func() { write(t, filepath.Join(h.site, "home/wireguard/farkeep.conf"), []byte("[Interface]\n")) }, "changed at the site since: home/wireguard/farkeep.conf"},
		"a repository": {func() {
			write(t, filepath.Join(h.site, "site.toml"), append(before, "\n[[repository]]\nname = \"new\"\npath = \"/srv/new\"\n"...))
		}, func() {}, "the repository new came after the bundle"},
		"the header": {func() {
			write(t, filepath.Join(h.site, "site.toml"), bytes.Replace(before, []byte("luks_uuid = \""+atticDisk+"\"\n"), []byte("luks_uuid = \""+atticDisk+"\"\nluks_header = \""+strings.Repeat("cd", 32)+"\"\n"), 1))
		}, func() {}, "not the live one (site.toml)"},
		"a disk": {func() {
			write(t, filepath.Join(h.site, "site.toml"), bytes.Replace(before, []byte("luks_uuid = \""+atticDisk+"\""), []byte("luks_uuid = \"11111111-2222-3333-4444-555555555555\""), 1))
		}, func() {}, "is not in the bundle"},
		"only the bundle's own entry": {func() {
			doc, err := site.ParseDocument("site.toml", before)
			check(t, err)
			b := doc.Site().Bundle
			b.Drilled = noon
			check(t, doc.SetBundle(b))
			write(t, filepath.Join(h.site, "site.toml"), doc.Text())
		}, func() {}, ""},
	} {
		t.Run("after "+name, func(t *testing.T) {
			tt.do()
			got := problems(t, h, path, nil)
			if tt.want == "" && len(got) > 0 || tt.want != "" && !strings.Contains(strings.Join(got, "\n"), tt.want) {
				t.Errorf("found %q; want %q", got, tt.want)
			}
			tt.undo()
			write(t, filepath.Join(h.site, "site.toml"), before)
		})
	}
}

// TestSealed: stock age and tar open it, our own program does, and nobody without
// the passphrase.
func TestSealed(t *testing.T) {
	h := newHome(t, "photos")
	o := h.options(Sealed, "sealed")
	self, err := os.Executable()
	check(t, err)
	o.Tools = []string{self}
	_, err = Create(o)
	check(t, err)
	sealed := filepath.Join(o.To, "farkeep-home.tar.age")
	if got := problems(t, h, o.To, nil); len(got) > 0 {
		t.Errorf("a new bundle has problems: %q", got)
	}
	for _, key := range []string{"disks", "recovery", "PRIVATE"} {
		if bytes.Contains(read(t, sealed), []byte(key)) {
			t.Errorf("the sealed bundle shows %q", key)
		}
	}
	if _, err := Open(o.To, wrongWords); err == nil || !strings.Contains(err.Error(), "the passphrase is wrong") {
		t.Errorf("with a wrong passphrase: %v", err)
	}
	check(t, Unseal(sealed, filepath.Join(h.dir, "ours"), words))
	// age asks the terminal; script(1) plays it.
	need(t, "age", "script")
	theirs := filepath.Join(h.dir, "theirs")
	check(t, os.Mkdir(theirs, 0o700))
	cmd := exec.Command("script", "--quiet", "--return", "--command", fmt.Sprintf("age --decrypt %s | tar -x --no-same-owner -C %s", sealed, theirs), "/dev/null")
	cmd.Stdin = strings.NewReader("six words that nobody ever guesses\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("age: %v\n%s", err, out)
	}
	tool(t, h.dir, "diff", "-r", "ours", "theirs/"+Folder)
	tool(t, filepath.Join(theirs, Folder), "sha256sum", "--quiet", "--strict", "-c", sumsFile)

	// Cut anywhere, or changed, it is refused, and nothing is unpacked.
	whole := read(t, sealed)
	for _, n := range []int{0, 200, len(whole) - 1} {
		write(t, sealed, whole[:n])
		if c, err := Open(sealed, words); err == nil {
			t.Errorf("cut to %d bytes it opens, with %d files", n, len(c.files))
		}
	}
	changed := bytes.Clone(whole)
	changed[len(changed)/2] ^= 1
	write(t, sealed, changed)
	if err := Unseal(sealed, filepath.Join(h.dir, "cut"), words); err == nil {
		t.Error("a changed bundle is unpacked")
	}
	if left, _ := filepath.Glob(filepath.Join(h.dir, "*cut*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestCreateRefuses(t *testing.T) {
	h := newHome(t, "photos")
	operator := func(name string) string { return filepath.Join(h.site, "operator", name) }
	keep := func(path string, do func()) func() func() {
		return func() func() {
			was := read(t, path)
			do()
			return func() { write(t, path, was) }
		}
	}
	other, _ := newKeyText(t)
	key, header, admin, toml := operator(atticDisk+".recovery.key"), operator(atticDisk+".luks-header"), operator("admin_key"), filepath.Join(h.site, "site.toml")
	for name, tt := range map[string]struct {
		do   func() func()
		to   string
		want string
	}{
		"wrong key":       {keep(key, func() { write(t, key, []byte("wrong")) }), "b", "opens none of the key slots"},
		"no key":          {keep(key, func() { check(t, os.Remove(key)) }), "b", "the recovery key of attic"},
		"no header":       {keep(header, func() { check(t, os.Remove(header)) }), "b", "the header backup of attic"},
		"header is noise": {keep(header, func() { write(t, header, make([]byte, 1<<20)) }), "b", "no LUKS header"},
		"admin key open":  {keep(admin, func() { write(t, admin, other) }), "b", "the admin key is not sealed"},
		"link in the site": {func() func() {
			check(t, os.Symlink("/etc/passwd", operator("x")))
			return func() { os.Remove(operator("x")) }
		}, "b", "no regular file"},
		"huge file": {func() func() {
			write(t, operator("x"), make([]byte, maxSiteFile+1))
			return func() { os.Remove(operator("x")) }
		}, "b", "larger than"},
		"other header": {keep(toml, func() {
			write(t, toml, bytes.Replace(read(t, toml), []byte("luks_uuid ="), []byte("luks_header = \""+strings.Repeat("cd", 32)+"\"\nluks_uuid ="), 1))
		}), "b", "not the header that site.toml names"},
		"no disk": {keep(toml, func() { write(t, toml, bytes.Replace(read(t, toml), []byte(atticDisk), nil, 1)) }), "b", "the site has no disk"},
		"something there": {func() func() {
			write(t, filepath.Join(h.dir, "b/mine"), nil)
			return func() { os.RemoveAll(filepath.Join(h.dir, "b")) }
		}, "b", "there is something already"},
		"in the repository": {func() func() { return func() {} }, "srv/photos/b", "the repository photos of the site"},
	} {
		t.Run(name, func(t *testing.T) {
			undo := tt.do()
			before := string(read(t, toml))
			if _, err := Create(h.options(Clear, tt.to)); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v; want %q", err, tt.want)
			}
			if string(read(t, toml)) != before {
				t.Error("site.toml names a bundle that was not made")
			}
			undo()
			if left, _ := filepath.Glob(filepath.Join(h.dir, "*b*")); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
	o := h.options(Clear, "mine")
	o.Replace = true
	write(t, filepath.Join(o.To, "photo.jpg"), nil)
	if _, err := Create(o); err == nil || !strings.Contains(err.Error(), "no bundle") {
		t.Errorf("a folder of somebody's own was replaced: %v", err)
	}
	o.To = "/proc"
	if _, err := Create(o); err == nil || !strings.Contains(err.Error(), "a disk is mounted there") {
		t.Errorf("onto a mount point: %v", err)
	}
	o.To = filepath.Join(h.dir, "again")
	// What an attempt that was killed has left, keys and all.
	write(t, filepath.Join(h.dir, ".again.new-123/disks/x.recovery.key"), []byte("key"))
	write(t, filepath.Join(h.dir, ".again.new-123.old/disks/x.recovery.key"), []byte("key"))
	for range 3 {
		_, err := Create(o)
		check(t, err)
	}
	o.KnownBy = "two\nlines"
	if _, err := Create(o); err == nil {
		t.Error("a note of two lines was taken")
	}
	if left, _ := filepath.Glob(filepath.Join(h.dir, ".again*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func newKeyText(t *testing.T) ([]byte, error) {
	t.Helper()
	dir := t.TempDir()
	tool(t, dir, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(dir, "k"))
	return read(t, filepath.Join(dir, "k")), nil
}

func TestPlacement(t *testing.T) {
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	for _, name := range []string{"srv/photos", "more/one", "nas", "stick"} {
		check(t, os.MkdirAll(in(name), 0o700))
	}
	check(t, os.Symlink(in("srv/photos"), in("stick/link")), os.Symlink(in("nowhere"), in("stick/dead")))
	s := &site.Site{
		Repositories: []site.Repository{{Name: "photos", Path: in("srv/photos")}, {Name: "gone", Path: "/srv/farkeep-test-that-is-not-here"}},
		Folders:      []site.Folder{{Path: in("more")}},
		Directories:  []site.Directory{{Name: "nas", Path: in("nas")}},
	}
	for to, want := range map[string]string{
		"stick/b":                                "",
		"srv/photographs":                        "",
		"srv/photos":                             "the repository photos",
		"srv/photos/deep/b":                      "the repository photos",
		"stick/link/b":                           "the repository photos",
		"more/b":                                 "the folder of repositories",
		"nas/generations/b":                      "the target nas",
		"srv":                                    "the repository photos",
		"stick/dead/b":                           "a link that leads nowhere",
		"../../../../../../../../../../../../..": "of the site",
	} {
		warnings, err := Placement(s, in(to))
		if (want == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v; want %q", to, err, want)
		}
		if err == nil && !strings.Contains(strings.Join(warnings, "\n"), "on the same file system as "+in("srv/photos")) {
			t.Errorf("%s: no word of the file system: %q", to, warnings)
		}
	}
	if _, err := Placement(s, "/srv/farkeep-test-that-is-not-here/b"); err == nil {
		t.Error("a repository of another machine was not seen")
	}
}

func TestStrong(t *testing.T) {
	for passphrase, strong := range map[string]bool{
		"": false, "secret": false, "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa": false, "one two six ten": false, "abc abc abc abc abc abc": false,
		"six words that nobody ever guesses": true, "K7#qLz!v0pWm2$xRt9&u": true, "zwölf Äpfel über sieben Öfen gären": true, "\xff\xfe six words that nobody ever guesses": false,
	} {
		if err := Strong(secret.New([]byte(passphrase))); (err == nil) != strong {
			t.Errorf("%q: %v", passphrase, err)
		}
	}
}

func TestTools(t *testing.T) {
	self, err := os.Executable()
	check(t, err)
	dir := t.TempDir()
	write(t, filepath.Join(dir, "text"), []byte("#!/bin/sh\n"))
	for _, name := range []string{"farkeep-keyserver-amd64", "borg-linux-glibc231-x86_64"} {
		check(t, os.Link(self, filepath.Join(dir, name)))
	}
	c, r := newContents(), &Report{}
	check(t, tools([]string{filepath.Join(dir, "farkeep-keyserver-amd64"), filepath.Join(dir, "borg-linux-glibc231-x86_64")}, c, r))
	arch, err := machine(self)
	check(t, err)
	if want := []string{"tools/linux-" + arch + "/borg", "tools/linux-" + arch + "/farkeep-keyserver"}; !slices.Equal(c.Names(), want) {
		t.Errorf("%v; want %v", c.Names(), want)
	}
	if len(r.Notes) != 1 {
		t.Errorf("notes: %q", r.Notes)
	}
	if err := tools([]string{filepath.Join(dir, "text")}, newContents(), r); err == nil {
		t.Error("a text was taken for a program")
	}
}

func TestManifestRefuses(t *testing.T) {
	good := func() *Manifest {
		return &Manifest{Format: 1, Site: "home", Created: noon, Disks: []Disk{{"attic", atticDisk, strings.Repeat("ab", 32)}},
			Repositories: []Repository{{Name: "photos", ID: strings.Repeat("cd", 32), Key: runbook.KeyFile, Keys: []string{"borg-keys/photos.keyfile"}}}}
	}
	text, err := good().text()
	check(t, err)
	m, err := ParseManifest(text)
	check(t, err)
	if m.Repositories[0].unreadable() || m.Disks[0] != good().Disks[0] {
		t.Errorf("read as %+v", m)
	}
	for name, change := range map[string]func(*Manifest){
		"format":         func(m *Manifest) { m.Format = 2 },
		"site":           func(m *Manifest) { m.Site = "../x" },
		"no disk":        func(m *Manifest) { m.Disks = nil },
		"disk":           func(m *Manifest) { m.Disks[0].LUKS = "../../etc" },
		"header":         func(m *Manifest) { m.Disks[0].Header = "x" },
		"disk twice":     func(m *Manifest) { m.Disks = append(m.Disks, m.Disks[0]) },
		"repository":     func(m *Manifest) { m.Repositories[0].Name = "a b; rm" },
		"id":             func(m *Manifest) { m.Repositories[0].ID = "x" },
		"kind":           func(m *Manifest) { m.Repositories[0].Key = "x" },
		"key outside":    func(m *Manifest) { m.Repositories[0].Keys = []string{"../borg-keys/x"} },
		"key elsewhere":  func(m *Manifest) { m.Repositories[0].Keys = []string{"disks/x"} },
		"note of lines":  func(m *Manifest) { m.KnownBy = "a\nb" },
		"note that runs": func(m *Manifest) { m.KnownBy = strings.Repeat("a", maxKnownBy+1) },
	} {
		m := good()
		change(m)
		text, err := m.text()
		check(t, err)
		if _, err := ParseManifest(text); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// archive is a tar with one file of the name.
func archive(t testing.TB, name string, kind byte, size int64) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	check(t, w.WriteHeader(&tar.Header{Name: name, Typeflag: kind, Size: size, Mode: 0o600, Linkname: "x"}))
	if kind == tar.TypeReg {
		_, err := io.CopyN(w, zeros{}, min(size, 100))
		check(t, err)
	}
	if size <= 100 {
		check(t, w.Close())
	}
	return out.Bytes()
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestReadTarRefuses(t *testing.T) {
	for name, b := range map[string][]byte{
		"outside":        archive(t, "etc/passwd", tar.TypeReg, 1),
		"up":             archive(t, Folder+"/../x", tar.TypeReg, 1),
		"absolute":       archive(t, "/"+Folder+"/x", tar.TypeReg, 1),
		"link":           archive(t, Folder+"/x", tar.TypeSymlink, 0),
		"hard link":      archive(t, Folder+"/x", tar.TypeLink, 0),
		"device":         archive(t, Folder+"/x", tar.TypeChar, 0),
		"line in a name": archive(t, Folder+"/a\nb", tar.TypeReg, 1),
		"huge":           archive(t, Folder+"/x", tar.TypeReg, maxSmall+1),
		"huge tool":      archive(t, Folder+"/tools/x", tar.TypeReg, maxTool+1),
		"cut":            archive(t, Folder+"/x", tar.TypeReg, 1000),
		"noise":          bytes.Repeat([]byte("noise"), 500),
	} {
		if c, err := readTar(bytes.NewReader(b)); err == nil {
			t.Errorf("%s: taken, %v", name, c.Names())
		}
	}
	twice := append(archive(t, Folder+"/x", tar.TypeReg, 1)[:1024], archive(t, Folder+"/x", tar.TypeReg, 1)...)
	if _, err := readTar(bytes.NewReader(twice)); err == nil {
		t.Error("a name that is there twice was taken")
	}
}

func FuzzReadTar(f *testing.F) {
	f.Add(archive(f, Folder+"/"+manifestFile, tar.TypeReg, 5))
	f.Add(archive(f, Folder+"/../x", tar.TypeReg, 5))
	f.Add(archive(f, Folder+"/tools/x", tar.TypeReg, 100))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := readTar(bytes.NewReader(b))
		if err != nil {
			return
		}
		total := int64(0)
		for _, name := range c.Names() {
			if !filepath.IsLocal(name) || strings.ContainsAny(name, "\n\\") {
				t.Errorf("name %q", name)
			}
			total += c.files[name].Size
		}
		if total > int64(len(b)) {
			t.Errorf("%d bytes out of %d", total, len(b))
		}
		if m, err := c.Manifest(); err == nil && len(m.Disks) == 0 {
			t.Error("a manifest without a disk")
		}
		c.checkSums()
	})
}

func FuzzParseManifest(f *testing.F) {
	m := &Manifest{Format: 1, Site: "home", Created: noon, Disks: []Disk{{"attic", atticDisk, strings.Repeat("ab", 32)}}, Repositories: []Repository{{Name: "a", Key: runbook.KeyNone}}}
	text, err := m.text()
	check(f, err)
	f.Add(text)
	f.Fuzz(func(t *testing.T, text []byte) {
		m, err := ParseManifest(text)
		if err != nil {
			return
		}
		// What is accepted is written and read as the same.
		again, err := m.text()
		check(t, err)
		if _, err := ParseManifest(again); err != nil {
			t.Errorf("%v\n%s", err, again)
		}
	})
}
