// Package place says where a peer of the VPN is, as far as the VPN itself can
// tell: from which network its last authenticated packets came (WireGuard's
// endpoint, Tailscale's current path), and how it came to be there.
//
// A small program that runs as root ([Watch], `farkeep-keyserver endpoints`) asks
// the VPN every few seconds and writes what it saw into a file; the key server
// reads that file ([Reader]) and needs no privilege for it. Times in the file are
// CLOCK_BOOTTIME of the machine that both run on: no clock change moves them.
//
// What this package says is evidence, not proof: an endpoint is an address that
// somebody with the peer's key sent from. It judges nothing.
package place

import (
	"fmt"
	"net/netip"
	"strings"
	"time"
)

const (
	// Visits bounds how many networks of one peer are remembered.
	Visits = 16
	// Stale is the age from which on the file, or what is said of a peer in it,
	// no longer tells where that peer is.
	Stale = time.Minute
)

// Network is what an endpoint is judged by. Two endpoints in one network are one place.
type Network struct {
	// Name is a prefix ("84.128.0.0/16"), or "relay:REGION" where the VPN
	// forwards by a relay and does not say where the peer is.
	Name string `json:"name"`
	// AS is the number of the autonomous system that announces the address,
	// from a table that the operator provides; 0: not known.
	AS uint32 `json:"as,omitempty"`
}

const relayed = "relay:"

// Bits of a network: what one line's provider gives out from one place. A /16 and
// a /32 are the sizes in which registries hand out addresses to providers that
// serve households (RIPE NCC allocates IPv6 from /32 on).
const (
	bits4 = 16
	bits6 = 32
	// A private network is somebody's LAN: there the neighbour is another /24 or /48.
	privateBits4 = 24
	privateBits6 = 48
)

// NetworkOf is the network that an address lies in.
func NetworkOf(a netip.Addr) Network {
	a = a.Unmap().WithZone("")
	if !a.IsValid() {
		return Network{}
	}
	bits := bits6
	switch private := a.IsPrivate() || a.IsLinkLocalUnicast() || a.IsLoopback(); {
	case a.Is4() && private:
		bits = privateBits4
	case a.Is4():
		bits = bits4
	case private:
		bits = privateBits6
	}
	p, err := a.Prefix(bits)
	if err != nil {
		return Network{}
	}
	return Network{Name: p.String()}
}

// RelayOf is the "network" of a peer that is reached through a relay.
func RelayOf(region string) Network { return Network{Name: relayed + region} }

// IsRelay reports whether only a relay is known.
func (n Network) IsRelay() bool { return strings.HasPrefix(n.Name, relayed) }

// Prefix is the network's prefix; not valid for a relay.
func (n Network) Prefix() netip.Prefix {
	p, _ := netip.ParsePrefix(n.Name)
	return p
}

// Same reports whether both are one network: by name, or because one autonomous
// system announces both.
func (n Network) Same(other Network) bool {
	return n.Name != "" && n.Name == other.Name || n.AS != 0 && n.AS == other.AS
}

// Valid reports whether n is a network as this package writes them.
func (n Network) Valid() bool {
	if region, ok := strings.CutPrefix(n.Name, relayed); ok {
		return isRegion(region)
	}
	p, err := netip.ParsePrefix(n.Name)
	return err == nil && p.Masked() == p && p.Addr().Zone() == "" && n.Name == p.String()
}

func isRegion(s string) bool {
	return s != "" && len(s) <= 32 && !strings.ContainsFunc(s, func(r rune) bool {
		return !('a' <= r && r <= 'z' || '0' <= r && r <= '9' || r == '-')
	})
}

// String is for logs and people.
func (n Network) String() string {
	switch {
	case n.Name == "":
		return "unknown"
	case n.AS != 0:
		return fmt.Sprintf("%s (AS%d)", n.Name, n.AS)
	}
	return n.Name
}

// Visit is a stretch of time in which a peer sent from one network.
type Visit struct {
	Network  Network        `json:"network"`
	Endpoint netip.AddrPort `json:"endpoint"` // the last one in this network; not valid for a relay
	// First and Last are when data came first and last, by CLOCK_BOOTTIME, in
	// nanoseconds. They are as exact as the VPN is asked often.
	First time.Duration `json:"first"`
	Last  time.Duration `json:"last"`
}

// Sighting is what is known about one peer. The zero value is "nothing".
type Sighting struct {
	Boot   string  // of the machine that saw it; times of visits count in that boot
	Peer   string  // the VPN's name of the peer: its WireGuard public key, or its Tailscale node key
	Trail  []Visit // oldest first; the last one is where the peer is now
	Flaps  bool    // its endpoint goes to and fro, as if two machines had one key
	Source string  // "wireguard" or "tailscale"
}

// Known reports whether s says where the peer is.
func (s Sighting) Known() bool { return len(s.Trail) > 0 }

// Here is the newest visit; zero if nothing is known.
func (s Sighting) Here() Visit {
	if !s.Known() {
		return Visit{}
	}
	return s.Trail[len(s.Trail)-1]
}

// String is for logs, the audit log and mails.
func (s Sighting) String() string {
	here := s.Here()
	switch {
	case !s.Known():
		return ""
	case here.Endpoint.IsValid():
		return fmt.Sprintf("%s in %s", here.Endpoint.Addr(), here.Network)
	}
	return here.Network.String()
}
