// Package clocktest plays NTP servers for tests, as honest or as false as a test
// wants them.
package clocktest

import (
	"encoding/binary"
	"net"
	"sync"
	"testing"
	"time"
)

// Server is one NTP server (RFC 5905, mode 4) on a loopback address.
type Server struct {
	Address string // host:port

	mu       sync.Mutex // guards the fields below
	behave   Behaviour
	requests int
}

// Behaviour says what a server answers. The zero value is an honest server.
type Behaviour struct {
	Offset     time.Duration    // added to the true time
	Now        func() time.Time // the true time; nil means time.Now
	Silent     bool
	Kiss       string        // a kiss-o'-death code
	Dispersion time.Duration // root dispersion
	Unsynced   bool          // leap indicator 3
	Garbage    []byte        // sent instead of an answer
}

// Start starts a server that ends with the test.
func Start(t testing.TB, b Behaviour) *Server {
	t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{Address: conn.LocalAddr().String(), behave: b}
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.serve(conn)
	}()
	t.Cleanup(func() {
		conn.Close()
		<-done
	})
	return s
}

// Set changes what the server answers from now on.
func (s *Server) Set(b Behaviour) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.behave = b
}

// Requests counts what arrived.
func (s *Server) Requests() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.requests
}

func (s *Server) serve(conn net.PacketConn) {
	buf := make([]byte, 512)
	for {
		n, from, err := conn.ReadFrom(buf)
		if err != nil {
			return
		}
		if n < 48 {
			continue
		}
		s.mu.Lock()
		s.requests++
		b := s.behave
		s.mu.Unlock()
		if answer := b.answer(buf[:n]); answer != nil {
			conn.WriteTo(answer, from) // a lost answer is a silent server
		}
	}
}

func (b Behaviour) answer(request []byte) []byte {
	switch {
	case b.Silent:
		return nil
	case b.Garbage != nil:
		return b.Garbage
	}
	now := time.Now
	if b.Now != nil {
		now = b.Now
	}
	t := now().Add(b.Offset)
	p := make([]byte, 48)
	leap := byte(0)
	if b.Unsynced {
		leap = 3
	}
	p[0] = leap<<6 | 4<<3 | 4 // version 4, mode server
	p[1], p[2], p[3] = 1, 6, 0xec
	copy(p[12:16], "TEST")
	if b.Kiss != "" {
		p[1] = 0
		copy(p[12:16], b.Kiss)
	}
	binary.BigEndian.PutUint32(p[8:], uint32(b.Dispersion*65536/time.Second))
	put(p[16:], t.Add(-time.Minute))
	copy(p[24:32], request[40:48]) // origin: the request's transmit time
	put(p[32:], t)
	put(p[40:], t)
	return p
}

// put writes an NTP timestamp: seconds since 1900, modulo 2^32, and a fraction.
func put(p []byte, t time.Time) {
	const from1900to1970 = 2208988800
	binary.BigEndian.PutUint32(p, uint32(t.Unix()+from1900to1970))
	binary.BigEndian.PutUint32(p[4:], uint32(uint64(t.Nanosecond())<<32/1e9))
}
