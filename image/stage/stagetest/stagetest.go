// Package stagetest builds the programs for tests that put them on a stage.
package stagetest

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"
)

// Programs builds the four programs, as the Makefile does, into a folder of the
// test and returns it.
func Programs(t *testing.T) string {
	t.Helper()
	bin := t.TempDir()
	for _, p := range []struct{ output, arch, path string }{
		{"farkeep-image", runtime.GOARCH, "farkeep/image"},
		{"farkeep-keyserver", runtime.GOARCH, "farkeep/keyserver"},
		{"farkeep-pusher", runtime.GOARCH, "farkeep/pusher"},
		{"farkeep-appliance-arm64", "arm64", "farkeep/appliance"},
	} {
		args := []string{"build", "-trimpath", "-o", filepath.Join(bin, p.output)}
		if p.output == "farkeep-appliance-arm64" {
			args = append(args, "-ldflags=-s -w")
		}
		cmd := exec.CommandContext(t.Context(), "go", append(args, p.path)...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+p.arch)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("build %s: %v\n%s", p.output, err, out)
		}
	}
	return bin
}
