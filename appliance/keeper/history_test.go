package keeper_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"farkeep/appliance/keeper"
	"farkeep/appliance/keepercall"
	"farkeep/appliance/part"
	"farkeep/appliance/status"
	"farkeep/shared/hint"
	"farkeep/shared/history"
	"farkeep/shared/pushwire"
	"farkeep/shared/settings"
)

const day = 24 * time.Hour

// historyOf is a history that lets go of what is older than three days.
func historyOf() settings.History {
	return settings.History{
		Daily: 3, FloorGenerations: 2, FloorAge: settings.Duration(time.Hour), ExpirePerDay: 100,
		RetireAfter: settings.Duration(3 * day), WhenFull: history.Refuse, VanishPercent: 20, ChangePercent: 50,
	}
}

// restart starts the machine anew, with its clock moved on by d.
func (b *bench) restart(d time.Duration) {
	b.Helper()
	b.stop()
	b.curated = b.status().Curated
	b.ahead += d
	b.boots++
	b.booted = time.Now()
	if err := status.Write(b.paths.Boot(), status.Boot{BootID: fmt.Sprint("boot-", b.boots)}); err != nil {
		b.Fatal(err)
	}
	b.run()
	if err := b.ask(keepercall.Attach, nil, nil); err != nil {
		b.Fatal(err)
	}
}

// days pushes once a day.
func (b *bench) days(n int) {
	b.Helper()
	for range n {
		b.restart(day)
		b.push("photos", repo{"a": fmt.Sprint(b.ahead), "b": "two", "c": "three", "d": "four"})
	}
}

func (b *bench) folders(repository string) []string {
	b.Helper()
	entries, err := os.ReadDir(filepath.Join(b.paths.Disk(), "generations", repository))
	if err != nil && !os.IsNotExist(err) {
		b.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), ".") {
			names = append(names, e.Name())
		}
	}
	return names
}

// await waits until the status says what is wanted.
func (b *bench) await(what string, ok func(*status.Keeper) bool) *status.Keeper {
	b.Helper()
	for {
		s := b.status()
		if ok(s) {
			return s
		}
		select {
		case <-b.Context().Done():
			b.Fatalf("never came: %s; %+v", what, s)
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// settled waits for the pass of the curator that follows a start of the machine.
func (b *bench) settled() *status.Keeper {
	b.Helper()
	return b.await("a pass", func(s *status.Keeper) bool { return !s.Curated.IsZero() && !s.Curated.Equal(b.curated) })
}

func (b *bench) list(repository string) (all []pushwire.Generation) {
	b.Helper()
	args := admin
	args.Repository = repository
	c := b.open(keepercall.Generations, args)
	defer c.Close()
	for {
		var a keepercall.Answer
		if err := c.ReadReply(&a); err != nil {
			b.Fatal(err)
		}
		if a.Then == keepercall.ThenEnd {
			return all
		}
		var g pushwire.Generation
		if err := json.Unmarshal(a.Out, &g); err != nil {
			b.Fatal(err)
		}
		all = append(all, g)
	}
}

var admin = keepercall.Args{Key: "boss", Role: "admin"}

// do runs an admin's verb.
func (b *bench) do(verb string, change func(*keepercall.Args), answer any) error {
	b.Helper()
	args := admin
	change(&args)
	c := b.open(verb, args)
	defer c.Close()
	_, err := line(c, answer)
	return err
}

func startHistory(t *testing.T) *bench {
	t.Helper()
	b := startWith(t, keeper.Brief{Reserve: 1, History: historyOf()})
	b.mount()
	return b
}

func TestExpiryOnARealDisk(t *testing.T) {
	b := startHistory(t)
	b.days(6)
	b.await("three are left", func(s *status.Keeper) bool { return len(s.Repositories) == 1 && s.Repositories[0].Generations == 3 })
	if got := b.folders("photos"); len(got) != 3 || !strings.HasPrefix(got[2], "000006-") {
		t.Errorf("%v", got)
	}
	going, err := os.ReadDir(filepath.Join(b.paths.Disk(), ".farkeep/going"))
	if err != nil || len(going) != 0 {
		t.Errorf("going: %v, %v", going, err)
	}
	all := b.list("photos")
	for i, g := range all {
		if !g.Keep || g.Why == "" || g.Standing != "good" {
			t.Errorf("%d: %+v", i, g)
		}
	}
	if s := b.status(); len(s.Frozen) > 0 || s.ClockDoubt != "" || s.Room == nil || s.Room.Free == 0 {
		t.Errorf("%+v", s)
	}
	// What is left is whole.
	c := b.open(keepercall.Verify, b.with(func(a *keepercall.Args) { a.Repository, a.Generation = "photos", all[0].Name }))
	var v pushwire.VerifyAnswer
	if _, err := line(c, &v); err != nil || len(v.Bad) > 0 || v.Files != 4 {
		t.Errorf("%+v, %v", v, err)
	}
}

// Whatever the clock does, and whichever card is in the machine, nothing goes that
// should not.
func TestClockAndCardsOnARealDisk(t *testing.T) {
	for name, test := range map[string]struct {
		jump   time.Duration
		frozen bool
	}{
		"set back":                         {-day, true},
		"forward 47 h":                     {47 * time.Hour, false},
		"forward 49 h":                     {49 * time.Hour, true},
		"forward 30 years":                 {30 * 365 * day, true},
		"another card":                     {0, false},
		"another card, 49 hours, no rules": {49 * time.Hour, true},
	} {
		t.Run(name, func(t *testing.T) {
			b := startHistory(t)
			b.brief.History.FloorGenerations, b.brief.History.FloorAge = 4, settings.Duration(5*day)
			b.days(6)
			b.settled()
			before := b.folders("photos")
			if len(before) != 5 { // younger than 5 days
				t.Fatalf("%v", before)
			}
			b.brief.History = settings.History{FloorOnly: true, FloorGenerations: 1, ExpirePerDay: 1000, RetireAfter: settings.Duration(time.Second), WhenFull: history.Thin}
			if strings.HasPrefix(name, "another card") {
				b.stop()
				if err := os.RemoveAll(b.paths.StateDir("keeper")); err != nil {
					t.Fatal(err)
				}
				if err := os.MkdirAll(b.paths.StateDir("keeper"), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			b.restart(test.jump)
			s := b.settled()
			if (len(s.Frozen) > 0) != test.frozen || (s.ClockDoubt != "") != test.frozen {
				t.Errorf("frozen %q, doubt %q", s.Frozen, s.ClockDoubt)
			}
			want := len(before)
			if test.jump == 47*time.Hour {
				want = 4 // the floor's number
			}
			if got := b.folders("photos"); len(got) != want {
				t.Errorf("%v were left of %v", got, before)
			}
			if !test.frozen {
				return
			}
			// The admin key accepts the time, and only then the floor that the card
			// and the disk agree on counts.
			var clock pushwire.ClockAnswer
			if err := b.do(keepercall.AcceptClock, func(*keepercall.Args) {}, &clock); err != nil || clock.Now.IsZero() {
				t.Fatalf("%+v, %v", clock, err)
			}
			if err := b.do(keepercall.Floor, func(a *keepercall.Args) { a.Number, a.Age = 1, "0s" }, nil); err != nil {
				t.Fatal(err)
			}
			b.await("one is left", func(s *status.Keeper) bool { return len(s.Repositories) == 1 && s.Repositories[0].Generations == 1 })
		})
	}
}

func TestSuspectFreezesUntilAnAdminDecides(t *testing.T) {
	b := startHistory(t)
	b.brief.History.ExpirePerDay = 0
	b.days(5)
	b.brief.History.ExpirePerDay = 100
	files := repo{}
	for i := range 300 {
		files[fmt.Sprintf("photo-%03d", i)] = strings.Repeat(fmt.Sprint(i), 1000)
	}
	b.push("docs", files)
	b.restart(day)
	gone := b.push("docs", repo{"README": "pay"})
	b.await("it is suspect", func(s *status.Keeper) bool {
		return slices.ContainsFunc(s.Repositories, func(r status.RepositoryStatus) bool {
			return r.Name == "docs" && len(r.Suspects) == 1 && r.Suspects[0].Generation == gone && len(r.Suspects[0].Reasons) > 0
		})
	})
	// The other repository is not concerned.
	b.await("three are left", func(s *status.Keeper) bool { return len(b.folders("photos")) == 3 })
	s := b.await("frozen", func(s *status.Keeper) bool { return len(s.Frozen) > 0 })
	if !slices.ContainsFunc(s.Frozen, func(why string) bool { return strings.HasPrefix(why, "docs: generation "+gone) }) || s.FrozenSince.IsZero() {
		t.Errorf("frozen %q since %v", s.Frozen, s.FrozenSince)
	}
	list := b.list("docs")
	if g := list[1]; g.Standing != "suspect" || g.Why != "suspect" || len(g.Reasons) == 0 {
		t.Errorf("%+v", g)
	}
	for _, role := range []string{"push", "restore", ""} {
		for _, verb := range []string{keepercall.Accept, keepercall.Reject, keepercall.Retire, keepercall.Keep, keepercall.AcceptClock, keepercall.Floor} {
			err := b.do(verb, func(a *keepercall.Args) {
				a.Role, a.Repositories, a.Repository, a.Generation, a.Number, a.Age = role, []string{"*"}, "docs", gone, 1, "0s"
			}, nil)
			if hint.Code(err) != hint.ExitRefused {
				t.Errorf("%s with a %q key: %v", verb, role, err)
			}
		}
	}
	if err := b.do(keepercall.Accept, func(a *keepercall.Args) { a.Repository, a.Generation = "docs", list[0].Name }, nil); err == nil {
		t.Error("accepted what was not suspect")
	}
	if err := b.do(keepercall.Reject, func(a *keepercall.Args) {
		a.Repository, a.Generation, a.Why = "docs", gone, "ransomware\r\nBcc: all@example.com"
	}, nil); err != nil {
		t.Fatal(err)
	}
	s = b.await("not frozen", func(s *status.Keeper) bool { return len(s.Frozen) == 0 && s.FrozenSince.IsZero() })
	last := s.Events[len(s.Events)-1]
	if last.Kind != status.EventRejected || last.By != "boss" || last.Generation != gone || last.ID == "" {
		t.Errorf("%+v", last)
	}
	b.restart(time.Minute)
	if got := b.list("docs")[1].Standing; got != "rejected" {
		t.Errorf("after a restart it is %q", got)
	}
}

func TestReaderFreezes(t *testing.T) {
	b := startHistory(t)
	b.brief.History.ExpirePerDay = 0
	b.days(5)
	b.brief.History.ExpirePerDay = 100
	b.restart(0) // without a pass in between: the reader comes first below
	b.settled()
	b.brief.History.Daily = 2
	b.stop()
	b.run()
	c := b.open(keepercall.Reading, keepercall.Args{Key: "laptop", Role: "restore"})
	if err := c.ReadReply(nil); err != nil {
		t.Fatal(err)
	}
	before := b.folders("photos")
	if err := b.ask(keepercall.Attach, nil, nil); err != nil {
		t.Fatal(err)
	}
	b.await("frozen", func(s *status.Keeper) bool {
		return len(s.Frozen) == 1 && strings.Contains(s.Frozen[0], "key laptop")
	})
	if got := b.folders("photos"); !slices.Equal(got, before) {
		t.Errorf("%v, there were %v", got, before)
	}
	c.Close()
	b.await("not frozen", func(s *status.Keeper) bool { return len(s.Frozen) == 0 && s.Repositories[0].Generations == 2 })
	push := b.open(keepercall.Reading, b.args)
	if err := push.ReadReply(nil); hint.Code(err) != hint.ExitRefused {
		t.Errorf("a push key reads: %v", err)
	}
}

func TestRetireOnARealDisk(t *testing.T) {
	b := startHistory(t)
	b.days(2)
	b.push("docs", repo{"a": "1"})
	var r pushwire.Retiring
	if err := b.do(keepercall.Retire, func(a *keepercall.Args) { a.Repository = "docs" }, &r); err != nil || r.Due.Sub(r.Asked) != 3*day {
		t.Fatalf("%+v, %v", r, err)
	}
	if s := b.status(); len(s.Retiring) != 1 || s.Retiring[0].By != "boss" || s.Events[len(s.Events)-1].Kind != status.EventRetire {
		t.Errorf("%+v", s)
	}
	if _, _, err := b.offer("docs", repo{"a": "2"}); hint.Code(err) != hint.ExitRefused || !strings.Contains(err.Error(), "being retired") || !strings.Contains(hint.Of(err), "keep docs") {
		t.Errorf("a push of it: %v, hint %q", err, hint.Of(err))
	}
	b.restart(day)
	b.restart(day)
	b.settled()
	if len(b.folders("docs")) != 1 {
		t.Fatal("it left too early")
	}
	if err := b.do(keepercall.Keep, func(a *keepercall.Args) { a.Repository = "docs" }, nil); err != nil {
		t.Fatal(err)
	}
	b.push("docs", repo{"a": "2"})
	if err := b.do(keepercall.Retire, func(a *keepercall.Args) { a.Repository = "docs" }, &r); err != nil {
		t.Fatal(err)
	}
	for range 4 {
		b.restart(day)
	}
	s := b.await("it left", func(s *status.Keeper) bool {
		return len(s.Retiring) == 0 && !slices.ContainsFunc(s.Repositories, func(r status.RepositoryStatus) bool { return r.Name == "docs" })
	})
	if len(b.folders("docs")) != 0 || len(b.folders("photos")) == 0 {
		t.Error("the wrong one left")
	}
	if e := s.Events[len(s.Events)-1]; e.Kind != status.EventRetired || e.Repository != "docs" {
		t.Errorf("%+v", e)
	}
}

func TestCommitInterval(t *testing.T) {
	b := startWith(t, keeper.Brief{Reserve: 1, History: settings.History{CommitInterval: settings.Duration(5 * time.Minute)}})
	b.mount()
	first := repo{"a": "1"}
	b.push("photos", first)
	if _, _, err := b.offer("photos", repo{"a": "2"}); hint.Code(err) != hint.ExitUnreachable || !strings.Contains(hint.Of(err), "commit_interval") {
		t.Errorf("%v, hint %q", err, hint.Of(err))
	}
	b.push("photos", first) // the same is confirmed, as often as anybody likes
	b.push("docs", repo{"a": "1"})
	// A clock that is thrown forward does not help within one run.
	b.restart(time.Minute)
	if _, _, err := b.offer("photos", repo{"a": "2"}); hint.Code(err) != hint.ExitUnreachable {
		t.Errorf("after a restart: %v", err)
	}
	b.restart(5 * time.Minute)
	b.push("photos", repo{"a": "2"})
}

func TestHeartbeatsAreBounded(t *testing.T) {
	b := startHistory(t)
	content := repo{"a": "1"}
	b.push("photos", content)
	_, o, _ := content.manifest(t)
	beat := pushwire.Heartbeat{Host: "home", At: time.Unix(100, 0), Repositories: []pushwire.RepositoryDigest{{Name: "photos", Digest: o.Digest}}}
	for i := range 5 {
		beat.At = time.Unix(int64(i), 0)
		if err := b.heartbeat(beat); err != nil {
			t.Fatal(err)
		}
	}
	if s := b.status(); len(s.Heartbeats) != 1 || !s.Heartbeats[0].At.Equal(time.Unix(0, 0)) {
		t.Errorf("written more than once: %+v", s.Heartbeats)
	}
	lie := beat
	lie.Repositories = []pushwire.RepositoryDigest{{Name: "photos", Digest: strings.Repeat("0", 64)}}
	for range 20 {
		for _, host := range []string{"home", "made-up\u2028name", "other"} {
			lie.Host = host
			if err := b.heartbeat(lie); err == nil {
				t.Fatal("a lie was believed")
			}
		}
	}
	s := b.await("the lie is told", func(s *status.Keeper) bool { return len(s.Untrue) > 0 })
	if len(s.Untrue) > status.MaxUntrue || len(s.Untrue) != 2 {
		t.Errorf("%+v", s.Untrue)
	}
	for _, u := range s.Untrue {
		if u.Host != "home" || len(u.What) > status.MaxText || !strings.Contains(u.What, "photos") {
			t.Errorf("%+v", u)
		}
	}
	// A new card and a dark disk: nothing is known, which is no lie.
	if err := b.ask(keepercall.Release, nil, nil); err != nil {
		t.Fatal(err)
	}
	b.stop()
	if err := os.RemoveAll(filepath.Join(b.paths.StateDir("keeper"), "repositories.json")); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(b.paths.Run, part.Disk, "status.json")); err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	b.run()
	if err := b.heartbeat(beat); hint.Code(err) != hint.ExitUnreachable {
		t.Errorf("%v", err)
	}
}

// A full disk refuses with numbers: what it needs, what it has, who holds it.
func TestFullDiskNamesWhoHolds(t *testing.T) {
	b := startHistory(t)
	b.push("photos", repo{"a": strings.Repeat("x", 8<<20)})
	b.push("docs", repo{"a": strings.Repeat("y", 4<<20)})
	_, _, err := b.offer("photos", repo{"a": strings.Repeat("z", 31<<20)})
	if hint.Code(err) != hint.ExitRefused {
		t.Fatalf("%v", err)
	}
	for _, want := range []string{"needs", "are free", "of 2 generations the most is held by: photos 000001-"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q lacks %q", err, want)
		}
	}
	if len(b.folders("photos")) != 1 {
		t.Error("history went to make room")
	}
}
