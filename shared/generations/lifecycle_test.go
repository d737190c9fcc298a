package generations_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"farkeep/shared/generations"
	"farkeep/shared/hint"
	"farkeep/shared/pushwire"

	"golang.org/x/sys/unix"
)

func TestResume(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, generations.Options{})
	long := noise(1, 20<<20)
	day := tree{}.add("a", "first").add("m/long", long).add("z", "last")

	answer, tx, err := begin(t, s, "photos", day)
	if err != nil || answer.Need != 3 || answer.NeedBytes != int64(len(long)+9) {
		t.Fatal(answer, err)
	}
	id := tx.ID()
	if _, err := upload(t, tx, day, answer, 15<<20); err == nil {
		t.Fatal("a cut upload was accepted")
	}
	tx.Close()

	// The same offer: no manifest is asked for, and the long file goes on.
	_, offer := day.manifest(t)
	answer, tx, err = s.Begin(t.Context(), generations.Request{Repository: "photos", Offer: offer, Pusher: "home"})
	if err != nil || answer.Answer != pushwire.AnswerSend || answer.Need != 2 || answer.Kept != 1 || tx.ID() != id {
		t.Fatalf("resumed: %+v, %v", answer, err)
	}
	if len(answer.Resume) != 1 || answer.Resume[0].Have < 14<<20 || answer.NeedBytes > 6<<20+10 {
		t.Fatalf("resumed: %+v; want nearly 15 MiB of the long file kept", answer)
	}
	if _, err := upload(t, tx, day, answer, 3<<20); err == nil {
		t.Fatal("a cut upload was accepted")
	}
	tx.Close()

	// Meanwhile the repository went on: the push is another one, the bytes stay.
	next := day.clone().add("b", "second")
	delete(next, "a")
	answer, tx, err = begin(t, s, "photos", next)
	if err != nil || len(answer.Resume) != 1 || answer.Resume[0].Have < 15<<20 {
		t.Fatalf("resumed by another push: %+v, %v", answer, err)
	}
	if _, err := upload(t, tx, next, answer, -1); err != nil {
		t.Fatal(err)
	}
	tx.Close()
	// Complete, but the commit never came; the repository went on once more.
	last := next.clone().add("c", "third")
	answer, tx, err = begin(t, s, "photos", last)
	if err != nil || answer.Need != 1 || answer.Kept != 3 {
		t.Fatalf("after a complete upload: %+v, %v", answer, err)
	}
	tx.Close()
	name, got := push(t, s, "photos", last)
	if got.Files != 1 {
		t.Errorf("the last push uploaded %d files", got.Files)
	}
	compare(t, dir, "photos", name, last)
}

// A half-built file whose beginning is wrong costs one upload of that file.
func TestWrongBeginningIsDiscarded(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, generations.Options{})
	day := tree{}.add("long", noise(1, 10<<20))
	answer, tx, err := begin(t, s, "photos", day)
	if err != nil {
		t.Fatal(err)
	}
	upload(t, tx, day, answer, 8<<20)
	tx.Close()
	half := filepath.Join(dir, "incoming/photos/building", day.entries()[0].Sum.String())
	f, err := os.OpenFile(half, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("rot"), 12345); err != nil {
		t.Fatal(err)
	}
	f.Close()
	answer, tx, err = begin(t, s, "photos", day)
	if err != nil || len(answer.Resume) != 1 {
		t.Fatal(answer, err)
	}
	if _, err := upload(t, tx, day, answer, -1); err == nil || !strings.Contains(err.Error(), "does not have the hash") {
		t.Errorf("a wrong beginning: %v", err)
	}
	tx.Close()
	name, _ := push(t, s, "photos", day)
	compare(t, dir, "photos", name, day)
}

func TestAbortDiscards(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, generations.Options{})
	day := tree{}.add("a", noise(1, 1<<20))
	answer, tx, err := begin(t, s, "photos", day)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := upload(t, tx, day, answer, -1); err != nil {
		t.Fatal(err)
	}
	if err := tx.Abort(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Commit(t.Context()); err == nil {
		t.Error("an aborted push was committed")
	}
	tx.Close()
	if left, _ := os.ReadDir(filepath.Join(dir, "incoming/photos")); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
	if answer, tx, err := begin(t, s, "photos", day); err != nil || answer.Need != 1 {
		t.Errorf("after an abort: %+v, %v", answer, err)
	} else {
		tx.Close()
	}
}

// A base that lost files, or their content, must not stop the pushes.
func TestDamagedBase(t *testing.T) {
	day := tree{}.add("d/a", "content").add("d/b", noise(5, 1000)).add("run", "#!/bin/sh\n")
	next := day.clone().add("d/c", "third")
	script := next["run"]
	script.mode = 0o700 // another mode on the disk: a copy, not a link
	next["run"] = script
	tests := []struct {
		name   string
		damage func(generation string) error
		resent int64 // files that the second attempt uploads
	}{
		{"nothing", func(string) error { return nil }, 1},
		{"a file is gone", func(g string) error { return os.Remove(g + "/files/d/a") }, 2},
		{"a file is shorter", func(g string) error { return os.Truncate(g+"/files/d/b", 999) }, 2},
		{"a folder is gone", func(g string) error { return os.RemoveAll(g + "/files/d") }, 3},
		{"rot in a file that is copied", func(g string) error {
			os.Chmod(g+"/files/run", 0o644)
			return os.WriteFile(g+"/files/run", []byte("#!/bin/zh\n"), 0o644)
		}, 2},
		{"the list is gone", func(g string) error { return os.Remove(g + "/MANIFEST") }, 4},
		{"the list is rotten", func(g string) error {
			data, err := os.ReadFile(g + "/MANIFEST")
			if err == nil {
				data[60] ^= 4
				os.Remove(g + "/MANIFEST")
				err = os.WriteFile(g+"/MANIFEST", data, 0o444)
			}
			return err
		}, 4},
		{"generation.toml is gone", func(g string) error { return os.Remove(g + "/generation.toml") }, 4},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			s, err := generations.Open(dir, generations.Options{Reserve: 1})
			if err != nil {
				t.Fatal(err)
			}
			one, _ := push(t, s, "photos", day)
			s.Close()
			if err := tt.damage(filepath.Join(dir, "generations/photos", one)); err != nil {
				t.Fatal(err)
			}
			s = open(t, dir, generations.Options{}) // nothing remembered
			var uploaded int64
			var name string
			for attempt := range 2 {
				answer, tx, err := begin(t, s, "photos", next)
				if err != nil {
					t.Fatal(err)
				}
				got, err := upload(t, tx, next, answer, -1)
				if err != nil {
					t.Fatal(err)
				}
				uploaded += got.Files
				name, err = tx.Commit(t.Context())
				tx.Close()
				if err == nil {
					break
				}
				if attempt > 0 || !errors.Is(err, generations.ErrDamaged) || hint.Of(err) == "" {
					t.Fatalf("attempt %d: %v, hint %q", attempt+1, err, hint.Of(err))
				}
			}
			if uploaded != tt.resent {
				t.Errorf("%d files were uploaded; want %d", uploaded, tt.resent)
			}
			compare(t, dir, "photos", name, next)
			if two, _, _ := generations.ParseName(name); two != 2 {
				t.Errorf("it got number %d", two)
			}
		})
	}
}

func TestModesAndTimes(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, generations.Options{})
	mtime := time.Date(2001, 2, 3, 4, 5, 6, 7, time.UTC)
	day := tree{}.add("plain", "p").add("open", "o").add("tool", "t").add("same a", "twin").add("same b", "twin")
	for path, mode := range map[string]uint32{"plain": 0o600, "open": 0o666, "tool": 0o4755, "same a": 0o644, "same b": 0o755} {
		f := day[path]
		f.mode, f.mtime = mode, mtime.UnixNano()
		day[path] = f
	}
	day["locked"] = file{folder: true, mode: 0o000}
	name, _ := push(t, s, "photos", day)
	base := filepath.Join(dir, "generations/photos", name)
	for path, want := range map[string]fs.FileMode{
		"": fs.ModeDir | 0o755, "MANIFEST": 0o444, "SUMS.b2": 0o444, "generation.toml": 0o444, "files": fs.ModeDir | 0o755,
		"files/plain": 0o444, "files/open": 0o444, "files/tool": 0o555, "files/same a": 0o444, "files/same b": 0o555, "files/locked": fs.ModeDir | 0o755,
	} {
		info, err := os.Stat(filepath.Join(base, path))
		if err != nil || info.Mode() != want {
			t.Errorf("%s has mode %v, %v; want %v", path, info.Mode(), err, want)
		}
	}
	if info, err := os.Stat(filepath.Join(base, "files/plain")); err != nil || !info.ModTime().Equal(mtime) {
		t.Errorf("modified %v, %v; want %v", info.ModTime(), err, mtime)
	}
	for path, want := range map[string]fs.FileMode{"generations": 0o700, "incoming": 0o700} {
		if info, err := os.Stat(filepath.Join(dir, path)); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s has mode %v; want %v", path, info.Mode(), want)
		}
	}
	compare(t, dir, "photos", name, day)

	// A disk that was filled at home is opened by the appliance.
	open(t, dir, generations.Options{Shared: true})
	if info, err := os.Stat(filepath.Join(dir, "generations")); err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("shared: mode %v, %v", info.Mode(), err)
	}
}

func TestOwner(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("only root gives files away: run this test as root")
	}
	dir := t.TempDir()
	s := open(t, dir, generations.Options{Owner: &generations.Owner{UID: 902, GID: 902}})
	push(t, s, "photos", tree{}.add("d/a", "1"))
	push(t, s, "photos", tree{}.add("d/a", "1").add("d/b", "2"))
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		info, err := d.Info()
		if err == nil && info.Sys().(*syscall.Stat_t).Uid != 902 {
			t.Errorf("%s belongs to %d", path, info.Sys().(*syscall.Stat_t).Uid)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// A disk that was filled at home as root, for the appliance's user, is carried on by
// that user without sending anything again.
func TestApplianceCarriesOn(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("only root gives files away: run this test as root")
	}
	const keeper = 902
	dir := tmpfs(t, "64m")
	// The other user must be able to come here at all.
	if err := errors.Join(os.Chown(dir, keeper, keeper), os.Chmod(filepath.Dir(dir), 0o755)); err != nil {
		t.Fatal(err)
	}
	s, err := generations.Open(dir, generations.Options{Reserve: 1, Owner: &generations.Owner{UID: keeper, GID: keeper}})
	if err != nil {
		t.Fatal(err)
	}
	one, _ := push(t, s, "photos", dayTree(1))
	// A push that was cut at home goes on there as well.
	next := dayTree(2)
	answer, tx, err := begin(t, s, "photos", next)
	if err != nil {
		t.Fatal(err)
	}
	upload(t, tx, next, answer, 2000)
	tx.Close()
	s.Close()

	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), crashFolder+"="+dir, crashOnce+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: keeper, Gid: keeper}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	two := strings.TrimSpace(string(out))
	compare(t, dir, "photos", one, dayTree(1))
	compare(t, dir, "photos", two, next)
	inode := func(name string) uint64 {
		return inodeOf(t, filepath.Join(dir, "generations/photos", name, "files/config"))
	}
	if inode(one) != inode(two) {
		t.Error("an unchanged file was stored again")
	}
}

// An inode has at most 65,000 names on ext4. Reached, the file is copied, and the
// next generations share the copy.
func TestMostLinks(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, generations.Options{})
	day := tree{}.add("config", "the same for ever")
	one, _ := push(t, s, "photos", day)
	path := filepath.Join(dir, "generations/photos", one, "files/config")
	links := t.TempDir()
	for i := range 64998 {
		if err := os.Link(path, filepath.Join(links, fmt.Sprint(i))); err != nil {
			t.Fatalf("link %d: %v", i, err)
		}
	}
	names := []string{one}
	for i := range 3 {
		day.add("day", fmt.Sprint(i))
		name, _ := push(t, s, "photos", day)
		compare(t, dir, "photos", name, day)
		names = append(names, name)
	}
	inode := func(i int) uint64 {
		return inodeOf(t, filepath.Join(dir, "generations/photos", names[i], "files/config"))
	}
	if inode(0) != inode(1) || inode(1) == inode(2) || inode(2) != inode(3) {
		t.Errorf("inodes %d %d %d %d; want the first two shared, then a copy shared", inode(0), inode(1), inode(2), inode(3))
	}
}

func TestNumbersAreNeverReused(t *testing.T) {
	dir := t.TempDir()
	now := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	s := open(t, dir, generations.Options{Now: func() time.Time { return now }, ClockSet: func() bool { return now.Year() > 2000 }})
	one, _ := push(t, s, "photos", tree{}.add("a", "1"))
	now = time.Date(1970, 1, 1, 0, 0, 1, 0, time.UTC) // the clock went back
	two, _ := push(t, s, "photos", tree{}.add("a", "2"))
	if one != "000001-20300101T000000Z" || two != "000002-19700101T000001Z" {
		t.Errorf("generations %s, %s", one, two)
	}
	if g, err := s.Newest(t.Context(), "photos"); err != nil || g.Name != two || g.ClockSet {
		t.Errorf("the newest is %s (clock set %v), %v: not the time decides", g.Name, g.ClockSet, err)
	}
	if err := os.RemoveAll(filepath.Join(dir, "generations/photos", two)); err != nil {
		t.Fatal(err)
	}
	if three, _ := push(t, s, "photos", tree{}.add("a", "3")); !strings.HasPrefix(three, "000003-") {
		t.Errorf("after number 2 was gone came %s", three)
	}
}

func TestSpace(t *testing.T) {
	dir := tmpfs(t, "16m")
	s := open(t, dir, generations.Options{Reserve: 2 << 20})
	first := tree{}.add("a", noise(1, 4<<20))
	one, _ := push(t, s, "photos", first)

	big := first.clone().add("b", noise(2, 12<<20))
	_, _, err := begin(t, s, "photos", big)
	var space *generations.SpaceError
	if !errors.As(err, &space) || space.Needs < 12<<20 || space.Has > 10<<20 || space.Reserve != 2<<20 {
		t.Fatalf("a push that does not fit: %v", err)
	}
	if !strings.Contains(err.Error(), fmt.Sprint(space.Needs)) || !strings.Contains(err.Error(), fmt.Sprint(space.Has)) {
		t.Errorf("%q has no numbers", err)
	}

	// It fits when it starts; then something else takes the room.
	day := first.clone().add("b", noise(3, 3<<20)).add("c", noise(4, 5<<20))
	answer, tx, err := begin(t, s, "photos", day)
	if err != nil {
		t.Fatal(err)
	}
	// What one push will write is not there for another one.
	if _, _, err := begin(t, s, "docs", tree{}.add("d", noise(6, 4<<20))); !errors.As(err, &space) {
		t.Errorf("a second push into the same room: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "thief"), make([]byte, 6<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = upload(t, tx, day, answer, -1)
	if !errors.Is(err, unix.ENOSPC) || !strings.Contains(hint.Of(err), "make room") {
		t.Fatalf("the disk filled up: %v, hint %q", err, hint.Of(err))
	}
	tx.Close()
	compare(t, dir, "photos", one, first)
	if err := os.Remove(filepath.Join(dir, "thief")); err != nil {
		t.Fatal(err)
	}
	two, got := push(t, s, "photos", day)
	if got.Files != 1 {
		t.Errorf("after room was made %d files were uploaded; want the one that did not fit", got.Files)
	}
	compare(t, dir, "photos", two, day)
}

func TestQuota(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, generations.Options{})
	try := func(repository string, day tree, quota int64) (*generations.Transaction, error) {
		list, offer := day.manifest(t)
		answer, tx, err := s.Begin(t.Context(), generations.Request{Repository: repository, Offer: offer, Pusher: "home", Quota: quota})
		if err == nil && answer.Answer == pushwire.AnswerSendManifest {
			if _, err = tx.TakeManifest(t.Context(), bytes.NewReader(list)); err != nil {
				tx.Close()
			}
		}
		return tx, err
	}
	const lists = 163 // bytes of overhead that a file with a name of one letter costs
	day := tree{}.add("a", noise(1, 1000))
	push(t, s, "photos", day)
	next := day.clone().add("b", noise(2, 500))
	used, needs := int64(1000+lists), int64(500+2*lists)
	var over *generations.QuotaError
	if _, err := try("photos", next, used+needs-1); !errors.As(err, &over) || over.Used != used || over.Needs != needs {
		t.Errorf("1 byte over the quota: %v", err)
	}
	tx, err := try("photos", next, used+needs)
	if err != nil {
		t.Fatalf("just within the quota: %v", err)
	}
	tx.Close()
	// The push that lies there counts: otherwise each repository would have a quota of its own.
	if _, err := try("docs", tree{}.add("c", "x"), used+needs); !errors.As(err, &over) || over.Used != used+needs {
		t.Errorf("another repository beside a push under way: %v", err)
	}
	// So do names without content.
	names := tree{}
	for i := range 100 {
		names.add(strings.Repeat("n", 200)+fmt.Sprint(i), "")
	}
	if _, err := try("photos", names, 50_000); !errors.As(err, &over) || over.Needs < 70_000 {
		t.Errorf("a hundred long names: %v", err)
	}
	// Nor does a list that was refused stay: it may be gigabytes.
	refused := func(what string) {
		t.Helper()
		for _, name := range []string{"MANIFEST", ".MANIFEST.new"} {
			if _, err := os.Stat(filepath.Join(dir, "incoming/photos", name)); err == nil {
				t.Errorf("%s: %s stays", what, name)
			}
		}
	}
	refused("refused by its plan")
	if _, err := try("photos", names, 10_000); !errors.As(err, &over) {
		t.Errorf("a list that is over the quota: %v", err)
	}
	refused("refused while it was read")
	// A file whose mode changes cannot share the old one's inode.
	day = day.clone()
	f := day["a"]
	f.mode |= 0o111
	day["a"] = f
	if _, err := try("photos", day, used+999); !errors.As(err, &over) || over.Needs != 1000+lists {
		t.Errorf("another mode, over the quota: %v", err)
	}
}

func TestVerifyFinds(t *testing.T) {
	day := tree{}.add("d/a", "content").add("d/e/b", noise(5, 100_000)).add("z", "")
	tests := []struct {
		name   string
		damage func(g string) error
		want   string
	}{
		{"nothing", func(string) error { return nil }, ""},
		{"a flipped bit", func(g string) error {
			f, err := os.OpenFile(g+"/files/d/e/b", os.O_RDWR, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			b := []byte{0}
			f.ReadAt(b, 77777)
			b[0] ^= 1
			_, err = f.WriteAt(b, 77777)
			return err
		}, "d/e/b: its hash is"},
		{"a missing file", func(g string) error { return os.Remove(g + "/files/z") }, "z: cannot be opened"},
		{"a missing folder", func(g string) error { return os.RemoveAll(g + "/files/d/e") }, "d/e/b: missing, with its folder"},
		{"a file more", func(g string) error { return os.WriteFile(g+"/files/d/e/x", nil, 0o444) }, "d/e/: the folder holds 2 names, 1 are listed"},
		{"a shorter file", func(g string) error { return os.Truncate(g+"/files/d/e/b", 5) }, "d/e/b: 5 bytes instead of 100000"},
		{"a longer file", func(g string) error { return os.Truncate(g+"/files/z", 5) }, "z: 5 bytes instead of 0"},
		{"a pipe", func(g string) error { return errors.Join(os.Remove(g+"/files/z"), unix.Mkfifo(g+"/files/z", 0o644)) }, "not a regular file"},
		{"other sums", func(g string) error { return os.Truncate(g+"/SUMS.b2", 100) }, "SUMS.b2: the line of"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			s := open(t, dir, generations.Options{})
			name, _ := push(t, s, "photos", day)
			if err := tt.damage(filepath.Join(dir, "generations/photos", name)); err != nil {
				t.Fatal(err)
			}
			r, err := s.Verify(t.Context(), "photos", name, nil)
			if err != nil {
				t.Fatal(err)
			}
			var found []string
			for _, p := range r.Problems {
				found = append(found, p.Path+": "+p.What)
			}
			all := strings.Join(found, "\n")
			if (tt.want == "") != (r.Bad == 0) || !strings.Contains(all, tt.want) {
				t.Errorf("found %d: %s; want %q", r.Bad, all, tt.want)
			}
		})
	}
	s := open(t, t.TempDir(), generations.Options{})
	for _, name := range []string{"", "../x", "000001-20300101T000000Z"} {
		if _, err := s.Verify(t.Context(), "photos", name, nil); err == nil {
			t.Errorf("generation %q was verified", name)
		}
	}
}

func TestCommittedIsFoundAgain(t *testing.T) {
	s := open(t, t.TempDir(), generations.Options{})
	day := tree{}.add("a", "1")
	answer, tx, err := begin(t, s, "photos", day)
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Close()
	if _, ok := s.Committed(t.Context(), answer.Push); ok {
		t.Error("found before the commit")
	}
	if _, err := upload(t, tx, day, answer, -1); err != nil {
		t.Fatal(err)
	}
	name, err := tx.Commit(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if g, ok := s.Committed(t.Context(), answer.Push); !ok || g.Name != name {
		t.Errorf("found %v %q; want %q", ok, g.Name, name)
	}
	for _, id := range []string{"", "photos", "photos/x", "../photos/0123456789abcdef"} {
		if _, ok := s.Committed(t.Context(), id); ok {
			t.Errorf("push %q was found", id)
		}
	}
}

func TestNames(t *testing.T) {
	at := time.Date(2026, 11, 22, 8, 9, 10, 0, time.UTC)
	for _, n := range []int64{1, 999_999, 1_000_000} {
		if got, when, err := generations.ParseName(generations.Name(n, at)); err != nil || got != n || !when.Equal(at) {
			t.Errorf("number %d came back as %d, %v, %v", n, got, when, err)
		}
	}
	for _, name := range []string{"", "000000-20261122T080910Z", "00001-20261122T080910Z", "0000001-20261122T080910Z", "-00001-20261122T080910Z", "+00001-20261122T080910Z",
		"000001-20261322T080910Z", "000001_20261122T080910Z", "000001-20261122T080910Z.tmp", "000001-20261122T080910"} {
		if _, _, err := generations.ParseName(name); err == nil {
			t.Errorf("%q was taken for a generation", name)
		}
	}
}

// A name that is accepted is the only one for its number and time.
func FuzzParseName(f *testing.F) {
	f.Add("000001-20261122T080910Z")
	f.Add("1000000-20261122T080910Z")
	f.Add("0000001-20261122T080910Z")
	f.Add("../x")
	f.Fuzz(func(t *testing.T, name string) {
		n, at, err := generations.ParseName(name)
		if err == nil && (generations.Name(n, at) != name || !filepath.IsLocal(name) || strings.ContainsRune(name, '/')) {
			t.Errorf("%q was accepted as number %d at %v", name, n, at)
		}
	})
}
