package main

import (
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cenkalti/backoff/v5"

	"farkeep/pusher/progress"
	"farkeep/pusher/push"
	"farkeep/pusher/repository"
	"farkeep/pusher/restictest"
	"farkeep/pusher/target"
	"farkeep/shared/site"
)

// A restic repository from the pusher's own code by SSH to the confined parts: its
// generations pass restic's own check of every byte, and a pack that is not what its
// name says does not leave home.
func TestPushRestic(t *testing.T) {
	a := startAppliance(t, benchDir(t), program(t), "256m")
	repo := restictest.Init(t, t.TempDir(), "photos", "2")
	state, log := t.TempDir(), slog.New(slog.DiscardHandler)
	opened, err := push.Open(state, time.Now())
	must(t, err)
	defer opened.Close()
	wire := &line{}
	attic := a.client(t, wire)
	pushIt := func() (push.Outcome, error) {
		t.Helper()
		found := repository.Find(&site.Site{Repositories: []site.Repository{{Name: "photos", Path: repo.Path}}})
		p := &push.Push{
			Host: "home", Repositories: found.Repositories, Problems: found.Problems, Whole: true, Targets: []target.Target{attic},
			State: state, Memory: repository.NewMemory(filepath.Join(state, "repositories")),
			Pause: func() backoff.BackOff { return backoff.NewConstantBackOff(time.Millisecond) },
			Now:   time.Now, Log: log, Board: progress.New(nil, nil, log, time.Now),
		}
		r := p.Run(t.Context())
		if len(r.Outcomes) != 1 {
			t.Fatalf("%+v", r)
		}
		return r.Outcomes[0], r.Err()
	}
	// verified is a copy of a generation that restic has read every byte of.
	verified := func(generation, source string) {
		t.Helper()
		to := filepath.Join(t.TempDir(), "copy")
		if out, err := exec.Command("cp", "-r", a.files("photos", generation), to).CombinedOutput(); err != nil {
			t.Fatalf("%s", out)
		}
		repo.Verify(t, to, source)
	}

	repo.Fill(t, 6, 2<<20)
	repo.Run(t, "backup", repo.Source)
	first, err := pushIt()
	must(t, err)
	before := filepath.Join(t.TempDir(), "before")
	if out, err := exec.Command("cp", "-a", repo.Source, before).CombinedOutput(); err != nil {
		t.Fatalf("%s", out)
	}
	sent := wire.sent.Load()
	if sent < 12<<20 || sent > 13<<20 {
		t.Errorf("%d bytes crossed the line for 12 MiB", sent)
	}
	// restic looked, its locks came and went: nothing to push.
	repo.Run(t, "check")
	if again, err := pushIt(); err != nil || again.New {
		t.Errorf("%+v %v", again, err)
	}
	repo.Fill(t, 2, 1<<20)
	must(t, os.Remove(filepath.Join(repo.Source, "001-0001")))
	repo.Run(t, "backup", repo.Source)
	repo.Run(t, "forget", "--keep-last", "1", "--prune", "--max-unused", "0")
	second, err := pushIt()
	must(t, err)
	if second.Suspect || second.Generation == first.Generation {
		t.Errorf("%+v", second)
	}
	verified(second.Generation, repo.Source)
	verified(first.Generation, before)

	pack := repo.Packs(t)[0]
	path := filepath.Join(repo.Path, pack)
	content, err := os.ReadFile(path)
	must(t, err)
	content[len(content)/2] ^= 1
	must(t, os.Chmod(path, 0o600))
	must(t, os.WriteFile(path, content, 0o600))
	if _, err := pushIt(); err == nil || !strings.Contains(err.Error(), pack) {
		t.Errorf("a damaged pack: %v", err)
	}
	if all := a.generations(t, "photos"); len(all) != 2 {
		t.Errorf("%+v", all)
	}
}
