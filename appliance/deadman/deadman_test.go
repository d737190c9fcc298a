package deadman

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"net/mail"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"farkeep/appliance/part"
	"farkeep/appliance/status"
	"farkeep/shared/outbox"
	"farkeep/shared/settings"

	"github.com/google/go-cmp/cmp"
)

// house is the part with its folders and the other parts' status files.
type house struct {
	t     *testing.T
	d     *deadman
	paths part.Paths
	log   *bytes.Buffer
	now   time.Time
	up    time.Duration
}

func newHouse(t *testing.T) *house {
	t.Helper()
	dir := t.TempDir()
	h := &house{t: t, paths: part.Paths{Run: filepath.Join(dir, "run"), State: filepath.Join(dir, "state"), Media: filepath.Join(dir, "media")}, log: &bytes.Buffer{}, now: t0, up: day}
	for _, f := range []string{h.paths.RunDir(part.Deadman), h.paths.RunDir(part.Network), h.paths.RunDir(part.Disk), h.paths.RunDir(part.Keeper), h.paths.RunDir(part.Mail), h.paths.Outbox()} {
		if err := os.MkdirAll(f, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	h.tell(part.Network, status.Network{Addresses: []string{"192.0.2.50/24"}, ClockSet: true, ClockSource: "2 of 3 sources agree", VPNUp: true})
	h.tell(part.Disk, status.Disk{State: status.DiskMounted, Mounted: true, Unlocked: true, TotalBytes: 100, FreeBytes: 50})
	h.tell(part.Keeper, status.Keeper{Heartbeats: []status.Heartbeat{{Host: "nas", At: t0, ReceivedAt: t0}}})
	h.restart()
	return h
}

func (h *house) tell(name string, v any) {
	h.t.Helper()
	if err := status.Write(h.paths.Status(name), v); err != nil {
		h.t.Fatal(err)
	}
}

// restart is the part's process anew, over what the last one left.
func (h *house) restart() {
	h.t.Helper()
	env, err := part.New(part.Header{Name: part.Deadman, Host: "attic", Paths: h.paths, Firmware: true}, Brief{}, slog.New(slog.NewTextHandler(io.MultiWriter(h.log, h.t.Output()), nil)), nil)
	if err != nil {
		h.t.Fatal(err)
	}
	env.Now = func() time.Time { return h.now }
	h.d = &deadman{env: env, brief: Brief{DeadMan: thresholds, From: "attic@site.example", To: []string{"op@site.example"}},
		uptime: func() (time.Duration, error) { return h.up, nil }, bootID: "boot-1"}
	if err := h.d.open(); err != nil {
		h.t.Fatal(err)
	}
}

func (h *house) pass(d time.Duration) { h.now, h.up = h.now.Add(d), h.up+d }

func (h *house) waiting() []string {
	h.t.Helper()
	ids, err := outbox.List(h.paths.Outbox())
	if err != nil {
		h.t.Fatal(err)
	}
	return ids
}

// subjects reads the subjects of the mails in the outbox.
func (h *house) subjects() []string {
	h.t.Helper()
	var out []string
	for _, id := range h.waiting() {
		text, err := outbox.Read(h.paths.Outbox(), id)
		if err != nil {
			h.t.Fatal(err)
		}
		m, err := mail.ReadMessage(bytes.NewReader(text))
		if err != nil {
			h.t.Fatal(err)
		}
		out = append(out, m.Header.Get("Subject"))
	}
	return out
}

func TestFromStatusFilesToTheOutbox(t *testing.T) {
	h := newHouse(t)
	h.d.step()
	if diff := cmp.Diff([]string{"[WATCHDOG] attic is up"}, h.subjects()); diff != "" {
		t.Fatal(diff)
	}
	first := h.waiting()[0]
	h.pass(31 * hour)
	h.d.step()
	h.d.step()
	if diff := cmp.Diff([]string{"[WATCHDOG] attic is up", "[WATCHDOG] nas heartbeat STALE"}, h.subjects()); diff != "" {
		t.Error(diff)
	}
	s, err := status.Read[status.Deadman](h.paths.Status(part.Deadman))
	if err != nil || len(s.Alarms) != 1 || s.Alarms[0].Kind != heartbeatStale || s.Alarms[0].Subject != "nas" || !s.Alarms[0].Since.Equal(h.now) {
		t.Errorf("status %+v, %v", s, err)
	}

	// The first was sent: it is pruned. A foreign id in the list harms nothing.
	if err := outbox.WriteSent(filepath.Join(h.paths.RunDir(part.Mail), "sent.json"), []string{first, outbox.ID(99999999, "x", 1)}); err != nil {
		t.Fatal(err)
	}
	h.d.step()
	if got := h.waiting(); len(got) != 1 || got[0] == first {
		t.Errorf("after pruning: %v", got)
	}
	// Nothing of it is sent again after a restart, and the alarm is not forgotten.
	h.restart()
	h.d.step()
	if got := h.waiting(); len(got) != 1 {
		t.Errorf("after a restart: %v", got)
	}
}

// A crash at any point between deciding and sending: every mail is in the
// outbox once, and its text is whole.
func TestCrashes(t *testing.T) {
	for _, tt := range []struct {
		name  string
		crash func(t *testing.T, h *house, before State)
	}{
		{"before the state was written", func(t *testing.T, h *house, before State) {
			if err := writeState(h.d.path(), before); err != nil {
				t.Fatal(err)
			}
			for _, id := range h.waiting()[1:] {
				if err := outbox.Prune(h.paths.Outbox(), []string{id}); err != nil {
					t.Fatal(err)
				}
			}
		}},
		{"after the state, before the outbox", func(t *testing.T, h *house, before State) {
			decided, mails := Judge(before, h.d.look(), thresholds)
			decided.Pending = mails
			if err := writeState(h.d.path(), decided); err != nil {
				t.Fatal(err)
			}
			for _, id := range h.waiting()[1:] {
				if err := outbox.Prune(h.paths.Outbox(), []string{id}); err != nil {
					t.Fatal(err)
				}
			}
		}},
		{"after the outbox, before that was noted", func(t *testing.T, h *house, before State) {
			decided, mails := Judge(before, h.d.look(), thresholds)
			decided.Pending = mails
			if err := writeState(h.d.path(), decided); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHouse(t)
			h.d.step()
			before := h.d.state
			h.pass(31 * hour)
			h.d.step()
			tt.crash(t, h, before)
			h.restart()
			h.d.step()
			h.d.step()
			if diff := cmp.Diff([]string{"[WATCHDOG] attic is up", "[WATCHDOG] nas heartbeat STALE"}, h.subjects()); diff != "" {
				t.Error(diff)
			}
			if len(h.d.state.Pending) != 0 {
				t.Errorf("pending %v", h.d.state.Pending)
			}
		})
	}
}

func TestADamagedStateIsPutAside(t *testing.T) {
	h := newHouse(t)
	if err := os.WriteFile(h.d.path(), []byte(`{"serial":`), 0o600); err != nil {
		t.Fatal(err)
	}
	h.restart()
	h.d.step()
	if got := h.subjects(); len(got) != 1 {
		t.Errorf("mails %q", got)
	}
	if _, err := os.Stat(h.d.path() + ".bad"); err != nil {
		t.Error(err)
	}
}

func TestAFullOutboxDropsAndSaysSo(t *testing.T) {
	h := newHouse(t)
	h.d.step()
	for i := range outbox.MaxMails - 1 {
		if err := outbox.Put(h.paths.Outbox(), outbox.ID(uint64(i), "x", 1), []byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	h.pass(31 * hour)
	h.d.step()
	if h.d.state.Dropped != 1 || len(h.d.state.Pending) != 0 {
		t.Errorf("dropped %d, pending %d", h.d.state.Dropped, len(h.d.state.Pending))
	}
	if err := outbox.Prune(h.paths.Outbox(), h.waiting()); err != nil {
		t.Fatal(err)
	}
	h.tell(part.Keeper, status.Keeper{Heartbeats: []status.Heartbeat{{Host: "nas", At: h.now, ReceivedAt: h.now}}})
	h.d.step()
	text, err := outbox.Read(h.paths.Outbox(), h.waiting()[0])
	if err != nil || !strings.Contains(string(text), "1 earlier mails were dropped") {
		t.Errorf("%s, %v", text, err)
	}
}

func TestAStatePartitionThatRefuses(t *testing.T) {
	h := newHouse(t)
	if err := os.RemoveAll(h.paths.StateDir(part.Deadman)); err != nil {
		t.Fatal(err)
	}
	for range 5 {
		h.d.step()
	}
	if n := strings.Count(h.log.String(), "level=ERROR"); n == 0 || n > 4 {
		t.Errorf("%d lines in the log; want each error once", n)
	}
	if err := os.MkdirAll(h.paths.Outbox(), 0o755); err != nil {
		t.Fatal(err)
	}
	h.d.step()
	if got := h.subjects(); len(got) != 1 {
		t.Errorf("mails %q", got)
	}
}

func TestAnUnchangedStateIsNotWritten(t *testing.T) {
	h := newHouse(t)
	h.d.step()
	if err := os.Remove(h.d.path()); err != nil {
		t.Fatal(err)
	}
	for range 100 {
		h.pass(time.Minute)
		h.d.step()
	}
	if _, err := os.Stat(h.d.path()); !errors.Is(err, fs.ErrNotExist) {
		t.Error("the SD card is written to although nothing changed")
	}
}

func TestRun(t *testing.T) {
	h := newHouse(t)
	set := thresholds
	set.CheckInterval = settings.Duration(time.Second)
	env, err := part.New(part.Header{Name: part.Deadman, Host: "attic", Paths: h.paths}, Brief{DeadMan: set, From: "attic@site.example", To: []string{"op@site.example"}}, slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	env.Now = func() time.Time { cancel(); return t0 }
	if err := Run(ctx, env); err != nil {
		t.Error(err)
	}
	if got := h.subjects(); len(got) == 0 {
		t.Error("no mail")
	}
}
