package keeper

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"time"

	"farkeep/appliance/keepercall"
	"farkeep/appliance/localcall"
	"farkeep/shared/generations"
	"farkeep/shared/hint"
	"farkeep/shared/pushwire"
)

var verbs = map[string]func(context.Context, *call) error{
	keepercall.Offer:       offer,
	keepercall.Upload:      upload,
	keepercall.Commit:      commit,
	keepercall.Abort:       abort,
	keepercall.Heartbeat:   heartbeat,
	keepercall.Generations: list,
	keepercall.Verify:      verify,
	keepercall.SFTP:        sftp,
	keepercall.Words:       words,
	keepercall.Reading:     reading,
	keepercall.Accept:      decide(generations.Accepted),
	keepercall.Reject:      decide(generations.Rejected),
	keepercall.Retire:      retire,
	keepercall.Keep:        keep,
	keepercall.AcceptClock: acceptClock,
	keepercall.Floor:       floor,
}

// call is one verb of a peer.
type call struct {
	*Keeper
	args keepercall.Args
	conn *localcall.Conn
	log  *slog.Logger
}

// answer sends a line; more says whether another one follows.
func (c *call) answer(v any, then string) error {
	out, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return c.conn.Reply(keepercall.Answer{Out: out, Then: then})
}

// over ends the answers of a verb without another line.
func (c *call) over() error {
	return c.conn.Reply(json.RawMessage(`{"Then":"` + keepercall.ThenEnd + `"}`))
}

// allowed checks that the peer's key may use the repository. The receiver has
// checked the role already; whoever writes the disk checks again.
func (c *call) allowed(repository string) error {
	if err := pushwire.CheckRepository(repository); err != nil {
		return hint.Exit(hint.ExitUsage, err)
	}
	if c.sees(repository) {
		return nil
	}
	err := fmt.Errorf("key %s may not use repository %s", c.args.Key, repository)
	return hint.Exit(hint.ExitRefused, hint.Because(err, "name it among the key's repositories in the appliance's farkeep.toml"))
}

func (c *call) sees(repository string) bool {
	if len(c.args.Repositories) == 0 {
		return c.args.Role == "restore" || c.args.Role == "admin"
	}
	return slices.ContainsFunc(c.args.Repositories, func(pattern string) bool {
		if prefix, ok := strings.CutSuffix(pattern, "*"); ok {
			return strings.HasPrefix(repository, prefix)
		}
		return repository == pattern
	})
}

func (c *call) pushKey() error {
	if c.args.Role != "push" || c.args.Key == "" {
		return hint.Exit(hint.ExitRefused, errors.New("only a push key pushes"))
	}
	return nil
}

// reader reads the peer's raw bytes. When none come for Brief.Stall, or ctx
// ends, the call is cut: a peer that says nothing hears nothing.
func (c *call) reader(ctx context.Context, progress func()) (_ io.Reader, stop func()) {
	stopWatch := context.AfterFunc(ctx, func() { c.conn.Close() })
	stalled := time.AfterFunc(c.brief.Stall, func() { c.conn.Close() })
	r := readerFunc(func(p []byte) (int, error) {
		stalled.Reset(c.brief.Stall)
		n, err := c.conn.Read(p)
		stalled.Stop()
		if progress != nil {
			progress()
		}
		if err != nil && !errors.Is(err, io.EOF) {
			if cause := context.Cause(ctx); cause != nil {
				err = cause
			}
		}
		return n, err
	})
	return r, func() {
		stalled.Stop()
		stopWatch()
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// line reads a peer's short message, one JSON line.
func (c *call) line(ctx context.Context, v any) error {
	r, stop := c.reader(ctx, nil)
	defer stop()
	if err := pushwire.ReadLine(pushwire.NewReader(io.LimitReader(r, pushwire.MaxLine)), v); err != nil {
		return hint.Exit(hint.ExitUsage, err)
	}
	return nil
}

func list(ctx context.Context, c *call) error {
	if c.args.Repository != "" {
		if err := c.allowed(c.args.Repository); err != nil {
			return err
		}
	}
	ctx, store, leave, err := c.enter(ctx)
	if err != nil {
		return err
	}
	defer leave()
	// A peer that does not read must not keep the disk from closing.
	defer context.AfterFunc(ctx, func() { c.conn.Close() })()
	repositories := []string{c.args.Repository}
	if c.args.Repository == "" {
		if repositories, err = store.Repositories(); err != nil {
			return err
		}
	}
	for _, repository := range repositories {
		if !c.sees(repository) {
			continue
		}
		all, err := store.List(ctx, repository)
		if err != nil {
			return err
		}
		plan, err := c.curatorNow().Explain(ctx, repository)
		if err != nil {
			return err
		}
		for _, g := range all {
			w := wireGeneration(g)
			if d, ok := plan[g.Name]; ok {
				w.Keep, w.Why, w.Goes = d.Keep, d.Why, d.Goes.UTC()
			}
			if err := c.answer(w, keepercall.ThenLine); err != nil {
				return err
			}
		}
	}
	return c.over()
}

func wireGeneration(g generations.Generation) pushwire.Generation {
	w := pushwire.Generation{Repository: g.Repository, Name: g.Name, Committed: g.Committed, Entries: g.Entries, Bytes: g.Bytes, NewBytes: g.NewBytes, Suspect: g.Suspect}
	w.Standing, w.Reasons = string(g.Standing), bounded(g.Reasons)
	if g.Format != 0 {
		w.Digest = g.Digest.String()
	}
	return w
}

// maxBad bounds the files that an answer to verify names, and maxBadName each.
const (
	maxBad     = 50
	maxBadName = 500
)

func verify(ctx context.Context, c *call) error {
	if err := c.allowed(c.args.Repository); err != nil {
		return err
	}
	ctx, store, leave, err := c.enter(ctx)
	if err != nil {
		return err
	}
	defer leave()
	select {
	case c.verifying[c.args.Role == "push"] <- struct{}{}:
		defer func() { <-c.verifying[c.args.Role == "push"] }()
	case <-time.After(settle):
		return hint.Exit(hint.ExitUnreachable, hint.Because(errors.New("another generation is being verified"), "wait for it: two at once are slower than one after the other"))
	}
	// A verify takes hours. Lines without content find out whether the peer is
	// still there: without them the disk would be read, and kept open, for nobody.
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// A peer that does not read must not keep the disk from closing.
	defer context.AfterFunc(ctx, func() { c.conn.Close() })()
	last := time.Now()
	report, err := store.Verify(ctx, c.args.Repository, c.args.Generation, func(generations.Report) {
		if time.Since(last) < 5*time.Second {
			return
		}
		last = time.Now()
		if err := c.conn.Reply(json.RawMessage(`{"Then":"` + keepercall.ThenLine + `"}`)); err != nil {
			cancel(fmt.Errorf("the peer is gone: %w", err))
		}
	})
	c.tellRot(store)
	if err != nil {
		return err
	}
	out := pushwire.VerifyAnswer{Files: report.Files, Bytes: report.Bytes}
	for i, p := range report.Problems {
		c.log.Error("a generation is damaged", "repository", c.args.Repository, "generation", c.args.Generation, "path", p.Path, "what", p.What)
		if i < maxBad {
			name := fmt.Sprintf("%s: %s", p.Path, p.What)
			out.Bad = append(out.Bad, name[:min(len(name), maxBadName)])
		}
	}
	return c.answer(out, keepercall.ThenEnd)
}

func heartbeat(ctx context.Context, c *call) error {
	if err := c.pushKey(); err != nil {
		return err
	}
	var beat pushwire.Heartbeat
	if err := c.line(ctx, &beat); err != nil {
		return err
	}
	if beat.Host != c.args.Host {
		return hint.Exit(hint.ExitUsage, fmt.Errorf("heartbeat of host %.64q, announced as %.64q", beat.Host, c.args.Host))
	}
	return c.beat(ctx, beat)
}

// beat judges a heartbeat, and writes down one that is true.
func (c *call) beat(ctx context.Context, beat pushwire.Heartbeat) error {
	if err := pushwire.CheckRepository(beat.Host); err != nil {
		return hint.Exit(hint.ExitUsage, fmt.Errorf("heartbeat of host %.64q: %w", beat.Host, err))
	}
	if len(beat.Repositories) == 0 {
		return hint.Exit(hint.ExitUsage, errors.New("a heartbeat that names no repository says nothing"))
	}
	for _, r := range beat.Repositories {
		if err := c.allowed(r.Name); err != nil {
			return err
		}
	}
	written, err := c.known.beat(c.args.Key, beat, c.env.Now())
	if err != nil {
		return err
	}
	if !written {
		return c.answer(struct{}{}, keepercall.ThenEnd)
	}
	// The disk's copy is for whoever finds the disk; the state partition's is the
	// one that counts.
	if _, store, leave, err := c.enter(ctx); err == nil {
		defer leave()
		text := fmt.Sprintf("heartbeat of %s, received %s by this appliance's clock, %s by its own\n", beat.Host, c.env.Now().UTC().Format(time.RFC3339), beat.At.UTC().Format(time.RFC3339))
		if err := store.Heartbeat(beat.Host, c.env.Now(), text); err != nil {
			c.log.Warn("the heartbeat cannot be written to the disk", "err", err)
		}
	}
	if err := c.report(true); err != nil {
		return err
	}
	return c.answer(struct{}{}, keepercall.ThenEnd)
}
