package main

import (
	"fmt"
	"net"

	"farkeep/keyserver/audit"
	"farkeep/keyserver/keystore"
	"farkeep/keyserver/server"
	"farkeep/shared/hint"
	"farkeep/shared/usage"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func newServeCmd(env *Env, where *places) *cobra.Command {
	var listen string
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
			if err := noDumps(); err != nil {
				return err
			}
			policies, records, err := where.openState(env.Now)
			if err != nil {
				return err
			}
			// The whole chain once per start: a key server whose log was altered
			// should not go on as if nothing had happened.
			orders, err := server.LastOrders(where.state)
			if err != nil {
				return hint.Because(err, "farkeep-keyserver audit --verify says where; find out why, then move the files audit*.log away, and a new log begins")
			}
			srv, err := server.New(server.Config{
				Site: s, HostKey: signer, Keys: keys, Policy: policies, Audit: records, Log: log, Now: env.Now,
			}, orders)
			if err != nil {
				return err
			}
			if listen == "" {
				listen = me.Address
			}
			l, err := (&net.ListenConfig{}).Listen(cmd.Context(), "tcp", listen)
			if err != nil {
				return hint.Because(fmt.Errorf("listen: %w", err), "is the VPN up (wg-quick up farkeep)? Another address goes with --listen")
			}
			defer l.Close()
			head, err := records.Append(audit.Record{Event: "start", Decision: "done", Reason: "serving on " + l.Addr().String()})
			if err != nil {
				return err
			}
			log.Info("serving", "name", me.Name, "address", l.Addr().String(), "appliances", len(s.Appliances), "head", head)
			return srv.Serve(cmd.Context(), l)
		},
	}
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
