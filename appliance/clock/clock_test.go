package clock

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// machine is a System whose clock and sources the test turns. Its uptime is
// synctest's time.
type machine struct {
	boot time.Time // synctest's time at power-on

	mu     sync.Mutex
	offset time.Duration // wall clock minus synctest's time
	truth  map[string]time.Duration
	steps  []time.Duration
	slews  []time.Duration
}

func (m *machine) Now() time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	return time.Now().Round(0).Add(m.offset)
}

// ahead is the wall clock minus synctest's time.
func (m *machine) ahead() time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.offset
}

// shifts counts the steps and slews so far.
func (m *machine) shifts() (steps, slews int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.steps), len(m.slews)
}

func (m *machine) Uptime() time.Duration { return time.Since(m.boot) }

func (m *machine) Step(d time.Duration) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.offset += d
	m.steps = append(m.steps, d)
	return nil
}

func (m *machine) Slew(d time.Duration) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.offset += d
	m.slews = append(m.slews, d)
	return nil
}

// query answers as the source's entry in truth says: an offset to synctest's
// time. A source without an entry is silent.
func (m *machine) query(_ context.Context, source string) (Sample, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	truth, ok := m.truth[source]
	if !ok {
		return Sample{}, errors.New("silent")
	}
	port := uint16(len(source)) // sources are named a, bb, ccc
	return Sample{Source: source, Address: netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), port), Offset: truth - m.offset, Distance: 10 * time.Millisecond}, nil
}

func (m *machine) say(d time.Duration, sources ...string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range sources {
		m.truth[s] = d
	}
}

var three = []string{"a", "bb", "ccc"}

// powerOn is a machine without a battery: its clock shows 1970.
func powerOn() *machine {
	return &machine{boot: time.Now(), offset: -time.Since(time.Unix(0, 0)), truth: map[string]time.Duration{}}
}

// run starts a keeper; stop ends it and waits.
func run(t *testing.T, m *machine, path string) (k *Keeper, stop func()) {
	t.Helper()
	return runWith(t, m, path, m.query)
}

// runWith is run with other answers than the machine's.
func runWith(t *testing.T, m *machine, path string, query func(context.Context, string) (Sample, error)) (k *Keeper, stop func()) {
	t.Helper()
	k, err := New(Config{Path: path, Servers: three, System: m, Query: query, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- k.Run(ctx) }()
	return k, func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func isReady(k *Keeper) bool { return isClosed(k.Ready()) }

// synctest's time starts in 2000; the tests' truth is ten thousand days later.
const future = 10000 * 24 * time.Hour

func TestFirstStart(t *testing.T) {
	path := filepath.Join(t.TempDir(), "clock")
	synctest.Test(t, func(t *testing.T) {
		m := powerOn()
		k, stop := run(t, m, path)
		defer stop()
		time.Sleep(30 * time.Second)
		if k.Status().Set || isReady(k) || m.Now().Before(Earliest) {
			t.Errorf("before any answer: %+v, ready %v, clock %v", k.Status(), isReady(k), m.Now())
		}
		m.say(future, three...)
		k.Wake()
		synctest.Wait()
		if !k.Status().Set || !isReady(k) || m.ahead().Round(time.Second) != future {
			t.Errorf("after the answer: %+v, clock %v", k.Status(), m.Now())
		}
	})
}

func TestNoSourcesOnFirstStart(t *testing.T) {
	path := filepath.Join(t.TempDir(), "clock")
	synctest.Test(t, func(t *testing.T) {
		m := powerOn()
		k, stop := run(t, m, path)
		time.Sleep(FallbackAfter + time.Second)
		if got := k.Status(); got != (Status{Source: "no known time"}) || !isReady(k) {
			t.Errorf("%+v, ready %v", got, isReady(k))
		}
		stop()
		if _, err := os.Stat(path); err == nil {
			t.Error("a time that nobody confirmed was saved")
		}
	})
}

func TestPowerCuts(t *testing.T) {
	path := filepath.Join(t.TempDir(), "clock")
	synctest.Test(t, func(t *testing.T) {
		m := powerOn()
		m.say(future, three...)
		_, stop := run(t, m, path)
		time.Sleep(25 * time.Minute)
		stop()
		last := m.Now()

		// An hour later it comes back, and nobody tells the time.
		time.Sleep(time.Hour)
		m = powerOn()
		k, stop := run(t, m, path)
		if d := m.Now().Sub(last); d != 0 {
			t.Errorf("the start is %v after the last known time", d)
		}
		time.Sleep(FallbackAfter + time.Second)
		synctest.Wait()
		want := Status{Source: "last known time"}
		if d := m.Now().Sub(last); k.Status() != want || d.Round(time.Minute) != SaveInterval+FallbackAfter || !isReady(k) {
			t.Errorf("without sources: %+v, %v after the last known time", k.Status(), d)
		}

		// When they answer again, the clock is right again, and it was no jump.
		m.say(future, three...)
		time.Sleep(20 * time.Minute)
		if k.Status().Jump != "" || !k.Status().Set || m.ahead().Round(time.Second) != future {
			t.Errorf("with sources: %+v, clock %v", k.Status(), m.Now())
		}
		stop()
	})
}

func TestThrownYearsAhead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "clock")
	synctest.Test(t, func(t *testing.T) {
		m := powerOn()
		m.say(future, three...)
		k, stop := run(t, m, path)
		time.Sleep(time.Hour)
		m.say(future+3*365*24*time.Hour, three...)
		time.Sleep(2 * time.Hour)
		if k.Status().Jump == "" || m.ahead().Round(time.Second) != future {
			t.Errorf("thrown: %+v, clock %v", k.Status(), m.Now())
		}
		stop()

		// It is not forgotten over a reboot, and ends when the sources are sane again.
		m = powerOn()
		k, stop = run(t, m, path)
		defer stop()
		if k.Status().Jump == "" {
			t.Error("forgotten over a reboot")
		}
		m.say(future, three...)
		k.Wake()
		synctest.Wait()
		if k.Status().Jump != "" || !k.Status().Set {
			t.Errorf("sane again: %+v", k.Status())
		}
	})
}

func TestMovedByAMonthAndAccepted(t *testing.T) {
	const month = 30 * 24 * time.Hour
	path := filepath.Join(t.TempDir(), "clock")
	synctest.Test(t, func(t *testing.T) {
		m := powerOn()
		m.say(future, three...)
		k, stop := run(t, m, path)
		defer stop()
		time.Sleep(time.Hour)
		m.say(future+month, three...)
		time.Sleep(2 * time.Hour)
		if !strings.Contains(k.Status().Jump, "set, not trusted") || m.ahead().Round(time.Second) != future+month {
			t.Errorf("%+v, clock %v", k.Status(), m.Now())
		}
		first := k.Status().Jump
		time.Sleep(48 * time.Hour)
		if k.Status().Jump != first {
			t.Errorf("the jump is now told as %q, before %q", k.Status().Jump, first)
		}
		k.Accept()
		synctest.Wait()
		if k.Status().Jump != "" {
			t.Errorf("accepted: %+v", k.Status())
		}
	})
}

func TestBackInTime(t *testing.T) {
	path := filepath.Join(t.TempDir(), "clock")
	synctest.Test(t, func(t *testing.T) {
		m := powerOn()
		m.say(future, three...)
		_, stop := run(t, m, path)
		time.Sleep(time.Hour)
		stop()
		before := m.Now()
		m = powerOn()
		m.say(future-100*24*time.Hour, three...)
		k, stop := run(t, m, path)
		defer stop()
		time.Sleep(time.Second)
		if k.Status().Jump == "" || k.Status().Set || !isReady(k) || k.Status().Source != "last known time" || m.Now().Before(before) {
			t.Errorf("%+v, clock %v, before %v", k.Status(), m.Now(), before)
		}
	})
}

func TestOneLiarOfThree(t *testing.T) {
	path := filepath.Join(t.TempDir(), "clock")
	synctest.Test(t, func(t *testing.T) {
		m := powerOn()
		m.say(future, "a", "bb")
		m.say(future+time.Hour, "ccc")
		k, stop := run(t, m, path)
		defer stop()
		time.Sleep(time.Second)
		if !strings.HasPrefix(k.Status().Source, "2 of 3") || m.ahead().Round(time.Second) != future {
			t.Errorf("%+v, clock %v", k.Status(), m.Now())
		}
	})
}

func TestASlowSourceHoldsNobodyUp(t *testing.T) {
	path := filepath.Join(t.TempDir(), "clock")
	synctest.Test(t, func(t *testing.T) {
		m := powerOn()
		m.say(future, "a", "bb")
		k, stop := runWith(t, m, path, func(ctx context.Context, source string) (Sample, error) {
			if source == "ccc" {
				<-ctx.Done()
				return Sample{}, ctx.Err()
			}
			return m.query(ctx, source)
		})
		synctest.Wait()
		if !k.Status().Set {
			t.Errorf("after no time: %+v", k.Status())
		}
		stop()
	})
}

func TestDriftIsSlewed(t *testing.T) {
	path := filepath.Join(t.TempDir(), "clock")
	synctest.Test(t, func(t *testing.T) {
		m := powerOn()
		m.say(future, three...)
		_, stop := run(t, m, path)
		defer stop()
		time.Sleep(time.Minute)
		before, _ := m.shifts()
		m.say(future-50*time.Millisecond, three...)
		time.Sleep(2 * time.Hour)
		if steps, slews := m.shifts(); steps != before || slews == 0 || m.ahead() != future-50*time.Millisecond {
			t.Errorf("%d steps and %d slews, %v ahead", steps-before, slews, m.ahead())
		}
	})
}

func TestKissOfDeathIsObeyed(t *testing.T) {
	path := filepath.Join(t.TempDir(), "clock")
	synctest.Test(t, func(t *testing.T) {
		m := powerOn()
		asked := 0
		_, stop := runWith(t, m, path, func(ctx context.Context, source string) (Sample, error) {
			if source == "a" {
				asked++
				return Sample{}, &holdError{code: "DENY", wait: 24 * time.Hour}
			}
			return m.query(ctx, source)
		})
		time.Sleep(23 * time.Hour)
		stop()
		if asked != 1 {
			t.Errorf("asked %d times", asked)
		}
	})
}

func TestDamagedStateIsNoKnowledge(t *testing.T) {
	for _, content := range []string{"", "{", `{"time":"1970-01-01T00:00:00Z"}`, strings.Repeat("x", maxState+1),
		`{"time":"2026-11-22T00:00:00Z","clock":"2099-11-22T00:00:00Z"}`} {
		path := filepath.Join(t.TempDir(), "clock")
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		m := &machine{boot: time.Now(), truth: map[string]time.Duration{}}
		k, err := New(Config{Path: path, System: m, Log: slog.New(slog.DiscardHandler)})
		if err != nil || !k.known.Time.IsZero() {
			t.Errorf("%q: %v, %+v", content, err, k.known)
		}
	}
}

func FuzzState(f *testing.F) {
	f.Add([]byte(`{"time":"2026-11-22T08:00:00Z","gained":3600000000000,"unsynced":0,"clock":"2026-11-22T08:00:00Z"}`))
	f.Add([]byte(`{"time":"2026-11-22T08:00:00Z","clock":"2027-11-22T08:00:00Z","jump":"x"}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := parseState(data)
		if err != nil {
			return
		}
		// Whatever was in the file, the clock can still be judged, within bounds.
		k := Knowledge{Time: s.Time, Gained: s.Gained, Unsynced: s.Unsynced}
		if k.Floor().After(k.Time) || k.Floor().Before(k.Time.Add(-MaxGain-time.Hour)) {
			t.Errorf("floor %v, time %v", k.Floor(), k.Time)
		}
		path := filepath.Join(t.TempDir(), "clock")
		if err := writeState(path, s); err != nil {
			t.Fatal(err)
		}
		if again, err := readState(path); err != nil || !again.Time.Equal(s.Time) || again.Gained != s.Gained {
			t.Errorf("%+v became %+v, %v", s, again, err)
		}
	})
}
