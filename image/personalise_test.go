package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"farkeep/image/fat"
	"farkeep/image/sdcard"
	"farkeep/shared/card"
	"farkeep/shared/identity"
	"farkeep/shared/site"
	"farkeep/shared/tomlfile"
)

// settingsFile writes valid settings: the sample that the settings' own tests
// use, with keys made here.
func settingsFile(t *testing.T) (name, text string) {
	t.Helper()
	sample, err := os.ReadFile("../shared/settings/testdata/good.toml")
	if err != nil {
		t.Fatal(err)
	}
	ssh := func() (private, public string) {
		key, public, err := identity.New("test")
		if err != nil {
			t.Fatal(err)
		}
		return key.Reveal(), public
	}
	vpn, vpnPublic, err := identity.NewWireGuard()
	if err != nil {
		t.Fatal(err)
	}
	preshared, err := identity.NewPreshared()
	if err != nil {
		t.Fatal(err)
	}
	host, p1 := ssh()
	client, p2 := ssh()
	_, p3 := ssh()
	text = strings.NewReplacer("HOST_KEY", host, "CLIENT_KEY", client, "SSH_PUBLIC_KEY_1", p1, "SSH_PUBLIC_KEY_2", p2, "SSH_PUBLIC_KEY_3", p3,
		"VPN_PRIVATE_KEY", vpn.Reveal(), "VPN_PUBLIC_KEY", vpnPublic, "VPN_PRESHARED_KEY", preshared.Reveal(), "MAIL_PASSWORD", "secret").Replace(string(sample))
	name = filepath.Join(t.TempDir(), "attic.farkeep.toml")
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return name, text
}

func personalise(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	env := &Env{Stdin: strings.NewReader(""), Stdout: &out, Stderr: &errs, Getenv: func(string) string { return "" }}
	code = run(context.Background(), append([]string{"personalise"}, args...), env)
	return code, out.String(), errs.String()
}

func emptyCard(t *testing.T) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "farkeep.img")
	slot := []fat.File{{Name: card.RelayFile, Data: card.RelayConfig(-1, false)}}
	err := sdcard.Write(context.Background(), name, sdcard.Content{
		Selector: []fat.File{{Name: card.AutobootFile, Data: card.AutobootConfig(card.A)}},
		SlotA:    slot, SlotB: slot, Time: time.Date(2026, 1, 2, 3, 4, 6, 0, time.UTC),
	})
	if err != nil {
		t.Fatal(err)
	}
	return name
}

func TestPersonaliseCommand(t *testing.T) {
	settings, text := settingsFile(t)
	image := emptyCard(t)
	out := filepath.Join(t.TempDir(), "attic.img")
	code, stdout, stderr := personalise(t, "--image", image, "--settings", settings, "--out", out)
	if code != 0 || !strings.Contains(stdout, "attic") || stderr != "" {
		t.Fatalf("exit %d\n%s\n%s", code, stdout, stderr)
	}
	f, err := os.Open(out)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for partition, want := range map[int]struct{ name, text string }{
		card.Selector: {card.SettingsFile, text},
		// The sample's relay is on line 17 and active low: off is high.
		card.SlotA: {card.RelayFile, string(card.RelayConfig(17, false))},
		card.SlotB: {card.RelayFile, string(card.RelayConfig(17, false))},
	} {
		v, err := sdcard.OpenPartition(f, partition)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := v.ReadFile(want.name); err != nil || string(got) != want.text {
			t.Errorf("partition %d: %s is %q, %v", partition, want.name, got, err)
		}
	}
}

func TestPersonaliseCommandOnAMountedPartition(t *testing.T) {
	settings, text := settingsFile(t)
	dir := t.TempDir()
	if code, _, stderr := personalise(t, "--boot-partition", dir, "--settings", settings); code == 0 || !strings.Contains(stderr, "hint: flash the image first") {
		t.Errorf("exit %d: %s", code, stderr)
	}
	if err := os.WriteFile(filepath.Join(dir, card.AutobootFile), card.AutobootConfig(card.A), 0o600); err != nil {
		t.Fatal(err)
	}
	code, _, stderr := personalise(t, "--boot-partition", dir, "--settings", settings)
	if code != 0 || !strings.Contains(stderr, "the relay's line floats") {
		t.Errorf("exit %d: %s", code, stderr)
	}
	if got, err := os.ReadFile(filepath.Join(dir, card.SettingsFile)); err != nil || string(got) != text {
		t.Errorf("settings: %d bytes, %v", len(got), err)
	}
}

// TestPersonaliseReplace: a card for an appliance whose card was lost.
func TestPersonaliseReplace(t *testing.T) {
	dir, disk := diskBench(t)
	if code, _, stderr := command(t, "disk", "prepare", disk, "--dir", dir, "--appliance", "attic", "--size-for", "1T", "--yes"); code != 0 {
		t.Fatalf("exit %d, %s", code, stderr)
	}
	was, err := site.Read(filepath.Join(dir, "site.toml"))
	if err != nil {
		t.Fatal(err)
	}
	settingsPath := filepath.Join(dir, "appliances", "attic", "farkeep.toml")
	before, err := os.ReadFile(settingsPath)
	if err != nil {
		t.Fatal(err)
	}
	image, out := emptyCard(t), filepath.Join(t.TempDir(), "attic.img")
	code, _, stderr := personalise(t, "--image", image, "--replace", "attic", "--dir", dir, "--out", out)
	if code != 0 {
		t.Fatalf("exit %d, %s", code, stderr)
	}
	a, _ := was.Appliance("attic")
	for _, want := range []string{"revoke attic", "wg-quick@farkeep", "mail password of attic", "allow attic", "expect attic", "bundle create", a.VPNKey} {
		if !strings.Contains(stderr, want) {
			t.Errorf("no %q in\n%s", want, stderr)
		}
	}
	now, err := site.Read(filepath.Join(dir, "site.toml"))
	if err != nil {
		t.Fatal(err)
	}
	b, _ := now.Appliance("attic")
	if b.HostKey == a.HostKey || b.ClientKey == a.ClientKey || b.VPNKey == a.VPNKey || b.LUKS != a.LUKS || b.VPNAddress != a.VPNAddress {
		t.Errorf("was %+v\nis %+v", a, b)
	}
	f, err := os.Open(out)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	v, err := sdcard.OpenPartition(f, card.Selector)
	if err != nil {
		t.Fatal(err)
	}
	after, err := os.ReadFile(settingsPath)
	if got, err2 := v.ReadFile(card.SettingsFile); err != nil || err2 != nil || !bytes.Equal(got, after) || bytes.Equal(got, before) {
		t.Errorf("the card's settings: %v, %v", err, err2)
	}
	// A failure afterwards says how to go on.
	code, _, stderr = personalise(t, "--image", filepath.Join(dir, "none.img"), "--replace", "attic", "--dir", dir, "--out", filepath.Join(dir, "x.img"))
	if code == 0 || !strings.Contains(stderr, "go on with --settings "+settingsPath) {
		t.Errorf("exit %d, %s", code, stderr)
	}
	for _, args := range [][]string{
		{"--image", image, "--out", out, "--replace", "attic", "--settings", settingsPath},
		{"--image", image, "--out", out, "--dir", dir, "--settings", settingsPath},
		{"--image", image, "--out", out, "--replace", "cellar", "--dir", dir},
	} {
		if code, _, stderr := personalise(t, args...); code == 0 {
			t.Errorf("%v: exit %d, %s", args, code, stderr)
		}
	}
}

func TestPersonaliseCommandRefuses(t *testing.T) {
	settings, text := settingsFile(t)
	bad := filepath.Join(t.TempDir(), "bad.toml")
	if err := os.WriteFile(bad, []byte("nonsense = 1\n"+text), 0o600); err != nil {
		t.Fatal(err)
	}
	huge := filepath.Join(t.TempDir(), "huge.toml")
	if err := os.WriteFile(huge, make([]byte, tomlfile.MaxSize+1), 0o600); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(t.TempDir(), "out.img")
	for _, tt := range []struct {
		name string
		args []string
		code int
		want string
	}{
		{"nothing", nil, 1, "image"},
		{"no target", []string{"--settings", settings}, 1, "boot-partition"},
		{"both targets", []string{"--settings", settings, "--image", "x", "--out", "y", "--boot-partition", "z"}, 1, "boot-partition"},
		{"image without out", []string{"--settings", settings, "--image", "x"}, 1, "out"},
		{"unknown key", []string{"--settings", bad, "--image", "x", "--out", out}, 2, "nonsense"},
		{"huge", []string{"--settings", huge, "--image", "x", "--out", out}, 2, "larger than 1 MiB"},
		{"missing settings", []string{"--settings", "/missing", "--image", "x", "--out", out}, 1, "read settings"},
		{"missing image", []string{"--settings", settings, "--image", "/missing", "--out", out}, 1, "open image"},
		{"not an image", []string{"--settings", settings, "--image", settings, "--out", out}, 1, "not a Farkeep card image"},
		{"unknown flag", []string{"--bogus"}, 2, "hint: farkeep-image personalise --help"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			code, stdout, stderr := personalise(t, tt.args...)
			if code != tt.code || !strings.Contains(stderr, tt.want) || stdout != "" {
				t.Errorf("exit %d (want %d), stdout %q, stderr %q does not say %q", code, tt.code, stdout, stderr, tt.want)
			}
			if _, err := os.Stat(out); err == nil {
				t.Error("an image was left behind")
			}
		})
	}
}
