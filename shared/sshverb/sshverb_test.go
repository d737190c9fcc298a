package sshverb_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
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
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"farkeep/shared/hint"
	"farkeep/shared/sshverb"
)

func newSigner(t *testing.T) (ssh.Signer, []byte) {
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
	return signer, pem.EncodeToMemory(block)
}

type testServer struct {
	addr    string
	host    ssh.Signer
	client  ssh.Signer
	pem     []byte
	stalled chan struct{}
}

func startServer(t *testing.T, limits sshverb.Limits) *testServer {
	t.Helper()
	ts := &testServer{stalled: make(chan struct{}, 1)}
	ts.host, _ = newSigner(t)
	ts.client, ts.pem = newSigner(t)
	server := &sshverb.Server{
		HostKey: ts.host,
		Limits:  limits,
		Log:     slog.New(slog.NewTextHandler(io.Discard, nil)),
		Authorise: func(key ssh.PublicKey, _ net.Addr) (*ssh.Permissions, error) {
			if bytes.Equal(key.Marshal(), ts.client.PublicKey().Marshal()) {
				return &ssh.Permissions{Extensions: map[string]string{"role": "push"}}, nil
			}
			return nil, errors.New("unknown key")
		},
		Exec: func(ctx context.Context, s *sshverb.Session) error {
			switch s.Verb {
			case "echo":
				_, err := io.Copy(s.Stdout, s.Stdin)
				if ctx.Err() != nil {
					ts.stalled <- struct{}{}
				}
				return err
			case "who":
				fmt.Fprintf(s.Stdout, "%s %q\n", s.Permissions.Extensions["role"], s.Args)
				return nil
			case "refuse":
				return &sshverb.Error{Code: hint.ExitRefused, Text: "refused", Hint: "ask nicely", Err: errors.New("the secret reason")}
			case "panic":
				panic("on purpose")
			case "think":
				time.Sleep(100 * time.Millisecond) // the peer waits meanwhile
				_, err := io.Copy(s.Stdout, s.Patient())
				return err
			case "wait":
				<-ctx.Done()
				ts.stalled <- struct{}{}
				return ctx.Err()
			}
			return &sshverb.Error{Code: hint.ExitUsage, Text: "unknown verb"}
		},
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ts.addr = l.Addr().String()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- server.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return ts
}

func (ts *testServer) dial(t *testing.T) *sshverb.Client {
	t.Helper()
	c, err := sshverb.Dial(t.Context(), sshverb.Peer{Address: ts.addr, User: "pi", Identity: ts.client, HostKey: ts.host.PublicKey()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestVerbs(t *testing.T) {
	ts := startServer(t, sshverb.Limits{})
	c := ts.dial(t)
	big := bytes.Repeat([]byte("farkeep "), 1<<18)
	tests := []struct {
		verb string
		in   []byte
		out  string
		code int
		err  string
	}{
		{"who a=b c", nil, "push [\"a=b\" \"c\"]\n", 0, ""},
		{"echo", big, string(big), 0, ""},
		{"refuse", nil, "", hint.ExitRefused, "refused"},
		{"panic", nil, "", hint.ExitFailure, "something went wrong inside"},
		{"who again", nil, "push [\"again\"]\n", 0, ""}, // a panic ends its own session only
		{"nonsense", nil, "", hint.ExitUsage, "unknown verb"},
	}
	for _, tt := range tests {
		t.Run(tt.verb, func(t *testing.T) {
			out, err := c.Run(t.Context(), tt.verb, bytes.NewReader(tt.in), 1<<22)
			if string(out) != tt.out || hint.Code(err) != tt.code {
				t.Errorf("got %d bytes, code %d, %v; want %d bytes, code %d", len(out), hint.Code(err), err, len(tt.out), tt.code)
			}
			if tt.err != "" && (err == nil || err.Error() != tt.err) {
				t.Errorf("error %v; want %q and not a word more", err, tt.err)
			}
		})
	}
	if _, err := c.Run(t.Context(), "echo", bytes.NewReader(big), 10); err == nil || !strings.Contains(err.Error(), "longer than 10 bytes") {
		t.Errorf("an answer over the limit: %v", err)
	}
}

func TestDialRefusals(t *testing.T) {
	ts := startServer(t, sshverb.Limits{})
	stranger, _ := newSigner(t)
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	tests := []struct {
		name string
		peer sshverb.Peer
		code int
	}{
		{"unknown key", sshverb.Peer{Address: ts.addr, Identity: stranger, HostKey: ts.host.PublicKey()}, hint.ExitRefused},
		{"wrong host key", sshverb.Peer{Address: ts.addr, Identity: ts.client, HostKey: stranger.PublicKey()}, hint.ExitRefused},
		{"nobody listens", sshverb.Peer{Address: "127.0.0.1:1", Identity: ts.client, HostKey: ts.host.PublicKey()}, hint.ExitUnreachable},
		{"silence", sshverb.Peer{Address: silent.Addr().String(), Identity: ts.client, HostKey: ts.host.PublicKey(), Connect: 50 * time.Millisecond}, hint.ExitUnreachable},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c, err := sshverb.Dial(t.Context(), tt.peer)
			if err == nil {
				c.Close()
			}
			if hint.Code(err) != tt.code {
				t.Errorf("code %d, %v; want %d", hint.Code(err), err, tt.code)
			}
		})
	}
}

func TestStalledPeerFreesItsSession(t *testing.T) {
	ts := startServer(t, sshverb.Limits{Stall: 50 * time.Millisecond})
	d, err := ts.dial(t).Start(t.Context(), "echo")
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	<-ts.stalled // nothing is sent, the server gives up by itself
}

// A handler may be the one that takes its time.
func TestPatientReader(t *testing.T) {
	ts := startServer(t, sshverb.Limits{Stall: 20 * time.Millisecond})
	d, err := ts.dial(t).Start(t.Context(), "think")
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	time.AfterFunc(200*time.Millisecond, func() {
		io.WriteString(d.Stdin, "at last")
		d.Stdin.Close()
	})
	if out, err := io.ReadAll(d.Stdout); string(out) != "at last" || err != nil {
		t.Errorf("%q, %v", out, err)
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
		<-make(chan struct{})
	default:
	}
	return n, err
}

// A peer that does not answer the end of its session loses the connection: the
// handler that waits for its bytes must not wait until the line is found dead.
func TestDeadLineFreesItsSession(t *testing.T) {
	ts := startServer(t, sshverb.Limits{Stall: 50 * time.Millisecond, Grace: 50 * time.Millisecond})
	line := &deaf{dead: make(chan struct{})}
	c, err := sshverb.Dial(t.Context(), sshverb.Peer{Address: ts.addr, Identity: ts.client, HostKey: ts.host.PublicKey(),
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := (&net.Dialer{}).DialContext(ctx, network, address)
			line.Conn = conn
			return line, err
		}})
	if err != nil {
		t.Fatal(err)
	}
	defer line.Conn.Close()
	if _, err := c.Start(t.Context(), "echo"); err != nil {
		t.Fatal(err)
	}
	close(line.dead)
	select {
	case <-ts.stalled:
	case <-time.After(10 * time.Second):
		t.Error("the handler still waits for a peer that is gone")
	}
}

func TestVanishedPeerFreesItsSession(t *testing.T) {
	ts := startServer(t, sshverb.Limits{})
	c := ts.dial(t)
	if _, err := c.Start(t.Context(), "wait"); err != nil {
		t.Fatal(err)
	}
	c.Close()
	<-ts.stalled
}

func TestLimits(t *testing.T) {
	ts := startServer(t, sshverb.Limits{Connections: 1, Sessions: 2})
	c := ts.dial(t)
	for range 2 {
		if _, err := c.Start(t.Context(), "wait"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.Start(t.Context(), "who"); err == nil {
		t.Error("a third session was accepted")
	}
	second, err := sshverb.Dial(t.Context(), sshverb.Peer{Address: ts.addr, Identity: ts.client, HostKey: ts.host.PublicKey()})
	if err == nil {
		second.Close()
		t.Error("a second connection was accepted")
	}
	c.Close()
	<-ts.stalled
	<-ts.stalled
}

// Connections that say nothing, however many, shut nobody out: the longest silent
// one makes room. One that has authenticated does not.
func TestSilentConnectionsMakeRoom(t *testing.T) {
	ts := startServer(t, sshverb.Limits{Connections: 3, PerKey: 3})
	first := ts.dial(t)
	if _, err := first.Run(t.Context(), "who", nil, 1<<10); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		c, err := net.Dial("tcp", ts.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	second := ts.dial(t)
	for _, c := range []*sshverb.Client{first, second} {
		if _, err := c.Run(t.Context(), "who", nil, 1<<10); err != nil {
			t.Error(err)
		}
	}
}

// One handshake at a time, and the first says nothing: all others are served.
func TestHandshakesTakeTurns(t *testing.T) {
	ts := startServer(t, sshverb.Limits{Connections: 40, PerKey: 40, Handshakes: 1, Turn: 50 * time.Millisecond})
	silent, err := net.Dial("tcp", ts.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	var all sync.WaitGroup
	for range 30 {
		all.Go(func() {
			c, err := sshverb.Dial(t.Context(), sshverb.Peer{Address: ts.addr, Identity: ts.client, HostKey: ts.host.PublicKey(), Connect: time.Minute})
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			if _, err := c.Run(t.Context(), "who", nil, 1<<10); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
}

// A stock OpenSSH client drives the verbs, and gets nothing else.
func TestOpenSSH(t *testing.T) {
	ssh, err := exec.LookPath("ssh")
	if err != nil {
		t.Fatal("install openssh-client: ", err)
	}
	ts := startServer(t, sshverb.Limits{})
	dir := t.TempDir()
	identity := filepath.Join(dir, "id")
	if err := os.WriteFile(identity, ts.pem, 0o600); err != nil {
		t.Fatal(err)
	}
	host, port, _ := net.SplitHostPort(ts.addr)
	known := filepath.Join(dir, "known_hosts")
	line := fmt.Sprintf("[%s]:%s %s", host, port, sshPublic(ts.host))
	if err := os.WriteFile(known, []byte(line), 0o600); err != nil {
		t.Fatal(err)
	}
	run := func(in string, args ...string) (string, string, int) {
		base := []string{"-F", "none", "-i", identity, "-p", port, "-o", "UserKnownHostsFile=" + known, "-o", "StrictHostKeyChecking=yes", "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes"}
		cmd := exec.CommandContext(t.Context(), ssh, append(append(base, host), args...)...)
		var out, errOut strings.Builder
		cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(in), &out, &errOut
		cmd.Run()
		return out.String(), errOut.String(), cmd.ProcessState.ExitCode()
	}
	version, _ := exec.Command(ssh, "-V").CombinedOutput()
	t.Logf("peer: %s", bytes.TrimSpace(version))

	if out, errOut, code := run("hello", "echo"); out != "hello" || code != 0 {
		t.Errorf("echo: %q %q %d", out, errOut, code)
	}
	if out, errOut, code := run("", "refuse"); out != "" || code != hint.ExitRefused || errOut != "refused\nhint: ask nicely\n" {
		t.Errorf("refuse: %q %q %d", out, errOut, code)
	}
	if out, errOut, code := run("", "who 'quoted words'"); out != "" || code != hint.ExitUsage {
		t.Errorf("quotes: %q %q %d", out, errOut, code)
	}
	if out, errOut, code := run(""); out != "" || code != hint.ExitUsage || !strings.Contains(errOut, "no shell") {
		t.Errorf("shell: %q %q %d", out, errOut, code)
	}
	if out, _, code := run("", "-s", "sftp"); out != "" || code == 0 {
		t.Errorf("subsystem: %q %d", out, code)
	}
	forwarded := []string{"-N", "-o", "ExitOnForwardFailure=yes", "-R", "0:127.0.0.1:1"}
	if _, errOut, code := run("", forwarded...); code == 0 || !strings.Contains(errOut, "forward") {
		t.Errorf("remote forwarding: %q %d", errOut, code)
	}
	if _, errOut, code := run("", "-W", "127.0.0.1:"+port); code == 0 || !strings.Contains(errOut, "only sessions") {
		t.Errorf("local forwarding: %q %d", errOut, code)
	}
}

func sshPublic(s ssh.Signer) string { return string(ssh.MarshalAuthorizedKey(s.PublicKey())) }

func FuzzParseVerb(f *testing.F) {
	for _, s := range []string{"status", "offer repo", "a  b", "", " a", "x\x00", "key 1-2", strings.Repeat("a", 5000), "../x", "a;b"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, line string) {
		verb, args, err := sshverb.ParseVerb(line)
		if err != nil {
			if !errors.Is(err, sshverb.ErrBadVerb) {
				t.Fatalf("untyped error %v", err)
			}
			return
		}
		if joined := strings.Join(append([]string{verb}, args...), " "); joined != line {
			t.Fatalf("%q parsed as %q", line, joined)
		}
		if strings.ContainsAny(line, "\x00\n\r;|&$`'\"\\<>(){}~!? ") && len(args) == 0 {
			t.Fatalf("%q accepted as a verb", line)
		}
	})
}

// One key that takes all it can get leaves room for the others.
func TestOneKeyCannotShutOutTheOthers(t *testing.T) {
	ts := startServer(t, sshverb.Limits{Connections: 4})
	for range 2 {
		if _, err := ts.dial(t).Run(t.Context(), "who a", nil, 100); err != nil {
			t.Fatal(err)
		}
	}
	third, err := sshverb.Dial(t.Context(), sshverb.Peer{Address: ts.addr, Identity: ts.client, HostKey: ts.host.PublicKey()})
	if err == nil {
		_, err = third.Run(t.Context(), "who a", nil, 100)
		third.Close()
	}
	if err == nil {
		t.Error("one key has more than half of the connections")
	}
	stranger, _ := newSigner(t)
	if _, err := sshverb.Dial(t.Context(), sshverb.Peer{Address: ts.addr, Identity: stranger, HostKey: ts.host.PublicKey()}); hint.Code(err) != hint.ExitRefused {
		t.Errorf("another key does not even get as far as being refused: %v", err)
	}
}

// What a verb's arguments are is for the handler; a server that takes secrets
// as words says what of them may be logged, and no error of either side quotes them.
func TestArgumentsStayOutOfLogAndErrors(t *testing.T) {
	const token = "AN-ARGUMENT-THAT-IS-SECRET"
	host, _ := newSigner(t)
	client, _ := newSigner(t)
	var log strings.Builder
	var mu sync.Mutex
	server := &sshverb.Server{
		HostKey:   host,
		Log:       slog.New(slog.NewTextHandler(writerFunc(func(p []byte) (int, error) { mu.Lock(); defer mu.Unlock(); return log.Write(p) }), &slog.HandlerOptions{Level: slog.LevelDebug})),
		Authorise: func(ssh.PublicKey, net.Addr) (*ssh.Permissions, error) { return &ssh.Permissions{}, nil },
		LogArgs:   func(_ string, args []string) []string { return args[:1] },
		Exec: func(ctx context.Context, s *sshverb.Session) error {
			if s.Verb == "refuse" {
				return sshverb.Refuse(errors.New("no"), "refused")
			}
			if s.Verb == "panic" {
				panic("on purpose")
			}
			fmt.Fprint(s.Stdout, strings.Repeat("x", 100))
			fmt.Fprint(s.Stderr, "token new\n")
			return nil
		},
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- server.Serve(ctx, l) }()
	c, err := sshverb.Dial(t.Context(), sshverb.Peer{Address: l.Addr().String(), Identity: client, HostKey: host.PublicKey()})
	if err != nil {
		t.Fatal(err)
	}
	var said strings.Builder
	for _, verb := range []string{"refuse known", "panic known", "key known"} {
		_, err := c.Run(t.Context(), verb+" "+token, nil, 10)
		if err == nil {
			t.Errorf("%s: no error", verb)
		}
		fmt.Fprintln(&said, err)
	}
	d, err := c.Start(t.Context(), "key known "+token)
	if err != nil {
		t.Fatal(err)
	}
	if out, err := io.ReadAll(d.Stdout); err != nil || len(out) != 100 {
		t.Errorf("%d bytes, %v", len(out), err)
	}
	if err := d.Wait(); err != nil || d.Stderr() != "token new\n" {
		t.Errorf("standard error: %q, %v", d.Stderr(), err)
	}
	c.Close()
	if _, err := c.Start(t.Context(), "key known "+token); err == nil {
		t.Error("a closed connection started a verb")
	} else {
		fmt.Fprintln(&said, err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if !strings.Contains(log.String(), "known") || !strings.Contains(log.String(), "verb=key") {
		t.Errorf("what may be logged is not: %s", log.String())
	}
	if strings.Contains(log.String()+said.String(), token) {
		t.Errorf("the argument was written down:\n%s\n%s", log.String(), said.String())
	}
}

type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }
