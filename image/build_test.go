package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestBuildCommandRefuses(t *testing.T) {
	dir := t.TempDir()
	text := filepath.Join(dir, "text")
	if err := os.WriteFile(text, []byte("not a program"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		args   []string
		mirror string
		want   string
	}{
		{"no appliance beside this program", nil, "http://mirror.example/debian", "hint: build it with: CGO_ENABLED=0"},
		{"not a program", []string{"--appliance", text}, "http://mirror.example/debian", "not an ELF program"},
		{"unknown argument", []string{"extra"}, "", "unknown command"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var out, errs bytes.Buffer
			env := &Env{Stdin: strings.NewReader(""), Stdout: &out, Stderr: &errs, Getenv: func(name string) string {
				if name == "FARKEEP_APT_MIRROR" {
					return tt.mirror
				}
				return ""
			}}
			image := filepath.Join(dir, "farkeep.img")
			args := append([]string{"build", "--cache", filepath.Join(dir, "cache"), "--out", image}, tt.args...)
			if code := run(context.Background(), args, env); code == 0 || !strings.Contains(errs.String(), tt.want) || out.Len() != 0 {
				t.Errorf("exit %d, stdout %q, stderr %q does not say %q", code, out.String(), errs.String(), tt.want)
			}
			if _, err := os.Stat(image); err == nil {
				t.Error("an image was left behind")
			}
		})
	}
}

// Every command shows how it is used.
func TestEveryCommandHasAnExample(t *testing.T) {
	root := newRootCmd(&Env{Stdin: strings.NewReader(""), Stdout: new(bytes.Buffer), Stderr: new(bytes.Buffer), Getenv: os.Getenv})
	for _, c := range root.Commands() {
		if c.Name() == "help" || c.Name() == "completion" {
			continue
		}
		if !strings.Contains(c.Example, c.CommandPath()) && !c.HasSubCommands() {
			t.Errorf("%s has no example of itself", c.CommandPath())
		}
	}
}
