package luksdisk

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"farkeep/image/diskuse"
	"farkeep/image/luksfile"
	"farkeep/image/siteinit"
	"farkeep/shared/hint"
	"farkeep/shared/history"
	"farkeep/shared/secret"
	"farkeep/shared/settings"
	"farkeep/shared/site"

	"github.com/google/go-cmp/cmp"
)

func tool(t testing.TB, pkg, name string, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		name = "/usr/sbin/" + name
	}
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s (Debian package %s): %v\n%s", name, strings.Join(args, " "), pkg, err, out)
	}
	return string(out)
}

func newSite(t *testing.T) *siteinit.Dir {
	t.Helper()
	dir, _, err := siteinit.Init(filepath.Join(t.TempDir(), "site"), siteinit.Options{
		Name: "home", HomeName: "borg", Endpoints: []string{"home.example.net:51820"}, Network: netip.MustParsePrefix("10.77.0.0/24"),
		MailServer: "smtp.example.net:465", MailUser: "attic", MailFrom: "attic@example.net", MailTo: []string{"me@example.net"}, MailPassword: "pw",
		AdminPassphrase: func() (secret.Bytes, error) { return secret.New([]byte("four words and more")), nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	for name, board := range map[string]string{"attic": "pi4", "cellar": "service"} {
		if _, err := dir.AddAppliance(siteinit.NewAppliance{Name: name, Board: board}); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func newDisk(t *testing.T, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, size)); err != nil {
		t.Fatal(err)
	}
	return path
}

func request(t *testing.T, dir *siteinit.Dir, appliance, path string) Request {
	return Request{
		Site: dir, Appliance: appliance, Path: path,
		Confirm:  func(*Target) error { return nil },
		Progress: func(format string, args ...any) { t.Logf(format, args...) },
	}
}

func TestPrepare(t *testing.T) {
	dir := newSite(t)
	for appliance, want := range map[string]luksfile.Cipher{"attic": luksfile.Adiantum, "cellar": luksfile.AES} {
		path := newDisk(t, 64<<20)
		p, err := Prepare(t.Context(), request(t, dir, appliance, path))
		if err != nil {
			t.Fatal(err)
		}
		if p.Cipher != want {
			t.Errorf("%s: %s", appliance, p.Cipher)
		}
		if got := strings.TrimSpace(tool(t, "cryptsetup-bin", "cryptsetup", "luksUUID", path)); got != p.UUID {
			t.Errorf("UUID %s, said %s", got, p.UUID)
		}
		for _, key := range append([]string{p.RecoveryKey}, p.KeyFiles...) {
			info, err := os.Stat(key)
			if err != nil || info.Mode() != 0o600 || info.Size() != 64 {
				t.Errorf("%s: %v, %v", key, info, err)
			}
			tool(t, "cryptsetup-bin", "cryptsetup", "open", "--test-passphrase", "--key-file", key, path)
		}
		if len(p.KeyFiles) != 1 || strings.Contains(p.KeyFiles[0], "operator") || filepath.Dir(p.RecoveryKey) != dir.OperatorDir() {
			t.Errorf("keys in %v and %s", p.KeyFiles, p.RecoveryKey)
		}
		// The settings are complete, and know the disk.
		text, err := os.ReadFile(dir.ApplianceSettings(appliance))
		if err != nil {
			t.Fatal(err)
		}
		if a, err := settings.Parse("farkeep.toml", text); err != nil || a.Disk.LUKS != p.UUID {
			t.Errorf("farkeep.toml: %v", err)
		}
		// A destroyed header comes back from the backup, by cryptsetup itself.
		backup, err := os.ReadFile(p.Backup)
		if err != nil {
			t.Fatal(err)
		}
		again := filepath.Join(t.TempDir(), "backup")
		tool(t, "cryptsetup-bin", "cryptsetup", "luksHeaderBackup", "--header-backup-file", again, path)
		if theirs, err := os.ReadFile(again); err != nil || !bytes.Equal(theirs, backup) {
			t.Errorf("the backup is not what luksHeaderBackup makes (%v)", err)
		}
		if sum := fmt.Sprintf("%x", sha256.Sum256(backup)); sum != p.Fingerprint {
			t.Errorf("fingerprint %s, the backup's SHA-256 is %s", p.Fingerprint, sum)
		}
		if bytes.Contains(text, []byte("recovery")) {
			t.Error("the settings mention the recovery key")
		}
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		noise := make([]byte, len(backup))
		rand.Read(noise)
		if _, err := f.WriteAt(noise, 0); err != nil {
			t.Fatal(err)
		}
		f.Close()
		tool(t, "cryptsetup-bin", "cryptsetup", "luksHeaderRestore", "-q", "--header-backup-file", p.Backup, path)
		// cryptsetup counts a restore as a change, so the fingerprint is another.
		if h, err := luksfile.Header(path); err != nil || h.UUID != p.UUID || h.Damage != "" {
			t.Errorf("after luksHeaderRestore: %v", err)
		}
		plain := filepath.Join(t.TempDir(), "plain")
		key, err := os.ReadFile(p.RecoveryKey)
		if err != nil {
			t.Fatal(err)
		}
		if err := luksfile.Decrypt(t.Context(), path, key, plain); err != nil {
			t.Fatal(err)
		}
		tool(t, "e2fsprogs", "e2fsck", "-fn", plain)
	}
}

func TestPrepareRefuses(t *testing.T) {
	dir := newSite(t)
	no := errors.New("no")
	for _, tc := range []struct {
		name   string
		change func(t *testing.T, r *Request)
		want   string
	}{
		{"no such appliance", func(_ *testing.T, r *Request) { r.Appliance = "nobody" }, "no appliance"},
		{"no such disk", func(_ *testing.T, r *Request) { r.Path += ".gone" }, "no such file"},
		{"a folder", func(t *testing.T, r *Request) { r.Path = t.TempDir() }, "neither a disk nor a file"},
		{"too small", func(t *testing.T, r *Request) { r.Path = newDisk(t, 8<<20) }, "the least"},
		{"a person says no", func(_ *testing.T, r *Request) { r.Confirm = func(*Target) error { return no } }, "no"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := newDisk(t, 64<<20)
			if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(path, 64<<20); err != nil {
				t.Fatal(err)
			}
			r := request(t, dir, "attic", path)
			tc.change(t, &r)
			if _, err := Prepare(t.Context(), r); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%v", err)
			}
			if b, err := os.ReadFile(path); err != nil || !bytes.HasPrefix(b, []byte("precious")) {
				t.Errorf("the disk was touched (%v)", err)
			}
			if keys, err := filepath.Glob(filepath.Join(dir.OperatorDir(), "*.recovery.key")); err != nil || len(keys) > 0 {
				t.Errorf("keys of no disk: %v", keys)
			}
		})
	}
}

// ownDisk is a disk that a person made, with a passphrase.
func ownDisk(t *testing.T, mkfs bool, args ...string) (path string, key secret.Bytes) {
	t.Helper()
	path = newDisk(t, 80<<20)
	key = secret.New([]byte("a person's passphrase"))
	keyFile := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(keyFile, key.Reveal(), 0o600); err != nil {
		t.Fatal(err)
	}
	tool(t, "cryptsetup-bin", "cryptsetup", append(append([]string{"luksFormat", "-q", "--type", "luks2", "--pbkdf-memory", "32768", "--pbkdf-force-iterations", "4", "--key-file", keyFile}, args...), path)...)
	if mkfs {
		if err := luksfile.MakeFileSystem(t.Context(), path, key, 0); err != nil {
			t.Fatal(err)
		}
	}
	return path, key
}

func TestAdopt(t *testing.T) {
	dir := newSite(t)
	path, key := ownDisk(t, true)
	p, err := Adopt(t.Context(), request(t, dir, "attic", path), key)
	if err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(p.OtherSlots) != "[0]" || len(p.Warnings) == 0 || p.Cipher != luksfile.AES {
		t.Errorf("%+v", p)
	}
	for _, k := range append([]string{p.RecoveryKey}, p.KeyFiles...) {
		tool(t, "cryptsetup-bin", "cryptsetup", "open", "--test-passphrase", "--key-file", k, path)
	}
	h, err := luksfile.Header(path)
	if err != nil || len(h.Slots) != 3 || h.Slots[1].KDF != "pbkdf2" || h.Slots[2].Iterations != 1000 || h.Fingerprint() != p.Fingerprint {
		t.Errorf("%d slots, %v", len(h.Slots), err)
	}
	plain := filepath.Join(t.TempDir(), "plain")
	if err := luksfile.Decrypt(t.Context(), path, key.Reveal(), plain); err != nil {
		t.Fatal(err)
	}
	tool(t, "e2fsprogs", "e2fsck", "-fn", plain)
	if _, err := Adopt(t.Context(), request(t, dir, "attic", path), key); err == nil || !strings.Contains(err.Error(), "adopted already") {
		t.Errorf("again: %v", err)
	}
}

func TestAdoptRefuses(t *testing.T) {
	for _, tc := range []struct {
		name string
		make func(t *testing.T) (string, secret.Bytes)
		want string
	}{
		{"wrong key", func(t *testing.T) (string, secret.Bytes) {
			path, _ := ownDisk(t, true)
			return path, secret.New([]byte("wrong"))
		}, "opens none"},
		{"no file system", func(t *testing.T) (string, secret.Bytes) { return ownDisk(t, false) }, "no ext4"},
		{"LUKS1", func(t *testing.T) (string, secret.Bytes) {
			path := newDisk(t, 40<<20)
			keyFile := filepath.Join(t.TempDir(), "key")
			if err := os.WriteFile(keyFile, []byte("k"), 0o600); err != nil {
				t.Fatal(err)
			}
			tool(t, "cryptsetup-bin", "cryptsetup", "luksFormat", "-q", "--type", "luks1", "--pbkdf-force-iterations", "1000", "--key-file", keyFile, path)
			return path, secret.New([]byte("k"))
		}, "LUKS1"},
		{"not encrypted", func(t *testing.T) (string, secret.Bytes) { return newDisk(t, 40<<20), secret.New([]byte("k")) }, "no LUKS header"},
		{"damaged", func(t *testing.T) (string, secret.Bytes) {
			path, key := ownDisk(t, true)
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if _, err := f.WriteAt([]byte("xxxx"), 5000); err != nil {
				t.Fatal(err)
			}
			return path, key
		}, "primary copy"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := newSite(t)
			path, key := tc.make(t)
			before, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			_, err = Adopt(t.Context(), request(t, dir, "attic", path), key)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%v", err)
			}
			if tc.want != "opens none" && hint.Of(err) == "" && tc.want != "no LUKS header" {
				t.Errorf("no hint: %v", err)
			}
			if after, err := os.ReadFile(path); err != nil || !bytes.Equal(before, after) {
				t.Errorf("the disk was written to (%v)", err)
			}
			if a, _ := dir.Site().Appliance("attic"); a.LUKS != "" {
				t.Error("the site has the disk")
			}
		})
	}
}

// fakeHost is a machine with one USB disk, sda, with two partitions, and a bare
// disk, sdb. The device nodes are files.
func fakeHost(t *testing.T, mountinfo, swaps string) host {
	t.Helper()
	root := t.TempDir()
	h := host{filepath.Join(root, "sys"), filepath.Join(root, "proc"), filepath.Join(root, "dev")}
	write := func(path, text string) {
		t.Helper()
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	usb := filepath.Join(h.sys, "devices/pci0/usb1/1-1/host0/block")
	for path, text := range map[string]string{
		"sda/dev": "8:0\n", "sda/device/vendor": "ACME    ", "sda/device/model": "Store 4T\x1b[31m ", "sda/device/vpd_pg80": "\x00\x80\x00\x08 WX123456",
		"sda/sda1/dev": "8:1\n", "sda/sda1/partition": "1", "sda/sda2/dev": "8:2\n", "sda/sda2/partition": "2",
		"sdb/dev": "8:16\n",
	} {
		write(filepath.Join(usb, path), text)
	}
	for number, dir := range map[string]string{"8:0": "sda", "8:1": "sda/sda1", "8:16": "sdb"} {
		link := filepath.Join(h.sys, "dev/block", number)
		if err := errors.Join(os.MkdirAll(filepath.Dir(link), 0o755), os.Symlink(filepath.Join(usb, dir), link)); err != nil {
			t.Fatal(err)
		}
	}
	write(filepath.Join(h.proc, "self/mountinfo"), mountinfo)
	write(filepath.Join(h.proc, "swaps"), "Filename Type Size Used Priority\n"+swaps)
	write(filepath.Join(h.dev, "sda1"), strings.Repeat("\x00", 8192))
	write(filepath.Join(h.dev, "sda2"), "\x00\x00\x00NTFS    "+strings.Repeat("\x00", 8192))
	return h
}

func TestDescribe(t *testing.T) {
	h := fakeHost(t, "", "")
	disk := &Target{Path: filepath.Join(h.dev, "sda"), Device: true, Size: 4_000_787_030_016, Content: "a GPT partition table"}
	if err := h.describe(disk, "8:0"); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	disk.Describe(&out)
	for _, want := range []string{"USB disk:", "4 TB", "ACME Store 4T[31m", "WX123456", "GPT", "sda1", "nothing (zeros)", "sda2", "NTFS"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
	if strings.Contains(out.String(), "\x1b") {
		t.Error("the disk's name controls the terminal")
	}
	if disk.Name() != disk.Model || disk.Refuse() != nil {
		t.Errorf("%q, %v", disk.Name(), disk.Refuse())
	}
}

func TestInUse(t *testing.T) {
	for _, tc := range []struct{ name, number, mountinfo, swaps, holder, want string }{
		{"a partition is mounted", "8:0", "36 35 8:1 / /home rw - ext4 /dev/sda1 rw\n", "", "", "sda1 is mounted on /home"},
		{"itself is mounted", "8:16", "36 35 8:16 / /mnt rw - ext4 /dev/sdb rw\n", "", "", "sdb is mounted on /mnt"},
		{"swap", "8:0", "", "/dev/sda2 partition 1 0 -2\n", "", "sda2 is swap"},
		{"mapped", "8:0", "", "", "sda2/holders/dm-0", "sda2 is part of dm-0"},
		{"another's mount", "8:16", "36 35 8:1 / /home rw - ext4 /dev/sda1 rw\n", "", "", ""},
		{"a similar number", "8:0", "36 35 8:10 / /home rw - ext4 /dev/sda10 rw\n", "", "", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := fakeHost(t, tc.mountinfo, tc.swaps)
			if tc.holder != "" {
				if err := os.MkdirAll(filepath.Join(h.sys, "devices/pci0/usb1/1-1/host0/block/sda", tc.holder), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			d := &Target{Path: filepath.Join(h.dev, "sdx"), Device: true}
			if err := h.describe(d, tc.number); err != nil {
				t.Fatal(err)
			}
			err := d.Refuse()
			if (tc.want == "") != (err == nil) || err != nil && (!strings.Contains(err.Error(), tc.want) || hint.Of(err) == "") {
				t.Errorf("%v, want %q", err, tc.want)
			}
		})
	}
}

func TestProbe(t *testing.T) {
	dir := t.TempDir()
	made := func(name string, pkg string, args ...string) string {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, 32<<20)); err != nil {
			t.Fatal(err)
		}
		tool(t, pkg, args[0], append(args[1:], path)...)
		return path
	}
	luks, _ := ownDisk(t, false)
	raw := func(name string, at int, text string) string {
		b := make([]byte, 128<<10)
		copy(b[at:], text)
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for path, want := range map[string]string{
		made("ext4", "e2fsprogs", "mke2fs", "-q", "-F", "-L", "photos", "-t", "ext4"): `ext2/3/4, label "photos"`,
		made("swap", "util-linux", "mkswap", "-q"):                                    "swap",
		luks:                              "LUKS",
		raw("ntfs", 3, "NTFS    "):        "NTFS",
		raw("gpt", 512, "EFI PART"):       "GPT",
		raw("mbr", 510, "\x55\xaa"):       "MBR",
		raw("btrfs", 0x10040, "_BHRfS_M"): "Btrfs",
		raw("lvm", 0x218, "LVM2 001"):     "LVM",
		raw("text", 0, "hello"):           "unknown data",
		raw("zeros", 0, ""):               "nothing",
		raw("bitlocker", 3, "-FVE-FS-"):   "BitLocker",
	} {
		target, err := Inspect(path)
		if err != nil || !strings.Contains(target.Content, want) {
			t.Errorf("%s: %q, %v; want %q", filepath.Base(path), target.Content, err, want)
		}
	}
}

func TestMeasure(t *testing.T) {
	dir := t.TempDir()
	if err := errors.Join(os.Mkdir(filepath.Join(dir, "a"), 0o755), os.WriteFile(filepath.Join(dir, "a", "1"), make([]byte, 1000), 0o600),
		os.Link(filepath.Join(dir, "a", "1"), filepath.Join(dir, "a", "2")), os.WriteFile(filepath.Join(dir, "a", "3"), make([]byte, 500), 0o600),
		os.MkdirAll(filepath.Join(dir, "more", "mail"), 0o755), os.WriteFile(filepath.Join(dir, "more", "mail", "1"), make([]byte, 1000), 0o600),
		os.MkdirAll(filepath.Join(dir, "more", "lost+found"), 0o755), os.WriteFile(filepath.Join(dir, "more", "lost+found", "1"), make([]byte, 9000), 0o600)); err != nil {
		t.Fatal(err)
	}
	s := &site.Site{
		History: settings.DefaultHistory(),
		Repositories: []site.Repository{
			{Name: "photos", Path: filepath.Join(dir, "a")}, {Name: "away", Path: filepath.Join(dir, "gone")},
		},
		Folders: []site.Folder{{Path: filepath.Join(dir, "more"), Prefix: "x-", Exclude: []string{"lost+found"}}, {Path: filepath.Join(dir, "none")}},
	}
	// What x-mail keeps is every night there ever was.
	s.History.Repositories = []history.Repository{{Name: "x-*", Daily: new(-1)}}
	factor := func(repository string) float64 {
		e, err := diskuse.For(s.History.For(repository))
		if err != nil {
			t.Fatal(err)
		}
		return e.Factor()
	}
	standard, all := factor("photos"), factor("x-mail")
	if standard < 1.5 || standard > 3 || all <= standard {
		t.Errorf("the default history wants %.2f times the repository, every night's %.2f", standard, all)
	}
	w, err := Measure(s)
	if err != nil {
		t.Fatal(err)
	}
	want := Wanted{Repositories: 2500, Disk: int64(1500*standard) + int64(1000*all), Unseen: []string{"away", filepath.Join(dir, "none")}, UnseenFactor: standard}
	if d := cmp.Diff(want, w); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	var out bytes.Buffer
	w.Advise(&out, 2000)
	for _, want := range []string{"2.5 kB", Size(w.Disk), fmt.Sprintf("%.1f times", float64(w.Disk)/2500), "fill up sooner", "away", fmt.Sprintf("%.1f times their size", standard), "--size-for"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in %s", want, out.String())
		}
	}
	// Given a size, the rules of one repository are nobody's.
	given, err := For(s, 1e12)
	if err != nil || given.Disk != int64(1e12*standard) {
		t.Errorf("%+v, %v", given, err)
	}
}

func TestParseSize(t *testing.T) {
	for in, want := range map[string]int64{"500G": 500e9, "2T": 2e12, "1.5 TB": 15e11, "100": 100, "0": 0, "10kB": 10e3} {
		if got, err := ParseSize(in); err != nil || got != want {
			t.Errorf("%q: %d, %v", in, got, err)
		}
	}
	for _, in := range []string{"", "G", "-1", "NaN", "1e30", "12 apples", "inf"} {
		if got, err := ParseSize(in); err == nil {
			t.Errorf("%q: %d", in, got)
		}
	}
}

func TestCharacterDevice(t *testing.T) {
	if _, err := Inspect("/dev/null"); err == nil || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v", err)
	}
}
