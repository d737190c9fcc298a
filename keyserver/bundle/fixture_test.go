package bundle

import (
	"bytes"
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"farkeep/shared/identity"
	"farkeep/shared/secret"
	"farkeep/shared/settings"
	"farkeep/shared/site"
)

const (
	atticDisk = "0b6e1f5c-8d1b-4c52-9a57-6a2f0c9d3e11"
	borgWords = "correct horse battery staple"
)

var noon = time.Date(2026, 5, 6, 12, 0, 0, 0, time.UTC)

// packages says where a program that a test needs comes from.
var packages = map[string]string{"borg": "borgbackup", "cryptsetup": "cryptsetup-bin", "age": "age", "zbarimg": "zbar-tools", "script": "bsdutils", "ddrescue": "gddrescue", "unshare": "util-linux", "mke2fs": "e2fsprogs", "b2sum": "coreutils"}

func need(t testing.TB, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Fatalf("%s is missing: install the Debian package %s", p, packages[p])
		}
	}
}

func check(t testing.TB, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// tool runs a program with home as its home folder.
func tool(t testing.TB, home, name string, args ...string) string {
	t.Helper()
	need(t, name)
	cmd := exec.Command(name, args...)
	cmd.Dir = home
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + home, "LANG=C.UTF-8", "BORG_PASSPHRASE=" + borgWords, "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK=yes", "BORG_RELOCATED_REPO_ACCESS_IS_OK=yes"}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func write(t testing.TB, path string, text []byte) {
	t.Helper()
	check(t, os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, text, 0o600))
}

func read(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	check(t, err)
	return b
}

// home is a site folder on a laptop, the disk that goes with it, and a Borg server
// whose repositories are on this machine.
type home struct {
	dir, site, disk, keys string
}

func (h *home) options(kind Kind, to string) Options {
	return Options{Site: h.site, To: filepath.Join(h.dir, to), Kind: kind, BorgKeys: []string{h.keys}, KnownBy: "the letter at the notary's", Now: noon,
		Passphrase: secret.New([]byte("six words that nobody ever guesses"))}
}

// newHome makes one with the named repositories, "NAME=ENCRYPTION" each.
func newHome(t testing.TB, repositories ...string) *home {
	t.Helper()
	dir := t.TempDir()
	h := &home{dir: dir, site: filepath.Join(dir, "site"), disk: filepath.Join(dir, "disk.img"), keys: filepath.Join(dir, ".config/borg/keys")}
	in := func(name string) string { return filepath.Join(h.site, name) }
	newKey := func(name string) string {
		private, public, err := identity.New(name)
		check(t, err)
		write(t, in(name), []byte(private.Reveal()))
		return public
	}
	wg := func(name string) string {
		private, public, err := identity.NewWireGuard()
		check(t, err)
		write(t, in(name), []byte(private.Reveal()+"\n"))
		return public
	}
	admin, adminPublic, err := identity.NewSealed("admin", secret.New([]byte("four words and more")))
	check(t, err)
	write(t, in("operator/admin_key"), []byte(admin.Reveal()))
	write(t, in("README.txt"), []byte("a site\n"))
	write(t, in("home/wireguard/farkeep.conf"), []byte("[Interface]\n"))
	write(t, in("home/wireguard/farkeep.nft"), []byte("table inet farkeep {}\n"))
	s := &site.Site{
		Name:       "home",
		VPN:        site.VPN{Network: netip.MustParsePrefix("10.77.0.0/24"), Endpoints: []string{"home.example.net:51820", "192.168.1.10:51820"}},
		Home:       site.Home{Name: "borg", VPNAddress: netip.MustParseAddr("10.77.0.1"), VPNKey: wg("home/wireguard/farkeep.key"), PushKey: newKey("home/pusher/ssh_key")},
		Operator:   site.Operator{AdminKey: adminPublic},
		KeyServers: []site.KeyServer{{Name: "borg", Address: "10.77.0.1:4022", HostKey: newKey("keyserver-borg/ssh_host_key")}},
		Mail:       site.Mail{Server: "smtp.example.net:465", From: "a@example.net", To: []string{"b@example.net"}},
		Appliances: []site.Appliance{{Name: "attic", Board: "pi4", VPNAddress: netip.MustParseAddr("10.77.0.2"), VPNKey: wg("appliances/attic/identity/wireguard_key"),
			HostKey: newKey("appliances/attic/identity/ssh_host_key"), ClientKey: newKey("appliances/attic/identity/ssh_client_key"), LUKS: atticDisk}},
		History: settings.DefaultHistory(), DeadMan: settings.DefaultDeadMan(),
	}
	for _, r := range repositories {
		name, encryption, _ := strings.Cut(r, "=")
		path := filepath.Join(dir, "srv", name)
		s.Repositories = append(s.Repositories, site.Repository{Name: name, Path: path})
		if encryption == "" {
			continue
		}
		check(t, os.MkdirAll(filepath.Dir(path), 0o700))
		tool(t, dir, "borg", "init", "--encryption="+encryption, path)
		write(t, filepath.Join(dir, "documents", name), bytes.Repeat([]byte(name+"\n"), 20000))
		tool(t, dir, "borg", "create", path+"::monday", "documents/"+name)
	}
	check(t, os.MkdirAll(h.keys, 0o700))
	s.SetDefaults()
	doc, err := site.NewDocument(s)
	check(t, err)
	write(t, in("site.toml"), doc.Text())
	h.format(t, h.disk, atticDisk, "operator")
	return h
}

// format makes a LUKS disk, whose recovery key and header backup go into folder.
func (h *home) format(t testing.TB, path, uuid, folder string) {
	t.Helper()
	write(t, path, nil)
	check(t, os.Truncate(path, 24<<20))
	server, recovery := filepath.Join(h.site, "keyserver-borg/keys", uuid+".key"), filepath.Join(h.site, folder, uuid+".recovery.key")
	if folder != "operator" {
		server = filepath.Join(h.dir, folder, "server.key")
		recovery = filepath.Join(h.dir, folder, uuid+".recovery.key")
	}
	write(t, server, bytes.Repeat([]byte("s"), 64))
	key := make([]byte, 64)
	for i := range key {
		key[i] = byte(i*7 + len(folder))
	}
	write(t, recovery, key)
	light := []string{"--batch-mode", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", server}
	tool(t, h.dir, "cryptsetup", append([]string{"luksFormat", "--type", "luks2", "--luks2-keyslots-size", "2M", "--sector-size", "4096", "--uuid", uuid}, append(light, path)...)...)
	tool(t, h.dir, "cryptsetup", append([]string{"luksAddKey"}, append(light, path, recovery)...)...)
	backup := strings.TrimSuffix(recovery, ".recovery.key") + ".luks-header"
	os.Remove(backup)
	tool(t, h.dir, "cryptsetup", "luksHeaderBackup", "--header-backup-file", backup, path)
}

// create makes a bundle in clear.
func (h *home) create(t testing.TB, kind Kind, to string) (string, *Report) {
	t.Helper()
	o := h.options(kind, to)
	o.VolumeKey = kind == Paper
	r, err := Create(o)
	check(t, err)
	return o.To, r
}
