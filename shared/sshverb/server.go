package sshverb

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"farkeep/shared/hint"
)

// Limits bound what peers can make a server hold. Zero fields get the defaults.
type Limits struct {
	Connections int           // at once; default 16
	PerKey      int           // of them by one key, so that no key shuts out the others; default half
	Sessions    int           // at once in one connection; default 8
	Stripes     int           // at once in all connections: channels beside sessions, for streams that are dealt over several (see Client.StartWide); default none
	Handshakes  int           // at once; who comes later waits for his turn, first come, first served; default: all at once
	Turn        time.Duration // how long a handshake that is slow, or silent, keeps others waiting; default 2s
	Handshake   time.Duration // its start to authenticated; default 20s
	Idle        time.Duration // without a byte from the peer, keepalives included; default 2m
	Stall       time.Duration // a session waiting for the peer to send or take data; default 2m
	Grace       time.Duration // from the end of a session to that of its connection, if the handler still waits for the peer; default 5s
}

func (l Limits) withDefaults() Limits {
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	if l.Connections == 0 {
		l.Connections = 16
	}
	if l.PerKey == 0 {
		l.PerKey = max(1, l.Connections/2)
	}
	if l.Sessions == 0 {
		l.Sessions = 8
	}
	if l.Handshakes == 0 {
		l.Handshakes = l.Connections
	}
	def(&l.Turn, 2*time.Second)
	def(&l.Handshake, 20*time.Second)
	def(&l.Idle, 2*time.Minute)
	def(&l.Stall, 2*time.Minute)
	def(&l.Grace, 5*time.Second)
	return l
}

// Handler carries out one verb or subsystem. It returns nil for exit status 0.
// An *Error is told to the peer; any other error is logged and the peer learns
// only that something inside went wrong. ctx ends when the peer hangs up, when
// it stalls, and when the server stops.
type Handler func(ctx context.Context, s *Session) error

// Server answers verbs on one listener.
type Server struct {
	HostKey ssh.Signer
	// Authorise decides who a key is. It must be quick and safe for concurrent
	// use; the permissions it returns are handed to every Session. SSH asks it
	// before the peer has proved that it holds the key: record nothing here.
	Authorise func(key ssh.PublicKey, peer net.Addr) (*ssh.Permissions, error)
	// Exec handles exec requests, Session.Verb and Args being set. It must
	// refuse verbs that it does not know.
	Exec Handler
	// Subsystems by name ("sftp"); nil for none.
	Subsystems map[string]Handler
	// LogArgs says what of a verb's arguments may be logged; nil for all of them.
	LogArgs func(verb string, args []string) []string
	// Knows are words, letters only, for what this server can do and older ones cannot.
	// They are told to everyone who connects, see [Client.Knows].
	Knows  []string
	Limits Limits
	Log    *slog.Logger

	mu      sync.Mutex
	perKey  map[string]int // connections by the key's wire form
	stripes int            // that are open
}

// enter counts a connection of a key; leave must be called if it says yes.
func (s *Server) enter(key ssh.PublicKey, limit int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.perKey == nil {
		s.perKey = map[string]int{}
	}
	name := string(key.Marshal())
	if s.perKey[name] >= limit {
		return false
	}
	s.perKey[name]++
	return true
}

func (s *Server) leave(key ssh.PublicKey) {
	s.mu.Lock()
	defer s.mu.Unlock()
	name := string(key.Marshal())
	if s.perKey[name]--; s.perKey[name] == 0 {
		delete(s.perKey, name)
	}
}

// Session is one verb in progress. Reads and writes fail once the peer has
// stalled for longer than Limits.Stall.
type Session struct {
	ID          string // unique per process, on every log line
	Peer        net.Addr
	Key         ssh.PublicKey
	Permissions *ssh.Permissions
	Verb        string
	Args        []string
	Stdin       io.Reader
	Stdout      io.Writer
	Stderr      io.Writer
	Log         *slog.Logger

	channel ssh.Channel
	input   io.Reader // the channel's, or one that is dealt over it and stripes
	end     context.CancelFunc
}

// End ends the session, as a hang-up of its peer does. A handler that still waits
// for the peer after Limits.Grace, because the line is dead, is freed by closing
// the whole connection.
func (s *Session) End() { s.end() }

// Patient reads like Stdin, but without the limit on a stalled peer: for handlers
// that know better whether it is the peer's turn.
func (s *Session) Patient() io.Reader { return s.input }

// ReadWriteCloser joins Stdin and Stdout, for subsystems.
func (s *Session) ReadWriteCloser() io.ReadWriteCloser {
	return struct {
		io.Reader
		io.Writer
		io.Closer
	}{s.Stdin, s.Stdout, s.channel}
}

// Serve accepts connections until ctx ends, then closes l and every connection
// and waits for the handlers. It returns nil when ctx ended.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	config := &ssh.ServerConfig{
		Config:        algorithms(),
		MaxAuthTries:  4,
		ServerVersion: strings.Join(append([]string{version}, s.Knows...), " "),
		// An unknown key and a known one of another appliance look the same.
		PublicKeyAuthAlgorithms: []string{ssh.KeyAlgoED25519, ssh.KeyAlgoSKED25519},
	}
	config.AddHostKey(s.HostKey)
	limits := s.Limits.withDefaults()

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()

	var conns sync.WaitGroup
	defer conns.Wait()
	slots := make(chan struct{}, limits.Connections)
	turns := &turns{free: limits.Handshakes, length: limits.Turn}
	var strangers lobby
	if limits.Handshakes < limits.Connections {
		strangers.patience = limits.Turn
	}
	for {
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			var temporary interface{ Temporary() bool }
			if errors.As(err, &temporary) && temporary.Temporary() {
				s.Log.Warn("accept", "err", err)
				select { // out of file descriptors: wait for some to come free
				case <-time.After(100 * time.Millisecond):
					continue
				case <-ctx.Done():
					return nil
				}
			}
			return fmt.Errorf("accept connections on %s: %w", l.Addr(), err)
		}
		select {
		case slots <- struct{}{}:
		default:
			// Whoever has not shown a key yet makes room, the longest silent first:
			// otherwise a few connections that say nothing, opened again and again,
			// would shut out everybody.
			if !strangers.showOut(slots) {
				s.Log.Warn("too many connections, one turned away", "peer", conn.RemoteAddr(), "limit", limits.Connections)
				conn.Close()
				continue
			}
		}
		conns.Add(1)
		turn, now := turns.queue()
		if now { // here, so that whoever comes next finds it in the lobby
			strangers.enter(conn)
		}
		go func() {
			defer func() { <-slots; conns.Done() }()
			if !now {
				select {
				case <-turn:
				case <-ctx.Done():
					conn.Close()
					return
				}
				strangers.enter(conn)
			}
			done := turns.begin()
			defer done()
			defer strangers.leave(conn)
			s.serveConn(ctx, conn, config, limits, func() { done(); strangers.leave(conn) })
		}()
	}
}

// turns bounds how many handshakes are under way. Without it, a thousand
// connections that come at once would all be served a little, and all time out.
type turns struct {
	length time.Duration // a peer that is slow, or says nothing, goes on without a turn then

	mu      sync.Mutex
	free    int
	waiting []chan struct{} // in the order in which they came
}

// queue takes a turn, or a place behind all who wait for one; turn is closed when
// it has come.
func (t *turns) queue() (turn <-chan struct{}, now bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.free > 0 {
		t.free--
		return nil, true
	}
	place := make(chan struct{})
	t.waiting = append(t.waiting, place)
	return place, false
}

// begin starts the clock of a turn; done gives it back and may be called more than
// once.
func (t *turns) begin() (done func()) {
	back := sync.OnceFunc(t.next)
	slow := time.AfterFunc(t.length, back)
	return func() { slow.Stop(); back() }
}

func (t *turns) next() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.waiting) == 0 {
		t.free++
		return
	}
	close(t.waiting[0])
	t.waiting = t.waiting[1:]
}

// lobby holds the connections that have not authenticated yet, oldest first.
type lobby struct {
	patience time.Duration // nobody is shown out sooner

	mu  sync.Mutex
	all []stranger
}

type stranger struct {
	net.Conn
	since time.Time
}

func (l *lobby) enter(c net.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = append(l.all, stranger{c, time.Now()})
}

// leave may be called more than once.
func (l *lobby) leave(c net.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = slices.DeleteFunc(l.all, func(o stranger) bool { return o.Conn == c })
}

// makeRoom bounds the wait for a connection that was closed to give its place.
const makeRoom = time.Second

// showOut ends the oldest connection and takes its place in slots.
func (l *lobby) showOut(slots chan<- struct{}) bool {
	l.mu.Lock()
	if len(l.all) == 0 || time.Since(l.all[0].since) < l.patience {
		l.mu.Unlock()
		return false
	}
	l.all[0].Close()
	l.all = slices.Delete(l.all, 0, 1)
	l.mu.Unlock()
	select {
	case slots <- struct{}{}:
		return true
	case <-time.After(makeRoom):
		return false
	}
}

// serveConn serves one connection; known is called when it has authenticated.
func (s *Server) serveConn(ctx context.Context, conn net.Conn, base *ssh.ServerConfig, limits Limits, known func()) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	id := newID()
	log := s.Log.With("conn", id, "peer", conn.RemoteAddr().String())
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()

	config := *base
	var offered ssh.PublicKey
	config.PublicKeyCallback = func(_ ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
		return s.Authorise(key, conn.RemoteAddr())
	}
	config.VerifiedPublicKeyCallback = func(_ ssh.ConnMetadata, key ssh.PublicKey, p *ssh.Permissions, _ string) (*ssh.Permissions, error) {
		offered = key
		return p, nil
	}
	conn.SetDeadline(time.Now().Add(limits.Handshake))
	sc, channels, requests, err := ssh.NewServerConn(conn, &config)
	if err != nil {
		log.Info("handshake not completed", "err", err)
		return
	}
	known()
	defer sc.Close()
	conn.SetDeadline(time.Time{})
	log = log.With("key", ssh.FingerprintSHA256(offered))
	if !s.enter(offered, limits.PerKey) {
		log.Warn("too many connections of one key, one turned away", "limit", limits.PerKey)
		return
	}
	defer s.leave(offered)
	log.Info("connected", "client", printable(string(sc.ClientVersion())))
	go ssh.DiscardRequests(requests)

	stopKeepalive := keepAlive(ctx, sc, conn, limits.Idle)
	defer stopKeepalive()

	var sessions sync.WaitGroup
	defer sessions.Wait()
	defer cancel()
	slots := make(chan struct{}, limits.Sessions)
	hangUp := func() { conn.Close() }
	wide := &stripes{server: s, limits: limits, hangUp: hangUp, waiting: map[uint32]*stripe{}}
	for n := 1; ; n++ {
		newChannel, ok := <-channels
		if !ok {
			log.Info("disconnected")
			return
		}
		if newChannel.ChannelType() == stripeChannel && limits.Stripes > 0 {
			if wait := wide.open(newChannel); wait != nil {
				sessions.Go(wait)
			}
			continue
		}
		if newChannel.ChannelType() != "session" {
			newChannel.Reject(ssh.Prohibited, "only sessions are served here")
			continue
		}
		select {
		case slots <- struct{}{}:
		default:
			newChannel.Reject(ssh.ResourceShortage, "too many sessions in this connection")
			continue
		}
		channel, channelRequests, err := newChannel.Accept()
		if err != nil {
			<-slots
			return
		}
		session := &Session{
			ID: fmt.Sprintf("%s.%d", id, n), Peer: conn.RemoteAddr(), Key: offered,
			Permissions: sc.Permissions, channel: channel, input: channel, Log: log.With("session", n),
		}
		sessions.Add(1)
		go func() {
			defer func() { <-slots; sessions.Done() }()
			s.serveSession(ctx, session, channelRequests, limits, wide, hangUp)
			// The place is free when the peer has closed the channel as well: until
			// then what it sent into it takes memory, and a peer that never closes
			// any would get ever more.
			ssh.DiscardRequests(channelRequests)
		}()
	}
}

// serveSession waits for the one request that names the work, and does it.
// hangUp closes the connection.
func (s *Server) serveSession(ctx context.Context, session *Session, requests <-chan *ssh.Request, limits Limits, wide *stripes, hangUp func()) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer session.channel.Close()
	tooSlow := time.AfterFunc(limits.Handshake, func() { session.channel.Close() })
	defer tooSlow.Stop()
	var dealt []*stripe
	var unfit error
	defer func() { wide.closeAll(dealt) }()

	for req := range requests {
		var handler Handler
		switch req.Type {
		case stripesRequest:
			more, err := wide.named(req.Payload)
			dealt = append(dealt, more...)
			unfit = errors.Join(unfit, err)
		case "exec":
			line, err := payloadString(req.Payload)
			if err == nil {
				session.Verb, session.Args, err = ParseVerb(line)
			}
			handler = s.Exec
			if err != nil {
				session.Log.Warn("bad verb line", "err", err)
				handler = func(context.Context, *Session) error {
					return &Error{Code: hint.ExitUsage, Text: "this is not a verb", Hint: "see docs/protocol.md for the verbs", Err: err}
				}
			}
		case "subsystem":
			name, err := payloadString(req.Payload)
			if err == nil {
				session.Verb = name
				handler = s.Subsystems[name]
			}
		case "shell":
			handler = func(context.Context, *Session) error {
				return &Error{Code: hint.ExitUsage, Text: "there is no shell here", Hint: "name a verb, for instance: ssh HOST status"}
			}
		}
		if handler == nil {
			if req.WantReply {
				req.Reply(false, nil)
			}
			continue
		}
		tooSlow.Stop()
		if req.WantReply {
			req.Reply(true, nil)
		}
		if unfit != nil {
			handler = func(context.Context, *Session) error { return unfit }
		} else if len(dealt) > 0 {
			from := []io.Reader{session.channel}
			for _, one := range dealt {
				from = append(from, one)
			}
			session.input = &joined{from: from}
			// Who reads from a stripe must wake up as one who reads from the session does.
			defer context.AfterFunc(ctx, func() { wide.closeAll(dealt) })()
		}
		go func() { // the peer's hang-up closes requests
			ssh.DiscardRequests(requests)
			cancel()
		}()
		s.run(ctx, cancel, handler, session, limits, hangUp)
		return
	}
}

func (s *Server) run(ctx context.Context, cancel context.CancelFunc, handler Handler, session *Session, limits Limits, hangUp func()) {
	ch := session.channel
	session.end = cancel
	guard := &stallGuard{limit: limits.Stall, expire: func() {
		session.Log.Warn("the peer stalled, its session ends", "verb", session.Verb, "after", limits.Stall)
		cancel()
		ch.Close()
	}}
	session.Stdin = guard.reader(session.input)
	session.Stdout = guard.writer(ch)
	session.Stderr = guard.writer(ch.Stderr())
	// Closing a channel asks the peer to close it; reads and writes of this side
	// return only when it did. A peer whose line is dead does not: then the whole
	// connection goes.
	done := make(chan struct{})
	defer close(done)
	stop := context.AfterFunc(ctx, func() {
		late := time.AfterFunc(limits.Grace, hangUp)
		defer late.Stop()
		ch.Close()
		<-done
	})
	defer stop()

	started, logged := time.Now(), session.Args
	if s.LogArgs != nil {
		logged = s.LogArgs(session.Verb, session.Args)
	}
	err := protect(ctx, handler, session)
	code := hint.ExitOK
	if err != nil {
		text, next := "something went wrong inside", "the other side's log says what"
		code = hint.ExitFailure
		var told *Error
		if errors.As(err, &told) {
			text, next, code = told.Text, told.Hint, told.Code
		}
		fmt.Fprintf(session.Stderr, "%s\n", text)
		if next != "" {
			fmt.Fprintf(session.Stderr, "hint: %s\n", next)
		}
		session.Log.Warn("verb not carried out", "verb", session.Verb, "args", logged, "code", code, "err", err)
	} else {
		session.Log.Info("verb done", "verb", session.Verb, "args", logged, "took", time.Since(started).Round(time.Millisecond))
	}
	ch.CloseWrite()
	ch.SendRequest("exit-status", false, ssh.Marshal(struct{ Status uint32 }{uint32(code)}))
}

// protect keeps a panic in one session from ending all the others.
func protect(ctx context.Context, handler Handler, session *Session) (err error) {
	defer func() {
		if p := recover(); p != nil {
			session.Log.Error("panic in a session", "verb", session.Verb, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			err = fmt.Errorf("panic: %v", p)
		}
	}()
	return handler(ctx, session)
}

func payloadString(payload []byte) (string, error) {
	var p struct{ Value string }
	if len(payload) > MaxVerbLine+4 {
		return "", fmt.Errorf("%w: longer than %d bytes", ErrBadVerb, MaxVerbLine)
	}
	err := ssh.Unmarshal(payload, &p)
	return p.Value, err
}

func newID() string {
	var b [4]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// printable makes a peer's text safe for a log line.
func printable(s string) string {
	out := []rune(s)
	if len(out) > 64 {
		out = out[:64]
	}
	for i, r := range out {
		if r < ' ' || r > '~' {
			out[i] = '?'
		}
	}
	return string(out)
}
