package disk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"farkeep/appliance/consent"
	"farkeep/appliance/keepercall"
	"farkeep/appliance/localcall"
	"farkeep/appliance/part"
	"farkeep/appliance/relay"
	"farkeep/appliance/status"
	"farkeep/appliance/tokens"
	"farkeep/appliance/unlock"
	"farkeep/shared/keywire"
	"farkeep/shared/settings"

	"golang.org/x/sys/unix"
)

// machine plays relay, kernel, disk, key server and neighbours. Faults are set
// by tests; every call is recorded in order.
type machine struct {
	mu    sync.Mutex
	calls []string

	power, switches        bool
	poweredAt              time.Time
	spinUp                 time.Duration
	seq                    int
	mapped, mountedNow     bool
	unlockResult           unlock.Result
	absent, hang, readOnly bool // of the disk
	stuckPower             bool // the relay does not cut
	unlockDelay            time.Duration
	busyUnmount, busyUnmap int // so many times EBUSY
	checkErr, mountErr     error
	care                   Care
	checks                 []bool // full or not
	checkWanted            bool
	attachErr, releaseErr  error
	clockSet               bool
	reports                []status.Disk
	alive                  int
	released               chan struct{} // closed at the end: lets hung calls return
	unlockErr              error
	vpnDown                bool
	before                 status.Disk
	unmapLater             int
	relayErr               error

	servers map[string]*keyServer // by host key; nil: one that always agrees
	book    *tokens.Book
	skew    time.Duration // of CLOCK_BOOTTIME: the machine was suspended for so long
	shown   []keywire.Token
	rounds  []consent.Round

	checkTakes time.Duration // e2fsck
}

// keyServer is one key server, as the answers that it gives.
type keyServer struct {
	refuses, silent bool
	heldKey         bool // the key alone waits for a person
	approved        bool // a person approved the next key, and check-ins are refused till then
	petitions       int
	lease, renew    time.Duration
	delay           time.Duration
	issues          keywire.Token // with the next key
	told            int           // how often it heard that the disk is dark
	asked           int
}

func (m *machine) boottime() time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.boottimeLocked()
}

// boottimeLocked goes on whatever else does: time starts in 2000 in a bubble.
func (m *machine) boottimeLocked() time.Duration {
	return time.Since(time.Date(1999, 12, 31, 23, 0, 0, 0, time.UTC)) + m.skew
}

func (m *machine) Consent(ctx context.Context, r consent.Round) (consent.Result, error) {
	m.mu.Lock()
	m.rounds = append(m.rounds, r)
	sent := m.boottimeLocked()
	var wait time.Duration
	var got consent.Result
	for _, id := range slices.Sorted(maps.Keys(m.servers)) {
		s := m.servers[id]
		s.asked++
		wait = max(wait, s.delay)
		a := consent.Answer{Server: "name of " + id, ID: id}
		switch {
		case s.silent:
			a.Error = "connection refused"
			wait = max(wait, 8*time.Second)
		case s.refuses:
			a.Refused, a.Error = true, "refused"
			if r.Petition {
				s.petitions++
				if s.approved {
					a = consent.Answer{Server: a.Server, ID: id, Granted: true, Freed: true}
					s.refuses = false
				}
			}
		default:
			a.Granted = true
			if r.Open {
				a.Until, a.Renew = sent+s.lease, sent+s.renew
			}
		}
		if slices.Contains(r.Dark, id) && !s.silent {
			a.Told = true
			s.told++
		}
		got.Answers = append(got.Answers, a)
	}
	m.mu.Unlock()
	select {
	case <-ctx.Done():
		return consent.Result{}, ctx.Err()
	case <-time.After(wait):
		return got, nil
	}
}

func (m *machine) note(format string, args ...any) {
	m.calls = append(m.calls, fmt.Sprintf(format, args...))
}

// touch blocks on a hung disk.
func (m *machine) touch() error {
	m.mu.Lock()
	hang, gone := m.hang, !m.presentLocked()
	m.mu.Unlock()
	if hang {
		<-m.released
		return unix.EIO
	}
	if gone {
		return unix.EIO
	}
	return nil
}

func (m *machine) presentLocked() bool {
	return m.power && !m.absent && time.Since(m.poweredAt) >= m.spinUp
}

// relay.Switch
func (m *machine) On() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.relayErr != nil {
		return m.relayErr
	}
	if !m.power {
		m.note("on")
		m.power, m.poweredAt = true, time.Now()
		m.seq++
	}
	return nil
}

func (m *machine) Off() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.switches {
		return nil
	}
	m.note("off")
	if !m.stuckPower {
		m.power, m.hang = false, false
	}
	return nil
}

func (m *machine) IsOn() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.power
}
func (m *machine) Switches() bool { return m.switches }
func (m *machine) Close() error   { return nil }

// System
func (m *machine) Find(uuid string) (Device, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.presentLocked() {
		return Device{}, errNotFound
	}
	return Device{Name: "sda", Node: "/dev/sda", Disk: "sda", Seq: fmt.Sprint(m.seq)}, nil
}

func (m *machine) Present(dev Device) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.presentLocked() && dev.Seq == fmt.Sprint(m.seq)
}

func (m *machine) Mapping() (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mapped {
		return "/dev/dm-7", nil
	}
	return "", nil
}

func (m *machine) Unlock(ctx context.Context, dev Device, shown map[string]keywire.Token, refused []string) (unlock.Result, error) {
	m.mu.Lock()
	delay := m.unlockDelay
	m.note("unlock")
	for _, id := range slices.Sorted(maps.Keys(shown)) {
		m.shown = append(m.shown, shown[id])
	}
	m.mu.Unlock()
	select {
	case <-ctx.Done():
		return unlock.Result{}, ctx.Err()
	case <-time.After(delay):
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mapped {
		return unlock.Result{ErrorKind: status.ErrorHung, Error: "there is a mapping already"}, nil
	}
	r := m.unlockResult
	// Those that refused last have to grant; otherwise the first that agrees does.
	for _, id := range slices.Sorted(maps.Keys(m.servers)) {
		s := m.servers[id]
		if s.silent || s.refuses {
			if slices.Contains(refused, id) {
				r = unlock.Result{ErrorKind: status.ErrorRefused, Error: id + " refuses"}
			}
			continue
		}
		if slices.Contains(refused, id) && !s.heldKey {
			r.Granted = append(r.Granted, id)
		}
		if s.issues != "" {
			if r.Tokens == nil {
				r.Tokens = tokens.Fresh{}
			}
			r.Tokens[id] = s.issues
		}
	}
	m.mapped = r.OK
	return r, m.unlockErr
}

func (m *machine) NeedsCheck(string, time.Time) (Care, string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.care, "", nil
}

func (m *machine) Check(ctx context.Context, _ string, full bool) error {
	if err := m.touch(); err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(m.checkTakes):
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.note("check")
	m.checks = append(m.checks, full)
	return m.checkErr
}

func (m *machine) Mount(string) error {
	if err := m.touch(); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mountErr != nil {
		return m.mountErr
	}
	m.note("mount")
	m.mountedNow = true
	return nil
}

func (m *machine) Mounted() (bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.mountedNow, nil
}

func (m *machine) Healthy(Device) error {
	m.mu.Lock()
	ro := m.readOnly
	m.mu.Unlock()
	if ro {
		return failed(status.ErrorFileSystem, "read-only")
	}
	return m.touch()
}

func (m *machine) Space() (int64, int64, error) { return 100, 40, nil }

func (m *machine) Sync() error {
	m.mu.Lock()
	m.note("sync")
	m.mu.Unlock()
	return m.touch()
}

func (m *machine) Unmount() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.busyUnmount > 0 {
		m.busyUnmount--
		return unix.EBUSY
	}
	m.note("unmount")
	m.mountedNow = false
	return nil
}

func (m *machine) Abandon(flush bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.note("abandon flush=%v", flush)
	m.mountedNow = false
	return nil
}

func (m *machine) Unmap(later bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if later {
		m.unmapLater++
		m.mapped = false
		m.note("unmap later")
		return nil
	}
	if m.busyUnmap > 0 {
		m.busyUnmap--
		return unix.EBUSY
	}
	if m.mapped {
		m.note("unmap")
	}
	m.mapped = false
	return nil
}

func (m *machine) Flush(_ Device, stop bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.note("flush stop=%v", stop)
	return nil
}

// Neighbours
func (m *machine) Attach(context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.note("attach")
	return m.attachErr
}

func (m *machine) Release(context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.note("release")
	return m.releaseErr
}

// Memory
func (m *machine) CheckWanted() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.checkWanted
}

func (m *machine) WantCheck(w bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.checkWanted = w
	return nil
}

// set changes the machine under its lock.
func (m *machine) set(change func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	change()
}

// take returns the calls since the last take.
func (m *machine) take() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := strings.Join(m.calls, ", ")
	m.calls = nil
	return s
}

// run runs a state machine on m, in a bubble of fake time, while body acts.
// Time starts at midnight UTC, 2000-01-01.
func run(t *testing.T, m *machine, w settings.Window, body func(t *testing.T, d *Disk)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		m.released = make(chan struct{})
		if !m.unlockResult.OK && m.unlockResult.ErrorKind == "" {
			m.unlockResult = unlock.Result{OK: true, Minor: 7, HeaderDigest: "d1", Server: "home"}
		}
		if m.servers == nil {
			m.servers = map[string]*keyServer{"a": {lease: 24 * time.Hour, renew: 5 * time.Minute}}
		}
		names := map[string]string{}
		for id := range m.servers {
			names[id] = "name of " + id
		}
		if m.book == nil {
			var err error
			if m.book, err = tokens.Open(filepath.Join(t.TempDir(), "key-servers.json"), slices.Collect(maps.Keys(names))); err != nil {
				t.Fatal(err)
			}
		}
		d := New(Config{
			Servers: names, Book: m.book, Boottime: m.boottime,
			UUID: "b64e6fbb-11a0-42e1-b7f1-32adde77f805", Window: w, IdleClose: 15 * time.Minute,
			OpenRelay: func(on bool) (relay.Switch, error) {
				m.set(func() {
					if on && !m.power {
						m.power, m.poweredAt = true, time.Now()
					}
				})
				return m, m.relayErr
			},
			System: m, Neighbours: m, Memory: m, Before: m.before,
			ClockSet: func() bool { m.mu.Lock(); defer m.mu.Unlock(); return m.clockSet },
			VPNUp:    func() bool { m.mu.Lock(); defer m.mu.Unlock(); return !m.vpnDown },
			Alive:    func() { m.set(func() { m.alive++ }) },
			Report:   func(s status.Disk) { m.set(func() { m.reports = append(m.reports, s) }) },
			Log:      slog.New(slog.NewTextHandler(t.Output(), nil)),
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- d.Run(ctx) }()
		synctest.Wait()
		body(t, d)
		cancel()
		err := <-done
		close(m.released)
		if err != nil && m.relayErr == nil && !m.stuckPower {
			t.Errorf("Run: %v", err)
		}
		if s := d.Status(); m.relayErr == nil && !m.stuckPower && (s.Mounted || s.Unlocked || s.Power && m.switches) {
			t.Errorf("not dark in the end: %+v", s)
		}
	})
}

func after(d time.Duration) { time.Sleep(d); synctest.Wait() }

func want(t *testing.T, d *Disk, state string) status.Disk {
	t.Helper()
	s := d.Status()
	if s.State != state {
		t.Fatalf("state %q (%s), want %q", s.State, s.Error, state)
	}
	return s
}

func newMachine() *machine {
	return &machine{switches: true, clockSet: true, spinUp: 2 * time.Second, care: CareReplay}
}

var night = settings.Window{Start: settings.ClockTime(2 * time.Hour), Length: settings.Duration(3 * time.Hour)}

func TestWindow(t *testing.T) {
	m := newMachine()
	run(t, m, night, func(t *testing.T, d *Disk) {
		want(t, d, status.DiskOff)
		after(time.Hour + 59*time.Minute)
		want(t, d, status.DiskOff)
		if calls := m.take(); calls != "" {
			t.Errorf("before the window: %s", calls)
		}
		after(time.Minute + 5*time.Second)
		s := want(t, d, status.DiskMounted)
		if !s.Power || !s.Unlocked || !s.Mounted || s.Error != "" || s.HeaderDigest != "d1" || s.TotalBytes != 100 || s.FreeBytes != 40 {
			t.Errorf("%+v", s)
		}
		if calls := m.take(); calls != "on, unlock, check, mount, attach" {
			t.Errorf("opening: %s", calls)
		}
		after(2 * time.Hour)
		if s := want(t, d, status.DiskMounted); s.ExposureMinutes != 120 {
			t.Errorf("exposed for %d minutes", s.ExposureMinutes)
		}
		after(time.Hour)
		if s := want(t, d, status.DiskOff); s.ExposureMinutes != 0 {
			t.Errorf("%+v", s)
		}
		if calls := m.take(); calls != "release, sync, unmount, unmap, flush stop=true, off" {
			t.Errorf("closing: %s", calls)
		}
		after(21 * time.Hour)
		want(t, d, status.DiskMounted)
	})
}

// A file system that was closed in order is mounted without e2fsck; after a
// power cut the journal is replayed; a full check is for what needs one.
func TestCheckedWhenItShouldBe(t *testing.T) {
	for _, tt := range []struct {
		name   string
		care   Care
		wanted bool // an earlier run of the part asked for a full check
		calls  string
		checks []bool
	}{
		{"clean", CareNone, false, "on, unlock, mount, attach", nil},
		{"power cut", CareReplay, false, "on, unlock, check, mount, attach", []bool{false}},
		{"due", CareFull, false, "on, unlock, check, mount, attach", []bool{true}},
		{"failed while it was open", CareNone, true, "on, unlock, check, mount, attach", []bool{true}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newMachine()
			m.care, m.checkWanted = tt.care, tt.wanted
			run(t, m, settings.Window{Length: settings.Duration(24 * time.Hour)}, func(t *testing.T, d *Disk) {
				after(10 * time.Second)
				want(t, d, status.DiskMounted)
				if calls := m.take(); calls != tt.calls || !slices.Equal(m.checks, tt.checks) || m.checkWanted {
					t.Errorf("%s; full checks %v; wanted again %v", calls, m.checks, m.checkWanted)
				}
			})
		})
	}
}

func TestClockUnset(t *testing.T) {
	m := newMachine()
	m.clockSet = false
	run(t, m, night, func(t *testing.T, d *Disk) {
		after(3 * time.Hour)
		want(t, d, status.DiskOff)
		d.Wake()
		after(10 * time.Second)
		want(t, d, status.DiskMounted)
		m.set(func() { m.clockSet = true })
		after(time.Hour)
		want(t, d, status.DiskMounted)
	})
	always := settings.Window{Length: settings.Duration(24 * time.Hour)}
	m = newMachine()
	m.clockSet = false
	run(t, m, always, func(t *testing.T, d *Disk) {
		after(10 * time.Second)
		want(t, d, status.DiskMounted)
	})
}

func TestWakeHoldSleep(t *testing.T) {
	m := newMachine()
	run(t, m, settings.Window{}, func(t *testing.T, d *Disk) {
		if _, ok := d.Hold(); ok {
			t.Error("held a disk that is off")
		}
		d.Wake()
		after(10 * time.Second)
		want(t, d, status.DiskMounted)
		after(14 * time.Minute)
		release, ok := d.Hold()
		if !ok {
			t.Fatal("not held")
		}
		after(5 * time.Hour)
		if s := want(t, d, status.DiskMounted); s.Sessions != 1 {
			t.Errorf("%d sessions", s.Sessions)
		}
		release()
		release()
		after(14 * time.Minute)
		if s := want(t, d, status.DiskMounted); s.Sessions != 0 {
			t.Errorf("%d sessions", s.Sessions)
		}
		after(2 * time.Minute)
		want(t, d, status.DiskOff)
		d.Wake()
		after(10 * time.Second)
		release, ok = d.Hold()
		if !ok {
			t.Fatal("not held")
		}
		d.Sleep()
		if _, ok := d.Hold(); ok {
			t.Error("held a disk that was sent to sleep")
		}
		after(10 * time.Second)
		want(t, d, status.DiskOff)
		release()
	})
	m = newMachine()
	run(t, m, night, func(t *testing.T, d *Disk) {
		after(2*time.Hour + 10*time.Second)
		want(t, d, status.DiskMounted)
		d.Sleep()
		after(10 * time.Second)
		want(t, d, status.DiskOff)
		after(2 * time.Hour) // still in the same window
		want(t, d, status.DiskOff)
		after(22 * time.Hour) // the next one
		want(t, d, status.DiskMounted)
		d.Sleep()
		after(time.Minute)
		d.Wake()
		after(10 * time.Second)
		want(t, d, status.DiskMounted)
	})
}

func TestErrors(t *testing.T) {
	for _, tc := range []struct {
		name  string
		fault func(m *machine)
		mend  func(m *machine)
		kind  string
		power bool // stays on between attempts
	}{
		{"missing", func(m *machine) { m.absent = true }, func(m *machine) { m.absent = false }, status.ErrorMissing, false},
		{"unreachable", unlockFails(status.ErrorUnreachable), unlockWorks, status.ErrorUnreachable, true},
		{"refused", unlockFails(status.ErrorRefused), unlockWorks, status.ErrorRefused, false},
		{"wrong key", unlockFails(status.ErrorWrongKey), unlockWorks, status.ErrorWrongKey, true},
		{"bad header", unlockFails(status.ErrorBadHeader), unlockWorks, status.ErrorBadHeader, true},
		{"does not read", unlockFails(status.ErrorHung), unlockWorks, status.ErrorHung, false},
		{"the child dies", func(m *machine) {
			m.unlockErr, m.unlockResult = failed(ErrorUnlock, "exit status 2"), unlock.Result{ErrorKind: ErrorUnlock}
		}, func(m *machine) { m.unlockErr = nil; unlockWorks(m) }, ErrorUnlock, true},
		{"fsck", func(m *machine) { m.checkErr = failed(status.ErrorFileSystem, "needs a person") }, func(m *machine) { m.checkErr = nil }, status.ErrorFileSystem, true},
		{"mount", func(m *machine) { m.mountErr = failed(status.ErrorFileSystem, "wrong fs type") }, func(m *machine) { m.mountErr = nil }, status.ErrorFileSystem, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m := newMachine()
			tc.fault(m)
			run(t, m, night, func(t *testing.T, d *Disk) {
				after(2*time.Hour + time.Minute)
				s := d.Status()
				if s.ErrorKind != tc.kind || s.Error == "" || s.FailingSince.IsZero() || s.Mounted || s.Unlocked {
					t.Fatalf("%+v", s)
				}
				if tc.power && !s.Power {
					t.Error("powered off for a failure that the disk has no part in")
				}
				first := s.FailingSince
				after(time.Hour)
				if s := d.Status(); !s.FailingSince.Equal(first) {
					t.Errorf("failing since %v, then since %v", first, s.FailingSince)
				}
				calls := m.take()
				if n := strings.Count(calls, "unlock"); n > 180 {
					t.Errorf("%d attempts in an hour", n)
				}
				if n := strings.Count(calls, "on,"); n > 80 || tc.power && n > 1 {
					t.Errorf("powered on %d times in an hour", n)
				}
				m.set(func() { tc.mend(m) })
				if tc.kind == status.ErrorRefused {
					if s.Power {
						t.Error("refused, and powered all the same")
					}
					d.Wake() // the person who allowed it again does not wait for the next attempt
				}
				after(10 * time.Minute)
				if s := want(t, d, status.DiskMounted); s.Error != "" || s.ErrorKind != "" || !s.FailingSince.IsZero() {
					t.Errorf("after it was mended: %+v", s)
				}
			})
			// Not mended: the window ends, the disk is dark, the error stays known.
			m = newMachine()
			tc.fault(m)
			run(t, m, night, func(t *testing.T, d *Disk) {
				after(6 * time.Hour)
				if s := want(t, d, status.DiskOff); s.ErrorKind != tc.kind || s.FailingSince.IsZero() {
					t.Errorf("%+v", s)
				}
			})
		})
	}
}

func unlockFails(kind string) func(*machine) {
	return func(m *machine) { m.unlockResult = unlock.Result{ErrorKind: kind, Error: "no"} }
}

func unlockWorks(m *machine) { m.unlockResult = unlock.Result{OK: true, Minor: 7} }

// The appliance boots within its window, and the VPN takes its time.
func TestOpensWhenTheVPNComesUp(t *testing.T) {
	m := newMachine()
	m.vpnDown = true
	unlockFails(status.ErrorUnreachable)(m)
	run(t, m, settings.Window{Length: settings.Duration(24 * time.Hour)}, func(t *testing.T, d *Disk) {
		after(10 * time.Minute)
		if n := strings.Count(m.take(), "unlock"); n < 15 || n > 60 {
			t.Errorf("asked %d times in ten minutes", n)
		}
		m.set(func() { m.vpnDown = false; unlockWorks(m) })
		after(2 * time.Second)
		want(t, d, status.DiskMounted)
	})
}

// A wake retries at once, whatever the back-off had in mind.
func TestWakeRetriesAtOnce(t *testing.T) {
	m := newMachine()
	unlockFails(status.ErrorUnreachable)(m)
	run(t, m, night, func(t *testing.T, d *Disk) {
		after(4 * time.Hour)
		m.set(func() { unlockWorks(m) })
		d.Wake()
		after(time.Second)
		want(t, d, status.DiskMounted)
	})
}

func TestCalledOff(t *testing.T) {
	m := newMachine()
	m.unlockDelay = time.Hour
	run(t, m, settings.Window{}, func(t *testing.T, d *Disk) {
		d.Wake()
		after(10 * time.Second)
		want(t, d, status.DiskPowered)
		d.Sleep()
		after(5 * time.Second)
		if s := want(t, d, status.DiskOff); s.Error != "" {
			t.Errorf("called off, not failed: %+v", s)
		}
	})
}

// The child unlock is killed after it made the mapping and before it said so.
func TestMappingOfAKilledChildIsRemoved(t *testing.T) {
	for _, switches := range []bool{true, false} {
		m := newMachine()
		m.switches, m.power = switches, !switches
		m.unlockErr = failed(ErrorUnlock, "signal: killed")
		run(t, m, settings.Window{}, func(t *testing.T, d *Disk) {
			d.Wake()
			after(5 * time.Second)
			want(t, d, status.DiskFailed)
			m.set(func() {
				if m.mapped {
					t.Error("the key stays in the kernel, and no further attempt can make a mapping")
				}
			})
		})
	}
}

// A part that held files until the file system was taken away is asked again to
// let go: it keeps the mapping alive.
func TestWhoKeptFilesIsAskedAgain(t *testing.T) {
	m := newMachine()
	run(t, m, settings.Window{}, func(t *testing.T, d *Disk) {
		d.Wake()
		after(10 * time.Second)
		want(t, d, status.DiskMounted)
		m.set(func() { m.busyUnmount, m.busyUnmap = 1000, 1000 })
		m.take()
		d.Sleep()
		after(time.Minute)
		_, calls, _ := strings.Cut(m.take(), "abandon")
		if !strings.Contains(calls, "release") {
			t.Errorf("after it was taken away: %s", calls)
		}
	})
}

// A receiver that does not answer must not keep the keeper from hearing.
func TestReleaseReachesTheKeeper(t *testing.T) {
	paths := part.Paths{Run: t.TempDir()}
	heard := make(chan string, 1)
	ctx, cancel := context.WithCancel(t.Context())
	var served sync.WaitGroup
	t.Cleanup(served.Wait)
	t.Cleanup(cancel)
	for _, name := range []string{part.Receiver, part.Keeper} {
		if err := os.MkdirAll(paths.RunDir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		served.Go(func() {
			err := localcall.Serve(ctx, paths.Socket(name), []uint32{uint32(os.Getuid())}, func(ctx context.Context, req localcall.Request, _ *localcall.Conn) error {
				if name == part.Receiver {
					<-ctx.Done()
				} else {
					heard <- req.Verb
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
		for {
			// The socket's file is there a moment before somebody listens.
			if c, err := net.Dial("unix", paths.Socket(name)); err == nil {
				c.Close()
				break
			}
			time.Sleep(time.Millisecond)
		}
	}
	// On a host that stands still for so long not even the keeper can be asked.
	for _, limit := range []time.Duration{time.Second, 4 * time.Second, 30 * time.Second} {
		short, stop := context.WithTimeout(t.Context(), limit)
		if err := (neighbours{paths}).Release(short); err == nil {
			t.Error("that the receiver does not let go is not told")
		}
		stop()
		select {
		case verb := <-heard:
			if verb != keepercall.Release {
				t.Error(verb)
			}
			return
		default:
		}
	}
	t.Error("the keeper was not asked")
}

func TestDiskFailsWhileOpen(t *testing.T) {
	for _, tc := range []struct {
		name  string
		fault func(m *machine)
		kind  string
	}{
		{"vanishes", func(m *machine) { m.absent = true }, status.ErrorHung},
		{"hangs", func(m *machine) { m.hang = true }, status.ErrorHung},
		{"goes read-only", func(m *machine) { m.readOnly = true }, status.ErrorFileSystem},
		{"was replaced", func(m *machine) { m.seq++ }, status.ErrorHung},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m := newMachine()
			run(t, m, night, func(t *testing.T, d *Disk) {
				after(2*time.Hour + time.Minute)
				want(t, d, status.DiskMounted)
				release, ok := d.Hold()
				if !ok {
					t.Fatal("not held")
				}
				m.take()
				m.set(func() { tc.fault(m) })
				var s status.Disk
				for range 300 {
					after(time.Second)
					if s = d.Status(); s.ErrorKind != "" {
						break
					}
				}
				if s.ErrorKind != tc.kind || s.Mounted || s.Unlocked {
					t.Fatalf("%+v", s)
				}
				calls := m.take()
				if !strings.HasPrefix(calls, "abandon flush=false, release, off, unmap") {
					t.Errorf("failing closed: %s", calls)
				}
				release()
				m.set(func() { m.absent, m.readOnly = false, false })
				after(time.Minute)
				s = want(t, d, status.DiskMounted)
				if calls := m.take(); !strings.Contains(calls, "on, unlock, check, mount, attach") {
					t.Errorf("opening again: %s", calls)
				}
				if !slices.Equal(m.checks, []bool{false, true}) || m.checkWanted {
					t.Errorf("checks %v, wanted %v: the second must be a full one", m.checks, m.checkWanted)
				}
				if s.Error != "" {
					t.Errorf("%+v", s)
				}
			})
		})
	}
}

// A disk that fails again and again is tried ever more slowly.
func TestFlappingDisk(t *testing.T) {
	m := newMachine()
	run(t, m, settings.Window{Length: settings.Duration(24 * time.Hour)}, func(t *testing.T, d *Disk) {
		for range 3 * 60 * 60 {
			after(time.Second)
			if d.Status().Mounted {
				m.set(func() { m.readOnly = true })
			} else {
				m.set(func() { m.readOnly = false })
			}
		}
		if n := strings.Count(m.take(), "mount, "); n > 60 || n < 10 {
			t.Errorf("%d attempts in three hours", n)
		}
	})
}

func TestBusy(t *testing.T) {
	m := newMachine()
	run(t, m, settings.Window{}, func(t *testing.T, d *Disk) {
		d.Wake()
		after(10 * time.Second)
		want(t, d, status.DiskMounted)
		m.set(func() { m.busyUnmount, m.busyUnmap = 5, 3 })
		m.take()
		d.Sleep()
		after(10 * time.Second)
		want(t, d, status.DiskOff)
		if calls := m.take(); calls != "release, sync, unmount, unmap, flush stop=true, off" {
			t.Errorf("%s", calls)
		}
		d.Wake()
		after(10 * time.Second)
		want(t, d, status.DiskMounted)
		m.set(func() { m.busyUnmount, m.busyUnmap = 1000, 1000 })
		m.take()
		d.Sleep()
		after(time.Minute)
		s := d.Status()
		if s.Mounted || s.Unlocked || s.Power {
			t.Errorf("not dark: %+v", s)
		}
		if calls := m.take(); !strings.Contains(calls, "abandon flush=true") || !strings.Contains(calls, "unmap later") || !strings.Contains(calls, "off") {
			t.Errorf("%s", calls)
		}
	})
}

func TestRelayThatDoesNotCut(t *testing.T) {
	m := newMachine()
	run(t, m, settings.Window{}, func(t *testing.T, d *Disk) {
		d.Wake()
		after(10 * time.Second)
		m.set(func() { m.stuckPower = true })
		d.Sleep()
		after(time.Minute)
		if s := d.Status(); s.ErrorKind != ErrorRelay || s.Unlocked || !s.Power {
			t.Errorf("%+v", s)
		}
		m.set(func() { m.stuckPower = false })
		after(10 * time.Minute)
		want(t, d, status.DiskOff)
	})
}

func TestNoRelay(t *testing.T) {
	m := newMachine()
	m.switches, m.power = false, true
	run(t, m, settings.Window{}, func(t *testing.T, d *Disk) {
		want(t, d, status.DiskPowered)
		after(10 * time.Second)
		d.Wake()
		after(10 * time.Second)
		if s := want(t, d, status.DiskMounted); !s.Power {
			t.Errorf("%+v", s)
		}
		m.take()
		after(16 * time.Minute)
		s := want(t, d, status.DiskPowered)
		if s.Unlocked || !s.Power || s.ExposureMinutes != 0 {
			t.Errorf("%+v", s)
		}
		if calls := m.take(); calls != "release, sync, unmount, unmap, flush stop=false" {
			t.Errorf("%s: a disk that is never switched must not be stopped", calls)
		}
	})
}

// The part was killed and starts anew: the disk is as it was.
func TestAdopt(t *testing.T) {
	t.Run("mounted, wanted", func(t *testing.T) {
		m := newMachine()
		m.power, m.mapped, m.mountedNow = true, true, true
		m.poweredAt = time.Date(1999, 12, 31, 0, 0, 0, 0, time.UTC)
		run(t, m, settings.Window{Length: settings.Duration(24 * time.Hour)}, func(t *testing.T, d *Disk) {
			after(20 * time.Second)
			want(t, d, status.DiskMounted)
			if calls := m.take(); calls != "attach" {
				t.Errorf("%s", calls)
			}
		})
	})
	t.Run("mounted, not wanted any more", func(t *testing.T) {
		m := newMachine()
		m.power, m.mapped, m.mountedNow = true, true, true
		m.poweredAt = time.Date(1999, 12, 31, 0, 0, 0, 0, time.UTC)
		run(t, m, settings.Window{}, func(t *testing.T, d *Disk) {
			after(16 * time.Minute)
			want(t, d, status.DiskOff)
		})
	})
	t.Run("unlocked", func(t *testing.T) {
		m := newMachine()
		m.power, m.mapped = true, true
		m.poweredAt = time.Date(1999, 12, 31, 0, 0, 0, 0, time.UTC)
		run(t, m, settings.Window{Length: settings.Duration(24 * time.Hour)}, func(t *testing.T, d *Disk) {
			after(5 * time.Second)
			want(t, d, status.DiskMounted)
			if calls := m.take(); calls != "check, mount, attach" {
				t.Errorf("%s", calls)
			}
		})
	})
	t.Run("unlocked, not wanted", func(t *testing.T) {
		m := newMachine()
		m.power, m.mapped = true, true
		m.poweredAt = time.Date(1999, 12, 31, 0, 0, 0, 0, time.UTC)
		run(t, m, settings.Window{}, func(t *testing.T, d *Disk) {
			after(5 * time.Second)
			want(t, d, status.DiskOff)
			if calls := m.take(); calls != "unmap, flush stop=true, off" {
				t.Errorf("%s", calls)
			}
		})
	})
	t.Run("the disk is gone, the mapping is not", func(t *testing.T) {
		m := newMachine()
		m.absent, m.mapped, m.mountedNow = true, true, true
		run(t, m, settings.Window{}, func(t *testing.T, d *Disk) {
			after(5 * time.Second)
			want(t, d, status.DiskOff)
			if calls := m.take(); !strings.HasPrefix(calls, "abandon flush=false, release, off, unmap") {
				t.Errorf("%s", calls)
			}
			if !m.CheckWanted() {
				t.Error("the file system must be checked")
			}
		})
	})
	t.Run("what was known before", func(t *testing.T) {
		m := newMachine()
		m.absent = true
		since := time.Date(1999, 12, 31, 12, 0, 0, 0, time.UTC)
		m.before = status.Disk{Error: "gone", ErrorKind: status.ErrorMissing, FailingSince: since, HeaderDigest: "d0", Mounted: true, Power: true}
		run(t, m, settings.Window{Length: settings.Duration(24 * time.Hour)}, func(t *testing.T, d *Disk) {
			after(5 * time.Minute)
			if s := d.Status(); !s.FailingSince.Equal(since) || s.HeaderDigest != "d0" || s.Mounted {
				t.Errorf("%+v", s)
			}
		})
	})
	t.Run("no relay chip", func(t *testing.T) {
		m := newMachine()
		m.relayErr = errors.New("no GPIO chip")
		run(t, m, settings.Window{}, func(t *testing.T, d *Disk) {
			if s := want(t, d, status.DiskFailed); s.ErrorKind != ErrorRelay {
				t.Errorf("%+v", s)
			}
		})
	})
}

func TestKeeperHearsLater(t *testing.T) {
	m := newMachine()
	m.attachErr = io.EOF
	run(t, m, settings.Window{}, func(t *testing.T, d *Disk) {
		d.Wake()
		after(time.Minute)
		want(t, d, status.DiskMounted)
		m.set(func() { m.attachErr = nil })
		m.take()
		after(time.Minute)
		if calls := m.take(); calls != "attach" {
			t.Errorf("%q", calls)
		}
	})
}

func TestHeaderDamageIsReported(t *testing.T) {
	m := newMachine()
	m.unlockResult = unlock.Result{OK: true, Minor: 7, HeaderDigest: "d2", HeaderDamage: "primary copy: checksum does not match"}
	run(t, m, settings.Window{}, func(t *testing.T, d *Disk) {
		d.Wake()
		after(10 * time.Second)
		if s := want(t, d, status.DiskMounted); s.ErrorKind != status.ErrorBadHeader || !strings.Contains(s.Error, "cryptsetup repair") || s.FailingSince.IsZero() {
			t.Errorf("%+v", s)
		}
	})
}

func TestStaysAlive(t *testing.T) {
	m := newMachine()
	m.spinUp = 30 * time.Second
	m.unlockDelay = 2 * time.Minute
	run(t, m, settings.Window{}, func(t *testing.T, d *Disk) {
		d.Wake()
		after(3 * time.Minute)
		want(t, d, status.DiskMounted)
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.alive < 170 {
			t.Errorf("alive %d times in three minutes", m.alive)
		}
	})
}

func TestWindowStart(t *testing.T) {
	at := func(s string) time.Time {
		v, err := time.Parse("2006-01-02 15:04", s)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	hours := func(start, length int) settings.Window {
		return settings.Window{Start: settings.ClockTime(time.Duration(start) * time.Hour), Length: settings.Duration(time.Duration(length) * time.Hour)}
	}
	for _, tc := range []struct {
		w     settings.Window
		now   string
		start string
		in    bool
	}{
		{hours(2, 3), "2026-03-29 01:59", "2026-03-28 02:00", false},
		{hours(2, 3), "2026-03-29 02:00", "2026-03-29 02:00", true},
		{hours(2, 3), "2026-03-29 04:59", "2026-03-29 02:00", true},
		{hours(2, 3), "2026-03-29 05:00", "2026-03-29 02:00", false},
		{hours(23, 4), "2026-12-31 23:30", "2026-12-31 23:00", true},
		{hours(23, 4), "2027-01-01 02:59", "2026-12-31 23:00", true},
		{hours(23, 4), "2027-01-01 03:00", "2026-12-31 23:00", false},
		{hours(5, 24), "2026-06-01 04:59", "2026-05-31 05:00", true},
		{hours(5, 24), "2026-06-01 05:00", "2026-06-01 05:00", true},
		{hours(5, 0), "2026-06-01 05:00", "0001-01-01 00:00", false},
	} {
		start, in := windowStart(tc.w, at(tc.now))
		if in != tc.in || !start.Equal(at(tc.start)) {
			t.Errorf("%v+%v at %s: %v, %v; want %s, %v", tc.w.Start, tc.w.Length, tc.now, start, in, tc.start, tc.in)
		}
	}
}
