package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"farkeep/pusher/progress"
	"farkeep/pusher/repository"
	"farkeep/pusher/target"
	"farkeep/shared/hint"
	"farkeep/shared/pushwire"
	"farkeep/shared/usage"
)

// statusWait bounds how long a target may take to answer.
const statusWait = 20 * time.Second

// siteStatus is what status says, as JSON.
type siteStatus struct {
	Site         string              `json:"site"`
	Host         string              `json:"host"`
	Repositories []repositoryStatus  `json:"repositories"`
	Problems     []problemStatus     `json:"problems"`
	Beside       []repository.Beside `json:"beside"` // neither mirrored nor excluded
	Targets      []targetStatus      `json:"targets"`
	Bundle       *bundleStatus       `json:"bundle,omitempty"`
}

type repositoryStatus struct {
	repository.Repository
	// Freshness is how recent the newest archive is known to be. A repository that
	// changes is no evidence: compaction changes it too.
	Freshness string                     `json:"freshness"`
	Pushed    map[string]repository.Push `json:"pushed"` // by target
}

type problemStatus struct {
	Name  string `json:"name"`
	Error string `json:"error"`
	Hint  string `json:"hint,omitempty"`
}

type targetStatus struct {
	Name   string           `json:"name"`
	Status *pushwire.Status `json:"status,omitempty"`
	Error  string           `json:"error,omitempty"`
	Hint   string           `json:"hint,omitempty"`
}

func newStatusCmd(env *Env, at *places) *cobra.Command {
	var asJSON, travel bool
	cmd := &cobra.Command{
		Use:   "status [APPLIANCE...]",
		Short: "Say how repositories and targets are",
		Long: `status lists the repositories that are mirrored, when each was last pushed where,
what lies beside them and is not mirrored, and what every target says of itself.

Whether a repository has a recent archive is "unknown": that it changed proves
nothing, and its newest archive cannot be read without a passphrase.

With --ready-to-travel it is the list before the drive instead: what must be in order
before an appliance is carried away, each line ok or not, and what to do. Ask while the
appliance hangs on another network than home's, a phone's hotspot for instance.`,
		Example: `  farkeep-pusher status
  farkeep-pusher status --ready-to-travel attic
  farkeep-pusher status --json | jq '.targets[].status.disk'`,
		Args: usage.Args(cobra.ArbitraryArgs),
		RunE: func(cmd *cobra.Command, args []string) error {
			if travel {
				return readyToTravel(cmd.Context(), env, at, args, asJSON)
			}
			if len(args) > 0 {
				return usage.Errorf("appliances are named with --ready-to-travel only: status is about all of them")
			}
			me, err := at.readSelf()
			if err != nil {
				return err
			}
			memory := at.memory()
			found, err := find(me, memory)
			if err != nil {
				return err
			}
			st := siteStatus{Site: me.site.Name, Host: me.name, Beside: found.Beside}
			for _, r := range found.Repositories {
				was, _, err := memory.Get(r.Name)
				if err != nil {
					return err
				}
				st.Repositories = append(st.Repositories, repositoryStatus{Repository: r, Freshness: "unknown", Pushed: was.Pushed})
			}
			for _, p := range found.Problems {
				st.Problems = append(st.Problems, problemStatus{p.Name, p.Err.Error(), hint.Of(p.Err)})
			}
			targets, err := at.targets(me, nil, memory, env, at.logger(env.Stderr))
			if err != nil {
				return err
			}
			st.Targets = ask(cmd.Context(), targets)
			st.Bundle = bundleOf(me.site, st.Targets, env.Now())
			if asJSON {
				enc := json.NewEncoder(env.Stdout)
				enc.SetIndent("", "\t")
				err = enc.Encode(st)
			} else {
				err = st.show(env)
			}
			if err != nil {
				return err
			}
			return st.verdict()
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().BoolVar(&travel, "ready-to-travel", false, "the list before the drive")
	return cmd
}

// ask asks all targets at the same time.
func ask(ctx context.Context, targets []target.Target) []targetStatus {
	ctx, cancel := context.WithTimeout(ctx, statusWait)
	defer cancel()
	answers := make([]targetStatus, len(targets))
	var all sync.WaitGroup
	for i, t := range targets {
		all.Go(func() {
			defer t.Close()
			answers[i].Name = t.Name()
			status, err := t.Status(ctx)
			if err != nil {
				answers[i].Error, answers[i].Hint = err.Error(), hint.Of(err)
				return
			}
			answers[i].Status = status
		})
	}
	all.Wait()
	return answers
}

func (s *siteStatus) show(env *Env) error {
	now := env.Now()
	w := tabwriter.NewWriter(env.Stdout, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "REPOSITORY\tTARGET\tLAST PUSH\tGENERATION\tNEWEST ARCHIVE\tPATH")
	for _, r := range s.Repositories {
		shown := false
		for _, t := range s.Targets {
			if p, ok := r.Pushed[t.Name]; ok {
				shown = true
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", r.Name, t.Name, ago(now, p.At), p.Generation, r.Freshness, r.Path)
			}
		}
		if !shown {
			fmt.Fprintf(w, "%s\t-\tnever\t-\t%s\t%s\n", r.Name, r.Freshness, r.Path)
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for _, p := range s.Problems {
		fmt.Fprintf(env.Stdout, "\nPROBLEM  %s: %s\n", p.Name, p.Error)
		if p.Hint != "" {
			fmt.Fprintf(env.Stdout, "         %s\n", p.Hint)
		}
	}
	if len(s.Beside) > 0 {
		fmt.Fprintln(env.Stdout, "\nNot mirrored, and not excluded:")
		for _, b := range s.Beside {
			fmt.Fprintf(env.Stdout, "  %s (%s)\n", b.Path, b.Why)
		}
	}
	for _, t := range s.Targets {
		fmt.Fprintf(env.Stdout, "\n%s\n", t.Name)
		t.show(env, now)
	}
	s.Bundle.show(env.Stdout, now)
	return nil
}

func (t *targetStatus) show(env *Env, now time.Time) {
	if t.Status == nil {
		fmt.Fprintf(env.Stdout, "  UNKNOWN: %s\n", t.Error)
		if t.Hint != "" {
			fmt.Fprintf(env.Stdout, "  %s\n", t.Hint)
		}
		return
	}
	s := t.Status
	d := s.Disk
	fmt.Fprintf(env.Stdout, "  disk %s, exposed for %d min", d.State, d.ExposureMinutes)
	if d.TotalBytes > 0 {
		fmt.Fprintf(env.Stdout, ", %s of %s free", progress.Bytes(d.FreeBytes), progress.Bytes(d.TotalBytes))
	}
	fmt.Fprintln(env.Stdout)
	if d.Error != "" {
		fmt.Fprintf(env.Stdout, "  disk error: %s\n", d.Error)
	}
	if !d.LeaseUntil.IsZero() {
		fmt.Fprintf(env.Stdout, "  open until %s unless a key server renews its lease\n", d.LeaseUntil.UTC().Format(time.DateTime))
	}
	if !s.ClockSet {
		fmt.Fprintln(env.Stdout, "  its clock is not set")
	}
	for _, h := range s.Heartbeats {
		fmt.Fprintf(env.Stdout, "  heartbeat of %s %s\n", h.Host, ago(s.Time, h.ReceivedAt))
	}
	for _, r := range s.Repositories {
		suspect := ""
		if r.Suspect {
			suspect = ", SUSPECT"
		}
		fmt.Fprintf(env.Stdout, "  %s: %d generations, newest %s%s\n", r.Name, r.Generations, r.Newest, suspect)
	}
	if s.MailQueued > 0 {
		fmt.Fprintf(env.Stdout, "  %d mails wait: %s\n", s.MailQueued, orDash(s.MailError))
	}
	for _, a := range s.Alarms {
		fmt.Fprintf(env.Stdout, "  ALARM %s %s, since %s\n", a.Kind, a.Subject, a.Since.Format(time.DateTime))
	}
	for _, text := range s.Degraded {
		fmt.Fprintf(env.Stdout, "  degraded: %s\n", text)
	}
}

// ago says how long ago at was.
func ago(now, at time.Time) string {
	d := now.Sub(at)
	switch {
	case at.IsZero():
		return "never"
	case d < -time.Minute:
		return "in the future"
	case d < time.Minute:
		return "just now"
	case d < time.Hour:
		return fmt.Sprintf("%d min ago", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h ago", int(d.Hours()))
	default:
		return fmt.Sprintf("%d days ago", int(d.Hours()/24))
	}
}

// verdict makes the exit code say whether everything could be looked at and is
// in order.
func (s *siteStatus) verdict() error {
	silent, alarms := 0, 0
	for _, t := range s.Targets {
		if t.Status == nil {
			silent++
		} else {
			alarms += len(t.Status.Alarms)
		}
	}
	if len(s.Problems) == 0 && silent == 0 && alarms == 0 {
		if s.Bundle != nil && len(s.Bundle.Stale) > 0 {
			return hint.Exit(hint.ExitPartial, errors.New("the recovery bundle does not fit the disks"))
		}
		return nil
	}
	return hint.Exit(hint.ExitPartial, fmt.Errorf("%d repositories have problems, %d targets did not answer, %d alarms are on", len(s.Problems), silent, alarms))
}
