// Package mail is the part that delivers what lies in the outbox, by SMTP
// submission straight to the provider: over the local line and never through
// the VPN, because it has to work just when home does not.
//
// A mail is tried until the server accepts it, with back-off, and noted as sent
// before the next one: after a crash at the worst moment it arrives twice, under
// the same Message-ID, and never not at all. TLS is not optional. The part knows
// the mail password and nothing else of value; it reads the outbox and cannot
// write to it.
package mail

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"farkeep/appliance/outbox"
	"farkeep/appliance/part"
	"farkeep/appliance/status"
	"farkeep/shared/settings"

	"github.com/cenkalti/backoff/v5"
)

// Brief is what the part is told.
type Brief struct {
	Mail settings.Mail
	VPN  []netip.Prefix // what the tunnel carries, and its own address
}

const (
	pollInterval    = 2 * time.Second
	rewriteInterval = time.Minute
	firstRetry      = time.Minute
	lastRetry       = time.Hour
	// rejectedRetry is how long a mail rests that the server refused for good.
	// It is tried again, because an account that was locked can be opened again.
	rejectedRetry = 6 * time.Hour
)

// courier is the part.
type courier struct {
	env    *part.Env
	brief  Brief
	sender *sender
	wall   func() time.Time // monotonic too, as time.Now is

	// A delivery that is under way closes busy when it ends; until then the
	// fields below are its own. The main loop must go on meanwhile: a server that
	// stalls is no reason to end the part.
	busy    chan struct{}
	started time.Time

	sent    []string                    // accepted, and still in the outbox
	partial map[string]map[string]error // by id: recipients that are done
	rest    map[string]time.Time        // by id: not before
	retry   *backoff.ExponentialBackOff
	next    time.Time // the account: not before
	line    string    // what the local line looked like at the last attempt
	status  status.Mail
	written status.Mail
}

// Run is the part. It returns nil after ctx ended.
func Run(ctx context.Context, env *part.Env) error {
	b, err := part.Brief[Brief](env)
	if err != nil {
		return err
	}
	c, err := newCourier(env, b)
	if err != nil {
		return err
	}
	err = env.Loop(ctx, pollInterval, c.step)
	if c.busy != nil {
		<-c.busy // it ends with ctx, or within sessionTimeout
	}
	return err
}

func newCourier(env *part.Env, b Brief) (*courier, error) {
	pool, err := roots(b.Mail.RootCA)
	if err != nil {
		return nil, err
	}
	c := &courier{env: env, brief: b, wall: time.Now, partial: map[string]map[string]error{}, rest: map[string]time.Time{}}
	c.retry = backoff.NewExponentialBackOff()
	c.retry.InitialInterval, c.retry.MaxInterval, c.retry.Multiplier = firstRetry, lastRetry, 2
	c.sender = &sender{settings: b.Mail, vpn: b.VPN, roots: pool, clock: c.clock}
	if c.sent, err = outbox.ReadSent(c.record()); err != nil {
		// Mails that were sent already are sent again, once: better than not at all.
		env.Log.Error("which mails were sent is lost", "err", err)
	}
	return c, nil
}

// record is the durable list of sent mails; public is the copy that the outbox's
// owner may read.
func (c *courier) record() string {
	return filepath.Join(c.env.Paths.StateDir(part.Mail), "sent.json")
}
func (c *courier) public() string {
	return filepath.Join(c.env.Paths.RunDir(part.Mail), "sent.json")
}

// errHangs ends the part, which is started again.
var errHangs = errors.New("a delivery does not end")

// step looks into the outbox and starts to deliver what is due.
func (c *courier) step(ctx context.Context) error {
	if c.busy != nil {
		select {
		case <-c.busy:
			c.busy = nil
		default:
			if c.wall().Sub(c.started) > 2*sessionTimeout {
				return errHangs
			}
			return nil
		}
	}
	waiting, err := outbox.List(c.env.Paths.Outbox())
	if err != nil {
		c.fail(err)
		c.tell()
		return nil
	}
	c.forget(waiting)
	c.status.Queued = len(waiting) - len(c.sent)
	if due := c.due(waiting); len(due) > 0 && c.mayTry() {
		c.busy, c.started = make(chan struct{}), c.wall()
		go func() {
			defer close(c.busy)
			c.deliver(ctx, due)
		}()
		return nil
	}
	c.tell()
	return nil
}

// forget drops what is known of mails that the outbox's owner has removed.
func (c *courier) forget(waiting []string) {
	gone := func(id string) bool { return !slices.Contains(waiting, id) }
	before := len(c.sent)
	c.sent = slices.DeleteFunc(c.sent, gone)
	if len(c.sent) != before || c.written.Updated.IsZero() {
		c.note()
	}
	for id := range c.partial {
		if gone(id) {
			delete(c.partial, id)
		}
	}
	for id := range c.rest {
		if gone(id) {
			delete(c.rest, id)
		}
	}
}

// due lists what is to be sent now, oldest first.
func (c *courier) due(waiting []string) []string {
	now := c.wall()
	return slices.DeleteFunc(slices.Clone(waiting), func(id string) bool {
		return slices.Contains(c.sent, id) || now.Before(c.rest[id])
	})
}

// mayTry reports whether an attempt makes sense: the line is up, the clock is
// as good as it gets, and the last failure is long enough ago, or the line has
// changed since.
func (c *courier) mayTry() bool {
	n, err := status.Read[status.Network](c.env.Paths.Status(part.Network))
	if err != nil || n == nil || len(n.Addresses) == 0 || !n.ClockSet && n.ClockSource == "" {
		return false
	}
	line := fmt.Sprint(n.Addresses, n.ClockSet, n.ClockJump != "")
	if line != c.line {
		c.line = line
		c.retry.Reset()
		c.next = time.Time{}
	}
	return !c.wall().Before(c.next)
}

// clock tells what certificates' dates are held against.
func (c *courier) clock() (time.Time, doubt) {
	n, err := status.Read[status.Network](c.env.Paths.Status(part.Network))
	if err != nil || n == nil {
		return c.env.Now(), doubt{}
	}
	return c.env.Now(), doubt{behind: !n.ClockSet, ahead: n.ClockJump != ""}
}

func (c *courier) deliver(ctx context.Context, due []string) {
	x, err := c.sender.open(ctx)
	if err != nil {
		if ctx.Err() == nil {
			c.fail(err)
		}
		return
	}
	defer x.close()
	for _, id := range due {
		if ctx.Err() != nil {
			return
		}
		text, err := outbox.Read(c.env.Paths.Outbox(), id)
		if err != nil {
			c.postpone(id, err)
			continue
		}
		done := c.partial[id]
		if done == nil {
			done = map[string]error{}
			c.partial[id] = done
		}
		switch err := x.send(c.brief.Mail.From, c.brief.Mail.To, text, done); {
		case err == nil:
			c.accepted(id, done)
		case isRejected(err):
			clear(done)
			c.postpone(id, err)
			if x.client.Reset() != nil {
				return
			}
		default:
			if ctx.Err() == nil {
				c.fail(fmt.Errorf("mail %s: %w", id, err))
			}
			return
		}
	}
}

// accepted notes that a mail is delivered.
func (c *courier) accepted(id string, done map[string]error) {
	c.sent = append(c.sent, id)
	c.note()
	c.retry.Reset()
	c.next = time.Time{}
	c.status.LastSent, c.status.LastError = c.env.Now(), ""
	refused := 0
	for _, err := range done {
		if err != nil {
			refused++
			c.status.LastError = clean(err)
		}
	}
	delete(c.partial, id)
	c.env.Log.Info("mail sent", "id", id, "recipients", len(done)-refused, "refused", refused)
}

// note writes both lists of sent mails. What cannot be written is remembered
// until this process ends.
func (c *courier) note() {
	for _, path := range []string{c.record(), c.public()} {
		if err := outbox.WriteSent(path, c.sent); err != nil {
			c.env.Log.Error("which mails were sent was not noted", "err", err)
		}
	}
}

// fail notes an error that concerns the account or the line.
func (c *courier) fail(err error) {
	wait := c.retry.NextBackOff()
	c.next = c.wall().Add(wait)
	c.status.LastError = clean(err)
	c.env.Log.Warn("mail not delivered", "err", c.status.LastError, "again", wait.Round(time.Second))
}

// postpone notes an error that concerns one mail.
func (c *courier) postpone(id string, err error) {
	c.rest[id] = c.wall().Add(rejectedRetry)
	c.status.LastError = clean(err)
	c.env.Log.Error("mail refused", "id", id, "err", c.status.LastError, "again", rejectedRetry)
}

// clean makes one short line out of an error that may quote a server.
func clean(err error) string {
	text := strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(err.Error(), "?"))
	if r := []rune(text); len(r) > 300 {
		text = string(r[:300]) + " ..."
	}
	if errors.Is(err, errInsideVPN) {
		text += "; name another server, or take its address out of allowed_ips"
	}
	return text
}

// tell writes the status file if there is something new to tell.
func (c *courier) tell() {
	now := c.env.Now()
	s := c.status
	s.Updated = c.written.Updated
	if reflect.DeepEqual(s, c.written) && now.Sub(c.written.Updated).Abs() < rewriteInterval {
		return
	}
	s.Updated = now
	if err := status.Write(c.env.Paths.Status(part.Mail), s); err != nil {
		c.env.Log.Error("status", "err", err)
		return
	}
	c.written = s
}
