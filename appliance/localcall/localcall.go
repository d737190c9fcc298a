// Package localcall is how the appliance's parts ask each other for something:
// a unix socket per part, the caller known by the uid that the kernel vouches
// for (SO_PEERCRED, unix(7)), one JSON line each way and, where a verb wants
// it, raw bytes after them.
//
//	caller                                   part
//	{"verb":"wake","args":{...}}\n    →
//	raw bytes, then half-close        →      (only where the verb says so)
//	                                  ←      {"reply":...}\n   or   {"error":{...}}\n
//	                                  ←      raw bytes, then close
//
// A verb may answer with several reply lines in the course of one call; each
// can be an error, which is the last. A failure after raw bytes were written
// back cannot be told any more: the connection just ends, so streams that go
// back must carry their own end mark.
//
// Everything is bounded: line lengths, calls at once in total and for each
// caller, the time until a request is complete. What the raw bytes mean and how
// many may come is up to the handler.
package localcall

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"farkeep/shared/hint"

	"golang.org/x/sys/unix"
)

// Limits.
const (
	MaxLine        = 64 << 10         // bytes of one request or reply line, newline included
	MaxCalls       = 128              // calls served at once on one socket
	MaxCallsPerUID = 48               // of them from one uid, so that no part starves the others
	RequestTimeout = 10 * time.Second // from connecting to the end of the request line
	CallTimeout    = 30 * time.Second // of Call, when its context has no deadline
)

// Error is what a part answered instead of a reply.
type Error struct {
	Code int    // an exit code of package hint
	Text string // what was refused or failed
	Hint string // what to do next; may be empty
}

func (e *Error) Error() string { return e.Text }

// toWire turns a handler's error into what the caller learns.
func toWire(err error) *Error {
	var e *Error
	if errors.As(err, &e) && err.Error() == e.Text {
		return e
	}
	return &Error{Code: hint.Code(err), Text: err.Error(), Hint: hint.Of(err)}
}

// toError turns a received error into one that package hint reports like the
// original.
func (e *Error) toError() error {
	var err error = e
	if e.Hint != "" {
		err = hint.Because(err, "%s", e.Hint)
	}
	if e.Code != 0 {
		err = hint.Exit(e.Code, err)
	}
	return err
}

// Request is what a caller asks for.
type Request struct {
	Verb string          `json:"verb"`
	Args json.RawMessage `json:"args,omitempty"`
	UID  uint32          `json:"-"` // who asks, from the kernel
}

// Decode reads the arguments into v, which must know every one of them.
func (r Request) Decode(v any) error {
	if err := strict(r.Args, v); err != nil {
		return hint.Exit(hint.ExitUsage, fmt.Errorf("%s: arguments: %w", r.Verb, err))
	}
	return nil
}

type reply struct {
	Reply json.RawMessage `json:"reply,omitempty"`
	Error *Error          `json:"error,omitempty"`
}

// errLine is returned for a line over MaxLine.
var errLine = fmt.Errorf("a line of more than %d bytes", MaxLine)

// Conn is one call's connection, at either end. Reads and writes are the raw
// bytes after the lines. One goroutine may read while another writes.
type Conn struct {
	unix *net.UnixConn
	r    *bufio.Reader
	stop func() bool // ends the watch over the context

	// Of the goroutine that writes.
	replied bool // a reply line went out
	wrote   bool // raw bytes went out: no more lines
}

func newConn(ctx context.Context, c *net.UnixConn) *Conn {
	// A context that ends must wake whoever reads or writes.
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	return &Conn{unix: c, r: bufio.NewReaderSize(c, MaxLine), stop: stop}
}

// Read reads raw bytes of the other side; io.EOF after its CloseWrite.
func (c *Conn) Read(p []byte) (int, error) { return c.r.Read(p) }

// Write sends raw bytes.
func (c *Conn) Write(p []byte) (int, error) {
	c.wrote = true
	return c.unix.Write(p)
}

// CloseWrite ends the raw bytes that this side sends.
func (c *Conn) CloseWrite() error { return c.unix.CloseWrite() }

// Close ends the call.
func (c *Conn) Close() error {
	c.stop()
	return c.unix.Close()
}

// Reply sends a reply line. It is for handlers.
func (c *Conn) Reply(v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("reply: %w", err)
	}
	c.replied = true
	return c.writeLine(reply{Reply: raw})
}

// ReadReply waits for the next reply line and decodes it into v, which may be
// nil. An *Error (by errors.As) is the part's own answer; any other error means
// that there was none.
func (c *Conn) ReadReply(v any) error {
	line, err := c.readLine()
	if err != nil {
		return fmt.Errorf("read the reply: %w", err)
	}
	var r reply
	if err := json.Unmarshal(line, &r); err != nil {
		return fmt.Errorf("read the reply: %w", err)
	}
	if r.Error != nil {
		return r.Error.toError()
	}
	if v == nil {
		return nil
	}
	if err := json.Unmarshal(r.Reply, v); err != nil {
		return fmt.Errorf("read the reply: %w", err)
	}
	return nil
}

func (c *Conn) writeLine(v any) error {
	line, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(line) >= MaxLine {
		return errLine
	}
	_, err = c.unix.Write(append(line, '\n'))
	return err
}

// readLine returns one line without its newline, valid until the next read.
func (c *Conn) readLine() ([]byte, error) {
	line, err := c.r.ReadSlice('\n')
	if errors.Is(err, bufio.ErrBufferFull) {
		return nil, errLine
	}
	if err != nil {
		return nil, err
	}
	return line[:len(line)-1], nil
}

// A Handler serves one call. It answers with conn.Reply (or not at all: then an
// empty reply is sent when it returns nil); an error that it returns becomes
// the answer. ctx ends when the socket closes down.
type Handler func(ctx context.Context, req Request, conn *Conn) error

// Serve listens on path, whose folder exists and belongs to the caller, and
// serves calls from the uids in allow until ctx ends; then it waits for the
// handlers. A socket left behind by an earlier run is replaced. The error is
// nil after ctx ended.
func Serve(ctx context.Context, path string, allow []uint32, h Handler) error {
	if info, err := os.Lstat(path); err == nil && info.Mode().Type() == os.ModeSocket {
		if err := os.Remove(path); err != nil {
			return fmt.Errorf("local calls: %w", err)
		}
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return fmt.Errorf("local calls: %w", err)
	}
	defer l.Close()
	// The uid decides, not the mode: callers have other uids than the folder.
	if err := os.Chmod(path, 0o666); err != nil {
		return fmt.Errorf("local calls: %w", err)
	}
	defer context.AfterFunc(ctx, func() { l.Close() })()

	s := &server{allow: map[uint32]bool{}, calls: map[uint32]int{}, h: h}
	for _, uid := range allow {
		s.allow[uid] = true
	}
	var handlers sync.WaitGroup
	defer handlers.Wait()
	for {
		c, err := l.AcceptUnix()
		if ctx.Err() != nil {
			if err == nil {
				c.Close()
			}
			return nil
		}
		if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) || errors.Is(err, unix.ENOMEM) {
			// Passing shortages must not end the part; calls in progress free them.
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(100 * time.Millisecond):
			}
			continue
		}
		if err != nil {
			return fmt.Errorf("local calls: %w", err)
		}
		handlers.Go(func() { s.serve(ctx, c) })
	}
}

type server struct {
	allow map[uint32]bool
	h     Handler

	mu    sync.Mutex // guards the fields below
	calls map[uint32]int
	total int
}

func (s *server) serve(ctx context.Context, uc *net.UnixConn) {
	conn := newConn(ctx, uc)
	defer conn.Close()
	err := s.call(ctx, conn)
	if err == nil || conn.wrote {
		return
	}
	// A caller that does not read must not hold the handler.
	uc.SetWriteDeadline(time.Now().Add(RequestTimeout))
	e := *toWire(err)
	// Cut by bytes of JSON's worst case, six for one.
	if limit := MaxLine / 16; len(e.Text) > limit {
		e.Text = e.Text[:limit]
	}
	if limit := MaxLine / 16; len(e.Hint) > limit {
		e.Hint = e.Hint[:limit]
	}
	if conn.writeLine(reply{Error: &e}) == nil && ctx.Err() == nil {
		drain(uc)
	}
}

// drain reads what the caller still sends, for a moment: closing a socket with
// unread bytes resets it, and the caller would lose the answer.
func drain(uc *net.UnixConn) {
	uc.CloseWrite()
	uc.SetReadDeadline(time.Now().Add(time.Second))
	buf := make([]byte, 64<<10)
	for {
		if _, err := uc.Read(buf); err != nil {
			return
		}
	}
}

func (s *server) call(ctx context.Context, conn *Conn) error {
	uid, err := peer(conn.unix)
	if err != nil {
		return err
	}
	if !s.allow[uid] {
		return hint.Exit(hint.ExitRefused, fmt.Errorf("user %d may not call this part", uid))
	}
	if !s.enter(uid) {
		return hint.Because(errors.New("too many calls at once"), "try again in a moment")
	}
	defer s.leave(uid)

	conn.unix.SetReadDeadline(time.Now().Add(RequestTimeout))
	line, err := conn.readLine()
	if err != nil {
		return fmt.Errorf("read the request: %w", err)
	}
	var req Request
	if err := strict(line, &req); err != nil {
		return hint.Exit(hint.ExitUsage, fmt.Errorf("read the request: %w", err))
	}
	req.UID = uid
	conn.unix.SetReadDeadline(time.Time{})
	// The context may have ended, and set its deadline, before this line.
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err := s.h(ctx, req, conn); err != nil {
		return err
	}
	if conn.replied || conn.wrote {
		return nil
	}
	return conn.Reply(struct{}{})
}

func (s *server) enter(uid uint32) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.total >= MaxCalls || s.calls[uid] >= MaxCallsPerUID {
		return false
	}
	s.total++
	s.calls[uid]++
	return true
}

func (s *server) leave(uid uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.total--
	s.calls[uid]--
}

// peer returns the uid of the process that connected.
func peer(c *net.UnixConn) (uint32, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, fmt.Errorf("ask who calls: %w", err)
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, fmt.Errorf("ask who calls: %w", err)
	}
	if credErr != nil {
		return 0, fmt.Errorf("ask who calls: %w", credErr)
	}
	return cred.Uid, nil
}
