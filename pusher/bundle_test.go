package main

import (
	"strings"
	"testing"
	"time"

	"farkeep/shared/pushwire"
	"farkeep/shared/site"
)

func TestBundleStatus(t *testing.T) {
	now := time.Date(2026, 5, 6, 12, 0, 0, 0, time.UTC)
	const disk = "0b6e1f5c-8d1b-4c52-9a57-6a2f0c9d3e11"
	old, live := strings.Repeat("0a", 32), strings.Repeat("0b", 32)
	attic := []site.Appliance{{Name: "attic", LUKS: disk}, {Name: "shed"}}
	of := func(header string) []site.BundleDisk { return []site.BundleDisk{{LUKS: disk, Header: header}} }
	says := func(header string) []targetStatus {
		return []targetStatus{{Name: "attic", Status: &pushwire.Status{Disk: pushwire.DiskState{HeaderDigest: header}}}, {Name: "nas"}}
	}
	for name, tt := range map[string]struct {
		site    site.Site
		targets []targetStatus
		stale   bool
		want    []string
	}{
		"no disk":       {site.Site{Appliances: attic[1:]}, nil, false, nil},
		"none":          {site.Site{Appliances: attic}, says(live), false, []string{"WARNING there is none"}},
		"fits":          {site.Site{Appliances: attic, Bundle: site.Bundle{Created: now.AddDate(0, 0, -3), Drilled: now.AddDate(0, 0, -2), Disks: of(live)}}, says(live), false, []string{"made 3 days ago, rehearsed 2 days ago"}},
		"silent":        {site.Site{Appliances: attic, Bundle: site.Bundle{Created: now, Drilled: now, Disks: of(live)}}, nil, false, []string{"made just now"}},
		"never drilled": {site.Site{Appliances: attic, Bundle: site.Bundle{Created: now, Disks: of(live)}}, says(live), false, []string{"rehearsed never", "WARNING it was never rehearsed"}},
		"overdue":       {site.Site{Appliances: attic, Bundle: site.Bundle{Created: now, Drilled: now.AddDate(-2, 0, 0), Disks: of(live)}}, says(live), false, []string{"WARNING the last drill was 730 days ago"}},
		"other header":  {site.Site{Appliances: attic, Bundle: site.Bundle{Created: now, Drilled: now, Disks: of(old)}}, says(live), true, []string{"STALE attic: the disk has another header", "make a new one"}},
		"other disk":    {site.Site{Appliances: attic, Bundle: site.Bundle{Created: now, Drilled: now}}, says(live), true, []string{"STALE attic: the bundle has no key"}},
	} {
		t.Run(name, func(t *testing.T) {
			st := siteStatus{Bundle: bundleOf(&tt.site, tt.targets, now)}
			var out strings.Builder
			st.Bundle.show(&out, now)
			if tt.want == nil && out.Len() > 0 {
				t.Errorf("says %q", out.String())
			}
			for _, want := range tt.want {
				if !strings.Contains(out.String(), want) {
					t.Errorf("says %q; want %q", out.String(), want)
				}
			}
			if err := st.verdict(); (err != nil) != tt.stale {
				t.Errorf("verdict: %v", err)
			}
		})
	}
}
