package main

import (
	"encoding/json"
	"fmt"
	"text/tabwriter"
	"time"

	"farkeep/keyserver/keystore"
	"farkeep/keyserver/policy"
	"farkeep/shared/usage"

	"github.com/spf13/cobra"
)

// row is what list says of one appliance; --json prints it as it is.
type row struct {
	Appliance string `json:"appliance"`
	UUID      string `json:"luks_uuid"`
	Key       string `json:"key"`   // "stored", "missing", or why it would not be given out
	State     string `json:"state"` // "enabled", "revoked", "new"
	Reason    string `json:"reason,omitempty"`
	Since     string `json:"since,omitempty"`
	LastKey   string `json:"last_key,omitempty"`
}

func newListCmd(env *Env, where *places) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the appliances, their state and whether their key is here",
		Long:  "List the appliances of the site. No key is ever printed.",
		Example: `  farkeep-keyserver list
  farkeep-keyserver list --json`,
		Args: usage.Args(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			rows, unclaimed, err := where.rows()
			if err != nil {
				return err
			}
			if asJSON {
				enc := json.NewEncoder(env.Stdout)
				enc.SetIndent("", "  ")
				return enc.Encode(rows)
			}
			t := tabwriter.NewWriter(env.Stdout, 0, 0, 2, ' ', 0)
			fmt.Fprintln(t, "APPLIANCE\tSTATE\tSINCE\tKEY\tLAST KEY\tDISK\tREASON")
			for _, r := range rows {
				fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", r.Appliance, r.State, dash(r.Since), r.Key, dash(r.LastKey), dash(r.UUID), dash(r.Reason))
			}
			if err := t.Flush(); err != nil {
				return err
			}
			for _, e := range unclaimed {
				fmt.Fprintf(env.Stderr, "%s: there is a key of %s, and no appliance has that disk\n", program, e.UUID)
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func stamp(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}

// rows are the appliances in the site's order; unclaimed are keys of no appliance.
func (p *places) rows() (rows []row, unclaimed []keystore.Entry, err error) {
	s, err := p.readSite()
	if err != nil {
		return nil, nil, err
	}
	keys, err := p.openKeys()
	if err != nil {
		return nil, nil, err
	}
	policies := policy.Open(p.state)
	entries, _, err := keys.List()
	if err != nil {
		return nil, nil, err
	}
	stored := map[string]keystore.Entry{}
	for _, e := range entries {
		stored[e.UUID] = e
	}
	for _, a := range s.Appliances {
		r := row{Appliance: a.Name, UUID: a.LUKS, State: "new", Key: "missing"}
		if e, ok := stored[a.LUKS]; ok {
			r.Key = "stored"
			if e.Err != nil {
				r.Key = e.Err.Error()
			}
			delete(stored, a.LUKS)
		}
		standing, err := policies.Standing(a.Name)
		if err != nil {
			return nil, nil, err
		}
		if standing != nil {
			r.State, r.Reason, r.Since = standing.State, standing.Reason, stamp(standing.Since)
		}
		history, err := policies.History(a.Name)
		if err != nil {
			return nil, nil, err
		}
		r.LastKey = stamp(history.LastKey)
		rows = append(rows, r)
	}
	for _, e := range entries {
		if _, left := stored[e.UUID]; left {
			unclaimed = append(unclaimed, e)
		}
	}
	return rows, unclaimed, nil
}
