package main

import (
	"fmt"
	"regexp"
	"strings"

	"farkeep/keyserver/audit"
	"farkeep/shared/hint"
	"farkeep/shared/usage"

	"github.com/spf13/cobra"
)

func newAuditCmd(env *Env, where *places) *cobra.Command {
	var verify, asJSON bool
	var expect []string
	var appliance string
	cmd := &cobra.Command{
		Use:   "audit",
		Short: "Print the audit log, or verify it",
		Long: `Print every decision, oldest first. With --verify, check the chain instead: a
record that was removed, changed or put in is found. That somebody who may write to
the state folder wrote the rest of it anew shows only against a head that was noted on
another machine: serve writes the head after every record to its own log; name one
with --expect.`,
		Example: `  farkeep-keyserver audit
  farkeep-keyserver audit --appliance attic
  farkeep-keyserver audit --json
  farkeep-keyserver audit --verify`,
		Args: usage.Args(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			switch {
			case verify && (asJSON || appliance != ""):
				return usage.Errorf("--verify prints no records: leave out --json and --appliance")
			case len(expect) > 0 && !verify:
				return usage.Errorf("--expect goes with --verify")
			}
			for _, h := range expect {
				if !headPattern.MatchString(h) {
					return usage.Errorf("--expect: %q is not a head: 64 hexadecimal digits", h)
				}
			}
			if verify {
				return verifyAudit(env, where.state, expect)
			}
			return audit.Read(where.state, func(line []byte, r audit.Record) error {
				if appliance != "" && r.Appliance != appliance {
					return nil
				}
				if asJSON {
					_, err := fmt.Fprintf(env.Stdout, "%s\n", line)
					return err
				}
				_, err := fmt.Fprintln(env.Stdout, readable(r))
				return err
			})
		},
	}
	cmd.Flags().BoolVar(&verify, "verify", false, "check the chain of hashes")
	cmd.Flags().StringVar(&appliance, "appliance", "", "print the records about this one only")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the records as they are stored")
	cmd.Flags().StringArrayVar(&expect, "expect", nil, "with --verify: a head that must be in the chain; repeat for several")
	return cmd
}

var headPattern = regexp.MustCompile(`^[0-9a-f]{64}$`)

func verifyAudit(env *Env, dir string, expect []string) error {
	s, err := audit.Verify(dir, expect...)
	if err != nil {
		return hint.Because(err, "compare with a copy of the log, and with the heads in the journal (journalctl -u farkeep-keyserver)")
	}
	fmt.Fprintf(env.Stdout, "%d records, the chain is whole\n", s.Records)
	if s.First > 1 {
		fmt.Fprintf(env.Stdout, "it begins at record %d: older files were removed\n", s.First)
	}
	if s.Records > 0 && !s.Noted {
		fmt.Fprintln(env.Stdout, "its head is not noted beside it (audit.head): a change of its end would not show; the next record notes it")
	}
	if s.Torn > 0 {
		fmt.Fprintf(env.Stdout, "%d lines were cut off, by power cuts or a full disk\n", s.Torn)
	}
	if s.Head != "" {
		fmt.Fprintf(env.Stdout, "head %s\n", s.Head)
	}
	return nil
}

// readable is a record for people. Text that came from a peer or a person is
// quoted by %q, so that it cannot play with the terminal.
func readable(r audit.Record) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s %s", stamp(r.Time), r.Event, r.Decision)
	for _, part := range []struct{ name, value string }{
		{"", r.Appliance}, {"reason", r.Reason}, {"disk", r.UUID}, {"from", r.Remote}, {"place", r.Place},
		{"token", r.Token}, {"says", r.Claims}, {"waiting", r.Waiting}, {"key", r.Identity}, {"by", r.By},
	} {
		switch {
		case part.value == "":
		case part.name == "":
			fmt.Fprintf(&b, " %s", strings.Trim(fmt.Sprintf("%q", part.value), `"`))
		default:
			fmt.Fprintf(&b, " %s=%q", part.name, part.value)
		}
	}
	return b.String()
}
