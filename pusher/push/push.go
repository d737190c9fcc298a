// Package push carries repositories to targets: freeze, list, offer, upload,
// commit, and, when everything arrived, heartbeat.
//
// Targets are independent of one another: each goes through the repositories at
// its own pace, and one that fails stops no other. A repository is frozen and
// listed when the first target gets to it and thawed when the last one is done.
// What a cut line interrupts is offered again, with jittered pauses, until nothing
// has moved for [Push.GiveUp]; the target asks only for what it does not have yet.
//
// A target gets a heartbeat only if this run brought every repository of the site
// there, found nothing missing and nothing wrong.
package push

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"

	"farkeep/pusher/base"
	"farkeep/pusher/borglock"
	"farkeep/pusher/progress"
	"farkeep/pusher/repository"
	"farkeep/pusher/target"
	"farkeep/shared/hint"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"
)

// rounds is how often plain files that change are listed and offered again.
const rounds = 3

// Push is what to push, and where to.
type Push struct {
	Host         string // whose heartbeat it is
	Repositories []repository.Repository
	// Problems are repositories that cannot be pushed; with any there is no heartbeat.
	Problems []repository.Problem
	// Whole says that Repositories is all that the site has; without it there is no
	// heartbeat.
	Whole   bool
	Targets []target.Target

	State  string // folder of the pusher's state, see [Lock]
	Memory *repository.Memory
	Lock   borglock.Options
	// Rate gives the bound on what a target gets at a time, in bytes per second, 0
	// for none; nil: none for all.
	Rate func(target string, at time.Time) int64
	// Reread is how often every file is read again although it did not change; 0: never.
	Reread time.Duration
	// GiveUp is how long a target may be out of reach without anything moving;
	// 0 means 30 minutes.
	GiveUp time.Duration
	// Pause makes the pauses between attempts; nil: from 2 s to 2 min, with jitter.
	Pause func() backoff.BackOff
	Now   func() time.Time
	Log   *slog.Logger
	Board *progress.Board

	bases *base.Memory // what the targets hold
	sleep func(context.Context, time.Duration) error
}

// Outcome is how one repository's push to one target ended.
type Outcome struct {
	Repository string        `json:"repository"`
	Target     string        `json:"target"`
	Generation string        `json:"generation,omitempty"`
	New        bool          `json:"new"` // false: unchanged, the newest generation was confirmed
	Suspect    bool          `json:"suspect,omitempty"`
	Files      int64         `json:"files"`  // uploaded
	Bytes      int64         `json:"bytes"`  // of them, that crossed the line
	Copied     int64         `json:"copied"` // of them, that the target took from what it held
	Spared     int64         `json:"spared"` // of them, that did not cross because the rest was compressed
	Took       time.Duration `json:"took"`
	Spent      Spent         `json:"-"`
	Slow       string        `json:"slow,omitempty"` // why it took long, in a clause; "": it did not
	Err        error         `json:"-"`
	digest     string
	clock      clock
	// beat makes the target's heartbeat, if this is the push that it waits for and its
	// digest that one; nil: it is not.
	beat    func(digest string) pushwire.Heartbeat
	beaten  bool // it was sent behind the commit
	beatErr error
	asked   bool // a commit was asked for that makes a generation
}

// Beat is how a target's heartbeat ended.
type Beat struct {
	Target string
	Sent   bool
	Why    string // not sent, though nothing failed
	Err    error
}

// Report is how everything ended.
type Report struct {
	Outcomes []Outcome
	Beats    []Beat
	Problems []repository.Problem
}

// Err sums the report up for the exit code: nil, hint.ExitPartial when some
// pushes succeeded, the failures' own code when none did.
func (r *Report) Err() error {
	var failed []error
	good := 0
	for _, p := range r.Problems {
		failed = append(failed, fmt.Errorf("%s: %w", p.Name, p.Err))
	}
	for _, o := range r.Outcomes {
		if o.Err == nil {
			good++
		} else {
			failed = append(failed, o.Err)
		}
	}
	for _, b := range r.Beats {
		if b.Err != nil {
			failed = append(failed, b.Err)
		}
	}
	if len(failed) == 0 {
		return nil
	}
	if good == 0 && len(failed) == 1 {
		return failed[0]
	}
	code := hint.Code(failed[0])
	for _, err := range failed {
		if hint.Code(err) != code {
			code = hint.ExitFailure
		}
	}
	for _, err := range failed {
		if errors.Is(err, context.Canceled) {
			return hint.Exit(hint.ExitCancelled, fmt.Errorf("interrupted; %d pushes were done", good))
		}
	}
	err := fmt.Errorf("%d pushes failed, %d succeeded", len(failed), good)
	if good > 0 {
		code = hint.ExitPartial
	}
	return hint.Exit(code, hint.Because(err, "see the lines above; what succeeded need not be repeated"))
}

// Run pushes everything and returns when all is done, or given up.
func (p *Push) Run(ctx context.Context) *Report {
	if p.GiveUp == 0 {
		p.GiveUp = 30 * time.Minute
	}
	if p.Pause == nil {
		p.Pause = func() backoff.BackOff {
			b := backoff.NewExponentialBackOff()
			b.InitialInterval, b.MaxInterval, b.Multiplier, b.RandomizationFactor = 2*time.Second, 2*time.Minute, 2, 0.5
			return b
		}
	}
	if p.sleep == nil {
		p.sleep = sleep
	}
	p.bases = base.Open(filepath.Join(p.State, "base"), p.Log)
	report := &Report{Problems: p.Problems}
	pictures := make([]*picture, len(p.Repositories))
	for i, r := range p.Repositories {
		pictures[i] = &picture{repository: r, push: p, users: len(p.Targets)}
	}
	var mu sync.Mutex // guards report
	var all sync.WaitGroup
	for _, t := range p.Targets {
		lane := p.Board.Lane(t.Name())
		all.Go(func() {
			outcomes, beat := p.target(ctx, t, pictures, lane)
			mu.Lock()
			defer mu.Unlock()
			report.Outcomes = append(report.Outcomes, outcomes...)
			report.Beats = append(report.Beats, beat)
		})
	}
	all.Wait()
	slices.SortStableFunc(report.Outcomes, func(a, b Outcome) int { return strings.Compare(a.Target, b.Target) })
	slices.SortStableFunc(report.Beats, func(a, b Beat) int { return strings.Compare(a.Target, b.Target) })
	return report
}

// target brings all repositories to one target.
func (p *Push) target(ctx context.Context, t target.Target, pictures []*picture, lane *progress.Lane) ([]Outcome, Beat) {
	beat := Beat{Target: t.Name()}
	outcomes := make([]Outcome, 0, len(pictures))
	failed := false
	// An unreachable target is found out before anything is frozen for it. While plain
	// files are read, which nobody has to wait for, the target wakes.
	var awake error
	asked := false
	early, stop := context.WithCancel(ctx)
	var waking sync.WaitGroup
	defer waking.Wait()
	defer stop()
	for i, pic := range pictures {
		start := p.Now()
		switch frozen := pic.repository.Kind != pushwire.KindFiles; {
		case frozen && !asked:
			awake, asked = p.retry(ctx, t, nil, func() error { return t.Wake(ctx) }), true
		case len(outcomes) == 0:
			waking.Go(func() { t.Wake(early) }) // its error comes again with the offer
		}
		o := Outcome{Repository: pic.repository.Name, Target: t.Name(), Err: awake, clock: clock{now: p.Now}}
		if i == len(pictures)-1 && !failed && len(p.Problems) == 0 && p.Whole {
			o.beat = func(digest string) pushwire.Heartbeat {
				return p.heartbeat(append(slices.Clip(outcomes), Outcome{Repository: pic.repository.Name, digest: digest}))
			}
		}
		o.clock.Away = p.Now().Sub(start)
		if o.Err == nil {
			o.Err = p.one(ctx, t, pic, &o, lane)
		}
		pic.done()
		o.Took, o.Spent = p.Now().Sub(start), o.clock.Spent
		rate := int64(0)
		if p.Rate != nil {
			rate = p.Rate(t.Name(), p.Now())
		}
		o.Slow = o.Spent.why(o.Took, o.Bytes, rate)
		if o.Err != nil {
			failed = true
			p.Log.Error("push failed", "repository", o.Repository, "target", o.Target, "err", o.Err)
		} else {
			p.Log.Info("pushed", "repository", o.Repository, "target", o.Target, "generation", o.Generation, "new", o.New, "files", o.Files, "bytes", o.Bytes, "copied", o.Copied, "spared", o.Spared, "took", o.Took.Round(time.Millisecond))
		}
		if o.Slow != "" {
			p.Log.Info("slow", "repository", o.Repository, "target", o.Target, "why", o.Slow)
		}
		outcomes = append(outcomes, o)
	}
	switch {
	case len(outcomes) > 0 && outcomes[len(outcomes)-1].sent():
		beat.Sent = true
	case failed || len(p.Problems) > 0:
		beat.Why = "not everything arrived"
	case !p.Whole:
		beat.Why = "only some repositories were pushed"
	case len(outcomes) == 0:
		beat.Why = "there is nothing to push"
	default:
		if err := outcomes[len(outcomes)-1].beatErr; err != nil && !target.Temporary(err) {
			beat.Err = err // it would be refused again
			break
		}
		h := p.heartbeat(outcomes)
		beat.Err = p.retry(ctx, t, nil, func() error { return t.Heartbeat(ctx, h) })
		beat.Sent = beat.Err == nil
	}
	return outcomes, beat
}

// sent says that the heartbeat arrived with the push.
func (o *Outcome) sent() bool { return o.beaten && o.beatErr == nil }

// heartbeat says that the pushes arrived.
func (p *Push) heartbeat(outcomes []Outcome) pushwire.Heartbeat {
	h := pushwire.Heartbeat{Host: p.Host, At: p.Now().UTC()}
	for _, o := range outcomes {
		h.Repositories = append(h.Repositories, pushwire.RepositoryDigest{Name: o.Repository, Digest: o.digest})
	}
	return h
}

// one brings one repository to one target.
func (p *Push) one(ctx context.Context, t target.Target, pic *picture, o *Outcome, lane *progress.Lane) error {
	begun := p.Now()
	l, err := pic.take(ctx, lane)
	took := p.Now().Sub(begun)
	freezing := min(took, pic.freezing)
	o.clock.Lock += freezing
	o.clock.Source += took - freezing
	if err != nil {
		return err
	}
	plain := pic.repository.Kind == pushwire.KindFiles
	for round := 1; ; round++ {
		again, err := p.offerUntilDone(ctx, t, pic, l, o, lane)
		if !again {
			if err == nil {
				o.digest = l.Digest.String()
				p.remember(ctx, t, pic, l, o, lane)
				err = p.Memory.Pushed(pic.repository, t.Name(), repository.Push{At: p.Now().UTC(), Generation: o.Generation, Digest: o.digest, New: o.New})
			}
			return err
		}
		var changed *ChangedError
		if !plain || round == rounds {
			if errors.As(err, &changed) && !plain {
				return changedHint(err)
			}
			return busy(pic.repository, err)
		}
		p.Log.Info("listing again", "repository", pic.repository.Name, "target", t.Name(), "why", err)
		listed := o.clock.spend(&o.clock.Source)
		fresh, err := pic.fresh(ctx, lane)
		listed()
		if err != nil {
			return err
		}
		defer fresh.remove()
		l = fresh
	}
}

// offerUntilDone offers, uploads and commits, again after every cut. again says
// that the list is not true any more, which err explains.
func (p *Push) offerUntilDone(ctx context.Context, t target.Target, pic *picture, l *list, o *Outcome, lane *progress.Lane) (again bool, err error) {
	moved := func() int64 { return o.Bytes + o.Copied }
	recommitted := false
	careful := false
	var all, tried time.Duration
	defer func() { o.clock.Away += all - tried }() // the pauses
	defer o.clock.spend(&all)()
	err = p.retry(ctx, t, moved, func() error {
		defer o.clock.spend(&tried)()
		again = false
		err := p.once(ctx, t, pic, l, careful, o, lane)
		var changed *ChangedError
		var commit *commitError
		var refused *uploadError
		if errors.As(err, &refused) && !errors.As(err, &changed) && !careful && !target.Temporary(err) && ctx.Err() == nil {
			// A file came out wrong over there: what we believe of the target is not true,
			// or a file here is not what was listed. Whole files, checked as they are read, tell.
			careful = true
			p.Log.Warn("sending whole files", "repository", o.Repository, "target", o.Target, "err", err)
			if err := p.bases.Forget(t.Name(), pic.repository.Name); err != nil {
				return err
			}
			err = p.once(ctx, t, pic, l, careful, o, lane)
		}
		switch {
		case errors.As(err, &changed):
			again = true
		case errors.As(err, &commit) && !target.Temporary(err) && !recommitted && ctx.Err() == nil:
			// The target may have found, while it committed, that it must ask for
			// more: the next offer tells.
			recommitted = true
			p.Log.Warn("offering again", "repository", o.Repository, "target", o.Target, "err", err)
			err = p.once(ctx, t, pic, l, careful, o, lane)
		}
		return err
	})
	return again, err
}

// uploadError is one that the target gave during an upload.
type uploadError struct{ err error }

func (e *uploadError) Error() string { return e.err.Error() }
func (e *uploadError) Unwrap() error { return e.err }

type commitError struct{ err error }

func (e *commitError) Error() string { return e.err.Error() }
func (e *commitError) Unwrap() error { return e.err }

// once is one attempt at the transaction. A careful one sends whole files, and
// compares each with the list as it is read; else the target alone does that, which
// spares a third of the pusher's processor time.
func (p *Push) once(ctx context.Context, t target.Target, pic *picture, l *list, careful bool, o *Outcome, lane *progress.Lane) error {
	r := pic.repository
	offer := pushwire.Offer{Digest: l.Digest.String(), Entries: l.Entries, Bytes: l.Bytes, Kind: r.Kind, RepositoryID: r.ID}
	answer, err := p.offer(ctx, t, r.Name, offer, l)
	if target.Temporary(err) && ctx.Err() == nil {
		// The disk is not open yet, or not any more. On most nights it is: asking first
		// would cost a round trip.
		waking := o.clock.spend(&o.clock.Away)
		err = t.Wake(ctx)
		waking()
		if err != nil {
			return err
		}
		answer, err = p.offer(ctx, t, r.Name, offer, l)
	}
	if err != nil {
		return err
	}
	if answer.Answer == pushwire.AnswerSame {
		// Also after a commit whose answer was lost: then the generation is ours.
		o.Generation, o.New = answer.Generation, o.asked
		return nil
	}
	if answer.Answer != pushwire.AnswerSend || answer.Needed == nil {
		return fmt.Errorf("offer %s: %.40q is no known answer", r.Name, answer.Answer)
	}
	if answer.Heal {
		p.Log.Warn("files of the newest generation went bad on the target's disk: sending them again", "repository", r.Name, "target", t.Name(), "files", answer.Needed.Len())
	}
	done, err := p.send(ctx, t, pic, l, answer, careful, o, lane)
	if err != nil {
		return err
	}
	// What heals a generation makes none.
	o.Generation, o.New, o.Suspect = done.Generation, !answer.Heal, done.Suspect
	return nil
}

// offer offers, with a delta of the manifest where the target has the one before.
func (p *Push) offer(ctx context.Context, t target.Target, repository string, offer pushwire.Offer, l *list) (target.Answer, error) {
	delta := false
	open := func(base string) (io.ReadCloser, error) {
		r, err := p.bases.Delta(t.Name(), repository, base, l.path, p.state("work", ""))
		if err != nil {
			p.Log.Warn("sending the whole manifest", "repository", repository, "target", t.Name(), "err", err)
		}
		delta = r != nil
		if r == nil {
			return l.open()
		}
		return r, nil
	}
	list := target.List{Open: open}
	if kept := p.bases.Kept(t.Name(), repository); kept != l.Digest {
		// It will be asked for: at home the repository is not what went there last.
		// While it is little it goes at once, which spares a round trip.
		base := kept.String()
		if kept == (manifest.Sum{}) {
			base = ""
		}
		expected, err := open(base)
		if err != nil {
			return target.Answer{}, err
		}
		defer expected.Close()
		head, err := io.ReadAll(io.LimitReader(expected, target.MaxAhead+1))
		if err != nil {
			return target.Answer{}, err
		}
		if len(head) <= target.MaxAhead {
			list.Ahead = head
		}
		list.Open = func(asked string) (io.ReadCloser, error) {
			if asked != base {
				return open(asked)
			}
			return io.NopCloser(io.MultiReader(bytes.NewReader(head), expected)), nil
		}
	}
	answer, err := t.Offer(ctx, repository, offer, list)
	if err == nil || !delta || target.Temporary(err) || hint.Code(err) == hint.ExitRefused || ctx.Err() != nil {
		return answer, err
	}
	// If the manifest that we keep was to blame, the whole one is taken; if not, it
	// is refused for the same reason again.
	p.Log.Warn("sending the whole manifest", "repository", repository, "target", t.Name(), "err", err)
	if err := p.bases.ForgetManifest(t.Name(), repository); err != nil {
		return answer, err
	}
	return t.Offer(ctx, repository, offer, target.List{Open: func(string) (io.ReadCloser, error) { return l.open() }})
}

// plan finds out what of the needed files the target has already, as far as we
// remember what its newest generation holds; nil: nothing, or not known.
func (p *Push) plan(ctx context.Context, t target.Target, pic *picture, answer target.Answer, u *upload) (*base.Plan, error) {
	var digest manifest.Sum
	if answer.BaseDigest == "" {
		return nil, nil
	}
	if err := digest.UnmarshalText([]byte(answer.BaseDigest)); err != nil {
		return nil, fmt.Errorf("offer %s: the digest of the base: %w", pic.repository.Name, err)
	}
	plan, err := p.bases.Plan(ctx, t.Name(), pic.repository.Name, digest, func(each func(manifest.Entry) error) error {
		return u.needed(func(_ int64, e manifest.Entry) error { return each(e) })
	}, opener(u.dir))
	if err != nil && ctx.Err() == nil {
		p.Log.Warn("sending whole files", "repository", pic.repository.Name, "target", t.Name(), "err", err)
		return nil, nil
	}
	return plan, err
}

// remember notes what the target holds now. Without it the next push sends more.
func (p *Push) remember(ctx context.Context, t target.Target, pic *picture, l *list, o *Outcome, lane *progress.Lane) {
	lane.Begin("noting "+pic.repository.Name, 0)
	defer lane.End()
	err := func() error {
		if err := p.bases.KeepManifest(t.Name(), pic.repository.Name, l.path, o.New); err != nil {
			return err
		}
		if pic.repository.Kind != pushwire.KindBorg1 {
			return nil
		}
		dir, err := os.OpenRoot(pic.root())
		if err != nil {
			return err
		}
		defer dir.Close()
		in, err := l.open()
		if err != nil {
			return err
		}
		defer in.Close()
		return p.bases.Remember(ctx, t.Name(), pic.repository.Name, l.Digest, in, opener(dir))
	}()
	if err != nil {
		p.Log.Warn("the next push may send more than it has to", "err", err)
	}
}

// retry repeats attempt while its errors are temporary, with jittered pauses,
// until p.GiveUp has passed in which moved, if there is one, did not grow.
func (p *Push) retry(ctx context.Context, t target.Target, moved func() int64, attempt func() error) error {
	pause := p.Pause()
	last, since := int64(0), p.Now()
	for {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		err := attempt()
		if !target.Temporary(err) {
			return err
		}
		if moved != nil && moved() > last {
			last, since = moved(), p.Now()
			pause.Reset()
		}
		wait := pause.NextBackOff()
		if p.Now().Add(wait).Sub(since) > p.GiveUp {
			return fmt.Errorf("gave up after %s: %w", p.Now().Sub(since).Round(time.Second), err)
		}
		p.Log.Warn("trying again", "target", t.Name(), "in", wait.Round(100*time.Millisecond), "err", err)
		if err := p.sleep(ctx, wait); err != nil {
			return err
		}
	}
}
