package clock

import (
	"math/rand/v2"
	"strings"
	"testing"
	"time"
)

var t0 = time.Date(2026, 11, 22, 8, 0, 0, 0, time.UTC)

func TestJudge(t *testing.T) {
	const day = 24 * time.Hour
	known := Knowledge{Time: t0}
	gained := Knowledge{Time: t0, Gained: 40 * time.Hour}
	for _, tt := range []struct {
		name string
		k    Knowledge
		t    time.Time
		set  bool
		jump string // a part of it
		next Knowledge
	}{
		{"first start", Knowledge{}, t0, true, "", Knowledge{Time: t0}},
		{"first start, sources in 1970", Knowledge{}, time.Unix(0, 0), false, "before this software existed", Knowledge{}},
		{"a power cut of an hour", known, t0.Add(time.Hour), true, "", Knowledge{Time: t0.Add(time.Hour), Gained: time.Hour}},
		{"off for 48 h", known, t0.Add(48 * time.Hour), true, "", Knowledge{Time: t0.Add(48 * time.Hour), Gained: 48 * time.Hour}},
		{"off for longer", known, t0.Add(48*time.Hour + 1), true, "48h0m0s", known},
		{"off for a month", known, t0.Add(30 * day), true, "30 days after the last known time", known},
		{"thrown years ahead", known, t0.Add(3 * 365 * day), false, "1095 days after", known},
		{"a second small lie", gained, t0.Add(9 * time.Hour), true, "set, not trusted", gained},
		{"the truth after a small lie", gained, t0.Add(-39 * time.Hour), true, "", Knowledge{Time: t0.Add(-39 * time.Hour), Gained: time.Hour}},
		{"oscillator ran fast", Knowledge{Time: t0, Unsynced: 10 * day}, t0.Add(-6 * time.Minute), true, "", Knowledge{Time: t0.Add(-6 * time.Minute)}},
		{"oscillator never that fast", Knowledge{Time: t0, Unsynced: 10 * day}, t0.Add(-8 * time.Minute), false, "before the last known time", Knowledge{Time: t0, Unsynced: 10 * day}},
		{"a little back", known, t0.Add(-4 * time.Second), true, "", Knowledge{Time: t0.Add(-4 * time.Second)}},
		{"back in time", known, t0.Add(-5 * day), false, "5 days before", known},
		{"1970", known, time.Unix(0, 0), false, "before the last known time", known},
	} {
		t.Run(tt.name, func(t *testing.T) {
			v := Judge(tt.k, tt.t)
			if v.Set != tt.set || (v.Jump == "") != (tt.jump == "") || !strings.Contains(v.Jump, tt.jump) {
				t.Errorf("set %v, jump %q; want %v, %q", v.Set, v.Jump, tt.set, tt.jump)
			}
			if v.Next != tt.next {
				t.Errorf("next %+v; want %+v", v.Next, tt.next)
			}
		})
	}
}

// However often the sources lie, they cannot turn the clock faster than the
// rule says, and never below what is certain.
func TestLiesAreBounded(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		k := Knowledge{Time: t0}
		var lived time.Duration
		for range 500 {
			d := time.Duration(random.Int64N(int64(6 * time.Hour)))
			lived += d
			k = k.After(d)
			floor := k.Floor()
			lie := time.Duration(random.Int64N(int64(200*time.Hour))) - 20*time.Hour
			v := Judge(k, t0.Add(lived+lie))
			if v.Set && t0.Add(lived+lie).Before(floor) {
				t.Fatalf("set below the floor %v", floor)
			}
			k = v.Next
			if ahead := k.Time.Sub(t0.Add(lived)); ahead > MaxGain+lived/refund+time.Second {
				t.Fatalf("%v ahead after %v", ahead, lived)
			}
			if k.Gained < 0 || k.Gained > MaxGain {
				t.Fatalf("gained %v", k.Gained)
			}
		}
	}
}

func TestGuess(t *testing.T) {
	k := Knowledge{Time: t0}.Guess(SaveInterval)
	if k.Time != t0.Add(SaveInterval) || Judge(k, t0.Add(time.Minute)).Jump != "" {
		t.Errorf("a guess cannot be taken back: %+v", k)
	}
	if k := (Knowledge{}).Guess(SaveInterval); !k.Time.IsZero() {
		t.Errorf("a guess out of nothing: %+v", k)
	}
}
