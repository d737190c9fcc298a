package curator

import (
	"testing"
	"time"
)

var noon = time.Date(2026, 11, 5, 12, 0, 0, 0, time.UTC)

func TestClock(t *testing.T) {
	first, doubt := clockRecord{}.observe(reading{now: noon, believed: true, boot: "a", uptime: time.Hour}, false)
	if doubt != "" {
		t.Fatal(doubt)
	}
	for name, test := range map[string]struct {
		at     reading
		accept bool
		doubt  bool
		passed time.Duration
	}{
		"an hour later":                 {at: reading{now: noon.Add(time.Hour), boot: "a", uptime: 2 * time.Hour}, passed: time.Hour},
		"corrected back a little":       {at: reading{now: noon.Add(-4 * time.Minute), boot: "a", uptime: time.Hour}},
		"back":                          {at: reading{now: noon.Add(-6 * time.Minute), boot: "a", uptime: time.Hour}, doubt: true},
		"back by years":                 {at: reading{now: noon.AddDate(-30, 0, 0), boot: "b"}, doubt: true},
		"thrown 47 h":                   {at: reading{now: noon.Add(47 * time.Hour), boot: "a", uptime: time.Hour + time.Minute}, passed: time.Minute},
		"thrown 49 h":                   {at: reading{now: noon.Add(49 * time.Hour), boot: "a", uptime: time.Hour}, doubt: true},
		"thrown 30 years":               {at: reading{now: noon.AddDate(30, 0, 0), boot: "a", uptime: time.Hour}, doubt: true},
		"accepted":                      {at: reading{now: noon.AddDate(30, 0, 0), boot: "a", uptime: 2 * time.Hour}, accept: true, passed: time.Hour},
		"accepted back":                 {at: reading{now: noon.AddDate(-1, 0, 0), boot: "a", uptime: 2 * time.Hour}, accept: true, passed: time.Hour},
		"dark for nine days, running":   {at: reading{now: noon.AddDate(0, 0, 9), boot: "a", uptime: 217 * time.Hour}, passed: 216 * time.Hour},
		"off for 30 h":                  {at: reading{now: noon.Add(30 * time.Hour), boot: "b"}, passed: 24 * time.Hour},
		"off for 47 h":                  {at: reading{now: noon.Add(47 * time.Hour), boot: "b"}, passed: 24 * time.Hour},
		"another card, thrown 30 years": {at: reading{now: noon.AddDate(30, 0, 0), boot: "b"}, doubt: true},
		"off for 49 h":                  {at: reading{now: noon.Add(49 * time.Hour), boot: "b"}, doubt: true},
		"off for 47 h, then up for 3":   {at: reading{now: noon.Add(50 * time.Hour), boot: "b", uptime: 3 * time.Hour}, passed: 27 * time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			test.at.believed = true
			next, doubt := first.observe(test.at, test.accept)
			if (doubt != "") != test.doubt {
				t.Fatalf("doubt %q", doubt)
			}
			if test.doubt {
				if next != first {
					t.Errorf("a time in doubt was written down: %+v", next)
				}
				return
			}
			if next.passed() != test.passed {
				t.Errorf("%v passed, want %v", next.passed(), test.passed)
			}
			if !test.accept && next.Latest.Before(first.Latest) {
				t.Error("the latest time went back")
			}
			if test.accept && !next.Latest.Equal(test.at.now) {
				t.Errorf("accepted %v, remembered %v", test.at.now, next.Latest)
			}
		})
	}
	if _, doubt := first.observe(reading{now: noon.Add(time.Hour), boot: "a", uptime: 2 * time.Hour}, true); doubt == "" {
		t.Error("a clock that is not set was accepted")
	}
}

// A clock that is pushed forward in small steps gets no further than by one big one.
func TestClockInSmallSteps(t *testing.T) {
	for _, step := range []time.Duration{6 * time.Minute, time.Hour, 20 * time.Hour} {
		r, _ := clockRecord{}.observe(reading{now: noon, believed: true, boot: "a"}, false)
		now, uptime, frozen := noon, time.Duration(0), false
		for range 1000 {
			now, uptime = now.Add(step+time.Minute), uptime+time.Minute
			var doubt string
			r, doubt = r.observe(reading{now: now, believed: true, boot: "a", uptime: uptime}, false)
			frozen = frozen || doubt != ""
		}
		if !frozen || r.Latest.After(noon.Add(uptime+MaxForward+uptime/leak)) {
			t.Errorf("by steps of %v to %v within %v", step, r.Latest.Sub(noon), uptime)
		}
		if r.passed() > uptime {
			t.Errorf("by steps of %v, %v passed within %v", step, r.passed(), uptime)
		}
	}
}

// The clock of an honest appliance drifts, is corrected, and is off now and then.
func TestClockOfYears(t *testing.T) {
	r, _ := clockRecord{}.observe(reading{now: noon, believed: true, boot: "0"}, false)
	now, uptime, boot := noon, time.Duration(0), 0
	for day := range 3 * 365 {
		off := time.Duration(0)
		if day%30 == 29 {
			boot++
			uptime, off = 0, 40*time.Hour
		}
		now, uptime = now.Add(24*time.Hour+off+time.Duration(day%7-3)*time.Second), uptime+24*time.Hour
		var doubt string
		if r, doubt = r.observe(reading{now: now, believed: true, boot: string(rune('0' + boot)), uptime: uptime}, false); doubt != "" {
			// 24 h of running after 40 h off, and no look at the disk in between.
			t.Fatalf("day %d: %s", day, doubt)
		}
	}
}
