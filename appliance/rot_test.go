package main

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/cenkalti/backoff/v5"

	"farkeep/appliance/part"
	"farkeep/appliance/status"
	"farkeep/pusher/borglock"
	"farkeep/pusher/progress"
	"farkeep/pusher/push"
	"farkeep/pusher/repository"
	"farkeep/pusher/target"
	"farkeep/shared/site"
)

// home is a pusher with one repository of plain files, as the program has it.
type home struct {
	*testing.T
	dir    string
	state  string
	memory *repository.Memory
	to     target.Target
	rate   func(target string, at time.Time) int64 // nil: no limit
}

func newHome(t *testing.T, to target.Target) *home {
	t.Helper()
	h := &home{T: t, dir: t.TempDir(), state: t.TempDir(), to: to}
	h.memory = repository.NewMemory(filepath.Join(h.state, "repositories"))
	return h
}

func (h *home) write(files map[string]string) {
	h.Helper()
	for name, content := range files {
		must(h.T, os.WriteFile(filepath.Join(h.dir, name), []byte(content), 0o600))
	}
}

// push runs the pusher once.
func (h *home) push() push.Outcome {
	h.Helper()
	found := repository.Find(&site.Site{Repositories: []site.Repository{{Name: "photos", Path: h.dir}}})
	log := slog.New(slog.DiscardHandler)
	state, err := push.Open(h.state, time.Now())
	must(h.T, err)
	defer state.Close()
	p := &push.Push{
		Host: "home", Repositories: found.Repositories, Problems: found.Problems, Whole: true, Targets: []target.Target{h.to},
		State: h.state, Memory: h.memory, Rate: h.rate, Lock: borglock.Options{Wait: 10 * time.Second},
		Pause: func() backoff.BackOff { return backoff.NewConstantBackOff(50 * time.Millisecond) },
		Now:   time.Now, Log: log, Board: progress.New(nil, nil, log, time.Now),
	}
	r := p.Run(h.Context())
	if err := r.Err(); err != nil || len(r.Outcomes) != 1 || len(r.Beats) != 1 || !r.Beats[0].Sent {
		h.Fatalf("push: %v, %+v", err, r)
	}
	return r.Outcomes[0]
}

// TestRotIsHealedOverSSH: the real pusher brings back what rotted on the disk of
// confined parts, over SSH: an unchanged repository, a changed one, and what home
// has no more stays named.
func TestRotIsHealedOverSSH(t *testing.T) {
	a := startAppliance(t, benchDir(t), program(t), "64m")
	to := a.client(t, &line{})
	must(t, to.Wake(t.Context()))
	h := newHome(t, to)
	day := func(n int) map[string]string {
		return map[string]string{"keep": noise(1, 300_000), "also": noise(2, 100_000), "day": fmt.Sprint("day ", n)}
	}
	var names []string
	for n := range 3 {
		h.write(day(n))
		o := h.push()
		if !o.New {
			t.Fatalf("day %d made no generation: %+v", n, o)
		}
		names = append(names, o.Generation)
	}
	flip := func(generation, name string, at int64) {
		t.Helper()
		f, err := os.OpenFile(filepath.Join(a.files("photos", generation), name), os.O_RDWR, 0)
		must(t, err)
		defer f.Close()
		b := make([]byte, 1)
		_, err = f.ReadAt(b, at)
		must(t, err)
		b[0] ^= 0x40
		_, err = f.WriteAt(b, at)
		must(t, err)
	}
	told := func(what string, ok func(*status.Keeper) bool) {
		t.Helper()
		await(t, what, func() bool {
			k, err := status.Read[status.Keeper](a.paths.Status(part.Keeper))
			return err == nil && k != nil && ok(k)
		})
	}

	// Unchanged: nothing but the rotten file crosses the line, and no generation
	// comes of it.
	flip(names[0], "keep", 150_000)
	if v := a.verify(t, "photos", names[1]); len(v.Bad) != 1 {
		t.Fatalf("verify: %+v", v)
	}
	told("the rotten file", func(k *status.Keeper) bool { return k.RotCount == 1 && k.Rot[0].Path == "keep" })
	o := h.push()
	if o.New || o.Generation != names[2] || o.Files != 1 || o.Bytes != 300_000 {
		t.Errorf("the push that heals: %+v", o)
	}
	told("it is healed", func(k *status.Keeper) bool { return k.RotCount == 0 && !k.Rot[0].Healed.IsZero() })
	if o := h.push(); o.New || o.Files != 0 {
		t.Errorf("the push after it: %+v", o)
	}

	// Changed: a new generation, and the earlier ones are healed along.
	flip(names[0], "also", 0)
	flip(names[1], "day", 4)
	for _, name := range names[:2] {
		if v := a.verify(t, "photos", name); len(v.Bad) == 0 {
			t.Errorf("verify %s finds nothing", name)
		}
	}
	told("two rotten files", func(k *status.Keeper) bool { return k.RotCount == 2 })
	h.write(day(3))
	o = h.push()
	if !o.New || o.Files != 2 {
		t.Errorf("the changed push: %+v", o)
	}
	names = append(names, o.Generation)
	told("what home has no more", func(k *status.Keeper) bool {
		return k.RotCount == 1 && k.Rot[0].Path == "day" && slices.Equal(k.Rot[0].Generations, names[1:2])
	})
	if o := h.push(); o.New || o.Files != 0 {
		t.Errorf("home is asked for what it does not have: %+v", o)
	}
	for i, name := range names {
		v := a.verify(t, "photos", name)
		if bad := i == 1; (len(v.Bad) > 0) != bad {
			t.Errorf("verify %s: %+v", name, v)
		}
		if i != 1 {
			source(day(i)).lies(t, a, "photos", name)
		}
	}
	if all := a.generations(t, "photos"); len(all) != 4 {
		t.Errorf("generations: %+v", all)
	}
}
