package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"farkeep/pusher/appliance"
	"farkeep/pusher/target"
	"farkeep/pusher/target/targettest"
	"farkeep/shared/hint"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"
	"farkeep/shared/recipe"
	"farkeep/shared/sshverb"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/crypto/ssh"
)

// The tests below let the pusher's own client speak to the appliance's own
// parts: confined processes with their users, SSH over the loopback interface, a
// real mount for the disk. Only the disk part is played.

// program is a copy of this test binary under the program's name, where every
// user may start it.
func program(t testing.TB) string {
	t.Helper()
	self, err := os.ReadFile("/proc/self/exe")
	must(t, err)
	bin := filepath.Join(benchDir(t), "farkeep-appliance")
	must(t, os.WriteFile(bin, self, 0o755))
	return bin
}

// line is a network that counts what the pusher sends, and can be cut.
type line struct {
	by   string // what to dial, if it is not who is meant
	sent atomic.Int64
	// cutAfter ends the connection once so many bytes were sent; 0: never.
	cutAfter atomic.Int64
}

func (l *line) dial(ctx context.Context, network, address string) (net.Conn, error) {
	if l.by != "" {
		address = l.by
	}
	c, err := (&net.Dialer{}).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	return &wire{c, l}, nil
}

type wire struct {
	net.Conn
	line *line
}

func (w *wire) Write(p []byte) (int, error) {
	n, err := w.Conn.Write(p)
	sent := w.line.sent.Add(int64(n))
	if limit := w.line.cutAfter.Load(); limit > 0 && sent >= limit {
		w.Conn.Close()
	}
	return n, err
}

// client is the pusher's view of the appliance, by way of l.
func (a *benchAppliance) client(t *testing.T, l *line) *appliance.Appliance {
	t.Helper()
	to := appliance.New(appliance.Config{
		Name: "attic", Address: a.address(), HostKey: a.pinned(t), Identity: a.identity(t),
		WakeWait: 20 * time.Second, Log: slog.New(slog.DiscardHandler), DialContext: l.dial,
	})
	t.Cleanup(func() { to.Close() })
	return to
}

func (a *benchAppliance) address() string { return fmt.Sprintf("127.0.0.1:%d", a.port) }

func (a *benchAppliance) pinned(t testing.TB) ssh.PublicKey {
	t.Helper()
	key, _, _, _, err := ssh.ParseAuthorizedKey([]byte(a.hostKey))
	must(t, err)
	return key
}

func (a *benchAppliance) identity(t testing.TB) ssh.Signer {
	t.Helper()
	private, err := os.ReadFile(a.key)
	must(t, err)
	signer, err := ssh.ParsePrivateKey(private)
	must(t, err)
	return signer
}

// verb runs one verb as any SSH client can.
func (a *benchAppliance) verb(t *testing.T, verb string) []byte {
	t.Helper()
	c, err := sshverb.Dial(t.Context(), sshverb.Peer{Address: a.address(), User: "farkeep", Identity: a.identity(t), HostKey: a.pinned(t)})
	must(t, err)
	defer c.Close()
	out, err := c.Run(t.Context(), verb, nil, 1<<20)
	if err != nil {
		t.Fatalf("%s: %v", verb, err)
	}
	return out
}

func (a *benchAppliance) generations(t *testing.T, repository string) (all []pushwire.Generation) {
	t.Helper()
	for text := range bytes.Lines(a.verb(t, "generations "+repository)) {
		var g pushwire.Generation
		must(t, pushwire.ReadLine(bufio.NewReaderSize(bytes.NewReader(text), pushwire.MaxLine), &g))
		all = append(all, g)
	}
	return all
}

func (a *benchAppliance) verify(t *testing.T, repository, generation string) (v pushwire.VerifyAnswer) {
	t.Helper()
	must(t, json.Unmarshal(a.verb(t, "verify "+repository+" "+generation), &v))
	return v
}

// files is where the content of a generation lies on the disk.
func (a *benchAppliance) files(repository, generation string) string {
	return filepath.Join(a.paths.Disk(), "generations", repository, generation, "files")
}

// source is a repository in memory: content by path, in one folder.
type source map[string]string

func noise(seed uint64, n int) string {
	var key [32]byte
	key[0] = byte(seed)
	b := make([]byte, n)
	rand.NewChaCha8(key).Read(b)
	return string(b)
}

// list is the manifest, as the pusher makes it.
func (s source) list(t testing.TB) (offer pushwire.Offer, encoded []byte, entries []manifest.Entry) {
	t.Helper()
	for path, content := range s {
		h := manifest.NewHash()
		io.WriteString(h, content)
		entries = append(entries, manifest.Entry{Path: path, Kind: manifest.File, Mode: 0o644, Size: int64(len(content)), Sum: manifest.SumOf(h)})
	}
	slices.SortFunc(entries, func(a, b manifest.Entry) int { return manifest.ComparePaths(a.Path, b.Path) })
	var out bytes.Buffer
	w := manifest.NewWriter(&out)
	for _, e := range entries {
		must(t, w.Add(e))
	}
	sum, err := w.Close()
	must(t, err)
	return pushwire.Offer{Digest: sum.Digest.String(), Entries: sum.Entries, Bytes: sum.Bytes, Kind: pushwire.KindFiles}, out.Bytes(), entries
}

// offer begins a push. As the pusher does, it tries again what is temporary: the
// appliance may not have noticed yet that the line of the attempt before is cut.
func (s source) offer(t testing.TB, to target.Target, repository string) (target.Answer, error) {
	t.Helper()
	o, encoded, _ := s.list(t)
	for {
		answer, err := to.Offer(t.Context(), repository, o, target.List{Open: func(string) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(encoded)), nil }})
		if !target.Temporary(err) || t.Context().Err() != nil {
			return answer, err
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// upload sends what the answer asks for.
func (s source) upload(t testing.TB, to target.Target, answer target.Answer) (pushwire.UploadAnswer, error) {
	t.Helper()
	_, _, entries := s.list(t)
	have := map[int64]int64{}
	for _, p := range answer.Resume {
		have[p.Index] = p.Have
	}
	return to.Upload(t.Context(), answer.Push, func(w io.Writer) error {
		e := recipe.NewEncoder(w)
		for i := range answer.Needed.All() {
			content := s[entries[i].Path]
			err := e.File(i)
			if err == nil && have[i] > 0 {
				err = e.Keep(have[i])
			}
			if err == nil {
				_, err = io.WriteString(e, content[have[i]:])
			}
			if err == nil {
				err = e.End(entries[i].Sum)
			}
			if err != nil {
				return err
			}
		}
		return e.Close()
	})
}

func (s source) push(t *testing.T, to target.Target, repository string) string {
	t.Helper()
	answer, err := s.offer(t, to, repository)
	must(t, err)
	if answer.Answer != pushwire.AnswerSend {
		t.Fatalf("offer: answered %q", answer.Answer)
	}
	_, err = s.upload(t, to, answer)
	must(t, err)
	c, err := to.Commit(t.Context(), answer.Push)
	must(t, err)
	return c.Generation
}

// lies compares a generation on the disk with the source.
func (s source) lies(t *testing.T, a *benchAppliance, repository, generation string) {
	t.Helper()
	got := source{}
	dir := a.files(repository, generation)
	entries, err := os.ReadDir(dir)
	must(t, err)
	for _, e := range entries {
		content, err := os.ReadFile(filepath.Join(dir, e.Name()))
		must(t, err)
		got[e.Name()] = string(content)
	}
	if !cmp.Equal(s, got) {
		t.Errorf("%s/%s on the disk is not what was pushed: %d files, want %d", repository, generation, len(got), len(s))
	}
}

// TestPushOverSSH: the appliance is a target like any other. The suite is the
// one that a local folder passes too.
func TestPushOverSSH(t *testing.T) {
	bin := program(t)
	targettest.Run(t, func(t *testing.T) target.Target {
		return startAppliance(t, benchDir(t), bin, "64m").client(t, &line{})
	})
}

// An upload that is refused while most of it is still to come ends with the reason,
// however much of it is on its way then.
func TestRefusalInAnUploadIsHeard(t *testing.T) {
	a := startAppliance(t, benchDir(t), program(t), "64m")
	to := a.client(t, &line{})
	must(t, to.Wake(t.Context()))
	rest := noise(1, 12<<20)
	for range 8 {
		s := source{"a": "what was offered", "b": rest}
		answer, err := s.offer(t, to, "photos")
		must(t, err)
		s["a"] = "what is sent now"
		if _, err := s.upload(t, to, answer); err == nil || target.Temporary(err) || !strings.Contains(err.Error(), "photos") {
			t.Fatalf("a wrong file ended its upload with %v", err)
		}
	}
}

// packets is a line that is cut at one of the packets that go either way.
type packets struct {
	seen  atomic.Int64
	cutAt atomic.Int64 // that one is lost, and all after it; 0: none
}

func (p *packets) dial(ctx context.Context, network, address string) (net.Conn, error) {
	c, err := (&net.Dialer{}).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	return &packetConn{c, p}, nil
}

type packetConn struct {
	net.Conn
	line *packets
}

// pass counts a packet, and cuts the line in its place.
func (c *packetConn) pass() error {
	if c.line.seen.Add(1) == c.line.cutAt.Load() {
		c.Conn.Close()
		return net.ErrClosed
	}
	return nil
}

func (c *packetConn) Write(p []byte) (int, error) {
	if err := c.pass(); err != nil {
		return 0, err
	}
	return c.Conn.Write(p)
}

func (c *packetConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if err == nil {
		err = c.pass()
	}
	if err != nil {
		n = 0
	}
	return n, err
}

// A push that is cut behind its upload, wherever that is, makes one generation and one
// heartbeat, and nobody is suspected of a lie.
func TestCutsBehindAnUpload(t *testing.T) {
	a := startAppliance(t, benchDir(t), program(t), "64m")
	l := &packets{}
	to := appliance.New(appliance.Config{
		Name: "attic", Address: a.address(), HostKey: a.pinned(t), Identity: a.identity(t),
		WakeWait: 20 * time.Second, Log: slog.New(slog.DiscardHandler), DialContext: l.dial,
	})
	defer to.Close()
	must(t, to.Wake(t.Context()))
	h := newHome(t, to)
	night := 0
	push := func() {
		t.Helper()
		night++
		h.write(map[string]string{"a": fmt.Sprint("night ", night)})
		if o := h.push(); !o.New {
			t.Errorf("night %d: %+v", night, o)
		}
	}
	push()
	l.seen.Store(0)
	push()
	all := l.seen.Load()
	for n := int64(1); n <= all; n++ {
		l.seen.Store(0)
		l.cutAt.Store(n)
		push()
	}
	l.cutAt.Store(0)
	if g := a.generations(t, "photos"); len(g) != night {
		t.Errorf("%d generations of %d nights", len(g), night)
	}
	s, err := a.client(t, &line{}).Status(t.Context()) // the last packet may have been the line's
	must(t, err)
	if len(s.Heartbeats) != 1 || len(s.Untrue) > 0 {
		t.Errorf("heartbeats: %+v, not true: %+v", s.Heartbeats, s.Untrue)
	}
	t.Logf("%d packets of a push, each lost once", all)
}

func TestGenerationsAndVerifyOverSSH(t *testing.T) {
	a := startAppliance(t, benchDir(t), program(t), "64m")
	to := a.client(t, &line{})
	must(t, to.Wake(t.Context()))
	first := source{"a": "one", "b": noise(1, 100_000), "c": "three"}
	second := source{"a": "one", "b": noise(2, 100_000), "d": "four"}
	names := []string{first.push(t, to, "photos"), second.push(t, to, "photos")}
	other := first.push(t, to, "music")

	all := a.generations(t, "photos")
	if len(all) != 2 {
		t.Fatalf("generations: %+v", all)
	}
	for i, s := range []source{first, second} {
		o, _, _ := s.list(t)
		g := all[i]
		if g.Repository != "photos" || g.Name != names[i] || g.Digest != o.Digest || g.Entries != o.Entries || g.Bytes != o.Bytes || g.Suspect || g.Committed.IsZero() {
			t.Errorf("generation %d is told as %+v, pushed was %s with %+v", i, g, names[i], o)
		}
		want := pushwire.VerifyAnswer{Files: o.Entries, Bytes: o.Bytes}
		if diff := cmp.Diff(want, a.verify(t, "photos", g.Name)); diff != "" {
			t.Errorf("verify %s: %s", g.Name, diff)
		}
	}

	// One byte rots in a file of one generation.
	path := filepath.Join(a.files("photos", names[0]), "b")
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	if _, err := f.WriteAt([]byte{^first["b"][50_000]}, 50_000); err != nil {
		t.Fatal(err)
	}
	must(t, f.Close())
	if bad := a.verify(t, "photos", names[0]).Bad; len(bad) != 1 || !strings.HasPrefix(bad[0], "b: ") {
		t.Errorf("the damaged file is b, named are %q", bad)
	}
	for _, whole := range [][2]string{{"photos", names[1]}, {"music", other}} {
		if v := a.verify(t, whole[0], whole[1]); len(v.Bad) > 0 {
			t.Errorf("%s is whole, yet: %q", whole, v.Bad)
		}
	}
}

// An upload that is cut in the middle of a file goes on there: what arrived does
// not cross the line again.
func TestCutUploadResumesOverSSH(t *testing.T) {
	a := startAppliance(t, benchDir(t), program(t), "128m")
	l := &line{}
	to := a.client(t, l)
	must(t, to.Wake(t.Context()))
	before := source{"a": "one"}
	kept := before.push(t, to, "photos")

	const long, cut = 24 << 20, 15 << 20
	s := source{"a": "one", "b": "two", "long": noise(1, long), "z": noise(2, 1<<20)}
	answer, err := s.offer(t, to, "photos")
	must(t, err)
	l.cutAfter.Store(l.sent.Load() + cut)
	if _, err := s.upload(t, to, answer); !target.Temporary(err) {
		t.Fatalf("a line that was cut: %v", err)
	}
	l.cutAfter.Store(0)
	if n := len(a.generations(t, "photos")); n != 1 {
		t.Errorf("after the cut there are %d generations", n)
	}

	sent := l.sent.Load()
	again, err := s.offer(t, to, "photos")
	must(t, err)
	if len(again.Resume) != 1 || again.Resume[0].Have < cut/2 || again.Resume[0].Have > cut {
		t.Fatalf("after %d bytes the appliance has %+v", cut, again.Resume)
	}
	rest := int64(long) - again.Resume[0].Have + 1<<20
	if again.Push != answer.Push || again.NeedBytes != rest {
		t.Errorf("push %s goes on as %s and needs %d bytes, want %d", answer.Push, again.Push, again.NeedBytes, rest)
	}
	got, err := s.upload(t, to, again)
	must(t, err)
	// SSH adds its packets' heads and tags: far less than 2 %.
	if n := l.sent.Load() - sent; n < rest || n > rest+rest/50 {
		t.Errorf("%d bytes went over the line for the %d that were missing", n, rest)
	}
	if got.Files != again.Need {
		t.Errorf("%d files arrived, %d were missing", got.Files, again.Need)
	}
	c, err := to.Commit(t.Context(), again.Push)
	must(t, err)
	s.lies(t, a, "photos", c.Generation)
	before.lies(t, a, "photos", kept)
}

// A heartbeat is believed only as long as it is true: after the next push the
// digest of yesterday is not the newest generation's.
func TestUntrueHeartbeatOverSSH(t *testing.T) {
	a := startAppliance(t, benchDir(t), program(t), "64m")
	to := a.client(t, &line{})
	must(t, to.Wake(t.Context()))
	beat := func(s source) error {
		o, _, _ := s.list(t)
		return to.Heartbeat(t.Context(), pushwire.Heartbeat{Host: "home", At: time.Now(), Repositories: []pushwire.RepositoryDigest{{Name: "photos", Digest: o.Digest}}})
	}
	heard := func() time.Time {
		s, err := to.Status(t.Context())
		must(t, err)
		if len(s.Heartbeats) == 0 {
			return time.Time{}
		}
		return s.Heartbeats[0].ReceivedAt
	}
	old, now := source{"a": "one"}, source{"a": "two"}
	old.push(t, to, "photos")
	must(t, beat(old))
	first := heard()
	if first.IsZero() {
		t.Error("a true heartbeat is not in the status")
	}
	now.push(t, to, "photos")
	if err := beat(old); err == nil || target.Temporary(err) || !strings.Contains(err.Error(), "photos") {
		t.Errorf("a heartbeat for the generation before: %v", err)
	}
	if got := heard(); !got.Equal(first) {
		t.Errorf("the untrue heartbeat counts: %v, then %v", first, got)
	}
	must(t, beat(now))
}

// A disk that fills up in the middle of an upload costs nothing but the push,
// and the push goes on when there is room again.
func TestDiskFullDuringUploadOverSSH(t *testing.T) {
	a := startAppliance(t, benchDir(t), program(t), "32m")
	l := &line{}
	to := a.client(t, l)
	must(t, to.Wake(t.Context()))
	before := source{"a": noise(1, 1<<20), "b": noise(2, 1<<20)}
	kept := before.push(t, to, "photos")

	s := source{"a": before["a"]}
	for i := range 12 {
		s[fmt.Sprintf("new-%02d", i)] = noise(uint64(10+i), 1<<20)
	}
	answer, err := s.offer(t, to, "photos")
	must(t, err)
	// Between the offer and the upload something else takes the room.
	ballast := filepath.Join(a.paths.Disk(), "ballast")
	must(t, os.WriteFile(ballast, make([]byte, 24<<20), 0o600))
	_, err = s.upload(t, to, answer)
	if err == nil || target.Temporary(err) || !strings.Contains(err.Error(), "no space left") || !strings.Contains(hint.Of(err), "every generation is intact") {
		t.Fatalf("a disk that filled up: %v; hint %q", err, hint.Of(err))
	}
	if _, err := s.offer(t, to, "photos"); err == nil || target.Temporary(err) || !strings.Contains(err.Error(), "no room") {
		t.Errorf("an offer to a full disk: %v", err)
	}
	if _, err := to.Commit(t.Context(), answer.Push); err == nil {
		t.Error("a push of which files are missing was committed")
	}
	all := a.generations(t, "photos")
	if len(all) != 1 || all[0].Name != kept {
		t.Errorf("generations: %+v", all)
	}
	if v := a.verify(t, "photos", kept); len(v.Bad) > 0 || v.Files != 2 {
		t.Errorf("the generation before: %+v", v)
	}
	before.lies(t, a, "photos", kept)

	must(t, os.Remove(ballast))
	again, err := s.offer(t, to, "photos")
	must(t, err)
	if again.Push != answer.Push || again.Kept == 0 || again.Need+again.Kept != 12 || again.Need == 0 {
		t.Errorf("push %s goes on as %s: %d files are there, %d are missing", answer.Push, again.Push, again.Kept, again.Need)
	}
	sent := l.sent.Load()
	got, err := s.upload(t, to, again)
	must(t, err)
	if n := l.sent.Load() - sent; got.Files != again.Need || n > again.NeedBytes+again.NeedBytes/50 {
		t.Errorf("%d files in %d bytes went over the line; %d files of %d bytes were missing", got.Files, n, again.Need, again.NeedBytes)
	}
	c, err := to.Commit(t.Context(), again.Push)
	must(t, err)
	s.lies(t, a, "photos", c.Generation)
	before.lies(t, a, "photos", kept)
}
