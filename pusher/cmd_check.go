package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"farkeep/pusher/borglock"
	"farkeep/shared/hint"
	"farkeep/shared/usage"
)

func newCheckCmd(env *Env, at *places) *cobra.Command {
	return &cobra.Command{
		Use:   "check",
		Short: "Check the configuration and the repositories, touch nothing",
		Long: `check reads the site and the push key, looks for every repository, and compares
it with what was pushed before. It asks no target: status does.`,
		Example: `  farkeep-pusher check --site ./site.toml --identity ./home/pusher/ssh_key`,
		Args:    usage.Args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			me, err := at.readSelf()
			if err != nil {
				return err
			}
			if _, err := at.readIdentity(me.site); err != nil {
				return err
			}
			memory := at.memory()
			if _, err := at.targets(me, nil, memory, env, at.logger(env.Stderr)); err != nil {
				return err
			}
			host, err := borglock.HostID(cmd.Context(), env.Getenv)
			if err != nil {
				return err
			}
			found, err := find(me, memory)
			if err != nil {
				return err
			}
			for _, r := range found.Repositories {
				fmt.Fprintf(env.Stdout, "%s: %s at %s\n", r.Name, r.What(), r.Path)
			}
			for _, p := range found.Problems {
				fmt.Fprintf(env.Stderr, "%s: %s: %v\n", program, p.Name, p.Err)
				if h := hint.Of(p.Err); h != "" {
					fmt.Fprintf(env.Stderr, "%s: hint: %s\n", program, h)
				}
			}
			if err := problems(found.Problems, len(found.Repositories)); err != nil {
				return err
			}
			fmt.Fprintf(env.Stdout, "%d repositories, %d targets; borg's name for this host is %s\n", len(found.Repositories), len(me.site.Appliances)+len(me.site.Directories), host)
			return nil
		},
	}
}
