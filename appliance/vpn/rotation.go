package vpn

import (
	"context"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"

	"farkeep/shared/settings"
)

const (
	// An endpoint's turn is enough for one handshake over a bad line, and grows
	// while none of them answers: WireGuard repeats it after 5 s (REKEY_TIMEOUT).
	firstTurn    = 3 * time.Second
	longestTurn  = time.Minute
	resolveTime  = 5 * time.Second
	maxAddresses = 4 // of one name
)

// candidate is one address of one endpoint.
type candidate struct {
	address netip.AddrPort
	index   int // in settings.Peer.Endpoints
}

// rotation decides which endpoint a peer has: none of its business while
// handshakes are young, the next one in turn otherwise.
type rotation struct {
	peer    settings.Peer
	resolve func(ctx context.Context, host string) ([]netip.Addr, error)
	inside  func(netip.Addr) bool

	handshake time.Time // as last seen, by the wall clock
	seen      time.Time // when it was first seen, by the monotonic clock; zero: never
	up        bool

	candidates []candidate
	next       int
	firstTurn  time.Duration
	turnLength time.Duration
	turnEnds   time.Time
}

func newRotation(p settings.Peer, turn time.Duration, resolve func(context.Context, string) ([]netip.Addr, error), inside func(netip.Addr) bool) *rotation {
	return &rotation{peer: p, resolve: resolve, inside: inside, firstTurn: turn, turnLength: turn}
}

// observe takes the last handshake and tells whether it still counts. Its age
// is measured from when it was seen, because the wall clock may be stepped; one
// that an earlier process left is believed to be as old as it says.
func (r *rotation) observe(handshake time.Time) bool {
	if !handshake.IsZero() && !handshake.Equal(r.handshake) {
		now := time.Now()
		first := r.handshake.IsZero()
		r.handshake, r.seen = handshake, now
		if age := now.Round(0).Sub(handshake); first && age > pollInterval {
			r.seen = now.Add(-age)
		}
	}
	r.up = !r.seen.IsZero() && time.Since(r.seen) < handshakeMax
	if r.up {
		r.turnLength, r.turnEnds = r.firstTurn, time.Time{}
	}
	return r.up
}

// turn returns the endpoint to try now, and false if nothing is to be changed.
// Names are resolved again at the beginning of every round.
func (r *rotation) turn(ctx context.Context) (candidate, bool) {
	now := time.Now()
	if r.up || now.Before(r.turnEnds) {
		return candidate{}, false
	}
	if r.next >= len(r.candidates) {
		// A round in which no name resolves goes over the addresses of the last.
		if found := r.lookUp(ctx); len(found) > 0 {
			r.candidates = found
		}
		if r.next > 0 {
			r.turnLength = min(r.turnLength*3/2, longestTurn)
		}
		r.next = 0
	}
	r.turnEnds = now.Add(r.turnLength + rand.N(r.turnLength/5+1))
	if len(r.candidates) == 0 {
		return candidate{}, false
	}
	c := r.candidates[r.next]
	r.next++
	return c, true
}

// lookUp resolves all endpoints at once: the first address of each, then the
// second of each, so that a name with many addresses does not hold up the rest.
func (r *rotation) lookUp(ctx context.Context) []candidate {
	ctx, cancel := context.WithTimeout(ctx, resolveTime)
	defer cancel()
	found := make([][]candidate, len(r.peer.Endpoints))
	var wg sync.WaitGroup
	for i, endpoint := range r.peer.Endpoints {
		wg.Go(func() { found[i] = r.addresses(ctx, i, endpoint) })
	}
	wg.Wait()
	var out []candidate
	for n := range maxAddresses {
		for _, c := range found {
			if n < len(c) && !slices.ContainsFunc(out, func(o candidate) bool { return o.address == c[n].address }) {
				out = append(out, c[n])
			}
		}
	}
	return out
}

func (r *rotation) addresses(ctx context.Context, index int, endpoint string) []candidate {
	host, port, err := net.SplitHostPort(endpoint)
	if err != nil {
		return nil // settings.Parse has refused it
	}
	number, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return nil
	}
	ips, err := r.resolve(ctx, host)
	if err != nil {
		return nil // a name that does not resolve now is asked again next round
	}
	var out []candidate
	for _, ip := range ips {
		ip = ip.Unmap()
		if ip.IsUnspecified() || ip.IsMulticast() || r.inside(ip) {
			continue
		}
		if out = append(out, candidate{netip.AddrPortFrom(ip, uint16(number)), index}); len(out) == maxAddresses {
			break
		}
	}
	return out
}
