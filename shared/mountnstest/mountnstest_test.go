package mountnstest_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"farkeep/shared/mountnstest"

	"golang.org/x/sys/unix"
)

const inside = "FARKEEP_TEST_MOUNTNS"

// A mount of another test is gone inside, and stays where it was made.
func TestPrivate(t *testing.T) {
	if of := os.Getenv(inside); of != "" {
		if err := mountnstest.Private(); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(filepath.Join(of, "here")); !os.IsNotExist(err) {
			t.Errorf("another test's mount is still there: %v", err)
		}
		return
	}
	dir := filepath.Join(t.TempDir(), "a folder")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for range 2 { // one upon the other
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
			t.Fatalf("mount, as root: %v", err)
		}
		defer unix.Unmount(dir, unix.MNT_DETACH)
		if err := os.WriteFile(filepath.Join(dir, "here"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^TestPrivate$")
	cmd.Env = append(os.Environ(), inside+"="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "PASS") {
		t.Fatalf("in a mount namespace: %v\n%s", err, out)
	}
	if _, err := os.Stat(filepath.Join(dir, "here")); err != nil {
		t.Errorf("the machine lost its mount: %v", err)
	}
}
