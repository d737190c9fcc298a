// Package history is the section [history] of site.toml and farkeep.toml: which
// generations stay, and what else becomes of what is on the disk. It validates
// and writes the section; package retention applies its rules.
package history

import (
	"bytes"
	_ "embed"
	"encoding/json"
	"fmt"
	"regexp"
	"strings"
	"text/template"
	"time"

	"farkeep/shared/retention"
	"farkeep/shared/span"
)

var pattern = regexp.MustCompile(`^(\*|[A-Za-z0-9][A-Za-z0-9._-]{0,127}\*?)$`)

// IsPattern reports whether s names repositories: a name, one with a trailing *
// that stands for any end, or * alone.
func IsPattern(s string) bool { return pattern.MatchString(s) }

// Settings says which generations stay, and what else becomes of what is on the
// disk. The zero value lets nothing go; Default is that of a file which
// does not mention it.
type Settings struct {
	// As in retention.Policy, that is as borg prune --keep-*.
	Within  span.Duration `toml:"within"`
	Hourly  int           `toml:"hourly"`
	Daily   int           `toml:"daily"`
	Weekly  int           `toml:"weekly"`
	Monthly int           `toml:"monthly"`
	Yearly  int           `toml:"yearly"`
	// FloorOnly says that a policy which keeps nothing but the floor is meant.
	FloorOnly bool `toml:"floor_only"`

	FloorGenerations int           `toml:"floor_generations"` // never fewer
	FloorAge         span.Duration `toml:"floor_age"`         // never anything younger
	ExpirePerDay     int           `toml:"expire_per_day"`    // per repository; 0: nothing expires by itself
	CommitInterval   span.Duration `toml:"commit_interval"`   // shortest time between two generations of one key and repository
	WhenFull         string        `toml:"when_full"`         // Refuse or Thin
	RetireAfter      span.Duration `toml:"retire_after"`      // from "retire" to its carrying out
	ScrubEvery       span.Duration `toml:"scrub_every"`       // everything on the disk is read again in this time; 0: never
	VanishPercent    int           `toml:"vanish_percent"`    // of Borg's live chunks, or of other files and bytes: what is suspect when it is gone; 100: never
	ChangePercent    int           `toml:"change_percent"`    // the same of what changed

	Repositories []Repository `toml:"repository"`
}

// Values of Settings.WhenFull.
const (
	Refuse = "refuse" // a push for which there is no room is refused
	Thin   = "thin"   // generations above the floor go to make room, least loss first
)

// Repository is what is different for the repositories of one name. What
// is nil is as in the Settings that it belongs to.
type Repository struct {
	Name             string         `toml:"name"` // a trailing * is allowed
	Within           *span.Duration `toml:"within,omitempty"`
	Hourly           *int           `toml:"hourly,omitempty"`
	Daily            *int           `toml:"daily,omitempty"`
	Weekly           *int           `toml:"weekly,omitempty"`
	Monthly          *int           `toml:"monthly,omitempty"`
	Yearly           *int           `toml:"yearly,omitempty"`
	FloorOnly        *bool          `toml:"floor_only,omitempty"`
	FloorGenerations *int           `toml:"floor_generations,omitempty"`
	FloorAge         *span.Duration `toml:"floor_age,omitempty"`
	ExpirePerDay     *int           `toml:"expire_per_day,omitempty"`
	VanishPercent    *int           `toml:"vanish_percent,omitempty"`
	ChangePercent    *int           `toml:"change_percent,omitempty"`
}

// MaxRepositories is how many [[history.repository]] a file may have.
const MaxRepositories = 100

// Bounds of the numbers, so that a slip of the finger is an error.
const (
	maxPeriods     = 10_000
	maxGenerations = 10_000
	maxPerDay      = 1_000
	maxSpan        = span.Duration(100 * 366 * 24 * time.Hour)
	maxFloorAge    = span.Duration(3660 * 24 * time.Hour)
	maxInterval    = span.Duration(7 * 24 * time.Hour)
	maxRetire      = span.Duration(366 * 24 * time.Hour)
	maxScrub       = span.Duration(366 * 24 * time.Hour)
	shortest       = span.Duration(time.Second)
)

// Default is the history of a file that does not mention it; see
// docs/retention.md for the reasons.
func Default() Settings {
	const day = span.Duration(24 * time.Hour)
	return Settings{
		Within: 10 * day, Weekly: 4, Monthly: 12, Yearly: -1,
		FloorGenerations: 7, FloorAge: 14 * day, ExpirePerDay: 8,
		CommitInterval: span.Duration(5 * time.Minute), WhenFull: Refuse,
		RetireAfter: 14 * day, ScrubEvery: 30 * day,
		VanishPercent: 20, ChangePercent: 50,
	}
}

// For is what applies to one repository: the first of Repositories whose name
// matches is put over the rest.
func (h Settings) For(repository string) retention.Rules {
	return h.of(repository).rules()
}

// Suspicion is from how much loss or change on a push is suspect, in percent: of a
// Borg repository's live chunks and their bytes, of any other's files and bytes.
func (h Settings) Suspicion(repository string) (vanish, change int) {
	o := h.of(repository)
	return o.VanishPercent, o.ChangePercent
}

func (h Settings) rules() retention.Rules {
	return retention.Rules{
		Policy: retention.Policy{Within: h.Within.Std(), Hourly: h.Hourly, Daily: h.Daily, Weekly: h.Weekly, Monthly: h.Monthly, Yearly: h.Yearly},
		Floor:  retention.Floor{Generations: h.FloorGenerations, Age: h.FloorAge.Std()},
		PerDay: h.ExpirePerDay,
	}
}

func (h Settings) of(repository string) Settings {
	for _, r := range h.Repositories {
		prefix, open := strings.CutSuffix(r.Name, "*")
		if r.Name == repository || open && strings.HasPrefix(repository, prefix) {
			return h.with(r)
		}
	}
	return h
}

func (h Settings) with(r Repository) Settings {
	override(&h.Within, r.Within)
	override(&h.Hourly, r.Hourly)
	override(&h.Daily, r.Daily)
	override(&h.Weekly, r.Weekly)
	override(&h.Monthly, r.Monthly)
	override(&h.Yearly, r.Yearly)
	override(&h.FloorOnly, r.FloorOnly)
	override(&h.FloorGenerations, r.FloorGenerations)
	override(&h.FloorAge, r.FloorAge)
	override(&h.ExpirePerDay, r.ExpirePerDay)
	override(&h.VanishPercent, r.VanishPercent)
	override(&h.ChangePercent, r.ChangePercent)
	return h
}

func override[T any](p *T, value *T) {
	if value != nil {
		*p = *value
	}
}

//go:embed history.toml.tmpl
var historyTemplate string

// TOML writes h as the section [history] of farkeep.toml and site.toml, with
// comments, and nothing for one that was never set: that reads back as the default.
func (h Settings) TOML() (string, error) {
	t, err := template.New("history").Funcs(template.FuncMap{"q": func(s string) string { return fmt.Sprintf("%q", s) }}).Parse(historyTemplate)
	if err != nil {
		return "", fmt.Errorf("write [history]: %w", err)
	}
	var out bytes.Buffer
	if err := t.Execute(&out, h); err != nil {
		return "", fmt.Errorf("write [history]: %w", err)
	}
	return out.String(), nil
}

// GobEncode writes h in full for the part that gets it. Plain gob leaves zeroes
// out, and a yearly = 0 of one repository would come back as "not said".
func (h Settings) GobEncode() ([]byte, error) {
	type plain Settings
	return json.Marshal(plain(h))
}

// GobDecode reads what GobEncode wrote.
func (h *Settings) GobDecode(data []byte) error {
	type plain Settings
	return json.Unmarshal(data, (*plain)(h))
}

// Mistake returns the first value that makes no sense: its table ("history" or
// "history.repository"), its key, the element of the table, and why; or "" for
// all of them.
func (h Settings) Mistake() (table, key string, n int, text string) {
	if key, text := h.mistake(); key != "" {
		return "history", key, 0, text
	}
	if len(h.Repositories) > MaxRepositories {
		return "history.repository", "name", MaxRepositories, fmt.Sprintf("at most %d repositories can have a history of their own", MaxRepositories)
	}
	seen := map[string]bool{}
	for i, r := range h.Repositories {
		switch {
		case !IsPattern(r.Name):
			return "history.repository", "name", i, fmt.Sprintf("%q is not a repository name", r.Name)
		case seen[r.Name]:
			return "history.repository", "name", i, fmt.Sprintf("%q has a history already: the first one counts", r.Name)
		}
		seen[r.Name] = true
		if key, text := h.with(r).mistake(); key != "" {
			return "history.repository", key, i, text
		}
	}
	return "", "", 0, ""
}

// Doubts says, each as a sentence for the operator, what is no mistake and will not
// do what it looks like: rules that count hours, for whoever pushes each hour, with
// fewer generations let go in a day than come.
func (h Settings) Doubts() []string {
	var all []string
	doubt := func(table string, h Settings) {
		const hours = 24
		if h.Hourly != 0 && h.ExpirePerDay > 0 && h.ExpirePerDay < hours {
			all = append(all, fmt.Sprintf("raise expire_per_day in %s if pushes come each hour, as hourly = %d looks like: %d are let go in a day, what else is due piles up until the disk is full; expire_per_day = %d does",
				table, h.Hourly, h.ExpirePerDay, 2*hours))
		}
	}
	doubt("[history]", h)
	for _, r := range h.Repositories {
		if r.Hourly != nil || r.ExpirePerDay != nil {
			doubt(fmt.Sprintf("[[history.repository]] of %q", r.Name), h.with(r))
		}
	}
	return all
}

func (h Settings) mistake() (key, text string) {
	for _, length := range []struct {
		key             string
		value, from, to span.Duration
		zero            bool // means something
	}{
		{"within", h.Within, shortest, maxSpan, true},
		{"floor_age", h.FloorAge, shortest, maxFloorAge, true},
		{"commit_interval", h.CommitInterval, shortest, maxInterval, true},
		{"retire_after", h.RetireAfter, shortest, maxRetire, false},
		{"scrub_every", h.ScrubEvery, shortest, maxScrub, true},
	} {
		if (length.value < length.from || length.value > length.to) && !(length.zero && length.value == 0) {
			return length.key, fmt.Sprintf("%s is not between %s and %s", length.value.Days(), length.from.Days(), length.to.Days())
		}
	}
	for _, number := range []struct {
		key             string
		value, from, to int
	}{
		{"hourly", h.Hourly, -1, maxPeriods}, {"daily", h.Daily, -1, maxPeriods}, {"weekly", h.Weekly, -1, maxPeriods},
		{"monthly", h.Monthly, -1, maxPeriods}, {"yearly", h.Yearly, -1, maxPeriods},
		{"floor_generations", h.FloorGenerations, 1, maxGenerations}, {"expire_per_day", h.ExpirePerDay, 0, maxPerDay},
		{"vanish_percent", h.VanishPercent, 0, 100}, {"change_percent", h.ChangePercent, 0, 100},
	} {
		if number.value < number.from || number.value > number.to {
			return number.key, fmt.Sprintf("%d is not between %d and %d", number.value, number.from, number.to)
		}
	}
	if h.WhenFull != Refuse && h.WhenFull != Thin {
		return "when_full", fmt.Sprintf("%q is neither %s nor %s", h.WhenFull, Refuse, Thin)
	}
	nothing := h.rules().Policy == retention.Policy{}
	if nothing && !h.FloorOnly {
		return "within", "within, hourly, daily, weekly, monthly and yearly are all 0, which keeps nothing but the floor: set one, or write floor_only = true if that is meant"
	}
	if !nothing && h.FloorOnly {
		return "floor_only", "the policy keeps more than the floor: set within, hourly, daily, weekly, monthly and yearly to 0, or remove floor_only"
	}
	return "", ""
}
