// Package siteinit makes and keeps the operator's site folder: site.toml and
// one secrets folder per machine, each to be carried to its machine as a whole.
//
//	site.toml                  the site, no secrets
//	home/                      for the Borg server
//	    pusher/ssh_key         the pusher's identity
//	    wireguard/             farkeep.conf for wg-quick, farkeep.nft for the firewall
//	pushers/NAME/              for a further Borg server: pusher/, wireguard/
//	keyserver-NAME/            for a key server
//	    ssh_host_key
//	    mail_password          the site's, or one of its own that was put there
//	    keys/UUID.key          the disks' keys
//	appliances/NAME/           for one appliance
//	    farkeep.toml           goes onto its SD card
//	    identity/              what farkeep.toml is made from
//	operator/                  stays with the operator, never lies at home
//	    admin_key              sealed with a passphrase
//	    restore_key            reads generations
//	    mail_password
//
// An identity is made once: its file is created exclusively, before site.toml
// names it, and a name whose identity is missing or differs from site.toml is an
// error, never a reason to make another. Only [Dir.ReplaceIdentity] replaces one,
// of an appliance whose card was lost. Everything else is derived and rewritten
// whenever it differs. So a run that was cut short is completed by the next, and a
// second run changes nothing.
package siteinit

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"

	"farkeep/shared/atomicfile"
	"farkeep/shared/hint"
	"farkeep/shared/identity"
	"farkeep/shared/keywire"
	"farkeep/shared/secret"
	"farkeep/shared/settings"
	"farkeep/shared/site"

	"golang.org/x/sys/unix"
)

// KeyServerPort is the port of a new site's key server.
const KeyServerPort = 4022

// Dir is a site folder. Its methods may be called from several processes: each
// change is made under a lock, on what the folder holds at that moment.
type Dir struct {
	path string
	doc  *site.Document
}

// Report says what a call did to the folder.
type Report struct {
	Made    []string // identities and files that did not exist, relative to the folder
	Changed []string // derived files that were rewritten
	Next    []string // what is still missing, as sentences for the operator
}

// Options describe a new site.
type Options struct {
	Name          string
	HomeName      string
	Network       netip.Prefix
	ListenPort    int // 0: 51820
	Endpoints     []string
	KeyServer     string         // its name; "": HomeName
	KeyServerAddr netip.AddrPort // zero: home's VPN address, KeyServerPort
	MailServer    string
	MailUser      string
	MailFrom      string
	MailTo        []string
	MailPassword  secret.Text // "": keep the one on file
	// AdminPassphrase is asked once, when the admin key is made.
	AdminPassphrase func() (secret.Bytes, error)
}

// Init makes the site folder dir, or completes one that an earlier run left
// unfinished, or checks that o agrees with the one that is there.
func Init(dir string, o Options) (*Dir, *Report, error) {
	dir = filepath.Clean(dir)
	if err := claim(dir); err != nil {
		return nil, nil, err
	}
	unlock, err := lock(dir)
	if err != nil {
		return nil, nil, err
	}
	defer unlock()

	d, r := &Dir{path: dir}, &Report{}
	switch doc, err := site.ReadDocument(d.SitePath()); {
	case err == nil:
		d.doc = doc
		if err := d.agrees(o); err != nil {
			return nil, nil, err
		}
	case errors.Is(err, fs.ErrNotExist):
		if err := d.begin(o, r); err != nil {
			return nil, nil, err
		}
	default:
		return nil, nil, hint.Exit(hint.ExitUsage, err)
	}
	if o.MailPassword != "" {
		text := o.MailPassword.Reveal() + "\n"
		if err := d.withdrawMailPasswords(secret.Text(text)); err != nil {
			return nil, nil, err
		}
		if err := d.writeDerived(filepath.Join("operator", "mail_password"), []byte(text), 0o600, r); err != nil {
			return nil, nil, err
		}
	}
	if err := d.refresh(r); err != nil {
		return nil, nil, err
	}
	return d, r, nil
}

// begin makes the identities of a new site and, last, its site.toml.
func (d *Dir) begin(o Options, r *Report) error {
	if o.KeyServer == "" {
		o.KeyServer = o.HomeName
	}
	for _, n := range []struct{ what, name string }{{"site", o.Name}, {"home", o.HomeName}, {"key server", o.KeyServer}} {
		if !settings.IsName(n.name) {
			return usage(fmt.Errorf("%q cannot name the %s: small letters, digits, dots and dashes, 63 at most", n.name, n.what))
		}
	}
	s := &site.Site{
		Name: o.Name,
		VPN:  site.VPN{Network: o.Network, ListenPort: o.ListenPort, Endpoints: o.Endpoints},
		Home: site.Home{Name: o.HomeName, VPNAddress: o.Network.Masked().Addr().Next()},
		Mail: site.Mail{Server: o.MailServer, User: o.MailUser, From: o.MailFrom, To: o.MailTo},
	}
	s.History, s.DeadMan = settings.DefaultHistory(), settings.DefaultDeadMan()
	if !o.KeyServerAddr.IsValid() {
		o.KeyServerAddr = netip.AddrPortFrom(s.Home.VPNAddress, KeyServerPort)
	}
	s.SetDefaults()
	// Before any secret exists: a site that would be refused costs nothing but a message.
	if err := rehearse(s, o); err != nil {
		return usage(err)
	}

	var err error
	if s.Home.VPNKey, err = d.wireGuard("home/wireguard/farkeep.key", r); err != nil {
		return err
	}
	if s.Home.PushKey, err = d.ssh("home/pusher/ssh_key", "pusher of "+o.HomeName, r); err != nil {
		return err
	}
	if s.Operator.AdminKey, err = d.sealed("operator/admin_key", "admin of "+o.Name, o.AdminPassphrase, r); err != nil {
		return err
	}
	if s.Operator.RestoreKey, err = d.ssh("operator/restore_key", "restore of "+o.Name, r); err != nil {
		return err
	}
	hostKey, err := d.ssh(filepath.Join(keyServerFolder(o.KeyServer), "ssh_host_key"), "key server "+o.KeyServer, r)
	if err != nil {
		return err
	}
	s.KeyServers = []site.KeyServer{{Name: o.KeyServer, Address: o.KeyServerAddr.String(), HostKey: hostKey}}
	doc, err := site.NewDocument(s)
	if err != nil {
		return usage(err)
	}
	return d.save(doc, r)
}

// rehearse validates s with keys that are thrown away.
func rehearse(s *site.Site, o Options) error {
	trial := *s
	_, one, err := identity.New("")
	if err != nil {
		return err
	}
	_, two, err := identity.New("")
	if err != nil {
		return err
	}
	_, trial.Home.VPNKey, err = identity.NewWireGuard()
	if err != nil {
		return err
	}
	trial.Home.PushKey = one
	trial.KeyServers = []site.KeyServer{{Name: o.KeyServer, Address: o.KeyServerAddr.String(), HostKey: two}}
	if _, err := site.NewDocument(&trial); err != nil {
		return err
	}
	if s.Mail.Server == "" || s.Mail.From == "" {
		return errors.New("a site needs a mail server and a sender: without them no alarm could reach you")
	}
	return nil
}

// agrees refuses options that contradict the site that is already there.
func (d *Dir) agrees(o Options) error {
	s := d.doc.Site()
	same := func(flag, given, present string) error {
		if given == "" || given == present {
			return nil
		}
		return usage(hint.Because(fmt.Errorf("%s: the site exists and says %q, not %q", flag, present, given),
			"edit %s, then run \"farkeep-image site init %s\" without the flag", d.SitePath(), d.path))
	}
	join := func(list []string) string { return strings.Join(list, ",") }
	network := ""
	if o.Network.IsValid() {
		network = o.Network.String()
	}
	port := ""
	if o.ListenPort != 0 {
		port = fmt.Sprint(o.ListenPort)
	}
	for _, c := range [][3]string{
		{"--name", o.Name, s.Name}, {"--home-name", o.HomeName, s.Home.Name},
		{"--vpn-network", network, s.VPN.Network.String()}, {"--vpn-port", port, fmt.Sprint(s.VPN.ListenPort)},
		{"--endpoint", join(o.Endpoints), join(s.VPN.Endpoints)},
		{"--mail-server", o.MailServer, s.Mail.Server}, {"--mail-user", o.MailUser, s.Mail.User},
		{"--mail-from", o.MailFrom, s.Mail.From}, {"--mail-to", join(o.MailTo), join(s.Mail.To)},
	} {
		if err := same(c[0], c[1], c[2]); err != nil {
			return err
		}
	}
	if o.KeyServer != "" && !slices.ContainsFunc(s.KeyServers, func(k site.KeyServer) bool { return k.Name == o.KeyServer }) {
		return same("--key-server", o.KeyServer, s.KeyServers[0].Name)
	}
	if o.KeyServerAddr.IsValid() {
		return same("--key-server-address", o.KeyServerAddr.String(), s.KeyServers[0].Address)
	}
	return nil
}

// Open opens a site folder that Init made.
func Open(dir string) (*Dir, error) {
	d := &Dir{path: filepath.Clean(dir)}
	info, err := os.Stat(d.path)
	if err == nil && info.Mode().Perm()&0o077 != 0 {
		return nil, looseFolder(d.path, info.Mode())
	}
	if err := d.reload(); err != nil {
		return nil, err
	}
	return d, nil
}

func (d *Dir) reload() error {
	doc, err := site.ReadDocument(d.SitePath())
	if errors.Is(err, fs.ErrNotExist) {
		return usage(hint.Because(fmt.Errorf("there is no site in %s", d.path), "make one: farkeep-image site init %s", d.path))
	}
	if err != nil {
		return hint.Exit(hint.ExitUsage, err)
	}
	d.doc = doc
	return nil
}

// Path is the folder's path.
func (d *Dir) Path() string { return d.path }

// Site is what site.toml says. It must not be changed.
func (d *Dir) Site() *site.Site { return d.doc.Site() }

// SitePath is the path of site.toml.
func (d *Dir) SitePath() string { return filepath.Join(d.path, "site.toml") }

// OperatorDir is the folder that stays with the operator: recovery keys and
// LUKS header backups belong there and nowhere else.
func (d *Dir) OperatorDir() string { return filepath.Join(d.path, "operator") }

// KeyServerKeysDir is the keys folder of the first key server.
func (d *Dir) KeyServerKeysDir() string { return d.keysDirs()[0] }

func (d *Dir) keysDirs() []string {
	var dirs []string
	for _, k := range d.Site().KeyServers {
		dirs = append(dirs, filepath.Join(d.path, keyServerFolder(k.Name), "keys"))
	}
	return dirs
}

// ApplianceSettings is the path of an appliance's farkeep.toml. The file exists
// once the appliance is complete.
func (d *Dir) ApplianceSettings(name string) string {
	return filepath.Join(d.path, "appliances", name, "farkeep.toml")
}

func keyServerFolder(name string) string { return "keyserver-" + name }

// StoreKey puts the key of a disk into the folder of every key server and
// returns the paths. A file that is there already with the same bytes is left
// alone; with other bytes it is an error, and nothing is overwritten. The caller
// wipes key.
func (d *Dir) StoreKey(uuid string, key secret.Bytes) ([]string, error) {
	if !settings.IsLUKSUUID(uuid) {
		return nil, fmt.Errorf("store a disk's key: %q is not a LUKS UUID", uuid)
	}
	if key.Len() < 1 || key.Len() > keywire.MaxKey {
		return nil, fmt.Errorf("store the key of %s: %d bytes; 1 to %d are possible", uuid, key.Len(), keywire.MaxKey)
	}
	var paths []string
	for _, dir := range d.keysDirs() {
		path := filepath.Join(dir, keywire.KeyFile(uuid))
		paths = append(paths, path)
		err := atomicfile.Create(path, key.Reveal(), 0o600)
		if errors.Is(err, fs.ErrExist) {
			err = sameKey(path, key)
		}
		if err != nil {
			return paths, err
		}
	}
	return paths, nil
}

// KeyFiles are the paths of a disk's key in the folders of the key servers,
// whether it is there or not.
func (d *Dir) KeyFiles(uuid string) []string {
	var paths []string
	for _, dir := range d.keysDirs() {
		paths = append(paths, filepath.Join(dir, keywire.KeyFile(uuid)))
	}
	return paths
}

// SetLUKSHeader records the fingerprint of the header that was backed up.
func (d *Dir) SetLUKSHeader(appliance, fingerprint string) error {
	_, err := d.change(func(doc *site.Document, _ *Report) error { return doc.SetLUKSHeader(appliance, fingerprint) })
	return err
}

// SetLUKS records the LUKS UUID of an appliance's disk in site.toml and writes
// its farkeep.toml, which was incomplete without.
func (d *Dir) SetLUKS(appliance, uuid string) error {
	_, err := d.change(func(doc *site.Document, _ *Report) error { return doc.SetLUKS(appliance, uuid) })
	return err
}

// Refresh brings every derived file in line with site.toml.
func (d *Dir) Refresh() (*Report, error) {
	return d.change(func(*site.Document, *Report) error { return nil })
}

// NewAppliance says what an appliance is to be.
type NewAppliance struct {
	Name    string
	Board   string
	Address string // of its receiver, host:port; "": VPN address, port 22
	Relay   settings.Relay
	Window  settings.Window
	OwnVPN  bool // with Board "service": the system's own VPN, no WireGuard of ours
	// Place is what tells the key server where the appliance is (site.KeyPolicy); "":
	// WireGuard, if it is ours, and otherwise nothing.
	Place string
}

// AddAppliance adds an appliance. One of that name that is there already must
// agree with n; then nothing changes.
func (d *Dir) AddAppliance(n NewAppliance) (*Report, error) {
	if !settings.IsName(n.Name) {
		return nil, usage(fmt.Errorf("%q cannot name an appliance: small letters, digits, dots and dashes, 63 at most", n.Name))
	}
	return d.change(func(doc *site.Document, r *Report) error {
		a := site.Appliance{Name: n.Name, Board: n.Board, Address: n.Address, Relay: n.Relay, Window: n.Window}
		a.KeyPolicy.Place = n.Place
		if old, ok := doc.Site().Appliance(n.Name); ok {
			if a.Board != "" && a.Board != old.Board || a.Address != "" && a.Address != old.Address ||
				a.Relay != (settings.Relay{}) && a.Relay != old.Relay || a.Window != (settings.Window{}) && a.Window != old.Window ||
				n.Place != "" && n.Place != old.KeyPolicy.Place {
				return usage(hint.Because(fmt.Errorf("the appliance %s exists and is described otherwise", n.Name),
					"edit its entry in %s, then run \"farkeep-image site init %s\"; its identity stays", d.SitePath(), d.path))
			}
			return nil
		}
		if !slices.Contains(site.Boards(), n.Board) {
			return usage(fmt.Errorf("%q is not a board: one of %s", n.Board, strings.Join(site.Boards(), ", ")))
		}
		if n.OwnVPN && (n.Board != "service" || n.Address == "") {
			return usage(errors.New("a VPN of its own is for --board service, and needs --address: where home reaches it"))
		}
		// Rehearse with keys that are thrown away: a refused appliance leaves no identity behind.
		if !n.OwnVPN {
			address, err := doc.Site().FreeAddress()
			if err != nil {
				return err
			}
			a.VPNAddress = address
			if a.Address == "" {
				a.Address = netip.AddrPortFrom(address, 22).String()
			}
		}
		if err := rehearseAppliance(doc, a, !n.OwnVPN); err != nil {
			return usage(err)
		}
		var err error
		folder := filepath.Join("appliances", n.Name, "identity")
		if a.HostKey, err = d.ssh(filepath.Join(folder, "ssh_host_key"), "appliance "+n.Name, r); err != nil {
			return err
		}
		if a.ClientKey, err = d.ssh(filepath.Join(folder, "ssh_client_key"), "appliance "+n.Name+" to key servers", r); err != nil {
			return err
		}
		if !n.OwnVPN {
			if a.VPNKey, err = d.wireGuard(filepath.Join(folder, "wireguard_key"), r); err != nil {
				return err
			}
			if err = d.preshared(filepath.Join(folder, "wireguard_preshared_key"), r); err != nil {
				return err
			}
		}
		if n.Place == "" && !n.OwnVPN {
			a.KeyPolicy.Place = site.PlaceWireGuard
		}
		a.SetDefaults()
		return doc.AddAppliance(a)
	})
}

func rehearseAppliance(doc *site.Document, a site.Appliance, vpn bool) error {
	trial, err := site.ParseDocument("site.toml", doc.Text())
	if err != nil {
		return err
	}
	if _, a.HostKey, err = identity.New(""); err != nil {
		return err
	}
	if _, a.ClientKey, err = identity.New(""); err != nil {
		return err
	}
	if vpn {
		if _, a.VPNKey, err = identity.NewWireGuard(); err != nil {
			return err
		}
	}
	a.SetDefaults()
	return trial.AddAppliance(a)
}

// AddKeyServer adds a key server, reached by the appliances at address.
func (d *Dir) AddKeyServer(name string, address netip.AddrPort) (*Report, error) {
	if !settings.IsName(name) {
		return nil, usage(fmt.Errorf("%q cannot name a key server: small letters, digits, dots and dashes, 63 at most", name))
	}
	return d.change(func(doc *site.Document, r *Report) error {
		for _, k := range doc.Site().KeyServers {
			if k.Name == name && k.Address == address.String() {
				return nil
			}
			if k.Name == name {
				return usage(hint.Because(fmt.Errorf("the key server %s exists, at %s", name, k.Address), "edit its address in %s", d.SitePath()))
			}
		}
		hostKey, err := d.ssh(filepath.Join(keyServerFolder(name), "ssh_host_key"), "key server "+name, r)
		if err != nil {
			return err
		}
		k := site.KeyServer{Name: name, Address: address.String(), HostKey: hostKey}
		if home := doc.Site().Home; home.VPNKey != "" && address.Addr() != home.VPNAddress && !inTailscale(address.Addr()) {
			k.Place = site.PlaceOthers // the tunnels end at home: only there is it seen from where they come
		}
		return doc.AddKeyServer(k)
	})
}

// inTailscale reports whether an address is one that Tailscale gives out
// (tailscale.com/kb/1015): there every machine sees every other by itself.
func inTailscale(a netip.Addr) bool {
	return netip.MustParsePrefix("100.64.0.0/10").Contains(a) || netip.MustParsePrefix("fd7a:115c:a1e0::/48").Contains(a)
}

// AddRepository adds a repository; one that is there already is left alone.
func (d *Dir) AddRepository(n site.Repository) (*Report, error) {
	return d.change(func(doc *site.Document, _ *Report) error {
		for _, old := range doc.Site().Repositories {
			if old == n {
				return nil
			}
			if old.Name == n.Name {
				return usage(hint.Because(fmt.Errorf("the repository %s exists, at %s", old.Name, old.Path), "edit its entry in %s", d.SitePath()))
			}
		}
		return usage(doc.AddRepository(n))
	})
}

// AddFolder adds a folder of repositories; one that is there already is left alone.
func (d *Dir) AddFolder(n site.Folder) (*Report, error) {
	return d.change(func(doc *site.Document, _ *Report) error {
		for _, old := range doc.Site().Folders {
			if old.Path == n.Path && old.Prefix == n.Prefix && old.Mount == n.Mount && old.Host == n.Host && slices.Equal(old.Exclude, n.Exclude) {
				return nil
			}
			if old.Path == n.Path && old.Host == n.Host {
				return usage(hint.Because(fmt.Errorf("the folder %s is there already", old.Path), "edit its entry in %s", d.SitePath()))
			}
		}
		return usage(doc.AddFolder(n))
	})
}

// change applies edit to the site as it is now on disk, saves it, and brings
// the derived files in line.
func (d *Dir) change(edit func(*site.Document, *Report) error) (*Report, error) {
	unlock, err := lock(d.path)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := d.reload(); err != nil {
		return nil, err
	}
	r := &Report{}
	doc, err := site.ParseDocument(d.SitePath(), d.doc.Text())
	if err != nil {
		return nil, err
	}
	if err := edit(doc, r); err != nil {
		return nil, err
	}
	if err := d.save(doc, r); err != nil {
		return nil, err
	}
	if err := d.refresh(r); err != nil {
		return nil, err
	}
	return r, nil
}

func (d *Dir) save(doc *site.Document, r *Report) error {
	if err := d.writeDerived("site.toml", doc.Text(), 0o644, r); err != nil {
		return err
	}
	d.doc = doc
	return nil
}

// claim makes dir, or accepts one that is ours or empty.
func claim(dir string) error {
	err := os.Mkdir(dir, 0o700)
	if err == nil {
		return nil
	}
	if errors.Is(err, fs.ErrNotExist) {
		return usage(hint.Because(fmt.Errorf("make the site folder: %w", err), "make the folder above it first: mkdir -p %s", filepath.Dir(dir)))
	}
	if !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make the site folder: %w", err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("look at the site folder: %w", err)
	}
	if !info.IsDir() {
		return usage(fmt.Errorf("%s is not a folder", dir))
	}
	if info.Mode().Perm()&0o077 != 0 {
		return looseFolder(dir, info.Mode())
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("look at the site folder: %w", err)
	}
	for _, e := range entries {
		name := e.Name()
		if name != "site.toml" && name != "home" && name != "operator" && name != "appliances" && name != "pushers" && name != "README.txt" &&
			!strings.HasPrefix(name, "keyserver-") && !strings.HasPrefix(name, ".") {
			if _, err := os.Stat(filepath.Join(dir, "site.toml")); err != nil {
				return usage(hint.Because(fmt.Errorf("%s is not empty and holds no site: there is %s", dir, name), "name a folder that does not exist yet"))
			}
		}
	}
	return nil
}

func looseFolder(dir string, mode fs.FileMode) error {
	return usage(hint.Because(fmt.Errorf("the site folder %s has mode %04o: others could read its secrets", dir, mode.Perm()), "chmod 700 %s", dir))
}

// lock keeps two runs from changing one folder at once.
func lock(dir string) (unlock func(), err error) {
	f, err := os.Open(dir)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, usage(hint.Because(fmt.Errorf("there is no site in %s", dir), "make one: farkeep-image site init %s", dir))
		}
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, hint.Because(fmt.Errorf("lock %s: %w", dir, err), "another farkeep-image works on this site: wait for it")
	}
	return func() { f.Close() }, nil
}

func usage(err error) error { return hint.Exit(hint.ExitUsage, err) }

func sorted[T any](list []T, name func(T) string) []T {
	list = slices.Clone(list)
	sort.SliceStable(list, func(i, j int) bool { return name(list[i]) < name(list[j]) })
	return list
}
