package site

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"farkeep/shared/settings"
)

// KeyPolicy is the standing rule by which key servers give an appliance its
// key. That an appliance is revoked, expected elsewhere or approved is no rule
// but an event: each key server keeps it in its own state.
type KeyPolicy struct {
	Source     string            `toml:"source"`       // "any" (default), or "vpn": from the appliance's VPN address only
	KeysPerDay int               `toml:"keys_per_day"` // in any 24 hours; default 48
	Approval   string            `toml:"approval"`     // ApprovalAfterAbsence (default), ApprovalNever, ApprovalAlways
	Absence    settings.Duration `toml:"absence"`      // a longer silence asks for approval; default 96h
	Windows    []Hours           `toml:"windows"`      // when keys are expected; none: at any time
	Token      string            `toml:"token"`        // TokenRequired (default), TokenIgnored
	Lease      settings.Duration `toml:"lease"`        // default 24h
	Place      string            `toml:"place"`        // PlaceNone (default), PlaceWireGuard, PlaceTailscale
}

// Values of KeyPolicy.Approval: when a person is asked.
const (
	ApprovalAfterAbsence = "after-absence" // for whatever is not as it was
	ApprovalNever        = "never"         // what is not as it was is granted, and mailed
	ApprovalAlways       = "always"        // for every key
)

// Values of KeyPolicy.Token.
const (
	TokenRequired = "required"
	TokenIgnored  = "ignored" // for plain systems that keep no state
)

// Values of KeyPolicy.Place: what says where the appliance is.
const (
	PlaceNone      = "none"
	PlaceWireGuard = "wireguard"
	PlaceTailscale = "tailscale"
	// PlaceOthers is a value of KeyServer.Place only.
	PlaceOthers = "others"
)

// Limits of a key policy.
const (
	maxKeysPerDay = 1440
	maxWindows    = 16
	minAbsence    = time.Hour
	maxAbsence    = 400 * 24 * time.Hour
	minLease      = time.Minute
	maxLease      = 30 * 24 * time.Hour
)

// headerPattern is a fingerprint of a LUKS header (luksheader).
var headerPattern = regexp.MustCompile(`^[0-9a-f]{64}$`)

func (p *KeyPolicy) setDefaults() {
	setDefault(&p.Source, "any")
	setDefault(&p.KeysPerDay, 48)
	setDefault(&p.Approval, ApprovalAfterAbsence)
	setDefault(&p.Absence, settings.Duration(96*time.Hour))
	setDefault(&p.Token, TokenRequired)
	setDefault(&p.Lease, settings.Duration(24*time.Hour))
	setDefault(&p.Place, PlaceNone)
}

// mistake returns the key of p that makes no sense for a and why, or "" and "".
func (p KeyPolicy) mistake(a Appliance) (key, text string) {
	oneOf := func(value string, allowed ...string) string {
		if slices.Contains(allowed, value) {
			return ""
		}
		return fmt.Sprintf("%q is none of %s", value, strings.Join(allowed, ", "))
	}
	between := func(d settings.Duration, least, most time.Duration) string {
		if d.Std() >= least && d.Std() <= most {
			return ""
		}
		return fmt.Sprintf("%v is not between %v and %v", d, settings.Duration(least), settings.Duration(most).Days())
	}
	for _, c := range []struct{ key, text string }{
		{"source", oneOf(p.Source, "any", "vpn")},
		{"approval", oneOf(p.Approval, ApprovalNever, ApprovalAfterAbsence, ApprovalAlways)},
		{"absence", between(p.Absence, minAbsence, maxAbsence)},
		{"token", oneOf(p.Token, TokenRequired, TokenIgnored)},
		{"lease", between(p.Lease, minLease, maxLease)},
		{"place", oneOf(p.Place, PlaceNone, PlaceWireGuard, PlaceTailscale)},
	} {
		if c.text != "" {
			return c.key, c.text
		}
	}
	switch {
	case p.KeysPerDay < 1 || p.KeysPerDay > maxKeysPerDay:
		return "keys_per_day", fmt.Sprintf("%d is not between 1 and %d", p.KeysPerDay, maxKeysPerDay)
	case p.Source == "vpn" && !a.VPNAddress.IsValid():
		return "source", "the appliance has no vpn_address to compare with"
	case len(p.Windows) > maxWindows:
		return "windows", fmt.Sprintf("%d are more than %d", len(p.Windows), maxWindows)
	}
	return "", ""
}

// WindowList is Windows as they are written.
func (p KeyPolicy) WindowList() []string {
	list := []string{}
	for _, h := range p.Windows {
		list = append(list, h.String())
	}
	return list
}

// Expects reports whether a key may be asked for at t: always, if there are no windows.
func (p KeyPolicy) Expects(t time.Time) bool {
	return len(p.Windows) == 0 || slices.ContainsFunc(p.Windows, func(h Hours) bool { return h.Contain(t) })
}

// Hours is a stretch of every day, UTC, written "22:00-06:00". Its end is outside;
// an end before the start is on the next day.
type Hours struct{ From, To settings.ClockTime }

// Contain reports whether t lies in h.
func (h Hours) Contain(t time.Time) bool {
	t = t.UTC()
	at := settings.ClockTime(time.Duration(t.Hour())*time.Hour + time.Duration(t.Minute())*time.Minute + time.Duration(t.Second())*time.Second)
	if h.From < h.To {
		return h.From <= at && at < h.To
	}
	return h.From <= at || at < h.To
}

// String writes h the way UnmarshalText reads it.
func (h Hours) String() string { return h.From.String() + "-" + h.To.String() }

// MarshalText implements encoding.TextMarshaler.
func (h Hours) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (h *Hours) UnmarshalText(text []byte) error {
	from, to, found := strings.Cut(string(text), "-")
	var read Hours
	if !found || read.From.UnmarshalText([]byte(from)) != nil || read.To.UnmarshalText([]byte(to)) != nil || read.From == read.To || read.String() != string(text) {
		return fmt.Errorf("%q is not a stretch of the day: write for instance 22:00-06:00 (UTC)", text)
	}
	*h = read
	return nil
}
