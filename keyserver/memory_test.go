package main

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"farkeep/shared/identity"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/crypto/ssh"
)

// aSite is what setup makes, for tests that are no scripts.
type aSite struct {
	dir string
	env *testscript.Env
}

func newTestSite(t *testing.T) *aSite {
	t.Helper()
	env := &testscript.Env{WorkDir: t.TempDir(), Vars: os.Environ()}
	if err := setup(env); err != nil {
		t.Fatal(err)
	}
	return &aSite{env.WorkDir, env}
}

func (s *aSite) path(name string) string { return filepath.Join(s.dir, name) }

func (s *aSite) address() string { return s.env.Getenv("ADDRESS") }

// command is the program, with its files.
func (s *aSite) command(args ...string) *exec.Cmd {
	cmd := exec.Command(program, append(args, "--site", s.path("site.toml"), "--secrets", s.path("secrets"), "--state", s.path("state"))...)
	cmd.Dir, cmd.Env = s.dir, s.env.Vars
	return cmd
}

func (s *aSite) do(t testing.TB, args ...string) string {
	t.Helper()
	out, err := s.command(args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// log is what a process wrote, while it still writes.
type log struct {
	mu  sync.Mutex
	all bytes.Buffer
}

func (l *log) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all.Write(b)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all.String()
}

// service is a command that serves.
type service struct {
	*log
	cmd   *exec.Cmd
	ended chan struct{}
}

// stop ends it as systemd does.
func (s *service) stop() {
	s.cmd.Process.Signal(syscall.SIGTERM)
	<-s.ended
}

// start runs a command until the test ends, and waits until it serves.
func start(t testing.TB, cmd *exec.Cmd) *service {
	t.Helper()
	s := &service{log: &log{}, cmd: cmd, ended: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = s, s
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { cmd.Wait(); close(s.ended) }()
	t.Cleanup(func() {
		s.stop()
		if t.Failed() {
			t.Logf("its log:\n%s", s)
		}
	})
	for deadline := time.Now().Add(time.Minute); !strings.Contains(s.String(), "msg=serving"); {
		select {
		case <-s.ended:
			t.Fatalf("it ended:\n%s", s)
		case <-time.After(10 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			t.Fatalf("it does not serve:\n%s", s)
		}
	}
	return s
}

// appliance dials as one of the site's appliances.
func (s *aSite) appliance(t testing.TB, name string, ciphers ...string) *ssh.Client {
	t.Helper()
	me, err := identity.ReadSigner(s.path("id/" + name))
	if err != nil {
		t.Fatal(err)
	}
	config := &ssh.ClientConfig{
		User: "ks", Auth: []ssh.AuthMethod{ssh.PublicKeys(me)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(), Timeout: 20 * time.Second,
	}
	config.Ciphers = ciphers
	c, err := ssh.Dial("tcp", s.address(), config)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestNoKeyInTheServersMemory searches the whole memory of a server that has
// given keys away, in clear and sealed, with each cipher, to OpenSSH and in many
// connections at once: not eight bytes of a key in a row are anywhere in it, nor in
// its log, its arguments or its environment; and it leaves no core dump.
func TestNoKeyInTheServersMemory(t *testing.T) {
	for _, how := range []string{"in clear", "sealed"} {
		t.Run(how, func(t *testing.T) {
			s := newTestSite(t)
			// Not the key of the scripts: its mark lies in this very program.
			key := make([]byte, 64)
			rand.Read(key)
			if err := os.WriteFile(s.path("random.key"), key, 0o600); err != nil {
				t.Fatal(err)
			}
			s.do(t, "add", atticDisk, "--key-file", s.path("random.key"))
			serve := []string{"serve"}
			if how == "sealed" {
				s.do(t, "seal", "--new-identity", s.path("identity"))
				serve = append(serve, "--identity", s.path("identity"))
			}
			cmd := s.command(serve...)
			cmd.Args = append([]string{"sh", "-c", `ulimit -c unlimited; exec "$@"`, "sh", program}, cmd.Args[1:]...)
			shell, err := exec.LookPath("sh")
			if err != nil {
				t.Fatal(err)
			}
			cmd.Path = shell
			const mark = "FARKEEP_MARK=this is found, so that can be"
			cmd.Env = append(cmd.Env, mark)
			logged := start(t, cmd)

			token := ""
			fetch := func(c *ssh.Client) {
				t.Helper()
				defer c.Close()
				session, err := c.NewSession()
				if err != nil {
					t.Fatal(err)
				}
				var stderr bytes.Buffer
				session.Stderr = &stderr
				got, err := session.Output(strings.TrimSpace("key " + atticDisk + " " + token))
				if err != nil || !bytes.Equal(got, key) {
					t.Fatalf("%d bytes, %v, %s", len(got), err, stderr.String())
				}
				if _, next, ok := strings.Cut(stderr.String(), "token "); ok {
					token = strings.TrimSpace(next)
				}
			}
			for _, cipher := range []string{ssh.CipherAES128GCM, ssh.CipherAES256GCM, ssh.CipherChaCha20Poly1305} {
				for range 3 {
					fetch(s.appliance(t, "attic", cipher))
				}
			}
			out, err := exec.Command("ssh", "-F", s.path("ssh_config"), "-i", s.path("id/attic"), "ks", "key", atticDisk, token).Output()
			if err != nil || !bytes.Equal(out, key) {
				t.Fatalf("ssh: %d bytes, %v", len(out), err)
			}

			found, marked, size := searchProcess(t, cmd.Process.Pid, key, []byte(mark))
			t.Logf("searched %d MiB", size>>20)
			if !marked {
				t.Fatal("the search does not find what is there")
			}
			for _, at := range found {
				t.Errorf("a piece of the key is in %s", at)
			}
			for _, name := range []string{"cmdline", "environ"} {
				text, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", cmd.Process.Pid, name))
				if err != nil {
					t.Fatal(err)
				}
				if pieces(text, key) {
					t.Errorf("a piece of the key is in %s", name)
				}
			}
			if got := procField(t, cmd.Process.Pid, "status", "VmLck:"); got != "0" {
				t.Errorf("VmLck is %s kB when nobody is served", got)
			}

			// The Go runtime writes every stack when it is asked to quit, and a kernel that
			// may would write a core.
			if err := cmd.Process.Signal(syscall.SIGQUIT); err != nil {
				t.Fatal(err)
			}
			for deadline := time.Now().Add(2 * time.Minute); !strings.Contains(logged.String(), "SIGQUIT: quit"); time.Sleep(10 * time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatal("it does not quit")
				}
			}
			if pieces([]byte(logged.String()), key) {
				t.Error("a piece of the key is in the log")
			}
			cores, err := filepath.Glob(s.path("core*"))
			if err != nil || len(cores) > 0 {
				t.Errorf("core dumps: %v, %v", cores, err)
			}
		})
	}
}

// window is how many bytes in a row make a piece of a key.
const window = 8

// pieces reports whether window bytes in a row of key are in text.
func pieces(text, key []byte) bool {
	for i := 0; i+window <= len(key); i++ {
		if bytes.Contains(text, key[i:i+window]) {
			return true
		}
	}
	return false
}

// searchProcess looks for pieces of key, and for mark, in all the memory of a process.
func searchProcess(t *testing.T, pid int, key, mark []byte) (found []string, marked bool, size int64) {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	wanted := map[uint64]bool{}
	var first [1 << 16]bool // by the first two bytes: the map is asked rarely
	for i := 0; i+window <= len(key); i++ {
		wanted[binary.LittleEndian.Uint64(key[i:])] = true
		first[binary.LittleEndian.Uint16(key[i:])] = true
	}
	buf := make([]byte, 4<<20)
	for line := range strings.Lines(string(maps)) {
		line = strings.TrimSpace(line)
		var low, high int64
		if n, _ := fmt.Sscanf(line, "%x-%x ", &low, &high); n != 2 || strings.Contains(line, "---p") || strings.Contains(line, "[v") {
			continue
		}
		const overlap = 64
		for pos := low; pos < high; pos += int64(len(buf)) - overlap {
			n, err := mem.ReadAt(buf[:min(int64(len(buf)), high-pos)], pos)
			if err != nil && n == 0 {
				t.Fatalf("read %s: %v", line, err)
			}
			size += int64(n)
			marked = marked || bytes.Contains(buf[:n], mark)
			for i := 0; i+window <= n; i++ {
				if first[binary.LittleEndian.Uint16(buf[i:])] && wanted[binary.LittleEndian.Uint64(buf[i:])] {
					found = append(found, line)
					break
				}
			}
			if n < len(buf) {
				break
			}
		}
	}
	return found, marked, size
}

func procField(t testing.TB, pid int, file, field string) string {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(text), field)
	if !ok {
		t.Fatalf("%s has no %s", file, field)
	}
	return strings.Fields(rest)[0]
}
