package keeper_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"farkeep/appliance/keeper"
	"farkeep/appliance/keepercall"
	"farkeep/appliance/status"
	"farkeep/shared/settings"

	"golang.org/x/sys/unix"
)

// TestScrubTellsAndHeals: what rots is found while the disk is open, told in the
// status, asked for by the next offer, and healed; and the disk is let go of at once.
func TestScrubTellsAndHeals(t *testing.T) {
	b := startWith(t, keeper.Brief{Reserve: 1, History: settings.History{ScrubEvery: settings.Duration(time.Second)}})
	b.mount()
	first := repo{"keep": strings.Repeat("k", 50_000), "day": "1"}
	second := repo{"keep": first["keep"], "day": "2"}
	names := []string{b.push("photos", first), b.push("photos", second)}
	b.await("nothing is rotten", func(s *status.Keeper) bool {
		return s.Scrub != nil && !s.Scrub.LastFull.IsZero() && s.Scrub.Every == time.Second && s.RotCount == 0
	})

	path := filepath.Join(b.paths.Disk(), "generations/photos", names[0], "files/keep")
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("X"), 123); err != nil {
		t.Fatal(err)
	}
	f.Close()
	s := b.await("the rotten file is told", func(s *status.Keeper) bool {
		return s.RotCount == 1 && len(s.Rot) == 1 && len(s.Rot[0].Generations) == 2
	})
	if r := s.Rot[0]; r.Repository != "photos" || r.Path != "keep" || len(r.Sum) != 64 || r.Found.IsZero() || !r.Healed.IsZero() || !strings.Contains(r.What, "hash") {
		t.Errorf("told: %+v", r)
	}

	answer, need, err := b.offer("photos", second)
	if err != nil || !answer.Heal || need.Len() != 1 {
		t.Fatalf("the offer of the same is answered %+v, %v", answer, err)
	}
	if err := b.upload(answer.Push, second, need); err != nil {
		t.Fatal(err)
	}
	done, err := b.commit(answer.Push)
	if err != nil || done.Generation != names[1] {
		t.Fatalf("%+v, %v", done, err)
	}
	s = b.await("it is told to be healed", func(s *status.Keeper) bool { return s.RotCount == 0 && len(s.Rot) == 1 && !s.Rot[0].Healed.IsZero() })
	if s.Repositories[0].Generations != 2 {
		t.Errorf("healing made a generation: %+v", s.Repositories[0])
	}
	for _, name := range names {
		got, err := os.ReadFile(filepath.Join(b.paths.Disk(), "generations/photos", name, "files/keep"))
		if err != nil || string(got) != first["keep"] {
			t.Errorf("keep in %s is not what it was: %v", name, err)
		}
	}

	// Within ReleaseTimeout, or it is an error.
	if err := b.ask(keepercall.Release, nil, nil); err != nil {
		t.Fatal(err)
	}
	if err := unix.Unmount(b.paths.Disk(), 0); err != nil {
		t.Errorf("the disk cannot be unmounted after release: %v", err)
	}
	if s := b.status(); s.Scrub == nil || len(s.Rot) != 1 {
		t.Errorf("with the disk dark: scrub %+v, rot %+v", s.Scrub, s.Rot)
	}
	// Known after a restart as well.
	b.stop()
	b.run()
	b.await("what was known before the restart", func(s *status.Keeper) bool { return s.Scrub != nil && len(s.Rot) == 1 })
}
