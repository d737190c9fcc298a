package main

import (
	"encoding/json"
	"fmt"
	"strconv"
	"text/tabwriter"
	"time"

	"farkeep/keyserver/keystore"
	"farkeep/keyserver/policy"
	"farkeep/keyserver/upgrade"
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
	LastSeen  string `json:"last_seen,omitempty"`
	Waiting   int    `json:"waiting,omitempty"` // requests that wait for a person
	Told      string `json:"told,omitempty"`    // revoked: when it was refused first
	Dark      string `json:"dark,omitempty"`    // when it said that its disk is dark
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
			fmt.Fprintln(t, "APPLIANCE\tSTATE\tSINCE\tKEY\tLAST KEY\tLAST SEEN\tWAITING\tDISK\tREASON")
			for _, r := range rows {
				fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", r.Appliance, r.State, dash(r.Since), r.Key, dash(r.LastKey), dash(r.LastSeen), waits(r.Waiting), dash(r.UUID), dash(r.Reason))
			}
			if err := t.Flush(); err != nil {
				return err
			}
			for _, r := range rows {
				if r.Waiting > 0 {
					fmt.Fprintf(env.Stderr, "%s: %s waits for a person: farkeep-keyserver waiting\n", program, r.Appliance)
				}
			}
			if err := where.sayPending(env); err != nil {
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

// sayPending names the key servers that have not taken a revocation yet.
func (p *places) sayPending(env *Env) error {
	s, err := p.readSite()
	if err != nil {
		return err
	}
	others, err := p.others(env, s)
	if err != nil || others == nil {
		return err
	}
	pending, err := others.Pending()
	for _, one := range pending {
		fmt.Fprintf(env.Stderr, "%s: key server %s does not know yet that %s is revoked: serve goes on trying; to be sure, revoke it there\n", program, one.Peer, one.Order.Appliance)
	}
	return err
}

func waits(n int) string {
	if n == 0 {
		return "-"
	}
	return strconv.Itoa(n)
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
		known, err := upgrade.Read(p.state, policies, a.Name)
		if err != nil {
			return nil, nil, err
		}
		if st := known.Standing; st.State != "" {
			r.State, r.Reason, r.Since = st.State, st.Reason, stamp(st.Since)
		}
		r.LastKey, r.LastSeen, r.Waiting = stamp(known.LastKey.Wall), stamp(known.LastSeen.Wall), len(known.Waiting)
		r.Told, r.Dark = stamp(known.Told.Wall), stamp(known.Dark.Wall)
		rows = append(rows, r)
	}
	for _, e := range entries {
		if _, left := stored[e.UUID]; left {
			unclaimed = append(unclaimed, e)
		}
	}
	return rows, unclaimed, nil
}
