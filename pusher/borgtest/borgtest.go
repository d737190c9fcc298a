// Package borgtest gives tests real Borg repositories, made and changed by the
// borg that is installed. A missing borg fails the test.
package borgtest

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Passphrase protects the encrypted repositories.
const Passphrase = "correct horse battery staple"

// Repository is a Borg repository and the folder that it backs up.
type Repository struct {
	Path   string
	Source string
	env    []string
	seed   uint64
}

// Init makes an empty repository dir/name. encryption is borg's word: "none",
// "repokey".
func Init(t testing.TB, dir, name, encryption string) *Repository {
	t.Helper()
	if _, err := exec.LookPath("borg"); err != nil {
		t.Fatal("borg is missing: install the Debian package borgbackup")
	}
	r := &Repository{Path: filepath.Join(dir, name), Source: filepath.Join(t.TempDir(), "source")}
	if err := os.MkdirAll(r.Source, 0o755); err != nil {
		t.Fatal(err)
	}
	r.env = Env(t.TempDir())
	r.Run(t, "init", "--encryption="+encryption, r.Path)
	return r
}

// Env is the environment for a borg whose caches and keys live in base.
func Env(base string) []string {
	return append(os.Environ(),
		"BORG_BASE_DIR="+base,
		"BORG_PASSPHRASE="+Passphrase,
		"BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK=yes",
		"BORG_RELOCATED_REPO_ACCESS_IS_OK=yes",
		"LANG=C.UTF-8",
	)
}

// Command is a borg command with the repository's environment, not started.
func (r *Repository) Command(args ...string) *exec.Cmd {
	c := exec.Command("borg", args...)
	c.Env = r.env
	return c
}

// Run runs borg and fails the test unless it succeeds. It returns its output.
func (r *Repository) Run(t testing.TB, args ...string) string {
	t.Helper()
	out, err := r.Command(args...).CombinedOutput()
	if err != nil {
		t.Fatalf("borg %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// Fill writes n new files of size random bytes each below Source. The content
// depends only on how often Fill was called.
func (r *Repository) Fill(t testing.TB, n, size int) {
	t.Helper()
	r.seed++
	var key [32]byte
	key[0] = byte(r.seed)
	random := rand.NewChaCha8(key)
	b := make([]byte, size)
	for i := range n {
		random.Read(b)
		name := filepath.Join(r.Source, fmt.Sprintf("%03d-%04d", r.seed, i))
		if err := os.WriteFile(name, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// Create makes an archive of Source.
func (r *Repository) Create(t testing.TB, archive string) {
	t.Helper()
	r.Run(t, "create", r.Path+"::"+archive, r.Source)
}

// Set changes a setting in the repository's config, as "borg config" does, but at once.
func (r *Repository) Set(t testing.TB, key, value string) {
	t.Helper()
	path := filepath.Join(r.Path, "config")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(b), "\n")
	for i, line := range lines {
		if strings.HasPrefix(line, key+" = ") {
			lines[i] = key + " = " + value
			if err := os.WriteFile(path, []byte(strings.Join(lines, "\n")), 0o600); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	t.Fatalf("%s has no setting %s", path, key)
}

// Verify checks the repository at path, a copy of r, with a borg that has never
// seen it: check --verify-data, then each archive of want extracted and compared
// with the folder that it names: Source, or a copy of it from when the archive
// was made.
func (r *Repository) Verify(t testing.TB, path string, want map[string]string) {
	t.Helper()
	base := t.TempDir()
	run := func(dir string, args ...string) {
		t.Helper()
		c := exec.Command("borg", args...)
		c.Dir, c.Env = dir, Env(base)
		if out, err := c.CombinedOutput(); err != nil {
			t.Fatalf("borg %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	run("", "check", "--verify-data", path)
	for archive, source := range want {
		out := t.TempDir()
		run(out, "extract", path+"::"+archive)
		diff, err := exec.Command("diff", "-r", filepath.Join(out, r.Source), source).CombinedOutput()
		if err != nil || len(bytes.TrimSpace(diff)) > 0 {
			t.Fatalf("archive %s differs from its source: %v\n%s", archive, err, diff)
		}
	}
}
