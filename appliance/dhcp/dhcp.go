// Package dhcp keeps a DHCPv4 lease on one interface: it acquires, renews,
// rebinds and gives up an address as RFC 2131 says, with jitter, for ever.
//
// It trusts no server farther than an address, a gateway and resolvers, all of
// them checked and bounded. It changes nothing itself: the caller puts a lease
// on the interface and takes it off. Needs CAP_NET_RAW.
package dhcp

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"time"

	"github.com/cenkalti/backoff/v5"
)

// Config says what to keep.
type Config struct {
	Interface string
	Had       netip.Addr // ask for this address first; may be zero
	// Accept refuses leases that the caller cannot use; nil accepts all.
	Accept func(Lease) error
	// Apply puts a lease on the interface. It is called for every new lease and
	// every renewal, each of which moves the time at which it ends. An error
	// gives up the lease and begins anew.
	Apply func(Lease) error
	// Lost takes the lease off: it expired, or the server refused it.
	Lost func(Lease)
	Log  *slog.Logger
}

// minRetry is the shortest pause between two renewals (RFC 2131 §4.4.5).
const minRetry = time.Minute

// exchanger is what the loop needs of the network.
type exchanger interface {
	acquire(ctx context.Context, had netip.Addr) (Lease, error)
	renew(ctx context.Context, l Lease, anyServer bool) (Lease, error)
}

// Run keeps a lease until ctx ends. Then the lease stays on the interface: the
// kernel takes the address off when its time is over.
func Run(ctx context.Context, c Config) {
	if c.Accept == nil {
		c.Accept = func(Lease) error { return nil }
	}
	c.run(ctx, &wire{name: c.Interface, accept: c.Accept})
}

func (c Config) run(ctx context.Context, x exchanger) {
	retry := backoff.NewExponentialBackOff()
	retry.InitialInterval, retry.Multiplier, retry.MaxInterval = time.Second, 2, time.Minute
	had := c.Had
	for ctx.Err() == nil {
		asked := time.Now()
		lease, err := x.acquire(ctx, had)
		if err == nil {
			err = c.Apply(lease)
		}
		if err != nil {
			if ctx.Err() == nil {
				c.Log.Warn("no lease", "interface", c.Interface, "err", err)
			}
			sleep(ctx, retry.NextBackOff())
			continue
		}
		retry.Reset()
		c.Log.Info("lease", "interface", c.Interface, "valid", lease.Valid)
		lease = c.keep(ctx, x, lease, asked)
		if ctx.Err() != nil {
			return
		}
		had = lease.Address.Addr()
		c.Lost(lease)
	}
}

// keep renews a lease until it is lost or ctx ends, and returns its last form.
func (c Config) keep(ctx context.Context, x exchanger, lease Lease, asked time.Time) Lease {
	// One in sixteen earlier or not: a street full of boxes that came up
	// together after a power cut does not renew together.
	wait := func(d time.Duration) time.Duration { return d - rand.N(d/16+1) }
	next := wait(lease.Renew)
	for {
		if !sleep(ctx, time.Until(asked.Add(next))) {
			return lease
		}
		age := time.Since(asked)
		if age >= lease.Valid {
			c.Log.Warn("the lease expired", "interface", c.Interface)
			return lease
		}
		rebinding := age >= lease.Rebind*15/16
		limit := lease.Rebind
		if rebinding {
			limit = lease.Valid
		}
		now := time.Now()
		renewed, err := x.renew(ctx, lease, rebinding)
		switch {
		case err == nil:
			err = c.Apply(renewed)
			if err != nil {
				c.Log.Warn("a renewed lease was not usable", "interface", c.Interface, "err", err)
				return lease
			}
			lease, asked, next = renewed, now, wait(renewed.Renew)
		case errors.Is(err, errRefused):
			c.Log.Warn("the lease is over", "interface", c.Interface, "err", err)
			return lease
		default:
			if ctx.Err() == nil {
				c.Log.Warn("the lease was not renewed", "interface", c.Interface, "err", err)
			}
			// RFC 2131 §4.4.5: wait for half of the time that is left.
			age = time.Since(asked)
			next = min(age+max((limit-age)/2, minRetry), lease.Valid)
		}
	}
}

// sleep returns false when ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
