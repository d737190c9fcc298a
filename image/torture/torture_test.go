package torture_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"farkeep/image/torture"
)

// What a long run is told, by "make torture". Without them the tests are short.
const (
	seedVariable  = "FARKEEP_TORTURE_SEED"
	killsVariable = "FARKEEP_TORTURE_KILLS"
	cutsVariable  = "FARKEEP_TORTURE_CUTS"
	logVariable   = "FARKEEP_TORTURE_LOG" // a file that everything is appended to that the appliance says
)

// number reads a variable; 0 if it is not set.
func number(t *testing.T, name string) uint64 {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return 0
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		t.Fatalf("%s=%q is not a number", name, text)
	}
	return n
}

func seed(t *testing.T) uint64 {
	t.Helper()
	s := number(t, seedVariable)
	if s == 0 {
		s = rand.Uint64N(1_000_000)
	}
	t.Logf("seed %d: make torture SEED=%d draws the same misfortunes", s, s)
	return s
}

// open makes a folder that every user may enter.
func open(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for d := dir; d != "/" && d != os.TempDir(); d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// build builds programs as the Makefile does.
func build(t *testing.T, dir, tags string, names ...string) {
	t.Helper()
	for _, name := range names {
		cmd := exec.CommandContext(t.Context(), "go", "build", "-tags", tags, "-trimpath", "-o", filepath.Join(dir, "farkeep-"+name), "farkeep/"+name)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("build %s: %v\n%s", name, err, out)
		}
	}
}

// tail keeps the end of what the appliance says.
type tail struct {
	mu   sync.Mutex
	b    bytes.Buffer
	file *os.File // the rest as well; may be nil
}

func newTail(t *testing.T) *tail {
	t.Helper()
	name := os.Getenv(logVariable)
	if name == "" {
		return &tail{}
	}
	f, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return &tail{file: f}
}

func (w *tail) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	const most = 1 << 20
	if w.b.Len() > most {
		w.b.Next(w.b.Len() - most/2)
	}
	if w.file != nil {
		fmt.Fprintf(w.file, "%s ", time.Now().Format("15:04:05.000"))
		if _, err := w.file.Write(p); err != nil {
			return 0, err
		}
	}
	return w.b.Write(p)
}

func (w *tail) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	b := w.b.Bytes()
	return string(b[max(0, len(b)-20_000):])
}

// TestKills kills the appliance's processes at random instants while real
// repositories are pushed.
func TestKills(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("this test runs an appliance: run it as root")
	}
	dir := open(t)
	build(t, dir, "torture", "appliance", "pusher")
	plan := torture.KillPlan{For: 8 * time.Second, Least: 5, Faults: 1}
	if n := number(t, killsVariable); n > 0 {
		t.Parallel() // with TestPowerCuts: both mostly wait
		plan = torture.KillPlan{Kills: int(n), Faults: int(n) / 25}
	}
	log := newTail(t)
	figures, err := torture.Kill(t.Context(), torture.Options{Seed: seed(t), Dir: dir, Bin: dir, Out: t.Output(), Log: log}, plan)
	t.Logf("figures:\n%s", figures)
	if err != nil {
		t.Logf("the appliance said:\n%s", log)
		t.Fatal(err)
	}
	if figures.Count("kills") < 5 {
		t.Errorf("only %d kills: the test proves little", figures.Count("kills"))
	}
}
