package main

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"encoding/pem"
	"net/netip"
	"testing"
	"time"

	"farkeep/shared/secret"
	"farkeep/shared/settings"

	"golang.org/x/crypto/ssh"
)

// testSettings is a valid farkeep.toml with keys made for this test.
func testSettings(t *testing.T) []byte {
	t.Helper()
	private := func() (secret.Text, string) {
		pub, key, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		block, err := ssh.MarshalPrivateKey(key, "")
		if err != nil {
			t.Fatal(err)
		}
		sshPub, err := ssh.NewPublicKey(pub)
		if err != nil {
			t.Fatal(err)
		}
		return secret.Text(pem.EncodeToMemory(block)), string(ssh.MarshalAuthorizedKey(sshPub))
	}
	wireGuard := func() string {
		var b [32]byte
		if _, err := rand.Read(b[:]); err != nil {
			t.Fatal(err)
		}
		return base64.StdEncoding.EncodeToString(b[:])
	}
	host, _ := private()
	client, _ := private()
	_, server := private()
	_, pusher := private()
	a := settings.Appliance{
		Name: "attic", Site: "home",
		Identity: settings.Identity{HostKey: host, ClientKey: client},
		Clock:    settings.Clock{Servers: []string{"10.0.2.2:47123", "10.0.2.2:47124"}},
		VPN: settings.VPN{
			Interface: "farkeep0", PrivateKey: secret.Text(wireGuard()), Address: netip.MustParsePrefix("10.77.0.2/24"),
			Peers: []settings.Peer{{
				Name: "home", PublicKey: wireGuard(), Endpoints: []string{"10.0.2.2:51820"},
				AllowedIPs: []netip.Prefix{netip.MustParsePrefix("10.77.0.1/32")}, Keepalive: settings.Duration(25 * time.Second),
			}},
		},
		KeyServers: []settings.KeyServer{{Name: "cellar", Address: "10.77.0.1:2222", HostKey: server}},
		Disk: settings.Disk{
			LUKS: "01234567-89ab-cdef-0123-456789abcdef", IdleClose: settings.Duration(time.Minute),
			Relay: settings.Relay{Driver: "none", Active: "high"},
		},
		Receiver: settings.Receiver{Port: 22, Keys: []settings.ReceiverKey{{Name: "borg", Role: "push", PublicKey: pusher, Repositories: []string{"*"}}}},
		DeadMan:  settings.DefaultDeadMan(),
		Mail: settings.Mail{
			Server: "mail.example:587", TLS: "starttls", User: "attic", Password: "a password",
			From: "attic@example.org", To: []string{"operator@example.org"},
		},
	}
	text, err := a.Render()
	if err != nil {
		t.Fatal(err)
	}
	return text.Reveal()
}
