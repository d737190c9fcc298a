package repository

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"farkeep/pusher/borgtest"
	"farkeep/shared/hint"
	"farkeep/shared/pushwire"
	"farkeep/shared/site"
)

const someID = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"

// fake makes what looks like a Borg repository.
func fake(t *testing.T, path, id string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(path, "data"), 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(path, "README"), "This is a Borg Backup repository.\n")
	write(t, filepath.Join(path, "config"), "[repository]\nversion = 1\nsegments_per_dir = 1000\nid = "+id+"\n\n")
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func names(f Found) (repositories, beside, problems []string) {
	for _, r := range f.Repositories {
		repositories = append(repositories, r.Name+" "+r.Kind)
	}
	for _, b := range f.Beside {
		beside = append(beside, filepath.Base(b.Path))
	}
	for _, p := range f.Problems {
		problems = append(problems, p.Name)
	}
	return repositories, beside, problems
}

func TestRealBorg(t *testing.T) {
	dir := t.TempDir()
	for _, encryption := range []string{"none", "repokey"} {
		r := borgtest.Init(t, dir, encryption, encryption)
		c, err := ReadBorg(r.Path)
		if err != nil {
			t.Fatal(err)
		}
		if out := r.Run(t, "config", r.Path, "id"); strings.TrimSpace(out) != c.ID {
			t.Errorf("id %s, borg says %s", c.ID, out)
		}
	}
}

func TestFind(t *testing.T) {
	folder, tree := t.TempDir(), t.TempDir()
	fake(t, filepath.Join(folder, "photos"), someID)
	fake(t, filepath.Join(folder, "old"), someID)
	fake(t, filepath.Join(folder, "bad name"), someID)
	fake(t, filepath.Join(folder, "named-too"), someID)
	fake(t, filepath.Join(folder, "broken"), "short")
	fake(t, filepath.Join(folder, "headless"), someID)
	if err := os.Remove(filepath.Join(folder, "headless", "config")); err != nil {
		t.Fatal(err)
	}
	fake(t, filepath.Join(folder, "future"), someID)
	write(t, filepath.Join(folder, "future", "config"), "[repository]\nversion = 2\nid = "+someID+"\n")
	fake(t, filepath.Join(folder, "cut"), someID)
	if err := os.Remove(filepath.Join(folder, "cut", "data")); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"stuff", "lost+found"} {
		if err := os.Mkdir(filepath.Join(folder, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write(t, filepath.Join(folder, "notes.txt"), "x")
	if err := os.Symlink(filepath.Join(folder, "photos"), filepath.Join(folder, "link")); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(filepath.Join(folder, "stuff", "config"), 0o600); err != nil {
		t.Fatal(err)
	}
	f := Find(&site.Site{
		Repositories: []site.Repository{
			{Name: "documents", Path: tree},
			{Name: "music", Path: filepath.Join(folder, "named-too")},
			{Name: "gone", Path: filepath.Join(folder, "not-there")},
		},
		Folders: []site.Folder{{Path: folder, Exclude: []string{"old"}}},
	})
	repositories, beside, problems := names(f)
	if d := cmp.Diff([]string{"documents files", "music borg1", "photos borg1"}, repositories); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff([]string{"future", "link", "notes.txt", "stuff"}, beside); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff([]string{"bad name", "broken", "cut", "gone", "headless"}, problems); d != "" {
		t.Error(d)
	}
	for _, p := range f.Problems {
		if p.Err == nil || strings.Contains(p.Err.Error(), "%!") {
			t.Errorf("%s: %v", p.Name, p.Err)
		}
	}
}

func TestTwins(t *testing.T) {
	a, b := t.TempDir(), t.TempDir()
	fake(t, filepath.Join(a, "photos"), someID)
	fake(t, filepath.Join(b, "photos"), someID)
	f := Find(&site.Site{Folders: []site.Folder{{Path: a}, {Path: b}}})
	if len(f.Repositories) != 0 || len(f.Problems) != 1 || !strings.Contains(hint.Of(f.Problems[0].Err), "prefix") {
		t.Errorf("%+v", f)
	}
	f = Find(&site.Site{Folders: []site.Folder{{Path: a}, {Path: b, Prefix: "b-"}}})
	repositories, _, problems := names(f)
	if d := cmp.Diff([]string{"b-photos borg1", "photos borg1"}, repositories); d != "" || len(problems) > 0 {
		t.Error(d, problems)
	}
}

func mount(t *testing.T, dir string) func() {
	t.Helper()
	if err := syscall.Mount("none", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal("mount a tmpfs (needs root, which CI has): ", err)
	}
	gone := false
	unmount := func() {
		if !gone {
			gone = true
			if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
				t.Error(err)
			}
		}
	}
	t.Cleanup(unmount)
	return unmount
}

func TestMountIsGone(t *testing.T) {
	disk := t.TempDir()
	unmount := mount(t, disk)
	fake(t, filepath.Join(disk, "photos"), someID)
	memory := NewMemory(t.TempDir())
	named := &site.Site{Repositories: []site.Repository{{Name: "photos", Path: filepath.Join(disk, "photos"), Mount: disk}}}
	folders := &site.Site{Folders: []site.Folder{{Path: disk, Mount: disk}}}
	bare := &site.Site{Folders: []site.Folder{{Path: disk}}}
	for _, s := range []*site.Site{named, folders, bare} {
		f := Find(s)
		if len(f.Repositories) != 1 || f.Repositories[0].MountedAt != disk || len(f.Problems) != 0 {
			t.Fatalf("%+v", f)
		}
	}
	if err := memory.Pushed(Find(bare).Repositories[0], "attic", Push{At: time.Unix(1e9, 0)}); err != nil {
		t.Fatal(err)
	}

	unmount()
	for _, s := range []*site.Site{named, folders} {
		f := Find(s)
		if len(f.Repositories) != 0 || len(f.Problems) != 1 {
			t.Errorf("unmounted: %+v", f)
		}
	}
	// Without a mount point in the site it is memory that notices.
	missing, err := memory.Missing(Find(bare), []string{disk})
	if err != nil || len(missing) != 1 || missing[0].Name != "photos" {
		t.Errorf("missing: %+v %v", missing, err)
	}
	// Something lies below the empty mount point under the same name.
	fake(t, filepath.Join(disk, "photos"), someID)
	f := Find(bare)
	if len(f.Repositories) != 1 {
		t.Fatalf("%+v", f)
	}
	if err := memory.Check(f.Repositories[0]); err == nil || !strings.Contains(err.Error(), "was on the file system at "+disk) {
		t.Errorf("got %v", err)
	}
}

func TestMemory(t *testing.T) {
	dir := t.TempDir()
	m := NewMemory(dir)
	r := Repository{Name: "photos", Path: "/srv/photos", Kind: pushwire.KindBorg1, ID: someID, MountedAt: "/srv"}
	if err := m.Check(r); err != nil {
		t.Errorf("never seen: %v", err)
	}
	if err := m.Pushed(r, "attic", Push{At: time.Unix(1e9, 0), Generation: "g1"}); err != nil {
		t.Fatal(err)
	}
	if err := m.Pushed(r, "cellar", Push{At: time.Unix(2e9, 0), Generation: "g2"}); err != nil {
		t.Fatal(err)
	}
	got, ok, err := m.Get("photos")
	if err != nil || !ok || len(got.Pushed) != 2 || !got.First.Equal(time.Unix(1e9, 0)) {
		t.Errorf("%+v %v %v", got, ok, err)
	}
	if err := m.Check(r); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(*Repository){
		"another id":          func(r *Repository) { r.ID = strings.Repeat("f", 64) },
		"another file system": func(r *Repository) { r.MountedAt = "/" },
		"no borg any more":    func(r *Repository) { r.Kind, r.ID = pushwire.KindFiles, "" },
	} {
		other := r
		change(&other)
		err := m.Check(other)
		if err == nil || !strings.Contains(hint.Of(err), "forget photos") {
			t.Errorf("%s: %v, hint %q", name, err, hint.Of(err))
		}
	}
	moved := r
	moved.Path = "/srv/pictures"
	if err := m.Check(moved); err != nil {
		t.Errorf("moved on the same file system: %v", err)
	}
	write(t, filepath.Join(dir, "photos.json"), "{")
	if err := m.Check(r); err == nil || !strings.Contains(hint.Of(err), "forget photos") {
		t.Errorf("damaged memory: %v", err)
	}
	if err := m.Forget("photos"); err != nil {
		t.Fatal(err)
	}
	if err := m.Forget("photos"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("forget twice: %v", err)
	}
	if err := m.Forget("../x"); err == nil {
		t.Error("forgot a path")
	}
}

func TestParseMounts(t *testing.T) {
	text := `22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw
36 22 98:0 / /mnt/my\040disk rw,noatime master:1 shared:7 - ext3 /dev/root rw,errors=continue
40 22 0:5 / /net rw - autofs systemd-1 rw
41 40 0:6 / /net rw - nfs4 nas:/export rw
`
	got, err := parseMounts(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	want := mountTable{"/": "ext4", "/mnt/my disk": "ext3", "/net": "nfs4"}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	for path, want := range map[string]string{"/mnt/my disk/a/b": "/mnt/my disk", "/mnt": "/", "/net": "/net", "/netx": "/"} {
		if at := got.mountOf(path, ""); at != want {
			t.Errorf("%s lies on %s, want %s", path, at, want)
		}
	}
	if _, err := parseMounts(strings.NewReader("what is this\n")); err == nil {
		t.Error("nonsense was understood")
	}
}

func FuzzParseMounts(f *testing.F) {
	f.Add("22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n")
	f.Add("41 40 0:6 / /a\\040b rw - nfs4 nas:/export rw\n")
	f.Fuzz(func(t *testing.T, text string) {
		table, err := parseMounts(strings.NewReader(text))
		if err != nil {
			return
		}
		for at := range table {
			if strings.Contains(at, `\040`) && !strings.Contains(text, `\134`) {
				t.Errorf("still escaped: %q of %s", at, fmt.Sprintf("%q", text))
			}
		}
	})
}

func TestUnreadable(t *testing.T) {
	denied := &fs.PathError{Op: "open", Path: "/srv/borg/photos/config", Err: syscall.EACCES}
	for _, tt := range []struct {
		err  error
		want string
	}{
		{denied, "run it as the owner of the repositories, or as root"},
		{errors.New("no id"), `run "borg check /srv/borg/photos"`},
		{hint.Because(denied, "its own"), "its own"},
	} {
		if got := unreadable(tt.err, "/srv/borg/photos"); hint.Of(got) != tt.want || !errors.Is(got, tt.err) {
			t.Errorf("%v: hint %q, want %q", got, hint.Of(got), tt.want)
		}
	}
}
