package siteinit

import (
	"bytes"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/template"
	"time"

	"farkeep/shared/hint"
	"farkeep/shared/identity"
	"farkeep/shared/keywire"
	"farkeep/shared/secret"
	"farkeep/shared/settings"
	"farkeep/shared/site"
	"farkeep/shared/tomlfile"
)

//go:embed templates
var templates embed.FS

// Interface is the name of home's WireGuard interface; wg-quick takes it from
// the name of its file, and the firewall rules go by it.
const Interface = "farkeep"

// refresh checks every identity against site.toml and writes everything that
// follows from the two. The order is fixed, so that two runs do the same.
func (d *Dir) refresh(r *Report) error {
	s := d.Site()
	if err := d.verify("home/pusher/ssh_key", s.Home.PushKey); err != nil {
		return err
	}
	if err := d.writeText("README.txt", "readme-site.txt", s, r); err != nil {
		return err
	}
	if err := d.refreshHome(s, r); err != nil {
		return err
	}
	for _, p := range s.Pushers {
		if err := d.refreshPusher(s, p, r); err != nil {
			return err
		}
	}
	for _, k := range s.KeyServers {
		folder := keyServerFolder(k.Name)
		if err := d.verify(filepath.Join(folder, "ssh_host_key"), k.HostKey); err != nil {
			return err
		}
		if err := os.MkdirAll(filepath.Join(d.path, folder, "keys"), 0o700); err != nil {
			return fmt.Errorf("make the keys folder of %s: %w", k.Name, err)
		}
		if err := d.keyServerMailPassword(s, k, r); err != nil {
			return err
		}
		data := struct {
			Site *site.Site
			site.KeyServer
		}{s, k}
		if err := d.writeText(filepath.Join(folder, "README.txt"), "readme-keyserver.txt", data, r); err != nil {
			return err
		}
	}
	if err := d.writeText("operator/README.txt", "readme-operator.txt", s, r); err != nil {
		return err
	}
	for _, a := range sorted(s.Appliances, func(a site.Appliance) string { return a.Name }) {
		if err := d.refreshAppliance(s, a, r); err != nil {
			return err
		}
	}
	r.Next = append(d.Missing(), d.Site().History.Doubts()...)
	return nil
}

// keyServerMailPassword gives a key server the site's mail password, unless it has
// one already: a person may have put one of its own there.
func (d *Dir) keyServerMailPassword(s *site.Site, k site.KeyServer, r *Report) error {
	if s.Mail.User == "" {
		return nil
	}
	path := keyServerPassword(k)
	if _, err := os.Lstat(filepath.Join(d.path, path)); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	password, err := d.read("operator/mail_password")
	if err != nil || password == "" {
		return err // that there is none yet, Missing says
	}
	return d.writeDerived(path, []byte(password.Reveal()), 0o600, r)
}

// withdrawMailPasswords removes the site's password from the key servers' folders
// before it is replaced by text; refresh then writes the new one. Their own ones
// stay.
func (d *Dir) withdrawMailPasswords(text secret.Text) error {
	old, err := d.read("operator/mail_password")
	if err != nil || old == "" || old == text {
		return err
	}
	for _, k := range d.Site().KeyServers {
		path := keyServerPassword(k)
		theirs, err := d.read(path)
		if err == nil && theirs == old {
			err = os.Remove(filepath.Join(d.path, path))
		}
		if err != nil {
			return fmt.Errorf("replace the mail password of %s: %w", k.Name, err)
		}
	}
	return nil
}

func keyServerPassword(k site.KeyServer) string {
	return filepath.Join(keyServerFolder(k.Name), "mail_password")
}

// homePeer is an appliance or a further pusher, as home's WireGuard sees it.
type homePeer struct {
	Name         string
	VPNKey       string
	VPNAddress   netip.Addr
	PresharedKey secret.Text
}

// opening is one place that appliances may reach.
type opening struct {
	Name    string
	Family  string // "ip" or "ip6", as nft says
	Address netip.AddrPort
}

func (d *Dir) refreshHome(s *site.Site, r *Report) error {
	if !s.VPN.Network.IsValid() {
		return d.writeText("home/README.txt", "readme-home.txt", s, r)
	}
	key, err := d.line("home/wireguard/farkeep.key")
	if err != nil {
		return err
	}
	if err := d.verifyWireGuard("home/wireguard/farkeep.key", key, s.Home.VPNKey); err != nil {
		return err
	}
	data := struct {
		Site            *site.Site
		Interface       string
		Key             secret.Text
		Address         netip.Prefix
		Peers           []homePeer
		AtHome, Through []opening // key servers on home itself, and behind it
		Passage         passage
	}{Site: s, Interface: Interface, Key: key, Passage: passageOf(s), Address: netip.PrefixFrom(s.Home.VPNAddress, s.VPN.Network.Bits())}
	for _, a := range s.Appliances {
		if a.VPNKey == "" {
			continue
		}
		psk, err := d.line(filepath.Join("appliances", a.Name, "identity", "wireguard_preshared_key"))
		if err != nil {
			return err
		}
		data.Peers = append(data.Peers, homePeer{a.Name, a.VPNKey, a.VPNAddress, psk})
	}
	for _, p := range s.Pushers {
		psk, err := d.pusherPreshared(p.Name)
		if err != nil {
			return err
		}
		data.Peers = append(data.Peers, homePeer{p.Name, p.VPNKey, p.VPNAddress, psk})
	}
	for _, k := range s.KeyServers {
		address, err := keyServerAddress(k)
		if err != nil {
			return err
		}
		o := opening{Name: k.Name, Family: family(address.Addr()), Address: address}
		if address.Addr() == s.Home.VPNAddress {
			data.AtHome = append(data.AtHome, o)
		} else {
			data.Through = append(data.Through, o)
		}
	}
	if err := d.writeText("home/README.txt", "readme-home.txt", s, r); err != nil {
		return err
	}
	if err := d.writeText("home/wireguard/farkeep.conf", "farkeep.conf", data, r); err != nil {
		return err
	}
	return d.writeText("home/wireguard/farkeep.nft", "farkeep.nft", data, r)
}

func family(a netip.Addr) string {
	if a.Is4() {
		return "ip"
	}
	return "ip6"
}

// keyServerAddress is a key server's address, which must be a number: an
// appliance asks no name server through the VPN, and a firewall rule by name
// would be looked up once and then be wrong.
func keyServerAddress(k site.KeyServer) (netip.AddrPort, error) {
	address, err := netip.ParseAddrPort(k.Address)
	if err != nil {
		return netip.AddrPort{}, usage(hint.Because(fmt.Errorf("the key server %s has the address %q", k.Name, k.Address),
			"appliances and the firewall need an IP address and a port, for instance 10.77.0.1:%d", KeyServerPort))
	}
	return address, nil
}

func (d *Dir) refreshAppliance(s *site.Site, a site.Appliance, r *Report) error {
	folder := filepath.Join("appliances", a.Name)
	own := filepath.Join(folder, "identity")
	if err := d.verify(filepath.Join(own, "ssh_host_key"), a.HostKey); err != nil {
		return err
	}
	if err := d.verify(filepath.Join(own, "ssh_client_key"), a.ClientKey); err != nil {
		return err
	}
	if a.VPNKey != "" {
		key, err := d.line(filepath.Join(own, "wireguard_key"))
		if err != nil {
			return err
		}
		if err := d.verifyWireGuard(filepath.Join(own, "wireguard_key"), key, a.VPNKey); err != nil {
			return err
		}
	}
	if err := d.writeText(filepath.Join(folder, "README.txt"), "readme-appliance.txt", a, r); err != nil {
		return err
	}
	if d.missingFor(s, a) != "" {
		return nil
	}
	full, err := d.settingsOf(s, a)
	if err != nil {
		return err
	}
	if a.Board == "service" && a.VPNKey != "" {
		// The system's own wg-quick brings the tunnel up.
		if err := d.writeServiceVPN(full, s, a, r); err != nil {
			return err
		}
		full.VPN = settings.VPN{Interface: full.VPN.Interface}
	}
	text, err := full.Render()
	if err != nil {
		return err
	}
	defer text.Wipe()
	return d.writeDerived(filepath.Join(folder, "farkeep.toml"), text.Reveal(), 0o600, r)
}

// Missing says what the site lacks, as sentences for the operator.
func (d *Dir) Missing() []string {
	var all []string
	s := d.Site()
	for _, a := range sorted(s.Appliances, func(a site.Appliance) string { return a.Name }) {
		if m := d.missingFor(s, a); m != "" && !slices.Contains(all, m) {
			all = append(all, m)
		}
	}
	if len(s.Appliances) == 0 {
		all = append(all, fmt.Sprintf("add an appliance: farkeep-image site add appliance NAME --board pi4 --dir %s", d.path))
	}
	if len(s.Repositories)+len(s.Folders) == 0 {
		all = append(all, fmt.Sprintf("say what is to be mirrored: farkeep-image site add repository NAME PATH --dir %s", d.path))
	}
	return all
}

// missingFor says what an appliance lacks before it can have a farkeep.toml.
func (d *Dir) missingFor(s *site.Site, a site.Appliance) string {
	if a.LUKS == "" {
		return fmt.Sprintf("prepare the disk of %s: farkeep-image disk prepare DEVICE --dir %s --appliance %s", a.Name, d.path, a.Name)
	}
	if s.Mail.Server == "" {
		return fmt.Sprintf("say in %s how the appliances send mail", d.SitePath())
	}
	if s.Mail.User != "" && d.mailPasswordFile(a.Name) == "" {
		return fmt.Sprintf("give the password of the mail user %s: farkeep-image site init %s --mail-password-file FILE", s.Mail.User, d.path)
	}
	return ""
}

// mailPasswordFile is the appliance's own password file, else the site's, "" for neither.
func (d *Dir) mailPasswordFile(appliance string) string {
	for _, name := range []string{filepath.Join("appliances", appliance, "identity", "mail_password"), "operator/mail_password"} {
		if _, err := os.Lstat(filepath.Join(d.path, name)); err == nil {
			return name
		}
	}
	return ""
}

// settingsOf puts an appliance's settings together. What a person may have set
// in an earlier farkeep.toml and site.toml does not know is kept.
func (d *Dir) settingsOf(s *site.Site, a site.Appliance) (*settings.Appliance, error) {
	path := d.ApplianceSettings(a.Name)
	text, err := tomlfile.ReadText(path)
	full := &settings.Appliance{}
	full.VPN.Interface = "farkeep0"
	full.Disk.IdleClose = settings.Duration(15 * time.Minute)
	full.Receiver.Port = 22
	if err == nil {
		old, err := settings.Parse(path, text)
		if err != nil {
			return nil, usage(hint.Because(err, "correct the file, or remove it: it is then made anew from site.toml"))
		}
		full.Network = old.Network
		full.VPN.Interface, full.VPN.ListenPort = old.VPN.Interface, old.VPN.ListenPort
		full.Disk.IdleClose = old.Disk.IdleClose
		full.Receiver = old.Receiver
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}

	full.Name, full.Site = a.Name, s.Name
	full.Clock, full.History, full.DeadMan = s.Clock, s.History, s.DeadMan
	own := filepath.Join("appliances", a.Name, "identity")
	if full.Identity.HostKey, err = d.read(filepath.Join(own, "ssh_host_key")); err != nil {
		return nil, err
	}
	if full.Identity.ClientKey, err = d.read(filepath.Join(own, "ssh_client_key")); err != nil {
		return nil, err
	}
	if a.VPNKey != "" {
		if err := d.fillVPN(full, s, a); err != nil {
			return nil, err
		}
	}
	for _, k := range s.KeyServers {
		full.KeyServers = append(full.KeyServers, settings.KeyServer{Name: k.Name, Address: k.Address, HostKey: k.HostKey})
	}
	full.Disk.LUKS, full.Disk.Relay, full.Disk.Window = a.LUKS, a.Relay, a.Window
	full.Receiver.Keys = receiverKeys(s, full.Receiver.Keys)
	m := s.Mail
	full.Mail = settings.Mail{Server: m.Server, TLS: m.TLS, User: m.User, From: m.From, To: m.To, RootCA: m.RootCA}
	if name := d.mailPasswordFile(a.Name); name != "" {
		if full.Mail.Password, err = d.line(name); err != nil {
			return nil, err
		}
	}
	return full, nil
}

func (d *Dir) fillVPN(full *settings.Appliance, s *site.Site, a site.Appliance) error {
	own := filepath.Join("appliances", a.Name, "identity")
	var err error
	if full.VPN.PrivateKey, err = d.line(filepath.Join(own, "wireguard_key")); err != nil {
		return err
	}
	psk, err := d.line(filepath.Join(own, "wireguard_preshared_key"))
	if err != nil {
		return err
	}
	full.VPN.Address = netip.PrefixFrom(a.VPNAddress, s.VPN.Network.Bits())
	// Only home, the pushers and key servers behind it: to an appliance the others do not exist.
	allowed := []netip.Prefix{netip.PrefixFrom(s.Home.VPNAddress, s.Home.VPNAddress.BitLen())}
	for _, p := range s.Pushers {
		allowed = append(allowed, netip.PrefixFrom(p.VPNAddress, p.VPNAddress.BitLen()))
	}
	for _, k := range s.KeyServers {
		address, err := keyServerAddress(k)
		if err != nil {
			return err
		}
		if host := netip.PrefixFrom(address.Addr(), address.Addr().BitLen()); !slices.Contains(allowed, host) {
			allowed = append(allowed, host)
		}
	}
	full.VPN.Peers = []settings.Peer{{
		Name: s.Home.Name, PublicKey: s.Home.VPNKey, PresharedKey: psk,
		Endpoints: s.VPN.Endpoints, AllowedIPs: allowed, Keepalive: settings.Duration(25 * time.Second),
	}}
	return nil
}

// receiverKeys are the site's keys, followed by those that a person added.
func receiverKeys(s *site.Site, old []settings.ReceiverKey) []settings.ReceiverKey {
	keys := []settings.ReceiverKey{{Name: s.Home.Name, Role: "push", PublicKey: s.Home.PushKey, Repositories: []string{"*"}}}
	for _, p := range s.Pushers {
		keys = append(keys, settings.ReceiverKey{Name: p.Name, Role: "push", PublicKey: p.PushKey, Repositories: []string{p.Repositories()}})
	}
	if s.Operator.AdminKey != "" {
		keys = append(keys, settings.ReceiverKey{Name: "operator", Role: "admin", PublicKey: s.Operator.AdminKey})
	}
	if s.Operator.RestoreKey != "" {
		keys = append(keys, settings.ReceiverKey{Name: "restore", Role: "restore", PublicKey: s.Operator.RestoreKey})
	}
	ours := len(keys)
	for _, k := range old {
		i := slices.IndexFunc(keys[:ours], func(our settings.ReceiverKey) bool {
			return our.Name == k.Name || identity.SamePublic(our.PublicKey, k.PublicKey)
		})
		switch {
		case i < 0:
			keys = append(keys, k)
		case keys[i].Role == "push" && k.Role == "push":
			keys[i].Repositories, keys[i].QuotaBytes = k.Repositories, k.QuotaBytes
		}
	}
	return keys
}

// writeServiceVPN writes the tunnel of an appliance in service mode for wg-quick.
func (d *Dir) writeServiceVPN(full *settings.Appliance, s *site.Site, a site.Appliance, r *Report) error {
	data := struct {
		Site *site.Site
		site.Appliance
		VPN settings.VPN
	}{s, a, full.VPN}
	return d.writeText(filepath.Join("appliances", a.Name, "wireguard", full.VPN.Interface+".conf"), "service.conf", data, r)
}

func (d *Dir) verifyWireGuard(name string, private secret.Text, public string) error {
	mine, err := identity.WireGuardPublic(private)
	if err != nil {
		return fmt.Errorf("read %s: %w", filepath.Join(d.path, name), err)
	}
	if mine != public {
		return hint.Because(fmt.Errorf("the WireGuard key %s belongs to %s, not to the key in site.toml", filepath.Join(d.path, name), mine),
			"one of the two was changed by hand: bring back the right one from a copy")
	}
	return nil
}

// writeText writes a file from a template. Everything but a README may hold secrets.
func (d *Dir) writeText(name, from string, data any, r *Report) error {
	t, err := template.New(from).Funcs(template.FuncMap{
		"reveal": func(t secret.Text) string { return t.Reveal() },
		"join":   strings.Join,
		"keyFile": func(uuid string) string {
			if uuid == "" {
				return "UUID.key"
			}
			return keywire.KeyFile(uuid)
		},
		"single": func(a netip.Addr) string { return netip.PrefixFrom(a, a.BitLen()).String() },
		"port": func(address string) string {
			_, port, err := net.SplitHostPort(address)
			if err != nil {
				return ""
			}
			return port
		},
	}).ParseFS(templates, "templates/"+from)
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	var out bytes.Buffer
	if err := t.Execute(&out, data); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	defer clear(out.Bytes())
	mode := fs.FileMode(0o600)
	if strings.HasSuffix(name, "README.txt") {
		mode = 0o644
	}
	return d.writeDerived(name, out.Bytes(), mode, r)
}
