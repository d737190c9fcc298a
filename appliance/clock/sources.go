package clock

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/beevik/ntp"
)

// DefaultServers are asked when farkeep.toml names none: operators that are
// independent of each other, serve the public, and do not smear leap seconds.
var DefaultServers = []string{"time.cloudflare.com", "ptbtime1.ptb.de", "ntp.se", "time.nist.gov"}

const (
	// maxDistance bounds a sample's own error bound (RFC 5905's root distance,
	// there 1.5 s; a slow home line may be worse).
	maxDistance = 3 * time.Second
	// slack is added on both sides of every sample when samples are compared.
	slack        = 100 * time.Millisecond
	queryTimeout = 3 * time.Second
	roundTimeout = 12 * time.Second
	maxAddresses = 3 // of one name
)

// Sample is one source's answer.
type Sample struct {
	Source   string         // as configured
	Address  netip.AddrPort // who answered: two names of one machine are one source
	Offset   time.Duration  // to be added to the system clock
	Distance time.Duration  // the sample's own error bound
}

// holdError says that a source asked not to be asked for a while (RFC 5905
// §7.4, kiss-o'-death).
type holdError struct {
	code string
	wait time.Duration
}

func (e *holdError) Error() string { return fmt.Sprintf("kiss of death %q", e.code) }

// Ask queries one source, host or host:port, by NTP; now is the clock that the
// sample's offset refers to. Answers that RFC 5905 calls unfit are errors.
func Ask(ctx context.Context, source string, now func() time.Time) (Sample, error) {
	addresses, err := resolve(ctx, source)
	if err != nil {
		return Sample{}, err
	}
	for _, a := range addresses {
		var s Sample
		if s, err = ask(ctx, source, a, now); err == nil {
			return s, nil
		}
		var hold *holdError
		if ctx.Err() != nil || errors.As(err, &hold) {
			break
		}
	}
	return Sample{}, err
}

func resolve(ctx context.Context, source string) ([]netip.AddrPort, error) {
	host, port, err := net.SplitHostPort(source)
	if err != nil {
		host, port = strings.Trim(source, "[]"), "123"
	}
	number, err := net.DefaultResolver.LookupPort(ctx, "udp", port)
	if err != nil {
		return nil, fmt.Errorf("time source %s: %w", source, err)
	}
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, fmt.Errorf("time source %s: %w", source, err)
	}
	var out []netip.AddrPort
	for _, ip := range ips[:min(len(ips), maxAddresses)] {
		out = append(out, netip.AddrPortFrom(ip.Unmap(), uint16(number)))
	}
	return out, nil
}

func ask(ctx context.Context, source string, address netip.AddrPort, now func() time.Time) (Sample, error) {
	// Dialled here, so that a cancelled context ends the wait for the answer.
	conn, err := (&net.Dialer{Timeout: queryTimeout}).DialContext(ctx, "udp", address.String())
	if err != nil {
		return Sample{}, fmt.Errorf("time source %s: %w", source, err)
	}
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	r, err := ntp.QueryWithOptions(address.String(), ntp.QueryOptions{
		Timeout:       queryTimeout,
		GetSystemTime: now,
		Dialer:        func(_, _ string) (net.Conn, error) { return conn, nil },
	})
	if err != nil {
		return Sample{}, fmt.Errorf("time source %s: %w", source, err)
	}
	if r.IsKissOfDeath() {
		hold := &holdError{code: r.KissCode, wait: time.Hour}
		if r.KissCode == "DENY" || r.KissCode == "RSTR" {
			hold.wait = 24 * time.Hour
		}
		return Sample{}, fmt.Errorf("time source %s: %w", source, hold)
	}
	if err := r.Validate(); err != nil {
		return Sample{}, fmt.Errorf("time source %s: %w", source, err)
	}
	if r.RootDistance > maxDistance {
		return Sample{}, fmt.Errorf("time source %s: its error bound of %v is above %v", source, r.RootDistance, maxDistance)
	}
	return Sample{Source: source, Address: address, Offset: r.ClockOffset, Distance: r.RootDistance}, nil
}

// round asks all sources at once and returns who answered, and the errors of
// the others by source. It does not wait for the rest when more than half of
// all that are configured agree already: they could not outvote those.
func round(ctx context.Context, sources []string, configured int, query func(context.Context, string) (Sample, error)) ([]Sample, map[string]error) {
	ctx, cancel := context.WithTimeout(ctx, roundTimeout)
	defer cancel()
	var (
		wg      sync.WaitGroup
		mu      sync.Mutex
		decided bool
		samples []Sample
		failed  = map[string]error{}
	)
	for _, source := range sources {
		wg.Go(func() {
			s, err := query(ctx, source)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case decided:
				return
			case err != nil:
				failed[source] = err
				return
			}
			samples = append(samples, s)
			if _, agreeing, err := Agree(samples, configured); err == nil && 2*agreeing > configured {
				decided = true
				cancel()
			}
		})
	}
	wg.Wait()
	return samples, failed
}

// ErrDisagree says that there were answers, but no majority for any of them.
var ErrDisagree = errors.New("time sources do not agree")

// ErrTooFew says that not enough sources answered.
var ErrTooFew = errors.New("too few time sources answered")

// Agree finds the time that more than half of the answering sources, and at
// least two of them (one, if only one is configured), can all mean: the middle
// of the largest overlap of their error bounds (Marzullo's algorithm, as
// RFC 5905 §11.2.1 uses it). It returns how many agree.
func Agree(samples []Sample, configured int) (offset time.Duration, agreeing int, err error) {
	// The order decides nothing, but the same answers give the same result.
	samples = slices.Clone(samples)
	slices.SortFunc(samples, func(a, b Sample) int { return cmp.Compare(a.Source, b.Source) })
	seen := map[netip.AddrPort]bool{}
	type edge struct {
		at    time.Duration
		delta int
	}
	var edges []edge
	answering := 0
	for _, s := range samples {
		if seen[s.Address] {
			continue
		}
		seen[s.Address] = true
		answering++
		edges = append(edges, edge{s.Offset - s.Distance - slack, +1}, edge{s.Offset + s.Distance + slack, -1})
	}
	need := max(min(2, configured), 1)
	if answering < need {
		return 0, 0, fmt.Errorf("%w: %d of %d", ErrTooFew, answering, configured)
	}
	slices.SortFunc(edges, func(a, b edge) int {
		return cmp.Or(cmp.Compare(a.at, b.at), cmp.Compare(b.delta, a.delta))
	})
	var low, high time.Duration
	depth, best := 0, 0
	for i, e := range edges {
		depth += e.delta
		if depth > best {
			best, low, high = depth, e.at, edges[i+1].at
		}
	}
	if best < need || 2*best <= answering {
		return 0, best, fmt.Errorf("%w: %d of %d", ErrDisagree, best, answering)
	}
	return low + (high-low)/2, best, nil
}
