package moment_test

import (
	"testing"
	"time"

	"farkeep/keyserver/moment"
)

func TestSince(t *testing.T) {
	wall := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	at := func(boot string, w, up time.Duration) moment.Moment {
		return moment.Moment{Wall: wall.Add(w), Boot: boot, Up: up}
	}
	const h = time.Hour
	for _, tt := range []struct {
		name           string
		earlier, later moment.Moment
		least, most    time.Duration
	}{
		{"one boot", at("a", 0, h), at("a", 2*h, 3*h), 2 * h, 2 * h},
		{"one boot, the clock was set forward", at("a", 0, h), at("a", 900*h, 3*h), 2 * h, 2 * h},
		{"one boot, the clock was set back", at("a", 0, h), at("a", -900*h, 3*h), 2 * h, 2 * h},
		{"one boot, and it went backwards", at("a", 0, 3*h), at("a", 2*h, h), 0, moment.Forever},
		{"a restart", at("a", 0, 3*h), at("b", 2*h, h), 2 * h, 2 * h},
		{"a restart, a clock a little behind", at("a", 0, 3*h), at("b", -time.Minute, h), 0, 0},
		{"a restart, a clock far behind", at("a", 0, 3*h), at("b", -h, h), 0, moment.Forever},
		{"no boot id", at("", 0, 3*h), at("", h, 9*h), h, h},
	} {
		if least, most := tt.later.Since(tt.earlier); least != tt.least || most != tt.most {
			t.Errorf("%s: %v to %v; want %v to %v", tt.name, least, most, tt.least, tt.most)
		}
	}
}

func TestBefore(t *testing.T) {
	wall := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	given := moment.Moment{Wall: wall, Boot: "a", Up: time.Hour}
	for _, tt := range []struct {
		name string
		now  moment.Moment
		want bool
	}{
		{"in time", moment.Moment{Wall: wall.Add(23 * time.Hour), Boot: "a", Up: 24 * time.Hour}, true},
		{"over", moment.Moment{Wall: wall.Add(24 * time.Hour), Boot: "a", Up: 25 * time.Hour}, false},
		{"over, with the clock set back", moment.Moment{Wall: wall.Add(time.Hour), Boot: "a", Up: 25 * time.Hour}, false},
		{"in time, with the clock set forward", moment.Moment{Wall: wall.Add(48 * time.Hour), Boot: "a", Up: 2 * time.Hour}, false},
		{"in time, with the clock set before it was given", moment.Moment{Wall: wall.Add(-48 * time.Hour), Boot: "a", Up: 2 * time.Hour}, false},
		{"after a restart", moment.Moment{Wall: wall.Add(23 * time.Hour), Boot: "b", Up: time.Hour}, true},
		{"over, after a restart", moment.Moment{Wall: wall.Add(25 * time.Hour), Boot: "b", Up: time.Hour}, false},
		{"after a restart, with the clock set before it was given", moment.Moment{Wall: wall.Add(-time.Hour), Boot: "b", Up: time.Hour}, false},
	} {
		if got := tt.now.Before(given, 24*time.Hour); got != tt.want {
			t.Errorf("%s: %v", tt.name, got)
		}
	}
}

func TestNow(t *testing.T) {
	a, err := moment.Now(time.Now)
	if err != nil {
		t.Fatal(err)
	}
	b, err := moment.Now(func() time.Time { return time.Unix(0, 0) })
	if err != nil {
		t.Fatal(err)
	}
	if least, most := b.Since(a); least < 0 || most > time.Minute || a.IsZero() || len(a.Boot) != 32 {
		t.Errorf("from %+v to %+v: %v to %v", a, b, least, most)
	}
	if !(moment.Moment{}).IsZero() {
		t.Error("never is some time")
	}
}
