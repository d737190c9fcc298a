package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"farkeep/pusher/borgcopy"
	"farkeep/pusher/mount"
	"farkeep/shared/usage"
)

func newBorgCmd(env *Env, at *places) *cobra.Command {
	r := &reading{}
	cmd := &cobra.Command{
		Use:   "borg TARGET REPOSITORY [GENERATION] -- SUBCOMMAND [ARGUMENT...]",
		Short: "Run borg on a generation, reading",
		Long: `borg mounts a generation in a private folder and runs your own borg on it: list,
info, extract, export-tar, diff, check and mount. Name archives as ::ARCHIVE. Borg
gets a cache of its own, below $TMPDIR, which is removed at the end, and your key
files; passphrases as usual (BORG_PASSPHRASE and its relatives, or it asks).

What would write to the repository is refused before anything starts: a copy
that goes on from an older state uses encryption counters a second time. Read
"A generation as the new repository" in docs/recovery.md.

The exit code is borg's own, unless borg was not started.`,
		Example: `  farkeep-pusher borg vault photos latest -- list
  farkeep-pusher borg vault photos 41 -- extract ::2026-05-01 home/documents
  farkeep-pusher borg vault photos --at 2026-05-01 -- mount :: /mnt/archives`,
		Args: usage.Args(cobra.MinimumNArgs(2)),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			dash := cmd.ArgsLenAtDash()
			if dash < 2 || dash > 3 {
				return usage.Flags(cmd, usage.Errorf("write TARGET REPOSITORY [GENERATION] -- and then borg's own subcommand"))
			}
			line := args[dash:]
			if err := borgcopy.Check(line); err != nil {
				return err
			}
			if _, err := borgcopy.Borg(); err != nil {
				return err
			}
			if err := mount.Possible(); err != nil {
				return err
			}
			generation, rest := r.split(args[2:dash])
			if len(rest) > 0 {
				return usage.Errorf("a generation and --at were given: one of the two is enough")
			}
			log := at.logger(env.Stderr)
			chosen, err := at.find(cmd, r, args[0], args[1], generation, env, log)
			if err != nil {
				return err
			}
			defer chosen.source.Close()
			private, err := os.MkdirTemp("", "farkeep-borg-")
			if err != nil {
				return err
			}
			folder := filepath.Join(private, "repository")
			if err := os.Mkdir(folder, 0o700); err != nil {
				return errors.Join(err, os.Remove(private))
			}
			m, err := at.show(cmd, chosen, mount.Mount{Folder: folder, Deny: true, Log: log})
			if err != nil {
				return errors.Join(err, os.RemoveAll(private))
			}
			// The mount outlives an interrupted borg, which unmounts its own first.
			shown, stop := context.WithCancel(context.WithoutCancel(cmd.Context()))
			ended := make(chan error, 1)
			go func() { ended <- m.Wait(shown) }()
			err = borgcopy.Run{
				Repository: folder, Private: private, Environ: env.Environ(),
				Stdin: env.Stdin, Stdout: env.Stdout, Stderr: env.Stderr, Unmount: mount.Detach,
			}.Start(cmd.Context(), line)
			stop()
			if lost := <-ended; lost != nil {
				err = lost // and that is why borg failed
			}
			// Not RemoveAll at once: below a mount that is still there lie no files of ours.
			if rmErr := os.Remove(folder); rmErr != nil {
				return errors.Join(err, rmErr)
			}
			return errors.Join(err, os.RemoveAll(private))
		},
	}
	r.reach(cmd)
	r.choose(cmd)
	return cmd
}
