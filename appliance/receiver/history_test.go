package receiver

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"farkeep/appliance/keepercall"
	"farkeep/appliance/part"
	"farkeep/appliance/status"
	"farkeep/shared/pushwire"
	"farkeep/shared/settings"

	"github.com/google/go-cmp/cmp"
	"github.com/pkg/sftp"
	"golang.org/x/crypto/ssh"
)

func newSFTP(t *testing.T, b *bench, key string) *sftp.Client {
	t.Helper()
	conn, err := ssh.Dial("tcp", b.address, &ssh.ClientConfig{
		User: "farkeep", Auth: []ssh.AuthMethod{ssh.PublicKeys(b.keys[key].signer)}, HostKeyCallback: ssh.FixedHostKey(b.host.signer.PublicKey()),
	})
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	c, err := sftp.NewClient(conn)
	must(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

func TestAdminsWordsReachTheKeeper(t *testing.T) {
	b := start(t)
	boss := b.dial(t, "boss")
	for verb, want := range map[string]keepercall.Args{
		"accept photos 000001-20260101T000000Z it was me": {Repository: "photos", Generation: "000001-20260101T000000Z", Why: "it was me"},
		"reject photos 000001-20260101T000000Z":           {Repository: "photos", Generation: "000001-20260101T000000Z"},
		"retire photos":                                   {Repository: "photos"},
		"keep photos":                                     {Repository: "photos"},
		"floor 7 14d":                                     {Number: 7, Age: "14d"},
		"accept-clock":                                    {},
	} {
		want.Key, want.Role = "boss", RoleAdmin
		if _, err := boss.Run(t.Context(), verb, nil, 1000); err != nil {
			t.Errorf("%s: %v", verb, err)
		}
		if diff := cmp.Diff(want, <-b.calls); diff != "" {
			t.Errorf("%s: %s", verb, diff)
		}
	}
}

func TestGenerationsAsText(t *testing.T) {
	b := start(t)
	out, err := b.dial(t, "reader").Run(t.Context(), "generations --text photos", nil, 1000)
	must(t, err)
	for _, want := range []string{"STANDING", "000001-20260101T000000Z", "2.0 KiB", "suspect: everything is gone", "not foreseen"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("%q is missing in\n%s", want, out)
		}
	}
}

// The sessions of one key that read share one call to the keeper; when that ends
// on the keeper's side, so do they, because nothing is promised any more.
func TestReadersPinHistory(t *testing.T) {
	b := start(t)
	await := func(n int32) {
		t.Helper()
		for b.pinned.Load() != n {
			select {
			case <-t.Context().Done():
				t.Fatalf("%d calls pin", b.pinned.Load())
			case <-time.After(time.Millisecond):
			}
		}
	}
	first := newSFTP(t, b, "reader")
	second := newSFTP(t, b, "reader")
	other := newSFTP(t, b, "boss")
	await(2)
	first.Close()
	if _, err := second.Stat("/photos"); err != nil {
		t.Error(err)
	}
	await(2)
	second.Close()
	await(1)
	close(b.gone)
	await(0)
	_ = other.Wait() // returns when the session ended, however
}

func TestLogsShowRotatedFilesToo(t *testing.T) {
	b := start(t)
	must(t, os.WriteFile(filepath.Join(b.paths.State, "log", "farkeep.log.1"), []byte("an older line\n"), 0o644))
	out, err := b.dial(t, "boss").Run(t.Context(), "logs", nil, 1000)
	must(t, err)
	if string(out) != "an older line\na line\n" {
		t.Errorf("%q", out)
	}
}

func TestStatusOfHistory(t *testing.T) {
	b := start(t)
	at := time.Date(2026, 11, 5, 12, 0, 0, 0, time.UTC)
	var rot []status.Rot
	for i := range status.MaxRot {
		rot = append(rot, status.Rot{Repository: "secret", Path: fmt.Sprint("hidden-file-", i), What: "rotten", Generations: []string{"000001-20260101T000000Z"}, Found: at})
	}
	rot = append(rot[1:], status.Rot{Repository: "photos", Path: "own-file", What: "rotten", Found: at, Healed: at})
	must(t, status.Write(b.paths.Status(part.Keeper), status.Keeper{
		Repositories: []status.RepositoryStatus{
			{Name: "photos", Suspect: true, Suspects: []status.SuspectStatus{{Generation: "000002-20260102T000000Z", At: at, Reasons: []string{"all of it is gone."}}}},
			{Name: "secret", Suspect: true, Suspects: []status.SuspectStatus{{Generation: "000009-20260102T000000Z", At: at}}},
		},
		Frozen:      []string{"the clock is odd", "photos: it is suspect", "secret: it is suspect"},
		FrozenSince: at, Room: &status.Room{Free: 1 << 30, Reserve: 1 << 20, WorstDay: 1 << 25, PerDay: 1 << 22, FullOn: at},
		Scrub: &status.Scrub{Started: at, Done: 0.25, Paused: "a push"}, Rot: rot, RotCount: 50,
		Retiring: []status.Retiring{{Repository: "secret", By: "boss", Asked: at, Due: at}, {Repository: "photos", By: "boss", Asked: at, Due: at}},
		Untrue:   []status.Untrue{{Host: "nas", At: at, What: "secret is up to date"}},
	}))
	text, err := b.dial(t, "boss").Run(t.Context(), "status", nil, pushwire.MaxLine)
	must(t, err)
	for _, want := range []string{
		"SUSPECT photos", "all of it is gone.", "SUSPECT secret", "RETIRING secret", "the clock is odd", "secret: it is suspect", "1.0 GiB for pushes",
		"a day adds 4.0 MiB, the worst added 32.0 MiB", "25 % of the round", "waits: a push", "hidden-file-7", "untrue heartbeat",
	} {
		if !strings.Contains(string(text), want) {
			t.Errorf("the admin's status lacks %q:\n%s", want, text)
		}
	}
	home := b.dial(t, "home")
	for _, verb := range []string{"status", "status --json"} {
		text, err := home.Run(t.Context(), verb, nil, pushwire.MaxLine)
		must(t, err)
		for _, foreign := range []string{"secret", "hidden", "nas", "the clock is odd"} {
			if strings.Contains(string(text), foreign) {
				t.Errorf("a push key's %s names %q:\n%s", verb, foreign, text)
			}
		}
		for _, own := range []string{"all of it is gone.", "own-file", "photos: it is suspect"} {
			if !strings.Contains(string(text), own) {
				t.Errorf("a push key's %s lacks %q:\n%s", verb, own, text)
			}
		}
	}
	var s pushwire.Status
	must(t, json.Unmarshal(must2(home.Run(t.Context(), "status --json", nil, pushwire.MaxLine))(t), &s))
	if len(s.Retiring) != 1 || len(s.Rot) != 1 || len(s.Repositories) != 1 {
		t.Errorf("%+v", s)
	}
}

func must2(out []byte, err error) func(*testing.T) []byte {
	return func(t *testing.T) []byte {
		t.Helper()
		must(t, err)
		return out
	}
}

func TestAwake(t *testing.T) {
	var a awake
	const hour = time.Hour
	for h := range 24 {
		from := time.Duration(h) * hour
		for range 3 { // side by side, and again: once
			a.add(from+hour/2, from, from+20*time.Minute, 0)
		}
	}
	if got := a.sum(23 * hour); got != 8*hour {
		t.Errorf("%v in a day", got)
	}
	if got := a.sum(30 * hour); got != 17*20*time.Minute {
		t.Errorf("%v seven hours later", got)
	}
	if got := a.sum(1000 * hour); got != 0 {
		t.Errorf("%v in the end", got)
	}
	a.add(1001*hour, 1000*hour, 1001*hour, 2*hour)
	if got := a.sum(1001 * hour); got != 0 {
		t.Errorf("%v were earned", got)
	}
}

// A push key cannot keep the disk open day and night; what it uploads does not
// count, and neither does its window, and no other key suffers.
func TestKeepingTheDiskAwake(t *testing.T) {
	home, boss := Key{Name: "home", Role: RolePush}, Key{Name: "boss", Role: RoleAdmin}
	noon := time.Date(2026, 11, 5, 12, 0, 0, 0, time.UTC)
	now := noon
	r := &receiver{env: &part.Env{Now: func() time.Time { return now }}, awake: map[string]*awake{}}
	pass := func(d time.Duration) { r.started = r.started.Add(-d) }
	r.started = time.Now()
	const hour = time.Hour
	// A first push of days.
	for range 5 {
		from := r.running()
		pass(20 * hour)
		r.kept(home, from, r.running(), int64(20*hour/time.Second)*awakeRate)
	}
	must(t, r.awakeEnough(home))
	// A push every hour, with two wakes each.
	for range 48 {
		must(t, r.mayWake(home))
		must(t, r.mayWake(home))
		pass(hour)
	}
	// An enemy with the key, and one with another, who is nobody's concern here.
	for range 40 {
		pass(15 * time.Minute)
		_ = r.mayWake(home)
		r.kept(boss, r.running()-hour, r.running(), 0)
	}
	if err := r.mayWake(home); err == nil {
		t.Error("awake for 12 hours, and on")
	}
	must(t, r.awakeEnough(boss))
	r.brief.Window = settings.Window{Start: settings.ClockTime(22 * hour), Length: settings.Duration(4 * hour)}
	if r.awakeEnough(home) == nil {
		t.Error("the window is at night, and it is noon")
	}
	now = noon.Add(13 * hour)
	must(t, r.awakeEnough(home))
	now = noon
	pass(24 * hour)
	must(t, r.awakeEnough(home))
}
