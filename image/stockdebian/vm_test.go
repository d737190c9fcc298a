//go:build vm

package stockdebian_test

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"farkeep/image/debian"
	"farkeep/image/stockdebian"
)

func stick(t *testing.T) *stockdebian.Stick {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	mirror, err := debian.FindMirror(os.DirFS("/etc/apt"))
	if err != nil {
		t.Fatal(err)
	}
	s, err := stockdebian.Make(t.Context(), filepath.Join(cache, "farkeep"), mirror, slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// The stick is a Debian at whose shell one can do what a person would: blocks of
// commands share a shell, a failing command ends it, questions can be answered, and
// nothing that it writes stays.
func TestStick(t *testing.T) {
	s := stick(t)
	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	d := stockdebian.Disk{Path: disk, Serial: "some"}
	m, err := stockdebian.Boot(t.Context(), stockdebian.Config{Stick: s, Disks: []stockdebian.Disk{d}, Console: t.Output()})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	t.Logf("booted in %s", m.Booted)
	run := func(script string, answers ...stockdebian.Answer) string {
		t.Helper()
		out, err := m.Run(t.Context(), script, answers...)
		if err != nil {
			t.Fatalf("%s\n%v", script, err)
		}
		return out
	}
	run("cd /tmp\nWORD='two  words'\n")
	if out := run(`echo "$WORD in $(pwd)"`); out != "two  words in /tmp\n" {
		t.Errorf("the shell forgets: %q", out)
	}
	if out := run(`printf 'What? '; read -r answer; echo "$answer!"`, stockdebian.Answer{Asked: regexp.MustCompile(`What\? $`), Text: "this"}); out != "What? this!\n" {
		t.Errorf("the answer: %q", out)
	}
	var failed *stockdebian.ScriptError
	if _, err := m.Run(t.Context(), "echo before\nfalse\necho after\n"); !errors.As(err, &failed) || failed.Code != 1 || failed.Output != "before\n" {
		t.Errorf("a command that fails: %v", err)
	}
	if out := run(`echo "${WORD:-none}"`); out != "none\n" {
		t.Errorf("a fresh shell knows %q", out)
	}
	run("echo changed > " + d.Device())
	if b, err := os.ReadFile(disk); err != nil || strings.Contains(string(b), "changed") {
		t.Errorf("the disk was written to: %v", err)
	}
	run("cryptsetup --version; borg --version; age --version; ssh -V; e2fsck -V; command -v ddrescue || :")
}
