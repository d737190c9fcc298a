package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"time"

	"farkeep/keyserver/moment"
	"farkeep/keyserver/orders"
	"farkeep/keyserver/peers"
	"farkeep/keyserver/policy"
	"farkeep/keyserver/upgrade"
	"farkeep/shared/hint"
	"farkeep/shared/site"
	"farkeep/shared/usage"

	"github.com/spf13/cobra"
)

// desk is where an order of the command line is carried out.
type desk struct {
	env   *Env
	where *places
	site  *site.Site
	book  *orders.Book
	// back makes the process root again where it became the owner of the state folder.
	back func() error
}

// openDesk checks the reason and opens what an order needs.
func openDesk(env *Env, where *places, reason string) (*desk, error) {
	if reason == "" {
		return nil, usage.Errorf("--reason is missing: in a year somebody will ask why")
	}
	if len(reason) > 300 {
		return nil, usage.Errorf("--reason is longer than 300 bytes")
	}
	s, err := where.readSite()
	if err != nil {
		return nil, err
	}
	back, err := asOwner(where.state)
	if err != nil {
		return nil, err
	}
	policies, records, err := where.openState(env.Now)
	if err != nil {
		return nil, errors.Join(err, back())
	}
	book := &orders.Book{Dir: where.state, Policy: policies, Audit: records, Now: func() (moment.Moment, error) { return moment.Now(env.Now) }}
	return &desk{env: env, where: where, site: s, book: book, back: back}, nil
}

// carryOver brings the state of an earlier version up to date.
func (d *desk) carryOver() error {
	_, err := upgrade.Migrate(d.where.state, d.book.Policy)
	return err
}

func (d *desk) say(format string, args ...any) {
	fmt.Fprintf(d.env.Stderr, program+": "+format+"\n", args...)
}

func (d *desk) order(name, reason string) orders.Order {
	return orders.Order{Appliance: name, By: who(d.env), Why: reason}
}

// others are the other key servers; nil with a warning where this one does not
// know who it is itself, nil where there are none.
func (d *desk) others() *peers.Peers {
	p, err := d.where.others(d.env, d.site)
	if err != nil {
		d.say("the other key servers cannot be told: %v", err)
	}
	return p
}

// others are the other key servers of the site, for orders; nil where there are none.
func (p *places) others(env *Env, s *site.Site) (*peers.Peers, error) {
	if len(s.KeyServers) < 2 {
		return nil, nil
	}
	signer, _, err := p.self(s)
	if err != nil {
		return nil, err
	}
	return peers.New(peers.Config{Servers: s.KeyServers, HostKey: signer, State: p.state, Log: slog.New(slog.DiscardHandler), Now: env.Now})
}

func newRevokeCmd(env *Env, where *places) *cobra.Command {
	var reason string
	var void bool
	var wait time.Duration
	tunnel := &tunnel{}
	cmd := &cobra.Command{
		Use:   "revoke NAME",
		Short: "Give an appliance no key any more, and have its open disk closed",
		Long: `Give an appliance no key any more, from now on and until "allow". The running
server need not be restarted. The other key servers of the site are told; those that
cannot be reached are named, and serve goes on trying.

An appliance whose disk is open learns of it when it next renews its lease, within
minutes where the line works, and closes the disk; where the line does not work, the
lease runs out. This command waits for that as long as --wait says, and shows it;
Ctrl-C ends the waiting and nothing else.

Then it prints what else a thief may have, and how to void it. With --void it voids
the appliance's SSH key here and its WireGuard peer (as root, on the machine where
the tunnel ends). A peer that is gone cannot be told any more: its lease ends it.`,
		Example: `  farkeep-keyserver revoke attic --reason "stolen"
  farkeep-keyserver revoke attic --reason "stolen" --wait 30m --void`,
		Args: usage.Args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			name := args[0]
			d, err := openDesk(env, where, reason)
			if err != nil {
				return err
			}
			a, err := known(d.site, name)
			if err != nil {
				return err
			}
			already, err := d.book.Revoke(d.order(name, reason))
			// Whatever goes wrong here, the others are told and the rest is printed.
			var unrecorded *orders.Unrecorded
			switch {
			case err != nil && !errors.As(err, &unrecorded):
				d.say("%s is NOT yet revoked here: see below", name)
				err = hint.Because(err, "an unreadable state gives no key; move %s away, restart serve, and revoke again",
					filepath.Join(where.state, "appliances", name+".json"))
			case already:
				d.say("%s was revoked already", name)
			default:
				d.say("%s is revoked: it gets no key any more", name)
			}
			told := d.tellOthers(cmd.Context(), name, reason)
			d.watch(cmd.Context(), name, wait)
			voided := d.void(a, tunnel, void)
			return errors.Join(err, told, voided)
		},
	}
	f := cmd.Flags()
	f.StringVar(&reason, "reason", "", "why; it is on record")
	f.DurationVar(&wait, "wait", 2*time.Minute, "how long to wait until the appliance has heard of it; 0: not at all")
	f.BoolVar(&void, "void", false, "void its SSH key and its WireGuard peer too")
	tunnel.register(f)
	return cmd
}

// tellOthers queues the revocation for the other key servers and tries them once.
func (d *desk) tellOthers(ctx context.Context, name, reason string) error {
	others := d.others()
	if others == nil {
		if n := len(d.site.KeyServers); n > 1 {
			return fmt.Errorf("the site has %d key servers: revoke %s on each of the others too", n, name)
		}
		return nil
	}
	if err := others.Queue(peers.NewOrder(name, reason, who(d.env), others.Me(), d.env.Now())); err != nil {
		return hint.Because(err, "revoke %s on each of the other key servers too", name)
	}
	missed := 0
	err := others.Deliver(ctx, func(o peers.Outcome) {
		switch {
		case o.Order.Appliance != name:
		case o.Err == nil:
			d.say("key server %s: revoked there too", o.Peer)
		default:
			missed++
			d.say("key server %s: NOT REACHED, it still gives the key: %v", o.Peer, o.Err)
		}
	})
	if missed > 0 {
		d.say("serve goes on trying; to be sure, run revoke there")
	}
	if err != nil && ctx.Err() == nil {
		return err
	}
	return nil
}

const watchEvery = 500 * time.Millisecond

// watch shows how the revocation reaches the appliance, until it has said that
// its disk is dark, the time is over, or ctx ends.
func (d *desk) watch(ctx context.Context, name string, wait time.Duration) {
	deadline := time.NewTimer(wait)
	defer deadline.Stop()
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	told := false
	for {
		s, err := d.book.Policy.Read(name)
		switch {
		case err != nil:
			d.say("cannot show whether it has reached the appliance: %v", err)
			return
		case s.Standing.State != policy.Revoked:
			d.say("somebody has allowed %s meanwhile", name)
			return
		}
		if !told && !s.Told.IsZero() {
			told = true
			d.say("told: %s asked at %s and was refused", name, stamp(s.Told.Wall))
		}
		if !s.Dark.IsZero() {
			d.say("dark: %s said at %s that its disk is closed", name, stamp(s.Dark.Wall))
			return
		}
		select {
		case <-tick.C:
			continue
		case <-ctx.Done():
		case <-deadline.C:
		}
		if told {
			d.say("it has not said that its disk is dark: it may have been dark before")
		} else {
			d.say("it has not asked since%s; an open disk closes when its lease ends", lastSeen(s))
		}
		return
	}
}

// elsewhere says where else an order has to be given that opens something: no key
// server opens on another's word.
func (d *desk) elsewhere(order string) {
	_, me, err := d.where.self(d.site)
	var names []string
	for _, k := range d.site.KeyServers {
		if err != nil || k.Name != me.Name {
			names = append(names, k.Name)
		}
	}
	if len(names) > 0 {
		d.say("%s it on %s too: each key server decides for itself, and one that refuses has the disk closed", order, strings.Join(names, ", "))
	}
}

func lastSeen(s policy.State) string {
	if s.LastSeen.IsZero() {
		return " it was made"
	}
	return ", and was last heard at " + stamp(s.LastSeen.Wall)
}

func newAllowCmd(env *Env, where *places) *cobra.Command {
	var reason string
	var unvoid bool
	cmd := &cobra.Command{
		Use:   "allow NAME",
		Short: "Give an appliance its key again",
		Long: `Give an appliance its key again. What is asked of every request is asked of it as
ever: in another place, after a long silence or with an old token its key waits for
"approve". Allow it on each key server: no key server allows on another's word.`,
		Example: `  farkeep-keyserver allow attic --reason "it was only borrowed"`,
		Args:    usage.Args(cobra.ExactArgs(1)),
		RunE: func(_ *cobra.Command, args []string) error {
			name := args[0]
			d, err := openDesk(env, where, reason)
			if err != nil {
				return err
			}
			a, err := known(d.site, name)
			if err == nil {
				err = d.carryOver()
			}
			if err != nil {
				return err
			}
			if err := d.book.Allow(d.order(name, reason)); err != nil {
				return err
			}
			d.say("%s may have its key, if its request is as it should be; otherwise it waits for approve", name)
			if p := d.others(); p != nil {
				from, err := p.Withdraw(name)
				if err != nil {
					return err
				}
				for _, server := range from {
					d.say("key server %s had not heard of the revocation, and will not", server)
				}
			}
			d.elsewhere("allow")
			return d.unvoid(a, unvoid)
		},
	}
	cmd.Flags().StringVar(&reason, "reason", "", "why; it is on record")
	cmd.Flags().BoolVar(&unvoid, "unvoid", false, "take its SSH key again, if revoke --void made it void")
	return cmd
}
