package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"farkeep/pusher/appliance"
	"farkeep/pusher/borgtest"
	"farkeep/pusher/mount"
	"farkeep/pusher/readback"
	"farkeep/pusher/restore"
	"farkeep/shared/hint"
	"farkeep/shared/identity"
	"farkeep/shared/pushwire"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"
)

// reader is a network that counts what comes back, and can be cut.
type reader struct {
	came     atomic.Int64
	cutAfter atomic.Int64 // ends the connection once so many bytes came; 0: never
	dials    atomic.Int64
}

func (r *reader) dial(ctx context.Context, network, address string) (net.Conn, error) {
	r.dials.Add(1)
	c, err := (&net.Dialer{}).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	return &readingEnd{c, r}, nil
}

type readingEnd struct {
	net.Conn
	r *reader
}

func (e *readingEnd) Read(p []byte) (int, error) {
	n, err := e.Conn.Read(p)
	came := e.r.came.Add(int64(n))
	if limit := e.r.cutAfter.Load(); limit > 0 && came >= limit {
		e.r.cutAfter.Store(0)
		e.Conn.Close()
	}
	return n, err
}

// reading is the view of the appliance with a key, by way of r.
func (a *benchAppliance) reading(t testing.TB, key string, r *reader) readback.Source {
	t.Helper()
	signer, err := identity.ReadSigner(key)
	must(t, err)
	host, _, _, _, err := ssh.ParseAuthorizedKey([]byte(a.hostKey))
	must(t, err)
	from := appliance.New(appliance.Config{
		Name: "attic", Address: a.address(), HostKey: host, Identity: signer,
		WakeWait: 20 * time.Second, Log: slog.New(slog.DiscardHandler), DialContext: r.dial,
	})
	t.Cleanup(func() { from.Close() })
	return from
}

// newest is the newest generation of a repository.
func newest(t testing.TB, from readback.Source, repository string) pushwire.Generation {
	t.Helper()
	all, err := from.Generations(t.Context(), repository)
	must(t, err)
	g, _, err := readback.Choose(all, readback.Wanted{})
	must(t, err)
	return g
}

func restoring(from readback.Source, g pushwire.Generation, to string, paths ...string) restore.Restore {
	return restore.Restore{Source: from, Generation: g, Paths: paths, To: to, Log: slog.New(slog.DiscardHandler)}
}

// holds compares a folder with what was pushed.
func (s source) holds(t *testing.T, dir string) {
	t.Helper()
	got := source{}
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		content, err := os.ReadFile(path)
		got[strings.TrimPrefix(path, dir+"/")] = string(content)
		return err
	}))
	if !cmp.Equal(s, got) {
		t.Errorf("%s holds %d files, want %d, or others", dir, len(got), len(s))
	}
}

func TestRestoreOverSSH(t *testing.T) {
	a := startAppliance(t, benchDir(t), program(t), "64m")
	to := a.client(t, &line{})
	must(t, to.Wake(t.Context()))
	first := source{"a": "one", "b": noise(1, 3<<20), "c": ""}
	second := source{"a": "one", "b": noise(2, 5<<20+17), "d": "four"}
	for i := range 300 {
		second[fmt.Sprintf("small-%03d", i)] = noise(uint64(i), 1000+i)
	}
	first.push(t, to, "photos")
	second.push(t, to, "photos")
	from := a.reading(t, a.restore, &reader{})
	all, err := from.Generations(t.Context(), "")
	must(t, err)
	if len(all) != 2 || all[0].Bytes >= all[1].Bytes || all[1].Digest == "" {
		t.Fatalf("generations: %+v", all)
	}
	for i, s := range []source{first, second} {
		dir := filepath.Join(t.TempDir(), "new")
		report, err := restoring(from, all[i], dir).Run(t.Context())
		must(t, err)
		s.holds(t, dir)
		if report.Files != int64(len(s)) || report.Bytes != all[i].Bytes || report.Kept != 0 {
			t.Errorf("report %+v of %d files", report, len(s))
		}
	}
	part := t.TempDir()
	_, err = restoring(from, all[1], part, "a", "small-007").Run(t.Context())
	must(t, err)
	source{"a": "one", "small-007": second["small-007"]}.holds(t, part)

	// A push key lists what is its own, and reads nothing of it.
	pushing := a.reading(t, a.key, &reader{})
	if all, err := pushing.Generations(t.Context(), "photos"); err != nil || len(all) != 2 {
		t.Errorf("a push key lists %d generations, %v", len(all), err)
	}
	_, err = restoring(pushing, all[1], filepath.Join(t.TempDir(), "new")).Run(t.Context())
	if hint.Code(err) != hint.ExitRefused {
		t.Errorf("a push key that restores: %v (code %d)", err, hint.Code(err))
	}
}

// A line that is cut again and again costs what was under way, and no more.
func TestCutRestoreGoesOnOverSSH(t *testing.T) {
	a := startAppliance(t, benchDir(t), program(t), "128m")
	to := a.client(t, &line{})
	must(t, to.Wake(t.Context()))
	const long = 24 << 20
	s := source{"a": "one", "long": noise(1, long), "longer": noise(2, long)}
	s.push(t, to, "photos")

	r := &reader{}
	from := a.reading(t, a.restore, r)
	g := newest(t, from, "photos")
	dir := filepath.Join(t.TempDir(), "new")
	r.cutAfter.Store(r.came.Load() + 15<<20)
	ctx, cancel := context.WithCancel(t.Context())
	o := restoring(from, g, dir)
	// The first cut is gone over within the run; in the second the program is ended.
	o.Log = slog.New(onWarning(func() {
		if r.dials.Load() > 1 {
			cancel()
			return
		}
		r.cutAfter.Store(r.came.Load() + 15<<20)
	}))
	if _, err := o.Run(ctx); !errors.Is(err, context.Canceled) {
		t.Fatalf("a restore that was ended: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "long")); err == nil && r.came.Load() < long {
		t.Error("a file has its name before it is complete")
	}
	before := r.came.Load()
	report, err := restoring(from, g, dir).Run(t.Context())
	must(t, err)
	s.holds(t, dir)
	if report.Files != 3 {
		t.Errorf("report %+v", report)
	}
	// What was in flight at the two cuts is lost: 8 MiB each at most.
	if total := r.came.Load(); total > 2*long+2*(8<<20)+long/20 {
		t.Errorf("%d bytes came for %d, %d of them in the last run", total, 2*long, total-before)
	}
}

// onWarning calls the function at each warning.
type onWarning func()

func (onWarning) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelWarn }
func (w onWarning) Handle(context.Context, slog.Record) error  { w(); return nil }
func (w onWarning) WithAttrs([]slog.Attr) slog.Handler         { return w }
func (w onWarning) WithGroup(string) slog.Handler              { return w }

// An appliance whose disk has rotted is found out; the rest arrives, and when the
// file is whole again only that crosses the line.
func TestRestoreFindsWrongBytesOverSSH(t *testing.T) {
	a := startAppliance(t, benchDir(t), program(t), "64m")
	to := a.client(t, &line{})
	must(t, to.Wake(t.Context()))
	s := source{"a": "one", "b": noise(1, 5<<20), "c": "three", "d": noise(2, 5<<20), "e": "five"}
	name := s.push(t, to, "photos")
	flip := func(file string) {
		f, err := os.OpenFile(filepath.Join(a.files("photos", name), file), os.O_RDWR, 0)
		must(t, err)
		defer f.Close()
		var b [1]byte
		_, err = f.ReadAt(b[:], 2)
		must(t, err)
		_, err = f.WriteAt([]byte{^b[0]}, 2)
		must(t, err)
	}
	flip("b")
	flip("c")
	must(t, os.Truncate(filepath.Join(a.files("photos", name), "e"), 2))

	r := &reader{}
	from := a.reading(t, a.restore, r)
	g := newest(t, from, "photos")
	dir := filepath.Join(t.TempDir(), "new")
	report, err := restoring(from, g, dir).Run(t.Context())
	if hint.Code(err) != hint.ExitPartial || report.Bad != 3 || report.Files != 2 {
		t.Fatalf("a restore of rotten files: %v, %+v", err, report)
	}
	var bad []string
	for _, p := range report.Problems {
		bad = append(bad, p.Path)
	}
	slices.Sort(bad)
	if diff := cmp.Diff([]string{"b", "c", "e"}, bad); diff != "" {
		t.Error(diff)
	}
	for _, file := range bad {
		if _, err := os.Lstat(filepath.Join(dir, file)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s was restored with wrong bytes: %v", file, err)
		}
	}
	flip("b")
	flip("c")
	must(t, os.WriteFile(filepath.Join(a.files("photos", name), "e"), []byte("five"), 0o444))
	before := r.came.Load()
	report, err = restoring(from, g, dir).Run(t.Context())
	must(t, err)
	s.holds(t, dir)
	if came := r.came.Load() - before; came > 6<<20 || report.Kept < 5<<20 {
		t.Errorf("%d bytes came for the healed files, %+v", came, report)
	}
}

// mounted mounts the newest generation of a repository until the test ends. wait
// waits until the mount has ended by itself.
func mounted(t *testing.T, from readback.Source, repository string) (dir string, wait func() error) {
	t.Helper()
	g := newest(t, from, repository)
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	tree, err := from.Open(context.WithoutCancel(ctx), repository, g.Name)
	must(t, err)
	dir = t.TempDir()
	m, err := mount.Mount{Tree: tree, Generation: g, Folder: dir, Log: slog.New(slog.DiscardHandler)}.Start(context.WithoutCancel(ctx))
	must(t, err)
	ended := make(chan struct{})
	go func() {
		err = m.Wait(ctx)
		close(ended)
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
	})
	return dir, func() error {
		select {
		case <-ended:
			return err
		case <-time.After(2 * time.Minute):
			return errors.New("it goes on after two minutes")
		}
	}
}

func isMounted(t *testing.T, dir string) bool {
	t.Helper()
	text, err := os.ReadFile("/proc/self/mounts")
	must(t, err)
	return bytes.Contains(text, []byte(" "+dir+" "))
}

func TestMountOverSSH(t *testing.T) {
	a := startAppliance(t, benchDir(t), program(t), "128m")
	to := a.client(t, &line{})
	must(t, to.Wake(t.Context()))
	s := source{"a": "one", "b": noise(1, 10<<20+5), "c": "", "rotten": noise(3, 3<<20), "rotten-small": "wrong"}
	for i := range 200 {
		s[fmt.Sprintf("small-%03d", i)] = noise(uint64(i), 1000+i)
	}
	name := s.push(t, to, "photos")
	for _, file := range []string{"rotten", "rotten-small"} {
		f, err := os.OpenFile(filepath.Join(a.files("photos", name), file), os.O_RDWR, 0)
		must(t, err)
		_, err = f.WriteAt([]byte("x"), 1)
		must(t, err)
		must(t, f.Close())
	}

	r := &reader{}
	from := a.reading(t, a.restore, r)
	dir, wait := mounted(t, from, "photos")
	before := r.came.Load()
	list, err := os.ReadDir(dir)
	must(t, err)
	for _, e := range list {
		info, err := e.Info()
		must(t, err)
		if want := int64(len(s[e.Name()])); info.Size() != want || info.Mode() != 0o644 {
			t.Errorf("%s: %v, %d bytes, want %d", e.Name(), info.Mode(), info.Size(), want)
		}
	}
	if came := r.came.Load() - before; len(list) != len(s) || came > 4096 {
		t.Errorf("a list of %d files took %d bytes from the line", len(list), came)
	}
	for file, content := range s {
		got, err := os.ReadFile(filepath.Join(dir, file))
		if strings.HasPrefix(file, "rotten") {
			if !errors.Is(err, unix.EIO) {
				t.Errorf("%s is not what was pushed, and was read: %v", file, err)
			}
			continue
		}
		if err != nil || string(got) != content {
			t.Errorf("%s: %d bytes, %v", file, len(got), err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "new"), nil, 0o600); !errors.Is(err, unix.EROFS) {
		t.Errorf("writing: %v", err)
	}
	// Pieces from anywhere.
	f, err := os.Open(filepath.Join(dir, "b"))
	must(t, err)
	defer f.Close()
	for _, off := range []int64{9 << 20, 5, 10<<20 - 3, 128<<10 - 1} {
		p := make([]byte, 1000)
		n, err := f.ReadAt(p, off)
		if want := s["b"][off:min(off+1000, int64(len(s["b"])))]; string(p[:n]) != want || err != nil && err != io.EOF {
			t.Errorf("%d bytes at %d: %v", n, off, err)
		}
	}

	// The line goes while somebody has a file open: reads fail, nothing hangs, and
	// the folder is a folder again.
	r.cutAfter.Store(1)
	if _, err := os.ReadFile(filepath.Join(dir, "b")); err == nil {
		r.cutAfter.Store(1) // it was all in the kernel's cache
		from.Generations(t.Context(), "photos")
	}
	if err := wait(); hint.Code(err) != hint.ExitUnreachable {
		t.Errorf("the mount ended with %v", err)
	}
	if isMounted(t, dir) {
		t.Error("it is still mounted")
	}
	if _, err := os.ReadDir(dir); err != nil {
		t.Errorf("the folder afterwards: %v", err)
	}
}

// The pusher's own program, end to end: what a user types, with real Borg
// repositories of each kind of encryption.
func TestBorgOnAGenerationOverSSH(t *testing.T) {
	dir := benchDir(t)
	buildPrograms(t, dir, "pusher")
	a := startAppliance(t, dir, program(t), "256m")
	work := t.TempDir()
	keys := filepath.Join(work, "operator")
	must(t, os.Mkdir(keys, 0o700))
	restoreKey, err := os.ReadFile(a.restore)
	must(t, err)
	must(t, os.WriteFile(filepath.Join(keys, "restore_key"), restoreKey, 0o600))

	repositories := map[string]*borgtest.Repository{}
	text := a.siteText(t)
	for _, encryption := range []string{"repokey", "keyfile", "none"} {
		b := borgtest.Init(t, work, "repo-"+encryption, encryption)
		b.Fill(t, 5, 100_000)
		b.Create(t, "first")
		repositories[encryption] = b
		text += fmt.Sprintf("[[repository]]\nname = %q\npath = %q\n", encryption, b.Path)
	}
	must(t, os.WriteFile(filepath.Join(work, "site.toml"), []byte(text), 0o600))
	base := []string{"--site", filepath.Join(work, "site.toml"), "--identity", a.key, "--state", filepath.Join(work, "state")}
	// farkeep runs the program as a user at home does, in a folder of its own.
	farkeep := func(environ []string, in string, args ...string) (stdout, stderr string, code int) {
		t.Helper()
		cmd := exec.Command(a.pusher, slices.Concat(base, args)...)
		var out, errOut bytes.Buffer
		cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr = in, environ, &out, &errOut
		var exit *exec.ExitError
		if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
		return out.String(), errOut.String(), cmd.ProcessState.ExitCode()
	}
	if out, text, code := farkeep(os.Environ(), work, "push"); code != 0 {
		t.Fatalf("push: %d\n%s%s", code, out, text)
	}
	if out, text, code := farkeep(os.Environ(), work, "generations", "attic"); code != 0 || strings.Count(out, "good") != 3 {
		t.Errorf("generations: %d\n%s%s", code, out, text)
	}
	for encryption, b := range repositories {
		t.Run(encryption, func(t *testing.T) {
			snapshot := filepath.Join(t.TempDir(), "snapshot")
			must(t, os.CopyFS(snapshot, os.DirFS(b.Source)))
			// The user's own environment remembers a newer state of the same repository, at
			// another place: as at home.
			b.Create(t, "second")
			environ := b.Command("list").Env
			run := func(in string, args ...string) (string, string, int) {
				t.Helper()
				return farkeep(environ, in, append([]string{"borg", "attic", encryption, "latest", "--"}, args...)...)
			}
			out, text, code := run(work, "list", "--short")
			if code != 0 || out != "first\n" {
				t.Fatalf("borg list: %d\n%s%s", code, out, text)
			}
			into := t.TempDir()
			if _, text, code = run(into, "extract", "::first"); code != 0 {
				t.Fatalf("borg extract: %d\n%s", code, text)
			}
			same(t, snapshot, filepath.Join(into, b.Source))
			if encryption != "repokey" {
				return
			}
			if _, text, code = run(work, "check", "--verify-data"); code != 0 {
				t.Errorf("borg check: %d\n%s", code, text)
			}
			// Borg's own exit code and words come through.
			if _, text, code = run(work, "info", "::no-such-archive"); code != 2 || !strings.Contains(text, "no-such-archive") || strings.Contains(text, "farkeep-pusher: error") {
				t.Errorf("borg info of an archive that is not there: %d\n%s", code, text)
			}
			// All that writes is in borgcopy.TestCheck.
			for _, writing := range [][]string{{"create", "::third", "."}, {"check", "--rep"}} {
				if _, text, code := run(work, writing...); code != hint.ExitUsage || !strings.Contains(text, "hint:") {
					t.Errorf("borg %v was not refused: %d\n%s", writing, code, text)
				}
			}
			checkBorgMount(t, a.pusher, slices.Concat(base, []string{"borg", "attic", encryption, "--", "mount", "::"}), environ, snapshot, b.Source)
		})
	}
	if left, _ := filepath.Glob(filepath.Join(os.TempDir(), "farkeep-borg-*")); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// same compares two folders.
func same(t *testing.T, a, b string) {
	t.Helper()
	if out, err := exec.Command("diff", "-r", a, b).CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("%s and %s differ: %v\n%s", a, b, err, out)
	}
}

// checkBorgMount lets the pusher run "borg mount" on a generation, compares, and
// ends it as Ctrl-C does.
func checkBorgMount(t *testing.T, pusher string, args, environ []string, want, source string) {
	t.Helper()
	if _, err := exec.Command("/usr/bin/python3", "-c", "import pyfuse3").CombinedOutput(); err != nil {
		t.Fatal("borg cannot mount: install the Debian package python3-pyfuse3")
	}
	dir := t.TempDir()
	cmd := exec.Command(pusher, append(args, dir)...)
	log := &output{}
	cmd.Env, cmd.Stdout, cmd.Stderr = environ, log, log
	must(t, cmd.Start())
	defer cmd.Process.Kill()
	await(t, "borg mounts the archives", func() bool {
		_, err := os.Stat(filepath.Join(dir, "first"))
		return err == nil
	})
	same(t, want, filepath.Join(dir, "first", source))
	must(t, cmd.Process.Signal(unix.SIGINT))
	if err := cmd.Wait(); err != nil && cmd.ProcessState.ExitCode() != hint.ExitCancelled {
		t.Errorf("borg mount ended with %v\n%s", err, log)
	}
	if isMounted(t, dir) {
		t.Error("borg's mount is still there")
	}
}

// siteText is a site.toml with this appliance.
func (a *benchAppliance) siteText(t testing.TB) string {
	t.Helper()
	_, keys := newIdentity(t, "keys")
	_, client := newIdentity(t, "client")
	return fmt.Sprintf(`name = "bench"
[home]
name = "home"
push_key = %q
[[key_server]]
name = "keys"
address = "127.0.0.1:9"
host_key = %q
[[appliance]]
name = "attic"
board = "service"
address = %q
host_key = %q
client_key = %q
`, a.pushKey, keys, a.address(), a.hostKey, client)
}
