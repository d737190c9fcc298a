package push

import (
	"context"
	"math/rand/v2"
	"testing"
	"time"

	"farkeep/shared/site"
)

// A day that begins at noon, with three rates and some hours without, on a line of
// 10 MB/s: every hour has the bytes that its rate allows, to one per cent. Sleeps end
// late, by up to 80 ms, as they do on a busy machine.
func TestRateOfADay(t *testing.T) {
	const line = 10_000_000
	hours := func(text string) (h site.Hours) {
		if err := h.UnmarshalText([]byte(text)); err != nil {
			t.Fatal(err)
		}
		return h
	}
	p := site.Push{RateLimit: 1_250_000, Rates: []site.Rate{
		{Hours: hours("07:30-18:00"), RateLimit: 150_000},
		{Hours: hours("01:00-05:00"), RateLimit: 0},
		{Hours: hours("23:00-07:30"), RateLimit: 4_000_000},
	}}
	begun := time.Date(2026, 3, 4, 12, 0, 0, 0, time.UTC)
	h := &hands{now: begun}
	r := rand.New(rand.NewPCG(1, 2))
	var got [24]int64
	l := &limit{rate: p.RateAt, now: h.Now, due: begun, wait: func(_ context.Context, d time.Duration) error {
		h.move(d + time.Duration(r.Int64N(int64(80*time.Millisecond))))
		return nil
	}}
	w := &limited{t.Context(), writerFunc(func(b []byte) (int, error) {
		h.move(time.Duration(float64(len(b)) / line * float64(time.Second)))
		got[h.Now().Hour()] += int64(len(b))
		return len(b), nil
	}), l}
	buf := make([]byte, 256<<10)
	for h.Now().Before(begun.Add(24 * time.Hour)) {
		if _, err := w.Write(buf); err != nil {
			t.Fatal(err)
		}
	}
	for hour, n := range got {
		want := 0.0
		for minute := range 60 {
			rate := p.RateAt(time.Date(2026, 3, 5, hour, minute, 0, 0, time.UTC))
			if rate == 0 {
				rate = line
			}
			want += 60 * float64(rate)
		}
		if off := float64(n)/want - 1; off < -0.01 || off > 0.01 {
			t.Errorf("from %02d:00 to %02d:00 %d bytes went out, %+.1f %% of what the rate allows", hour, hour+1, n, 100*off)
		}
	}
}
