package network

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"farkeep/appliance/dhcp"
	"farkeep/appliance/status"
	"farkeep/appliance/vpn"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// maxLinks bounds how many wired links are looked after.
const maxLinks = 8

// lan looks after the wired links. Its methods but wait are called from one
// goroutine; the leases come from others.
type lan struct {
	brief   Brief
	sys     string
	resolv  string // the file for resolvers
	log     *slog.Logger
	changed func() // a lease came or went

	links   map[int]*wired // by index
	workers sync.WaitGroup

	mu      sync.Mutex // guards the fields below
	leases  map[int]dhcp.Lease
	written string // content of the resolvers' file
}

// wired is one link that has been seen.
type wired struct {
	name    string
	carrier bool
	stop    context.CancelFunc // of its worker; nil without carrier
}

func newLAN(b Brief, sys, resolv string, log *slog.Logger) *lan {
	return &lan{brief: b, sys: sys, resolv: resolv, log: log, changed: func() {}, links: map[int]*wired{}, leases: map[int]dhcp.Lease{}}
}

// wait returns when every worker has ended; they do when reconcile's ctx ends.
func (l *lan) wait() { l.workers.Wait() }

// watchLinks gives word when a link changed. Messages may be lost (netlink(7),
// ENOBUFS): the caller looks again now and then all the same.
func watchLinks(ctx context.Context, log *slog.Logger) <-chan struct{} {
	out := make(chan struct{}, 1)
	updates := make(chan netlink.LinkUpdate)
	err := netlink.LinkSubscribeWithOptions(updates, ctx.Done(), netlink.LinkSubscribeOptions{
		ErrorCallback: func(err error) {
			if ctx.Err() == nil {
				log.Debug("link changes", "err", err)
			}
		},
	})
	if err != nil {
		log.Warn("link changes are only polled", "err", err)
		return out
	}
	go func() {
		for range updates { // closed when ctx ends, or on an error
			select {
			case out <- struct{}{}:
			default:
			}
		}
	}()
	return out
}

// reconcile brings every wired link up, starts a worker on each that has a
// carrier and ends those of links that lost it.
func (l *lan) reconcile(ctx context.Context) error {
	l.mu.Lock()
	l.writeResolvers() // at the first time; a network without DHCP needs names too
	l.mu.Unlock()
	all, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("list the links: %w", err)
	}
	slices.SortFunc(all, func(a, b netlink.Link) int { return a.Attrs().Index - b.Attrs().Index })
	var errs []error
	present := map[int]bool{}
	for _, link := range all {
		if !l.isWired(link) {
			continue
		}
		index := link.Attrs().Index
		if l.links[index] == nil && len(l.links) >= maxLinks {
			continue
		}
		present[index] = true
		if err := l.reconcileOne(ctx, link); err != nil {
			errs = append(errs, err)
		}
	}
	for index, w := range l.links {
		if !present[index] {
			l.log.Info("link gone", "interface", w.name)
			w.end()
			delete(l.links, index)
			l.setLease(index, nil)
		}
	}
	return errors.Join(errs...)
}

func (l *lan) reconcileOne(ctx context.Context, link netlink.Link) error {
	a := link.Attrs()
	w := l.links[a.Index]
	if w == nil {
		w = &wired{name: a.Name}
		l.links[a.Index] = w
		l.log.Info("link", "interface", a.Name)
	}
	if a.RawFlags&unix.IFF_UP == 0 {
		if err := netlink.LinkSetUp(link); err != nil {
			return fmt.Errorf("bring up %s: %w", a.Name, err)
		}
	}
	// The carrier and not the operational state: usb-net leaves that unknown.
	carrier := a.RawFlags&unix.IFF_UP != 0 && a.RawFlags&unix.IFF_LOWER_UP != 0
	if carrier == w.carrier {
		return nil
	}
	w.carrier = carrier
	l.log.Info("carrier", "interface", a.Name, "carrier", carrier)
	w.end()
	if !carrier {
		// The address stays: the cable may come back, and the lease is still ours.
		// The route goes: another link may be a way out.
		l.mu.Lock()
		lease, had := l.leases[a.Index]
		l.mu.Unlock()
		if !had {
			return nil
		}
		lease.Gateway = netip.Addr{}
		return route(link, lease)
	}
	if fixed := l.brief.Network.Address; fixed.IsValid() {
		if l.fixedElsewhere(a.Index) {
			return nil
		}
		lease := dhcp.Lease{Address: fixed, Gateway: l.brief.Network.Gateway}
		if err := l.apply(link, lease); err != nil {
			w.carrier = false // tried again at the next look
			return err
		}
		return nil
	}
	ctx, w.stop = context.WithCancel(ctx)
	l.workers.Go(func() { l.lease(ctx, link) })
	return nil
}

// fixedElsewhere reports whether another link has the fixed address.
func (l *lan) fixedElsewhere(index int) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range l.leases {
		if i != index && l.links[i] != nil && l.links[i].carrier {
			return true
		}
	}
	return false
}

func (w *wired) end() {
	if w.stop != nil {
		w.stop()
		w.stop = nil
	}
}

// isWired accepts Ethernet cards that are there as hardware, and whatever link
// the settings name.
func (l *lan) isWired(link netlink.Link) bool {
	a := link.Attrs()
	if named := l.brief.Network.Interface; named != "" {
		return a.Name == named
	}
	if link.Type() != "device" || a.EncapType != "ether" || a.RawFlags&unix.IFF_LOOPBACK != 0 {
		return false
	}
	_, err := os.Stat(filepath.Join(l.sys, "class/net", a.Name, "phy80211"))
	return err != nil
}

// lease keeps a DHCP lease on a link until ctx ends.
func (l *lan) lease(ctx context.Context, link netlink.Link) {
	index := link.Attrs().Index
	var had netip.Addr
	if old, err := netlink.AddrList(link, netlink.FAMILY_V4); err == nil && len(old) > 0 {
		had, _ = netip.AddrFromSlice(old[0].IP.To4())
	}
	check := usable(l.brief.VPN)
	dhcp.Run(ctx, dhcp.Config{
		Interface: link.Attrs().Name,
		Had:       had,
		Accept:    func(d dhcp.Lease) error { return check(d.Address.Addr(), d.Gateway) },
		Apply:     func(d dhcp.Lease) error { return l.apply(link, d) },
		Lost: func(d dhcp.Lease) {
			if err := remove(link, d); err != nil {
				l.log.Warn("lease", "err", err)
			}
			l.setLease(index, nil)
		},
		Log: l.log,
	})
}

// remove takes a lease off a link.
func remove(link netlink.Link, d dhcp.Lease) error {
	d.Gateway = netip.Addr{}
	err := route(link, d)
	// The kernel may have been faster.
	if del := netlink.AddrDel(link, address(d)); del != nil && !errors.Is(del, unix.EADDRNOTAVAIL) {
		err = errors.Join(err, fmt.Errorf("remove the address of %s: %w", link.Attrs().Name, del))
	}
	return err
}

// apply puts a lease on a link: the new address first, then the old ones off,
// then the route, so that the link is never without an address when it had one.
func (l *lan) apply(link netlink.Link, d dhcp.Lease) error {
	name := link.Attrs().Name
	want := address(d)
	if err := netlink.AddrReplace(link, want); err != nil {
		return fmt.Errorf("set the address of %s: %w", name, err)
	}
	old, err := netlink.AddrList(link, netlink.FAMILY_V4)
	if err != nil {
		return fmt.Errorf("list the addresses of %s: %w", name, err)
	}
	removed := false
	for _, a := range old {
		if !a.Equal(*want) {
			if err := netlink.AddrDel(link, &a); err != nil {
				return fmt.Errorf("remove an old address of %s: %w", name, err)
			}
			removed = true
		}
	}
	if removed {
		// With the first address of a network the kernel removes the others too,
		// unless promote_secondaries is on.
		if err := netlink.AddrReplace(link, want); err != nil {
			return fmt.Errorf("set the address of %s: %w", name, err)
		}
	}
	if err := route(link, d); err != nil {
		return err
	}
	l.setLease(link.Attrs().Index, &d)
	return nil
}

func address(d dhcp.Lease) *netlink.Addr {
	return &netlink.Addr{
		IPNet: &net.IPNet{IP: d.Address.Addr().AsSlice(), Mask: net.CIDRMask(d.Address.Bits(), d.Address.Addr().BitLen())},
		// The kernel takes the address off by itself when nobody renews it.
		ValidLft: int(d.Valid.Seconds()), PreferedLft: int(d.Valid.Seconds()),
	}
}

// route makes the default route of a link, or removes it. Several links differ
// in their metric; the first one wins.
func route(link netlink.Link, d dhcp.Lease) error {
	r := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: anywhere(d.Address.Addr()), Priority: 200 + link.Attrs().Index, Protocol: unix.RTPROT_DHCP}
	if !d.Gateway.IsValid() {
		if err := netlink.RouteDel(r); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("remove the default route by %s: %w", link.Attrs().Name, err)
		}
		return nil
	}
	r.Gw = d.Gateway.AsSlice()
	if !d.Address.Contains(d.Gateway) {
		r.Flags = unix.RTNH_F_ONLINK // a provider that hands out /32
	}
	if err := netlink.RouteReplace(r); err != nil {
		return fmt.Errorf("set the default route by %s: %w", link.Attrs().Name, err)
	}
	return nil
}

func anywhere(a netip.Addr) *net.IPNet {
	n := a.BitLen()
	return &net.IPNet{IP: make(net.IP, n/8), Mask: net.CIDRMask(0, n)}
}

// setLease notes a lease or its end, and what follows from it for names.
func (l *lan) setLease(index int, d *dhcp.Lease) {
	l.mu.Lock()
	before, had := l.leases[index]
	if d != nil {
		l.leases[index] = *d
	} else {
		delete(l.leases, index)
	}
	news := had != (d != nil) || d != nil && !d.Equal(before)
	l.writeResolvers()
	l.mu.Unlock()
	if news {
		l.changed()
	}
}

// status tells what the links look like. The interface that it names is the
// first with a carrier and an address, or else the first.
func (l *lan) status() status.Network {
	var s status.Network
	works := false
	for _, index := range slices.Sorted(maps.Keys(l.links)) {
		w := l.links[index]
		link, err := netlink.LinkByIndex(index)
		if err != nil {
			continue // just gone
		}
		found, err := netlink.AddrList(link, netlink.FAMILY_ALL)
		if err != nil {
			continue
		}
		var own []string
		for _, a := range found {
			if a.IP.IsGlobalUnicast() {
				own = append(own, a.IPNet.String())
			}
		}
		s.Addresses = append(s.Addresses, own...)
		s.Carrier = s.Carrier || w.carrier
		if s.Interface == "" || !works && w.carrier && len(own) > 0 {
			s.Interface, works = w.name, w.carrier && len(own) > 0
		}
	}
	return s
}

// insideVPN is a resolver that cannot be one: it would be asked through the tunnel.
func (l *lan) insideVPN(a netip.Addr) bool { return vpn.Contains(l.brief.VPN, a) }
