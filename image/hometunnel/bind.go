package hometunnel

import (
	"net"
	"net/netip"
	"sync"

	"golang.zx2c4.com/wireguard/conn"
)

// loopback carries WireGuard's packets over one UDP socket of the host's loopback. wireguard-go's own binds
// listen on every address of the host.
type loopback struct {
	mu     sync.Mutex
	socket *net.UDPConn
}

func (b *loopback) Open(port uint16) ([]conn.ReceiveFunc, uint16, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.socket != nil {
		return nil, 0, conn.ErrBindAlreadyOpen
	}
	at := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port)
	s, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(at))
	if err != nil {
		return nil, 0, err
	}
	// A burst of a whole TCP window should find room; the kernel may grant less.
	_ = s.SetReadBuffer(4 << 20)
	_ = s.SetWriteBuffer(4 << 20)
	b.socket = s
	receive := func(packets [][]byte, sizes []int, endpoints []conn.Endpoint) (int, error) {
		n, from, err := s.ReadFromUDPAddrPort(packets[0])
		if err != nil {
			return 0, err
		}
		sizes[0] = n
		endpoints[0] = &conn.StdNetEndpoint{AddrPort: from}
		return 1, nil
	}
	return []conn.ReceiveFunc{receive}, localPort(s), nil
}

func (b *loopback) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.socket == nil {
		return nil
	}
	err := b.socket.Close()
	b.socket = nil
	return err
}

func (b *loopback) Send(packets [][]byte, to conn.Endpoint) error {
	e, ok := to.(*conn.StdNetEndpoint)
	if !ok {
		return conn.ErrWrongEndpointType
	}
	b.mu.Lock()
	s := b.socket
	b.mu.Unlock()
	if s == nil {
		return net.ErrClosed
	}
	for _, p := range packets {
		if _, err := s.WriteToUDPAddrPort(p, e.AddrPort); err != nil {
			return err
		}
	}
	return nil
}

func (b *loopback) ParseEndpoint(s string) (conn.Endpoint, error) {
	a, err := netip.ParseAddrPort(s)
	if err != nil {
		return nil, err
	}
	return &conn.StdNetEndpoint{AddrPort: a}, nil
}

func (b *loopback) SetMark(uint32) error { return nil }
func (b *loopback) BatchSize() int       { return 1 }

func (b *loopback) port() uint16 {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.socket == nil {
		return 0
	}
	return localPort(b.socket)
}

func localPort(s *net.UDPConn) uint16 { return s.LocalAddr().(*net.UDPAddr).AddrPort().Port() }
