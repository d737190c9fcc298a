package main

import (
	"context"
	"io"
	"runtime/debug"

	"farkeep/shared/usage"

	"github.com/spf13/cobra"
)

// Env is what the commands use of the process they run in.
type Env struct {
	Stdout, Stderr io.Writer
	Getenv         func(string) string
}

func run(ctx context.Context, args []string, env Env) error {
	root := &cobra.Command{
		Use:   "farkeep-appliance",
		Short: "keep the second copy in another building",
		Long: `farkeep-appliance takes in what pushers send, keeps its history on an encrypted
disk, and raises the alarm when home falls silent.

Started by the kernel as PID 1 it is the whole system of a Raspberry Pi. Under
another system it is the service "farkeep-appliance run".`,
		Example:           "  farkeep-appliance run --settings /etc/farkeep/farkeep.toml",
		Args:              usage.Args(cobra.NoArgs),
		RunE:              func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		SilenceUsage:      true,
		SilenceErrors:     true,
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: true},
	}
	root.SetArgs(args)
	root.SetOut(env.Stdout)
	root.SetErr(env.Stderr)
	root.SetFlagErrorFunc(usage.Flags)
	root.AddCommand(runCommand(env), partCommand(env), stepsCommand(env), checkCommand(env), versionCommand(env))
	return root.ExecuteContext(ctx)
}

// version is what the build says of itself: a tag, or the commit.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	if v := info.Main.Version; v != "" && v != "(devel)" {
		return v
	}
	revision, dirty := "unknown", ""
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision" && len(s.Value) >= 12:
			revision = s.Value[:12]
		case s.Key == "vcs.modified" && s.Value == "true":
			dirty = "+changes"
		}
	}
	return revision + dirty
}
