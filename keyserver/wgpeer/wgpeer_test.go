package wgpeer

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"farkeep/shared/mountnstest"
	"farkeep/shared/wgtest"

	"github.com/google/go-cmp/cmp"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

const inside = "FARKEEP_TEST_NETNS"

// TestMain runs the tests in a network and mount namespace of their own, where
// they may have an interface.
func TestMain(m *testing.M) {
	if os.Getenv(inside) != "" {
		for _, err := range []error{
			mountnstest.Private(),
			// wg and wgctrl look for sockets in /var/run/wireguard.
			syscall.Mount("run", "/run", "tmpfs", 0, ""),
		} {
			if err != nil {
				fmt.Fprintln(os.Stderr, "prepare the namespaces:", err)
				os.Exit(1)
			}
		}
		os.Exit(m.Run())
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "these tests need root, for a network namespace:", err)
		os.Exit(1)
	}
}

func wg(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("wg", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("wg %v (apt install wireguard-tools): %v: %s", args, err, out)
	}
	return string(out)
}

func newKey(t *testing.T) string {
	t.Helper()
	k, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	return k.PublicKey().String()
}

const conf = `# Home's end.

[Interface]
ListenPort = 51820
PrivateKey = %s

[Peer]
# attic
PublicKey = %s
PresharedKey = %s
AllowedIPs = 10.77.0.2/32

[Peer] # shed, PublicKey = in a comment counts for nothing
publickey=%s # its key
AllowedIPs = 10.77.0.3/32
`

// The real wg(8) loads the file before and after, and shows what runs.
func TestCutAndStrike(t *testing.T) {
	wgtest.Interface(t, "farkeep", 1420)
	private, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	attic, shed := newKey(t), newKey(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "farkeep.conf")
	text := fmt.Sprintf(conf, private, attic, newKey(t), shed)
	write := func(name, text string, mode os.FileMode) {
		if err := os.WriteFile(name, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
	}
	write(path, text, 0o640)
	if err := os.Chown(path, 0, 12); err != nil {
		t.Fatal(err)
	}
	wg(t, "setconf", "farkeep", path)
	if got := strings.Fields(wg(t, "show", "farkeep", "peers")); len(got) != 2 {
		t.Fatalf("peers before: %v", got)
	}

	link := filepath.Join(dir, "link.conf")
	if err := os.Symlink("farkeep.conf", link); err != nil {
		t.Fatal(err)
	}
	for n := range 2 {
		was, err := Cut("farkeep", attic)
		if err != nil || was != (n == 0) {
			t.Errorf("cut, time %d: %v, %v", n, was, err)
		}
		was, err = Strike(link, attic)
		if err != nil || was != (n == 0) {
			t.Errorf("strike, time %d: %v, %v", n, was, err)
		}
	}
	if got := strings.TrimSpace(wg(t, "show", "farkeep", "peers")); got != shed {
		t.Errorf("peers after: %q", got)
	}
	// The same after the next start: setconf takes what is in the file.
	wg(t, "setconf", "farkeep", path)
	if got := strings.TrimSpace(wg(t, "show", "farkeep", "peers")); got != shed {
		t.Errorf("peers after a start: %q", got)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o640 || info.Sys().(*syscall.Stat_t).Gid != 12 {
		t.Errorf("mode and owner: %v, %+v, %v", info.Mode(), info.Sys(), err)
	}
	if l, err := os.Lstat(link); err != nil || l.Mode()&os.ModeSymlink == 0 {
		t.Error("the link was replaced by a file")
	}
	if _, err := Cut("nothing0", attic); !errors.Is(err, ErrNoInterface) {
		t.Errorf("an interface that is not there: %v", err)
	}
	if _, err := Strike(filepath.Join(dir, "none.conf"), attic); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
	if _, err := Strike(dir, attic); err == nil {
		t.Error("a folder is no file")
	}
	if _, err := Strike(path, "nonsense"); err == nil {
		t.Error("no key")
	}
}

func TestWithout(t *testing.T) {
	const a, b = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaA=", "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbA="
	for _, tt := range []struct{ name, text, want string }{
		{"in the middle", "[Interface]\nX = 1\n\n[Peer]\nPublicKey = " + a + "\n\n[Peer]\nPublicKey = " + b + "\n", "[Interface]\nX = 1\n\n[Peer]\nPublicKey = " + b + "\n"},
		{"no newline at the end", "[Interface]\n[Peer]\nPublicKey=" + a, "[Interface]\n"},
		{"windows", "[Interface]\r\n[Peer]\r\nPublicKey = " + a + "\r\n[Peer]\r\nPublicKey = " + b + "\r\n", "[Interface]\r\n[Peer]\r\nPublicKey = " + b + "\r\n"},
		{"twice", "[Peer]\nPublicKey = " + a + "\n[Peer]\nPublicKey = " + b + "\n[Peer]\nPublicKey = " + a + "\n", "[Peer]\nPublicKey = " + b + "\n"},
		{"in a comment", "[Peer]\n# PublicKey = " + a + "\nPublicKey = " + b + "\n", ""},
		{"in the interface", "[Interface]\nPublicKey = " + a + "\n", ""},
		{"empty", "", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, found := without([]byte(tt.text), a)
			want, has := tt.want, tt.want != ""
			if !has {
				want = tt.text
			}
			if diff := cmp.Diff(want, string(got)); diff != "" || found != has {
				t.Errorf("found %v; -want +got:\n%s", found, diff)
			}
		})
	}
}

func FuzzWithout(f *testing.F) {
	const key = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaA="
	f.Add([]byte("[Interface]\n[Peer]\nPublicKey = " + key + "\n"))
	f.Add([]byte("[Peer]#\npublickey=" + key + "#\n\r\n[peer"))
	f.Fuzz(func(t *testing.T, text []byte) {
		rest, found := without(text, key)
		if again, still := without(rest, key); still || !bytes.Equal(again, rest) {
			t.Fatalf("it is still in %q", rest)
		}
		if !found && !bytes.Equal(rest, text) {
			t.Fatal("something else was changed")
		}
	})
}
