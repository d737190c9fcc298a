package hometunnel

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"time"
)

// dialTimeout bounds how long a connection through Forward or Expose may take to come about.
const dialTimeout = 30 * time.Second

// Forward makes a TCP server of the host, at hostDial, reachable in the VPN on home's address and the given port.
// It lasts until Close.
func (h *Home) Forward(vpnPort uint16, hostDial string) error {
	l, err := h.Listen("tcp", fmt.Sprintf(":%d", vpnPort))
	if err != nil {
		return err
	}
	dial := func(ctx context.Context) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", hostDial)
	}
	return h.serve(l, dial, "forward from the VPN to "+hostDial)
}

// Expose makes a TCP server in the VPN, at vpnDial, reachable at hostListen, an address of the host's loopback
// such as "127.0.0.1:0". It returns the address, with the port that was chosen, and lasts until Close.
func (h *Home) Expose(hostListen string, vpnDial netip.AddrPort) (net.Addr, error) {
	l, err := net.Listen("tcp", hostListen)
	if err != nil {
		return nil, err
	}
	if a, ok := l.Addr().(*net.TCPAddr); !ok || !a.IP.IsLoopback() {
		l.Close()
		return nil, fmt.Errorf("expose %s on %s: not an address of the loopback", vpnDial, hostListen)
	}
	dial := func(ctx context.Context) (net.Conn, error) { return h.DialContext(ctx, "tcp", vpnDial.String()) }
	return l.Addr(), h.serve(l, dial, "expose "+vpnDial.String())
}

// serve joins every connection that l accepts with one that dial makes.
func (h *Home) serve(l net.Listener, dial func(context.Context) (net.Conn, error), what string) error {
	if !h.hold(l) {
		return fmt.Errorf("%s: %w", what, net.ErrClosed)
	}
	h.work.Go(func() {
		defer h.drop(l)
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			if !h.hold(in) {
				return
			}
			h.work.Go(func() {
				defer h.drop(in)
				ctx, cancel := context.WithTimeout(h.ctx, dialTimeout)
				out, err := dial(ctx)
				cancel()
				if err != nil {
					h.log.Warn(what, "error", err)
					return
				}
				if !h.hold(out) {
					return
				}
				defer h.drop(out)
				join(in, out)
			})
		}
	})
	return nil
}

// hold notes a connection or listener to be closed by Close. If that has happened already, it closes c.
func (h *Home) hold(c io.Closer) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		c.Close()
		return false
	}
	h.open[c] = struct{}{}
	return true
}

func (h *Home) drop(c io.Closer) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, ok := h.open[c]; ok {
		delete(h.open, c)
		c.Close()
	}
}

// join copies in both directions until both have ended. The end of one direction is passed on as such, because
// SSH and other protocols go on in the other.
func join(a, b net.Conn) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		half(a, b)
	}()
	half(b, a)
	<-done
}

func half(to, from net.Conn) {
	_, err := io.Copy(to, from)
	if c, ok := to.(interface{ CloseWrite() error }); ok && err == nil {
		_ = c.CloseWrite()
		return
	}
	to.Close()
	from.Close()
}
