package siteinit_test

import (
	"bytes"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"farkeep/image/siteinit"
	"farkeep/shared/hint"
	"farkeep/shared/identity"
	"farkeep/shared/secret"
	"farkeep/shared/settings"
	"farkeep/shared/site"

	"golang.org/x/sys/unix"
)

const (
	disk       = "0b6e1f5c-8d1b-4c52-9a57-6a2f0c9d3e11"
	passphrase = "four words and more"
)

func options() siteinit.Options {
	return siteinit.Options{
		Name: "home", HomeName: "borg", Network: netip.MustParsePrefix("10.77.0.0/24"),
		Endpoints:  []string{"home.example.net:51820", "192.168.1.10:51820"},
		MailServer: "smtp.example.net:465", MailUser: "attic@example.net", MailFrom: "attic@example.net", MailTo: []string{"me@example.net"},
		MailPassword:    "correct horse",
		AdminPassphrase: func() (secret.Bytes, error) { return secret.New([]byte(passphrase)), nil },
	}
}

// model is a site with two appliances, of which attic's disk is known: its
// files, made once because the admin key's sealing is slow on purpose.
var model = sync.OnceValues(func() (map[string]string, error) {
	dir, err := os.MkdirTemp("", "siteinit")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	d, _, err := siteinit.Init(filepath.Join(dir, "site"), options())
	if err != nil {
		return nil, err
	}
	_, one := d.AddAppliance(siteinit.NewAppliance{Name: "attic", Board: "pi4", Relay: settings.Relay{Driver: "gpio", Line: 17, Active: "low"}, Window: settings.Window{Length: settings.Duration(4 * time.Hour)}})
	_, two := d.AddAppliance(siteinit.NewAppliance{Name: "shed", Board: "pi3"})
	_, three := d.AddRepository(site.Repository{Name: "photos", Path: "/srv/photos"})
	if err := errors.Join(one, two, three, d.SetLUKS("attic", disk)); err != nil {
		return nil, err
	}
	return snapshot(d.Path())
})

// complete is a copy of model.
func complete(t *testing.T) *siteinit.Dir {
	t.Helper()
	files, err := model()
	check(t, err)
	dir := filepath.Join(t.TempDir(), "site")
	lay(t, dir, files)
	d, err := siteinit.Open(dir)
	check(t, err)
	return d
}

// lay writes files into a folder, as an operator's copy of it would be.
func lay(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	check(t, os.MkdirAll(dir, 0o700))
	for name, text := range files {
		check(t, os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o700))
		mode := fs.FileMode(0o600)
		if base := filepath.Base(name); base == "site.toml" || base == "README.txt" {
			mode = 0o644
		}
		check(t, os.WriteFile(filepath.Join(dir, name), []byte(text), mode))
	}
	for _, k := range []string{"keyserver-borg"} {
		check(t, os.MkdirAll(filepath.Join(dir, k, "keys"), 0o700))
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// snapshot reads a whole folder, name to content.
func snapshot(dir string) (map[string]string, error) {
	files := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		text, err := os.ReadFile(path)
		files[name] = string(text)
		return err
	})
	return files, err
}

func look(t *testing.T, dir string) map[string]string {
	t.Helper()
	files, err := snapshot(dir)
	check(t, err)
	return files
}

func changed(a, b map[string]string) (names []string) {
	for name := range a {
		if a[name] != b[name] {
			names = append(names, name)
		}
	}
	for name := range b {
		if _, ok := a[name]; !ok {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

func TestASecondRunChangesNothing(t *testing.T) {
	d := complete(t)
	before := look(t, d.Path())
	o := options()
	o.AdminPassphrase = nil // nobody is asked again
	_, r, err := siteinit.Init(d.Path(), o)
	check(t, err)
	if len(r.Made)+len(r.Changed) > 0 {
		t.Errorf("made %v, changed %v", r.Made, r.Changed)
	}
	for _, n := range []siteinit.NewAppliance{{Name: "attic", Board: "pi4"}, {Name: "shed"}} {
		r, err := d.AddAppliance(n)
		check(t, err)
		if len(r.Made)+len(r.Changed) > 0 {
			t.Errorf("%s again: made %v, changed %v", n.Name, r.Made, r.Changed)
		}
	}
	if _, err := d.AddRepository(site.Repository{Name: "photos", Path: "/srv/photos"}); err != nil {
		t.Error(err)
	}
	check(t, d.SetLUKS("attic", disk))
	if names := changed(before, look(t, d.Path())); len(names) > 0 {
		t.Errorf("changed: %v", names)
	}
}

func TestModes(t *testing.T) {
	old := unix.Umask(0)
	defer unix.Umask(old)
	d, _, err := siteinit.Init(filepath.Join(t.TempDir(), "site"), options())
	check(t, err)
	_, err = d.AddAppliance(siteinit.NewAppliance{Name: "attic", Board: "pi4"})
	check(t, err)
	check(t, d.SetLUKS("attic", disk))
	if _, err := d.StoreKey(disk, secret.New([]byte("key"))); err != nil {
		t.Fatal(err)
	}
	check(t, filepath.WalkDir(d.Path(), func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		want := fs.FileMode(0o600)
		switch {
		case e.IsDir():
			want = 0o700
		case e.Name() == "site.toml", e.Name() == "README.txt":
			want = 0o644
		}
		if info.Mode().Perm() != want {
			t.Errorf("%s has mode %04o; want %04o", path, info.Mode().Perm(), want)
		}
		return nil
	}))
}

func TestWhoHasWhat(t *testing.T) {
	d := complete(t)
	if _, err := d.StoreKey(disk, secret.New([]byte("THE-KEY-OF-ATTIC"))); err != nil {
		t.Fatal(err)
	}
	files := look(t, d.Path())
	private := func(name string) string {
		t.Helper()
		text, ok := files[name]
		if !ok {
			t.Fatalf("%s is missing", name)
		}
		return strings.TrimSpace(text)
	}
	// Each secret may stand in these folders and in no other.
	for name, folders := range map[string][]string{
		"home/pusher/ssh_key":                               {"home/"},
		"home/wireguard/farkeep.key":                        {"home/"},
		"keyserver-borg/ssh_host_key":                       {"keyserver-borg/"},
		"keyserver-borg/keys/" + disk + ".key":              {"keyserver-borg/"},
		"operator/admin_key":                                {"operator/"},
		"operator/restore_key":                              {"operator/"},
		"operator/mail_password":                            {"operator/", "appliances/attic/", "keyserver-borg/"},
		"appliances/attic/identity/ssh_host_key":            {"appliances/attic/"},
		"appliances/attic/identity/ssh_client_key":          {"appliances/attic/"},
		"appliances/attic/identity/wireguard_key":           {"appliances/attic/"},
		"appliances/attic/identity/wireguard_preshared_key": {"appliances/attic/", "home/wireguard/"},
		"appliances/shed/identity/wireguard_preshared_key":  {"appliances/shed/", "home/wireguard/"},
	} {
		secret := private(name)
		for where, text := range files {
			allowed := slices.ContainsFunc(folders, func(folder string) bool { return strings.HasPrefix(where, folder) })
			if !allowed && strings.Contains(text, secret) {
				t.Errorf("%s stands in %s too", name, where)
			}
		}
	}
	if _, err := identity.Signer(secret.Text(private("operator/admin_key") + "\n")); !errors.Is(err, identity.ErrSealed) {
		t.Errorf("the admin key is not sealed: %v", err)
	}
	if _, err := identity.Unseal(secret.Text(private("operator/admin_key")+"\n"), secret.New([]byte(passphrase))); err != nil {
		t.Errorf("the admin key does not open: %v", err)
	}
	for where, text := range files {
		if strings.Contains(text, passphrase) {
			t.Errorf("the passphrase stands in %s", where)
		}
		// The sealing must not give the operator away at home.
		if strings.HasPrefix(where, "home/") && strings.Contains(text, "admin of home") && where != "home/site.toml" {
			t.Errorf("%s names the admin key", where)
		}
	}
}

func TestSettingsOfAnAppliance(t *testing.T) {
	d := complete(t)
	path := d.ApplianceSettings("attic")
	text, err := os.ReadFile(path)
	check(t, err)
	a, err := settings.Parse(path, text)
	check(t, err)
	s := d.Site()
	attic, _ := s.Appliance("attic")
	signer, err := identity.Signer(a.Identity.ClientKey)
	check(t, err)
	host, err := identity.Signer(a.Identity.HostKey)
	check(t, err)
	public, err := identity.WireGuardPublic(a.VPN.PrivateKey)
	check(t, err)
	p := a.VPN.Peers[0]
	for what, ok := range map[string]bool{
		"client key":  identity.SamePublic(attic.ClientKey, identity.Line(signer.PublicKey(), "")),
		"host key":    identity.SamePublic(attic.HostKey, identity.Line(host.PublicKey(), "")),
		"vpn key":     public == attic.VPNKey,
		"vpn address": a.VPN.Address.String() == "10.77.0.2/24",
		"peer":        p.PublicKey == s.Home.VPNKey && slices.Equal(p.Endpoints, s.VPN.Endpoints) && p.PresharedKey != "",
		"only home":   len(p.AllowedIPs) == 1 && p.AllowedIPs[0].String() == "10.77.0.1/32",
		"key server":  len(a.KeyServers) == 1 && a.KeyServers[0].Address == "10.77.0.1:4022" && a.KeyServers[0].HostKey == s.KeyServers[0].HostKey,
		"disk":        a.Disk.LUKS == disk && a.Disk.Relay.Line == 17 && a.Disk.Relay.Active == "low" && a.Disk.Window.Length.Std() == 4*time.Hour,
		"roles":       len(a.Receiver.Keys) == 3 && a.Receiver.Keys[0].Role == "push" && a.Receiver.Keys[1].Role == "admin" && a.Receiver.Keys[2].Role == "restore",
		"push key":    identity.SamePublic(a.Receiver.Keys[0].PublicKey, s.Home.PushKey),
		"admin key":   identity.SamePublic(a.Receiver.Keys[1].PublicKey, s.Operator.AdminKey),
		"mail":        a.Mail.Server == s.Mail.Server && a.Mail.Password == "correct horse",
	} {
		if !ok {
			t.Errorf("%s: not what the site says: %+v", what, a)
		}
	}
	if _, err := os.Stat(d.ApplianceSettings("shed")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("shed has settings without a disk: %v", err)
	}
	if next := d.Missing(); len(next) != 1 || !strings.Contains(next[0], "prepare the disk of shed") {
		t.Errorf("what is next: %v", next)
	}
}

func TestHandEditsOfSettingsSurvive(t *testing.T) {
	d := complete(t)
	path := d.ApplianceSettings("attic")
	text, err := os.ReadFile(path)
	check(t, err)
	_, extra, err := identity.New("mother's laptop")
	check(t, err)
	edited := strings.NewReplacer(
		`# address = "192.168.1.50/24"`, `address = "192.168.8.5/24"`,
		`repositories = ["*"]`, `repositories = ["photos"]`,
		"[dead_man]", "[[receiver.key]]\nname = \"laptop\"\nrole = \"restore\"\npublic_key = \""+extra+"\"\n\n[dead_man]",
	).Replace(string(text))
	check(t, os.WriteFile(path, []byte(edited), 0o600))
	_, err = d.AddKeyServer("second", netip.MustParseAddrPort("192.168.1.7:4022"))
	check(t, err)
	text, err = os.ReadFile(path)
	check(t, err)
	a, err := settings.Parse(path, text)
	check(t, err)
	if a.Network.Address.String() != "192.168.8.5/24" || len(a.Receiver.Keys) != 4 || a.Receiver.Keys[3].Name != "laptop" || a.Receiver.Keys[0].Repositories[0] != "photos" {
		t.Errorf("a person's settings are gone: %+v", a)
	}
	if len(a.KeyServers) != 2 || len(a.VPN.Peers[0].AllowedIPs) != 2 {
		t.Errorf("the second key server is missing: %+v", a)
	}
	// Settings that nobody can read are not thrown away silently.
	check(t, os.WriteFile(path, []byte("name = \"attic\"\nnetwrk = 1\n"), 0o600))
	if _, err := d.Refresh(); err == nil || !strings.Contains(err.Error(), "farkeep.toml:2: netwrk") || !strings.Contains(hint.Of(err), "made anew") {
		t.Errorf("broken settings: %v, hint %q", err, hint.Of(err))
	}
}

// A key server that is not where the tunnels end asks the one that is.
func TestWhereAKeyServerSeesPlaces(t *testing.T) {
	d := complete(t)
	for address, want := range map[string]string{
		"10.77.0.9:4022": site.PlaceOthers, "192.168.1.7:4022": site.PlaceOthers,
		"10.77.0.1:4122": "", "100.101.102.103:4022": "", "[fd7a:115c:a1e0::7]:4022": "",
	} {
		name := "ks" + strings.Trim(strings.NewReplacer(".", "", ":", "", "[", "", "]", "").Replace(address), "-")
		_, err := d.AddKeyServer(name, netip.MustParseAddrPort(address))
		check(t, err)
		all := d.Site().KeyServers
		if k := all[len(all)-1]; k.Name != name || k.Place != want {
			t.Errorf("%s: %+v; want place %q", address, k, want)
		}
	}
}

// A run may be cut short after any file: the next completes the site, and what
// was there keeps its identity.
func TestInterruptedRuns(t *testing.T) {
	first := filepath.Join(t.TempDir(), "site")
	_, r, err := siteinit.Init(first, options())
	check(t, err)
	whole := look(t, first)
	for n := range r.Made {
		dir := filepath.Join(t.TempDir(), "site")
		there := map[string]string{}
		for _, name := range r.Made[:n] {
			there[name] = whole[name]
		}
		lay(t, dir, there)
		d, _, err := siteinit.Init(dir, options())
		if err != nil {
			t.Fatalf("cut after %d files: %v", n, err)
		}
		after := look(t, dir)
		for _, name := range r.Made[:n] {
			if after[name] != whole[name] {
				t.Errorf("cut after %d files: %s is another", n, name)
			}
		}
		if _, err := d.Refresh(); err != nil {
			t.Errorf("cut after %d files: %v", n, err)
		}
	}
}

func TestInterruptedAddition(t *testing.T) {
	d := complete(t)
	n := siteinit.NewAppliance{Name: "cellar", Board: "zero2w"}
	before, err := os.ReadFile(d.SitePath())
	check(t, err)
	_, err = d.AddAppliance(n)
	check(t, err)
	made := look(t, filepath.Join(d.Path(), "appliances", "cellar", "identity"))
	// As if the power had gone before site.toml was replaced.
	check(t, os.WriteFile(d.SitePath(), before, 0o644))
	_, err = d.AddAppliance(n)
	check(t, err)
	if names := changed(made, look(t, filepath.Join(d.Path(), "appliances", "cellar", "identity"))); len(names) > 0 {
		t.Errorf("a new identity for an old name: %v", names)
	}
}

func TestLostOrForeignIdentityIsAnError(t *testing.T) {
	for _, name := range []string{
		"home/pusher/ssh_key", "home/wireguard/farkeep.key", "keyserver-borg/ssh_host_key",
		"appliances/attic/identity/ssh_host_key", "appliances/attic/identity/ssh_client_key", "appliances/attic/identity/wireguard_key", "appliances/attic/identity/wireguard_preshared_key",
	} {
		d := complete(t)
		path := filepath.Join(d.Path(), name)
		check(t, os.Rename(path, path+".aside"))
		_, err := d.Refresh()
		if err == nil || !strings.Contains(err.Error(), "is missing") || hint.Of(err) == "" {
			t.Errorf("%s lost: %v", name, err)
		}
		if _, err := os.Stat(path); err == nil {
			t.Errorf("%s was made anew", name)
		}
		if strings.HasSuffix(name, "preshared_key") {
			continue // it has no public half to compare with
		}
		foreign, _, err := identity.New("x")
		check(t, err)
		if strings.Contains(name, "wireguard") {
			foreign, _, err = identity.NewWireGuard()
			check(t, err)
		}
		check(t, os.WriteFile(path, []byte(foreign.Reveal()), 0o600))
		if _, err := d.Refresh(); err == nil || !strings.Contains(hint.Of(err), "changed by hand") {
			t.Errorf("%s replaced: %v", name, err)
		}
		check(t, os.Chmod(path, 0o644))
		if _, err := d.Refresh(); err == nil || !strings.Contains(err.Error(), "chmod 600") {
			t.Errorf("%s readable by others: %v", name, err)
		}
	}
}

func TestInitRefuses(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(*siteinit.Options)
		want   string
	}{
		"name":        {func(o *siteinit.Options) { o.Name = "My Home" }, "cannot name the site"},
		"endpoint":    {func(o *siteinit.Options) { o.Endpoints = []string{"home"} }, `"home" is not host:port`},
		"no endpoint": {func(o *siteinit.Options) { o.Endpoints = nil }, "vpn.endpoints"},
		"network":     {func(o *siteinit.Options) { o.Network = netip.MustParsePrefix("10.77.0.7/24") }, "write 10.77.0.0/24"},
		"tiny":        {func(o *siteinit.Options) { o.Network = netip.MustParsePrefix("10.77.0.0/32") }, "home.vpn_address"},
		"no mail":     {func(o *siteinit.Options) { o.MailServer, o.MailUser, o.MailFrom, o.MailTo = "", "", "", nil }, "no alarm could reach you"},
		"recipient":   {func(o *siteinit.Options) { o.MailTo = []string{"me"} }, `"me" is not a mail address`},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "site")
			o := options()
			tt.change(&o)
			_, _, err := siteinit.Init(dir, o)
			if err == nil || !strings.Contains(err.Error(), tt.want) || hint.Code(err) != hint.ExitUsage {
				t.Errorf("got %v (exit %d); want %q", err, hint.Code(err), tt.want)
			}
			if files := look(t, dir); len(files) > 0 {
				t.Errorf("a refused site left %d files behind", len(files))
			}
		})
	}
	dir := t.TempDir()
	check(t, os.Chmod(dir, 0o755))
	if _, _, err := siteinit.Init(dir, options()); err == nil || !strings.Contains(hint.Of(err), "chmod 700") {
		t.Errorf("a loose folder: %v", err)
	}
	check(t, os.Chmod(dir, 0o700))
	check(t, os.WriteFile(filepath.Join(dir, "thesis.odt"), nil, 0o600))
	if _, _, err := siteinit.Init(dir, options()); err == nil || !strings.Contains(err.Error(), "thesis.odt") {
		t.Errorf("somebody's folder: %v", err)
	}
	if _, err := siteinit.Open(filepath.Join(dir, "none")); err == nil || !strings.Contains(hint.Of(err), "site init") {
		t.Errorf("no folder: %v", err)
	}
}

func TestContradictionsChangeNothing(t *testing.T) {
	d := complete(t)
	before := look(t, d.Path())
	for name, change := range map[string]func(*siteinit.Options){
		"--name":        func(o *siteinit.Options) { o.Name = "other" },
		"--home-name":   func(o *siteinit.Options) { o.HomeName = "other" },
		"--endpoint":    func(o *siteinit.Options) { o.Endpoints = []string{"other:1"} },
		"--vpn-network": func(o *siteinit.Options) { o.Network = netip.MustParsePrefix("10.78.0.0/24") },
		"--vpn-port":    func(o *siteinit.Options) { o.ListenPort = 1 },
		"--mail-server": func(o *siteinit.Options) { o.MailServer = "other:25" },
		"--mail-to":     func(o *siteinit.Options) { o.MailTo = []string{"other@example.net"} },
		"--key-server":  func(o *siteinit.Options) { o.KeyServer = "other" },
	} {
		o := options()
		change(&o)
		if _, _, err := siteinit.Init(d.Path(), o); err == nil || !strings.HasPrefix(err.Error(), name+":") || !strings.Contains(hint.Of(err), "site.toml") {
			t.Errorf("%s: %v, hint %q", name, err, hint.Of(err))
		}
	}
	for _, n := range []siteinit.NewAppliance{
		{Name: "attic", Board: "pi3"}, {Name: "attic", Board: "pi4", Relay: settings.Relay{Driver: "gpio", Line: 4, Active: "high"}},
		{Name: "cellar", Board: "pi9"}, {Name: "../x", Board: "pi4"}, {Name: "nas", Board: "service", OwnVPN: true}, {Name: "nas", Board: "pi4", OwnVPN: true, Address: "x:22"},
		{Name: "cellar", Board: "pi4", Address: "nowhere"},
	} {
		if _, err := d.AddAppliance(n); err == nil || hint.Code(err) != hint.ExitUsage {
			t.Errorf("%+v: %v", n, err)
		}
	}
	if _, err := d.AddRepository(site.Repository{Name: "photos", Path: "/elsewhere"}); err == nil {
		t.Error("photos has two paths")
	}
	if _, err := d.AddKeyServer("borg", netip.MustParseAddrPort("10.77.0.1:5")); err == nil {
		t.Error("borg has two addresses")
	}
	if names := changed(before, look(t, d.Path())); len(names) > 0 {
		t.Errorf("changed: %v", names)
	}
}

func TestStoreKey(t *testing.T) {
	d := complete(t)
	_, err := d.AddKeyServer("second", netip.MustParseAddrPort("192.168.1.7:4022"))
	check(t, err)
	paths, err := d.StoreKey(disk, secret.New([]byte("key")))
	check(t, err)
	if len(paths) != 2 || filepath.Dir(paths[0]) != d.KeyServerKeysDir() {
		t.Errorf("stored in %v", paths)
	}
	if _, err := d.StoreKey(disk, secret.New([]byte("key"))); err != nil {
		t.Errorf("the same key again: %v", err)
	}
	if _, err := d.StoreKey(disk, secret.New([]byte("yek"))); err == nil || hint.Of(err) == "" {
		t.Errorf("another key: %v", err)
	}
	for _, path := range paths {
		if text, err := os.ReadFile(path); err != nil || string(text) != "key" {
			t.Errorf("%s holds %q, %v", path, text, err)
		}
	}
	if _, err := d.StoreKey("../../x", secret.New([]byte("key"))); err == nil {
		t.Error("a key for ../../x")
	}
}

func TestTwoRunsAtOnce(t *testing.T) {
	d := complete(t)
	f, err := os.Open(d.Path())
	check(t, err)
	defer f.Close()
	check(t, unix.Flock(int(f.Fd()), unix.LOCK_EX))
	if _, err := d.Refresh(); err == nil || !strings.Contains(hint.Of(err), "another farkeep-image") {
		t.Errorf("while another run holds the folder: %v", err)
	}
}

func TestServiceMode(t *testing.T) {
	d := complete(t)
	_, err := d.AddAppliance(siteinit.NewAppliance{Name: "debian", Board: "service"})
	check(t, err)
	_, err = d.AddAppliance(siteinit.NewAppliance{Name: "nas", Board: "service", OwnVPN: true, Address: "nas.example.ts.net:2222"})
	check(t, err)
	check(t, d.SetLUKS("debian", strings.Replace(disk, "0b", "0c", 1)))
	check(t, d.SetLUKS("nas", strings.Replace(disk, "0b", "0d", 1)))
	for _, name := range []string{"debian", "nas"} {
		text, err := os.ReadFile(d.ApplianceSettings(name))
		check(t, err)
		a, err := settings.Parse(name, text)
		check(t, err)
		if a.VPN.PrivateKey != "" || len(a.VPN.Peers) > 0 {
			t.Errorf("%s: its settings hold the tunnel of the system", name)
		}
	}
	strip(t, filepath.Join(d.Path(), "appliances", "debian", "wireguard", "farkeep0.conf"))
	if _, err := os.Stat(filepath.Join(d.Path(), "appliances", "nas", "wireguard")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("nas has a tunnel of ours: %v", err)
	}
}

// strip lets wg-quick read a file, and returns what it would hand to wg.
func strip(t *testing.T, path string) string {
	t.Helper()
	wgQuick, err := exec.LookPath("wg-quick")
	if err != nil {
		t.Fatal("wg-quick is missing: apt install wireguard-tools")
	}
	var diag bytes.Buffer
	cmd := exec.Command(wgQuick, "strip", path)
	cmd.Stderr = &diag
	out, err := cmd.Output()
	if err != nil || diag.Len() > 0 {
		t.Fatalf("wg-quick strip %s: %v, %s", path, err, diag.String())
	}
	return string(out)
}

func TestHomesWireGuard(t *testing.T) {
	d := complete(t)
	out := strip(t, filepath.Join(d.Path(), "home", "wireguard", "farkeep.conf"))
	s := d.Site()
	for _, a := range s.Appliances {
		block := "PublicKey = " + a.VPNKey + "\nPresharedKey = "
		if !strings.Contains(out, block) || !strings.Contains(out, "AllowedIPs = "+a.VPNAddress.String()+"/32\n") {
			t.Errorf("%s is no peer", a.Name)
		}
	}
	if n := strings.Count(out, "[Peer]"); n != len(s.Appliances) {
		t.Errorf("%d peers", n)
	}
	conf, err := os.ReadFile(filepath.Join(d.Path(), "home", "wireguard", "farkeep.conf"))
	check(t, err)
	for _, line := range []string{"Address = 10.77.0.1/24", "ListenPort = 51820", "PreUp = nft -f /etc/wireguard/%i.nft", "PostDown = nft delete table inet farkeep"} {
		if !strings.Contains(string(conf), line+"\n") {
			t.Errorf("no line %q", line)
		}
	}
}

// A key server mails as the site's user, with the site's password or one of its
// own, which no later run takes away.
func TestKeyServersMailPassword(t *testing.T) {
	d := complete(t)
	path := filepath.Join(d.Path(), "keyserver-borg", "mail_password")
	has := func(want string) {
		t.Helper()
		text, err := os.ReadFile(path)
		if err != nil || string(text) != want {
			t.Errorf("%q, %v; want %q", text, err, want)
		}
		if info, err := os.Stat(path); err == nil && info.Mode().Perm() != 0o600 {
			t.Errorf("mode %v", info.Mode())
		}
	}
	again := func(password string) {
		t.Helper()
		o := options()
		o.MailPassword = secret.Text(password)
		if _, _, err := siteinit.Init(d.Path(), o); err != nil {
			t.Fatal(err)
		}
	}
	has("correct horse\n")
	again("battery staple")
	has("battery staple\n")
	check(t, os.WriteFile(path, []byte("its own\n"), 0o600))
	again("")
	has("its own\n")
	again("third")
	has("its own\n")
	check(t, os.Remove(path))
	again("")
	has("third\n")
}
