package span_test

import (
	"testing"
	"time"

	"farkeep/shared/span"
)

const day = 24 * time.Hour

func TestDays(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0s", day: "24h", 2 * day: "2d", 30 * day: "30d", 36 * time.Hour: "36h", 5 * time.Minute: "5m",
	} {
		got := span.Duration(d).Days()
		var back span.Duration
		if err := back.UnmarshalText([]byte(got)); err != nil || got != want || back.Std() != d {
			t.Errorf("%v is written %s and read back as %v, %v; want %s", d, got, back, err, want)
		}
	}
}

func TestDurationsReadBack(t *testing.T) {
	for text, want := range map[string]string{
		"30h": "30h", "90m": "1h30m", "8d": "192h", "1h0m5s": "1h0m5s", "10m": "10m", "0s": "0s", "1m30s": "1m30s", "250ms": "250ms", "100m0s": "1h40m",
	} {
		var d, again span.Duration
		if err := d.UnmarshalText([]byte(text)); err != nil || d.String() != want {
			t.Errorf("%s is written %s, %v; want %s", text, d, err, want)
		}
		if err := again.UnmarshalText([]byte(d.String())); err != nil || again != d {
			t.Errorf("%s is read back as %s, %v", d, again, err)
		}
	}
}

func TestWhatIsNoSpan(t *testing.T) {
	for _, text := range []string{"", "d", "1.5d", "-1d", "36501d", "1 d", "+1d", "01d", "30 hours", "-1h", "5", "1d12h"} {
		var d span.Duration
		if err := d.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q was read as %v", text, d)
		}
	}
}
