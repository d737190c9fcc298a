package sshverb

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"farkeep/shared/hint"
)

// A stripe is a channel that carries a part of what a session of the same connection
// reads. The client opens it with a number of its choice, before the session needs
// it, and names it in a request of the session, before the one that names the verb;
// their order is the order of dealing, the session's own channel being the first. A
// peer that knows no stripes refuses to open one, and nothing else changes.
const (
	stripeChannel  = "stripe@farkeep"  // its extra data is the number, four bytes
	stripesRequest = "stripes@farkeep" // its payload is the numbers
)

// enterStripe counts a stripe; leaveStripe must be called if it says yes.
func (s *Server) enterStripe(limit int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stripes >= limit {
		return false
	}
	s.stripes++
	return true
}

func (s *Server) leaveStripe() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stripes--
}

// stripes are those of one connection that no session has named yet.
type stripes struct {
	server *Server
	limits Limits
	hangUp func()

	mu      sync.Mutex
	waiting map[uint32]*stripe
}

type stripe struct {
	ssh.Channel
	unused  *time.Timer   // closes it
	ended   chan struct{} // closed when both sides have closed it
	closing sync.Once
}

// close asks the peer to close the stripe, and hangs up on one that does not: it would
// keep it from others.
func (s *stripe) close(grace time.Duration, hangUp func()) {
	s.closing.Do(func() {
		s.Channel.Close()
		go func() {
			late := time.NewTimer(grace)
			defer late.Stop()
			select {
			case <-s.ended:
			case <-late.C:
				hangUp()
			}
		}()
	})
}

// open answers a peer that asks for a stripe. The returned function waits for its end;
// it is nil where the stripe was refused.
func (s *stripes) open(asked ssh.NewChannel) (wait func()) {
	if len(asked.ExtraData()) != 4 {
		asked.Reject(ssh.Prohibited, "a stripe has a number")
		return nil
	}
	number := binary.BigEndian.Uint32(asked.ExtraData())
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.waiting[number] != nil {
		asked.Reject(ssh.Prohibited, "this stripe is open already")
		return nil
	}
	if !s.server.enterStripe(s.limits.Stripes) {
		asked.Reject(ssh.ResourceShortage, "no more stripes now")
		return nil
	}
	channel, requests, err := asked.Accept()
	if err != nil {
		s.server.leaveStripe()
		return nil
	}
	one := &stripe{Channel: channel, ended: make(chan struct{})}
	one.unused = time.AfterFunc(s.limits.Handshake, func() {
		if s.take(number, one) != nil {
			one.close(s.limits.Grace, s.hangUp)
		}
	})
	s.waiting[number] = one
	return func() {
		ssh.DiscardRequests(requests) // until both sides have closed it
		close(one.ended)
		s.take(number, one)
		s.server.leaveStripe()
	}
}

// take returns the stripe with a number, for whoever asks first; with only, no other
// than that: numbers are the client's, who may use one again.
func (s *stripes) take(number uint32, only *stripe) *stripe {
	s.mu.Lock()
	defer s.mu.Unlock()
	one := s.waiting[number]
	if one != nil && only != nil && one != only {
		return nil
	}
	if one != nil {
		one.unused.Stop()
		delete(s.waiting, number)
	}
	return one
}

// named returns the stripes that a session names.
func (s *stripes) named(payload []byte) (all []*stripe, err error) {
	if len(payload) == 0 || len(payload)%4 != 0 || len(payload)/4 > s.limits.Stripes {
		return nil, &Error{Code: hint.ExitUsage, Text: "this is no list of stripes"}
	}
	for number := range slices.Chunk(payload, 4) {
		one := s.take(binary.BigEndian.Uint32(number), nil)
		if one == nil {
			err = &Error{Code: hint.ExitUnreachable, Text: "a stripe of this connection is not open any more", Hint: "try again"}
			continue
		}
		all = append(all, one)
	}
	return all, err
}

// closeAll closes the stripes of a session.
func (s *stripes) closeAll(all []*stripe) {
	for _, one := range all {
		one.close(s.limits.Grace, s.hangUp)
	}
}

// opening is a stripe that a client has asked for.
type opening struct {
	number uint32
	ahead
}

// RoundTrip is the least time that the peer took to answer when a session was opened
// ahead (Peer.Ahead); 0: not known.
func (c *Client) RoundTrip() time.Duration { return time.Duration(c.roundTrip.Load()) }

func (c *Client) answered(took time.Duration) {
	for {
		was := c.roundTrip.Load()
		if was != 0 && was <= int64(took) || c.roundTrip.CompareAndSwap(was, int64(took)) {
			return
		}
	}
}

// Widen asks the peer for n stripes, less those that it was asked for and that are of
// use still. It does not wait: [Client.StartWide] finds which of them there are.
func (c *Client) Widen(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	fresh := c.opening[:0]
	for _, o := range c.opening {
		if time.Since(o.at) > aheadFor {
			go o.discard()
			continue
		}
		fresh = append(fresh, o)
	}
	c.opening = fresh
	for len(c.opening) < n && !c.narrow {
		c.stripes++
		o := &opening{number: c.stripes, ahead: ahead{ready: make(chan struct{}), at: time.Now()}}
		c.opening = append(c.opening, o)
		go func() {
			o.channel, o.requests, o.err = c.conn.OpenChannel(stripeChannel, binary.BigEndian.AppendUint32(nil, o.number))
			var refused *ssh.OpenChannelError
			if errors.As(o.err, &refused) && refused.Reason != ssh.ResourceShortage {
				c.mu.Lock()
				c.narrow = true // the peer knows none
				c.mu.Unlock()
			}
			close(o.ready)
			if o.err == nil {
				ssh.DiscardRequests(o.requests)
			}
		}()
	}
}

func (o *opening) discard() {
	<-o.ready
	if o.err == nil {
		o.channel.Close()
	}
}

// StartWide is Start for a verb with much input on a long line: what is written is
// dealt over at most n stripes and the session's own channel, so that n+1 windows of
// 2 MiB are under way at once. How many stripes there are the peer decides; without
// any this is Start. It waits for the peer's word about stripes that [Client.Widen]
// has not asked for in time, and closes those that were asked for beyond n.
func (c *Client) StartWide(ctx context.Context, verb string, n int) (*Dialogue, error) {
	name, _, err := ParseVerb(verb)
	if err != nil {
		return nil, err
	}
	granted, err := c.granted(ctx, n)
	if err != nil {
		return nil, hint.Exit(hint.ExitCancelled, fmt.Errorf("%s: %w", name, err))
	}
	s, err := c.stream(ctx, name, "exec", verb, false, granted)
	if err != nil {
		return nil, err
	}
	if len(granted) == 0 {
		return &Dialogue{Stdin: input{s}, Stdout: s, stream: s}, nil
	}
	to := []lane{s}
	for _, o := range granted {
		to = append(to, o.channel)
	}
	return &Dialogue{Stdin: wideInput{&dealer{to: to}}, Stdout: s, stream: s}, nil
}

// wideInput is what a verb reads. Closing it ends that, and not the verb.
type wideInput struct{ *dealer }

func (i wideInput) Close() error { return i.CloseWrite() }

// granted returns at most n stripes, once the peer has answered for each that it was
// asked for.
func (c *Client) granted(ctx context.Context, n int) (all []*opening, err error) {
	c.Widen(n)
	c.mu.Lock()
	asked := c.opening
	c.opening = nil
	c.mu.Unlock()
	if len(asked) > n {
		for _, o := range asked[n:] {
			go o.discard()
		}
		asked = asked[:n]
	}
	for _, o := range asked {
		select {
		case <-o.ready:
		case <-ctx.Done():
			for _, o := range asked {
				go o.discard()
			}
			return nil, context.Cause(ctx)
		}
		if o.err == nil {
			all = append(all, o)
		}
	}
	return all, nil
}

func closeStripes(all []*opening) {
	for _, o := range all {
		o.channel.Close()
	}
}

// nameStripes is the payload of the request that names stripes.
func nameStripes(all []*opening) (payload []byte) {
	for _, o := range all {
		payload = binary.BigEndian.AppendUint32(payload, o.number)
	}
	return payload
}
