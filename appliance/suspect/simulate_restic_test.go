package suspect_test

import (
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cenkalti/backoff/v5"

	"farkeep/appliance/suspect"
	"farkeep/pusher/borgtest/household"
	"farkeep/pusher/directory"
	"farkeep/pusher/progress"
	"farkeep/pusher/push"
	"farkeep/pusher/repository"
	"farkeep/pusher/restictest"
	"farkeep/pusher/target"
	"farkeep/shared/generations"
	"farkeep/shared/pushwire"
	"farkeep/shared/site"
)

// The household of TestSimulation, backed up with the real restic: a backup each day, forget
// and prune every second day, a check now and then. Nothing may be suspect. Then come the bad
// days, and each is caught twice: the pusher refuses what is not what its name
// says, and the appliance sees what an enemy pushes without the pusher.
func TestSimulationRestic(t *testing.T) {
	t.Parallel()
	days := daysToSimulate(t) * 4 / 5 // each restic takes half a second to try a passphrase
	seen := &observer{}
	log := slog.New(seen)
	repo := restictest.Init(t, t.TempDir(), name, "2")
	files, err := household.New(repo.Source, 7)
	if err != nil {
		t.Fatal(err)
	}
	random := rand.New(rand.NewPCG(7, 1))
	clock := files.Date().Add(3 * time.Hour)
	now := func() time.Time { return clock }
	disk, state := t.TempDir(), t.TempDir()
	opened, err := push.Open(state, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	defer opened.Close()
	judge := suspect.New(suspect.Config{Now: now}, log)
	attic := directory.New(directory.Config{Name: "attic", Path: disk, Pusher: "home", Judge: judge, Now: now, Log: log})
	defer attic.Close()
	store, err := generations.Open(disk, generations.Options{Judge: judge, Now: now, Log: log, Reserve: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	memory := repository.NewMemory(filepath.Join(state, "repositories"))

	// find and push do what "farkeep-pusher push" does.
	find := func() repository.Repository {
		t.Helper()
		found := repository.Find(&site.Site{Repositories: []site.Repository{{Name: name, Path: repo.Path}}})
		if len(found.Repositories) != 1 {
			t.Fatalf("%+v", found)
		}
		return found.Repositories[0]
	}
	pushIt := func() error {
		r := find()
		if err := memory.Check(r); err != nil {
			return err
		}
		p := &push.Push{
			Host: "home", Repositories: []repository.Repository{r}, Whole: true, Targets: []target.Target{attic}, State: state, Memory: memory,
			Pause: func() backoff.BackOff { return backoff.NewConstantBackOff(time.Millisecond) },
			Now:   now, Log: log, Board: progress.New(nil, nil, log, now),
		}
		return p.Run(t.Context()).Err()
	}
	newest := func() generations.Generation {
		t.Helper()
		g, err := store.Newest(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		return g
	}
	good := func(what string) {
		t.Helper()
		if err := pushIt(); err != nil {
			t.Fatalf("%s: %v\n%s", what, err, seen.tail())
		}
		if g := newest(); g.Suspect {
			t.Fatalf("%s: a false suspicion: %q\n%s", what, g.Reasons, seen.tail())
		}
	}
	current := func() generations.Generation {
		t.Helper()
		g, err := store.Current(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		return g
	}
	backup := func() { repo.Run(t, "backup", "--time", clock.Format(time.DateTime), repo.Source) }

	backup()
	good("the first push")
	for day := range days {
		clock = clock.Add(24 * time.Hour)
		if err := files.Next(); err != nil {
			t.Fatal(err)
		}
		backup()
		if day%2 == 1 {
			repo.Run(t, "forget", "--keep-daily", "7", "--keep-weekly", "4", "--keep-monthly", "6", "--prune")
		}
		if day%8 == 7 {
			repo.Run(t, "check")
		}
		good("a day")
	}
	seen.report(t)

	kept := filepath.Join(t.TempDir(), "repo")
	run(t, "cp", "-a", repo.Path, kept)
	packs := repo.Packs(t)
	every := func(do func(path string)) {
		t.Helper()
		for _, e := range walk(t, repo.Path) {
			if e.Size > 0 {
				do(filepath.Join(repo.Path, e.Path))
			}
		}
	}
	for _, attack := range []struct {
		name    string
		do      func()
		want    string // in the reasons
		refused string // by the pusher; "": it sees nothing wrong
	}{
		{"ransomware encrypts every pack in place", func() {
			for _, p := range packs {
				junk(t, random, filepath.Join(repo.Path, p))
			}
		}, "have other content than before", "files have not the content that they should have"},
		{"ransomware encrypts everything and renames it", func() {
			every(func(path string) {
				junk(t, random, path)
				run(t, "mv", path, path+".locked")
			})
		}, "Until now this was a restic repository", "is a plain folder of files now"},
		{"a disk flips one bit", func() {
			path := filepath.Join(repo.Path, packs[len(packs)/2])
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			b[len(b)/2] ^= 1
			overwrite(t, path, b)
		}, "1 file, named by what is in them, have other content than before", "it is named"},
		{"ransomware encrypts what is new", func() {
			before := repo.Packs(t)
			if err := files.Next(); err != nil {
				t.Fatal(err)
			}
			backup()
			for _, p := range repo.Packs(t) {
				if !slices.Contains(before, p) {
					junk(t, random, filepath.Join(repo.Path, p))
				}
			}
		}, "new files are not what their names say", "it is named"},
		{"rm -rf data", func() { run(t, "rm", "-rf", repo.Path+"/data") }, "Until now this was a restic repository", "is a plain folder of files now"},
		{"rm -rf of the packs", func() { run(t, "find", repo.Path+"/data", "-type", "f", "-delete") }, "packs are gone", ""},
		{"restic forget of everything, and prune", func() {
			var ids []string
			for _, path := range walk(t, filepath.Join(repo.Path, "snapshots")) {
				ids = append(ids, path.Path)
			}
			repo.Run(t, append([]string{"forget", "--prune"}, ids...)...)
		}, "Not one snapshot is left", ""},
		{"another repository in its place", func() {
			run(t, "rm", "-rf", repo.Path)
			other := restictest.Init(t, filepath.Dir(repo.Path), name, "2")
			other.Fill(t, 10, 100_000)
			other.Run(t, "backup", other.Source)
		}, "Changed or gone: config", "it is another repository"},
	} {
		clock = clock.Add(24 * time.Hour)
		before := current()
		attack.do()
		err := pushIt()
		if (err != nil) != (attack.refused != "") || err != nil && !strings.Contains(err.Error(), attack.refused) {
			t.Errorf("%s: the pusher says %v", attack.name, err)
		}
		if err != nil {
			if g := newest(); g.Name != before.Name && !g.Suspect {
				t.Errorf("%s: the pusher made %s of it", attack.name, g.Name)
			}
			enemy(t, store, repo.Path, pushwire.KindFiles, "")
		}
		g := newest()
		if !g.Suspect || !strings.Contains(strings.Join(g.Reasons, "\n"), attack.want) {
			t.Errorf("%s: suspect %v, %q", attack.name, g.Suspect, g.Reasons)
		}
		for _, r := range g.Reasons {
			t.Logf("%s: %s", attack.name, r)
		}
		if now := current(); now.Name != before.Name {
			t.Errorf("%s: %s counts now", attack.name, now.Name)
		}
		run(t, "rm", "-rf", repo.Path)
		run(t, "cp", "-a", kept, repo.Path)
	}
	// The last good generation is a repository that restic finds nothing wrong with.
	other := &restictest.Repository{Path: filepath.Join(disk, "generations", name, current().Name, "files")}
	other.Run(t, "--no-lock", "check", "--read-data")

	// The household goes on as if nothing had been.
	clock = clock.Add(24 * time.Hour)
	if err := files.Next(); err != nil {
		t.Fatal(err)
	}
	backup()
	good("after the attacks")
	repo.Verify(t, filepath.Join(disk, "generations", name, current().Name, "files"), repo.Source)
}
