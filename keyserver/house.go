package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"

	"farkeep/keyserver/alert"
	"farkeep/keyserver/audit"
	"farkeep/keyserver/keystore"
	"farkeep/keyserver/moment"
	"farkeep/keyserver/orders"
	"farkeep/keyserver/peers"
	"farkeep/keyserver/place"
	"farkeep/keyserver/server"
	"farkeep/keyserver/upgrade"
	"farkeep/shared/hint"
	"farkeep/shared/site"
	"farkeep/shared/sshverb"

	"golang.org/x/crypto/ssh"
)

// house is a key server that serves, with everything that stands around the
// answers: alarms, the other key servers, where the VPN sees peers.
type house struct {
	env    *Env
	where  *places
	site   *site.Site
	me     *site.KeyServer
	signer ssh.Signer
	keys   *keystore.Store
	log    *slog.Logger
	// metrics is where they are shown; nil for beside the key server's own address.
	metrics *string
}

// serve answers until ctx ends.
func (h *house) serve(ctx context.Context, listen string) error {
	h.site = h.site.SeenBy(*h.me)
	policies, records, err := h.where.openState(h.env.Now)
	if err != nil {
		return err
	}
	// The whole chain once per start: a key server whose log was altered
	// should not go on as if nothing had happened.
	last, err := orders.LastOrders(h.where.state)
	if err != nil {
		return hint.Because(err, damagedLog)
	}
	carried, err := upgrade.Migrate(h.where.state, policies)
	if err != nil {
		return err
	}
	if len(carried) > 0 {
		h.log.Info("carried over the state of an earlier version", "appliances", carried)
	}
	now := func() (moment.Moment, error) { return moment.Now(h.env.Now) }
	mail, err := h.where.mail(h.site)
	if err != nil {
		h.log.Warn("no mails are sent", "err", err)
	}
	alerts, err := alert.New(alert.Config{
		Dir: filepath.Join(h.where.state, "mail"), KeyServer: h.me.Name, Mail: mail, Now: h.env.Now, Log: h.log,
	})
	if err != nil {
		return err
	}
	book := &orders.Book{Dir: h.where.state, Policy: policies, Audit: records, Now: now}
	seenHere := h.seenHere(now)
	others, err := peers.New(peers.Config{
		Servers: h.site.KeyServers, HostKey: h.signer, State: h.where.state, Log: h.log, Now: h.env.Now, Place: seenHere,
		Revoke: func(_ context.Context, from string, o peers.Order) (bool, error) { return h.revokeFor(book, from, o) },
		Alarm: func(p peers.Pending) {
			alerts.Raise(alert.Event{Kind: alert.RevocationNotDelivered, Appliance: p.Order.Appliance, Decision: "pending at " + p.Peer, Reason: p.Order.Reason})
		},
	})
	if err != nil {
		return err
	}
	seen := &watch{house: h, policies: policies, records: records, others: others, alerts: alerts, endpoints: place.NewReader(h.where.endpoints, now).Age}
	counts := seen.metrics()
	srv, err := server.New(server.Config{
		Site: h.site, HostKey: h.signer, Keys: h.keys, Policy: policies, Audit: records, Log: h.log, Now: h.env.Now, Moment: now,
		Peers: others, Alert: alerts.Raise, Place: h.placeOf(seenHere, others),
		Void:    func(name, fingerprint string) (bool, error) { return orders.IsVoid(h.where.state, name, fingerprint) },
		Observe: observe(counts),
	}, last)
	if err != nil {
		return err
	}
	if listen == "" {
		listen = h.me.Address
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", listen)
	if err != nil {
		return hint.Because(fmt.Errorf("listen: %w", err), "is the VPN up (wg-quick up farkeep)? Another address goes with --listen")
	}
	defer l.Close()
	shown, err := listenMetrics(ctx, h.metricsAddress(listen))
	if err != nil && h.metrics == nil {
		h.log.Error("no metrics are shown", "err", err) // keys matter more
	} else if err != nil {
		return err
	}
	head, err := records.Append(audit.Record{Event: "start", Decision: "done", Reason: "serving on " + l.Addr().String()})
	if errors.Is(err, audit.ErrDamaged) {
		err = hint.Because(err, damagedLog)
	}
	if err != nil {
		return err
	}
	h.log.Info("serving", "name", h.me.Name, "address", l.Addr().String(), "appliances", len(h.site.Appliances), "head", head)
	return together(ctx,
		func(ctx context.Context) error { return srv.Serve(ctx, l) },
		func(ctx context.Context) error { others.Run(ctx); return nil },
		func(ctx context.Context) error {
			if shown == nil {
				<-ctx.Done()
				return nil
			}
			if err := counts.Serve(ctx, shown); err != nil { // keys matter more
				h.log.Error("no metrics are shown any more", "err", err)
			}
			<-ctx.Done()
			return nil
		},
		func(ctx context.Context) error {
			// Without mails there are still keys, and the log.
			if err := alerts.Run(ctx); err != nil {
				h.log.Error("no mails are sent any more", "err", err)
			}
			<-ctx.Done()
			return nil
		},
	)
}

const damagedLog = "farkeep-keyserver audit --verify says where; find out why, then move the files audit* away, and a new log begins"

// together runs all until one returns an error or ctx ends, and returns when all have.
func together(ctx context.Context, all ...func(context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wait sync.WaitGroup
	errs := make([]error, len(all))
	for i, run := range all {
		wait.Go(func() {
			defer cancel()
			errs[i] = run(ctx)
		})
	}
	wait.Wait()
	return errors.Join(errs...)
}

// revokeFor carries out a revocation that was typed at another key server.
func (h *house) revokeFor(book *orders.Book, from string, o peers.Order) (known bool, err error) {
	if _, ok := h.site.Appliance(o.Appliance); !ok {
		// Its site.toml is newer than ours: the order is kept against the day on
		// which the appliance appears here.
		h.log.Warn("revoked for another key server: site.toml has no such appliance", "appliance", o.Appliance, "key_server", from)
	}
	known, err = book.Revoke(orders.Order{Appliance: o.Appliance, By: o.By, Why: why(o.Reason), From: from})
	var unrecorded *orders.Unrecorded
	if errors.As(err, &unrecorded) {
		// The other one asks again until it is on record here too.
		return known, &sshverb.Error{Code: hint.ExitFailure, Text: "revoked, but not on record", Err: err}
	}
	return known, err
}

func why(reason string) string {
	if strings.TrimSpace(reason) == "" {
		return "no reason was given"
	}
	return reason
}

// look says where a VPN sees the peer with an address.
type look = func(ctx context.Context, source string, from netip.Addr) (place.Sighting, error)

// seenHere looks at what "endpoints" wrote; nil where the VPN does not end.
func (h *house) seenHere(now func() (moment.Moment, error)) look {
	if h.me.Place != "" {
		return nil
	}
	return place.NewReader(h.where.endpoints, now).Look
}

// placeOf says where the VPN sees an appliance: here, or by the word of the others.
func (h *house) placeOf(here look, others *peers.Peers) func(context.Context, site.Appliance, netip.Addr) place.Sighting {
	if here == nil {
		here = others.Where
	}
	return func(ctx context.Context, a site.Appliance, from netip.Addr) place.Sighting {
		if a.KeyPolicy.Place == site.PlaceNone {
			return place.Sighting{}
		}
		seen, err := here(ctx, a.KeyPolicy.Place, from)
		if err != nil {
			h.log.Warn("the VPN does not say where peers are", "appliance", a.Name, "err", err)
		}
		return seen
	}
}
