package generations_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"farkeep/shared/beneath"
	"farkeep/shared/generations"
	"farkeep/shared/pushwire"

	"golang.org/x/sys/unix"
)

// onDisk is what the files of a repository's generations take: each inode once.
func onDisk(tb testing.TB, dir, repository string) (bytes int64) {
	tb.Helper()
	seen := map[uint64]bool{}
	homes, err := filepath.Glob(filepath.Join(dir, "generations", repository, "*", "files"))
	if err != nil {
		tb.Fatal(err)
	}
	for _, home := range homes {
		err := filepath.WalkDir(home, func(_ string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			info, err := d.Info()
			if err != nil {
				return err
			}
			if st := info.Sys().(*syscall.Stat_t); !seen[st.Ino] {
				seen[st.Ino] = true
				bytes += st.Size
			}
			return nil
		})
		if err != nil {
			tb.Fatal(err)
		}
	}
	return bytes
}

// charged is what the generations of a repository are charged with for their files.
func charged(tb testing.TB, s *generations.Store, repository string) (bytes int64) {
	tb.Helper()
	all, err := s.Holdings(tb.Context())
	if err != nil {
		tb.Fatal(err)
	}
	for _, h := range all {
		if h.Repository == repository {
			bytes += h.Bytes
		}
	}
	list, err := s.List(tb.Context(), repository)
	if err != nil {
		tb.Fatal(err)
	}
	for _, g := range list {
		bytes -= g.Overhead
	}
	return bytes
}

// checkCharges checks that everything on the disk is charged once, to somebody.
func checkCharges(tb testing.TB, dir string, s *generations.Store, repository string) {
	tb.Helper()
	if got, want := charged(tb, s, repository), onDisk(tb, dir, repository); got != want {
		tb.Errorf("the generations of %s are charged with %d bytes, and hold %d", repository, got, want)
	}
}

func going(tb testing.TB, dir string) (names []string) {
	tb.Helper()
	entries, err := os.ReadDir(filepath.Join(dir, ".farkeep/going"))
	if err != nil {
		tb.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// history pushes days, each of which shares most with the one before.
func history(tb testing.TB, s *generations.Store, repository string, days int64) (names []string) {
	tb.Helper()
	for day := int64(1); day <= days; day++ {
		name, _ := push(tb, s, repository, dayTree(day))
		names = append(names, name)
	}
	return names
}

func TestRemove(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, generations.Options{})
	names := history(t, s, "photos", 6)
	checkCharges(t, dir, s, "photos")
	gone := map[string]bool{}
	for _, i := range []int{2, 0, 4, 1} { // from the middle, the oldest, before the newest
		if err := s.Remove(t.Context(), "photos", names[i]); err != nil {
			t.Fatal(err)
		}
		gone[names[i]] = true
		checkCharges(t, dir, s, "photos")
		for day, name := range names {
			if !gone[name] {
				compare(t, dir, "photos", name, dayTree(int64(day)+1))
			}
		}
	}
	if left := going(t, dir); len(left) > 0 {
		t.Errorf("left in going/: %v", left)
	}
	list, err := s.List(t.Context(), "photos")
	if err != nil || len(list) != 2 {
		t.Errorf("left are %v, %v", names, err)
	}
	if err := s.Remove(t.Context(), "photos", names[0]); err == nil {
		t.Error("a generation was expired twice")
	}
	if err := s.Remove(t.Context(), "photos", "../x"); err == nil {
		t.Error("a generation outside was expired")
	}
	if err := s.Remove(t.Context(), "photos", names[5]); !errors.Is(err, generations.ErrKept) {
		t.Errorf("the current generation: %v", err)
	}
	// A base that is gone is no base; numbers go on.
	name, got := push(t, s, "photos", dayTree(7))
	if n, _, _ := generations.ParseName(name); n != 7 || got.Files > 20 {
		t.Errorf("the next push became number %d and uploaded %d files", n, got.Files)
	}
	checkCharges(t, dir, s, "photos")
}

// judge is a Judge that says what it is told to.
type judge func(context.Context, *generations.Candidate) (generations.Verdict, error)

func (j judge) Judge(ctx context.Context, c *generations.Candidate) (generations.Verdict, error) {
	return j(ctx, c)
}

// suspecting suspects every push that has the file "odd".
var suspecting = judge(func(_ context.Context, c *generations.Candidate) (generations.Verdict, error) {
	f, err := c.Open("odd")
	if errors.Is(err, fs.ErrNotExist) {
		return generations.Verdict{}, nil
	}
	if err != nil {
		return generations.Verdict{}, err
	}
	return generations.Verdict{Suspect: true, Reasons: []string{"There is an odd file."}}, f.Close()
})

func TestRemoveRefuses(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, generations.Options{Judge: suspecting})
	refused := func(name string, want error) {
		t.Helper()
		if err := s.Remove(t.Context(), "photos", name); !errors.Is(err, want) {
			t.Errorf("expire %s: %v; want %v", name, err, want)
		}
	}
	one, _ := push(t, s, "photos", tree{}.add("a", "1"))
	refused(one, generations.ErrKept) // the only one
	two, _ := push(t, s, "photos", tree{}.add("a", "2"))
	three, _ := push(t, s, "photos", tree{}.add("a", "2").add("odd", "3"))
	refused(two, generations.ErrKept) // current, though not the newest
	refused(three, generations.ErrKept)
	if err := s.Decide(t.Context(), "photos", three, generations.Decision{Standing: generations.Rejected, By: "admin"}); err != nil {
		t.Fatal(err)
	}
	// It is the base of this push.
	next := tree{}.add("a", "2").add("odd", "3").add("b", "4")
	answer, tx, err := begin(t, s, "photos", next)
	if err != nil || answer.Base != three {
		t.Fatal(answer, err)
	}
	refused(three, generations.ErrHeld)
	if err := s.RemoveRepository(t.Context(), "photos"); !errors.Is(err, generations.ErrBusy) && !errors.Is(err, generations.ErrHeld) {
		t.Errorf("a repository that is being pushed: %v", err)
	}
	if err := s.Remove(t.Context(), "photos", one); err != nil {
		t.Errorf("the oldest, while a push builds on another: %v", err)
	}
	if _, err := upload(t, tx, next, answer, -1); err != nil {
		t.Fatal(err)
	}
	four, err := tx.Commit(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	compare(t, dir, "photos", four, next)
	tx.Close()
	if err := s.Remove(t.Context(), "photos", three); err != nil {
		t.Errorf("a rejected one: %v", err)
	}
	checkCharges(t, dir, s, "photos")
	// Number four is suspect too, and two is damaged: nothing that can be read may go.
	if err := s.Decide(t.Context(), "photos", four, generations.Decision{Standing: generations.Rejected, By: "admin"}); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, "generations/photos", two, "generation.toml")); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir, generations.Options{}) // nothing remembered
	refused(four, generations.ErrKept)
	if err := s.Remove(t.Context(), "photos", two); err != nil {
		t.Errorf("one that cannot be read: %v", err)
	}
}

// Two that expire at once, and pushes meanwhile: each generation goes once, and
// what is left is right.
func TestTwoExpiriesAtOnce(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, generations.Options{})
	names := history(t, s, "photos", 8)
	var wait sync.WaitGroup
	done := make([]int, len(names))
	var mu sync.Mutex
	for range 2 {
		wait.Go(func() {
			for i, name := range names[:6] {
				if err := s.Remove(t.Context(), "photos", name); err == nil {
					mu.Lock()
					done[i]++
					mu.Unlock()
				}
			}
		})
	}
	// Another store on the same folder, as another process would have.
	other := open(t, dir, generations.Options{})
	if _, err := other.Sweep(t.Context()); err != nil && !errors.Is(err, beneath.ErrLocked) {
		t.Error(err)
	}
	for day := int64(9); day <= 12; day++ {
		push(t, s, "photos", dayTree(day))
	}
	wait.Wait()
	for i, n := range done[:6] {
		if n > 1 {
			t.Errorf("%s was expired %d times", names[i], n)
		}
	}
	for try := 0; len(going(t, dir)) > 0 && try < 3; try++ { // the other one may have had the lock
		if _, err := s.Sweep(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	list, err := s.List(t.Context(), "photos")
	if err != nil || len(list) != 6 {
		t.Fatalf("left are %s, %v; want the last 6", names, err)
	}
	for i, g := range list {
		compare(t, dir, "photos", g.Name, dayTree(int64(i)+7))
	}
	checkCharges(t, dir, s, "photos")
}

// Expiry that is told to stop leaves the rest for the sweep; what is on its way out
// is charged in full until it is gone.
func TestRemoveStops(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, generations.Options{})
	names := history(t, s, "photos", 3)
	before, err := s.Used(t.Context(), "home")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("the disk is wanted back")
	cancel(why)
	if err := s.Remove(ctx, "photos", names[0]); !errors.Is(err, why) {
		t.Errorf("stopped before it began: %v", err)
	}
	list, err := s.List(t.Context(), "photos")
	if err != nil || len(list) != 3 {
		t.Errorf("an expiry that was stopped before it began left %d generations", len(list))
	}
	// Stopped after the rename: as a crash leaves it.
	if err := os.Rename(filepath.Join(dir, "generations/photos", names[0]), filepath.Join(dir, ".farkeep/going", "photos--"+names[0])); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir, generations.Options{})
	if used, err := s.Used(t.Context(), "home"); err != nil || used != before {
		t.Errorf("with a generation on its way out %d bytes are used, %v; before it were %d", used, err, before)
	}
	if _, err := s.Sweep(ctx); !errors.Is(err, why) {
		t.Errorf("a sweep that was stopped: %v", err)
	}
	if n, err := s.Sweep(t.Context()); err != nil || n != 1 {
		t.Errorf("swept %d, %v", n, err)
	}
	if n, err := s.Sweep(t.Context()); err != nil || n != 0 {
		t.Errorf("without work %d were swept, %v", n, err)
	}
	checkCharges(t, dir, s, "photos")
}

// Files under several names, empty ones, other modes: each inode is charged once,
// whichever generation goes first.
func TestChargesOfTwins(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, generations.Options{})
	twins := func(day int) tree {
		d := tree{}.add("empty", "").add("also empty", "").add("a", "twin").add("b", "twin").add("day", fmt.Sprint(day))
		if day > 1 {
			d.add("c/of the second day", "twin")
		}
		if day > 2 {
			delete(d, "b")
			f := d["a"]
			f.mode |= 0o100
			d["a"] = f
			d.add("x1", "only on the third").add("x2", "only on the third")
		}
		if day > 3 {
			delete(d, "x1")
		}
		if day > 4 {
			delete(d, "x2")
		}
		return d
	}
	for _, order := range [][]int{{0, 1, 2, 3}, {3, 2, 1, 0}, {2, 0, 3, 1}, {1, 3, 0, 2}} {
		repository := fmt.Sprintf("twins%d%d", order[0], order[1])
		var names []string
		for day := 1; day <= 5; day++ {
			name, _ := push(t, s, repository, twins(day))
			names = append(names, name)
			checkCharges(t, dir, s, repository)
		}
		for _, i := range order {
			if err := s.Remove(t.Context(), repository, names[i]); err != nil {
				t.Fatal(err)
			}
			checkCharges(t, dir, s, repository)
		}
		compare(t, dir, repository, names[4], twins(5))
	}
}

// What the first pusher stored and the second still has is charged to the second
// once the first one's generation is gone: nobody's room comes for free, and nobody
// pays for what only others have.
func TestQuotaMovesOn(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, generations.Options{})
	push := func(pusher string, day tree, quota int64) (string, error) {
		list, offer := day.manifest(t)
		answer, tx, err := s.Begin(t.Context(), generations.Request{Repository: "photos", Offer: offer, Pusher: pusher, Quota: quota})
		if err != nil {
			return "", err
		}
		defer tx.Close()
		if answer.Answer == pushwire.AnswerSendManifest {
			if answer, err = tx.TakeManifest(t.Context(), bytes.NewReader(list)); err != nil {
				return "", err
			}
		}
		if _, err := upload(t, tx, day, answer, -1); err != nil {
			return "", err
		}
		return tx.Commit(t.Context())
	}
	used := func(pusher string, want int64, entries int64) {
		t.Helper()
		const lists = 163 // for a name of one letter
		if got, err := s.Used(t.Context(), pusher); err != nil || got != want+entries*lists {
			t.Errorf("%s uses %d bytes, %v; want %d and the lists of %d entries", pusher, got, err, want, entries)
		}
	}
	one, err := push("enemy", tree{}.add("a", noise(1, 1000)).add("b", noise(2, 5000)), 0)
	if err != nil {
		t.Fatal(err)
	}
	two, err := push("home", tree{}.add("a", noise(1, 1000)).add("c", noise(3, 300)), 0)
	if err != nil {
		t.Fatal(err)
	}
	used("enemy", 6000, 2)
	used("home", 300, 2)
	if err := s.Remove(t.Context(), "photos", one); err != nil {
		t.Fatal(err)
	}
	used("enemy", 0, 0)
	used("home", 1300, 2) // not b, which home never had
	// Whoever fills his quota and waits for expiry has not gained a byte.
	var over *generations.QuotaError
	if _, err := push("home", tree{}.add("a", noise(1, 1000)).add("c", noise(3, 300)).add("d", noise(4, 100)), 1300+2*163+3*163+99); !errors.As(err, &over) {
		t.Errorf("one byte too many after an expiry: %v", err)
	}
	three, err := push("home", tree{}.add("a", noise(1, 1000)).add("c", noise(3, 300)).add("d", noise(4, 100)), 1300+2*163+3*163+100)
	if err != nil {
		t.Fatal(err)
	}
	used("home", 1400, 5)
	if err := s.Remove(t.Context(), "photos", two); err != nil {
		t.Fatal(err)
	}
	used("home", 1400, 3)
	if _, err := push("home", tree{}.add("e", "e"), 0); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(t.Context(), "photos", three); err != nil {
		t.Fatal(err)
	}
	used("home", 1, 1)
}

// Links to files outside, and all else that somebody could put into going/, are
// removed and never followed.
func TestHostileGoing(t *testing.T) {
	dir, outside := t.TempDir(), t.TempDir()
	secret := filepath.Join(outside, "secret")
	if err := os.WriteFile(secret, []byte("secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := open(t, dir, generations.Options{})
	names := history(t, s, "photos", 3)
	in := func(parts ...string) string {
		return filepath.Join(append([]string{dir, ".farkeep/going"}, parts...)...)
	}
	gone := in("photos--" + names[0])
	plant := []func() error{
		func() error { return os.Rename(filepath.Join(dir, "generations/photos", names[0]), gone) },
		func() error { return os.Symlink(outside, in("link")) },
		func() error {
			return os.Symlink(filepath.Join(dir, "generations/photos", names[1]), in("photos--000009-20260101T000000Z"))
		},
		func() error { return os.WriteFile(in("file"), []byte("x"), 0o600) },
		func() error { return unix.Mkfifo(in("pipe"), 0o600) },
		func() error { return os.Mkdir(in("--"), 0o700) },
		func() error { return os.Mkdir(in("photos--000001-20260101T000000Z"), 0) },
		func() error { return os.Symlink(outside, filepath.Join(gone, "away")) },
		// Where the manifest lists files and folders.
		func() error { return os.RemoveAll(filepath.Join(gone, "files/small")) },
		func() error { return os.Symlink(outside, filepath.Join(gone, "files/small")) },
		func() error { return os.Remove(filepath.Join(gone, "files/config")) },
		func() error { return os.Symlink(secret, filepath.Join(gone, "files/config")) },
		func() error { return os.Remove(filepath.Join(gone, "files/day")) },
		func() error { return os.Mkdir(filepath.Join(gone, "files/day"), 0o700) },
		func() error { return os.WriteFile(filepath.Join(gone, "files/more"), []byte("more"), 0o600) },
		func() error { return os.Symlink(secret, filepath.Join(gone, ".progress")) },
	}
	for i, f := range plant {
		if err := f(); err != nil {
			t.Fatal(i, err)
		}
	}
	s = open(t, dir, generations.Options{})
	if _, err := s.Sweep(t.Context()); err != nil {
		t.Error(err)
	}
	if left := going(t, dir); len(left) != 0 {
		t.Errorf("left in going/: %v", left)
	}
	for day, name := range names[1:] {
		compare(t, dir, "photos", name, dayTree(int64(day)+2))
	}
	left, err := os.ReadDir(outside)
	data, _ := os.ReadFile(secret)
	if err != nil || len(left) != 1 || string(data) != "secret\n" {
		t.Errorf("outside there is %v, %q, %v", left, data, err)
	}
	// going/ itself, or .farkeep, somewhere else: nothing works, nothing is removed.
	for _, path := range []string{".farkeep/going", ".farkeep"} {
		path = filepath.Join(dir, path)
		if err := errors.Join(os.RemoveAll(path), os.Symlink(outside, path)); err != nil {
			t.Fatal(err)
		}
		if _, err := generations.Open(dir, generations.Options{}); err == nil {
			t.Errorf("%s leads outside, and the store was opened", path)
		}
	}
	if _, err := os.Stat(secret); err != nil {
		t.Error(err)
	}
}

// Expiry is how a full disk gets room: it works on one, and what it cannot note
// there costs no generation.
func TestRemoveOnFullDisk(t *testing.T) {
	dir := tmpfs(t, "32m")
	s := open(t, dir, generations.Options{})
	names := history(t, s, "photos", 4)
	if err := s.WriteRecord("room", map[string]string{"a": "old"}); err != nil {
		t.Fatal(err)
	}
	fill, err := os.Create(filepath.Join(dir, "fill"))
	if err != nil {
		t.Fatal(err)
	}
	defer fill.Close()
	for err == nil {
		_, err = fill.Write(make([]byte, 4096))
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	if err := s.WriteRecord("room", map[string]string{"a": strings.Repeat("b", 8192)}); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("a record on a full disk: %v", err)
	}
	var room map[string]string
	if err := s.ReadRecord("room", &room); err != nil || room["a"] != "old" {
		t.Errorf("after it the record is %v, %v; want the old one", room, err)
	}
	for _, name := range names[:2] {
		if err := s.Remove(t.Context(), "photos", name); err != nil {
			t.Fatal(err)
		}
	}
	checkCharges(t, dir, s, "photos")
	for day, name := range names[2:] {
		compare(t, dir, "photos", name, dayTree(int64(day)+3))
	}
	var space *generations.SpaceError
	if _, _, err := begin(t, s, "photos", dayTree(4).add("big", noise(9, 30<<20))); !errors.As(err, &space) {
		t.Fatal(err)
	}
	if len(space.Most) != 2 || len(space.Own) != 2 || space.Most[0].Bytes < 5<<20 || !strings.Contains(space.Error(), names[2]) {
		t.Errorf("a push that does not fit: %+v: %v", space, space)
	}
	if _, _, err := begin(t, s, "others", tree{}.add("big", noise(9, 30<<20))); !errors.As(err, &space) || len(space.Most) != 2 || strings.Contains(err.Error(), "photos") {
		t.Errorf("another repository learns of this one: %v", err)
	}
}

// An inode that has all the names that ext4 gives it lives on through expiry, and
// what has no room for a further name is copied once, not for each name.
func TestMostLinksThroughExpiry(t *testing.T) {
	dir := tmpfs(t, "64m")
	s := open(t, dir, generations.Options{})
	const content = "the same for ever"
	day := tree{}.add("day", "0")
	for i := range 20 {
		day.add(fmt.Sprintf("n/%02d", i), content)
	}
	copies := func(want int64) {
		t.Helper()
		checkCharges(t, dir, s, "photos")
		if got := onDisk(t, dir, "photos") / int64(len(content)); got != want {
			t.Errorf("there are %d inodes; want %d", got, want)
		}
	}
	one, _ := push(t, s, "photos", day)
	copies(1)
	// As if hundreds of generations were between this and the next.
	others := filepath.Join(dir, "others")
	if err := os.Mkdir(others, 0o700); err != nil {
		t.Fatal(err)
	}
	for i := range 64_970 {
		if err := os.Link(filepath.Join(dir, "generations/photos", one, "files/n/00"), filepath.Join(others, fmt.Sprint(i))); err != nil {
			t.Fatal(err)
		}
	}
	day = day.clone().add("day", "1")
	two, _ := push(t, s, "photos", day) // ten names fill the inode
	copies(2)
	day = day.clone().add("day", "2")
	three, _ := push(t, s, "photos", day)
	copies(3)
	for _, name := range []string{one, two} {
		if err := s.Remove(t.Context(), "photos", name); err != nil {
			t.Fatal(err)
		}
		if err := os.RemoveAll(others); err != nil {
			t.Fatal(err)
		}
		checkCharges(t, dir, s, "photos")
	}
	copies(2)
	compare(t, dir, "photos", three, day)
}

func TestRemoveRepository(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, generations.Options{Judge: suspecting})
	history(t, s, "photos", 3)
	odd := dayTree(4).add("odd", "4")
	push(t, s, "photos", odd)
	kept, _ := push(t, s, "docs", dayTree(1))
	// A push that was cut, and a staging copy.
	if answer, tx, err := begin(t, s, "photos", dayTree(5)); err != nil {
		t.Fatal(err)
	} else {
		upload(t, tx, dayTree(5), answer, 2000)
		tx.Close()
	}
	if err := os.MkdirAll(filepath.Join(dir, "staging/photos/home/sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := s.RemoveRepository(t.Context(), "photos"); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"generations/photos", "incoming/photos", "staging/photos", ".farkeep/judge/photos"} {
		if _, err := os.Lstat(filepath.Join(dir, path)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is still there: %v", path, err)
		}
	}
	if left := going(t, dir); len(left) > 0 {
		t.Errorf("left in going/: %v", left)
	}
	if names, err := s.Repositories(); err != nil || strings.Join(names, " ") != "docs" {
		t.Errorf("repositories are %v, %v", names, err)
	}
	compare(t, dir, "docs", kept, dayTree(1))
	checkCharges(t, dir, s, "docs")
	if err := s.RemoveRepository(t.Context(), "photos"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("once more: %v", err)
	}
	if used, err := s.Used(t.Context(), "home"); err != nil || used > onDisk(t, dir, "docs")+40_000 {
		t.Errorf("%d bytes are used, %v", used, err)
	}
	// Its numbers go on.
	if name, _ := push(t, s, "photos", dayTree(9)); !strings.HasPrefix(name, "000005-") {
		t.Errorf("it came again as %s", name)
	}
}

// Each kind of leftover has a rule that removes it.
func TestSweepLeavesNothingBehind(t *testing.T) {
	dir := t.TempDir()
	now := time.Now()
	set := true
	s := open(t, dir, generations.Options{Now: func() time.Time { return now }, ClockSet: func() bool { return set }})
	path := func(p string) string { return filepath.Join(dir, p) }
	there := func(p string) bool {
		_, err := os.Lstat(path(p))
		return err == nil
	}
	sweep := func() {
		t.Helper()
		if _, err := s.Sweep(t.Context()); err != nil {
			t.Fatal(err)
		}
		if left := going(t, dir); len(left) > 0 {
			t.Errorf("left in going/: %v", left)
		}
	}
	history(t, s, "photos", 2)

	// A commit that was cut leaves links to every file.
	if err := os.CopyFS(path("incoming/photos/generation"), os.DirFS(path("generations/photos"))); err != nil {
		t.Fatal(err)
	}
	// A first push that was refused leaves a name.
	if _, tx, err := begin(t, s, "nothing", tree{}.add("a", "1")); err != nil {
		t.Fatal(err)
	} else if err := errors.Join(tx.Abort(t.Context()), tx.Close()); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(path("generations/nothing"), 0o755); err != nil {
		t.Fatal(err)
	}
	// An upload that was cut is gone on with, but not for ever.
	cut := func(repository string) *generations.Transaction {
		answer, tx, err := begin(t, s, repository, dayTree(3))
		if err != nil {
			t.Fatal(err)
		}
		upload(t, tx, dayTree(3), answer, 6<<20)
		return tx
	}
	cut("cut").Close()
	busy := cut("busy")
	defer busy.Close()
	sweep()
	for p, want := range map[string]bool{
		"incoming/photos": true, "incoming/photos/generation": false, "incoming/nothing": false, "generations/nothing": false,
		"incoming/cut/push.toml": true, "incoming/busy/push.toml": true,
	} {
		if there(p) != want {
			t.Errorf("after a sweep %s is there: %v", p, !want)
		}
	}
	now = now.Add(generations.MaxIdle + time.Hour)
	set = false
	sweep()
	if !there("incoming/cut/push.toml") {
		t.Error("an upload was given up by a clock that is not set")
	}
	set = true
	sweep()
	for p, want := range map[string]bool{"incoming/cut": false, "incoming/busy/push.toml": true} {
		if there(p) != want {
			t.Errorf("after %v %s is there: %v", generations.MaxIdle, p, !want)
		}
	}
	list, err := s.List(t.Context(), "photos")
	if err != nil || len(list) != 2 {
		t.Fatal(list, err)
	}
	for i, g := range list {
		compare(t, dir, "photos", g.Name, dayTree(int64(i)+1))
	}
}

// Expiry rests between names, and a rest that is ended ends it.
func TestRemoveRests(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, generations.Options{})
	names := history(t, s, "photos", 3)
	stop := errors.New("the disk is wanted back")
	var rests []time.Duration
	left := 1 << 30
	s.RestWith(time.Nanosecond, func(_ context.Context, d time.Duration) error {
		rests = append(rests, d)
		if left--; left == 0 {
			return stop
		}
		return nil
	})
	if err := s.Remove(t.Context(), "photos", names[0]); err != nil || len(rests) < 40 {
		t.Errorf("%d rests, %v", len(rests), err)
	}
	for _, d := range rests {
		if d <= 0 || d > 2*time.Second {
			t.Errorf("a rest of %v", d)
		}
	}
	left = 20
	if err := s.Remove(t.Context(), "photos", names[1]); !errors.Is(err, stop) {
		t.Errorf("stopped in a rest: %v", err)
	}
	if left := going(t, dir); len(left) != 1 {
		t.Errorf("in going/ is %v", left)
	}
	left = 1 << 30
	if n, err := s.Sweep(t.Context()); n != 1 || err != nil {
		t.Errorf("swept %d, %v", n, err)
	}
	checkCharges(t, dir, s, "photos")
}

// A retirement that is cut short anywhere is repeated until nothing is left, and
// touches no other repository.
func TestRemoveRepositoryCutShort(t *testing.T) {
	dir := tmpfs(t, "128m")
	s := open(t, dir, generations.Options{})
	kept, _ := push(t, s, "docs", dayTree(3))
	names := history(t, s, "photos", 4)
	cuts := 0
	for n := 1; ; n += 7 {
		err := s.RemoveRepository(newFuse(n), "photos")
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			break
		}
		if !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		cuts++
		s = open(t, dir, generations.Options{})
		list, err := s.List(t.Context(), "photos")
		if err != nil {
			t.Fatal(err)
		}
		for i, g := range list { // the newest are left
			if want := len(names) - len(list) + i; g.Name != names[want] {
				t.Errorf("left is %s; want %s", g.Name, names[want])
			} else {
				compare(t, dir, "photos", g.Name, dayTree(int64(want)+1))
			}
		}
	}
	if _, err := s.Sweep(t.Context()); err != nil || cuts < 3 {
		t.Errorf("%d cuts, then %v", cuts, err)
	}
	if left := going(t, dir); len(left) > 0 {
		t.Errorf("left in going/: %v", left)
	}
	compare(t, dir, "docs", kept, dayTree(3))
	checkCharges(t, dir, s, "docs")
	if name, _ := push(t, s, "photos", dayTree(1)); !strings.HasPrefix(name, "000005-") {
		t.Errorf("it came again as %s", name)
	}
}

// Whoever fills an inode with names, so that the next generation has to copy, pays
// for the copies before they are made.
func TestCopiesCountForQuota(t *testing.T) {
	dir := tmpfs(t, "64m")
	s := open(t, dir, generations.Options{})
	day := tree{}.add("a", noise(1, 100_000)).add("b", noise(2, 100_000))
	one, _ := push(t, s, "photos", day)
	for _, name := range []string{"a", "b"} {
		others := filepath.Join(dir, "others-"+name)
		if err := os.Mkdir(others, 0o700); err != nil {
			t.Fatal(err)
		}
		for i := range 64_999 {
			if err := os.Link(filepath.Join(dir, "generations/photos", one, "files", name), filepath.Join(others, fmt.Sprint(i))); err != nil {
				t.Fatal(err)
			}
		}
	}
	next := day.clone().add("c", "new")
	try := func(quota int64) error {
		list, offer := next.manifest(t)
		answer, tx, err := s.Begin(t.Context(), generations.Request{Repository: "photos", Offer: offer, Pusher: "home", Quota: quota})
		if err != nil {
			return err
		}
		defer tx.Close()
		if answer.Answer == pushwire.AnswerSendManifest {
			if answer, err = tx.TakeManifest(t.Context(), bytes.NewReader(list)); err != nil {
				return err
			}
		}
		if _, err := upload(t, tx, next, answer, -1); err != nil {
			t.Fatal(err)
		}
		_, err = tx.Commit(t.Context())
		return err
	}
	const lists = 163
	needs := int64(200_000 + 2*lists + 3 + 3*lists)
	var over *generations.QuotaError
	if err := try(needs + 199_999); !errors.As(err, &over) {
		t.Errorf("copies over the quota: %v", err)
	}
	if list, err := s.List(t.Context(), "photos"); err != nil || len(list) != 1 {
		t.Errorf("%d generations, %v", len(list), err)
	}
	if err := try(needs + 200_000); err != nil {
		t.Errorf("copies within the quota: %v", err)
	}
	if used, err := s.Used(t.Context(), "home"); err != nil || used != needs+200_000 {
		t.Errorf("%d bytes are used, %v; want %d", used, err, needs+200_000)
	}
}

// However .moved was damaged, no generation is charged with less than it brought,
// nor with more than it shows.
func FuzzMoved(f *testing.F) {
	f.Add([]byte(""))
	f.Add([]byte("[[moved]]\nfrom = '000001-20260101T000000Z'\nto = '000002-20260102T000000Z'\nbytes = 17\n"))
	f.Add([]byte("[[moved]]\nto = '000002-20260102T000000Z'\nbytes = -1\n"))
	f.Add([]byte("[[moved]]\nto = '000002-20260102T000000Z'\nbytes = 9223372036854775807\n"))
	f.Add([]byte("[[moved]]\nto = '000002-20260102T000000Z'\nbytes = 1152921504606846976\n[[moved]]\nto = '000002-20260102T000000Z'\nbytes = 1152921504606846976\n"))
	f.Add([]byte("moved = 3"))
	f.Fuzz(func(t *testing.T, text []byte) {
		const bytes = 1000
		if got, err := generations.Charge(text, "000002-20260102T000000Z", bytes); got < bytes/2 || got > bytes {
			t.Errorf("charged with %d of %d bytes, %v", got, bytes, err)
		}
	})
}

// A folder in going/ is taken for a generation by one name only.
func FuzzGoingName(f *testing.F) {
	f.Add("photos--000001-20261122T080910Z")
	f.Add("a----000001-20261122T080910Z")
	f.Add("photos--commit-0123abcd")
	f.Add("--")
	f.Add("../x--000001-20261122T080910Z")
	f.Fuzz(func(t *testing.T, entry string) {
		repository, name, ok := generations.GoingGeneration(entry)
		if !ok {
			return
		}
		_, _, err := generations.ParseName(name)
		if err != nil || repository+"--"+name != entry || pushwire.CheckRepository(repository) != nil || strings.Contains(entry, "/") {
			t.Errorf("%q was taken for generation %q of %q", entry, name, repository)
		}
	})
}

// A generation that expires while somebody verifies it is not damaged.
func TestVerifyOfWhatExpires(t *testing.T) {
	s := open(t, t.TempDir(), generations.Options{})
	names := history(t, s, "photos", 2)
	once := false
	r, err := s.Verify(t.Context(), "photos", names[0], func(generations.Report) {
		if !once {
			once = true
			if err := s.Remove(t.Context(), "photos", names[0]); err != nil {
				t.Error(err)
			}
		}
	})
	if err == nil || !strings.Contains(err.Error(), "expired") {
		t.Errorf("%+v, %v", r, err)
	}
	if files, open, err := s.Rotten(); err != nil || len(files) > 0 || open > 0 {
		t.Errorf("%v is said to be rotten, %v", files, err)
	}
}

// Wherever a cut falls between the names of one inode, it is counted once.
func TestCutBetweenTwins(t *testing.T) {
	disk := tmpfs(t, "64m")
	day := tree{}
	for i := range 8 {
		// Each content has two names, in folders next to each other.
		day.add(fmt.Sprintf("%d/a", i), fmt.Sprint("twin ", i)).add(fmt.Sprintf("%d/b", i), fmt.Sprint("twin ", i+1))
	}
	next := tree{}.add("0/b", "twin 1")
	for i := range 20 { // it shows more than it holds: a wrong charge is not cut off
		next.add(fmt.Sprint("more/", i), "more")
	}
	for cut, done := 1, false; !done; cut++ {
		dir := filepath.Join(disk, fmt.Sprint(cut))
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		s := open(t, dir, generations.Options{})
		s.CountEvery(3)
		one, _ := push(t, s, "photos", day)
		two, _ := push(t, s, "photos", next)
		if err := os.Rename(filepath.Join(dir, "generations/photos", one), filepath.Join(dir, ".farkeep/going", "photos--"+one)); err != nil {
			t.Fatal(err)
		}
		_, err := s.Sweep(newFuse(cut))
		if err != nil && !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		done = err == nil
		s = open(t, dir, generations.Options{})
		s.CountEvery(1 + cut%7) // not where it was noted before
		if _, err := s.Sweep(t.Context()); err != nil {
			t.Fatal(err)
		}
		checkCharges(t, dir, s, "photos")
		if t.Failed() {
			t.Fatalf("cut at look %d", cut)
		}
		compare(t, dir, "photos", two, next)
	}
}
