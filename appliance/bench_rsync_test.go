package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"farkeep/appliance/benchtest"

	"golang.org/x/sys/unix"
)

// benchSSHD is OpenSSH's server on the loopback interface, and how to reach it.
type benchSSHD struct {
	pid     int
	host    string // its public key
	address string // host:port
	dir     string
	config  string // the client's, in which the server is called "bench"
	key     string // the client's
	known   string // its known hosts
}

func startSSHD(b testing.TB, dir string) *benchSSHD {
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
	s := &benchSSHD{dir: dir, host: hostPublic, key: file("user_key", user.Reveal())}
	s.configure(b, fmt.Sprintf("127.0.0.1:%d", port))
	server := file("sshd_config", fmt.Sprintf(`ListenAddress 127.0.0.1:%d
HostKey %s
AuthorizedKeysFile %s
PermitRootLogin prohibit-password
StrictModes no
PidFile none
UsePAM no
SetEnv BORG_BASE_DIR=%s
Subsystem sftp /usr/lib/openssh/sftp-server
`, port, file("host_key", host.Reveal()), file("authorized_keys", userPublic+"\n"), filepath.Join(dir, "borg")))

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
		c, err := net.Dial("tcp", s.address)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return s
}

// configure writes what a client needs to find the server at address.
func (s *benchSSHD) configure(b testing.TB, address string) {
	b.Helper()
	_, port, err := net.SplitHostPort(address)
	must(b, err)
	s.address, s.config, s.known = address, filepath.Join(s.dir, "ssh_config-"+port), filepath.Join(s.dir, "known_hosts-"+port)
	must(b, os.WriteFile(s.known, fmt.Appendf(nil, "[127.0.0.1]:%s %s\n", port, s.host), 0o600))
	must(b, os.WriteFile(s.config, fmt.Appendf(nil, `Host bench
  HostName 127.0.0.1
  Port %s
  User root
  IdentityFile %s
  IdentitiesOnly yes
  BatchMode yes
  LogLevel ERROR
  UserKnownHostsFile %s
`, port, s.key, s.known), 0o600))
}

// through is the same server by way of another address.
func (s *benchSSHD) through(b testing.TB, address string) *benchSSHD {
	b.Helper()
	far := *s
	far.configure(b, address)
	return &far
}

// shell is the ssh command that takes the cipher.
func (s *benchSSHD) shell(cipher string) string {
	if cipher == defaultCipher {
		return "ssh -F " + s.config
	}
	return "ssh -F " + s.config + " -c " + cipher
}

// The ciphers of rsync's SSH: what OpenSSH takes by itself, and its quickest
// where the processor has AES instructions.
const (
	defaultCipher = ""
	quickCipher   = "aes128-gcm@openssh.com"
)

// copy mirrors source into target.
func (s *benchSSHD) copy(b testing.TB, source, target, cipher string, options ...string) benchtest.Cost {
	b.Helper()
	args := append([]string{"-a", "--rsh=" + s.shell(cipher)}, options...)
	c, _ := measure(b, exec.Command("rsync", append(args, source+"/", "bench:"+target+"/")...), s.pid)
	return c
}
