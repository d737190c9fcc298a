package settings_test

import (
	"bytes"
	"encoding/gob"
	"strings"
	"testing"
	"time"

	"farkeep/shared/retention"
	"farkeep/shared/settings"

	"github.com/google/go-cmp/cmp"
)

const day = 24 * time.Hour

func TestDefaultHistory(t *testing.T) {
	base := fixture(t, "good.toml")
	from := strings.Index(base, "[history]")
	to := strings.Index(base, "[dead_man]")
	a := parse(t, base[:from]+base[to:])
	if d := cmp.Diff(settings.DefaultHistory(), a.History); d != "" {
		t.Errorf("-default +without a section:\n%s", d)
	}
	want := retention.Rules{
		Policy: retention.Policy{Within: 10 * day, Weekly: 4, Monthly: 12, Yearly: -1},
		Floor:  retention.Floor{Generations: 7, Age: 14 * day},
		PerDay: 8,
	}
	if got := a.History.For("photos"); got != want {
		t.Errorf("rules %+v; want %+v", got, want)
	}
	// One key changes one thing.
	a = parse(t, base[:from]+"[history]\ndaily = 30\n"+base[to:])
	want.Daily = 30
	if got := a.History.For("photos"); got != want {
		t.Errorf("with daily = 30: %+v; want %+v", got, want)
	}
	if got := (settings.History{}).For("photos"); got.PerDay != 0 {
		t.Errorf("a history that was not set lets %d go", got.PerDay)
	}
}

func TestHistoryOfOneRepository(t *testing.T) {
	base := fixture(t, "good.toml")
	text := strings.Replace(base, "[dead_man]", `[[history.repository]]
name = "photos-old"
within = "0s"
weekly = 0
monthly = 0
yearly = 0
floor_only = true
floor_generations = 2
floor_age = "3d"
expire_per_day = 1

[[history.repository]]
name = "mail"
yearly = 0
change_percent = 100

[[history.repository]]
name = "*"
hourly = 5

[dead_man]`, 1)
	h := parse(t, text).History
	// The keeper gets its settings as gob; nothing may be lost on the way.
	var wire bytes.Buffer
	var sent settings.History
	if err := gob.NewEncoder(&wire).Encode(h); err != nil {
		t.Fatal(err)
	}
	if err := gob.NewDecoder(&wire).Decode(&sent); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(h, sent); d != "" {
		t.Fatalf("-given +sent:\n%s", d)
	}
	standard := retention.Rules{
		Policy: retention.Policy{Within: 10 * day, Weekly: 4, Monthly: 12, Yearly: -1},
		Floor:  retention.Floor{Generations: 7, Age: 14 * day}, PerDay: 8,
	}
	with := func(change func(*retention.Rules)) retention.Rules {
		r := standard
		change(&r)
		return r
	}
	for _, tt := range []struct {
		name           string
		want           retention.Rules
		vanish, change int
	}{
		// The first that matches counts, and no other.
		{"photos-old", with(func(r *retention.Rules) { r.Monthly = 24 }), 1, 50},
		{"photos-", with(func(r *retention.Rules) { r.Monthly = 24 }), 1, 50},
		{"photos", with(func(r *retention.Rules) { r.Hourly = 5 }), 20, 50},
		{"mail", with(func(r *retention.Rules) { r.Yearly = 0 }), 20, 100},
		{"mails", with(func(r *retention.Rules) { r.Hourly = 5 }), 20, 50},
	} {
		if got := sent.For(tt.name); got != tt.want {
			t.Errorf("%s: rules %+v; want %+v", tt.name, got, tt.want)
		}
		if vanish, change := sent.Suspicion(tt.name); vanish != tt.vanish || change != tt.change {
			t.Errorf("%s: suspicion %d, %d; want %d, %d", tt.name, vanish, change, tt.vanish, tt.change)
		}
	}
	sent.Repositories = sent.Repositories[1:]
	want := retention.Rules{Floor: retention.Floor{Generations: 2, Age: 3 * day}, PerDay: 1}
	if got := sent.For("photos-old"); got != want {
		t.Errorf("floor only: %+v; want %+v", got, want)
	}
}

func TestDays(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0s", day: "24h", 2 * day: "2d", 30 * day: "30d", 36 * time.Hour: "36h", 5 * time.Minute: "5m",
	} {
		got := settings.Duration(d).Days()
		var back settings.Duration
		if err := back.UnmarshalText([]byte(got)); err != nil || got != want || back.Std() != d {
			t.Errorf("%v is written %s and read back as %v, %v; want %s", d, got, back, err, want)
		}
	}
}
