package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"farkeep/image/freeport"
	"farkeep/shared/identity"
	"farkeep/shared/settings"
	"farkeep/shared/site"
	"farkeep/shared/sshverb"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/crypto/ssh"
)

// A herd is a site of many appliances that all come back at once.
type herd struct {
	*aSite
	ids  []ssh.Signer
	host ssh.PublicKey
	keys [][]byte
}

func herdDisk(i int) string { return fmt.Sprintf("%08x-0000-4000-8000-000000000000", i+1) }

func newHerd(t testing.TB, size int) *herd {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	h := &herd{aSite: &aSite{dir: dir, env: &testscript.Env{WorkDir: dir, Vars: os.Environ()}}}
	port, err := freeport.TCP()
	must(err)
	address := fmt.Sprintf("127.0.0.1:%d", port)
	h.env.Setenv("ADDRESS", address)
	newKey := func() (ssh.Signer, string, []byte) {
		private, public, err := identity.New("x")
		must(err)
		s, err := identity.Signer(private)
		must(err)
		return s, public, []byte(private.Reveal())
	}
	wg := func() string {
		_, public, err := identity.NewWireGuard()
		must(err)
		return public
	}
	host, hostLine, hostFile := newKey()
	h.host = host.PublicKey()
	_, push, _ := newKey()
	s := &site.Site{
		Name:       "herd",
		VPN:        site.VPN{Network: netip.MustParsePrefix("10.77.0.0/16"), Endpoints: []string{"home.example.net:51820"}},
		Home:       site.Home{Name: "borg", VPNAddress: netip.MustParseAddr("10.77.0.1"), VPNKey: wg(), PushKey: push},
		KeyServers: []site.KeyServer{{Name: "borg", Address: address, HostKey: hostLine}},
	}
	s.DeadMan = settings.DefaultDeadMan()
	keys := h.path("secrets/keys")
	must(os.MkdirAll(keys, 0o700))
	must(os.Chmod(h.path("secrets"), 0o700))
	must(os.WriteFile(h.path("secrets/ssh_host_key"), hostFile, 0o600))
	for i := range size {
		id, line, _ := newKey()
		_, hostLine, _ := newKey()
		h.ids = append(h.ids, id)
		s.Appliances = append(s.Appliances, site.Appliance{
			Name: fmt.Sprintf("a%d", i), Board: "pi4", VPNAddress: netip.AddrFrom4([4]byte{10, 77, byte(1 + i/250), byte(1 + i%250)}), VPNKey: wg(),
			HostKey: hostLine, ClientKey: line, LUKS: herdDisk(i),
		})
		key := make([]byte, 64)
		rand.Read(key)
		h.keys = append(h.keys, key)
		must(os.WriteFile(filepath.Join(keys, herdDisk(i)+".key"), key, 0o600))
	}
	s.SetDefaults()
	doc, err := site.NewDocument(s)
	must(err)
	must(os.WriteFile(h.path("site.toml"), doc.Text(), 0o600))
	return h
}

// fetch is what appliance i does: one try. Every appliance has an address of its
// own, as in a VPN.
func (h *herd) fetch(ctx context.Context, i int, connect, answer time.Duration) error {
	from := net.IPv4(127, 1, byte(i/250), byte(1+i%250))
	c, err := sshverb.Dial(ctx, sshverb.Peer{
		Address: h.address(), User: "farkeep", Identity: h.ids[i], HostKey: h.host, Connect: connect, Idle: answer,
		DialContext: (&net.Dialer{LocalAddr: &net.TCPAddr{IP: from}}).DialContext,
	})
	if err != nil {
		return err
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(ctx, answer)
	defer cancel()
	key, err := c.Run(ctx, "key "+herdDisk(i), nil, 8192)
	if err != nil {
		return err
	}
	if !bytes.Equal(key, h.keys[i]) {
		return errors.New("another key came back")
	}
	return nil
}

// stampede lets all appliances come at the same instant and returns how long each
// waited for its key, sorted, and how many tries failed. Who fails tries again at once,
// which is harder on the server than the back-off of a real one.
func (h *herd) stampede(t testing.TB, connect, answer time.Duration) (waits []time.Duration, failed int) {
	t.Helper()
	const tries = 20
	waits = make([]time.Duration, len(h.ids))
	failures := make([]error, len(h.ids)*tries)
	var all sync.WaitGroup
	begin := make(chan struct{})
	for i := range h.ids {
		all.Go(func() {
			<-begin
			start := time.Now()
			for try := range tries {
				err := h.fetch(t.Context(), i, connect, answer)
				waits[i] = time.Since(start)
				if err == nil {
					return
				}
				failures[i*tries+try] = err
			}
			t.Errorf("a%d never got its key", i)
		})
	}
	close(begin)
	all.Wait()
	seen := map[string]bool{}
	for _, err := range failures {
		if err == nil {
			continue
		}
		failed++
		if text := err.Error(); len(seen) < 5 && !seen[text] {
			seen[text] = true
			t.Log(text)
		}
	}
	slices.Sort(waits)
	return waits, failed
}

// toll is what a process took at most, or has.
type toll struct{ memory, threads, locked int } // MiB, number, KiB

func tollOf(t testing.TB, pid int) toll {
	t.Helper()
	number := func(field string) int {
		n, err := strconv.Atoi(procField(t, pid, "status", field))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	return toll{memory: number("VmHWM:") >> 10, threads: number("Threads:"), locked: number("VmLck:")}
}

// TestHerd: everybody comes at once, and everybody is served at the first try,
// with memory, threads and locked pages that do not grow with the crowd. How long
// that takes is the benchmark's question: the bounds on waiting here are out of the way.
func TestHerd(t *testing.T) {
	h := newHerd(t, 300)
	cmd := h.command("serve")
	start(t, cmd)
	// A host that stands still for longer than a handshake may take fails the few that
	// are in one.
	if _, failed := h.stampede(t, 5*time.Minute, 5*time.Minute); failed > len(h.ids)/20 {
		t.Errorf("%d tries failed", failed)
	}
	u := tollOf(t, cmd.Process.Pid)
	t.Logf("%+v", u)
	if u.memory > 160 || u.threads > 200 || u.locked != 0 {
		t.Errorf("it took %d MiB and %d threads, and holds %d KiB locked", u.memory, u.threads, u.locked)
	}
	if out := h.do(t, "audit"); strings.Count(out, " granted ") != len(h.ids) {
		t.Errorf("%d keys are on record; want %d", strings.Count(out, " granted "), len(h.ids))
	}
	h.do(t, "audit", "--verify")
}

// BenchmarkHerd: five hundred appliances come back after a power cut at once, with
// the bounds that a real one has (appliance/keysource: 8 s to connect, 20 s to be
// answered). "sealed" opens every key with age; "slow disk" has a state folder that
// syncs thirty times a second, as an SD card does.
func BenchmarkHerd(b *testing.B) {
	for _, how := range []string{"fast disk", "sealed", "slow disk"} {
		b.Run(how, func(b *testing.B) {
			for range b.N {
				b.StopTimer()
				h := newHerd(b, 500)
				args := []string{"serve"}
				switch how {
				case "sealed":
					h.do(b, "seal", "--new-identity", h.path("identity"))
					args = append(args, "--identity", h.path("identity"))
				case "slow disk":
					// Once before: a new site is adopted one appliance after the other.
					start(b, h.command("serve")).stop()
					slowFolder(b, h.path("state"), time.Second/30)
				}
				cmd := h.command(args...)
				start(b, cmd)
				b.StartTimer()
				began := time.Now()
				waits, failed := h.stampede(b, 8*time.Second, 20*time.Second)
				took := time.Since(began)
				b.StopTimer()
				u := tollOf(b, cmd.Process.Pid)
				b.ReportMetric(float64(len(waits))/took.Seconds(), "keys/s")
				b.ReportMetric(waits[0].Seconds(), "first-s")
				b.ReportMetric(waits[len(waits)/2].Seconds(), "median-s")
				b.ReportMetric(waits[len(waits)-1].Seconds(), "last-s")
				b.ReportMetric(float64(failed), "failed-tries")
				b.ReportMetric(float64(u.memory), "MiB")
				b.ReportMetric(float64(u.threads), "threads")
				b.ReportMetric(procSeconds(b, cmd.Process.Pid), "cpu-s")
			}
		})
	}
}

// procSeconds is how much processor time a process took.
func procSeconds(t testing.TB, pid int) float64 {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+2:]))
	user, err1 := strconv.Atoi(fields[11])
	system, err2 := strconv.Atoi(fields[12])
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	return float64(user+system) / 100 // USER_HZ, proc_pid_stat(5)
}
