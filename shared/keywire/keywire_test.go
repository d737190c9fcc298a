package keywire_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"farkeep/shared/keywire"
	"farkeep/shared/sshverb"
)

const uuid = "0b6e1f5c-8d1b-4c52-9a57-6a2f0c9d3e11"

var (
	hex32 = strings.Repeat("0a", 16)
	hex64 = strings.Repeat("0a", 32)
	full  = keywire.Claims{Boot: hex32, Serial: "10000000deadbeef", Up: 86400, Header: hex64, Damage: keywire.DamageSecondary, Slots: 2}
	words = "boot=" + hex32 + " serial=10000000deadbeef up=86400 header=" + hex64 + " damage=secondary slots=2"
)

func TestParse(t *testing.T) {
	for line, want := range map[string]keywire.Request{
		"key " + uuid:                        {Verb: keywire.Key, UUID: uuid},
		"key " + uuid + " abc_-Z":            {Verb: keywire.Key, UUID: uuid, Token: "abc_-Z"},
		"key " + uuid + " token " + words:    {Verb: keywire.Key, UUID: uuid, Token: "token", Claims: full},
		"lease " + uuid:                      {Verb: keywire.Renew, UUID: uuid},
		"lease " + uuid + " header=" + hex64: {Verb: keywire.Renew, UUID: uuid, Claims: keywire.Claims{Header: hex64}},
		"checkin":                            {Verb: keywire.CheckIn},
		"checkin token":                      {Verb: keywire.CheckIn, Token: "token"},
		"checkin up=1 slots=32":              {Verb: keywire.CheckIn, Claims: keywire.Claims{Up: 1, Slots: 32}},
		"dark " + uuid:                       {Verb: keywire.Dark, UUID: uuid},
	} {
		verb, args, err := sshverb.ParseVerb(line)
		if err != nil {
			t.Fatal(err)
		}
		got, err := keywire.Parse(verb, args)
		if err != nil || got != want {
			t.Errorf("%s: %+v, %v", line, got, err)
		}
		if got.Line() != line || len(line) > keywire.MaxRequest {
			t.Errorf("%s is written as %s", line, got.Line())
		}
	}
	// A server that is older than its appliance passes over what it does not know.
	if r, err := keywire.Parse("checkin", []string{"slots=2", "moon=full", "up=9"}); err != nil || r.Claims != (keywire.Claims{Slots: 2, Up: 9}) {
		t.Errorf("a claim of a newer appliance: %+v, %v", r, err)
	}
	for _, bad := range [][]string{
		{""}, {"status"}, {"KEY", uuid}, {"key"}, {"lease"}, {"key", ""}, {"key", strings.ToUpper(uuid)}, {"key", uuid[1:]},
		{"key", "../../etc/passwd"}, {"key", uuid, ""}, {"key", uuid, "a b"}, {"key", uuid, "a/b"}, {"key", uuid, strings.Repeat("a", keywire.MaxToken+1)},
		{"key", uuid, "a", "b"}, {"checkin", "a", "b"}, {"key", uuid + "\n"}, {"key", uuid, strings.Repeat("a", 10000)},
		{"dark"}, {"dark", uuid, "token"}, {"dark", uuid, "up=1"},
		{"checkin", "boot=" + hex32[1:]}, {"checkin", "boot=" + strings.ToUpper(hex32)}, {"checkin", "boot="}, {"checkin", "=1"},
		{"checkin", "serial=" + hex32}, {"checkin", "up=0"}, {"checkin", "up=-1"}, {"checkin", "up=01"}, {"checkin", "up=+1"}, {"checkin", "up=1e3"},
		{"checkin", "up=99999999999999999999"}, {"checkin", "header=" + hex32}, {"checkin", "damage=both"}, {"checkin", "slots=33"}, {"checkin", "slots=0"},
		{"checkin", "up=1", "up=1"}, {"checkin", "moon=a", "moon=b"}, {"checkin", "up=1", "token"}, {"checkin", "UP=1"}, {"checkin", strings.Repeat("a", 17) + "=1"},
	} {
		r, err := keywire.Parse(bad[0], bad[1:])
		if !errors.Is(err, keywire.ErrBadRequest) || r != (keywire.Request{}) {
			t.Errorf("%q: %+v, %v; want ErrBadRequest", bad, r, err)
		}
	}
}

// A claim that cannot be sent costs the claim, not the key.
func TestUnfitClaimsAreLeftOut(t *testing.T) {
	r := keywire.Request{Verb: keywire.Key, UUID: uuid, Claims: keywire.Claims{Boot: "x", Serial: "RPI 4", Up: -3, Header: "none", Damage: "both", Slots: 99}}
	if got := r.Line(); got != "key "+uuid {
		t.Error(got)
	}
}

// A token reaches a log, an error or a JSON file by Reveal and Line only.
func TestTokensDoNotPrint(t *testing.T) {
	r := keywire.Request{Verb: keywire.Key, UUID: uuid, Token: keywire.NewToken(), Claims: full}
	var out strings.Builder
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		fmt.Fprintf(&out, verb+" "+verb+" "+verb+"\n", r, &r, r.Token)
	}
	j, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	out.Write(j)
	slog.New(slog.NewJSONHandler(&out, nil)).Info("x", "r", r, "t", r.Token)
	slog.New(slog.NewTextHandler(&out, nil)).Info("x", "r", r, "t", r.Token)
	_, err = keywire.Parse("key", []string{uuid, r.Token.Reveal(), r.Token.Reveal()})
	fmt.Fprint(&out, err)
	_, err = keywire.Parse("key", []string{r.Token.Reveal()})
	fmt.Fprint(&out, err)
	_, err = keywire.Parse(r.Token.Reveal(), nil)
	fmt.Fprint(&out, err)
	fmt.Fprint(&out, keywire.Loggable("key", []string{uuid, r.Token.Reveal()}), keywire.Loggable("checkin", []string{r.Token.Reveal()}))
	if s := out.String(); strings.Contains(s, r.Token.Reveal()) || strings.Contains(s, fmt.Sprintf("%x", r.Token.Reveal())) {
		t.Errorf("a token was printed: %s", s)
	}
}

func TestTokens(t *testing.T) {
	a, b := keywire.NewToken(), keywire.NewToken()
	if a == b || !keywire.IsToken(a.Reveal()) || len(a.Reveal()) != 43 {
		t.Errorf("new tokens of %d and %d bytes", len(a.Reveal()), len(b.Reveal()))
	}
	if !a.Equal(a) || a.Equal(b) || keywire.Token("").Equal("") {
		t.Error("tokens are compared wrongly")
	}
	for stderr, want := range map[string]keywire.Token{
		keywire.TokenLine(a): a,
		"Warning: Permanently added\r\n" + keywire.TokenLine(a): a,
		keywire.TokenLine(a) + keywire.TokenLine(b):             a,
		"token abc\r\n":                    "abc",
		"token abc":                        "abc",
		"":                                 "",
		"refused\n":                        "",
		"a token abc\n":                    "",
		"token a b\n":                      "",
		"token \n":                         "",
		"token " + strings.Repeat("a", 65): "",
	} {
		if got := keywire.ParseTokenLine(stderr); got != want {
			t.Errorf("%q: %q", stderr, got.Reveal())
		}
	}
}

func TestAnswers(t *testing.T) {
	if l, err := keywire.ParseLease([]byte(`{"seconds":3600,"from a newer server":true}` + "\n")); err != nil || l.Duration().Hours() != 1 {
		t.Errorf("lease: %+v, %v", l, err)
	}
	if l := keywire.NewLease(24 * time.Hour); l.Renewal() != 5*time.Minute || l.Duration() != 24*time.Hour {
		t.Errorf("a lease of a day: %+v", l)
	}
	if l := keywire.NewLease(time.Minute); l.Renewal() != 20*time.Second {
		t.Errorf("a lease of a minute: %+v", l)
	}
	if l, err := keywire.ParseLease([]byte(`{"seconds":86400,"renew":300}`)); err != nil || l != keywire.NewLease(24*time.Hour) {
		t.Errorf("lease: %+v, %v", l, err)
	}
	if l, err := keywire.ParseLease([]byte(`{"seconds":86400}`)); err != nil || l.Renewal() != 5*time.Minute {
		t.Errorf("a lease of an older server: %+v, %v", l, err)
	}
	for _, bad := range []string{`{"seconds":60,"renew":61}`, `{"seconds":60,"renew":-1}`, `{"seconds":2592001}`, "", "{}", `{"seconds":0}`, `{"seconds":-1}`, `{"seconds":1e12}`, `{"seconds":"1"}`, `{"seconds":1}` + strings.Repeat(" ", keywire.MaxAnswer)} {
		if l, err := keywire.ParseLease([]byte(bad)); err == nil {
			t.Errorf("%.40q is a lease of %v", bad, l.Duration())
		}
	}
	if c, err := keywire.ParseCheckin([]byte(`{"appliance":"attic"}`)); err != nil || c.Appliance != "attic" {
		t.Errorf("checkin: %+v, %v", c, err)
	}
	for _, bad := range []string{"", "{}", `{"appliance":"\u001b[2J"}`, `{"appliance":"../x"}`} {
		if c, err := keywire.ParseCheckin([]byte(bad)); err == nil {
			t.Errorf("%q names %q", bad, c.Appliance)
		}
	}
}

func TestKeyFile(t *testing.T) {
	if got, ok := keywire.KeyFileUUID(keywire.KeyFile(uuid)); !ok || got != uuid {
		t.Errorf("got %q, %v", got, ok)
	}
	for _, bad := range []string{"", uuid, uuid + ".key.bak", ".key", "." + uuid + ".key", "../" + uuid + ".key"} {
		if got, ok := keywire.KeyFileUUID(bad); ok {
			t.Errorf("%q holds the key of %q", bad, got)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, seed := range []string{"key " + uuid + " token " + words, "checkin moon=full", "dark " + uuid, "key " + uuid, "lease " + uuid + " abc", "checkin", "key", "key  ", "\x00", "key " + strings.Repeat("a", 200)} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, line string) {
		words := strings.Split(line, " ")
		r, err := keywire.Parse(words[0], words[1:])
		if err != nil {
			if !errors.Is(err, keywire.ErrBadRequest) || r != (keywire.Request{}) {
				t.Fatalf("%+v, %v", r, err)
			}
			return
		}
		// What is accepted can be sent again and says the same, fits the door before
		// it, keeps its token to itself and names at most one file below the keys folder.
		line = r.Line()
		words = strings.Split(line, " ")
		if again, err := keywire.Parse(words[0], words[1:]); err != nil || again != r || len(line) > keywire.MaxRequest {
			t.Fatalf("%q was read as %+v, %v", line, again, err)
		}
		if len(r.Token) > 12 && strings.Contains(fmt.Sprintf("%+v %s", r, r), r.Token.Reveal()) && !strings.Contains(r.UUID+r.Claims.Boot+r.Claims.Header+r.Claims.Serial, r.Token.Reveal()) {
			t.Fatalf("the token of %q prints", line)
		}
		if _, _, err := sshverb.ParseVerb(line); err != nil {
			t.Fatal(err)
		}
		if r.UUID != "" {
			if got, ok := keywire.KeyFileUUID(keywire.KeyFile(r.UUID)); !ok || got != r.UUID || strings.ContainsAny(r.UUID, "/\x00") {
				t.Fatalf("%q is no file name", r.UUID)
			}
		}
	})
}

func FuzzAnswers(f *testing.F) {
	for _, seed := range []string{`{"seconds":3600,"renew":300}`, `{"appliance":"attic"}`, "token abc\n", "refused\n", "\x00"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if l, err := keywire.ParseLease(b); err == nil && (l.Duration() < time.Second || l.Duration() > keywire.MaxLease || l.Renewal() < time.Second || l.Renewal() > l.Duration()) {
			t.Fatalf("a lease of %v, renewed after %v", l.Duration(), l.Renewal())
		}
		if c, err := keywire.ParseCheckin(b); err == nil && (c.Appliance == "" || strings.ContainsAny(c.Appliance, "/\x00\x1b\n ")) {
			t.Fatalf("the appliance is %q", c.Appliance)
		}
		if tok := keywire.ParseTokenLine(string(b)); tok != "" {
			if !keywire.IsToken(tok.Reveal()) || keywire.ParseTokenLine(keywire.TokenLine(tok)) != tok {
				t.Fatalf("%q is no token", tok.Reveal())
			}
		}
	})
}
