package site_test

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

	"farkeep/shared/identity"
	"farkeep/shared/settings"
	"farkeep/shared/site"
	"farkeep/shared/tomlfile"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

const disk = "0b6e1f5c-8d1b-4c52-9a57-6a2f0c9d3e11"

func good(t testing.TB) string {
	t.Helper()
	text, err := os.ReadFile("testdata/good.toml")
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func parse(t testing.TB, text string) *site.Document {
	t.Helper()
	d, err := site.ParseDocument("site.toml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// same compares what two sites say.
func same(a, b *site.Site) string {
	return cmp.Diff(a, b, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{}))
}

// another makes an appliance with keys of its own.
func another(t testing.TB, name, address string) site.Appliance {
	t.Helper()
	a := site.Appliance{Name: name, Board: "pi3"}
	if err := a.VPNAddress.UnmarshalText([]byte(address)); err != nil {
		t.Fatal(err)
	}
	var err [3]error
	_, a.HostKey, err[0] = identity.New(name)
	_, a.ClientKey, err[1] = identity.New(name)
	_, a.VPNKey, err[2] = identity.NewWireGuard()
	if err := errors.Join(err[:]...); err != nil {
		t.Fatal(err)
	}
	a.SetDefaults()
	return a
}

func TestReadFillsInDefaults(t *testing.T) {
	path := filepath.Join(t.TempDir(), "site.toml")
	if err := os.WriteFile(path, []byte(good(t)), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := site.Read(path)
	if err != nil {
		t.Fatal(err)
	}
	a, ok := s.Appliance("attic")
	if !ok || a.Address != "10.77.0.2:22" || !cmp.Equal(a.KeyPolicy, site.KeyPolicy{Source: "vpn", KeysPerDay: 10, Approval: "after-absence", Absence: settings.Duration(96 * time.Hour), Token: "required", Lease: settings.Duration(24 * time.Hour), Place: "none"}) {
		t.Errorf("attic: %+v", a)
	}
	if s.VPN.ListenPort != 51820 || s.Push.WakeWait.Std() != 10*time.Minute || s.Push.LockWait.Std() != 2*time.Hour || s.Mail.TLS != "implicit" || s.DeadMan != settings.DefaultDeadMan() {
		t.Errorf("defaults: %+v", s)
	}
	if _, ok := s.Appliance("shed"); ok {
		t.Error("an appliance that is not there was found")
	}
	if _, err := site.Read(filepath.Join(t.TempDir(), "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that does not exist: %v", err)
	}
}

func TestNewDocumentReadsBack(t *testing.T) {
	s := parse(t, good(t)).Site()
	d, err := site.NewDocument(s)
	if err != nil {
		t.Fatal(err)
	}
	if diff := same(s, d.Site()); diff != "" {
		t.Errorf("-given +read:\n%s", diff)
	}
	if !strings.HasPrefix(string(d.Text()), "# site.toml: the site home") {
		t.Errorf("no comment at the top: %.80s", d.Text())
	}
}

func TestWithoutAVPNOfOurs(t *testing.T) {
	text := regexp.MustCompile(`(?s)\[vpn\].*?\n\n`).ReplaceAllString(good(t), "")
	text = regexp.MustCompile(`(?m)^vpn_(address|key) = .*\n`).ReplaceAllString(text, "")
	text = strings.NewReplacer(`board = "pi4"`, "board = \"service\"\naddress = \"nas.example.ts.net:2222\"", `source = "vpn"`, `source = "any"`).Replace(text)
	d := parse(t, text)
	again, err := site.NewDocument(d.Site())
	if err != nil {
		t.Fatal(err)
	}
	if diff := same(d.Site(), again.Site()); diff != "" {
		t.Errorf("-given +read:\n%s", diff)
	}
}

func TestAddKeepsWhatAPersonWrote(t *testing.T) {
	for name, text := range map[string]string{
		"unix": good(t), "windows": strings.ReplaceAll(good(t), "\n", "\r\n"), "no newline at the end": strings.TrimSpace(good(t)),
	} {
		t.Run(name, func(t *testing.T) {
			d := parse(t, text)
			shed := another(t, "shed", "10.77.0.3")
			_, hostKey, err := identity.New("second")
			if err != nil {
				t.Fatal(err)
			}
			for _, err := range []error{
				d.AddAppliance(shed),
				d.AddKeyServer(site.KeyServer{Name: "second", Address: "192.168.1.7:4022", HostKey: hostKey}),
				d.AddRepository(site.Repository{Name: "docs", Path: `/srv/"docs" \ more`}),
				d.AddFolder(site.Folder{Path: "/srv/x", Prefix: "x-", Exclude: []string{"a b"}, Mount: "/srv"}),
				d.AddDirectory(site.Directory{Name: "seed", Path: "/mnt/seed"}),
			} {
				if err != nil {
					t.Fatal(err)
				}
			}
			if !strings.HasPrefix(string(d.Text()), strings.TrimRight(text, "\r\n")) {
				t.Error("what was there before has changed")
			}
			if name == "windows" && strings.Contains(strings.ReplaceAll(string(d.Text()), "\r\n", ""), "\n") {
				t.Error("two kinds of line end")
			}
			s := d.Site()
			if got, ok := s.Appliance("shed"); !ok || cmp.Diff(shed, *got, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})) != "" {
				t.Errorf("shed: %+v", got)
			}
			if len(s.KeyServers) != 2 || s.Repositories[1].Path != `/srv/"docs" \ more` || s.Folders[1].Exclude[0] != "a b" || s.Directories[1].Name != "seed" {
				t.Errorf("added: %+v", s)
			}
		})
	}
}

func TestARefusedChangeChangesNothing(t *testing.T) {
	d := parse(t, good(t))
	if err := d.AddAppliance(another(t, "attic", "10.77.0.3")); err == nil {
		t.Error("a second attic")
	}
	if err := d.AddAppliance(another(t, "shed", "10.77.0.2")); err == nil || !strings.Contains(err.Error(), "attic has it already") {
		t.Errorf("attic's address twice: %v", err)
	}
	if err := d.AddRepository(site.Repository{Name: "photos", Path: "/x"}); err == nil {
		t.Error("a second photos")
	}
	if err := d.SetLUKS("shed", disk); err == nil {
		t.Error("the disk of nobody")
	}
	if err := d.SetLUKS("attic", "x"); err == nil {
		t.Error("a disk called x")
	}
	if string(d.Text()) != good(t) {
		t.Error("the document has changed")
	}
}

// TestSetOfAppliance: what a command learns about an appliance goes into its entry,
// and nothing else there changes.
func TestSetOfAppliance(t *testing.T) {
	const disk, other = "0b2b2f8e-4c3a-4f6e-9d57-3f1f6a1b2c3d", "1b2b2f8e-4c3a-4f6e-9d57-3f1f6a1b2c3d"
	d := parse(t, good(t))
	name := d.Site().Appliances[0].Name
	fingerprint := strings.Repeat("5a", 32)
	if err := d.SetLUKS(name, disk); err != nil {
		t.Fatal(err)
	}
	before := string(d.Text())
	for range 2 {
		if err := d.SetLUKSHeader(name, fingerprint); err != nil {
			t.Fatal(err)
		}
	}
	if a := d.Site().Appliances[0]; a.LUKSHeader != fingerprint || a.LUKS != disk {
		t.Errorf("%+v", a)
	}
	line := "luks_header = \"" + fingerprint + "\"\n"
	if got := string(d.Text()); strings.Replace(got, line, "", 1) != before || !strings.Contains(got, disk+"\"\n"+line) {
		t.Errorf("the text is now\n%s", got)
	}
	// Another disk has another header.
	if err := d.SetLUKS(name, other); err != nil || d.Site().Appliances[0].LUKSHeader != "" {
		t.Errorf("%v, %+v", err, d.Site().Appliances[0])
	}
	key := d.Site().KeyServers[0].HostKey
	old := d.Site().Appliances[0]
	if err := d.SetIdentity(name, "", key, ""); err != nil {
		t.Fatal(err)
	}
	if a := d.Site().Appliances[0]; a.ClientKey != key || a.HostKey != old.HostKey || a.VPNKey != old.VPNKey {
		t.Errorf("%+v", a)
	}
	text := string(d.Text())
	if err := d.SetIdentity(name, key, "nonsense", ""); err == nil || string(d.Text()) != text {
		t.Errorf("half an identity: %v", err)
	}
	if err := d.SetLUKSHeader(name, "short"); err == nil {
		t.Error("a fingerprint of five letters")
	}
	if err := d.SetLUKSHeader("nowhere", fingerprint); err == nil {
		t.Error("an appliance that is not there")
	}
}

func TestSetLUKS(t *testing.T) {
	plain := good(t)
	shed := parse(t, plain)
	if err := shed.AddAppliance(another(t, "shed", "10.77.0.3")); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"as it is":      plain,
		"two":           string(shed.Text()),
		"with comment":  strings.Replace(plain, `luks_uuid = ""`, `luks_uuid = "" # not yet`, 1),
		"with spaces":   strings.Replace(plain, `luks_uuid = ""`, `   luks_uuid=''`, 1),
		"without a key": strings.Replace(plain, "luks_uuid = \"\"\n", "", 1),
		"windows":       strings.ReplaceAll(plain, "\n", "\r\n"),
	} {
		t.Run(name, func(t *testing.T) {
			d := parse(t, text)
			before := d.Site()
			for _, uuid := range []string{disk, disk, strings.Replace(disk, "0b", "0c", 1)} {
				if err := d.SetLUKS("attic", uuid); err != nil {
					t.Fatal(err)
				}
				a, _ := d.Site().Appliance("attic")
				if a.LUKS != uuid {
					t.Errorf("the disk is %q", a.LUKS)
				}
			}
			if len(d.Site().Appliances) > 1 && d.Site().Appliances[1].LUKS != "" {
				t.Error("the other appliance has a disk now")
			}
			if strings.Count(string(d.Text()), "\n")-strings.Count(text, "\n") > 1 || len(before.Appliances) != len(d.Site().Appliances) {
				t.Error("more than one line has changed")
			}
			if !strings.Contains(string(d.Text()), "# at the parents'") {
				t.Error("a comment is gone")
			}
		})
	}
	// Written in a way that no line editor should touch: nothing is changed.
	odd := strings.Replace(plain, "[[appliance]]", "[[ appliance ]]", 1)
	odd = strings.Replace(odd, `luks_uuid = ""`, `"luks_uuid" = """
"""`, 1)
	d, err := site.ParseDocument("site.toml", []byte(odd))
	if err != nil {
		return // a newline is no UUID: such a file is refused from the start
	}
	if err := d.SetLUKS("attic", disk); err == nil {
		a, _ := d.Site().Appliance("attic")
		if a.LUKS != disk {
			t.Errorf("the disk is %q", a.LUKS)
		}
	}
}

func TestFreeAddress(t *testing.T) {
	d := parse(t, good(t))
	for i, want := range []string{"10.77.0.3", "10.77.0.4"} {
		a, err := d.Site().FreeAddress()
		if err != nil || a.String() != want {
			t.Fatalf("got %v, %v; want %s", a, err, want)
		}
		if err := d.AddAppliance(another(t, fmt.Sprint("x", i), want)); err != nil {
			t.Fatal(err)
		}
	}
	small := strings.NewReplacer("10.77.0.0/24", "10.77.0.0/30").Replace(good(t))
	if a, err := parse(t, small).Site().FreeAddress(); err == nil {
		t.Errorf("%v is free in a network of two", a)
	}
}

func TestMistakes(t *testing.T) {
	// Each replaces the first match of a pattern; the error must name the line of the mark "¶".
	tests := []struct{ name, pattern, replacement, want string }{
		{"unknown key", `rate_limit`, "¶ratelimit", "push.ratelimit: unknown key"},
		{"unknown table", `\[push\]`, "¶[pushed]", "pushed: unknown key"},
		{"name", `name = "home"`, `¶name = "My Home"`, `name: "My Home" is not a name`},
		{"network", `network = ".*"`, `¶network = "10.77.0.1/24"`, "vpn.network: 10.77.0.1/24 is an address in a network: write 10.77.0.0/24"},
		{"no network", `network = ".*"\n`, "", "vpn.network: the network of the VPN is missing"},
		{"no endpoint", `endpoints = .*`, `¶endpoints = []`, "vpn.endpoints: 1 to 16"},
		{"endpoint", `endpoints = .*`, `¶endpoints = ["home"]`, `"home" is not host:port`},
		{"port", `\[vpn\]`, "[vpn]\n¶listen_port = 70000", "vpn.listen_port"},
		{"home's name", `name = "borg"`, `¶name = "Borg"`, "home.name"},
		{"home's address", `vpn_address = "10.77.0.1"`, `¶vpn_address = "10.78.0.1"`, "home.vpn_address: 10.78.0.1 is no address of 10.77.0.0/24"},
		{"network's address", `vpn_address = "10.77.0.1"`, `¶vpn_address = "10.77.0.0"`, "home.vpn_address"},
		{"broadcast", `vpn_address = "10.77.0.1"`, `¶vpn_address = "10.77.0.255"`, "home.vpn_address"},
		{"home's key", `vpn_key = "u.*"`, `¶vpn_key = "AAAA"`, "home.vpn_key: this is not a WireGuard key"},
		{"push key", `push_key = ".*"`, `¶push_key = "AAAA"`, "home.push_key: this is not an SSH public key"},
		{"admin key", `admin_key = ".*"`, `¶admin_key = "AAAA"`, "operator.admin_key"},
		{"admin key is home's", `admin_key = ".*"`, `¶admin_key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAINpSGbeBE10MJpyaOatCsh3L8VdLpJTc0uj0eOUzqD/c"`, "operator.admin_key: this is home's push key"},
		{"restore key is admin's", `restore_key = ".*"`, `¶restore_key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIINbO8gRo02yVw990ZteDcNbRlwDTNUSfOJfh6M6L3Ad"`, "operator.restore_key: this is the admin key"},
		{"no key server", `(?s)\[\[key_server\]\].*?\n\n`, "", "key_server.name: 1 to 16 key servers are needed, 0 are named"},
		{"key server's address", `address = "10.77.0.1:4022"`, `¶address = "10.77.0.1"`, "key_server.address"},
		{"key server's host key", `host_key = ".*server borg"`, `¶host_key = "x"`, "key_server.host_key"},
		{"key server's place", `address = "10.77.0.1:4022"`, "address = \"10.77.0.1:4022\"\n¶place = \"home\"", `key_server.place: "home" is none of others (ask the other key servers where appliances are), none (judge no places)`},
		{"nobody sees places", `address = "10.77.0.1:4022"`, "address = \"10.77.0.1:4022\"\n¶place = \"others\"", "key_server.place: no other key server sees places itself"},
		{"appliance's name", `name = "attic"`, `¶name = "../attic"`, "appliance.name"},
		{"board", `board = "pi4"`, `¶board = "pi5"`, `appliance.board: "pi5" is not a board: one of pi3, pi4`},
		{"home's address taken", `vpn_address = "10.77.0.2"`, `¶vpn_address = "10.77.0.1"`, "appliance.vpn_address: home has it already"},
		{"foreign address", `vpn_address = "10.77.0.2"`, `¶vpn_address = "10.1.0.2"`, "appliance.vpn_address: 10.1.0.2 is no address of"},
		{"appliance's key", `vpn_key = "L.*"`, `¶vpn_key = ""`, "appliance.vpn_key"},
		{"home's key twice", `vpn_key = "L.*"`, `¶vpn_key = "uLoNi33NtkJDyUSpUrTSJVvI9t2o8oiiNNF6wOHetEY="`, "appliance.vpn_key: home has it already"},
		{"address", `board = "pi4"`, "board = \"pi4\"\n¶address = 'attic'", "appliance.address"},
		{"host key", `host_key = ".*attic"`, `¶host_key = "x"`, "appliance.host_key"},
		{"client key", `client_key = ".*"`, `¶client_key = "x"`, "appliance.client_key"},
		{"disk", `luks_uuid = ""`, `¶luks_uuid = "/dev/sda"`, "appliance.luks_uuid: \"/dev/sda\" is not a LUKS UUID"},
		{"relay", `line = 17`, `¶line = 99`, "appliance.relay.line: 99 is not a GPIO line"},
		{"relay driver", `driver = "gpio"`, `¶driver = "usb"`, "appliance.relay.driver"},
		{"window", `length = "4h"`, `¶length = "2d"`, "appliance.window.length: 48h is longer than a day"},
		{"policy's source", `source = "vpn"`, `¶source = "lan"`, "appliance.key_policy.source"},
		{"policy's approval", `keys_per_day = 10`, `¶approval = "sometimes"`, "appliance.key_policy.approval"},
		{"policy's absence", `keys_per_day = 10`, `¶absence = "59m"`, "appliance.key_policy.absence"},
		{"policy's lease", `keys_per_day = 10`, `¶lease = "31d"`, "appliance.key_policy.lease"},
		{"policy's short lease", `keys_per_day = 10`, `¶lease = "59s"`, "appliance.key_policy.lease"},
		{"policy's token", `keys_per_day = 10`, `¶token = "maybe"`, "appliance.key_policy.token"},
		{"policy's place", `keys_per_day = 10`, `¶place = "openvpn"`, "appliance.key_policy.place"},
		{"policy's window", `keys_per_day = 10`, `¶windows = ["22-06"]`, "appliance.key_policy.windows"},
		{"policy's empty window", `keys_per_day = 10`, `¶windows = ["22:00-22:00"]`, "appliance.key_policy.windows"},
		{"policy's many windows", `keys_per_day = 10`, `¶windows = [` + strings.Repeat(`"01:00-02:00", `, 17) + `]`, "appliance.key_policy.windows"},
		{"a disk's header", `luks_uuid = ""`, `¶luks_header = "abc"`, "appliance.luks_header"},
		{"policy's rate", `keys_per_day = 10`, `¶keys_per_day = -1`, "appliance.key_policy.keys_per_day"},
		{"repository's name", `name = "photos"`, `¶name = "photos*"`, "repository.name"},
		{"repository's path", `path = "/srv/borg/photos"`, `¶path = "photos"`, "repository.path"},
		{"path with dots", `path = "/srv/borg/photos"`, `¶path = "/srv/../etc"`, "repository.path: \"/srv/../etc\" is not a plain absolute path"},
		{"mount", `mount = "/srv/borg"`, `¶mount = "srv"`, "repository.mount"},
		{"folder's path twice", `path = "/srv/more"`, `¶path = "/srv/borg/photos"`, "repository_folder.path: photos has it already"},
		{"exclude", `exclude = .*`, `¶exclude = ["a/b"]`, "repository_folder.exclude"},
		{"prefix", `exclude = .*`, `¶prefix = "a/"`, "repository_folder.prefix"},
		{"directory's name", `name = "nas"`, `¶name = "attic"`, "directory_target.name: an appliance has it already"},
		{"directory's path", `path = "/mnt/nas/farkeep"`, `¶path = "nas"`, "directory_target.path"},
		{"rate", `rate_limit = \d+`, `¶rate_limit = -1`, "push.rate_limit"},
		{"reread", `reread_every = "60d"`, `¶reread_every = "1d"`, "push.reread_every"},
		{"rate at night", `rate_limit = 0`, `¶rate_limit = -1`, "push.rate.rate_limit"},
		{"no hours", `\[\[push.rate\]\]\nhours = .*`, `¶[[push.rate]]`, "push.rate.hours"},
		{"hours", `hours = "22:00-05:00"`, `¶hours = "22-5"`, "22-5"},
		{"span", `lock_wait = "2h"`, `¶lock_wait = "two hours"`, "is not a time span"},
		{"heartbeat", `heartbeat_age = "30h"`, `¶heartbeat_age = "0s"`, "dead_man.heartbeat_age"},
		{"history", `monthly = 12`, `¶monthly = -2`, "history.monthly: -2 is not between"},
		{"repository's history", `vanish_percent = 1`, `¶vanish_percent = 900`, "history.repository.vanish_percent: 900 is not between"},
		{"clock", `\[push\]`, "[clock]\n¶servers = ['']\n[push]", "clock.servers"},
		{"no mail server", `server = "smtp.*"\n`, "", "mail.server: the mail server is missing"},
		{"mail server", `server = "smtp.*"`, `¶server = "smtp"`, "mail.server"},
		{"mail in clear", `server = "smtp.*"`, "server = 'smtp.example.net:25'\n¶tls = 'none'", "mail.tls"},
		{"sender", `from = ".*"`, `¶from = "attic"`, "mail.from"},
		{"recipient", `to = .*`, `¶to = ["x"]`, "mail.to"},
		{"no recipient", `to = .*`, `¶to = []`, "mail.to"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			base := good(t)
			re := regexp.MustCompile(tt.pattern)
			where := re.FindStringIndex(base)
			if where == nil {
				t.Fatalf("the fixture has no %q", tt.pattern)
			}
			text := base[:where[0]] + tt.replacement + base[where[1]:]
			line := 0
			if before, after, marked := strings.Cut(text, "¶"); marked {
				text, line = before+after, strings.Count(before, "\n")+1
			}
			_, err := site.Parse("site.toml", []byte(text))
			var mistake *tomlfile.Error
			if !errors.As(err, &mistake) || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("got %v; want it to contain %q", err, tt.want)
			}
			if line != 0 && mistake.Line != line {
				t.Errorf("%v: named line %d; want %d", err, mistake.Line, line)
			}
		})
	}
}

// TestDocsShowTheFixture keeps the sample in the docs one that works.
func TestDocsShowTheFixture(t *testing.T) {
	docs, err := os.ReadFile("../../docs/site.md")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(docs), "```toml\n"+good(t)+"```") {
		t.Error("docs/site.md does not show testdata/good.toml as it is")
	}
}

func FuzzDocument(f *testing.F) {
	f.Add(good(f))
	f.Add(strings.ReplaceAll(good(f), "\n", "\r\n"))
	f.Add(strings.Replace(good(f), "luks_uuid = \"\"\n", "", 1))
	f.Add(strings.Replace(good(f), "luks_uuid = \"\"", "luks_uuid = '''\n[[appliance]]'''", 1))
	f.Fuzz(func(t *testing.T, text string) {
		d, err := site.ParseDocument("site.toml", []byte(text))
		if err != nil {
			return
		}
		// What is accepted can be written anew and says the same.
		again, err := site.NewDocument(d.Site())
		if err != nil {
			t.Fatalf("accepted, but not written: %v", err)
		}
		if diff := same(d.Site(), again.Site()); diff != "" {
			t.Fatalf("-given +read:\n%s", diff)
		}
		// Recording a disk does that and nothing else, or says that it cannot.
		if len(d.Site().Appliances) == 0 {
			return
		}
		name, want := d.Site().Appliances[0].Name, *d.Site()
		if err := d.SetLUKS(name, disk); err != nil {
			return
		}
		want.Appliances = append([]site.Appliance(nil), want.Appliances...)
		want.Appliances[0].LUKS = disk
		if diff := same(&want, d.Site()); diff != "" {
			t.Fatalf("-wanted +read:\n%s", diff)
		}
	})
}
