package main

import (
	"encoding/json"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"farkeep/pusher/progress"
	"farkeep/shared/hint"
	"farkeep/shared/pushwire"
	"farkeep/shared/usage"
)

// listed is a generation of one target.
type listed struct {
	Target string `json:"target"`
	pushwire.Generation
}

func newGenerationsCmd(env *Env, at *places) *cobra.Command {
	r := &reading{listOnly: true}
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "generations [TARGET] [REPOSITORY]",
		Short: "List what the targets keep",
		Long: `generations lists the generations of every target, or of one: number, when it was
complete (UTC), size, how much of it the generation before had not, what is
thought of it (good, suspect, accepted, rejected), what it is kept as, and when it
will go if nothing new comes.

TARGET is an appliance or a folder of the site, or the path of a folder with
generations in it (with a slash). An appliance opens its disk for it.

With the push key it shows the repositories of that key; with the restore key all.`,
		Example: `  farkeep-pusher generations
  farkeep-pusher generations vault photos
  farkeep-pusher generations vault --json | jq '.[] | select(.standing == "suspect")'`,
		Args: usage.Args(cobra.MaximumNArgs(2)),
		RunE: func(cmd *cobra.Command, args []string) error {
			var names []string
			repository := ""
			if len(args) > 0 {
				names = args[:1]
			}
			if len(args) > 1 {
				repository = args[1]
			}
			all, err := at.sources(r, names, env, at.logger(env.Stderr))
			if err != nil {
				return err
			}
			list := []listed{}
			var failed error
			silent := 0
			for _, s := range all {
				defer s.Close()
				err := s.Wake(cmd.Context())
				var own []pushwire.Generation
				if err == nil {
					own, err = s.Generations(cmd.Context(), repository)
				}
				for _, g := range own {
					list = append(list, listed{s.Name(), g})
				}
				if err != nil {
					silent++
					failed = err
					if len(all) > 1 {
						fmt.Fprintf(env.Stderr, "%s: %v\n", program, err)
					}
				}
			}
			if asJSON {
				enc := json.NewEncoder(env.Stdout)
				enc.SetIndent("", "\t")
				err = enc.Encode(list)
			} else {
				err = showGenerations(env, list)
			}
			if err == nil && silent > 0 {
				err = failed
				if silent < len(all) {
					err = hint.Exit(hint.ExitPartial, fmt.Errorf("%d of %d targets did not answer", silent, len(all)))
				}
			}
			return err
		},
	}
	r.reach(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func showGenerations(env *Env, list []listed) error {
	w := tabwriter.NewWriter(env.Stdout, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "TARGET\tREPOSITORY\tNUMBER\tCOMPLETE (UTC)\tSIZE\tNEW\tSTANDING\tKEPT AS\tGOES")
	var doubts []listed
	for _, g := range list {
		number, _, _ := strings.Cut(g.Name, "-")
		number = strings.TrimLeft(number, "0")
		goes := "-"
		if !g.Goes.IsZero() {
			goes = g.Goes.UTC().Format(time.DateOnly)
		}
		size, added := progress.Bytes(g.Bytes), progress.Bytes(g.NewBytes)
		if g.Digest == "" { // the target itself cannot read it
			size, added = "unreadable", "-"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", g.Target, g.Repository, number,
			g.Committed.UTC().Format("2006-01-02 15:04:05"), size, added, standing(g.Generation), orDash(g.Why), goes)
		if len(g.Reasons) > 0 {
			doubts = append(doubts, g)
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for _, g := range doubts {
		fmt.Fprintf(env.Stdout, "\n%s %s %s is %s:\n", g.Target, g.Repository, g.Name, standing(g.Generation))
		for _, reason := range g.Reasons {
			fmt.Fprintf(env.Stdout, "  %s\n", reason)
		}
	}
	return nil
}
