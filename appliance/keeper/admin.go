package keeper

import (
	"context"
	"errors"
	"io"
	"time"

	"farkeep/appliance/keepercall"
	"farkeep/shared/generations"
	"farkeep/shared/hint"
	"farkeep/shared/pushwire"
	"farkeep/shared/span"
)

// adminKey checks the role. The receiver has done so already; whoever decides
// about history checks again.
func (c *call) adminKey() error {
	if c.args.Role != "admin" || c.args.Key == "" {
		return hint.Exit(hint.ExitRefused, errors.New("only an admin key decides about history"))
	}
	return nil
}

// decide accepts or rejects a suspect generation.
func decide(standing generations.Standing) func(context.Context, *call) error {
	return func(ctx context.Context, c *call) error {
		if err := errors.Join(c.adminKey(), c.allowed(c.args.Repository)); err != nil {
			return err
		}
		ctx, store, leave, err := c.enter(ctx)
		if err != nil {
			return err
		}
		defer leave()
		if err := c.curatorNow().Decide(ctx, c.args.Repository, c.args.Generation, standing, c.args.Key, c.args.Why); err != nil {
			return err
		}
		if err := c.known.reread(ctx, store, c.args.Repository); err != nil {
			return err
		}
		c.background.Go(c.curate)
		return c.answerAtOnce(struct{}{})
	}
}

func retire(ctx context.Context, c *call) error {
	if err := errors.Join(c.adminKey(), c.allowed(c.args.Repository)); err != nil {
		return err
	}
	_, _, leave, err := c.enter(ctx)
	if err != nil {
		return err
	}
	defer leave()
	r, err := c.curatorNow().Retire(c.args.Repository, c.args.Key)
	if err != nil {
		return err
	}
	return c.answerAtOnce(pushwire.Retiring{Repository: r.Repository, By: r.By, Asked: r.Asked, Due: r.Due})
}

func keep(ctx context.Context, c *call) error {
	if err := errors.Join(c.adminKey(), c.allowed(c.args.Repository)); err != nil {
		return err
	}
	_, _, leave, err := c.enter(ctx)
	if err != nil {
		return err
	}
	defer leave()
	if err := c.curatorNow().Keep(c.args.Repository, c.args.Key); err != nil {
		return err
	}
	return c.answerAtOnce(struct{}{})
}

func acceptClock(ctx context.Context, c *call) error {
	if err := c.adminKey(); err != nil {
		return err
	}
	_, _, leave, err := c.enter(ctx)
	if err != nil {
		return err
	}
	defer leave()
	was, now, err := c.curatorNow().AcceptClock(c.args.Key)
	if err != nil {
		return err
	}
	c.background.Go(c.curate)
	return c.answerAtOnce(pushwire.ClockAnswer{Was: was, Now: now})
}

func floor(ctx context.Context, c *call) error {
	if err := c.adminKey(); err != nil {
		return err
	}
	var age span.Duration
	if err := age.UnmarshalText([]byte(c.args.Age)); err != nil {
		return hint.Exit(hint.ExitUsage, err)
	}
	_, _, leave, err := c.enter(ctx)
	if err != nil {
		return err
	}
	defer leave()
	if err := c.curatorNow().LowerFloor(c.args.Number, time.Duration(age), c.args.Key); err != nil {
		return hint.Exit(hint.ExitUsage, err)
	}
	c.background.Go(c.curate)
	return c.answerAtOnce(struct{}{})
}

// answerAtOnce tells the peer, after the status told the rest of the appliance:
// whoever decided wants to see it there.
func (c *call) answerAtOnce(v any) error {
	if err := c.report(true); err != nil {
		return err
	}
	return c.answer(v, keepercall.ThenEnd)
}

// reading keeps everything where it is until the caller hangs up.
func reading(ctx context.Context, c *call) error {
	if c.args.Role != "restore" && c.args.Role != "admin" {
		return hint.Exit(hint.ExitRefused, errors.New("only keys that restore read generations"))
	}
	c.mu.Lock()
	c.Keeper.reading[c] = c.args.Key
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.Keeper.reading, c)
		last, cur := len(c.Keeper.reading) == 0, c.curator
		c.mu.Unlock()
		// Only what a pass could not do because of readers is done now: one who comes
		// and goes must not keep the disk at work.
		if last && cur != nil && cur.Frozen() {
			c.background.Go(c.curate)
		}
	}()
	if err := c.conn.Reply(nil); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { c.conn.Close() })
	defer stop()
	// Ends when the receiver hangs up; what it says is of no interest.
	if _, err := io.Copy(io.Discard, c.conn); err != nil && ctx.Err() == nil {
		return err
	}
	return nil
}
