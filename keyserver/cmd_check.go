package main

import (
	"fmt"

	"farkeep/keyserver/audit"
	"farkeep/keyserver/keystore"
	"farkeep/shared/hint"
	"farkeep/shared/usage"

	"github.com/spf13/cobra"
)

func newCheckCmd(env *Env, where *places) *cobra.Command {
	return &cobra.Command{
		Use:   "check",
		Short: "Check the configuration and the files, without serving",
		Long: `Check site.toml, the host key, the keys and their modes, the state and the chain
of the audit log. Nothing is changed, and nothing is sent.`,
		Example: "  farkeep-keyserver check",
		Args:    usage.Args(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			found := 0
			complain := func(err error) {
				found++
				fmt.Fprintf(env.Stdout, "problem: %v\n", err)
				if next := hint.Of(err); next != "" {
					fmt.Fprintf(env.Stdout, "  hint: %s\n", next)
				}
			}
			s, err := where.readSite()
			if err != nil {
				return err
			}
			fmt.Fprintf(env.Stdout, "site: %s, %d appliances\n", s.Name, len(s.Appliances))
			if _, me, err := where.self(s); err != nil {
				complain(err)
			} else {
				fmt.Fprintf(env.Stdout, "key server: %s, at %s\n", me.Name, me.Address)
			}
			if err := keystore.CanLock(); err != nil {
				complain(err)
			}
			if summary, err := audit.Verify(where.state); err != nil {
				complain(err)
			} else {
				fmt.Fprintf(env.Stdout, "audit log: %d records, the chain is whole\n", summary.Records)
			}
			rows, unclaimed, err := where.rows()
			if err != nil {
				complain(err)
			}
			for _, r := range rows {
				switch {
				case r.UUID == "":
					complain(hint.Because(fmt.Errorf("%s has no disk in site.toml", r.Appliance), "prepare its disk (farkeep-image disk), then copy site.toml here again"))
				case r.Key != "stored":
					complain(hint.Because(fmt.Errorf("%s: its key is not usable: %s", r.Appliance, r.Key), "farkeep-keyserver add %s --key-file FILE", r.UUID))
				default:
					fmt.Fprintf(env.Stdout, "appliance: %s, %s, key stored\n", r.Appliance, r.State)
				}
			}
			for _, e := range unclaimed {
				fmt.Fprintf(env.Stdout, "note: there is a key of %s, and no appliance has that disk\n", e.UUID)
			}
			if found > 0 {
				return hint.Exit(hint.ExitFailure, fmt.Errorf("problems found: %d", found))
			}
			return nil
		},
	}
}
