package sshverb

import (
	"context"
	"fmt"
	"io"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"farkeep/shared/hint"
)

// Stream is a subsystem or a verb in progress: bytes both ways until one side ends it.
type Stream struct {
	ssh.Channel
	name      string // of a verb without its arguments: they are nothing for an error
	raw       io.Closer
	release   func() bool
	cancelled atomic.Bool // cut off by its context
	wide      []*opening  // the stripes of its input
	stderr    tail
	status    int           // of the peer's exit; -1: it sent none
	ended     chan struct{} // closed when the peer has closed the channel; guards the two above
}

// Subsystem starts a subsystem ("sftp"). When ctx ends it is cut off. The caller
// must Close the stream.
func (c *Client) Subsystem(ctx context.Context, name string) (*Stream, error) {
	return c.stream(ctx, name, "subsystem", name, true, nil)
}

// stream opens a session and asks for what it is for; with answered it waits for
// the peer's word that it has that. The stripes that its input is dealt over are closed
// with it.
func (c *Client) stream(ctx context.Context, name, request, what string, answered bool, wide []*opening) (*Stream, error) {
	channel, requests, err := c.session()
	if err != nil {
		closeStripes(wide)
		return nil, hint.Exit(hint.ExitUnreachable, fmt.Errorf("open a session for %s: %w", name, err))
	}
	s := &Stream{Channel: channel, name: name, raw: c.raw, wide: wide, status: -1, ended: make(chan struct{})}
	var both sync.WaitGroup
	both.Go(func() { io.Copy(&s.stderr, channel.Stderr()) })
	both.Go(func() {
		for r := range requests {
			// RFC 4254 §6.10.
			var exit struct{ Status uint32 }
			if r.Type == "exit-status" && ssh.Unmarshal(r.Payload, &exit) == nil {
				s.status = int(min(exit.Status, math.MaxInt32))
			}
			if r.WantReply {
				r.Reply(false, nil)
			}
		}
	})
	go func() {
		both.Wait()
		close(s.ended)
	}()
	s.release = context.AfterFunc(ctx, s.cut)
	if len(wide) > 0 {
		_, err = channel.SendRequest(stripesRequest, false, nameStripes(wide))
	}
	ok := false
	if err == nil {
		// RFC 4254 §6.5.
		ok, err = channel.SendRequest(request, answered, ssh.Marshal(struct{ Value string }{what}))
	}
	if err == nil && answered && !ok {
		err = fmt.Errorf("the peer has no such %s", request)
	}
	if err != nil {
		s.Close()
		return nil, hint.Exit(hint.ExitUnreachable, fmt.Errorf("start %s: %w", name, err))
	}
	return s, nil
}

// cut ends the stream, and the connection with it if the peer does not answer.
func (s *Stream) cut() {
	s.cancelled.Store(true)
	s.Channel.Close()
	closeStripes(s.wide)
	select {
	case <-s.ended:
	case <-time.After(closeGrace):
		s.raw.Close()
	}
}

// Close ends the stream.
func (s *Stream) Close() error {
	s.release()
	closeStripes(s.wide)
	return s.Channel.Close()
}

// Wait returns, once the peer has closed the stream, how it did: nil for exit
// status 0, an *Error with its words for another, hint.ExitUnreachable where the
// connection broke.
func (s *Stream) Wait() error {
	<-s.ended
	switch {
	case s.status == 0:
		return nil
	case s.status > 0:
		return told(s.status, s.stderr.String())
	}
	return hint.Exit(hint.ExitUnreachable, fmt.Errorf("%s: the connection broke", s.name))
}
