package push

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cenkalti/backoff/v5"

	"farkeep/pusher/borglock"
	"farkeep/pusher/borgtest"
	"farkeep/pusher/directory"
	"farkeep/pusher/progress"
	"farkeep/pusher/repository"
	"farkeep/pusher/target"
	"farkeep/shared/hint"
	"farkeep/shared/pushwire"
	"farkeep/shared/site"
)

// small are the files of a Borg repository that are copied, not linked.
var small = []string{"README", "config", "nonce"}

// bench is a home with a folder of Borg repositories, and targets.
type bench struct {
	t       *testing.T
	repos   string // the folder of repositories
	site    *site.Site
	state   string
	memory  *repository.Memory
	targets []target.Target
	log     *slog.Logger
	said    *strings.Builder // what was logged
}

func newBench(t *testing.T) *bench {
	b := &bench{t: t, repos: t.TempDir(), state: t.TempDir(), said: &strings.Builder{}}
	b.log = slog.New(slog.NewTextHandler(io.MultiWriter(testWriter{t}, b.said), nil))
	b.site = &site.Site{Folders: []site.Folder{{Path: b.repos}}}
	state, err := Open(b.state, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { state.Close() })
	b.memory = repository.NewMemory(filepath.Join(b.state, "repositories"))
	return b
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Logf("%s", strings.TrimSpace(string(p)))
	return len(p), nil
}

func (b *bench) directory(name, path string) *directory.Directory {
	d := directory.New(directory.Config{Name: name, Path: path, Pusher: "home", Log: b.log})
	b.t.Cleanup(func() { d.Close() })
	b.targets = append(b.targets, d)
	return d
}

func (b *bench) push(change ...func(*Push)) *Report {
	b.t.Helper()
	found := repository.Find(b.site)
	id, err := borglock.HostID(b.t.Context(), os.Getenv)
	if err != nil {
		b.t.Fatal(err)
	}
	p := &Push{
		Host: "home", Repositories: found.Repositories, Problems: found.Problems, Whole: true, Targets: b.targets,
		State: b.state, Memory: b.memory, Lock: borglock.Options{HostID: id, Wait: 10 * time.Second},
		Pause: func() backoff.BackOff { return backoff.NewConstantBackOff(time.Millisecond) },
		Now:   time.Now, Log: b.log, Board: progress.New(nil, nil, b.log, time.Now),
	}
	for _, f := range change {
		f(p)
	}
	return p.Run(b.t.Context())
}

func (b *bench) mustPush(change ...func(*Push)) *Report {
	b.t.Helper()
	r := b.push(change...)
	if err := r.Err(); err != nil {
		b.t.Fatal(err)
	}
	return r
}

// files is where a generation's files lie in a directory target.
func files(root, repo, generation string) string {
	return filepath.Join(root, "generations", repo, generation, "files")
}

// verify takes a writable copy of a generation, as README.txt says, and lets a
// borg that has never seen it check and extract it.
func verify(t *testing.T, r *borgtest.Repository, generation string, want map[string]string) {
	t.Helper()
	to := filepath.Join(t.TempDir(), "copy")
	if out, err := exec.Command("cp", "-r", generation, to).CombinedOutput(); err != nil {
		t.Fatalf("%s", out)
	}
	if out, err := exec.Command("chmod", "-R", "u+rwX", to).CombinedOutput(); err != nil {
		t.Fatalf("%s", out)
	}
	r.Verify(t, to, want)
	sums := exec.Command("b2sum", "-l", "256", "-c", "--quiet", "SUMS.b2")
	sums.Dir = filepath.Dir(generation)
	if out, err := sums.CombinedOutput(); err != nil {
		t.Errorf("b2sum: %v\n%s", err, out)
	}
}

func snapshot(t *testing.T, dir string) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), "source")
	if out, err := exec.Command("cp", "-a", dir, to).CombinedOutput(); err != nil {
		t.Fatalf("%s", out)
	}
	return to
}

func TestBorgToDirectory(t *testing.T) {
	for _, encryption := range []string{"none", "repokey"} {
		t.Run(encryption, func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			disk, nas := t.TempDir(), t.TempDir()
			b.directory("disk", disk)
			b.directory("nas", nas)
			r := borgtest.Init(t, b.repos, "photos", encryption)
			r.Set(t, "max_segment_size", "300000")
			r.Fill(t, 8, 150_000)
			r.Create(t, "one")
			sourceOne := snapshot(t, r.Source)

			first := b.mustPush()
			if len(first.Outcomes) != 2 || !first.Outcomes[0].New || !first.Beats[0].Sent || !first.Beats[1].Sent {
				t.Fatalf("%+v", first)
			}
			one := files(disk, "photos", first.Outcomes[0].Generation)
			verify(t, r, one, map[string]string{"one": sourceOne})

			// Nothing changed: nothing is sent, the generation is confirmed, and, because
			// the cache follows the change times that freezing moves, nothing is read.
			b.said.Reset()
			same := b.mustPush()
			read := -1
			if i := strings.Index(b.said.String(), "files_read="); i >= 0 {
				fmt.Sscanf(b.said.String()[i:], "files_read=%d", &read)
			}
			if read < 0 || read > len(small) {
				t.Errorf("%d files were read again; only the %d that are copied need be", read, len(small))
			}
			for _, o := range same.Outcomes {
				if o.New || o.Files != 0 || o.Bytes != 0 || o.Generation == "" {
					t.Errorf("unchanged repository: %+v", o)
				}
			}

			r.Fill(t, 2, 150_000)
			r.Create(t, "two")
			r.Run(t, "delete", r.Path+"::one")
			r.Run(t, "compact", "--threshold=0", r.Path)
			second := b.mustPush()
			if o := second.Outcomes[0]; !o.New || o.Generation == first.Outcomes[0].Generation {
				t.Fatalf("%+v", o)
			}
			two := files(disk, "photos", second.Outcomes[0].Generation)
			verify(t, r, two, map[string]string{"two": r.Source})
			if out, err := exec.Command("diff", "-r", two, files(nas, "photos", second.Outcomes[1].Generation)).CombinedOutput(); err != nil {
				t.Errorf("the targets differ:\n%s", out)
			}
			verify(t, r, one, map[string]string{"one": sourceOne}) // history is as it was
			r.Run(t, "check", r.Path)
			if left, _ := os.ReadDir(filepath.Join(b.state, "work")); len(left) > 0 {
				t.Errorf("left behind in work: %v", left)
			}
		})
	}
}

// wrapped is a target that a test interferes with.
type wrapped struct {
	target.Target
	name     string
	wake     func() error
	list     func(target.List) target.List
	onUpload func(w io.Writer) io.Writer
	uploaded func(error) error
	commit   func() error
	beats    []pushwire.Heartbeat
}

func (w *wrapped) Name() string {
	if w.name != "" {
		return w.name
	}
	return w.Target.Name()
}

func (w *wrapped) Wake(ctx context.Context) error {
	if w.wake != nil {
		if err := w.wake(); err != nil {
			return err
		}
	}
	return w.Target.Wake(ctx)
}

func (w *wrapped) Offer(ctx context.Context, repository string, offer pushwire.Offer, list target.List) (target.Answer, error) {
	if w.list != nil {
		list = w.list(list)
	}
	return w.Target.Offer(ctx, repository, offer, list)
}

func (w *wrapped) Upload(ctx context.Context, push string, write func(io.Writer) error) (pushwire.UploadAnswer, error) {
	answer, err := w.Target.Upload(ctx, push, func(out io.Writer) error {
		if w.onUpload != nil {
			out = w.onUpload(out)
		}
		return write(out)
	})
	if w.uploaded != nil {
		err = w.uploaded(err)
	}
	return answer, err
}

func (w *wrapped) Commit(ctx context.Context, push string) (pushwire.CommitAnswer, error) {
	if w.commit != nil {
		if err := w.commit(); err != nil {
			return pushwire.CommitAnswer{}, err
		}
	}
	return w.Target.Commit(ctx, push)
}

func (w *wrapped) Heartbeat(ctx context.Context, h pushwire.Heartbeat) error {
	w.beats = append(w.beats, h)
	return w.Target.Heartbeat(ctx, h)
}

func (b *bench) wrapped(path string) *wrapped {
	b.directory("disk", path)
	w := &wrapped{Target: b.targets[len(b.targets)-1]}
	b.targets[len(b.targets)-1] = w
	return w
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// Promise 8: borg works while a push uploads, without waiting for the push.
func TestBorgGoesOnDuringTheUpload(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	disk := t.TempDir()
	w := b.wrapped(disk)
	r := borgtest.Init(t, b.repos, "photos", "none")
	r.Set(t, "max_segment_size", "300000")
	r.Fill(t, 8, 150_000)
	r.Create(t, "one")
	kept := snapshot(t, r.Source)
	worked := false
	w.onUpload = func(out io.Writer) io.Writer {
		return writerFunc(func(p []byte) (int, error) {
			if !worked {
				worked = true
				// The upload stands still while borg does all it can do to a repository.
				r.Fill(t, 2, 150_000)
				r.Run(t, "create", "--lock-wait=0", r.Path+"::two", r.Source)
				r.Run(t, "prune", "--lock-wait=0", "--keep-last=1", r.Path)
				r.Run(t, "compact", "--lock-wait=0", "--threshold=0", r.Path)
			}
			return out.Write(p)
		})
	}
	first := b.mustPush()
	if !worked {
		t.Fatal("there was no upload")
	}
	verify(t, r, files(disk, "photos", first.Outcomes[0].Generation), map[string]string{"one": kept})
	w.onUpload = nil
	second := b.mustPush()
	verify(t, r, files(disk, "photos", second.Outcomes[0].Generation), map[string]string{"two": r.Source})
}

var errLine = hint.Exit(hint.ExitUnreachable, errors.New("the line was cut"))

func TestResumeAfterCuts(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	disk := t.TempDir()
	w := b.wrapped(disk)
	r := borgtest.Init(t, b.repos, "photos", "none")
	r.Set(t, "max_segment_size", "300000")
	r.Fill(t, 20, 150_000)
	r.Create(t, "one")
	cuts, total := 0, int64(0)
	w.onUpload = func(out io.Writer) io.Writer {
		left := 1_200_000
		return writerFunc(func(p []byte) (int, error) {
			total += int64(len(p))
			if left -= len(p); left < 0 && cuts < 2 {
				cuts++
				return 0, errLine
			}
			return out.Write(p)
		})
	}
	lost := 0
	w.commit = func() error {
		if lost++; lost == 1 {
			return errLine
		}
		return nil
	}
	report := b.mustPush()
	if cuts != 2 || lost < 2 {
		t.Errorf("%d cuts, %d commits", cuts, lost)
	}
	// Three million bytes, and what was under way at two cuts.
	if total > 4_500_000 {
		t.Errorf("%d bytes were sent: cuts made it begin anew", total)
	}
	verify(t, r, files(disk, "photos", report.Outcomes[0].Generation), map[string]string{"one": r.Source})
}

func TestOneTargetFails(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	good := t.TempDir()
	b.directory("good", good)
	b.directory("gone", filepath.Join(t.TempDir(), "not", "mounted"))
	far := &wrapped{Target: b.directory("far", t.TempDir()), wake: func() error { return errLine }}
	b.targets[2] = far
	r := borgtest.Init(t, b.repos, "photos", "none")
	r.Fill(t, 1, 1000)
	r.Create(t, "one")
	start := time.Now()
	ticks := 0
	report := b.push(func(p *Push) {
		p.GiveUp = time.Hour
		p.Now = func() time.Time { ticks++; return start.Add(time.Duration(ticks) * time.Minute) }
		p.Targets = b.targets[:1]
	})
	if report.Err() != nil {
		t.Fatal(report.Err())
	}
	var now atomic.Int64
	report = b.push(func(p *Push) {
		p.GiveUp = time.Hour
		p.Now = func() time.Time { return start.Add(time.Duration(now.Add(1)) * time.Minute) }
	})
	if code := hint.Code(report.Err()); code != hint.ExitPartial {
		t.Errorf("exit code %d: %v", code, report.Err())
	}
	for _, o := range report.Outcomes {
		if (o.Err == nil) != (o.Target == "good") {
			t.Errorf("%s: %v", o.Target, o.Err)
		}
	}
	for _, beat := range report.Beats {
		if beat.Sent != (beat.Target == "good") {
			t.Errorf("heartbeat: %+v", beat)
		}
	}
}

func TestHeartbeatOnlyForAll(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	w := b.wrapped(t.TempDir())
	for _, name := range []string{"a", "b"} {
		r := borgtest.Init(t, b.repos, name, "none")
		r.Fill(t, 1, 1000)
		r.Create(t, "one")
	}
	b.mustPush()
	if len(w.beats) != 1 || len(w.beats[0].Repositories) != 2 {
		t.Fatalf("heartbeats: %+v", w.beats)
	}
	b.push(func(p *Push) { p.Repositories, p.Whole = p.Repositories[:1], false })
	b.push(func(p *Push) { p.Problems = []repository.Problem{{Name: "c", Err: errors.New("gone")}} })
	// A damaged repository spoils the heartbeat and nothing else.
	if err := os.Truncate(filepath.Join(b.repos, "b", "data/0/1"), 3); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"index", "hints", "integrity"} {
		matches, _ := filepath.Glob(filepath.Join(b.repos, "b", name+".*"))
		for _, path := range matches {
			if err := os.Rename(path, filepath.Join(b.repos, "b", name+".9")); err != nil {
				t.Fatal(err)
			}
		}
	}
	report := b.push()
	if hint.Code(report.Err()) != hint.ExitPartial || len(w.beats) != 1 {
		t.Errorf("%v, heartbeats %+v", report.Err(), w.beats)
	}
}

func TestPlainFiles(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	disk, tree := t.TempDir(), t.TempDir()
	w := b.wrapped(disk)
	b.site = &site.Site{Repositories: []site.Repository{{Name: "documents", Path: tree}}}
	write := func(name, content string) {
		path := filepath.Join(tree, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 100 {
		write(fmt.Sprintf("d%d/f%d", i%7, i), strings.Repeat("x", i))
	}
	for i := range 50 { // a farm of links
		if err := os.Symlink("/etc/passwd", filepath.Join(tree, fmt.Sprintf("link%d", i))); err != nil {
			t.Fatal(err)
		}
	}
	changes := 0
	w.onUpload = func(out io.Writer) io.Writer {
		switch changes++; changes {
		case 1:
			write("d0/late", "came during the upload")
			write("d1/f1", "changed during the upload")
		case 2:
			write("d2/f2", "zz") // as long as before: only the target's hash tells
		}
		return out
	}
	report := b.mustPush()
	if changes != 4 {
		t.Errorf("%d uploads, want 4: changed twice, of these once read again to name the file", changes)
	}
	got := files(disk, "documents", report.Outcomes[0].Generation)
	for name, want := range map[string]string{"d0/late": "came during the upload", "d1/f1": "changed during the upload", "d2/f2": "zz"} {
		if b, err := os.ReadFile(filepath.Join(got, name)); err != nil || string(b) != want {
			t.Errorf("%s: %q %v", name, b, err)
		}
	}
	if _, err := os.Lstat(filepath.Join(got, "link0")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a link was mirrored: %v", err)
	}

	// What never stays still is not committed.
	changes = 0
	w.onUpload = func(out io.Writer) io.Writer {
		changes++
		write("d0/late", strings.Repeat("y", changes))
		return out
	}
	write("d0/other", "new")
	report = b.push()
	var changed *ChangedError
	if err := report.Err(); !errors.As(err, &changed) {
		t.Errorf("got %v", err)
	}
	all, err := os.ReadDir(filepath.Join(disk, "generations", "documents"))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range all {
		if !strings.HasPrefix(e.Name(), ".") {
			names = append(names, e.Name())
		}
	}
	if len(names) != 1 {
		t.Errorf("generations: %v", names)
	}
}

func TestDiskFull(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	disk := t.TempDir()
	if err := syscall.Mount("none", disk, "tmpfs", 0, "size=2m"); err != nil {
		t.Fatal("mount a tmpfs (needs root, which CI has): ", err)
	}
	t.Cleanup(func() { syscall.Unmount(disk, syscall.MNT_DETACH) })
	b.directory("disk", disk)
	r := borgtest.Init(t, b.repos, "photos", "none")
	r.Fill(t, 1, 100_000)
	r.Create(t, "one")
	first := b.mustPush()
	r.Fill(t, 10, 400_000)
	r.Create(t, "two")
	report := b.push()
	if err := report.Err(); err == nil || !strings.Contains(err.Error(), "no room") {
		t.Errorf("got %v", err)
	}
	if report.Beats[0].Sent {
		t.Error("a heartbeat without the newest state")
	}
	if _, err := os.Stat(files(disk, "photos", first.Outcomes[0].Generation)); err != nil {
		t.Error(err)
	}
}

// A borg that empties segments through hard links (before 1.1.18, 1.2.1) cannot
// harm the mirror: the push fails, says why, and commits nothing.
func TestFrozenSegmentIsEmptied(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	disk := t.TempDir()
	w := b.wrapped(disk)
	r := borgtest.Init(t, b.repos, "photos", "none")
	r.Set(t, "max_segment_size", "300000")
	r.Fill(t, 8, 150_000)
	r.Create(t, "one")
	w.onUpload = func(out io.Writer) io.Writer {
		segments, err := filepath.Glob(filepath.Join(r.Path, "data/0/*"))
		if err != nil || len(segments) == 0 {
			t.Fatal(segments, err)
		}
		// The largest: the smallest hold a COMMIT alone, of which the target has others.
		size := func(path string) int64 {
			info, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			return info.Size()
		}
		slices.SortFunc(segments, func(a, b string) int { return int(size(a) - size(b)) })
		if err := os.Truncate(segments[len(segments)-1], 0); err != nil {
			t.Fatal(err)
		}
		w.onUpload = nil
		return out
	}
	report := b.push()
	err := report.Err()
	var changed *ChangedError
	if !errors.As(err, &changed) || !strings.Contains(hint.Of(err), "smartctl") {
		t.Errorf("got %v, hint %q", err, hint.Of(err))
	}
	if all, _ := os.ReadDir(filepath.Join(disk, "generations", "photos")); len(all) > 0 {
		t.Errorf("something was committed: %v", all)
	}
}

func TestRate(t *testing.T) {
	var now time.Time
	now = time.Unix(1e9, 0)
	start := now
	rate := int64(1_000_000)
	l := &limit{rate: func(time.Time) int64 { return rate }, now: func() time.Time { return now }, wait: func(_ context.Context, d time.Duration) error { now = now.Add(d); return nil }, due: now}
	w := &limited{t.Context(), io.Discard, l}
	n, err := w.Write(make([]byte, 10_000_000))
	if n != 10_000_000 || err != nil {
		t.Fatal(n, err)
	}
	if took := now.Sub(start); took < 9900*time.Millisecond || took > 10*time.Second {
		t.Errorf("10 MB at 1 MB/s took %v", took)
	}
	// A pause is not made up for beyond the burst.
	now = now.Add(time.Hour)
	start = now
	if _, err := w.Write(make([]byte, 1_000_000)); err != nil {
		t.Fatal(err)
	}
	if took := now.Sub(start); took < 850*time.Millisecond || took > time.Second {
		t.Errorf("1 MB after a pause took %v", took)
	}
	// The hour strikes in the middle: 4 MB at 1 MB/s, then 8 at 4, then no limit.
	start = now
	l.rate = func(at time.Time) int64 {
		switch at = at.UTC(); {
		case at.Before(start.Add(4 * time.Second)):
			return 1_000_000
		case at.Before(start.Add(6 * time.Second)):
			return 4_000_000
		}
		return 0
	}
	if _, err := w.Write(make([]byte, 50_000_000)); err != nil {
		t.Fatal(err)
	}
	if took := now.Sub(start); took < 5700*time.Millisecond || took > 6300*time.Millisecond {
		t.Errorf("4 s at 1 MB/s, 2 s at 4 MB/s and the rest at once took %v", took)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	slow := &limited{ctx, io.Discard, &limit{rate: func(time.Time) int64 { return 1 }, now: time.Now, wait: sleep, due: time.Now().Add(time.Hour)}}
	if _, err := slow.Write([]byte("x")); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestTwoPushers(t *testing.T) {
	dir := t.TempDir()
	first, err := Open(dir, time.Unix(1e9, 0))
	if err != nil {
		t.Fatal(err)
	}
	_, err = Open(dir, time.Now())
	if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("process %d, since 2001-09-09", os.Getpid())) {
		t.Errorf("second pusher: %v", err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := Open(dir, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
}
