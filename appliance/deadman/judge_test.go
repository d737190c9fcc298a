package deadman

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"farkeep/appliance/status"
	"farkeep/shared/settings"

	"github.com/google/go-cmp/cmp"
)

var t0 = time.Date(2026, 11, 22, 8, 0, 0, 0, time.UTC)

const hour, day = time.Hour, 24 * time.Hour

var thresholds = settings.DeadMan{
	HeartbeatAge: settings.Duration(30 * hour), UnchangedAge: settings.Duration(8 * day), ReminderInterval: settings.Duration(day),
	DiskFullPercent: 95, UnreachableAfter: settings.Duration(hour), CheckInterval: settings.Duration(time.Minute),
}

// world is an appliance and its surroundings, driven through time.
type world struct {
	t     *testing.T
	now   time.Time     // the true time
	off   time.Duration // the wall clock minus the true time
	boots int
	up    time.Duration
	facts Facts
	state State
	set   settings.DeadMan
	mails []Mail
}

// newWorld is an appliance that has been up for a day and is well.
func newWorld(t *testing.T) *world {
	w := &world{t: t, now: t0, set: thresholds, state: State{Nonce: 7, Welcomed: true}}
	w.boot()
	w.state.LastProof = Moment{Wall: t0, Sure: true}
	w.beat("nas")
	w.run(day)
	if len(w.mails) > 0 {
		t.Fatalf("an appliance that is well sends %q", w.take())
	}
	w.beat("nas")
	return w
}

func (w *world) boot() {
	w.boots++
	w.up = 0
	w.facts.Host, w.facts.BootID = "attic", fmt.Sprint("boot-", w.boots)
	w.facts.Boot = &status.Boot{Version: "v1", Board: "Raspberry Pi 3 Model B", Restarts: map[string]int{}}
	w.facts.Network = &status.Network{Interface: "eth0", Addresses: []string{"192.0.2.50/24"}, Carrier: true, ClockSet: true, ClockSource: "3 of 4 sources agree", VPNUp: true}
	w.facts.Disk = &status.Disk{State: status.DiskMounted, Power: true, Unlocked: true, Mounted: true, TotalBytes: 4e12, FreeBytes: 2e12}
	if w.facts.Keeper == nil {
		w.facts.Keeper = &status.Keeper{}
	}
}

func (w *world) beat(host string) {
	k := *w.facts.Keeper
	k.Heartbeats = slices.DeleteFunc(slices.Clone(k.Heartbeats), func(h status.Heartbeat) bool { return h.Host == host })
	k.Heartbeats = append(k.Heartbeats, status.Heartbeat{Host: host, At: w.now, ReceivedAt: w.now.Add(w.off)})
	w.facts.Keeper = &k
	w.look()
}

// look judges once, with everything through JSON as over a restart of the part.
func (w *world) look() {
	w.t.Helper()
	f := w.facts
	f.Now, f.Uptime = w.now.Add(w.off), w.up
	before, err := json.Marshal(w.state)
	if err != nil {
		w.t.Fatal(err)
	}
	next, mails := Judge(w.state, f, w.set)
	if after, _ := json.Marshal(w.state); string(after) != string(before) {
		w.t.Fatal("Judge changed its input")
	}
	data, err := json.Marshal(next)
	if err != nil {
		w.t.Fatal(err)
	}
	if w.state, err = parseState(data); err != nil {
		w.t.Fatal(err)
	}
	w.mails = append(w.mails, mails...)
}

// run lets time pass, looking every ten minutes.
func (w *world) run(d time.Duration) {
	w.t.Helper()
	for end := w.now.Add(d); w.now.Before(end); {
		w.now, w.up = w.now.Add(10*time.Minute), w.up+10*time.Minute
		w.look()
	}
}

// outage switches the appliance off for d and on again.
func (w *world) outage(d time.Duration) {
	w.now = w.now.Add(d)
	w.boot()
}

// take returns the subjects of the mails since the last take.
func (w *world) take() []string {
	var out []string
	for _, m := range w.mails {
		out = append(out, strings.TrimPrefix(m.Subject, "[WATCHDOG] "))
	}
	w.mails = nil
	return out
}

func (w *world) want(subjects ...string) {
	w.t.Helper()
	if diff := cmp.Diff(subjects, w.take()); diff != "" {
		w.t.Errorf("mails (-want +got)\n%s", diff)
	}
}

func TestHeartbeatGoesStaleAndComesBack(t *testing.T) {
	w := newWorld(t)
	w.run(29 * hour)
	w.want()
	w.run(2 * hour)
	w.want("nas heartbeat STALE")
	w.run(23 * hour)
	w.want()
	w.run(49 * hour)
	w.want("nas heartbeat STALE (reminder 1)", "nas heartbeat STALE (reminder 2)", "nas heartbeat STALE (reminder 3)")
	w.beat("nas")
	w.want("nas heartbeat is back")
	w.run(29 * hour)
	w.want()
}

func TestHeartbeatMailSaysWhatMatters(t *testing.T) {
	w := newWorld(t)
	w.run(31 * hour)
	if len(w.mails) != 1 || w.mails[0].Subject != "[WATCHDOG] nas heartbeat STALE" {
		t.Fatalf("%+v", w.mails)
	}
	for _, want := range []string{"2026-11-23 08:00 UTC, 30 hours ago", "threshold         30h\n", "What it could mean", "What to do", "farkeep-pusher status",
		"VPN        up", "192.0.2.50/24", "Raspberry Pi 3", "heartbeat-stale"} {
		if !strings.Contains(w.mails[0].Body, want) {
			t.Errorf("the mail does not say %q:\n%s", want, w.mails[0].Body)
		}
	}
}

func TestTwoHosts(t *testing.T) {
	w := newWorld(t)
	w.beat("laptop")
	w.run(20 * hour)
	w.beat("nas")
	w.run(20 * hour)
	w.want("laptop heartbeat STALE")
	w.beat("laptop")
	w.want("laptop heartbeat is back")
}

func TestNoHeartbeatEver(t *testing.T) {
	w := &world{t: t, now: t0, set: thresholds, state: State{Nonce: 7, Welcomed: true, LastProof: Moment{Wall: t0, Sure: true}}}
	w.boot()
	w.look()
	w.run(20 * hour)
	w.outage(hour) // counts from the installation, not from the start
	w.run(10 * hour)
	w.want("home heartbeat STALE")
	w.outage(hour)
	w.facts.Network.ClockSet, w.facts.Network.ClockSource = false, "last known time"
	w.run(10 * time.Minute)
	w.want()
	w.beat("nas")
	w.want("home heartbeat is back")
}

func TestHeartbeatsAndClocks(t *testing.T) {
	stale := func(w *world) bool { return w.state.Alarms["heartbeat-stale/nas"].Raised }
	for _, tt := range []struct {
		name string
		do   func(w *world)
		want bool
	}{
		{"a long power cut makes it stale at once when the clock is set", func(w *world) {
			w.outage(40 * hour)
			w.look()
		}, true},
		{"1970, the start is not over: not judged", func(w *world) {
			w.outage(40 * hour)
			w.off = time.Unix(0, 0).Sub(w.now)
			w.facts.Network.ClockSet, w.facts.Network.ClockSource = false, ""
			w.run(40 * hour)
		}, false},
		{"no known time: only the time that it ran counts", func(w *world) {
			w.outage(40 * hour)
			w.off = time.Unix(0, 0).Sub(w.now)
			w.facts.Network.ClockSet, w.facts.Network.ClockSource = false, "no known time"
			w.run(29 * hour)
		}, false},
		{"last known time: only the time that it ran counts", func(w *world) {
			w.outage(40 * hour)
			w.off = -40 * hour
			w.facts.Network.ClockSet, w.facts.Network.ClockSource = false, "last known time"
			w.run(29 * hour)
		}, false},
		{"last known time, for 31 hours", func(w *world) {
			w.outage(hour)
			w.facts.Network.ClockSet, w.facts.Network.ClockSource = false, "last known time"
			w.run(31 * hour)
		}, true},
		{"thrown years ahead", func(w *world) {
			w.off = 3 * 365 * day
			w.facts.Network.ClockJump = "the time sources say 2029"
			w.run(29 * hour)
		}, false},
		{"thrown years ahead, with a reboot", func(w *world) {
			w.off = 3 * 365 * day
			w.outage(hour)
			w.facts.Network.ClockJump = "the time sources say 2029"
			w.run(29 * hour)
		}, false},
		{"thrown by a day without being noticed", func(w *world) {
			w.off = 31 * hour
			w.run(2 * hour)
		}, false},
		{"back in time does not make it young", func(w *world) {
			w.off = -20 * hour
			w.run(31 * hour)
		}, true},
		{"arrived before the clock was set, judged after", func(w *world) {
			w.outage(40 * hour)
			w.off = -40 * hour
			w.facts.Network.ClockSet, w.facts.Network.ClockSource = false, "last known time"
			w.run(hour)
			w.beat("nas")
			w.run(hour)
			w.off = 0
			w.facts.Network.ClockSet = true
			w.run(20 * hour)
			w.outage(time.Minute) // and its moment is known on the wall clock now
			w.look()
		}, false},
		{"stale, then a start without time sources: no all-clear", func(w *world) {
			w.run(31 * hour)
			w.outage(hour)
			w.facts.Network.ClockSet, w.facts.Network.ClockSource = false, "last known time"
			w.run(hour)
			w.want("nas heartbeat STALE")
		}, true},
		{"the network part is dead: nothing changes", func(w *world) {
			w.facts.Network = nil
			w.run(60 * hour)
		}, false},
		{"the keeper is dead: what arrived last still counts", func(w *world) {
			w.facts.Keeper = nil
			w.run(31 * hour)
		}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			tt.do(w)
			if got := stale(w); got != tt.want {
				t.Errorf("stale: %v; want %v; mails %q", got, tt.want, w.take())
			}
		})
	}
}

func TestDisk(t *testing.T) {
	set := func(kind, text string) func(*world) {
		return func(w *world) {
			w.facts.Disk = &status.Disk{State: status.DiskFailed, Power: true, Error: text, ErrorKind: kind, FailingSince: w.now}
		}
	}
	for _, tt := range []struct {
		kind  string
		after bool
		want  string
		clear string
	}{
		{status.ErrorMissing, true, "attic disk is missing", "attic disk is there again"},
		{status.ErrorHung, true, "attic disk hangs", "attic disk answers again"},
		{status.ErrorUnreachable, true, "attic key server is out of reach", "attic key server is back"},
		{"relay", true, "attic disk cannot be opened", "attic disk opens again"},
		{status.ErrorRefused, false, "attic disk key REFUSED", "attic disk key is granted again"},
		{status.ErrorWrongKey, false, "attic disk key does not fit", "attic disk key fits again"},
		{status.ErrorBadHeader, false, "attic disk header is damaged", "attic disk header is whole again"},
		{status.ErrorFileSystem, false, "attic file system is damaged", "attic file system is whole again"},
	} {
		t.Run(tt.kind, func(t *testing.T) {
			w := newWorld(t)
			good := w.facts.Disk
			set(tt.kind, "no such\r\nBcc: everybody")(w)
			w.look()
			if tt.after {
				w.want()
				w.run(30 * time.Minute)
				w.want()
				w.facts.Disk = good
				w.look()
				w.want() // it was short
				set(tt.kind, "again")(w)
				w.run(2 * hour)
			}
			w.want(tt.want)

			// A reboot later the disk is dark and nothing was tried yet: no all-clear.
			w.outage(time.Minute)
			w.facts.Disk = &status.Disk{State: status.DiskOff}
			w.run(2 * hour)
			w.facts.Disk = nil
			w.run(2 * hour)
			w.want()
			w.facts.Disk = good
			w.look()
			w.want(tt.clear)
		})
	}
}

// A disk that was closed for lack of consent is told once, when it is dark, with
// who refused; and once more when it is open again.
func TestConsent(t *testing.T) {
	for _, tt := range []struct {
		dark    string
		kind    string
		refused []status.Refusal
		want    string
		says    []string
	}{
		{status.DarkRefused, status.ErrorLeaseRefused, []status.Refusal{{Server: "home\r\nBcc: x", Since: t0}}, "attic disk was closed: consent REFUSED", []string{"home  Bcc: x", "off, locked, without power", "farkeep-keyserver allow NAME"}},
		{status.DarkExpired, status.ErrorLeaseExpired, nil, "attic disk was closed: nobody renewed its lease", []string{"off, locked, without power"}},
	} {
		t.Run(tt.dark, func(t *testing.T) {
			w := newWorld(t)
			good := w.facts.Disk
			closing := &status.Disk{State: status.DiskClosing, Power: true, Unlocked: true, Mounted: true, Dark: tt.dark, ErrorKind: tt.kind, Error: "closed", Refused: tt.refused, FailingSince: w.now}
			w.facts.Disk = closing
			w.look()
			w.want() // a moment: the mail shall say that it is dark
			w.facts.Disk = &status.Disk{State: status.DiskOff, Dark: tt.dark, ErrorKind: tt.kind, Error: "closed", Refused: tt.refused, FailingSince: w.now}
			w.look()
			for _, text := range tt.says {
				if !strings.Contains(w.mails[0].Body, text) {
					t.Errorf("the mail does not say %q:\n%s", text, w.mails[0].Body)
				}
			}
			w.want(tt.want)
			// The check-in is granted again and the key waits for a person.
			w.facts.Disk = &status.Disk{State: status.DiskOff, Dark: tt.dark, ErrorKind: status.ErrorRefused, Error: "held", Refused: tt.refused, FailingSince: w.now}
			w.look()
			w.want("attic disk key REFUSED")
			// Over a reboot a lease that ran out is forgotten: that is no all-clear.
			w.outage(time.Minute)
			w.facts.Disk = &status.Disk{State: status.DiskOff}
			w.run(2 * hour)
			w.want()
			w.facts.Disk = good
			w.look()
			w.want("attic disk is open again with consent", "attic disk key is granted again")
			// One that cannot be closed is told as well, and that it is open.
			closing.FailingSince = w.now
			w.facts.Disk = closing
			w.run(10 * time.Minute)
			if !strings.Contains(w.mails[0].Body, "STILL UNLOCKED") {
				t.Error(w.mails[0].Body)
			}
			w.want(tt.want)
		})
	}
}

func TestDiskFull(t *testing.T) {
	w := newWorld(t)
	at := func(percent float64) {
		w.facts.Disk = &status.Disk{State: status.DiskMounted, Mounted: true, Unlocked: true, TotalBytes: 4e12, FreeBytes: int64(4e12 * (100 - percent) / 100)}
		w.look()
	}
	at(94.9)
	w.want()
	at(95)
	w.want("attic disk is nearly full")
	at(94.5)
	at(95.5)
	w.want() // within the hysteresis
	w.facts.Disk = &status.Disk{State: status.DiskOff}
	w.look()
	w.want()
	at(93)
	w.want("attic disk has room again")
}

func TestUnchanged(t *testing.T) {
	w := newWorld(t)
	changed := w.now
	beats := func(d time.Duration) {
		for range int(d / (12 * hour)) {
			w.facts.Keeper.Repositories = []status.RepositoryStatus{{Name: "photos", ChangedAt: changed, ConfirmedAt: w.now, Generations: 3}}
			w.beat("nas")
			w.run(12 * hour)
		}
	}
	beats(8 * day)
	w.want()
	beats(day)
	w.want("attic repository photos has not changed")
	changed = w.now
	beats(12 * hour)
	w.want("attic repository photos changes again")
	w.off = 365 * day
	w.facts.Network.ClockJump = "thrown"
	beats(12 * hour)
	w.want("attic clock JUMPED")
	w.set.UnchangedAge = 0
	w.off, w.facts.Network.ClockJump = 0, ""
	beats(20 * day)
	w.want("attic clock is plausible again", "attic monthly report")
}

func TestClock(t *testing.T) {
	w := newWorld(t)
	w.facts.Network.ClockSet, w.facts.Network.ClockSource = false, "last known time"
	w.run(50 * time.Minute)
	w.want()
	w.run(20 * time.Minute)
	w.want("attic clock is not set")
	w.facts.Network.ClockSet = true
	w.look()
	w.want("attic clock is set")
	w.facts.Network.ClockJump = "the time sources say 2029-01-01"
	w.look()
	if len(w.mails) != 1 || !strings.Contains(w.mails[0].Body, "the time sources say 2029-01-01") {
		t.Errorf("%+v", w.mails)
	}
}

func TestMachine(t *testing.T) {
	w := newWorld(t)
	w.facts.Network.Undervoltage = true
	w.look()
	w.want("attic supply voltage is too low")
	for range 20 { // the sensor flickers
		w.facts.Network.Undervoltage = !w.facts.Network.Undervoltage
		w.run(10 * time.Minute)
	}
	w.want()
	w.facts.Network.Undervoltage = false
	w.run(2 * hour)
	w.want("attic supply voltage is fine again")

	w.facts.Boot.StateLost = true
	w.look()
	w.want("attic state is kept in memory only")
	w.facts.Boot.Degraded = []string{"mount /boot: no such device"}
	w.look()
	w.want("attic works only in part")
}

func TestRestarts(t *testing.T) {
	w := newWorld(t)
	for range 12 { // one every three hours is no loop
		w.facts.Boot.Restarts["keeper"]++
		w.beat("nas")
		w.run(3 * hour)
	}
	w.want()
	for range 10 {
		w.facts.Boot.Restarts["keeper"]++
		w.run(10 * time.Minute)
	}
	w.want("attic keeper part keeps restarting")
	for range 60 { // and goes on for hours
		w.facts.Boot.Restarts["keeper"]++
		w.run(10 * time.Minute)
	}
	w.want()
	w.run(4 * hour)
	w.want("attic keeper part runs steadily")
}

func TestFirstAndMonthlyMail(t *testing.T) {
	w := &world{t: t, now: t0, set: thresholds}
	w.boot()
	w.facts.Network = nil
	w.look()
	w.facts.Network = &status.Network{}
	w.look()
	w.facts.Network = &status.Network{ClockSet: true, ClockSource: "2 of 2 sources agree", Addresses: []string{"192.0.2.50/24"}}
	w.facts.Disk = &status.Disk{State: status.DiskOff}
	w.look()
	w.want() // VPN and disk get a moment
	w.run(10 * time.Minute)
	if len(w.mails) != 1 || w.mails[0].Subject != "[WATCHDOG] attic is up" {
		t.Fatalf("%+v", w.mails)
	}
	for _, want := range []string{"Raspberry Pi 3 Model B", "v1", "192.0.2.50/24", "VPN        down", "disk       off", "2026-11-22", "No alarm is raised"} {
		if !strings.Contains(w.mails[0].Body, want) {
			t.Errorf("the mail does not say %q:\n%s", want, w.mails[0].Body)
		}
	}
	w.take()
	w.outage(time.Minute)
	for range 29 {
		w.beat("nas")
		w.run(day)
	}
	w.want()
	for range 2 {
		w.beat("nas")
		w.run(day)
	}
	w.want("attic monthly report")
}

func TestEverythingReadyMailsAtOnce(t *testing.T) {
	w := &world{t: t, now: t0, set: thresholds}
	w.boot()
	w.look()
	w.want("attic is up")
}

func TestNoReminderWhileTheMailWaits(t *testing.T) {
	w := newWorld(t)
	w.run(31 * hour)
	w.facts.Waiting = []string{w.mails[0].ID}
	w.want("nas heartbeat STALE")
	w.run(5 * day)
	w.want()
	w.facts.Waiting = nil
	w.look()
	w.want("nas heartbeat STALE (reminder 1)")
}

func TestSecondsForTests(t *testing.T) {
	w := newWorld(t)
	w.set.HeartbeatAge, w.set.ReminderInterval = settings.Duration(5*time.Second), settings.Duration(10*time.Second)
	w.beat("nas")
	for range 6 {
		w.now, w.up = w.now.Add(time.Second), w.up+time.Second
		w.look()
	}
	w.want("nas heartbeat STALE")
}

func TestAHostileStatusIsBounded(t *testing.T) {
	w := newWorld(t)
	for i := range 1000 {
		w.facts.Keeper.Heartbeats = append(w.facts.Keeper.Heartbeats, status.Heartbeat{Host: fmt.Sprint("h", i), ReceivedAt: t0})
		w.facts.Keeper.Repositories = append(w.facts.Keeper.Repositories, status.RepositoryStatus{Name: fmt.Sprintf("r%d\r\nBcc: x", i), ChangedAt: t0.AddDate(-1, 0, 0)})
		w.facts.Boot.Restarts[fmt.Sprint("p", i)] = 100
		w.facts.Boot.Degraded = append(w.facts.Boot.Degraded, strings.Repeat("x", 5000))
	}
	w.run(hour)
	if len(w.state.Alarms) > maxAlarms || len(w.state.Hosts) > maxHosts || len(w.state.Restarts) > maxHosts || len(w.mails) > 2*maxAlarms {
		t.Errorf("%d alarms, %d hosts, %d restarts, %d mails", len(w.state.Alarms), len(w.state.Hosts), len(w.state.Restarts), len(w.mails))
	}
	for _, m := range w.mails {
		if strings.ContainsAny(m.Subject, "\r\n") || len(m.Body) > 32<<10 {
			t.Fatalf("%d bytes, subject %q", len(m.Body), m.Subject)
		}
	}
}

// Whatever happens, in whatever order: alarms and all-clears of one thing take
// turns, and no id is given twice.
func TestOneMailPerFlip(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	for range 3 {
		w := newWorld(t)
		ids := map[string]bool{}
		raised := map[string]bool{}
		kinds := []string{"", "", status.ErrorMissing, status.ErrorRefused, status.ErrorUnreachable, status.ErrorWrongKey}
		for range 150 {
			switch random.IntN(6) {
			case 0:
				w.beat("nas")
			case 1:
				w.outage(time.Duration(random.Int64N(int64(50 * hour))))
			case 2:
				w.facts.Disk = &status.Disk{State: status.DiskMounted, Mounted: true, ErrorKind: kinds[random.IntN(len(kinds))], TotalBytes: 100, FreeBytes: random.Int64N(10)}
			case 3:
				w.facts.Network = &status.Network{ClockSet: random.IntN(2) == 0, ClockSource: "last known time", Undervoltage: random.IntN(2) == 0}
			case 4:
				w.off = time.Duration(random.Int64N(int64(100*hour))) - 50*hour
			case 5:
				w.run(time.Duration(random.Int64N(int64(40 * hour))))
			}
			w.look()
			for _, m := range w.mails {
				if ids[m.ID] {
					t.Fatalf("id %s twice", m.ID)
				}
				ids[m.ID] = true
				if m.Kind == "monthly" || strings.Contains(m.Subject, "(reminder") {
					continue
				}
				e, _ := entryOf(m.Kind)
				up := strings.HasSuffix(m.Subject, e.title)
				about := m.Kind + strings.Fields(m.Subject)[1]
				if raised[about] == up {
					t.Fatalf("%q, but it was raised: %v", m.Subject, raised[about])
				}
				raised[about] = up
			}
			w.mails = nil
		}
	}
}

func FuzzState(f *testing.F) {
	w := &world{t: &testing.T{}, now: t0, set: thresholds}
	w.boot()
	w.beat("nas")
	w.facts.Disk.ErrorKind = status.ErrorRefused
	w.look()
	good, err := json.Marshal(w.state)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{}`))
	f.Add([]byte(`{"pending":[{"id":"../../x"}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := parseState(data)
		if err != nil {
			return
		}
		// Whatever the file held, judging goes on, and what it makes can be read again.
		next, _ := Judge(s, Facts{Now: t0, Uptime: hour, BootID: "b", Host: "attic", Network: &status.Network{ClockSet: true, ClockSource: "x"}, Keeper: &status.Keeper{}}, thresholds)
		again, err := json.Marshal(next)
		if err != nil {
			return // a year that JSON cannot write
		}
		if _, err := parseState(again); err != nil {
			t.Error(err)
		}
	})
}
