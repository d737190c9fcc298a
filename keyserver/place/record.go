package place

import (
	"net/netip"
	"slices"
	"time"
)

const (
	// flapSpan and flapReturns: an endpoint that came back this often within this
	// time to one that it had left is not a line that reconnects but two senders.
	// Two machines with one WireGuard key come to a return or two a minute, by
	// their keepalives alone; a line that fails over comes back once.
	flapSpan    = 10 * time.Minute
	flapReturns = 3
	maxRecent   = 8
)

// Observation is what a VPN says of one peer at one moment.
type Observation struct {
	Source   string         // SourceWireGuard, SourceTailscale
	Peer     string         // public key
	Allowed  []netip.Prefix // addresses in the VPN that are the peer's
	Endpoint netip.AddrPort // where its last authenticated packet came from; not valid: none, or by relay
	Relay    string         // the relay's region, where there is no endpoint
	Received uint64         // bytes, counted since the interface was made
}

// Values of Observation.Source; site.toml uses the same words.
const (
	SourceWireGuard = "wireguard"
	SourceTailscale = "tailscale"
)

// Peer is what is known of one peer, as it is written to the file.
type Peer struct {
	Source   string         `json:"source"`
	Peer     string         `json:"peer"`
	Allowed  []netip.Prefix `json:"allowed,omitempty"`
	Received uint64         `json:"received"`
	Trail    []Visit        `json:"trail,omitempty"`
	Recent   []string       `json:"recent,omitempty"`  // endpoints, newest last
	Returns  []Visit        `json:"returns,omitempty"` // when it came back to one of them
}

// observe brings a peer up to date. Only data that came since the last look says
// where a peer is: a VPN keeps the endpoint of a peer that fell silent long ago.
func (p *Peer) observe(o Observation, at time.Duration, as func(netip.Addr) uint32) {
	fresh := p.Peer != "" && o.Received != p.Received && o.Received != 0
	p.Source, p.Peer, p.Allowed, p.Received = o.Source, o.Peer, o.Allowed, o.Received
	p.Returns = slices.DeleteFunc(p.Returns, func(v Visit) bool { return at-v.Last > flapSpan })
	if !fresh {
		return
	}
	var here Network
	var spot string
	switch {
	case o.Endpoint.IsValid():
		o.Endpoint = netip.AddrPortFrom(o.Endpoint.Addr().Unmap().WithZone(""), o.Endpoint.Port())
		here = NetworkOf(o.Endpoint.Addr())
		here.AS = as(o.Endpoint.Addr())
		spot = o.Endpoint.String()
	case isRegion(o.Relay):
		here = RelayOf(o.Relay)
		spot = here.Name
	default:
		return
	}
	// Tailscale tries several paths to one machine at a time, so there only whole
	// networks count as senders.
	if o.Source == SourceTailscale {
		spot = here.Name
	}
	p.count(spot, Visit{Network: here, Endpoint: o.Endpoint, First: at, Last: at})
	if i := len(p.Trail) - 1; i >= 0 && p.Trail[i].Network.Name == here.Name {
		p.Trail[i].Last, p.Trail[i].Endpoint, p.Trail[i].Network = at, o.Endpoint, here
		return
	}
	p.Trail = append(p.Trail, Visit{Network: here, Endpoint: o.Endpoint, First: at, Last: at})
	if len(p.Trail) > Visits {
		p.Trail = slices.Delete(p.Trail, 0, len(p.Trail)-Visits)
	}
}

// count notes whether the peer came back to an endpoint that it had left.
func (p *Peer) count(spot string, v Visit) {
	i := slices.Index(p.Recent, spot)
	if i >= 0 && i == len(p.Recent)-1 {
		return
	}
	if i >= 0 {
		p.Returns = append(p.Returns, v)
		if len(p.Returns) > maxRecent {
			p.Returns = slices.Delete(p.Returns, 0, 1)
		}
		p.Recent = slices.Delete(p.Recent, i, i+1)
	}
	p.Recent = append(p.Recent, spot)
	if len(p.Recent) > maxRecent {
		p.Recent = slices.Delete(p.Recent, 0, 1)
	}
}

// flaps reports whether two senders seem to have the peer's key.
func (p *Peer) flaps(at time.Duration) bool {
	n := 0
	for _, v := range p.Returns {
		if at-v.Last <= flapSpan {
			n++
		}
	}
	return n >= flapReturns
}

// Recorder follows peers from look to look.
type Recorder struct {
	boot  string
	peers map[id]*Peer
	as    func(netip.Addr) uint32
}

type id struct{ source, peer string }

// NewRecorder goes on from what an earlier one wrote in the same boot; as says to
// which autonomous system an address belongs, nil for not known.
func NewRecorder(boot string, before File, as func(netip.Addr) uint32) *Recorder {
	if as == nil {
		as = func(netip.Addr) uint32 { return 0 }
	}
	r := &Recorder{boot: boot, peers: map[id]*Peer{}, as: as}
	if before.Boot == boot {
		for _, p := range before.Peers {
			r.peers[id{p.Source, p.Peer}] = &p
		}
	}
	return r
}

// Observe takes in one look at everything that there is, at this CLOCK_BOOTTIME.
// Peers that are no longer configured are forgotten; those of VPNs that did not
// answer (silent) are kept as they are, and grow stale.
func (r *Recorder) Observe(at time.Duration, all []Observation, silent ...string) File {
	seen := map[id]*Peer{}
	for k, p := range r.peers {
		if slices.Contains(silent, k.source) {
			seen[k] = p
		}
	}
	for _, o := range all {
		if len(seen) >= MaxPeers {
			break
		}
		k := id{o.Source, o.Peer}
		p := r.peers[k]
		if p == nil {
			p = &Peer{}
		}
		p.observe(o, at, r.as)
		seen[k] = p
	}
	r.peers = seen
	f := File{Version: version, Boot: r.boot, Taken: at}
	for _, p := range seen {
		f.Peers = append(f.Peers, *p)
	}
	slices.SortFunc(f.Peers, func(a, b Peer) int { return cmpStrings(a.Source, b.Source, a.Peer, b.Peer) })
	return f
}

// cmpStrings compares pairs, the first that differ decide.
func cmpStrings(pairs ...string) int {
	for i := 0; i+1 < len(pairs); i += 2 {
		switch a, b := pairs[i], pairs[i+1]; {
		case a < b:
			return -1
		case a > b:
			return 1
		}
	}
	return 0
}
