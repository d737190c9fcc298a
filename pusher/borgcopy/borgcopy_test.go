package borgcopy

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"farkeep/shared/hint"
)

func TestCheck(t *testing.T) {
	for _, good := range []string{
		"list", "list --short", "info ::one", "extract ::one home/ada", "extract --dry-run --list ::one", "export-tar ::one -", "diff ::one two",
		"check", "check --verify-data", "check --repository-only", "mount :: /mnt", "list --prefix --repair",
	} {
		if err := Check(strings.Fields(good)); err != nil {
			t.Errorf("borg %s: %v", good, err)
		}
	}
	for _, bad := range []string{
		"", "create ::x .", "delete ::x", "prune", "compact", "recreate", "rename ::a b", "init", "config :: a b", "with-lock :: true", "break-lock", "upgrade",
		"key change-passphrase", "key export :: file", "key import :: file", "import-tar ::x -", "serve", "debug put-obj", "umount /mnt", "benchmark crud :: /x", "lists", "LIST",
		"check --repair", "check --repai", "check --re", "check -v --rep ::", "check --repair=1", "--verbose create ::x", "--lock-wait 1 list", "-- create",
	} {
		err := Check(strings.Fields(bad))
		if hint.Code(err) != hint.ExitUsage || hint.Of(err) == "" {
			t.Errorf("borg %s: %v, hint %q", bad, err, hint.Of(err))
		}
	}
}

// Borg's own program says which of its subcommands work without its lock: the
// table here is not wider than that, and every name in it exists.
func TestTableIsBorgs(t *testing.T) {
	borg, err := exec.LookPath("borg")
	if err != nil {
		t.Fatal("borg is missing: install the Debian package borgbackup")
	}
	out, err := exec.Command(borg, "--version").Output()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s", out)
	text, err := os.ReadFile("/usr/lib/python3/dist-packages/borg/archiver.py")
	if err != nil {
		t.Fatal("Debian's borgbackup is missing: ", err)
	}
	m := regexp.MustCompile(`(?s)bypass_allowed = \{(.*?)\}`).FindSubmatch(text)
	if m == nil {
		t.Fatal("this borg has no bypass_allowed")
	}
	for _, name := range Reads() {
		if !strings.Contains(string(m[1]), "self.do_"+strings.ReplaceAll(name, "-", "_")) {
			t.Errorf("borg %s does not take --bypass-lock", name)
		}
	}
}

func TestEnviron(t *testing.T) {
	r := Run{Repository: "/r", Private: "/p", Environ: []string{
		"HOME=/home/ada", "BORG_PASSPHRASE=secret", "BORG_REPO=ssh://home/srv/photos", "BORG_BASE_DIR=", "BORG_SECURITY_DIR=/s", "BORG_RELOCATED_REPO_ACCESS_IS_OK=no", "LANG=C",
	}}
	got, err := r.environ()
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"HOME=/home/ada", "BORG_PASSPHRASE=secret", "LANG=C", "BORG_REPO=/r", "BORG_BASE_DIR=/p", "BORG_CACHE_DIR=/p/cache", "BORG_CONFIG_DIR=/p/config",
		"BORG_SECURITY_DIR=/p/security", "BORG_KEYS_DIR=/home/ada/.config/borg/keys", "BORG_RELOCATED_REPO_ACCESS_IS_OK=yes", "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK=yes",
	}
	if !slices.Equal(got, want) {
		t.Errorf("environment\n%q, want\n%q", got, want)
	}
}

// The keys folder is the one that Borg itself would use.
func TestKeysFolder(t *testing.T) {
	if _, err := os.Stat("/usr/bin/python3"); err != nil {
		t.Fatal("python3 is missing: install the Debian package borgbackup")
	}
	base := t.TempDir()
	all := []map[string]string{
		{"HOME": base},
		{"HOME": base, "XDG_CONFIG_HOME": base + "/xdg"},
		{"HOME": base, "XDG_CONFIG_HOME": base + "/xdg", "BORG_BASE_DIR": base + "/base"},
		{"HOME": base, "XDG_CONFIG_HOME": base + "/xdg", "BORG_CONFIG_DIR": base + "/config"},
		{"HOME": base, "BORG_CONFIG_DIR": base + "/config", "BORG_KEYS_DIR": base + "/keys"},
	}
	asked, err := json.Marshal(all)
	if err != nil {
		t.Fatal(err)
	}
	const ask = `
import json, os, sys
from borg.helpers import get_keys_dir
for env in json.load(sys.stdin):
    os.environ.clear()
    os.environ.update(env)
    print(get_keys_dir())
`
	cmd := exec.Command("/usr/bin/python3", "-c", ask)
	cmd.Stdin = bytes.NewReader(asked)
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	answers := strings.Fields(string(out))
	if len(answers) != len(all) {
		t.Fatalf("Borg answers %q", answers)
	}
	for i, env := range all {
		if got, err := keysFolder(env); err != nil || got != answers[i] {
			t.Errorf("%q: %s, %v, Borg says %s", env, got, err, answers[i])
		}
	}
}

// What Borg gets and how it ends, played by a program of its name.
func TestStart(t *testing.T) {
	bin := t.TempDir()
	script := "#!/bin/sh\necho \"$BORG_REPO $*\"\ncat\nexit 3\n"
	if err := os.WriteFile(filepath.Join(bin, "borg"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	var out strings.Builder
	r := Run{Repository: "/r", Private: t.TempDir(), Environ: os.Environ(), Stdin: strings.NewReader("typed"), Stdout: &out}
	var ended *ExitError
	if err := r.Start(t.Context(), []string{"mount", "::", "/mnt"}); !errors.As(err, &ended) || ended.Code != 3 {
		t.Errorf("Start: %v", err)
	}
	if want := "/r mount --bypass-lock --foreground :: /mnt\ntyped"; out.String() != want {
		t.Errorf("borg saw %q, want %q", out.String(), want)
	}
	out.Reset()
	if err := r.Start(t.Context(), []string{"create", "::x"}); hint.Code(err) != hint.ExitUsage || out.Len() > 0 {
		t.Errorf("create: %v, %q", err, out.String())
	}
	t.Setenv("PATH", t.TempDir())
	if err := r.Start(t.Context(), []string{"list"}); !strings.Contains(hint.Of(err), "borgbackup") {
		t.Errorf("without borg: %v", err)
	}
}
