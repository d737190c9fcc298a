package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"farkeep/keyserver/moment"
	"farkeep/keyserver/place"
	"farkeep/shared/hint"
	"farkeep/shared/site"
	"farkeep/shared/usage"

	"github.com/spf13/cobra"
)

func newEndpointsCmd(env *Env) *cobra.Command {
	var path, table, socket string
	var every time.Duration
	var once bool
	cmd := &cobra.Command{
		Use:   "endpoints",
		Short: "Tell the server from which networks the appliances come (runs as root)",
		Long: `Ask WireGuard, and Tailscale where it runs, every few seconds from where each
peer's last packets came, and write that to a file that "serve" reads. This is
the only part that needs CAP_NET_ADMIN, and it holds no key and no policy.

It is needed where site.toml says key_policy.place = "wireguard" or "tailscale".
A table of networks makes the judgement better where a line changes its address:
the file ip2asn-combined.tsv of iptoasn.com, unpacked, or lines "PREFIX AS".`,
		Example: `  farkeep-keyserver endpoints
  farkeep-keyserver endpoints --once
  farkeep-keyserver endpoints --networks /var/lib/farkeep-networks/ip2asn-combined.tsv`,
		Args: usage.Args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !cmd.Flags().Changed("every") {
				every = place.DefaultEvery
			}
			if every < 100*time.Millisecond || every > place.MaxEvery {
				return usage.Errorf("--every %v is not between 100ms and %v", every, place.MaxEvery)
			}
			wireguard, err := place.OpenWireGuard()
			if err != nil {
				return hint.Because(err, "it needs CAP_NET_ADMIN: run it as root")
			}
			defer wireguard.Close()
			looks := []place.Look{{Source: place.SourceWireGuard, Observe: func(context.Context) ([]place.Observation, error) { return wireguard.Observe() }}}
			if _, err := os.Stat(socket); err == nil || cmd.Flags().Changed("tailscale") {
				looks = append(looks, place.Look{Source: place.SourceTailscale, Observe: place.OpenTailscale(socket).Observe})
				if !cmd.Flags().Changed("every") {
					every = place.TailscaleEvery
				}
			} else if !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			w := &place.Watch{Looks: looks, Path: path, Table: table, Every: every, Now: func() (moment.Moment, error) { return moment.Now(env.Now) }, Log: env.Logger()}
			if once {
				return w.Once(cmd.Context(), env.Stdout)
			}
			err = w.Run(cmd.Context())
			if errors.Is(err, fs.ErrPermission) {
				err = hint.Because(err, "run it as root, or name another file with --file")
			}
			return err
		},
	}
	cmd.Flags().StringVar(&path, "file", place.DefaultPath, "where serve finds it")
	cmd.Flags().StringVar(&table, "networks", "", "table of networks and autonomous systems")
	cmd.Flags().StringVar(&socket, "tailscale", place.TailscaleSocket, "tailscaled's socket")
	cmd.Flags().DurationVar(&every, "every", place.DefaultEvery, "how often to look (default with Tailscale 1s)")
	cmd.Flags().BoolVar(&once, "once", false, "look once, print what is seen, write nothing")
	return cmd
}

// placed reports whether the site wants to know where an appliance is.
func placed(s *site.Site) bool {
	for _, a := range s.Appliances {
		if a.KeyPolicy.Place != site.PlaceNone {
			return true
		}
	}
	return false
}

// checkEndpoints is what "check" says of the endpoints.
func checkEndpoints(s *site.Site, r *place.Reader) (string, error) {
	if !placed(s) {
		return "", nil
	}
	age, err := r.Age()
	if err == nil && age > place.Stale {
		err = fmt.Errorf("%s is %v old", place.DefaultPath, age.Round(time.Second))
	}
	if err != nil {
		return "", hint.Because(fmt.Errorf("site.toml wants places judged, and the VPN's endpoints are not known: %w", err),
			`start the service "farkeep-endpoints" (docs/keyserver.md); where the VPN does not end on this machine, set place = "others" for this key server; or set key_policy.place = "none"`)
	}
	return fmt.Sprintf("endpoints: %v old", age.Round(time.Second)), nil
}

// checkOthers is what "check" says of the endpoints at a key server that asks the
// others for them.
func (p *places) checkOthers(ctx context.Context, env *Env, s *site.Site) (string, error) {
	others, err := p.others(env, s)
	if err != nil {
		return "", err
	}
	for _, a := range s.Appliances {
		if a.KeyPolicy.Place == site.PlaceNone || !a.VPNAddress.IsValid() {
			continue
		}
		seen, err := others.Where(ctx, a.KeyPolicy.Place, a.VPNAddress)
		switch {
		case err != nil:
			return "", hint.Because(fmt.Errorf("this key server asks the others where appliances are, and nobody answers: %w", err),
				"see that serve and endpoints run there; until then no appliance with a place gets its key here")
		case seen.Known():
			return "endpoints: another key server tells them", nil
		}
	}
	if !placed(s) {
		return "", nil
	}
	return "endpoints: the other key servers answer, and have seen no appliance yet", nil
}
