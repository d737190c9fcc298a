package policy_test

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"farkeep/keyserver/policy"
	"farkeep/shared/keywire"
	"farkeep/shared/site"

	"github.com/google/go-cmp/cmp"
)

const uuid = "0b6e1f5c-8d1b-4c52-9a57-6a2f0c9d3e11"

var now = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func attic() site.Appliance {
	a := site.Appliance{Name: "attic", LUKS: uuid, VPNAddress: netip.MustParseAddr("10.77.0.2")}
	a.SetDefaults()
	a.KeyPolicy.KeysPerDay = 2
	return a
}

func TestDecide(t *testing.T) {
	enabled := &policy.Standing{Appliance: "attic", State: policy.Enabled}
	revoked := &policy.Standing{Appliance: "attic", State: policy.Revoked}
	key := keywire.Request{Verb: keywire.Key, UUID: uuid}
	home, elsewhere := netip.MustParseAddr("10.77.0.2"), netip.MustParseAddr("203.0.113.9")
	ago := func(spans ...time.Duration) policy.History {
		h := policy.History{Appliance: "attic"}
		for _, d := range spans {
			h.Keys = append(h.Keys, now.Add(-d))
		}
		return h
	}
	vpnOnly := func(a *site.Appliance) { a.KeyPolicy.Source = "vpn" }

	tests := []struct {
		name     string
		change   func(*site.Appliance)
		standing *policy.Standing
		history  policy.History
		request  keywire.Request
		from     netip.Addr
		want     string // "" means granted
	}{
		{"key", nil, enabled, ago(), key, home, ""},
		{"key from anywhere", nil, enabled, ago(), key, elsewhere, ""},
		{"key, no address", nil, enabled, ago(), key, netip.Addr{}, ""},
		{"lease", nil, enabled, ago(), keywire.Request{Verb: keywire.Renew, UUID: uuid}, home, ""},
		{"checkin", nil, enabled, ago(), keywire.Request{Verb: keywire.CheckIn}, home, ""},
		{"checkin before there is a disk", func(a *site.Appliance) { a.LUKS = "" }, enabled, ago(), keywire.Request{Verb: keywire.CheckIn}, home, ""},

		{"no standing", nil, nil, ago(), key, home, policy.ReasonNoStanding},
		{"somebody else's standing", nil, &policy.Standing{Appliance: "shed", State: policy.Enabled}, ago(), key, home, policy.ReasonNoStanding},
		{"empty standing", nil, &policy.Standing{Appliance: "attic"}, ago(), key, home, policy.ReasonRevoked},
		{"unknown state", nil, &policy.Standing{Appliance: "attic", State: "held"}, ago(), key, home, policy.ReasonRevoked},
		{"revoked key", nil, revoked, ago(), key, home, policy.ReasonRevoked},
		{"revoked lease", nil, revoked, ago(), keywire.Request{Verb: keywire.Renew, UUID: uuid}, home, policy.ReasonRevoked},
		{"revoked checkin", nil, revoked, ago(), keywire.Request{Verb: keywire.CheckIn}, home, policy.ReasonRevoked},

		{"no disk yet", func(a *site.Appliance) { a.LUKS = "" }, enabled, ago(), key, home, policy.ReasonNoDisk},
		{"no disk, no uuid", func(a *site.Appliance) { a.LUKS = "" }, enabled, ago(), keywire.Request{Verb: keywire.Key}, home, policy.ReasonNoDisk},
		{"another disk", nil, enabled, ago(), keywire.Request{Verb: keywire.Key, UUID: strings.Replace(uuid, "0b", "0c", 1)}, home, policy.ReasonForeignDisk},
		{"lease of another disk", nil, enabled, ago(), keywire.Request{Verb: keywire.Renew, UUID: strings.Replace(uuid, "0b", "0c", 1)}, home, policy.ReasonForeignDisk},

		{"vpn only, from there", vpnOnly, enabled, ago(), key, home, ""},
		{"vpn only, mapped", vpnOnly, enabled, ago(), key, netip.MustParseAddr("::ffff:10.77.0.2"), ""},
		{"vpn only, from elsewhere", vpnOnly, enabled, ago(), key, elsewhere, policy.ReasonForeignPlace},
		{"vpn only, no address", vpnOnly, enabled, ago(), key, netip.Addr{}, policy.ReasonForeignPlace},
		{"vpn only, none configured", func(a *site.Appliance) { vpnOnly(a); a.VPNAddress = netip.Addr{} }, enabled, ago(), key, netip.Addr{}, policy.ReasonForeignPlace},
		{"unknown source rule", func(a *site.Appliance) { a.KeyPolicy.Source = "" }, enabled, ago(), key, elsewhere, policy.ReasonForeignPlace},

		{"second key today", nil, enabled, ago(time.Hour), key, home, ""},
		{"third key today", nil, enabled, ago(23*time.Hour+59*time.Minute, time.Hour), key, home, policy.ReasonTooOften},
		{"a day later", nil, enabled, ago(24*time.Hour, time.Hour), key, home, ""},
		{"clock set back", nil, enabled, ago(-48*time.Hour, -47*time.Hour), key, home, policy.ReasonTooOften},
		{"lease is not a key", nil, enabled, ago(2*time.Hour, time.Hour), keywire.Request{Verb: keywire.Renew, UUID: uuid}, home, ""},
		{"no allowance at all", func(a *site.Appliance) { a.KeyPolicy.KeysPerDay = 0 }, enabled, ago(), key, home, policy.ReasonTooOften},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			a := attic()
			if tt.change != nil {
				tt.change(&a)
			}
			d := policy.Decide(a, tt.standing, tt.history, tt.request, tt.from, now)
			if tt.want == "" && !d.Granted {
				t.Errorf("refused: %s", d.Reason)
			}
			if tt.want != "" && (d.Granted || d.Reason != tt.want) {
				t.Errorf("got %+v; want a refusal: %s", d, tt.want)
			}
		})
	}
}

func TestAfterStaysBounded(t *testing.T) {
	h := policy.History{Appliance: "attic"}
	for i := range 3000 {
		at := now.Add(time.Duration(i) * time.Hour)
		if len(h.Keys) > 24 {
			t.Fatalf("%d grants kept", len(h.Keys))
		}
		h = h.After(keywire.Key, at)
	}
	before := h
	h = h.After(keywire.CheckIn, now.Add(3000*time.Hour))
	if h.LastKey != before.LastKey || h.LastSeen == before.LastSeen {
		t.Errorf("a checkin: %+v after %+v", h, before)
	}
}

func TestStore(t *testing.T) {
	dir := t.TempDir()
	s := policy.Open(dir)
	if v, err := s.Standing("attic"); v != nil || err != nil {
		t.Errorf("nothing ordered yet: %v, %v", v, err)
	}
	want := policy.Standing{Appliance: "attic", State: policy.Revoked, Reason: "stolen", By: "ada", Since: now}
	if err := s.SetStanding(want); err != nil {
		t.Fatal(err)
	}
	h := policy.History{Appliance: "attic"}.After(keywire.Key, now)
	if err := s.SetHistory(h); err != nil {
		t.Fatal(err)
	}
	again := policy.Open(dir) // a restart
	got, err := again.Standing("attic")
	if err != nil || cmp.Diff(&want, got) != "" {
		t.Errorf("standing %+v, %v", got, err)
	}
	gotHistory, err := again.History("attic")
	if err != nil || cmp.Diff(h, gotHistory) != "" {
		t.Errorf("history %+v, %v", gotHistory, err)
	}

	for name, text := range map[string]string{
		"empty": "", "garbage": "{", "another appliance": `{"appliance":"shed","state":"enabled","reason":"","since":"2026-01-01T00:00:00Z"}`,
		"another state": `{"appliance":"attic","state":"maybe","reason":"","since":"2026-01-01T00:00:00Z"}`,
		"newer program": `{"appliance":"attic","state":"enabled","hold":true}`,
		"too large":     `{"appliance":"attic","state":"enabled","reason":"` + strings.Repeat("x", 200<<10) + `"}`,
	} {
		if err := os.WriteFile(filepath.Join(dir, "standing", "attic.json"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if v, err := s.Standing("attic"); err == nil {
			t.Errorf("%s: read as %+v", name, v)
		}
	}
	for _, bad := range []string{"", "..", "../x", "a/b", "A"} {
		if _, err := s.Standing(bad); err == nil {
			t.Errorf("%q has a standing", bad)
		}
		if err := s.SetStanding(policy.Standing{Appliance: bad}); err == nil {
			t.Errorf("%q was given a standing", bad)
		}
	}
}
