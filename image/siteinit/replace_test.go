package siteinit_test

import (
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"farkeep/image/siteinit"
)

// within are the files of a snapshot below a folder, by their name there.
func within(files map[string]string, folder string) map[string]string {
	found := map[string]string{}
	for name, text := range files {
		if rest, ok := strings.CutPrefix(name, folder+"/"); ok {
			found[rest] = text
		}
	}
	return found
}

// moved is a snapshot in which a folder has other files; nil for none.
func moved(files map[string]string, folder string, to map[string]string) map[string]string {
	changed := maps.Clone(files)
	maps.DeleteFunc(changed, func(name, _ string) bool { return strings.HasPrefix(name, folder+"/") })
	for name, text := range to {
		changed[folder+"/"+name] = text
	}
	return changed
}

// TestReplaceIdentity: everything that was on the lost card is new, nothing else
// is, and wherever the change is cut, the next call finishes it.
func TestReplaceIdentity(t *testing.T) {
	const own, fresh, lost, making = "appliances/attic/identity", "appliances/attic/identity.new", "appliances/attic/identity.lost", "appliances/attic/identity.making"
	files, err := model()
	check(t, err)
	before := maps.Clone(files)
	before[own+"/mail_password"] = "own\n"

	replace := func(t *testing.T, files map[string]string) (map[string]string, *siteinit.Report) {
		t.Helper()
		dir := filepath.Join(t.TempDir(), "site")
		lay(t, dir, files)
		d, err := siteinit.Open(dir)
		check(t, err)
		r, void, err := d.ReplaceIdentity("attic")
		check(t, err)
		if !strings.HasPrefix(void.ClientKey, "SHA256:") || void.HostKey == void.ClientKey || void.VPNKey == "" || void.MailUser != "attic@example.net" {
			t.Errorf("void: %+v", void)
		}
		after, err := snapshot(dir)
		check(t, err)
		return after, r
	}
	// whole checks a folder after a change that came to its end.
	whole := func(t *testing.T, after map[string]string) {
		t.Helper()
		was, now := within(before, own), within(after, own)
		if len(was) != 5 || !slices.Equal(slices.Sorted(maps.Keys(was)), slices.Sorted(maps.Keys(now))) {
			t.Errorf("the identity was %v, is %v", slices.Sorted(maps.Keys(was)), slices.Sorted(maps.Keys(now)))
		}
		for name := range was {
			if same := was[name] == now[name]; same != (name == "mail_password") {
				t.Errorf("%s: the same is %v", name, same)
			}
		}
		for name, text := range after {
			changes := strings.HasPrefix(name, own+"/") || slices.Contains([]string{"site.toml", "appliances/attic/farkeep.toml", "home/wireguard/farkeep.conf"}, name)
			if !changes && before[name] != text {
				t.Errorf("%s changed, or is new", name)
			}
			// Of the old identity nothing is left anywhere.
			for secret, old := range was {
				if secret != "mail_password" && strings.Contains(text, strings.TrimSpace(old)) {
					t.Errorf("%s still has the old %s", name, secret)
				}
			}
		}
		for _, name := range []string{"appliances/attic/farkeep.toml", "home/wireguard/farkeep.conf"} {
			if psk := strings.TrimSpace(now["wireguard_preshared_key"]); !strings.Contains(after[name], psk) {
				t.Errorf("%s does not have the new preshared key", name)
			}
		}
	}

	after, r := replace(t, before)
	whole(t, after)
	if !slices.Contains(r.Changed, "home/wireguard/farkeep.conf") || !slices.Contains(r.Changed, "site.toml") {
		t.Errorf("the report says %+v", r)
	}
	old, made := within(before, own), within(after, own)
	for _, cut := range []struct {
		name     string
		files    map[string]string
		finishes bool // with the identity that the cut call had made
	}{
		{"while keys were made", moved(before, making, map[string]string{"ssh_host_key": "half"}), false},
		{"before the first rename", moved(before, fresh, made), true},
		{"between the renames", moved(moved(moved(before, own, nil), lost, old), fresh, made), true},
		{"before site.toml knew", moved(moved(before, own, made), lost, old), true},
		{"before the old keys were removed", moved(after, lost, old), false},
	} {
		t.Run(cut.name, func(t *testing.T) {
			got, _ := replace(t, cut.files)
			whole(t, got)
			if same := maps.Equal(within(got, own), made); same != cut.finishes {
				t.Errorf("the identity that was made before is used: %v", same)
			}
		})
	}
	dir := filepath.Join(t.TempDir(), "site")
	lay(t, dir, before)
	d, err := siteinit.Open(dir)
	check(t, err)
	if _, _, err := d.ReplaceIdentity("nowhere"); err == nil {
		t.Error("an appliance that is not there")
	}
}
