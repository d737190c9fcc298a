package dhcp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

// Bounds on what a server may say; the LAN is hostile.
const (
	minLease     = time.Minute
	maxLease     = 7 * 24 * time.Hour
	maxResolvers = 3 // as many as resolv.conf(5) reads
)

// Lease is what a server granted, checked. Everything else that a server may
// send, classless routes (RFC 3442) and search domains above all, is not looked
// at: it would let the LAN take over addresses and names that are not its own.
type Lease struct {
	Address   netip.Prefix
	Gateway   netip.Addr // zero: none
	Resolvers []netip.Addr
	Server    netip.Addr
	// Since the moment of the request: when to renew, when to ask any server,
	// when the address must not be used any more (RFC 2131 §4.4.5).
	Renew, Rebind, Valid time.Duration
}

// Equal reports whether a machine with lease a need not change anything for b
// but the times.
func (a Lease) Equal(b Lease) bool {
	return a.Address == b.Address && a.Gateway == b.Gateway && slices.Equal(a.Resolvers, b.Resolvers)
}

// parse checks an offer or an acknowledgement.
func parse(m *dhcpv4.DHCPv4) (Lease, error) {
	var l Lease
	address, err := hostAddress(m.YourIPAddr)
	if err != nil {
		return l, fmt.Errorf("offered address: %w", err)
	}
	bits := 24
	if mask := m.Options.Get(dhcpv4.OptionSubnetMask); mask != nil {
		ones, size := net.IPMask(mask).Size()
		if size != 32 || ones < 8 {
			return l, fmt.Errorf("subnet mask %x is none", mask)
		}
		bits = ones
	}
	l.Address = netip.PrefixFrom(address, bits)
	if bits < 31 && (address == l.Address.Masked().Addr() || address == last(l.Address)) {
		return l, fmt.Errorf("offered address %s is the network's own", l.Address)
	}
	if l.Server, err = hostAddress(m.ServerIdentifier()); err != nil {
		return l, fmt.Errorf("server identifier: %w", err)
	}
	if routers := m.Router(); len(routers) > 0 {
		if l.Gateway, err = hostAddress(routers[0]); err != nil || l.Gateway == address {
			return l, fmt.Errorf("router %v cannot be one", routers[0])
		}
	}
	for _, ip := range m.DNS() {
		if a, err := hostAddress(ip); err == nil && len(l.Resolvers) < maxResolvers && !slices.Contains(l.Resolvers, a) {
			l.Resolvers = append(l.Resolvers, a)
		}
	}
	l.Valid = seconds(m, dhcpv4.OptionIPAddressLeaseTime)
	if l.Valid == 0 {
		return l, errors.New("no lease time")
	}
	l.Valid = min(max(l.Valid, minLease), maxLease)
	// RFC 2131 §4.4.5: T1 is half, T2 seven eighths of the lease, unless the
	// server says otherwise, and they come in this order.
	l.Renew, l.Rebind = seconds(m, dhcpv4.OptionRenewTimeValue), seconds(m, dhcpv4.OptionRebindingTimeValue)
	if l.Rebind == 0 || l.Rebind >= l.Valid || l.Rebind < minLease/2 {
		l.Rebind = l.Valid * 7 / 8
	}
	if l.Renew == 0 || l.Renew >= l.Rebind || l.Renew < minLease/2 {
		l.Renew = min(l.Valid/2, l.Rebind)
	}
	return l, nil
}

// hostAddress accepts what one machine on a network can have as its address.
func hostAddress(ip net.IP) (netip.Addr, error) {
	a, ok := netip.AddrFromSlice(ip.To4())
	switch {
	case !ok:
		return netip.Addr{}, errors.New("missing, or not IPv4")
	case a.IsUnspecified(), a.IsLoopback(), a.IsMulticast(), a.IsLinkLocalUnicast(), a.As4()[0] == 0, a.As4()[0] >= 240:
		return netip.Addr{}, fmt.Errorf("%s is not a host's address", a)
	}
	return a, nil
}

func last(p netip.Prefix) netip.Addr {
	a := p.Masked().Addr().As4()
	n := binary.BigEndian.Uint32(a[:]) | (1<<(32-p.Bits()) - 1)
	binary.BigEndian.PutUint32(a[:], n)
	return netip.AddrFrom4(a)
}

func seconds(m *dhcpv4.DHCPv4, code dhcpv4.OptionCode) time.Duration {
	if v := m.Options.Get(code); len(v) == 4 {
		return time.Duration(binary.BigEndian.Uint32(v)) * time.Second
	}
	return 0
}
