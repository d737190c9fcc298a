package deadman

import (
	"fmt"
	"net/mail"
	"slices"
	"strings"
	"testing"
	"time"

	"farkeep/appliance/status"
)

// keeper changes what the keeper says and looks.
func (w *world) keeper(change func(*status.Keeper)) {
	k := *w.facts.Keeper
	change(&k)
	w.facts.Keeper = &k
	w.look()
}

func (w *world) body() string {
	w.t.Helper()
	if len(w.mails) == 0 {
		w.t.Fatal("no mail")
	}
	return w.mails[len(w.mails)-1].Body
}

func (w *world) wantWords(words ...string) {
	w.t.Helper()
	body := w.body()
	for _, want := range words {
		if !strings.Contains(body, want) {
			w.t.Errorf("the mail lacks %q:\n%s", want, body)
		}
	}
}

func TestSuspectGeneration(t *testing.T) {
	w := newWorld(t)
	w.keeper(func(k *status.Keeper) {
		k.Repositories = []status.RepositoryStatus{{Name: "photos", Suspect: true, Suspects: []status.SuspectStatus{
			{Generation: "000012-20261105T030000Z", At: t0, Reasons: []string{"4711 of 5000 live chunks are gone.", "The repository id changed."}},
		}}}
	})
	w.wantWords("repository photos has a SUSPECT generation", "4711 of 5000 live chunks are gone.", "The repository id changed.", "committed 2026-11-22 08:00 UTC",
		"ssh attic generations --text photos", "ssh attic accept photos 000012-20261105T030000Z", "ssh attic reject photos 000012-20261105T030000Z")
	if a := w.state.Raised(); len(a) != 1 || a[0].Repository != "photos" {
		t.Errorf("%+v", a)
	}
	w.want("attic repository photos has a SUSPECT generation")
	w.run(25 * hour)
	w.want("attic repository photos has a SUSPECT generation (reminder 1)")
	w.beat("nas")
	w.keeper(func(k *status.Keeper) { k.Repositories = []status.RepositoryStatus{{Name: "photos"}} })
	w.want("attic repository photos has no suspect generation any more")
}

// An enemy who may push under any name cannot hide what happens to a repository
// behind many others.
func TestManySuspects(t *testing.T) {
	w := newWorld(t)
	w.keeper(func(k *status.Keeper) {
		for i := range 1023 {
			k.Repositories = append(k.Repositories, status.RepositoryStatus{Name: fmt.Sprint("a", i), Suspect: true, Generations: 2})
		}
		k.Repositories = append(k.Repositories, status.RepositoryStatus{Name: "photos", Suspect: true, Generations: 9})
	})
	got := w.take()
	if !slices.Contains(got, "attic repository photos has a SUSPECT generation") || len(got) > maxSubjects {
		t.Errorf("%d mails: %q", len(got), got)
	}
}

func TestHistorysAlarms(t *testing.T) {
	at := t0.Add(day)
	for name, test := range map[string]struct {
		raise func(*status.Keeper)
		wait  time.Duration
		title string
		words []string
		over  func(*status.Keeper)
		hold  time.Duration
		clear string
	}{
		"untrue": {
			raise: func(k *status.Keeper) {
				k.Untrue = []status.Untrue{{Host: "nas", At: at.Add(time.Minute), What: "photos: it claimed 1234"}, {Host: "nas", At: at, What: "older"}}
			},
			title: "attic nas sent an untrue heartbeat", words: []string{"photos: it claimed 1234"},
			over: func(k *status.Keeper) {
				k.Heartbeats = []status.Heartbeat{{Host: "nas", At: at.Add(2 * time.Minute), ReceivedAt: at.Add(2 * time.Minute)}}
			},
			hold: hour, clear: "attic nas sends true heartbeats",
		},
		"rot": {
			raise: func(k *status.Keeper) {
				for i := range 30 {
					k.Rot = append(k.Rot, status.Rot{Repository: "photos", Path: fmt.Sprint("data/0/", i), What: "cannot be read", Found: t0, Generations: []string{"1", "2", "3", "4", "5", "6"}})
				}
				k.RotCount = 33
			},
			title: "attic repository photos has ROTTEN files", words: []string{"data/0/9", "1, 2, 3, 4 and 2 more", "20 more of this repository", "33 rotten files in all"},
			over: func(k *status.Keeper) {
				k.Rot, k.RotCount = slices.Clone(k.Rot), 0
				for i := range k.Rot {
					k.Rot[i].Healed = t0
				}
			},
			clear: "attic repository photos has no rotten files any more",
		},
		"scrub": {
			raise: func(k *status.Keeper) {
				k.Scrub = &status.Scrub{LastFull: t0.Add(-46 * day), Started: t0, Done: 0.125, Paused: "a push", Every: 30 * day}
			},
			title: "attic disk was not read through in time", words: []string{"12 % since", "a push", "30 days"},
			over: func(k *status.Keeper) { k.Scrub = &status.Scrub{LastFull: t0, Every: 30 * day} }, clear: "attic disk was read through again",
		},
		"full in 29 days": {
			raise: func(k *status.Keeper) {
				k.Room = &status.Room{Free: 3e9, PerDay: 1e8, WorstDay: 1e8, FullOn: at.Add(29 * day)}
			},
			title: "attic disk will be full soon", words: []string{"3.0 GB", "100.0 MB", "one worst day kept in reserve"},
			over: func(k *status.Keeper) { k.Room = &status.Room{Free: 3e9, FullOn: at.Add(40 * day)} }, clear: "attic disk has room for longer again",
		},
		"no worst day": {
			raise: func(k *status.Keeper) { k.Room = &status.Room{Free: 9, WorstDay: 10} }, title: "attic disk will be full soon",
			over: func(k *status.Keeper) { k.Room = &status.Room{Free: 11, WorstDay: 10} }, clear: "attic disk has room for longer again",
		},
		"retiring": {
			raise: func(k *status.Keeper) {
				k.Retiring = []status.Retiring{{Repository: "docs", By: "boss", Asked: t0, Due: t0.Add(14 * day)}}
			},
			title: "attic repository docs is being RETIRED", words: []string{"2026-12-06 08:00 UTC", "with the key boss", "ssh attic keep docs"},
			over: func(k *status.Keeper) { k.Retiring = nil }, clear: "attic repository docs is not retiring any more",
		},
		"frozen": {
			raise: func(k *status.Keeper) { k.FrozenSince, k.Frozen = t0, []string{"a session with the key laptop reads"} },
			wait:  7 * day, title: "attic has not expired all that is due for a week", words: []string{"a session with the key laptop reads", "2026-11-22 08:00 UTC"},
			over: func(k *status.Keeper) { k.FrozenSince, k.Frozen = time.Time{}, nil }, clear: "attic expires generations again",
		},
		"clock": {
			raise: func(k *status.Keeper) { k.ClockDoubt = "the clock shows 2056" },
			title: "attic clock does not fit the disk", words: []string{"the clock shows 2056", "accept-clock"},
			over: func(k *status.Keeper) { k.ClockDoubt = "" }, hold: 10 * time.Minute, clear: "attic clock fits the disk again",
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.facts.Keeper = &status.Keeper{Heartbeats: w.facts.Keeper.Heartbeats}
			beats := func(d time.Duration) { // time passes, and heartbeats come
				for ; d > 0; d -= min(d, 12*hour) {
					w.run(min(d, 12*hour))
					w.beat("nas")
				}
			}
			w.keeper(test.raise)
			if test.wait > 0 {
				w.want()
				beats(test.wait - hour)
				w.want()
				beats(2 * hour)
			}
			if len(test.words) > 0 {
				w.wantWords(test.words...)
			}
			w.want(test.title)
			// What cannot be seen ends nothing.
			keeper := w.facts.Keeper
			w.facts.Keeper = nil
			w.look()
			w.facts.Keeper = keeper
			w.want()
			w.keeper(test.over)
			if test.hold > 0 {
				w.want()
				w.run(test.hold)
			}
			w.want(test.clear)
		})
	}
}

// A clock that is not set judges no forecast and no scrub.
func TestNoClockNoForecast(t *testing.T) {
	w := newWorld(t)
	w.facts.Network.ClockSet = false
	w.keeper(func(k *status.Keeper) {
		k.Room = &status.Room{Free: 3e9, FullOn: t0.Add(-day)}
		k.Scrub = &status.Scrub{LastFull: t0.Add(-400 * day), Every: day}
	})
	w.want()
}

// Each decision is mailed once, also over restarts, and however often the status
// is read.
func TestNotices(t *testing.T) {
	w := newWorld(t)
	event := func(id, kind string) status.Event {
		return status.Event{ID: id, Kind: kind, At: t0, By: "boss", Repository: "photos", Generation: "000001-20261105T030000Z", Text: "ransomware\r\nBcc: everybody@example.com"}
	}
	w.keeper(func(k *status.Keeper) { k.Events = []status.Event{event("a", status.EventRejected)} })
	w.wantWords("admin key declared a suspect generation bad", "boss", "000001-20261105T030000Z", "ransomware  Bcc: everybody@example.com", "not in your hands")
	w.want("attic repository photos generation was rejected")
	w.run(2 * hour)
	w.want()
	var many []status.Event
	for i, n := range notices {
		many = append(many, event(fmt.Sprint("b", i), n.kind))
	}
	w.keeper(func(k *status.Keeper) {
		k.Events = append(slices.Clone(k.Events), many...)
		k.Events = append(k.Events, event("z", "no such kind"), status.Event{ID: strings.Repeat("x", 100), Kind: status.EventFloor})
	})
	if got := w.take(); len(got) != len(notices) {
		t.Errorf("%q", got)
	}
	// A keeper that was taken over lists what it likes: what is remembered is bounded.
	w.keeper(func(k *status.Keeper) {
		k.Events = nil
		for i := range 10_000 {
			k.Events = append(k.Events, event(fmt.Sprint("c", i), status.EventFloor))
		}
	})
	if got := w.take(); len(got) > status.MaxEvents {
		t.Errorf("%d mails at once", len(got))
	}
	if len(w.state.Told) > status.MaxEvents {
		t.Errorf("%d are remembered", len(w.state.Told))
	}
}

// A keeper that was taken over forges no headers, no commands, and no mail that
// is too large.
func TestHostileHistory(t *testing.T) {
	w := newWorld(t)
	evil := "x\r\nBcc: all@example.com\r\n\r\n; rm -rf / #" + strings.Repeat("é", 5000)
	var many []string
	for range 200 {
		many = append(many, evil)
	}
	w.keeper(func(k *status.Keeper) {
		for range 200 {
			k.Repositories = append(k.Repositories, status.RepositoryStatus{Name: evil, Suspect: true, Suspects: []status.SuspectStatus{{Generation: evil, Reasons: many}}})
			k.Retiring = append(k.Retiring, status.Retiring{Repository: evil, By: evil})
			k.Untrue = append(k.Untrue, status.Untrue{Host: evil, What: evil})
			k.Rot = append(k.Rot, status.Rot{Repository: evil, Path: evil, What: evil, Generations: many})
			k.Events = append(k.Events, status.Event{ID: fmt.Sprint(len(k.Events)), Kind: status.EventRetire, Repository: evil, Generation: evil, Text: evil, By: evil})
		}
		k.Frozen, k.FrozenSince, k.ClockDoubt = many, t0, evil
		k.Scrub = &status.Scrub{Every: time.Second, LastFull: t0.Add(-day), Paused: evil}
		k.Room = &status.Room{Free: -1 << 63, WorstDay: 1<<63 - 1, PerDay: -1 << 63, FullOn: t0.Add(-1e6 * hour)}
	})
	w.now, w.up = w.now.Add(8*day), w.up+8*day
	w.look()
	if len(w.mails) < 8 {
		t.Fatalf("%d mails", len(w.mails))
	}
	for _, m := range w.mails {
		text, err := m.letter().Text("attic@site.example", []string{"you@site.example"})
		if err != nil {
			t.Fatal(err)
		}
		parsed, err := mail.ReadMessage(strings.NewReader(string(text)))
		if err != nil {
			t.Fatal(err)
		}
		if len(parsed.Header) != 9 || parsed.Header.Get("Bcc") != "" {
			t.Errorf("headers %v", parsed.Header)
		}
		for l := range strings.Lines(m.Body) {
			if l = strings.TrimSpace(l); strings.HasPrefix(l, "- ssh ") && strings.ContainsAny(l, ";#\"'$`\\|&<>()") {
				t.Errorf("a command to paste: %q", l)
			}
		}
	}
}
