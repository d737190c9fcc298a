package sshverb_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"farkeep/shared/hint"
	"farkeep/shared/sshverb"
)

// subsystems serves echo and refuse, and returns a client of it.
func subsystems(t *testing.T) *sshverb.Client {
	t.Helper()
	host, _ := newSigner(t)
	own, _ := newSigner(t)
	server := &sshverb.Server{
		HostKey:   host,
		Log:       slog.New(slog.DiscardHandler),
		Authorise: func(ssh.PublicKey, net.Addr) (*ssh.Permissions, error) { return &ssh.Permissions{}, nil },
		Subsystems: map[string]sshverb.Handler{
			"echo": func(_ context.Context, s *sshverb.Session) error {
				_, err := io.Copy(s.Stdout, s.Stdin)
				return err
			},
			"refuse": func(context.Context, *sshverb.Session) error {
				return &sshverb.Error{Code: hint.ExitRefused, Text: "a push key reads nothing", Hint: "use another"}
			},
		},
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.Serve(ctx, l) }()
	c, err := sshverb.Dial(t.Context(), sshverb.Peer{Address: l.Addr().String(), Identity: own, HostKey: host.PublicKey()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Close()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return c
}

func TestSubsystem(t *testing.T) {
	c := subsystems(t)
	s, err := c.Subsystem(t.Context(), "echo")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	sent := bytes.Repeat([]byte("to and fro "), 500_000)
	go func() {
		s.Write(sent)
		s.CloseWrite()
	}()
	got, err := io.ReadAll(s)
	if err != nil || !bytes.Equal(got, sent) {
		t.Errorf("%d bytes came back of %d: %v", len(got), len(sent), err)
	}
	if err := s.Wait(); err != nil {
		t.Errorf("Wait: %v", err)
	}

	// The peer's own words say why it ended.
	if s, err = c.Subsystem(t.Context(), "refuse"); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if got, _ := io.ReadAll(s); len(got) > 0 {
		t.Errorf("a refusal sent %q", got)
	}
	if err := s.Wait(); hint.Code(err) != hint.ExitRefused || !strings.Contains(err.Error(), "reads nothing") || hint.Of(err) != "use another" {
		t.Errorf("refused with %v (%d), hint %q", err, hint.Code(err), hint.Of(err))
	}

	if _, err := c.Subsystem(t.Context(), "none"); hint.Code(err) != hint.ExitUnreachable {
		t.Errorf("a subsystem that is not there: %v", err)
	}
}

// A stream ends with its context and with its connection.
func TestSubsystemIsCut(t *testing.T) {
	c := subsystems(t)
	ctx, cancel := context.WithCancel(t.Context())
	s, err := c.Subsystem(ctx, "echo")
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := io.ReadAll(s); err != nil && !errors.Is(err, io.EOF) {
		t.Log(err)
	}
	s.Wait()
	if s, err = c.Subsystem(t.Context(), "echo"); err != nil {
		t.Fatalf("after one that was cut: %v", err)
	}
	c.Close()
	if err := s.Wait(); hint.Code(err) != hint.ExitUnreachable {
		t.Errorf("a connection that broke: %v", err)
	}
	s.Close()
}
