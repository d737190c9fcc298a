package main

import (
	"fmt"
	"strings"

	"farkeep/keyserver/alert"
	"farkeep/keyserver/audit"
	"farkeep/keyserver/keystore"
	"farkeep/keyserver/moment"
	"farkeep/keyserver/place"
	"farkeep/keyserver/policy"
	"farkeep/shared/hint"
	"farkeep/shared/site"
	"farkeep/shared/usage"

	"github.com/spf13/cobra"
)

func newCheckCmd(env *Env, where *places) *cobra.Command {
	var tryMail bool
	var id identityFlags
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Check the configuration and the files, without serving",
		Long: `Check site.toml, the host key, the keys and their modes, the state and the chain
of the audit log. Nothing is changed, and nothing is sent but, with --mail, a test mail,
and to the other key servers, where they say where appliances are, that question.`,
		Example: `  farkeep-keyserver check
  farkeep-keyserver check --mail
  farkeep-keyserver check --identity /root/keys.identity`,
		Args: usage.Args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			found := 0
			complain := func(err error) {
				found++
				fmt.Fprintf(env.Stdout, "problem: %v\n", err)
				if next := hint.Of(err); next != "" {
					fmt.Fprintf(env.Stdout, "  hint: %s\n", next)
				}
			}
			note := func(format string, args ...any) { fmt.Fprintf(env.Stdout, "note: "+format+"\n", args...) }
			s, err := where.readSite()
			if err != nil {
				return err
			}
			fmt.Fprintf(env.Stdout, "site: %s, %d appliances\n", s.Name, len(s.Appliances))
			name := s.Home.Name
			others := false
			if _, me, err := where.self(s); err != nil {
				complain(err)
			} else {
				name, s, others = me.Name, s.SeenBy(*me), me.Place == site.PlaceOthers
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
			if err := checkSealed(env, where, &id); err != nil {
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
			for _, r := range rows {
				if r.Waiting > 0 {
					note("%s waits for a person: farkeep-keyserver waiting", r.Appliance)
				}
				if r.State == policy.Revoked && r.Dark == "" {
					note("%s is revoked and has not said that its disk is dark", r.Appliance)
				}
			}
			switch mail, err := where.mail(s); {
			case s.Mail.Server == "" && !tryMail:
				note("no mails are sent: %v", err)
			case err != nil:
				complain(err)
			case tryMail:
				if err := alert.Try(cmd.Context(), mail, name, env.Now()); err != nil {
					complain(hint.Because(err, "compare [mail] in site.toml, and mail_password, with what your provider says"))
				} else {
					fmt.Fprintf(env.Stdout, "mail: %s took a test mail to %s\n", mail.Server, strings.Join(mail.To, ", "))
				}
			default:
				fmt.Fprintf(env.Stdout, "mail: by %s to %s\n", mail.Server, strings.Join(mail.To, ", "))
			}
			reader := place.NewReader(where.endpoints, func() (moment.Moment, error) { return moment.Now(env.Now) })
			text, err := "", error(nil)
			if others {
				text, err = where.checkOthers(cmd.Context(), env, s)
			} else {
				text, err = checkEndpoints(s, reader)
			}
			if err != nil {
				complain(err)
			} else if text != "" {
				fmt.Fprintln(env.Stdout, text)
			}
			for _, e := range unclaimed {
				note("there is a key of %s, and no appliance has that disk", e.UUID)
			}
			if found > 0 {
				return hint.Exit(hint.ExitFailure, fmt.Errorf("problems found: %d", found))
			}
			return nil
		},
	}
	where.registerEndpoints(cmd)
	cmd.Flags().BoolVar(&tryMail, "mail", false, "send a test mail and say whether the provider takes it")
	id.register(cmd)
	return cmd
}
