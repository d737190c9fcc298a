package sshverb

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"io"
	"log/slog"
	"net"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"farkeep/shared/hint"
)

// A session that was opened ahead serves the next verb, unless the server may have
// given up waiting for a word.
func TestAhead(t *testing.T) {
	signer := func() ssh.Signer {
		_, private, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		s, err := ssh.NewSignerFromKey(private)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	host := signer()
	server := &Server{
		HostKey:   host,
		Log:       slog.New(slog.DiscardHandler),
		Authorise: func(ssh.PublicKey, net.Addr) (*ssh.Permissions, error) { return &ssh.Permissions{}, nil },
		Exec: func(_ context.Context, s *Session) error {
			_, err := io.Copy(s.Stdout, s.Stdin)
			return err
		},
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- server.Serve(ctx, l) }()
	c, err := Dial(t.Context(), Peer{Address: l.Addr().String(), Identity: signer(), HostKey: host.PublicKey(), Ahead: true})
	if err != nil {
		t.Fatal(err)
	}
	echo := func(what string) {
		t.Helper()
		if got, err := c.Run(t.Context(), "echo", strings.NewReader(what), 100); err != nil || string(got) != what {
			t.Errorf("%q came back as %q, %v", what, got, err)
		}
	}
	next := func() *ahead {
		c.mu.Lock()
		defer c.mu.Unlock()
		<-c.next.ready
		return c.next
	}
	for range 20 { // more than a connection may have at once
		before := next()
		echo("one after the other")
		if next() == before {
			t.Fatal("the session that was opened ahead was not taken")
		}
	}

	// One that is old is not used, whether the server has closed it or not.
	old := next()
	c.mu.Lock()
	old.at = old.at.Add(-2 * aheadFor)
	c.mu.Unlock()
	echo("after a while")
	if _, err := old.channel.Write([]byte("x")); err == nil {
		t.Error("an old session stays open")
	}
	c.mu.Lock()
	<-c.next.ready
	c.next.channel.Close()
	c.mu.Unlock()
	if _, err := c.Run(t.Context(), "echo", nil, 100); hint.Code(err) != hint.ExitUnreachable {
		t.Errorf("a session that is closed: %v", err)
	}
	echo("and the one after it")

	c.Close()
	if _, err := c.Run(t.Context(), "echo", nil, 100); hint.Code(err) != hint.ExitUnreachable {
		t.Errorf("a closed connection: %v", err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
