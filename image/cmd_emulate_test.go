package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"farkeep/shared/hint"
)

func TestEmulateRefuses(t *testing.T) {
	image := filepath.Join(t.TempDir(), "sd.img")
	if err := os.WriteFile(image, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		args []string
		want string
		code int
	}{
		{"no image named", nil, "hint: farkeep-image emulate --help", hint.ExitUsage},
		{"no such image", []string{"--image", image + ".none"}, "no such file", hint.ExitFailure},
		{"not an image", []string{"--image", image}, "not a Farkeep card image", hint.ExitFailure},
		{"ports without home", []string{"--image", image, "--serve", "22:127.0.0.1:22"}, "hint: name home's WireGuard configuration", hint.ExitUsage},
		{"active low without line", []string{"--image", image, "--relay-active-low"}, "hint: name the line with --relay-line", hint.ExitUsage},
		{"line without relay", []string{"--image", image, "--relay-line", "17", "--no-relay"}, "relay", hint.ExitFailure},
		{"forward", []string{"--image", image, "--forward", "22"}, `--forward "22" is no pair of ports`, hint.ExitUsage},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out, diagnostics bytes.Buffer
			code := run(t.Context(), append([]string{"emulate"}, c.args...), &Env{Stdout: &out, Stderr: &diagnostics, Getenv: os.Getenv})
			if code != c.code || !strings.Contains(diagnostics.String(), c.want) || out.Len() > 0 {
				t.Errorf("exit %d, stderr %q, stdout %q; want exit %d and %q", code, diagnostics.String(), out.String(), c.code, c.want)
			}
		})
	}
}
