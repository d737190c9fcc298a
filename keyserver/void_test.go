package main

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"farkeep/keyserver/orders"
	"farkeep/shared/mountnstest"
	"farkeep/shared/site"
	"farkeep/shared/wgtest"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

const inNamespace = "FARKEEP_TEST_NAMESPACE"

// namespace runs the rest of a test in a network and mount namespace of its own,
// where it may have a WireGuard interface; it reports whether this is there.
func namespace(t *testing.T) bool {
	t.Helper()
	if os.Getenv(inNamespace) == t.Name() {
		for _, err := range []error{
			mountnstest.Private(),
			// wg and wgctrl look for sockets in /var/run/wireguard.
			syscall.Mount("run", "/run", "tmpfs", 0, ""),
		} {
			if err != nil {
				t.Fatal("prepare the namespaces: ", err)
			}
		}
		return true
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=10m")
	cmd.Env = append(os.Environ(), inNamespace+"="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("in a network namespace (the tests run as root): %v\n%s", err, out)
	}
	return false
}

// TestRevokeVoids has root revoke an appliance for a service that runs as another
// user, with the real wg(8) to say what is left of the tunnel.
func TestRevokeVoids(t *testing.T) {
	if !namespace(t) {
		return
	}
	const service = 12345
	dir := t.TempDir()
	if err := setup(&testscript.Env{WorkDir: dir}); err != nil {
		t.Fatal(err)
	}
	s, err := site.Read(filepath.Join(dir, "site.toml"))
	if err != nil {
		t.Fatal(err)
	}
	attic, shed := s.Appliances[0], s.Appliances[1]
	wgtest.Interface(t, "farkeep", 1420)
	private, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	conf := filepath.Join(dir, "farkeep.conf")
	text := fmt.Sprintf("[Interface]\nPrivateKey = %s\n\n[Peer]\n# attic\nPublicKey = %s\nAllowedIPs = 10.77.0.2/32\n\n[Peer]\n# shed\nPublicKey = %s\nAllowedIPs = 10.77.0.3/32\n", private, attic.VPNKey, shed.VPNKey)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	wg := func(args ...string) string {
		out, err := exec.Command("wg", args...).CombinedOutput()
		if err != nil {
			t.Fatalf("wg %v (apt install wireguard-tools): %v: %s", args, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	wg("setconf", "farkeep", conf)
	state := filepath.Join(dir, "state")
	for _, err := range []error{
		os.Mkdir(state, 0o700), os.Chown(state, service, service),
		os.Chmod(dir, 0o755), os.Chmod(filepath.Dir(dir), 0o755),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	run := func(args ...string) string {
		t.Helper()
		cmd := exec.Command(program, append(args, "--site", "site.toml", "--secrets", "secrets", "--state", "state")...)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
		return string(out)
	}
	expect := func(out string, wanted ...string) {
		t.Helper()
		for _, w := range wanted {
			if !strings.Contains(out, w) {
				t.Errorf("no word of %q:\n%s", w, out)
			}
		}
	}

	for _, path := range []string{"secrets", "secrets/keys", "secrets/ssh_host_key", "secrets/mail_password"} {
		if err := os.Chown(filepath.Join(dir, path), service, service); err != nil {
			t.Fatal(err)
		}
	}
	// A key that root brings, from a file that only root can read.
	run("add", attic.LUKS, "--key-file", "disk.key")

	// Printed only.
	out := run("revoke", "attic", "--reason", "stolen", "--wait", "0", "--wg-conf", conf)
	expect(out, "wg set farkeep peer "+attic.VPNKey+" remove", conf, "SSH client key SHA256:", "SSH host key SHA256:", "ks at 127.0.0.1:1",
		"farkeep-image site init my-site --mail-password-file FILE") // the command of docs/operations.md
	if got := strings.Fields(wg("show", "farkeep", "peers")); len(got) != 2 {
		t.Errorf("peers: %v", got)
	}
	// Carried out.
	out = run("revoke", "attic", "--reason", "stolen", "--wait", "0", "--void", "--wg-conf", conf)
	expect(out, "out of "+conf, "out of the interface farkeep: it cannot be told anything any more", "is void here")
	if got := wg("show", "farkeep", "peers"); got != shed.VPNKey {
		t.Errorf("peers: %v", got)
	}
	wg("setconf", "farkeep", conf)
	if got := wg("show", "farkeep", "peers"); got != shed.VPNKey {
		t.Errorf("peers after the next start: %v", got)
	}
	fingerprint, err := clientFingerprint(&attic)
	if err != nil {
		t.Fatal(err)
	}
	if void, err := orders.IsVoid(state, "attic", fingerprint); err != nil || !void {
		t.Errorf("void: %v, %v", void, err)
	}
	// Twice is the same as once.
	run("revoke", "attic", "--reason", "stolen", "--wait", "0", "--void", "--wg-conf", conf)
	expect(run("allow", "attic", "--reason", "found"), "is void: it gets no session", "allow --unvoid")
	expect(run("allow", "attic", "--reason", "found", "--unvoid"), "is taken again")
	if void, err := orders.IsVoid(state, "attic", fingerprint); err != nil || void {
		t.Errorf("void: %v, %v", void, err)
	}
	expect(run("audit"), "void done attic", "unvoid done attic")
	// Whatever root wrote, the service can read and change.
	ownedBy(t, state, service)
	ownedBy(t, filepath.Join(dir, "secrets"), service)
	// No interface, no file: what was done stays done, and the rest is an error with a way out.
	cmd := exec.Command(program, "revoke", "shed", "--reason", "x", "--wait", "0", "--void", "--wg-interface", "none0", "--site", "site.toml", "--secrets", "secrets", "--state", "state")
	cmd.Dir = dir
	bad, err := cmd.CombinedOutput()
	if err == nil {
		t.Error("a peer was voided in an interface that is not there")
	}
	expect(string(bad), "shed is revoked", "no such WireGuard interface here: none0", "on the machine where the tunnel ends")
}

// ownedBy checks who owns a folder and everything in it.
func ownedBy(t *testing.T, folder string, uid uint32) {
	t.Helper()
	if err := filepath.WalkDir(folder, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err == nil && info.Sys().(*syscall.Stat_t).Uid != uid {
			t.Errorf("%s belongs to %d", path, info.Sys().(*syscall.Stat_t).Uid)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
}
