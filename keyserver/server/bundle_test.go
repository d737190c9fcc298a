package server_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"farkeep/keyserver/alert"
	"farkeep/shared/keywire"
	"farkeep/shared/site"
	"farkeep/shared/sshverb"
)

// A live header that the recovery bundle does not have is mailed once; without a
// bundle, or with the right one, there is nothing to say.
func TestBundleStale(t *testing.T) {
	old, live := strings.Repeat("0a", 32), strings.Repeat("0b", 32)
	for name, tt := range map[string]struct {
		bundle site.Bundle
		want   []string
	}{
		"none":  {site.Bundle{}, nil},
		"right": {site.Bundle{Created: time.Unix(1, 0), Disks: []site.BundleDisk{{LUKS: atticDisk, Header: live}}}, nil},
		"old":   {site.Bundle{Created: time.Unix(1, 0), Disks: []site.BundleDisk{{LUKS: atticDisk, Header: old}}}, []string{alert.BundleStale}},
		"other": {site.Bundle{Created: time.Unix(1, 0), Disks: []site.BundleDisk{{LUKS: shedDisk, Header: live}}}, []string{alert.BundleStale}},
	} {
		t.Run(name, func(t *testing.T) {
			f := prepare(t)
			f.site.Bundle = tt.bundle
			f.site.Appliances[0].LUKSHeader = live
			f.site.Appliances[0].KeyPolicy.Token = "ignored"
			f.start(sshverb.Limits{})
			var got []string
			for range 2 {
				if _, err := f.ask(f.attic, keywire.Request{Verb: keywire.Key, UUID: atticDisk, Claims: keywire.Claims{Header: live, Slots: 2}}.Line()); err != nil {
					t.Fatal(err)
				}
				got = append(got, f.alerts()...)
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("alerts: %v, want %v", got, tt.want)
			}
		})
	}
}
