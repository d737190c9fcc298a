package place

import (
	"fmt"
	"net/netip"
	"slices"

	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// WireGuard looks at every WireGuard interface of the machine's network
// namespace. It needs CAP_NET_ADMIN.
type WireGuard struct{ client *wgctrl.Client }

// OpenWireGuard connects to the kernel.
func OpenWireGuard() (*WireGuard, error) {
	c, err := wgctrl.New()
	if err != nil {
		return nil, fmt.Errorf("speak to WireGuard: %w", err)
	}
	return &WireGuard{c}, nil
}

// Close ends the connection.
func (w *WireGuard) Close() error { return w.client.Close() }

// Observe says what WireGuard knows of its peers. A peer that is on several
// interfaces counts where it was heard from last.
func (w *WireGuard) Observe() ([]Observation, error) {
	devices, err := w.client.Devices()
	if err != nil {
		return nil, fmt.Errorf("ask WireGuard for its peers: %w", err)
	}
	return observations(devices), nil
}

func observations(devices []*wgtypes.Device) []Observation {
	var peers []wgtypes.Peer
	for _, d := range devices {
		peers = append(peers, d.Peers...)
	}
	slices.SortStableFunc(peers, func(a, b wgtypes.Peer) int { return b.LastHandshakeTime.Compare(a.LastHandshakeTime) })
	var all []Observation
	for _, p := range peers {
		if slices.ContainsFunc(all, func(o Observation) bool { return o.Peer == p.PublicKey.String() }) {
			continue
		}
		o := Observation{Source: SourceWireGuard, Peer: p.PublicKey.String(), Received: uint64(max(p.ReceiveBytes, 0))}
		for _, n := range p.AllowedIPs[:min(len(p.AllowedIPs), maxAllowed)] {
			if a, ok := netip.AddrFromSlice(n.IP); ok {
				ones, _ := n.Mask.Size()
				o.Allowed = append(o.Allowed, netip.PrefixFrom(a.Unmap(), ones))
			}
		}
		if p.Endpoint != nil {
			o.Endpoint = p.Endpoint.AddrPort()
		}
		all = append(all, o)
	}
	return all
}
