package site

import (
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"farkeep/shared/identity"
	"farkeep/shared/settings"
	"farkeep/shared/tomlfile"
)

// Limits on what a site may name.
const (
	MaxAppliances   = 500
	MaxRepositories = 1000
	MaxDirectories  = 16
	MaxPushers      = 16
	maxRates        = 16
	minReread       = 7 * 24 * time.Hour
)

// Boards are the values of Appliance.Board: what the image can boot, and
// "service" for the program under a system of the user's own.
func Boards() []string { return []string{"pi3", "pi4", "zero2w", "virt", "service"} }

// validator knows what values of a site look like.
type validator struct{ *tomlfile.Checker }

func (v validator) name(s, table string, n int) {
	v.Check(settings.IsName(s), table, "name", n, "%q is not a name: small letters, digits, dots and dashes, 63 at most", s)
}

func (v validator) hostPort(s, table, key string, n int) {
	v.Check(settings.IsHostPort(s), table, key, n, "%q is not host:port", s)
}

func (v validator) publicKey(s, table, key string, n int) {
	_, err := identity.ParsePublic(s)
	v.Check(err == nil, table, key, n, "%v", err)
}

func (v validator) wireGuardKey(s, table, key string, n int) {
	_, err := identity.ParseWireGuard(s)
	v.Check(err == nil, table, key, n, "%v", err)
}

func (v validator) path(s, table string, n int) {
	v.Check(filepath.IsAbs(s) && filepath.Clean(s) == s, table, "path", n, "%q is not a plain absolute path", s)
}

// unique finds what must not be named twice; owner says who has it already.
type unique map[string]string

func (u unique) take(v validator, value, owner, table, key string, n int) {
	if value == "" {
		return
	}
	first, taken := u[value]
	v.Check(!taken, table, key, n, "%s has it already: every one has its own", first)
	u[value] = owner
}

func (s *Site) validate(v validator) {
	v.name(s.Name, "", 0)
	s.validateHome(v)
	v.Check(len(s.KeyServers) >= 1 && len(s.KeyServers) <= settings.MaxKeyServers, "key_server", "name", 0, "1 to %d key servers are needed, %d are named", settings.MaxKeyServers, len(s.KeyServers))
	names := unique{}
	for i, k := range s.KeyServers {
		v.name(k.Name, "key_server", i)
		names.take(v, k.Name, "another key server", "key_server", "name", i)
		v.hostPort(k.Address, "key_server", "address", i)
		v.publicKey(k.HostKey, "key_server", "host_key", i)
		v.Check(slices.Contains([]string{"", PlaceNone, PlaceOthers}, k.Place), "key_server", "place", i, "%q is none of %s (ask the other key servers where appliances are), %s (judge no places)", k.Place, PlaceOthers, PlaceNone)
		v.Check(k.Place != PlaceOthers || slices.ContainsFunc(s.KeyServers, func(o KeyServer) bool { return o.Place == "" }), "key_server", "place", i, "no other key server sees places itself")
	}
	s.validateAppliances(v)
	s.validatePushers(v)
	s.validateSources(v)
	s.validateAlarms(v)
	s.validateBundle(v)
}

func (s *Site) validateHome(v validator) {
	h := s.Home
	v.name(h.Name, "home", 0)
	v.publicKey(h.PushKey, "home", "push_key", 0)
	for _, k := range []struct{ key, value string }{{"admin_key", s.Operator.AdminKey}, {"restore_key", s.Operator.RestoreKey}} {
		if k.value == "" {
			continue
		}
		v.publicKey(k.value, "operator", k.key, 0)
		v.Check(!identity.SamePublic(k.value, h.PushKey), "operator", k.key, 0, "this is home's push key: whoever takes over home would be the operator")
	}
	v.Check(s.Operator.AdminKey == "" || !identity.SamePublic(s.Operator.AdminKey, s.Operator.RestoreKey), "operator", "restore_key", 0, "this is the admin key: one key has one role")

	if !s.VPN.Network.IsValid() {
		// The system's own VPN carries the traffic: every appliance says so below.
		v.Check(h.VPNKey == "" && len(s.VPN.Endpoints) == 0, "vpn", "network", 0, "the network of the VPN is missing: write for instance 10.77.0.0/24")
		return
	}
	v.Check(s.VPN.Network.Masked() == s.VPN.Network, "vpn", "network", 0, "%v is an address in a network: write %v", s.VPN.Network, s.VPN.Network.Masked())
	v.Check(len(s.VPN.Endpoints) >= 1 && len(s.VPN.Endpoints) <= settings.MaxEndpoints, "vpn", "endpoints", 0, "1 to %d endpoints are needed: where the appliances find home", settings.MaxEndpoints)
	for _, e := range s.VPN.Endpoints {
		v.hostPort(e, "vpn", "endpoints", 0)
	}
	v.Check(s.VPN.ListenPort >= 1 && s.VPN.ListenPort <= 65535, "vpn", "listen_port", 0, "%d is not a port", s.VPN.ListenPort)
	v.wireGuardKey(h.VPNKey, "home", "vpn_key", 0)
	v.Check(usable(s.VPN.Network, h.VPNAddress), "home", "vpn_address", 0, "%v is no address of %v", h.VPNAddress, s.VPN.Network)
}

// usable reports whether a is an address in p that a machine may have.
func usable(p netip.Prefix, a netip.Addr) bool {
	return a.IsValid() && a.Zone() == "" && p.Contains(a) && a != p.Masked().Addr() && (!a.Is4() || a != lastOf(p))
}

// lastOf is the broadcast address of an IPv4 network.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().As4()
	for i := p.Bits(); i < 32; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	return netip.AddrFrom4(b)
}

func (s *Site) validateAppliances(v validator) {
	const table = "appliance"
	v.Check(len(s.Appliances) <= MaxAppliances, table, "name", MaxAppliances, "at most %d appliances", MaxAppliances)
	names, addresses, vpnKeys, clientKeys, hostKeys, disks := unique{}, unique{}, unique{}, unique{}, unique{}, unique{}
	if s.Home.VPNAddress.IsValid() {
		addresses[s.Home.VPNAddress.String()] = "home"
	}
	vpnKeys[s.Home.VPNKey] = "home"
	for i, a := range s.Appliances {
		v.name(a.Name, table, i)
		names.take(v, a.Name, "another appliance", table, "name", i)
		v.Check(slices.Contains(Boards(), a.Board), table, "board", i, "%q is not a board: one of %s", a.Board, strings.Join(Boards(), ", "))
		if a.Board == "service" && a.VPNKey == "" {
			// Reached through a VPN of the system's own; its address there is all we need.
			v.hostPort(a.Address, table, "address", i)
		} else {
			v.Check(s.VPN.Network.IsValid(), table, "board", i, "%q needs a VPN: write [vpn]; only \"service\" may use the system's own", a.Board)
			v.wireGuardKey(a.VPNKey, table, "vpn_key", i)
			v.Check(usable(s.VPN.Network, a.VPNAddress), table, "vpn_address", i, "%v is no address of %v", a.VPNAddress, s.VPN.Network)
			v.hostPort(a.Address, table, "address", i)
		}
		if a.VPNAddress.IsValid() {
			addresses.take(v, a.VPNAddress.String(), a.Name, table, "vpn_address", i)
		}
		vpnKeys.take(v, a.VPNKey, a.Name, table, "vpn_key", i)
		v.publicKey(a.HostKey, table, "host_key", i)
		v.publicKey(a.ClientKey, table, "client_key", i)
		hostKeys.take(v, fingerprint(a.HostKey), a.Name, table, "host_key", i)
		clientKeys.take(v, fingerprint(a.ClientKey), a.Name, table, "client_key", i)
		v.Check(a.LUKS == "" || settings.IsLUKSUUID(a.LUKS), table, "luks_uuid", i, "%q is not a LUKS UUID: farkeep-image disk prints it, and so does cryptsetup luksUUID", a.LUKS)
		disks.take(v, a.LUKS, a.Name, table, "luks_uuid", i)

		key, text := a.Relay.Mistake()
		v.Check(key == "", "appliance.relay", key, i, "%s", text)
		key, text = a.Window.Mistake()
		v.Check(key == "", "appliance.window", key, i, "%s", text)
		v.Check(a.LUKSHeader == "" || headerPattern.MatchString(a.LUKSHeader), table, "luks_header", i, "%q is not the fingerprint of a LUKS header: 64 hexadecimal digits, as farkeep-image disk prints them", a.LUKSHeader)
		key, text = a.KeyPolicy.mistake(a)
		v.Check(key == "", "appliance.key_policy", key, i, "%s", text)
	}
}

func fingerprint(line string) string {
	key, err := identity.ParsePublic(line)
	if err != nil {
		return ""
	}
	return identity.Fingerprint(key)
}

// validatePushers comes after the appliances, so that of two that share
// something the pusher is named.
func (s *Site) validatePushers(v validator) {
	const table = "pusher"
	v.Check(len(s.Pushers) <= MaxPushers, table, "name", MaxPushers, "at most %d pushers", MaxPushers)
	// The names of an appliance's receiver keys, and the hosts of its heartbeats.
	names := unique{s.Home.Name: "home", "operator": "the operator's key", "restore": "the restore key"}
	addresses, vpnKeys := unique{s.Home.VPNAddress.String(): "home"}, unique{s.Home.VPNKey: "home"}
	pushKeys := unique{
		fingerprint(s.Operator.AdminKey): "the operator", fingerprint(s.Operator.RestoreKey): "the restore key",
		fingerprint(s.Home.PushKey): "home",
	}
	for _, a := range s.Appliances {
		addresses[a.VPNAddress.String()], vpnKeys[a.VPNKey] = a.Name, a.Name
	}
	for i, p := range s.Pushers {
		v.name(p.Name, table, i)
		names.take(v, p.Name, "another pusher", table, "name", i)
		for _, other := range s.Pushers {
			v.Check(!strings.HasPrefix(p.Name, other.prefix()), table, "name", i, "%q would have the repositories of %s: choose a name that does not begin with %q", p.Name, other.Name, other.prefix())
		}
		v.publicKey(p.PushKey, table, "push_key", i)
		pushKeys.take(v, fingerprint(p.PushKey), p.Name, table, "push_key", i)
		if !s.VPN.Network.IsValid() {
			v.Check(!p.VPNAddress.IsValid() && p.VPNKey == "", table, "vpn_address", i, "there is no [vpn] for it")
			continue
		}
		v.wireGuardKey(p.VPNKey, table, "vpn_key", i)
		vpnKeys.take(v, p.VPNKey, p.Name, table, "vpn_key", i)
		v.Check(usable(s.VPN.Network, p.VPNAddress), table, "vpn_address", i, "%v is no address of %v", p.VPNAddress, s.VPN.Network)
		addresses.take(v, p.VPNAddress.String(), p.Name, table, "vpn_address", i)
	}
}

func (s *Site) knownHost(v validator, host, table string, n int) {
	known := host == "" || slices.ContainsFunc(s.Pushers, func(p Pusher) bool { return p.Name == host })
	v.Check(known, table, "host", n, "there is no pusher %q: leave host out for home, or add a [[pusher]]", host)
}

// host checks that the site has a pusher of that name, and that the repository
// name or prefix in key is one for it.
func (s *Site) host(v validator, host, name, table, key string, n int) {
	s.knownHost(v, host, table, n)
	owner := s.Owner(name)
	v.Check(host == "" || owner == host, table, key, n, "%q does not begin with %q: appliances take nothing else from %s", name, host+"-", host)
	v.Check(host != "" || owner == "", table, key, n, "what begins with %q is for the pusher %s: give it another name, or host = %q", owner+"-", owner, owner)
}

func (s *Site) validateSources(v validator) {
	v.Check(len(s.Repositories)+len(s.Folders) <= MaxRepositories, "repository", "name", 0, "at most %d repositories and folders", MaxRepositories)
	names, paths := unique{}, unique{}
	for i, r := range s.Repositories {
		v.Check(settings.IsRepository(r.Name), "repository", "name", i, "%q is not a repository name: letters, digits, dots, dashes and underscores", r.Name)
		names.take(v, r.Name, "another repository", "repository", "name", i)
		v.path(r.Path, "repository", i)
		paths.take(v, r.Host+":"+r.Path, r.Name, "repository", "path", i)
		s.host(v, r.Host, r.Name, "repository", "name", i)
		v.Check(r.Mount == "" || filepath.IsAbs(r.Mount), "repository", "mount", i, "%q is not an absolute path", r.Mount)
	}
	for i, f := range s.Folders {
		v.path(f.Path, "repository_folder", i)
		paths.take(v, f.Host+":"+f.Path, "another entry", "repository_folder", "path", i)
		s.host(v, f.Host, f.Prefix, "repository_folder", "prefix", i)
		v.Check(f.Prefix == "" || settings.IsRepository(f.Prefix), "repository_folder", "prefix", i, "%q is not the beginning of a repository name", f.Prefix)
		v.Check(f.Mount == "" || filepath.IsAbs(f.Mount), "repository_folder", "mount", i, "%q is not an absolute path", f.Mount)
		for _, name := range f.Exclude {
			v.Check(name != "" && !strings.Contains(name, "/"), "repository_folder", "exclude", i, "%q is not a name directly inside the folder", name)
		}
	}
	v.Check(len(s.Directories) <= MaxDirectories, "directory_target", "name", 0, "at most %d directory targets", MaxDirectories)
	targets := unique{}
	for _, a := range s.Appliances {
		targets[a.Name] = "an appliance"
	}
	for i, d := range s.Directories {
		v.name(d.Name, "directory_target", i)
		targets.take(v, d.Name, "another target", "directory_target", "name", i)
		v.path(d.Path, "directory_target", i)
		s.knownHost(v, d.Host, "directory_target", i)
	}
	v.Check(s.Push.RateLimit >= 0, "push", "rate_limit", 0, "a rate cannot be negative")
	v.Check(s.Push.RereadEvery == 0 || s.Push.RereadEvery.Std() >= minReread, "push", "reread_every", 0, "%v is less than %v; \"0s\" is never", s.Push.RereadEvery, settings.Duration(minReread).Days())
	v.Check(len(s.Push.Rates) <= maxRates, "push.rate", "hours", 0, "at most %d", maxRates)
	for i, r := range s.Push.Rates {
		v.Check(r.RateLimit >= 0, "push.rate", "rate_limit", i, "a rate cannot be negative")
		v.Check(r.Hours != Hours{}, "push.rate", "hours", i, `hours are missing: "07:00-23:00"`)
	}
}

func (s *Site) validateAlarms(v validator) {
	key, text := s.DeadMan.Mistake()
	v.Check(key == "", "dead_man", key, 0, "%s", text)
	table, key, n, text := s.History.Mistake()
	v.Check(key == "", table, key, n, "%s", text)
	v.Check(len(s.Clock.Servers) <= settings.MaxClockServers, "clock", "servers", 0, "at most %d time sources", settings.MaxClockServers)
	for _, server := range s.Clock.Servers {
		v.Check(server != "" && len(server) <= 255, "clock", "servers", 0, "%q is not a host", server)
	}

	m := s.Mail
	if m.Server == "" {
		// Not every program that reads the site sends mail.
		v.Check(m.User == "" && m.From == "" && len(m.To) == 0, "mail", "server", 0, "the mail server is missing: write host:port")
		return
	}
	v.hostPort(m.Server, "mail", "server", 0)
	v.Check(m.TLS == "implicit" || m.TLS == "starttls", "mail", "tls", 0, "%q is neither implicit nor starttls", m.TLS)
	v.Check(settings.IsMailAddress(m.From), "mail", "from", 0, "%q is not a mail address", m.From)
	v.Check(len(m.To) >= 1 && len(m.To) <= settings.MaxRecipients, "mail", "to", 0, "1 to %d recipients are needed", settings.MaxRecipients)
	for _, to := range m.To {
		v.Check(settings.IsMailAddress(to), "mail", "to", 0, "%q is not a mail address", to)
	}
}
