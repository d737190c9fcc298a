package plainfile_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"farkeep/shared/plainfile"
)

func TestRead(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	if err := errors.Join(
		os.WriteFile(at("empty"), nil, 0o600),
		os.WriteFile(at("full"), []byte("12345678"), 0o600),
		os.WriteFile(at("large"), []byte("123456789"), 0o600),
		os.Mkdir(at("folder"), 0o700),
		os.Symlink(at("full"), at("link")),
		unix.Mkfifo(at("pipe"), 0o600),
	); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"empty": "", "full": "12345678"} {
		if got, err := plainfile.Read(at(name), 8); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v; want %q", name, got, err, want)
		}
	}
	for name, want := range map[string]string{
		"large": "more than 8 bytes", "folder": "not a regular file", "pipe": "not a regular file",
		"link": unix.ELOOP.Error(), "none": unix.ENOENT.Error(),
	} {
		got, err := plainfile.Read(at(name), 8)
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), at(name)) || got != nil {
			t.Errorf("%s: %q, %v; want an error that names the file and says %q", name, got, err, want)
		}
	}
	if _, err := plainfile.Read(at("none"), 8); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a file: %v; want fs.ErrNotExist", err)
	}
}
