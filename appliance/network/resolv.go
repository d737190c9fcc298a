package network

import (
	"maps"
	"net/netip"
	"slices"
	"strings"

	"farkeep/shared/atomicfile"
)

// maxNameservers is how many resolv.conf(5) and Go's resolver read.
const maxNameservers = 3

// lastResolvers are asked when neither the settings nor the LAN name any
// (Quad9): an appliance far away must find its mail server and home all the same.
var lastResolvers = []netip.Addr{netip.MustParseAddr("9.9.9.9"), netip.MustParseAddr("149.112.112.112"), netip.MustParseAddr("2620:fe::fe")}

// writeResolvers writes the resolvers' file if it changes: the settings' own
// first, because the LAN's are the LAN's. The caller holds mu.
func (l *lan) writeResolvers() {
	content := resolvConf(l.resolvers())
	if content == l.written {
		return
	}
	if err := atomicfile.Write(l.resolv, []byte(content), 0o644); err != nil {
		l.log.Error("resolvers", "err", err)
		return
	}
	l.written = content
}

func (l *lan) resolvers() []netip.Addr {
	var all []netip.Addr
	add := func(found []netip.Addr) {
		for _, a := range found {
			if len(all) < maxNameservers && !slices.Contains(all, a) && !l.insideVPN(a) {
				all = append(all, a)
			}
		}
	}
	add(l.brief.Network.Resolvers)
	for _, index := range slices.Sorted(maps.Keys(l.leases)) {
		add(l.leases[index].Resolvers)
	}
	if len(all) == 0 {
		add(lastResolvers)
	}
	return all
}

func resolvConf(resolvers []netip.Addr) string {
	var b strings.Builder
	for _, a := range resolvers {
		b.WriteString("nameserver " + a.String() + "\n")
	}
	b.WriteString("options timeout:3 attempts:2\n")
	return b.String()
}
