package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"farkeep/appliance/part"
	"farkeep/appliance/status"
	"farkeep/shared/settings"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

// TestMain makes this binary the program wherever it is called by its name: in
// scripts, and when the supervisor starts its parts.
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"farkeep-appliance": main})
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(e *testscript.Env) error {
			good := testSettings(t)
			return errors.Join(
				os.WriteFile(filepath.Join(e.WorkDir, "good.toml"), good, 0o600),
				os.WriteFile(filepath.Join(e.WorkDir, "bad.toml"), append(good, "\nnonsense = 1\n"...), 0o600),
			)
		},
	})
}

// output collects what a service prints.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// TestService runs the whole appliance as systemd would: every part as its own
// user, confined and probed on this machine's kernel; one of them is killed.
func TestService(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("this test needs root: parts get users of their own")
	}
	dir := t.TempDir()
	for d := dir; d != "/" && d != os.TempDir(); d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	paths := part.Paths{Run: filepath.Join(dir, "run"), State: filepath.Join(dir, "state"), Media: filepath.Join(dir, "media")}
	file := filepath.Join(dir, "farkeep.toml")
	if err := os.WriteFile(file, testSettings(t), 0o600); err != nil {
		t.Fatal(err)
	}
	// A copy under the program's name, where every user may start it.
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(dir, "farkeep-appliance")
	if err := os.WriteFile(bin, self, 0o755); err != nil {
		t.Fatal(err)
	}
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer notify.Close()

	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, bin, "run", "--settings", file, "--run-dir", paths.Run, "--state-dir", paths.State, "--media-dir", paths.Media)
	cmd.Env = []string{"NOTIFY_SOCKET=" + filepath.Join(dir, "notify"), "WATCHDOG_USEC=1000000"}
	var out output
	cmd.Stderr = &out
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	defer func() {
		if t.Failed() {
			t.Log(out.String())
		}
	}()
	await := func(what string, ok func() bool) {
		t.Helper()
		for limit := time.Now().Add(2 * time.Minute); !ok(); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(limit) {
				t.Fatalf("%s did not happen", what)
			}
		}
	}
	told := func(want string) {
		t.Helper()
		buf := make([]byte, 256)
		if err := notify.SetReadDeadline(time.Now().Add(2 * time.Minute)); err != nil {
			t.Fatal(err)
		}
		for {
			n, err := notify.Read(buf)
			if err != nil {
				t.Fatalf("systemd was not told %s: %v", want, err)
			}
			if string(buf[:n]) == want {
				return
			}
		}
	}

	told("READY=1")
	told("WATCHDOG=1")
	for _, p := range parts() {
		if !p.child {
			await(p.name+" is confined", func() bool { return strings.Contains(out.String(), p.name+": confined uid=") })
		}
	}
	if strings.Contains(out.String(), ":OPEN") {
		t.Error("a protection does not hold")
	}
	await("the status of the supervisor", func() bool {
		b, err := status.Read[status.Boot](paths.Boot())
		return err == nil && b != nil && b.FirstBoot && b.Restarts[part.Keeper] == 0
	})

	// The status files of the parts appear, each its part's own.
	for name, uid := range map[string]uint32{part.Disk: 0, part.Keeper: part.KeeperUID, part.Receiver: part.ReceiverUID, part.Deadman: part.DeadmanUID} {
		await("status of "+name, func() bool {
			var st unix.Stat_t
			return unix.Stat(paths.Status(name), &st) == nil && st.Uid == uid
		})
	}

	// A part is killed; it comes back, and the others have not noticed.
	pid := func(name string) int {
		for line := range strings.Lines(out.String()) {
			if _, rest, ok := strings.Cut(line, "part started child="+name+" pid="); ok {
				var n int
				if json.Unmarshal([]byte(strings.TrimSpace(rest)), &n) == nil {
					return n
				}
			}
		}
		return 0
	}
	if err := unix.Kill(pid(part.Deadman), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	await("a restart", func() bool {
		b, err := status.Read[status.Boot](paths.Boot())
		return err == nil && b != nil && b.Restarts[part.Deadman] == 1
	})
	await("the part's new start", func() bool {
		return strings.Count(out.String(), "part started child="+part.Deadman) == 2
	})
	for line := range strings.Lines(out.String()) {
		if strings.Contains(line, "part ended") && !strings.Contains(line, "child="+part.Deadman) {
			t.Errorf("another part ended: %s", line)
		}
	}

	if err := cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	told("STOPPING=1")
	if err := <-ended; err != nil {
		t.Errorf("the service ended with %v", err)
	}
	for _, p := range parts() {
		if !p.child && !strings.Contains(out.String(), "stopped child="+p.name) {
			t.Errorf("%s was not stopped in order", p.name)
		}
	}
	log, err := os.ReadFile(filepath.Join(paths.State, "log", "farkeep.log"))
	if err != nil || !bytes.Contains(log, []byte(`"msg":"confined"`)) {
		t.Errorf("the log file: %v", err)
	}
	// No secret of the settings is in any log.
	if bytes.Contains(log, []byte("a password")) || strings.Contains(out.String(), "a password") || bytes.Contains(log, []byte("PRIVATE KEY")) {
		t.Error("a secret is in the log")
	}
}

// What the supervisor tells each part is what it needs, and no secret of
// another's.
func TestBriefsHoldOnlyTheirOwnSecrets(t *testing.T) {
	cfg, err := settings.Parse("farkeep.toml", testSettings(t))
	if err != nil {
		t.Fatal(err)
	}
	secrets := map[string]struct {
		value  string
		owners []string
	}{
		"host key":      {cfg.Identity.HostKey.Reveal(), []string{part.Receiver}},
		"client key":    {cfg.Identity.ClientKey.Reveal(), []string{part.Disk}},
		"VPN key":       {cfg.VPN.PrivateKey.Reveal(), []string{part.Network}},
		"mail password": {cfg.Mail.Password.Reveal(), []string{part.Mail}},
	}
	for _, spec := range specs(part.Header{Paths: part.FirmwarePaths(), Firmware: true}, cfg) {
		var brief bytes.Buffer
		if err := spec.Brief(&brief); err != nil {
			t.Fatal(err)
		}
		for name, s := range secrets {
			want := false
			for _, owner := range s.owners {
				want = want || owner == spec.Name
			}
			if got := bytes.Contains(brief.Bytes(), []byte(s.value)); got != want {
				t.Errorf("%s knows the %s: %v", spec.Name, name, got)
			}
		}
	}
}

func TestFoldersBelongToTheirParts(t *testing.T) {
	seen := map[string]bool{}
	for _, f := range folders(part.FirmwarePaths()) {
		if seen[f.path] {
			t.Errorf("%s is listed twice", f.path)
		}
		if parent := filepath.Dir(f.path); parent != "/" && parent != "/run" && !seen[parent] {
			t.Errorf("%s comes before its parent", f.path)
		}
		if f.mode&0o022 != 0 {
			t.Errorf("%s can be written by others", f.path)
		}
		seen[f.path] = true
	}
}
