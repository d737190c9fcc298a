package runbook_test

import (
	"bytes"
	"os"
	"os/exec"
	"strings"
	"testing"

	"farkeep/keyserver/runbook"
	"farkeep/shared/runsteps"
	"farkeep/shared/site"

	"github.com/google/go-cmp/cmp"
)

const docPath = "../../docs/recovery.md"

func example(t *testing.T) runbook.Book {
	t.Helper()
	s, err := site.Read("../../shared/site/testdata/good.toml")
	if err != nil {
		t.Fatal(err)
	}
	return runbook.Example(s)
}

// TestDocIsTheRunbook: docs/recovery.md is the text of the bundles. With
// FARKEEP_DOCS=write in the environment it is written instead.
func TestDocIsTheRunbook(t *testing.T) {
	want, err := runbook.Doc(example(t))
	if err != nil {
		t.Fatal(err)
	}
	if os.Getenv("FARKEEP_DOCS") == "write" {
		if err := os.WriteFile(docPath, want, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(docPath)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(strings.Split(string(want), "\n"), strings.Split(string(got), "\n")); diff != "" {
		t.Errorf("docs/recovery.md is not the runbook; FARKEEP_DOCS=write go test -run TestDocIsTheRunbook ./keyserver/runbook writes it:\n-runbook +doc\n%s", diff)
	}
	markdown, err := runbook.Markdown(example(t))
	if err != nil {
		t.Fatal(err)
	}
	inDoc, err := runsteps.Parse(got)
	if err != nil {
		t.Fatal(err)
	}
	inBundle, err := runsteps.Parse(markdown)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(inDoc, inBundle); diff != "" {
		t.Errorf("-doc +bundle:\n%s", diff)
	}
}

// TestStepsAreSh: each block is sh that the shell understands, holds nothing that
// would end a person's own shell, and no name of a variable is used before a step of
// its own chapters gave it a value.
func TestStepsAreSh(t *testing.T) {
	markdown, err := runbook.Markdown(example(t))
	if err != nil {
		t.Fatal(err)
	}
	steps, err := runsteps.Parse(markdown)
	if err != nil {
		t.Fatal(err)
	}
	if len(steps) < 30 {
		t.Errorf("%d steps", len(steps))
	}
	for _, s := range steps {
		cmd := exec.Command("sh", "-n")
		cmd.Stdin = strings.NewReader(s.Script)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", s.Name, err, out)
		}
		if strings.Contains(s.Script, "\nset -") || strings.Contains(s.Script, "[[ ") || strings.Contains(s.Script, "sudo ") {
			t.Errorf("%s is no plain sh for root:\n%s", s.Name, s.Script)
		}
		if s.Chapter == "" {
			t.Errorf("%s stands in no chapter", s.Name)
		}
	}
	for _, line := range bytes.Split(markdown, []byte("\n")) {
		// What a heading is linked by: small letters, dashes for blanks.
		for _, part := range bytes.Split(line, []byte("](#"))[1:] {
			anchor, _, _ := bytes.Cut(part, []byte(")"))
			if !hasHeading(markdown, string(anchor)) {
				t.Errorf("a link leads to #%s, which is no heading", anchor)
			}
		}
	}
}

func hasHeading(markdown []byte, anchor string) bool {
	for line := range strings.Lines(string(markdown)) {
		if heading, ok := strings.CutPrefix(line, "## "); ok && strings.ReplaceAll(strings.ToLower(strings.TrimSpace(heading)), " ", "-") == anchor {
			return true
		}
	}
	return false
}

func TestBooks(t *testing.T) {
	b := example(t)
	b.KnownBy = "the letter at the notary's"
	b.Repositories = append(b.Repositories, runbook.Repository{Name: "ledger", Key: runbook.KeyFile}, runbook.Repository{Name: "pictures", Key: runbook.KeyNone}, runbook.Repository{Name: "tree", Key: runbook.KeyNoBorg})
	text, err := runbook.Markdown(b)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"| attic | `0b6e1f5c-8d1b-4c52-9a57-6a2f0c9d3e11` |", "OFFSET=32768\n", "KEYBITS=256\n", "| ledger | **a key file that is not in the bundle", "| pictures | none: Borg did not encrypt it | none |",
		"How the passphrases are known: the letter at the notary's", "home at home.example.net:51820: the", "KEYSERVER=borg\n", "REPO=photos\n", "lies outside the kill switch",
	} {
		if !strings.Contains(string(text), want) {
			t.Errorf("the runbook does not say %q", want)
		}
	}
	b.VPN, b.Repositories = false, nil
	text, err = runbook.Markdown(b)
	if err != nil || strings.Contains(string(text), "wg-quick up") || !strings.Contains(string(text), "REPO=NAME") {
		t.Errorf("without a VPN of ours: %v", err)
	}
	b.Disks = nil
	if _, err := runbook.Markdown(b); err == nil {
		t.Error("a runbook for no disk")
	}
}
