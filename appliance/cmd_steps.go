package main

import (
	"fmt"

	"farkeep/appliance/boot"
	"farkeep/shared/usage"

	"github.com/spf13/cobra"
)

func stepsCommand(env Env) *cobra.Command {
	return &cobra.Command{
		Use:     "steps",
		Short:   "print what firmware does at boot, in order",
		Example: "  farkeep-appliance steps",
		Args:    usage.Args(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			return boot.Print(env.Stdout, boot.Steps())
		},
	}
}

func versionCommand(env Env) *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "print the version",
		Example: "  farkeep-appliance version",
		Args:    usage.Args(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			_, err := fmt.Fprintln(env.Stdout, version())
			return err
		},
	}
}
