// Package dhcptest plays a DHCP server for tests, as well or badly behaved as a
// test wants it.
package dhcptest

import (
	"net"
	"sync"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/server4"
)

// Server is a DHCP server on one interface.
type Server struct {
	mu       sync.Mutex // guards the fields below
	behave   Behaviour
	messages []dhcpv4.MessageType
}

// Behaviour says what a server answers.
type Behaviour struct {
	Self      net.IP // the server's identifier; the interface must have an address
	Address   net.IP
	Mask      net.IPMask
	Router    net.IP
	Resolvers []net.IP
	Lease     time.Duration
	Renew     time.Duration     // T1; 0 leaves it out
	Silent    bool              // to everything
	Refuse    bool              // NAK every request
	Extra     []dhcpv4.Modifier // put into every answer
}

// Start starts a server that ends with the test.
func Start(t testing.TB, ifname string, b Behaviour) *Server {
	t.Helper()
	s := &Server{behave: b}
	server, err := server4.NewServer(ifname, &net.UDPAddr{Port: dhcpv4.ServerPort}, s.handle)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		server.Serve()
	}()
	t.Cleanup(func() {
		server.Close()
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

// Messages lists the kinds of what arrived so far.
func (s *Server) Messages() []dhcpv4.MessageType {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]dhcpv4.MessageType(nil), s.messages...)
}

func (s *Server) handle(conn net.PacketConn, _ net.Addr, m *dhcpv4.DHCPv4) {
	s.mu.Lock()
	b := s.behave
	s.messages = append(s.messages, m.MessageType())
	s.mu.Unlock()
	if b.Silent {
		return
	}
	kind := dhcpv4.MessageTypeOffer
	if m.MessageType() == dhcpv4.MessageTypeRequest {
		kind = dhcpv4.MessageTypeAck
		if b.Refuse {
			kind = dhcpv4.MessageTypeNak
		}
	}
	answer, err := Answer(m, kind, b)
	if err != nil {
		return
	}
	// Broadcast: the client has no address yet, or wants to be asked on all of them.
	conn.WriteTo(answer.ToBytes(), &net.UDPAddr{IP: net.IPv4bcast, Port: dhcpv4.ClientPort})
}

// Answer makes the answer that a server with this behaviour gives.
func Answer(m *dhcpv4.DHCPv4, kind dhcpv4.MessageType, b Behaviour) (*dhcpv4.DHCPv4, error) {
	modifiers := []dhcpv4.Modifier{
		dhcpv4.WithMessageType(kind),
		dhcpv4.WithOption(dhcpv4.OptServerIdentifier(b.Self)),
	}
	if kind != dhcpv4.MessageTypeNak {
		modifiers = append(modifiers, dhcpv4.WithYourIP(b.Address), dhcpv4.WithLeaseTime(uint32(b.Lease/time.Second)))
		if b.Mask != nil {
			modifiers = append(modifiers, dhcpv4.WithNetmask(b.Mask))
		}
		if b.Router != nil {
			modifiers = append(modifiers, dhcpv4.WithOption(dhcpv4.OptRouter(b.Router)))
		}
		if len(b.Resolvers) > 0 {
			modifiers = append(modifiers, dhcpv4.WithOption(dhcpv4.OptDNS(b.Resolvers...)))
		}
		if b.Renew > 0 {
			modifiers = append(modifiers, dhcpv4.WithOption(dhcpv4.OptRenewTimeValue(b.Renew)))
		}
	}
	return dhcpv4.NewReplyFromRequest(m, append(modifiers, b.Extra...)...)
}
