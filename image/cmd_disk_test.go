package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"farkeep/shared/hint"
	"farkeep/shared/settings"
	"farkeep/shared/site"
)

// diskBench is a site with one appliance, and a file that plays its disk.
func diskBench(t *testing.T) (dir, disk string) {
	t.Helper()
	base := t.TempDir()
	dir, disk = filepath.Join(base, "site"), filepath.Join(base, "disk.img")
	pass, password := filepath.Join(base, "pass"), filepath.Join(base, "password")
	if err := errors.Join(os.WriteFile(pass, []byte("four words and more\n"), 0o600), os.WriteFile(password, []byte("pw\n"), 0o600),
		os.WriteFile(disk, []byte("precious"), 0o600), os.Truncate(disk, 64<<20)); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"site", "init", dir, "--name", "home", "--home-name", "borg", "--endpoint", "home.example.net:51820", "--mail-server", "smtp.example.net:465",
			"--mail-user", "attic", "--mail-from", "attic@example.net", "--mail-to", "me@example.net", "--mail-password-file", password, "--admin-passphrase-file", pass},
		{"site", "add", "appliance", "attic", "--board", "pi4", "--dir", dir},
	} {
		if code, _, stderr := command(t, args...); code != 0 {
			t.Fatalf("%v: exit %d, %s", args, code, stderr)
		}
	}
	return dir, disk
}

func command(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, diagnostics bytes.Buffer
	code = run(t.Context(), args, &Env{Stdin: strings.NewReader(""), Stdout: &out, Stderr: &diagnostics, Getenv: os.Getenv})
	return code, out.String(), diagnostics.String()
}

func TestDiskPrepareAndAdopt(t *testing.T) {
	dir, disk := diskBench(t)
	code, stdout, stderr := command(t, "disk", "prepare", disk, "--dir", dir, "--appliance", "attic", "--size-for", "1T", "--yes")
	if code != 0 {
		t.Fatalf("exit %d, %s", code, stderr)
	}
	uuid := strings.TrimSpace(stdout)
	if !settings.IsLUKSUUID(uuid) {
		t.Errorf("stdout is %q: the UUID and nothing else", stdout)
	}
	for _, want := range []string{"unknown data", "67.1 MB", "The repositories hold 1 TB now", "they want a disk of", "adiantum", "recovery key", "personalise"} {
		if !strings.Contains(stderr, want) {
			t.Errorf("no %q in\n%s", want, stderr)
		}
	}
	s, err := site.Read(filepath.Join(dir, "site.toml"))
	if err != nil {
		t.Fatal(err)
	}
	if a, ok := s.Appliance("attic"); !ok || a.LUKS != uuid {
		t.Errorf("site.toml: %+v", a)
	}
	_, shown, _ := command(t, "disk", "show", disk)
	if !strings.Contains(shown, "LUKS (encrypted), UUID "+uuid) {
		t.Errorf("show: %s", shown)
	}
	// The same disk, whose site was lost, comes into another one.
	key := filepath.Join(dir, "operator", uuid+".recovery.key")
	other, _ := diskBench(t)
	code, stdout, stderr = command(t, "disk", "adopt", disk, "--dir", other, "--appliance", "attic", "--key-file", key)
	if code != 0 || strings.TrimSpace(stdout) != uuid || !strings.Contains(stderr, "earlier key slots 0 1 still open it") {
		t.Errorf("adopt: exit %d, %q, %s", code, stdout, stderr)
	}
}

// TestDiskRekey: the command finds the recovery key, and says what is left to do.
func TestDiskRekey(t *testing.T) {
	dir, disk := diskBench(t)
	code, stdout, stderr := command(t, "disk", "prepare", disk, "--dir", dir, "--appliance", "attic", "--size-for", "1T", "--yes")
	if code != 0 {
		t.Fatalf("exit %d, %s", code, stderr)
	}
	uuid := strings.TrimSpace(stdout)
	key := filepath.Join(dir, "keyserver-borg", "keys", uuid+".key")
	before, err := os.ReadFile(key)
	if err != nil {
		t.Fatal(err)
	}
	code, stdout, stderr = command(t, "disk", "rekey", disk, "--dir", dir, "--appliance", "attic")
	if code != 0 || strings.TrimSpace(stdout) != uuid {
		t.Fatalf("exit %d, %q, %s", code, stdout, stderr)
	}
	for _, want := range []string{"wiped: 0", "carry " + key, "bundle create", "an older copy of the header", "remove " + key + ".old"} {
		if !strings.Contains(stderr, want) {
			t.Errorf("no %q in\n%s", want, stderr)
		}
	}
	now, err := os.ReadFile(key)
	if err != nil || bytes.Equal(now, before) || bytes.Contains([]byte(stderr), now) {
		t.Errorf("the key: %v", err)
	}
	// The recovery key lies in a safe.
	recovery := filepath.Join(dir, "operator", uuid+".recovery.key")
	safe := filepath.Join(t.TempDir(), "safe")
	if err := errors.Join(os.Rename(recovery, safe), os.Remove(key+".old")); err != nil {
		t.Fatal(err)
	}
	if code, _, stderr := command(t, "disk", "rekey", disk, "--dir", dir, "--appliance", "attic"); code != hint.ExitUsage || !strings.Contains(stderr, "--recovery-key") {
		t.Errorf("exit %d, %s", code, stderr)
	}
	if code, _, stderr := command(t, "disk", "rekey", disk, "--dir", dir, "--appliance", "attic", "--recovery-key", safe); code != 0 {
		t.Errorf("exit %d, %s", code, stderr)
	}
}

func TestDiskRefuses(t *testing.T) {
	dir, disk := diskBench(t)
	for _, tc := range []struct {
		name string
		args []string
		want string
		code int
	}{
		{"nobody to ask", []string{"prepare", disk, "--dir", dir, "--appliance", "attic"}, "hint: give the flag", hint.ExitUsage},
		{"no appliance named", []string{"prepare", disk, "--dir", dir}, "--appliance is missing", hint.ExitUsage},
		{"unknown appliance", []string{"prepare", disk, "--dir", dir, "--appliance", "cellar", "--yes"}, `lists them; site add appliance adds one`, hint.ExitUsage},
		{"unknown board", []string{"prepare", disk, "--dir", dir, "--appliance", "attic", "--board", "pi99", "--yes"}, "pi99", hint.ExitUsage},
		{"no site", []string{"prepare", disk, "--dir", dir + ".none", "--appliance", "attic", "--yes"}, "there is no site", hint.ExitUsage},
		{"no disk", []string{"prepare", disk + ".none", "--dir", dir, "--appliance", "attic", "--yes"}, "no such file", hint.ExitFailure},
		{"two disks", []string{"prepare", disk, disk, "--dir", dir, "--appliance", "attic", "--yes"}, "accepts 1 arg", hint.ExitUsage},
		{"bad size", []string{"prepare", disk, "--dir", dir, "--appliance", "attic", "--yes", "--size-for", "much"}, "not a size", hint.ExitUsage},
		{"bad ratio", []string{"prepare", disk, "--dir", dir, "--appliance", "attic", "--yes", "--inode-ratio", "1"}, "--inode-ratio", hint.ExitUsage},
		{"adopt what is not encrypted", []string{"adopt", disk, "--dir", dir, "--appliance", "attic", "--key-file", filepath.Join(dir, "site.toml")}, "no LUKS header", hint.ExitFailure},
		{"adopt with two keys", []string{"adopt", disk, "--dir", dir, "--appliance", "attic", "--key-file", "a", "--passphrase-file", "b"}, "exclude each other", hint.ExitUsage},
		{"adopt without a key", []string{"adopt", disk, "--dir", dir, "--appliance", "attic"}, "--passphrase-file is missing", hint.ExitUsage},
	} {
		t.Run(tc.name, func(t *testing.T) {
			code, stdout, stderr := command(t, append([]string{"disk"}, tc.args...)...)
			if code != tc.code || !strings.Contains(stderr, tc.want) || stdout != "" {
				t.Errorf("exit %d, stdout %q, stderr %q; want exit %d and %q", code, stdout, stderr, tc.code, tc.want)
			}
		})
	}
	if b, err := os.ReadFile(disk); err != nil || !bytes.HasPrefix(b, []byte("precious")) {
		t.Errorf("the disk was touched (%v)", err)
	}
}
