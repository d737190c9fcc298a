package main

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"farkeep/keyserver/policy"
)

// TestPlainLinux runs the very commands that docs/keyserver.md gives to a Linux
// without our appliance, with the real ssh and the real cryptsetup, and only then
// believes that they keep the token.
func TestPlainLinux(t *testing.T) {
	docs, err := os.ReadFile("../docs/keyserver.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, found := strings.Cut(string(docs), "## A plain Linux, without our appliance")
	_, rest, block := strings.Cut(rest, "```sh\n")
	script, _, closed := strings.Cut(rest, "```")
	if !found || !block || !closed {
		t.Fatal("docs/keyserver.md has no commands for a plain Linux")
	}
	k := prepareKilling(t)
	defer k.serve()()
	dir := t.TempDir()
	image := filepath.Join(dir, "disk.img")
	file, err := os.Create(image)
	k.check(err)
	k.check(file.Truncate(32 << 20))
	k.check(file.Close())
	run := func(name string, args ...string) {
		t.Helper()
		if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
			t.Fatalf("%s %v (apt install cryptsetup-bin openssh-client): %v: %s", name, args, err, out)
		}
	}
	run("cryptsetup", "luksFormat", "-q", "--type", "luks2", "--uuid", atticDisk, "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000",
		"--key-file", filepath.Join(k.dir, "disk.key"), image)
	run("install", "-m", "0600", filepath.Join(k.dir, "id", "attic"), filepath.Join(dir, "ssh_client_key"))
	run("install", "-m", "0600", filepath.Join(k.dir, "known_hosts"), dir)

	_, port, err := net.SplitHostPort(k.address)
	k.check(err)
	for _, change := range [][2]string{
		{"cd /etc/farkeep ", "cd " + dir + " "},
		{"-p 4022 farkeep@10.77.0.1", "-p " + port + " -o BatchMode=yes farkeep@127.0.0.1"},
		// All but the mapping itself: that needs a kernel with device mapper.
		{`/dev/disk/by-uuid/"$UUID" farkeep`, "--test-passphrase --verbose " + image},
	} {
		if !strings.Contains(script, change[0]) {
			t.Fatalf("the commands have no %q:\n%s", change[0], script)
		}
		script = strings.Replace(script, change[0], change[1], 1)
	}
	open := func() string {
		t.Helper()
		cmd := exec.Command("sh", "-c", script)
		cmd.Env = append(os.Environ(), "UUID="+atticDisk, "LC_ALL=C")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return string(out)
	}
	token := func() string {
		t.Helper()
		text, err := os.ReadFile(filepath.Join(dir, "token"))
		k.check(err)
		return strings.TrimSpace(string(text))
	}
	last := ""
	for range 3 {
		if out := open(); !strings.Contains(out, "Command successful") {
			t.Fatalf("the disk did not open: %s", out)
		}
		if now := token(); now == last || len(now) != 43 {
			t.Fatalf("the token was %q and is %q", last, now)
		} else {
			last = now
		}
	}
	s, err := policy.Open(k.state()).Read("attic")
	if err != nil || len(s.Keys) != 3 || s.Tokens.Shown == "" {
		t.Errorf("the key server saw no tokens: %+v, %v", s, err)
	}
	// A refusal opens nothing, is shown, and leaves the token.
	if out, err := k.command("revoke", "attic", "--reason", "stolen", "--wait", "0").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if out := open(); !strings.Contains(out, "refused") || strings.Contains(out, "Command successful") {
		t.Errorf("revoked: %s", out)
	}
	if now := token(); now != last {
		t.Errorf("the token was %q and is %q", last, now)
	}
}
