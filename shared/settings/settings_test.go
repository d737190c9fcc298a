package settings_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"farkeep/shared/history"
	"farkeep/shared/identity"
	"farkeep/shared/secret"
	"farkeep/shared/settings"
	"farkeep/shared/tomlfile"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// fixture reads a file of testdata and puts keys made for this run where it
// says so: private keys do not belong into a repository, not even test ones.
func fixture(t testing.TB, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	must := func(s string, err error) string {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	ssh := func() (string, string) {
		private, public, err := identity.New("test")
		return must(private.Reveal(), err), public
	}
	host, _ := ssh()
	client, _ := ssh()
	_, p1 := ssh()
	_, p2 := ssh()
	_, p3 := ssh()
	wgPrivate, wgPublic, err := identity.NewWireGuard()
	must("", err)
	psk, err := identity.NewPreshared()
	must("", err)
	return strings.NewReplacer(
		"HOST_KEY", host, "CLIENT_KEY", client,
		"SSH_PUBLIC_KEY_1", p1, "SSH_PUBLIC_KEY_2", p2, "SSH_PUBLIC_KEY_3", p3,
		"VPN_PRIVATE_KEY", wgPrivate.Reveal(), "VPN_PUBLIC_KEY", wgPublic, "VPN_PRESHARED_KEY", psk.Reveal(),
		"MAIL_PASSWORD", "correct horse",
	).Replace(string(text))
}

func parse(t testing.TB, text string) *settings.Appliance {
	t.Helper()
	a, err := settings.Parse("farkeep.toml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestParseFillsInDefaults(t *testing.T) {
	a := parse(t, fixture(t, "good.toml"))
	if a.VPN.Interface != "farkeep0" || a.VPN.Peers[0].Keepalive.Std() != 25*time.Second || a.Receiver.Port != 22 ||
		a.Disk.IdleClose.Std() != 15*time.Minute || a.Mail.TLS != "implicit" {
		t.Errorf("defaults are missing: %+v", a)
	}
	want := settings.DefaultDeadMan()
	if a.DeadMan != want {
		t.Errorf("dead man's switch %+v; want %+v", a.DeadMan, want)
	}
	never := parse(t, strings.Replace(fixture(t, "good.toml"), `unchanged_age = "8d"`, `unchanged_age = "0s"`, 1))
	if never.DeadMan.UnchangedAge != 0 {
		t.Errorf("unchanged_age 0 became %v", never.DeadMan.UnchangedAge)
	}
}

func TestRenderParsesBackToTheSame(t *testing.T) {
	base := fixture(t, "good.toml")
	tests := map[string]func(a *settings.Appliance){
		"as it is": func(*settings.Appliance) {},
		"everything set": func(a *settings.Appliance) {
			other := parse(t, strings.NewReplacer(
				"[disk]", "[network]\ninterface = 'end0'\naddress = '192.168.1.5/24'\ngateway = '192.168.1.1'\nresolvers = ['192.168.1.1', 'fe80::1%eth0']\n[clock]\nservers = ['a', 'b:123']\n[disk]",
			).Replace(base))
			a.Network, a.Clock = other.Network, other.Clock
			a.Mail.RootCA = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
			a.Receiver.Keys[0].QuotaBytes = 1 << 40
			a.Receiver.Keys[0].Repositories = []string{"photos", "docs-*"}
			a.Disk.Relay.Chip = "pinctrl-bcm2711"
		},
		"a history of its own": func(a *settings.Appliance) {
			a.History = settings.History{
				FloorOnly: true, FloorGenerations: 3, WhenFull: history.Thin, RetireAfter: settings.Duration(time.Hour),
				Repositories: []history.Repository{
					{Name: "docs", Within: new(settings.Duration(36 * time.Hour)), Hourly: new(1), Daily: new(0), Weekly: new(2), Monthly: new(-1), Yearly: new(3), FloorOnly: new(false)},
					{Name: "*", FloorGenerations: new(9), FloorAge: new(settings.Duration(0)), ExpirePerDay: new(0), VanishPercent: new(0), ChangePercent: new(100)},
				},
			}
		},
		"text that needs quoting": func(a *settings.Appliance) {
			a.Mail.Password = "\"\\ \t'''# €\x01\x7f\n[mail]"
			a.Mail.User = "a\"b"
			a.Mail.RootCA = "'''\r\n"
		},
		"the system's VPN": func(a *settings.Appliance) {
			a.VPN = settings.VPN{Interface: "tailscale0"}
		},
		"windows line ends in a key": func(a *settings.Appliance) {
			a.Identity.HostKey = secret.Text(strings.ReplaceAll(a.Identity.HostKey.Reveal(), "\n", "\r\n"))
		},
	}
	for name, change := range tests {
		t.Run(name, func(t *testing.T) {
			a := parse(t, base)
			change(a)
			text, err := a.Render()
			if err != nil {
				t.Fatal(err)
			}
			again, err := settings.Parse("again", text.Reveal())
			if err != nil {
				t.Fatalf("%v\n%s", err, text.Reveal())
			}
			if d := cmp.Diff(a, again, cmp.Comparer(func(x, y secret.Text) bool { return x == y }), cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); d != "" {
				t.Errorf("-rendered +read:\n%s", d)
			}
			// A user on Windows: Notepad's byte order mark and line ends.
			windows := "\ufeff" + strings.ReplaceAll(string(text.Reveal()), "\n", "\r\n")
			if _, err := settings.Parse("windows", []byte(windows)); err != nil {
				t.Errorf("as Windows saves it: %v", err)
			}
		})
	}
}

func TestRenderRefusesWhatParseWould(t *testing.T) {
	a := parse(t, fixture(t, "good.toml"))
	a.Disk.LUKS = ""
	if _, err := a.Render(); err == nil || !strings.Contains(err.Error(), "disk.luks_uuid") {
		t.Errorf("without a LUKS UUID: %v", err)
	}
}

func TestSecretsDoNotPrint(t *testing.T) {
	a := parse(t, fixture(t, "good.toml"))
	text, err := a.Render()
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{fmt.Sprintf("%v %+v %#v", a, a, *a), fmt.Sprint(text)} {
		for _, clear := range []string{"PRIVATE KEY", a.VPN.PrivateKey.Reveal(), a.VPN.Peers[0].PresharedKey.Reveal()} {
			if strings.Contains(s, clear) {
				t.Errorf("a secret was printed: %s", s)
			}
		}
	}
}

func TestMistakes(t *testing.T) {
	sealed, _, err := identity.NewSealed("x", secret.New([]byte("pass")))
	if err != nil {
		t.Fatal(err)
	}
	// Each replaces the first match of a pattern; the error must name the line of the mark "¶".
	tests := []struct{ name, pattern, replacement, want string }{
		{"unknown key", `line = 17`, "¶pin = 17", "disk.relay.pin: unknown key"},
		{"unknown table", `\[dead_man\]`, "¶[deadman]", "deadman: unknown key"},
		{"syntax", `line = 17`, "¶line == 17", ""},
		{"wrong type", `line = 17`, `¶line = "17"`, "disk.relay.line"},
		{"name", `name = "attic"`, `¶name = "At tic"`, `name: "At tic" is not a name`},
		{"site", `site = "home"`, `¶site = ""`, `site: "" is not a name`},
		{"host key", `host_key = '''(.|\n)*?'''`, `¶host_key = "x"`, "identity.host_key: this is not an OpenSSH private key"},
		{"sealed client key", `client_key = '''(.|\n)*?'''`, "¶client_key = '''\n" + sealed.Reveal() + "'''", "identity.client_key: the private key is sealed"},
		{"interface", `\[disk\]`, "[network]\n¶interface = 'eth 0'\n[disk]", "network.interface"},
		{"gateway alone", `\[disk\]`, "[network]\n¶gateway = '10.0.0.1'\n[disk]", "network.gateway: a gateway needs a fixed address"},
		{"bad address", `\[disk\]`, "[network]\n¶address = '10.0.0.1'\n[disk]", "network.address"},
		{"clocks", `\[disk\]`, "[clock]\n¶servers = [" + strings.Repeat("'a',", settings.MaxClockServers+1) + "]\n[disk]", "clock.servers: at most 16"},
		{"empty clock", `\[disk\]`, "[clock]\n¶servers = ['']\n[disk]", "clock.servers"},
		{"vpn interface", `\[vpn\]`, "[vpn]\n¶interface = 'a-name-that-is-too-long'", "vpn.interface"},
		{"vpn key", `private_key = ".*"`, `¶private_key = "short"`, "vpn.private_key: this is not a WireGuard key"},
		{"vpn address", `address = "10.77.0.2/24"`, "", "vpn.address: the appliance's address in the VPN is missing"},
		{"vpn port", `\[vpn\]`, "[vpn]\n¶listen_port = 70000", "vpn.listen_port: 70000 is not a port"},
		{"no peer", `(?s)\[\[vpn.peer\]\].*?\n\n`, "", "vpn.peer.public_key: 1 to 16 peers are needed, 0 are named"},
		{"peer name", `(\[\[vpn.peer\]\]\n)name = "home"`, "${1}¶name = 'Home'", "vpn.peer.name"},
		{"peer key", `public_key = "[^s].*"`, `¶public_key = "AAAA"`, "vpn.peer.public_key"},
		{"preshared key", `preshared_key = ".*"`, `¶preshared_key = "AAAA"`, "vpn.peer.preshared_key"},
		{"no endpoint", `endpoints = .*`, `¶endpoints = []`, "vpn.peer.endpoints: 1 to 16"},
		{"bad endpoint", `endpoints = .*`, `¶endpoints = ["home.example.net"]`, `vpn.peer.endpoints: "home.example.net" is not host:port`},
		{"no allowed addresses", `allowed_ips = .*`, `¶allowed_ips = []`, "vpn.peer.allowed_ips"},
		{"keepalive", `allowed_ips`, "¶keepalive = '2h'\nallowed_ips", "vpn.peer.keepalive: 2h is not between"},
		{"no key server", `(?s)\[\[key_server\]\].*?\n\n`, "", "key_server.address: 1 to 16 key servers are needed"},
		{"key server name", `(\[\[key_server\]\]\n)name = "home"`, "${1}¶name = '-'", "key_server.name"},
		{"key server address", `address = "10.77.0.1:4022"`, `¶address = "10.77.0.1:0"`, "key_server.address"},
		{"key server host key", `(?m)^host_key = "ssh.*"`, `¶host_key = "ssh-rsa AAAA"`, "key_server.host_key: this is not an SSH public key"},
		{"no LUKS UUID", `luks_uuid = ".*"`, `¶luks_uuid = ""`, "disk.luks_uuid: \"\" is not a LUKS UUID: farkeep-image disk prints it"},
		{"relay driver", `driver = "gpio"`, `¶driver = "usb"`, "disk.relay.driver"},
		{"relay level", `active = "low"`, `¶active = "on"`, "disk.relay.active"},
		{"relay line", `line = 17`, `¶line = 58`, "disk.relay.line: 58 is not a GPIO line"},
		{"window start", `start = "01:30"`, `¶start = "25:00"`, "is not a time of day"},
		{"window length", `length = "4h"`, `¶length = "25h"`, "disk.window.length: 25h is longer than a day"},
		{"idle close", `\[disk.relay\]`, "¶idle_close = '1ms'\n[disk.relay]", "disk.idle_close"},
		{"receiver port", `\[\[receiver.key\]\]`, "[receiver]\n¶port = -1\n[[receiver.key]]", "receiver.port"},
		{"receiver keys", `\[dead_man\]`, strings.Repeat("[[receiver.key]]\nname = 'x'\n", settings.MaxReceiverKeys) + "[dead_man]", "receiver.key.name: at most 64 keys"},
		{"key name", `name = "operator"`, `¶name = "Operator"`, "receiver.key.name"},
		{"key twice", `(?s)(name = "operator".*?)public_key = "(.*?)( test)?"`, "${1}¶public_key = 'SAME'", "receiver.key.public_key: the same key is authorised twice"},
		{"role", `role = "admin"`, `¶role = "root"`, "receiver.key.role"},
		{"push without repositories", `repositories = .*`, `¶repositories = []`, "receiver.key.repositories: a push key needs"},
		{"repository name", `repositories = .*`, `¶repositories = ["../x"]`, `receiver.key.repositories: "../x"`},
		{"quota", `repositories = .*`, "repositories = ['*']\n¶quota_bytes = -1", "receiver.key.quota_bytes"},
		{"heartbeat age", `heartbeat_age = ".*"`, `¶heartbeat_age = "1ms"`, "dead_man.heartbeat_age"},
		{"negative span", `heartbeat_age = ".*"`, `¶heartbeat_age = "-1h"`, "is not a time span"},
		{"days", `unchanged_age = ".*"`, `¶unchanged_age = "1.5d"`, "is not a time span"},
		{"reminder", `\[dead_man\]`, "[dead_man]\n¶reminder_interval = '0s'", "dead_man.reminder_interval"},
		{"check interval", `\[dead_man\]`, "[dead_man]\n¶check_interval = '0s'", "dead_man.check_interval"},
		{"percent", `\[dead_man\]`, "[dead_man]\n¶disk_full_percent = 101", "dead_man.disk_full_percent"},
		{"within", `within = "10d"`, `¶within = "10 days"`, `"10 days" is not a time span`},
		{"within is endless", `within = "10d"`, `¶within = "36600d"`, "is not a time span"},
		{"weekly", `weekly = 4`, `¶weekly = -2`, "history.weekly: -2 is not between -1 and 10000"},
		{"yearly", `yearly = -1`, `¶yearly = 1000000`, "history.yearly: 1000000 is not between"},
		{"monthly is a text", `monthly = 12`, `¶monthly = "12"`, "history.monthly: a whole number is wanted here"},
		{"no floor", `\[history\]`, "[history]\n¶floor_generations = 0", "history.floor_generations: 0 is not between 1 and 10000"},
		{"floor's age", `\[history\]`, "[history]\n¶floor_age = '20000d'", "history.floor_age: 20000d is not between 1s and 3660d"},
		{"expire per day", `\[history\]`, "[history]\n¶expire_per_day = -1", "history.expire_per_day: -1 is not between 0 and 1000"},
		{"commit interval", `\[history\]`, "[history]\n¶commit_interval = '8d'", "history.commit_interval: 8d is not between 1s and 7d"},
		{"when full", `\[history\]`, "[history]\n¶when_full = 'delete'", `history.when_full: "delete" is neither refuse nor thin`},
		{"retire", `\[history\]`, "[history]\n¶retire_after = '0s'", "history.retire_after: 0s is not between 1s and 366d"},
		{"scrub", `\[history\]`, "[history]\n¶scrub_every = '500d'", "history.scrub_every: 500d is not between"},
		{"vanished", `\[history\]`, "[history]\n¶vanish_percent = 101", "history.vanish_percent: 101 is not between 0 and 100"},
		{"nothing but the floor", `(?s)within = "10d".*?yearly = -1`, "¶within = '0s'\nweekly = 0\nmonthly = 0\nyearly = 0", "history.within: within, hourly, daily, weekly, monthly and yearly are all 0, which keeps nothing but the floor: set one, or write floor_only = true if that is meant"},
		{"floor only, and more", `\[history\]`, "[history]\n¶floor_only = true", "history.floor_only: the policy keeps more than the floor"},
		{"nothing but the floor for one", `monthly = 24`, "¶within = '0s'\nweekly = 0\nmonthly = 0\nyearly = 0", "history.repository.within: within, hourly"},
		{"repository's history without a name", `name = "photos-\*"`, "", `history.repository.name: "" is not a repository name`},
		{"repository's history", `name = "photos-\*"`, `¶name = "../x"`, `history.repository.name: "../x" is not a repository name`},
		{"repository's history twice", `\[dead_man\]`, "[[history.repository]]\n¶name = 'photos-*'\n[dead_man]", `history.repository.name: "photos-*" has a history already`},
		{"repository's scrub", `monthly = 24`, "¶scrub_every = '1d'", "history.repository.scrub_every: unknown key"},
		{"repository's number", `monthly = 24`, "¶monthly = -3", "history.repository.monthly: -3 is not between"},
		{"histories", `\[dead_man\]`, strings.Repeat("[[history.repository]]\nname = 'x'\n", history.MaxRepositories) + "[dead_man]", "history.repository.name: at most 100"},
		{"mail server", `server = ".*"`, `¶server = "smtp.example.net"`, "mail.server"},
		{"mail without encryption", `user = ".*"`, `¶tls = "none"`, "mail.tls"},
		{"sender", `from = ".*"`, `¶from = "Attic <attic@example.net>"`, "mail.from"},
		{"no recipient", `to = .*`, `¶to = []`, "mail.to: 1 to 16"},
		{"recipient", `to = .*`, `¶to = ["me"]`, "mail.to"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			base := fixture(t, "good.toml")
			same := regexp.MustCompile(`(?s)role = "push"\npublic_key = "(\S+ \S+)`).FindStringSubmatch(base)[1]
			re := regexp.MustCompile(tt.pattern)
			where := re.FindStringIndex(base)
			if where == nil {
				t.Fatalf("the fixture has no %q", tt.pattern)
			}
			text := base[:where[0]] + re.ReplaceAllString(base[where[0]:where[1]], tt.replacement) + base[where[1]:]
			text = strings.Replace(text, "SAME", same+" another comment", 1)
			line := 0
			if before, after, marked := strings.Cut(text, "¶"); marked {
				text, line = before+after, strings.Count(before, "\n")+1
			}
			_, err := settings.Parse("farkeep.toml", []byte(text))
			var mistake *tomlfile.Error
			if !errors.As(err, &mistake) || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("got %v; want it to contain %q", err, tt.want)
			}
			if line != 0 && mistake.Line != line {
				t.Errorf("%v: named line %d; want %d", err, mistake.Line, line)
			}
			if strings.Contains(err.Error(), "PRIVATE") || strings.Contains(err.Error(), "\n") {
				t.Errorf("not one clean line: %v", err)
			}
		})
	}
}

// TestDocsShowTheFixtures keeps the samples in the docs ones that work, and the
// mistakes in them ones that are reported as the docs say.
func TestDocsShowTheFixtures(t *testing.T) {
	docs, err := os.ReadFile("../../docs/site.md")
	if err != nil {
		t.Fatal(err)
	}
	shown := func(name string) string {
		t.Helper()
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(docs), "```toml\n"+string(text)+"```") {
			t.Errorf("docs/site.md does not show %s as it is", name)
		}
		return string(text)
	}
	shown("testdata/good.toml")
	bad, err := filepath.Glob("testdata/bad/*.toml")
	if err != nil || len(bad) < 4 {
		t.Fatalf("bad samples: %v, %v", bad, err)
	}
	for _, name := range bad {
		text := shown(name)
		want, _, _ := strings.Cut(strings.TrimPrefix(text, "# "), "\n")
		if _, err := settings.Parse("farkeep.toml", []byte(text)); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%s: got %v; want %s", name, err, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(fixture(f, "good.toml"))
	f.Add("name = 1")
	f.Add("[disk]\nluks_uuid = ''")
	f.Fuzz(func(t *testing.T, text string) {
		a, err := settings.Parse("farkeep.toml", []byte(text))
		if err != nil {
			var mistake *tomlfile.Error
			if !errors.As(err, &mistake) {
				t.Fatalf("%T: %v", err, err)
			}
			return
		}
		// What an appliance accepts, we can write, and it accepts that again.
		if _, err := a.Render(); err != nil {
			t.Fatalf("accepted, but not rendered: %v", err)
		}
	})
}
