package main

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"farkeep/shared/hint"
	"farkeep/shared/identity"
	"farkeep/shared/pushwire"
	"farkeep/shared/sshverb"

	"golang.org/x/crypto/ssh"
)

// serveSSH answers SSH on this machine; handler nil knows nobody, as a key server
// knows no pusher.
func serveSSH(t *testing.T, handler sshverb.Handler) (address, hostKey string) {
	t.Helper()
	private, public, err := identity.New("test")
	if err != nil {
		t.Fatal(err)
	}
	signer, err := identity.Signer(private)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &sshverb.Server{
		HostKey: signer, Exec: handler, Log: slog.New(slog.DiscardHandler),
		Authorise: func(ssh.PublicKey, net.Addr) (*ssh.Permissions, error) {
			if handler == nil {
				return nil, errors.New("unknown")
			}
			return &ssh.Permissions{}, nil
		},
	}
	done := make(chan error, 1)
	go func() { done <- server.Serve(t.Context(), l) }()
	t.Cleanup(func() { <-done })
	return l.Addr().String(), strings.TrimSpace(public)
}

// TestReadyToTravel: the list is made of what a real appliance's protocol and a
// real key server's handshake say.
func TestReadyToTravel(t *testing.T) {
	now := time.Now().UTC()
	header := strings.Repeat("5a", 32)
	status := pushwire.Status{
		Appliance: "attic", Version: "v1", Time: now, Started: now.Add(-time.Hour), ClockSet: true, MailSent: now.Add(-time.Hour),
		Disk:         pushwire.DiskState{State: "off", Since: now, HeaderDigest: header},
		Repositories: []pushwire.RepositoryStatus{{Name: "photos", ConfirmedAt: now.Add(-time.Hour)}},
		VPN:          &pushwire.VPNState{Addresses: []string{"100.66.7.4/28"}, Endpoint: "203.0.113.7:51820", LastHandshake: now.Add(-time.Minute)},
	}
	at, hostKey := serveSSH(t, func(_ context.Context, s *sshverb.Session) error {
		return json.NewEncoder(s.ReadWriteCloser()).Encode(status)
	})
	keyServer, keyServerKey := serveSSH(t, nil)
	dir := t.TempDir()
	if err := writeSite(dir, ""); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(dir, "site.toml"))
	if err != nil {
		t.Fatal(err)
	}
	before, _, _ := strings.Cut(string(text), "[[key_server]]")
	wg, public, err := identity.NewWireGuard()
	if err != nil || wg == "" {
		t.Fatal(err)
	}
	const disk = "0b6e1f5c-8d1b-4c52-9a57-6a2f0c9d3e11"
	_, client, err := identity.New("client")
	if err != nil {
		t.Fatal(err)
	}
	write := func(keyServerKey, more string) {
		t.Helper()
		site := before + "vpn_address = \"10.77.0.1\"\nvpn_key = \"" + public + "\"\n" +
			"[vpn]\nnetwork = \"10.77.0.0/24\"\nlisten_port = 51820\nendpoints = [\"home.example.net:51820\"]\n" +
			"[[key_server]]\nname = \"keys\"\naddress = \"" + keyServer + "\"\nhost_key = \"" + keyServerKey + "\"\n" +
			"[[appliance]]\nname = \"attic\"\nboard = \"pi4\"\nvpn_address = \"10.77.0.2\"\nvpn_key = \"" + public[:1] + strings.Repeat("A", 42) + "=\"\naddress = \"" + at + "\"\nhost_key = \"" + hostKey + "\"\nclient_key = \"" + strings.TrimSpace(client) + "\"\nluks_uuid = \"" + disk + "\"\n" +
			"[appliance.relay]\ndriver = \"gpio\"\nline = 17\nactive = \"low\"\n" + more
		if err := os.WriteFile(filepath.Join(dir, "site.toml"), []byte(site), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	ask := func(args ...string) (int, string) {
		out := &watcher{text: "\x00"}
		args = append([]string{"status", "--ready-to-travel", "--site", filepath.Join(dir, "site.toml"), "--identity", filepath.Join(dir, "ssh_key"), "--state", filepath.Join(dir, "state")}, args...)
		code := run(t.Context(), args, &Env{Stdout: out, Stderr: out, Getenv: os.Getenv, Now: time.Now})
		return code, out.all
	}

	write(keyServerKey, "")
	if code, said := ask("attic"); code != hint.ExitPartial || !strings.Contains(said, "NOT OK  bundle") || !strings.Contains(said, "NOT OK  drill") || strings.Count(said, "NOT OK") != 2 || !strings.Contains(said, "2 not ok") {
		t.Errorf("without a bundle: exit %d\n%s", code, said)
	}
	bundle := "[bundle]\ncreated = " + now.Format(time.RFC3339) + "\ndrilled = " + now.Format(time.RFC3339) + "\n[[bundle.disk]]\nluks_uuid = \"" + disk + "\"\nheader = \"" + header + "\"\n"
	write(keyServerKey, bundle)
	if code, said := ask(); code != 0 || strings.Contains(said, "NOT OK") || !strings.Contains(said, "answers at "+keyServer+" with its host key") {
		t.Errorf("ready: exit %d\n%s", code, said)
	}
	code, said := ask("--json")
	var lists []travelStatus
	if err := json.Unmarshal([]byte(said), &lists); code != 0 || err != nil || len(lists) != 1 || !lists[0].Ready || len(lists[0].Items) < 10 {
		t.Errorf("as JSON: exit %d, %v\n%s", code, err, said)
	}
	// Somebody else's host key is no answer.
	write(hostKey, bundle)
	if code, said := ask(); code != hint.ExitPartial || !strings.Contains(said, "NOT OK  key server keys") {
		t.Errorf("another host key: exit %d\n%s", code, said)
	}
	for _, args := range [][]string{{"shed"}} {
		if code, said := ask(args...); code != hint.ExitUsage {
			t.Errorf("%v: exit %d\n%s", args, code, said)
		}
	}
}
