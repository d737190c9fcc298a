package push

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"farkeep/pusher/restictest"
	"farkeep/shared/contentname"
	"farkeep/shared/hint"
	"farkeep/shared/site"
)

// resticBench is a home with one restic repository, and a directory target.
func resticBench(t *testing.T, version string) (b *bench, r *restictest.Repository, at string) {
	b = newBench(t)
	r = restictest.Init(t, b.repos, "photos", version)
	b.site = &site.Site{Repositories: []site.Repository{{Name: "photos", Path: r.Path}}}
	at = t.TempDir()
	b.directory("attic", at)
	return b, r, at
}

func TestResticToDirectory(t *testing.T) {
	for _, version := range []string{"1", "2"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			b, r, at := resticBench(t, version)
			r.Fill(t, 8, 2<<20)
			r.Run(t, "backup", r.Source)
			// What a restic that was killed leaves, and one that runs has.
			pack := r.Packs(t)[0]
			litter := []string{"locks/" + strings.Repeat("ab", 32), pack + "-tmp-4711"}
			for _, name := range litter {
				if err := os.WriteFile(filepath.Join(r.Path, name), []byte("x"), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			first := b.mustPush().Outcomes[0]
			if !first.New || first.Copied != 0 {
				t.Errorf("%+v", first)
			}
			there := files(at, "photos", first.Generation)
			for _, name := range litter {
				if _, err := os.Lstat(filepath.Join(there, name)); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("%s was mirrored: %v", name, err)
				}
				if err := os.Remove(filepath.Join(r.Path, name)); err != nil {
					t.Fatal(err)
				}
			}
			r.Verify(t, there, r.Source)
			before := snapshot(t, r.Source)

			// Nothing new: the locks that came and went are nothing.
			r.Run(t, "check")
			if o := b.mustPush().Outcomes[0]; o.New || o.Bytes != 0 {
				t.Errorf("unchanged: %+v", o)
			}
			r.Fill(t, 3, 1<<20)
			if err := os.Remove(filepath.Join(r.Source, "001-0002")); err != nil {
				t.Fatal(err)
			}
			r.Run(t, "backup", r.Source)
			r.Run(t, "forget", "--keep-last", "1", "--prune", "--max-unused", "0")
			second := b.mustPush().Outcomes[0]
			if !second.New || second.Bytes < 3<<20 || second.Bytes > 12<<20 {
				t.Errorf("after a prune: %+v", second)
			}
			r.Verify(t, files(at, "photos", second.Generation), r.Source)
			r.Verify(t, there, before)
		})
	}
}

// A pack that its disk damaged goes nowhere; the push says which it is, and who has
// it as it was. What is put back is pushed again.
func TestWrongNameIsNotPushed(t *testing.T) {
	t.Parallel()
	b, r, at := resticBench(t, "2")
	r.Fill(t, 4, 2<<20)
	r.Run(t, "backup", r.Source)
	first := b.mustPush().Outcomes[0]
	pack := r.Packs(t)[0]
	path := filepath.Join(r.Path, pack)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	damage := func(content []byte) {
		t.Helper()
		if err := os.Chmod(path, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, 0o400); err != nil {
			t.Fatal(err)
		}
	}
	bad := slices.Clone(good)
	bad[1000] ^= 1
	damage(bad)
	sum := sha256.Sum256(bad)
	for range 2 { // the second push must not take the first one's word
		report := b.push()
		err := report.Err()
		if err == nil {
			t.Fatal("a damaged pack was pushed")
		}
		for _, want := range []string{"photos", pack, "it is named " + filepath.Base(pack)[:16], "and has " + hex.EncodeToString(sum[:])[:16], "nothing was pushed"} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%q is not in %v", want, err)
			}
		}
		if want := "attic has as pushed before: farkeep-pusher restore attic photos " + first.Generation + " " + pack + " --to"; !strings.Contains(hint.Of(err), want) {
			t.Errorf("hint: %s", hint.Of(err))
		}
		if len(report.Beats) != 1 || report.Beats[0].Sent {
			t.Errorf("a heartbeat was sent: %+v", report.Beats)
		}
	}
	if there, err := os.ReadDir(filepath.Join(at, "generations", "photos")); err != nil || len(slices.DeleteFunc(there, func(e os.DirEntry) bool { return e.Name()[0] == '.' })) != 1 {
		t.Errorf("generations: %v, %v", there, err)
	}
	back, err := os.ReadFile(filepath.Join(files(at, "photos", first.Generation), pack))
	if err != nil || !bytes.Equal(back, good) {
		t.Fatalf("the target has another pack than was pushed: %v", err)
	}
	damage(back)
	if r := b.mustPush(); r.Outcomes[0].New || !r.Beats[0].Sent {
		t.Errorf("%+v", r)
	}

	// A pack that never was right is nowhere to be had.
	other := strings.Repeat("cd", 32)
	if err := os.WriteFile(filepath.Join(r.Path, "data/cd", other), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := b.push().Err(); err == nil || !strings.Contains(hint.Of(err), "No target is known to have it") {
		t.Errorf("%v, hint %q", err, hint.Of(err))
	}
}

// A backup adds files while a list is made and pushed: what goes is a whole
// repository. A prune takes some away: the list is made anew.
func TestResticLivesOn(t *testing.T) {
	t.Parallel()
	b, r, at := resticBench(t, "2")
	r.Fill(t, 4, 2<<20)
	r.Run(t, "backup", r.Source)
	before := snapshot(t, r.Source)
	var do func()
	always := false
	b.targets[0] = &wrapped{Target: b.targets[0], onUpload: func(w io.Writer) io.Writer {
		if do != nil {
			do()
			if !always {
				do = nil
			}
		}
		return w
	}}
	do = func() {
		r.Fill(t, 2, 1<<20)
		r.Run(t, "backup", r.Source)
	}
	o := b.mustPush().Outcomes[0]
	r.Verify(t, files(at, "photos", o.Generation), before)

	do = func() {
		if err := os.RemoveAll(filepath.Join(r.Source, "001-0000")); err != nil {
			t.Fatal(err)
		}
		r.Run(t, "backup", r.Source)
		r.Run(t, "forget", "--keep-last", "1", "--prune", "--max-unused", "0")
	}
	o = b.mustPush().Outcomes[0]
	r.Verify(t, files(at, "photos", o.Generation), r.Source)
	if !strings.Contains(b.said.String(), "listing again") {
		t.Error("the prune was not noticed")
	}

	// One that prunes for ever ends the push, with a word about its lock.
	lock := filepath.Join(r.Path, "locks", strings.Repeat("ab", 32))
	if err := os.WriteFile(lock, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	always = true
	do = func() {
		all, err := filepath.Glob(filepath.Join(r.Path, "snapshots", "*"))
		if err != nil {
			t.Fatal(err)
		}
		for _, one := range all {
			content, err := os.ReadFile(one)
			if err != nil {
				t.Fatal(err)
			}
			content = append(content, 'x')
			sum := sha256.Sum256(content)
			if err := os.WriteFile(filepath.Join(r.Path, "snapshots", hex.EncodeToString(sum[:])), content, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Remove(one); err != nil {
				t.Fatal(err)
			}
		}
	}
	r.Fill(t, 1, 1<<20)
	r.Run(t, "backup", r.Source)
	if err := b.push().Err(); err == nil || !strings.Contains(hint.Of(err), "a lock from ") || !strings.Contains(hint.Of(err), "push when no restic prune runs") {
		t.Errorf("%v, hint %q", err, hint.Of(err))
	}
}

func TestBeginnings(t *testing.T) {
	root := t.TempDir()
	for _, name := range []string{"snapshots/a", "index/b", "data/c"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(root, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	b, err := readBeginnings(root)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{"snapshots": true, "snapshots/a": true, "snapshots/z": false, "index/b": true, "index/z": false, "data/z": true, "config": true} {
		if b.includes(name) != want {
			t.Errorf("%s: %v", name, !want)
		}
	}
	if err := b.check(); err != nil {
		t.Error(err)
	}
	if err := os.Remove(filepath.Join(root, "index/b")); err != nil {
		t.Fatal(err)
	}
	var changed *ChangedError
	if err := b.check(); !errors.As(err, &changed) || changed.Path != "index/b" {
		t.Errorf("got %v", err)
	}
	if _, err := readBeginnings(t.TempDir()); err == nil {
		t.Error("a folder without them has them")
	}
}

// A tree as Borg 2's documents describe it: no such borg is installed anywhere.
func TestBorg2ToDirectory(t *testing.T) {
	b := newBench(t)
	repo := filepath.Join(b.repos, "photos")
	put := func(name, content string) {
		t.Helper()
		path := filepath.Join(repo, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		old := time.Now().Add(-time.Hour)
		if err := os.Chtimes(path, old, old); err != nil {
			t.Fatal(err)
		}
	}
	id := sha256.Sum256([]byte("a pack"))
	pack := contentname.Borg2.Path(contentname.Pack, id)
	put("config/id", strings.Repeat("57", 32))
	put("config/version", "4")
	put("config/manifest", "encrypted")
	put("archives/"+strings.Repeat("12", 32), "a MAC is its name")
	put("locks/"+strings.Repeat("34", 32), "a lock")
	put("packs/57/temp-1", "half a pack")
	put(pack, "a pack")
	b.site = &site.Site{Repositories: []site.Repository{{Name: "photos", Path: repo}}}
	at := t.TempDir()
	b.directory("attic", at)
	o := b.mustPush().Outcomes[0]
	var there []string
	root := files(at, "photos", o.Generation)
	err := filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			name, _ := filepath.Rel(root, path)
			there = append(there, name)
		}
		return err
	})
	if want := []string{"archives/" + strings.Repeat("12", 32), "config/id", "config/manifest", "config/version", pack}; err != nil || !slices.Equal(there, want) {
		t.Errorf("there is %q: %v", there, err)
	}
	put(pack, "a pacK")
	if err := b.push().Err(); err == nil || !strings.Contains(err.Error(), pack) || !strings.Contains(hint.Of(err), "attic has as pushed before") {
		t.Errorf("%v, hint %q", err, hint.Of(err))
	}
}

// Whatever restic does meanwhile, every generation is a repository in which restic
// finds nothing wrong.
func TestResticAtOnce(t *testing.T) {
	t.Parallel()
	b, r, at := resticBench(t, "2")
	r.Fill(t, 6, 1<<20)
	r.Run(t, "backup", r.Source)
	b.mustPush()
	stop := make(chan struct{})
	var restic sync.WaitGroup
	restic.Go(func() {
		defer close(stop)
		for i := range atOnce {
			r.Fill(t, 1, 3<<20)
			if err := os.Remove(filepath.Join(r.Source, fmt.Sprintf("001-%04d", i%6))); err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Error(err)
			}
			for _, args := range [][]string{{"backup", r.Source}, {"forget", "--keep-last", "1", "--prune", "--max-unused", "0"}} {
				if out, err := r.Command(args...).CombinedOutput(); err != nil {
					t.Errorf("restic %v: %v\n%s", args, err, out)
				}
			}
		}
	})
	made := map[string]bool{}
	for done := false; !done; {
		select {
		case <-stop:
			done = true // and once more, when all is still
		default:
		}
		if o := b.push().Outcomes[0]; o.Err == nil {
			made[o.Generation] = true
		} else if !errors.As(o.Err, new(*ChangedError)) {
			t.Error(o.Err)
		}
	}
	restic.Wait()
	for generation := range made {
		other := &restictest.Repository{Path: files(at, "photos", generation)}
		other.Run(t, "--no-lock", "check", "--read-data")
	}
	t.Logf("%d generations", len(made))
}

// atOnce is how many times restic backs up and prunes.
const atOnce = 2
