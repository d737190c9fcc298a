package luksdisk

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"farkeep/image/luksfile"
	"farkeep/image/siteinit"
	"farkeep/shared/hint"
	"farkeep/shared/secret"
)

func keyFile(t *testing.T, path string) secret.Bytes {
	t.Helper()
	key, err := readKey(path)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// opens says whether cryptsetup opens the disk with the key in a file.
func opens(t *testing.T, disk, keyFile string) bool {
	t.Helper()
	err := exec.Command("cryptsetup", "open", "--test-passphrase", "--key-file", keyFile, disk).Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("cryptsetup (Debian package cryptsetup-bin): %v", err)
	}
	return err == nil
}

// data is a hash of everything behind the header.
func data(t *testing.T, disk string) string {
	t.Helper()
	f, err := os.Open(disk)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(f, luksfile.DataOffset, 1<<40)); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

func rekeyRequest(t *testing.T, dir *siteinit.Dir, appliance, disk string, p *Prepared) RekeyRequest {
	t.Helper()
	return RekeyRequest{Request: request(t, dir, appliance, disk), Recovery: keyFile(t, p.RecoveryKey), Slot: -1}
}

// rekeyed checks what a finished change must have left; old is a file with the key
// that was to go.
func rekeyed(t *testing.T, dir *siteinit.Dir, appliance, disk, old string, p *Prepared, got *Rekeyed) {
	t.Helper()
	if opens(t, disk, old) {
		t.Error("the old key opens the disk")
	}
	for _, path := range append(slices.Clone(p.KeyFiles), p.RecoveryKey) {
		if !opens(t, disk, path) {
			t.Errorf("%s does not open the disk", path)
		}
		if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 || info.Size() != 64 {
			t.Errorf("%s: %v, %v", path, info, err)
		}
	}
	h, err := luksfile.Header(disk)
	if err != nil || len(h.Slots) != 2 || h.Damage != "" {
		t.Fatalf("%v, %+v", err, h)
	}
	theirs := filepath.Join(t.TempDir(), "backup")
	tool(t, "cryptsetup-bin", "cryptsetup", "luksHeaderBackup", "--header-backup-file", theirs, disk)
	ours, _ := os.ReadFile(got.Backup)
	if want, err := os.ReadFile(theirs); err != nil || !bytes.Equal(ours, want) {
		t.Errorf("the backup is not what luksHeaderBackup makes (%v)", err)
	}
	again, err := siteinit.Open(dir.Path())
	if err != nil {
		t.Fatal(err)
	}
	if a, _ := again.Site().Appliance(appliance); a.LUKSHeader != got.Fingerprint || got.Fingerprint != fmt.Sprintf("%x", sha256.Sum256(ours)) {
		t.Errorf("site.toml has %q, the backup's SHA-256 is %x", a.LUKSHeader, sha256.Sum256(ours))
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(p.KeyFiles[0]), "*"+NewSuffix)); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
}

// TestRekey: another key for the key servers, with real cryptsetup; the data and
// the recovery key's slot stay as they are.
func TestRekey(t *testing.T) {
	dir := newSite(t)
	for _, appliance := range []string{"attic", "cellar"} { // adiantum, aes-xts
		disk := newDisk(t, 64<<20)
		p, err := Prepare(t.Context(), request(t, dir, appliance, disk))
		if err != nil {
			t.Fatal(err)
		}
		if a, _ := dir.Site().Appliance(appliance); a.LUKSHeader != p.Fingerprint {
			t.Errorf("after prepare site.toml has the header %q, not %s", a.LUKSHeader, p.Fingerprint)
		}
		before := data(t, disk)
		got, err := Rekey(t.Context(), rekeyRequest(t, dir, appliance, disk, p))
		if err != nil {
			t.Fatal(err)
		}
		rekeyed(t, dir, appliance, disk, p.KeyFiles[0]+OldSuffix, p, got)
		if data(t, disk) != before {
			t.Error("the data changed")
		}
		if !slices.Equal(got.Killed, []int{0}) || len(got.OtherSlots) != 0 || got.Slot != 2 || !slices.Equal(got.OldKeys, []string{p.KeyFiles[0] + OldSuffix}) {
			t.Errorf("%+v", got)
		}
		// As long as the old key lies about, it may be needed: no third one.
		if _, err := Rekey(t.Context(), rekeyRequest(t, dir, appliance, disk, p)); hint.Code(err) != hint.ExitUsage || !strings.Contains(err.Error(), OldSuffix) {
			t.Errorf("with an old key left: %v", err)
		}
		// Once more, on a laptop whose keys were carried away.
		old := filepath.Join(t.TempDir(), "carried")
		if err := errors.Join(os.Remove(got.OldKeys[0]), os.Rename(p.KeyFiles[0], old)); err != nil {
			t.Fatal(err)
		}
		if got, err = Rekey(t.Context(), rekeyRequest(t, dir, appliance, disk, p)); err != nil {
			t.Fatal(err)
		}
		rekeyed(t, dir, appliance, disk, old, p, got)
		if !slices.Equal(got.Killed, []int{2}) || len(got.OldKeys) != 0 {
			t.Errorf("the second time: %+v", got)
		}
	}
}

// A disk that was adopted keeps its other slots, unless one is named.
func TestRekeyOfAnAdoptedDisk(t *testing.T) {
	dir := newSite(t)
	disk, own := ownDisk(t, true)
	p, err := Adopt(t.Context(), request(t, dir, "cellar", disk), own)
	if err != nil {
		t.Fatal(err)
	}
	r := rekeyRequest(t, dir, "cellar", disk, p)
	got, err := Rekey(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(got.OtherSlots, p.OtherSlots) || len(got.Killed) != 1 {
		t.Errorf("adopted with the slots %v, now %+v", p.OtherSlots, got)
	}
	if err := luksfile.TestKey(t.Context(), disk, own); err != nil {
		t.Errorf("the owner's key: %v", err)
	}
	// Without the old key nobody can tell which slot is meant.
	if err := errors.Join(os.Remove(got.OldKeys[0]), os.Remove(p.KeyFiles[0])); err != nil {
		t.Fatal(err)
	}
	if _, err := Rekey(t.Context(), r); err == nil || !strings.Contains(err.Error(), "which one goes") {
		t.Errorf("two slots that may be meant: %v", err)
	}
	r.Slot = got.Slot
	again, err := Rekey(t.Context(), r)
	if err != nil || !slices.Equal(again.Killed, []int{got.Slot}) || !slices.Equal(again.OtherSlots, p.OtherSlots) {
		t.Errorf("%v, %+v", err, again)
	}
}

func TestRekeyRefuses(t *testing.T) {
	dir := newSite(t)
	disk, other := newDisk(t, 64<<20), newDisk(t, 64<<20)
	p, err := Prepare(t.Context(), request(t, dir, "attic", disk))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Prepare(t.Context(), request(t, dir, "cellar", other)); err != nil {
		t.Fatal(err)
	}
	header := func() string {
		f, err := os.Open(disk)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		b := make([]byte, luksfile.DataOffset)
		f.ReadAt(b, 0)
		return string(b)
	}
	before := header()
	for _, tc := range []struct {
		name   string
		change func(r *RekeyRequest)
		want   string
	}{
		{"another appliance's disk", func(r *RekeyRequest) { r.Path = other }, "is the LUKS volume"},
		{"not the recovery key", func(r *RekeyRequest) { r.Recovery = secret.New([]byte("guess")) }, "the recovery key does not open"},
		{"the recovery key's slot", func(r *RekeyRequest) { r.Slot = 1 }, "never touches"},
		{"a file that is no disk", func(r *RekeyRequest) { r.Path = newDisk(t, 64<<20) }, "LUKS"},
		{"nobody", func(r *RekeyRequest) { r.Appliance = "shed" }, "no appliance"},
		{"not agreed to", func(r *RekeyRequest) { r.Confirm = func(*Target) error { return errors.New("no thanks") } }, "no thanks"},
	} {
		r := rekeyRequest(t, dir, "attic", disk, p)
		tc.change(&r)
		if _, err := Rekey(t.Context(), r); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v", tc.name, err)
		}
		if header() != before {
			t.Fatalf("%s: the header was changed", tc.name)
		}
	}
}

// What a process of TestRekeyCut is told.
const (
	rekeyDir  = "FARKEEP_TEST_REKEY_SITE"
	rekeyDisk = "FARKEEP_TEST_REKEY_DISK"
	rekeyKey  = "FARKEEP_TEST_REKEY_KEY"
)

// TestRekeyProcess is no test: it is the process that TestRekeyCut kills.
func TestRekeyProcess(t *testing.T) {
	path := os.Getenv(rekeyDir)
	if path == "" {
		return
	}
	dir, err := siteinit.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	r := RekeyRequest{Request: request(t, dir, "cellar", os.Getenv(rekeyDisk)), Recovery: keyFile(t, os.Getenv(rekeyKey)), Slot: -1}
	r.Progress = func(format string, args ...any) { fmt.Printf(format+"\n", args...) }
	if _, err := Rekey(t.Context(), r); err != nil {
		t.Fatal(err)
	}
}

// TestRekeyCut: a change that is killed, between its steps or in the middle of
// one, leaves a disk that the recovery key opens, and a key in the folders; and
// the next run finishes it.
func TestRekeyCut(t *testing.T) {
	random := rand.New(rand.NewPCG(4, 4))
	dir := newSite(t)
	disk := newDisk(t, 64<<20)
	p, err := Prepare(t.Context(), request(t, dir, "cellar", disk))
	if err != nil {
		t.Fatal(err)
	}
	key := p.KeyFiles[0]
	for cut := range 10 {
		old := filepath.Join(t.TempDir(), "old")
		text, err := os.ReadFile(key)
		if err := errors.Join(err, os.WriteFile(old, text, 0o600)); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cmd := exec.CommandContext(ctx, os.Args[0], "-test.run=^TestRekeyProcess$")
		cmd.Env = append(os.Environ(), rekeyDir+"="+dir.Path(), rekeyDisk+"="+disk, rekeyKey+"="+p.RecoveryKey)
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		out, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		// As a step begins, and for half of them a moment later, in its middle.
		for range 1 + cut%7 {
			var line [64]byte
			if _, err := out.Read(line[:]); err != nil {
				break
			}
		}
		if cut >= 7 {
			time.Sleep(time.Duration(random.IntN(60)) * time.Millisecond)
		}
		syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // cryptsetup with it
		io.Copy(io.Discard, out)
		cmd.Wait()
		cancel()

		if !opens(t, disk, p.RecoveryKey) {
			t.Fatalf("cut %d: the recovery key does not open the disk", cut)
		}
		if !opens(t, disk, key) && !(exists(key+NewSuffix) && opens(t, disk, key+NewSuffix)) {
			t.Fatalf("cut %d: no key in the key server's folder opens the disk", cut)
		}
		if exists(key+NewSuffix) || opens(t, disk, old) { // else it was through already
			got, err := Rekey(t.Context(), rekeyRequest(t, dir, "cellar", disk, p))
			if err != nil {
				t.Fatalf("cut %d: %v", cut, err)
			}
			rekeyed(t, dir, "cellar", disk, old, p, got)
		}
		if err := os.Remove(key + OldSuffix); err != nil {
			t.Fatalf("cut %d: %v", cut, err)
		}
	}
}
