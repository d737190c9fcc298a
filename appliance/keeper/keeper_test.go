package keeper_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"farkeep/appliance/keeper"
	"farkeep/appliance/keepercall"
	"farkeep/appliance/localcall"
	"farkeep/appliance/part"
	"farkeep/appliance/status"
	"farkeep/shared/hint"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"
	"farkeep/shared/recipe"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// bench is a keeper that runs, with a small file system as its disk.
type bench struct {
	*testing.T
	paths part.Paths
	args  keepercall.Args
	brief keeper.Brief
	stop  func() // ends the keeper and waits for it

	ahead   time.Duration // the appliance's clock before the machine's
	booted  time.Time
	curated time.Time // as the status said before the last start
	boots   int
}

func start(t *testing.T) *bench { return startWith(t, keeper.Brief{Reserve: 1}) }

func startWith(t *testing.T, brief keeper.Brief) *bench {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("this test mounts a tmpfs: run it as root")
	}
	root := t.TempDir()
	b := &bench{T: t, paths: part.Paths{Run: root + "/run", State: root + "/state", Media: root + "/media"},
		brief: brief, args: keepercall.Args{Key: "home", Role: "push", Repositories: []string{"photos", "docs*"}}}
	for _, dir := range []string{b.paths.RunDir("keeper"), b.paths.RunDir("disk"), b.paths.StateDir("keeper"), b.paths.Disk()} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	b.booted = time.Now()
	b.run()
	return b
}

// run starts the keeper.
func (b *bench) run() {
	b.Helper()
	env, err := part.New(part.Header{Name: part.Keeper, Host: "vault", Paths: b.paths}, b.brief, slog.New(slog.NewTextHandler(testWriter{b.T}, nil)), nil)
	if err != nil {
		b.Fatal(err)
	}
	ahead, booted := b.ahead, b.booted
	env.Now = func() time.Time { return time.Now().Add(ahead) }
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- keeper.RunWith(ctx, env, func() time.Duration { return time.Since(booted) }) }()
	stopped := false
	b.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			b.Error(err)
		}
	}
	b.Cleanup(b.stop)
	for {
		if c, err := net.Dial("unix", b.paths.Socket(part.Keeper)); err == nil {
			c.Close()
			return
		}
		select {
		case err := <-done:
			b.Fatal(err)
		case <-time.After(time.Millisecond):
		}
	}
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

// mount mounts the disk and tells the keeper.
func (b *bench) mount() {
	b.Helper()
	if err := unix.Mount("tmpfs", b.paths.Disk(), "tmpfs", 0, "size=32m"); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { unix.Unmount(b.paths.Disk(), unix.MNT_DETACH) })
	if err := b.ask(keepercall.Attach, nil, nil); err != nil {
		b.Fatal(err)
	}
}

func (b *bench) ask(verb string, args, reply any) error {
	return localcall.Call(b.Context(), b.paths.Socket(part.Keeper), verb, args, reply)
}

func (b *bench) open(verb string, args keepercall.Args) *localcall.Conn {
	b.Helper()
	c, err := localcall.Open(b.Context(), b.paths.Socket(part.Keeper), verb, args)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { c.Close() })
	return c
}

func (b *bench) with(change func(*keepercall.Args)) keepercall.Args {
	args := b.args
	change(&args)
	return args
}

// line reads an answer whose line is decoded into v.
func line(c *localcall.Conn, v any) (then string, err error) {
	var a keepercall.Answer
	if err := c.ReadReply(&a); err != nil {
		return "", err
	}
	if v != nil {
		err = json.Unmarshal(a.Out, v)
	}
	return a.Then, err
}

// repo is a repository of few files.
type repo map[string]string

func (r repo) manifest(t *testing.T) (list []byte, o pushwire.Offer, contents []string) {
	t.Helper()
	var names []string
	for name := range r {
		names = append(names, name)
	}
	slices.Sort(names)
	var b bytes.Buffer
	w := manifest.NewWriter(&b)
	for _, name := range names {
		h := manifest.NewHash()
		io.WriteString(h, r[name])
		if err := w.Add(manifest.Entry{Path: name, Kind: manifest.File, Mode: 0o600, Size: int64(len(r[name])), Sum: manifest.SumOf(h)}); err != nil {
			t.Fatal(err)
		}
		contents = append(contents, r[name])
	}
	s, err := w.Close()
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes(), pushwire.Offer{Digest: s.Digest.String(), Entries: s.Entries, Bytes: s.Bytes, Kind: pushwire.KindFiles}, contents
}

// offer makes an offer and returns the answer, and what is needed.
func (b *bench) offer(repository string, r repo) (pushwire.OfferAnswer, *manifest.Set, error) {
	b.Helper()
	list, o, _ := r.manifest(b.T)
	c := b.open(keepercall.Offer, b.with(func(a *keepercall.Args) { a.Repository = repository }))
	defer c.Close()
	if err := pushwire.WriteLine(c, o); err != nil {
		b.Fatal(err)
	}
	var answer pushwire.OfferAnswer
	then, err := line(c, &answer)
	if err != nil {
		return answer, nil, err
	}
	if answer.Answer == pushwire.AnswerSendManifest {
		if then != keepercall.ThenLine {
			b.Errorf("send-manifest is followed by %q", then)
		}
		if _, err := c.Write(list); err != nil {
			b.Fatal(err)
		}
		c.CloseWrite()
		answer = pushwire.OfferAnswer{}
		if then, err = line(c, &answer); err != nil {
			return answer, nil, err
		}
	}
	if answer.Answer == pushwire.AnswerSame {
		return answer, nil, nil
	}
	if then != keepercall.ThenRaw {
		b.Errorf("send is followed by %q", then)
	}
	set, err := manifest.ReadSet(pushwire.NewReader(c), o.Entries)
	return answer, set, err
}

func (b *bench) upload(push string, r repo, need *manifest.Set) error {
	b.Helper()
	c := b.uploading(push, r, need)
	defer c.Close()
	c.CloseWrite()
	then, err := line(c, nil)
	for err == nil && then == keepercall.ThenLine {
		then, err = line(c, nil)
	}
	return err
}

// uploading sends what is needed, and no end.
func (b *bench) uploading(push string, r repo, need *manifest.Set) *localcall.Conn {
	b.Helper()
	_, _, contents := r.manifest(b.T)
	c := b.open(keepercall.Upload, b.with(func(a *keepercall.Args) { a.Push = push }))
	e := recipe.NewEncoder(c)
	for i := range need.All() {
		h := manifest.NewHash()
		io.WriteString(h, contents[i])
		err := errors.Join(e.File(i), second(io.WriteString(e, contents[i])), e.End(manifest.SumOf(h)))
		if err != nil {
			b.Fatal(err)
		}
	}
	if err := e.Close(); err != nil {
		b.Fatal(err)
	}
	return c
}

func second(_ int, err error) error { return err }

func (b *bench) commit(push string) (pushwire.CommitAnswer, error) {
	b.Helper()
	c := b.open(keepercall.Commit, b.with(func(a *keepercall.Args) { a.Push = push }))
	defer c.Close()
	var answer pushwire.CommitAnswer
	_, err := line(c, &answer)
	return answer, err
}

func (b *bench) push(repository string, r repo) string {
	b.Helper()
	answer, need, err := b.offer(repository, r)
	if err != nil {
		b.Fatal(err)
	}
	if answer.Answer == pushwire.AnswerSame {
		return answer.Generation
	}
	if err := b.upload(answer.Push, r, need); err != nil {
		b.Fatal(err)
	}
	done, err := b.commit(answer.Push)
	if err != nil {
		b.Fatal(err)
	}
	return done.Generation
}

func (b *bench) heartbeat(beat pushwire.Heartbeat) error {
	b.Helper()
	c := b.open(keepercall.Heartbeat, b.with(func(a *keepercall.Args) { a.Host = beat.Host }))
	defer c.Close()
	if err := pushwire.WriteLine(c, beat); err != nil {
		b.Fatal(err)
	}
	_, err := line(c, nil)
	return err
}

func (b *bench) status() *status.Keeper {
	b.Helper()
	s, err := status.Read[status.Keeper](b.paths.Status(part.Keeper))
	if err != nil || s == nil {
		b.Fatalf("no status: %v", err)
	}
	return s
}

func TestPushThroughTheKeeper(t *testing.T) {
	b := start(t)
	if _, _, err := b.offer("photos", repo{"a": "1"}); hint.Code(err) != hint.ExitUnreachable || hint.Of(err) == "" {
		t.Errorf("an offer to a dark disk: %v, hint %q", err, hint.Of(err))
	}
	b.mount()
	content := repo{"config": "x", "data": strings.Repeat("y", 100_000)}
	name := b.push("photos", content)
	if again := b.push("photos", content); again != name {
		t.Errorf("the same again made %s", again)
	}
	got, err := os.ReadFile(filepath.Join(b.paths.Disk(), "generations/photos", name, "files/data"))
	if err != nil || string(got) != content["data"] {
		t.Errorf("the generation's file: %d bytes, %v", len(got), err)
	}
	s := b.status()
	if !s.DiskReady || len(s.Repositories) != 1 || s.Repositories[0].Newest != name || s.Repositories[0].ConfirmedAt.IsZero() {
		t.Errorf("status: %+v", s)
	}

	_, o, _ := content.manifest(t)
	beat := pushwire.Heartbeat{Host: "home", At: time.Unix(0, 0), Repositories: []pushwire.RepositoryDigest{{Name: "photos", Digest: o.Digest}}}
	if err := b.heartbeat(beat); err != nil {
		t.Fatal(err)
	}
	lie := beat
	lie.Repositories = []pushwire.RepositoryDigest{{Name: "photos", Digest: strings.Repeat("0", 64)}}
	if err := b.heartbeat(lie); hint.Code(err) != hint.ExitRefused || !strings.Contains(err.Error(), "photos") {
		t.Errorf("a heartbeat that is not true: %v", err)
	}
	if _, err := os.Stat(filepath.Join(b.paths.Disk(), ".heartbeat/home-last-success")); err != nil {
		t.Error(err)
	}

	if err := b.ask(keepercall.Release, nil, nil); err != nil {
		t.Fatal(err)
	}
	if err := unix.Unmount(b.paths.Disk(), 0); err != nil {
		t.Errorf("the disk cannot be unmounted after release: %v", err)
	}
	s = b.status()
	if s.DiskReady || len(s.Repositories) != 1 || len(s.Heartbeats) != 1 || time.Since(s.Heartbeats[0].ReceivedAt) > time.Hour {
		t.Errorf("status with the disk dark: %+v", s)
	}
	if err := b.ask(keepercall.Attach, nil, nil); err == nil {
		t.Error("an empty mount point was taken for the disk")
	}
}

// What follows an upload is carried out in order, each step only after the one before.
func TestEndingOfAnUpload(t *testing.T) {
	b := start(t)
	b.mount()
	night := 0
	// ended sends all that is needed, or the half of it, and then what end says.
	ended := func(end func(push string, beat pushwire.Heartbeat) string, half bool) (answers []pushwire.CommitAnswer, err error) {
		t.Helper()
		night++
		content := repo{"a": fmt.Sprint("one ", night), "b": fmt.Sprint("two ", night)}
		answer, need, err := b.offer("photos", content)
		if err != nil {
			t.Fatal(err)
		}
		if half {
			need.Remove(0)
		}
		_, o, _ := content.manifest(t)
		c := b.uploading(answer.Push, content, need)
		defer c.Close()
		beat := pushwire.Heartbeat{Host: "home", At: time.Unix(int64(night), 0).UTC(), Repositories: []pushwire.RepositoryDigest{{Name: "photos", Digest: o.Digest}}}
		if _, err := io.WriteString(c, end(answer.Push, beat)); err != nil {
			t.Fatal(err)
		}
		c.CloseWrite()
		var got pushwire.UploadAnswer
		then, err := line(c, &got)
		if err != nil || got.Files != int64(need.Len()) {
			t.Fatalf("the upload: %+v, %v", got, err)
		}
		for then == keepercall.ThenLine {
			var more pushwire.CommitAnswer
			if then, err = line(c, &more); err != nil {
				return answers, err
			}
			answers = append(answers, more)
		}
		return answers, nil
	}
	text := func(change func(e *pushwire.Ending)) func(string, pushwire.Heartbeat) string {
		return func(push string, beat pushwire.Heartbeat) string {
			e := pushwire.Ending{Commit: push, Heartbeat: &beat}
			change(&e)
			line, err := json.Marshal(e)
			if err != nil {
				t.Fatal(err)
			}
			return string(line) + "\n"
		}
	}
	whole := text(func(*pushwire.Ending) {})
	got, err := ended(whole, false)
	if err != nil || len(got) != 2 || got[0].Generation == "" {
		t.Fatalf("an upload, its commit, its heartbeat: %+v, %v", got, err)
	}
	first := got[0].Generation
	s := b.status()
	if len(s.Heartbeats) != 1 || !s.Heartbeats[0].At.Equal(time.Unix(1, 0)) || s.Repositories[0].Newest != first {
		t.Errorf("status: %+v", s)
	}
	if got, err := ended(text(func(e *pushwire.Ending) { e.Heartbeat = nil }), false); err != nil || len(got) != 1 || got[0].Generation == first {
		t.Errorf("without a heartbeat: %+v, %v", got, err)
	}
	second := b.status().Repositories[0].Newest

	// Nothing is committed, and no heartbeat believed, nor taken for a lie.
	for _, tt := range []struct {
		name string
		end  func(string, pushwire.Heartbeat) string
		half bool
		want string
	}{
		{"half of the files", whole, true, "1 files are missing"},
		{"another push", text(func(e *pushwire.Ending) { e.Commit = "photos/0123456789abcdef" }), false, "ends with the commit of"},
		{"no push", text(func(e *pushwire.Ending) { e.Commit = "" }), false, "ends with the commit of"},
		{"half a line", func(push string, beat pushwire.Heartbeat) string { return strings.TrimSuffix(whole(push, beat), "\n") }, false, "read the ending"},
		{"something else", func(string, pushwire.Heartbeat) string { return "commit\n" }, false, "read the ending"},
	} {
		got, err := ended(tt.end, tt.half)
		if err == nil || len(got) > 0 || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %+v, %v; want %q", tt.name, got, err, tt.want)
		}
	}
	if s := b.status(); s.Repositories[0].Newest != second || len(s.Heartbeats) != 1 || !s.Heartbeats[0].At.Equal(time.Unix(1, 0)) || len(s.Untrue) > 0 {
		t.Errorf("after refusals: %+v", s)
	}
	// One that claims what was not committed is found out behind a commit as anywhere.
	lie := text(func(e *pushwire.Ending) { e.Heartbeat.Repositories[0].Digest = strings.Repeat("0", 64) })
	if got, err := ended(lie, false); hint.Code(err) != hint.ExitRefused || len(got) != 1 || got[0].Generation == "" {
		t.Errorf("a heartbeat that is not true behind a commit: %+v, %v", got, err)
	}
	b.await("the lie is told", func(s *status.Keeper) bool { return len(s.Untrue) == 1 })
}

// A peer that sends its manifest with the offer gets the whole answer also when
// the keeper knows the manifest, and reads nothing of it.
func TestManifestThatNobodyNeeds(t *testing.T) {
	b := start(t)
	b.mount()
	content := repo{}
	for i := range 3000 {
		content[fmt.Sprint(i)] = fmt.Sprint("content ", i)
	}
	if _, _, err := b.offer("photos", content); err != nil { // and is cut before its upload
		t.Fatal(err)
	}
	list, o, _ := content.manifest(t)
	for range 20 {
		c := b.open(keepercall.Offer, b.with(func(a *keepercall.Args) { a.Repository = "photos" }))
		if err := pushwire.WriteLine(c, o); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write(list); err != nil {
			t.Fatal(err)
		}
		c.CloseWrite()
		var answer pushwire.OfferAnswer
		then, err := line(c, &answer)
		if err != nil || then != keepercall.ThenRaw || answer.Answer != pushwire.AnswerSend {
			t.Fatalf("%+v, then %q, %v", answer, then, err)
		}
		r := pushwire.NewReader(c)
		set, err := manifest.ReadSet(r, o.Entries)
		if err != nil || set.Len() != int64(len(content)) {
			t.Fatalf("%d files are needed, %v", set.Len(), err)
		}
		if rest, err := io.ReadAll(r); err != nil || len(rest) > 0 {
			t.Fatalf("after the answer: %d bytes, %v", len(rest), err)
		}
		c.Close()
	}
}

func TestWhoMayDoWhat(t *testing.T) {
	b := start(t)
	b.mount()
	name := b.push("photos", repo{"a": "1"})
	b.push("docs-2026", repo{"a": "1"})
	restore := func(a *keepercall.Args) { a.Role, a.Key, a.Repositories = "restore", "laptop", nil }
	tests := []struct {
		name string
		verb string
		args keepercall.Args
		want string // in the error; "" for none
		code int
	}{
		{"another repository", keepercall.Offer, b.with(func(a *keepercall.Args) { a.Repository = "mail" }), "may not use", hint.ExitRefused},
		{"../x", keepercall.Offer, b.with(func(a *keepercall.Args) { a.Repository = "../x" }), "repository name", hint.ExitUsage},
		{"restore key offers", keepercall.Offer, b.with(func(a *keepercall.Args) { restore(a); a.Repository = "photos" }), "only a push key", hint.ExitRefused},
		{"restore key commits", keepercall.Commit, b.with(func(a *keepercall.Args) { restore(a); a.Push = "photos/0123456789abcdef" }), "only a push key", hint.ExitRefused},
		{"push key without repositories", keepercall.Generations, b.with(func(a *keepercall.Args) { a.Repositories = nil; a.Repository = "photos" }), "may not use", hint.ExitRefused},
		{"commit of nothing", keepercall.Commit, b.with(func(a *keepercall.Args) { a.Push = "photos/0123456789abcdef" }), "not open", hint.ExitUnreachable},
		{"commit of a foreign repository", keepercall.Commit, b.with(func(a *keepercall.Args) { a.Push = "mail/0123456789abcdef" }), "may not use", hint.ExitRefused},
		{"commit of garbage", keepercall.Commit, b.with(func(a *keepercall.Args) { a.Push = "../../x" }), "not the id", hint.ExitUsage},
		{"upload to nothing", keepercall.Upload, b.with(func(a *keepercall.Args) { a.Push = "photos/0123456789abcdef" }), "not open", hint.ExitUnreachable},
		{"abort of nothing", keepercall.Abort, b.with(func(a *keepercall.Args) { a.Push = "photos/0123456789abcdef" }), "not open", hint.ExitUnreachable},
		{"verify", keepercall.Verify, b.with(func(a *keepercall.Args) { restore(a); a.Repository, a.Generation = "photos", name }), "", 0},
		{"verify of a foreign repository", keepercall.Verify, b.with(func(a *keepercall.Args) { a.Repository, a.Generation = "mail", name }), "may not use", hint.ExitRefused},
		{"verify of ..", keepercall.Verify, b.with(func(a *keepercall.Args) { a.Repository, a.Generation = "photos", ".." }), "not a generation", hint.ExitFailure},
		{"unknown verb", "delete", b.args, "no verb", hint.ExitUsage},
		{"unknown verb in words", "expire", b.args, "no verb", hint.ExitUsage},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := b.open(tt.verb, tt.args)
			c.CloseWrite()
			_, err := line(c, nil)
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want) || hint.Code(err) != tt.code) {
				t.Errorf("%v (code %d); want %q (code %d)", err, hint.Code(err), tt.want, tt.code)
			}
		})
	}
	listed := func(args keepercall.Args) (names []string) {
		c := b.open(keepercall.Generations, args)
		defer c.Close()
		for {
			var a keepercall.Answer
			if err := c.ReadReply(&a); err != nil {
				t.Fatal(err)
			}
			if a.Then == keepercall.ThenEnd {
				return names
			}
			var g pushwire.Generation
			if err := json.Unmarshal(a.Out, &g); err != nil {
				t.Fatal(err)
			}
			names = append(names, g.Repository)
		}
	}
	if got := listed(b.with(func(a *keepercall.Args) { a.Repositories = []string{"docs*"} })); !slices.Equal(got, []string{"docs-2026"}) {
		t.Errorf("a push key sees %v", got)
	}
	if got := listed(b.with(restore)); !slices.Equal(got, []string{"docs-2026", "photos"}) {
		t.Errorf("a restore key sees %v", got)
	}
}

func TestHeartbeatsAreRefused(t *testing.T) {
	b := start(t)
	b.mount()
	content := repo{"a": "1"}
	b.push("photos", content)
	_, o, _ := content.manifest(t)
	truth := []pushwire.RepositoryDigest{{Name: "photos", Digest: o.Digest}}
	tests := []struct {
		name string
		beat pushwire.Heartbeat
		want string
	}{
		{"no repositories", pushwire.Heartbeat{Host: "home"}, "names no repository"},
		{"unknown repository", pushwire.Heartbeat{Host: "home", Repositories: []pushwire.RepositoryDigest{{Name: "docs1", Digest: o.Digest}}}, "docs1 is not what"},
		{"foreign repository", pushwire.Heartbeat{Host: "home", Repositories: []pushwire.RepositoryDigest{{Name: "mail", Digest: o.Digest}}}, "may not use"},
		{"host ../x", pushwire.Heartbeat{Host: "../x", Repositories: truth}, "heartbeat of host"},
	}
	for _, tt := range tests {
		if err := b.heartbeat(tt.beat); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v; want %q", tt.name, err, tt.want)
		}
	}
	if err := b.heartbeat(pushwire.Heartbeat{Host: "home", Repositories: truth}); err != nil {
		t.Fatal(err)
	}
	b.args.Key = "barn"
	if err := b.heartbeat(pushwire.Heartbeat{Host: "home", Repositories: truth}); err == nil || !strings.Contains(err.Error(), "another key") {
		t.Errorf("another key's heartbeat for the same host: %v", err)
	}
	for i := range 70 {
		err := b.heartbeat(pushwire.Heartbeat{Host: fmt.Sprint("h", i), Repositories: truth})
		if (err != nil) != (i >= 63) {
			t.Fatalf("host %d: %v", i, err)
		}
	}
}

// What is known outlives the process, with the disk dark; a keeper that comes
// back while the disk is mounted uses it by itself.
func TestKeeperComesBack(t *testing.T) {
	b := start(t)
	b.mount()
	content := repo{"a": "1"}
	name := b.push("photos", content)
	_, o, _ := content.manifest(t)
	if err := b.heartbeat(pushwire.Heartbeat{Host: "home", Repositories: []pushwire.RepositoryDigest{{Name: "photos", Digest: o.Digest}}}); err != nil {
		t.Fatal(err)
	}
	before := b.status()
	b.stop()
	if err := os.Remove(b.paths.Socket(part.Keeper)); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	b.run()
	b.wait("a status", func() bool { return !b.status().DiskReady })
	after := b.status()
	before.DiskReady, before.Updated, after.Updated = false, time.Time{}, time.Time{}
	if diff := cmp.Diff(before, after); diff != "" {
		t.Errorf("status changed (-before +after):\n%s", diff)
	}
	if err := status.Write(b.paths.Status(part.Disk), status.Disk{State: status.DiskMounted, Mounted: true}); err != nil {
		t.Fatal(err)
	}
	b.wait("the disk", func() bool { return b.status().DiskReady })
	if again := b.push("photos", content); again != name {
		t.Errorf("after coming back the same push made %s", again)
	}
}

// Between the disk part's word that the disk is mounted and the keeper's having
// opened it lies a moment, longer on a slow machine: a verb that comes then waits.
// One that comes while the disk is dark is told so at once.
func TestVerbWaitsForTheDisk(t *testing.T) {
	b := start(t)
	generations := func() error {
		c := b.open(keepercall.Generations, b.args)
		_, err := line(c, nil)
		return err
	}
	if err := generations(); err == nil || !strings.Contains(err.Error(), "the disk is dark") {
		t.Fatalf("in the dark: %v", err)
	}
	if err := status.Write(b.paths.Status(part.Disk), status.Disk{State: status.DiskMounted, Mounted: true}); err != nil {
		t.Fatal(err)
	}
	asked := make(chan error, 1)
	go func() { asked <- generations() }()
	select {
	case err := <-asked:
		t.Fatalf("before the keeper has the disk: %v", err)
	case <-time.After(200 * time.Millisecond):
	}
	b.mount()
	if err := <-asked; err != nil {
		t.Fatal(err)
	}
}

// The disk is wanted back in the middle of an upload.
func TestReleaseEndsWhatIsAtWork(t *testing.T) {
	b := start(t)
	b.mount()
	old := repo{"a": "1"}
	name := b.push("photos", old)
	next := repo{"a": "1", "b": strings.Repeat("x", 1<<20), "c": "2"}
	answer, need, err := b.offer("photos", next)
	if err != nil {
		t.Fatal(err)
	}
	c := b.open(keepercall.Upload, b.with(func(a *keepercall.Args) { a.Push = answer.Push }))
	e := recipe.NewEncoder(c)
	_, _, contents := next.manifest(t)
	for i := range need.All() {
		h := manifest.NewHash()
		io.WriteString(h, contents[i])
		if err := errors.Join(e.File(i), second(io.WriteString(e, contents[i])), e.End(manifest.SumOf(h)), e.Flush()); err != nil {
			t.Fatal(err)
		}
		break
	}
	b.wait("the first file", func() bool {
		files, _ := os.ReadDir(filepath.Join(b.paths.Disk(), "incoming/photos/building"))
		return len(files) == 1
	})
	begun := time.Now()
	if err := b.ask(keepercall.Release, nil, nil); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begun); took > keeper.ReleaseTimeout {
		t.Errorf("release took %v", took)
	}
	if _, err := line(c, nil); err == nil {
		t.Error("the upload was said to be complete")
	}
	if err := unix.Mount("", b.paths.Disk(), "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Errorf("a file is still open for writing: %v", err)
	}
	if err := unix.Mount("", b.paths.Disk(), "", unix.MS_REMOUNT, "size=32m"); err != nil {
		t.Fatal(err)
	}
	if _, _, err := b.offer("photos", next); hint.Code(err) != hint.ExitUnreachable || !strings.Contains(hint.Of(err), "wake") {
		t.Errorf("an offer after release: %v, hint %q", err, hint.Of(err))
	}
	if err := b.ask(keepercall.Attach, nil, nil); err != nil {
		t.Fatal(err)
	}
	if again := b.push("photos", old); again != name {
		t.Errorf("the newest generation is %s", again)
	}
	b.push("photos", next)
}

func TestOnePushOfARepositoryAtATime(t *testing.T) {
	b := start(t)
	b.mount()
	first, next := repo{"a": "1"}, repo{"b": "2"}
	answer, need, err := b.offer("photos", first)
	if err != nil {
		t.Fatal(err)
	}
	// The same key may begin anew between verbs: its line was cut.
	again, _, err := b.offer("photos", first)
	if err != nil || again.Push != answer.Push {
		t.Errorf("the same offer again: %+v, %v", again, err)
	}
	// Another key may not.
	b.args.Key = "barn"
	if _, _, err := b.offer("photos", next); hint.Code(err) != hint.ExitUnreachable || !strings.Contains(err.Error(), "under way") {
		t.Errorf("another key's push: %v", err)
	}
	if _, err := b.commit(answer.Push); err == nil {
		t.Error("another key committed the push")
	}
	b.args.Key = "home"
	// While an upload runs nobody may begin.
	c := b.open(keepercall.Upload, b.with(func(a *keepercall.Args) { a.Push = answer.Push }))
	e := recipe.NewEncoder(c)
	if err := errors.Join(e.File(0), second(io.WriteString(e, "1")), e.Flush()); err != nil {
		t.Fatal(err)
	}
	b.wait("the upload to run", func() bool {
		files, _ := os.ReadDir(filepath.Join(b.paths.Disk(), "incoming/photos/building"))
		return len(files) == 1
	})
	if _, _, err := b.offer("photos", next); err == nil || !strings.Contains(err.Error(), "under way") {
		t.Errorf("an offer while an upload runs: %v", err)
	}
	c.Close()
	b.wait("the cut upload to end", func() bool {
		answer, need, err = b.offer("photos", first)
		return err == nil
	})
	if err := b.upload(answer.Push, first, need); err != nil {
		t.Fatal(err)
	}
	done, err := b.commit(answer.Push)
	if err != nil {
		t.Fatal(err)
	}
	// The answer was lost on the way; the pusher asks again.
	if twice, err := b.commit(answer.Push); err != nil || twice != done {
		t.Errorf("the commit repeated: %+v, %v; want %+v", twice, err, done)
	}
}

func TestFullDiskIsRefusedWithNumbers(t *testing.T) {
	b := start(t)
	b.mount()
	_, _, err := b.offer("photos", repo{"big": strings.Repeat("x", 40<<20)})
	if hint.Code(err) != hint.ExitRefused || !strings.Contains(err.Error(), "41") || !strings.Contains(err.Error(), "free") {
		t.Errorf("%v (code %d)", err, hint.Code(err))
	}
}

// A peer that stalls loses its verb, one that idles its push, and neither its upload.
func TestStalledPeersAreFreed(t *testing.T) {
	day := repo{"a": strings.Repeat("x", 100_000), "b": "2"}
	// begin starts an upload that sends one whole file and then nothing.
	begin := func(b *bench) *localcall.Conn {
		answer, _, err := b.offer("photos", day)
		if err != nil {
			b.Fatal(err)
		}
		c := b.open(keepercall.Upload, b.with(func(a *keepercall.Args) { a.Push = answer.Push }))
		e := recipe.NewEncoder(c)
		h := manifest.NewHash()
		io.WriteString(h, day["a"])
		if err := errors.Join(e.File(0), second(io.WriteString(e, day["a"])), e.End(manifest.SumOf(h)), e.Flush()); err != nil {
			b.Fatal(err)
		}
		b.wait("the file", func() bool {
			files, _ := os.ReadDir(filepath.Join(b.paths.Disk(), "incoming/photos/building"))
			return len(files) == 1
		})
		return c
	}
	resumes := func(b *bench) {
		b.wait("the push to be free", func() bool {
			answer, _, err := b.offer("photos", day)
			if err == nil && (answer.Need != 1 || answer.Kept != 1) {
				b.Errorf("the next attempt: %+v; want one file kept", answer)
			}
			return err == nil
		})
	}
	t.Run("stalled", func(t *testing.T) {
		b := startWith(t, keeper.Brief{Reserve: 1, Stall: 50 * time.Millisecond})
		b.mount()
		if _, err := line(begin(b), nil); err == nil {
			t.Error("a stalled upload was answered as complete")
		}
		resumes(b)
	})
	t.Run("taken over", func(t *testing.T) {
		b := startWith(t, keeper.Brief{Reserve: 1, Takeover: 50 * time.Millisecond})
		b.mount()
		begin(b)
		resumes(b)
	})
	t.Run("idle", func(t *testing.T) {
		b := startWith(t, keeper.Brief{Reserve: 1, Idle: time.Nanosecond})
		b.mount()
		if _, _, err := b.offer("photos", day); err != nil {
			t.Fatal(err)
		}
		b.args.Key = "barn"
		if _, _, err := b.offer("photos", day); err != nil {
			t.Errorf("another key, after the first one idled: %v", err)
		}
	})
}

// wait waits for what another process or goroutine brings about.
func (b *bench) wait(what string, there func() bool) {
	b.Helper()
	for deadline := time.Now().Add(time.Minute); !there(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			b.Fatal("waited in vain for ", what)
		}
	}
}
