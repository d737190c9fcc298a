//go:build vm

package stage_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"farkeep/image/emulate"
	"farkeep/image/freeport"
	"farkeep/image/stage"
	"farkeep/image/stage/stagetest"
	"farkeep/shared/hint"
	"farkeep/shared/pushwire"
)

type world struct {
	*testing.T
	s      *stage.Stage
	a      *stage.Appliance
	source string
}

func (w *world) must(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

// await bounds a wait for a state of the appliance.
func (w *world) await(what string, ok func(pushwire.Status) bool) pushwire.Status {
	w.Helper()
	ctx, cancel := context.WithTimeout(w.Context(), 4*time.Minute)
	defer cancel()
	s, err := w.a.Await(ctx, what, ok)
	w.must(err)
	return s
}

func (w *world) mounted() {
	w.Helper()
	w.await("mounted", func(s pushwire.Status) bool { return s.Disk.Mounted })
}

// change writes new random files into the repository, which is a plain folder.
func (w *world) change(files, size int) {
	w.Helper()
	data := make([]byte, size)
	for i := range files {
		rand.Read(data)
		w.must(os.WriteFile(filepath.Join(w.source, fmt.Sprintf("file-%02d", i)), data, 0o600))
	}
}

func (w *world) generations() []string {
	w.Helper()
	out, err := w.a.SSH(w.Context(), "home/pusher/ssh_key", "generations")
	w.must(err)
	return regexp.MustCompile(`"name":"[^"]+"`).FindAllString(out, -1)
}

// TestMisfortunes takes one appliance, booted once on the generic machine,
// through what goes wrong around it. The order matters: each leaves it well.
func TestMisfortunes(t *testing.T) {
	dir := t.TempDir()
	var console bytes.Buffer
	defer func() {
		if t.Failed() {
			t.Logf("console and commands:\n%s", tailOf(console.Bytes(), 40_000))
		}
	}()
	out := &lockedWriter{w: &console}
	s, err := stage.New(t.Context(), stage.Options{Dir: dir, Bin: stagetest.Programs(t), Out: out, Console: out, Log: slog.New(slog.DiscardHandler), HeartbeatAge: time.Hour, UnreachableAfter: 10 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	w := &world{T: t, s: s, source: filepath.Join(dir, "source")}
	w.must(os.Mkdir(w.source, 0o700))
	w.change(3, 10_000)
	_, err = s.Run(t.Context(), "farkeep-image", "site", "add", "repository", "files", w.source, "--dir", s.Site)
	w.must(err)
	w.must(s.BuildImage(t.Context()))
	port, err := freeport.TCP()
	w.must(err)
	lan := emulate.Forward{HostPort: port, GuestPort: 22}
	w.a, err = s.Add(t.Context(), stage.Cast{Name: "barn", Machine: emulate.Generic, DiskSize: 512 << 20, Relay: emulate.Relay{Line: 5}, Window: "24h", Settings: stage.ShortLease, Forward: []emulate.Forward{lan}})
	w.must(err)
	w.must(s.OpenHome(t.Context()))
	w.must(s.StopKeyServer())
	w.must(w.a.Boot(t.Context()))

	run := func(name string, f func(*world)) {
		if !t.Run(name, func(t *testing.T) { inner := *w; inner.T = t; f(&inner) }) {
			t.FailNow()
		}
	}
	run("key server out of reach, then back", func(w *world) {
		st := w.await("complaining", func(s pushwire.Status) bool { return s.Disk.Error != "" })
		if st.Disk.Unlocked {
			w.Errorf("open without a key: %+v", st.Disk)
		}
		w.must(w.s.StartKeyServer(t.Context())) // it outlives this subtest
		w.mounted()
	})
	run("nothing answers on the LAN side", func(w *world) {
		w.silent(lan.Address())
	})
	run("push", func(w *world) {
		_, err := w.s.Push(w.Context())
		w.must(err)
		if n := len(w.generations()); n != 1 {
			w.Fatalf("%d generations", n)
		}
	})
	run("wrong key at the key server, then the right one", func(w *world) {
		path := filepath.Join(w.s.KeyServerSecrets(), "keys", w.a.LUKS+".key")
		right, err := os.ReadFile(path)
		w.must(err)
		wrong := make([]byte, len(right))
		rand.Read(wrong)
		w.sleep()
		w.must(os.WriteFile(path, wrong, 0o600))
		_, err = w.a.SSH(w.Context(), "home/pusher/ssh_key", "wake")
		w.must(err)
		st := w.await("complaining", func(s pushwire.Status) bool { return s.Disk.Error != "" })
		if st.Disk.Unlocked || !strings.Contains(st.Disk.Error, "key") {
			w.Errorf("with a wrong key: %+v", st.Disk)
		}
		w.must(os.WriteFile(path, right, 0o600))
		_, err = w.a.SSH(w.Context(), "home/pusher/ssh_key", "wake") // now, not after the back-off
		w.must(err)
		w.mounted()
	})
	run("disk pulled in the middle of a push", func(w *world) {
		before := w.generations()
		w.change(12, 1<<20)
		ctx, cancel := context.WithCancel(w.Context())
		defer cancel()
		sent, err := w.s.Sent("barn")
		w.must(err)
		pushed := make(chan error, 1)
		// With the limit it takes a quarter of a minute, however fast the host is.
		go func() { _, err := w.s.Push(ctx, "--rate-limit", "800000"); pushed <- err }()
		for {
			now, err := w.s.Sent("barn")
			w.must(err)
			if now > sent+(2<<20) {
				break
			}
			select {
			case err := <-pushed:
				w.Fatalf("the push ended before the disk was pulled: %v", err)
			case <-time.After(50 * time.Millisecond):
			}
		}
		w.must(w.a.Pi.UnplugDisk(w.Context()))
		w.await("without a disk", func(s pushwire.Status) bool { return !s.Disk.Mounted }) // it meets the loss by itself
		w.a.Pi.PlugDisk()
		cancel()
		<-pushed
		w.mounted()
		if after := w.generations(); !slices.Equal(before, after[:len(before)]) {
			w.Errorf("generations were %v and are %v", before, after)
		}
		_, err = w.s.Push(w.Context())
		w.must(err)
		if after := w.generations(); len(after) <= len(before) {
			w.Errorf("the push made no generation: %v", after)
		}
	})
	run("a push that the disk has no room for", func(w *world) {
		before := w.generations()
		big, err := os.Create(filepath.Join(w.source, "too-big"))
		w.must(err)
		_, err = io.CopyN(big, rand.Reader, 600<<20)
		w.must(errors.Join(err, big.Close()))
		_, err = w.s.Push(w.Context())
		var failed *stage.CommandError
		if !errors.As(err, &failed) || failed.Code() == hint.ExitOK {
			w.Fatalf("the push was taken: %v", err)
		}
		if !regexp.MustCompile(`(?i)room|space|free`).MatchString(failed.Diagnostics) {
			w.Errorf("the refusal does not speak of room: %s", failed.Diagnostics)
		}
		w.must(os.Remove(big.Name()))
		if after := w.generations(); !slices.Equal(before, after) {
			w.Errorf("generations were %v and are %v", before, after)
		}
	})
	run("the key is nowhere in the memory of a machine whose disk is open", (*world).searched)
	run("revoked while it runs: dark within its lease, and the word of it arrives", (*world).revokedWhileItRuns)
	run("stolen and switched off: no key after the revocation, and none on the card", (*world).stolenAndSwitchedOff)
	run("allowed again: it opens when it is woken", (*world).allowedAgain)
	run("the card is copied: whichever comes second is found out", (*world).cardCopied)
}

// sleep closes the disk and waits until it is dark.
func (w *world) sleep() {
	w.Helper()
	_, err := w.a.SSH(w.Context(), "home/pusher/ssh_key", "sleep")
	w.must(err)
	ctx, cancel := context.WithTimeout(w.Context(), 3*time.Minute)
	defer cancel()
	w.must(w.a.Pi.WaitDisk(ctx, false))
}

// silent fails when anything speaks at address. The emulator's network accepts
// before it asks the guest, so a connection alone means nothing.
func (w *world) silent(address string) {
	w.Helper()
	c, err := net.DialTimeout("tcp", address, 5*time.Second)
	if err != nil {
		return
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	banner := make([]byte, 64)
	if n, err := c.Read(banner); n > 0 || err == nil {
		w.Errorf("%s answers %q", address, banner[:n])
	}
}

// lockedWriter lets several sources write into one buffer.
type lockedWriter struct {
	mu sync.Mutex
	w  io.Writer
}

func (l *lockedWriter) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}

// tailOf is the end of a log, from the beginning of a line.
func tailOf(b []byte, n int) []byte {
	if len(b) <= n {
		return b
	}
	b = b[len(b)-n:]
	if i := bytes.IndexByte(b, '\n'); i >= 0 {
		b = b[i+1:]
	}
	return b
}
