package settings

import (
	"regexp"
	"time"

	"farkeep/shared/history"
	"farkeep/shared/identity"
	"farkeep/shared/secret"
	"farkeep/shared/tomlfile"
)

var interfacePattern = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,15}$`)

// validator knows what values of a settings file look like.
type validator struct{ *tomlfile.Checker }

func (a *Appliance) validate(v validator) {
	v.Check(IsName(a.Name), "", "name", 0, "%q is not a name: small letters, digits, dots and dashes, 63 at most", a.Name)
	v.Check(IsName(a.Site), "", "site", 0, "%q is not a name: small letters, digits, dots and dashes, 63 at most", a.Site)
	v.privateKey(a.Identity.HostKey, "host_key")
	v.privateKey(a.Identity.ClientKey, "client_key")
	a.validateNetwork(v)
	a.validateVPN(v)

	v.Check(len(a.KeyServers) >= 1 && len(a.KeyServers) <= MaxKeyServers, "key_server", "address", 0, "1 to %d key servers are needed, %d are named", MaxKeyServers, len(a.KeyServers))
	for i, k := range a.KeyServers {
		v.Check(IsName(k.Name), "key_server", "name", i, "%q is not a name", k.Name)
		v.hostPort(k.Address, "key_server", "address", i)
		v.publicKey(k.HostKey, "key_server", "host_key", i)
	}
	a.validateDisk(v)
	a.validateReceiver(v)
	a.validateAlarms(v)
}

func (a *Appliance) validateNetwork(v validator) {
	n := a.Network
	v.Check(n.Interface == "" || interfacePattern.MatchString(n.Interface), "network", "interface", 0, "%q is not an interface name", n.Interface)
	v.Check(!n.Gateway.IsValid() || n.Address.IsValid(), "network", "gateway", 0, "a gateway needs a fixed address: set address too, or remove it")
	v.Check(len(a.Clock.Servers) <= MaxClockServers, "clock", "servers", 0, "at most %d time sources", MaxClockServers)
	for _, s := range a.Clock.Servers {
		v.Check(s != "" && len(s) <= 255, "clock", "servers", 0, "%q is not a host", s)
	}
}

func (a *Appliance) validateVPN(v validator) {
	w := a.VPN
	v.Check(interfacePattern.MatchString(w.Interface), "vpn", "interface", 0, "%q is not an interface name", w.Interface)
	if w.PrivateKey == "" && len(w.Peers) == 0 {
		return // the system's own VPN; only service mode accepts that
	}
	v.wireGuardKey(w.PrivateKey.Reveal(), "vpn", "private_key", 0)
	v.Check(w.Address.IsValid(), "vpn", "address", 0, "the appliance's address in the VPN is missing: write for instance 10.77.0.2/24")
	v.Check(w.ListenPort >= 0 && w.ListenPort <= 65535, "vpn", "listen_port", 0, "%d is not a port", w.ListenPort)
	v.Check(len(w.Peers) >= 1 && len(w.Peers) <= MaxPeers, "vpn.peer", "public_key", 0, "1 to %d peers are needed, %d are named", MaxPeers, len(w.Peers))
	for i, p := range w.Peers {
		v.Check(IsName(p.Name), "vpn.peer", "name", i, "%q is not a name", p.Name)
		v.wireGuardKey(p.PublicKey, "vpn.peer", "public_key", i)
		if p.PresharedKey != "" {
			v.wireGuardKey(p.PresharedKey.Reveal(), "vpn.peer", "preshared_key", i)
		}
		v.Check(len(p.Endpoints) >= 1 && len(p.Endpoints) <= MaxEndpoints, "vpn.peer", "endpoints", i, "1 to %d endpoints are needed", MaxEndpoints)
		for _, e := range p.Endpoints {
			v.hostPort(e, "vpn.peer", "endpoints", i)
		}
		v.Check(len(p.AllowedIPs) > 0, "vpn.peer", "allowed_ips", i, "the peer's addresses are missing")
		v.Check(p.Keepalive.Std() >= time.Second && p.Keepalive.Std() <= time.Hour, "vpn.peer", "keepalive", i, "%v is not between 1s and 1h", p.Keepalive)
	}
}

func (a *Appliance) validateDisk(v validator) {
	d := a.Disk
	v.Check(IsLUKSUUID(d.LUKS), "disk", "luks_uuid", 0, "%q is not a LUKS UUID: farkeep-image disk prints it, and so does cryptsetup luksUUID", d.LUKS)
	key, text := d.Relay.Mistake()
	v.Check(key == "", "disk.relay", key, 0, "%s", text)
	key, text = d.Window.Mistake()
	v.Check(key == "", "disk.window", key, 0, "%s", text)
	v.Check(d.IdleClose.Std() >= time.Second, "disk", "idle_close", 0, "%v is shorter than 1s", d.IdleClose)
}

func (a *Appliance) validateReceiver(v validator) {
	v.Check(a.Receiver.Port >= 1 && a.Receiver.Port <= 65535, "receiver", "port", 0, "%d is not a port", a.Receiver.Port)
	v.Check(len(a.Receiver.Keys) <= MaxReceiverKeys, "receiver.key", "name", 0, "at most %d keys", MaxReceiverKeys)
	seen := map[string]bool{}
	for i, k := range a.Receiver.Keys {
		v.Check(IsName(k.Name), "receiver.key", "name", i, "%q is not a name", k.Name)
		v.publicKey(k.PublicKey, "receiver.key", "public_key", i)
		if key, err := identity.ParsePublic(k.PublicKey); err == nil {
			print := identity.Fingerprint(key) // the comment makes no other key of it
			v.Check(!seen[print], "receiver.key", "public_key", i, "the same key is authorised twice: one key has one role")
			seen[print] = true
		}
		v.Check(k.Role == "push" || k.Role == "restore" || k.Role == "admin", "receiver.key", "role", i, "%q is not push, restore or admin", k.Role)
		v.Check(k.Role != "push" || len(k.Repositories) > 0, "receiver.key", "repositories", i, "a push key needs the repositories that it may push")
		for _, name := range k.Repositories {
			v.Check(history.IsPattern(name), "receiver.key", "repositories", i, "%q is not a repository name", name)
		}
		v.Check(k.QuotaBytes >= 0, "receiver.key", "quota_bytes", i, "a quota cannot be negative")
	}
}

func (a *Appliance) validateAlarms(v validator) {
	key, text := a.DeadMan.Mistake()
	v.Check(key == "", "dead_man", key, 0, "%s", text)
	table, key, n, text := a.History.Mistake()
	v.Check(key == "", table, key, n, "%s", text)

	m := a.Mail
	v.hostPort(m.Server, "mail", "server", 0)
	v.Check(m.TLS == "implicit" || m.TLS == "starttls", "mail", "tls", 0, "%q is neither implicit nor starttls", m.TLS)
	v.address(m.From, "from")
	v.Check(len(m.To) >= 1 && len(m.To) <= MaxRecipients, "mail", "to", 0, "1 to %d recipients are needed", MaxRecipients)
	for _, to := range m.To {
		v.address(to, "to")
	}
}

func (v validator) address(s, key string) {
	v.Check(IsMailAddress(s), "mail", key, 0, "%q is not a mail address", s)
}

func (v validator) hostPort(s, table, key string, n int) {
	v.Check(IsHostPort(s), table, key, n, "%q is not host:port", s)
}

func (v validator) publicKey(s, table, key string, n int) {
	_, err := identity.ParsePublic(s)
	v.Check(err == nil, table, key, n, "%v", err)
}

func (v validator) privateKey(s secret.Text, key string) {
	_, err := identity.Signer(s)
	v.Check(err == nil, "identity", key, 0, "%v", err)
}

func (v validator) wireGuardKey(s, table, key string, n int) {
	_, err := identity.ParseWireGuard(s)
	v.Check(err == nil, table, key, n, "%v", err)
}
