package suspect_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cenkalti/backoff/v5"

	"farkeep/appliance/suspect"
	"farkeep/pusher/borglock"
	"farkeep/pusher/borgtest"
	"farkeep/pusher/borgtest/household"
	"farkeep/pusher/directory"
	"farkeep/pusher/progress"
	"farkeep/pusher/push"
	"farkeep/pusher/repository"
	"farkeep/pusher/target"
	"farkeep/shared/generations"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"
	"farkeep/shared/recipe"
	"farkeep/shared/site"
)

// The simulation: a household is backed up day after day with the real borg, and
// pushed with the pusher's own code into a store that has the real judge. In good
// times nothing may be suspect. Then come the bad days.
//
// FARKEEP_SIMULATE sets the days of good times; "make simulate" runs a year.
const (
	simulateDays = "FARKEEP_SIMULATE"
	shortDays    = 20
	name         = "family"
)

// home is a Borg server with one repository, and the disk that it pushes to.
type home struct {
	t      testing.TB
	repo   *borgtest.Repository
	files  *household.Household
	random *rand.Rand
	clock  time.Time
	days   int // that were lived
	thrift bool

	disk   string
	target *directory.Directory
	store  *generations.Store // a second view of the disk, for us and for the enemy
	state  string
	memory *repository.Memory
	log    *slog.Logger
	seen   *observer
}

func newHome(t testing.TB, seed uint64) *home {
	h := &home{t: t, disk: t.TempDir(), state: t.TempDir(), random: rand.New(rand.NewPCG(seed, 1)), seen: &observer{}}
	h.log = slog.New(h.seen)
	h.repo = borgtest.Init(t, t.TempDir(), name, "repokey")
	h.repo.Set(t, "max_segment_size", "2000000") // more of the segments that a large repository has
	var err error
	if h.files, err = household.New(h.repo.Source, seed); err != nil {
		t.Fatal(err)
	}
	h.clock = h.files.Date().Add(3 * time.Hour)
	h.memory = repository.NewMemory(filepath.Join(h.state, "repositories"))
	state, err := push.Open(h.state, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { state.Close() })
	now := func() time.Time { return h.clock }
	judge := suspect.New(suspect.Config{Now: now}, h.log)
	h.target = directory.New(directory.Config{Name: "attic", Path: h.disk, Pusher: "home", Judge: judge, Now: now, Log: h.log})
	if h.store, err = generations.Open(h.disk, generations.Options{Judge: judge, Now: now, Log: h.log, Reserve: 1}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		h.target.Close()
		h.store.Close()
	})
	return h
}

// push pushes what is there and returns the newest generation.
func (h *home) push() generations.Generation {
	h.t.Helper()
	found := repository.Find(&site.Site{Folders: []site.Folder{{Path: filepath.Dir(h.repo.Path)}}})
	id, err := borglock.HostID(h.t.Context(), os.Getenv)
	if err != nil {
		h.t.Fatal(err)
	}
	now := func() time.Time { return h.clock }
	p := &push.Push{
		Host: "home", Repositories: found.Repositories, Problems: found.Problems, Whole: true, Targets: []target.Target{h.target},
		State: h.state, Memory: h.memory, Lock: borglock.Options{HostID: id, Wait: 10 * time.Second},
		Pause: func() backoff.BackOff { return backoff.NewConstantBackOff(time.Millisecond) },
		Now:   now, Log: h.log, Board: progress.New(nil, nil, h.log, now),
	}
	if err := p.Run(h.t.Context()).Err(); err != nil {
		h.t.Fatalf("day %d: %v\n%s", h.days, err, h.seen.tail())
	}
	return h.newest()
}

func (h *home) newest() generations.Generation {
	h.t.Helper()
	g, err := h.store.Newest(h.t.Context(), name)
	if err != nil {
		h.t.Fatal(err)
	}
	return g
}

// good pushes, and nothing may be suspect.
func (h *home) good(what string) generations.Generation {
	h.t.Helper()
	g := h.push()
	if g.Suspect {
		h.t.Fatalf("day %d, %s: a false suspicion: %q\n%s", h.days, what, g.Reasons, h.seen.tail())
	}
	return g
}

func (h *home) archive() string { return h.repo.Path + "::day-" + strconv.Itoa(h.days) }

// create makes the day's archive.
func (h *home) create() []string {
	return []string{"create", "--timestamp", h.clock.Format("2006-01-02T15:04:05"), h.archive(), h.repo.Source}
}

// tomorrow lets the household live for a day.
func (h *home) tomorrow() {
	h.t.Helper()
	h.days++
	h.clock = h.clock.Add(24 * time.Hour)
	if err := h.files.Next(); err != nil {
		h.t.Fatal(err)
	}
}

// day is one day of good times.
func (h *home) day() {
	h.tomorrow()
	prune := []string{"prune", "--keep-daily", "7", "--keep-weekly", "4", "--keep-monthly", "6", h.repo.Path}
	switch {
	case h.days%9 == 4:
		h.kill(h.create()...)
		if h.days%2 == 0 {
			h.good("after a borg create that was killed")
		}
		h.repo.Run(h.t, append([]string{"create", "--timestamp", h.clock.Format("2006-01-02T15:04:05")}, h.archive()+"-again", h.repo.Source)...)
	default:
		h.repo.Run(h.t, h.create()...)
	}
	if !h.thrift || h.days%4 == 0 {
		h.repo.Run(h.t, prune...)
	}
	switch {
	case h.days%11 == 7:
		h.kill("compact", h.repo.Path)
	case !h.thrift || h.days%4 == 0:
		h.repo.Run(h.t, "compact", h.repo.Path)
	}
	h.good("after create, prune, compact")
}

// kill starts borg and kills it when it has begun to write, at some instant after.
// A borg that was quicker was not killed; that is a day like any other.
func (h *home) kill(args ...string) {
	h.t.Helper()
	before := h.segments()
	c := h.repo.Command(args...)
	if err := c.Start(); err != nil {
		h.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		c.Wait()
		close(done)
	}()
	writing := time.NewTicker(5 * time.Millisecond)
	defer writing.Stop()
	var end <-chan time.Time
	for {
		select {
		case <-done:
			return
		case <-end:
			c.Process.Kill()
			<-done
			h.seen.count("killed " + args[0])
			return
		case <-writing.C:
			if end == nil && !slices.Equal(h.segments(), before) {
				end = time.After(time.Duration(h.random.IntN(60)) * time.Millisecond)
			}
		}
	}
}

func (h *home) segments() []string {
	names, err := filepath.Glob(filepath.Join(h.repo.Path, "data", "*", "*"))
	if err != nil {
		h.t.Fatal(err)
	}
	return names
}

func run(t testing.TB, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

// observer counts what the judge logs, and keeps the last lines.
type observer struct {
	mu     sync.Mutex
	lines  []string
	counts map[string]int64
	most   map[string]float64
}

func (o *observer) Enabled(context.Context, slog.Level) bool { return true }
func (o *observer) WithAttrs([]slog.Attr) slog.Handler       { return o }
func (o *observer) WithGroup(string) slog.Handler            { return o }

func (o *observer) count(what string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.counts == nil {
		o.counts, o.most = map[string]int64{}, map[string]float64{}
	}
	o.counts[what]++
}

func (o *observer) Handle(_ context.Context, r slog.Record) error {
	o.count(r.Message)
	o.mu.Lock()
	defer o.mu.Unlock()
	line := r.Message
	v := map[string]float64{}
	r.Attrs(func(a slog.Attr) bool {
		line += fmt.Sprintf(" %s=%v", a.Key, a.Value)
		switch a.Value.Kind() {
		case slog.KindInt64:
			v[a.Key] = float64(a.Value.Int64())
		case slog.KindDuration:
			v[a.Key] = a.Value.Duration().Seconds()
		}
		return true
	})
	o.lines = append(o.lines, line)
	if len(o.lines) > 12 {
		o.lines = o.lines[1:]
	}
	if r.Message == "compared names with contents" {
		o.top("packs gone, percent of the bytes", 100*v["gone_bytes"]/max(v["bytes"]+v["gone_bytes"], 1))
		o.top("packs gone", v["gone"])
		o.top("names compared", v["checked"])
		o.top("wrong names", v["wrong"])
	}
	if r.Message == "compared chunks" {
		old := v["alive"] + v["vanished"] - v["added"]
		o.top("vanished chunks, percent", 100*v["vanished"]/max(old, 1))
		o.top("vanished bytes, percent", 100*v["vanished_bytes"]/max(v["bytes"]+v["vanished_bytes"], 1))
		o.top("rewritten chunks", v["rewritten"])
		o.top("lost of the sample, percent", 100*v["lost_of_sample"]/max(v["sample"], 1))
		o.top("segments", v["segments"])
		o.top("segments read", v["read"])
		o.top("chunks alive", v["alive"])
	}
	return nil
}

func (o *observer) top(what string, v float64) { o.most[what] = max(o.most[what], v) }

func (o *observer) tail() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return strings.Join(o.lines, "\n")
}

func (o *observer) report(t testing.TB) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for what, v := range o.most {
		t.Logf("most in one day: %s: %.1f", what, v)
	}
	for _, what := range []string{"judged", "killed create", "killed compact", "killed prune"} {
		t.Logf("%s: %d", what, o.counts[what])
	}
	clear(o.most)
}

// enemy pushes a folder as it lies, with a client of his own: whatever the pusher
// would refuse. He has the pusher's key.
func (h *home) enemy(kind, id string) generations.Generation {
	h.t.Helper()
	enemy(h.t, h.store, h.repo.Path, kind, id)
	return h.newest()
}

func enemy(t testing.TB, store *generations.Store, root, kind, id string) {
	t.Helper()
	var list bytes.Buffer
	w := manifest.NewWriter(&list)
	var paths []string
	for _, e := range walk(t, root) {
		if err := w.Add(e); err != nil {
			t.Fatal(err)
		}
		paths = append(paths, e.Path)
	}
	sum, err := w.Close()
	if err != nil {
		t.Fatal(err)
	}
	offer := pushwire.Offer{Digest: sum.Digest.String(), Entries: sum.Entries, Bytes: sum.Bytes, Kind: kind, RepositoryID: id}
	answer, tx, err := store.Begin(t.Context(), generations.Request{Repository: name, Offer: offer, Pusher: "home"})
	if err != nil {
		t.Fatal(err)
	}
	if tx == nil {
		return
	}
	defer tx.Close()
	if answer.Answer == pushwire.AnswerSendManifest {
		if answer, err = tx.TakeManifest(t.Context(), &list); err != nil {
			t.Fatal(err)
		}
	}
	_, err = tx.Upload(t.Context(), func(w io.Writer) error {
		e := recipe.NewEncoder(w)
		for i := range answer.Needed.All() {
			b, err := os.ReadFile(filepath.Join(root, paths[i]))
			if err != nil {
				return err
			}
			if err := e.File(i); err != nil {
				return err
			}
			if _, err := e.Write(b); err != nil {
				return err
			}
			if err := e.End(sumOf(b)); err != nil {
				return err
			}
		}
		return e.Close()
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func sumOf(b []byte) manifest.Sum {
	s := manifest.NewHash()
	s.Write(b)
	return manifest.SumOf(s)
}

func walk(t testing.TB, root string) []manifest.Entry {
	t.Helper()
	var all []manifest.Entry
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == root {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil || strings.HasPrefix(rel, "lock.") {
			return err
		}
		e := manifest.Entry{Path: rel, Kind: manifest.Folder, Mode: 0o700}
		if !d.IsDir() {
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			e.Kind, e.Size, e.Sum, e.Mode = manifest.File, int64(len(b)), sumOf(b), 0o600
		}
		all = append(all, e)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(all, func(a, b manifest.Entry) int { return manifest.ComparePaths(a.Path, b.Path) })
	return all
}

// recover takes the last good generation, as somebody would who lost everything
// else, and compares its newest archive with the household.
func (h *home) recover(archive string) {
	h.t.Helper()
	g, err := h.store.Current(h.t.Context(), name)
	if err != nil {
		h.t.Fatal(err)
	}
	dir := h.t.TempDir()
	run(h.t, "cp", "-r", filepath.Join(h.disk, "generations", name, g.Name, "files"), dir+"/copy")
	run(h.t, "chmod", "-R", "u+rwX", dir+"/copy")
	c := exec.Command("borg", "extract", dir+"/copy::"+archive)
	c.Dir, c.Env = h.t.TempDir(), borgtest.Env(h.t.TempDir())
	if out, err := c.CombinedOutput(); err != nil {
		h.t.Fatalf("extract %s from %s: %v\n%s", archive, g.Name, err, out)
	}
	run(h.t, "diff", "-r", filepath.Join(c.Dir, h.repo.Source), h.repo.Source)
}

// junk is what a file becomes when it is encrypted: as long as before, and random.
func (h *home) junk(path string) { junk(h.t, h.random, path) }

func junk(t testing.TB, random *rand.Rand, path string) {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, info.Size())
	var seed [32]byte
	for i := range seed {
		seed[i] = byte(random.Uint32())
	}
	rand.NewChaCha8(seed).Read(b)
	overwrite(t, path, b)
}

// overwrite writes a file that nobody should write to, as root can.
func overwrite(t testing.TB, path string, content []byte) {
	t.Helper()
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

func daysToSimulate(t testing.TB) int {
	t.Helper()
	text := os.Getenv(simulateDays)
	if text == "" {
		return shortDays
	}
	days, err := strconv.Atoi(text)
	if err != nil || days < 1 {
		t.Fatalf("%s=%q is not a number of days", simulateDays, text)
	}
	return days
}

func TestSimulation(t *testing.T) {
	t.Parallel()
	days := daysToSimulate(t)
	const seed = 7
	t.Logf("seed %d, %d days", seed, days)
	h := newHome(t, seed)
	h.thrift = days == shortDays
	h.repo.Run(t, h.create()...)
	h.good("the first push")
	for range days {
		h.day()
	}
	h.seen.report(t)
	h.repair()

	last := "day-" + strconv.Itoa(h.days)
	kept := t.TempDir()
	run(t, "cp", "-a", h.repo.Path, kept+"/repo")
	id := h.newest().RepositoryID
	attacks := []struct {
		name string
		do   func() generations.Generation
		want string // in the reasons
	}{
		{"ransomware encrypts every segment in place", func() generations.Generation {
			for _, s := range h.segments() {
				h.junk(s)
			}
			return h.enemy(pushwire.KindBorg1, id)
		}, "that were final have other bytes now"},
		{"ransomware that spares what the pusher looks at", func() generations.Generation {
			all := h.segments()
			slices.SortFunc(all, func(a, b string) int { return len(a) - len(b) })
			for _, s := range all[:len(all)-2] {
				if info, err := os.Stat(s); err != nil || info.Size() < 1000 {
					continue
				}
				h.junk(s)
			}
			return h.enemy(pushwire.KindBorg1, id)
		}, "no segments of borg's"},
		{"borg delete", func() generations.Generation {
			h.stranger("delete", "-a", "*", h.repo.Path)
			return h.push()
		}, "that archives used are gone"},
		{"borg delete and compact", func() generations.Generation {
			h.stranger("delete", "-a", "*", h.repo.Path)
			h.stranger("compact", h.repo.Path)
			return h.push()
		}, "that archives used are gone"},
		{"rm -rf", func() generations.Generation {
			run(t, "rm", "-rf", h.repo.Path+"/data", h.repo.Path+"/config")
			return h.enemy(pushwire.KindBorg1, id)
		}, "data/ is gone"},
		{"rm -rf, pushed as files", func() generations.Generation {
			run(t, "rm", "-rf", h.repo.Path)
			run(t, "mkdir", h.repo.Path)
			return h.enemy(pushwire.KindFiles, "")
		}, "a plain folder of files"},
		{"another repository in its place", func() generations.Generation {
			run(t, "rm", "-rf", h.repo.Path)
			other := borgtest.Init(t, filepath.Dir(h.repo.Path), name, "repokey")
			other.Fill(t, 10, 100_000)
			other.Create(t, last)
			return h.enemy(pushwire.KindBorg1, id)
		}, "another repository"},
	}
	for i, attack := range attacks {
		h.clock = h.clock.Add(24 * time.Hour)
		before, err := h.store.Current(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		g := attack.do()
		if !g.Suspect || !strings.Contains(strings.Join(g.Reasons, "\n"), attack.want) {
			t.Errorf("%s: suspect %v, %q", attack.name, g.Suspect, g.Reasons)
		}
		for _, r := range g.Reasons {
			t.Logf("%s: %s", attack.name, r)
			if len(r) > 300 {
				t.Errorf("a reason of %d bytes is cut", len(r))
			}
		}
		// A second bad push does not become the norm.
		if now, err := h.store.Current(t.Context(), name); err != nil || now.Name != before.Name {
			t.Errorf("%s: %s counts now, %v", attack.name, now.Name, err)
		}
		if !h.thrift || i == len(attacks)-1 {
			h.recover(last)
		}
		run(t, "rm", "-rf", h.repo.Path)
		run(t, "cp", "-a", kept+"/repo", h.repo.Path)
	}
	// The household goes on as if nothing had been.
	h.tomorrow()
	h.stranger("create", h.archive(), h.repo.Source)
	h.good("after the attacks")
	h.recover("day-" + strconv.Itoa(h.days))
}

// stranger runs a borg that has never seen the repository: the one at home refuses
// what is older than it remembers, and here the repository was put back.
func (h *home) stranger(args ...string) {
	h.t.Helper()
	c := h.repo.Command(args...)
	c.Env = borgtest.Env(h.t.TempDir())
	if out, err := c.CombinedOutput(); err != nil {
		h.t.Fatalf("borg %v: %v\n%s", args, err, out)
	}
}

// repair lets a disk at home spoil a segment, and "borg check --repair" mend it.
// That may ask once, and is accepted.
func (h *home) repair() {
	h.t.Helper()
	h.tomorrow()
	all := h.segments()
	largest := slices.MaxFunc(all, func(a, b string) int {
		x, _ := os.Stat(a)
		y, _ := os.Stat(b)
		return int(x.Size() - y.Size())
	})
	b, err := os.ReadFile(largest)
	if err != nil {
		h.t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	if err := os.WriteFile(largest, b, 0o600); err != nil {
		h.t.Fatal(err)
	}
	c := h.repo.Command("check", "--repair", h.repo.Path)
	c.Env = append(c.Env, "BORG_CHECK_I_KNOW_WHAT_I_AM_DOING=YES")
	if out, err := c.CombinedOutput(); err != nil && c.ProcessState.ExitCode() > 1 {
		h.t.Fatalf("borg check --repair: %v\n%s", err, out)
	}
	g := h.push()
	h.t.Logf("check --repair: suspect %v %q", g.Suspect, g.Reasons)
	if g.Suspect {
		err := h.store.Decide(h.t.Context(), name, g.Name, generations.Decision{Standing: generations.Accepted, By: "admin", Why: "a disk was replaced"})
		if err != nil {
			h.t.Fatal(err)
		}
		h.target.Close() // the next push opens the disk anew, and sees the decision
	}
	h.tomorrow()
	h.repo.Run(h.t, h.create()...)
	h.good("after the repair")
}
