package supervise_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"farkeep/appliance/part"
	"farkeep/appliance/supervise"

	"golang.org/x/sys/unix"
)

// reaper owns all waits of the test process, so there is one for all tests.
var reaper *supervise.Reaper

func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "part" {
		if err := child(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	var err error
	if reaper, err = supervise.NewReaper(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

type brief struct {
	Secret string
	Folder string
}

// child is one of the parts that the tests run: real processes.
func child(name string) error {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	e, err := part.Attach(name, os.Stderr)
	if err != nil {
		return err
	}
	b, err := part.Brief[brief](e)
	if err != nil {
		return err
	}
	e.Alive()
	e.Log.Info("here", "secret", b.Secret, "environment", len(os.Environ()), "arguments", strings.Join(os.Args, " "))
	beat := func() error {
		return e.Loop(ctx, 10*time.Millisecond, func(context.Context) error { return nil })
	}
	switch name {
	case "steady", "other":
		if err := beat(); err != nil {
			return err
		}
		f, err := os.OpenFile(filepath.Join(b.Folder, "order"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = fmt.Fprintln(f, name)
		return err
	case "panics":
		var nobody *part.Env
		return nobody.Result(nil)
	case "exits":
		return nil
	case "silent":
		for {
			time.Sleep(time.Hour)
		}
	case "deaf":
		signal.Ignore(unix.SIGTERM, unix.SIGQUIT)
		for {
			e.Alive()
			time.Sleep(10 * time.Millisecond)
		}
	case "orphans":
		cmd := exec.Command("/proc/self/exe", "part", "orphan")
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			return err
		}
		e.Log.Info("orphan", "pid", cmd.Process.Pid)
		return beat()
	}
	return fmt.Errorf("no part %q", name)
}

// logs collects what the parts and the supervisor log.
type logs struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

type rig struct {
	t   *testing.T
	sup *supervise.Supervisor
	log *logs
	dir string
	end func() // stops the supervisor and waits
}

// run supervises parts until the test ends.
func run(t *testing.T, timing supervise.Timing, names ...string) *rig {
	t.Helper()
	r := &rig{t: t, log: &logs{}, dir: t.TempDir()}
	var specs []supervise.Spec
	for _, name := range names {
		h := part.Header{Name: name, Host: "attic", Paths: part.FirmwarePaths()}
		specs = append(specs, supervise.Spec{Name: name, Required: true, Brief: func(w io.Writer) error {
			return part.Send(w, h, brief{Secret: "hush-" + name, Folder: r.dir})
		}})
	}
	r.sup = supervise.New(supervise.Config{
		Reaper: reaper, Timing: timing,
		Log:   slog.New(slog.NewTextHandler(r.log, nil)),
		Relay: func(_ string, in io.Reader) { io.Copy(r.log, in) },
	}, specs)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.sup.Run(ctx)
	}()
	r.end = func() {
		cancel()
		<-done
	}
	t.Cleanup(func() {
		r.end()
		if t.Failed() {
			t.Log(r.log.String())
		}
	})
	return r
}

// await waits until the state of a part satisfies ok.
func (r *rig) await(name string, ok func(supervise.State) bool) supervise.State {
	r.t.Helper()
	limit := time.After(2 * time.Minute)
	for {
		states, change := r.sup.States()
		for _, st := range states {
			if st.Name == name && ok(st) {
				return st
			}
		}
		select {
		case <-change:
		case <-limit:
			r.t.Fatalf("%s: %+v", name, states)
		}
	}
}

// awaitLog waits until the log holds all of want.
func (r *rig) awaitLog(want ...string) {
	r.t.Helper()
	limit := time.Now().Add(2 * time.Minute)
	for {
		missing := ""
		text := r.log.String()
		for _, w := range want {
			if !strings.Contains(text, w) {
				missing = w
			}
		}
		if missing == "" {
			return
		}
		if time.Now().After(limit) {
			r.t.Fatalf("the log lacks %q", missing)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

var fast = supervise.Timing{FirstDelay: time.Millisecond, MaxDelay: 20 * time.Millisecond, Silence: time.Minute, Stop: time.Minute}

func running(st supervise.State) bool { return st.Pid != 0 }

func TestBriefAndSurroundings(t *testing.T) {
	r := run(t, fast, "steady")
	r.awaitLog(`"secret":"hush-steady"`, `"environment":0`, `"arguments":"farkeep-appliance part steady"`)
	st := r.await("steady", running)
	// The secret is in the pipe alone.
	for _, file := range []string{"cmdline", "environ"} {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", st.Pid, file))
		if err != nil || bytes.Contains(text, []byte("hush")) {
			t.Errorf("%s: %q, %v", file, text, err)
		}
	}
	links, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", st.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, link := range links {
		if to, err := os.Readlink(link); err == nil && strings.HasPrefix(to, "/") && to != os.DevNull &&
			!strings.HasPrefix(to, "/sys/fs/cgroup/") { // Go's runtime asks there how many CPUs it may use
			t.Errorf("the part has %s open", to)
		}
	}
}

func TestPanicIsSurvivedAndLogged(t *testing.T) {
	r := run(t, fast, "steady", "panics")
	pid := r.await("steady", running).Pid
	r.await("panics", func(st supervise.State) bool { return st.Restarts >= 3 })
	r.awaitLog("panic: runtime error: invalid memory address", "goroutine 1 ", "supervise_test.child")
	if st := r.await("steady", running); st.Pid != pid || st.Restarts != 0 {
		t.Errorf("another part was touched: %+v", st)
	}
}

func TestKilledPartComesBack(t *testing.T) {
	r := run(t, fast, "steady")
	for n := 1; n <= 3; n++ {
		st := r.await("steady", running)
		if err := syscall.Kill(st.Pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		after := r.await("steady", func(s supervise.State) bool { return s.Restarts == n })
		if !strings.Contains(after.LastEnd, "killed") {
			t.Errorf("ended by %q", after.LastEnd)
		}
	}
}

func TestSilentPartIsEnded(t *testing.T) {
	timing := fast
	timing.Dump = time.Minute
	// Alive writes once a second at the most. A part that the host gives no time for so
	// long is ended as well, and rightly: then there is more patience.
	for _, timing.Silence = range []time.Duration{2500 * time.Millisecond, 10 * time.Second, 25 * time.Second} {
		r := run(t, timing, "steady", "silent")
		st := r.await("silent", func(s supervise.State) bool { return s.Restarts > 0 })
		if !strings.Contains(st.LastEnd, "without a sign of life") {
			t.Errorf("ended by %q", st.LastEnd)
		}
		r.awaitLog("SIGQUIT: quit", "supervise_test.child")
		steady, _ := r.sup.States()
		if steady[0].Restarts == 0 {
			return
		}
		t.Logf("the part that beats was ended: %+v", steady[0])
		r.end()
	}
	t.Error("the part that beats was ended every time")
}

func TestDeafPartIsKilled(t *testing.T) {
	timing := fast
	timing.Stop = 200 * time.Millisecond
	r := run(t, timing, "deaf")
	r.awaitLog(`"secret":"hush-deaf"`)
	start := time.Now()
	r.end()
	if took := time.Since(start); took > time.Minute {
		t.Errorf("stopping took %v", took)
	}
	if states, _ := r.sup.States(); !strings.Contains(states[0].LastEnd, "killed") {
		t.Errorf("ended by %q", states[0].LastEnd)
	}
}

func TestStopsInReverseOrder(t *testing.T) {
	r := run(t, fast, "steady", "other")
	r.awaitLog("hush-steady", "hush-other")
	r.end()
	order, err := os.ReadFile(filepath.Join(r.dir, "order"))
	if err != nil || string(order) != "other\nsteady\n" {
		t.Errorf("stopped in the order %q, %v", order, err)
	}
}

func TestBackOffGrowsAndFailingIsSeen(t *testing.T) {
	timing := fast
	timing.FirstDelay, timing.MaxDelay = 20*time.Millisecond, 10*time.Second
	start := time.Now()
	r := run(t, timing, "exits")
	r.await("exits", func(s supervise.State) bool { return s.Restarts == 4 })
	// 20 + 40 + 80 ms, each up to 30 % shorter.
	if took := time.Since(start); took < 95*time.Millisecond {
		t.Errorf("four runs in %v: no back-off", took)
	}
	if name := r.sup.Failing(time.Millisecond); name != "exits" {
		t.Errorf("failing: %q", name)
	}
	if name := r.sup.Failing(time.Hour); name != "" {
		t.Errorf("failing for an hour already: %q", name)
	}
}

func TestStableRunEndsFailing(t *testing.T) {
	timing := fast
	timing.Stable = 100 * time.Millisecond
	r := run(t, timing, "steady")
	if err := syscall.Kill(r.await("steady", running).Pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	// DownSince is set with the restart: when it is zero then, the run was stable.
	r.await("steady", func(s supervise.State) bool { return s.Restarts == 1 && s.DownSince.IsZero() })
}

// A part that dies leaves its own children to the supervisor, which is PID 1
// in firmware: none may stay a zombie.
func TestOrphansAreReaped(t *testing.T) {
	r := run(t, fast, "orphans")
	r.awaitLog("no brief on descriptor 3", `"msg":"orphan"`) // the orphan has ended
	text := r.log.String()
	_, rest, _ := strings.Cut(text, `"msg":"orphan","part":"orphans","pid":`)
	orphan, err := strconv.Atoi(strings.TrimRight(strings.SplitN(rest, "}", 2)[0], "} \n"))
	if err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	if err := syscall.Kill(r.await("orphans", running).Pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	limit := time.Now().Add(time.Minute)
	for syscall.Kill(orphan, 0) == nil {
		if time.Now().After(limit) {
			t.Fatal("the orphan is still there")
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func TestRun(t *testing.T) {
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	if code, err := reaper.Run(t.Context(), null, "/bin/sh", "-c", "exit 3"); err != nil || code != 3 {
		t.Errorf("got %d, %v", code, err)
	}
	if _, err := reaper.Run(t.Context(), null, "/bin/sh", "-c", "kill -9 $$"); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("got %v", err)
	}
	if _, err := reaper.Run(t.Context(), null, "/no/such/program"); err == nil {
		t.Error("a program that does not exist ran")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := reaper.Run(ctx, null, "/bin/sleep", "60"); err == nil || !strings.Contains(err.Error(), "deadline") {
		t.Errorf("got %v", err)
	}
}

func TestPartThatCannotStart(t *testing.T) {
	log := &logs{}
	sup := supervise.New(supervise.Config{
		Reaper: reaper, Timing: fast, Exec: "/no/such/program",
		Log: slog.New(slog.NewTextHandler(log, nil)), Relay: func(string, io.Reader) {},
	}, []supervise.Spec{{Name: "steady", Brief: func(io.Writer) error { return nil }}})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); sup.Run(ctx) }()
	for {
		states, change := sup.States()
		if states[0].Restarts >= 2 {
			break
		}
		<-change
	}
	cancel()
	<-done
	if states, _ := sup.States(); !strings.Contains(states[0].LastEnd, "no such file") {
		t.Errorf("%+v", states[0])
	}
}

func TestOnlyPID1EndsEverybody(t *testing.T) {
	if err := supervise.KillOthers(0); err == nil {
		t.Error("it would have been done")
	}
}
