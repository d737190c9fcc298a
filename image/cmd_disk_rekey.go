package main

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"farkeep/image/luksdisk"
	"farkeep/shared/hint"
	"farkeep/shared/usage"
)

func newDiskRekeyCmd(env *Env) *cobra.Command {
	var d diskFlags
	var recoveryFile string
	var slot int
	cmd := &cobra.Command{
		Use:   "rekey DEVICE|FILE",
		Short: "Give the key servers another key for a disk",
		Long: `Change the key that the key servers have for an appliance's disk: after one of them
was stolen, or an old copy of its keys turned up. The data stay as they are. The
recovery key, from the operator's folder, authorises the change; its own slot is
never touched.

The new key is added and tried before the old one's slot is wiped. A change that was
cut is finished by the same command. The key servers must have the new key before
the appliance wants to open the disk.`,
		Example: `  farkeep-image disk rekey /dev/sdb --dir my-site --appliance attic
  farkeep-image disk rekey /dev/sdb --dir my-site --appliance attic --recovery-key /media/safe/attic.recovery.key`,
		Args: usage.Args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if cmd.Flags().Changed("slot") && slot < 0 {
				return usage.Errorf("--slot: %d is not the number of a key slot", slot)
			}
			request, err := d.request(env, args[0])
			if err != nil {
				return err
			}
			r := luksdisk.RekeyRequest{Request: request, Slot: slot}
			path := recoveryFile
			if path == "" {
				a, ok := request.Site.Site().Appliance(d.appliance)
				if !ok || a.LUKS == "" {
					return hint.Exit(hint.ExitUsage, fmt.Errorf("%s knows no disk of %q", request.Site.SitePath(), d.appliance))
				}
				path = filepath.Join(request.Site.OperatorDir(), luksdisk.RecoveryKeyFile(a.LUKS))
			}
			if r.Recovery, err = readKeyFile(path); err != nil {
				if errors.Is(err, fs.ErrNotExist) && recoveryFile == "" {
					err = hint.Exit(hint.ExitUsage, hint.Because(err, "fetch it from where you keep it, and name it with --recovery-key"))
				}
				return err
			}
			defer r.Recovery.Wipe()
			r.Confirm = func(t *luksdisk.Target) error {
				fmt.Fprintln(env.Stderr, "The key servers get another key for this disk; its data stay:")
				t.Describe(env.Stderr)
				return nil
			}
			done, err := luksdisk.Rekey(cmd.Context(), r)
			if err != nil {
				return err
			}
			printRekeyed(env, d, done)
			return nil
		},
	}
	d.register(cmd)
	cmd.Flags().StringVar(&recoveryFile, "recovery-key", "", "file with the recovery key (default: the operator's folder)")
	cmd.Flags().IntVar(&slot, "slot", -1, "the key slot to wipe, where it cannot be found by the old key")
	return cmd
}

func printRekeyed(env *Env, d diskFlags, r *luksdisk.Rekeyed) {
	fmt.Fprintln(env.Stdout, r.UUID)
	say := func(format string, args ...any) {
		fmt.Fprintf(env.Stderr, "%s: %s\n", program, fmt.Sprintf(format, args...))
	}
	say("the new key is in slot %d; wiped: %s", r.Slot, orNone(r.Killed))
	if len(r.OtherSlots) > 0 {
		say("the disk's other key slots still open it: %s", orNone(r.OtherSlots))
	}
	say("backup of the header: %s (SHA-256 %s)", r.Backup, r.Fingerprint)
	say("next, before the disk goes back to %s:", d.appliance)
	for _, path := range r.KeyFiles {
		say("  carry %s to its key server, in the old one's place, then delete it here", path)
	}
	say("  copy %s/site.toml to the key servers and to the Borg server: the header has another fingerprint", d.dir)
	say("  make the bundle anew: farkeep-keyserver bundle create --site %s", d.dir)
	say("then: whoever has the old key and an older copy of the header can still open the disk; destroy older bundles and header backups")
	for _, path := range r.OldKeys {
		say("once %s has opened its disk with the new key, remove %s", d.appliance, path)
	}
}

func orNone(slots []int) string {
	if len(slots) == 0 {
		return "none"
	}
	return strings.Trim(fmt.Sprint(slots), "[]")
}
