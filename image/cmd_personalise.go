package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"farkeep/image/sdcard"
	"farkeep/shared/hint"
	"farkeep/shared/settings"
	"farkeep/shared/tomlfile"
)

func newPersonaliseCmd(env *Env) *cobra.Command {
	var image, from, out, folder string
	cmd := &cobra.Command{
		Use:   "personalise",
		Short: "Write one appliance's settings into an image or onto a card",
		Long: `Write one appliance's farkeep.toml into a copy of an image, or onto the boot
partition of a card that is flashed already. The settings are checked first,
exactly as the appliance will check them. The image that is read stays as it is.

The copy holds the appliance's own keys: flash it, then delete it.`,
		Example: `  farkeep-image personalise --image farkeep.img --settings vault.farkeep.toml --out vault.img
  farkeep-image personalise --boot-partition /media/FARKEEP --settings vault.farkeep.toml`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			text, a, err := readSettings(from)
			if err != nil {
				return err
			}
			switch {
			case folder != "":
				if err := sdcard.PersonaliseFolder(folder, text); err != nil {
					return err
				}
				fmt.Fprintf(env.Stdout, "%s: settings of %s written\n", folder, a.Name)
				if a.Disk.Relay.Driver == "gpio" {
					fmt.Fprintf(env.Stderr, "%s: the relay's line floats until the appliance has run once; an image made with --image and --out does not have that gap\n", program)
				}
				return nil
			default:
				if err := sdcard.Personalise(cmd.Context(), image, out, personal(text, a)); err != nil {
					return err
				}
				fmt.Fprintf(env.Stdout, "%s: image of %s written\n", out, a.Name)
				return nil
			}
		},
	}
	f := cmd.Flags()
	f.StringVar(&image, "image", "", "the image to copy; it is not altered")
	f.StringVarP(&out, "out", "o", "", "the personal image to write")
	f.StringVar(&from, "settings", "", "the appliance's farkeep.toml")
	f.StringVar(&folder, "boot-partition", "", "folder where the boot partition of a flashed card is mounted")
	cmd.MarkFlagsRequiredTogether("image", "out")
	cmd.MarkFlagsMutuallyExclusive("image", "boot-partition")
	cmd.MarkFlagsOneRequired("image", "boot-partition")
	if err := cmd.MarkFlagRequired("settings"); err != nil {
		panic(err) // the flag is defined three lines above
	}
	return cmd
}

func personal(text []byte, a *settings.Appliance) sdcard.Personal {
	p := sdcard.Personal{Settings: text, RelayLine: -1}
	if r := a.Disk.Relay; r.Driver == "gpio" {
		p.RelayLine, p.RelayActiveHigh = r.Line, r.Active != "low"
	}
	return p
}

func readSettings(name string) ([]byte, *settings.Appliance, error) {
	text, err := tomlfile.ReadText(name)
	if err != nil {
		return nil, nil, fmt.Errorf("read settings: %w", err)
	}
	if len(text) > tomlfile.MaxSize {
		return nil, nil, hint.Exit(hint.ExitUsage, errors.New(name+" is larger than 1 MiB: not settings"))
	}
	a, err := settings.Parse(name, text)
	if err != nil {
		return nil, nil, hint.Exit(hint.ExitUsage, err)
	}
	return text, a, nil
}
