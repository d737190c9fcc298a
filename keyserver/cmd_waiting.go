package main

import (
	"encoding/json"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"farkeep/keyserver/orders"
	"farkeep/keyserver/policy"
	"farkeep/keyserver/upgrade"
	"farkeep/shared/hint"
	"farkeep/shared/settings"
	"farkeep/shared/usage"

	"github.com/spf13/cobra"
)

// waitingRow is what waiting says of one request; --json prints it as it is.
type waitingRow struct {
	ID        string   `json:"id"`
	Appliance string   `json:"appliance"`
	First     string   `json:"first"`
	Last      string   `json:"last"`
	Count     int      `json:"count"`
	Place     string   `json:"place,omitempty"`
	Asks      []string `json:"asks"`
}

func newWaitingCmd(env *Env, where *places) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "waiting",
		Short: "List the requests that wait for a person",
		Example: `  farkeep-keyserver waiting
  farkeep-keyserver waiting --json`,
		Args: usage.Args(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			rows, err := where.waiting()
			if err != nil {
				return err
			}
			if asJSON {
				enc := json.NewEncoder(env.Stdout)
				enc.SetIndent("", "  ")
				return enc.Encode(rows)
			}
			t := tabwriter.NewWriter(env.Stdout, 0, 0, 2, ' ', 0)
			fmt.Fprintln(t, "ID\tAPPLIANCE\tSINCE\tLAST\tASKED\tPLACE\tWHY IT WAITS")
			for _, r := range rows {
				fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%d times\t%s\t%s\n", r.ID, r.Appliance, r.First, r.Last, r.Count, dash(r.Place), strings.Join(r.Asks, "; "))
			}
			return t.Flush()
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// waiting are the requests that wait, in the site's order.
func (p *places) waiting() ([]waitingRow, error) {
	s, err := p.readSite()
	if err != nil {
		return nil, err
	}
	policies := policy.Open(p.state)
	rows := []waitingRow{}
	for _, a := range s.Appliances {
		state, err := upgrade.Read(p.state, policies, a.Name)
		if err != nil {
			return nil, err
		}
		for _, w := range state.Waiting {
			rows = append(rows, waitingRow{
				ID: w.ID, Appliance: a.Name, First: stamp(w.First.Wall), Last: stamp(w.Last.Wall), Count: w.Count,
				Place: placeOf(w), Asks: w.Asks,
			})
		}
	}
	return rows, nil
}

func placeOf(w policy.Waiting) string {
	if w.Network.Name == "" {
		return ""
	}
	if w.Endpoint == "" {
		return w.Network.String()
	}
	return w.Endpoint + " in " + w.Network.String()
}

// find turns what a person typed, an appliance's name or the id of a waiting
// request, into both. The id is "" where a name was typed.
func (d *desk) find(arg string) (name, id string, err error) {
	if _, ok := d.site.Appliance(arg); ok {
		return arg, "", nil
	}
	for _, a := range d.site.Appliances {
		s, err := d.book.Policy.Read(a.Name)
		if err != nil {
			return "", "", err
		}
		for _, w := range s.Waiting {
			if w.ID == arg {
				return a.Name, arg, nil
			}
		}
	}
	return "", "", hint.Exit(hint.ExitUsage, hint.Because(fmt.Errorf("%q is neither an appliance nor a request that waits", arg), "farkeep-keyserver waiting lists them"))
}

func newApproveCmd(env *Env, where *places) *cobra.Command {
	var reason string
	cmd := &cobra.Command{
		Use:   "approve NAME|ID",
		Short: "Give a waiting appliance its key, once",
		Long: fmt.Sprintf(`Let exactly one key through: the appliance's next request that is like the one that
waits, from the same place and with the same token, within %.0f hours. The new place is then
known, and the token is new. NAME will do where one request of it waits. Other key
servers are not told: each asks for itself.

Ask yourself before: is it you, or somebody you trust, who moved or replaced it?`, policy.ApprovalTime.Hours()),
		Example: `  farkeep-keyserver approve attic --reason "moved to the new flat, I asked them"`,
		Args:    usage.Args(cobra.ExactArgs(1)),
		RunE: func(_ *cobra.Command, args []string) error {
			return decideWaiting(env, where, args[0], reason, func(d *desk, o orders.Order, id string) error {
				if err := d.book.Approve(o, id); err != nil {
					return err
				}
				d.say("%s gets its key when it next asks; it asks again within minutes", o.Appliance)
				d.elsewhere("approve")
				return nil
			})
		},
	}
	cmd.Flags().StringVar(&reason, "reason", "", "why; it is on record")
	return cmd
}

func newDenyCmd(env *Env, where *places) *cobra.Command {
	var reason string
	cmd := &cobra.Command{
		Use:   "deny NAME|ID",
		Short: "Drop a waiting request",
		Long: `Drop a waiting request, and an approval of it. The appliance is not told, and waits
anew when it asks again: if it is not where it should be, revoke it.`,
		Example: `  farkeep-keyserver deny k3f9ab --reason "nobody is there"`,
		Args:    usage.Args(cobra.ExactArgs(1)),
		RunE: func(_ *cobra.Command, args []string) error {
			return decideWaiting(env, where, args[0], reason, func(d *desk, o orders.Order, id string) error {
				if err := d.book.Deny(o, id); err != nil {
					return err
				}
				d.say("denied; if %s is not where it should be: farkeep-keyserver revoke %s --reason ...", o.Appliance, o.Appliance)
				return nil
			})
		},
	}
	cmd.Flags().StringVar(&reason, "reason", "", "why; it is on record")
	return cmd
}

func decideWaiting(env *Env, where *places, arg, reason string, do func(*desk, orders.Order, string) error) error {
	d, err := openDesk(env, where, reason)
	if err != nil {
		return err
	}
	name, id, err := d.find(arg)
	if err == nil {
		err = d.carryOver()
	}
	if err != nil {
		return err
	}
	return do(d, d.order(name, reason), id)
}

func newExpectCmd(env *Env, where *places) *cobra.Command {
	var reason, until string
	cmd := &cobra.Command{
		Use:   "expect NAME",
		Short: "Approve one move of an appliance beforehand",
		Long: `Let the appliance come back once from another place, after a silence or with a token
that does not match, until the given time. Use it before the appliance travels.`,
		Example: `  farkeep-keyserver expect attic --until 2026-12-24 --reason "goes to my sister"
  farkeep-keyserver expect attic --until 3d --reason "new flat"`,
		Args: usage.Args(cobra.ExactArgs(1)),
		RunE: func(_ *cobra.Command, args []string) error {
			end, err := parseUntil(until, env.Now())
			if err != nil {
				return err
			}
			d, err := openDesk(env, where, reason)
			if err != nil {
				return err
			}
			if _, err := known(d.site, args[0]); err != nil {
				return err
			}
			if err := d.carryOver(); err != nil {
				return err
			}
			if err := d.book.Expect(d.order(args[0], reason), end); err != nil {
				return err
			}
			d.say("%s may come from anywhere, once, until %s", args[0], stamp(end))
			d.elsewhere("expect")
			return nil
		},
	}
	cmd.Flags().StringVar(&reason, "reason", "", "why; it is on record")
	cmd.Flags().StringVar(&until, "until", "", `a day ("2026-12-24", all of it), a time ("2026-12-24T18:00"), both in this machine's time zone, or a span from now ("3d")`)
	return cmd
}

// parseUntil reads a day, a time or a span.
func parseUntil(text string, now time.Time) (time.Time, error) {
	zone := now.Location()
	if day, err := time.ParseInLocation(time.DateOnly, text, zone); err == nil {
		return day.AddDate(0, 0, 1), nil
	}
	for _, layout := range []string{time.RFC3339, "2006-01-02T15:04", "2006-01-02 15:04"} {
		if t, err := time.ParseInLocation(layout, text, zone); err == nil {
			return t, nil
		}
	}
	var d settings.Duration
	if err := d.UnmarshalText([]byte(text)); err == nil && d > 0 {
		return now.Add(d.Std()), nil
	}
	return time.Time{}, usage.Errorf("--until: %q is neither a day (2026-12-24) nor a time (2026-12-24T18:00) nor a span (3d)", text)
}
