package curator

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"farkeep/appliance/status"
	"farkeep/shared/generations"
	"farkeep/shared/history"
	"farkeep/shared/settings"
	"farkeep/shared/tomlfile"

	"github.com/google/go-cmp/cmp"
	"github.com/pelletier/go-toml/v2"
)

// shelf is a disk in memory. Records go through TOML as on the real one.
type shelf struct {
	records map[string]string
	lists   map[string][]generations.Generation
	held    string // a generation in use
	free    int64
	total   int64
	// after is called for everything that is written; an error is a power cut.
	after  func(what string) error
	failed error
}

func (s *shelf) step(what string) error {
	if s.failed == nil && s.after != nil {
		s.failed = s.after(what)
	}
	return s.failed
}

func (s *shelf) Repositories() (names []string, err error) {
	for name := range s.lists {
		names = append(names, name)
	}
	slices.Sort(names)
	return names, s.failed
}

func (s *shelf) List(_ context.Context, repository string) ([]generations.Generation, error) {
	return slices.Clone(s.lists[repository]), s.failed
}

func (s *shelf) Current(_ context.Context, repository string) (generations.Generation, error) {
	for _, g := range slices.Backward(s.lists[repository]) {
		if g.Standing.Counts() {
			return g, nil
		}
	}
	return generations.Generation{}, generations.ErrNone
}

func (s *shelf) Decide(_ context.Context, repository, name string, d generations.Decision) error {
	for i, g := range s.lists[repository] {
		if g.Name == name && g.Suspect {
			s.lists[repository][i].Standing = d.Standing
			return nil
		}
	}
	return errors.New("not suspect")
}

func (s *shelf) Remove(ctx context.Context, repository, name string) error {
	if current, err := s.Current(ctx, repository); err == nil && current.Name == name {
		return errors.New("that is the current one")
	}
	if name == s.held {
		return fmt.Errorf("%w: by a push", generations.ErrHeld)
	}
	list := s.lists[repository]
	i := slices.IndexFunc(list, func(g generations.Generation) bool { return g.Name == name })
	if i < 0 {
		return errors.New("there is none")
	}
	s.free += list[i].NewBytes
	s.lists[repository] = slices.Delete(list, i, i+1)
	return s.step("removed " + repository + " " + name)
}

func (s *shelf) RemoveRepository(_ context.Context, repository string) error {
	delete(s.lists, repository)
	return s.step("removed " + repository)
}

func (s *shelf) Sweep(context.Context) (int, error) { return 0, s.failed }

func (s *shelf) Space() (free, reserve, total int64, err error) {
	return s.free, 100, s.total, s.failed
}

func (s *shelf) ReadRecord(name string, v any) error {
	text, ok := s.records[name]
	if !ok {
		return fs.ErrNotExist
	}
	return tomlfile.Parse(name, []byte(text), v)
}

func (s *shelf) WriteRecord(name string, v any) error {
	var b bytes.Buffer
	if err := toml.NewEncoder(&b).Encode(v); err != nil {
		return err
	}
	s.records[name] = b.String()
	return s.step("wrote " + name)
}

// world is a curator, its disk and the clocks around it.
type world struct {
	*testing.T
	shelf   *shelf
	history settings.History
	true    time.Time     // what no clock shows
	off     time.Duration // the clock minus the true time
	booted  time.Time
	boots   int
	unset   bool
	readers []string
	events  []status.Event
	*Curator
}

func newWorld(t *testing.T) *world {
	w := &world{T: t, shelf: &shelf{records: map[string]string{}, lists: map[string][]generations.Generation{}, free: 1 << 30}, true: noon}
	w.history = settings.History{Within: days(2), Daily: 3, FloorGenerations: 2, FloorAge: days(1), ExpirePerDay: 2, RetireAfter: days(14), WhenFull: history.Refuse}
	w.boot()
	return w
}

func days(n int) settings.Duration { return settings.Duration(time.Duration(n) * 24 * time.Hour) }

// boot starts the machine, and with it the curator.
func (w *world) boot() {
	w.boots++
	w.booted = w.true
	w.open()
}

// open starts the curator.
func (w *world) open() {
	w.Helper()
	w.shelf.failed = nil
	c, err := New(w.Context(), w.shelf, Options{
		History: w.history, Now: func() time.Time { return w.true.Add(w.off) }, Believed: func() bool { return !w.unset },
		Uptime: func() time.Duration { return w.true.Sub(w.booted) + time.Second }, Boot: fmt.Sprint(w.boots),
		Readers: func() []string { return w.readers }, Event: func(e status.Event) { w.events = append(w.events, e) }, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		w.Fatal(err)
	}
	w.Curator = c
}

// commit adds a generation of n bytes.
func (w *world) commit(repository string, n int64, standing generations.Standing) string {
	now := w.true.Add(w.off).Truncate(time.Second)
	list := w.shelf.lists[repository]
	sequence := int64(1)
	if len(list) > 0 {
		sequence = list[len(list)-1].Sequence + 1
	}
	g := generations.Generation{
		Name: generations.Name(sequence, now), Format: 1, Repository: repository, Sequence: sequence, Committed: now,
		ClockSet: w.Believed(), NewBytes: n, Standing: standing, Suspect: standing != generations.Good,
	}
	w.shelf.lists[repository] = append(list, g)
	w.shelf.free -= n
	return g.Name
}

func (w *world) mustPass() {
	w.Helper()
	if err := w.Pass(w.Context()); err != nil {
		w.Fatal(err)
	}
}

// run lets days pass: a commit and a pass each.
func (w *world) run(n int) {
	w.Helper()
	for range n {
		w.true = w.true.Add(24 * time.Hour)
		w.commit("photos", 10, generations.Good)
		w.mustPass()
	}
}

// numbers are the sequences that are left.
func (w *world) numbers(repository string) (out []int64) {
	for _, g := range w.shelf.lists[repository] {
		out = append(out, g.Sequence)
	}
	return out
}

func (w *world) want(numbers ...int64) {
	w.Helper()
	if diff := cmp.Diff(numbers, w.numbers("photos")); diff != "" {
		w.Errorf("generations (-want +got)\n%s", diff)
	}
}

func (w *world) wantFrozen(words string) {
	w.Helper()
	s := w.State()
	if words == "" {
		if len(s.Frozen) > 0 || !s.FrozenSince.IsZero() {
			w.Errorf("frozen since %v: %q", s.FrozenSince, s.Frozen)
		}
		return
	}
	if !strings.Contains(strings.Join(s.Frozen, "\n"), words) || s.FrozenSince.IsZero() {
		w.Errorf("frozen since %v: %q, want %q", s.FrozenSince, s.Frozen, words)
	}
}

func (w *world) wantEvents(kinds ...string) {
	w.Helper()
	var got []string
	for _, e := range w.events {
		got = append(got, e.Kind)
	}
	w.events = nil
	if diff := cmp.Diff(kinds, got); diff != "" {
		w.Errorf("events (-want +got)\n%s", diff)
	}
}

func TestExpires(t *testing.T) {
	w := newWorld(t)
	w.run(10)
	w.want(6, 7, 8, 9, 10) // within 2 days, then 3 daily
	w.wantFrozen("")
	plan, err := w.Explain(t.Context(), "photos")
	if err != nil {
		t.Fatal(err)
	}
	newest := plan[w.shelf.lists["photos"][4].Name]
	if !newest.Keep || newest.Why == "" {
		t.Errorf("the newest: %+v", newest)
	}
}

func TestFreezes(t *testing.T) {
	for name, test := range map[string]struct {
		freeze func(*world)
		why    string
		thaw   func(*world)
	}{
		"the clock is not set":  {func(w *world) { w.unset = true }, "not set", func(w *world) { w.unset = false }},
		"the clock is set back": {func(w *world) { w.off = -5 * 24 * time.Hour }, "has seen", func(w *world) { w.off = 0 }},
		"49 h forward":          {func(w *world) { w.off = 49 * time.Hour }, "can explain", func(w *world) { w.off = 0 }},
		"30 years forward":      {func(w *world) { w.off = 30 * 365 * 24 * time.Hour }, "can explain", func(w *world) { w.off = 0 }},
		"30 years, and a new card": {
			func(w *world) { w.off = 30 * 365 * 24 * time.Hour; w.boot() }, "can explain",
			func(w *world) {
				if _, now, err := w.AcceptClock("boss"); err != nil || now.IsZero() {
					w.Error(now, err)
				}
			},
		},
		"somebody reads": {func(w *world) { w.readers = []string{"boss"} }, "key boss reads", func(w *world) { w.readers = nil }},
		"a generation is suspect": {
			func(w *world) { w.commit("photos", 10, generations.Suspect) }, "photos: generation 000011-",
			func(w *world) {
				err := w.Decide(w.Context(), "photos", w.shelf.lists["photos"][len(w.numbers("photos"))-1].Name, generations.Accepted, "boss", "mine")
				if err != nil {
					w.Error(err)
				}
			},
		},
		"the floor cannot be read": {
			func(w *world) { w.shelf.records["floor"] = "broken"; w.open() }, "floor",
			func(w *world) {
				if err := w.LowerFloor(2, 24*time.Hour, "boss"); err != nil {
					w.Error(err)
				}
			},
		},
		"the clock cannot be read": {
			func(w *world) { w.shelf.records["clock"] = "broken"; w.open() }, "record of the time",
			func(w *world) {
				if _, _, err := w.AcceptClock("boss"); err != nil {
					w.Error(err)
				}
			},
		},
		"the clock's record is gone, 30 years forward": {
			func(w *world) { delete(w.shelf.records, "clock"); w.off = 30 * 365 * 24 * time.Hour; w.boot() }, "can explain",
			func(w *world) { w.off = 0 },
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.history.ExpirePerDay = 0
			w.open()
			w.run(10)
			w.history.ExpirePerDay = 100
			w.open()
			test.freeze(w)
			before := w.numbers("photos")
			for range 3 {
				w.mustPass()
				if diff := cmp.Diff(before, w.numbers("photos")); diff != "" {
					t.Fatalf("expired although frozen: %s", diff)
				}
			}
			w.wantFrozen(test.why)
			since := w.State().FrozenSince
			w.open()
			if !w.State().FrozenSince.Equal(since) {
				t.Error("a restart forgot since when it is frozen")
			}
			test.thaw(w)
			w.mustPass()
			if len(w.numbers("photos")) == len(before) {
				t.Error("nothing expired after that")
			}
			w.wantFrozen("")
		})
	}
}

// 47 hours are within what an appliance may have been off: the clock is believed,
// the floor holds, and so does the bound of a day.
func TestForwardALittle(t *testing.T) {
	w := newWorld(t)
	w.history.ExpirePerDay = 0
	w.open()
	w.run(20)
	w.history.ExpirePerDay = 2
	w.open()
	w.off = 47 * time.Hour
	for range 10 {
		w.mustPass()
	}
	if n := len(w.numbers("photos")); n != 18 {
		t.Errorf("%d generations are left, want 18", n)
	}
	w.off = 94 * time.Hour
	w.mustPass()
	w.wantFrozen("can explain")
	if n := len(w.numbers("photos")); n != 18 {
		t.Errorf("%d generations are left, want 18", n)
	}
}

// A new card with no floor, no policy and a fresh state folder changes nothing
// about what the disk remembers.
func TestFloorOutlivesTheCard(t *testing.T) {
	w := newWorld(t)
	w.history.FloorGenerations, w.history.FloorAge = 6, days(8)
	w.open()
	w.run(10)
	w.want(3, 4, 5, 6, 7, 8, 9, 10)
	w.history = settings.History{FloorOnly: true, FloorGenerations: 1, ExpirePerDay: 1000, RetireAfter: days(1)}
	w.boot()
	for range 5 {
		w.mustPass()
	}
	w.want(3, 4, 5, 6, 7, 8, 9, 10)
	// Only the admin key and the card together lower it.
	if err := w.LowerFloor(2, 0, "boss"); err != nil {
		t.Fatal(err)
	}
	w.mustPass()
	w.want(9, 10)
	w.wantEvents(status.EventFloor)
	if err := w.LowerFloor(0, 0, "boss"); err == nil {
		t.Error("a floor of nothing was taken")
	}
}

func TestWhatIsInUseStaysAndHoldsUpNothingElse(t *testing.T) {
	w := newWorld(t)
	w.history.ExpirePerDay = 0
	w.open()
	w.run(12)
	w.history.ExpirePerDay = 3
	w.open()
	w.shelf.held = w.shelf.lists["photos"][0].Name
	w.mustPass()
	w.wantFrozen("000001-")
	w.mustPass()
	w.want(1, 5, 6, 7, 8, 9, 10, 11, 12)
	w.shelf.held = ""
	w.true = w.true.Add(25 * time.Hour)
	w.mustPass()
	w.want(7, 8, 9, 10, 11, 12)
	w.wantFrozen("")
}

func TestPerDayIsCountedOnTheDisk(t *testing.T) {
	w := newWorld(t)
	w.history.ExpirePerDay = 0
	w.open()
	w.run(20)
	w.history.ExpirePerDay = 2
	for i := range 8 {
		w.open() // a restart each time
		w.mustPass()
		w.true = w.true.Add(3 * time.Hour)
		if n := len(w.numbers("photos")); n != 18 {
			t.Fatalf("after %d passes %d are left", i+1, n)
		}
	}
	w.mustPass()
	if n := len(w.numbers("photos")); n != 16 {
		t.Errorf("on the next day %d are left, want 16", n)
	}
	// Who breaks the count wins nothing for a day.
	w.true = w.true.Add(12 * time.Hour)
	w.shelf.records["expiry"] = "broken"
	w.open()
	w.mustPass()
	w.true = w.true.Add(20 * time.Hour)
	w.mustPass()
	if n := len(w.numbers("photos")); n != 16 {
		t.Errorf("with a broken count %d are left", n)
	}
	w.true = w.true.Add(5 * time.Hour)
	w.mustPass()
	if n := len(w.numbers("photos")); n != 14 {
		t.Errorf("a day later %d are left, want 14", n)
	}
}

// TestPilesUp: whoever pushes more in a day than may go in one hears of it, before the
// disk is full; a change of the rules that takes days is no alarm of a week.
func TestPilesUp(t *testing.T) {
	w := newWorld(t)
	w.history.ExpirePerDay = 2
	w.open()
	told := 0
	for day := range 12 {
		for range 8 {
			w.commit("photos", 10, generations.Good)
			w.true = w.true.Add(3 * time.Hour)
			w.mustPass()
		}
		if len(w.State().Frozen) > 0 && told == 0 {
			told = day
			w.wantFrozen("expire_per_day = 2 lets go 2 in 24 hours")
		}
	}
	if told == 0 || w.State().FrozenSince.IsZero() {
		t.Errorf("eight are pushed in a day and two go: told on day %d, since %v", told, w.State().FrozenSince)
	}
	// The operator raises it, and it is over.
	w.history.ExpirePerDay = 48
	w.open()
	w.mustPass()
	w.wantFrozen("")
	// 0 was chosen.
	w.history.ExpirePerDay = 0
	w.open()
	for range 40 {
		w.commit("photos", 10, generations.Good)
		w.true = w.true.Add(3 * time.Hour)
	}
	w.mustPass()
	w.wantFrozen("")
}

func TestRejectedGoesAndMayComeBack(t *testing.T) {
	w := newWorld(t)
	w.history.FloorAge = settings.Duration(25 * time.Hour)
	w.open()
	w.run(3)
	bad := w.commit("photos", 10, generations.Suspect)
	w.run(1)
	if err := w.Decide(t.Context(), "photos", bad, generations.Rejected, "boss", "ransom\nware"); err != nil {
		t.Fatal(err)
	}
	w.mustPass()
	w.want(1, 2, 3, 4, 5) // the floor's age holds the rejected one
	w.true = w.true.Add(time.Hour)
	w.mustPass()
	w.want(1, 2, 3, 5)
	w.wantEvents(status.EventRejected)
}

func TestRetire(t *testing.T) {
	w := newWorld(t)
	w.run(3)
	w.commit("docs", 10, generations.Good)
	if _, err := w.Retire("none", "boss"); err == nil {
		t.Error("retired what is not there")
	}
	r, err := w.Retire("docs", "boss")
	if err != nil || !r.Due.Equal(w.true.Add(14*24*time.Hour)) {
		t.Fatalf("%+v, %v", r, err)
	}
	if w.Refuse("docs") == nil || w.Refuse("photos") != nil {
		t.Error("pushes of it are taken, or of another are not")
	}
	if _, err := w.Retire("docs", "boss"); err != nil {
		t.Error(err)
	}
	w.wantEvents(status.EventRetire)
	w.run(10)
	if err := w.Keep("docs", "boss"); err != nil {
		t.Fatal(err)
	}
	if w.Refuse("docs") != nil || len(w.State().Retiring) != 0 {
		t.Error("it is still retiring")
	}
	if err := w.Keep("docs", "boss"); err == nil {
		t.Error("cancelled twice")
	}
	w.run(20)
	if len(w.numbers("docs")) != 1 {
		t.Fatal("it left although that was cancelled")
	}
	w.wantEvents(status.EventKept)

	if r, err = w.Retire("docs", "boss"); err != nil {
		t.Fatal(err)
	}
	// A card with another delay, and a clock that is thrown as far as it is
	// believed, at every start anew, shorten nothing by much.
	w.history.RetireAfter = days(1)
	w.run(3)
	for range 4 {
		w.off += 47 * time.Hour
		w.boot()
		w.mustPass()
	}
	if len(w.numbers("docs")) != 1 {
		t.Fatal("a thrown clock shortened the delay")
	}
	if got := w.State().Retiring; len(got) != 1 || got[0].Due.Before(w.true.Add(w.off+6*24*time.Hour)) {
		t.Errorf("due %+v", got)
	}
	w.run(8)
	if len(w.numbers("docs")) != 0 || len(w.State().Retiring) != 0 {
		t.Error("it did not leave")
	}
	w.wantEvents(status.EventRetire, status.EventRetired)
}

// While nothing may go, nothing retires either.
func TestRetireWaits(t *testing.T) {
	w := newWorld(t)
	w.run(3)
	if _, err := w.Retire("photos", "boss"); err != nil {
		t.Fatal(err)
	}
	w.readers = []string{"boss"}
	w.true = w.true.Add(15 * 24 * time.Hour)
	w.mustPass()
	if len(w.numbers("photos")) == 0 {
		t.Fatal("retired under a reader")
	}
	w.readers, w.off = nil, 72*time.Hour
	w.mustPass()
	if len(w.numbers("photos")) == 0 {
		t.Fatal("retired by a thrown clock")
	}
	if _, err := w.Retire("photos", "boss"); err != nil {
		t.Error(err)
	}
	w.off = 0
	w.mustPass()
	if len(w.numbers("photos")) != 0 {
		t.Error("not retired")
	}
	w.commit("docs", 10, generations.Good)
	w.unset = true
	if _, err := w.Retire("docs", "boss"); err == nil {
		t.Error("a delay began that cannot be counted")
	}
}

// An accepted time is taken as soon as the clock is set, and not a day later.
func TestAcceptClockWaits(t *testing.T) {
	w := newWorld(t)
	w.run(1)
	w.off, w.unset = 72*time.Hour, true
	was, now, err := w.AcceptClock("boss")
	if err != nil || !now.IsZero() || was.IsZero() {
		t.Fatalf("%v, %v, %v", was, now, err)
	}
	w.wantEvents(status.EventClockAccepted)
	w.true = w.true.Add(2 * time.Hour)
	w.unset = false
	w.mustPass()
	w.wantFrozen("can explain")
	w.unset = true
	if _, _, err := w.AcceptClock("boss"); err != nil {
		t.Fatal(err)
	}
	w.true = w.true.Add(10 * time.Minute)
	w.unset = false
	w.mustPass()
	w.wantFrozen("")
}

func TestThinning(t *testing.T) {
	w := newWorld(t)
	w.history = settings.History{Yearly: -1, Daily: -1, FloorGenerations: 3, FloorAge: days(2), ExpirePerDay: 2, WhenFull: history.Refuse}
	w.open()
	w.run(10)
	w.shelf.free = 5
	w.mustPass()
	if n := len(w.numbers("photos")); n != 10 {
		t.Fatalf("%d are left although when_full is refuse", n)
	}
	w.history.WhenFull = history.Thin
	w.open()
	bad := w.commit("photos", 1, generations.Suspect)
	w.mustPass()
	if n := len(w.numbers("photos")); n != 11 {
		t.Fatal("a suspect push made history go")
	}
	if err := w.Decide(t.Context(), "photos", bad, generations.Accepted, "boss", ""); err != nil {
		t.Fatal(err)
	}
	w.mustPass()
	if n := len(w.numbers("photos")); n != 10 {
		t.Errorf("%d are left, want 10: one was enough", n)
	}
	w.shelf.free = -1000
	for range 10 {
		w.true = w.true.Add(24 * time.Hour)
		w.mustPass()
	}
	if n := len(w.numbers("photos")); n != 3 {
		t.Errorf("%d are left, want the floor's 3", n)
	}
	// A disk that was full for so long that no day of the last weeks says what a day
	// needs goes on making room.
	w.shelf.free = 1 << 20
	w.run(3)
	w.shelf.total, w.shelf.free = 50<<20, 1000
	for range 100 {
		w.true = w.true.Add(24 * time.Hour)
		w.mustPass()
	}
	if n := len(w.numbers("photos")); n != 3 {
		t.Errorf("%d are left after a hundred days", n)
	}
	if w.events[1].Kind != status.EventThinned || !strings.Contains(w.events[1].Text, "bytes were free") {
		t.Errorf("%+v", w.events[1])
	}
}

// Whatever a pass is cut at, the next one goes on, and no day's bound is lost.
func TestCutAtEveryWrite(t *testing.T) {
	for cut := range 40 {
		w := newWorld(t)
		w.history.ExpirePerDay = 0
		w.open()
		w.run(12)
		w.commit("docs", 10, generations.Good)
		w.history.ExpirePerDay = 3
		w.open()
		if _, err := w.Retire("docs", "boss"); err != nil {
			t.Fatal(err)
		}
		w.true = w.true.Add(14*24*time.Hour + time.Minute)
		left := cut
		w.shelf.after = func(string) error {
			if left--; left < 0 {
				return errors.New("the power went")
			}
			return nil
		}
		err := w.Pass(t.Context())
		w.shelf.after = nil
		w.open()
		w.mustPass()
		if n := len(w.numbers("photos")); n < 9 || err == nil && n != 9 {
			t.Errorf("cut %d: %d are left", cut, n)
		}
		if len(w.numbers("docs")) != 0 || len(w.State().Retiring) != 0 {
			t.Errorf("cut %d: not retired", cut)
		}
		for range 8 {
			w.true = w.true.Add(25 * time.Hour)
			w.mustPass()
		}
		w.want(10, 11, 12)
		if err == nil {
			return
		}
	}
	t.Error("never came to the end")
}

func TestCancelled(t *testing.T) {
	w := newWorld(t)
	w.history.ExpirePerDay = 0
	w.open()
	w.run(10)
	w.history.ExpirePerDay = 100
	w.open()
	ctx, cancel := context.WithCancelCause(t.Context())
	wanted := errors.New("the disk is wanted back")
	w.shelf.after = func(what string) error {
		if strings.HasPrefix(what, "removed") {
			cancel(wanted)
		}
		return nil
	}
	if err := w.Pass(ctx); !errors.Is(err, wanted) {
		t.Errorf("%v", err)
	}
	if n := len(w.numbers("photos")); n != 9 {
		t.Errorf("%d are left: one was at work", n)
	}
}

func TestTimes(t *testing.T) {
	g := func(hours int, set bool) generations.Generation {
		return generations.Generation{Committed: noon.Add(time.Duration(hours) * time.Hour), ClockSet: set}
	}
	for name, test := range map[string]struct {
		list []generations.Generation
		want []int
	}{
		"as they are":                {[]generations.Generation{g(-3, true), g(-2, true), g(-1, true)}, []int{-3, -2, -1}},
		"one from the future":        {[]generations.Generation{g(-3, true), g(9000, true), g(-1, true)}, []int{-3, -1, -1}},
		"the newest from the future": {[]generations.Generation{g(-3, true), g(9000, true)}, []int{-3, 0}},
		"one with no clock":          {[]generations.Generation{g(-9000, false), g(-2, true)}, []int{-2, -2}},
		"set back":                   {[]generations.Generation{g(-1, true), g(-5, true)}, []int{-5, -5}},
	} {
		t.Run(name, func(t *testing.T) {
			for i, got := range times(noon, test.list) {
				if want := noon.Add(time.Duration(test.want[i]) * time.Hour); !got.Equal(want) {
					t.Errorf("%d: %v, want %v", i, got, want)
				}
			}
		})
	}
}

func TestForecast(t *testing.T) {
	w := newWorld(t)
	w.history.Daily, w.history.FloorGenerations = -1, 100
	w.open()
	w.shelf.free = 1100
	w.commit("photos", 500, generations.Good) // filling it for the first time is no pace
	w.mustPass()
	if r := w.State().Room; r.PerDay != 0 || !r.FullOn.IsZero() || r.Free != 600 || r.WorstDay != 0 {
		t.Errorf("%+v", r)
	}
	w.run(3)
	if r := w.State().Room; r.PerDay != 7 || r.WorstDay != 10 {
		t.Errorf("%+v", r)
	}
	w.run(10)
	r := w.State().Room
	// 470 free, less the worst day's 10, at 10 a day.
	if r.PerDay != 10 || r.WorstDay != 10 || r.Free != 470 || !r.FullOn.Equal(w.true.Truncate(24*time.Hour).AddDate(0, 0, 46)) {
		t.Errorf("%+v", r)
	}
	// A card that was swapped remembers nothing; the disk does.
	w.boot()
	w.mustPass()
	if diff := cmp.Diff(r, w.State().Room); diff != "" {
		t.Error(diff)
	}
}

// What a record of the time counted does not outlive it: not for ever, that is.
func TestLostClock(t *testing.T) {
	w := newWorld(t)
	w.run(3)
	w.commit("docs", 1, generations.Good)
	if _, err := w.Retire("docs", "boss"); err != nil {
		t.Fatal(err)
	}
	w.history.ExpirePerDay = 0
	w.open()
	w.run(10)
	w.history.ExpirePerDay = 2
	w.open()
	w.mustPass()
	n := len(w.numbers("photos"))
	w.shelf.records["clock"] = "broken"
	w.open()
	if _, _, err := w.AcceptClock("boss"); err != nil {
		t.Fatal(err)
	}
	w.mustPass()
	if got := len(w.numbers("photos")); got != n {
		t.Errorf("the day's bound was forgotten: %d of %d are left", got, n)
	}
	w.true = w.true.Add(25 * time.Hour)
	w.mustPass()
	if got := len(w.numbers("photos")); got != n-2 {
		t.Errorf("a day later %d of %d are left", got, n)
	}
	w.run(12)
	if len(w.numbers("docs")) != 1 {
		t.Error("the delay was shortened")
	}
	w.run(3)
	if len(w.numbers("docs")) != 0 {
		t.Error("it never leaves")
	}
}

// Whatever the records hold, nothing panics, and the settings' floor, the newest
// and a day's bound hold.
func FuzzRecords(f *testing.F) {
	for _, seed := range []struct{ clock, floor, expiry, retiring, room string }{
		{},
		{clock: "latest = 2026-11-05T12:00:00Z\npassed_seconds = 5\nahead_seconds = 0\nboot = '1'\nuptime_seconds = 1\n"},
		{clock: "latest = 2026-11-05T12:00:00Z\npassed_seconds = 9223372036854775807\nahead_seconds = -1\nboot = ''\nuptime_seconds = 1\n"},
		{floor: "[repositories.photos]\ngenerations = 3\nage_seconds = 9223372036854775807\n"},
		{expiry: "frozen_since = 0001-01-01T00:00:00Z\n[gone]\nphotos = [1, 2, 9223372036854775807]\n"},
		{retiring: "[repositories.docs]\nby = 'x'\nasked = 2000-01-01T00:00:00Z\npassed_seconds = 0\nafter_seconds = -1\n"},
		{room: "[[days]]\nday = 9223372036854775807\nadded = -5\nfirst = 1\nfree = -1\n"},
	} {
		f.Add(seed.clock, seed.floor, seed.expiry, seed.retiring, seed.room)
	}
	f.Fuzz(func(t *testing.T, clock, floor, expiry, retiring, room string) {
		w := newWorld(t)
		w.history.ExpirePerDay, w.history.WhenFull, w.shelf.total = 0, history.Thin, 1<<40
		w.open()
		w.run(12)
		w.history.ExpirePerDay = 2
		for name, text := range map[string]string{"clock": clock, "floor": floor, "expiry": expiry, "retiring": retiring, "room": room} {
			if text != "" {
				w.shelf.records[name] = text
			}
		}
		newest := w.shelf.lists["photos"][11].Name
		w.open()
		_ = w.Pass(t.Context())
		w.State()
		left := w.shelf.lists["photos"]
		if !strings.Contains(retiring, "photos") && (len(left) < 10 || left[len(left)-1].Name != newest) {
			t.Errorf("%d generations are left", len(left))
		}
	})
}
