package siteinit_test

import (
	"os"
	"strings"
	"testing"

	"farkeep/image/siteinit"
	"farkeep/shared/settings"

	"github.com/google/go-cmp/cmp"
)

// TestHistoryReachesEveryAppliance: a new site says the default in full, and what
// the operator makes of it stands in the farkeep.toml of the appliances.
func TestHistoryReachesEveryAppliance(t *testing.T) {
	d := complete(t)
	if diff := cmp.Diff(settings.DefaultHistory(), d.Site().History); diff != "" {
		t.Errorf("a new site, -default +written:\n%s", diff)
	}
	text, err := os.ReadFile(d.SitePath())
	check(t, err)
	edited := strings.NewReplacer(
		"floor_age = \"14d\"", "floor_age = \"30d\"",
		"[dead_man]", "[[history.repository]]\nname = \"mail\"\nyearly = 0\ndaily = 60\n\n[dead_man]",
	).Replace(string(text))
	check(t, os.WriteFile(d.SitePath(), []byte(edited), 0o600))
	d, err = siteinit.Open(d.Path())
	check(t, err)
	_, err = d.Refresh()
	check(t, err)
	path := d.ApplianceSettings("attic")
	text, err = os.ReadFile(path)
	check(t, err)
	a, err := settings.Parse(path, text)
	check(t, err)
	if diff := cmp.Diff(d.Site().History, a.History); diff != "" {
		t.Errorf("-site +appliance:\n%s", diff)
	}
	photos, mail := a.History.For("photos"), a.History.For("mail")
	if photos.Age.Hours() != 30*24 || photos.Yearly != -1 || mail.Yearly != 0 || mail.Daily != 60 || mail.Monthly != 12 {
		t.Errorf("photos %+v, mail %+v", photos, mail)
	}
}
