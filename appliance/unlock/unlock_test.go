package unlock

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"farkeep/appliance/part"
	"farkeep/appliance/status"
	"farkeep/shared/identity"
	"farkeep/shared/keywire"
	"farkeep/shared/luksheader"
	"farkeep/shared/secret"
	"farkeep/shared/settings"
	"farkeep/shared/sshverb"

	"github.com/anatol/luks.go"
	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"
)

const diskSize = 20 << 20

func cryptsetup(t testing.TB, args ...string) string {
	t.Helper()
	out, err := exec.Command("cryptsetup", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("cryptsetup %s (Debian package cryptsetup-bin): %v\n%s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// bench is a disk made by the real cryptsetup, and its key.
type bench struct {
	disk, keyFile string
	key           []byte
	uuid          string
}

var light = []string{"--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"}

func newBench(t testing.TB) *bench {
	t.Helper()
	dir := t.TempDir()
	b := &bench{disk: filepath.Join(dir, "disk"), keyFile: filepath.Join(dir, "key"), key: make([]byte, 64)}
	rand.Read(b.key)
	if err := errors.Join(os.WriteFile(b.keyFile, b.key, 0o600), os.WriteFile(b.disk, nil, 0o600), os.Truncate(b.disk, diskSize)); err != nil {
		t.Fatal(err)
	}
	cryptsetup(t, append(append([]string{"luksFormat", "-q", "--type", "luks2"}, light...),
		"--cipher", "aes-xts-plain64", "--key-size", "256", "--sector-size", "4096", "--luks2-keyslots-size", "4m", "--offset", "32768",
		"--key-slot", "0", "--key-file", b.keyFile, b.disk)...)
	b.uuid = cryptsetup(t, "luksUUID", b.disk)
	return b
}

func (b *bench) edit(t testing.TB, do func(disk []byte)) {
	t.Helper()
	data, err := os.ReadFile(b.disk)
	if err != nil {
		t.Fatal(err)
	}
	do(data)
	if err := os.WriteFile(b.disk, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// adiantum turns the header into one for the boards without AES instructions,
// as emulated machines and CI cannot format it without the kernel's help.
func (b *bench) adiantum(t testing.TB) {
	b.edit(t, func(disk []byte) {
		for _, c := range [][]byte{disk[:16384], disk[16384:32768]} {
			json := c[4096:]
			at := bytes.Index(json, []byte(`"segments"`))
			changed := append(bytes.Clone(json[:at]), bytes.Replace(json[at:], []byte("aes-xts-plain64"), []byte("xchacha20,aes-adiantum-plain64"), 1)...)
			copy(json, changed)
			luksheader.Seal(c)
		}
	})
}

// keyServer answers every request for b's key with answer and returns a brief
// that names it.
func (b *bench) keyServer(t testing.TB, answer func(s *sshverb.Session) error) Brief {
	t.Helper()
	host, hostPublic := newIdentity(t)
	client, _ := newIdentity(t)
	signer, err := identity.Signer(host)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &sshverb.Server{
		HostKey:   signer,
		Authorise: func(ssh.PublicKey, net.Addr) (*ssh.Permissions, error) { return &ssh.Permissions{}, nil },
		Exec:      func(_ context.Context, s *sshverb.Session) error { return answer(s) },
		Log:       slog.New(slog.DiscardHandler),
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.Serve(ctx, l) }()
	t.Cleanup(func() { cancel(); <-done })
	return Brief{
		Identity: client, UUID: b.uuid, Device: b.disk, Mapping: "farkeep",
		KeyServers: []settings.KeyServer{{Name: "home", Address: l.Addr().String(), HostKey: hostPublic}},
	}
}

func (b *bench) gives(key []byte) func(*sshverb.Session) error {
	return func(s *sshverb.Session) error {
		r, err := keywire.Parse(s.Verb, s.Args)
		if err != nil || r.Verb != keywire.Key || r.UUID != b.uuid || len(r.Claims.Header) != 64 || r.Claims.Slots == 0 {
			return fmt.Errorf("unexpected request %v, %+v, %w", r, r.Claims, err)
		}
		_, err = s.Stdout.Write(key)
		return err
	}
}

func newIdentity(t testing.TB) (secret.Text, string) {
	t.Helper()
	private, public, err := identity.New("test")
	if err != nil {
		t.Fatal(err)
	}
	return private, public
}

// fakeKernel takes the place of dm-crypt, which CI's kernel does not have.
type fakeKernel struct {
	err    error
	mapped *luks.Volume
}

func (k *fakeKernel) Map(v *luks.Volume, _ string) (uint32, error) {
	if k.err != nil {
		return 0, k.err
	}
	k.mapped = v
	return 7, nil
}

func TestAttempt(t *testing.T) {
	for _, tc := range []struct {
		name    string
		prepare func(t *testing.T, b *bench)
		cipher  string
		damaged bool
	}{
		{"aes", nil, "aes-xts-plain64", false},
		{"adiantum", func(t *testing.T, b *bench) { b.adiantum(t) }, "xchacha20,aes-adiantum-plain64", false},
		{"primary header damaged", func(t *testing.T, b *bench) {
			b.edit(t, func(d []byte) { d[5000] ^= 1 })
		}, "aes-xts-plain64", true},
		{"primary header wiped", func(t *testing.T, b *bench) {
			b.edit(t, func(d []byte) { clear(d[:16384]) })
		}, "aes-xts-plain64", true},
		{"secondary header damaged", func(t *testing.T, b *bench) {
			b.edit(t, func(d []byte) { d[16384+5000] ^= 1 })
		}, "aes-xts-plain64", true},
		{"behind other slots", func(t *testing.T, b *bench) {
			other := filepath.Join(t.TempDir(), "other")
			if err := os.WriteFile(other, []byte("a person's passphrase"), 0o600); err != nil {
				t.Fatal(err)
			}
			cryptsetup(t, "luksAddKey", "-q", "--pbkdf", "argon2id", "--pbkdf-memory", "32768", "--pbkdf-force-iterations", "4", "--pbkdf-parallel", "1", "--key-file", b.keyFile, b.disk, other)
			cryptsetup(t, "luksAddKey", "-q", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "2000", "--key-file", b.keyFile, b.disk, other)
		}, "aes-xts-plain64", false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newBench(t)
			if tc.prepare != nil {
				tc.prepare(t, b)
			}
			before, err := os.ReadFile(b.disk)
			if err != nil {
				t.Fatal(err)
			}
			brief := b.keyServer(t, b.gives(b.key))
			var log bytes.Buffer
			k := &fakeKernel{}
			r := Attempt(t.Context(), slog.New(slog.NewJSONHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})), brief, k)
			if !r.OK || r.Minor != 7 || r.Server != "home" || len(r.HeaderDigest) != 64 || (r.HeaderDamage != "") != tc.damaged {
				t.Fatalf("%+v", r)
			}
			v := k.mapped
			if v.StorageEncryption != tc.cipher || v.StorageOffset != 16<<20 || v.StorageSize != diskSize-16<<20 || v.StorageSectorSize != 4096 || v.BackingDevice != b.disk || v.UUID != b.uuid {
				t.Errorf("cipher %s, offset %d, size %d, sectors of %d, on %s", v.StorageEncryption, v.StorageOffset, v.StorageSize, v.StorageSectorSize, v.BackingDevice)
			}
			for _, form := range []string{string(b.key), hex.EncodeToString(b.key), fmt.Sprint(b.key)} {
				if strings.Contains(log.String(), form) || strings.Contains(fmt.Sprintf("%+v", r), form) {
					t.Error("the key is in the log or in the result")
				}
			}
			after, err := os.ReadFile(b.disk)
			if err != nil || !bytes.Equal(before, after) {
				t.Errorf("the disk was written to (%v)", err)
			}
		})
	}
}

func TestAttemptFails(t *testing.T) {
	for _, tc := range []struct {
		name   string
		answer func(b *bench) func(*sshverb.Session) error
		change func(t *testing.T, b *bench, brief *Brief)
		kernel fakeKernel
		kind   string
		text   string
	}{
		{name: "wrong key", answer: func(b *bench) func(*sshverb.Session) error { return b.gives(bytes.Repeat([]byte("x"), 64)) }, kind: status.ErrorWrongKey, text: "opens the disk"},
		{name: "refused", answer: func(*bench) func(*sshverb.Session) error {
			return func(*sshverb.Session) error { return sshverb.Refuse(errors.New("revoked"), "no key for you") }
		}, kind: status.ErrorRefused, text: "no key for you"},
		{name: "unreachable", change: func(_ *testing.T, _ *bench, brief *Brief) { brief.KeyServers[0].Address = "127.0.0.1:1" }, kind: status.ErrorUnreachable, text: "connect"},
		{name: "wrong host key", change: func(t *testing.T, _ *bench, brief *Brief) {
			_, brief.KeyServers[0].HostKey = newIdentity(t)
		}, kind: status.ErrorUnreachable, text: "host key"},
		{name: "header gone", change: func(t *testing.T, b *bench, _ *Brief) { b.edit(t, func(d []byte) { clear(d[:1<<20]) }) }, kind: status.ErrorBadHeader, text: "no LUKS header"},
		{name: "both headers damaged", change: func(t *testing.T, b *bench, _ *Brief) {
			b.edit(t, func(d []byte) { d[5000] ^= 1; d[16384+5000] ^= 1 })
		}, kind: status.ErrorBadHeader, text: "damaged"},
		{name: "key slot area damaged", change: func(t *testing.T, b *bench, _ *Brief) {
			b.edit(t, func(d []byte) { d[32768+1000] ^= 1 })
		}, kind: status.ErrorWrongKey, text: "opens the disk"},
		{name: "another disk", change: func(_ *testing.T, _ *bench, brief *Brief) { brief.UUID = "00000000-0000-0000-0000-000000000000" }, kind: status.ErrorMissing, text: "is LUKS disk"},
		{name: "no disk", change: func(_ *testing.T, _ *bench, brief *Brief) { brief.Device += ".gone" }, kind: status.ErrorMissing, text: "no such file"},
		{name: "device mapper fails", kernel: fakeKernel{err: unix.EBUSY}, kind: status.ErrorHung, text: "map"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newBench(t)
			answer := b.gives(b.key)
			if tc.answer != nil {
				answer = tc.answer(b)
			}
			brief := b.keyServer(t, answer)
			if tc.change != nil {
				tc.change(t, b, &brief)
			}
			r := Attempt(t.Context(), slog.New(slog.NewTextHandler(t.Output(), nil)), brief, &tc.kernel)
			if r.OK || r.ErrorKind != tc.kind || !strings.Contains(r.Error, tc.text) {
				t.Errorf("%+v; want kind %q and %q in the error", r, tc.kind, tc.text)
			}
			if r.Hint == "" && tc.kind != status.ErrorMissing && tc.kind != status.ErrorHung {
				t.Error("no hint")
			}
		})
	}
}

// Each server is shown its own token, what it claims comes from the live header,
// and every new token is handed back, that of a wrong key included.
func TestTokens(t *testing.T) {
	b := newBench(t)
	b.edit(t, func(d []byte) { d[16384+5000] ^= 1 })
	var asked []keywire.Request
	answer := func(key []byte, token keywire.Token) func(*sshverb.Session) error {
		return func(s *sshverb.Session) error {
			r, err := keywire.Parse(s.Verb, s.Args)
			if err != nil {
				return err
			}
			asked = append(asked, r)
			s.Stderr.Write([]byte(keywire.TokenLine(token)))
			_, err = s.Stdout.Write(key)
			return err
		}
	}
	brief := b.keyServer(t, answer(bytes.Repeat([]byte("x"), 64), "liar-2"))
	right := b.keyServer(t, answer(b.key, "home-2"))
	right.KeyServers[0].Name = "right"
	brief.KeyServers = append(brief.KeyServers, right.KeyServers...)
	liarID, rightID := idOf(t, brief.KeyServers[0]), idOf(t, brief.KeyServers[1])
	brief.Tokens = map[string]keywire.Token{liarID: "liar-1", rightID: "home-1"}
	brief.Claims = keywire.Claims{Up: 77}
	var log bytes.Buffer
	r := Attempt(t.Context(), slog.New(slog.NewJSONHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})), brief, &fakeKernel{})
	if !r.OK || r.Server != "right" || r.Slots != 1 || len(r.Tokens) != 2 || r.Tokens[liarID] != "liar-2" || r.Tokens[rightID] != "home-2" {
		t.Fatalf("%+v with %d tokens", r, len(r.Tokens))
	}
	if len(asked) != 2 || asked[0].Token != "liar-1" || asked[1].Token != "home-1" {
		t.Errorf("%d asked, or shown another server's token", len(asked))
	}
	for _, a := range asked {
		if a.Claims != (keywire.Claims{Up: 77, Header: r.HeaderDigest, Damage: keywire.DamageSecondary, Slots: 1}) {
			t.Errorf("claimed %+v", a.Claims)
		}
	}
	for _, token := range []string{"liar-1", "liar-2", "home-1", "home-2"} {
		if strings.Contains(log.String()+fmt.Sprintf("%+v", r), token) {
			t.Error("a token is in the log, or prints")
		}
	}
}

// While a server refuses, no other server's key counts.
func TestRefusingServersDecide(t *testing.T) {
	b := newBench(t)
	others := 0
	ready := b.keyServer(t, func(s *sshverb.Session) error { others++; return b.gives(b.key)(s) })
	revoked := true
	strict := b.keyServer(t, func(s *sshverb.Session) error {
		if revoked {
			return sshverb.Refuse(errors.New("revoked"), "refused")
		}
		return b.gives(b.key)(s)
	})
	strict.KeyServers[0].Name = "strict"
	brief := ready
	brief.KeyServers = append(brief.KeyServers, strict.KeyServers...)
	id := idOf(t, strict.KeyServers[0])
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	brief.Refused = []string{id}
	if r := Attempt(t.Context(), log, brief, &fakeKernel{}); r.OK || r.ErrorKind != status.ErrorRefused || len(r.Granted) != 0 {
		t.Errorf("%+v", r)
	}
	if others != 0 {
		t.Error("another server was asked for a key that does not count")
	}
	revoked = false
	if r := Attempt(t.Context(), log, brief, &fakeKernel{}); !r.OK || r.Server != "strict" || len(r.Granted) != 1 || r.Granted[0] != id {
		t.Errorf("%+v", r)
	}
	// Two that refused must both agree; what one of them granted is not lost.
	brief.Refused, revoked = []string{id, idOf(t, ready.KeyServers[0])}, true
	k := &fakeKernel{}
	if r := Attempt(t.Context(), log, brief, k); r.OK || r.ErrorKind != status.ErrorRefused || k.mapped != nil || len(r.Granted) != 1 || !strings.Contains(r.Error, "strict") {
		t.Errorf("%+v", r)
	}
	revoked = false
	if r := Attempt(t.Context(), log, brief, k); !r.OK || len(r.Granted) != 2 {
		t.Errorf("%+v", r)
	}
}

func idOf(t *testing.T, k settings.KeyServer) string {
	t.Helper()
	key, err := identity.ParsePublic(k.HostKey)
	if err != nil {
		t.Fatal(err)
	}
	return identity.Fingerprint(key)
}

// TestOnlyArgon2 would need the memory of a larger board.
func TestOnlyArgon2(t *testing.T) {
	b := newBench(t)
	cryptsetup(t, "luksConvertKey", "-q", "--pbkdf", "argon2id", "--pbkdf-memory", "32768", "--pbkdf-force-iterations", "4", "--pbkdf-parallel", "1", "--key-file", b.keyFile, b.disk)
	asked := false
	brief := b.keyServer(t, func(*sshverb.Session) error { asked = true; return nil })
	r := Attempt(t.Context(), slog.New(slog.DiscardHandler), brief, &fakeKernel{})
	if r.ErrorKind != status.ErrorBadHeader || asked {
		t.Errorf("%+v, key server asked: %v", r, asked)
	}
}

// TestRun runs the part itself and looks at how it confined the process.
func TestRun(t *testing.T) {
	b := newBench(t)
	brief := b.keyServer(t, b.gives(b.key))
	env, err := part.New(part.Header{Name: part.Unlock, Paths: part.FirmwarePaths()}, brief, slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := Run(t.Context(), env); err == nil || !strings.Contains(err.Error(), "nobody waits") {
		t.Errorf("without anybody to tell: %v", err)
	}
	var core unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_CORE, &core); err != nil || core.Max != 0 {
		t.Errorf("core dumps up to %d bytes, %v", core.Max, err)
	}
	dumpable, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
	if err != nil || dumpable != 0 {
		t.Errorf("dumpable %d, %v", dumpable, err)
	}
}
