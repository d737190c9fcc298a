package server_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"farkeep/keyserver/alert"
	"farkeep/keyserver/audit"
	"farkeep/keyserver/orders"
	"farkeep/keyserver/place"
	"farkeep/keyserver/policy"
	"farkeep/shared/hint"
	"farkeep/shared/keywire"
	"farkeep/shared/secret"
	"farkeep/shared/settings"
	"farkeep/shared/site"
	"farkeep/shared/sshverb"
)

// open asks for attic's key with a token and claims of the test's own.
func (f *fixture) open(private secret.Text, token keywire.Token, claims keywire.Claims) (next keywire.Token, err error) {
	f.t.Helper()
	out, next, err := f.exchange(private, keywire.Request{Verb: keywire.Key, UUID: atticDisk, Token: token, Claims: claims}.Line())
	if (err == nil) != (string(out) == string(f.key)) || (err == nil) != (next != "") {
		f.t.Errorf("%d bytes and the token %q came with %v", len(out), next.Reveal(), err)
	}
	return next, err
}

// A card that was copied is found when both have asked, and one of them has shown
// what it got: whoever comes with the older token waits for a person.
func TestClonedCard(t *testing.T) {
	type step struct {
		who  string // "original" or "copy", each with its own card
		verb keywire.Verb
		held bool
	}
	for name, steps := range map[string][]step{
		"the original goes on, then the copy asks": {
			{"original", keywire.Key, false}, {"original", keywire.Renew, false}, {"copy", keywire.Key, true},
		},
		"the copy asks first and keeps the disk open": {
			{"copy", keywire.Key, false}, {"copy", keywire.Renew, false}, {"original", keywire.Key, true},
		},
		// Until then it looks like a power cut that lost a token.
		"the copy asks once and comes back": {
			{"copy", keywire.Key, false}, {"original", keywire.Key, false}, {"original", keywire.Renew, false}, {"copy", keywire.Key, true},
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := prepare(t)
			f.start(sshverb.Limits{})
			token, err := f.open(f.attic, "", keywire.Claims{})
			f.check(err)
			token, err = f.open(f.attic, token, keywire.Claims{})
			f.check(err)
			card := map[string]keywire.Token{"original": token, "copy": token}
			for _, s := range steps {
				_, next, err := f.exchange(f.attic, keywire.Request{Verb: s.verb, UUID: atticDisk, Token: card[s.who]}.Line())
				if held := hint.Code(err) == hint.ExitRefused; held != s.held || err != nil && !held {
					t.Fatalf("%s %s: %v", s.who, s.verb, err)
				}
				if next != "" {
					card[s.who] = next
				}
			}
			if kinds := f.alerts(); !slices.Equal(kinds, []string{alert.TokenMismatch}) {
				t.Errorf("alerts: %v", kinds)
			}
			if r := f.last(); r.Decision != "held" || r.Reason != policy.AskToken {
				t.Errorf("on record: %+v", r)
			}
		})
	}
}

// A power cut loses the newest token: the one before it is still good, again and again.
func TestLostTokens(t *testing.T) {
	f := prepare(t)
	f.start(sshverb.Limits{})
	token, err := f.open(f.attic, "", keywire.Claims{})
	f.check(err)
	for range 5 {
		if _, err := f.open(f.attic, token, keywire.Claims{}); err != nil {
			t.Fatal(err)
		}
	}
	if kinds := f.alerts(); len(kinds) > 0 {
		t.Errorf("alerts: %v", kinds)
	}
	f.silentAboutKeys()
}

// A client that knows nothing of tokens, as every appliance before them, goes on
// to work: it never had one to lose.
func TestClientWithoutTokens(t *testing.T) {
	f := prepare(t)
	f.start(sshverb.Limits{})
	for range 3 {
		if _, err := f.open(f.attic, "", keywire.Claims{}); err != nil {
			t.Fatal(err)
		}
		if _, _, err := f.exchange(f.attic, "lease "+atticDisk); err != nil {
			t.Fatal(err)
		}
	}
	if kinds := f.alerts(); len(kinds) > 0 {
		t.Errorf("alerts: %v", kinds)
	}
}

// Silence holds the key; approve lets exactly one through.
func TestHeldAndApproved(t *testing.T) {
	f := prepare(t)
	f.start(sshverb.Limits{})
	if _, err := f.ask(f.attic, "key "+atticDisk); err != nil {
		t.Fatal(err)
	}
	f.advance(97 * time.Hour)
	f.refused(f.attic, "key "+atticDisk, hint.ExitRefused, policy.AskAbsence)
	if kinds := f.alerts(); !slices.Equal(kinds, []string{alert.Held}) {
		t.Errorf("alerts: %v", kinds)
	}
	s, err := f.policies.Read("attic")
	f.check(err)
	if len(s.Waiting) != 1 {
		t.Fatalf("waiting: %+v", s.Waiting)
	}
	f.check(f.book().Approve(orders.Order{Appliance: "attic", By: "ada", Why: "the power was out"}, s.Waiting[0].ID))
	if _, err := f.ask(f.attic, "key "+atticDisk); err != nil {
		t.Fatal(err)
	}
	if r := f.last(); r.Decision != "granted" || r.Reason != policy.ReasonApproved {
		t.Errorf("on record: %+v", r)
	}
	f.advance(97 * time.Hour)
	f.refused(f.attic, "key "+atticDisk, hint.ExitRefused, policy.AskAbsence)
}

// Where the VPN has not said yet where the peer is, it is asked to come again.
func TestPlaceDecides(t *testing.T) {
	f := prepare(t)
	a := &f.site.Appliances[0]
	a.KeyPolicy.Place = site.PlaceWireGuard
	f.start(sshverb.Limits{})
	at := func(address string) {
		m, err := f.moment()
		f.check(err)
		ap := netip.AddrPortFrom(netip.MustParseAddr(address), 51820)
		f.mu.Lock()
		defer f.mu.Unlock()
		f.where["attic"] = place.Sighting{Boot: m.Boot, Peer: "x", Source: "wireguard",
			Trail: []place.Visit{{Network: place.NetworkOf(ap.Addr()), Endpoint: ap, First: m.Up, Last: m.Up}}}
	}
	f.refused(f.attic, "key "+atticDisk, hint.ExitUnreachable, policy.ReasonUnplaced)
	at("203.0.113.9")
	if _, err := f.ask(f.attic, "key "+atticDisk); err != nil {
		t.Fatal(err)
	}
	f.advance(6 * time.Hour)
	at("198.51.100.7")
	f.refused(f.attic, "key "+atticDisk, hint.ExitRefused, policy.AskPlace)
	f.refused(f.attic, "lease "+atticDisk, hint.ExitRefused, policy.AskPlace)
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.told) == 0 || f.told[0].Kind != alert.Held || !strings.Contains(f.told[0].Place, "198.51.100.7") || f.told[0].Disk != atticDisk {
		t.Errorf("told: %+v", f.told)
	}
}

// What the appliance says of its header is mailed once per change and refuses nothing.
func TestHeaderAlarms(t *testing.T) {
	f := prepare(t)
	good, other := strings.Repeat("0a", 32), strings.Repeat("0b", 32)
	f.site.Appliances[0].LUKSHeader = good
	f.start(sshverb.Limits{})
	var token keywire.Token
	for _, tt := range []struct {
		claims keywire.Claims
		want   []string
	}{
		{keywire.Claims{Header: good, Slots: 2}, nil},
		{keywire.Claims{Header: other, Slots: 2}, []string{alert.HeaderChanged}},
		{keywire.Claims{Header: other, Slots: 2}, nil},
		{keywire.Claims{Header: good, Slots: 3}, []string{alert.Slots}},
		{keywire.Claims{Header: good, Slots: 2, Damage: keywire.DamagePrimary}, []string{alert.HeaderDamaged}},
		{keywire.Claims{Header: good, Slots: 2, Damage: keywire.DamagePrimary}, nil},
		{keywire.Claims{Header: good, Slots: 2}, nil},
	} {
		var err error
		if token, err = f.open(f.attic, token, tt.claims); err != nil {
			t.Fatal(err)
		}
		if kinds := f.alerts(); !slices.Equal(kinds, tt.want) {
			t.Errorf("%+v: alerts %v, want %v", tt.claims, kinds, tt.want)
		}
	}
}

// A revoked appliance is told, says that it is dark, and both are shown and mailed once.
func TestToldAndDark(t *testing.T) {
	f := prepare(t)
	f.start(sshverb.Limits{})
	if _, err := f.ask(f.attic, "key "+atticDisk); err != nil {
		t.Fatal(err)
	}
	f.revoke("attic")
	f.advance(time.Minute)
	for range 2 {
		f.refused(f.attic, "lease "+atticDisk, hint.ExitRefused, policy.ReasonRevoked)
	}
	told := f.clock()
	f.advance(time.Minute)
	for range 2 {
		if out, err := f.ask(f.attic, "dark "+atticDisk); err != nil || string(out) != `{"appliance":"attic"}`+"\n" {
			t.Errorf("dark: %q, %v", out, err)
		}
	}
	s, err := f.policies.Read("attic")
	f.check(err)
	if !s.Told.Wall.Equal(told) || s.Dark.IsZero() {
		t.Errorf("told at %v, dark at %v", s.Told.Wall, s.Dark.Wall)
	}
	kinds := f.alerts()
	for _, kind := range []string{alert.RevokedTold, alert.Dark} {
		if n := len(slices.DeleteFunc(slices.Clone(kinds), func(k string) bool { return k != kind })); n != 1 {
			t.Errorf("%s was mailed %d times: %v", kind, n, kinds)
		}
	}
	f.refused(f.shed, "dark "+atticDisk, hint.ExitRefused, policy.ReasonForeignDisk)
}

// A client key that is void gets no session, and the others do.
func TestVoidKey(t *testing.T) {
	f := prepare(t)
	f.start(sshverb.Limits{})
	f.mu.Lock()
	f.voids["attic"] = true
	f.mu.Unlock()
	if _, err := f.dial(f.attic); hint.Code(err) != hint.ExitRefused {
		t.Errorf("a void key: %v", err)
	}
	if r := f.last(); r.Event != "connect" || r.Reason != "void SSH key" || r.Appliance != "attic" {
		t.Errorf("on record: %+v", r)
	}
	if _, err := f.ask(f.shed, "checkin"); err != nil {
		t.Error(err)
	}
}

// The lease is the policy's, and is to be renewed within minutes.
func TestLeaseOfThePolicy(t *testing.T) {
	f := prepare(t)
	f.site.Appliances[0].KeyPolicy.Lease = settings.Duration(10 * time.Minute)
	f.start(sshverb.Limits{})
	if _, err := f.ask(f.attic, "key "+atticDisk); err != nil {
		t.Fatal(err)
	}
	out, err := f.ask(f.attic, "lease "+atticDisk)
	if l, perr := keywire.ParseLease(out); err != nil || perr != nil || l.Duration() != 10*time.Minute || l.Renewal() != 200*time.Second {
		t.Errorf("%q, %v, %v", out, err, perr)
	}
}

// What is observed has verdicts and no texts of peers.
func TestObservations(t *testing.T) {
	f := prepare(t)
	f.start(sshverb.Limits{})
	_, first := f.ask(f.attic, "key "+atticDisk)
	_, foreign := f.ask(f.shed, "key "+atticDisk)
	_, malformed := f.ask(f.shed, "status")
	_, missing := f.ask(f.shed, "key "+shedDisk)
	_, stranger := f.ask(f.stranger, "checkin")
	if first != nil || foreign == nil || malformed == nil || missing == nil || stranger == nil {
		t.Fatal(first, foreign, malformed, missing, stranger)
	}
	var got []string
	f.mu.Lock()
	for _, o := range f.seen {
		got = append(got, o.Verb+" "+o.Verdict+" "+o.Appliance)
	}
	f.mu.Unlock()
	want := []string{"key granted attic", "key refused shed", "request malformed shed", "key failed shed", "connect refused "}
	if !slices.Equal(slices.Compact(got), want) {
		t.Errorf("%q", got)
	}
	if kinds := f.alerts(); !slices.Contains(kinds, alert.StateUnreadable) {
		t.Errorf("a missing key was not mailed: %v", kinds)
	}
}

// A grant whose key is missing counts nothing and issues nothing.
func TestMissingKeyCountsNothing(t *testing.T) {
	f := prepare(t)
	f.site.Appliances[1].KeyPolicy.KeysPerDay = 2
	f.start(sshverb.Limits{})
	for range 4 {
		if _, err := f.ask(f.shed, "key "+shedDisk); hint.Code(err) != hint.ExitFailure {
			t.Fatal(err)
		}
	}
	s, err := f.policies.Read("shed")
	f.check(err)
	if len(s.Keys) != 0 || s.Tokens.Issued != "" {
		t.Errorf("%+v", s)
	}
	granted := 0
	f.check(audit.Read(f.dir, func(_ []byte, r audit.Record) error {
		if r.Event == "key" && r.Decision == "granted" {
			granted++
		}
		return nil
	}))
	if granted != 0 {
		t.Errorf("%d grants on record", granted)
	}
}
