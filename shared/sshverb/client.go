package sshverb

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"farkeep/shared/hint"
)

// Peer says whom to dial and as whom.
type Peer struct {
	Address  string        // host:port
	User     string        // SSH user name; servers of ours ignore it
	Identity ssh.Signer    // who we are
	HostKey  ssh.PublicKey // who the peer must be
	// Connect is the bound for TCP and SSH handshake together; default 15s.
	Connect time.Duration
	// Idle is the bound for silence, keepalives included; default 2m.
	Idle time.Duration
	// DialContext replaces net.Dialer's, for tunnels and tests.
	DialContext func(ctx context.Context, network, address string) (net.Conn, error)
	// Ahead keeps one session open for the verb after this one, so that several in
	// a row wait for one round trip less each.
	Ahead bool
}

// ErrHostKey is wrapped when the peer shows another host key than the pinned one.
var ErrHostKey = errors.New("the host key is not the one on record")

// Client is a connection to a peer. It is safe for concurrent use.
type Client struct {
	conn *ssh.Client
	raw  net.Conn
	stop func()

	roundTrip atomic.Int64 // the least that was seen, in nanoseconds; 0: none

	mu      sync.Mutex // guards what follows
	next    *ahead     // nil where nothing is opened ahead
	opening []*opening // stripes, in the order in which they were asked for
	stripes uint32     // how many were asked for in all
	narrow  bool       // the peer knows no stripes
}

// Dial connects and authenticates. The caller must Close the client. Errors
// carry hint.ExitUnreachable or hint.ExitRefused.
func Dial(ctx context.Context, p Peer) (*Client, error) {
	if p.Connect == 0 {
		p.Connect = 15 * time.Second
	}
	if p.Idle == 0 {
		p.Idle = 2 * time.Minute
	}
	dial := p.DialContext
	if dial == nil {
		dial = (&net.Dialer{}).DialContext
	}
	deadline, cancel := context.WithTimeout(ctx, p.Connect)
	defer cancel()
	raw, err := dial(deadline, "tcp", p.Address)
	if err != nil {
		return nil, hint.Exit(hint.ExitUnreachable, fmt.Errorf("connect to %s: %w", p.Address, err))
	}
	stopWatch := context.AfterFunc(deadline, func() { raw.Close() })
	config := &ssh.ClientConfig{
		Config:            algorithms(),
		User:              p.User,
		Auth:              []ssh.AuthMethod{ssh.PublicKeys(p.Identity)},
		HostKeyAlgorithms: []string{ssh.KeyAlgoED25519},
		ClientVersion:     version,
		HostKeyCallback: func(_ string, _ net.Addr, key ssh.PublicKey) error {
			if !bytes.Equal(key.Marshal(), p.HostKey.Marshal()) {
				return fmt.Errorf("%w: it shows %s, on record is %s", ErrHostKey, ssh.FingerprintSHA256(key), ssh.FingerprintSHA256(p.HostKey))
			}
			return nil
		},
	}
	conn, channels, requests, err := ssh.NewClientConn(raw, p.Address, config)
	if err == nil && !stopWatch() {
		conn.Close()
		err = deadline.Err()
	}
	if err != nil {
		stopWatch()
		raw.Close()
		return nil, dialError(p, err, deadline.Err())
	}
	c := &Client{conn: ssh.NewClient(conn, channels, requests), raw: raw}
	c.stop = keepAlive(context.WithoutCancel(ctx), c.conn.Conn, raw, p.Idle)
	if p.Ahead {
		c.next = c.openAhead()
	}
	return c, nil
}

func dialError(p Peer, err, expired error) error {
	wrapped := fmt.Errorf("speak SSH to %s: %w", p.Address, err)
	switch {
	case errors.Is(err, ErrHostKey):
		return hint.Exit(hint.ExitRefused, hint.Because(wrapped, "somebody stands between, or the machine was made new: compare the fingerprint on the machine itself before you change it in the configuration"))
	case expired != nil:
		return hint.Exit(hint.ExitUnreachable, fmt.Errorf("speak SSH to %s: no answer within %v", p.Address, p.Connect))
	case strings.Contains(err.Error(), "unable to authenticate"):
		return hint.Exit(hint.ExitRefused, hint.Because(wrapped, "the peer does not know the key %s", ssh.FingerprintSHA256(p.Identity.PublicKey())))
	default:
		return hint.Exit(hint.ExitUnreachable, wrapped)
	}
}

// Knows says whether word is among the peer's [Server.Knows]. That costs no exchange.
func (c *Client) Knows(word string) bool {
	_, words, _ := strings.Cut(string(c.conn.ServerVersion()), " ")
	return slices.Contains(strings.Fields(words), word)
}

// Close ends the connection and everything in it.
func (c *Client) Close() error {
	c.stop()
	return c.conn.Close()
}

// aheadFor is how long a session that was opened ahead is of use: a server closes
// one that has asked for nothing within Limits.Handshake.
const aheadFor = 10 * time.Second

// ahead is a session that is opened before it is needed.
type ahead struct {
	ready    chan struct{} // closed when the peer has answered; guards the rest
	at       time.Time     // when it was asked for
	channel  ssh.Channel
	requests <-chan *ssh.Request
	err      error
}

func (c *Client) openAhead() *ahead {
	a := &ahead{ready: make(chan struct{}), at: time.Now()}
	go func() {
		a.channel, a.requests, a.err = c.conn.OpenChannel("session", nil)
		if a.err == nil {
			c.answered(time.Since(a.at))
		}
		close(a.ready)
	}()
	return a
}

// session opens a session, or takes the one that was opened ahead and opens the next.
func (c *Client) session() (ssh.Channel, <-chan *ssh.Request, error) {
	c.mu.Lock()
	a := c.next
	if a != nil {
		c.next = c.openAhead()
	}
	c.mu.Unlock()
	if a == nil {
		return c.conn.OpenChannel("session", nil)
	}
	<-a.ready
	if a.err != nil {
		return nil, nil, a.err
	}
	if time.Since(a.at) > aheadFor {
		go ssh.DiscardRequests(a.requests)
		a.channel.Close()
		return c.conn.OpenChannel("session", nil)
	}
	return a.channel, a.requests, nil
}

// Dialogue is a verb in progress: write its input to Stdin and close it, read
// its output from Stdout to EOF, then Wait.
type Dialogue struct {
	Stdin  io.WriteCloser
	Stdout io.Reader

	stream *Stream
}

// closeGrace is how long a verb that was cut off may take to end before its
// whole connection is closed.
const closeGrace = 5 * time.Second

// Start begins a verb, without waiting for the peer's word that it has: what
// becomes of it, Wait tells. When ctx ends the verb is cut off.
func (c *Client) Start(ctx context.Context, verb string) (*Dialogue, error) {
	name, _, err := ParseVerb(verb)
	if err != nil {
		return nil, err
	}
	// RFC 4254 §6.5.
	s, err := c.stream(ctx, name, "exec", verb, false, nil)
	if err != nil {
		return nil, err
	}
	return &Dialogue{Stdin: input{s}, Stdout: s, stream: s}, nil
}

// input is what a verb reads. Closing it ends that, and not the verb.
type input struct{ *Stream }

func (i input) Close() error { return i.CloseWrite() }

// Wait returns how the verb ended: nil for exit status 0, an *Error with the
// peer's words for another, hint.ExitUnreachable where the connection broke.
func (d *Dialogue) Wait() error {
	err := d.stream.Wait()
	cut := d.stream.cancelled.Load()
	d.stream.Close()
	if cut {
		return hint.Exit(hint.ExitCancelled, fmt.Errorf("%s: %w", d.stream.name, context.Canceled))
	}
	return err
}

// told is the error for a status other than 0, with the peer's words.
func told(status int, stderr string) error {
	text, next, _ := strings.Cut(strings.TrimSpace(stderr), "\nhint: ")
	if text == "" {
		text = fmt.Sprintf("exit status %d without a word", status)
	}
	return hint.Exit(status, hint.Because(&Error{Code: status, Text: printableLines(text), Hint: printable(next)}, "%s", printableLines(next)))
}

// Stderr is what the peer wrote to standard error, its first 8 KiB. Call it after
// Wait.
func (d *Dialogue) Stderr() string { return d.stream.stderr.String() }

// Close cuts the verb off.
func (d *Dialogue) Close() error { return d.stream.Close() }

// Run carries out a verb: in is sent (nil for nothing), at most limit bytes of
// output are returned.
func (c *Client) Run(ctx context.Context, verb string, in io.Reader, limit int64) ([]byte, error) {
	d, err := c.Start(ctx, verb)
	if err != nil {
		return nil, err
	}
	sent := make(chan error, 1)
	go func() {
		var err error
		if in != nil {
			_, err = io.Copy(d.Stdin, in)
		}
		d.Stdin.Close()
		sent <- err
	}()
	out, readErr := io.ReadAll(io.LimitReader(d.Stdout, limit+1))
	if int64(len(out)) > limit {
		d.Close()
		<-sent
		return nil, fmt.Errorf("%s: the answer is longer than %d bytes", d.stream.name, limit)
	}
	err = d.Wait()
	sendErr := <-sent
	switch {
	case err != nil:
		return out, err // the peer's reason explains a broken send too
	case readErr != nil:
		return out, fmt.Errorf("%s: read the answer: %w", d.stream.name, readErr)
	case sendErr != nil && !errors.Is(sendErr, io.EOF):
		return out, fmt.Errorf("%s: send: %w", d.stream.name, sendErr)
	}
	return out, nil
}

// tail keeps the beginning of what a peer says on stderr: enough for a message,
// too little to fill a memory.
type tail struct{ b []byte }

func (t *tail) Write(p []byte) (int, error) {
	const limit = 8 << 10
	if room := limit - len(t.b); room > 0 {
		t.b = append(t.b, p[:min(room, len(p))]...)
	}
	return len(p), nil
}

func (t *tail) String() string { return string(t.b) }

// printableLines makes a peer's message safe for a terminal: no control
// characters but line ends, 4 KiB at most.
func printableLines(s string) string {
	if len(s) > 4096 {
		s = s[:4096]
	}
	return strings.Map(func(r rune) rune {
		if r == '\n' || (r >= ' ' && r != 0x7f && r < 0x80) || r >= 0xa0 {
			return r
		}
		return '?'
	}, s)
}
