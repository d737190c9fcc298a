package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"farkeep/appliance/benchtest"
	"farkeep/appliance/disk"
	"farkeep/appliance/localcall"
	"farkeep/appliance/part"
	"farkeep/appliance/status"
	"farkeep/image/freeport"
	"farkeep/shared/identity"
	"farkeep/shared/secret"
	"farkeep/shared/settings"

	"golang.org/x/sys/unix"
)

// benchAppliance is an appliance's receiver and keeper, each a confined process
// with its own user as in the field, on the loopback interface; and the pusher.
// Benchmarks measure it, TestPushOverSSH and its neighbours try it.
// The disk is always mounted: a tmpfs in tests, an ext4 in memory in benchmarks.
type benchAppliance struct {
	paths   part.Paths
	port    int
	hostKey string // public
	pushKey string // public
	key     string // the pusher's identity, a file
	restore string // a restore key, a file
	pusher  string // the program
	parts   []int  // pids of keeper and receiver

	bin      string
	header   part.Header
	settings *settings.Appliance
	running  map[string]*exec.Cmd

	closed atomic.Int32 // so many times the disk is found closed
}

// buildPrograms builds the programs as "make all" does, into dir.
func buildPrograms(b testing.TB, dir string, names ...string) {
	b.Helper()
	for _, name := range names {
		cmd := exec.Command("go", "build", "-trimpath", "-o", filepath.Join(dir, "farkeep-"+name), "farkeep/"+name)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			b.Fatalf("build %s: %v\n%s", name, err, out)
		}
	}
}

func newIdentity(b testing.TB, name string) (private secret.Text, public string) {
	b.Helper()
	private, public, err := identity.New(name)
	if err != nil {
		b.Fatal(err)
	}
	return private, strings.TrimSpace(public)
}

// freePort is a TCP port of the loopback interface that nobody uses.
func freePort(b testing.TB) int {
	b.Helper()
	port, err := freeport.TCP()
	if err != nil {
		b.Fatal(err)
	}
	return int(port)
}

// startAppliance runs bin's parts below dir, with a disk of that size (in
// tmpfs(5)'s words). It knows the pusher's key, a restore key, and those that are
// asked for.
func startAppliance(b testing.TB, dir, bin, diskSize string, keys ...settings.ReceiverKey) *benchAppliance {
	b.Helper()
	return startApplianceWith(b, dir, bin, diskSize, settings.History{}, keys...)
}

func startApplianceWith(b testing.TB, dir, bin, diskSize string, kept settings.History, keys ...settings.ReceiverKey) *benchAppliance {
	b.Helper()
	return startApplianceOn(b, dir, bin, func(disk string) { mountTmpfs(b, disk, diskSize) }, kept, keys...)
}

// startApplianceOn has mount make the disk.
func startApplianceOn(b testing.TB, dir, bin string, mount func(disk string), kept settings.History, keys ...settings.ReceiverKey) *benchAppliance {
	b.Helper()
	a := &benchAppliance{
		bin:   bin,
		paths: part.Paths{Run: filepath.Join(dir, "run"), State: filepath.Join(dir, "state"), Media: filepath.Join(dir, "media")},
		port:  freePort(b), key: filepath.Join(dir, "push_key"), pusher: filepath.Join(dir, "farkeep-pusher"),
	}
	host, hostKey := newIdentity(b, "attic")
	private, pushKey := newIdentity(b, "home")
	a.hostKey, a.pushKey = hostKey, pushKey
	must(b, os.WriteFile(a.key, []byte(private.Reveal()), 0o600))
	private, restoreKey := newIdentity(b, "restore")
	a.restore = filepath.Join(dir, "restore_key")
	must(b, os.WriteFile(a.restore, []byte(private.Reveal()), 0o600))
	s := &settings.Appliance{
		Name: "attic", Identity: settings.Identity{HostKey: host}, VPN: settings.VPN{Interface: "lo"}, History: kept,
		Receiver: settings.Receiver{Port: a.port, Keys: append([]settings.ReceiverKey{
			{Name: "home", Role: "push", PublicKey: pushKey, Repositories: []string{"*"}},
			{Name: "restore", Role: "restore", PublicKey: restoreKey},
		}, keys...)},
	}
	h := part.Header{Host: s.Name, Paths: a.paths}
	a.header, a.settings = h, s
	must(b, (&system{header: h}).makeFolders())
	mount(a.paths.Disk())
	must(b, os.Chown(a.paths.Disk(), part.KeeperUID, part.KeeperUID)) // as the disk part does
	a.playDisk(b)
	for _, name := range []string{part.Keeper, part.Receiver} {
		a.startPart(b, bin, name, h, s)
	}
	await(b, "the keeper has the disk", func() bool {
		k, err := status.Read[status.Keeper](a.paths.Status(part.Keeper))
		return err == nil && k != nil && k.DiskReady
	})
	await(b, "the keeper listens", func() bool {
		c, err := net.Dial("unix", a.paths.Socket(part.Keeper))
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	await(b, "the receiver listens", func() bool {
		r, err := status.Read[status.Receiver](a.paths.Status(part.Receiver))
		return err == nil && r != nil && r.Listening
	})
	return a
}

// benchmarkAppliance builds the programs as a user has them, and starts them; the
// disk is an ext4 in memory.
func benchmarkAppliance(b testing.TB, dir string) *benchAppliance {
	b.Helper()
	buildPrograms(b, dir, "pusher", "appliance")
	return startApplianceOn(b, dir, filepath.Join(dir, "farkeep-appliance"), func(disk string) { mountExt4(b, disk, 3<<10) }, settings.History{})
}

// playDisk stands in for the disk part: a disk that is mounted and stays so.
func (a *benchAppliance) playDisk(b testing.TB) {
	b.Helper()
	must(b, status.Write(a.paths.Status(part.Disk), status.Disk{State: status.DiskMounted, Power: true, Unlocked: true, Mounted: true, Since: time.Now(), Updated: time.Now()}))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- localcall.Serve(ctx, a.paths.Socket(part.Disk), []uint32{part.ReceiverUID}, func(_ context.Context, req localcall.Request, c *localcall.Conn) error {
			switch req.Verb {
			case "hold":
				if a.closed.Add(-1) >= 0 {
					return disk.NotOpen(status.DiskPowered)
				}
				if err := c.Reply(nil); err != nil {
					return err
				}
				_, err := io.Copy(io.Discard, c) // until the receiver lets go
				return err
			case "wake", "sleep":
				return nil
			}
			return fmt.Errorf("unknown verb %q", req.Verb)
		})
	}()
	b.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			b.Error(err)
		}
	})
}

// startPart starts a part as the supervisor does, who cannot be used here: it
// waits for every child of this process, the test's own included.
func (a *benchAppliance) startPart(b testing.TB, bin, name string, h part.Header, s *settings.Appliance) {
	b.Helper()
	p, ok := findPart(name)
	if !ok {
		b.Fatalf("there is no part %s", name)
	}
	h.Name = name
	if p.ports != nil {
		h.Ports = p.ports(s)
	}
	briefOut, briefIn, err := os.Pipe()
	must(b, err)
	aliveOut, aliveIn, err := os.Pipe()
	must(b, err)
	log := &output{}
	cmd := exec.Command(bin, "part", name)
	cmd.Env, cmd.Stderr = []string{}, log
	cmd.ExtraFiles = []*os.File{briefOut, aliveIn} // descriptors 3 and 4
	cmd.SysProcAttr = p.profile(h).Attr()
	must(b, cmd.Start())
	a.parts = append(a.parts, cmd.Process.Pid)
	if a.running == nil {
		a.running = map[string]*exec.Cmd{}
	}
	a.running[name] = cmd
	briefOut.Close()
	aliveIn.Close()
	b.Cleanup(func() {
		defer aliveOut.Close()
		if cmd.ProcessState != nil { // killed by the test
			return
		}
		err := cmd.Process.Signal(unix.SIGTERM)
		if ended := cmd.Wait(); err != nil || ended != nil {
			b.Errorf("part %s: %v, %v", name, err, ended)
		}
		if b.Failed() {
			b.Logf("log of %s:\n%s", name, log)
		}
	})
	go io.Copy(io.Discard, aliveOut)
	must(b, part.Send(briefIn, h, p.brief(s)))
	must(b, briefIn.Close())
}

// kill ends a part as no program can end itself.
func (a *benchAppliance) kill(b testing.TB, name string) {
	b.Helper()
	cmd := a.running[name]
	must(b, cmd.Process.Kill())
	_ = cmd.Wait() // "signal: killed"
}

// benchSite is a pusher's configuration for one repository, with a memory of its own.
type benchSite struct {
	appliance  *benchAppliance
	dir        string
	repository string
	text       string // site.toml, with a %s for the appliance's address
}

func (a *benchAppliance) site(b testing.TB, dir, repository, source string) *benchSite {
	b.Helper()
	s := &benchSite{appliance: a, dir: dir, repository: repository}
	must(b, os.MkdirAll(dir, 0o700))
	_, keys := newIdentity(b, "keys")
	_, client := newIdentity(b, "client")
	s.text = fmt.Sprintf(`name = "bench"
[home]
name = "home"
push_key = %q
[[key_server]]
name = "keys"
address = "127.0.0.1:9"
host_key = %q
[[appliance]]
name = "attic"
board = "service"
address = "%%s"
host_key = %q
client_key = %q
[[repository]]
name = %q
path = %q
`, a.pushKey, keys, a.hostKey, client, repository, source)
	s.through(b, a.address())
	return s
}

// through has the pusher find the appliance at another address.
func (s *benchSite) through(b testing.TB, address string) {
	b.Helper()
	must(b, os.WriteFile(filepath.Join(s.dir, "site.toml"), fmt.Appendf(nil, s.text, address), 0o600))
}

// push runs the pusher; result is the word that it must report.
func (s *benchSite) push(b testing.TB, result string) benchtest.Cost {
	b.Helper()
	// At normal priority: rsync has no other.
	cmd := exec.Command(s.appliance.pusher, "push", "--priority", "normal", "--site", filepath.Join(s.dir, "site.toml"),
		"--identity", s.appliance.key, "--state", filepath.Join(s.dir, "state"))
	c, out := measure(b, cmd, s.appliance.parts...)
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) > 3 && f[1] == s.repository && strings.TrimSuffix(f[2], ",") == result { // "new, suspect" is new
			return c
		}
	}
	b.Fatalf("%s is not %s:\n%s", s.repository, result, out)
	return c
}

// generation is the folder of the newest generation, of which there must be n.
func (s *benchSite) generation(b testing.TB, n int) string {
	b.Helper()
	all, err := filepath.Glob(filepath.Join(s.appliance.paths.Disk(), "generations", s.repository, "*-*"))
	must(b, err)
	if len(all) != n {
		b.Fatalf("the disk has %d generations of %s, want %d", len(all), s.repository, n)
	}
	return all[n-1]
}
