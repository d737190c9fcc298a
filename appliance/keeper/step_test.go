package keeper

import (
	"log/slog"
	"os"
	"testing"

	"farkeep/appliance/part"
	"farkeep/shared/generations"
)

// A release that ran out of time is completed when the last verb has ended, also
// when nobody asks for it again.
func TestReleaseIsCompletedLater(t *testing.T) {
	root := t.TempDir()
	paths := part.Paths{Run: root + "/run", State: root + "/state", Media: root + "/media"}
	for _, dir := range []string{paths.RunDir(part.Keeper), paths.RunDir(part.Disk), paths.StateDir(part.Keeper), paths.Disk()} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	env, err := part.New(part.Header{Name: part.Keeper, Paths: paths}, Brief{}, slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	known, err := openMemory(paths.StateDir(part.Keeper), env.Log)
	if err != nil {
		t.Fatal(err)
	}
	store, err := generations.Open(paths.Disk(), generations.Options{Reserve: 1})
	if err != nil {
		t.Fatal(err)
	}
	busy := &running{cancel: func(error) {}}
	k := &Keeper{env: env, uptime: uptime, known: known, store: store, closing: true, pushes: map[string]*push{}, running: map[*running]struct{}{busy: {}}}
	if k.curator, err = k.newCurator(store); err != nil {
		t.Fatal(err)
	}
	if err := k.step(); err != nil {
		t.Fatal(err)
	}
	if k.store == nil {
		t.Error("let go while a verb was at work")
	}
	delete(k.running, busy)
	if err := k.step(); err != nil {
		t.Fatal(err)
	}
	if k.store != nil || k.closing {
		t.Error("the keeper still holds the disk")
	}
}
