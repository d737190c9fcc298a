package diskuse_test

import (
	"math"
	"strings"
	"testing"

	"farkeep/image/diskuse"
	"farkeep/shared/retention"

	"github.com/google/go-cmp/cmp"
)

// sample: 100 bytes stay, 50 are replaced by 60 in the second night and by 70 in
// the fourth; the third brings nothing.
const sample = "+0:100 +1:50\n+2:60 -1\n\n+3:70 -2\n"

func TestSimulate(t *testing.T) {
	r, err := diskuse.Parse(sample)
	if err != nil {
		t.Fatal(err)
	}
	last := func(n int) retention.Rules {
		return retention.Rules{Policy: retention.Policy{Daily: n}, PerDay: 9}
	}
	for _, tt := range []struct {
		name  string
		rules retention.Rules
		want  []diskuse.Night
	}{
		{"all", last(-1), []diskuse.Night{{150, 150, 150, 1}, {160, 210, 60, 2}, {160, 210, 0, 3}, {170, 280, 70, 4}}},
		{"the last", last(1), []diskuse.Night{{150, 150, 150, 1}, {160, 160, 60, 1}, {160, 160, 0, 1}, {170, 170, 70, 1}}},
		{"the last two", last(2), []diskuse.Night{{150, 150, 150, 1}, {160, 210, 60, 2}, {160, 160, 0, 2}, {170, 230, 70, 2}}},
		{"nothing goes", retention.Rules{}, []diskuse.Night{{150, 150, 150, 1}, {160, 210, 60, 2}, {160, 210, 0, 3}, {170, 280, 70, 4}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if d := cmp.Diff(tt.want, r.Simulate(tt.rules)); d != "" {
				t.Errorf("-want +got:\n%s", d)
			}
		})
	}
	got := diskuse.Sum(r.Simulate(last(-1)))
	want := diskuse.Use{Least: 210.0 / 160, Average: (210.0/160 + 280.0/170) / 2, Peak: 280.0 / 170, WorstDay: 70.0 / 170, Generations: 4}
	if d := cmp.Diff(want, got, cmp.Comparer(func(a, b float64) bool { return math.Abs(a-b) < 1e-9 })); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	if got := diskuse.Sum(nil); got != (diskuse.Use{}) {
		t.Errorf("of no nights: %+v", got)
	}
}

func TestRecordingReadsBack(t *testing.T) {
	r, err := diskuse.Parse(sample)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	if err := r.Write(&b); err != nil || b.String() != sample {
		t.Errorf("%q, %v; want %q", b.String(), err, sample)
	}
	for name, text := range map[string]string{
		"no number": "+x:1", "no sign": "0:1", "a sign alone": "+", "no size": "+0", "no size after the colon": "+0:", "a negative size": "+0:-1",
		"a size that went": "+0:1\n-0:1", "came twice": "+0:1 +0:1", "went before it came": "-0", "went twice": "+0:1\n-0\n-0", "a negative name": "+-1:1",
	} {
		if _, err := diskuse.Parse(text); err == nil {
			t.Errorf("%s: %q was read", name, text)
		}
	}
}

// TestEstimate: more history wants a larger disk, and never less than the
// repository and its growth.
func TestEstimate(t *testing.T) {
	before := diskuse.Growth
	for _, p := range []retention.Policy{{}, {Daily: 30}, {Daily: 90}, {Daily: -1}} {
		e, err := diskuse.For(rules(p))
		if err != nil {
			t.Fatal(err)
		}
		if e.Factor() <= before || e.WorstDay <= 0 || e.Factor() != (e.Peak+e.WorstDay)*diskuse.Growth {
			t.Errorf("%+v: factor %.2f after %.2f", p, e.Factor(), before)
		}
		before = e.Factor()
	}
}
