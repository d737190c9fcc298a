package keystore_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"farkeep/keyserver/keystore"
	"farkeep/shared/hint"
	"farkeep/shared/keywire"
	"farkeep/shared/secret"
)

const uuid = "0b6e1f5c-8d1b-4c52-9a57-6a2f0c9d3e11"

func open(t *testing.T) (*keystore.Store, string) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "keys")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	s, err := keystore.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return s, dir
}

func TestAddAndGet(t *testing.T) {
	s, dir := open(t)
	for i, size := range []int{1, 64, keywire.MaxKey} {
		id := strings.Replace(uuid, "0b", []string{"00", "01", "02"}[i], 1)
		want := bytes.Repeat([]byte{0, 0xff, '\n', 'k'}, size/4+1)[:size]
		if err := s.Add(id, secret.New(bytes.Clone(want))); err != nil {
			t.Fatal(err)
		}
		k, err := s.Get(id)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(k.Reveal(), want) {
			t.Errorf("%d bytes: another key came back", size)
		}
		k.Release()
		k.Release()
		if k.Len() != 0 {
			t.Error("a released key has bytes")
		}
		info, err := os.Stat(filepath.Join(dir, keywire.KeyFile(id)))
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("mode %v, %v; want 0600", info.Mode(), err)
		}
	}
	if err := s.Add(uuid, secret.New([]byte("first"))); err != nil {
		t.Fatal(err)
	}
	if err := s.Add(uuid, secret.New([]byte("second"))); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a second key: %v; want fs.ErrExist", err)
	}
	keys, strays, err := s.List()
	if err != nil || len(keys) != 4 || len(strays) != 0 {
		t.Errorf("list: %v, %v, %v", keys, strays, err)
	}
}

func TestRefusals(t *testing.T) {
	s, dir := open(t)
	path := filepath.Join(dir, keywire.KeyFile(uuid))
	for _, tt := range []struct {
		name string
		make func() error
		want string
	}{
		{"none", func() error { return nil }, keystore.ErrNoKey.Error()},
		{"readable by others", func() error { return os.WriteFile(path, []byte("k"), 0o644) }, "mode 0644: others can read the key"},
		{"readable by the group", func() error { return os.WriteFile(path, []byte("k"), 0o640) }, "mode 0640"},
		{"empty", func() error { return os.WriteFile(path, nil, 0o600) }, "is empty"},
		{"too long", func() error { return os.WriteFile(path, make([]byte, keywire.MaxKey+1), 0o600) }, "longer than 8192 bytes"},
		{"a folder", func() error { return os.Mkdir(path, 0o700) }, "not a regular file"},
		{"a link", func() error { return os.Symlink("/etc/passwd", path) }, "too many levels of symbolic links"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := os.RemoveAll(path); err != nil {
				t.Fatal(err)
			}
			if err := tt.make(); err != nil {
				t.Fatal(err)
			}
			k, err := s.Get(uuid)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("got %v; want %q", err, tt.want)
			}
			if k != nil {
				t.Error("a key came with an error")
			}
			if strings.HasPrefix(tt.name, "readable") && !strings.Contains(hint.Of(err), "chmod 600") {
				t.Errorf("no hint: %q", hint.Of(err))
			}
		})
	}
	for _, bad := range []string{"", "../../etc/passwd", strings.ToUpper(uuid), uuid + "x"} {
		if _, err := s.Get(bad); err == nil {
			t.Errorf("Get(%q) gave a key", bad)
		}
		if err := s.Add(bad, secret.New([]byte("k"))); err == nil {
			t.Errorf("Add(%q) took a key", bad)
		}
	}
	for _, size := range []int{0, keywire.MaxKey + 1} {
		if err := s.Add(strings.Replace(uuid, "0b", "0c", 1), secret.New(make([]byte, size))); err == nil {
			t.Errorf("a key of %d bytes was taken", size)
		}
	}
}

func TestOpenRefusesALooseFolder(t *testing.T) {
	_, dir := open(t)
	if err := os.Chmod(dir, 0o750); err != nil {
		t.Fatal(err)
	}
	if _, err := keystore.Open(dir); err == nil || !strings.Contains(hint.Of(err), "chmod 700") {
		t.Errorf("mode 0750: %v, hint %q", err, hint.Of(err))
	}
	if _, err := keystore.Open(filepath.Join(dir, "none")); err == nil {
		t.Error("a folder that does not exist was opened")
	}
}

func TestListNamesWhatIsWrong(t *testing.T) {
	s, dir := open(t)
	for name, mode := range map[string]os.FileMode{keywire.KeyFile(uuid): 0o644, "notes.txt": 0o600, ".hidden": 0o600} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("x"), mode); err != nil {
			t.Fatal(err)
		}
	}
	keys, strays, err := s.List()
	if err != nil || len(keys) != 1 || keys[0].Err == nil || len(strays) != 2 {
		t.Errorf("list: %+v, %v, %v", keys, strays, err)
	}
}

func TestKeysLieInLockedMemory(t *testing.T) {
	s, _ := open(t)
	if err := s.Add(uuid, secret.New([]byte("key"))); err != nil {
		t.Fatal(err)
	}
	before := lockedKiB(t)
	k, err := s.Get(uuid)
	if err != nil {
		t.Fatal(err)
	}
	if during := lockedKiB(t); during == before {
		t.Errorf("VmLck is %s kB with a key in memory as without", during)
	}
	k.Release()
	if after := lockedKiB(t); after != before {
		t.Errorf("VmLck is %s kB after the release; it was %s", after, before)
	}
	if err := keystore.CanLock(); err != nil {
		t.Error(err)
	}
}

func lockedKiB(t *testing.T) string {
	t.Helper()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, found := strings.Cut(string(status), "VmLck:")
	if !found {
		t.Fatal("/proc/self/status has no VmLck")
	}
	return strings.Fields(rest)[0]
}
