package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"farkeep/image/sdcard"
	"farkeep/image/siteinit"
	"farkeep/shared/hint"
	"farkeep/shared/settings"
	"farkeep/shared/tomlfile"
	"farkeep/shared/usage"
)

func newPersonaliseCmd(env *Env) *cobra.Command {
	var image, from, out, folder, replace, dir string
	cmd := &cobra.Command{
		Use:   "personalise",
		Short: "Write one appliance's settings into an image or onto a card",
		Long: `Write one appliance's farkeep.toml into a copy of an image, or onto the boot
partition of a card that is flashed already. The settings are checked first,
exactly as the appliance will check them. The image that is read stays as it is.

The copy holds the appliance's own keys: flash it, then delete it.

With --replace the appliance gets new identities first, because its card was lost:
the site folder is changed, and what is on the lost card is void as soon as home and
the key servers have the new files. What to do there is printed.`,
		Example: `  farkeep-image personalise --image farkeep.img --settings vault.farkeep.toml --out vault.img
  farkeep-image personalise --image farkeep.img --replace vault --dir my-site --out vault.img
  farkeep-image personalise --boot-partition /media/FARKEEP --settings vault.farkeep.toml`,
		Args: usage.Args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if cmd.Flags().Changed("dir") && replace == "" {
				return usage.Errorf("--dir goes with --replace; without it, --settings says all")
			}
			if replace != "" {
				var next *replaced
				if next, err = replaceIdentity(env, dir, replace); err != nil {
					return err
				}
				from = next.settings
				defer func() {
					if err != nil {
						err = hint.Because(err, "%s has its new identities all the same: go on with --settings %s", replace, next.settings)
					}
					next.say(env)
				}()
			}
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
	f.StringVar(&replace, "replace", "", "give this appliance new identities, because its card was lost, and use its settings")
	f.StringVar(&dir, "dir", defaultSiteDir, "site folder, with --replace")
	f.StringVar(&folder, "boot-partition", "", "folder where the boot partition of a flashed card is mounted")
	cmd.MarkFlagsOneRequired("settings", "replace")
	cmd.MarkFlagsRequiredTogether("image", "out")
	cmd.MarkFlagsMutuallyExclusive("image", "boot-partition")
	cmd.MarkFlagsOneRequired("image", "boot-partition")
	cmd.MarkFlagsMutuallyExclusive("settings", "replace")
	return cmd
}

// replaced is what is left to do after an appliance got new identities.
type replaced struct {
	dir, name, settings string
	void                *siteinit.Void
	servers             []string
	vpn                 bool
}

func replaceIdentity(env *Env, path, name string) (*replaced, error) {
	dir, err := siteinit.Open(path)
	if err != nil {
		return nil, err
	}
	r, void, err := dir.ReplaceIdentity(name)
	if err != nil {
		return nil, err
	}
	if err := printReport(env, path, r, nil); err != nil {
		return nil, err
	}
	next := &replaced{dir: path, name: name, settings: dir.ApplianceSettings(name), void: void, vpn: void.VPNKey != ""}
	if _, err := os.Stat(next.settings); err != nil {
		return nil, hint.Because(fmt.Errorf("%s has new identities, and no settings yet: %w", name, err), "farkeep-image site show --dir %s says what is missing", path)
	}
	for _, k := range dir.Site().KeyServers {
		next.servers = append(next.servers, k.Name)
	}
	return next, nil
}

// say tells what voids the lost card, in the order in which it should be done.
func (n *replaced) say(env *Env) {
	say := func(format string, args ...any) {
		fmt.Fprintf(env.Stderr, "%s: %s\n", program, fmt.Sprintf(format, args...))
	}
	say("void from now on: SSH host key %s, SSH client key %s", n.void.HostKey, n.void.ClientKey)
	if n.vpn {
		say("void from now on: WireGuard key %s", n.void.VPNKey)
	}
	say("next, in this order:")
	say("  on each key server (%s): farkeep-keyserver revoke %s --reason \"card lost\"", strings.Join(n.servers, ", "), n.name)
	say("  copy %s/site.toml to the key servers and to the Borg server, and restart farkeep-keyserver", n.dir)
	if n.vpn {
		say("  copy %s/home/wireguard/farkeep.conf to /etc/wireguard of the home server: systemctl restart wg-quick@farkeep", n.dir)
	}
	if n.void.MailUser != "" {
		say("  change the mail password of %s at your provider: it is on the lost card. Then farkeep-image site init %s --mail-password-file FILE, and write the card again", n.void.MailUser, n.dir)
	}
	say("  on each key server: farkeep-keyserver allow %s --reason \"new card\"", n.name)
	say("  on each key server: farkeep-keyserver expect %s --until 3d --reason \"new card\" (it has no token yet)", n.name)
	say("  make the bundle anew: farkeep-keyserver bundle create --site %s", n.dir)
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
		return nil, nil, hint.Because(fmt.Errorf("read settings: %w", err), "farkeep-image site add appliance makes them: SITE/appliances/NAME/farkeep.toml")
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
