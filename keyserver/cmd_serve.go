package main

import (
	"fmt"

	"farkeep/keyserver/keystore"
	"farkeep/shared/usage"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func newServeCmd(env *Env, where *places) *cobra.Command {
	var listen, shown string
	var id identityFlags
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Answer the appliances",
		Long: `Answer the appliances of the site until SIGTERM. site.toml is read once: restart
after a change. Orders (revoke, allow) and new keys (add) count at once.`,
		Example: `  farkeep-keyserver serve
  farkeep-keyserver serve --site site.toml --secrets keyserver-home --state state --listen 127.0.0.1:4022`,
		Args: usage.Args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			log := env.Logger()
			s, err := where.readSite()
			if err != nil {
				return err
			}
			signer, me, err := where.self(s)
			if err != nil {
				return err
			}
			keys, err := where.openKeys()
			if err != nil {
				return err
			}
			if err := keystore.CanLock(); err != nil {
				return err
			}
			if err := noDumps(); err != nil { // before the identity is read
				return err
			}
			opener, err := id.load(env)
			if err == nil {
				err = needIdentity(keys, opener)
			}
			if err != nil {
				return err
			}
			h := &house{env: env, where: where, site: s, me: me, signer: signer, keys: keys, log: log}
			if cmd.Flags().Changed("metrics") {
				h.metrics = &shown
			}
			return h.serve(cmd.Context(), listen)
		},
	}
	id.register(cmd)
	where.registerEndpoints(cmd)
	cmd.Flags().StringVar(&shown, "metrics", "", "address and port of /metrics and /healthz; \"\" for none (default: port 4023 beside the key server's)")
	cmd.Flags().StringVar(&listen, "listen", "", "address and port (default: the one in site.toml)")
	return cmd
}

// noDumps keeps the process out of core dumps and away from debuggers of other
// processes with its uid, and checks that the kernel agreed.
func noDumps() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("forbid core dumps: %w", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("forbid core dumps: %w", err)
	}
	if v, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0); err != nil || v != 0 {
		return fmt.Errorf("forbid core dumps: the kernel still says %d (%v)", v, err)
	}
	return nil
}
