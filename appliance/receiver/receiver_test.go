package receiver

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/crypto/ssh"

	"farkeep/appliance/keepercall"
	"farkeep/appliance/localcall"
	"farkeep/appliance/part"
	"farkeep/appliance/status"
	"farkeep/shared/hint"
	"farkeep/shared/pushwire"
	"farkeep/shared/secret"
	"farkeep/shared/sshverb"
)

type identity struct {
	signer ssh.Signer
	pem    string
}

func newIdentity(t *testing.T) identity {
	t.Helper()
	_, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(priv, "")
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(priv)
	if err != nil {
		t.Fatal(err)
	}
	return identity{signer, string(pem.EncodeToMemory(block))}
}

func (i identity) public() string { return string(ssh.MarshalAuthorizedKey(i.signer.PublicKey())) }

// bench is a receiver on one interface, the loopback's unless said otherwise, with the disk and the keeper
// played by the test over real sockets.
type bench struct {
	paths   part.Paths
	address string
	host    identity
	keys    map[string]identity
	dark    bool // the disk part refuses holds
	held    chan struct{}
	calls   chan keepercall.Args
	pinned  atomic.Int32  // calls that keep everything where it is
	gone    chan struct{} // closed: those calls end
}

func start(t *testing.T) *bench {
	t.Helper()
	return startOn(t, "lo")
}

// startOn is start with another interface for the VPN's.
func startOn(t *testing.T, device string) *bench {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("run as root: the sockets check uids")
	}
	dir := t.TempDir()
	b := &bench{
		paths: part.Paths{Run: filepath.Join(dir, "run"), State: filepath.Join(dir, "state"), Media: filepath.Join(dir, "media")},
		host:  newIdentity(t), keys: map[string]identity{}, held: make(chan struct{}, 64), calls: make(chan keepercall.Args, 64),
		gone: make(chan struct{}),
	}
	for _, name := range []string{part.Receiver, part.Keeper, part.Disk, part.Network, part.Deadman, part.Mail} {
		must(t, os.MkdirAll(b.paths.RunDir(name), 0o755))
	}
	must(t, os.MkdirAll(filepath.Join(b.paths.State, "log"), 0o755))
	must(t, os.WriteFile(filepath.Join(b.paths.State, "log", "farkeep.log"), []byte("a line\n"), 0o644))
	for _, repo := range []string{"photos", "secret"} {
		files := filepath.Join(b.paths.Disk(), "generations", repo, "000001-20260101T000000Z", "files")
		must(t, os.MkdirAll(files, 0o755))
		must(t, os.WriteFile(filepath.Join(files, "README"), []byte(repo+" data\n"), 0o444))
	}
	must(t, os.Symlink("/etc", filepath.Join(b.paths.Disk(), "generations", "photos", "000001-20260101T000000Z", "files", "escape")))
	must(t, status.Write(b.paths.Status(part.Disk), status.Disk{State: status.DiskMounted, Power: true, Unlocked: true, Mounted: true, ExposureMinutes: 7, TotalBytes: 1 << 40, FreeBytes: 1 << 39}))
	must(t, status.Write(b.paths.Status(part.Keeper), status.Keeper{Repositories: []status.RepositoryStatus{{Name: "photos", Generations: 3}, {Name: "secret", Generations: 1}}}))
	must(t, status.Write(b.paths.Status(part.Deadman), status.Deadman{Alarms: []status.Alarm{{Kind: "unchanged", Subject: "secret", Repository: "secret"}, {Kind: "heartbeat", Subject: "home is silent"}}}))

	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	port := l.Addr().(*net.TCPAddr).Port
	l.Close()
	b.address = fmt.Sprintf("127.0.0.1:%d", port)
	brief := Brief{Appliance: "vault", HostKey: secret.Text(b.host.pem), Interface: device, Port: port}
	for name, k := range map[string]Key{
		"home":    {Role: RolePush, Repositories: []string{"photos", "docs*"}},
		"reader":  {Role: RoleRestore, Repositories: []string{"photos"}},
		"anybody": {Role: RoleRestore},
		"boss":    {Role: RoleAdmin},
	} {
		b.keys[name] = newIdentity(t)
		k.Name, k.PublicKey = name, b.keys[name].public()
		brief.Keys = append(brief.Keys, k)
	}
	env, err := part.New(part.Header{Name: part.Receiver, Host: "vault", Paths: b.paths}, brief, slog.New(slog.NewTextHandler(t.Output(), nil)), io.Discard)
	must(t, err)

	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 3)
	go func() { done <- localcall.Serve(ctx, b.paths.Socket(part.Disk), []uint32{0}, b.disk) }()
	go func() { done <- localcall.Serve(ctx, b.paths.Socket(part.Keeper), []uint32{0}, b.keeper) }()
	go func() { done <- Run(ctx, env) }()
	t.Cleanup(func() {
		cancel()
		for range 3 {
			if err := <-done; err != nil {
				t.Errorf("part: %v", err)
			}
		}
	})
	awaitStatus(t, b.paths)
	return b
}

// awaitStatus waits until the receiver says that it listens, bounded by the test's own limit.
func awaitStatus(t *testing.T, paths part.Paths) {
	t.Helper()
	for t.Context().Err() == nil {
		s, err := status.Read[status.Receiver](paths.Status(part.Receiver))
		must(t, err)
		if s != nil && s.Listening {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func (b *bench) disk(ctx context.Context, req localcall.Request, c *localcall.Conn) error {
	switch req.Verb {
	case "hold":
		if b.dark {
			return hint.Because(hint.Exit(hint.ExitRefused, errors.New("the disk is dark")), "wake it first")
		}
		if err := c.Reply(nil); err != nil {
			return err
		}
		b.held <- struct{}{}
		io.Copy(io.Discard, c) // until the receiver lets go
		return nil
	case "wake", "sleep":
		return nil
	}
	return fmt.Errorf("unknown verb %q", req.Verb)
}

func (b *bench) keeper(_ context.Context, req localcall.Request, c *localcall.Conn) error {
	var args keepercall.Args
	if err := req.Decode(&args); err != nil {
		return err
	}
	b.calls <- args
	switch req.Verb {
	case keepercall.Offer:
		line := make([]byte, 6)
		if _, err := io.ReadFull(c, line); err != nil {
			return err
		}
		if err := c.Reply(keepercall.Answer{Out: json.RawMessage(`{"answer":"send-manifest"}`), Then: keepercall.ThenLine}); err != nil {
			return err
		}
		rest, err := io.ReadAll(c)
		if err != nil {
			return err
		}
		if err := c.Reply(keepercall.Answer{Out: json.RawMessage(`{"answer":"send"}`), Then: keepercall.ThenRaw}); err != nil {
			return err
		}
		_, err = c.Write(bytes.ToUpper(rest))
		return err
	case keepercall.SFTP:
		return &localcall.Error{Code: hint.ExitRefused, Text: "the keeper was asked"}
	case keepercall.Upload:
		n, err := io.Copy(io.Discard, c)
		if err != nil {
			return err
		}
		return c.Reply(keepercall.Answer{Out: json.RawMessage(fmt.Sprintf(`{"bytes":%d}`, n))})
	case keepercall.Reading:
		if err := c.Reply(nil); err != nil {
			return err
		}
		b.pinned.Add(1)
		defer b.pinned.Add(-1)
		select {
		case <-b.gone:
			return errors.New("the keeper crashes")
		case <-hungUp(c):
		}
		return nil
	case keepercall.Generations:
		line := `{"repository":"photos","name":"000001-20260101T000000Z","committed":"2026-01-01T00:00:00Z","bytes":2048,"digest":"","standing":"suspect","reasons":["everything is gone"],"keep":true,"why":"suspect"}`
		return c.Reply(keepercall.Answer{Out: json.RawMessage(line)})
	case keepercall.Commit:
		return hint.Because(hint.Exit(hint.ExitFailure, errors.New("push p1 is not complete")), "upload the rest")
	}
	return c.Reply(keepercall.Answer{Out: json.RawMessage(`{}`)})
}

func hungUp(c *localcall.Conn) <-chan struct{} {
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		io.Copy(io.Discard, c)
	}()
	return ended
}

func (b *bench) dial(t *testing.T, key string) *sshverb.Client {
	t.Helper()
	c, err := sshverb.Dial(t.Context(), sshverb.Peer{Address: b.address, User: "farkeep", Identity: b.keys[key].signer, HostKey: b.host.signer.PublicKey()})
	must(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestRolesAndVerbs(t *testing.T) {
	b := start(t)
	tests := []struct {
		key, verb, in string
		out           string // "" means: not compared
		code          int
		err           string
	}{
		{"home", "offer photos", "line1\nmanifest", "{\"answer\":\"send-manifest\"}\n{\"answer\":\"send\"}\nMANIFEST", 0, ""},
		{"home", "upload p1", strings.Repeat("x", 1<<20), "{\"bytes\":1048576}\n", 0, ""},
		{"home", "commit p1", "", "", hint.ExitFailure, "push p1 is not complete"},
		{"home", "abort p1", "", "{}\n", 0, ""},
		{"home", "heartbeat home", "{}\n", "{}\n", 0, ""},
		{"home", "offer", "", "", hint.ExitUsage, "usage: offer REPOSITORY"},
		{"home", "offer a b", "", "", hint.ExitUsage, "usage: offer REPOSITORY"},
		{"home", "logs", "", "", hint.ExitRefused, "no verb of that name"},
		{"home", "delete photos", "", "", hint.ExitRefused, "no verb of that name"},
		{"reader", "offer photos", "", "", hint.ExitRefused, "no verb of that name"},
		{"reader", "heartbeat home", "", "", hint.ExitRefused, "no verb of that name"},
		{"boss", "commit p1", "", "", hint.ExitRefused, "no verb of that name"},
		{"boss", "logs", "", "a line\n", 0, ""},
		{"boss", "logs --all", "", "", hint.ExitUsage, "usage: logs"},
		{"home", "accept photos 000001-20260101T000000Z", "", "", hint.ExitRefused, "no verb of that name"},
		{"reader", "reject photos 000001-20260101T000000Z", "", "", hint.ExitRefused, "no verb of that name"},
		{"home", "retire photos", "", "", hint.ExitRefused, "no verb of that name"},
		{"reader", "keep photos", "", "", hint.ExitRefused, "no verb of that name"},
		{"home", "accept-clock", "", "", hint.ExitRefused, "no verb of that name"},
		{"reader", "floor 1 0s", "", "", hint.ExitRefused, "no verb of that name"},
		{"home", "reading", "", "", hint.ExitRefused, "no verb of that name"},
		{"boss", "reading", "", "", hint.ExitRefused, "no verb of that name"},
		{"boss", "accept photos", "", "", hint.ExitUsage, "usage: accept REPOSITORY GENERATION"},
		{"boss", "accept photos 000001-20260101T000000Z it was me", "", "{}\n", 0, ""},
		{"boss", "retire photos", "", "{}\n", 0, ""},
		{"boss", "keep photos", "", "{}\n", 0, ""},
		{"boss", "accept-clock", "", "{}\n", 0, ""},
		{"boss", "floor 7 14d", "", "{}\n", 0, ""},
		{"boss", "floor few 14d", "", "", hint.ExitUsage, "usage: floor GENERATIONS AGE"},
		{"home", "generations --text photos", "", "", 0, ""},
		{"reader", "wake --wait=5", "", "", 0, ""},
		{"reader", "wake --wait=-1", "", "", hint.ExitUsage, "usage: wake"},
		{"reader", "wake --wait=99999999999", "", "", hint.ExitUsage, "usage: wake"},
		{"reader", "sleep", "", "", hint.ExitRefused, "no verb of that name"},
		{"home", "sleep", "", "", 0, ""},
		{"home", "status --xml", "", "", hint.ExitUsage, "usage: status"},
	}
	for _, tt := range tests {
		t.Run(tt.key+" "+tt.verb, func(t *testing.T) {
			out, err := b.dial(t, tt.key).Run(t.Context(), tt.verb, strings.NewReader(tt.in), 1<<21)
			if hint.Code(err) != tt.code || (tt.err != "" && !strings.Contains(err.Error(), tt.err)) {
				t.Errorf("code %d, %v; want %d, %q", hint.Code(err), err, tt.code, tt.err)
			}
			if tt.out != "" && string(out) != tt.out {
				t.Errorf("got %q; want %q", out, tt.out)
			}
		})
	}
}

func TestKeeperLearnsWhoAsks(t *testing.T) {
	b := start(t)
	if _, err := b.dial(t, "home").Run(t.Context(), "abort p9", nil, 100); err != nil {
		t.Fatal(err)
	}
	want := keepercall.Args{Key: "home", Role: RolePush, Repositories: []string{"photos", "docs*"}, Push: "p9"}
	if diff := cmp.Diff(want, <-b.calls); diff != "" {
		t.Error(diff)
	}
}

// TestStatusOfTheLine: what home wants to know before the appliance travels.
func TestStatusOfTheLine(t *testing.T) {
	b := start(t)
	home := b.dial(t, "home")
	ask := func() (s pushwire.Status) {
		t.Helper()
		must(t, json.Unmarshal(must2(home.Run(t.Context(), "status --json", nil, pushwire.MaxLine))(t), &s))
		return s
	}
	if s := ask(); s.VPN != nil || !s.MailSent.IsZero() {
		t.Errorf("before any part said anything: %+v, %v", s.VPN, s.MailSent)
	}
	at := time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	must(t, status.Write(b.paths.Status(part.Network), status.Network{Addresses: []string{"192.0.2.7/24"}}))
	must(t, status.Write(b.paths.Status(part.Mail), status.Mail{LastSent: at}))
	if s := ask(); s.VPN == nil || s.VPN.Endpoint != "" || len(s.VPN.Addresses) != 1 || !s.MailSent.Equal(at) {
		t.Errorf("with another system's VPN: %+v, %v", s.VPN, s.MailSent)
	}
	must(t, status.Write(b.paths.Status(part.Network), status.Network{Peers: []status.PeerStatus{{Name: "home", Endpoint: "203.0.113.7:51820", LastHandshake: at}}}))
	if s := ask(); s.VPN == nil || s.VPN.Endpoint != "203.0.113.7:51820" || !s.VPN.LastHandshake.Equal(at) {
		t.Errorf("with a tunnel of its own: %+v", s.VPN)
	}
}

func TestStatusShowsOwnRepositoriesOnly(t *testing.T) {
	b := start(t)
	for key, want := range map[string][]string{"home": {"photos"}, "boss": {"photos", "secret"}, "reader": {"photos"}} {
		out, err := b.dial(t, key).Run(t.Context(), "status --json", nil, 1<<20)
		must(t, err)
		var s pushwire.Status
		must(t, json.Unmarshal(out, &s))
		var got []string
		for _, r := range s.Repositories {
			got = append(got, r.Name)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: %s", key, diff)
		}
		if s.Disk.State != status.DiskMounted || s.Disk.ExposureMinutes != 7 {
			t.Errorf("disk: %+v", s.Disk)
		}
	}
	text, err := b.dial(t, "home").Run(t.Context(), "status", nil, 1<<20)
	must(t, err)
	for _, want := range []string{"power", "unlocked", "mounted", "7 min", "512.0 GiB free of 1.0 TiB", "home is silent", "not set"} {
		if !strings.Contains(string(text), want) {
			t.Errorf("status lacks %q:\n%s", want, text)
		}
	}
	if strings.Contains(string(text), "secret") {
		t.Errorf("a push key learns the name of another's repository:\n%s", text)
	}
}

func TestDarkDisk(t *testing.T) {
	b := start(t)
	b.dark = true
	_, err := b.dial(t, "home").Run(t.Context(), "offer photos", strings.NewReader("line1\n"), 100)
	if hint.Code(err) != hint.ExitRefused || err.Error() != "the disk is dark" || hint.Of(err) != "wake it first" {
		t.Errorf("%v (%s)", err, hint.Of(err))
	}
	if _, err := b.dial(t, "home").Run(t.Context(), "status", nil, 1<<20); err != nil {
		t.Errorf("status must work in the dark: %v", err)
	}
}

// deaf is a line that goes dead in one direction.
type deaf struct {
	net.Conn
	dead chan struct{}
}

func (c *deaf) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	select {
	case <-c.dead:
		select {}
	default:
	}
	return n, err
}

// The disk cannot wait until a dead line is found to be dead.
func TestReleaseEndsSessionsOfADeadLine(t *testing.T) {
	b := start(t)
	raw, err := net.Dial("tcp", b.address)
	must(t, err)
	defer raw.Close()
	line := &deaf{raw, make(chan struct{})}
	conn, channels, requests, err := ssh.NewClientConn(line, b.address, &ssh.ClientConfig{
		User: "farkeep", Auth: []ssh.AuthMethod{ssh.PublicKeys(b.keys["reader"].signer)}, HostKeyCallback: ssh.FixedHostKey(b.host.signer.PublicKey()),
	})
	must(t, err)
	session, err := ssh.NewClient(conn, channels, requests).NewSession()
	must(t, err)
	must(t, session.RequestSubsystem("sftp"))
	<-b.held
	close(line.dead)
	begun := time.Now()
	must(t, localcall.Call(t.Context(), b.paths.Socket(part.Receiver), "release", nil, nil))
	if took := time.Since(begun); took > time.Minute {
		t.Errorf("the disk had to wait for %v", took)
	}
}

func TestReleaseEndsSessionsThatHoldTheDisk(t *testing.T) {
	b := start(t)
	d, err := b.dial(t, "home").Start(t.Context(), "upload p1")
	must(t, err)
	<-b.held
	must(t, localcall.Call(t.Context(), b.paths.Socket(part.Receiver), "release", nil, nil))
	if err := d.Wait(); hint.Code(err) != hint.ExitUnreachable {
		t.Errorf("the upload ended with %v", err)
	}
}

// The real OpenSSH sftp reads generations with a restore key and changes nothing.
func TestOpenSSHSFTP(t *testing.T) {
	sftp, err := exec.LookPath("sftp")
	if err != nil {
		t.Fatal("install openssh-client: ", err)
	}
	b := start(t)
	dir := t.TempDir()
	host, port, _ := net.SplitHostPort(b.address)
	known := filepath.Join(dir, "known")
	must(t, os.WriteFile(known, []byte("["+host+"]:"+port+" "+b.host.public()), 0o600))
	run := func(key, batch string) string {
		id := filepath.Join(dir, key)
		must(t, os.WriteFile(id, []byte(b.keys[key].pem), 0o600))
		cmd := exec.CommandContext(t.Context(), sftp, "-b", "-", "-i", id, "-P", port, "-o", "IdentitiesOnly=yes", "-o", "UserKnownHostsFile="+known, "-F", "none", host)
		cmd.Stdin = strings.NewReader(batch)
		out, _ := cmd.CombinedOutput()
		return string(out)
	}
	const generation = "/photos/000001-20260101T000000Z/files"
	got := filepath.Join(dir, "got")
	if out := run("reader", "get "+generation+"/README "+got+"\n"); true {
		if data, err := os.ReadFile(got); err != nil || string(data) != "photos data\n" {
			t.Fatalf("get: %q, %v\n%s", data, err, out)
		}
	}
	tests := []struct{ name, key, batch, want string }{
		{"listing", "anybody", "ls -1 /\n", "/secret"},
		{"own listing", "reader", "ls -1 /\n", "/photos"},
		{"another's repository", "reader", "ls /secret\n", "not found"},
		{"another's file", "reader", "get /secret/000001-20260101T000000Z/files/README " + got + "2\n", "not found"},
		{"up and away", "reader", "get /photos/../../../../../../etc/passwd " + got + "2\n", "not found"},
		{"symbolic link out", "reader", "get " + generation + "/escape/passwd " + got + "2\n", "not found"},
		{"put", "boss", "put " + got + " " + generation + "/new\n", "Permission denied"},
		{"overwrite", "boss", "put " + got + " " + generation + "/README\n", "Permission denied"},
		{"rm", "boss", "rm " + generation + "/README\n", "Permission denied"},
		{"rename", "boss", "rename " + generation + "/README " + generation + "/x\n", "Permission denied"},
		{"chmod", "boss", "chmod 777 " + generation + "/README\n", "Permission denied"},
		{"mkdir", "boss", "mkdir /photos/x\n", "Permission denied"},
		{"symlink", "boss", "symlink a " + generation + "/x\n", "Permission denied"},
		{"push key, the keeper serves it", "home", "ls /\n", "the keeper was asked"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			out := run(tt.key, tt.batch)
			if !strings.Contains(strings.ToLower(out), strings.ToLower(tt.want)) {
				t.Errorf("%q lacks %q", out, tt.want)
			}
			if tt.name == "own listing" && strings.Contains(out, "secret") {
				t.Errorf("another's repository is named: %q", out)
			}
		})
	}
	if _, err := os.Stat(got + "2"); err == nil {
		t.Error("something forbidden was fetched")
	}
	if data, _ := os.ReadFile(filepath.Join(b.paths.Disk(), "generations"+generation, "README")); string(data) != "photos data\n" {
		t.Errorf("the generation changed: %q", data)
	}
}

// One key gets its share of the disk's sessions and no more; another still gets in.
func TestOneKeyCannotTakeAllHolds(t *testing.T) {
	b := start(t)
	first, second, third := b.dial(t, "home"), b.dial(t, "home"), b.dial(t, "home")
	for i := range maxHolds {
		c := first
		if i >= maxHolds/2 {
			c = second
		}
		_, err := c.Start(t.Context(), "upload p1")
		must(t, err)
		<-b.held
	}
	_, err := third.Run(t.Context(), "abort p1", nil, 100)
	if hint.Code(err) != hint.ExitRefused || !strings.Contains(err.Error(), "sessions already") {
		t.Errorf("one hold more: %v", err)
	}
	if _, err := b.dial(t, "reader").Run(t.Context(), "generations", nil, 1000); err != nil {
		t.Errorf("another key: %v", err)
	}
}
