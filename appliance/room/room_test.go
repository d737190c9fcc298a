package room_test

import (
	"math"
	"math/rand/v2"
	"testing"
	"time"

	"farkeep/appliance/room"
	"farkeep/appliance/status"

	"github.com/google/go-cmp/cmp"
)

const (
	day = 24 * time.Hour
	gb  = 1_000_000_000
)

var now = time.Date(2026, time.June, 15, 4, 0, 0, 0, time.UTC)

// days makes samples, the last one yesterday, from what each day added and gave
// back; free at the end is what Forecast is told.
func days(free int64, change func(ago int) (added, expired int64), n int) []room.Sample {
	var samples []room.Sample
	for ago := 1; ago <= n; ago++ {
		added, expired := change(ago)
		free += added - expired // before it
		samples = append(samples, room.Sample{At: now.Add(-time.Duration(ago) * day), Free: free, New: added})
	}
	return samples
}

// first is samples in whose i-th a repository's first generation came.
func first(samples []room.Sample, i int, bytes int64) []room.Sample {
	samples[i].First = bytes
	for k := i + 1; k < len(samples); k++ { // earlier days
		samples[k].Free += bytes
	}
	return samples
}

func TestForecast(t *testing.T) {
	steady := func(int) (int64, int64) { return 2 * gb, gb }
	in := func(d float64) time.Time { return now.Add(time.Duration(d * float64(day))) }
	tests := []struct {
		name          string
		samples       []room.Sample
		free, reserve int64
		want          status.Room
	}{
		{"nothing is known", nil, 100 * gb, 5 * gb,
			status.Room{Free: 100 * gb, Reserve: 5 * gb}},
		{"nothing is known and nothing is free", nil, 0, 5 * gb,
			status.Room{Reserve: 5 * gb, FullOn: now}},
		{"steady", days(100*gb, steady, 29), 100 * gb, 0,
			status.Room{Free: 100 * gb, Reserve: 2 * gb, WorstDay: 2 * gb, PerDay: gb, FullOn: in(98)}},
		{"a reserve that is larger than the worst day", days(100*gb, steady, 29), 100 * gb, 40 * gb,
			status.Room{Free: 100 * gb, Reserve: 40 * gb, WorstDay: 2 * gb, PerDay: gb, FullOn: in(60)}},
		{"full", days(2*gb, steady, 29), 2 * gb, 0,
			status.Room{Free: 2 * gb, Reserve: 2 * gb, WorstDay: 2 * gb, PerDay: gb, FullOn: now}},
		{"less than the reserve", days(gb, steady, 29), gb, 3 * gb,
			status.Room{Free: gb, Reserve: 3 * gb, WorstDay: 2 * gb, PerDay: gb, FullOn: now}},
		{"one large day is the worst, and counts",
			days(100*gb, func(ago int) (int64, int64) {
				if ago == 12 {
					return 40 * gb, 0
				}
				return 2 * gb, gb
			}, 29), 100 * gb, 0,
			status.Room{Free: 100 * gb, Reserve: 40 * gb, WorstDay: 40 * gb, PerDay: (27*gb + 40*gb) / 28, FullOn: in(60 * 28.0 / 67)}},
		{"a repository was retired",
			days(500*gb, func(ago int) (int64, int64) {
				if ago == 5 {
					return 2 * gb, 300 * gb
				}
				return 2 * gb, gb
			}, 29), 500 * gb, 0,
			status.Room{Free: 500 * gb, Reserve: 2 * gb, WorstDay: 2 * gb, PerDay: gb, FullOn: in(498)}},
		{"a second repository was filled for the first time",
			first(days(100*gb, steady, 29), 7, 250*gb), 100 * gb, 0,
			status.Room{Free: 100 * gb, Reserve: 2 * gb, WorstDay: 2 * gb, PerDay: gb, FullOn: in(98)}},
		{"as much expires as comes", days(100*gb, func(int) (int64, int64) { return gb, gb }, 29), 100 * gb, 0,
			status.Room{Free: 100 * gb, Reserve: gb, WorstDay: gb}},
		{"it is emptying", days(100*gb, func(int) (int64, int64) { return gb, 2 * gb }, 29), 100 * gb, 0,
			status.Room{Free: 100 * gb, Reserve: gb, WorstDay: gb, PerDay: -gb}},
		{"the first days go by what was added", days(100*gb, steady, 3), 100 * gb, 0,
			status.Room{Free: 100 * gb, Reserve: 2 * gb, WorstDay: 2 * gb, PerDay: 6 * gb / 4, FullOn: in(98 / 1.5)}},
		{"not within ten years", days(40_000*gb, steady, 29), 40_000 * gb, 0,
			status.Room{Free: 40_000 * gb, Reserve: 2 * gb, WorstDay: 2 * gb, PerDay: gb}},
		{"what is long ago does not count", days(100*gb, func(ago int) (int64, int64) {
			if ago > 30 {
				return 90 * gb, 0
			}
			return 2 * gb, gb
		}, 60), 100 * gb, 0,
			status.Room{Free: 100 * gb, Reserve: 2 * gb, WorstDay: 2 * gb, PerDay: gb, FullOn: in(98)}},
		{"what is still to come does not count",
			append(days(100*gb, steady, 29), room.Sample{At: now.Add(day), Free: 0, New: 90 * gb}), 100 * gb, 0,
			status.Room{Free: 100 * gb, Reserve: 2 * gb, WorstDay: 2 * gb, PerDay: gb, FullOn: in(98)}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := room.Forecast(now, tt.samples, tt.free, tt.reserve)
			close := cmp.Comparer(func(a, b time.Time) bool { return a.IsZero() == b.IsZero() && a.Sub(b).Abs() < time.Minute })
			if d := cmp.Diff(tt.want, got, close); d != "" {
				t.Errorf("-want +got:\n%s", d)
			}
		})
	}
}

// TestForecastComesTrue lets a disk fill up by random days of one mean, and asks
// each day: from the third week on the date is off by 5 days and two fifths of
// what is left at most, for these households.
func TestForecastComesTrue(t *testing.T) {
	for seed := range uint64(30) {
		random := rand.New(rand.NewPCG(seed, 0))
		const start, reserve = 400 * gb, 20 * gb
		var free []int64
		var samples []room.Sample
		for left := int64(start); left > reserve; {
			added := int64(random.IntN(8 * gb))
			left -= added
			samples = append(samples, room.Sample{At: now.Add(time.Duration(len(samples)) * day), Free: left, New: added})
			free = append(free, left)
		}
		full := len(samples) - 1
		for d := 21; d < full; d++ {
			got := room.Forecast(samples[d].At, samples[:d+1], free[d], reserve)
			foretold := got.FullOn.Sub(now).Hours() / 24
			if math.Abs(foretold-float64(full)) > 5+0.4*float64(full-d) {
				t.Errorf("seed %d: on day %d it is foretold for day %.0f; it came on day %d", seed, d, foretold, full)
			}
		}
	}
}

// FuzzForecast: no numbers make it panic, or foretell the past.
func FuzzForecast(f *testing.F) {
	f.Add(int64(0), int64(0), int64(0), int64(0), uint8(0))
	f.Add(int64(100*gb), int64(gb), int64(math.MaxInt64), int64(math.MinInt64), uint8(200))
	f.Add(int64(math.MaxInt64), int64(-1), int64(5), int64(3), uint8(40))
	f.Fuzz(func(t *testing.T, free, reserve, a, b int64, n uint8) {
		var samples []room.Sample
		random := rand.New(rand.NewPCG(uint64(a), uint64(b)))
		for range n {
			samples = append(samples, room.Sample{At: now.Add(-time.Duration(random.IntN(80)-3) * 13 * time.Hour), Free: a * random.Int64N(7), New: b / (1 + random.Int64N(9))})
		}
		free, reserve = max(0, free), max(0, reserve)
		got := room.Forecast(now, samples, free, reserve)
		if !got.FullOn.IsZero() && (got.FullOn.Before(now) || got.FullOn.After(now.AddDate(10, 0, 1))) {
			t.Errorf("full on %v", got.FullOn)
		}
		if got.Reserve < reserve || got.Reserve < got.WorstDay {
			t.Errorf("a reserve of %d for a worst day of %d", got.Reserve, got.WorstDay)
		}
		if got.FullOn.IsZero() && free <= got.Reserve {
			t.Errorf("full, and no date: %+v", got)
		}
	})
}
