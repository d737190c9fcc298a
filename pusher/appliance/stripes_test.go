package appliance

import (
	"testing"
	"time"
)

func TestStripes(t *testing.T) {
	const ms, mib = time.Millisecond, 1 << 20
	for _, test := range []struct {
		roundTrip time.Duration
		bytes     int64
		want      int
		ahead     int
	}{
		{0, 1 << 40, 0, 0}, // not known
		{ms, 1 << 40, 0, 0},
		{40 * ms, 0, 0, 0},
		{40 * ms, 2 * mib, 0, 0},
		{40 * ms, 2*mib + 1, 1, 1},
		{40 * ms, 6 * mib, 2, 2},
		{40 * ms, 10_000_000, 4, 4},
		{40 * ms, 10 * mib, 4, 4},
		{40 * ms, 10*mib + 1, 2, 4},
		{10 * ms, 1 << 62, 2, 4},
	} {
		if got := stripes(test.roundTrip, test.bytes); got != test.want {
			t.Errorf("%d bytes over %v: %d stripes, want %d", test.bytes, test.roundTrip, got, test.want)
		}
		if got := stripesAhead(test.roundTrip, test.bytes); got != test.ahead {
			t.Errorf("%d bytes over %v: %d stripes ahead, want %d", test.bytes, test.roundTrip, got, test.ahead)
		}
	}
}
