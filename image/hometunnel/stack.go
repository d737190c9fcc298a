package hometunnel

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"

	"golang.zx2c4.com/wireguard/tun"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

const (
	mtu = 1420 // WireGuard's usual: fits an IPv6 path of 1500 bytes
	nic = 1
	// sendBuffer bounds what is under way to a peer, in bytes. The stack's own megabytes overrun the emulated
	// network card's queue, and the transfer then crawls from loss to loss.
	sendBuffer = 128 << 10
	queue      = 512 // packets
)

// stackTUN is a TCP/IP stack that looks like a network interface to WireGuard.
//
// wireguard-go brings one of its own (tun/netstack), whose Close closes a channel into which the
// stack may be sending: a panic now and then at the end of a program.
type stackTUN struct {
	address netip.Addr
	stack   *stack.Stack
	link    *channel.Endpoint
	events  chan tun.Event
	ctx     context.Context
	cancel  context.CancelFunc
	close   sync.Once
}

func newStack(address netip.Addr) (*stackTUN, error) {
	t := &stackTUN{
		address: address,
		stack: stack.New(stack.Options{
			NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol},
			TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6},
			HandleLocal:        true,
		}),
		link:   channel.New(queue, mtu, ""),
		events: make(chan tun.Event, 1),
	}
	t.ctx, t.cancel = context.WithCancel(context.Background())
	sack := tcpip.TCPSACKEnabled(true)
	size := tcpip.TCPSendBufferSizeRangeOption{Min: 4 << 10, Default: sendBuffer, Max: sendBuffer}
	for _, option := range []tcpip.SettableTransportProtocolOption{&sack, &size} {
		if err := t.stack.SetTransportProtocolOption(tcp.ProtocolNumber, option); err != nil {
			return nil, errors.New(err.String())
		}
	}
	if err := t.stack.CreateNIC(nic, t.link); err != nil {
		return nil, errors.New(err.String())
	}
	protocol, everywhere := ipv4.ProtocolNumber, header.IPv4EmptySubnet
	if address.Is6() {
		protocol, everywhere = ipv6.ProtocolNumber, header.IPv6EmptySubnet
	}
	err := t.stack.AddProtocolAddress(nic, tcpip.ProtocolAddress{
		Protocol:          protocol,
		AddressWithPrefix: tcpip.AddrFromSlice(address.AsSlice()).WithPrefix(),
	}, stack.AddressProperties{})
	if err != nil {
		return nil, errors.New(err.String())
	}
	t.stack.AddRoute(tcpip.Route{Destination: everywhere, NIC: nic})
	// No EventUp: Start brings the device up, and a second attempt beside it would take another port if the
	// first one found the wanted port taken.
	return t, nil
}

func full(a netip.AddrPort) (tcpip.FullAddress, tcpip.NetworkProtocolNumber) {
	protocol := ipv4.ProtocolNumber
	if a.Addr().Is6() {
		protocol = ipv6.ProtocolNumber
	}
	return tcpip.FullAddress{NIC: nic, Addr: tcpip.AddrFromSlice(a.Addr().AsSlice()), Port: a.Port()}, protocol
}

func (t *stackTUN) dial(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	address, protocol := full(to)
	return gonet.DialContextTCP(ctx, t.stack, address, protocol)
}

func (t *stackTUN) listen(at netip.AddrPort) (net.Listener, error) {
	address, protocol := full(at)
	l, err := gonet.ListenTCP(t.stack, address, protocol)
	if err != nil {
		return nil, err
	}
	return &listener{TCPListener: l}, nil
}

// listener behaves as net's listeners do at the end: Close wakes Accept, whose error is net.ErrClosed.
type listener struct {
	*gonet.TCPListener
	once sync.Once
}

func (l *listener) Accept() (net.Conn, error) {
	c, err := l.TCPListener.Accept()
	if err != nil {
		return nil, &net.OpError{Op: "accept", Net: "tcp", Addr: l.Addr(), Err: net.ErrClosed}
	}
	return c, nil
}

func (l *listener) Close() error {
	l.once.Do(func() {
		l.Shutdown()
		l.TCPListener.Close()
	})
	return nil
}

// The methods of tun.Device.

func (t *stackTUN) File() *os.File           { return nil }
func (t *stackTUN) Name() (string, error)    { return "hometunnel", nil }
func (t *stackTUN) MTU() (int, error)        { return mtu, nil }
func (t *stackTUN) BatchSize() int           { return 32 }
func (t *stackTUN) Events() <-chan tun.Event { return t.events }

// Read takes packets that the stack sends.
func (t *stackTUN) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	p := t.link.ReadContext(t.ctx)
	if p == nil {
		return 0, os.ErrClosed
	}
	n := 0
	for p != nil {
		size := 0
		for _, part := range p.AsSlices() {
			size += copy(bufs[n][offset+size:], part)
		}
		p.DecRef()
		sizes[n] = size
		n++
		if n == len(bufs) {
			break
		}
		p = t.link.Read()
	}
	return n, nil
}

// Write gives the stack packets that have come.
func (t *stackTUN) Write(bufs [][]byte, offset int) (int, error) {
	for i, b := range bufs {
		packet := b[offset:]
		if len(packet) == 0 {
			continue
		}
		var protocol tcpip.NetworkProtocolNumber
		switch packet[0] >> 4 {
		case 4:
			protocol = header.IPv4ProtocolNumber
		case 6:
			protocol = header.IPv6ProtocolNumber
		default:
			return i, syscall.EAFNOSUPPORT
		}
		p := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(packet)})
		t.link.InjectInbound(protocol, p)
		p.DecRef()
	}
	return len(bufs), nil
}

func (t *stackTUN) Close() error {
	t.close.Do(func() {
		t.cancel()
		t.stack.Close()
		t.link.Close()
		close(t.events)
	})
	return nil
}
