package keeper

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"farkeep/appliance/keepercall"
	"farkeep/shared/generations"
	"farkeep/shared/hint"
	"farkeep/shared/pushwire"
)

// push is a repository's transaction, held from its offer to its commit, over
// several verbs.
//
//	      offer             upload, commit
//	free ───────▶ idle ◀───────────────────▶ busy
//	  ▲            │                          │ commit, abort, cut, stall
//	  └────────────┴──── Brief.Idle ──────────┘
type push struct {
	repository string
	key        string

	// progress is when bytes last came or a verb ended, as the time since born:
	// not by the wall clock, which NTP may throw by years.
	born     time.Time
	progress atomic.Int64

	// Guarded by the Keeper's mutex.
	tx     *generations.Transaction // nil while the offer is being made
	busy   bool
	cancel context.CancelCauseFunc // of the verb that is busy
	ended  chan struct{}           // closed when that verb ended
}

func (p *push) touch() { p.progress.Store(int64(time.Since(p.born))) }

func (p *push) silent() time.Duration { return time.Since(p.born) - time.Duration(p.progress.Load()) }

// settle is how long a verb waits for the one before it to end: a peer may have
// read its answer before this side was done with it.
const settle = time.Second

// await waits until the verb that is busy with p ended, limit at most.
func await(ctx context.Context, ended <-chan struct{}, limit time.Duration) bool {
	t := time.NewTimer(limit)
	defer t.Stop()
	select {
	case <-ended:
		return true
	case <-ctx.Done():
	case <-t.C:
	}
	return false
}

var errTaken = errors.New("a newer attempt at the same repository took over")

// claim makes the repository's push for an offer. One that was left by the same
// key between verbs is closed; one whose peer has been silent, busy or not, is
// ended. Otherwise it is ErrBusy. The returned context is the verb's until done.
func (c *call) claim(ctx context.Context, repository string) (context.Context, *push, error) {
	for {
		c.mu.Lock()
		old := c.pushes[repository]
		if old == nil {
			p := &push{repository: repository, key: c.args.Key, born: time.Now()}
			c.pushes[repository] = p
			ctx = p.begin(ctx)
			c.mu.Unlock()
			return ctx, p, nil
		}
		if !old.busy {
			if old.key != c.args.Key && old.silent() < c.brief.Idle {
				c.mu.Unlock()
				return nil, nil, c.busy(repository)
			}
			delete(c.pushes, repository)
			c.mu.Unlock()
			old.tx.Close()
			continue
		}
		limit := settle
		if old.key == c.args.Key && old.silent() >= c.brief.Takeover {
			old.cancel(errTaken)
			limit = c.brief.Takeover
		}
		ended := old.ended
		c.mu.Unlock()
		if !await(ctx, ended, limit) {
			return nil, nil, c.busy(repository)
		}
	}
}

func (k *Keeper) busy(repository string) error {
	return hint.Because(fmt.Errorf("push %s: %w", repository, generations.ErrBusy), "wait for it to end; one that is stalled can be taken over after %v", k.brief.Takeover)
}

// use finds the push of that id and makes it busy for a verb, whose context it
// returns: it is over when the verb is done, or loses the push to another.
func (c *call) use(ctx context.Context, id string) (context.Context, *push, error) {
	repository, err := generations.PushRepository(id)
	if err != nil {
		return nil, nil, hint.Exit(hint.ExitUsage, err)
	}
	if err := c.allowed(repository); err != nil {
		return nil, nil, err
	}
	for {
		c.mu.Lock()
		p := c.pushes[repository]
		if p == nil || p.tx == nil || p.tx.ID() != id || p.key != c.args.Key {
			c.mu.Unlock()
			return nil, nil, hint.Exit(hint.ExitUnreachable, hint.Because(fmt.Errorf("push %s is not open", id), "offer it again: what was uploaded is kept"))
		}
		if !p.busy {
			ctx = p.begin(ctx)
			p.touch()
			c.mu.Unlock()
			return ctx, p, nil
		}
		ended := p.ended
		c.mu.Unlock()
		if !await(ctx, ended, settle) {
			return nil, nil, c.busy(repository)
		}
	}
}

// begin makes p busy for a verb, under the Keeper's mutex. The verb's context
// ends with done.
func (p *push) begin(ctx context.Context) context.Context {
	ctx, p.cancel = context.WithCancelCause(ctx)
	p.busy, p.ended = true, make(chan struct{})
	return ctx
}

// done ends a verb's use of a push. Without keep the repository is free again.
func (k *Keeper) done(p *push, keep bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	p.cancel(nil)
	p.touch()
	p.busy = false
	if !keep {
		if p.tx != nil {
			p.tx.Close()
		}
		if k.pushes[p.repository] == p {
			delete(k.pushes, p.repository)
		}
	}
	close(p.ended)
}

// freeIdle closes the pushes that nobody used for longer than limit.
func (k *Keeper) freeIdle(limit time.Duration) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for name, p := range k.pushes {
		if !p.busy && p.silent() >= limit {
			p.tx.Close()
			delete(k.pushes, name)
		}
	}
}

func offer(ctx context.Context, c *call) error {
	err := begin(ctx, c)
	if err == nil {
		c.rest()
	}
	return err
}

// maxRest bounds what an offer may send that nobody reads, in bytes: a manifest
// ahead, which the answer makes needless.
const maxRest = 1 << 20

// rest ends the answer, and waits until the peer has ended, too. A socket that is
// closed with bytes in it that nobody read gives the other side an error in place
// of the end of the answer.
func (c *call) rest() {
	late := time.AfterFunc(c.brief.Stall, func() { c.conn.Close() })
	defer late.Stop()
	if c.conn.CloseWrite() == nil {
		io.Copy(io.Discard, io.LimitReader(c.conn, maxRest))
	}
}

func begin(ctx context.Context, c *call) error {
	if err := errors.Join(c.pushKey(), c.allowed(c.args.Repository)); err != nil {
		return err
	}
	ctx, store, leave, err := c.enter(ctx)
	if err != nil {
		return err
	}
	defer leave()
	if err := c.stays(c.args.Repository); err != nil {
		return err
	}
	ctx, p, err := c.claim(ctx, c.args.Repository)
	if err != nil {
		return err
	}
	keep := false
	defer func() { c.done(p, keep) }()

	raw, stop := c.reader(ctx, p.touch)
	defer stop()
	r := pushwire.NewReader(raw)
	var o pushwire.Offer
	if err := pushwire.ReadLine(r, &o); err != nil {
		return hint.Exit(hint.ExitUsage, fmt.Errorf("read the offer: %w", err))
	}
	quota, err := c.quota(ctx, store)
	if err != nil {
		return err
	}
	answer, tx, err := store.Begin(ctx, generations.Request{Repository: c.args.Repository, Offer: o, Pusher: c.args.Key, Quota: quota})
	if err != nil {
		return c.whoHolds(ctx, store, err)
	}
	if tx != nil {
		c.mu.Lock()
		p.tx = tx
		c.mu.Unlock()
	} else {
		if err := c.confirmed(ctx, store, c.args.Repository); err != nil {
			return err
		}
		return c.answer(answer.OfferAnswer, keepercall.ThenEnd)
	}
	if !answer.Heal {
		if err := c.tooSoon(ctx, store, c.args.Repository); err != nil {
			return err
		}
	}
	if answer.Answer == pushwire.AnswerSendManifest {
		if err := c.answer(answer.OfferAnswer, keepercall.ThenLine); err != nil {
			return err
		}
		if answer, err = tx.TakeManifest(ctx, r); err != nil {
			return c.whoHolds(ctx, store, err)
		}
	}
	if err := c.answer(answer.OfferAnswer, keepercall.ThenRaw); err != nil {
		return err
	}
	late := time.AfterFunc(c.brief.Stall, func() { c.conn.Close() })
	defer late.Stop()
	if _, err := answer.Needed.WriteTo(c.conn); err != nil {
		return err
	}
	keep = true
	return nil
}

func upload(ctx context.Context, c *call) error {
	beat, err := receive(ctx, c)
	if err != nil || beat == nil {
		return err
	}
	return c.beat(ctx, *beat)
}

// receive takes an upload, and commits the push if an ending that follows says so. It
// returns the heartbeat that is to come after the commit; nil: none.
func receive(ctx context.Context, c *call) (*pushwire.Heartbeat, error) {
	if err := c.pushKey(); err != nil {
		return nil, err
	}
	ctx, store, leave, err := c.enter(ctx)
	if err != nil {
		return nil, err
	}
	defer leave()
	ctx, p, err := c.use(ctx, c.args.Push)
	if err != nil {
		return nil, err
	}
	keep := false
	defer func() { c.done(p, keep) }()
	raw, stop := c.reader(ctx, p.touch)
	defer stop()
	got, err := p.tx.Receive(ctx, raw)
	if err != nil {
		return nil, err
	}
	keep = true
	if err := c.answer(got, keepercall.ThenLine); err != nil {
		return nil, err
	}
	var end pushwire.Ending
	err = pushwire.ReadLine(pushwire.NewReader(io.MultiReader(bytes.NewReader(p.tx.Behind()), raw)), &end)
	if errors.Is(err, io.EOF) && !errors.Is(err, pushwire.ErrLine) {
		return nil, c.over() // all that is wanted for now
	}
	if err != nil {
		return nil, hint.Exit(hint.ExitUsage, fmt.Errorf("read the ending of the upload: %w", err))
	}
	if end.Commit != c.args.Push {
		return nil, hint.Exit(hint.ExitUsage, fmt.Errorf("an upload of push %s that ends with the commit of %.200q", c.args.Push, end.Commit))
	}
	stop()
	keep = false
	done, err := c.commit(ctx, store, p)
	if err != nil {
		return nil, err
	}
	then := keepercall.ThenEnd
	if end.Heartbeat != nil {
		then = keepercall.ThenLine
	}
	return end.Heartbeat, c.answer(done, then)
}

func commit(ctx context.Context, c *call) error {
	if isCopy(c.args.Push) {
		return commitCopy(ctx, c)
	}
	if err := c.pushKey(); err != nil {
		return err
	}
	ctx, store, leave, err := c.enter(ctx)
	if err != nil {
		return err
	}
	defer leave()
	used, p, err := c.use(ctx, c.args.Push)
	if err != nil {
		// A commit whose answer was lost is asked for again.
		if g, ok := store.Committed(ctx, c.args.Push); ok && c.sees(g.Repository) && g.Pusher == c.args.Key {
			return c.answer(pushwire.CommitAnswer{Generation: g.Name, Suspect: g.Suspect}, keepercall.ThenEnd)
		}
		return err
	}
	defer c.done(p, false)
	answer, err := c.commit(used, store, p)
	if err != nil {
		return err
	}
	return c.answer(answer, keepercall.ThenEnd)
}

// commit makes the generation of a push.
func (c *call) commit(ctx context.Context, store *generations.Store, p *push) (answer pushwire.CommitAnswer, err error) {
	if err := c.stays(p.repository); err != nil {
		return answer, err
	}
	// A commit of many files sends nothing for minutes, and is not silent.
	working := p.working(c.brief.Takeover / 4)
	defer working()
	if answer.Generation, err = p.tx.Commit(ctx); err != nil {
		return answer, err
	}
	if err := c.confirmed(ctx, store, p.repository); err != nil {
		return answer, err
	}
	c.tellRot(store)
	if p.tx.Heals() {
		c.log.Info("rotten files came again", "repository", p.repository, "generation", answer.Generation, "healed", p.tx.Healed())
		return answer, nil
	}
	c.committed(p.repository)
	g, err := store.Generation(ctx, p.repository, answer.Generation)
	if err != nil {
		return answer, err
	}
	answer.Suspect = g.Suspect
	c.log.Info("a new generation", "repository", p.repository, "generation", g.Name, "files", g.Files, "new_files", g.NewFiles, "new_bytes", g.NewBytes)
	return answer, nil
}

// working keeps the push from being taken over until the returned func is called.
func (p *push) working(pace time.Duration) (stop func()) {
	done := make(chan struct{})
	var wait sync.WaitGroup
	wait.Go(func() {
		t := time.NewTicker(pace)
		defer t.Stop()
		for {
			select {
			case <-done:
				return
			case <-t.C:
				p.touch()
			}
		}
	})
	return func() {
		close(done)
		wait.Wait()
	}
}

func abort(ctx context.Context, c *call) error {
	if isCopy(c.args.Push) {
		return abortCopy(ctx, c)
	}
	if err := c.pushKey(); err != nil {
		return err
	}
	ctx, _, leave, err := c.enter(ctx)
	if err != nil {
		return err
	}
	defer leave()
	ctx, p, err := c.use(ctx, c.args.Push)
	if err != nil {
		return err
	}
	defer c.done(p, false)
	if err := p.tx.Abort(ctx); err != nil {
		return err
	}
	return c.answer(struct{}{}, keepercall.ThenEnd)
}

// confirmed takes note that the newest generation is what the repository is now.
func (c *call) confirmed(ctx context.Context, store *generations.Store, repository string) error {
	if err := c.known.confirm(ctx, store, repository, c.env.Now()); err != nil {
		return err
	}
	return c.report(true)
}
