package transfer_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"farkeep/keyserver/audit"
	"farkeep/keyserver/keystore"
	"farkeep/keyserver/moment"
	"farkeep/keyserver/orders"
	"farkeep/keyserver/place"
	"farkeep/keyserver/policy"
	"farkeep/keyserver/transfer"
	"farkeep/shared/secret"
	"farkeep/shared/site"
)

const (
	atticDisk = "0b6e1f5c-8d1b-4c52-9a57-6a2f0c9d3e11"
	shedDisk  = "11111111-2222-3333-4444-555555555555"
)

var now = moment.Moment{Wall: time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC), Boot: strings.Repeat("ab", 16), Up: time.Hour}

// server is a key server without the network.
type server struct {
	transfer.Here
	dir string
}

func newServer(t testing.TB) *server {
	t.Helper()
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "keys"), 0o700); err != nil {
		t.Fatal(err)
	}
	keys, err := keystore.Open(filepath.Join(dir, "keys"))
	if err != nil {
		t.Fatal(err)
	}
	records, err := audit.Open(dir, func() time.Time { return now.Wall })
	if err != nil {
		t.Fatal(err)
	}
	policies := policy.Open(dir)
	s := &site.Site{Name: "home", Appliances: []site.Appliance{{Name: "attic", LUKS: atticDisk}, {Name: "shed", LUKS: shedDisk}}}
	return &server{transfer.Here{
		Site: s, Keys: keys, Policy: policies, By: "ada",
		Book: &orders.Book{Dir: dir, Policy: policies, Audit: records, Now: func() (moment.Moment, error) { return now, nil }},
	}, dir}
}

func (s *server) add(t testing.TB, uuid, key string) {
	t.Helper()
	if err := s.Keys.Add(uuid, secret.New([]byte(key))); err != nil {
		t.Fatal(err)
	}
}

func (s *server) set(t testing.TB, name string, change func(*policy.State)) {
	t.Helper()
	if err := s.Policy.Update(name, func(state policy.State) (policy.State, error) { change(&state); return state, nil }); err != nil {
		t.Fatal(err)
	}
}

func (s *server) state(t testing.TB, name string) policy.State {
	t.Helper()
	state, err := s.Policy.Read(name)
	if err != nil {
		t.Fatal(err)
	}
	return state
}

func (s *server) export(t testing.TB) *bytes.Buffer {
	t.Helper()
	f, err := transfer.Make(s.Site, []byte("name = \"home\"\n"), "one", s.Keys, s.Policy, now.Wall)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := f.Write(&b); err != nil {
		t.Fatal(err)
	}
	f.Wipe()
	return &b
}

func parse(t testing.TB, r io.Reader) *transfer.File {
	t.Helper()
	f, err := transfer.Parse(r)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// lived is a state with everything in it.
func lived(s *policy.State) {
	net := place.Network{Name: "203.0.113.0/24"}
	s.Standing = policy.Standing{State: policy.Enabled, Reason: "new in site.toml", Since: now.Wall}
	s.LastKey, s.LastSeen = now, now
	s.Keys = []moment.Moment{now}
	s.Tokens = policy.Tokens{Shown: strings.Repeat("0a", 32), Issued: strings.Repeat("0b", 32)}
	s.Networks = []policy.KnownNetwork{{Network: net, First: now.Wall, Last: now.Wall, How: "first"}}
	s.Waiting = []policy.Waiting{{ID: "abcd", Verb: "key", Asks: []string{policy.AskToken}, Network: net, Token: strings.Repeat("0c", 32)}}
	s.Expected = &policy.Expectation{Until: now.Wall.Add(time.Hour), By: "ada", Why: "a move", Given: now}
	s.Approval = &policy.Approval{Of: s.Waiting[0], By: "ada", Why: "it was me", Given: now}
	s.Told, s.Dark, s.Anchor = now, now, now
}

func TestTransfer(t *testing.T) {
	one, two := newServer(t), newServer(t)
	one.add(t, atticDisk, "attic's key")
	one.add(t, shedDisk, "shed's key")
	one.set(t, "attic", lived)
	if _, err := one.Book.Revoke(orders.Order{Appliance: "shed", By: "ada", Why: "stolen"}); err != nil {
		t.Fatal(err)
	}
	text := one.export(t)
	for _, private := range []string{strings.Repeat("0a", 32), strings.Repeat("0b", 32), strings.Repeat("0c", 32), "a move", "it was me"} {
		if bytes.Contains(text.Bytes(), []byte(private)) {
			t.Errorf("the file has %q", private)
		}
	}
	f := parse(t, text)
	if f.From != "one" || f.Site != "home" || f.Rules != "name = \"home\"\n" || len(f.Keys) != 2 || len(f.States) != 2 {
		t.Errorf("%+v", f)
	}
	r, err := two.Take(f)
	if err != nil || !slices.Equal(r.Added, []string{atticDisk, shedDisk}) || !slices.Equal(r.Revoked, []string{"shed"}) || !slices.Equal(r.States, []string{"attic"}) {
		t.Fatalf("%+v, %v", r, err)
	}
	k, err := two.Keys.Get(atticDisk)
	if err != nil || string(k.Reveal()) != "attic's key" {
		t.Errorf("attic's key: %v", err)
	}
	k.Release()
	attic := two.state(t, "attic")
	if attic.Standing.State != "" || attic.Tokens != (policy.Tokens{}) || len(attic.Networks) != 1 || attic.LastSeen != now || attic.Waiting != nil || attic.Approval != nil || attic.Expected != nil {
		t.Errorf("attic: %+v", attic)
	}
	shed := two.state(t, "shed")
	if shed.Standing.State != policy.Revoked || shed.Standing.Reason != "stolen" {
		t.Errorf("shed: %+v", shed.Standing)
	}

	// Again, and after the first one has lifted the revocation: it stays here.
	if err := one.Book.Allow(orders.Order{Appliance: "shed", By: "ada", Why: "found"}); err != nil {
		t.Fatal(err)
	}
	two.set(t, "attic", func(s *policy.State) { s.Tokens.Issued = strings.Repeat("0d", 32) })
	r, err = two.Take(parse(t, one.export(t)))
	if err != nil || len(r.Added)+len(r.Revoked)+len(r.States) != 0 || len(r.Same) != 2 || !slices.Equal(r.Kept, []string{"attic", "shed"}) {
		t.Errorf("again: %+v, %v", r, err)
	}
	if two.state(t, "shed").Standing.State != policy.Revoked {
		t.Error("an import enabled what is revoked here")
	}
	if two.state(t, "attic").Tokens.Issued != strings.Repeat("0d", 32) {
		t.Error("an import changed a token")
	}
}

func TestConflictsAndStrangers(t *testing.T) {
	one, two := newServer(t), newServer(t)
	one.add(t, atticDisk, "attic's key")
	one.Site.Appliances = append(one.Site.Appliances, site.Appliance{Name: "cellar"})
	if _, err := one.Book.Revoke(orders.Order{Appliance: "cellar", By: "ada", Why: "sold"}); err != nil {
		t.Fatal(err)
	}
	two.add(t, atticDisk, "another key")
	r, err := two.Take(parse(t, one.export(t)))
	if err != nil || !slices.Equal(r.Conflicts, []string{atticDisk}) || !slices.Equal(r.Strangers, []string{"cellar"}) || !slices.Equal(r.Revoked, []string{"cellar"}) {
		t.Errorf("%+v, %v", r, err)
	}
	k, err := two.Keys.Get(atticDisk)
	if err != nil || string(k.Reveal()) != "another key" {
		t.Errorf("the key here was replaced: %v", err)
	}
	k.Release()
}

func TestParseRefuses(t *testing.T) {
	one := newServer(t)
	one.add(t, atticDisk, "attic's key")
	one.set(t, "attic", lived)
	good := one.export(t).String()
	change := func(old, new string) string {
		t.Helper()
		if !strings.Contains(good, old) {
			t.Fatalf("the file has no %q", old)
		}
		return strings.Replace(good, old, new, 1)
	}
	for name, text := range map[string]string{
		"empty":              "",
		"cut":                good[:len(good)/2],
		"something behind":   good + "{}",
		"another format":     change(`"format":"farkeep key server"`, `"format":"farkeep"`),
		"a newer version":    change(`"version":1`, `"version":2`),
		"an unknown key":     change(`"version":1`, `"version":1,"more":1`),
		"no site":            change(`"site":"home"`, `"site":"../x"`),
		"no UUID":            change(atticDisk, "../../etc/passwd"),
		"an empty key":       change(`"key":"`, `"key":"","x":"`),
		"states that are no": good[:strings.Index(good, `"states":`)] + `"states":{}}`,
		"a state of nobody":  change(`"appliance":"attic"`, `"appliance":"../attic"`),
		"two states of one":  change(`"appliance":"shed"`, `"appliance":"attic"`),
		"a bad standing":     change(`"state":"enabled"`, `"state":"maybe"`),
	} {
		if f, err := transfer.Parse(strings.NewReader(text)); !errors.Is(err, transfer.ErrBadFile) || f != nil {
			t.Errorf("%s: %v", name, err)
		} else if strings.Contains(err.Error(), "YXR0aWMn") {
			t.Errorf("%s: the error holds a key: %v", name, err)
		}
	}
	two := strings.Replace(good, `"keys":[`, `"keys":[{"uuid":"`+atticDisk+`","key":"eA=="},`, 1)
	if _, err := transfer.Parse(strings.NewReader(two)); !errors.Is(err, transfer.ErrBadFile) {
		t.Errorf("two keys of one disk: %v", err)
	}
}

// FuzzParse: what is accepted can be written and read again, is what the store
// and the policy accept, and carries no token.
func FuzzParse(f *testing.F) {
	one := newServer(f)
	one.add(f, atticDisk, "attic's key")
	one.set(f, "attic", lived)
	f.Add(one.export(f).Bytes())
	f.Add([]byte(`{"format":"farkeep key server","version":1,"site":"a","from":"b","states":[]}`))
	f.Add([]byte(`{"format":"farkeep key server","version":1,"site":"a","from":"b","states":[{"version":1,"appliance":"x","tokens":{"shown":"` + strings.Repeat("0a", 32) + `"}}]}`))
	f.Add([]byte("{}"))
	f.Fuzz(func(t *testing.T, text []byte) {
		file, err := transfer.Parse(bytes.NewReader(text))
		if err != nil {
			return
		}
		for _, s := range file.States {
			if s.Tokens != (policy.Tokens{}) || s.Approval != nil || s.Expected != nil || len(s.Waiting) > 0 {
				t.Fatalf("taken from a file: %+v", s)
			}
		}
		var b bytes.Buffer
		if err := file.Write(&b); err != nil {
			t.Fatal(err)
		}
		again, err := transfer.Parse(&b)
		if err != nil {
			t.Fatalf("it cannot be read again: %v", err)
		}
		was, err1 := json.Marshal(file.States)
		is, err2 := json.Marshal(again.States)
		if err1 != nil || err2 != nil || !bytes.Equal(was, is) || len(again.Keys) != len(file.Keys) {
			t.Fatalf("it changed: %s to %s", was, is)
		}
	})
}
