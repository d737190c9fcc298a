package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// benchSSHD is OpenSSH's server on the loopback interface, and how to reach it.
type benchSSHD struct {
	pid    int
	config string // the client's
}

func startSSHD(b *testing.B, dir string) *benchSSHD {
	b.Helper()
	const sshd = "/usr/sbin/sshd" // it insists on an absolute path
	for bin, pkg := range map[string]string{sshd: "openssh-server", "ssh": "openssh-client", "rsync": "rsync"} {
		if _, err := exec.LookPath(bin); err != nil {
			b.Fatalf("install %s: %v", pkg, err)
		}
	}
	var peers []string
	for _, version := range [][]string{{"rsync", "--version"}, {"ssh", "-V"}} {
		out, err := exec.Command(version[0], version[1:]...).CombinedOutput()
		must(b, err)
		first, _, _ := strings.Cut(string(out), "\n")
		peers = append(peers, first)
	}
	b.Logf("peers: %s", strings.Join(peers, "; "))
	// sshd's folder for privilege separation; a running system has it.
	if err := os.Mkdir("/run/sshd", 0o755); err == nil {
		b.Cleanup(func() { os.Remove("/run/sshd") })
	}
	dir = filepath.Join(dir, "sshd")
	must(b, os.Mkdir(dir, 0o755))
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		must(b, os.WriteFile(path, []byte(text), 0o600))
		return path
	}
	host, hostPublic := newIdentity(b, "host")
	user, userPublic := newIdentity(b, "user")
	port := freePort(b)
	s := &benchSSHD{config: file("ssh_config", fmt.Sprintf(`Host bench
  HostName 127.0.0.1
  Port %d
  User root
  IdentityFile %s
  IdentitiesOnly yes
  BatchMode yes
  LogLevel ERROR
  UserKnownHostsFile %s
`, port, file("user_key", user.Reveal()), file("known_hosts", fmt.Sprintf("[127.0.0.1]:%d %s\n", port, hostPublic))))}
	server := file("sshd_config", fmt.Sprintf(`ListenAddress 127.0.0.1:%d
HostKey %s
AuthorizedKeysFile %s
PermitRootLogin prohibit-password
StrictModes no
PidFile none
UsePAM no
Subsystem sftp /usr/lib/openssh/sftp-server
`, port, file("host_key", host.Reveal()), file("authorized_keys", userPublic+"\n")))

	log := &output{}
	cmd := exec.Command(sshd, "-D", "-e", "-f", server)
	cmd.Stderr = log
	must(b, cmd.Start())
	s.pid = cmd.Process.Pid
	b.Cleanup(func() {
		cmd.Process.Signal(unix.SIGTERM)
		cmd.Wait() // it ends by the signal
		if b.Failed() {
			b.Logf("log of sshd:\n%s", log)
		}
	})
	await(b, "sshd listens", func() bool {
		c, err := net.Dial("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return s
}

// The ciphers of rsync's SSH: what OpenSSH takes by itself, and its quickest
// where the processor has AES instructions.
const (
	defaultCipher = ""
	quickCipher   = "aes128-gcm@openssh.com"
)

// copy mirrors source into target.
func (s *benchSSHD) copy(b *testing.B, source, target, cipher string, options ...string) cost {
	b.Helper()
	shell := "ssh -F " + s.config
	if cipher != defaultCipher {
		shell += " -c " + cipher
	}
	args := append([]string{"-a", "--rsh=" + shell}, options...)
	c, _ := measure(b, exec.Command("rsync", append(args, source+"/", "bench:"+target+"/")...), s.pid)
	return c
}
