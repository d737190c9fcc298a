package push

import (
	"context"
	"io"
	"os"
	"time"

	"farkeep/pusher/progress"
	"farkeep/pusher/target"
	"farkeep/shared/contentname"
	"farkeep/shared/pushwire"
)

// send uploads what the answer asks for and commits it, in one go where the target
// takes that.
func (p *Push) send(ctx context.Context, t target.Target, pic *picture, l *list, answer target.Answer, careful bool, o *Outcome, lane *progress.Lane) (done pushwire.CommitAnswer, err error) {
	check := &checking{look: func() error { return pic.check(ctx, l, lane) }}
	defer check.settle()
	if _, ok := t.(target.Finisher); ok || answer.Needed.Len() > 0 {
		committed, err := p.upload(ctx, t, pic, l, answer, careful, o, lane, check)
		if err != nil {
			return done, err
		}
		if committed != nil {
			return *committed, nil
		}
	}
	checked := o.clock.spend(&o.clock.Source)
	err = check.wait()
	checked()
	if err != nil {
		return done, err
	}
	lane.Begin("committing "+pic.repository.Name, 0)
	defer lane.End()
	o.asked = !answer.Heal
	committing := o.clock.spend(&o.clock.Store)
	done, err = t.Commit(ctx, answer.Push)
	committing()
	if err != nil {
		return done, &commitError{err}
	}
	return done, nil
}

// upload sends what the answer asks for. Where the target takes that, the commit goes
// behind it, and the heartbeat if this is the last repository; nil: it was not committed.
func (p *Push) upload(ctx context.Context, t target.Target, pic *picture, l *list, answer target.Answer, careful bool, o *Outcome, lane *progress.Lane, check *checking) (*pushwire.CommitAnswer, error) {
	lane.Begin(pic.repository.Name, answer.NeedBytes)
	defer lane.End()
	dir, err := os.OpenRoot(pic.root())
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	u := &upload{
		ctx: ctx, dir: dir, list: l, set: answer.Needed, resume: answer.Resume, careful: careful,
		sent:   func(n int64) { o.Bytes += n; lane.Add(n) },
		copied: func(n int64) { o.Copied += n; lane.Add(n) },
		spared: func(n int64) { o.Bytes -= n; o.Spared += n },
		times:  &uploading{c: &o.clock, sleep: p.sleep},
		// What Borg and restic write is encrypted, or compressed already.
		pack: t.Far() && pic.repository.Kind == pushwire.KindFiles && pic.repository.Layout == contentname.None,
	}
	if !careful && answer.Needed.Len() > 0 {
		if u.plan, err = p.plan(ctx, t, pic, answer, u); err != nil {
			return nil, err
		}
	}
	write := func(w io.Writer) error {
		w = u.times.writer(w)
		if p.Rate != nil {
			rate := func(at time.Time) int64 { return p.Rate(t.Name(), at) }
			w = &limited{ctx, w, &limit{rate: rate, now: p.Now, wait: u.times.wait, due: p.Now()}}
		}
		return u.write(w)
	}
	var took, checked time.Duration
	uploading := o.clock.spend(&took)
	ended := func(got pushwire.UploadAnswer) {
		uploading()
		u.times.ended(took-checked, got, t.Far())
		o.Files += got.Files
	}
	f, behind := t.(target.Finisher)
	if !behind {
		got, err := t.Upload(ctx, answer.Push, write)
		ended(got)
		if err != nil {
			err = &uploadError{err}
		}
		return nil, err
	}
	arrived := false
	committing := func() {}
	end := target.Ending{
		Commit: func() bool {
			looked := o.clock.spend(&checked)
			good := check.within(checkPatience) && check.err == nil
			looked()
			o.clock.Source += checked
			if good {
				lane.Begin("committing "+pic.repository.Name, 0)
				o.asked = !answer.Heal
			}
			return good
		},
		Uploaded: func(got pushwire.UploadAnswer) {
			arrived = true
			ended(got)
			committing = o.clock.spend(&o.clock.Store)
		},
	}
	if o.beat != nil {
		end.Heartbeat = func() pushwire.Heartbeat { return o.beat(l.Digest.String()) }
	}
	done, err := f.Finish(ctx, answer.Push, write, end)
	committing()
	if !arrived {
		ended(pushwire.UploadAnswer{})
	}
	o.beaten, o.beatErr = done.Beaten && done.Commit != nil, done.BeatErr
	switch {
	case err == nil:
		return done.Commit, nil
	case arrived:
		return nil, &commitError{err}
	}
	return nil, &uploadError{err}
}

// checkPatience is how long a target waits behind an upload for the word that it may
// be committed; it would wait for two minutes. What takes longer comes by itself.
const checkPatience = 10 * time.Second

// checking is the look at a picture before its commit. It is taken once.
type checking struct {
	look func() error
	done chan struct{} // closed when err is there; nil: not begun
	err  error
}

// within begins, and says whether the look was over in time.
func (c *checking) within(limit time.Duration) bool {
	if c.done == nil {
		c.done = make(chan struct{})
		go func() {
			defer close(c.done)
			c.err = c.look()
		}()
	}
	t := time.NewTimer(limit)
	defer t.Stop()
	select {
	case <-c.done:
		return true
	case <-t.C:
		return false
	}
}

// wait returns what was seen.
func (c *checking) wait() error {
	if c.done == nil {
		return c.look()
	}
	<-c.done
	return c.err
}

// settle waits for the end of what was begun.
func (c *checking) settle() {
	if c.done != nil {
		<-c.done
	}
}
