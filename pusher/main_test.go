package main

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spf13/cobra"

	"farkeep/pusher/borgtest"
	"farkeep/shared/identity"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		program: func() {
			ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
			defer stop()
			code := run(ctx, os.Args[1:], &Env{Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Getenv: os.Getenv, Environ: os.Environ, Now: time.Now})
			noteEnd()
			os.Exit(code)
		},
	})
}

// newKey writes a new identity to path, unless that is "", and returns its public half.
func newKey(path string) (string, error) {
	private, public, err := identity.New("test")
	if err == nil && path != "" {
		err = os.WriteFile(path, []byte(private.Reveal()), 0o600)
	}
	return public, err
}

// writeSite writes site.toml and the push key into dir. extra is added at the end.
func writeSite(dir, extra string) error {
	push, err := newKey(filepath.Join(dir, "ssh_key"))
	if err != nil {
		return err
	}
	other, err := newKey("")
	if err != nil {
		return err
	}
	text := fmt.Sprintf(`name = "test"
[home]
name = "home"
push_key = %q
[[key_server]]
name = "keys"
address = "192.0.2.1:7022"
host_key = %q
%s`, strings.TrimSpace(push), strings.TrimSpace(other), strings.ReplaceAll(extra, "$HOSTKEY", strings.TrimSpace(other)))
	return os.WriteFile(filepath.Join(dir, "site.toml"), []byte(text), 0o644)
}

func TestScripts(t *testing.T) {
	scripts, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(scripts) == 0 {
		t.Fatal("no scripts were found", err)
	}
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(e *testscript.Env) error {
			e.Setenv("STATE", filepath.Join(e.WorkDir, "state"))
			for _, kv := range borgtest.Env(filepath.Join(e.WorkDir, ".borg")) {
				if name, value, _ := strings.Cut(kv, "="); strings.HasPrefix(name, "BORG_") {
					e.Setenv(name, value)
				}
			}
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			// site FILE makes site.toml and ssh_key, with the content of FILE at the end.
			"site": func(ts *testscript.TestScript, _ bool, args []string) {
				extra := strings.ReplaceAll(ts.ReadFile(args[0]), "$WORK", ts.Getenv("WORK"))
				extra = strings.ReplaceAll(extra, "$TOWERKEY", ts.Getenv("TOWERKEY"))
				ts.Check(writeSite(ts.Getenv("WORK"), extra))
			},
			// key FILE [VARIABLE] makes an identity, and keeps its public half in VARIABLE.
			"key": func(ts *testscript.TestScript, _ bool, args []string) {
				public, err := newKey(ts.MkAbs(args[0]))
				ts.Check(err)
				if len(args) > 1 {
					ts.Setenv(args[1], strings.TrimSpace(public))
				}
			},
			// suspect FOLDER REPOSITORY NUMBER marks a generation, as its commit would have.
			"suspect": func(ts *testscript.TestScript, _ bool, args []string) {
				found, err := filepath.Glob(filepath.Join(ts.MkAbs(args[0]), "generations", args[1], "*0"+args[2]+"-*", "generation.toml"))
				if err != nil || len(found) != 1 {
					ts.Fatalf("generation %s: %q, %v", args[2], found, err)
				}
				text, err := os.ReadFile(found[0])
				ts.Check(err)
				changed := strings.Replace(string(text), "suspect = false\n", "suspect = true\nsuspect_reasons = ['Everything is gone.']\n", 1)
				ts.Check(os.Remove(found[0]))
				ts.Check(os.WriteFile(found[0], []byte(changed), 0o444))
			},
			// holdlock makes a lock that nobody will ever release.
			"holdlock": func(ts *testscript.TestScript, _ bool, args []string) {
				dir := filepath.Join(ts.MkAbs(args[0]), "lock.exclusive")
				ts.Check(os.Mkdir(dir, 0o700))
				ts.Check(os.WriteFile(filepath.Join(dir, "elsewhere@1.17-0"), nil, 0o600))
			},
			// stalelock makes the lock of a process of this host that is dead.
			"stalelock": func(ts *testscript.TestScript, _ bool, args []string) {
				c := exec.Command("true")
				ts.Check(c.Run())
				dir := filepath.Join(ts.MkAbs(args[0]), "lock.exclusive")
				ts.Check(os.Mkdir(dir, 0o700))
				name := fmt.Sprintf("%s.%d-0", ts.Getenv("BORG_HOST_ID"), c.Process.Pid)
				ts.Check(os.WriteFile(filepath.Join(dir, name), nil, 0o600))
			},
		},
	})
}

// Every command's help ends in an example, which names only what exists.
func TestExamples(t *testing.T) {
	root := newRootCmd(&Env{Stdout: os.Stdout, Stderr: os.Stderr, Getenv: os.Getenv, Now: time.Now})
	var visit func(c *cobra.Command)
	visit = func(c *cobra.Command) {
		if c.Name() == "help" || c.Name() == "completion" {
			return
		}
		if c.Example == "" {
			t.Errorf("%s has no example", c.CommandPath())
		}
		for _, line := range strings.Split(c.Example, "\n") {
			words := strings.Fields(line)
			if len(words) == 0 || words[0] == "#" {
				continue
			}
			if words[0] != program {
				t.Errorf("%s: example %q", c.CommandPath(), line)
				continue
			}
			found, rest, err := root.Find(words[1:])
			if err != nil {
				t.Errorf("%s: example %q: %v", c.CommandPath(), line, err)
				continue
			}
			for i, word := range rest {
				if word == "|" {
					rest = rest[:i]
					break
				}
			}
			if err := found.ParseFlags(rest); err != nil {
				t.Errorf("%s: example %q: %v", c.CommandPath(), line, err)
			}
		}
		for _, sub := range c.Commands() {
			visit(sub)
		}
	}
	visit(root)
}

// A signal ends a push in order: no lock, no freeze is left behind.
func TestInterrupt(t *testing.T) {
	work := t.TempDir()
	repos := filepath.Join(work, "repos")
	if err := os.Mkdir(repos, 0o755); err != nil {
		t.Fatal(err)
	}
	r := borgtest.Init(t, repos, "photos", "none")
	r.Fill(t, 4, 500_000)
	r.Create(t, "one")
	disk := filepath.Join(work, "disk")
	if err := os.Mkdir(disk, 0o755); err != nil {
		t.Fatal(err)
	}
	extra := fmt.Sprintf("[[repository_folder]]\npath = %q\n[[directory_target]]\nname = \"disk\"\npath = %q\n", repos, disk)
	if err := writeSite(work, extra); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	out := &watcher{text: "frozen", seen: cancel}
	code := run(ctx, []string{"push", "--site", filepath.Join(work, "site.toml"), "--state", filepath.Join(work, "state"), "--priority", "normal", "--rate-limit", "100000"}, &Env{Stdout: out, Stderr: out, Getenv: os.Getenv, Now: time.Now})
	if code != 130 {
		t.Errorf("exit code %d\n%s", code, out.all)
	}
	for _, left := range []string{"lock.roster", "lock.exclusive", ".farkeep-freeze"} {
		if _, err := os.Lstat(filepath.Join(r.Path, left)); err == nil {
			t.Errorf("%s is left behind", left)
		}
	}
	r.Fill(t, 1, 1000)
	r.Create(t, "two")
}

// watcher keeps what is written, and calls seen when it sees text.
type watcher struct {
	text string
	seen func()
	all  string
}

func (w *watcher) Write(p []byte) (int, error) {
	w.all += string(p)
	if strings.Contains(string(p), w.text) {
		w.seen()
	}
	return len(p), nil
}

// A pusher that is killed in the middle of an upload leaves nothing that stops
// borg or the next push.
func TestKilled(t *testing.T) {
	work := t.TempDir()
	repos, disk := filepath.Join(work, "repos"), filepath.Join(work, "disk")
	for _, dir := range []string{repos, disk} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	r := borgtest.Init(t, repos, "photos", "none")
	r.Fill(t, 4, 500_000)
	r.Create(t, "one")
	extra := fmt.Sprintf("[[repository_folder]]\npath = %q\n[[directory_target]]\nname = \"disk\"\npath = %q\n", repos, disk)
	if err := writeSite(work, extra); err != nil {
		t.Fatal(err)
	}
	args := []string{"push", "--site", filepath.Join(work, "site.toml"), "--state", filepath.Join(work, "state")}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(work, program) // testscript.Main acts on the name it is called by
	if err := os.Symlink(exe, link); err != nil {
		t.Fatal(err)
	}
	c := exec.Command(link, append(args, "--rate-limit", "1000")...)
	stderr, err := c.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	buf, text := make([]byte, 4096), ""
	for !strings.Contains(text, "frozen") {
		n, err := stderr.Read(buf)
		text += string(buf[:n])
		if err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
	}
	if err := c.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	c.Wait()
	if _, err := os.Lstat(filepath.Join(r.Path, ".farkeep-freeze")); err != nil {
		t.Fatalf("it was killed before or after the push: %v", err)
	}
	r.Fill(t, 1, 1000)
	r.Run(t, "create", "--lock-wait=0", r.Path+"::two", r.Source)
	var out watcher
	out.seen = func() {}
	if code := run(t.Context(), append(args, "--priority", "normal"), &Env{Stdout: &out, Stderr: &out, Getenv: os.Getenv, Now: time.Now}); code != 0 {
		t.Fatalf("exit code %d\n%s", code, out.all)
	}
	if _, err := os.Lstat(filepath.Join(r.Path, ".farkeep-freeze")); err == nil {
		t.Error("the freeze of the killed push is still there")
	}
	var generations []fs.DirEntry
	if generations, err = os.ReadDir(filepath.Join(disk, "generations/photos")); err != nil || len(generations) < 1 {
		t.Errorf("%v %v", generations, err)
	}
}

func TestExitCodes(t *testing.T) {
	work := t.TempDir()
	if err := writeSite(work, "[[directory_target]]\nname = \"disk\"\npath = \"/nowhere\"\n"); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args string
		want int
	}{
		{"", 0},
		{"--help", 0},
		{"push --nonsense", 2},
		{"push --rate-limit=-1", 2},
		{"push --site WORK/missing", 2},
		{"check --site WORK/site.toml --identity WORK/missing --state WORK/state", 2},
		{"push --site WORK/site.toml --state WORK/state", 2},    // no repository
		{"forget photos --state WORK/state", 2},                 // nothing remembered
		{"status --site WORK/site.toml --state WORK/state", 3},  // the target does not answer
		{"push --site WORK/site.toml --state /proc/nowhere", 1}, // no state
		{"status attic --site WORK/site.toml --state WORK/state", 2},
		{"status --ready-to-travel --site WORK/site.toml --state WORK/state", 2}, // no appliance
	} {
		out := &watcher{text: "\x00"}
		args := strings.Fields(strings.ReplaceAll(c.args, "WORK", work))
		if got := run(t.Context(), args, &Env{Stdout: out, Stderr: out, Getenv: os.Getenv, Now: time.Now}); got != c.want {
			t.Errorf("%q: exit code %d, want %d\n%s", c.args, got, c.want, out.all)
		}
	}
}
