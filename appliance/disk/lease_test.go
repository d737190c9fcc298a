package disk

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"farkeep/appliance/status"
	"farkeep/appliance/tokens"
	"farkeep/appliance/unlock"
	"farkeep/shared/keywire"
	"farkeep/shared/settings"
)

var always = settings.Window{Length: settings.Duration(24 * time.Hour)}

const inOrder = "release, sync, unmount, unmap, flush stop=true, off"

func agrees() *keyServer { return &keyServer{lease: 24 * time.Hour, renew: 5 * time.Minute} }

func (m *machine) asked(id string) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.servers[id].asked
}

// opened runs until the disk is open and forgets what was called for that.
func opened(t *testing.T, m *machine, d *Disk) {
	t.Helper()
	after(10 * time.Second)
	want(t, d, status.DiskMounted)
	m.take()
}

func TestLeaseIsRenewed(t *testing.T) {
	m := newMachine()
	m.servers = map[string]*keyServer{"a": {lease: time.Hour, renew: 5 * time.Minute}, "b": {lease: 24 * time.Hour, renew: time.Minute}}
	run(t, m, always, func(t *testing.T, d *Disk) {
		opened(t, m, d)
		if s := d.Status(); s.LeaseServer != "name of b" || time.Until(s.LeaseUntil).Round(time.Minute) != 24*time.Hour || s.LeaseEnds == 0 {
			t.Errorf("lease until %v of %q", s.LeaseUntil, s.LeaseServer)
		}
		after(3 * time.Hour)
		want(t, d, status.DiskMounted)
		// Every server hears of it, at the pace of the one that is in a hurry.
		for _, id := range []string{"a", "b"} {
			if n := m.asked(id); n < 175 || n > 190 {
				t.Errorf("%s was asked %d times in three hours", id, n)
			}
		}
		if calls := m.take(); calls != "" {
			t.Errorf("%s", calls)
		}
		// A policy that is shortened counts from the next round on.
		m.set(func() { m.servers["b"].lease = 2 * time.Hour })
		after(2 * time.Minute)
		if s := d.Status(); time.Until(s.LeaseUntil) > 2*time.Hour {
			t.Errorf("lease until %v", s.LeaseUntil)
		}
	})
}

// A running disk whose appliance is revoked is dark within minutes, with
// everybody thrown out, and stays dark until the server that refused agrees.
func TestRefusedWhileOpen(t *testing.T) {
	m := newMachine()
	m.servers = map[string]*keyServer{"a": agrees(), "b": agrees()}
	run(t, m, always, func(t *testing.T, d *Disk) {
		opened(t, m, d)
		release, ok := d.Hold()
		if !ok {
			t.Fatal("not held")
		}
		defer release()
		m.set(func() { m.servers["b"].refuses = true })
		after(5*time.Minute + 10*time.Second)
		s := want(t, d, status.DiskOff)
		if calls := m.take(); calls != inOrder {
			t.Errorf("closing: %s", calls)
		}
		if s.Dark != status.DarkRefused || s.ErrorKind != status.ErrorLeaseRefused || !strings.Contains(s.Error, "name of b") || strings.Contains(s.Error, "name of a") ||
			len(s.Refused) != 1 || s.Refused[0].Server != "name of b" || s.FailingSince.IsZero() || !s.LeaseUntil.IsZero() {
			t.Errorf("%+v", s)
		}
		if m.servers["a"].told != 1 || m.servers["b"].told != 1 {
			t.Errorf("that it is dark was told %d and %d times", m.servers["a"].told, m.servers["b"].told)
		}
		if got := m.book.Refusing(); !slices.Equal(got, []string{"b"}) {
			t.Errorf("the card remembers %v", got)
		}
		if _, ok := d.Hold(); ok {
			t.Error("a barred disk was held")
		}
		// The other server's consent does not count, nor does a wake, nor a new window.
		d.Wake()
		after(9 * time.Hour)
		if s := want(t, d, status.DiskOff); s.Dark != status.DarkRefused {
			t.Errorf("%+v", s)
		}
		if calls := m.take(); calls != "" {
			t.Errorf("while it was refused: %s", calls)
		}
		if n := m.asked("b"); n > 9*6+40 {
			t.Errorf("asked %d times in nine hours", n)
		}
		m.set(func() { m.servers["b"].refuses = false })
		after(barredPace*6/5 + 15*time.Second)
		s = want(t, d, status.DiskMounted)
		if s.Dark != "" || s.Error != "" || len(s.Refused) != 0 || len(m.book.Refusing()) != 0 {
			t.Errorf("%+v", s)
		}
	})
}

// A barred disk that is woken all day asks no more often than it must.
func TestWokenAllDay(t *testing.T) {
	m := newMachine()
	run(t, m, settings.Window{}, func(t *testing.T, d *Disk) {
		d.Wake()
		opened(t, m, d)
		m.set(func() { m.servers["a"].refuses = true })
		after(6 * time.Minute)
		before := m.asked("a")
		for range 600 {
			d.Wake()
			after(time.Second)
		}
		if n := m.asked("a") - before; n > 125 {
			t.Errorf("asked %d times in ten minutes", n)
		}
	})
}

// Whoever allowed it again wakes it and does not wait.
func TestAllowedAndWoken(t *testing.T) {
	m := newMachine()
	run(t, m, settings.Window{}, func(t *testing.T, d *Disk) {
		d.Wake()
		opened(t, m, d)
		m.set(func() { m.servers["a"].refuses = true })
		after(5 * time.Hour)
		want(t, d, status.DiskOff)
		m.set(func() { m.servers["a"].refuses = false })
		d.Wake()
		after(12 * time.Second)
		want(t, d, status.DiskMounted)
	})
}

func TestLeaseRunsOut(t *testing.T) {
	m := newMachine()
	m.servers = map[string]*keyServer{"a": {lease: time.Hour, renew: 5 * time.Minute}, "b": {silent: true, lease: time.Hour, renew: 5 * time.Minute}}
	run(t, m, always, func(t *testing.T, d *Disk) {
		opened(t, m, d)
		m.set(func() { m.servers["a"].silent = true })
		after(53 * time.Minute)
		want(t, d, status.DiskMounted)
		after(8 * time.Minute)
		s := want(t, d, status.DiskOff)
		if calls := m.take(); calls != inOrder {
			t.Errorf("closing: %s", calls)
		}
		if s.Dark != status.DarkExpired || s.ErrorKind != status.ErrorLeaseExpired || len(s.Refused) != 0 {
			t.Errorf("%+v", s)
		}
		after(4 * time.Hour)
		if calls := m.take(); calls != "" {
			t.Errorf("without an answer: %s", calls)
		}
		// Any server's answer will do, and it is told that the disk was dark.
		m.set(func() { m.servers["b"].silent = false })
		after(expiredPace*6/5 + 20*time.Second)
		want(t, d, status.DiskMounted)
		if m.servers["b"].told != 1 || m.servers["a"].told != 0 {
			t.Errorf("told: %d, %d", m.servers["a"].told, m.servers["b"].told)
		}
		if left := m.book.Untold(); len(left) != 0 {
			t.Errorf("%v would be told of a disk that is open", left)
		}
	})
}

// The lease goes by CLOCK_BOOTTIME: a suspended machine loses it.
func TestSuspended(t *testing.T) {
	m := newMachine()
	m.servers = map[string]*keyServer{"a": {lease: 2 * time.Hour, renew: time.Hour}}
	run(t, m, always, func(t *testing.T, d *Disk) {
		opened(t, m, d)
		m.set(func() { m.skew += 3 * time.Hour; m.servers["a"].silent = true })
		after(5 * time.Second)
		want(t, d, status.DiskOff)
		if calls := m.take(); calls != inOrder {
			t.Errorf("%s", calls)
		}
	})
}

// A refusal in the middle of e2fsck ends the opening.
func TestRefusedWhileOpening(t *testing.T) {
	m := newMachine()
	m.servers = map[string]*keyServer{"a": {refuses: false, lease: time.Hour, renew: time.Minute}}
	m.hang = false
	m.checkTakes = 2 * time.Hour
	run(t, m, always, func(t *testing.T, d *Disk) {
		after(10 * time.Minute)
		want(t, d, status.DiskUnlocked)
		m.set(func() { m.servers["a"].refuses = true })
		after(90 * time.Second)
		if s := want(t, d, status.DiskOff); s.Unlocked || s.Dark != status.DarkRefused {
			t.Errorf("%+v", s)
		}
	})
	// And one that takes longer than any lease is renewed meanwhile.
	m = newMachine()
	m.servers = map[string]*keyServer{"a": {lease: 10 * time.Minute, renew: 3 * time.Minute}}
	m.checkTakes = 5 * time.Hour
	run(t, m, always, func(t *testing.T, d *Disk) {
		after(5*time.Hour + time.Minute)
		want(t, d, status.DiskMounted)
	})
}

// Dead and slow servers cost a lease nothing, and the key nothing: a round of
// check-ins under way is called off for it.
func TestSlowServers(t *testing.T) {
	m := newMachine()
	m.servers = map[string]*keyServer{"a": {lease: time.Minute, renew: 20 * time.Second}, "b": {silent: true}, "c": {lease: time.Minute, renew: 20 * time.Second, delay: 20 * time.Second}}
	run(t, m, settings.Window{}, func(t *testing.T, d *Disk) {
		after(time.Minute + 5*time.Second) // the first check-in is under way
		if n := m.asked("b"); n != 1 {
			t.Fatalf("asked %d times", n)
		}
		d.Wake()
		after(5 * time.Second)
		want(t, d, status.DiskMounted)
		for range 60 {
			after(time.Minute)
			d.Wake() // it is in use
			want(t, d, status.DiskMounted)
		}
	})
}

// While it is dark every server hears of the appliance.
func TestCheckIn(t *testing.T) {
	m := newMachine()
	m.servers = map[string]*keyServer{"a": agrees(), "b": {silent: true}}
	run(t, m, settings.Window{}, func(t *testing.T, d *Disk) {
		after(6 * time.Hour)
		want(t, d, status.DiskOff)
		if n := m.asked("a"); n < 50 { // b is silent: it is asked every few minutes
			t.Errorf("asked %d times in six hours", n)
		}
		m.set(func() { m.servers["b"].silent = false })
		after(10 * time.Minute)
		before := m.asked("a")
		after(12 * time.Hour)
		if n := m.asked("a") - before; n < 18 || n > 32 {
			t.Errorf("asked %d times in half a day", n)
		}
		for _, r := range m.rounds {
			if r.Open || len(r.Dark) > 0 {
				t.Fatalf("%+v", r)
			}
		}
		if calls := m.take(); calls != "" {
			t.Errorf("the disk was touched: %s", calls)
		}
		// Revoked while it is dark: it is not opened any more, and says that it is dark.
		m.set(func() { m.servers["b"].refuses = true })
		after(40 * time.Minute)
		d.Wake()
		after(time.Minute)
		s := want(t, d, status.DiskOff)
		if calls := m.take(); calls != "" || s.Dark != status.DarkRefused || m.servers["b"].told != 1 {
			t.Errorf("%s; told %d times; %+v", calls, m.servers["b"].told, s)
		}
	})
}

// Refusals and what is to be told survive a power cut; the rest survives a
// restart of the part.
func TestStaysDarkOverRestarts(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key-servers.json")
	ids := []string{"a", "b"}
	book, err := tokens.Open(path, ids)
	if err != nil {
		t.Fatal(err)
	}
	if err := book.Close([]string{"b"}, time.Unix(1e9, 0)); err != nil {
		t.Fatal(err)
	}
	m := newMachine()
	m.servers = map[string]*keyServer{"a": agrees(), "b": {refuses: true}}
	if m.book, err = tokens.Open(path, ids); err != nil {
		t.Fatal(err)
	}
	run(t, m, always, func(t *testing.T, d *Disk) {
		after(time.Hour)
		s := want(t, d, status.DiskOff)
		if calls := m.take(); calls != "" || s.Dark != status.DarkRefused || s.ErrorKind != status.ErrorLeaseRefused {
			t.Errorf("%q; %+v", calls, s)
		}
		if m.servers["a"].told != 1 || m.servers["b"].told != 1 {
			t.Errorf("told: %d, %d", m.servers["a"].told, m.servers["b"].told)
		}
		m.set(func() { m.servers["b"].refuses = false })
		after(20 * time.Minute)
		want(t, d, status.DiskMounted)
	})
	// A new card knows of nothing, and the key servers judge it.
	m = newMachine()
	m.servers = map[string]*keyServer{"a": agrees()}
	run(t, m, always, func(t *testing.T, d *Disk) { opened(t, m, d) })

	m = newMachine()
	m.servers = map[string]*keyServer{"a": {silent: true}}
	m.before = status.Disk{Dark: status.DarkExpired}
	run(t, m, always, func(t *testing.T, d *Disk) {
		after(time.Hour)
		if s := want(t, d, status.DiskOff); s.Dark != status.DarkExpired || m.take() != "" {
			t.Errorf("%+v", s)
		}
	})
}

// The part was killed while the disk was open: its lease goes on, neither longer
// nor shorter.
func TestAdoptsTheLease(t *testing.T) {
	open := func(ends time.Duration) *machine {
		m := newMachine()
		m.power, m.mapped, m.mountedNow = true, true, true
		m.poweredAt = time.Date(1999, 12, 31, 0, 0, 0, 0, time.UTC)
		m.before = status.Disk{LeaseEnds: ends}
		m.servers = map[string]*keyServer{"a": {silent: true}}
		return m
	}
	const now = time.Hour // the boot was an hour ago
	for _, tt := range []struct {
		name string
		ends time.Duration
		left time.Duration
	}{
		{"half an hour", now + 30*time.Minute, 30 * time.Minute},
		{"over", now - time.Second, 0},
		{"unknown", 0, adoptGrace},
		{"impossible", now + keywire.MaxLease + time.Hour, adoptGrace},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := open(tt.ends)
			run(t, m, always, func(t *testing.T, d *Disk) {
				if tt.left > 0 {
					after(tt.left - 5*time.Second)
					want(t, d, status.DiskMounted)
				}
				after(15 * time.Second)
				want(t, d, status.DiskOff)
				if calls := m.take(); !strings.HasSuffix(calls, inOrder) {
					t.Errorf("%s", calls)
				}
			})
		})
	}
	t.Run("renewed at once", func(t *testing.T) {
		m := open(now + time.Minute)
		m.servers["a"] = agrees()
		run(t, m, always, func(t *testing.T, d *Disk) {
			after(time.Hour)
			want(t, d, status.DiskMounted)
		})
	})
}

// What a server gave is kept before the disk is mounted, also where it did not
// open, and shown from then on.
func TestTokensAreKeptAndShown(t *testing.T) {
	m := newMachine()
	m.servers = map[string]*keyServer{"a": agrees(), "b": agrees()}
	m.servers["a"].issues, m.servers["b"].issues = "a1", "b1"
	run(t, m, settings.Window{}, func(t *testing.T, d *Disk) {
		m.mountErr = failed(status.ErrorFileSystem, "wrong fs type")
		d.Wake()
		after(3 * time.Second)
		if got := m.book.Tokens(); got["a"] != "a1" || got["b"] != "b1" {
			t.Fatalf("%d tokens before the disk is mounted", len(got))
		}
		m.set(func() {
			m.mountErr = nil
			m.servers["a"].issues, m.servers["b"].issues = "a2", ""
		})
		after(time.Minute)
		want(t, d, status.DiskMounted)
		if !slices.Equal(m.shown, []keywire.Token{"a1", "b1"}) {
			t.Errorf("shown %d tokens, or others", len(m.shown))
		}
		last := m.rounds[len(m.rounds)-1]
		if !last.Open || last.Tokens["a"] != "a2" || last.Tokens["b"] != "b1" {
			t.Errorf("the lease showed others than the newest")
		}
	})
	// A disk that does not open still has tokens to keep.
	m = newMachine()
	m.servers = map[string]*keyServer{"a": agrees()}
	m.servers["a"].issues = "a1"
	m.unlockResult = unlock.Result{ErrorKind: status.ErrorWrongKey, Error: "no"}
	run(t, m, settings.Window{}, func(t *testing.T, d *Disk) {
		d.Wake()
		after(3 * time.Second)
		if got := m.book.Tokens(); got["a"] != "a1" {
			t.Errorf("%d tokens", len(got))
		}
	})
}

// A card that takes no more writes: the old tokens are shown on, and the disk
// opens, and closes, all the same.
func TestCardThatTakesNoWrites(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	book, err := tokens.Open(filepath.Join(dir, "key-servers.json"), []string{"a"})
	if err != nil {
		t.Fatal(err)
	}
	if err := book.Keep(tokens.Fresh{"a": "a0"}, nil, false); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(dir, dir+".gone"); err != nil {
		t.Fatal(err)
	}
	m := newMachine()
	m.book = book
	m.servers = map[string]*keyServer{"a": agrees()}
	m.servers["a"].issues = "a1"
	run(t, m, always, func(t *testing.T, d *Disk) {
		opened(t, m, d)
		if r := m.rounds[len(m.rounds)-1]; r.Tokens["a"] != "a0" {
			t.Error("a token was shown that is not kept")
		}
		m.set(func() { m.servers["a"].refuses = true })
		after(6 * time.Minute)
		want(t, d, status.DiskOff)
		after(time.Hour)
		if s := want(t, d, status.DiskOff); s.Dark != status.DarkRefused || m.servers["a"].told != 1 {
			t.Errorf("told %d times; %+v", m.servers["a"].told, s)
		}
	})
}

// Held, not revoked: the check-in is granted and the key is not. The refusal
// stays on record until the key comes.
func TestHeldAfterARefusal(t *testing.T) {
	m := newMachine()
	run(t, m, settings.Window{}, func(t *testing.T, d *Disk) {
		d.Wake()
		opened(t, m, d)
		m.set(func() { m.servers["a"].refuses = true })
		after(6 * time.Minute)
		want(t, d, status.DiskOff)
		m.set(func() {
			m.servers["a"].refuses = false
			m.unlockResult = unlock.Result{ErrorKind: status.ErrorRefused, Error: "held"}
			m.servers["a"].heldKey = true
		})
		d.Wake()
		after(time.Minute)
		s := d.Status()
		if s.Power || s.ErrorKind != status.ErrorRefused || s.Dark != status.DarkRefused || len(s.Refused) != 1 {
			t.Errorf("%+v", s)
		}
		m.set(func() { m.unlockResult = unlock.Result{OK: true, Minor: 7}; m.servers["a"].heldKey = false })
		d.Wake()
		after(12 * time.Second)
		if s := want(t, d, status.DiskMounted); s.Dark != "" || len(s.Refused) != 0 {
			t.Errorf("%+v", s)
		}
	})
}

// In another place, or with a copied card, a person has to approve: the request
// is listed, without power for the disk, and approved it opens.
func TestApprovedAfterARefusal(t *testing.T) {
	m := newMachine()
	run(t, m, always, func(t *testing.T, d *Disk) {
		opened(t, m, d)
		m.set(func() { m.servers["a"].refuses = true })
		after(6 * time.Minute)
		want(t, d, status.DiskOff)
		m.take()
		if n := m.servers["a"].petitions; n < 1 || n > 3 {
			t.Errorf("%d requests that could be approved", n)
		}
		after(6 * time.Hour)
		if n := m.servers["a"].petitions; n < 20 || n > 45 {
			t.Errorf("%d requests in six hours", n)
		}
		if calls := m.take(); calls != "" {
			t.Errorf("the disk was touched: %s", calls)
		}
		m.set(func() { m.servers["a"].approved = true })
		d.Wake()
		after(12 * time.Second)
		if s := want(t, d, status.DiskMounted); len(s.Refused) != 0 {
			t.Errorf("%+v", s)
		}
	})
}

// Many hours of answers of all kinds: a disk is never open without a lease,
// nor after a refusal that was heard.
func TestNeverOpenWithoutConsent(t *testing.T) {
	m := newMachine()
	m.servers = map[string]*keyServer{"a": {lease: 20 * time.Minute, renew: 5 * time.Minute}, "b": {lease: 20 * time.Minute, renew: 5 * time.Minute}}
	run(t, m, always, func(t *testing.T, d *Disk) {
		quiet, refused := 0, 0 // minutes since the last consent, and with a refusal
		for minute := range 600 {
			switch minute % 50 {
			case 7:
				m.set(func() { m.servers["a"].silent = true })
			case 11:
				m.set(func() { m.servers["b"].silent = true })
			case 37:
				m.set(func() { m.servers["a"].silent = false; m.servers["b"].refuses = minute%100 > 50 })
			case 38:
				m.set(func() { m.servers["b"].silent = false })
			case 49:
				m.set(func() { m.servers["b"].refuses = false })
			}
			after(time.Minute)
			m.mu.Lock()
			a, b := *m.servers["a"], *m.servers["b"]
			m.mu.Unlock()
			quiet++
			if !a.silent && !a.refuses || !b.silent && !b.refuses {
				quiet = 0
			}
			refused++
			if !b.refuses || b.silent {
				refused = 0
			}
			s := d.Status()
			if s.Unlocked && (quiet > 22 || refused > 6) {
				t.Fatalf("minute %d: open after %d minutes without consent, %d of refusal: %+v", minute, quiet, refused, s)
			}
			if s.Unlocked != !s.LeaseUntil.IsZero() {
				t.Fatalf("minute %d: unlocked %v, lease until %v", minute, s.Unlocked, s.LeaseUntil)
			}
		}
		if n := strings.Count(m.take(), "mount"); n < 8 {
			t.Errorf("opened %d times: nothing was shown", n)
		}
	})
}

func TestBackOff(t *testing.T) {
	for tries, want := range map[int]time.Duration{0: 1, 1: 1, 2: 2, 3: 4, 5: 16, 6: 20, 100: 20} {
		for range 100 {
			if got := backOff(time.Minute, 20*time.Minute, tries); got < want*time.Minute*4/5 || got > want*time.Minute*6/5 {
				t.Fatal(fmt.Sprint(tries, got))
			}
		}
	}
}
