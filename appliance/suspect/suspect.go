// Package suspect compares each generation that is about to be with the one that
// counts, and says whether a person should look: a [Judge] for package
// generations.
//
// It knows no passphrase. What it can see of a Borg 1.x repository it reads from
// the entries of the segment files (package borgsegment): which chunks were alive
// before and are not any more, which committed segments have other bytes, which
// files are no segments at all. Of everything else it sees names, sizes and sums
// in the manifests. docs/suspicion.md has the rules, their numbers and what they
// do not see.
//
// What it guarantees: it changes nothing but its scratch folder, which may be
// lost at any time; a repository of 3 million chunks needs less than 16 MB of
// memory; on a normal night it reads of the repository only what is new. Whatever
// was pushed, it ends, with a verdict or an error, and package generations takes
// an error for suspicion.
//
// What it leaves to callers: to keep what is suspect, to tell a person, and to
// hand over as Current what a person accepted: comparison starts there.
package suspect

import (
	"context"
	"fmt"
	"log/slog"
	"runtime/debug"
	"time"

	"farkeep/shared/generations"
	"farkeep/shared/pushwire"
)

// Limits that hold where a Config says nothing.
const (
	DefaultVanish   = 20 // percent
	DefaultChange   = 50 // percent
	DefaultPatience = 20 * time.Minute
)

// Config tunes a Judge.
type Config struct {
	// Limits are the shares, in percent, from which on it is suspect what vanished
	// and what changed in one push; 100: never. nil: the defaults for all.
	Limits func(repository string) (vanish, change int)
	// Patience is how long one judgement may take to read the headers of segments
	// that are not new and have no index yet: those of a disk that was filled at
	// home, or after the scratch folder was lost. 0: DefaultPatience. What is left is
	// read at the next commits.
	Patience time.Duration
	Now      func() time.Time // nil: time.Now
}

// Judge implements generations.Judge. It is safe for concurrent use; judgements
// wait for one another, so that their memory does not add up.
type Judge struct {
	config Config
	log    *slog.Logger
	turn   chan struct{}
	bits   uint  // of tables; tests have small ones
	most   int64 // entries; tests have fewer
}

var _ generations.Judge = (*Judge)(nil)

// New returns a Judge. A nil log discards.
func New(config Config, log *slog.Logger) *Judge {
	if config.Limits == nil {
		config.Limits = func(string) (int, int) { return DefaultVanish, DefaultChange }
	}
	if config.Patience == 0 {
		config.Patience = DefaultPatience
	}
	if config.Now == nil {
		config.Now = time.Now
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Judge{config: config, log: log, turn: make(chan struct{}, 1), bits: tableBits, most: maxEntries}
}

// Judge implements generations.Judge.
func (j *Judge) Judge(ctx context.Context, c *generations.Candidate) (generations.Verdict, error) {
	select {
	case j.turn <- struct{}{}:
		defer func() { <-j.turn }()
	case <-ctx.Done():
		return generations.Verdict{}, ctx.Err()
	}
	// What a judgement takes is half of what this process ever needs.
	defer debug.FreeOSMemory()
	start := j.config.Now()
	f := &findings{}
	err := j.judge(ctx, c, f)
	v := f.verdict(c)
	if err != nil {
		return v, fmt.Errorf("compare with the generation before: %w", err)
	}
	j.log.Info("judged", "repository", c.Repository, "suspect", v.Suspect, "reasons", v.Reasons, "took", j.config.Now().Sub(start).Round(time.Millisecond))
	return v, nil
}

func (j *Judge) judge(ctx context.Context, c *generations.Candidate, f *findings) error {
	was := c.Current
	if was != nil && was.Kind != c.Offer.Kind {
		f.add("Until now this was %s, and what was pushed is %s.", kindName(was.Kind), kindName(c.Offer.Kind))
		return nil
	}
	vanish, change := j.config.Limits(c.Repository)
	l := limits{vanish: vanish, change: change}
	if c.Offer.Kind == pushwire.KindBorg1 {
		return j.borg(ctx, c, l, f)
	}
	return j.files(ctx, c, l, f)
}

func kindName(kind string) string {
	if kind == pushwire.KindBorg1 {
		return "a Borg repository"
	}
	return "a plain folder of files"
}

// limits are percentages.
type limits struct{ vanish, change int }

// cumulative is the limit of what may vanish within [window].
func (l limits) cumulative() int { return min(2*l.vanish, 100) }

// over reports whether part of whole is at least percent of it; 100 is never.
func over(part, whole int64, percent int) bool {
	return percent < 100 && part > 0 && float64(part)*100 >= float64(whole)*float64(percent)
}
