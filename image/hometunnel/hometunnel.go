// Package hometunnel is the home end of the VPN in user space: WireGuard and a TCP/IP stack inside an ordinary
// process. It needs no root, no network interface and no WireGuard in the host's kernel, so an emulated
// appliance can be tried on any machine.
//
// It listens on a UDP port of the host's loopback only, where an emulated machine reaches it at 10.0.2.2. Like
// every WireGuard peer without a fixed endpoint for the other side, it cannot speak first: until the
// appliance's first handshake has come, dialling waits. Other programs of the host take part through
// Forward and Expose, which map ports of the VPN to ports of the loopback and back.
//
// It is for trying and testing. A home that stays uses the kernel's WireGuard.
package hometunnel

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.zx2c4.com/wireguard/device"

	"farkeep/shared/identity"
	"farkeep/shared/secret"
)

// Config is one end of a WireGuard tunnel. Keys are in WireGuard's base64 form.
type Config struct {
	PrivateKey secret.Text
	ListenPort uint16     // UDP, on 127.0.0.1; 0: any, see Home.Port
	Address    netip.Addr // in the VPN
	Peers      []Peer
	Logger     *slog.Logger // may be nil
}

// Peer is another end. Endpoint and Keepalive are for a peer that is to speak first; home leaves them empty.
type Peer struct {
	PublicKey    string
	PresharedKey secret.Text // may be empty
	AllowedIPs   []netip.Prefix
	Endpoint     netip.AddrPort
	Keepalive    time.Duration // whole seconds; 0: none
}

// Home is a running tunnel end. Its methods may be called from several goroutines.
type Home struct {
	log    *slog.Logger
	device *device.Device
	stack  *stackTUN
	bind   *loopback

	ctx    context.Context // ends at Close
	cancel context.CancelFunc
	work   sync.WaitGroup // goroutines of Forward and Expose

	talk  sync.RWMutex
	quiet bool // guarded by talk

	mu     sync.Mutex
	closed bool
	open   map[io.Closer]struct{} // listeners and connections of Forward and Expose
}

// Start brings the tunnel up.
func Start(cfg Config) (*Home, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if !cfg.Address.IsValid() {
		return nil, errors.New("start the home tunnel: its address in the VPN is missing")
	}
	settings, err := uapi(cfg)
	if err != nil {
		return nil, fmt.Errorf("start the home tunnel: %w", err)
	}
	stack, err := newStack(cfg.Address)
	if err != nil {
		return nil, fmt.Errorf("start the home tunnel: %w", err)
	}
	bind := &loopback{}
	h := &Home{log: cfg.Logger, stack: stack, bind: bind, open: map[io.Closer]struct{}{}}
	h.ctx, h.cancel = context.WithCancel(context.Background())
	h.device = device.NewDevice(stack, bind, &device.Logger{
		Verbosef: func(format string, args ...any) { h.say(slog.LevelDebug, format, args...) },
		Errorf:   func(format string, args ...any) { h.say(slog.LevelWarn, format, args...) },
	})
	err = h.device.IpcSet(settings)
	if err == nil {
		err = h.device.Up()
	}
	if err != nil {
		h.Close()
		return nil, fmt.Errorf("start the home tunnel on UDP port %d of the loopback: %w", cfg.ListenPort, err)
	}
	return h, nil
}

// say logs for wireguard-go, whose workers go on a moment after its Close has returned. The caller's log may be
// gone by then.
func (h *Home) say(level slog.Level, format string, args ...any) {
	h.talk.RLock()
	defer h.talk.RUnlock()
	if !h.quiet {
		h.log.Log(context.Background(), level, "wireguard: "+fmt.Sprintf(format, args...))
	}
}

// uapi writes cfg in the form of WireGuard's configuration protocol
// (https://www.wireguard.com/xplatform/).
func uapi(cfg Config) (string, error) {
	var b strings.Builder
	key := func(name, text string) error {
		raw, err := identity.ParseWireGuard(text)
		if err != nil {
			return fmt.Errorf("%s: %w", strings.ReplaceAll(name, "_", " "), err)
		}
		fmt.Fprintf(&b, "%s=%s\n", name, hex.EncodeToString(raw))
		return nil
	}
	if err := key("private_key", cfg.PrivateKey.Reveal()); err != nil {
		return "", err
	}
	fmt.Fprintf(&b, "listen_port=%d\nreplace_peers=true\n", cfg.ListenPort)
	for i, p := range cfg.Peers {
		if err := key("public_key", p.PublicKey); err != nil {
			return "", fmt.Errorf("peer %d: %w", i+1, err)
		}
		if p.PresharedKey != "" {
			if err := key("preshared_key", p.PresharedKey.Reveal()); err != nil {
				return "", fmt.Errorf("peer %d: %w", i+1, err)
			}
		}
		if p.Endpoint.IsValid() {
			fmt.Fprintf(&b, "endpoint=%s\n", p.Endpoint)
		}
		fmt.Fprintf(&b, "persistent_keepalive_interval=%d\n", int(p.Keepalive/time.Second))
		for _, prefix := range p.AllowedIPs {
			fmt.Fprintf(&b, "allowed_ip=%s\n", prefix)
		}
	}
	return b.String(), nil
}

// Port is the UDP port on the host's loopback.
func (h *Home) Port() uint16 { return h.bind.port() }

// DialContext connects to a TCP port in the VPN, given as "tcp" and "address:port" with a literal address.
func (h *Home) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	if network != "tcp" && network != "tcp4" && network != "tcp6" {
		return nil, fmt.Errorf("dial %s %s through the tunnel: only tcp is carried", network, address)
	}
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, fmt.Errorf("dial through the tunnel: %w", err)
	}
	c, err := h.stack.dial(ctx, to)
	if err != nil {
		return nil, fmt.Errorf("dial %s through the tunnel: %w", address, err)
	}
	return c, nil
}

// Listen listens on a TCP port of home's VPN address. An address without a host part (":22") means that
// address.
func (h *Home) Listen(network, address string) (net.Listener, error) {
	if network != "tcp" && network != "tcp4" && network != "tcp6" {
		return nil, fmt.Errorf("listen on %s %s in the VPN: only tcp is carried", network, address)
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, fmt.Errorf("listen in the VPN: %w", err)
	}
	at := netip.AddrPortFrom(h.stack.address, 0)
	if host != "" {
		a, err := netip.ParseAddr(host)
		if err != nil {
			return nil, fmt.Errorf("listen in the VPN: %w", err)
		}
		at = netip.AddrPortFrom(a, 0)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return nil, fmt.Errorf("listen in the VPN: port %q: %w", port, err)
	}
	l, err := h.stack.listen(netip.AddrPortFrom(at.Addr(), uint16(n)))
	if err != nil {
		return nil, fmt.Errorf("listen on %s in the VPN: %w", address, err)
	}
	return l, nil
}

// PeerStatus is what WireGuard knows about a peer.
type PeerStatus struct {
	PublicKey     string
	Endpoint      string    // "" before the first handshake
	LastHandshake time.Time // zero before the first
	Received      uint64    // bytes
	Sent          uint64
}

// Peers returns the state of every peer.
func (h *Home) Peers() ([]PeerStatus, error) {
	text, err := h.device.IpcGet()
	if err != nil {
		return nil, fmt.Errorf("ask WireGuard for its peers: %w", err)
	}
	return parseStatus(text)
}

// WaitHandshake returns when the peer with this public key has completed a handshake later than after, which may
// be zero.
func (h *Home) WaitHandshake(ctx context.Context, publicKey string, after time.Time) error {
	tick := time.NewTicker(50 * time.Millisecond) // wireguard-go tells nobody when it happens
	defer tick.Stop()
	for {
		peers, err := h.Peers()
		if err != nil {
			return err
		}
		i := slices.IndexFunc(peers, func(p PeerStatus) bool { return p.PublicKey == publicKey })
		if i < 0 {
			return fmt.Errorf("wait for a handshake with %s: no such peer", publicKey)
		}
		if peers[i].LastHandshake.After(after) {
			return nil
		}
		select {
		case <-tick.C:
		case <-h.ctx.Done():
			return fmt.Errorf("wait for a handshake with %s: %w", publicKey, net.ErrClosed)
		case <-ctx.Done():
			return fmt.Errorf("wait for a handshake with %s: %w", publicKey, ctx.Err())
		}
	}
}

// Close takes the tunnel down and ends everything that goes through it.
func (h *Home) Close() error {
	h.mu.Lock()
	h.closed = true
	for c := range h.open {
		c.Close()
	}
	h.mu.Unlock()
	h.cancel()
	h.work.Wait()
	h.device.Close()
	h.talk.Lock()
	h.quiet = true
	h.talk.Unlock()
	return nil
}
