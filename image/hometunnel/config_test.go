package hometunnel_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"farkeep/image/hometunnel"
)

const (
	keyA = "YAnz5TF+lXXJte14tji3zlMNftYN/qDSTLGMSBRnPEg="
	keyB = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg="
)

func TestParseConfig(t *testing.T) {
	text := strings.ReplaceAll(`# home
[Interface]
Address = 10.77.0.1/24, fd00::1/64
ListenPort = 51820
PrivateKey = `+keyA+`
PreUp = nft -f /etc/wireguard/%i.nft

[Peer]
# vault
PublicKey = `+keyB+`
PresharedKey = `+keyA+`
AllowedIPs = 10.77.0.2, 10.78.0.0/16
PersistentKeepalive = 25
Endpoint = 192.0.2.1:51820
`, "\n", "\r\n")
	got, err := hometunnel.ParseConfig([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	want := hometunnel.Config{
		PrivateKey: keyA, ListenPort: 51820, Address: netip.MustParseAddr("10.77.0.1"),
		Peers: []hometunnel.Peer{{
			PublicKey: keyB, PresharedKey: keyA, Keepalive: 25 * time.Second,
			AllowedIPs: []netip.Prefix{netip.MustParsePrefix("10.77.0.2/32"), netip.MustParsePrefix("10.78.0.0/16")},
			Endpoint:   netip.MustParseAddrPort("192.0.2.1:51820"),
		}},
	}
	if d := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{}, netip.AddrPort{})); d != "" {
		t.Error(d)
	}
}

func TestParseConfigErrors(t *testing.T) {
	head := "[Interface]\nAddress = 10.77.0.1\nPrivateKey = " + keyA + "\n"
	for _, c := range []struct{ text, want string }{
		{"", "no PrivateKey"},
		{"[Interface]\nPrivateKey = " + keyA, "no Address"},
		{head + "[Peer]\nAllowedIPs = 10.77.0.2", "no PublicKey in [Peer] number 1"},
		{"Address = 10.77.0.1", "line 1: \"address\" stands before any section"},
		{head + "[Pear]", `line 4: section "[Pear]"`},
		{head + "Adress = 10.77.0.1", `line 4: "adress" is unknown in [Interface]`},
		{head + "Address", "line 4: want NAME = VALUE"},
		{head + "ListenPort = 70000", `line 4: set ListenPort: "70000"`},
		{"[Interface]\nPrivateKey = abc", "line 2: set PrivateKey: this is not a WireGuard key"},
		{head + "[Peer]\nPublicKey = abc", "line 5: set PublicKey: this is not"},
		{head + "[Peer]\nPresharedKey = abc", "line 5: set PresharedKey: this is not"},
		{head + "[Peer]\nAllowedIPs = home", `line 5: set AllowedIPs: "home" is no address`},
		{head + "[Peer]\nPersistentKeepalive = soon", "line 5: set PersistentKeepalive"},
		{head + "[Peer]\nName = x", `line 5: "name" is unknown in [Peer]`},
	} {
		if _, err := hometunnel.ParseConfig([]byte(c.text)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q: %v, want %q", c.text, err, c.want)
		}
	}
}

// A configuration that is taken has a usable key and address, and printing it shows no key.
func FuzzParseConfig(f *testing.F) {
	f.Add([]byte("[Interface]\nAddress = 10.77.0.1/24\nPrivateKey = " + keyA + "\n[Peer]\nPublicKey = " + keyB + "\nAllowedIPs = ::/0\n"))
	f.Add([]byte("[Peer]\n[Peer]\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := hometunnel.ParseConfig(text)
		if err != nil {
			return
		}
		if !c.Address.IsValid() || len(c.PrivateKey) != 44 {
			t.Errorf("took %q", text)
		}
		if strings.Contains(fmt.Sprintf("%+v", c), c.PrivateKey.Reveal()) {
			t.Error("prints its private key")
		}
	})
}
