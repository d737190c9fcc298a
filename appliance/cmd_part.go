package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"

	"farkeep/appliance/confine"
	"farkeep/appliance/part"
	"farkeep/shared/hint"
	"farkeep/shared/usage"

	"github.com/spf13/cobra"
)

func partCommand(Env) *cobra.Command {
	return &cobra.Command{
		Use:     "part NAME",
		Short:   "be one of the appliance's parts (the supervisor starts these)",
		Example: "  farkeep-appliance part receiver",
		Args:    usage.Args(cobra.ExactArgs(1)),
		Hidden:  true,
		RunE: func(cmd *cobra.Command, args []string) error {
			return runPart(cmd.Context(), args[0])
		},
	}
}

// runPart is a child's whole life: brief, confinement, the part's own code.
func runPart(ctx context.Context, name string) error {
	p, ok := findPart(name)
	if !ok {
		return hint.Exit(hint.ExitUsage, fmt.Errorf("there is no part %q", name))
	}
	env, err := part.Attach(name, os.Stderr)
	if err != nil {
		return hint.Exit(hint.ExitUsage, err)
	}
	log := env.Log
	if p.routine && !env.Debug {
		log = slog.New(slog.DiscardHandler) // a protection that fails is an error all the same
	}
	if err := confine.Enter(p.profile(env.Header), env.Firmware, log); err != nil {
		return err
	}
	frugal()
	if err := p.run(ctx, env); err != nil && ctx.Err() == nil {
		env.Log.Error("part failed", "err", err)
		return err
	}
	return nil
}
