package outbox

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func TestPutListReadPrune(t *testing.T) {
	dir := t.TempDir()
	first, second := ID(1, "heartbeat-stale", 7), ID(2, "disk-full", 7)
	for _, id := range []string{second, first} {
		if err := Put(dir, id, []byte("mail "+id)); err != nil {
			t.Fatal(err)
		}
	}
	if err := Put(dir, first, []byte("another")); err != nil {
		t.Error("again: ", err)
	}
	if got, err := Read(dir, first); err != nil || string(got) != "mail "+first {
		t.Errorf("%q, %v; want the mail that was put first", got, err)
	}
	for _, name := range []string{".new-1", "x.eml", "00000001-x-00000001", first + ".eml.bak"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got, err := List(dir)
	if diff := cmp.Diff([]string{first, second}, got); err != nil || diff != "" {
		t.Errorf("%v\n%s", err, diff)
	}
	if err := Prune(dir, []string{first, "../../etc/passwd", first}); err != nil {
		t.Error(err)
	}
	if got, _ := List(dir); !slices.Equal(got, []string{second}) {
		t.Errorf("after pruning: %v", got)
	}
}

func TestBounds(t *testing.T) {
	dir := t.TempDir()
	if err := Put(dir, ID(1, "x", 1), make([]byte, MaxSize+1)); err == nil {
		t.Error("a mail that is too large was taken")
	}
	for _, id := range []string{"", "../x", "1-x-1", "00000001-X-00000001", "00000001--00000001", strings.Repeat("0", 300)} {
		if Put(dir, id, nil) == nil {
			t.Errorf("id %q was taken", id)
		}
		if _, err := Read(dir, id); err == nil {
			t.Errorf("id %q was read", id)
		}
	}
	for i := range MaxMails {
		if err := os.WriteFile(filepath.Join(dir, ID(uint64(i), "x", 1)+suffix), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := Put(dir, ID(MaxMails, "x", 1), nil); !errors.Is(err, ErrFull) {
		t.Errorf("got %v; want ErrFull", err)
	}
}

func TestWhatTheOtherSideMayPutThere(t *testing.T) {
	dir := t.TempDir()
	pipe, link, folder, huge := ID(1, "x", 1), ID(2, "x", 1), ID(3, "x", 1), ID(4, "x", 1)
	path := func(id string) string { return filepath.Join(dir, id+suffix) }
	if err := errors.Join(unix.Mkfifo(path(pipe), 0o644), os.Symlink("/etc/passwd", path(link)), os.Mkdir(path(folder), 0o755),
		os.WriteFile(path(huge), make([]byte, MaxSize+1), 0o644)); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{pipe, link, folder, huge} {
		if _, err := Read(dir, id); err == nil {
			t.Errorf("%s was read", id)
		}
	}
}

func TestSent(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sent.json")
	if got, err := ReadSent(path); got != nil || err != nil {
		t.Errorf("before the first: %v, %v", got, err)
	}
	var ids []string
	for i := range maxSent + 3 {
		ids = append(ids, ID(uint64(i), "x", 1))
	}
	if err := WriteSent(path, ids); err != nil {
		t.Fatal(err)
	}
	if got, err := ReadSent(path); err != nil || !slices.Equal(got, ids[3:]) {
		t.Errorf("%d ids, %v", len(got), err)
	}
	if err := WriteSent(path, nil); err != nil {
		t.Fatal(err)
	}
	if got, err := ReadSent(path); err != nil || len(got) != 0 {
		t.Errorf("%v, %v", got, err)
	}
}

func FuzzSent(f *testing.F) {
	f.Add([]byte(`["00000001-heartbeat-stale-00000007"]`))
	f.Add([]byte(`["../../etc/passwd"]`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, data []byte) {
		ids, err := parseSent(data)
		if err != nil {
			return
		}
		for _, id := range ids {
			if filepath.Base(id) != id || strings.Contains(id, ".") {
				t.Errorf("%q is a path", id)
			}
		}
	})
}
