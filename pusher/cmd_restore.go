package main

import (
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"farkeep/pusher/progress"
	"farkeep/pusher/repository"
	"farkeep/pusher/restore"
	"farkeep/shared/hint"
	"farkeep/shared/usage"
)

func newRestoreCmd(env *Env, at *places) *cobra.Command {
	r := &reading{}
	var to string
	var giveUp time.Duration
	cmd := &cobra.Command{
		Use:   "restore TARGET REPOSITORY [GENERATION] [PATH...] --to FOLDER",
		Short: "Bring a generation, or a part of it, back",
		Long: `restore fetches a generation into an empty folder: every file with the content,
mode and time that it had at the source, compared with the hash that was taken there.

GENERATION is a number or a name out of "generations", or "latest", the newest
that is neither suspect nor rejected; --at takes a time instead. PATHs are files
and folders as they lie in the repository; without any, everything is restored.

What a cut line or Ctrl-C interrupts goes on where it was: run the same command
again. What is there is read and not fetched again.

Do not let Borg write into the result before you have read "A generation as the
new repository" in docs/recovery.md.

Exit codes: 0 everything is there, 1 failed, 3 some files could not be restored
and are named, 4 the generation is suspect, or the key may not read it, 5 out of reach.`,
		Example: `  farkeep-pusher restore vault photos latest --to /srv/restored/photos
  farkeep-pusher restore vault photos 41 config data/0 --to /tmp/look
  farkeep-pusher restore vault photos --at 2026-05-01 --to /srv/restored/photos
  farkeep-pusher restore /mnt/farkeep photos latest --to /srv/restored/photos`,
		Args: usage.Args(cobra.MinimumNArgs(2)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if to == "" {
				return usage.Flags(cmd, usage.Errorf("--to FOLDER is missing: where shall it go?"))
			}
			generation, paths := r.split(args[2:])
			// A board without a terminal logs, and needs no tidying.
			var screen io.Writer
			if env.Terminal != nil {
				screen = env.Stderr
			}
			board := progress.New(screen, env.Terminal, at.logger(env.Stderr), env.Now)
			log := at.logger(board.Writer(env.Stderr))
			chosen, err := at.find(cmd, r, args[0], args[1], generation, env, log)
			if err != nil {
				return err
			}
			defer chosen.source.Close()
			board.Start()
			report, err := restore.Restore{
				Source: chosen.source, Generation: chosen.generation, Paths: paths, To: to,
				GiveUp: giveUp, Lane: board.Lane(chosen.source.Name()), Log: log,
			}.Run(cmd.Context())
			board.Stop()
			for i, p := range report.Problems {
				if i == 20 {
					fmt.Fprintf(env.Stderr, "%s: and %d more\n", program, report.Bad-int64(i))
					break
				}
				fmt.Fprintf(env.Stderr, "%s: not restored: %q: %v\n", program, p.Path, p.Err)
			}
			if err == nil || hint.Code(err) == hint.ExitPartial {
				fmt.Fprintf(env.Stdout, "%s: generation %s: %d files, %s, of which %s were there; in %s\n", args[1], chosen.generation.Name,
					report.Files, progress.Bytes(report.Bytes), progress.Bytes(report.Kept), to)
				if _, err := repository.ReadBorg(to); err == nil && len(paths) == 0 {
					// Who restores in a hurry has not read the help.
					fmt.Fprintf(env.Stderr, "%s: this is an older copy of a Borg repository: read from it, but let nothing write into it (create, prune, compact, check --repair).\n", program)
					fmt.Fprintf(env.Stderr, "%s: Borg would use encryption counters a second time. How it becomes the new repository: docs/recovery.md, \"A generation as the new repository\"\n", program)
				}
			}
			return err
		},
	}
	r.reach(cmd)
	r.choose(cmd)
	f := cmd.Flags()
	f.StringVar(&to, "to", "", "the folder: empty, not there yet, or left by an interrupted restore")
	f.DurationVar(&giveUp, "give-up", 30*time.Minute, "give up when nothing has come for so long")
	return cmd
}
