package main

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"farkeep/pusher/borglock"
	"farkeep/pusher/gentle"
	"farkeep/pusher/progress"
	"farkeep/pusher/push"
	"farkeep/pusher/repository"
	"farkeep/shared/hint"
	"farkeep/shared/site"
	"farkeep/shared/usage"
)

func newPushCmd(env *Env, at *places) *cobra.Command {
	var (
		targets, repositories []string
		dryRun, asJSON        bool
		priority              string
		giveUp                time.Duration
		rate                  int64
	)
	cmd := &cobra.Command{
		Use:   "push",
		Short: "Bring every repository to every target",
		Long: `push freezes each repository under Borg's lock for a moment, uploads what a
target does not have yet, and has the target commit it as a new generation. An
unchanged repository costs one exchange. What a cut line interrupts goes on where
it stopped, in this run or the next.

When everything has arrived at a target it gets the heartbeat that keeps its dead
man's switch quiet.`,
		Example: `  # everything, everywhere; what the timer runs
  farkeep-pusher push

  # fill a disk at home before it travels
  farkeep-pusher push --target travel-disk

  # what would be pushed
  farkeep-pusher push --repository photos --dry-run

  # for programs: bytes sent and spared, and what the time went into
  farkeep-pusher push --json`,
		Args: usage.Args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			ctx := cmd.Context()
			if rate < 0 {
				return usage.Errorf("--rate-limit %d: a rate cannot be negative", rate)
			}
			if priority != "idle" && priority != "normal" {
				return usage.Errorf("--priority %q is neither idle nor normal", priority)
			}
			me, err := at.readSelf()
			if err != nil {
				return err
			}
			s := me.site
			state, err := push.Open(at.state, env.Now())
			if err != nil {
				return err
			}
			defer state.Close()
			memory := at.memory()
			// A board without a terminal logs, and needs no tidying.
			var screen io.Writer
			if env.Terminal != nil {
				screen = env.Stderr
			}
			board := progress.New(screen, env.Terminal, at.logger(env.Stderr), env.Now)
			log := at.logger(board.Writer(env.Stderr))

			found, err := find(me, memory)
			if err != nil {
				return err
			}
			whole := len(repositories) == 0
			if !whole {
				if found, err = only(found, repositories); err != nil {
					return err
				}
			}
			for _, p := range found.Problems {
				log.Error("not pushed", "repository", p.Name, "err", p.Err, "hint", hint.Of(p.Err))
			}
			for _, b := range found.Beside {
				log.Debug("not mirrored", "path", b.Path, "why", b.Why)
			}
			if len(found.Repositories) == 0 && len(found.Problems) == 0 {
				return hint.Exit(hint.ExitUsage, hint.Because(fmt.Errorf("%s names no repository that is there", at.site), `"farkeep-image site add repository" adds one`))
			}
			if dryRun {
				return showPlan(env, found)
			}
			all, err := at.targets(me, targets, memory, env, log)
			if err != nil {
				return err
			}
			for _, t := range all {
				defer t.Close()
			}
			if priority == "idle" {
				if err := gentle.Idle(); err != nil {
					log.Warn("running at normal priority", "err", err)
				}
			}
			host, err := borglock.HostID(ctx, env.Getenv)
			if err != nil {
				return err
			}
			p := &push.Push{
				Host: me.name, Repositories: found.Repositories, Problems: found.Problems, Whole: whole, Targets: all,
				State: at.state, Memory: memory,
				Lock: borglock.Options{HostID: host, Wait: time.Duration(s.Push.LockWait)},
				Rate: rateOf(cmd, s, rate), GiveUp: giveUp, Reread: s.Push.RereadEvery.Std(), Now: env.Now, Log: log, Board: board,
			}
			board.Start()
			report := p.Run(ctx)
			board.Stop()
			show := showReport
			if asJSON {
				show = showReportJSON
			}
			if err := show(env, report); err != nil {
				return err
			}
			return report.Err()
		},
	}
	f := cmd.Flags()
	f.StringSliceVar(&targets, "target", nil, "only this target; may be repeated (default all)")
	f.StringSliceVar(&repositories, "repository", nil, "only this repository; may be repeated; no heartbeat is sent then (default all)")
	f.BoolVar(&dryRun, "dry-run", false, "say what would be pushed, touch nothing")
	f.BoolVar(&asJSON, "json", false, "print the result as JSON")
	f.StringVar(&priority, "priority", "idle", "idle: stay behind every other process; normal")
	f.Int64Var(&rate, "rate-limit", 0, "bytes per second for each target; 0: none (default what the site says, for appliances)")
	f.DurationVar(&giveUp, "give-up", 30*time.Minute, "give a target up when nothing has moved for so long")
	cmd.MarkFlagsMutuallyExclusive("dry-run", "json")
	return cmd
}

// rateOf is the limit for each target: the flag's, or else the site's, which is
// about the line to appliances and not about local folders.
func rateOf(cmd *cobra.Command, s *site.Site, flag int64) func(string, time.Time) int64 {
	return func(target string, at time.Time) int64 {
		if cmd.Flags().Changed("rate-limit") {
			return flag
		}
		if _, far := s.Appliance(target); far {
			return s.Push.RateAt(at)
		}
		return 0
	}
}

// only keeps the repositories with these names, and their problems.
func only(found repository.Found, names []string) (repository.Found, error) {
	kept := repository.Found{}
	for _, name := range names {
		known := false
		for _, r := range found.Repositories {
			if r.Name == name {
				kept.Repositories, known = append(kept.Repositories, r), true
			}
		}
		for _, p := range found.Problems {
			if p.Name == name {
				kept.Problems, known = append(kept.Problems, p), true
			}
		}
		if !known {
			var all []string
			for _, r := range found.Repositories {
				all = append(all, r.Name)
			}
			slices.Sort(all)
			return kept, hint.Exit(hint.ExitUsage, hint.Because(fmt.Errorf("there is no repository %q", name), "there are %s", strings.Join(all, ", ")))
		}
	}
	return kept, nil
}

func showPlan(env *Env, found repository.Found) error {
	w := tabwriter.NewWriter(env.Stdout, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "REPOSITORY\tKIND\tPATH")
	for _, r := range found.Repositories {
		fmt.Fprintf(w, "%s\t%s\t%s\n", r.Name, r.What(), r.Path)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	return problems(found.Problems, len(found.Repositories))
}

// problems turns what was found wrong into the exit code.
func problems(p []repository.Problem, good int) error {
	switch {
	case len(p) == 0:
		return nil
	case len(p) == 1 && good == 0:
		return fmt.Errorf("%s: %w", p[0].Name, p[0].Err)
	case good == 0:
		return fmt.Errorf("%d repositories cannot be pushed", len(p))
	default:
		return hint.Exit(hint.ExitPartial, fmt.Errorf("%d of %d repositories cannot be pushed", len(p), len(p)+good))
	}
}

func showReport(env *Env, r *push.Report) error {
	w := tabwriter.NewWriter(env.Stdout, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "TARGET\tREPOSITORY\tRESULT\tGENERATION\tSENT\tSAVED\tTIME")
	for _, o := range r.Outcomes {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", o.Target, o.Repository, result(o), orDash(o.Generation), progress.Bytes(o.Bytes), progress.Bytes(o.Copied+o.Spared), o.Took.Round(100*time.Millisecond))
	}
	for _, p := range r.Problems {
		fmt.Fprintf(w, "-\t%s\tFAILED\t-\t-\t-\t-\n", p.Name)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	tell(env, r)
	return nil
}

// result is how a push ended, in a word or two.
func result(o push.Outcome) string {
	switch {
	case o.Err != nil:
		return "FAILED"
	case o.Suspect:
		return "new, suspect"
	case o.New:
		return "new"
	}
	return "unchanged"
}

// tell says what is in no table: what was slow, and what failed.
func tell(env *Env, r *push.Report) {
	for _, o := range r.Outcomes {
		if o.Slow != "" {
			fmt.Fprintf(env.Stderr, "%s: %s to %s was slow: %s\n", program, o.Repository, o.Target, o.Slow)
		}
		if o.Err != nil {
			fmt.Fprintf(env.Stderr, "%s: %s to %s: %v\n", program, o.Repository, o.Target, o.Err)
			if h := hint.Of(o.Err); h != "" {
				fmt.Fprintf(env.Stderr, "%s: hint: %s\n", program, h)
			}
		}
	}
	for _, b := range r.Beats {
		switch {
		case b.Err != nil:
			fmt.Fprintf(env.Stderr, "%s: heartbeat to %s: %v\n", program, b.Target, b.Err)
		case !b.Sent:
			fmt.Fprintf(env.Stderr, "%s: no heartbeat to %s: %s\n", program, b.Target, b.Why)
		}
	}
}

// reportJSON is what push --json prints.
type reportJSON struct {
	Pushes     []pushJSON    `json:"pushes"`
	Heartbeats []beatJSON    `json:"heartbeats"`
	Problems   []problemJSON `json:"problems,omitempty"` // repositories that cannot be pushed
}

type pushJSON struct {
	Target     string             `json:"target"`
	Repository string             `json:"repository"`
	Result     string             `json:"result"` // new; new, suspect; unchanged; FAILED
	Generation string             `json:"generation,omitempty"`
	Files      int64              `json:"files"`          // uploaded
	Sent       int64              `json:"sent"`           // bytes of them that crossed the line
	Copied     int64              `json:"copied"`         // bytes that the target took from what it held
	Spared     int64              `json:"spared"`         // bytes that compression spared
	Seconds    float64            `json:"seconds"`        // altogether
	Spent      map[string]float64 `json:"spent"`          // seconds on: lock, source, work, limit, line, store, away
	Slow       string             `json:"slow,omitempty"` // why it took long
	Error      string             `json:"error,omitempty"`
	Hint       string             `json:"hint,omitempty"`
}

type beatJSON struct {
	Target string `json:"target"`
	Sent   bool   `json:"sent"`
	Why    string `json:"why,omitempty"` // not sent, though nothing failed
	Error  string `json:"error,omitempty"`
}

type problemJSON struct {
	Repository string `json:"repository"`
	Error      string `json:"error"`
}

func showReportJSON(env *Env, r *push.Report) error {
	text := func(err error) string {
		if err == nil {
			return ""
		}
		return err.Error()
	}
	out := reportJSON{Pushes: []pushJSON{}, Heartbeats: []beatJSON{}}
	for _, o := range r.Outcomes {
		p := pushJSON{
			Target: o.Target, Repository: o.Repository, Result: result(o), Generation: o.Generation, Files: o.Files,
			Sent: o.Bytes, Copied: o.Copied, Spared: o.Spared, Seconds: o.Took.Seconds(), Slow: o.Slow, Error: text(o.Err),
			Spent: map[string]float64{
				"lock": o.Spent.Lock.Seconds(), "source": o.Spent.Source.Seconds(), "work": o.Spent.Work.Seconds(), "limit": o.Spent.Limit.Seconds(),
				"line": o.Spent.Line.Seconds(), "store": o.Spent.Store.Seconds(), "away": o.Spent.Away.Seconds(),
			},
		}
		if o.Err != nil {
			p.Hint = hint.Of(o.Err)
		}
		out.Pushes = append(out.Pushes, p)
	}
	for _, b := range r.Beats {
		out.Heartbeats = append(out.Heartbeats, beatJSON{Target: b.Target, Sent: b.Sent, Why: b.Why, Error: text(b.Err)})
	}
	for _, p := range r.Problems {
		out.Problems = append(out.Problems, problemJSON{p.Name, text(p.Err)})
	}
	enc := json.NewEncoder(env.Stdout)
	enc.SetIndent("", "  ")
	if err := enc.Encode(out); err != nil {
		return err
	}
	tell(env, r)
	return nil
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
