package identity_test

import (
	"crypto/rand"
	"crypto/rsa"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"farkeep/shared/identity"
	"farkeep/shared/secret"

	"golang.org/x/crypto/ssh"
)

// tool returns the path of a program that these tests compare with.
func tool(t *testing.T, name, pkg string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("%s is missing: apt install %s", name, pkg)
	}
	return path
}

func writeKey(t *testing.T, private secret.Text) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(path, []byte(private.Reveal()), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestNewIsAnOpenSSHIdentity(t *testing.T) {
	private, public, err := identity.New("pusher of home")
	if err != nil {
		t.Fatal(err)
	}
	path := writeKey(t, private)
	out, err := exec.Command(tool(t, "ssh-keygen", "openssh-client"), "-y", "-f", path).CombinedOutput()
	if err != nil || strings.TrimSpace(string(out)) != public {
		t.Errorf("ssh-keygen reads %q, %v; we say %q", out, err, public)
	}
	s, err := identity.ReadSigner(path)
	if err != nil {
		t.Fatal(err)
	}
	key, err := identity.ParsePublic(public)
	if err != nil || identity.Fingerprint(key) != identity.Fingerprint(s.PublicKey()) {
		t.Errorf("private and public do not match: %v", err)
	}
	out, err = exec.Command("ssh-keygen", "-l", "-f", path).CombinedOutput()
	if err != nil || !strings.Contains(string(out), identity.Fingerprint(key)) {
		t.Errorf("ssh-keygen -l says %q, %v; we say %s", out, err, identity.Fingerprint(key))
	}
	if s := fmt.Sprintf("%v %+v %#v", private, private, private); strings.Contains(s, "PRIVATE") {
		t.Errorf("a private key was printed: %s", s)
	}
	again, _, err := identity.New("pusher of home")
	if err != nil || again == private {
		t.Errorf("the same identity twice (%v)", err)
	}
}

func TestNewSealed(t *testing.T) {
	pass := func() secret.Bytes { return secret.New([]byte("four words and more")) }
	private, public, err := identity.NewSealed("operator", pass())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := identity.Signer(private); !errors.Is(err, identity.ErrSealed) {
		t.Errorf("without the passphrase: %v", err)
	}
	if _, err := identity.Unseal(private, secret.New([]byte("wrong"))); !errors.Is(err, identity.ErrPassphrase) {
		t.Errorf("with a wrong passphrase: %v", err)
	}
	s, err := identity.Unseal(private, pass())
	if err != nil || !identity.SamePublic(public, identity.Line(s.PublicKey(), "another comment")) {
		t.Errorf("with the passphrase: %v", err)
	}
	path := writeKey(t, private)
	keygen := tool(t, "ssh-keygen", "openssh-client")
	if out, err := exec.Command(keygen, "-y", "-P", "four words and more", "-f", path).CombinedOutput(); err != nil || strings.TrimSpace(string(out)) != public {
		t.Errorf("ssh-keygen with the passphrase: %q, %v", out, err)
	}
	if out, err := exec.Command(keygen, "-y", "-P", "", "-f", path).CombinedOutput(); err == nil {
		t.Errorf("ssh-keygen opens it without: %q", out)
	}
	if _, _, err := identity.NewSealed("operator", secret.Bytes{}); err == nil {
		t.Error("an empty passphrase was accepted")
	}
}

func TestRefusals(t *testing.T) {
	private, public, err := identity.New("x")
	if err != nil {
		t.Fatal(err)
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(rsaKey, "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := identity.Signer(secret.Text(pem.EncodeToMemory(block))); !errors.Is(err, identity.ErrNotEd25519) {
		t.Errorf("an RSA private key: %v", err)
	}
	rsaPub, err := ssh.NewPublicKey(&rsaKey.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	for name, line := range map[string]string{
		"empty": "", "junk": "hello", "options": `command="x" ` + public,
		"two": public + "\n" + public, "rsa": identity.Line(rsaPub, ""), "private": private.Reveal(),
	} {
		if _, err := identity.ParsePublic(line); err == nil {
			t.Errorf("%s: accepted as a public key", name)
		}
		if identity.SamePublic(line, line) {
			t.Errorf("%s: is the same as itself", name)
		}
	}
	if _, _, err := identity.New("two\nlines"); err == nil {
		t.Error("a comment of two lines was accepted")
	}

	path := writeKey(t, private)
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := identity.ReadSigner(path); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("mode 0640: %v", err)
	}
	if _, err := identity.ReadSigner(t.TempDir()); err == nil {
		t.Error("a folder was read")
	}
	long := writeKey(t, secret.Text(strings.Repeat("x", identity.MaxFile+1)))
	if _, err := identity.ReadSigner(long); err == nil || !strings.Contains(err.Error(), "longer than") {
		t.Errorf("a long file: %v", err)
	}
}

func TestWireGuardAgreesWithWg(t *testing.T) {
	private, public, err := identity.NewWireGuard()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(tool(t, "wg", "wireguard-tools"), "pubkey")
	cmd.Stdin = strings.NewReader(private.Reveal() + "\n")
	out, err := cmd.Output()
	if err != nil || strings.TrimSpace(string(out)) != public {
		t.Errorf("wg pubkey says %q, %v; we say %q", out, err, public)
	}
	psk, err := identity.NewPreshared()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := identity.ParseWireGuard(psk.Reveal()); err != nil || psk == private {
		t.Errorf("preshared key: %v", err)
	}
	for _, bad := range []string{"", "AAAA", public + "\n", public[:43], strings.Repeat("A", 43) + "!", strings.Repeat("/", 43) + "="} {
		if _, err := identity.ParseWireGuard(bad); !errors.Is(err, identity.ErrNotWireGuard) {
			t.Errorf("%q: %v", bad, err)
		}
		if _, err := identity.WireGuardPublic(secret.Text(bad)); err == nil {
			t.Errorf("%q has a public key", bad)
		}
	}
}

func FuzzParsePublic(f *testing.F) {
	_, public, err := identity.New("comment")
	if err != nil {
		f.Fatal(err)
	}
	for _, seed := range []string{public, "", "ssh-ed25519 AAAA", `no-pty ` + public, public + "\n#", "\x00"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, line string) {
		key, err := identity.ParsePublic(line)
		if err != nil {
			return
		}
		// What is accepted survives being written and read again.
		if !identity.SamePublic(line, identity.Line(key, "x")) {
			t.Errorf("%q is not the same key after a round trip", line)
		}
	})
}
