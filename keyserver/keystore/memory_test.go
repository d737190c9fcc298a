package keystore_test

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"farkeep/keyserver/keystore"
	"farkeep/keyserver/seal"
	"farkeep/shared/secret"
)

// TestKeyInMemory looks through this process's own memory while it holds a key:
// every copy lies in pages that are locked (lo) and not dumped (dd), and there is
// no other; when the key is released there is none.
func TestKeyInMemory(t *testing.T) {
	for _, how := range []string{"in clear", "sealed"} {
		t.Run(how, func(t *testing.T) {
			s, dir := open(t)
			// Another process makes the key, so that this one never had it otherwise.
			cmd := exec.Command(os.Args[0], "-test.run", "^$")
			cmd.Env = append(os.Environ(), "FARKEEP_STORE="+dir, "FARKEEP_HOW="+how)
			cmd.Stderr = os.Stderr
			out, err := cmd.Output()
			if err != nil || len(out) <= 128 {
				t.Fatalf("make a key: %d bytes, %v", len(out), err)
			}
			masked, mask := out[:64], out[64:128]
			id, err := seal.ParseIdentity(secret.New(out[128:]))
			if err != nil {
				t.Fatal(err)
			}
			if err := s.Use(id); err != nil {
				t.Fatal(err)
			}
			k, err := s.Get(uuid)
			if err != nil {
				t.Fatal(err)
			}
			found := search(t, masked, mask)
			for _, at := range found {
				if !at.locked || !at.undumped {
					t.Errorf("a copy lies in %s: locked %v, kept out of core dumps %v", at.mapping, at.locked, at.undumped)
				}
			}
			if len(found) != 1 {
				t.Errorf("%d copies of the key while it is used; want one", len(found))
			}
			k.Release()
			if left := search(t, masked, mask); len(left) != 0 {
				t.Errorf("after its release the key is still at %+v", left)
			}
		})
	}
}

// TestMain makes a key for TestKeyInMemory where it is asked to, and says it
// masked, with the mask, and the identity that opens the store.
func TestMain(m *testing.M) {
	dir := os.Getenv("FARKEEP_STORE")
	if dir == "" {
		os.Exit(m.Run())
	}
	if err := makeKey(dir, os.Getenv("FARKEEP_HOW") == "sealed"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func makeKey(dir string, sealed bool) error {
	s, err := keystore.Open(dir)
	if err != nil {
		return err
	}
	text, recipient, err := seal.New()
	if err != nil {
		return err
	}
	if sealed {
		if err := os.WriteFile(filepath.Join(dir, "recipients.txt"), []byte(recipient), 0o600); err != nil {
			return err
		}
	}
	key, mask := make([]byte, 64), make([]byte, 64)
	rand.Read(key)
	rand.Read(mask)
	if err := s.Add(uuid, secret.New(key)); err != nil {
		return err
	}
	for i := range key {
		key[i] ^= mask[i]
	}
	_, err = os.Stdout.Write(slices.Concat(key, mask, text.Reveal()))
	return err
}

type place struct {
	mapping          string
	locked, undumped bool
}

// search finds the first 16 bytes of a masked key in this process's memory.
func search(t *testing.T, masked, mask []byte) (found []place) {
	t.Helper()
	smaps, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	mem, err := os.Open("/proc/self/mem")
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	var at place
	var from, to int64
	buf := make([]byte, 1<<20)
	lines := bufio.NewScanner(bytes.NewReader(smaps))
	for lines.Scan() {
		line := lines.Text()
		var low, high int64
		if n, _ := fmt.Sscanf(line, "%x-%x ", &low, &high); n == 2 {
			from, to, at = low, high, place{mapping: line}
			continue
		}
		flags, ok := strings.CutPrefix(line, "VmFlags: ")
		if !ok || !strings.Contains(flags, "rd") || strings.Contains(at.mapping, "[v") {
			continue
		}
		at.locked, at.undumped = strings.Contains(flags+" ", " lo "), strings.Contains(flags+" ", " dd ")
		for pos := from; pos < to; pos += int64(len(buf)) - 15 {
			n, err := mem.ReadAt(buf[:min(int64(len(buf)), to-pos)], pos)
			if err != nil {
				break // unmapped meanwhile, by the garbage collector
			}
			for i := 0; i+16 <= n; i++ {
				next := bytes.IndexByte(buf[i:n-15], masked[0]^mask[0])
				if next < 0 {
					break
				}
				if i += next; matches(buf[i:], masked, mask) {
					found = append(found, at)
				}
			}
		}
	}
	clear(buf)
	return found
}

func matches(b, masked, mask []byte) bool {
	for i := range 16 {
		if b[i]^mask[i] != masked[i] {
			return false
		}
	}
	return true
}
