// Package span is the time span of Farkeep's configuration files: Go's own
// notation and days.
package span

import (
	"fmt"
	"strings"
	"time"
)

// Duration is a time span written as Go does ("30h", "15m"), and in days ("8d").
type Duration time.Duration

// Std returns d as a time.Duration.
func (d Duration) Std() time.Duration { return time.Duration(d) }

// String writes the span the way UnmarshalText reads it, and a person would: 30h, not 30h0m0s.
func (d Duration) String() string {
	s := time.Duration(d).String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// Days writes whole days as days, from two on ("10d"), and other spans as String does.
func (d Duration) Days() string {
	const day = Duration(24 * time.Hour)
	if d >= 2*day && d%day == 0 {
		return fmt.Sprintf("%dd", d/day)
	}
	return d.String()
}

// MarshalText implements encoding.TextMarshaler.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Duration) UnmarshalText(text []byte) error {
	s := string(text)
	if days, ok := strings.CutSuffix(s, "d"); ok {
		var n int
		if _, err := fmt.Sscanf(days, "%d", &n); err != nil || fmt.Sprint(n) != days || n < 0 || n > 36500 {
			return fmt.Errorf("%q is not a time span: write for instance 30h, 15m or 8d", s)
		}
		*d = Duration(time.Duration(n) * 24 * time.Hour)
		return nil
	}
	v, err := time.ParseDuration(s)
	if err != nil || v < 0 {
		return fmt.Errorf("%q is not a time span: write for instance 30h, 15m or 8d", s)
	}
	*d = Duration(v)
	return nil
}
