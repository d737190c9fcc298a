package main

import (
	"context"
	"io"
	"log/slog"

	"github.com/spf13/cobra"

	"farkeep/shared/hint"
	"farkeep/shared/usage"
)

const program = "farkeep-image"

// Env is what the commands know of the world, so that tests can run them in
// their own process.
type Env struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Getenv         func(string) string
}

// Logger returns a logger for progress and diagnostics: standard error, without
// the time, which a person at a terminal does not need.
func (e *Env) Logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(e.Stderr, &slog.HandlerOptions{
		ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		},
	}))
}

// run executes one command line and returns the exit code.
func run(ctx context.Context, args []string, env *Env) int {
	root := newRootCmd(env)
	root.SetArgs(args)
	return hint.Report(env.Stderr, program, root.ExecuteContext(ctx))
}

func newRootCmd(env *Env) *cobra.Command {
	root := &cobra.Command{
		Use:           program,
		Short:         "Make Farkeep's card image, sites and disks",
		Long:          "farkeep-image makes what an appliance needs before it travels: the card image,\nits personal settings, the site's secrets and the encrypted disk.\n\n" + usage.ExitCodes,
		Example:       "  farkeep-image build --out farkeep.img\n  farkeep-image personalise --image farkeep.img --settings vault.farkeep.toml --out vault.img",
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          usage.Args(cobra.NoArgs),
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetIn(env.Stdin)
	root.SetOut(env.Stdout)
	root.SetErr(env.Stderr)
	root.SetFlagErrorFunc(usage.Flags)
	root.AddCommand(
		newBuildCmd(env),
		newPersonaliseCmd(env),
		newSiteCmd(env),
		newDiskCmd(env),
		newEmulateCmd(env),
		newDemoCmd(env),
		newDrillCmd(env),
	)
	return root
}
