package place_test

import (
	"bytes"
	"net/netip"
	"strings"
	"testing"
	"time"

	"farkeep/keyserver/moment"
	"farkeep/keyserver/place"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

var sameAddress = cmpopts.EquateComparable(netip.AddrPort{})

func visit(endpoint string, first, last time.Duration) place.Visit {
	e := netip.MustParseAddrPort(endpoint)
	return place.Visit{Network: place.NetworkOf(e.Addr()), Endpoint: e, First: first, Last: last}
}

// Two machines whose clocks have nothing in common agree on how long ago something was.
func TestTold(t *testing.T) {
	const day = 24 * time.Hour
	there := moment.Moment{Wall: time.Unix(1, 0), Boot: boot, Up: 40 * day}
	here := moment.Moment{Wall: time.Unix(2e9, 0), Boot: strings.Repeat("b", 32), Up: time.Minute} // it was just switched on
	relay := place.Visit{Network: place.RelayOf("fra"), First: 30 * day, Last: 31 * day}
	seen := place.Sighting{Boot: boot, Source: place.SourceWireGuard, Peer: "key", Flaps: true, Trail: []place.Visit{
		relay, visit("84.150.1.2:1", 31*day, 39*day), visit("[2003:e1::1]:2", 39*day, 40*day-2*time.Second),
	}}
	seen.Trail[1].Network.AS = 3320
	text, err := seen.Tell(there)
	if err != nil {
		t.Fatal(err)
	}
	got, err := place.ParseTold(text, here)
	if err != nil {
		t.Fatal(err)
	}
	want := seen
	want.Boot, want.Trail = here.Boot, nil
	for _, v := range seen.Trail {
		v.First, v.Last = v.First-there.Up+here.Up, v.Last-there.Up+here.Up
		want.Trail = append(want.Trail, v)
	}
	if diff := cmp.Diff(want, got, sameAddress); diff != "" {
		t.Error(diff)
	}

	if text, err := (place.Sighting{}).Tell(there); err != nil {
		t.Error(err)
	} else if got, err := place.ParseTold(text, here); err != nil || got.Known() {
		t.Errorf("nothing is known: %+v, %v", got, err)
	}
	if _, err := seen.Tell(here); err == nil {
		t.Error("times of one boot were told by the clock of another")
	}
	full := place.Sighting{Boot: boot, Source: place.SourceTailscale, Peer: strings.Repeat("k", 128)}
	for i := range place.Visits {
		full.Trail = append(full.Trail, visit("[2003:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535", time.Duration(i), time.Duration(i)))
	}
	if text, err := full.Tell(there); err != nil || len(text) > place.MaxTold/2 {
		t.Errorf("the largest takes %d bytes, %v", len(text), err)
	}
}

func TestToldRefuses(t *testing.T) {
	one := func(visit string) string {
		return `{"source":"wireguard","peer":"k","trail":[` + visit + `]}`
	}
	good := `{"network":{"name":"84.150.0.0/16"},"endpoint":"84.150.1.2:1","first":9,"last":3}`
	now := moment.Moment{Wall: time.Unix(1, 0), Boot: boot, Up: time.Hour}
	if s, err := place.ParseTold([]byte(one(good)), now); err != nil || !s.Known() {
		t.Fatalf("%+v, %v", s, err)
	}
	for name, text := range map[string]string{
		"nothing":                   ``,
		"no object":                 `7`,
		"something behind":          one(good) + `{}`,
		"too long":                  one(good) + strings.Repeat(" ", place.MaxTold),
		"another VPN":               strings.Replace(one(good), "wireguard", "carrier", 1),
		"no peer":                   strings.Replace(one(good), `"k"`, `""`, 1),
		"in the future":             one(strings.Replace(good, `"last":3`, `"last":-3`, 1)),
		"it left before it came":    one(strings.Replace(good, `"first":9`, `"first":2`, 1)),
		"older than time":           one(strings.Replace(good, `"first":9`, `"first":9000000000000000000`, 1)),
		"the older visit is last":   one(good + `,{"network":{"name":"91.20.0.0/16"},"endpoint":"91.20.1.2:1","first":30,"last":20}`),
		"the endpoint is elsewhere": one(strings.Replace(good, "84.150.1.2:1", "91.20.1.2:1", 1)),
		"no endpoint":               one(strings.Replace(good, `"endpoint":"84.150.1.2:1",`, ``, 1)),
		"a network that is none":    one(strings.Replace(good, "84.150.0.0/16", "84.150.0.0/99", 1)),
		"too many visits":           one(strings.Repeat(good+",", place.Visits) + good),
	} {
		if s, err := place.ParseTold([]byte(text), now); err == nil || s.Known() {
			t.Errorf("%s: %+v", name, s)
		}
	}
}

// FuzzTold: what is read can be told again, and says the same.
func FuzzTold(f *testing.F) {
	f.Add([]byte(`{}`))
	f.Add([]byte(`{"source":"tailscale","peer":"nodekey:a","trail":[{"network":{"name":"relay:fra"},"first":9,"last":3}]}`))
	f.Add([]byte(`{"source":"wireguard","peer":"k","flaps":true,"trail":[{"network":{"name":"84.150.0.0/16","as":3320},"endpoint":"84.150.1.2:1","first":9,"last":3}]}`))
	now := moment.Moment{Wall: time.Unix(1e9, 0).UTC(), Boot: boot, Up: 1000 * time.Hour}
	f.Fuzz(func(t *testing.T, text []byte) {
		s, err := place.ParseTold(text, now)
		if err != nil {
			return
		}
		for i, v := range s.Trail {
			if v.Last < v.First || v.Last > now.Up || i > 0 && v.First < s.Trail[i-1].Last {
				t.Fatalf("%+v", s.Trail)
			}
		}
		again, err := s.Tell(now)
		if err != nil {
			t.Fatal(err)
		}
		same, err := place.ParseTold(again, now)
		if err != nil && !bytes.Contains([]byte(err.Error()), []byte("longer than")) {
			t.Fatalf("%v: %s", err, again)
		}
		if diff := cmp.Diff(s, same, sameAddress); err == nil && diff != "" {
			t.Error(diff)
		}
	})
}
