package siteinit

import (
	"fmt"
	"net/netip"
	"path/filepath"

	"farkeep/shared/identity"
	"farkeep/shared/secret"
	"farkeep/shared/settings"
	"farkeep/shared/site"
)

func pusherFolder(name string) string { return filepath.Join("pushers", name) }

// AddPusher adds a further Borg server of the same home, with an identity of its
// own. One that is there already is left alone.
func (d *Dir) AddPusher(name string) (*Report, error) {
	if !settings.IsName(name) {
		return nil, usage(fmt.Errorf("%q cannot name a pusher: small letters, digits, dots and dashes, 63 at most", name))
	}
	r, err := d.change(func(doc *site.Document, r *Report) error {
		s := doc.Site()
		for _, old := range s.Pushers {
			if old.Name == name {
				return nil
			}
		}
		p := site.Pusher{Name: name}
		vpn := s.VPN.Network.IsValid()
		var err error
		if vpn {
			if p.VPNAddress, err = s.FreeAddress(); err != nil {
				return err
			}
		}
		if err := rehearsePusher(doc, p); err != nil {
			return usage(err)
		}
		folder := pusherFolder(name)
		if p.PushKey, err = d.ssh(filepath.Join(folder, "pusher", "ssh_key"), "pusher of "+name, r); err != nil {
			return err
		}
		if vpn {
			if p.VPNKey, err = d.wireGuard(filepath.Join(folder, "wireguard", "farkeep.key"), r); err != nil {
				return err
			}
			if err := d.preshared(filepath.Join(folder, "wireguard", "farkeep.psk"), r); err != nil {
				return err
			}
		}
		return doc.AddPusher(p)
	})
	if err == nil && len(r.Changed) > 0 {
		r.Next = append(r.Next, "carry what was brought in line to its machine: home and the appliances do not know "+name+" before")
	}
	return r, err
}

// rehearsePusher adds p with keys that are thrown away: a refused pusher leaves
// no identity behind.
func rehearsePusher(doc *site.Document, p site.Pusher) error {
	trial, err := site.ParseDocument("site.toml", doc.Text())
	if err != nil {
		return err
	}
	if _, p.PushKey, err = identity.New(""); err != nil {
		return err
	}
	if p.VPNAddress.IsValid() {
		if _, p.VPNKey, err = identity.NewWireGuard(); err != nil {
			return err
		}
	}
	return trial.AddPusher(p)
}

// refreshPusher checks the identity of p and writes what follows from the site.
func (d *Dir) refreshPusher(s *site.Site, p site.Pusher, r *Report) error {
	folder := pusherFolder(p.Name)
	if err := d.verify(filepath.Join(folder, "pusher", "ssh_key"), p.PushKey); err != nil {
		return err
	}
	data := struct {
		Site *site.Site
		site.Pusher
		Interface         string
		Address           netip.Prefix
		Key, PresharedKey secret.Text
		Endpoint          string
	}{Site: s, Pusher: p, Interface: Interface}
	if err := d.writeText(filepath.Join(folder, "README.txt"), "readme-pusher.txt", data, r); err != nil || p.VPNKey == "" {
		return err
	}
	var err error
	key := filepath.Join(folder, "wireguard", "farkeep.key")
	if data.Key, err = d.line(key); err != nil {
		return err
	}
	if err := d.verifyWireGuard(key, data.Key, p.VPNKey); err != nil {
		return err
	}
	if data.PresharedKey, err = d.pusherPreshared(p.Name); err != nil {
		return err
	}
	data.Endpoint = nearest(s.VPN.Endpoints)
	data.Address = netip.PrefixFrom(p.VPNAddress, p.VPNAddress.BitLen())
	return d.writeText(filepath.Join(folder, "wireguard", "farkeep.conf"), "pusher.conf", data, r)
}

// nearest is the first endpoint with a private address, or else the first: a
// further pusher is in home's own network, where the outer address of a router
// often does not lead back in.
func nearest(endpoints []string) string {
	for _, e := range endpoints {
		if at, err := netip.ParseAddrPort(e); err == nil && at.Addr().IsPrivate() {
			return e
		}
	}
	return endpoints[0]
}

func (d *Dir) pusherPreshared(name string) (secret.Text, error) {
	return d.line(filepath.Join(pusherFolder(name), "wireguard", "farkeep.psk"))
}

// passage is what home's firewall lets through between its peers: from the
// pushers to the receivers of the appliances.
type passage struct {
	Family    string // "ip" or "ip6", as nft says
	Pushers   []netip.Addr
	Receivers []netip.AddrPort
}

func passageOf(s *site.Site) passage {
	p := passage{Family: family(s.VPN.Network.Addr())}
	for _, one := range s.Pushers {
		p.Pushers = append(p.Pushers, one.VPNAddress)
	}
	for _, a := range s.Appliances {
		// Where home reaches the receiver in another way, so must the pusher.
		if at, err := netip.ParseAddrPort(a.Address); err == nil && a.VPNKey != "" && at.Addr() == a.VPNAddress {
			p.Receivers = append(p.Receivers, at)
		}
	}
	return p
}
