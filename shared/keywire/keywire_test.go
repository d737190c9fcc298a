package keywire_test

import (
	"errors"
	"strings"
	"testing"

	"farkeep/shared/keywire"
	"farkeep/shared/sshverb"
)

const uuid = "0b6e1f5c-8d1b-4c52-9a57-6a2f0c9d3e11"

func TestParse(t *testing.T) {
	for line, want := range map[string]keywire.Request{
		"key " + uuid:              {Verb: keywire.Key, UUID: uuid},
		"key " + uuid + " abc_-=Z": {Verb: keywire.Key, UUID: uuid, Token: "abc_-=Z"},
		"lease " + uuid:            {Verb: keywire.Renew, UUID: uuid},
		"checkin":                  {Verb: keywire.CheckIn},
		"checkin token":            {Verb: keywire.CheckIn, Token: "token"},
	} {
		verb, args, err := sshverb.ParseVerb(line)
		if err != nil {
			t.Fatal(err)
		}
		got, err := keywire.Parse(verb, args)
		if err != nil || got != want {
			t.Errorf("%s: %+v, %v", line, got, err)
		}
		if got.String() != line {
			t.Errorf("%s is written as %s", line, got)
		}
	}
	for _, bad := range [][]string{
		{""}, {"status"}, {"KEY", uuid}, {"key"}, {"lease"}, {"key", ""}, {"key", strings.ToUpper(uuid)}, {"key", uuid[1:]},
		{"key", "../../etc/passwd"}, {"key", uuid, ""}, {"key", uuid, "a b"}, {"key", uuid, "a/b"}, {"key", uuid, strings.Repeat("a", keywire.MaxToken+1)},
		{"key", uuid, "a", "b"}, {"checkin", "a", "b"}, {"key", uuid + "\n"}, {"key", uuid, strings.Repeat("a", 10000)},
	} {
		if r, err := keywire.Parse(bad[0], bad[1:]); !errors.Is(err, keywire.ErrBadRequest) {
			t.Errorf("%q: %+v, %v; want ErrBadRequest", bad, r, err)
		}
	}
}

func TestAnswers(t *testing.T) {
	if l, err := keywire.ParseLease([]byte(`{"seconds":3600,"from a newer server":true}` + "\n")); err != nil || l.Duration().Hours() != 1 {
		t.Errorf("lease: %+v, %v", l, err)
	}
	for _, bad := range []string{"", "{}", `{"seconds":0}`, `{"seconds":-1}`, `{"seconds":1e12}`, `{"seconds":"1"}`, `{"seconds":1}` + strings.Repeat(" ", keywire.MaxAnswer)} {
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
	for _, seed := range []string{"key " + uuid, "lease " + uuid + " abc", "checkin", "key", "key  ", "\x00", "key " + strings.Repeat("a", 200)} {
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
		// What is accepted is exactly what was written, fits the door before it,
		// and names at most one file below the keys folder.
		if r.String() != line || len(line) > keywire.MaxRequest {
			t.Fatalf("%q was read as %q", line, r)
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
