package generations_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"farkeep/shared/generations"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"
	"farkeep/shared/recipe"

	"github.com/google/go-cmp/cmp"
)

// historyOf pushes three days of photos: keep and sub/keep never change, day does.
func historyOf(tb testing.TB, s *generations.Store, last tree) (names []string, days []tree) {
	tb.Helper()
	for day := range 3 {
		now := tree{}.add("keep", noise(1, 300_000)).add("sub/keep", noise(2, 70_000)).add("day", fmt.Sprint("day ", day))
		if day == 2 && last != nil {
			now = last
		}
		name, _ := push(tb, s, "photos", now)
		names, days = append(names, name), append(days, now)
	}
	return names, days
}

func committedFile(dir, name, path string) string {
	return filepath.Join(dir, generations.GenerationsFolder, "photos", name, generations.FilesFolder, path)
}

// damage rewrites a committed file in place, as a disk does: same inode, no link broken.
func damage(tb testing.TB, path string, change func([]byte) []byte) {
	tb.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		tb.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		tb.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(change(data)); err != nil {
		tb.Fatal(err)
	}
}

func flip(at int) func([]byte) []byte {
	return func(b []byte) []byte { b[(at+len(b))%len(b)] ^= 0x10; return b }
}

// verifyAll reads every generation, which records what is rotten, and returns the
// files that wait to be healed.
func verifyAll(tb testing.TB, s *generations.Store, names []string) (open []generations.Rot) {
	tb.Helper()
	for _, name := range names {
		if _, err := s.Verify(tb.Context(), "photos", name, nil); err != nil {
			tb.Fatal(err)
		}
	}
	return rotten(tb, s)
}

func rotten(tb testing.TB, s *generations.Store) (open []generations.Rot) {
	tb.Helper()
	files, _, err := s.Rotten()
	if err != nil {
		tb.Fatal(err)
	}
	for _, f := range files {
		if f.Open() {
			open = append(open, f)
		}
	}
	return open
}

// heal offers what is the newest generation already, and goes on as a pusher does.
func heal(tb testing.TB, s *generations.Store, now tree) int {
	tb.Helper()
	answer, tx, err := begin(tb, s, "photos", now)
	if err != nil {
		tb.Fatal(err)
	}
	if tx == nil {
		tb.Fatal("nothing is asked for")
	}
	defer tx.Close()
	if answer.Answer != pushwire.AnswerSend || !answer.Heal || !tx.Heals() {
		tb.Fatalf("the offer is answered %+v", answer.OfferAnswer)
	}
	if answer.Needed.Len() > 0 {
		if _, err := tx.Upload(tb.Context(), func(w io.Writer) error { return now.write(w, answer) }); err != nil {
			tb.Fatal(err)
		}
	}
	newest, err := s.Newest(tb.Context(), "photos")
	if err != nil {
		tb.Fatal(err)
	}
	name, err := tx.Commit(tb.Context())
	if err != nil {
		tb.Fatal(err)
	}
	if name != newest.Name {
		tb.Fatalf("healing made generation %s", name)
	}
	return tx.Healed()
}

// TestHeal: whatever became of a file, the next offer of an unchanged repository
// is asked for it, and it is whole in every generation afterwards.
func TestHeal(t *testing.T) {
	remove := func(tb testing.TB, path string) {
		if err := os.Remove(path); err != nil {
			tb.Fatal(err)
		}
	}
	change := func(f func([]byte) []byte) func(testing.TB, string, []string) {
		return func(tb testing.TB, dir string, names []string) {
			damage(tb, committedFile(dir, names[1], "sub/keep"), f)
		}
	}
	for _, tt := range []struct {
		name   string
		damage func(tb testing.TB, dir string, names []string)
		shared int // generations that are named
	}{
		{"first bit", change(flip(0)), 3},
		{"a bit in the middle", change(flip(33_333)), 3},
		{"last bit", change(flip(-1)), 3},
		{"truncated", change(func(b []byte) []byte { return b[:len(b)-1] }), 3},
		{"empty", change(func([]byte) []byte { return nil }), 3},
		{"longer", change(func(b []byte) []byte { return append(b, 0) }), 3},
		{"missing in one generation", func(tb testing.TB, dir string, names []string) {
			remove(tb, committedFile(dir, names[0], "sub/keep"))
		}, 1},
		{"missing in all", func(tb testing.TB, dir string, names []string) {
			for _, n := range names {
				remove(tb, committedFile(dir, n, "sub/keep"))
			}
		}, 3},
		{"folder missing", func(tb testing.TB, dir string, names []string) {
			for _, n := range names {
				if err := os.RemoveAll(filepath.Dir(committedFile(dir, n, "sub/keep"))); err != nil {
					tb.Fatal(err)
				}
			}
		}, 3},
		{"a link elsewhere", func(tb testing.TB, dir string, names []string) {
			path := committedFile(dir, names[0], "sub/keep")
			damage(tb, path, flip(1))
			remove(tb, path)
			if err := os.Symlink("/etc/hostname", path); err != nil {
				tb.Fatal(err)
			}
		}, 3},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			s := open(t, dir, generations.Options{})
			names, days := historyOf(t, s, nil)
			tt.damage(t, dir, names)
			found := verifyAll(t, s, names)
			if len(found) == 0 || found[0].Sum == (manifest.Sum{}) && len(found) == 1 {
				t.Fatalf("found rotten: %+v", found)
			}
			local, err := s.Heal(t.Context(), "photos")
			if err != nil {
				t.Fatal(err)
			}
			if tt.shared == 1 {
				if local != 1 {
					t.Errorf("healed %d files from the other generations, want 1", local)
				}
			} else {
				if left := rotten(t, s); len(left) == 0 || len(left[0].Generations) != tt.shared {
					t.Errorf("named: %+v, want %d generations", left, tt.shared)
				}
				if n := heal(t, s, days[2]); n != 1 {
					t.Errorf("healed %d files, want 1", n)
				}
			}
			for i, name := range names {
				compare(t, dir, "photos", name, days[i])
			}
			var inode uint64
			for _, name := range names {
				ino := inodeOf(t, committedFile(dir, name, "sub/keep"))
				if inode != 0 && inode != ino {
					t.Errorf("generation %s has a copy of its own", name)
				}
				inode = ino
			}
			left := 0
			for _, f := range rotten(t, s) {
				if f.Sum != (manifest.Sum{}) {
					left++
				}
			}
			if left != 0 {
				t.Errorf("still rotten: %+v", rotten(t, s))
			}
			if answer, tx, err := begin(t, s, "photos", days[2]); err != nil || tx != nil || answer.Answer != pushwire.AnswerSame {
				t.Errorf("the next offer is answered %+v, %v", answer.OfferAnswer, err)
			}
			if entries, err := os.ReadDir(filepath.Join(dir, generations.IncomingFolder, "photos")); err != nil || len(entries) != 0 {
				t.Errorf("left in %s: %v, %v", generations.IncomingFolder, entries, err)
			}
		})
	}
}

// TestHealByAChangedRepository: a push that makes a generation heals the earlier
// ones, as far as it holds their bytes; what home has no more stays named.
func TestHealByAChangedRepository(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, generations.Options{})
	names, days := historyOf(t, s, nil)
	damage(t, committedFile(dir, names[0], "keep"), flip(7))
	damage(t, committedFile(dir, names[0], "sub/keep"), flip(7))
	damage(t, committedFile(dir, names[1], "day"), flip(2)) // that day is over: home has it no more
	verifyAll(t, s, names)

	next := tree{}.add("moved/keep", noise(1, 300_000)).add("sub/keep", noise(2, 70_000)).add("day", "day 3")
	name, got := push(t, s, "photos", next)
	if got.Files != 3 {
		t.Errorf("%d files were uploaded, want all 3", got.Files)
	}
	compare(t, dir, "photos", name, next)
	compare(t, dir, "photos", names[0], days[0])
	compare(t, dir, "photos", names[2], days[2])
	newest, err := s.Newest(t.Context(), "photos")
	if err != nil || newest.Name != name {
		t.Fatal(newest.Name, err)
	}
	want := []generations.Rot{{Repository: "photos", Path: "day", Size: 5, Generations: []string{names[1]}, Lacking: newest.Digest.String()}}
	ignore := cmp.FilterPath(func(p cmp.Path) bool {
		switch p.Last().String() {
		case ".Sum", ".What", ".Found", ".Seen":
			return true
		}
		return false
	}, cmp.Ignore())
	if diff := cmp.Diff(want, rotten(t, s), ignore); diff != "" {
		t.Error(diff)
	}
	// Home is not asked again for what it does not have, until it changes.
	if answer, tx, err := begin(t, s, "photos", next); err != nil || tx != nil || answer.Answer != pushwire.AnswerSame {
		t.Errorf("the next offer is answered %+v, %v", answer.OfferAnswer, err)
	}
	// The day comes back at home.
	back := next.clone().add("old-day", "day 1")
	push(t, s, "photos", back)
	compare(t, dir, "photos", names[1], days[1])
	if left := rotten(t, s); len(left) != 0 {
		t.Errorf("still rotten: %+v", left)
	}
}

// TestHealSums: a SUMS.b2 that rotted is made anew from the manifest, and only from
// the right one.
func TestHealSums(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, generations.Options{})
	names, days := historyOf(t, s, nil)
	list := func(generation, name string) string {
		return filepath.Join(dir, "generations/photos", generation, name)
	}
	damage(t, list(names[0], generations.SumsFile), flip(70))
	damage(t, list(names[1], generations.SumsFile), flip(70))
	committed := time.Date(2026, 1, 1, 3, 4, 5, 6000, time.UTC)
	if err := os.Chtimes(list(names[0], generations.SumsFile), committed, committed); err != nil {
		t.Fatal(err)
	}
	if n := len(verifyAll(t, s, names[:2])); n != 2 {
		t.Errorf("%d lists are rotten, want 2", n)
	}
	damage(t, list(names[1], generations.ManifestFile), flip(40))
	if _, err := s.Heal(t.Context(), "photos"); !errors.Is(err, generations.ErrDamaged) {
		t.Errorf("without a manifest: %v", err)
	}
	compare(t, dir, "photos", names[0], days[0])
	if st, err := os.Stat(list(names[0], generations.SumsFile)); err != nil || !st.ModTime().Equal(committed) || st.Mode() != 0o444 {
		t.Errorf("the healed list: %v, %v", st, err)
	}
	if left := rotten(t, s); len(left) != 1 || left[0].Generations[0] != names[1] {
		t.Errorf("still rotten: %+v", left)
	}
}

// TestHealFromAnotherCopy: the same content in an inode of its own heals.
func TestHealFromAnotherCopy(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, generations.Options{})
	now := tree{}.add("a", noise(1, 100_000)).add("b", noise(1, 100_000))
	b := now["b"]
	b.mode = 0o755 // cannot share an inode
	now["b"] = b
	names, days := historyOf(t, s, now)
	a := committedFile(dir, names[2], "a")
	damage(t, a, flip(50_000))
	verifyAll(t, s, names)
	if n, err := s.Heal(t.Context(), "photos"); n != 1 || err != nil {
		t.Fatalf("healed %d, %v", n, err)
	}
	compare(t, dir, "photos", names[2], days[2])
	if st, err := os.Stat(a); err != nil || st.Mode().Perm() != 0o444 || inodeOf(t, a) == inodeOf(t, committedFile(dir, names[2], "b")) {
		t.Errorf("%v, %v", st.Mode(), err)
	}
}

// TestHealAlterNothing: an enemy with the push key cannot use healing to change
// what a generation is.
func TestHealAlterNothing(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, generations.Options{})
	names, days := historyOf(t, s, nil)
	damage(t, committedFile(dir, names[0], "keep"), flip(0))
	verifyAll(t, s, names)
	before := inodeOf(t, committedFile(dir, names[0], "sub/keep"))

	// Other bytes under the hash that is asked for: refused while they arrive.
	answer, tx, err := begin(t, s, "photos", days[2])
	if err != nil || tx == nil {
		t.Fatal(answer, err)
	}
	forged := days[2].clone().add("keep", noise(66, 300_000))
	_, err = tx.Upload(t.Context(), func(w io.Writer) error {
		e := recipe.NewEncoder(w)
		for i := range answer.Needed.All() {
			if err := e.File(i); err != nil {
				return err
			}
			if _, err := io.WriteString(e, forged["keep"].content); err != nil {
				return err
			}
			if err := e.End(days[2].entries()[i].Sum); err != nil { // a lie
				return err
			}
		}
		return e.Close()
	})
	if !errors.Is(err, recipe.ErrSum) {
		t.Errorf("forged bytes: %v", err)
	}
	if _, err := tx.Commit(t.Context()); !errors.Is(err, generations.ErrIncomplete) {
		t.Errorf("commit without the bytes: %v", err)
	}
	tx.Close()

	// Bytes that were put among the complete files behind the keeper's back.
	answer, tx, err = begin(t, s, "photos", days[2])
	if err != nil || tx == nil {
		t.Fatal(answer, err)
	}
	sum := days[2].entries()[1].Sum
	if days[2].entries()[1].Path != "keep" {
		t.Fatal("the tree changed")
	}
	tx.Close()
	object := filepath.Join(dir, "incoming/photos/objects", sum.String())
	if err := os.WriteFile(object, []byte(forged["keep"].content), 0o600); err != nil {
		t.Fatal(err)
	}
	answer, tx, err = begin(t, s, "photos", days[2])
	if err != nil || tx == nil || answer.Need != 0 {
		t.Fatal(answer, err)
	}
	if _, err := tx.Commit(t.Context()); err != nil || tx.Healed() != 0 {
		t.Errorf("commit of planted bytes: healed %d, %v", tx.Healed(), err)
	}
	tx.Close()
	// A file that reads well is not touched, whoever says that it is rotten.
	err = s.NoteRot([]generations.Rot{{Repository: "photos", Path: "sub/keep", Sum: days[0].entries()[3].Sum, Size: 70_000, What: "a lie", Generations: names, Found: time.Now()}})
	if err != nil {
		t.Fatal(err)
	}
	// Another content under the rotten path makes a generation, and heals nothing.
	push(t, s, "photos", forged)
	if after := inodeOf(t, committedFile(dir, names[0], "sub/keep")); after != before {
		t.Error("a good file was replaced")
	}
	if left := rotten(t, s); len(left) != 1 || left[0].Sum != sum {
		t.Errorf("rotten: %+v, want keep alone", left)
	}
	data, err := os.ReadFile(committedFile(dir, names[0], "keep"))
	if err != nil {
		t.Fatal(err)
	}
	damaged := []byte(days[0]["keep"].content)
	damaged[0] ^= 0x10
	if !bytes.Equal(data, damaged) {
		t.Error("the rotten file holds what an enemy sent")
	}
	// The true bytes still heal.
	push(t, s, "photos", days[2].clone().add("day", "day 9"))
	for i, name := range names {
		compare(t, dir, "photos", name, days[i])
	}
}

// TestHealLeavesOutWhatIsForged: a generation whose list is not what its
// generation.toml says is not healed by that list.
func TestHealLeavesOutWhatIsForged(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, generations.Options{})
	names, days := historyOf(t, s, nil)
	victim := committedFile(dir, names[1], "sub/keep")
	old, err := os.ReadFile(victim)
	if err != nil {
		t.Fatal(err)
	}
	// Somebody with the disk in hand writes a list by which sub/keep should be what keep is.
	other := days[1].clone().add("sub/keep", noise(1, 300_000))
	list, _ := other.manifest(t)
	path := filepath.Join(dir, "generations/photos", names[1], generations.ManifestFile)
	if err := errors.Join(os.Remove(path), os.WriteFile(path, list, 0o444)); err != nil {
		t.Fatal(err)
	}
	damage(t, committedFile(dir, names[0], "keep"), flip(0))
	if _, err := s.Verify(t.Context(), "photos", names[0], nil); err != nil {
		t.Fatal(err)
	}
	heal(t, s, days[2])
	if now, err := os.ReadFile(victim); err != nil || !bytes.Equal(now, old) {
		t.Errorf("%s was changed: %v", victim, err)
	}
	compare(t, dir, "photos", names[0], days[0])
	compare(t, dir, "photos", names[2], days[2])
}

// TestHealCostsNoQuota: a key at its limit heals all the same.
func TestHealCostsNoQuota(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, generations.Options{})
	names, days := historyOf(t, s, nil)
	damage(t, committedFile(dir, names[0], "keep"), flip(0))
	verifyAll(t, s, names)
	_, offer := days[2].manifest(t)
	answer, tx, err := s.Begin(t.Context(), generations.Request{Repository: "photos", Offer: offer, Pusher: "home", Quota: 1})
	if err != nil || tx == nil || !answer.Heal {
		t.Fatalf("%+v, %v", answer.OfferAnswer, err)
	}
	tx.Close()
}

// TestRotIsBounded: a disk that dies does not fill its record.
func TestRotIsBounded(t *testing.T) {
	dir := t.TempDir()
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	s := open(t, dir, generations.Options{Now: func() time.Time { return now }})
	var found []generations.Rot
	for i := range 3000 {
		r := generations.Rot{Repository: "photos", Path: strings.Repeat("\xff\n\"", 1300), Size: 1, What: strings.Repeat("x", 5000), Found: now}
		r.Sum[0], r.Sum[1] = byte(i), byte(1+i>>8)
		for g := range 100 {
			r.Generations = append(r.Generations, generations.Name(int64(g+1), now))
		}
		found = append(found, r)
	}
	for part := range 3 {
		if err := s.NoteRot(found[part*1000:][:1000]); err != nil {
			t.Fatal(err)
		}
	}
	files, count, err := s.Rotten()
	if err != nil || len(files) != generations.MaxRot || count != 3000 {
		t.Errorf("%d files listed, %d counted, %v", len(files), count, err)
	}
	if len(files[0].Generations) != generations.MaxRotGenerations || files[0].Generations[15] != generations.Name(100, now) {
		t.Errorf("generations: %v", files[0].Generations)
	}
	again := open(t, dir, generations.Options{})
	fromDisk, _, err := again.Rotten()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(files, fromDisk); diff != "" {
		t.Error(diff)
	}
	// Nothing on the disk needs them: they are settled, and forgotten in time.
	if _, err := s.Heal(t.Context(), "photos"); err != nil {
		t.Fatal(err)
	}
	now = now.Add(91 * 24 * time.Hour)
	if err := s.SettleRot(now); err != nil {
		t.Fatal(err)
	}
	if err := s.NoteRot([]generations.Rot{{Repository: "docs", Path: "x", Generations: []string{generations.Name(1, now)}, Found: now}}); err != nil {
		t.Fatal(err)
	}
	if files, count, err := s.Rotten(); err != nil || len(files) != 1 || count != 1 {
		t.Errorf("%d files listed, %d counted, %v", len(files), count, err)
	}
}

// TestRotOfAForeignHand: a record that this package did not write is used as far
// as it makes sense.
func TestRotOfAForeignHand(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, generations.Options{})
	text := "format = 1\nbeyond = -7\n"
	for _, f := range []string{
		`repository = "../x", path = "a", generations = []`,
		`repository = "photos", path = "` + strings.Repeat("a", 300) + `", generations = []`,
		`repository = "photos", path = "SUMS.b2", generations = ["../../etc"]`,
		`repository = "photos", path = "good", generations = ["000001-20260101T000000Z"]`,
	} {
		text += "[[file]]\n" + strings.ReplaceAll(f, ", ", "\n") + "\n"
	}
	if err := os.WriteFile(filepath.Join(dir, ".farkeep/rot.toml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	files, count, err := s.Rotten()
	if err != nil || count != 1 || len(files) != 1 || files[0].Path != "good" {
		t.Errorf("%+v, %d, %v", files, count, err)
	}
}

// healTree has what takes a while to heal.
func healTree() tree {
	t := tree{}
	for i := range 40 {
		t.add(fmt.Sprintf("data/%d/%d", i%4, i), noise(uint64(i), 100_000+i))
	}
	return t
}

// healOnce heals the store in dir, as healChild asks for it.
func healOnce(dir string) error {
	ctx := context.Background()
	s, err := generations.Open(dir, generations.Options{Reserve: 1})
	if err != nil {
		return err
	}
	var tb testing.B
	now := healTree().add("day", "2")
	_, offer := now.manifest(&tb)
	answer, tx, err := s.Begin(ctx, generations.Request{Repository: "photos", Offer: offer, Pusher: "home"})
	if err != nil || tx == nil {
		return err
	}
	defer tx.Close()
	fmt.Println("begun")
	if answer.Needed.Len() > 0 {
		if _, err := tx.Upload(ctx, func(w io.Writer) error { return now.write(w, answer) }); err != nil {
			return err
		}
	}
	_, err = tx.Commit(ctx)
	return err
}

// TestHealResumes: a heal that is killed at random instants leaves each name with
// the rotten inode or the healed one, and the next one goes on.
func TestHealResumes(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, generations.Options{})
	var names []string
	var days []tree
	for day := range 3 {
		now := healTree().add("day", fmt.Sprint(day))
		name, _ := push(t, s, "photos", now)
		names, days = append(names, name), append(days, now)
	}
	for i := range 40 {
		damage(t, committedFile(dir, names[0], fmt.Sprintf("data/%d/%d", i%4, i)), flip(i*1000))
	}
	if open := verifyAll(t, s, names); len(open) != 40 {
		t.Fatalf("%d files are rotten, want 40", len(open))
	}
	// From here on another process has the disk: what this one remembers is old.
	s.Close()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	seed := uint64(time.Now().UnixNano())
	t.Log("seed ", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	killed := 0
	for left := 40; left > 0; {
		cmd := exec.Command(self)
		cmd.Env = append(os.Environ(), healFolder+"="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		var errText bytes.Buffer
		cmd.Stderr = &errText
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		io.ReadFull(out, make([]byte, 6)) // begun
		if killed < 12 {
			time.AfterFunc(time.Duration(random.IntN(60))*time.Millisecond, func() { cmd.Process.Signal(syscall.SIGKILL) })
		}
		err = cmd.Wait()
		if err != nil && errText.Len() > 0 {
			t.Fatal(errText.String())
		}
		if err != nil {
			killed++
		}
		now := open(t, dir, generations.Options{})
		left = len(rotten(t, now))
		for i, name := range names {
			for path, want := range days[i] {
				if want.folder {
					continue
				}
				data, err := os.ReadFile(committedFile(dir, name, path))
				if err != nil {
					t.Fatal(err)
				}
				var n int
				fmt.Sscanf(filepath.Base(path), "%d", &n)
				damaged := []byte(want.content)
				if path != "day" {
					damaged = flip(n * 1000)(damaged)
				}
				if string(data) != want.content && !bytes.Equal(data, damaged) {
					t.Fatalf("%s in %s is neither what it was nor what it should be", path, name)
				}
			}
		}
	}
	t.Log("killed ", killed)
	if killed == 0 {
		t.Log("every heal was faster than its murderer")
	}
	for i, name := range names {
		compare(t, dir, "photos", name, days[i])
	}
}
