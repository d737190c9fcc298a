package server

import (
	"fmt"
	"slices"
	"strings"

	"farkeep/keyserver/alert"
	"farkeep/keyserver/audit"
	"farkeep/keyserver/policy"
	"farkeep/shared/keywire"
	"farkeep/shared/site"
)

// alarm raises what a person should know of one request. What it depends on is in
// the state before and after, so that the same is not said each time.
func (s *Server) alarm(a site.Appliance, r keywire.Request, o *outcome, record audit.Record, err error) {
	raise := func(kind, reason string) {
		s.c.Alert(alert.Event{
			Kind: kind, Appliance: a.Name, Disk: a.LUKS, From: record.Remote, Place: o.place.String(),
			Decision: fmt.Sprintf("%s %s", r.Verb, record.Decision), Reason: reason, At: s.c.Now(),
		})
	}
	if err != nil {
		raise(alert.StateUnreadable, err.Error())
		return
	}
	if d := o.decision; d.Unexpected {
		why := d.Reason
		if len(d.Asks) > 1 {
			why = strings.Join(d.Asks, "; ")
		}
		raise(kindOf(d), why)
	}
	for _, alarm := range o.decision.Alarms {
		c := r.Claims
		switch alarm {
		case policy.AlarmHeader:
			raise(alert.HeaderChanged, fmt.Sprintf("%s: live %.16s..., backed up %.16s...", alarm, c.Header, a.LUKSHeader))
		case policy.AlarmDamage:
			raise(alert.HeaderDamaged, alarm+": the "+c.Damage+" one")
		case policy.AlarmSlots:
			raise(alert.Slots, fmt.Sprintf("%s: %d", alarm, c.Slots))
		}
	}
	if why := s.bundleStale(a, r, o); why != "" {
		raise(alert.BundleStale, why)
	}
	if o.before.Told.IsZero() && !o.after.Told.IsZero() {
		raise(alert.RevokedTold, o.after.Standing.Reason)
	}
	if o.before.Dark.IsZero() && !o.after.Dark.IsZero() {
		raise(alert.Dark, "the appliance says so")
	}
}

// bundleStale says why the recovery bundle that site.toml names does not open the
// disk as it is now, once for each header that the disk turns out to have. A header
// that is not the backed-up one either is told of as such, and says this too.
func (s *Server) bundleStale(a site.Appliance, r keywire.Request, o *outcome) string {
	live := r.Claims.Header
	if live == "" || live == o.before.Header.Digest || s.c.Site.Bundle.Created.IsZero() || slices.Contains(o.decision.Alarms, policy.AlarmHeader) {
		return ""
	}
	return s.c.Site.Bundle.Stale(a.LUKS, live)
}

// kindOf is the kind of mail for a decision that was not expected.
func kindOf(d policy.Decision) string {
	switch {
	case d.Reason == policy.AskToken:
		return alert.TokenMismatch
	case d.Reason == policy.AskFlapping:
		return alert.Flapping
	case d.Verdict == policy.Later:
		return alert.PlaceUnknownLasting
	case d.Verdict == policy.Hold:
		return alert.Held
	case d.Verdict == policy.Grant:
		return alert.GrantedUnexpected
	default:
		return alert.RefusedUnexpected
	}
}
