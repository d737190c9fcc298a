package status_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"farkeep/appliance/status"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func TestRoundTrip(t *testing.T) {
	path := filepath.Join(t.TempDir(), "status.json")
	want := status.Disk{State: status.DiskMounted, Power: true, Since: time.Date(2026, 11, 5, 3, 0, 0, 0, time.UTC), FreeBytes: 1 << 40}
	if err := status.Write(path, want); err != nil {
		t.Fatal(err)
	}
	got, err := status.Read[status.Disk](path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(&want, got); diff != "" {
		t.Error(diff)
	}
}

func TestMissingMeansUnknown(t *testing.T) {
	got, err := status.Read[status.Mail](filepath.Join(t.TempDir(), "mail", "status.json"))
	if got != nil || err != nil {
		t.Errorf("got %v, %v", got, err)
	}
}

// A part that was taken over may put anything in place of its status file.
func TestHostileFiles(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	good := at("good")
	if err := status.Write(good, status.Mail{}); err != nil {
		t.Fatal(err)
	}
	for name, err := range map[string]error{
		"fifo":   unix.Mkfifo(at("fifo"), 0o644),
		"link":   os.Symlink(good, at("link")),
		"folder": os.Mkdir(at("folder"), 0o755),
		"huge":   os.WriteFile(at("huge"), []byte(strings.Repeat(" ", status.MaxSize+2)), 0o644),
		"broken": os.WriteFile(at("broken"), []byte(`{"Queued":`), 0o644),
		"typed":  os.WriteFile(at("typed"), []byte(`{"Queued":"many"}`), 0o644),
	} {
		if err != nil {
			t.Fatal(err)
		}
		if got, err := status.Read[status.Mail](at(name)); err == nil {
			t.Errorf("%s: accepted as %+v", name, got)
		}
	}
}

func TestTooLargeToWrite(t *testing.T) {
	path := filepath.Join(t.TempDir(), "status.json")
	if err := status.Write(path, status.Mail{LastError: strings.Repeat("x", status.MaxSize)}); err == nil {
		t.Error("written")
	}
	if _, err := os.Stat(path); err == nil {
		t.Error("something was left behind")
	}
}
