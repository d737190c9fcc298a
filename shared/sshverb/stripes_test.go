package sshverb

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"farkeep/shared/hint"
)

// wideServer serves "count", which answers with how many bytes it read and what the
// end of them was, and "wait", which reads nothing until its session ends.
type wideServer struct {
	*Server
	address string
	waiting chan struct{} // one for each "wait" that has begun
}

func newWideServer(t *testing.T, limits Limits) *wideServer {
	t.Helper()
	s := &wideServer{waiting: make(chan struct{}, 8)}
	s.Server = &Server{
		HostKey:   newKey(t),
		Log:       slog.New(slog.DiscardHandler),
		Authorise: func(ssh.PublicKey, net.Addr) (*ssh.Permissions, error) { return &ssh.Permissions{}, nil },
		Limits:    limits,
		Exec: func(ctx context.Context, session *Session) error {
			switch session.Verb {
			case "wait":
				s.waiting <- struct{}{}
				<-ctx.Done()
				return ctx.Err()
			case "refuse":
				return &Error{Code: hint.ExitRefused, Text: "enough"}
			}
			n, err := io.Copy(io.Discard, session.Stdin)
			fmt.Fprintf(session.Stdout, "%d %v", n, err)
			return nil
		},
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.address = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if s.stripes != 0 {
			t.Errorf("%d stripes are counted when nobody is connected", s.stripes)
		}
	})
	return s
}

func newKey(t *testing.T) ssh.Signer {
	t.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return signer
}

func (s *wideServer) dial(t *testing.T, change ...func(*Peer)) *Client {
	t.Helper()
	p := Peer{Address: s.address, Identity: newKey(t), HostKey: s.HostKey.PublicKey()}
	for _, f := range change {
		f(&p)
	}
	c, err := Dial(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func (s *wideServer) open() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stripes
}

// until waits for a state of the other side that nothing announces.
func until(t *testing.T, what string, is func() bool) {
	t.Helper()
	for limit := time.Now().Add(2 * time.Minute); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatalf("not within two minutes: %s", what)
		}
	}
}

// count sends size bytes over at most n stripes and returns the answer.
func count(t *testing.T, c *Client, n, size int) string {
	t.Helper()
	d, err := c.StartWide(t.Context(), "count", n)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if _, err := d.Stdin.Write(make([]byte, size)); err != nil {
		t.Error(err)
	}
	if err := d.Stdin.Close(); err != nil {
		t.Error(err)
	}
	answer, err := io.ReadAll(d.Stdout)
	if err == nil {
		err = d.Wait()
	}
	if err != nil {
		t.Error(err)
	}
	return string(answer)
}

// A stream of many windows goes over as many stripes as there are, again and again;
// who finds none left uses its session alone.
func TestWide(t *testing.T) {
	s := newWideServer(t, Limits{Stripes: 3})
	c := s.dial(t)
	const size = 24 << 20
	for range 3 {
		if got := count(t, c, 5, size); got != fmt.Sprint(size, " <nil>") {
			t.Errorf("answered %q", got)
		}
		until(t, "all stripes are closed", func() bool { return s.open() == 0 })
	}
	c.Widen(2)
	c.Widen(3)
	until(t, "3 stripes are open", func() bool { return s.open() == 3 })
	if got := count(t, s.dial(t), 3, 100); got != "100 <nil>" {
		t.Errorf("without a stripe that is free: answered %q", got)
	}
	d, err := c.StartWide(t.Context(), "wait", 3)
	if err != nil {
		t.Fatal(err)
	}
	<-s.waiting
	if len(d.stream.wide) != 3 {
		t.Errorf("%d stripes in use, want the 3 that were opened ahead", len(d.stream.wide))
	}
	// Cut off, with more written than four windows hold.
	wrote := make(chan error)
	go func() {
		_, err := d.Stdin.Write(make([]byte, 12<<20))
		wrote <- err
	}()
	d.Close()
	if err := <-wrote; err == nil {
		t.Error("12 MiB were sent to a verb that reads nothing")
	}
	until(t, "all stripes are closed", func() bool { return s.open() == 0 })

	// Who asked for more than he needs gives the rest back at once.
	c.Widen(3)
	until(t, "3 stripes are open", func() bool { return s.open() == 3 })
	if d, err = c.StartWide(t.Context(), "wait", 1); err != nil {
		t.Fatal(err)
	}
	<-s.waiting
	until(t, "one stripe is open", func() bool { return s.open() == 1 })
	d.Close()
	until(t, "all stripes are closed", func() bool { return s.open() == 0 })

	// A refusal's words come through, and free whoever writes.
	if d, err = c.StartWide(t.Context(), "refuse", 3); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Stdin.Write(make([]byte, 12<<20)); err == nil {
		t.Error("12 MiB were sent to a verb that refused")
	}
	d.Stdin.Close()
	if err := d.Wait(); hint.Code(err) != hint.ExitRefused || !strings.Contains(err.Error(), "enough") {
		t.Errorf("refused with %v", err)
	}
	if got := count(t, c, 3, size); got != fmt.Sprint(size, " <nil>") {
		t.Errorf("after all that, answered %q", got)
	}
}

// A peer that knows no stripes is asked for none again, and served as ever.
func TestNarrowPeer(t *testing.T) {
	s := newWideServer(t, Limits{})
	c := s.dial(t)
	for range 2 {
		if got := count(t, c, 4, 5<<20); got != fmt.Sprint(5<<20, " <nil>") {
			t.Errorf("answered %q", got)
		}
	}
	if !c.narrow || c.stripes > 8 {
		t.Errorf("asked for %d stripes, narrow: %v", c.stripes, c.narrow)
	}
}

// A stripe that ends, is not there, or belongs to somebody else makes no stream.
func TestForeignStripes(t *testing.T) {
	s := newWideServer(t, Limits{Stripes: 4})
	c, other := s.dial(t), s.dial(t)
	name := func(payload ...byte) error {
		t.Helper()
		ch, requests, err := c.conn.OpenChannel("session", nil)
		if err != nil {
			t.Fatal(err)
		}
		defer ch.Close()
		status := make(chan error, 1)
		go func() {
			defer close(status)
			for r := range requests {
				if r.Type == "exit-status" {
					status <- fmt.Errorf("exit status %d", binary.BigEndian.Uint32(r.Payload))
				}
			}
		}()
		ch.SendRequest(stripesRequest, false, payload)
		ch.SendRequest("exec", false, ssh.Marshal(struct{ Value string }{"count"}))
		ch.CloseWrite()
		io.Copy(io.Discard, ch)
		return <-status
	}
	other.Widen(1)
	until(t, "a stripe is open", func() bool { return s.open() == 1 })
	for payload, want := range map[string]int{
		"":                      hint.ExitUsage,
		"\x00\x00\x01":          hint.ExitUsage,
		"\x00\x00\x00\x01":      hint.ExitUnreachable, // the other one's number
		strings.Repeat("1", 20): hint.ExitUsage,       // more than there may be
	} {
		if err := name([]byte(payload)...); err == nil || err.Error() != fmt.Sprint("exit status ", want) {
			t.Errorf("stripes %q: %v, want %d", payload, err, want)
		}
	}
	if got := count(t, other, 1, 100); got != "100 <nil>" {
		t.Errorf("the other one was answered %q", got)
	}
	// The same stripe twice.
	c.Widen(1)
	until(t, "a stripe is open", func() bool { return s.open() == 1 })
	if err := name(0, 0, 0, 1, 0, 0, 0, 1); err == nil || err.Error() != fmt.Sprint("exit status ", hint.ExitUnreachable) {
		t.Errorf("a stripe twice: %v", err)
	}
	c.opening = nil // it was used behind the client's back
	for _, extra := range [][]byte{nil, make([]byte, 5)} {
		if _, _, err := c.conn.OpenChannel(stripeChannel, extra); err == nil {
			t.Errorf("a stripe with a number of %d bytes is open", len(extra))
		}
	}

	// One of several channels ends, and the stream has not.
	for end := range 3 {
		d, err := c.StartWide(t.Context(), "count", 2)
		if err != nil {
			t.Fatal(err)
		}
		d.Stdin.Write([]byte("a block"))
		d.Stdin.(wideInput).to[end].CloseWrite()
		for range 3 {
			d.Stdin.Write([]byte("another")) // fails where it is this one's turn
		}
		d.Stdin.Close()
		got, err := io.ReadAll(d.Stdout)
		if err != nil || !bytes.Contains(got, []byte(ErrDealt.Error())) {
			t.Errorf("channel %d ended: answered %q, %v", end, got, err)
		}
		d.Close()
		until(t, "all stripes are closed", func() bool { return s.open() == 0 })
	}
}

// Nobody keeps stripes that he does not use: the server closes them, and the
// connection of a peer that does not follow.
func TestUnusedStripes(t *testing.T) {
	s := newWideServer(t, Limits{Stripes: 4, Handshake: 4 * time.Second, Grace: 2 * time.Second})
	c := s.dial(t)
	line := &deadLine{}
	mute := s.dial(t, func(p *Peer) {
		p.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := (&net.Dialer{}).DialContext(ctx, network, address)
			line.Conn = conn
			return line, err
		}
	})
	for _, client := range []*Client{mute, c} {
		client.Widen(2)
		for _, o := range client.opening {
			if <-o.ready; o.err != nil {
				t.Fatal(o.err)
			}
		}
	}
	line.dead.Store(true)
	until(t, "all stripes are closed", func() bool { return s.open() == 0 })
	for _, o := range c.opening {
		if _, err := o.channel.Write([]byte("x")); !errors.Is(err, io.EOF) {
			t.Errorf("a stripe that the server has closed: %v", err)
		}
		o.at = o.at.Add(-2 * aheadFor)
	}
	if got := count(t, c, 4, 100); got != "100 <nil>" {
		t.Errorf("with stripes that are too old: answered %q", got)
	}
	if err := mute.conn.Wait(); err == nil {
		t.Error("the connection of a peer that closes no stripe lives on")
	}
}

// deadLine takes what is sent and, once it is dead, does not carry it.
type deadLine struct {
	net.Conn
	dead atomic.Bool
}

func (l *deadLine) Write(p []byte) (int, error) {
	if l.dead.Load() {
		return len(p), nil
	}
	return l.Conn.Write(p)
}

// A client knows how far away its peer is as soon as it has opened a session.
func TestRoundTrip(t *testing.T) {
	s := newWideServer(t, Limits{})
	c := s.dial(t, func(p *Peer) { p.Ahead = true })
	if _, err := c.Run(t.Context(), "count", nil, 100); err != nil {
		t.Fatal(err)
	}
	if got := c.RoundTrip(); got <= 0 || got > time.Minute {
		t.Errorf("a round trip of %v", got)
	}
	c.answered(time.Hour)
	c.answered(1)
	if got := c.RoundTrip(); got != 1 {
		t.Errorf("the least of several is %v", got)
	}
}
