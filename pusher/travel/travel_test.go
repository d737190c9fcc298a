package travel

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"farkeep/shared/pushwire"
	"farkeep/shared/settings"
	"farkeep/shared/site"
)

const (
	disk   = "0b6e1f5c-8d1b-4c52-9a57-6a2f0c9d3e11"
	header = "5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a"
)

// good are the facts of an appliance that is ready, on a phone's hotspot.
func good() Facts {
	now := time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	s := &site.Site{
		VPN:        site.VPN{Network: netip.MustParsePrefix("10.77.0.0/24")},
		KeyServers: []site.KeyServer{{Name: "borg", Address: "10.77.0.1:4022"}},
		Appliances: []site.Appliance{{Name: "attic", LUKS: disk, VPNKey: "key", Relay: settings.Relay{Driver: "gpio"}}},
		Bundle:     site.Bundle{Created: now.AddDate(0, -1, 0), Drilled: now.AddDate(0, -1, 0), Disks: []site.BundleDisk{{LUKS: disk, Header: header}}},
	}
	return Facts{
		Site: s, Appliance: &s.Appliances[0], Now: now, KeyServers: map[string]error{"borg": nil},
		Here: []netip.Prefix{netip.MustParsePrefix("127.0.0.1/8"), netip.MustParsePrefix("192.168.1.10/24"), netip.MustParsePrefix("10.77.0.1/24"), netip.MustParsePrefix("fe80::1/64")},
		Status: &pushwire.Status{
			Version: "v1", Time: now.Add(time.Second), Started: now.Add(-time.Hour), ClockSet: true, MailSent: now.Add(-time.Hour),
			Disk:         pushwire.DiskState{State: "off", Since: now.Add(-time.Minute), HeaderDigest: header},
			Repositories: []pushwire.RepositoryStatus{{Name: "old", ConfirmedAt: now.AddDate(0, -1, 0)}, {Name: "photos", ConfirmedAt: now.Add(-2 * time.Hour)}},
			VPN:          &pushwire.VPNState{Addresses: []string{"172.20.10.4/28", "10.77.0.2/32", "fe80::2/64"}, Endpoint: "203.0.113.7:51820", LastHandshake: now.Add(-time.Minute)},
		},
	}
}

func TestList(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(f *Facts)
		bad    string // the items that are not in order
		says   string
	}{
		{"ready", func(*Facts) {}, "", ""},
		{"silent", func(f *Facts) { f.Status, f.Silence = nil, errors.New("no route to host") }, "answers vpn foreign network clock disk relay mail alarms", "no route to host"},
		{"old handshake", func(f *Facts) { f.Status.VPN.LastHandshake = f.Now.Add(-time.Hour) }, "vpn", "10:59|11:00"},
		{"no handshake", func(f *Facts) { f.Status.VPN.LastHandshake = time.Time{} }, "vpn", "nothing of a handshake"},
		{"an older appliance", func(f *Facts) { f.Status.VPN = nil }, "vpn foreign network", "does not say"},
		{"at home, by the LAN", func(f *Facts) { f.Status.VPN.Endpoint = "192.168.1.10:51820" }, "foreign network", "inside of a house"},
		{"at home, around the router", func(f *Facts) { f.Status.VPN.Addresses[0] = "192.168.1.77/24" }, "foreign network", "192.168.1.77"},
		{"by IPv6 of its own house", func(f *Facts) { f.Status.VPN.Endpoint = "[fd00::1]:51820" }, "foreign network", "inside of a house"},
		{"by IPv6", func(f *Facts) { f.Status.VPN.Endpoint = "[2001:db8::1]:51820" }, "", ""},
		{"an endpoint that is none", func(f *Facts) { f.Status.VPN.Endpoint = "home" }, "foreign network", "how it reaches home"},
		{"a VPN of its own", func(f *Facts) { f.Appliance.VPNKey, f.Status.VPN.Endpoint = "", "" }, "", ""},
		{"service mode", func(f *Facts) {
			f.Appliance.Board, f.Status.VPN.Endpoint, f.Status.VPN.LastHandshake = "service", "", time.Time{}
		}, "", ""},
		{"no clock", func(f *Facts) { f.Status.ClockSet = false }, "clock", "not set"},
		{"wrong clock", func(f *Facts) { f.Status.Time = f.Now.Add(time.Hour); f.Status.VPN.LastHandshake = f.Status.Time }, "clock", "1h0m0s"},
		{"key server dead", func(f *Facts) { f.KeyServers["borg"] = errors.New("refused") }, "key server borg", "refused"},
		{"key server not tried", func(f *Facts) { f.KeyServers = nil }, "key server borg", "10.77.0.1:4022"},
		{"no key server", func(f *Facts) { f.Site.KeyServers = nil }, "key server", "has none"},
		{"nothing pushed", func(f *Facts) { f.Status.Repositories = nil }, "disk", "48 hours"},
		{"not lately", func(f *Facts) { f.Status.Repositories = f.Status.Repositories[:1] }, "disk", "48 hours"},
		{"disk error", func(f *Facts) { f.Status.Disk.Error = "no disk appeared" }, "disk relay", "no disk appeared"},
		{"refused", func(f *Facts) { f.Status.Disk.RefusedBy = []string{"borg"} }, "disk", "stays dark"},
		{"disk open", func(f *Facts) { f.Status.Disk.State, f.Status.Disk.Power = "mounted", true }, "relay", "has power now"},
		{"no relay", func(f *Facts) { f.Appliance.Relay.Driver, f.Status.Disk.State = "none", "powered" }, "", ""},
		{"mail stuck", func(f *Facts) { f.Status.MailQueued, f.Status.MailError = 2, "535 password" }, "mail", "535 password"},
		{"mail waits", func(f *Facts) { f.Status.MailQueued = 1 }, "mail", "1 wait"},
		{"no mail ever", func(f *Facts) { f.Status.MailSent = time.Time{} }, "mail", "35 days"},
		{"no bundle", func(f *Facts) { f.Site.Bundle = site.Bundle{} }, "bundle drill", "there is no bundle"},
		{"another header", func(f *Facts) { f.Status.Disk.HeaderDigest = strings.Repeat("00", 32) }, "bundle", "another header"},
		{"never drilled", func(f *Facts) { f.Site.Bundle.Drilled = time.Time{} }, "drill", "never"},
		{"drilled long ago", func(f *Facts) { f.Site.Bundle.Drilled = f.Now.AddDate(-2, 0, 0) }, "drill", "2024"},
		{"an alarm", func(f *Facts) { f.Status.Alarms = []pushwire.Alarm{{Kind: "x", Subject: "the disk is full"}} }, "alarms", "the disk is full"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := good()
			tc.change(&f)
			items := List(f)
			var bad, said []string
			for _, i := range items {
				if !i.OK {
					bad, said = append(bad, i.Name), append(said, i.Says)
				}
				if i.Says == "" || i.OK != (i.Do == "") {
					t.Errorf("%+v", i)
				}
			}
			if got := strings.Join(bad, " "); got != tc.bad || Ready(items) != (tc.bad == "") {
				t.Errorf("not in order: %q, want %q", got, tc.bad)
			}
			if tc.says != "" && !slices.ContainsFunc(strings.Split(tc.says, "|"), func(s string) bool { return strings.Contains(strings.Join(said, "\n"), s) }) {
				t.Errorf("it says %q", said)
			}
		})
	}
	if Ready(nil) {
		t.Error("an empty list is no list")
	}
}
