// Package alert mails what a person at home should know of the key server's
// decisions: a request that was not expected, a card that was cloned, a
// revocation that was carried out.
//
// Raise never waits. An event becomes a mail of its own or a line in the next
// summary (see limit.go); a mail is put durably into an outbox under the state
// folder and delivered from there until the provider takes it, over restarts. No
// mail has a link, and nothing that is in one opens anything: whoever reads a
// person's mail learns that an appliance asked, and can do nothing.
//
// What was raised and not told yet survives a restart but for the last seconds
// before a crash. The audit log, which is written before any answer, has those.
package alert

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"farkeep/shared/atomicfile"
	"farkeep/shared/courier"
	"farkeep/shared/letter"
	"farkeep/shared/outbox"
	"farkeep/shared/plainfile"
	"farkeep/shared/settings"
)

// Event is something that a person should know. Every text is made one line and
// cut before it is used.
type Event struct {
	Kind      string    `json:"kind"`                // one of the constants
	Appliance string    `json:"appliance,omitempty"` // its name; "" when it concerns none
	Disk      string    `json:"disk,omitempty"`      // LUKS UUID
	From      string    `json:"from,omitempty"`      // the VPN address that asked
	Place     string    `json:"place,omitempty"`     // where the VPN says that it is
	Decision  string    `json:"decision,omitempty"`  // what the key server did
	Reason    string    `json:"reason,omitempty"`    // why
	At        time.Time `json:"at"`                  // zero: now
	Next      []string  `json:"next,omitempty"`      // commands for this case; empty: the kind's own
}

// The kinds of events.
const (
	Up                     = "up"                       // the first start ever: mails work
	Held                   = "held"                     // a key waits for a person
	GrantedUnexpected      = "granted-unexpected"       // a key that was given although something was unusual
	Stranger               = "stranger"                 // an SSH key that is unknown, or declared void
	RefusedUnexpected      = "refused-unexpected"       // a request that this policy does not foresee
	TokenMismatch          = "token-mismatch"           // the card was cloned or replaced
	PlaceUnknownLasting    = "place-unknown-lasting"    // the VPN cannot be asked where peers are
	HeaderChanged          = "header-changed"           // the disk's header is not the backed-up one
	HeaderDamaged          = "header-damaged"           // one of the two copies of the header
	Slots                  = "slots"                    // a key slot too many or too few
	RevokedTold            = "revoked-told"             // a revoked appliance was told
	Dark                   = "dark"                     // it says that its disk is dark
	RevocationNotDelivered = "revocation-not-delivered" // another key server does not know yet
	BundleStale            = "bundle-stale"             // the recovery bundle no longer matches
	StateUnreadable        = "state-unreadable"         // and so the answer is no
	Flapping               = "flapping"                 // two machines with one WireGuard key
)

const (
	pollInterval = 2 * time.Second
	saveInterval = 5 * time.Second
	// blockedFor is how long a disk that took nothing is left alone.
	blockedFor = time.Minute
	maxField   = 200 // runes
	maxNext    = 8
	maxState   = 8 << 20
)

// Config is what Alerts is made of.
type Config struct {
	Dir       string // state/mail: the outbox and what was told; made when missing
	KeyServer string // this server's name, for the mails
	// Mail is the account. Without a server events are logged and nothing else.
	Mail settings.Mail
	Now  func() time.Time
	Log  *slog.Logger
}

// Alerts takes events. Its methods may be called from several goroutines.
type Alerts struct {
	c    Config
	wake chan struct{}

	mu     sync.Mutex // guards the fields below
	limit  *limiter
	out    []Event // to be queued; bounded by the limiter
	dirty  bool
	report courier.Report
	serial uint64
	nonce  uint32

	courier *courier.Courier // Run's own
	saved   time.Time        // Run's own
	blocked time.Time        // Run's own: the disk took nothing; not before
}

// state is what is on the disk.
type state struct {
	Version int      `json:"version"`
	Serial  uint64   `json:"serial"`
	Limit   *limiter `json:"limit"`
}

// New prepares the folder. An unreadable memory of what was told is logged and
// begun anew: a mail too many is better than none.
func New(c Config) (*Alerts, error) {
	a := &Alerts{c: c, wake: make(chan struct{}, 1), limit: newLimiter()}
	if !a.Mails() {
		return a, nil
	}
	for _, dir := range []string{c.Dir, a.outbox()} {
		if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, fmt.Errorf("make the folder for mails: %w", err)
		}
	}
	var n [4]byte
	rand.Read(n[:]) // never fails, says crypto/rand
	a.nonce = binary.BigEndian.Uint32(n[:])
	switch s, err := readState(a.path()); {
	case err == nil:
		a.limit, a.serial = s.Limit, s.Serial
	case errors.Is(err, fs.ErrNotExist):
		a.Raise(Event{Kind: Up})
	default:
		c.Log.Error("what was mailed is forgotten", "err", err)
	}
	var err error
	a.courier, err = courier.New(courier.Config{
		Outbox: a.outbox(), Sent: []string{filepath.Join(c.Dir, "sent.json")}, Mail: c.Mail, Now: c.Now, Log: c.Log,
	})
	return a, err
}

func (a *Alerts) outbox() string { return filepath.Join(a.c.Dir, "outbox") }
func (a *Alerts) path() string   { return filepath.Join(a.c.Dir, "told.json") }

func readState(path string) (*state, error) {
	data, err := plainfile.Read(path, maxState)
	if err != nil {
		return nil, err
	}
	s, err := parseState(data)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return s, nil
}

func parseState(data []byte) (*state, error) {
	s := &state{}
	if err := json.Unmarshal(data, s); err != nil {
		return nil, err
	}
	if s.Version != 1 || s.Limit == nil || s.Limit.Pairs == nil || len(s.Limit.Pairs) > 2*maxPairs || len(s.Limit.Mails) > firstsPerDay+repeatsPerDay {
		return nil, errors.New("not what this program wrote")
	}
	for name, p := range s.Limit.Pairs {
		if p == nil || (p.Count > 0) != (p.Last != nil) || p.Count < 0 || p.Gap < 0 || p.Gap > lastGap {
			return nil, fmt.Errorf("%.80q makes no sense", name)
		}
	}
	return s, nil
}

// Mails reports whether there is an account to mail by.
func (a *Alerts) Mails() bool { return a.c.Mail.Server != "" }

// Report says how deliveries go.
func (a *Alerts) Report() courier.Report {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.report
}

// Raise takes an event. It returns at once, whatever disk and provider do.
func (a *Alerts) Raise(ev Event) {
	ev = ev.bounded(a.c.Now())
	a.c.Log.Warn("alert", "kind", ev.Kind, "appliance", ev.Appliance, "disk", ev.Disk, "from", ev.From, "place", ev.Place, "decision", ev.Decision, "reason", ev.Reason)
	if !a.Mails() {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.dirty = true
	if a.limit.take(ev, a.c.Now()) {
		a.out = append(a.out, ev)
		select {
		case a.wake <- struct{}{}:
		default: // it is awake already
		}
	}
}

func (ev Event) bounded(now time.Time) Event {
	for _, s := range []*string{&ev.Kind, &ev.Appliance, &ev.Disk, &ev.From, &ev.Place, &ev.Decision, &ev.Reason} {
		*s = letter.Line(*s, maxField)
	}
	ev.Next = slices.Clone(ev.Next[:min(len(ev.Next), maxNext)])
	for i := range ev.Next {
		ev.Next[i] = letter.Line(ev.Next[i], maxField)
	}
	if _, ok := kinds[ev.Kind]; !ok {
		ev.Reason, ev.Kind = letter.Line(ev.Kind+": "+ev.Reason, maxField), RefusedUnexpected
	}
	if ev.At.IsZero() {
		ev.At = now
	}
	ev.At = ev.At.UTC().Truncate(time.Second)
	return ev
}

// Run queues and delivers until ctx ends; what was raised before that is on the
// disk when it returns. Without an account it only waits.
func (a *Alerts) Run(ctx context.Context) error {
	if !a.Mails() {
		<-ctx.Done()
		return nil
	}
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	defer a.courier.Wait()
	for {
		err := a.step(ctx)
		if err == nil {
			select {
			case <-ctx.Done():
			case <-a.courier.Done():
				continue
			case <-a.wake:
				continue
			case <-tick.C:
				continue
			}
		}
		a.saved, a.blocked = time.Time{}, time.Time{}
		a.queue()
		return err
	}
}

func (a *Alerts) step(ctx context.Context) error {
	a.queue()
	busy, err := a.courier.Step(ctx)
	if err != nil {
		return fmt.Errorf("deliver mails: %w", err)
	}
	if !busy {
		a.settle()
	}
	return nil
}

// settle removes what was sent and notes how it goes.
func (a *Alerts) settle() {
	if err := outbox.Prune(a.outbox(), a.courier.Sent()); err != nil {
		a.c.Log.Error("mails that were sent are still queued", "err", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.report = a.courier.Report()
}

// queue makes mails of what is due and saves what was told. The mails come
// first: a crash in between mails one twice, the other order would lose it.
func (a *Alerts) queue() {
	now := a.c.Now()
	if wait := a.blocked.Sub(now); wait > 0 && wait <= blockedFor {
		return
	}
	a.mu.Lock()
	events := a.out
	a.out = nil
	lines := a.limit.summary(now)
	a.mu.Unlock()

	var failed []Event
	for _, ev := range events {
		if !a.put(ev.Kind, compose(ev, a.c.KeyServer)) {
			failed = append(failed, ev)
		}
	}
	summarised := len(lines) > 0 && a.put("summary", composeSummary(lines, a.c.KeyServer))

	a.mu.Lock()
	for _, ev := range failed {
		a.limit.giveBack(ev)
	}
	if summarised {
		a.limit.summarised(lines, now)
	}
	a.dirty = a.dirty || len(failed) > 0 || summarised
	var data []byte
	var err error
	if a.dirty && (len(events) > 0 || summarised || now.Sub(a.saved).Abs() >= saveInterval) {
		data, err = json.Marshal(state{Version: 1, Serial: a.serial, Limit: a.limit})
		a.dirty = false
		a.saved = now
	}
	a.mu.Unlock()
	if data != nil && err == nil {
		err = atomicfile.Write(a.path(), data, 0o600)
	}
	if err != nil {
		a.c.Log.Error("what was mailed is not saved", "err", err)
		a.mu.Lock()
		a.dirty = true
		a.mu.Unlock()
	}
	if err != nil || len(failed) > 0 || len(lines) > 0 && !summarised {
		a.blocked = now.Add(blockedFor)
	}
}

// put queues one mail.
func (a *Alerts) put(kind string, m mail) bool {
	a.mu.Lock()
	a.serial++
	id := outbox.ID(a.serial, kind, a.nonce)
	a.mu.Unlock()
	text, err := letter.Letter{ID: id, Subject: m.subject, Body: m.body, Date: a.c.Now()}.Text(a.c.Mail.From, a.c.Mail.To)
	if err == nil {
		err = outbox.Put(a.outbox(), id, text)
	}
	if err != nil {
		a.c.Log.Error("a mail is not queued and waits for the next summary", "subject", m.subject, "err", err)
	}
	return err == nil
}
