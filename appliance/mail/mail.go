// Package mail is the part that delivers what lies in the outbox, by SMTP
// submission straight to the provider: over the local line and never through
// the VPN, because it has to work just when home does not.
//
// How a mail is delivered, once and never not at all, is package courier's. This
// part says when an attempt makes sense and what the clock is worth, and tells
// the other parts how it goes. It knows the mail password and nothing else of
// value; it reads the outbox and cannot write to it.
package mail

import (
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
	"reflect"
	"time"

	"farkeep/appliance/part"
	"farkeep/appliance/status"
	"farkeep/shared/courier"
	"farkeep/shared/settings"
)

// Brief is what the part is told.
type Brief struct {
	Mail settings.Mail
	VPN  []netip.Prefix // what the tunnel carries, and its own address
}

const (
	pollInterval    = 2 * time.Second
	rewriteInterval = time.Minute
)

// mailer is the part.
type mailer struct {
	env     *part.Env
	courier *courier.Courier
	written status.Mail
}

// Run is the part. It returns nil after ctx ended.
func Run(ctx context.Context, env *part.Env) error {
	b, err := part.Brief[Brief](env)
	if err != nil {
		return err
	}
	m, err := newMailer(env, b, time.Now)
	if err != nil {
		return err
	}
	err = env.Loop(ctx, pollInterval, m.step)
	m.courier.Wait()
	return err
}

func newMailer(env *part.Env, b Brief, wall func() time.Time) (*mailer, error) {
	m := &mailer{env: env}
	var err error
	m.courier, err = courier.New(courier.Config{
		Outbox: env.Paths.Outbox(), Sent: []string{m.record(), m.public()},
		Mail: b.Mail, Avoid: b.VPN, Line: m.line, Doubt: m.doubt,
		Now: func() time.Time { return env.Now() }, Wall: wall, Log: env.Log,
	})
	return m, err
}

// record is the durable list of sent mails; public is the copy that the outbox's
// owner may read.
func (m *mailer) record() string {
	return filepath.Join(m.env.Paths.StateDir(part.Mail), "sent.json")
}
func (m *mailer) public() string {
	return filepath.Join(m.env.Paths.RunDir(part.Mail), "sent.json")
}

func (m *mailer) step(ctx context.Context) error {
	busy, err := m.courier.Step(ctx)
	if err == nil && !busy {
		m.tell()
	}
	return err
}

// line says what the local line looks like. An attempt makes sense when it is up
// and the clock is as good as it gets.
func (m *mailer) line() (string, bool) {
	n, err := status.Read[status.Network](m.env.Paths.Status(part.Network))
	if err != nil || n == nil || len(n.Addresses) == 0 || !n.ClockSet && n.ClockSource == "" {
		return "", false
	}
	return fmt.Sprint(n.Addresses, n.ClockSet, n.ClockJump != ""), true
}

// doubt tells what may be wrong with the clock.
func (m *mailer) doubt() courier.Doubt {
	n, err := status.Read[status.Network](m.env.Paths.Status(part.Network))
	if err != nil || n == nil {
		return courier.Doubt{}
	}
	return courier.Doubt{Behind: !n.ClockSet, Ahead: n.ClockJump != ""}
}

// tell writes the status file if there is something new to tell.
func (m *mailer) tell() {
	now := m.env.Now()
	r := m.courier.Report()
	s := status.Mail{Queued: r.Queued, LastSent: r.LastSent, LastError: r.LastError, Updated: m.written.Updated}
	if reflect.DeepEqual(s, m.written) && now.Sub(m.written.Updated).Abs() < rewriteInterval {
		return
	}
	s.Updated = now
	if err := status.Write(m.env.Paths.Status(part.Mail), s); err != nil {
		m.env.Log.Error("status", "err", err)
		return
	}
	m.written = s
}
