// Package courier delivers what lies in an outbox by SMTP submission (RFC 6409).
//
// A mail is tried until the server accepts it, with back-off, and noted as sent
// before the next one: after a crash at the worst moment it arrives twice, under
// the same Message-ID, and never not at all. A mail that is refused for good
// rests and holds up no other. TLS is not optional, and nothing falls back to
// less. The courier reads the outbox and never writes to it: pruning what was
// sent is for the outbox's owner.
package courier

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	"farkeep/shared/letter"
	"farkeep/shared/outbox"
	"farkeep/shared/settings"

	"github.com/cenkalti/backoff/v5"
)

const (
	firstRetry = time.Minute
	lastRetry  = time.Hour
	// RejectedRetry is how long a mail rests that the server refused for good.
	// It is tried again, because an account that was locked can be opened again.
	RejectedRetry = 6 * time.Hour
)

// ErrHangs is returned by Step when a delivery does not end although everything
// in it has a timeout. Only a new process helps.
var ErrHangs = errors.New("a delivery does not end")

// Config is what a courier is made of. Outbox, Sent, Mail, Now and Log are needed.
type Config struct {
	Outbox string // the folder
	// Sent are the files for the list of mails that were sent. The first is the
	// record that counts after a restart; the others are copies of it.
	Sent []string
	Mail settings.Mail
	// Avoid are addresses that are never connected to, whatever a resolver says.
	Avoid []netip.Prefix
	// Line reports whether an attempt makes sense now, and what the way to the
	// provider looks like: when that changes, the back-off begins again. nil:
	// always.
	Line func() (line string, ready bool)
	// Doubt says what may be wrong with Now. nil: nothing.
	Doubt func() Doubt
	// Now is what certificates' dates are held against.
	Now func() time.Time
	// Wall is what spans are measured by; it must be monotonic. nil: time.Now.
	Wall func() time.Time
	Log  *slog.Logger
}

// Report is how deliveries go.
type Report struct {
	Queued    int // mails that wait
	LastSent  time.Time
	LastError string // one line; "" when the last attempt went well
}

// Courier delivers one outbox by one account. It is for one goroutine.
type Courier struct {
	c      Config
	sender *sender

	// A delivery that is under way closes busy when it ends; until then the
	// fields below are its own. The owner's loop must go on meanwhile: a server
	// that stalls is no reason to end it.
	busy    chan struct{}
	started time.Time

	sent    []string                    // accepted, and still in the outbox
	fresh   bool                        // the lists of sent mails were written since the start
	partial map[string]map[string]error // by id: recipients that are done
	rest    map[string]time.Time        // by id: not before
	retry   *backoff.ExponentialBackOff
	next    time.Time // the account: not before
	line    string    // what the line looked like at the last attempt
	report  Report
}

// New prepares a courier. That the list of sent mails cannot be read is logged,
// and they are sent again, once: better than not at all.
func New(c Config) (*Courier, error) {
	pool, err := roots(c.Mail.RootCA)
	if err != nil {
		return nil, err
	}
	if c.Line == nil {
		c.Line = func() (string, bool) { return "", true }
	}
	if c.Doubt == nil {
		c.Doubt = func() Doubt { return Doubt{} }
	}
	if c.Wall == nil {
		c.Wall = time.Now
	}
	k := &Courier{c: c, partial: map[string]map[string]error{}, rest: map[string]time.Time{}}
	k.retry = backoff.NewExponentialBackOff()
	k.retry.InitialInterval, k.retry.MaxInterval, k.retry.Multiplier = firstRetry, lastRetry, 2
	k.sender = &sender{settings: c.Mail, avoid: c.Avoid, roots: pool, clock: func() (time.Time, Doubt) { return c.Now(), c.Doubt() }}
	if k.sent, err = outbox.ReadSent(c.Sent[0]); err != nil {
		c.Log.Error("which mails were sent is lost", "err", err)
	}
	return k, nil
}

// Step looks into the outbox and starts to deliver what is due, in the
// background and until ctx ends. It reports whether a delivery is under way;
// Report and Sent are to be called only when none is. Call it every few seconds.
func (k *Courier) Step(ctx context.Context) (busy bool, err error) {
	if k.busy != nil {
		select {
		case <-k.busy:
			k.busy = nil
		default:
			if k.c.Wall().Sub(k.started) > 2*sessionTimeout {
				return true, ErrHangs
			}
			return true, nil
		}
	}
	waiting, err := outbox.List(k.c.Outbox)
	if err != nil {
		k.fail(err)
		return false, nil
	}
	k.forget(waiting)
	k.report.Queued = len(waiting) - len(k.sent)
	due := k.due(waiting)
	if len(due) == 0 || !k.mayTry() {
		return false, nil
	}
	k.busy, k.started = make(chan struct{}), k.c.Wall()
	go func(done chan<- struct{}) {
		defer close(done)
		k.deliver(ctx, due)
	}(k.busy)
	return true, nil
}

// Done is closed when the delivery that is under way ends; nil if none is.
func (k *Courier) Done() <-chan struct{} { return k.busy }

// Wait waits for the delivery that is under way, if one is: it ends with the
// context of its Step, or after minutes.
func (k *Courier) Wait() {
	if k.busy != nil {
		<-k.busy
	}
}

// Report says how it goes.
func (k *Courier) Report() Report { return k.report }

// Sent lists the mails that were accepted and still lie in the outbox.
func (k *Courier) Sent() []string { return slices.Clone(k.sent) }

// forget drops what is known of mails that the outbox's owner has removed.
func (k *Courier) forget(waiting []string) {
	gone := func(id string) bool { return !slices.Contains(waiting, id) }
	before := len(k.sent)
	k.sent = slices.DeleteFunc(k.sent, gone)
	if len(k.sent) != before || !k.fresh {
		k.note()
		k.fresh = true
	}
	for id := range k.partial {
		if gone(id) {
			delete(k.partial, id)
		}
	}
	for id := range k.rest {
		if gone(id) {
			delete(k.rest, id)
		}
	}
}

// due lists what is to be sent now, oldest first.
func (k *Courier) due(waiting []string) []string {
	now := k.c.Wall()
	return slices.DeleteFunc(slices.Clone(waiting), func(id string) bool {
		return slices.Contains(k.sent, id) || now.Before(k.rest[id])
	})
}

// mayTry reports whether an attempt makes sense: the line is ready, and the last
// failure is long enough ago, or the line has changed since.
func (k *Courier) mayTry() bool {
	line, ready := k.c.Line()
	if !ready {
		return false
	}
	if line != k.line {
		k.line = line
		k.retry.Reset()
		k.next = time.Time{}
	}
	return !k.c.Wall().Before(k.next)
}

func (k *Courier) deliver(ctx context.Context, due []string) {
	x, err := k.sender.open(ctx)
	if err != nil {
		if ctx.Err() == nil {
			k.fail(err)
		}
		return
	}
	defer x.close()
	for _, id := range due {
		if ctx.Err() != nil {
			return
		}
		text, err := outbox.Read(k.c.Outbox, id)
		if err != nil {
			k.postpone(id, err)
			continue
		}
		done := k.partial[id]
		if done == nil {
			done = map[string]error{}
			k.partial[id] = done
		}
		switch err := x.send(k.c.Mail.From, k.c.Mail.To, text, done); {
		case err == nil:
			k.accepted(id, done)
		case isRejected(err):
			clear(done)
			k.postpone(id, err)
			if x.client.Reset() != nil {
				return
			}
		default:
			if ctx.Err() == nil {
				k.fail(fmt.Errorf("mail %s: %w", id, err))
			}
			return
		}
	}
}

// accepted notes that a mail is delivered.
func (k *Courier) accepted(id string, done map[string]error) {
	k.sent = append(k.sent, id)
	k.note()
	k.retry.Reset()
	k.next = time.Time{}
	k.report.LastSent, k.report.LastError = k.c.Now(), ""
	refused := 0
	for _, err := range done {
		if err != nil {
			refused++
			k.report.LastError = clean(err)
		}
	}
	delete(k.partial, id)
	k.c.Log.Info("mail sent", "id", id, "recipients", len(done)-refused, "refused", refused)
}

// note writes the lists of sent mails. What cannot be written is remembered
// until this process ends.
func (k *Courier) note() {
	for _, path := range k.c.Sent {
		if err := outbox.WriteSent(path, k.sent); err != nil {
			k.c.Log.Error("which mails were sent was not noted", "err", err)
		}
	}
}

// fail notes an error that concerns the account or the line.
func (k *Courier) fail(err error) {
	wait := k.retry.NextBackOff()
	k.next = k.c.Wall().Add(wait)
	k.report.LastError = clean(err)
	k.c.Log.Warn("mail not delivered", "err", k.report.LastError, "again", wait.Round(time.Second))
}

// postpone notes an error that concerns one mail.
func (k *Courier) postpone(id string, err error) {
	k.rest[id] = k.c.Wall().Add(RejectedRetry)
	k.report.LastError = clean(err)
	k.c.Log.Error("mail refused", "id", id, "err", k.report.LastError, "again", RejectedRetry)
}

// clean makes one short line out of an error that may quote a server.
func clean(err error) string {
	text := letter.Line(err.Error(), 300)
	if errors.Is(err, ErrAvoided) {
		text += "; name another server, or take its address out of allowed_ips"
	}
	return text
}
