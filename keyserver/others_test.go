package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"farkeep/image/freeport"
	"farkeep/keyserver/policy"
	"farkeep/shared/identity"
)

// TestRevokeOnEveryKeyServer has two real key servers: a revocation that is typed at
// one counts at the other, at once where it can be reached, and else as soon as it
// is back.
func TestRevokeOnEveryKeyServer(t *testing.T) {
	k := prepareKilling(t)
	private, public, err := identity.New("cellar")
	k.check(err)
	port, err := freeport.TCP()
	k.check(err)
	cellar := fmt.Sprintf("127.0.0.1:%d", port)
	for _, err := range []error{
		os.MkdirAll(filepath.Join(k.dir, "cellar", "keys"), 0o700),
		os.WriteFile(filepath.Join(k.dir, "cellar", "ssh_host_key"), []byte(private.Reveal()), 0o600),
		os.WriteFile(filepath.Join(k.dir, "cellar", "mail_password"), []byte("x\n"), 0o600),
	} {
		k.check(err)
	}
	path := filepath.Join(k.dir, "site.toml")
	text, err := os.ReadFile(path)
	k.check(err)
	second := fmt.Sprintf("\n[[key_server]]\nname = \"cellar\"\naddress = %q\nhost_key = %q\n", cellar, public)
	k.check(os.WriteFile(path, append(text, second...), 0o600))

	atCellar := func(args ...string) *exec.Cmd {
		cmd := exec.Command(program, append(args, "--site", "site.toml", "--secrets", "cellar", "--state", "cellar-state")...)
		cmd.Dir = k.dir
		return cmd
	}
	run := func(cmd *exec.Cmd) string {
		t.Helper()
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %v: %s", cmd.Args, err, out)
		}
		return string(out)
	}
	standing := func() policy.Standing {
		t.Helper()
		s, err := policy.Open(filepath.Join(k.dir, "cellar-state")).Read("attic")
		k.check(err)
		return s.Standing
	}

	stop := k.start(atCellar("serve", "--listen", cellar, "--metrics", ""))
	out := run(k.command("revoke", "attic", "--reason", "stolen", "--wait", "0"))
	if !strings.Contains(out, "key server cellar: revoked there too") || standing().State != policy.Revoked || standing().Reason != "stolen" {
		t.Errorf("revoked at one: %s\nthe other one: %+v", out, standing())
	}
	if out := run(atCellar("audit")); !strings.Contains(out, `revoke done attic reason="stolen"`) || !strings.Contains(out, " at borg") {
		t.Errorf("on record there:\n%s", out)
	}
	// Nobody allows by another's word.
	out = run(k.command("allow", "attic", "--reason", "found"))
	if !strings.Contains(out, "allow it on cellar too: each key server decides for itself") || standing().State != policy.Revoked {
		t.Errorf("allowed at one: %s\nthe other one: %+v", out, standing())
	}
	if out = run(atCellar("allow", "attic", "--reason", "found")); !strings.Contains(out, "allow it on borg too") {
		t.Errorf("allowed at the other: %s", out)
	}
	if out = run(k.command("expect", "attic", "--until", "3d", "--reason", "new flat")); !strings.Contains(out, "expect it on cellar too") {
		t.Errorf("expected at one: %s", out)
	}
	stop()

	// Out of reach: named, listed, and delivered by serve when it is back.
	out = run(k.command("revoke", "attic", "--reason", "stolen again", "--wait", "0"))
	if !strings.Contains(out, "key server cellar: NOT REACHED") {
		t.Errorf("nobody serves: %s", out)
	}
	if out := run(k.command("list")); !strings.Contains(out, "key server cellar does not know yet that attic is revoked") {
		t.Errorf("list: %s", out)
	}
	defer k.start(atCellar("serve", "--listen", cellar, "--metrics", ""))()
	defer k.serve()()
	for deadline := time.Now().Add(2 * time.Minute); standing().State != policy.Revoked; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("the other one: %+v", standing())
		}
	}
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(100 * time.Millisecond) {
		if out := run(k.command("list")); !strings.Contains(out, "does not know yet") {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("it was taken, and still: %s", out)
		}
	}
}
