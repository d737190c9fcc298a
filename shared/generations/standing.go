package generations

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"time"

	"farkeep/shared/hint"
)

// Standing is what is thought of a generation now. generation.toml says what was
// thought at the commit and never changes; what the operator decided later is the
// record "verdicts".
//
//	commit ──▶ good
//	   └─────▶ suspect ──Decide──▶ accepted ◀──Decide──▶ rejected
type Standing string

// The standings.
const (
	Good     Standing = "good"
	Suspect  Standing = "suspect" // nobody has decided yet
	Accepted Standing = "accepted"
	Rejected Standing = "rejected"
)

// Counts reports whether a generation of that standing can be the current one.
func (s Standing) Counts() bool { return s == Good || s == Accepted }

// Decision is what the operator thinks of a suspect generation.
type Decision struct {
	Standing Standing  // Accepted or Rejected
	By       string    // the name of the key, at most 200 bytes
	Why      string    // at most 300 bytes
	At       time.Time // zero: now
}

// verdictsRecord holds the decisions about generations that are still there.
const verdictsRecord = "verdicts"

type verdicts struct {
	Verdicts []verdict `toml:"verdict"`
}

type verdict struct {
	Repository string    `toml:"repository"`
	Generation string    `toml:"generation"`
	Standing   Standing  `toml:"standing"`
	By         string    `toml:"by"`
	Why        string    `toml:"why,omitempty"`
	At         time.Time `toml:"at"`
}

// decided returns what was decided about the generations of a repository. A
// record that cannot be read decides nothing: what was suspect is so again, and
// nothing expires until somebody looked.
func (s *Store) decided(repository string) map[string]Standing {
	s.deciding.Lock()
	defer s.deciding.Unlock()
	if err := s.loadVerdicts(); err != nil {
		s.opt.Log.Error("the operator's decisions cannot be read: suspect generations count as undecided", "err", err)
	}
	return s.standings[repository]
}

// loadVerdicts reads the record, once. s.deciding is held. What it leaves in
// s.standings is replaced as a whole and never changed, so that it can be read
// without the lock.
func (s *Store) loadVerdicts() error {
	if s.standings != nil {
		return nil
	}
	_, err := s.readVerdicts()
	return err
}

func (s *Store) readVerdicts() (verdicts, error) {
	var v verdicts
	if err := s.ReadRecord(verdictsRecord, &v); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return verdicts{}, err
	}
	for _, d := range v.Verdicts {
		if d.Standing != Accepted && d.Standing != Rejected {
			return verdicts{}, fmt.Errorf("%w: record %s: %.40q is not a decision", ErrDamaged, verdictsRecord, d.Standing)
		}
	}
	s.keepVerdicts(v)
	return v, nil
}

func (s *Store) keepVerdicts(v verdicts) {
	s.standings = map[string]map[string]Standing{}
	for _, d := range v.Verdicts {
		if s.standings[d.Repository] == nil {
			s.standings[d.Repository] = map[string]Standing{}
		}
		s.standings[d.Repository][d.Generation] = d.Standing
	}
}

// Decide records the operator's decision about a suspect generation. It may be
// changed later; only the last one is kept. Nothing else here makes a suspect
// generation count, and nothing but its expiry forgets the decision.
func (s *Store) Decide(ctx context.Context, repository, name string, d Decision) error {
	if err := s.decide(ctx, repository, name, d); err != nil {
		return fmt.Errorf("decide about generation %.64s of %.200s: %w", name, repository, err)
	}
	return nil
}

func (s *Store) decide(ctx context.Context, repository, name string, d Decision) error {
	if d.Standing != Accepted && d.Standing != Rejected {
		return fmt.Errorf("%.40q is not a decision: %s and %s are", d.Standing, Accepted, Rejected)
	}
	g, err := s.Generation(ctx, repository, name)
	if err != nil {
		return err
	}
	if !g.Suspect {
		err := errors.New("it is not suspect")
		if g.Format == 0 {
			err = fmt.Errorf("%w: its %s cannot be read", ErrDamaged, TOMLFile)
		}
		return hint.Because(err, "only suspect generations are accepted or rejected")
	}
	if d.At.IsZero() {
		d.At = s.opt.Now()
	}
	s.deciding.Lock()
	defer s.deciding.Unlock()
	v, err := s.readVerdicts()
	if err != nil {
		return err
	}
	v.Verdicts = slices.DeleteFunc(v.Verdicts, func(o verdict) bool {
		return o.Repository == repository && o.Generation == name || !s.exists(o.Repository, o.Generation)
	})
	v.Verdicts = append(v.Verdicts, verdict{
		Repository: repository, Generation: name, Standing: d.Standing,
		By: sentence(d.By, 200), Why: sentence(d.Why, maxReason), At: d.At.UTC().Truncate(time.Second),
	})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err := s.WriteRecord(verdictsRecord, v); err != nil {
		s.standings = nil // whichever is on the disk now
		return err
	}
	s.keepVerdicts(v)
	return nil
}

// exists reports whether a generation's folder is there, or may be.
func (s *Store) exists(repository, name string) bool {
	dir, err := s.generations.Dir(repository)
	if err == nil {
		defer dir.Close()
		_, err = dir.Stat(name)
	}
	return !errors.Is(err, fs.ErrNotExist)
}

// Decisions returns what the operator decided about generations that are there,
// by their names.
func (s *Store) Decisions(repository string) map[string]Standing {
	return maps.Clone(s.decided(repository))
}

// Current returns the newest generation that can be read and is neither suspect
// nor rejected, or an error that wraps ErrNone.
func (s *Store) Current(ctx context.Context, repository string) (Generation, error) {
	list, err := s.List(ctx, repository)
	if err != nil {
		return Generation{}, err
	}
	if g := current(list); g != nil {
		return *g, nil
	}
	return Generation{}, fmt.Errorf("%s: %w", repository, ErrNone)
}

// current is the current one of a list, nil for none.
func current(list []Generation) *Generation {
	for i := range list {
		if g := &list[len(list)-1-i]; g.Format != 0 && g.Standing.Counts() {
			return g
		}
	}
	return nil
}
