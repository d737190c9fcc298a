package main

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"farkeep/image/demo"
	"farkeep/shared/hint"
	"farkeep/shared/usage"
)

func newDemoCmd(env *Env) *cobra.Command {
	o := demo.Options{Out: env.Stdout}
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Show the main job on an emulated Raspberry Pi",
		Long: `Show Farkeep's main job on this machine: make a site, build the image, boot an
emulated Raspberry Pi from it, push real Borg repositories to it, cut its power,
read them back, let home fall silent, steal the Pi. Every step is checked; the
command succeeds only if all of them held.

It needs borg, qemu-system-aarch64, ssh, sftp, cryptsetup, e2fsprogs and
coreutils, no root and no KVM, about 3 GB of disk, and some minutes.`,
		Example: `  farkeep-image demo
  farkeep-image demo --bin bin --dir /var/tmp/farkeep-demo`,
		Args: usage.Args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.Bin == "" {
				self, err := os.Executable()
				if err != nil {
					return fmt.Errorf("find the programs beside this one: %w", err)
				}
				o.Bin = filepath.Dir(self)
			}
			bin, err := filepath.Abs(o.Bin)
			if err != nil {
				return err
			}
			o.Bin = bin
			return hint.Because(demo.Run(cmd.Context(), o), "the log named above has every command and both consoles")
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Bin, "bin", "", "the folder with the programs (default: where this one is)")
	f.StringVar(&o.Dir, "dir", "", "where everything is put and kept (default: a temporary folder, removed after success)")
	f.StringVar(&o.Image, "image", "", "an image built before (default: one is built)")
	return cmd
}
