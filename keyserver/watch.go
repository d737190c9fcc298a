package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"time"

	"farkeep/keyserver/alert"
	"farkeep/keyserver/audit"
	"farkeep/keyserver/metrics"
	"farkeep/keyserver/peers"
	"farkeep/keyserver/place"
	"farkeep/keyserver/policy"
	"farkeep/keyserver/server"
	"farkeep/shared/hint"
	"farkeep/shared/site"
)

// metricsPort is where metrics are shown on the VPN address.
const metricsPort = 4023

// watch is what /metrics and /healthz look at.
type watch struct {
	house     *house
	policies  *policy.Store
	records   *audit.Log
	others    *peers.Peers
	alerts    *alert.Alerts
	endpoints func() (time.Duration, error) // age of what the VPN was last seen to say
}

func (w *watch) metrics() *metrics.Metrics {
	return metrics.New(metrics.Config{State: w.look, Now: w.house.env.Now, Log: w.house.log})
}

// observe counts what the server tells.
func observe(m *metrics.Metrics) func(server.Observation) {
	return func(o server.Observation) { m.Observe(o.Verb, o.Verdict, o.Took) }
}

// look takes a snapshot. What cannot be read is a check that fails, and never a
// number.
func (w *watch) look() metrics.Snapshot {
	var s metrics.Snapshot
	var state, keys []error
	entries, _, err := w.house.keys.List()
	keys = append(keys, err)
	stored := map[string]error{}
	for _, e := range entries {
		stored[e.UUID] = e.Err
	}
	places := false
	for _, a := range w.house.site.Appliances {
		places = places || a.KeyPolicy.Place != site.PlaceNone
		if a.LUKS != "" {
			err, ok := stored[a.LUKS]
			if !ok {
				err = errors.New("not there")
			}
			if err != nil {
				keys = append(keys, fmt.Errorf("the key of %s: %w", a.Name, err))
			}
		}
		known, err := w.policies.Read(a.Name)
		if err != nil {
			state = append(state, err)
			continue
		}
		s.Appliances = append(s.Appliances, metrics.Appliance{
			Name: a.Name, Revoked: known.Standing.State == policy.Revoked, Waiting: len(known.Waiting), Seen: known.LastSeen.Wall,
		})
	}
	pending, err := w.others.Pending()
	state = append(state, err)
	for _, name := range w.others.Names() {
		p := metrics.Peer{Name: name}
		for _, one := range pending {
			if one.Peer == name {
				p.Pending++
			}
		}
		s.Peers = append(s.Peers, p)
	}
	newest, err := w.records.Newest()
	s.AuditRecords = newest
	if w.alerts.Mails() {
		r := w.alerts.Report()
		s.Mail = &metrics.Mail{Queued: r.Queued, LastSent: r.LastSent, Failing: r.LastError != ""}
	}
	s.Checks = []metrics.Check{
		{Name: "audit", Err: errors.Join(err, w.records.Check())},
		{Name: "keys", Err: errors.Join(keys...)},
		{Name: "state", Err: errors.Join(state...)},
	}
	switch {
	case places && w.house.me.Place == site.PlaceOthers:
		s.Checks = append(s.Checks, metrics.Check{Name: "endpoints", Err: w.others.Blind()})
	case places:
		age, err := w.endpoints()
		if err == nil && age > place.Stale {
			err = fmt.Errorf("the VPN's endpoints are %v old: is farkeep-keyserver endpoints running?", age.Round(time.Second))
		}
		s.Checks = append(s.Checks, metrics.Check{Name: "endpoints", Err: err})
	}
	return s
}

// metricsAddress is where metrics are shown: where the flag says, or beside the
// key server's own address, and nowhere when it does not listen there, as in a
// trial run.
func (h *house) metricsAddress(listen string) string {
	if h.metrics != nil {
		return *h.metrics
	}
	address, err := netip.ParseAddrPort(h.me.Address)
	if listen != h.me.Address || err != nil {
		return ""
	}
	return net.JoinHostPort(address.Addr().String(), strconv.Itoa(metricsPort))
}

// listenMetrics opens the listener; nil for no address.
func listenMetrics(ctx context.Context, address string) (net.Listener, error) {
	if address == "" {
		return nil, nil
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
	if err != nil {
		return nil, hint.Because(fmt.Errorf("listen for metrics: %w", err), "another address goes with --metrics, none with --metrics \"\"")
	}
	return l, nil
}
