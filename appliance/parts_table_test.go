package main

import (
	"maps"
	"slices"
	"strings"
	"testing"

	"farkeep/appliance/confine"
	"farkeep/appliance/part"
	"farkeep/shared/settings"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// partsOfTheProduct are the parts without those that only builds for tests have.
func partsOfTheProduct() []partEntry {
	var names []string
	for _, p := range testParts() {
		names = append(names, p.name)
	}
	return slices.DeleteFunc(parts(), func(p partEntry) bool { return slices.Contains(names, p.name) })
}

// profilesOf are the profiles as specs hands them out: with the settings' ports.
func profilesOf(t *testing.T, paths part.Paths, firmware bool) map[string]confine.Profile {
	t.Helper()
	s, err := settings.Parse("farkeep.toml", testSettings(t))
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]confine.Profile{}
	for _, p := range partsOfTheProduct() {
		h := part.Header{Name: p.name, Paths: paths, Firmware: firmware}
		if p.name == part.Consent {
			h.Ports = keyServerPorts(s) // as its parent has them
		}
		if p.ports != nil {
			h.Ports = p.ports(s)
		}
		got[p.name] = p.profile(h)
	}
	return got
}

// TestConfinementTable states once more, in full, what each part may do. It is
// the table of docs/threat-model.md ("Inside the appliance") in Go: whoever
// changes a profile changes a promise, and must change it here and there too.
func TestConfinementTable(t *testing.T) {
	modes := []struct {
		name       string
		firmware   bool
		paths      part.Paths
		run        string
		state      string
		media      string
		networkCap []uintptr
	}{
		{
			"firmware", true, part.FirmwarePaths(), "/run/farkeep", "/state", "/media",
			[]uintptr{unix.CAP_NET_ADMIN, unix.CAP_NET_RAW, unix.CAP_SYS_TIME},
		},
		// Another system has the network and the clock there.
		{"service", false, part.ServicePaths(), "/run/farkeep", "/var/lib/farkeep", "/var/lib/farkeep/media", nil},
	}
	for _, m := range modes {
		t.Run(m.name, func(t *testing.T) {
			want := map[string]confine.Profile{
				"network": {
					UID: 901, Caps: m.networkCap, Network: confine.WholeNetwork, Clock: true,
					Read:  []string{m.run, "/etc", "/proc", "/sys"},
					Write: []string{m.run + "/network", m.state + "/network"},
				},
				"disk": {
					UID: 0, Network: confine.WholeNetwork, Mounts: true, Exec: true,
					Caps: []uintptr{
						unix.CAP_SYS_ADMIN, unix.CAP_IPC_LOCK, unix.CAP_DAC_OVERRIDE, unix.CAP_SYS_RAWIO,
						unix.CAP_CHOWN, unix.CAP_FOWNER, unix.CAP_KILL,
					},
				},
				"keeper": {
					UID: 902, Network: confine.NoNetwork,
					Read:  []string{m.run},
					Write: []string{m.run + "/keeper", m.state + "/keeper", m.media},
				},
				"unlock": {
					UID: 0, Network: confine.WholeNetwork,
					Caps:    []uintptr{unix.CAP_SYS_ADMIN, unix.CAP_IPC_LOCK, unix.CAP_DAC_OVERRIDE},
					Read:    []string{"/proc", "/sys", "/etc", m.run},
					Devices: []string{"/dev"},
				},
				"consent": {
					UID: 0, Caps: []uintptr{unix.CAP_IPC_LOCK}, Network: confine.TCPPorts, Connect: []uint16{53, 2222},
					Read: []string{"/etc", m.run},
				},
				"receiver": {
					UID: 903, Caps: []uintptr{unix.CAP_NET_BIND_SERVICE}, Network: confine.TCPPorts, Bind: []uint16{22},
					Read:  []string{m.run, m.media, m.state + "/log", "/proc/sys/net/core"},
					Write: []string{m.run + "/receiver"},
				},
				"deadman": {
					UID: 904, Network: confine.NoNetwork,
					Read:  []string{m.run, "/proc/sys/kernel/random"},
					Write: []string{m.run + "/deadman", m.state + "/deadman"},
				},
				"mail": {
					UID: 905, Network: confine.TCPPorts, Connect: []uint16{53, 587},
					Read:  []string{m.run, "/etc", m.state + "/deadman/outbox"},
					Write: []string{m.run + "/mail", m.state + "/mail"},
				},
			}
			if diff := cmp.Diff(want, profilesOf(t, m.paths, m.firmware)); diff != "" {
				t.Errorf("a part may do something else than it did (- promised, + now):\n%s", diff)
			}
		})
	}
}

// reaches says whether a rule on folder covers path, or lies below it.
func reaches(folder, path string) bool {
	below := func(a, b string) bool { return a == b || b == "/" || strings.HasPrefix(a, b+"/") }
	return below(path, folder) || below(folder, path)
}

// TestConfinementRules are the reasons for the table: what must hold of it
// however it is rearranged.
func TestConfinementRules(t *testing.T) {
	for mode, paths := range map[string]part.Paths{"firmware": part.FirmwarePaths(), "service": part.ServicePaths()} {
		profiles := profilesOf(t, paths, mode == "firmware")
		root := []string{part.Disk, part.Unlock, part.Consent}
		users := map[uint32]string{}
		for name, p := range profiles {
			fail := func(what string) { t.Errorf("%s, %s: %s", mode, name, what) }
			isRoot := slices.Contains(root, name)
			if (p.UID == 0) != isRoot {
				fail("only the parts that mount and map, and their children, are root")
			}
			if other, taken := users[p.UID]; taken && !isRoot {
				fail("shares its user with " + other)
			}
			users[p.UID] = name
			if len(p.Groups) > 0 {
				fail("is in another part's group")
			}
			if name != part.Disk && (p.Mounts || p.Exec) {
				fail("only the disk part mounts, and only it starts programs")
			}
			if name == part.Consent && (!slices.Equal(p.Caps, []uintptr{unix.CAP_IPC_LOCK}) || len(p.Write) > 0) {
				fail("it asks, and does nothing")
			}
			if name != part.Network && p.Clock {
				fail("only the network part sets the clock")
			}
			if name != part.Unlock && len(p.Devices) > 0 {
				fail("only the unlocking child steers devices")
			}
			// Who reads and judges what comes from outside speaks to nobody.
			isolated := p.Attr().Cloneflags&unix.CLONE_NEWNET != 0
			if wanted := name == part.Keeper || name == part.Deadman; isolated != wanted {
				fail("its network namespace is not what it was")
			}
			if p.Network == confine.NoNetwork && len(p.Bind)+len(p.Connect) > 0 {
				fail("has ports without a network")
			}
			for _, folder := range p.Write {
				if reaches(folder, paths.Media) && name != part.Keeper {
					fail("writes to the disk: " + folder)
				}
				for other := range profiles {
					if other == name {
						continue
					}
					for _, theirs := range []string{paths.RunDir(other), paths.StateDir(other)} {
						if reaches(folder, theirs) {
							fail("writes to " + theirs + ", which belongs to " + other)
						}
					}
				}
				if reaches(folder, paths.State+"/log") || reaches(folder, paths.Boot()) {
					fail("writes what the supervisor says: " + folder)
				}
			}
			// The disk's content is for the part that writes it and the one that shows it.
			for _, folder := range p.Read {
				if reaches(folder, paths.Media) && name != part.Receiver {
					fail("reads the disk: " + folder)
				}
			}
		}
		if got, want := slices.Sorted(maps.Keys(profiles)), []string{"consent", "deadman", "disk", "keeper", "mail", "network", "receiver", "unlock"}; !slices.Equal(got, want) {
			t.Errorf("%s: the parts are %v, want %v", mode, got, want)
		}
		if got, want := profiles[part.Receiver].Write, []string{paths.RunDir(part.Receiver)}; !slices.Equal(got, want) {
			t.Errorf("%s: the receiver writes to %v, want %v", mode, got, want)
		}
	}
}

// What lies in a part's folders belongs to that part's user: Landlock is the
// second wall, not the first.
func TestFoldersAreTheirOwnersOnly(t *testing.T) {
	paths := part.FirmwarePaths()
	profiles := profilesOf(t, paths, true)
	owner := map[string]int{}
	for _, f := range folders(paths) {
		owner[f.path] = f.uid
	}
	for name, p := range profiles {
		for _, folder := range p.Write {
			uid, listed := owner[folder]
			switch {
			case folder == paths.Media: // its top belongs to root; the mounted disk to the keeper
				if uid != 0 {
					t.Errorf("%s belongs to %d before the disk is mounted", folder, uid)
				}
			case !listed || uid != int(p.UID):
				t.Errorf("%s writes to %s, which belongs to %d", name, folder, uid)
			}
		}
	}
}
