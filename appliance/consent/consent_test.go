package consent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"farkeep/appliance/keysource"
	"farkeep/appliance/part"
	"farkeep/shared/identity"
	"farkeep/shared/keywire"
	"farkeep/shared/secret"
	"farkeep/shared/settings"
)

const uuid = "b64e6fbb-11a0-42e1-b7f1-32adde77f805"

// server is a key server in memory.
type server struct {
	name  string
	delay time.Duration
	says  map[keywire.Verb]string // an answer; "" for a refusal
	asked []keywire.Request
}

func (s *server) ID() string     { return "id of " + s.name }
func (s *server) String() string { return s.name }

func (s *server) Ask(ctx context.Context, r keywire.Request) ([]byte, error) {
	s.asked = append(s.asked, r)
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-time.After(s.delay):
	}
	text, ok := s.says[r.Verb]
	switch {
	case !ok:
		return nil, errors.New("connection refused")
	case text == "":
		return nil, fmt.Errorf("%w: exit status 4", keysource.ErrRefused)
	default:
		return []byte(text), nil
	}
}

func (s *server) Key(ctx context.Context, r keywire.Request) (keysource.Grant, error) {
	text, err := s.Ask(ctx, r)
	return keysource.Grant{Key: secret.New(text), Token: "fresh"}, err
}

// A server that refuses a check-in is asked for the key, so that a person finds
// the request; one that does not is not.
func TestPetition(t *testing.T) {
	const in = `{"appliance":"attic"}`
	for _, tc := range []struct {
		name  string
		open  bool
		says  map[keywire.Verb]string
		want  Answer
		asked []keywire.Verb
	}{
		{"held", false, map[keywire.Verb]string{keywire.CheckIn: "", keywire.Key: ""}, Answer{Refused: true}, []keywire.Verb{keywire.CheckIn, keywire.Key}},
		{"approved", false, map[keywire.Verb]string{keywire.CheckIn: "", keywire.Key: "the key"}, Answer{Granted: true, Freed: true}, []keywire.Verb{keywire.CheckIn, keywire.Key}},
		{"gone meanwhile", false, map[keywire.Verb]string{keywire.CheckIn: ""}, Answer{Refused: true}, []keywire.Verb{keywire.CheckIn, keywire.Key}},
		{"allowed again", false, map[keywire.Verb]string{keywire.CheckIn: in}, Answer{Granted: true}, []keywire.Verb{keywire.CheckIn}},
		{"dead", false, nil, Answer{}, []keywire.Verb{keywire.CheckIn}},
		{"open", true, map[keywire.Verb]string{keywire.Renew: ""}, Answer{Refused: true}, []keywire.Verb{keywire.Renew}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := &server{name: "home", says: tc.says}
			r := Ask(t.Context(), []Asked{s}, Round{UUID: uuid, Open: tc.open, Petition: true, Tokens: map[string]keywire.Token{s.ID(): "tok"}}, Boottime)
			got := r.Answers[0]
			tc.want.Server, tc.want.ID, got.Error = "home", s.ID(), ""
			if got != tc.want || len(r.Tokens) != 0 != tc.want.Freed || tc.want.Freed && r.Tokens[s.ID()] != "fresh" {
				t.Errorf("%+v with %d tokens, want %+v", got, len(r.Tokens), tc.want)
			}
			var asked []keywire.Verb
			for _, a := range s.asked {
				asked = append(asked, a.Verb)
				if a.Token != "tok" {
					t.Error("asked without its token")
				}
			}
			if !slices.Equal(asked, tc.asked) {
				t.Errorf("asked %v, want %v", asked, tc.asked)
			}
		})
	}
}

func TestRound(t *testing.T) {
	const lease, in = `{"seconds":3600,"renew":300}`, `{"appliance":"attic"}`
	all := map[keywire.Verb]string{keywire.Renew: lease, keywire.CheckIn: in, keywire.Dark: in}
	revoked := map[keywire.Verb]string{keywire.Renew: "", keywire.CheckIn: "", keywire.Dark: in}
	for _, tc := range []struct {
		name string
		says map[keywire.Verb]string
		open Answer
		dark Answer
	}{
		{"agrees", all, Answer{Granted: true, Until: 2 * time.Hour, Renew: time.Hour + 5*time.Minute}, Answer{Granted: true, Told: true}},
		{"revoked", revoked, Answer{Refused: true}, Answer{Refused: true, Told: true}},
		{"dead", nil, Answer{}, Answer{}},
		{"knows no dark", map[keywire.Verb]string{keywire.Renew: lease, keywire.CheckIn: in}, Answer{Granted: true, Until: 2 * time.Hour, Renew: time.Hour + 5*time.Minute}, Answer{Granted: true}},
		{"lease without renew", map[keywire.Verb]string{keywire.Renew: `{"seconds":60}`}, Answer{Granted: true, Until: time.Hour + time.Minute, Renew: time.Hour + 20*time.Second}, Answer{}},
		{"talks rubbish", map[keywire.Verb]string{keywire.Renew: "yes", keywire.CheckIn: `{"appliance":"../x"}`, keywire.Dark: "{}"}, Answer{}, Answer{}},
		{"a lease for ever", map[keywire.Verb]string{keywire.Renew: `{"seconds":99999999}`}, Answer{}, Answer{}},
		{"a lease of no time", map[keywire.Verb]string{keywire.Renew: `{"seconds":0}`}, Answer{}, Answer{}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				for _, open := range []bool{true, false} {
					s := &server{name: "home", says: tc.says, delay: time.Second}
					r := Round{UUID: uuid, Open: open, Dark: []string{s.ID()}, Tokens: map[string]keywire.Token{s.ID(): "tok", "other": "no"}, Claims: keywire.Claims{Slots: 2}}
					got := Ask(t.Context(), []Asked{s}, r, func() time.Duration { return time.Hour }).Answers[0]
					want := tc.dark
					if open {
						want = tc.open
					}
					if (got.Error == "") != got.Granted {
						t.Errorf("granted %v, error %q", got.Granted, got.Error)
					}
					want.Server, want.ID, got.Error = "home", s.ID(), ""
					if got != want {
						t.Errorf("open %v: %+v, want %+v", open, got, want)
					}
					last := s.asked[len(s.asked)-1]
					wanted := keywire.Request{Verb: keywire.CheckIn, Token: "tok", Claims: keywire.Claims{Slots: 2}}
					if open {
						wanted.Verb, wanted.UUID = keywire.Renew, uuid
					}
					if last != wanted || open && len(s.asked) != 1 || !open && s.asked[0] != (keywire.Request{Verb: keywire.Dark, UUID: uuid}) {
						t.Errorf("asked %v, with another token or claim than its own", s.asked)
					}
				}
			})
		})
	}
}

// The slowest server decides how long a round takes, not their number; what the
// others said counts. Time counts from the sending.
func TestSlowServersSideBySide(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		var servers []Asked
		for i := range 8 {
			servers = append(servers, &server{name: fmt.Sprint(i), delay: 20 * time.Second})
		}
		quick := &server{name: "quick", delay: 10 * time.Second, says: map[keywire.Verb]string{keywire.Renew: `{"seconds":60}`}}
		got := Ask(t.Context(), append(servers, quick), Round{UUID: uuid, Open: true}, func() time.Duration { return time.Since(begin) })
		if took := time.Since(begin); took != 20*time.Second {
			t.Errorf("took %v", took)
		}
		for _, a := range got.Answers {
			if a.Granted != (a.Server == "quick") || a.Granted && a.Until != time.Minute {
				t.Errorf("%+v", a)
			}
		}
	})
}

// TestRun runs the part itself, against a server that is not there.
func TestRun(t *testing.T) {
	private, public, err := identity.New("test")
	if err != nil {
		t.Fatal(err)
	}
	brief := Brief{Identity: private, KeyServers: []settings.KeyServer{{Name: "home", Address: "127.0.0.1:1", HostKey: public}}, Round: Round{UUID: uuid}}
	env, err := part.New(part.Header{Name: part.Consent, Paths: part.FirmwarePaths()}, brief, slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := Run(t.Context(), env); err == nil || !strings.Contains(err.Error(), "nobody waits") {
		t.Errorf("without anybody to tell: %v", err)
	}
}

func TestMachine(t *testing.T) {
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	c := Machine(log)
	line := keywire.Request{Verb: keywire.CheckIn, Claims: c}.Line()
	if !strings.Contains(line, "boot=") || !strings.Contains(line, "up=") {
		t.Errorf("%+v makes %s", c, line)
	}
	root := t.TempDir()
	dir := filepath.Join(root, "sys/firmware/devicetree/base")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]string{"10000000DEADBEEF\x00": "10000000deadbeef", "unknown\x00": "", "": "", "100000000DEADBEEF0": ""} {
		if err := os.WriteFile(filepath.Join(dir, "serial-number"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if c := machine(log, root); c.Serial != want || c.Boot != "" {
			t.Errorf("%q: %+v", text, c)
		}
	}
	before := Boottime()
	if after := Boottime(); before <= 0 || after < before {
		t.Errorf("%v, then %v", before, after)
	}
}
