package history_test

import (
	"bytes"
	"encoding/gob"
	"fmt"
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"farkeep/shared/history"
	"farkeep/shared/retention"
	"farkeep/shared/span"
	"farkeep/shared/tomlfile"

	"github.com/google/go-cmp/cmp"
)

const day = 24 * time.Hour

// parse reads a file's section over the default, as settings and site do.
func parse(t *testing.T, text string) history.Settings {
	t.Helper()
	file := struct {
		History history.Settings `toml:"history"`
	}{history.Default()}
	if err := tomlfile.Parse("farkeep.toml", []byte(text), &file); err != nil {
		t.Fatal(err)
	}
	if table, key, n, mistake := file.History.Mistake(); key != "" {
		t.Fatalf("%s.%s, element %d: %s", table, key, n, mistake)
	}
	return file.History
}

func TestDefaultHistory(t *testing.T) {
	h := parse(t, "")
	want := retention.Rules{
		Policy: retention.Policy{Within: 10 * day, Weekly: 4, Monthly: 12, Yearly: -1},
		Floor:  retention.Floor{Generations: 7, Age: 14 * day},
		PerDay: 8,
	}
	if got := h.For("photos"); got != want {
		t.Errorf("rules %+v; want %+v", got, want)
	}
	// One key changes one thing.
	h = parse(t, "[history]\ndaily = 30\n")
	want.Daily = 30
	if got := h.For("photos"); got != want {
		t.Errorf("with daily = 30: %+v; want %+v", got, want)
	}
	if got := (history.Settings{}).For("photos"); got.PerDay != 0 {
		t.Errorf("a history that was not set lets %d go", got.PerDay)
	}
}

// TestDoubts: who counts hours and lets eight go in a day is told so, for each
// repository that it is true of.
func TestDoubts(t *testing.T) {
	for text, want := range map[string][]string{
		"":                         nil,
		"[history]\nhourly = 48\n": {"in [history] if pushes come each hour, as hourly = 48 looks like: 8 are let go in a day"},
		"[history]\nhourly = -1\nexpire_per_day=48\n":            nil,
		"[history]\nhourly = 48\nexpire_per_day=0\n":             nil,
		"[[history.repository]]\nname = \"db-*\"\nhourly = 24\n": {`of "db-*"`},
		"[history]\nhourly = 24\nexpire_per_day=50\n[[history.repository]]\nname = \"db\"\nexpire_per_day = 9\n[[history.repository]]\nname = \"x\"\nweekly = 9\n": {`of "db"`},
	} {
		got := parse(t, text).Doubts()
		if len(got) != len(want) {
			t.Errorf("%s\n%q, want %q", text, got, want)
			continue
		}
		for i := range got {
			if !strings.Contains(got[i], want[i]) {
				t.Errorf("%s\n%q, want %q", text, got[i], want[i])
			}
		}
	}
}

func TestHistoryOfOneRepository(t *testing.T) {
	h := parse(t, `[[history.repository]]
name = "photos-*"
monthly = 24
vanish_percent = 1

[[history.repository]]
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
`)
	// The keeper gets its settings as gob; nothing may be lost on the way.
	var wire bytes.Buffer
	var sent history.Settings
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

// TestTOML: what is written reads back, for every key, and what was never set is
// not written.
func TestTOML(t *testing.T) {
	if text, err := (history.Settings{}).TOML(); err != nil || text != "" {
		t.Errorf("%q, %v", text, err)
	}
	h := history.Default()
	h.Hourly, h.Daily, h.WhenFull, h.ScrubEvery = 24, -1, history.Thin, 0
	h.Repositories = []history.Repository{{Name: "a", Yearly: new(0)}, {Name: "b*", FloorAge: new(h.Within), ChangePercent: new(0)}}
	text, err := h.TOML()
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(h, parse(t, text)); d != "" {
		t.Errorf("-given +read:\n%s\n%s", d, text)
	}
}

// TestDocsNameEveryKey keeps docs/retention.md whole: its sample is one that
// works, its table has every key and every default.
func TestDocsNameEveryKey(t *testing.T) {
	docs, err := os.ReadFile("../../docs/retention.md")
	if err != nil {
		t.Fatal(err)
	}
	sample, err := os.ReadFile("testdata/sample.toml")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(docs), "```toml\n"+string(sample)+"```") {
		t.Error("docs/retention.md does not show testdata/sample.toml as it is")
	}
	if got := parse(t, string(sample)).For("photos-2025").Monthly; got != 24 {
		t.Errorf("the sample keeps %d months of photos-2025", got)
	}
	_, table, _ := strings.Cut(string(docs), "## The keys\n")
	table, _, _ = strings.Cut(table, "\n## ")
	defaults := history.Default()
	for i := range reflect.TypeOf(defaults).NumField() {
		field := reflect.TypeOf(defaults).Field(i)
		key := "`" + field.Tag.Get("toml") + "`"
		value := fmt.Sprint(reflect.ValueOf(defaults).Field(i).Interface())
		switch v := reflect.ValueOf(defaults).Field(i).Interface().(type) {
		case span.Duration:
			value = fmt.Sprintf("%q", v.Days())
		case string:
			value = fmt.Sprintf("%q", v)
		case []history.Repository:
			key, value = "`[[history.repository]]`", ""
		}
		row := regexp.MustCompile(`(?m)^\| .*` + regexp.QuoteMeta(key) + `.* \|.*` + regexp.QuoteMeta(value) + `.*\|`)
		if !row.MatchString(table) {
			t.Errorf("the table has no row with %s and its default %s", key, value)
		}
	}
}
