package keysource_test

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"farkeep/appliance/keysource"
	"farkeep/shared/keywire"
	"farkeep/shared/secret"
	"farkeep/shared/settings"
	"farkeep/shared/sshverb"
)

// Every token that a server issued is kept: also those that came with a key that
// was not used, or too late. One that was not given a key issued none.
func TestFindKeepsEveryToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		liar := &fake{name: "liar", key: "wrong", token: "liar-new"}
		slow := &fake{name: "slow", delay: time.Hour, late: true, key: "right", token: "slow-new"}
		dead := &fake{name: "dead", delay: time.Hour}
		old := &fake{name: "old", err: errors.New("down"), token: "old-new"}
		quick := &fake{name: "quick", key: "right", token: "quick-new"}
		all := []*fake{liar, slow, dead, old, quick}
		var sources []keysource.Source
		for _, f := range all {
			sources = append(sources, f)
		}
		got, err := keysource.Find(t.Context(), logger(t), sources, keysource.Stagger, request, func(_ keysource.Source, key secret.Bytes) error {
			if string(key.Reveal()) != "right" {
				return keysource.ErrWrongKey
			}
			return nil
		})
		if err != nil || got.From != keysource.Source(quick) {
			t.Fatalf("%v, %v", got.From, err)
		}
		want := map[string]keywire.Token{"id of liar": "liar-new", "id of slow": "slow-new", "id of quick": "quick-new"}
		if !maps.Equal(got.Tokens, want) {
			t.Errorf("%d tokens: from %v", len(got.Tokens), slices.Sorted(maps.Keys(got.Tokens)))
		}
		for _, f := range all {
			if f.asked.Token != request(f).Token {
				t.Errorf("%s was shown another token than its own", f.name)
			}
			if bytes.ContainsAny(f.given.Reveal(), "rightwon") {
				t.Errorf("the key of %s was not wiped", f.name)
			}
		}
	})
}

// A key that another server's refusal forbids is passed over, and the search
// goes on.
func TestFindPassesOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sources := []keysource.Source{&fake{name: "a", key: "right"}, &fake{name: "b", key: "right"}}
		forbidden := errors.Join(keysource.ErrRefused, errors.New("b has to agree"))
		got, err := keysource.Find(t.Context(), logger(t), sources, keysource.Stagger, request, func(s keysource.Source, _ secret.Bytes) error {
			if s.String() == "a" {
				return forbidden
			}
			return nil
		})
		if err != nil || got.From.String() != "b" {
			t.Errorf("%v, %v", got.From, err)
		}
		got, err = keysource.Find(t.Context(), logger(t), sources[:1], keysource.Stagger, request, func(keysource.Source, secret.Bytes) error { return forbidden })
		if got.From != nil || !errors.Is(err, keysource.ErrRefused) {
			t.Errorf("%v, %v", got.From, err)
		}
	})
}

func TestTokenOverTheLine(t *testing.T) {
	s, id := server(t, func(_ context.Context, s *sshverb.Session) error {
		r, err := keywire.Parse(s.Verb, s.Args)
		if err != nil || r.Token != "shown" || r.Claims.Slots != 2 {
			t.Errorf("asked %v, %v", r, err)
		}
		s.Stdout.Write([]byte("the key"))
		s.Stderr.Write([]byte(keywire.TokenLine("issued")))
		return nil
	})
	src, err := keysource.NewServer(s, id)
	if err != nil {
		t.Fatal(err)
	}
	g, err := src.Key(t.Context(), keywire.Request{Verb: keywire.Key, UUID: uuid, Token: "shown", Claims: keywire.Claims{Slots: 2}})
	if err != nil || g.Token != "issued" || string(g.Key.Reveal()) != "the key" {
		t.Errorf("%v, %v", g, err)
	}
}

func TestAsk(t *testing.T) {
	ask := func(t *testing.T, h sshverb.Handler) ([]byte, error) {
		t.Helper()
		s, id := server(t, h)
		src, err := keysource.NewServer(s, id)
		if err != nil {
			t.Fatal(err)
		}
		return src.Ask(t.Context(), keywire.Request{Verb: keywire.Renew, UUID: uuid})
	}
	got, err := ask(t, func(_ context.Context, s *sshverb.Session) error {
		_, err := s.Stdout.Write([]byte("yes\n"))
		return err
	})
	if err != nil || string(got) != "yes\n" {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := ask(t, func(context.Context, *sshverb.Session) error { return sshverb.Refuse(errors.New("revoked"), "refused") }); !errors.Is(err, keysource.ErrRefused) {
		t.Errorf("refused: %v", err)
	}
	for name, h := range map[string]sshverb.Handler{
		"in doubt": func(context.Context, *sshverb.Session) error { return errors.New("state unreadable") },
		"without end": func(_ context.Context, s *sshverb.Session) error {
			s.Stdout.Write(make([]byte, keywire.MaxAnswer+1))
			return nil
		},
		"unknown verb": func(context.Context, *sshverb.Session) error { return &sshverb.Error{Code: 2, Text: "no such verb"} },
	} {
		if _, err := ask(t, h); err == nil || errors.Is(err, keysource.ErrRefused) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// One that does not know the appliance has judged nothing, and neither has
	// one that is not who it should be.
	s, id := server(t, func(context.Context, *sshverb.Session) error { return nil })
	stranger, _ := newIdentity(t)
	src, err := keysource.NewServer(s, stranger)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := src.Ask(t.Context(), keywire.Request{Verb: keywire.CheckIn}); err == nil || errors.Is(err, keysource.ErrRefused) {
		t.Errorf("a server that does not know us: %v", err)
	}
	_, s.HostKey = newIdentity(t)
	if src, err = keysource.NewServer(s, id); err != nil {
		t.Fatal(err)
	}
	if _, err := src.Ask(t.Context(), keywire.Request{Verb: keywire.CheckIn}); err == nil || errors.Is(err, keysource.ErrRefused) {
		t.Errorf("another machine: %v", err)
	}
}

// Two addresses with one host key are one server, reached by the way that works.
func TestTwoWaysToOneServer(t *testing.T) {
	s, id := server(t, func(_ context.Context, s *sshverb.Session) error {
		_, err := s.Stdout.Write([]byte("yes"))
		return err
	})
	blocked, _ := server(t, nil)
	away := settings.KeyServer{Name: "by the back door", Address: "127.0.0.1:1", HostKey: s.HostKey}
	all, err := keysource.Servers([]settings.KeyServer{away, blocked, s}, id)
	if err != nil || len(all) != 2 || all[0].ID() == all[1].ID() {
		t.Fatalf("%v, %v", all, err)
	}
	if got, err := all[0].Ask(t.Context(), keywire.Request{Verb: keywire.CheckIn}); err != nil || string(got) != "yes" {
		t.Errorf("%q, %v", got, err)
	}
}
