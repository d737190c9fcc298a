// Package vpn keeps the WireGuard tunnel home: the interface, its address and
// routes, and for every peer an endpoint that answers.
//
// Home's address changes, and home has several: a peer's endpoints are names
// and addresses that are resolved again and tried in turn, without end, whenever
// its handshake grows too old. While it is young WireGuard's own roaming is left
// alone. Addresses that belong to the VPN leave through the VPN or not at all,
// whatever the LAN says about them.
//
// No address and no key is logged. The caller has the clock set first: peers
// refuse handshakes from a clock that went back. Needs CAP_NET_ADMIN and the
// wireguard module.
package vpn

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"time"

	"farkeep/shared/settings"

	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

const (
	// handshakeMax is the age at which a handshake is worth nothing any more:
	// WireGuard's REJECT_AFTER_TIME (whitepaper §6.1). With a keepalive a tunnel
	// that works has made a new one a minute before.
	handshakeMax = 180 * time.Second
	// pollInterval is how often the handshakes are looked at, searchInterval while
	// a peer has none that counts.
	pollInterval   = 2 * time.Second
	searchInterval = 250 * time.Millisecond
)

// Peer is one peer as it is now.
type Peer struct {
	Name          string
	Endpoint      string // as WireGuard has it; "" without one
	LastHandshake time.Time
	Up            bool // it made a handshake that still counts
}

// device is what is needed of WireGuard; *wgctrl.Client is one.
type device interface {
	ConfigureDevice(name string, c wgtypes.Config) error
	Device(name string) (*wgtypes.Device, error)
}

// Tunnel is the VPN interface of one appliance.
type Tunnel struct {
	settings settings.VPN
	log      *slog.Logger
	resolve  func(ctx context.Context, host string) ([]netip.Addr, error)
	turn     time.Duration // an endpoint's first turn
}

// New returns the tunnel that s describes; Run makes it.
func New(s settings.VPN, log *slog.Logger) *Tunnel {
	return &Tunnel{settings: s, log: log, turn: firstTurn, resolve: func(ctx context.Context, host string) ([]netip.Addr, error) {
		return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	}}
}

// Run makes the interface, or takes over the one that an earlier run left, and
// keeps it until ctx ends; report is called with the peers' state at least every
// pollInterval. The interface stays when Run ends, so that a restart of the
// caller does not cut sessions. An error means that the kernel refused something.
func (t *Tunnel) Run(ctx context.Context, report func([]Peer)) error {
	if err := t.makeLink(); err != nil {
		return err
	}
	// Only now: the kernel's WireGuard is found once its module is loaded, which
	// making a link may do.
	wg, err := wgctrl.New()
	if err != nil {
		return fmt.Errorf("vpn: reach WireGuard: %w", err)
	}
	defer wg.Close()
	if err := t.configure(wg); err != nil {
		return err
	}
	if err := t.makeRoutes(); err != nil {
		return err
	}
	return t.tend(ctx, wg, report)
}

// configure sets keys and peers without disturbing sessions that are alive.
func (t *Tunnel) configure(wg device) error {
	private, err := wgtypes.ParseKey(t.settings.PrivateKey.Reveal())
	if err != nil {
		return errors.New("vpn: the private key is not one") // wgtypes' error may quote it
	}
	config := wgtypes.Config{PrivateKey: &private}
	if t.settings.ListenPort != 0 {
		config.ListenPort = &t.settings.ListenPort
	}
	now, err := wg.Device(t.settings.Interface)
	if err != nil {
		return fmt.Errorf("vpn: read %s: %w", t.settings.Interface, err)
	}
	wanted := map[wgtypes.Key]bool{}
	for _, p := range t.settings.Peers {
		pc, err := peerConfig(p)
		if err != nil {
			return err
		}
		// Without an endpoint a keepalive only starts a handshake that cannot be
		// sent, and the next one has to wait for REKEY_TIMEOUT; point sets both.
		if !slices.ContainsFunc(now.Peers, func(q wgtypes.Peer) bool { return q.PublicKey == pc.PublicKey && q.Endpoint != nil }) {
			pc.PersistentKeepaliveInterval = nil
		}
		wanted[pc.PublicKey] = true
		config.Peers = append(config.Peers, pc)
	}
	for _, p := range now.Peers {
		if !wanted[p.PublicKey] {
			config.Peers = append(config.Peers, wgtypes.PeerConfig{PublicKey: p.PublicKey, Remove: true})
		}
	}
	if err := wg.ConfigureDevice(t.settings.Interface, config); err != nil {
		return fmt.Errorf("vpn: configure %s: %w", t.settings.Interface, err)
	}
	return nil
}

func peerConfig(p settings.Peer) (wgtypes.PeerConfig, error) {
	public, err := wgtypes.ParseKey(p.PublicKey)
	if err != nil {
		return wgtypes.PeerConfig{}, fmt.Errorf("vpn: peer %s: its public key is not one", p.Name)
	}
	keepalive := p.Keepalive.Std()
	c := wgtypes.PeerConfig{PublicKey: public, PersistentKeepaliveInterval: &keepalive, ReplaceAllowedIPs: true}
	if p.PresharedKey != "" {
		psk, err := wgtypes.ParseKey(p.PresharedKey.Reveal())
		if err != nil {
			return wgtypes.PeerConfig{}, fmt.Errorf("vpn: peer %s: its preshared key is not one", p.Name)
		}
		c.PresharedKey = &psk
	}
	for _, a := range p.AllowedIPs {
		c.AllowedIPs = append(c.AllowedIPs, ipNet(a.Masked()))
	}
	return c, nil
}

// tend looks after the peers' endpoints.
func (t *Tunnel) tend(ctx context.Context, wg device, report func([]Peer)) error {
	rotations := map[wgtypes.Key]*rotation{}
	next := time.NewTimer(0)
	defer next.Stop()
	for {
		interval := pollInterval
		now, err := wg.Device(t.settings.Interface)
		if err != nil {
			return fmt.Errorf("vpn: read %s: %w", t.settings.Interface, err)
		}
		var peers []Peer
		for _, p := range t.settings.Peers {
			key, err := wgtypes.ParseKey(p.PublicKey)
			if err != nil {
				return fmt.Errorf("vpn: peer %s: its public key is not one", p.Name)
			}
			r := rotations[key]
			if r == nil {
				r = newRotation(p, t.turn, t.resolve, t.inside)
				rotations[key] = r
			}
			state := Peer{Name: p.Name}
			if i := slices.IndexFunc(now.Peers, func(q wgtypes.Peer) bool { return q.PublicKey == key }); i >= 0 {
				state.LastHandshake = now.Peers[i].LastHandshakeTime
				if e := now.Peers[i].Endpoint; e != nil {
					state.Endpoint = e.String()
				}
			}
			was := r.up
			state.Up = r.observe(state.LastHandshake)
			state.LastHandshake = r.handshake // also of a peer that was made anew
			if state.Up != was {
				t.log.Info("vpn peer", "peer", p.Name, "up", state.Up)
			}
			if !state.Up {
				interval = searchInterval
			}
			if c, ok := r.turn(ctx); ok {
				t.log.Debug("vpn peer: next endpoint", "peer", p.Name, "endpoint", c.index+1, "of", len(p.Endpoints))
				if err := t.point(wg, p, c.address); err != nil {
					return err
				}
			}
			peers = append(peers, state)
		}
		report(peers)
		next.Reset(interval)
		select {
		case <-ctx.Done():
			return nil
		case <-next.C:
		}
	}
}

// point gives a peer another endpoint and makes it try at once. The peer is made
// anew for that: it has no session that counts, and otherwise WireGuard waits
// for the end of its handshake with the last endpoint (REKEY_TIMEOUT).
func (t *Tunnel) point(wg device, p settings.Peer, to netip.AddrPort) error {
	pc, err := peerConfig(p)
	if err != nil {
		return err
	}
	pc.Endpoint = net.UDPAddrFromAddrPort(to)
	err = wg.ConfigureDevice(t.settings.Interface, wgtypes.Config{Peers: []wgtypes.PeerConfig{{PublicKey: pc.PublicKey, Remove: true}, pc}})
	if err != nil {
		return fmt.Errorf("vpn: set the endpoint of peer %s: %w", p.Name, err)
	}
	return nil
}

// inside reports whether an address belongs to the VPN: an endpoint there would
// send the tunnel through itself.
func (t *Tunnel) inside(a netip.Addr) bool { return Contains(t.settings, a) }

// Contains reports whether an address is reached through the tunnel that s
// describes, or is its own.
func Contains(s settings.VPN, a netip.Addr) bool {
	a = a.Unmap()
	if s.Address.IsValid() && s.Address.Addr() == a {
		return true
	}
	for _, p := range s.Peers {
		if slices.ContainsFunc(p.AllowedIPs, func(q netip.Prefix) bool { return q.Contains(a) }) {
			return true
		}
	}
	return false
}

func ipNet(p netip.Prefix) net.IPNet {
	return net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
