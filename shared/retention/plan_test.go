package retention_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"farkeep/shared/retention"

	"github.com/google/go-cmp/cmp"
)

// daily makes n items, one a day at noon, the last one today; now is an hour later.
func daily(n int) (now time.Time, items []retention.Item) {
	now = at("2026-06-15 13:00")
	for i := range n {
		items = append(items, retention.Item{Name: fmt.Sprintf("d%02d", n-1-i), Sequence: int64(i + 1), Committed: now.Add(-time.Hour - time.Duration(n-1-i)*day)})
	}
	return now, items
}

// kept maps what stays to why.
func kept(decisions []retention.Decision) map[string]string {
	m := map[string]string{}
	for _, d := range decisions {
		if d.Keep {
			m[d.Name] = d.Why
		}
	}
	return m
}

// TestFloor: what is not Borg's. Names are ages in days.
func TestFloor(t *testing.T) {
	two := retention.Policy{Daily: 2}
	tests := []struct {
		name   string
		rules  retention.Rules
		change func(items []retention.Item) []retention.Item
		want   map[string]string
	}{
		{"the zero value lets nothing go", retention.Rules{}, nil,
			map[string]string{"d05": "expire_per_day", "d04": "expire_per_day", "d03": "expire_per_day", "d02": "expire_per_day", "d01": "expire_per_day", "d00": "newest"}},
		{"policy alone", retention.Rules{Policy: two, PerDay: 99}, nil,
			map[string]string{"d01": "daily #2", "d00": "daily #1"}},
		{"at least four", retention.Rules{Policy: two, Floor: retention.Floor{Generations: 4}, PerDay: 99}, nil,
			map[string]string{"d03": "floor", "d02": "floor", "d01": "daily #2", "d00": "daily #1"}},
		{"nothing younger than three days", retention.Rules{Policy: two, Floor: retention.Floor{Age: 3 * day}, PerDay: 99}, nil,
			map[string]string{"d02": "floor", "d01": "daily #2", "d00": "daily #1"}},
		{"the floor is larger than the history", retention.Rules{Floor: retention.Floor{Generations: 99}, PerDay: 99}, nil,
			map[string]string{"d05": "floor", "d04": "floor", "d03": "floor", "d02": "floor", "d01": "floor", "d00": "newest"}},
		{"no policy and no floor", retention.Rules{PerDay: 99}, nil,
			map[string]string{"d00": "newest"}},
		{"two a day, the oldest first", retention.Rules{Policy: two, PerDay: 2}, nil,
			map[string]string{"d03": "expire_per_day", "d02": "expire_per_day", "d01": "daily #2", "d00": "daily #1"}},
		{"nothing a day", retention.Rules{Policy: two, PerDay: -1}, nil,
			map[string]string{"d05": "expire_per_day", "d04": "expire_per_day", "d03": "expire_per_day", "d02": "expire_per_day", "d01": "daily #2", "d00": "daily #1"}},
		{"a suspect one stays and takes nobody's place", retention.Rules{Policy: two, Floor: retention.Floor{Generations: 2}, PerDay: 99},
			func(i []retention.Item) []retention.Item {
				i[5].Kept, i[4].Kept = retention.KeptSuspect, retention.KeptSuspect
				return i
			},
			map[string]string{"d03": "daily #2", "d02": "daily #1", "d01": "suspect", "d00": "suspect"}},
		{"a pinned one stays, and is counted", retention.Rules{Policy: two, PerDay: 99},
			func(i []retention.Item) []retention.Item {
				i[0].Kept, i[5].Kept = "a reader", retention.KeptCurrent
				return i
			},
			map[string]string{"d05": "a reader", "d01": "daily #2", "d00": "current"}},
		{"a rejected one counts for nothing and goes after the floor's age", retention.Rules{Policy: two, Floor: retention.Floor{Generations: 2, Age: 50 * time.Hour}, PerDay: 99},
			func(i []retention.Item) []retention.Item {
				i[4].Rejected, i[3].Rejected, i[2].Rejected = true, true, true
				return i
			},
			map[string]string{"d04": "daily #2", "d02": "floor", "d01": "floor", "d00": "daily #1"}},
		{"the newest stays, rejected or not, and so does the newest good one", retention.Rules{PerDay: 99},
			func(i []retention.Item) []retention.Item { i[5].Rejected = true; return i },
			map[string]string{"d01": "newest", "d00": "newest"}},
		{"by an unknown age nothing is judged", retention.Rules{Policy: two, PerDay: 99},
			func(i []retention.Item) []retention.Item { i[2].Committed = time.Time{}; return i },
			map[string]string{"d03": "no commit time", "d01": "daily #2", "d00": "daily #1"}},
		{"a commit time from the future is young", retention.Rules{Floor: retention.Floor{Age: day}, PerDay: 99},
			func(i []retention.Item) []retention.Item { i[2].Committed = at("2027-01-01 00:00"); return i },
			map[string]string{"d03": "floor", "d00": "floor"}},
		{"numbers say which is newest, whatever the clock said", retention.Rules{Floor: retention.Floor{Generations: 1}, PerDay: 99},
			func(i []retention.Item) []retention.Item { i[5].Committed = at("2001-01-01 00:00"); return i },
			map[string]string{"d00": "newest"}},
		{"an order of any kind", retention.Rules{Policy: two, PerDay: 99},
			func(i []retention.Item) []retention.Item { slices.Reverse(i); i[0], i[3] = i[3], i[0]; return i },
			map[string]string{"d01": "daily #2", "d00": "daily #1"}},
		{"none", retention.Rules{Policy: two, PerDay: 99}, func([]retention.Item) []retention.Item { return nil }, map[string]string{}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			now, items := daily(6)
			if tt.change != nil {
				items = tt.change(items)
			}
			before := slices.Clone(items)
			got := retention.Plan(now, tt.rules, items)
			if d := cmp.Diff(tt.want, kept(got)); d != "" {
				t.Errorf("-want +got:\n%s", d)
			}
			if d := cmp.Diff(before, items); d != "" {
				t.Errorf("the question was changed:\n%s", d)
			}
			for i := range got {
				if got[i].Keep != (got[i].Goes.IsZero() || got[i].Goes.After(now)) || !got[i].Keep && !got[i].Goes.Equal(now) {
					t.Errorf("%+v: keep and goes contradict each other at %v", got[i], now)
				}
			}
		})
	}
}

// TestAYearOfTheDefault walks through a year and a half of daily commits under
// the default rules and says how many generations that leaves.
func TestAYearOfTheDefault(t *testing.T) {
	r := retention.Rules{
		Policy: retention.Policy{Within: 10 * day, Weekly: 4, Monthly: 12, Yearly: -1},
		Floor:  retention.Floor{Generations: 7, Age: 14 * day}, PerDay: 8,
	}
	start := at("2025-01-10 03:00")
	var items []retention.Item
	most := 0
	for d := range 540 {
		now := start.Add(time.Duration(d) * day)
		items = append(items, retention.Item{Name: now.Format("0102"), Sequence: int64(d + 1), Committed: now})
		items = without(items, retention.Plan(now, r, items))
		most = max(most, len(items))
	}
	// 15 of the floor's 14 days, 4 weeks behind the 10 days of "within", 12 months
	// that these do not show, and the years; some of them are one and the same.
	if len(items) < 28 || most > 36 {
		t.Errorf("%d generations at the end, %d at most", len(items), most)
	}
}

func without(items []retention.Item, decisions []retention.Decision) []retention.Item {
	gone := map[string]bool{}
	for _, d := range decisions {
		gone[d.Name] = !d.Keep
	}
	return slices.DeleteFunc(slices.Clone(items), func(i retention.Item) bool { return gone[i.Name] })
}

// TestGoesComesTrue runs the clock on, instant by instant, as a keeper would that
// gets nothing new, and compares with what Plan foretold.
func TestGoesComesTrue(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 1))
	later := 0
	for run := range 150 {
		start := at("2026-02-28 10:00")
		items := randomItems(random, start, 1+random.IntN(30))
		r := randomRules(random)
		for i := range items {
			disturb(random, &items[i])
		}
		foretold := map[string]time.Time{}
		for _, d := range retention.Plan(start, r, items) {
			foretold[d.Name] = d.Goes
			if d.Goes.After(start) {
				later++
			}
		}
		events := []time.Time{start}
		for _, i := range items {
			events = append(events, i.Committed.Add(r.Within), i.Committed.Add(r.Age))
		}
		came := map[string]time.Time{}
		var removed []time.Time
		for len(events) > 0 {
			slices.SortFunc(events, time.Time.Compare)
			now := events[0]
			events = events[1:]
			if now.Before(start) {
				continue
			}
			today := r
			for _, at := range removed {
				if at.Add(day).After(now) {
					today.PerDay--
				}
			}
			for _, d := range retention.Plan(now, today, items) {
				if !d.Keep {
					came[d.Name] = now
					removed = append(removed, now)
					events = append(events, now.Add(day))
				}
			}
			items = slices.DeleteFunc(items, func(i retention.Item) bool { _, gone := came[i.Name]; return gone })
		}
		for name, want := range foretold {
			if !came[name].Equal(want) {
				t.Fatalf("run %d, %+v: %s was to go %v and went %v", run, r, name, want, came[name])
			}
		}
	}
	if later == 0 {
		t.Error("nothing was foretold for later: the test shows nothing")
	}
}

func randomRules(random *rand.Rand) retention.Rules {
	return retention.Rules{
		Policy: randomPolicy(random),
		Floor:  retention.Floor{Generations: random.IntN(9), Age: time.Duration(random.IntN(20*24)) * time.Hour},
		PerDay: 1 + random.IntN(5),
	}
}

// disturb makes some items special.
func disturb(random *rand.Rand, i *retention.Item) {
	switch random.IntN(12) {
	case 0:
		i.Kept = retention.KeptSuspect
	case 1:
		i.Kept = "a reader"
	case 2:
		i.Rejected = true
	case 3:
		i.Committed = i.Committed.Add(time.Duration(random.IntN(1000)-500) * time.Hour) // the clock was wrong
	}
}

// FuzzPlan asserts what must hold for every question.
func FuzzPlan(f *testing.F) {
	f.Add(uint64(1), uint16(10), int64(0))
	f.Add(uint64(2), uint16(60), int64(5*365*24))
	f.Add(uint64(3), uint16(0), int64(-24))
	f.Add(uint64(4), uint16(63), int64(1<<20))
	f.Fuzz(func(t *testing.T, seed uint64, n uint16, hours int64) {
		random := rand.New(rand.NewPCG(seed, 2))
		start := at("2026-02-28 10:00")
		now := start.Add(time.Duration(hours%(1<<20)) * time.Hour) // a clock may say anything
		items := randomItems(random, start, int(n%64))
		r := randomRules(random)
		for i := range items {
			disturb(random, &items[i])
		}
		check(t, now, r, items)
	})
}

func TestPropertiesHold(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 2))
	for range 300 {
		start := at("2026-02-28 10:00")
		items := randomItems(random, start, random.IntN(80))
		for i := range items {
			disturb(random, &items[i])
		}
		check(t, start.Add(time.Duration(random.IntN(4000)-500)*time.Hour), randomRules(random), items)
	}
}

func check(t *testing.T, now time.Time, r retention.Rules, items []retention.Item) {
	t.Helper()
	decisions := retention.Plan(now, r, items)
	if d := cmp.Diff(decisions, retention.Plan(now, r, items)); d != "" {
		t.Fatalf("two answers to one question:\n%s", d)
	}
	if len(decisions) != len(items) {
		t.Fatalf("%d decisions about %d items", len(decisions), len(items))
	}
	byName := map[string]retention.Item{}
	newest := int64(0)
	good := 0
	for _, i := range items {
		byName[i.Name] = i
		newest = max(newest, i.Sequence)
		if !i.Rejected && i.Kept != retention.KeptSuspect {
			good++
		}
	}
	going, left := 0, 0
	var before retention.Item
	for k, d := range decisions {
		i := byName[d.Name]
		if k > 0 && i.Committed.Before(before.Committed) {
			t.Fatalf("%s comes after %s, and is older", i.Name, before.Name)
		}
		before = i
		if d.Keep && !i.Rejected && i.Kept != retention.KeptSuspect {
			left++
		}
		if d.Why == "" {
			t.Fatalf("no reason for %+v", d)
		}
		if d.Keep {
			continue
		}
		going++
		switch {
		case i.Kept != "":
			t.Fatalf("%+v is pinned (%s) and goes", i, i.Kept)
		case i.Sequence == newest:
			t.Fatalf("the newest goes: %+v", i)
		case now.Sub(i.Committed) < r.Age:
			t.Fatalf("%+v goes at %v, younger than %v", i, now, r.Age)
		}
	}
	if left < min(good, max(1, r.Floor.Generations)) {
		t.Fatalf("%d of %d good ones are left; the floor is %d", left, good, r.Floor.Generations)
	}
	if going > r.PerDay {
		t.Fatalf("%d go; at most %d may", going, r.PerDay)
	}
	// Planned again after the removal: with what is left of the day nothing, and
	// next day's share goes on where this one stopped, with the same in the end.
	rest := without(items, decisions)
	today := r
	today.PerDay -= going
	for _, d := range retention.Plan(now, today, rest) {
		if !d.Keep {
			t.Fatalf("%s goes in a second look at the same instant", d.Name)
		}
	}
	whole := r
	whole.PerDay = len(items) + 1
	atOnce := without(items, retention.Plan(now, whole, items))
	for before := -1; before != len(rest); {
		before = len(rest)
		rest = without(rest, retention.Plan(now, r, rest))
	}
	if d := cmp.Diff(atOnce, rest); d != "" {
		t.Fatalf("a part at a time leaves something else:\n-at once +in parts\n%s", d)
	}
	// Time alone brings nothing back: whatever goes now would go later as well.
	later := kept(retention.Plan(now.Add(1000*time.Hour), whole, items))
	for _, d := range retention.Plan(now, whole, items) {
		if _, stays := later[d.Name]; !d.Keep && stays {
			t.Fatalf("%s goes now and would stay later (%s)", d.Name, later[d.Name])
		}
	}
	// Making room eats no more than may go, and ends at the floor.
	thin := items
	for range items {
		name, ok := retention.Thin(now, r, thin)
		if !ok {
			break
		}
		i := byName[name]
		if i.Kept != "" || i.Sequence == newest || now.Sub(i.Committed) < r.Age {
			t.Fatalf("%+v was thinned out", i)
		}
		thin = slices.DeleteFunc(slices.Clone(thin), func(i retention.Item) bool { return i.Name == name })
	}
	left = 0
	for _, i := range thin {
		if !i.Rejected && i.Kept != retention.KeptSuspect {
			left++
		}
	}
	if left < min(good, max(1, r.Floor.Generations)) {
		t.Fatalf("thinning left %d of %d good ones; the floor is %d", left, good, r.Floor.Generations)
	}
}

// TestThin: what no rule keeps goes first, then the loss that is felt least.
func TestThin(t *testing.T) {
	now := at("2026-06-15 13:00")
	var items []retention.Item
	for i, age := range []int{720, 360, 330, 300, 60, 30, 22, 21, 15, 3, 0} {
		items = append(items, retention.Item{Name: fmt.Sprint(age), Sequence: int64(i + 1), Committed: now.Add(-time.Duration(age)*day - time.Hour)})
	}
	r := retention.Rules{Policy: retention.Policy{Daily: 10}, Floor: retention.Floor{Generations: 2, Age: 10 * day}, PerDay: 1}
	var order []string
	for {
		name, ok := retention.Thin(now, r, items)
		if !ok {
			break
		}
		order = append(order, name)
		items = slices.DeleteFunc(items, func(i retention.Item) bool { return i.Name == name })
	}
	// 720 is beyond the ten days of the rule. A day between 22 and 21 is little, a
	// month of last year too; what is alone in its time goes last.
	want := []string{"720", "22", "360", "330", "21", "30", "60", "15", "300"}
	if d := cmp.Diff(want, order); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	r.PerDay = 0
	if name, ok := retention.Thin(now, r, []retention.Item{{Name: "a", Sequence: 1, Committed: at("2001-01-01 00:00")}, {Name: "b", Sequence: 2, Committed: at("2002-01-01 00:00")}}); ok {
		t.Errorf("%s is thinned out on a day when nothing may go", name)
	}
}

// BenchmarkPlan is the cost of a long history: 10,000 generations of an hour each.
func BenchmarkPlan(b *testing.B) {
	now := at("2026-06-15 13:00")
	var items []retention.Item
	for i := range 10_000 {
		items = append(items, retention.Item{Name: fmt.Sprint(i), Sequence: int64(i + 1), Committed: now.Add(-time.Duration(10_000-i) * time.Hour)})
	}
	for name, p := range map[string]retention.Policy{
		"default": {Within: 10 * day, Weekly: 4, Monthly: 12, Yearly: -1},
		"large":   {Within: 400 * day, Hourly: 5000, Daily: 400, Weekly: 60, Monthly: 24, Yearly: -1},
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				retention.Plan(now, retention.Rules{Policy: p, Floor: retention.Floor{Generations: 7, Age: 14 * day}, PerDay: 8}, items)
			}
		})
	}
}
