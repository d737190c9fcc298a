package receiver

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"farkeep/appliance/keepercall"
	"farkeep/appliance/localcall"
	"farkeep/appliance/part"
	"farkeep/appliance/status"
	"farkeep/shared/pushwire"
	"farkeep/shared/sshverb"
)

// listGenerations relays the keeper's list, as lines of JSON or for a person.
func (r *receiver) listGenerations(ctx context.Context, s *sshverb.Session, k Key) error {
	words := s.Args
	text := len(words) > 0 && words[0] == "--text"
	if text {
		words = words[1:]
	}
	args := keepercall.Args{Key: k.Name, Role: k.Role, Repositories: k.Repositories, Quota: k.Quota}
	switch len(words) {
	case 0:
	case 1:
		args.Repository = words[0]
	default:
		return errUsage
	}
	ctx, done, err := r.hold(ctx, s)
	if err != nil {
		return err
	}
	defer done()
	if !text {
		return r.relay(ctx, s, keepercall.Generations, args, false, s.Stdout)
	}
	w := tabwriter.NewWriter(s.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "REPOSITORY\tGENERATION\tSIZE\tNEW\tSTANDING\tSTAYS\tGOES")
	if err := r.relay(ctx, s, keepercall.Generations, args, false, generationRows{w}); err != nil {
		return err
	}
	return w.Flush()
}

// generationRows turns the keeper's lines, one to a Write, into rows.
type generationRows struct{ w io.Writer }

func (g generationRows) Write(line []byte) (int, error) {
	var e pushwire.Generation
	if err := json.Unmarshal(bytes.TrimSpace(line), &e); err != nil {
		return 0, fmt.Errorf("generations: %w", err)
	}
	goes := "not foreseen"
	switch {
	case !e.Keep:
		goes = "next"
	case !e.Goes.IsZero():
		goes = e.Goes.UTC().Format("2006-01-02")
	}
	fmt.Fprintf(g.w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", e.Repository, e.Name, size(e.Bytes), size(e.NewBytes), orUnknown(e.Standing), e.Why, goes)
	for _, reason := range e.Reasons {
		fmt.Fprintf(g.w, "\t  suspect: %s\t\t\t\t\t\n", reason)
	}
	return len(line), nil
}

// floor changes the floor that the disk remembers.
func (r *receiver) floor(ctx context.Context, s *sshverb.Session, k Key) error {
	if len(s.Args) != 2 {
		return errUsage
	}
	n, err := strconv.Atoi(s.Args[0])
	if err != nil {
		return errUsage
	}
	return r.admin(ctx, s, keepercall.Floor, keepercall.Args{Key: k.Name, Role: k.Role, Number: n, Age: s.Args[1]})
}

// acceptClock takes the time for right: the network part's, if it sets the clock,
// and the disk's own record of it.
func (r *receiver) acceptClock(ctx context.Context, s *sshverb.Session, k Key) error {
	if len(s.Args) != 0 {
		return errUsage
	}
	// In service mode another system sets the clock, and that part answers nobody.
	err := localcall.Call(ctx, r.env.Paths.Socket(part.Network), "accept-clock", nil, nil)
	var refused *localcall.Error
	if errors.As(err, &refused) {
		return forPeer(err)
	}
	if err != nil {
		s.Log.Info("the network part does not set the clock", "err", err)
	}
	return r.admin(ctx, s, keepercall.AcceptClock, keepercall.Args{Key: k.Name, Role: k.Role})
}

func (r *receiver) admin(ctx context.Context, s *sshverb.Session, verb string, args keepercall.Args) error {
	ctx, done, err := r.hold(ctx, s)
	if err != nil {
		return err
	}
	defer done()
	return r.relay(ctx, s, verb, args, false, s.Stdout)
}

// pinned is a key's call to the keeper that nothing may go, for all of its
// sessions that read.
type pinned struct {
	ctx   context.Context // ends when the keeper is gone: nothing is certain then
	close func()
	users int
}

// pin keeps everything on the disk where it is while a session with k reads. The
// returned context ends with that promise; the caller must call unpin.
func (r *receiver) pin(ctx context.Context, k Key) (_ context.Context, unpin func(), err error) {
	r.pinning.Lock() // one call to the keeper at a time
	defer r.pinning.Unlock()
	p := r.pins[k.Name]
	if p == nil || p.ctx.Err() != nil {
		if p, err = r.openPin(k); err != nil {
			return nil, nil, forPeer(err)
		}
		r.pins[k.Name] = p
	}
	p.users++
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(p.ctx, cancel)
	return ctx, func() {
		stop()
		cancel()
		r.pinning.Lock()
		defer r.pinning.Unlock()
		if p.users--; p.users == 0 {
			p.close()
			if r.pins[k.Name] == p {
				delete(r.pins, k.Name)
			}
		}
	}, nil
}

func (r *receiver) openPin(k Key) (*pinned, error) {
	ctx, cancel := context.WithCancel(context.Background())
	call, err := localcall.Open(ctx, r.env.Paths.Socket(part.Keeper), keepercall.Reading, keepercall.Args{Key: k.Name, Role: k.Role})
	if err == nil {
		if err = call.ReadReply(nil); err != nil {
			call.Close()
		}
	}
	if err != nil {
		cancel()
		return nil, err
	}
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		defer cancel()
		// The keeper says nothing more: this ends with it, or by close.
		_, _ = io.Copy(io.Discard, call)
	}()
	return &pinned{ctx: ctx, close: func() {
		cancel()
		<-gone
		call.Close()
	}}, nil
}

// historyFor adds what the keeper says of history, as far as k may see it.
func historyFor(k Key, now *pushwire.Status, s *status.Keeper) {
	all := k.Role != RolePush
	for _, why := range s.Frozen {
		name, _, named := strings.Cut(why, ": ")
		if all || named && k.mayUse(name) {
			now.Frozen = append(now.Frozen, why)
		}
	}
	if s.Room != nil {
		now.Room = &pushwire.Room{Free: s.Room.Free, Reserve: s.Room.Reserve, WorstDay: s.Room.WorstDay, PerDay: s.Room.PerDay, FullOn: s.Room.FullOn}
	}
	if s.Scrub != nil {
		now.Scrub = &pushwire.Scrub{Started: s.Scrub.Started, LastFull: s.Scrub.LastFull, Done: s.Scrub.Done, Bytes: s.Scrub.Bytes, Paused: s.Scrub.Paused}
	}
	for _, rot := range s.Rot {
		if k.mayUse(rot.Repository) && len(now.Rot) < maxRotLines {
			now.Rot = append(now.Rot, pushwire.Rot{
				Repository: rot.Repository, Path: rot.Path, Sum: rot.Sum, What: rot.What,
				Generations: rot.Generations, Found: rot.Found, Healed: rot.Healed,
			})
		}
	}
	if all {
		now.RotCount = s.RotCount
		for _, u := range s.Untrue {
			now.Untrue = append(now.Untrue, pushwire.Untrue{Host: u.Host, At: u.At, What: u.What})
		}
	}
	for _, t := range s.Retiring {
		if k.mayUse(t.Repository) {
			now.Retiring = append(now.Retiring, pushwire.Retiring{Repository: t.Repository, By: t.By, Asked: t.Asked, Due: t.Due})
		}
	}
}

// maxRotLines bounds the rotten files that a status names.
const maxRotLines = 20

// describeHistory writes it for a person.
func describeHistory(s pushwire.Status, row func(name, format string, args ...any)) {
	for _, r := range s.Repositories {
		for _, g := range r.Suspects {
			row("SUSPECT "+r.Name, "%s: %s", g.Generation, strings.Join(g.Reasons, " "))
		}
	}
	for _, t := range s.Retiring {
		row("RETIRING "+t.Repository, "on %s, asked for %s with the key %s", when(t.Due), when(t.Asked), t.By)
	}
	for _, why := range s.Frozen {
		row("nothing expires", "%s", why)
	}
	if r := s.Room; r != nil {
		forecast := "not foreseen"
		if !r.FullOn.IsZero() {
			forecast = r.FullOn.UTC().Format("2006-01-02") + ", one worst day kept in reserve"
		}
		row("room", "%s for pushes beside a reserve of %s; a day adds %s, the worst added %s; full: %s", size(r.Free), size(r.Reserve), size(max(0, r.PerDay)), size(r.WorstDay), forecast)
	}
	if c := s.Scrub; c != nil {
		paused := ""
		if c.Paused != "" {
			paused = ", waits: " + c.Paused
		}
		row("scrub", "%.0f %% of the round since %s, last whole one %s%s", 100*c.Done, when(c.Started), when(c.LastFull), paused)
	}
	for _, rot := range s.Rot {
		healed := "not healed"
		if !rot.Healed.IsZero() {
			healed = "healed " + when(rot.Healed)
		}
		row("ROT "+rot.Repository, "%s: %s, in %d generations, %s", rot.Path, rot.What, len(rot.Generations), healed)
	}
	for _, u := range s.Untrue {
		row("untrue heartbeat", "%s: %s", when(u.At), u.What)
	}
}

// suspectsFor is a repository's part of it.
func suspectsFor(all []status.SuspectStatus) (out []pushwire.Suspect) {
	for _, g := range all {
		out = append(out, pushwire.Suspect{Generation: g.Generation, At: g.At, Reasons: slices.Clone(g.Reasons)})
	}
	return out
}
