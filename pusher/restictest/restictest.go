// Package restictest gives tests real restic repositories, made and changed by the
// restic that is installed. A missing restic fails the test.
package restictest

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Passphrase protects the repositories.
const Passphrase = "correct horse battery staple"

// Repository is a restic repository and the folder that it backs up.
type Repository struct {
	Path   string
	Source string
	cache  string
	seed   uint64
}

// Init makes an empty repository dir/name of the format version "1" or "2", with
// the smallest packs that restic makes, so that there are some.
func Init(t testing.TB, dir, name, version string) *Repository {
	t.Helper()
	if _, err := exec.LookPath("restic"); err != nil {
		t.Fatal("restic is missing: install the Debian package restic")
	}
	r := &Repository{Path: filepath.Join(dir, name), Source: filepath.Join(t.TempDir(), "source"), cache: t.TempDir()}
	if err := os.MkdirAll(r.Source, 0o755); err != nil {
		t.Fatal(err)
	}
	r.Run(t, "init", "--repository-version", version)
	return r
}

// Command is a restic command on the repository, not started.
func (r *Repository) Command(args ...string) *exec.Cmd {
	c := exec.Command("restic", append([]string{"--repo", r.Path, "--cache-dir", r.cache, "--pack-size", "4"}, args...)...)
	c.Env = append(os.Environ(), "RESTIC_PASSWORD="+Passphrase)
	return c
}

// Run runs restic and fails the test unless it succeeds. It returns its output.
func (r *Repository) Run(t testing.TB, args ...string) string {
	t.Helper()
	out, err := r.Command(args...).CombinedOutput()
	if err != nil {
		t.Fatalf("restic %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// Fill writes n new files of size random bytes each below Source. The content
// depends only on how often Fill was called.
func (r *Repository) Fill(t testing.TB, n, size int) {
	t.Helper()
	r.seed++
	random := rand.NewChaCha8([32]byte{byte(r.seed)})
	b := make([]byte, size)
	for i := range n {
		random.Read(b)
		if err := os.WriteFile(filepath.Join(r.Source, fmt.Sprintf("%03d-%04d", r.seed, i)), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// Packs are the paths of all packs below the repository's folder.
func (r *Repository) Packs(t testing.TB) []string {
	t.Helper()
	all, err := filepath.Glob(filepath.Join(r.Path, "data", "*", "*"))
	if err != nil || len(all) == 0 {
		t.Fatalf("%s has no packs: %v", r.Path, err)
	}
	for i := range all {
		all[i], _ = filepath.Rel(r.Path, all[i])
	}
	return all
}

// Verify reads all data of the repository at path, a copy of r that nobody may
// write to, with a restic that has never seen it, and restores its newest snapshot, which must
// have what source has.
func (r *Repository) Verify(t testing.TB, path, source string) {
	t.Helper()
	other := &Repository{Path: path, cache: t.TempDir()}
	other.Run(t, "--no-lock", "check", "--read-data")
	out := t.TempDir()
	other.Run(t, "--no-lock", "restore", "latest", "--target", out)
	if diff, err := exec.Command("diff", "-r", filepath.Join(out, r.Source), source).CombinedOutput(); err != nil {
		t.Fatalf("the restored snapshot differs from its source: %v\n%s", err, diff)
	}
}
