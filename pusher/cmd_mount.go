package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/spf13/cobra"

	"farkeep/pusher/mount"
	"farkeep/shared/hint"
	"farkeep/shared/usage"
)

func newMountCmd(env *Env, at *places) *cobra.Command {
	r := &reading{}
	var cache int64
	var others bool
	cmd := &cobra.Command{
		Use:   "mount TARGET REPOSITORY [GENERATION] FOLDER",
		Short: "Show a generation as a read-only folder",
		Long: `mount shows a generation in FOLDER until Ctrl-C, until somebody unmounts it, or
until the line goes. What is read is fetched; nothing can be written. It needs
FUSE; "restore" does not. The appliance's disk stays open meanwhile, and nothing
expires there.

A file that is read from beginning to end is compared with the hash that was taken
at the source. To look into a Borg repository, take "farkeep-pusher borg".`,
		Example: `  farkeep-pusher mount vault documents latest /mnt/documents
  farkeep-pusher mount vault documents --at "2026-05-01 14:00" /mnt/documents`,
		Args: usage.Args(cobra.RangeArgs(3, 4)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := mount.Possible(); err != nil {
				return err
			}
			folder := args[len(args)-1]
			generation, rest := r.split(args[2 : len(args)-1])
			if len(rest) > 0 {
				return usage.Errorf("a generation and --at were given: one of the two is enough")
			}
			if cache < 0 {
				return usage.Errorf("--cache %d: a size cannot be negative", cache)
			}
			log := at.logger(env.Stderr)
			chosen, err := at.find(cmd, r, args[0], args[1], generation, env, log)
			if err != nil {
				return err
			}
			defer chosen.source.Close()
			err = os.Mkdir(folder, 0o700)
			if err == nil {
				defer os.Remove(folder)
			} else if !errors.Is(err, fs.ErrExist) {
				return hint.Exit(hint.ExitUsage, err)
			}
			m, err := at.show(cmd, chosen, mount.Mount{Folder: folder, Cache: cache << 20, AllowOther: others, Log: log})
			if err != nil {
				return err
			}
			fmt.Fprintf(env.Stderr, "%s: generation %s of %s is in %s; Ctrl-C ends\n", program, chosen.generation.Name, args[1], folder)
			return m.Wait(cmd.Context())
		},
	}
	r.reach(cmd)
	r.choose(cmd)
	f := cmd.Flags()
	f.Int64Var(&cache, "cache", mount.DefaultCache>>20, "MiB of what was read to keep in memory")
	f.BoolVar(&others, "allow-other", false, "let other users of this machine read, too")
	return cmd
}

// show mounts a generation. The caller must Wait.
func (at *places) show(cmd *cobra.Command, o *one, m mount.Mount) (*mount.Mounted, error) {
	// What ends first is up to Wait: nobody shall see a cut line who has pressed Ctrl-C.
	ctx := context.WithoutCancel(cmd.Context())
	tree, err := o.source.Open(ctx, o.generation.Repository, o.generation.Name)
	if err != nil {
		return nil, err
	}
	m.Tree, m.Generation = tree, o.generation
	mounted, err := m.Start(ctx)
	if err != nil {
		tree.Close()
	}
	return mounted, err
}
