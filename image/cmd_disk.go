package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"farkeep/image/luksdisk"
	"farkeep/image/siteinit"
	"farkeep/shared/hint"
	"farkeep/shared/keywire"
	"farkeep/shared/secret"
	"farkeep/shared/settings"
	"farkeep/shared/site"
	"farkeep/shared/usage"
)

func newDiskCmd(env *Env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "disk",
		Short: "Prepare the encrypted disk of an appliance",
		Long: `Prepare a disk on the operator's laptop or at home: encrypt it, make a file system,
and put its two keys where they belong. The first goes to the key servers' folders,
the second, for recovery, with a backup of the header to the operator's folder.`,
		Example: `  farkeep-image disk show /dev/sdb
  farkeep-image disk prepare /dev/sdb --dir my-site --appliance attic
  farkeep-image disk adopt /dev/sdb --dir my-site --appliance attic --key-file old.key
  farkeep-image disk rekey /dev/sdb --dir my-site --appliance attic`,
		Args: usage.Args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newDiskPrepareCmd(env), newDiskAdoptCmd(env), newDiskRekeyCmd(env), newDiskShowCmd(env), newDiskCopyCmd(env), newDiskSalvageCmd(env))
	return cmd
}

// diskFlags are those that prepare and adopt share.
type diskFlags struct {
	dir, appliance, board string
}

func (d *diskFlags) register(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&d.dir, "dir", defaultSiteDir, "site folder")
	f.StringVar(&d.appliance, "appliance", "", "the appliance that the disk is for (needed)")
	f.StringVar(&d.board, "board", "", "choose the cipher for this board: "+strings.Join(site.Boards(), ", ")+" (default: the appliance's)")
}

func (d *diskFlags) request(env *Env, path string) (luksdisk.Request, error) {
	if d.appliance == "" {
		return luksdisk.Request{}, hint.Exit(hint.ExitUsage, hint.Because(fmt.Errorf("--appliance is missing"), "farkeep-image site show --dir %s lists them", d.dir))
	}
	known := d.board == ""
	for _, b := range site.Boards() {
		known = known || b == d.board
	}
	if !known {
		return luksdisk.Request{}, usage.Errorf("--board: %q is none of %s", d.board, strings.Join(site.Boards(), ", "))
	}
	dir, err := siteinit.Open(d.dir)
	if err != nil {
		return luksdisk.Request{}, err
	}
	return luksdisk.Request{
		Site: dir, Appliance: d.appliance, Board: d.board, Path: path,
		Progress: func(format string, args ...any) {
			fmt.Fprintf(env.Stderr, "%s: %s\n", program, fmt.Sprintf(format, args...))
		},
	}, nil
}

func newDiskPrepareCmd(env *Env) *cobra.Command {
	var d diskFlags
	var yes bool
	var sizeFor string
	var inodeRatio int64
	cmd := &cobra.Command{
		Use:   "prepare DEVICE|FILE",
		Short: "Erase a disk and encrypt it for an appliance",
		Long: `Erase a disk, encrypt it and make a file system on it. Shows what is on the disk,
and asks for its model before it erases. A plain file serves as a disk for trying
things out. The LUKS UUID is printed, and entered in site.toml; farkeep.toml is
complete after that.

An earlier owner's data are not overwritten, only made unreachable in the ordinary
way; a disk that held secrets in clear is better overwritten first.`,
		Example: `  farkeep-image disk prepare /dev/sdb --dir my-site --appliance attic
  truncate -s 4G attic.disk && farkeep-image disk prepare attic.disk --dir my-site --appliance attic --yes`,
		Args: usage.Args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := d.request(env, args[0])
			if err != nil {
				return err
			}
			wanted, err := wantedSize(r.Site.Site(), sizeFor)
			if err != nil {
				return err
			}
			if inodeRatio != 0 && (inodeRatio < 4096 || inodeRatio > 1<<26) {
				return usage.Errorf("--inode-ratio: %d is not between 4096 and %d bytes", inodeRatio, 1<<26)
			}
			r.BytesPerInode = inodeRatio
			r.Confirm = func(t *luksdisk.Target) error {
				fmt.Fprintln(env.Stderr, "This disk will be erased:")
				t.Describe(env.Stderr)
				wanted.Advise(env.Stderr, t.Size)
				if a, ok := r.Site.Site().Appliance(d.appliance); ok && a.LUKS != "" {
					fmt.Fprintf(env.Stderr, "It takes the place of %s's disk %s.\n", a.Name, a.LUKS)
				}
				if yes {
					return nil
				}
				answer, err := newPrompt(env).line("--yes", fmt.Sprintf("Type %q to erase it", t.Name()), "")
				if err != nil {
					return err
				}
				if answer != t.Name() {
					return hint.Exit(hint.ExitUsage, fmt.Errorf("%q is not %q: nothing was changed", answer, t.Name()))
				}
				return nil
			}
			p, err := luksdisk.Prepare(cmd.Context(), r)
			return printDisk(env, d, p, err)
		},
	}
	d.register(cmd)
	f := cmd.Flags()
	f.BoolVar(&yes, "yes", false, "erase without asking")
	f.StringVar(&sizeFor, "size-for", "", "size of all repositories together, where they are not on this machine (500G)")
	f.Int64Var(&inodeRatio, "inode-ratio", 0, "bytes of disk for each inode (default 64 KiB on large disks; less for trees of small files)")
	return cmd
}

func newDiskAdoptCmd(env *Env) *cobra.Command {
	var d diskFlags
	var keyFile, passphraseFile string
	cmd := &cobra.Command{
		Use:   "adopt DEVICE|FILE",
		Short: "Take in a LUKS2 disk that is encrypted already",
		Long: `Add two key slots, the key servers' and the operator's, to a LUKS2 disk with an ext4
file system whose key you have. Its data stay. Its old keys go on opening it, until
you remove their slots.`,
		Example: `  farkeep-image disk adopt /dev/sdb --dir my-site --appliance attic --key-file old.key
  farkeep-image disk adopt /dev/sdb --dir my-site --appliance attic`,
		Args: usage.Args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if keyFile != "" && passphraseFile != "" {
				return usage.Errorf("--key-file and --passphrase-file exclude each other: a disk has one key at a time")
			}
			r, err := d.request(env, args[0])
			if err != nil {
				return err
			}
			var existing secret.Bytes
			switch {
			case keyFile != "":
				existing, err = readKeyFile(keyFile)
			case passphraseFile != "":
				existing, err = readLine(passphraseFile, "--passphrase-file")
			default:
				existing, err = newPrompt(env).secret("--passphrase-file", "The disk's passphrase")
			}
			if err != nil {
				return err
			}
			defer existing.Wipe()
			r.Confirm = func(t *luksdisk.Target) error {
				fmt.Fprintln(env.Stderr, "This disk gets two more key slots; its data stay:")
				t.Describe(env.Stderr)
				return nil
			}
			p, err := luksdisk.Adopt(cmd.Context(), r, existing)
			return printDisk(env, d, p, err)
		},
	}
	d.register(cmd)
	f := cmd.Flags()
	f.StringVar(&keyFile, "key-file", "", "file with the disk's present key, taken byte by byte")
	f.StringVar(&passphraseFile, "passphrase-file", "", "file with the disk's present passphrase in its first line")
	return cmd
}

func newDiskShowCmd(env *Env) *cobra.Command {
	var dir, sizeFor string
	cmd := &cobra.Command{
		Use:     "show DEVICE|FILE",
		Short:   "Show what is on a disk, and how large a disk the repositories want",
		Example: "  farkeep-image disk show /dev/sdb --dir my-site",
		Args:    usage.Args(cobra.ExactArgs(1)),
		RunE: func(_ *cobra.Command, args []string) error {
			t, err := luksdisk.Inspect(args[0])
			if err != nil {
				return err
			}
			t.Describe(env.Stdout)
			for _, use := range t.Uses {
				fmt.Fprintf(env.Stdout, "  %-8s %s\n", "in use:", use)
			}
			if dir == "" && sizeFor == "" {
				return nil
			}
			s := &site.Site{History: settings.DefaultHistory()}
			if dir != "" {
				opened, err := siteinit.Open(dir)
				if err != nil {
					return err
				}
				s = opened.Site()
			}
			wanted, err := wantedSize(s, sizeFor)
			if err != nil {
				return err
			}
			wanted.Advise(env.Stdout, t.Size)
			return nil
		},
	}
	cmd.Flags().StringVar(&dir, "dir", "", "site folder, whose repositories are measured")
	cmd.Flags().StringVar(&sizeFor, "size-for", "", "size of all repositories together, where they are not on this machine (500G)")
	return cmd
}

func wantedSize(s *site.Site, sizeFor string) (luksdisk.Wanted, error) {
	if sizeFor == "" {
		return luksdisk.Measure(s)
	}
	n, err := luksdisk.ParseSize(sizeFor)
	if err != nil {
		return luksdisk.Wanted{}, usage.Errorf("--size-for: %w", err)
	}
	return luksdisk.For(s, n)
}

// readKeyFile reads a key as cryptsetup --key-file does: byte by byte.
func readKeyFile(path string) (secret.Bytes, error) {
	f, err := os.Open(path)
	if err != nil {
		return secret.Bytes{}, fmt.Errorf("--key-file: %w", err)
	}
	defer f.Close()
	key, err := secret.ReadAll(f, keywire.MaxKey)
	if err != nil {
		return secret.Bytes{}, fmt.Errorf("--key-file: read %s: %w", path, err)
	}
	if key.Len() == 0 {
		return secret.Bytes{}, usage.Errorf("--key-file: %s is empty", path)
	}
	return key, nil
}

func printDisk(env *Env, d diskFlags, p *luksdisk.Prepared, err error) error {
	if err != nil {
		return err
	}
	fmt.Fprintln(env.Stdout, p.UUID)
	say := func(format string, args ...any) {
		fmt.Fprintf(env.Stderr, "%s: %s\n", program, fmt.Sprintf(format, args...))
	}
	for _, path := range p.KeyFiles {
		say("key for the key server: %s (carry it there, then delete it here)", path)
	}
	say("recovery key, for your safe: %s", p.RecoveryKey)
	say("backup of the header: %s (SHA-256 %s)", p.Backup, p.Fingerprint)
	if len(p.OtherSlots) > 0 {
		say("the disk's earlier key slots %s still open it: cryptsetup luksKillSlot removes one, once the appliance has opened the disk", strings.Trim(fmt.Sprint(p.OtherSlots), "[]"))
	}
	for _, w := range p.Warnings {
		say("note: %s", w)
	}
	say("next: farkeep-image personalise --settings %s/appliances/%s/farkeep.toml ...", d.dir, d.appliance)
	return nil
}
