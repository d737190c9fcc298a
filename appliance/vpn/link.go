package vpn

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// mtu leaves room for WireGuard's headers over IPv6 on a line of 1500 bytes.
	mtu = 1420
	// table holds the VPN's routes; rulePriority puts it before the main table,
	// so that no route that the LAN brings in, however narrow, is asked first.
	table        = 51820
	rulePriority = 100
	// lastMetric is that of the route which refuses the VPN's addresses when
	// the interface is gone: nothing meant for the VPN goes out on the LAN.
	lastMetric = 1 << 20
)

// makeLink makes the interface, with its address and MTU, and brings it up.
func (t *Tunnel) makeLink() error {
	name := t.settings.Interface
	link, err := netlink.LinkByName(name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = name
		if err := netlink.LinkAdd(&netlink.Wireguard{LinkAttrs: attrs}); err != nil {
			return fmt.Errorf("vpn: make the WireGuard interface %s: %w", name, err)
		}
		link, err = netlink.LinkByName(name)
	}
	if err != nil {
		return fmt.Errorf("vpn: find %s: %w", name, err)
	}
	if link.Attrs().MTU != mtu {
		if err := netlink.LinkSetMTU(link, mtu); err != nil {
			return fmt.Errorf("vpn: set the MTU of %s: %w", name, err)
		}
	}
	// Without the kernel's own route for the whole prefix: the allowed
	// addresses, in the VPN's table, are the only way in.
	own := ipNet(t.settings.Address)
	address := &netlink.Addr{IPNet: &own, Flags: unix.IFA_F_NOPREFIXROUTE}
	if err := netlink.AddrReplace(link, address); err != nil {
		return fmt.Errorf("vpn: set the address of %s: %w", name, err)
	}
	old, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("vpn: list the addresses of %s: %w", name, err)
	}
	for _, a := range old {
		if !a.Equal(*address) && !a.IP.IsLinkLocalUnicast() {
			if err := netlink.AddrDel(link, &a); err != nil {
				return fmt.Errorf("vpn: remove an old address of %s: %w", name, err)
			}
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("vpn: bring up %s: %w", name, err)
	}
	return nil
}

// makeRoutes sends the peers' addresses into the tunnel, and nowhere else.
func (t *Tunnel) makeRoutes() error {
	link, err := netlink.LinkByName(t.settings.Interface)
	if err != nil {
		return fmt.Errorf("vpn: find %s: %w", t.settings.Interface, err)
	}
	wanted := map[netip.Prefix]bool{}
	for _, p := range t.settings.Peers {
		for _, a := range p.AllowedIPs {
			wanted[a.Masked()] = true
		}
	}
	for p := range wanted {
		to := ipNet(p)
		through := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: &to, Table: table, Scope: netlink.SCOPE_LINK, Protocol: unix.RTPROT_STATIC}
		if p.Addr().Is4() == t.settings.Address.Addr().Is4() {
			through.Src = t.settings.Address.Addr().AsSlice()
		}
		refuse := &netlink.Route{Dst: &to, Table: table, Type: unix.RTN_UNREACHABLE, Priority: lastMetric, Protocol: unix.RTPROT_STATIC}
		for _, r := range []*netlink.Route{refuse, through} {
			if err := netlink.RouteReplace(r); err != nil {
				return fmt.Errorf("vpn: route the peers' addresses into %s: %w", t.settings.Interface, err)
			}
		}
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		if err := removeRoutes(family, wanted); err != nil {
			return err
		}
		if err := makeRule(family); err != nil {
			return err
		}
	}
	return nil
}

// removeRoutes takes away what an earlier configuration left in the table.
func removeRoutes(family int, wanted map[netip.Prefix]bool) error {
	routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: table}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return fmt.Errorf("vpn: list the VPN's routes: %w", err)
	}
	for _, r := range routes {
		if r.Dst == nil {
			continue
		}
		address, _ := netip.AddrFromSlice(r.Dst.IP)
		ones, _ := r.Dst.Mask.Size()
		if !wanted[netip.PrefixFrom(address.Unmap(), ones)] {
			if err := netlink.RouteDel(&r); err != nil {
				return fmt.Errorf("vpn: remove an old route: %w", err)
			}
		}
	}
	return nil
}

func makeRule(family int) error {
	rules, err := netlink.RuleList(family)
	if err != nil {
		return fmt.Errorf("vpn: list the routing rules: %w", err)
	}
	if slices.ContainsFunc(rules, func(r netlink.Rule) bool { return r.Priority == rulePriority && r.Table == table }) {
		return nil
	}
	rule := netlink.NewRule()
	rule.Family, rule.Priority, rule.Table = family, rulePriority, table
	if err := netlink.RuleAdd(rule); err != nil {
		return fmt.Errorf("vpn: put the VPN's routes before the others: %w", err)
	}
	return nil
}
