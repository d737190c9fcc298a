package main

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"farkeep/image/build"
	"farkeep/image/debian"
	"farkeep/shared/hint"
	"farkeep/shared/usage"
)

// applianceName is the program that goes into the image, as it is called
// beside farkeep-image.
const applianceName = "farkeep-appliance-arm64"

func newBuildCmd(env *Env) *cobra.Command {
	o := build.Options{}
	mirror := ""
	cmd := &cobra.Command{
		Use:   "build",
		Short: "Build the card image",
		Long: `Build the card image for every supported board, from Debian's kernel and boot
firmware and the appliance program. It needs neither root nor loop devices.

Packages come from the Debian mirror that this machine's apt uses and are
checked against Debian's keys. They are kept: the next build needs no network.`,
		Example: `  farkeep-image build --out farkeep.img
  farkeep-image build --appliance ./farkeep-appliance-arm64 --out farkeep.img --compress`,
		Args: usage.Args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.Appliance == "" {
				self, err := os.Executable()
				if err != nil {
					return fmt.Errorf("find the appliance beside this program: %w", err)
				}
				o.Appliance = filepath.Join(filepath.Dir(self), applianceName)
			}
			if o.Cache == "" {
				dir, err := os.UserCacheDir()
				if err != nil {
					return hint.Because(fmt.Errorf("find the cache directory: %w", err), "name one with --cache")
				}
				o.Cache = filepath.Join(dir, "farkeep")
			}
			if mirror == "" {
				mirror = env.Getenv("FARKEEP_APT_MIRROR")
			}
			o.Mirror = debian.Mirror{Archive: mirror}
			if mirror == "" {
				var err error
				if o.Mirror, err = debian.FindMirror(os.DirFS("/etc/apt")); err != nil {
					return hint.Because(err, "name a Debian mirror with --mirror or FARKEEP_APT_MIRROR, as in --mirror http://mirror.example/debian")
				}
			}
			o.Log = env.Logger()
			r, err := build.Build(cmd.Context(), o)
			if err != nil {
				return err
			}
			return report(env, r)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Appliance, "appliance", "", "the linux/arm64 appliance program (default: "+applianceName+" beside this program)")
	f.StringVarP(&o.Out, "out", "o", "farkeep.img", "the image to write")
	f.StringVar(&o.Contents, "manifest", "", "also write the list of contents to this file")
	f.StringVar(&o.Cache, "cache", "", "directory for downloads (default: farkeep in the user's cache directory)")
	f.StringVar(&mirror, "mirror", "", "address of a Debian mirror (default: FARKEEP_APT_MIRROR, else the one that this machine's apt uses)")
	f.BoolVar(&o.Update, "update", false, "look for newer packages first")
	f.BoolVar(&o.Compress, "compress", false, "also write the image compressed, with .xz appended to its name")
	return cmd
}

// report prints what was made: one fact a line, the value first for scripts
// that cut.
func report(env *Env, r build.Result) error {
	fmt.Fprintf(env.Stdout, "image       %s\n", r.Image)
	fmt.Fprintf(env.Stdout, "kernel      %s, %d modules\n", r.Contents.Kernel, len(r.Contents.Modules))
	fmt.Fprintf(env.Stdout, "slot        %.1f MB, of which initramfs %.1f MB\n", mb(r.SlotBytes), mb(r.Initramfs))
	if r.Compressed != "" {
		s, err := os.Stat(r.Compressed)
		if err != nil {
			return fmt.Errorf("compressed image: %w", err)
		}
		fmt.Fprintf(env.Stdout, "compressed  %s, %.1f MB\n", r.Compressed, mb(s.Size()))
	}
	return nil
}

func mb(n int64) float64 { return float64(n) / 1e6 }
