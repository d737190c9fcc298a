// Package redteam attacks an appliance with everything that lies at home. It has
// no code but its tests.
//
// One appliance runs for all attacks: the real supervisor and the real, confined
// parts, spoken to over real SSH. Its history is noted from outside before the
// first attack and compared after each, name by name and byte by byte
// (image/torture/witness, whose own test shows that every break is found), and no
// part may have ended. What each attack is expected to come to stands in its row,
// and the same rows stand in docs/threat-model.md.
package redteam

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"farkeep/image/torture/service"
	"farkeep/image/torture/witness"
	"farkeep/pusher/appliance"
	"farkeep/pusher/target"
	"farkeep/shared/hint"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"
	"farkeep/shared/recipe"
	"farkeep/shared/settings"

	"golang.org/x/crypto/ssh"
)

// An attack is one row. do tries it and returns nil if it came to what result
// says; otherwise it says what happened.
type attack struct {
	kind   string
	name   string
	result string
	do     func(w *world) error
}

// attacks are all of them, in the order in which they are made.
func attacks() []attack {
	return slices.Concat(sshAttacks(), verbAttacks(), manifestAttacks(), streamAttacks(), stripeAttacks(), raceAttacks(), sftpAttacks(), heartbeatAttacks(), restoreAttacks(), clockAttacks(), keyServerAttacks(), resourceAttacks())
}

// world is the appliance under attack.
type world struct {
	*testing.T
	ctx   context.Context // of one attack: bounded
	later *sync.WaitGroup // attacks that go on
	suite *testing.T
	undo  *[]func() // ends what an attack has opened
	svc   *service.Service
	// The history: of the attacker's own repositories, and of another key's.
	one, two tree
	names    []string // generations of photos, oldest first
	other    string   // a generation of other-music
}

// Later lets an attack go on while the next ones are made; its error is this
// attack's.
func (w *world) Later(do func() error) {
	w.later.Go(func() {
		if err := do(); err != nil {
			w.suite.Errorf("%s: it did not come to what it should: %v", w.Name(), err)
		}
	})
}

// Cleanup does f when the attack is over, before anything is looked at.
func (w *world) Cleanup(f func()) { *w.undo = append(*w.undo, f) }

func (w *world) cleanUp() {
	for _, f := range slices.Backward(*w.undo) {
		f()
	}
	*w.undo = nil
}

// Context is the attack's, not the test's.
func (w *world) Context() context.Context { return w.ctx }

const (
	own     = "photos"      // what home's key may push, with "docs" and "scratch-*"
	foreign = "other-music" // what it may not even know of
	quota   = 64 << 20      // of home's key, in bytes
)

// start runs an appliance with a history.
func start(t *testing.T) *world {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("this test runs an appliance: run it as root")
	}
	dir := t.TempDir()
	for d := dir; d != "/" && d != os.TempDir(); d = filepath.Dir(d) {
		must(t, os.Chmod(d, 0o755))
	}
	for _, name := range []string{"appliance"} {
		cmd := exec.CommandContext(t.Context(), "go", "build", "-tags", "torture", "-trimpath", "-o", filepath.Join(dir, "farkeep-"+name), "farkeep/"+name)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("build %s: %v\n%s", name, err, out)
		}
	}
	log := &tail{}
	svc, err := service.Start(t.Context(), service.Options{Dir: dir, Bin: dir, DiskSize: 192 << 20, Log: log, Settings: func(a *settings.Appliance) {
		a.History = settings.DefaultHistory()
		a.History.CommitInterval = 0
		for i := range a.Receiver.Keys {
			if k := &a.Receiver.Keys[i]; k.Name == string(service.Push) {
				k.Repositories, k.QuotaBytes = []string{own, "docs", "scratch-*"}, quota
			}
		}
	}})
	if err != nil {
		t.Fatalf("%v\n%s", err, log)
	}
	t.Cleanup(func() {
		if err := svc.Close(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("the appliance said:\n%s", log)
		}
	})
	w := &world{T: t, ctx: t.Context(), later: &sync.WaitGroup{}, suite: t, undo: &[]func(){}, svc: svc,
		one: tree{"a": "one", "b": noise(1, 100_000), "dir/c": noise(2, 30_000)},
		two: tree{"a": "one", "b": noise(3, 100_000), "dir/c": noise(2, 30_000), "dir/d": "new"},
	}
	for _, content := range []tree{{"a": "zero"}, w.one, w.two} {
		w.names = append(w.names, w.push(own, content))
	}
	w.push("docs", tree{"letter": "dear all"})
	other := w.client(service.Other)
	defer other.Close()
	w.other = pushTo(t.Context(), t, other, foreign, tree{"song": noise(4, 50_000)})
	return w
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// tail keeps the end of a log.
type tail struct {
	mu sync.Mutex
	b  []byte
}

func (l *tail) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.b = append(l.b, p...)
	l.b = l.b[max(0, len(l.b)-200_000):]
	return len(p), nil
}

func (l *tail) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.b[max(0, len(l.b)-15_000):])
}

// TestRedTeam makes all attacks.
func TestRedTeam(t *testing.T) {
	w := start(t)
	var seen witness.Witness
	must(t, seen.Look(t.Context(), w.svc.Generations()))
	if n := seen.Figures().Generations; n != 5 {
		t.Fatalf("the history has %d generations", n)
	}
	parts := w.svc.Parts()
	done := 0
	begin := time.Now()
	for _, a := range attacks() {
		ok := t.Run(a.kind+"/"+a.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
			defer cancel()
			inner := *w
			inner.T, inner.ctx = t, ctx
			started := time.Now()
			if err := a.do(&inner); err != nil {
				t.Errorf("it did not come to %q: %v", a.result, err)
			}
			inner.cleanUp()
			after, stop := context.WithTimeout(t.Context(), 2*time.Minute)
			defer stop()
			if err := w.svc.AwaitOpen(after); err != nil {
				t.Errorf("the appliance is gone: %v", err)
			}
			if err := seen.Look(after, w.svc.Generations()); err != nil {
				t.Errorf("HISTORY IS NOT WHAT IT WAS: %v", err)
			}
			if now := w.svc.Parts(); !maps.Equal(parts, now) {
				t.Errorf("a part ended: %v, were %v", now, parts)
				parts = now
			}
			if d := time.Since(started); d > 3*time.Second {
				t.Logf("took %v", d.Round(time.Millisecond))
			}
		})
		if ok {
			done++
		}
	}
	w.later.Wait()
	t.Logf("%d of %d attacks came to what they should, in %v; %d generations, each as it was", done, len(attacks()), time.Since(begin).Round(time.Second), seen.Figures().Generations)
}

// A suite whose check cannot fail proves nothing: a break of one committed byte,
// such as an attack would make, is found by the very check that the suite uses.
func TestABreakWouldBeFound(t *testing.T) {
	w := start(t)
	var seen witness.Witness
	root := w.svc.Generations()
	must(t, seen.Look(t.Context(), root))
	file := filepath.Join(root, own, w.names[1], "files", "b")
	for _, tt := range []struct {
		name, want string
		do         func() error
	}{
		{"one byte", "other bytes", func() error {
			f, err := os.OpenFile(file, os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = f.WriteAt([]byte{^w.one["b"][7]}, 7)
			return err
		}},
		{"a file", "is gone", func() error { return os.Remove(file) }},
		{"a generation", "nothing may go", func() error {
			return os.Rename(filepath.Join(root, own, w.names[0]), filepath.Join(root, own, ".gone"))
		}},
	} {
		must(t, tt.do())
		if err := seen.Look(t.Context(), root); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: found %v", tt.name, err)
		}
	}
}

const (
	document   = "../../docs/threat-model.md"
	tableHead  = "| kind | attack | what it comes to |\n|---|---|---|\n"
	leastCount = 60
)

// TestDocument: the document's table and the suite's are the same.
func TestDocument(t *testing.T) {
	all := attacks()
	var want strings.Builder
	want.WriteString(tableHead)
	names := map[string]bool{}
	for _, a := range all {
		if names[a.name] {
			t.Errorf("there are two attacks %q", a.name)
		}
		names[a.name] = true
		fmt.Fprintf(&want, "| %s | %s | %s |\n", a.kind, a.name, a.result)
	}
	if len(all) < leastCount {
		t.Errorf("there are %d attacks, promised are %d", len(all), leastCount)
	}
	text, err := os.ReadFile(document)
	must(t, err)
	_, rest, found := strings.Cut(string(text), tableHead)
	end := regexp.MustCompile(`(?m)^(?:[^|]|$)`).FindStringIndex(rest)
	if !found || end == nil {
		t.Fatalf("%s has no table that begins with\n%s", document, tableHead)
	}
	got := tableHead + rest[:end[0]]
	if got == want.String() {
		return
	}
	g, n := strings.Split(got, "\n"), strings.Split(want.String(), "\n")
	for i := range max(len(g), len(n)) {
		a, b := "", ""
		if i < len(g) {
			a = g[i]
		}
		if i < len(n) {
			b = n[i]
		}
		if a != b {
			t.Fatalf("%s, row %d:\n  it says       %s\n  the suite has %s\nthe whole table:\n%s", document, i, a, b, want.String())
		}
	}
}

// tree is a repository in memory: content by path. Folders follow from paths.
type tree map[string]string

func noise(seed byte, n int) string {
	b := make([]byte, n)
	x := uint32(seed) + 1
	for i := range b {
		x = x*1664525 + 1013904223
		b[i] = byte(x >> 24)
	}
	return string(b)
}

func sumOf(content string) manifest.Sum {
	h := manifest.NewHash()
	io.WriteString(h, content)
	return manifest.SumOf(h)
}

func (c tree) entries() (all []manifest.Entry) {
	folders := map[string]bool{}
	for path, content := range c {
		for d := filepath.Dir(path); d != "."; d = filepath.Dir(d) {
			folders[d] = true
		}
		all = append(all, manifest.Entry{Path: path, Kind: manifest.File, Mode: 0o644, Size: int64(len(content)), Sum: sumOf(content)})
	}
	for d := range folders {
		all = append(all, manifest.Entry{Path: d, Kind: manifest.Folder, Mode: 0o755})
	}
	slices.SortFunc(all, func(a, b manifest.Entry) int { return manifest.ComparePaths(a.Path, b.Path) })
	return all
}

// list is the manifest of a tree that is as it should be.
func (c tree) list() (pushwire.Offer, []byte) {
	var out bytes.Buffer
	m := manifest.NewWriter(&out)
	for _, e := range c.entries() {
		if err := m.Add(e); err != nil {
			panic(err) // a mistake of this test
		}
	}
	sum, err := m.Close()
	if err != nil {
		panic(err)
	}
	return pushwire.Offer{Digest: sum.Digest.String(), Entries: sum.Entries, Bytes: sum.Bytes, Kind: pushwire.KindFiles}, out.Bytes()
}

func opener(list []byte) target.List {
	return target.List{Open: func(string) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(list)), nil }}
}

// stream writes the recipe stream that an answer asks for.
func (c tree) stream(answer target.Answer) func(io.Writer) error {
	return func(out io.Writer) error {
		all := c.entries()
		e := recipe.NewEncoder(out)
		for i := range answer.Needed.All() {
			if err := e.File(i); err != nil {
				return err
			}
			if _, err := io.WriteString(e, c[all[i].Path]); err != nil {
				return err
			}
			if err := e.End(all[i].Sum); err != nil {
				return err
			}
		}
		return e.Close()
	}
}

// client is the real pusher's, with one of the keys.
func (w *world) client(k service.Key) *appliance.Appliance {
	return appliance.New(appliance.Config{
		Name: "attic", Address: w.svc.Address(), HostKey: w.svc.Host, Identity: w.svc.Signer(k), WakeWait: time.Minute, Log: slog.New(slog.DiscardHandler),
	})
}

// offer begins a push, with whatever list and offer say.
func (w *world) offer(k service.Key, repository string, o pushwire.Offer, list []byte) (target.Answer, *appliance.Appliance, error) {
	to := w.client(k)
	w.Cleanup(func() { to.Close() })
	for limit := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		answer, err := to.Offer(w.ctx, repository, o, opener(list))
		// A push of the attack before may not be over yet.
		if !target.Temporary(err) || !strings.Contains(err.Error(), "under way") || time.Now().After(limit) {
			return answer, to, err
		}
	}
}

// begin offers a tree of the attacker's own scratch repository.
func (w *world) begin(repository string, c tree) (target.Answer, *appliance.Appliance, error) {
	o, list := c.list()
	answer, to, err := w.offer(service.Push, repository, o, list)
	if err == nil && answer.Answer != pushwire.AnswerSend {
		err = fmt.Errorf("the offer was answered %q", answer.Answer)
	}
	return answer, to, err
}

func (w *world) push(repository string, c tree) string {
	w.Helper()
	to := w.client(service.Push)
	defer to.Close()
	return pushTo(w.ctx, w.T, to, repository, c)
}

func pushTo(ctx context.Context, t *testing.T, to *appliance.Appliance, repository string, c tree) string {
	t.Helper()
	o, list := c.list()
	answer, err := to.Offer(ctx, repository, o, opener(list))
	must(t, err)
	_, err = to.Upload(ctx, answer.Push, c.stream(answer))
	must(t, err)
	done, err := to.Commit(ctx, answer.Push)
	must(t, err)
	return done.Generation
}

// refused says whether err is a refusal in these words.
func refused(err error, words string) error {
	if err == nil {
		return errors.New("it was not refused")
	}
	if !regexp.MustCompile(words).MatchString(err.Error() + " " + hint.Of(err)) {
		return fmt.Errorf("refused in other words: %w (%s)", err, hint.Of(err))
	}
	return nil
}

// anyOf is nil when one of them is.
func anyOf(all ...error) error {
	for _, err := range all {
		if err == nil {
			return nil
		}
	}
	return errors.Join(all...)
}

// verb runs one verb.
func (w *world) verb(k service.Key, verb string, in string) (string, error) {
	out, err := w.svc.Verb(w.Context(), k, verb, strings.NewReader(in))
	return string(out), err
}

// dial is a raw SSH connection.
func (w *world) dial(change func(*ssh.ClientConfig)) (*ssh.Client, error) {
	config := &ssh.ClientConfig{User: "farkeep", Auth: []ssh.AuthMethod{ssh.PublicKeys(w.svc.Signer(service.Push))}, HostKeyCallback: ssh.FixedHostKey(w.svc.Host), Timeout: 10 * time.Second}
	if change != nil {
		change(config)
	}
	c, err := ssh.Dial("tcp", w.svc.Address(), config)
	if err == nil {
		w.Cleanup(func() { c.Close() })
	}
	return c, err
}
