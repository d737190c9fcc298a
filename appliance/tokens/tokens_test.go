package tokens

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"farkeep/shared/keywire"
	"farkeep/shared/settings"
)

var ids = []string{"SHA256:a", "SHA256:b"}

func open(t *testing.T, path string, ids ...string) *Book {
	t.Helper()
	b, err := Open(path, ids)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestBook(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key-servers.json")
	b := open(t, path, ids...)
	if len(b.Tokens()) != 0 || len(b.Refusing()) != 0 || len(b.Untold()) != 0 {
		t.Error("a new card knows something")
	}
	do := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		again := open(t, path, ids...)
		for id, s := range b.All() {
			if got := again.All()[id]; got.Token != s.Token || !got.Refused.Equal(s.Refused) || got.Untold != s.Untold {
				t.Errorf("%s: the card says %+v of %s, here is %+v", what, got, id, s)
			}
		}
		info, err := os.Stat(path)
		if err != nil || info.Mode() != 0o600 {
			t.Errorf("%v, %v", info.Mode(), err)
		}
	}
	do("keep", b.Keep(Fresh{"SHA256:a": "a1", "SHA256:stranger": "x"}, nil, false))
	if got := b.Tokens(); len(got) != 1 || got["SHA256:a"] != "a1" {
		t.Errorf("%d tokens", len(got))
	}
	since := time.Unix(1e9, 5)
	do("close", b.Close([]string{"SHA256:b"}, since))
	do("close again", b.Close([]string{"SHA256:b"}, since.Add(time.Hour)))
	if got := b.All()["SHA256:b"].Refused; !got.Equal(time.Unix(1e9, 0)) {
		t.Errorf("refuses since %v", got)
	}
	if !slices.Equal(b.Refusing(), ids[1:]) || !slices.Equal(b.Untold(), ids) {
		t.Errorf("%v, %v", b.Refusing(), b.Untold())
	}
	do("told", b.Told(ids[:1]))
	if !slices.Equal(b.Untold(), ids[1:]) {
		t.Errorf("%v", b.Untold())
	}
	do("granted by the other", b.Keep(Fresh{"SHA256:a": "a2"}, ids[:1], false))
	if !slices.Equal(b.Refusing(), ids[1:]) {
		t.Error("another server's grant ended a refusal")
	}
	do("granted", b.Keep(Fresh{"SHA256:b": "b1"}, ids[1:], true))
	if len(b.Refusing()) != 0 || len(b.Untold()) != 0 || b.Tokens()["SHA256:a"] != "a2" || b.Tokens()["SHA256:b"] != "b1" {
		t.Errorf("%+v", b.All())
	}
	// A server that the settings name no more is forgotten with the next change.
	c := open(t, path, ids[0])
	if err := c.Keep(Fresh{ids[0]: "a3"}, nil, true); err != nil {
		t.Fatal(err)
	}
	if got := open(t, path, ids...).Tokens(); len(got) != 1 || got[ids[0]] != "a3" {
		t.Errorf("%d tokens", len(got))
	}
}

// A card that cannot be written keeps its tokens, here too; what closes the disk
// counts all the same.
func TestUnwritable(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	b := open(t, filepath.Join(dir, "f"), ids...)
	if err := b.Keep(Fresh{ids[0]: "a1"}, nil, true); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := b.Keep(Fresh{ids[0]: "a2"}, nil, true); err == nil || b.Tokens()[ids[0]] != "a1" {
		t.Errorf("%v", err)
	}
	if err := b.Close(ids[:1], time.Unix(1, 0)); err == nil || !slices.Equal(b.Refusing(), ids[:1]) {
		t.Errorf("%v, %v", err, b.Refusing())
	}
}

func TestBadFiles(t *testing.T) {
	many := map[string]record{}
	for i := range settings.MaxKeyServers + 1 {
		many[fmt.Sprint(i)] = record{Token: "t"}
	}
	tooMany, err := json.Marshal(document{1, many})
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"no JSON": "tokens\n", "empty": "", "cut": `{"version":1,"serv`, "another version": `{"version":2}`,
		"too many": string(tooMany), "too large": strings.Repeat(" ", maxSize) + "{}",
		"no token":     `{"version":1,"servers":{"SHA256:a":{"token":"a b"}}}`,
		"a long token": `{"version":1,"servers":{"SHA256:a":{"token":"` + strings.Repeat("a", keywire.MaxToken+1) + `"}}}`,
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "f")
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			b, err := Open(path, ids)
			if err == nil || len(b.Tokens()) != 0 {
				t.Fatalf("%v, %+v", err, b.All())
			}
			if err := b.Keep(Fresh{ids[0]: "a1"}, nil, true); err != nil || open(t, path, ids...).Tokens()[ids[0]] != "a1" {
				t.Errorf("it does not work on: %v", err)
			}
			if _, err := os.Stat(path + ".bad"); err != nil {
				t.Error(err)
			}
		})
	}
}

// Tokens cross the pipe between two parts, and no log.
func TestFresh(t *testing.T) {
	f := Fresh{"SHA256:a": keywire.NewToken()}
	line, err := json.Marshal(struct{ Tokens Fresh }{f})
	if err != nil {
		t.Fatal(err)
	}
	var got struct{ Tokens Fresh }
	if err := json.Unmarshal(line, &got); err != nil || got.Tokens["SHA256:a"] != f["SHA256:a"] {
		t.Errorf("%v", err)
	}
	if text := fmt.Sprintf("%v %+v %#v %q", f, struct{ F Fresh }{f}, f, f); strings.Contains(text, f["SHA256:a"].Reveal()) {
		t.Error("a token prints")
	}
	if err := json.Unmarshal([]byte(`{"Tokens":{"a":"x y"}}`), &got); err == nil {
		t.Error("a token with a space was accepted")
	}
	if text := fmt.Sprintf("%+v", Server{Token: "secret-token"}); strings.Contains(text, "secret-token") {
		t.Error(text)
	}
}

func FuzzFile(f *testing.F) {
	f.Add([]byte(`{"version":1,"servers":{"SHA256:a":{"token":"abc","refused":"2026-11-22T14:00:00Z","untold":true}}}`))
	f.Add([]byte(`{"version":1,"servers":{"SHA256:a":{"token":"a b"}}}`))
	f.Add([]byte(`{"version":1}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		path := filepath.Join(t.TempDir(), "f")
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		b, _ := Open(path, ids)
		for id, s := range b.All() {
			if !slices.Contains(ids, id) || s.Token != "" && !keywire.IsToken(s.Token.Reveal()) {
				t.Errorf("%s: %d bytes of token", id, len(s.Token))
			}
		}
	})
}
