package curator

import (
	"context"
	"fmt"
	"slices"
	"time"

	"farkeep/appliance/status"
	"farkeep/shared/generations"
	"farkeep/shared/span"
)

// What an admin decides. The caller has made sure that it is one; by is the
// key's name.

// Decide accepts or rejects a suspect generation.
func (c *Curator) Decide(ctx context.Context, repository, name string, standing generations.Standing, by, why string) error {
	if standing == generations.Accepted {
		// One that was rejected may be about to go.
		c.pass.Lock()
		defer c.pass.Unlock()
	}
	d := generations.Decision{Standing: standing, By: by, Why: cut(why), At: c.opt.Now().UTC().Truncate(time.Second)}
	if err := c.disk.Decide(ctx, repository, name, d); err != nil {
		return err
	}
	kind := status.EventAccepted
	if standing == generations.Rejected {
		kind = status.EventRejected
	}
	c.event(status.Event{Kind: kind, By: by, Repository: repository, Generation: name, Text: why})
	return nil
}

// Retire has a repository leave, generations and all, when History.RetireAfter
// has passed. To ask again changes nothing.
func (c *Curator) Retire(repository, by string) (status.Retiring, error) {
	repositories, err := c.disk.Repositories()
	if err != nil {
		return status.Retiring{}, err
	}
	if !slices.Contains(repositories, repository) {
		return status.Retiring{}, fmt.Errorf("retire %s: %w", repository, errUnknown)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.opt.Now()
	if _, ok := c.retiring.Repositories[repository]; ok {
		return c.retirement(repository, now), nil
	}
	if len(c.retiring.Repositories) >= status.MaxRetiring {
		return status.Retiring{}, fmt.Errorf("retire %s: %d repositories are retiring already, which is the most", repository, status.MaxRetiring)
	}
	if err := c.observe(true); err != nil {
		return status.Retiring{}, err
	}
	if c.doubt != "" {
		return status.Retiring{}, fmt.Errorf("retire %s: %s: a delay cannot be counted", repository, c.doubt)
	}
	c.retiring.Repositories[repository] = retirement{
		By: by, Asked: now.UTC().Truncate(time.Second), Passed: c.clock.Passed, After: int64(c.opt.History.RetireAfter.Std() / time.Second),
	}
	if err := c.disk.WriteRecord("retiring", c.retiring); err != nil {
		delete(c.retiring.Repositories, repository)
		return status.Retiring{}, err
	}
	r := c.retirement(repository, now)
	c.event(status.Event{Kind: status.EventRetire, By: by, Repository: repository, Text: "it leaves on " + stamp(r.Due) + " unless somebody cancels it"})
	return r, nil
}

// Keep cancels a retirement.
func (c *Curator) Keep(repository, by string) error {
	// One that is being carried out cannot be cancelled: say so by waiting for it.
	c.pass.Lock()
	defer c.pass.Unlock()
	c.mu.Lock()
	_, ok := c.retiring.Repositories[repository]
	c.mu.Unlock()
	if !ok {
		return fmt.Errorf("keep %s: it is not retiring", repository)
	}
	if err := c.drop(repository); err != nil {
		return err
	}
	c.event(status.Event{Kind: status.EventKept, By: by, Repository: repository})
	return nil
}

// acceptFor is how long an accepted time may take to be set.
const acceptFor = time.Hour

// AcceptClock takes the time as it is for right, at once or as soon as it is set,
// for an hour. It returns what the disk had seen, and what it takes for the time
// now: the zero time means that this waits until the clock is set.
func (c *Curator) AcceptClock(by string) (was, now time.Time, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	was = c.clock.Latest
	c.accept = c.opt.Uptime() + acceptFor
	if err := c.observe(true); err != nil {
		return was, now, err
	}
	text := "as soon as the time sources agree"
	if c.accept == 0 {
		now = c.clock.Latest
		text = "the disk had seen " + stamp(was) + "; now is " + stamp(now)
	}
	c.event(status.Event{Kind: status.EventClockAccepted, By: by, Text: text})
	return was, now, nil
}

// LowerFloor replaces the floors that the disk remembers. Those of the settings
// stay in force: a floor that both name is not lowered until both do.
func (c *Curator) LowerFloor(n int, age time.Duration, by string) error {
	h := c.opt.History
	h.FloorGenerations, h.FloorAge, h.Repositories = n, span.Duration(age), nil
	if _, key, _, text := h.Mistake(); key == "floor_generations" || key == "floor_age" {
		return fmt.Errorf("floor: %s", text)
	}
	repositories, err := c.disk.Repositories()
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	next := floorRecord{Repositories: map[string]floor{}}
	for _, name := range repositories {
		next.Repositories[name] = floor{n, int64(age / time.Second)}
	}
	if err := c.disk.WriteRecord("floor", next); err != nil {
		return err
	}
	c.floors, c.noFloor = next, false
	c.event(status.Event{Kind: status.EventFloor, By: by, Text: fmt.Sprintf("the disk remembers a floor of %d generations and %s", n, span.Duration(age).Days())})
	return nil
}
