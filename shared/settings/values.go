package settings

import (
	"fmt"
	"net"
	"net/mail"
	"regexp"
	"strconv"
	"strings"
	"time"

	"farkeep/shared/history"
)

var (
	namePattern     = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]{0,62}$`)
	luksUUIDPattern = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)
)

// IsName reports whether s may name a site, a machine, a key server or a key:
// small letters, digits, dots and dashes, 63 at most, so that it may be a host
// name and a file name too.
func IsName(s string) bool { return namePattern.MatchString(s) }

// IsLUKSUUID reports whether s is a LUKS UUID as cryptsetup luksUUID prints it.
func IsLUKSUUID(s string) bool { return luksUUIDPattern.MatchString(s) }

// IsHostPort reports whether s is host:port with a port from 1 to 65535.
func IsHostPort(s string) bool {
	host, port, err := net.SplitHostPort(s)
	if err != nil || host == "" || len(s) > 260 {
		return false
	}
	p, err := strconv.Atoi(port)
	return err == nil && p >= 1 && p <= 65535
}

// IsMailAddress reports whether s is one bare address, without a display name.
func IsMailAddress(s string) bool {
	const most = 320 // a local part of 64, "@", a domain of 255 (RFC 5321 §4.5.3.1)
	if len(s) > most {
		return false
	}
	parsed, err := mail.ParseAddress(s)
	return err == nil && parsed.Address == s
}

// Mistake returns the key of r that makes no sense and why, or "" and "".
func (r Relay) Mistake() (key, text string) {
	switch {
	case r.Driver != "none" && r.Driver != "gpio":
		return "driver", fmt.Sprintf("%q is neither gpio nor none", r.Driver)
	case r.Active != "high" && r.Active != "low":
		return "active", fmt.Sprintf("%q is neither high nor low", r.Active)
	case r.Line < 0 || r.Line > 57:
		return "line", fmt.Sprintf("%d is not a GPIO line (0 to 57)", r.Line)
	case len(r.Chip) > 64:
		return "chip", "the label of a GPIO chip has at most 64 characters"
	}
	return "", ""
}

// Mistake returns the key of w that makes no sense and why, or "" and "".
func (w Window) Mistake() (key, text string) {
	if w.Length.Std() > 24*time.Hour {
		return "length", fmt.Sprintf("%v is longer than a day", w.Length)
	}
	return "", ""
}

// Mistake returns the key of d that makes no sense and why, or "" and "".
func (d DeadMan) Mistake() (key, text string) {
	for _, span := range []struct {
		key   string
		value Duration
	}{
		{"heartbeat_age", d.HeartbeatAge}, {"reminder_interval", d.ReminderInterval},
		{"unreachable_after", d.UnreachableAfter}, {"check_interval", d.CheckInterval},
	} {
		if span.value.Std() < time.Second {
			return span.key, fmt.Sprintf("%v is shorter than 1s", span.value)
		}
	}
	if d.DiskFullPercent < 1 || d.DiskFullPercent > 100 {
		return "disk_full_percent", fmt.Sprintf("%d is not between 1 and 100", d.DiskFullPercent)
	}
	return "", ""
}

// IsRepository reports whether s may name a repository: it becomes a folder on
// the appliance's disk.
func IsRepository(s string) bool {
	return !strings.HasSuffix(s, "*") && history.IsPattern(s)
}
