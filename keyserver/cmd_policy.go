package main

import (
	"fmt"

	"farkeep/keyserver/audit"
	"farkeep/keyserver/policy"
	"farkeep/shared/usage"

	"github.com/spf13/cobra"
)

func newRevokeCmd(env *Env, where *places) *cobra.Command {
	var reason string
	cmd := &cobra.Command{
		Use:   "revoke NAME",
		Short: "Give an appliance no key any more",
		Long: `Give an appliance no key any more, from now on and until "allow". The running
server need not be restarted. Do it on every key server of the site.`,
		Example: `  farkeep-keyserver revoke attic --reason "stolen"`,
		Args:    usage.Args(cobra.ExactArgs(1)),
		RunE: func(_ *cobra.Command, args []string) error {
			o, err := newOrder(env, where, args[0], reason)
			if err != nil {
				return err
			}
			// The order first, the record second: if the disk is full, the thief
			// still gets nothing.
			if err := o.set(policy.Revoked); err != nil {
				return err
			}
			if err := o.record("revoke"); err != nil {
				return fmt.Errorf("%s is revoked, but not on record: %w", args[0], err)
			}
			fmt.Fprintf(env.Stderr, "%s: %s is revoked: it gets no key any more\n", program, args[0])
			if n := o.servers; n > 1 {
				fmt.Fprintf(env.Stderr, "%s: the site has %d key servers: revoke it on the others too\n", program, n)
			}
			fmt.Fprintf(env.Stderr, "%s: void as well: its VPN peer at home, and its mail password at the provider\n", program)
			return nil
		},
	}
	cmd.Flags().StringVar(&reason, "reason", "", "why; it is on record")
	return cmd
}

func newAllowCmd(env *Env, where *places) *cobra.Command {
	var reason string
	cmd := &cobra.Command{
		Use:     "allow NAME",
		Short:   "Give an appliance its key again",
		Example: `  farkeep-keyserver allow attic --reason "it was only borrowed"`,
		Args:    usage.Args(cobra.ExactArgs(1)),
		RunE: func(_ *cobra.Command, args []string) error {
			o, err := newOrder(env, where, args[0], reason)
			if err != nil {
				return err
			}
			// The record first: nothing opens without one.
			if err := o.record("allow"); err != nil {
				return err
			}
			if err := o.set(policy.Enabled); err != nil {
				return err
			}
			fmt.Fprintf(env.Stderr, "%s: %s may have its key\n", program, args[0])
			return nil
		},
	}
	cmd.Flags().StringVar(&reason, "reason", "", "why; it is on record")
	return cmd
}

// order is a person's decision about an appliance.
type order struct {
	env      *Env
	name     string
	reason   string
	servers  int
	policies *policy.Store
	records  *audit.Log
}

func newOrder(env *Env, where *places, name, reason string) (*order, error) {
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
	if _, err := known(s, name); err != nil {
		return nil, err
	}
	policies, records, err := where.openState(env.Now)
	if err != nil {
		return nil, err
	}
	return &order{env: env, name: name, reason: reason, servers: len(s.KeyServers), policies: policies, records: records}, nil
}

func (o *order) set(state string) error {
	return o.policies.SetStanding(policy.Standing{Appliance: o.name, State: state, Reason: o.reason, By: who(o.env), Since: o.env.Now()})
}

func (o *order) record(event string) error {
	_, err := o.records.Append(audit.Record{Event: event, Decision: "done", Appliance: o.name, Reason: o.reason, By: who(o.env)})
	return err
}
