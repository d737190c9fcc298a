package alert

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"
)

// told is what reached a person.
type told struct {
	at    time.Time
	own   bool
	count int
}

// household runs a limiter over time as Alerts does: a summary is looked for
// every few seconds.
type household struct {
	l         *limiter
	now       time.Time
	told      map[string][]told
	own       []time.Time
	summaries []time.Time
}

func newHousehold() *household {
	return &household{l: newLimiter(), now: t0, told: map[string][]told{}}
}

func (h *household) raise(appliance, kind string) bool {
	ok := h.l.take(Event{Kind: kind, Appliance: appliance, At: h.now}, h.now)
	if ok {
		h.own = append(h.own, h.now)
		h.add(appliance, kind, told{h.now, true, 1})
	}
	return ok
}

func (h *household) add(appliance, kind string, x told) {
	name := pairName(appliance, kind)
	h.told[name] = append(h.told[name], x)
}

func (h *household) pass(d time.Duration) {
	const step = 5 * time.Minute
	for end := h.now.Add(d); h.now.Before(end); {
		h.now = h.now.Add(min(step, end.Sub(h.now)))
		if lines := h.l.summary(h.now); len(lines) > 0 {
			h.l.summarised(lines, h.now)
			h.summaries = append(h.summaries, h.now)
			for _, u := range lines {
				h.add(u.Appliance, u.Kind, told{h.now, false, u.Count})
			}
		}
	}
}

func (h *household) count(appliance, kind string) (n int) {
	for _, x := range h.told[pairName(appliance, kind)] {
		n += x.count
	}
	return n
}

// Somebody has one appliance and makes it ask for everything, all day.
func TestAFloodDrownsNobody(t *testing.T) {
	h := newHousehold()
	raised := 0
	for range 2 * 24 * 60 {
		for kind := range kinds {
			h.raise("attic", kind)
			raised++
		}
		h.pass(time.Minute)
	}
	if n := len(h.own) + len(h.summaries); n > 50 {
		t.Errorf("%d mails in two days", n)
	}
	// And hides nothing: another appliance is heard at once, with every kind,
	// in the middle of the flood.
	for _, kind := range []string{Held, TokenMismatch, Dark} {
		if !h.raise("barn", kind) {
			t.Errorf("%s of another appliance gets no mail during the flood", kind)
		}
	}
	h.pass(25 * time.Hour)
	n := 0
	for kind := range kinds {
		n += h.count("attic", kind)
	}
	if n != raised {
		t.Errorf("%d of %d events were told", n, raised)
	}
}

// A flood of one kind holds up no other kind of the same appliance.
func TestAFloodHidesNoOtherKind(t *testing.T) {
	h := newHousehold()
	for range 24 * 60 {
		h.raise("attic", RefusedUnexpected)
		h.raise("", RefusedUnexpected) // nor does one by strangers
		h.pass(time.Minute)
	}
	if !h.raise("attic", TokenMismatch) || !h.raise("barn", RefusedUnexpected) {
		t.Error("a flood silenced another kind, or another appliance")
	}
	if n := len(h.own) + len(h.summaries); n > 25 {
		t.Errorf("%d mails in a day", n)
	}
}

// Five hundred appliances come back after a power cut of a week, and wait: some
// mails, then one summary, and none is missing.
func TestAfterAPowerCut(t *testing.T) {
	h := newHousehold()
	for i := range 500 {
		h.raise(fmt.Sprint("a", i), Held)
		h.pass(100 * time.Millisecond)
	}
	h.pass(20 * time.Minute)
	for i := range 500 {
		if n := h.count(fmt.Sprint("a", i), Held); n != 1 {
			t.Errorf("a%d was told of %d times", i, n)
		}
	}
	if len(h.own) != firstsPerDay || len(h.summaries) > 1 {
		t.Errorf("%d mails, %d summaries", len(h.own), len(h.summaries))
	}
}

// Twice in a day, for different causes: two mails.
func TestLaterTheSameDay(t *testing.T) {
	h := newHousehold()
	h.raise("attic", Held)
	h.pass(5 * time.Hour)
	if !h.raise("attic", Held) {
		t.Error("no mail after five quiet hours")
	}
	h.pass(30 * time.Minute)
	if h.raise("attic", Held) {
		t.Error("a third mail within half an hour")
	}
	h.pass(7 * time.Hour)
	if n := h.count("attic", Held); n != 3 {
		t.Errorf("%d of 3 events were told", n)
	}
}

func TestAClockThatGoesBack(t *testing.T) {
	h := newHousehold()
	h.raise("attic", Held)
	h.raise("attic", Held)
	h.now = h.now.AddDate(-1, 0, 0)
	if !h.raise("barn", Held) {
		t.Error("a clock that was set back silences")
	}
	h.pass(8 * time.Hour)
	if n := h.count("attic", Held); n != 2 {
		t.Errorf("%d of 2 events were told", n)
	}
}

// Whatever is raised: everything is told, nothing twice, within a day, and the
// number of mails is bounded.
func TestEverythingIsToldOnce(t *testing.T) {
	var names []string
	for kind := range kinds {
		names = append(names, kind)
	}
	for seed := range uint64(30) {
		random := rand.New(rand.NewPCG(seed, 4))
		h := newHousehold()
		raised := map[string]int{}
		for h.now.Before(t0.Add(3 * 24 * time.Hour)) {
			appliance := fmt.Sprint("a", random.IntN(1+random.IntN(40)))
			kind := names[random.IntN(len(names))]
			for range 1 + random.IntN(30) {
				h.raise(appliance, kind)
				raised[pairName(appliance, kind)]++
			}
			h.pass(time.Duration(random.ExpFloat64() * float64(20*time.Minute)))
		}
		h.pass(25 * time.Hour)
		for name, n := range raised {
			got := 0
			for _, x := range h.told[name] {
				got += x.count
			}
			if got != n {
				t.Errorf("seed %d: %s: %d of %d events were told", seed, name, got, n)
			}
		}
		for day := 0; day < 4; day++ {
			from, to, n := t0.Add(time.Duration(day)*window), t0.Add(time.Duration(day+1)*window), 0
			for _, at := range append(h.own, h.summaries...) {
				if !at.Before(from) && at.Before(to) {
					n++
				}
			}
			if n > firstsPerDay+repeatsPerDay+24+1 {
				t.Errorf("seed %d: %d mails on day %d", seed, n, day)
			}
		}
	}
}

// Whatever of the memory on the disk is believed: what is raised after that is
// told within two days, and the memory can be written and read again.
func FuzzState(f *testing.F) {
	h := newHousehold()
	h.raise("attic", Held)
	h.raise("attic", Held)
	h.raise("", Stranger)
	seed, err := json.Marshal(state{Version: 1, Serial: 3, Limit: h.l})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Add([]byte(`{"version":1,"limit":{"pairs":{}}}`))
	f.Add([]byte(`{"version":1,"limit":{"pairs":{"held attic":{"told":"9999-01-01T00:00:00Z","gap":86400000000000}},"summary":"9999-01-01T00:00:00Z","seen":"2020-01-01T00:00:00Z","cleaned":"9999-01-01T00:00:00Z"}}`))
	f.Add([]byte(`{"version":1,"limit":{"pairs":{"held attic":{"count":2,"since":"2026-03-01T11:00:00Z","last":{"kind":"x","appliance":"y","at":"0001-01-01T00:00:00Z"}}}}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		s, err := parseState(text)
		if err != nil {
			return
		}
		h := newHousehold()
		h.l = s.Limit
		before := 0
		if p := h.l.Pairs[pairName("attic", Held)]; p != nil {
			before = p.Count
		}
		if before > 1<<30 {
			return
		}
		told := 0
		if h.raise("attic", Held) {
			told++
		}
		for range 48 * 6 {
			h.now = h.now.Add(10 * time.Minute)
			if lines := h.l.summary(h.now); len(lines) > 0 {
				composeSummary(lines, "nas")
				h.l.summarised(lines, h.now)
				for _, u := range lines {
					if u.pair == pairName("attic", Held) {
						told += u.Count
					}
				}
			}
		}
		if told != before+1 {
			t.Errorf("%d of %d events were told", told, before+1)
		}
		again, err := json.Marshal(state{Version: 1, Limit: h.l})
		if err != nil {
			return // times beyond the year 9999
		}
		if _, err := parseState(again); err != nil {
			t.Errorf("what was written cannot be read: %v", err)
		}
	})
}
