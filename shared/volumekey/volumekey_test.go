package volumekey_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"farkeep/shared/luksheader"
	"farkeep/shared/secret"
	"farkeep/shared/volumekey"
)

func cryptsetup(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("cryptsetup", args...).CombinedOutput(); err != nil {
		t.Fatalf("cryptsetup %v (Debian package cryptsetup-bin): %v\n%s", args, err, out)
	}
}

// TestOpen compares with the volume key that cryptsetup itself reads, from each of two slots
// and from a backup of the header alone.
func TestOpen(t *testing.T) {
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	write := func(name string, b []byte) {
		if err := os.WriteFile(in(name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	first, second := bytes.Repeat([]byte{1}, 64), []byte("a passphrase")
	write("first", first)
	write("second", second)
	write("disk", nil)
	if err := os.Truncate(in("disk"), 24<<20); err != nil {
		t.Fatal(err)
	}
	cryptsetup(t, "luksFormat", "--batch-mode", "--type", "luks2", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", in("first"), in("disk"))
	cryptsetup(t, "luksAddKey", "--batch-mode", "--pbkdf", "argon2id", "--pbkdf-memory", "32768", "--pbkdf-force-iterations", "4", "--pbkdf-parallel", "1", "--key-file", in("first"), in("disk"), in("second"))
	cryptsetup(t, "luksDump", "--batch-mode", "--dump-volume-key", "--volume-key-file", in("volume"), "--key-file", in("first"), in("disk"))
	cryptsetup(t, "luksHeaderBackup", "--header-backup-file", in("backup"), in("disk"))
	want, err := os.ReadFile(in("volume"))
	if err != nil {
		t.Fatal(err)
	}
	backup, err := os.ReadFile(in("backup"))
	if err != nil {
		t.Fatal(err)
	}
	h, err := luksheader.Check(bytes.NewReader(backup), 1<<40)
	if err != nil {
		t.Fatal(err)
	}
	for name, key := range map[string][]byte{"first": first, "second": second} {
		got, err := volumekey.Open(h, secret.New(bytes.Clone(key)))
		if err != nil || !bytes.Equal(got.Reveal(), want) {
			t.Errorf("with the %s key: %v", name, err)
		}
	}
	if _, err := volumekey.Open(h, secret.New([]byte("wrong"))); !errors.Is(err, volumekey.ErrWrongKey) {
		t.Errorf("with a wrong key: %v", err)
	}
}
