package siteinit_test

import (
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"farkeep/image/siteinit"
	"farkeep/shared/hint"
	"farkeep/shared/settings"
	"farkeep/shared/site"
)

func TestAPusherIsMadeOnce(t *testing.T) {
	d := complete(t)
	beforeSite, err := os.ReadFile(d.SitePath())
	check(t, err)
	r, err := d.AddPusher("tower")
	check(t, err)
	for _, name := range []string{"pushers/tower/pusher/ssh_key", "pushers/tower/wireguard/farkeep.key", "pushers/tower/wireguard/farkeep.psk", "pushers/tower/wireguard/farkeep.conf", "pushers/tower/README.txt"} {
		if !slices.Contains(r.Made, name) {
			t.Errorf("%s was not made: %v", name, r.Made)
		}
	}
	for _, name := range []string{"home/wireguard/farkeep.conf", "home/wireguard/farkeep.nft", "appliances/attic/farkeep.toml"} {
		if !slices.Contains(r.Changed, name) {
			t.Errorf("%s was not brought in line: %v", name, r.Changed)
		}
	}
	before := look(t, d.Path())
	again := func(what string) {
		t.Helper()
		if _, err := d.AddPusher("tower"); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if names := changed(before, look(t, d.Path())); len(names) > 0 {
			t.Errorf("%s: changed %v", what, names)
		}
	}
	again("a second time")
	// As if the power had gone before site.toml was replaced, or before the last files were.
	check(t, os.WriteFile(d.SitePath(), beforeSite, 0o644))
	again("without its entry")
	check(t, os.Remove(filepath.Join(d.Path(), "pushers", "tower", "wireguard", "farkeep.conf")))
	again("without its configuration")

	key := filepath.Join(d.Path(), "pushers", "tower", "pusher", "ssh_key")
	check(t, os.Remove(key))
	if _, err := d.AddPusher("tower"); err == nil || !strings.Contains(hint.Of(err), "bring it back from a copy") {
		t.Errorf("its identity is lost: %v", err)
	}
	if _, err := os.Stat(key); !errors.Is(err, fs.ErrNotExist) {
		t.Error("an old name got a new identity")
	}
}

func TestARefusedPusherLeavesNoIdentity(t *testing.T) {
	d := complete(t)
	before := look(t, d.Path())
	for _, name := range []string{"", "../x", "borg", "operator"} {
		if _, err := d.AddPusher(name); err == nil || hint.Code(err) != hint.ExitUsage {
			t.Errorf("%q: %v", name, err)
		}
	}
	if names := changed(before, look(t, d.Path())); len(names) > 0 {
		t.Errorf("changed: %v", names)
	}
}

func TestPusherAndItsPeers(t *testing.T) {
	d := complete(t)
	_, err := d.AddPusher("tower")
	check(t, err)
	_, err = d.AddAppliance(siteinit.NewAppliance{Name: "nas", Board: "service", OwnVPN: true, Address: "nas.example.ts.net:2222"})
	check(t, err)
	_, err = d.AddRepository(site.Repository{Name: "tower-mail", Path: "/srv/photos", Host: "tower"})
	check(t, err)
	_, err = d.AddFolder(site.Folder{Path: "/srv/borg", Prefix: "tower-", Host: "tower"})
	check(t, err)
	tower := d.Site().Pushers[0]

	text, err := os.ReadFile(d.ApplianceSettings("attic"))
	check(t, err)
	attic, err := settings.Parse("farkeep.toml", text)
	check(t, err)
	i := slices.IndexFunc(attic.Receiver.Keys, func(k settings.ReceiverKey) bool { return k.Name == "tower" })
	if i < 0 {
		t.Fatalf("attic does not know tower: %+v", attic.Receiver.Keys)
	}
	k := attic.Receiver.Keys[i]
	if k.Role != "push" || k.PublicKey != tower.PushKey || !slices.Equal(k.Repositories, []string{"tower-*"}) {
		t.Errorf("attic takes %+v", k)
	}
	if len(attic.VPN.Peers) != 1 || !slices.Contains(attic.VPN.Peers[0].AllowedIPs, netip.MustParsePrefix("10.77.0.4/32")) {
		t.Errorf("attic's peers: %+v", attic.VPN.Peers)
	}

	home := strip(t, filepath.Join(d.Path(), "home", "wireguard", "farkeep.conf"))
	if !strings.Contains(home, "PublicKey = "+tower.VPNKey+"\nPresharedKey = ") || !strings.Contains(home, "AllowedIPs = 10.77.0.4/32\n") {
		t.Error("tower is no peer of home")
	}
	conf, err := os.ReadFile(filepath.Join(d.Path(), "home", "wireguard", "farkeep.conf"))
	check(t, err)
	if !strings.Contains(string(conf), "PostUp = sysctl -q -w net.ipv4.conf.%i.forwarding=1\nPostDown = ") {
		t.Error("home does not forward")
	}
	own := strip(t, filepath.Join(d.Path(), "pushers", "tower", "wireguard", "farkeep.conf"))
	if strings.Count(own, "[Peer]") != 1 || !strings.Contains(own, "PublicKey = "+d.Site().Home.VPNKey+"\n") ||
		!strings.Contains(own, "Endpoint = 192.168.1.10:51820\nAllowedIPs = 10.77.0.2/32\nAllowedIPs = 10.77.0.3/32\nPersistentKeepalive") {
		t.Error("tower's one peer is not home, by its LAN, for attic and shed")
	}
	// Its folder has no secret of another machine but the key that it shares with home.
	for name, text := range look(t, d.Path()) {
		if !strings.HasPrefix(name, "pushers/") && strings.HasSuffix(name, "_key") && strings.Contains(own, strings.TrimSpace(text)) {
			t.Errorf("tower has %s", name)
		}
	}
}
