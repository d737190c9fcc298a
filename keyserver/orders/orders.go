// Package orders carries out what a person decides about an appliance, at this
// terminal or at that of another key server: it changes the state and puts the
// decision on record.
//
// What closes is done first and written second, so that a full disk or a crash
// in between leaves the thief with nothing. What opens is written first: nothing
// opens without a record. A crash in between leaves an order on record that was
// not carried out; giving it again does both.
package orders

import (
	"errors"
	"fmt"
	"time"

	"farkeep/keyserver/audit"
	"farkeep/keyserver/moment"
	"farkeep/keyserver/policy"
)

// Events of orders in the audit log.
const (
	EventRevoke  = "revoke"
	EventAllow   = "allow"
	EventApprove = "approve"
	EventDeny    = "deny"
	EventExpect  = "expect"
	EventVoid    = "void"
)

// Book is where orders are carried out. All fields are needed.
type Book struct {
	Dir    string // the state folder
	Policy *policy.Store
	Audit  *audit.Log
	Now    func() (moment.Moment, error)
}

// Order says about whom, by whom and why.
type Order struct {
	Appliance string // a name of the site
	By        string // who typed it
	Why       string
	// From is the key server at which it was typed; "" for this one.
	From string
}

// Revoke gives the appliance nothing any more. known is whether it was revoked
// already; then the first reason stays, and nothing is written twice. When the
// error is an *Unrecorded, the appliance is revoked all the same. After any other
// error the order is on record if it could be, and Adopt carries it out.
func (b *Book) Revoke(o Order) (known bool, err error) {
	now, err := b.Now()
	if err != nil {
		return false, fmt.Errorf("revoke %s: %w", o.Appliance, err)
	}
	err = b.Policy.Update(o.Appliance, func(s policy.State) (policy.State, error) {
		if known = s.Standing.State == policy.Revoked; known {
			return s, nil
		}
		return policy.Revoke(s, o.By, o.Why, now)
	})
	if err != nil {
		// On record all the same: it then counts as soon as the state can be
		// written, and until then an appliance whose state cannot be read gets nothing.
		return false, errors.Join(fmt.Errorf("revoke %s: %w", o.Appliance, err), b.record(EventRevoke, o, o.Why))
	}
	if known {
		// The record may be what a crash cost the first time.
		last, err := LastOrders(b.Dir)
		if err == nil && last[o.Appliance] == EventRevoke {
			return true, nil
		}
	}
	if err := b.record(EventRevoke, o, o.Why); err != nil {
		return known, &Unrecorded{o.Appliance, err}
	}
	return known, nil
}

// Unrecorded means that an order was carried out and could not be written down.
type Unrecorded struct {
	Appliance string
	Err       error
}

func (e *Unrecorded) Error() string {
	return fmt.Sprintf("%s is revoked, but not on record: %v", e.Appliance, e.Err)
}

func (e *Unrecorded) Unwrap() error { return e.Err }

// Allow enables the appliance again. Its next request is judged like any other.
func (b *Book) Allow(o Order) error {
	return b.open(EventAllow, o, o.Why, func(s policy.State, now moment.Moment) (policy.State, error) {
		return policy.Allow(s, o.By, o.Why, now)
	})
}

// Approve lets one request through that is like the waiting one with that id; ""
// stands for the only one.
func (b *Book) Approve(o Order, id string) error {
	return b.open(EventApprove, o, named(id, o.Why), func(s policy.State, now moment.Moment) (policy.State, error) {
		return policy.Approve(s, id, o.By, o.Why, now)
	})
}

// Expect lets one move through beforehand.
func (b *Book) Expect(o Order, until time.Time) error {
	why := "until " + until.UTC().Format(time.RFC3339) + ": " + o.Why
	return b.open(EventExpect, o, why, func(s policy.State, now moment.Moment) (policy.State, error) {
		return policy.Expect(s, until, o.By, o.Why, now)
	})
}

// Deny drops the waiting request with that id; "" stands for the only one.
func (b *Book) Deny(o Order, id string) error {
	err := b.Policy.Update(o.Appliance, func(s policy.State) (policy.State, error) {
		return policy.Deny(s, id, o.By, o.Why)
	})
	if err != nil {
		return fmt.Errorf("deny a request of %s: %w", o.Appliance, err)
	}
	if err := b.record(EventDeny, o, named(id, o.Why)); err != nil {
		return fmt.Errorf("the request is denied, but not on record: %w", err)
	}
	return nil
}

func named(id, why string) string {
	if id == "" {
		return why
	}
	return id + ": " + why
}

// open carries out an order that opens something: change says whether it can be,
// then it goes on record, then it counts.
func (b *Book) open(event string, o Order, why string, change func(policy.State, moment.Moment) (policy.State, error)) error {
	now, err := b.Now()
	if err != nil {
		return fmt.Errorf("%s %s: %w", event, o.Appliance, err)
	}
	err = b.Policy.Update(o.Appliance, func(s policy.State) (policy.State, error) {
		s, err := change(s, now)
		if err != nil {
			return s, err
		}
		return s, b.record(event, o, why)
	})
	if err != nil {
		return fmt.Errorf("%s %s: %w", event, o.Appliance, err)
	}
	return nil
}

func (b *Book) record(event string, o Order, why string) error {
	by := o.By
	if o.From != "" {
		by += " at " + o.From
	}
	_, err := b.Audit.Append(audit.Record{Event: event, Decision: "done", Appliance: o.Appliance, Reason: why, By: by})
	return err
}

// LastOrders reads from the audit log in dir what was last ordered about each
// appliance: EventRevoke or EventAllow.
func LastOrders(dir string) (map[string]string, error) {
	last := map[string]string{}
	err := audit.Read(dir, func(_ []byte, r audit.Record) error {
		if r.Decision == "done" && (r.Event == EventRevoke || r.Event == EventAllow) {
			last[r.Appliance] = r.Event
		}
		return nil
	})
	return last, err
}

// Adopt makes sure that the appliance has a standing: one that was never heard
// of is enabled, and one whose last order in the audit log was a revocation is
// revoked, whatever its file says: the file was lost, or came back from an old
// copy. last is what LastOrders says. It reports whether it had to revoke.
func (b *Book) Adopt(name, last string) (again bool, err error) {
	s, err := b.Policy.Read(name)
	if err != nil {
		return false, err
	}
	switch {
	case s.Standing.State == policy.Revoked:
		return false, nil
	case last == EventRevoke:
		now, err := b.Now()
		if err != nil {
			return false, err
		}
		return true, b.Policy.Update(name, func(s policy.State) (policy.State, error) {
			return policy.Revoke(s, "farkeep-keyserver", "the audit log's last order", now)
		})
	case s.Standing.State == policy.Enabled:
		return false, nil
	}
	return false, b.Allow(Order{Appliance: name, By: "farkeep-keyserver", Why: "new in site.toml"})
}
