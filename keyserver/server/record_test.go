package server_test

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"farkeep/keyserver/alert"
	"farkeep/keyserver/audit"
	"farkeep/keyserver/place"
	"farkeep/keyserver/policy"
	"farkeep/shared/keywire"
	"farkeep/shared/sshverb"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// Every request and every knock is on record with what decided it, and never
// with a token.
func TestWhatIsOnRecord(t *testing.T) {
	f := prepare(t)
	f.start(sshverb.Limits{})
	m, err := f.moment()
	f.check(err)
	at := netip.AddrPortFrom(netip.MustParseAddr("203.0.113.9"), 51820)
	f.where["attic"] = place.Sighting{Boot: m.Boot, Peer: "x", Source: "wireguard",
		Trail: []place.Visit{{Network: place.NetworkOf(at.Addr()), Endpoint: at, First: m.Up, Last: m.Up}}}
	seen := f.where["attic"].String()
	claims := "boot=" + strings.Repeat("a", 32) + " up=77"
	wrong := keywire.NewToken()

	f.exchange(f.attic, "key "+atticDisk+" "+claims)
	if _, token, err := f.exchange(f.attic, "key "+atticDisk); err != nil { // the first answer was lost
		t.Fatal(err)
	} else {
		f.exchange(f.attic, "lease "+atticDisk+" "+token.Reveal())
		defer func(token string) { noToken(f, token, wrong.Reveal()) }(token.Reveal())
	}
	f.exchange(f.attic, "key "+atticDisk+" "+wrong.Reveal())
	f.exchange(f.attic, "dark "+atticDisk)
	f.exchange(f.attic, "key nonsense")
	if _, err := f.dial(f.stranger); err == nil {
		t.Error("a stranger got in")
	}
	f.mu.Lock()
	f.voids["shed"] = true
	f.mu.Unlock()
	if _, err := f.dial(f.shed); err == nil {
		t.Error("a void key got in")
	}

	var got []audit.Record
	f.check(audit.Read(f.dir, func(_ []byte, r audit.Record) error {
		if r.Event != "allow" { // new in site.toml
			got = append(got, r)
		}
		return nil
	}))
	state, err := f.policies.Read("attic")
	f.check(err)
	if len(state.Waiting) != 1 {
		t.Fatalf("waiting: %+v", state.Waiting)
	}
	want := []audit.Record{
		{Event: "key", Decision: "granted", Appliance: "attic", UUID: atticDisk, Place: seen, Token: "none", Claims: claims},
		{Event: "key", Decision: "granted", Appliance: "attic", UUID: atticDisk, Place: seen, Token: "none"},
		{Event: "lease", Decision: "granted", Appliance: "attic", UUID: atticDisk, Place: seen, Token: "accepted"},
		{Event: "key", Decision: "held", Appliance: "attic", UUID: atticDisk, Place: seen, Token: "mismatch", Waiting: state.Waiting[0].ID},
		{Event: "dark", Decision: "granted", Appliance: "attic", UUID: atticDisk, Place: seen},
		{Event: "request", Decision: "refused", Appliance: "attic"},
		{Event: "connect", Decision: "refused"},
		{Event: "connect", Decision: "refused", Appliance: "shed"},
	}
	if diff := cmp.Diff(want, got, cmpopts.IgnoreFields(audit.Record{}, "Seq", "Time", "Prev", "Reason", "Remote", "Identity")); diff != "" {
		t.Error(diff)
	}
	for _, r := range got {
		if r.Remote == "" || r.Reason == "" || r.Identity == "" || !r.Time.Equal(f.clock().Truncate(time.Millisecond)) {
			t.Errorf("incomplete: %+v", r)
		}
	}
	if got[3].Reason != policy.AskToken {
		t.Errorf("the reason of a hold is %q", got[3].Reason)
	}
	if kinds := f.alerts(); !slices.Equal(kinds, []string{alert.TokenMismatch, alert.Dark, alert.Stranger, alert.Stranger}) {
		t.Errorf("alerts: %v", kinds)
	}
}

// noToken checks that no token is in the state folder or in the log.
func noToken(f *fixture, tokens ...string) {
	f.t.Helper()
	texts := []string{f.log.String()}
	f.check(filepath.WalkDir(f.dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			var text []byte
			text, err = os.ReadFile(path)
			texts = append(texts, string(text))
		}
		return err
	}))
	for _, token := range tokens {
		for _, text := range texts {
			if strings.Contains(text, token) {
				f.t.Error("a token was written down")
			}
		}
	}
}
