package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestUnderSystemd: systemd itself, as the first process of a namespace of its own,
// runs the service as a user who is not root and hands it the identity: as it is,
// encrypted by systemd-creds with the machine's key, and sealed to a TPM, which is
// emulated; and stock ssh gets the key that was sealed.
func TestUnderSystemd(t *testing.T) {
	for _, tool := range []string{"systemd-creds", "unshare", "ssh", "swtpm", "tpm2"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatalf("%s is missing: apt install systemd util-linux openssh-client swtpm tpm2-tools", tool)
		}
	}
	here, err := exec.LookPath(program)
	if err != nil {
		t.Fatal(err)
	}
	binary, err := os.ReadFile(here)
	if err != nil {
		t.Fatal(err)
	}
	for _, load := range []string{"LoadCredential", "LoadCredentialEncrypted", tpm} {
		t.Run(load, func(t *testing.T) {
			s := newTestSite(t)
			credential, encrypt := "/run/keys.credential", "cp "+s.path("identity")+" /run/keys.credential"
			switch load {
			case "LoadCredentialEncrypted":
				encrypt = "systemd-creds --with-key=host --name=keys encrypt " + s.path("identity") + " " + credential
			case tpm:
				load, credential = "LoadCredentialEncrypted", s.path("keys.credential")
				encrypt = "export SYSTEMD_TPM2_DEVICE=" + emulateTPM(t) + "\nsystemd-creds --with-key=tpm2 --name=keys encrypt " + s.path("identity") + " " + credential
			}
			s.do(t, "add", atticDisk, "--key-file", s.path("disk.key"))
			s.do(t, "seal", "--new-identity", s.path("identity"))
			me := s.path(program) // where the service's user can reach it
			if err := os.WriteFile(me, binary, 0o755); err != nil {
				t.Fatal(err)
			}
			// The service's user owns what it needs, and cannot read the identity.
			for _, dir := range []string{"secrets", "state", "site.toml"} {
				if err := filepath.WalkDir(s.path(dir), func(path string, _ fs.DirEntry, err error) error {
					return errors.Join(err, os.Lchown(path, nobody, nobody))
				}); err != nil {
					t.Fatal(err)
				}
			}
			for dir := s.dir; dir != filepath.Clean(os.TempDir()) && dir != "/"; dir = filepath.Dir(dir) {
				if err := os.Chmod(dir, 0o755); err != nil {
					t.Fatal(err)
				}
			}
			unit := fmt.Sprintf(`[Unit]
DefaultDependencies=no
SuccessAction=exit-force
FailureAction=exit-force
[Service]
User=%d
LimitMEMLOCK=8M
%s=keys:%s
ExecStart=%s serve --identity-credential keys --site %s --secrets %s --state %s
StandardOutput=append:%s
StandardError=append:%s
`, nobody, load, credential, me, s.path("site.toml"), s.path("secrets"), s.path("state"), s.path("log"), s.path("log"))
			runSystemd(t, s, unit, encrypt)

			out, err := exec.Command("ssh", "-F", s.path("ssh_config"), "-i", s.path("id/attic"), "ks", "key", atticDisk).Output()
			key, readErr := os.ReadFile(s.path("disk.key"))
			if err != nil || readErr != nil || !bytes.Equal(out, key) {
				t.Errorf("ssh: %d bytes, %v, %v\n%s", len(out), err, readErr, s.read("log"))
			}
			if !strings.HasSuffix(t.Name(), tpm) {
				return
			}
			// Whoever has the disk and another machine's TPM has nothing.
			other := exec.Command("systemd-creds", "--name=keys", "decrypt", credential, "-")
			other.Env = append(os.Environ(), "SYSTEMD_TPM2_DEVICE="+emulateTPM(t))
			if out, err := other.Output(); err == nil || len(out) > 0 {
				t.Errorf("another TPM opens the credential: %d bytes, %v", len(out), err)
			}
		})
	}
}

const (
	nobody = 65534
	tpm    = "LoadCredentialEncrypted_by_a_TPM"
)

// emulateTPM starts a TPM 2 that was never used before, until the test ends, and returns
// what systemd calls it (SYSTEMD_TPM2_DEVICE: a transport of tpm2-tss, and its address).
func emulateTPM(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "tpm") // a socket's path is 107 bytes long at most
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "s")
	cmd := exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+dir, "--flags", "not-need-init,startup-clear",
		"--server", "type=unixio,path="+socket, "--ctrl", "type=unixio,path="+socket+".ctrl")
	said := &log{}
	cmd.Stdout, cmd.Stderr = said, said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { cmd.Wait(); close(ended) }()
	t.Cleanup(func() { cmd.Process.Kill(); <-ended })
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(10 * time.Millisecond) {
		_, data := os.Stat(socket)
		_, control := os.Stat(socket + ".ctrl")
		if data == nil && control == nil {
			return "swtpm:path=" + socket
		}
		select {
		case <-ended:
			t.Fatalf("swtpm ended: %s", said)
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("swtpm does not listen: %s", said)
		}
	}
}

func (s *aSite) read(name string) string {
	text, err := os.ReadFile(s.path(name))
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// runSystemd runs a unit under a systemd of its own until the test ends, and
// waits until it serves.
func runSystemd(t *testing.T, s *aSite, unit, encrypt string) {
	t.Helper()
	group := filepath.Base(filepath.Dir(s.dir)) // a name that nobody else has
	write := func(name, text string) {
		if err := os.WriteFile(s.path(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("service", unit)
	// Its cgroups lie below one that can be removed as a whole.
	write("outer.sh", fmt.Sprintf(`set -e
mkdir -p %[1]s/cgroup
mount --make-rprivate /
mount -t cgroup2 none %[1]s/cgroup
mkdir %[1]s/cgroup/%[2]s
echo $$ >%[1]s/cgroup/%[2]s/cgroup.procs
exec unshare --fork --pid --mount --uts --ipc --cgroup --kill-child sh %[1]s/inner.sh
`, s.dir, group))
	// systemd hands credentials over by a mount that has to spread; a tmpfs keeps the
	// machine's key for credentials, made here, off the machine.
	write("inner.sh", fmt.Sprintf(`set -e
mount --make-rshared /
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /var/lib/systemd
mount -t tmpfs tmpfs /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir -p /run/systemd/system
cp %[1]s/service /run/systemd/system/keyserver.service
%[2]s
touch %[1]s/begun
export container=farkeep
exec /lib/systemd/systemd --system --unit=keyserver.service --log-target=console --show-status=no
`, s.dir, encrypt))
	cmd := exec.Command("unshare", "--mount", "sh", s.path("outer.sh"))
	said := &log{}
	cmd.Stdout, cmd.Stderr = said, said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { cmd.Wait(); close(ended) }()
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGKILL) // and with it everything in the namespace
		<-ended
		clean := exec.Command("unshare", "--mount", "sh", "-c", `mount --make-rprivate /; mount -t cgroup2 none "$1" && find "$1/$2" -depth -type d -exec rmdir {} +`, "sh", s.path("cgroup"), group)
		for try := 0; ; try++ { // a cgroup is busy until the kernel is done with its last process
			out, err := clean.CombinedOutput()
			if err == nil {
				return
			}
			if try == 50 {
				t.Logf("its cgroups are left: %v %s", err, out)
				return
			}
			time.Sleep(50 * time.Millisecond)
			clean = exec.Command(clean.Args[0], clean.Args[1:]...)
		}
	})
	for deadline := time.Now().Add(3 * time.Minute); !strings.Contains(s.read("log"), "msg=serving"); time.Sleep(10 * time.Millisecond) {
		select {
		case <-ended:
			if _, err := os.Stat(s.path("begun")); err != nil {
				t.Fatalf("systemd does not start in a namespace (the tests run as root): %s", said)
			}
			t.Fatalf("systemd ended: %s\nthe service: %s", said, s.read("log"))
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("it does not serve: %s\nsystemd: %s", s.read("log"), said)
		}
	}
}
