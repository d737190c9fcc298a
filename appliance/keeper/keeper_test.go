package keeper_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
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

	"golang.org/x/sys/unix"
)

// bench is a keeper that runs, with a small file system as its disk.
type bench struct {
	*testing.T
	paths part.Paths
	args  keepercall.Args
}

func start(t *testing.T) *bench {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("this test mounts a tmpfs: run it as root")
	}
	root := t.TempDir()
	b := &bench{T: t, paths: part.Paths{Run: root + "/run", State: root + "/state", Media: root + "/media"},
		args: keepercall.Args{Key: "home", Role: "push", Repositories: []string{"photos", "docs*"}}}
	for _, dir := range []string{b.paths.RunDir("keeper"), b.paths.RunDir("disk"), b.paths.StateDir("keeper"), b.paths.Disk()} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	b.run()
	return b
}

// run starts the keeper; the returned func ends it and waits.
func (b *bench) run() (stop func()) {
	b.Helper()
	env, err := part.New(part.Header{Name: part.Keeper, Host: "vault", Paths: b.paths}, keeper.Brief{Reserve: 1}, slog.New(slog.NewTextHandler(testWriter{b.T}, nil)), nil)
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- keeper.Run(ctx, env) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			b.Error(err)
		}
	}
	b.Cleanup(stop)
	for {
		if _, err := os.Stat(b.paths.Socket(part.Keeper)); err == nil {
			return stop
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
	_, _, contents := r.manifest(b.T)
	c := b.open(keepercall.Upload, b.with(func(a *keepercall.Args) { a.Push = push }))
	defer c.Close()
	e := recipe.NewEncoder(c)
	for i := range need.All() {
		h := manifest.NewHash()
		io.WriteString(h, contents[i])
		err := errors.Join(e.File(i), second(io.WriteString(e, contents[i])), e.End(manifest.SumOf(h)))
		if err != nil {
			return err
		}
	}
	if err := e.Close(); err != nil {
		return err
	}
	c.CloseWrite()
	_, err := line(c, nil)
	return err
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
