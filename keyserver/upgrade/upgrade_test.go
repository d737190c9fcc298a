package upgrade_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"farkeep/keyserver/policy"
	"farkeep/keyserver/upgrade"
	"farkeep/shared/hint"
)

// files as the earlier version wrote them.
const (
	revoked = `{
  "appliance": "attic",
  "state": "revoked",
  "reason": "stolen",
  "by": "ada",
  "since": "2026-02-01T12:00:00Z"
}
`
	enabled = `{"appliance": "shed", "state": "enabled", "reason": "new in site.toml", "since": "2026-01-01T12:00:00Z"}`
	keys    = `{"appliance": "shed", "keys": ["2026-02-28T20:00:00Z","2026-03-01T02:00:00Z"], "last_key": "2026-03-01T02:00:00Z", "last_seen": "2026-03-01T03:00:00Z"}`
)

func write(t *testing.T, dir, name, text string) {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, dir, name string) policy.State {
	t.Helper()
	s, err := policy.Open(dir).Read(name)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestMigrate(t *testing.T) {
	dir := t.TempDir()
	store := policy.Open(dir)
	write(t, dir, "standing/attic.json", revoked)
	write(t, dir, "standing/shed.json", enabled)
	write(t, dir, "history/shed.json", keys)

	// Reading alone shows it and changes nothing.
	if s, err := upgrade.Read(dir, store, "attic"); err != nil || s.Standing.State != policy.Revoked {
		t.Errorf("%+v, %v", s.Standing, err)
	}
	if names, err := upgrade.Pending(dir); err != nil || !slices.Equal(names, []string{"attic", "shed"}) {
		t.Errorf("pending: %v, %v", names, err)
	}
	for n := range 2 {
		done, err := upgrade.Migrate(dir, store)
		if err != nil || len(done) != 2*(1-n) {
			t.Fatalf("time %d: %v, %v", n, done, err)
		}
	}
	since := time.Date(2026, 2, 1, 12, 0, 0, 0, time.UTC)
	if got := read(t, dir, "attic").Standing; got != (policy.Standing{State: policy.Revoked, Reason: "stolen", By: "ada", Since: since}) {
		t.Errorf("%+v", got)
	}
	s := read(t, dir, "shed")
	if s.Standing.State != policy.Enabled || len(s.Keys) != 2 || !s.LastKey.Wall.Equal(s.Keys[1].Wall) || s.LastSeen.Wall.Hour() != 3 {
		t.Errorf("%+v", s)
	}
	for _, kind := range []string{"standing", "history"} {
		if _, err := os.Stat(filepath.Join(dir, kind)); !os.IsNotExist(err) {
			t.Errorf("%s is still there: %v", kind, err)
		}
	}
}

// A crash after the state was written and before the old file went repeats the
// work; an order that came in between stays.
func TestMigrateAgain(t *testing.T) {
	dir := t.TempDir()
	store := policy.Open(dir)
	write(t, dir, "standing/shed.json", enabled)
	write(t, dir, "history/shed.json", keys)
	if _, err := upgrade.Migrate(dir, store); err != nil {
		t.Fatal(err)
	}
	if err := store.Update("shed", func(s policy.State) (policy.State, error) {
		s.Standing = policy.Standing{State: policy.Revoked, Reason: "stolen"}
		return s, nil
	}); err != nil {
		t.Fatal(err)
	}
	write(t, dir, "standing/shed.json", enabled)
	write(t, dir, "history/shed.json", keys)
	if _, err := upgrade.Migrate(dir, store); err != nil {
		t.Fatal(err)
	}
	if s := read(t, dir, "shed"); s.Standing.State != policy.Revoked || len(s.Keys) != 2 {
		t.Errorf("%+v", s)
	}
}

// What cannot be read may be a revocation: it stays, and is named.
func TestDamagedFilesStay(t *testing.T) {
	for name, text := range map[string]string{
		"cut off": revoked[:20], "another's": enabled, "no state": `{"appliance":"attic","state":""}`, "huge": strings.Repeat(" ", 200<<10),
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			store := policy.Open(dir)
			write(t, dir, "standing/attic.json", text)
			write(t, dir, "standing/shed.json", enabled)
			done, err := upgrade.Migrate(dir, store)
			if err == nil || !slices.Equal(done, []string{"shed"}) || !strings.Contains(hint.Of(err), "farkeep-keyserver revoke attic") {
				t.Errorf("%v, %v, %q", done, err, hint.Of(err))
			}
			if _, err := upgrade.Read(dir, store, "attic"); err == nil {
				t.Error("read as if nothing was there")
			}
			if _, err := os.Stat(filepath.Join(dir, "standing", "attic.json")); err != nil {
				t.Error(err)
			}
			// Once a person has revoked it, nothing stands in the way.
			if err := store.Update("attic", func(s policy.State) (policy.State, error) {
				s.Standing = policy.Standing{State: policy.Revoked, Reason: "to be sure"}
				return s, nil
			}); err != nil {
				t.Fatal(err)
			}
			if _, err := upgrade.Migrate(dir, store); err != nil {
				t.Error(err)
			}
			if s := read(t, dir, "attic"); s.Standing.Reason != "to be sure" {
				t.Errorf("%+v", s.Standing)
			}
		})
	}
}
