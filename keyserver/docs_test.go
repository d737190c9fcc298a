package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestUnitsInTheDocs keeps the systemd units in the docs ones that systemd accepts.
func TestUnitsInTheDocs(t *testing.T) {
	docs, err := os.ReadFile("../docs/keyserver.md")
	if err != nil {
		t.Fatal(err)
	}
	names, err := filepath.Glob("testdata/systemd/*")
	if err != nil || len(names) != 3 {
		t.Fatalf("units: %v, %v", names, err)
	}
	dir := t.TempDir()
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(docs), "```ini\n"+string(text)+"```") {
			t.Errorf("docs/keyserver.md does not show %s as it is", name)
		}
		// The programs are not installed here; something else has to be executable.
		installed := regexp.MustCompile(`/usr/local/bin/farkeep-\w+`).ReplaceAll(text, []byte("/bin/true"))
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(name)), installed, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Fatal("systemd-analyze is missing: apt install systemd")
	}
	for _, name := range names {
		if out, err := exec.Command(analyze, "verify", filepath.Join(dir, filepath.Base(name))).CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
	}
}

// TestDocsNameEveryCommand finds a command that the docs forgot.
func TestDocsNameEveryCommand(t *testing.T) {
	docs, err := os.ReadFile("../docs/keyserver.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, cmd := range newRootCmd(&Env{}).Commands() {
		if !strings.Contains(string(docs), "farkeep-keyserver "+cmd.Name()) {
			t.Errorf("docs/keyserver.md does not mention %s", cmd.Name())
		}
	}
}
