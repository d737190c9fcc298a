package service_test

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"farkeep/image/torture/service"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"
	"farkeep/shared/recipe"
	"farkeep/shared/settings"
	"farkeep/shared/sshverb"

	"golang.org/x/sys/unix"
)

// allowed is what all processes of an appliance together may have in memory, in
// bytes: 64 MB, less what a child has that asks key servers and lives for seconds.
// Here no disk is encrypted and nobody is asked.
const allowed = 64_000_000 - 5_000_000

// filesVariable says how many files the generations of TestMemory have; a million
// takes minutes. A million are offered anyway.
const filesVariable = "FARKEEP_MEMORY_FILES"

// The whole appliance, as it runs under systemd, stays small whatever it does and
// however long the list of a repository is.
func TestMemory(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("this test runs an appliance: run it as root")
	}
	files := 50_000
	if text := os.Getenv(filesVariable); text != "" {
		var err error
		if files, err = strconv.Atoi(text); err != nil {
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	for d := dir; d != "/" && d != os.TempDir(); d = filepath.Dir(d) {
		must(t, os.Chmod(d, 0o755))
	}
	cmd := exec.CommandContext(t.Context(), "go", "build", "-tags", "torture", "-trimpath", "-o", filepath.Join(dir, "farkeep-appliance"), "farkeep/appliance")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	var log bytes.Buffer
	freed := confine(t, 4)
	svc, err := service.Start(t.Context(), service.Options{Dir: dir, Bin: dir, DiskSize: 8 << 30, Inodes: 1_100_000, InMemory: true, Log: &log, Settings: func(a *settings.Appliance) {
		// What is not the newest goes as soon as the next one is there.
		a.History = settings.DefaultHistory()
		h := &a.History
		h.Within, h.Hourly, h.Daily, h.Weekly, h.Monthly, h.Yearly, h.FloorOnly = 0, 0, 0, 0, 0, 0, true
		h.FloorGenerations, h.FloorAge, h.ExpirePerDay = 1, 0, 1000
		h.CommitInterval, h.ScrubEvery = 0, settings.Duration(time.Minute)
	}})
	freed()
	must(t, err)
	defer func() {
		must(t, svc.Close())
		if t.Failed() {
			t.Logf("the appliance said:\n%s", log.String())
		}
	}()
	client, err := svc.Dial(t.Context(), service.Push)
	must(t, err)
	defer client.Close()

	weigh := newScale(svc)
	defer weigh.close()
	h := &household{t: t, client: client, list: filepath.Join(dir, "list"), files: 1_000_000, long: 8}
	for i := range h.long {
		sum := manifest.NewHash()
		io.Copy(sum, noise(i)) // a hash does not fail
		h.sums = append(h.sums, manifest.SumOf(sum))
	}
	weigh.begin("idle")
	weigh.begin("a million files are offered")
	answer, needed := h.offer()
	if needed == nil || needed.Len() != int64(h.files+h.long) {
		t.Fatalf("of a million files: %+v", answer)
	}
	if files != h.files {
		h.files = files
		weigh.begin("first offer")
		answer, needed = h.offer()
	}
	weigh.begin("upload of long files")
	h.paused = func() {
		// The windows of the session and of four stripes, and the receiver's own.
		stopUntilFull(t, svc.Parts()["keeper"], &h.sent, func() bool { return svc.Memory()["receiver"] > 12<<20 })
	}
	h.upload(answer.Push, needed)
	h.paused = nil
	weigh.begin("the offer of an upload that was cut")
	if answer, _ = h.offer(); answer.Need != 0 || answer.Kept != int64(h.files+h.long) {
		t.Fatalf("after the upload: %+v", answer)
	}
	weigh.begin("first commit")
	h.verb("commit " + answer.Push)
	weigh.begin("nothing changed")
	if answer, _ = h.offer(); answer.Answer != pushwire.AnswerSame {
		t.Fatalf("of the same: %+v", answer)
	}
	h.night++
	weigh.begin("offer of a night")
	if answer, needed = h.offer(); answer.Need != 1 {
		t.Fatalf("one file changed: %+v", answer)
	}
	h.upload(answer.Push, needed)
	weigh.begin("commit of a night")
	h.verb("commit " + answer.Push)
	weigh.begin("expiry, and reading all again")
	for limit := time.Now().Add(10 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
		there, err := filepath.Glob(filepath.Join(svc.Generations(), "crowd", "0*"))
		must(t, err)
		going, err := filepath.Glob(filepath.Join(svc.Disk(), ".farkeep/going/*"))
		must(t, err)
		if len(there) == 1 && len(going) == 0 {
			break
		}
		if time.Now().After(limit) {
			t.Fatalf("still there: %s, %s", there, going)
		}
	}
	weigh.close()
	t.Logf("%d files\n%s", files, weigh)
	for _, w := range weigh.phases {
		if w.samples == 0 || w.sum > allowed {
			t.Errorf("%s: %d samples, at most %.1f MB; %.1f are allowed", w.phase, w.samples, float64(w.sum)/1e6, float64(allowed)/1e6)
		}
	}
}

// confine gives what this goroutine starts n processors, as a Pi has, until the
// returned function is called: a Go process keeps memory for each that it may use.
func confine(t *testing.T, n int) (freed func()) {
	t.Helper()
	runtime.LockOSThread()
	var all, few unix.CPUSet
	must(t, unix.SchedGetaffinity(0, &all))
	for cpu := 0; few.Count() < min(n, all.Count()); cpu++ {
		if all.IsSet(cpu) {
			few.Set(cpu)
		}
	}
	must(t, unix.SchedSetaffinity(0, &few))
	return func() {
		must(t, unix.SchedSetaffinity(0, &all))
		runtime.UnlockOSThread()
	}
}

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

// scale weighs an appliance, again and again.
type scale struct {
	svc  *service.Service
	stop func()

	mu     sync.Mutex // guards the field below
	phases []*weighing
}

// weighing is the most that an appliance had in a phase, in bytes.
type weighing struct {
	phase   string
	samples int
	sum     int64
	parts   map[string]int64
}

func newScale(svc *service.Service) *scale {
	s := &scale{svc: svc}
	ended, done := make(chan struct{}), sync.WaitGroup{}
	done.Go(func() {
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-ended:
				return
			case <-tick.C:
				s.take()
			}
		}
	})
	s.stop = sync.OnceFunc(func() {
		close(ended)
		done.Wait()
	})
	return s
}

func (s *scale) close() { s.stop() }

// begin ends a phase and begins the next one; each has two samples at the least.
func (s *scale) begin(phase string) {
	s.take()
	s.mu.Lock()
	s.phases = append(s.phases, &weighing{phase: phase})
	s.mu.Unlock()
	s.take()
}

func (s *scale) take() {
	parts := s.svc.Memory()
	var sum int64
	for _, n := range parts {
		sum += n
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.phases) == 0 {
		return
	}
	w := s.phases[len(s.phases)-1]
	w.samples++
	if sum > w.sum {
		w.sum, w.parts = sum, parts
	}
}

func (s *scale) String() string {
	var b strings.Builder
	for _, w := range s.phases {
		fmt.Fprintf(&b, "%-36s %5.1f MB, %5d samples:", w.phase, float64(w.sum)/1e6, w.samples)
		for _, name := range slices.Sorted(maps.Keys(w.parts)) {
			fmt.Fprintf(&b, " %s %.1f", name, float64(w.parts[name])/1e6)
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// household pushes the repository "crowd": very many files of a hundred contents,
// so that a disk takes them in seconds and not in hours, and some long ones.
type household struct {
	t      *testing.T
	client *sshverb.Client
	list   string // a file
	files  int    // small ones, in folders of 1000
	long   int
	sums   []manifest.Sum // of the long ones
	night  int            // changes one file
	sent   atomic.Int64   // bytes of streams
	paused func()         // called beside an upload
}

// stopUntilFull has an upload meet the slowest disk there can be: the keeper stops
// after some of it, until every window between here and there is full.
func stopUntilFull(t *testing.T, keeper int, sent *atomic.Int64, full func() bool) {
	const some = 2 * longSize
	limit := time.Now().Add(2 * time.Minute)
	for sent.Load() < some {
		if time.Now().After(limit) {
			t.Error("the upload does not come far enough")
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	if err := unix.Kill(keeper, unix.SIGSTOP); err != nil {
		t.Error(err)
		return
	}
	defer unix.Kill(keeper, unix.SIGCONT)
	for last, still := sent.Load(), 0; still < 25 || !full(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(limit) {
			t.Error("the windows do not become full: fewer than an upload may have")
			return
		}
		now := sent.Load()
		if still++; now != last {
			last, still = now, 0
		}
	}
}

// counted counts what passes.
type counted struct {
	io.Writer
	n *atomic.Int64
}

func (c counted) Write(p []byte) (int, error) {
	n, err := c.Writer.Write(p)
	c.n.Add(int64(n))
	return n, err
}

const longSize = 64 << 20

func noise(i int) io.Reader {
	return io.LimitReader(rand.NewChaCha8([32]byte{byte(i)}), longSize)
}

func (h *household) content(i int) string {
	if i == 0 {
		return fmt.Sprint("night ", h.night)
	}
	return fmt.Sprint("content ", i%100)
}

// each calls f for each entry, in the order of a manifest, and with what makes its content.
func (h *household) each(f func(e *manifest.Entry, open func() io.Reader) error) error {
	sum := manifest.NewHash()
	known := map[string]manifest.Sum{}
	for i := range h.files {
		if i%1000 == 0 {
			if err := f(&manifest.Entry{Path: fmt.Sprintf("%05d", i/1000), Kind: manifest.Folder, Mode: 0o755}, nil); err != nil {
				return err
			}
		}
		text := h.content(i)
		if _, ok := known[text]; !ok {
			sum.Reset()
			io.WriteString(sum, text)
			known[text] = manifest.SumOf(sum)
		}
		e := manifest.Entry{Path: fmt.Sprintf("%05d/%08d", i/1000, i), Kind: manifest.File, Mode: 0o600, MTime: 1e18 + int64(i), Size: int64(len(text)), Sum: known[text]}
		if err := f(&e, func() io.Reader { return strings.NewReader(text) }); err != nil {
			return err
		}
	}
	for i, sum := range h.sums {
		e := manifest.Entry{Path: fmt.Sprintf("long%03d", i), Kind: manifest.File, Mode: 0o600, MTime: 1e18, Size: longSize, Sum: sum}
		if err := f(&e, func() io.Reader { return noise(i) }); err != nil {
			return err
		}
	}
	return nil
}

// write writes the list into its file, to be read from the beginning.
func (h *household) write() (*os.File, pushwire.Offer) {
	h.t.Helper()
	file, err := os.Create(h.list)
	must(h.t, err)
	m := manifest.NewWriter(file)
	must(h.t, h.each(func(e *manifest.Entry, _ func() io.Reader) error { return m.Add(*e) }))
	s, err := m.Close()
	must(h.t, err)
	_, err = file.Seek(0, io.SeekStart)
	must(h.t, err)
	return file, pushwire.Offer{Digest: s.Digest.String(), Entries: s.Entries, Bytes: s.Bytes, Kind: pushwire.KindFiles}
}

func (h *household) offer() (answer pushwire.OfferAnswer, needed *manifest.Set) {
	h.t.Helper()
	list, offer := h.write()
	defer list.Close()
	d, err := h.client.Start(h.t.Context(), "offer crowd")
	must(h.t, err)
	defer d.Close()
	r := pushwire.NewReader(d.Stdout)
	must(h.t, pushwire.WriteLine(d.Stdin, offer))
	h.line(d, pushwire.ReadLine(r, &answer))
	if answer.Answer == pushwire.AnswerSendManifest {
		_, err := io.Copy(d.Stdin, list)
		h.line(d, err)
		d.Stdin.Close()
		answer = pushwire.OfferAnswer{}
		h.line(d, pushwire.ReadLine(r, &answer))
	}
	if answer.Answer == pushwire.AnswerSend {
		needed, err = manifest.ReadSet(r, offer.Entries)
		h.line(d, err)
	}
	d.Stdin.Close()
	must(h.t, d.Wait())
	return answer, needed
}

// line fails the test with the appliance's words if the line to it broke.
func (h *household) line(d *sshverb.Dialogue, err error) {
	h.t.Helper()
	if err != nil {
		d.Stdin.Close()
		h.t.Fatal(err, d.Wait())
	}
}

// upload sends each content once: the next offer finds all files that have it. It goes
// over as many channels as the appliance grants.
func (h *household) upload(push string, needed *manifest.Set) {
	h.t.Helper()
	d, err := h.client.StartWide(h.t.Context(), "upload "+push, 8)
	must(h.t, err)
	defer d.Close()
	if h.paused != nil {
		var beside sync.WaitGroup
		beside.Go(h.paused)
		defer beside.Wait()
	}
	e := recipe.NewEncoder(counted{d.Stdin, &h.sent})
	sent := map[manifest.Sum]bool{}
	index := int64(-1)
	err = h.each(func(entry *manifest.Entry, open func() io.Reader) error {
		index++
		if !needed.Has(index) || sent[entry.Sum] {
			return nil
		}
		sent[entry.Sum] = true
		if err := e.File(index); err != nil {
			return err
		}
		if _, err := io.Copy(e, open()); err != nil {
			return err
		}
		return e.End(entry.Sum)
	})
	h.line(d, err)
	h.line(d, e.Close())
	d.Stdin.Close()
	var got pushwire.UploadAnswer
	h.line(d, pushwire.ReadLine(pushwire.NewReader(d.Stdout), &got))
	must(h.t, d.Wait())
}

func (h *household) verb(verb string) {
	h.t.Helper()
	_, err := h.client.Run(h.t.Context(), verb, nil, 1<<20)
	must(h.t, err)
}
