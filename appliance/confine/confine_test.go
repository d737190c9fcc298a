package confine

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// child is what a re-executed test binary is told to do.
type child struct {
	Profile Profile
	Action  string
	Folder  string
}

// TestMain makes this binary a part when it is told to be one.
func TestMain(m *testing.M) {
	text := os.Getenv("CONFINE_TEST")
	if text == "" {
		os.Exit(m.Run())
	}
	var c child
	if err := json.Unmarshal([]byte(text), &c); err != nil {
		panic(err)
	}
	if err := c.run(); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

func (c child) run() error {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	switch c.Action {
	case "probe-only": // nothing is protected: every probe must notice
		for _, r := range c.Profile.probe(landlockABI) {
			fmt.Println(r)
		}
		return nil
	case "filter-missing":
		c.Profile.Exec = true // the filter lets pass what the probes then forbid
		if err := c.Profile.filterCalls(); err != nil {
			return err
		}
		c.Profile.Exec = false
		for _, r := range c.Profile.probe(0) {
			fmt.Println(r)
		}
		return nil
	}
	if err := Enter(c.Profile, true, log); err != nil {
		return err
	}
	in := func(name string) string { return filepath.Join(c.Folder, name) }
	_, exists := os.Stat("/etc/passwd")
	tries := []struct {
		name string
		err  error
	}{
		{"read what is allowed", try(os.ReadFile(in("readable/file")))},
		{"write what is readable", os.WriteFile(in("readable/file"), nil, 0o600)},
		{"write what is allowed", os.WriteFile(in("writable/file"), []byte("x"), 0o600)},
		{"link between folders", errors.Join(os.Mkdir(in("writable/a"), 0o700), os.Link(in("writable/file"), in("writable/a/file")))},
		{"truncate elsewhere", os.Truncate(in("forbidden/file"), 0)},
		{"read elsewhere", try(os.ReadFile(in("forbidden/file")))},
		{"read passwords", try(os.ReadFile("/etc/passwd"))},
		{"see passwords", exists},
		{"listen on its port", listen(c.Profile.Bind)},
		{"listen on another port", listen([]uint16{47113})},
		{"start a program", exec.Command("/bin/true").Run()},
		{"user namespace", clone(unix.CLONE_NEWUSER)},
		{"signal its parent", unix.Kill(os.Getppid(), 0)},
	}
	for _, t := range tries {
		fmt.Printf("%s: %s\n", t.name, outcome(t.err))
	}
	return nil
}

func try[T any](_ T, err error) error { return err }

func outcome(err error) string {
	switch {
	case err == nil:
		return "yes"
	case errors.Is(err, fs.ErrPermission), errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EADDRNOTAVAIL):
		return "no"
	}
	return err.Error()
}

func listen(ports []uint16) error {
	if len(ports) == 0 {
		return unix.EPERM
	}
	// Over Go's own listener, which asks for multipath TCP first.
	l, err := net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", ports[0]))
	if err == nil {
		l.Close()
	}
	return err
}

func clone(flag uintptr) error {
	pid, _, errno := syscall.RawSyscall6(unix.SYS_CLONE, flag|uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	if errno != 0 {
		return errno
	}
	if pid == 0 {
		syscall.RawSyscall(unix.SYS_EXIT, 0, 0, 0)
	}
	return nil
}

// run starts a child with the supervisor's half of the profile.
func run(t *testing.T, c child) (out, log string, err error) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("these tests need root: parts get other users and namespaces")
	}
	// Where every user may start it.
	dir, err := os.MkdirTemp("", "confine")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(dir, "self")
	if err := os.WriteFile(bin, self, 0o755); err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(bin)
	cmd.Env = []string{"CONFINE_TEST=" + string(text)}
	cmd.SysProcAttr = c.Profile.Attr()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err = cmd.Run()
	return stdout.String(), stderr.String(), err
}

// folders makes a tree that every user could use were it not for confinement.
func folders(t *testing.T) string {
	t.Helper()
	// Not below /tmp: the probe for forbidden writes uses that.
	dir, err := os.MkdirTemp("/var/tmp", "confine")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	for _, name := range []string{"", "readable", "writable", "forbidden"} {
		sub := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(sub, 0o777), os.Chmod(sub, 0o777)); err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(sub, "file")
		if err := errors.Join(os.WriteFile(file, []byte("x"), 0o666), os.Chmod(file, 0o666)); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Remove(filepath.Join(dir, "writable/file"))); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestConfinedPart(t *testing.T) {
	dir := folders(t)
	base := Profile{UID: 65501, Read: []string{dir + "/readable"}, Write: []string{dir + "/writable"}}
	out, log, err := run(t, child{Profile: base, Folder: dir})
	if err != nil {
		t.Fatalf("%v\n%s\n%s", err, out, log)
	}
	want := `read what is allowed: yes
write what is readable: no
write what is allowed: yes
link between folders: yes
truncate elsewhere: no
read elsewhere: no
read passwords: no
see passwords: yes
listen on its port: no
listen on another port: no
start a program: no
user namespace: no
signal its parent: no
`
	if out != want {
		t.Errorf("got\n%s\nwant\n%s", out, want)
	}
	for _, probe := range []string{"root", "caps", "no-new-privileges", "read", "write", "network", "mptcp", "mount", "exec", "clock", "calls"} {
		if !strings.Contains(log, " "+probe+":held") && !strings.Contains(log, `"`+probe+":held") {
			t.Errorf("probe %s did not hold: %s", probe, log)
		}
	}
	if strings.Count(log, "\n") != 1 {
		t.Errorf("the log is more than one line: %s", log)
	}
}

func TestPorts(t *testing.T) {
	dir := folders(t)
	out, log, err := run(t, child{Folder: dir, Profile: Profile{
		UID: 65502, Network: TCPPorts, Bind: []uint16{222}, Caps: []uintptr{unix.CAP_NET_BIND_SERVICE},
	}})
	if err != nil {
		t.Fatalf("%v\n%s\n%s", err, out, log)
	}
	if !strings.Contains(out, "listen on its port: yes\nlisten on another port: no\n") || !strings.Contains(log, "tcp:held") {
		t.Errorf("%s\n%s", out, log)
	}
}

// Root parts keep the capabilities that they name and lose the others.
func TestRootPart(t *testing.T) {
	dir := folders(t)
	caps := []uintptr{unix.CAP_SYS_ADMIN, unix.CAP_CHOWN, unix.CAP_DAC_OVERRIDE}
	out, log, err := run(t, child{Folder: dir, Profile: Profile{Caps: caps, Mounts: true, Exec: true, Network: WholeNetwork}})
	if err != nil {
		t.Fatalf("%v\n%s\n%s", err, out, log)
	}
	if !strings.Contains(out, "start a program: yes\nuser namespace: no\n") || !strings.Contains(log, "caps=sys_admin,chown,dac_override") {
		t.Errorf("%s\n%s", out, log)
	}
}

// A probe that cannot fail protects nothing: without confinement each one must
// notice.
func TestProbesNotice(t *testing.T) {
	for _, tt := range []struct {
		name, action string
		profile      Profile
		open         []string
	}{
		{"as root, nothing done", "probe-only", Profile{UID: 0, Network: WholeNetwork},
			[]string{"caps", "no-new-privileges", "read", "write", "mount", "exec", "clock", "calls"}},
		{"user with the machine's TCP", "probe-only", Profile{UID: 65503, Network: TCPPorts},
			[]string{"no-new-privileges", "read", "tcp", "exec", "calls"}},
		{"filter without exec", "filter-missing", Profile{Network: WholeNetwork}, []string{"exec"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := child{Profile: tt.profile, Action: tt.action}
			out, _, err := run(t, c)
			if err != nil {
				t.Fatal(err, out)
			}
			for _, name := range tt.open {
				if !strings.Contains(out, name+":OPEN\n") {
					t.Errorf("probe %s did not notice that it can:\n%s", name, out)
				}
			}
		})
	}

}

// As root without dropping: becoming root must be noticed too.
func TestStillRoot(t *testing.T) {
	p := Profile{UID: 65503}
	for _, r := range p.probe(0) {
		if r.name == "root" && r.err == nil {
			t.Error("a process that is root was not noticed")
		}
	}
}

func TestCovers(t *testing.T) {
	p := Profile{}
	for _, tt := range []struct {
		dir, path string
		want      bool
	}{
		{"/", "/tmp", true}, {"/tmp", "/tmp", true}, {"/tmp", "/", false}, {"/tmp", "/tmpx", false}, {"/tm", "/tmp", false},
	} {
		if got := p.covers(tt.path, []string{tt.dir}); got != tt.want {
			t.Errorf("%s covers %s: %v", tt.dir, tt.path, got)
		}
	}
}
