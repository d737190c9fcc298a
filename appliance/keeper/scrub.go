package keeper

import (
	"context"
	"slices"
	"sync"
	"time"

	"farkeep/appliance/scrub"
	"farkeep/appliance/status"
	"farkeep/shared/generations"
	"farkeep/shared/manifest"
)

const (
	// scrubAgain is how long the scrub rests after the disk would not let it work.
	scrubAgain = 10 * time.Minute
	// scrubNoted is how often the reading's progress is written to the state
	// partition, which is an SD card.
	scrubNoted = 30 * time.Minute
)

// scrubState is how far the reading has come.
type scrubState struct {
	mu    sync.Mutex // guards the fields below
	now   *status.Scrub
	noted time.Time
}

// scrub reads what lies on the disk, until the disk is wanted back. It belongs to
// the goroutine that attach starts for it.
func (k *Keeper) scrub() {
	ctx, store, leave, err := k.enter(context.Background())
	if err != nil {
		return // the disk is wanted back already
	}
	defer leave()
	k.scrubLoop(ctx, store)
}

func (k *Keeper) scrubLoop(ctx context.Context, store *generations.Store) {
	k.tellRot(store)
	every := k.brief.History.ScrubEvery.Std()
	for ctx.Err() == nil {
		err := scrub.Run(ctx, scrub.Config{
			Store: store, Every: every, Busy: k.occupied, Now: k.env.Now, Log: k.env.Log,
			Report: func(p scrub.Progress) {
				k.scrubbed(p, every)
				k.tellRot(store)
			},
		})
		if ctx.Err() != nil {
			break
		}
		k.env.Log.Error("the disk cannot be read through", "err", err, "again_in", scrubAgain)
		wait := time.NewTimer(scrubAgain)
		select {
		case <-ctx.Done():
		case <-wait.C:
		}
		wait.Stop()
	}
	k.noteScrub(true)
}

// occupied says who needs the disk more than the scrub does.
func (k *Keeper) occupied() string {
	if len(k.verifying[true])+len(k.verifying[false]) > 0 {
		return "a generation is being verified"
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, p := range k.pushes {
		// Between two verbs a push is at work as well, for a moment.
		if p.busy || p.silent() < k.brief.Takeover {
			return "a push is at work"
		}
	}
	switch {
	case len(k.reading) > 0:
		return "somebody reads generations"
	case k.passing:
		return "history is being looked after"
	}
	return ""
}

// scrubbed takes note of the reading's progress.
func (k *Keeper) scrubbed(p scrub.Progress, every time.Duration) {
	now := &status.Scrub{Started: p.Started, LastFull: p.LastFull, Done: p.Done, Bytes: p.Bytes, Paused: p.Paused, Every: every}
	k.scrubs.mu.Lock()
	old := k.scrubs.now
	k.scrubs.now = now
	k.scrubs.mu.Unlock()
	k.noteScrub(old == nil || !old.Started.Equal(now.Started) || !old.LastFull.Equal(now.LastFull))
	k.changed()
}

// noteScrub writes the progress down for the time after a restart.
func (k *Keeper) noteScrub(always bool) {
	k.scrubs.mu.Lock()
	now := k.scrubs.now
	always = always || time.Since(k.scrubs.noted) >= scrubNoted
	if always {
		k.scrubs.noted = time.Now()
	}
	k.scrubs.mu.Unlock()
	if now != nil && always {
		k.known.note(func(l *ledger) { l.Scrub = now })
	}
}

// tellScrub adds the progress to the status.
func (k *Keeper) tellScrub(s *status.Keeper) {
	k.scrubs.mu.Lock()
	defer k.scrubs.mu.Unlock()
	if k.scrubs.now != nil {
		s.Scrub = k.scrubs.now
	}
}

// tellRot takes over what the disk knows to be rotten, newest first.
func (k *Keeper) tellRot(store *generations.Store) {
	files, open, err := store.Rotten()
	if err != nil {
		k.env.Log.Error("what is rotten is not known", "err", err)
		return
	}
	// What waits to be healed first: healed ones only as far as there is room.
	slices.SortStableFunc(files, func(a, b generations.Rot) int {
		if a.Open() != b.Open() {
			if a.Open() {
				return -1
			}
			return 1
		}
		return b.Found.Compare(a.Found)
	})
	var all []status.Rot
	for _, f := range files[:min(len(files), status.MaxRot)] {
		r := status.Rot{
			Repository: f.Repository, Path: f.Path, What: f.What, Generations: f.Generations[:min(len(f.Generations), generations.MaxRotGenerations)],
			Found: f.Found, Healed: f.Healed,
		}
		if f.Sum != (manifest.Sum{}) {
			r.Sum = f.Sum.String()
		}
		if f.Open() && f.Lacking != "" {
			r.What += "; home does not have these bytes any more"
		}
		r.What = r.What[:min(len(r.What), status.MaxText)]
		all = append(all, r)
	}
	k.known.note(func(l *ledger) { l.Rot, l.RotCount = all, int(open) })
	k.changed()
}
