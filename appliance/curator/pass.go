package curator

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"farkeep/appliance/status"
	"farkeep/shared/generations"
	"farkeep/shared/history"
	"farkeep/shared/retention"
)

// Pass finishes what was begun, retires and expires what is due, makes room if
// that is wanted, and finds out how much room there is. It returns ctx's error
// when ctx ends; the rest is for the next one. Two at once wait for each other.
func (c *Curator) Pass(ctx context.Context) error {
	c.pass.Lock()
	defer c.pass.Unlock()
	if n, err := c.disk.Sweep(ctx); err != nil {
		return fmt.Errorf("finish what was expired before: %w", err)
	} else if n > 0 {
		c.opt.Log.Info("finished what was expired before", "generations", n)
	}
	if err := c.Observe(true); err != nil {
		return err
	}
	repositories, err := c.disk.Repositories()
	if err != nil {
		return err
	}
	if err := c.raise(repositories); err != nil {
		return err
	}
	if err := c.retire(ctx, repositories); err != nil {
		return err
	}
	var frozen []string
	for _, name := range repositories {
		why, err := c.expire(ctx, name)
		if err != nil {
			return fmt.Errorf("expire %s: %w", name, err)
		}
		frozen = append(frozen, why...)
	}
	if err := c.measure(ctx); err != nil {
		return err
	}
	if c.opt.History.WhenFull == history.Thin {
		if err := c.thin(ctx); err != nil {
			return fmt.Errorf("make room: %w", err)
		}
	}
	return c.frozen(frozen)
}

// frozen takes note of why something could not go in this pass.
func (c *Curator) frozen(why []string) error {
	why = append(c.stopped(), why...)
	for i := range why {
		why[i] = cut(why[i])
	}
	if over := len(why) - (status.MaxFrozen - 1); over > 1 {
		why = append(why[:status.MaxFrozen-1], fmt.Sprintf("and %d reasons more", over))
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	was := c.expiry.FrozenSince
	switch {
	case len(why) == 0:
		c.expiry.FrozenSince = time.Time{}
	case was.IsZero():
		c.expiry.FrozenSince = c.opt.Now().UTC().Truncate(time.Second)
	}
	c.state.Frozen, c.state.FrozenSince = why, c.expiry.FrozenSince
	if was.Equal(c.expiry.FrozenSince) {
		return nil
	}
	return c.disk.WriteRecord("expiry", c.expiry)
}

// stopped is why nothing at all may go now, in words; empty: it may.
func (c *Curator) stopped() []string {
	if err := c.Observe(false); err != nil {
		return []string{"the time cannot be written to the disk: " + err.Error()}
	}
	var why []string
	c.mu.Lock()
	if c.doubt != "" {
		why = append(why, c.doubt)
	}
	if c.noFloor {
		why = append(why, "the floor that this disk remembers cannot be read")
	}
	c.mu.Unlock()
	for _, name := range c.opt.Readers() {
		why = append(why, "a session with the key "+name+" reads generations")
	}
	return why
}

// expire lets go what is due of one repository, and says what forbids it for this
// repository alone.
func (c *Curator) expire(ctx context.Context, repository string) (frozen []string, err error) {
	held := map[string]bool{}
	for {
		list, err := c.disk.List(ctx, repository)
		if err != nil {
			return nil, err
		}
		if why := undecided(list); why != "" {
			return []string{repository + ": " + why}, nil
		}
		if len(c.stopped()) > 0 {
			return nil, nil
		}
		items, err := c.items(ctx, repository, list)
		if err != nil {
			return nil, err
		}
		for i := range items {
			if held[items[i].Name] {
				items[i].Kept = "in use"
			}
		}
		c.mu.Lock()
		rules := c.rules(repository)
		perDay := rules.PerDay
		rules.PerDay -= c.spent(repository)
		c.mu.Unlock()
		plan := retention.Plan(c.opt.Now(), rules, items)
		next := slices.IndexFunc(plan, func(d retention.Decision) bool { return !d.Keep })
		if next < 0 {
			if why := piledUp(perDay, plan); why != "" {
				frozen = append(frozen, repository+": "+why)
			}
			return frozen, nil
		}
		err = c.remove(ctx, repository, plan[next].Name, plan[next].Why)
		if errors.Is(err, generations.ErrHeld) {
			held[plan[next].Name] = true
			frozen = append(frozen, repository+": generation "+plan[next].Name+" should go, and is in use")
			continue
		}
		if err != nil {
			return nil, err
		}
	}
}

// piledUp says that more is due than expire_per_day lets go in a week, or "". After a
// change of the rules that passes; where more is pushed in a day it never does. 0 was
// chosen to let nothing go.
func piledUp(perDay int, plan []retention.Decision) string {
	due := 0
	for _, d := range plan {
		if d.Why == retention.WaitsForItsDay {
			due++
		}
	}
	if perDay <= 0 || due <= 7*perDay {
		return ""
	}
	return fmt.Sprintf("%d generations are due, and expire_per_day = %d lets go %d in 24 hours", due, perDay, perDay)
}

// undecided says which generation waits for a decision, or "".
func undecided(list []generations.Generation) string {
	for _, g := range list {
		if g.Standing == generations.Suspect {
			return "generation " + g.Name + " is suspect, and nobody has accepted or rejected it"
		}
	}
	return ""
}

func (c *Curator) remove(ctx context.Context, repository, name, why string) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	if err := c.count(repository); err != nil {
		return err
	}
	if err := c.disk.Remove(ctx, repository, name); err != nil {
		if errors.Is(err, generations.ErrHeld) { // it did not go
			err = errors.Join(err, c.uncount(repository))
		}
		return err
	}
	c.opt.Log.Info("a generation expired", "repository", repository, "generation", name, "why", why)
	return nil
}

// retire carries out what was asked for long enough ago.
func (c *Curator) retire(ctx context.Context, repositories []string) error {
	c.mu.Lock()
	asked := maps.Clone(c.retiring.Repositories)
	c.mu.Unlock()
	for _, name := range slices.Sorted(maps.Keys(asked)) {
		if slices.Contains(repositories, name) {
			if len(c.stopped()) > 0 {
				continue
			}
			c.mu.Lock()
			_, still := c.retiring.Repositories[name]
			due := c.retirement(name, c.opt.Now()).Due
			c.mu.Unlock()
			if !still || c.opt.Now().Before(due) {
				continue
			}
			if err := c.disk.RemoveRepository(ctx, name); err != nil {
				return fmt.Errorf("retire %s: %w", name, err)
			}
		}
		// Gone now, or by a pass that was cut right after it.
		if err := c.drop(name); err != nil {
			return err
		}
		c.opt.Log.Warn("a repository was retired", "repository", name, "by", asked[name].By)
		c.event(status.Event{Kind: status.EventRetired, By: asked[name].By, Repository: name, Text: "asked for on " + stamp(asked[name].Asked)})
	}
	return nil
}

// drop forgets a retirement.
func (c *Curator) drop(repository string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	was := c.retiring.Repositories[repository]
	delete(c.retiring.Repositories, repository)
	if err := c.disk.WriteRecord("retiring", c.retiring); err != nil {
		c.retiring.Repositories[repository] = was
		return err
	}
	return nil
}

// thin lets go of what the policy would keep, above the floor, until one worst
// day has room again. It does nothing while any generation of the disk is
// suspect: what fills the disk may be just that.
func (c *Curator) thin(ctx context.Context) error {
	for {
		c.mu.Lock()
		room, least := c.state.Room, c.least
		c.mu.Unlock()
		if room == nil || len(c.stopped()) > 0 {
			return nil
		}
		want := max(room.WorstDay, least)
		if room.Free >= want {
			return nil
		}
		repositories, err := c.disk.Repositories()
		if err != nil {
			return err
		}
		type offer struct {
			repository, name string
			committed        time.Time
		}
		var oldest *offer
		for _, repository := range repositories {
			list, err := c.disk.List(ctx, repository)
			if err != nil {
				return err
			}
			if undecided(list) != "" {
				return nil
			}
			items, err := c.items(ctx, repository, list)
			if err != nil {
				return err
			}
			c.mu.Lock()
			rules := c.rules(repository)
			rules.PerDay -= c.spent(repository)
			c.mu.Unlock()
			name, ok := retention.Thin(c.opt.Now(), rules, items)
			if !ok {
				continue
			}
			i := slices.IndexFunc(items, func(i retention.Item) bool { return i.Name == name })
			if oldest == nil || items[i].Committed.Before(oldest.committed) {
				oldest = &offer{repository, name, items[i].Committed}
			}
		}
		if oldest == nil {
			return nil
		}
		err = c.remove(ctx, oldest.repository, oldest.name, "no room")
		if errors.Is(err, generations.ErrHeld) {
			return nil // the next pass
		}
		if err != nil {
			return err
		}
		c.event(status.Event{
			Kind: status.EventThinned, Repository: oldest.repository, Generation: oldest.name,
			Text: fmt.Sprintf("%d bytes were free, less than the %d that one day may need", room.Free, want),
		})
		if err := c.measure(ctx); err != nil {
			return err
		}
	}
}

func (c *Curator) event(e status.Event) {
	e.At, e.Text = c.opt.Now().UTC(), cut(e.Text)
	c.opt.Event(e)
}

var errUnknown = errors.New("there is no such repository on the disk")
