package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"farkeep/shared/generations"
	"farkeep/shared/generations/generationstest"
	"farkeep/shared/hint"
)

// TestDiskCopyAndSalvage: the commands as a person runs them, with their exit codes.
func TestDiskCopyAndSalvage(t *testing.T) {
	base := t.TempDir()
	from, whole, saved := filepath.Join(base, "old"), filepath.Join(base, "whole"), filepath.Join(base, "saved")
	if err := errors.Join(os.Mkdir(from, 0o711), os.Mkdir(whole, 0o711), os.Mkdir(saved, 0o711)); err != nil {
		t.Fatal(err)
	}
	s, err := generations.Open(from, generations.Options{Reserve: 1})
	if err != nil {
		t.Fatal(err)
	}
	name := generationstest.Push(t, s, "photos", generationstest.Tree{"a": "one", "b": "two"})
	s.Close()

	code, stdout, stderr := command(t, "disk", "copy", from, whole)
	if code != 0 || stdout != "" || !strings.Contains(stderr, "1 generations are on the new disk") {
		t.Fatalf("exit %d, %q, %s", code, stdout, stderr)
	}
	got, err := os.ReadFile(filepath.Join(whole, "generations/photos", name, "files/b"))
	if err != nil || string(got) != "two" {
		t.Errorf("%q, %v", got, err)
	}

	if err := os.WriteFile(filepath.Join(from, "generations/photos", name, "files/b"), []byte("tvo"), 0); err != nil {
		t.Fatal(err)
	}
	code, _, stderr = command(t, "disk", "copy", from, saved)
	if code != hint.ExitFailure || !strings.Contains(stderr, "its hash is") || !strings.Contains(stderr, "disk salvage") {
		t.Errorf("exit %d, %s", code, stderr)
	}
	code, stdout, stderr = command(t, "disk", "salvage", from, saved)
	if code != hint.ExitPartial || !strings.Contains(stdout, `"b": its hash is`) || !strings.Contains(stderr, "saved-lost.txt") {
		t.Errorf("exit %d, %s, %s", code, stdout, stderr)
	}
	list, err := os.ReadFile(saved + "-lost.txt")
	if err != nil || string(list) != stdout {
		t.Errorf("%s, %v", list, err)
	}
	if _, err := os.Stat(filepath.Join(saved, "generations/photos", name, "files/a")); err != nil {
		t.Error(err)
	}
	if code, _, stderr := command(t, "disk", "copy", from); code != hint.ExitUsage || !strings.Contains(stderr, "arg") {
		t.Errorf("exit %d, %s", code, stderr)
	}
}
