package site_test

import (
	"strings"
	"testing"
	"time"

	"farkeep/shared/settings"
	"farkeep/shared/site"

	"github.com/google/go-cmp/cmp"
)

func TestKeyPolicyIsRead(t *testing.T) {
	text := strings.Replace(good(t), "keys_per_day = 10", `keys_per_day = 10
approval = "always"
absence = "10d"
windows = ["22:00-06:00", "12:00-12:30"]
token = "ignored"
lease = "1m"
place = "wireguard"`, 1)
	s, err := site.Parse("site.toml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	p := s.Appliances[0].KeyPolicy
	if p.Approval != site.ApprovalAlways || p.Absence != settings.Duration(240*time.Hour) || p.Token != site.TokenIgnored || p.Lease != settings.Duration(time.Minute) || p.Place != site.PlaceWireGuard {
		t.Errorf("%+v", p)
	}
	for at, want := range map[string]bool{
		"21:59:59": false, "22:00:00": true, "23:59:59": true, "00:00:00": true, "05:59:59": true, "06:00:00": false,
		"11:59:59": false, "12:00:00": true, "12:29:59": true, "12:30:00": false,
	} {
		clock, err := time.Parse("15:04:05", at)
		if err != nil {
			t.Fatal(err)
		}
		if p.Expects(clock) != want {
			t.Errorf("at %s a key is expected: %v", at, !want)
		}
		// The same moment, said elsewhere.
		if p.Expects(clock.In(time.FixedZone("", 5*3600))) != want {
			t.Errorf("at %s, in another zone, a key is expected: %v", at, !want)
		}
	}
	p.Windows = nil
	if !p.Expects(time.Now()) {
		t.Error("without windows a key is not expected")
	}

	// A policy survives being written again.
	doc, err := site.NewDocument(s)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(s.Appliances[0].KeyPolicy, doc.Site().Appliances[0].KeyPolicy); diff != "" {
		t.Error(diff)
	}
}

func TestAKeyServerThatSeesNoPlaces(t *testing.T) {
	s, err := site.Parse("site.toml", []byte(strings.Replace(good(t), "keys_per_day = 10", "keys_per_day = 10\nplace = \"wireguard\"", 1)))
	if err != nil {
		t.Fatal(err)
	}
	blind := s.SeenBy(site.KeyServer{Place: site.PlaceNone})
	if blind.Appliances[0].KeyPolicy.Place != site.PlaceNone || s.Appliances[0].KeyPolicy.Place != site.PlaceWireGuard {
		t.Errorf("%q, and the site itself %q", blind.Appliances[0].KeyPolicy.Place, s.Appliances[0].KeyPolicy.Place)
	}
	if s.SeenBy(site.KeyServer{}) != s {
		t.Error("a key server that sees everything has another site")
	}
}

func FuzzHours(f *testing.F) {
	f.Add("22:00-06:00")
	f.Add("00:00-23:59")
	f.Add("7:00-8:00")
	f.Fuzz(func(t *testing.T, text string) {
		var h site.Hours
		if h.UnmarshalText([]byte(text)) != nil {
			return
		}
		if h.String() != text {
			t.Errorf("%q is read as %v", text, h)
		}
		inside := 0
		for m := range 24 * 60 {
			if h.Contain(time.Unix(int64(m)*60, 0)) {
				inside++
			}
		}
		if inside == 0 || inside == 24*60 {
			t.Errorf("%v has %d minutes", h, inside)
		}
	})
}
