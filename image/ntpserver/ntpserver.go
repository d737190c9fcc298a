// Package ntpserver is a small NTP server for tests and for machines without internet: an emulated appliance sets
// its clock from it. It answers clients (RFC 5905 §7.3, mode 3) over UDP with the host's time plus an offset
// that can be changed while it runs, so that a source can also lie. It keeps no time of its own and knows
// neither authentication nor other modes.
package ntpserver

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Server is a running server.
type Server struct {
	socket   net.PacketConn
	now      func() time.Time
	offset   atomic.Int64 // nanoseconds
	silent   atomic.Bool
	unsynced atomic.Bool
	served   atomic.Int64
	done     sync.WaitGroup
}

const (
	packetSize  = 48
	modeClient  = 3
	modeServer  = 4
	unsyncStrat = 16 // RFC 5905 §7.3: unsynchronised
)

// epoch is NTP's: seconds since 1900 (era 0).
var epoch = time.Date(1900, 1, 1, 0, 0, 0, 0, time.UTC)

// Listen starts a server on a UDP address such as "127.0.0.1:0". now gives the time before the offset is
// added; nil means time.Now.
func Listen(address string, now func() time.Time) (*Server, error) {
	if now == nil {
		now = time.Now
	}
	socket, err := (&net.ListenConfig{}).ListenPacket(context.Background(), "udp", address)
	if err != nil {
		return nil, fmt.Errorf("listen for NTP: %w", err)
	}
	s := &Server{socket: socket, now: now}
	s.done.Go(s.serve)
	return s, nil
}

// Addr is where the server listens.
func (s *Server) Addr() *net.UDPAddr { return s.socket.LocalAddr().(*net.UDPAddr) }

// SetOffset makes the server say the time plus d.
func (s *Server) SetOffset(d time.Duration) { s.offset.Store(int64(d)) }

// SetSilent makes the server ignore requests, or answer again.
func (s *Server) SetSilent(silent bool) { s.silent.Store(silent) }

// SetUnsynchronised makes the server say of itself that its time means nothing, or take that back.
func (s *Server) SetUnsynchronised(u bool) { s.unsynced.Store(u) }

// Served is how many requests have been answered.
func (s *Server) Served() int64 { return s.served.Load() }

// Close stops the server.
func (s *Server) Close() error {
	err := s.socket.Close()
	s.done.Wait()
	return err
}

func (s *Server) serve() {
	buf := make([]byte, 1024)
	for {
		n, from, err := s.socket.ReadFrom(buf)
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			continue // an ICMP error for an earlier answer
		}
		if s.silent.Load() {
			continue
		}
		at := s.now().Add(time.Duration(s.offset.Load()))
		reply, ok := answer(buf[:n], at, s.unsynced.Load())
		if !ok {
			continue
		}
		if _, err := s.socket.WriteTo(reply, from); err == nil {
			s.served.Add(1)
		}
	}
}

// answer makes the reply to a request that came at the given time. ok is false if it is no client's request.
func answer(request []byte, at time.Time, unsynchronised bool) (reply []byte, ok bool) {
	if len(request) < packetSize || request[0]&7 != modeClient {
		return nil, false
	}
	version := request[0] >> 3 & 7
	if version < 3 || version > 4 {
		return nil, false
	}
	reply = make([]byte, packetSize)
	leap, stratum := byte(0), byte(2)
	if unsynchronised {
		leap, stratum = 3, unsyncStrat
	}
	reply[0] = leap<<6 | version<<3 | modeServer
	reply[1] = stratum
	reply[2] = request[2]                             // poll interval
	reply[3] = 0xec                                   // precision 2^-20 s
	binary.BigEndian.PutUint32(reply[4:], 1<<16/1000) // root delay, 1 ms in 16.16 seconds
	binary.BigEndian.PutUint32(reply[8:], 1<<16/1000) // root dispersion
	copy(reply[12:], []byte{127, 127, 1, 0})          // reference id: the local clock
	stamp := timestamp(at)
	binary.BigEndian.PutUint64(reply[16:], timestamp(at.Add(-time.Second))) // set a second ago
	copy(reply[24:32], request[40:48])                                      // origin: what the client sent
	binary.BigEndian.PutUint64(reply[32:], stamp)                           // received
	binary.BigEndian.PutUint64(reply[40:], stamp)                           // sent
	return reply, true
}

// timestamp is t in NTP's 32.32 format. Times outside era 0 wrap around, as the format does.
func timestamp(t time.Time) uint64 {
	seconds := t.Unix() - epoch.Unix()
	fraction := uint64(t.Nanosecond()) << 32 / uint64(time.Second)
	return uint64(uint32(seconds))<<32 | fraction
}
