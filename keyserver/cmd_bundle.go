package main

import (
	"crypto/subtle"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"farkeep/keyserver/bundle"
	"farkeep/shared/hint"
	"farkeep/shared/secret"
	"farkeep/shared/settings"
	"farkeep/shared/site"
	"farkeep/shared/usage"

	"github.com/spf13/cobra"
)

func newBundleCmd(env *Env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "bundle",
		Short: "Make and check the recovery bundle, on the operator's laptop",
		Long: `A bundle is what brings the files back, with the disk, when home is gone: recovery
keys, headers, Borg keys, what rebuilds home, and the runbook, which needs no Farkeep.

It lies outside the kill switch: whoever has it and a disk reads the disk, revoked or
not. The runbook's last chapter says how to void it.`,
		Example: `  farkeep-keyserver bundle create --site my-site --to /media/stick/farkeep-bundle --passphrase
  farkeep-keyserver bundle verify /media/stick/farkeep-bundle --site my-site`,
		Args: usage.Args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newBundleCreateCmd(env), newBundleVerifyCmd(env), newBundleShowCmd(env), newBundleOpenCmd(env), newBundleBorgKeysCmd(env))
	return cmd
}

// passphraseFlag adds a flag that says where a passphrase comes from.
func passphraseFlag(cmd *cobra.Command, from *string, what string) {
	cmd.Flags().StringVar(from, "passphrase", "", what+": terminal, fd:N or credential:NAME")
	cmd.Flags().Lookup("passphrase").NoOptDefVal = "terminal"
}

func newBundleCreateCmd(env *Env) *cobra.Command {
	var o bundle.Options
	var passphrase, standalone string
	var clearly, paper, weak, bare bool
	cmd := &cobra.Command{
		Use:   "create",
		Short: "Make a recovery bundle",
		Long: `Make a recovery bundle of the site folder that farkeep-image site init made, in a new
folder: sealed with a passphrase, in clear for a safe, or as one page to print. Every
recovery key is tried on its header before anything is written.

Borg keeps the keys of keyfile repositories on the machines that make the backups. Name
folders with such key files (or what "bundle borg-keys" wrote there) with --borg-keys;
this user's own Borg keys are taken along without being asked for. Exit code 3 means that
the bundle is made, and that a repository would be unreadable with it.`,
		Example: `  farkeep-keyserver bundle create --site my-site --to /media/stick/farkeep-bundle --passphrase
  farkeep-keyserver bundle create --site my-site --to /media/stick/farkeep-bundle --clear --borg-keys keys-of-borg \
      --passphrases-known-by "the letter at the notary's" --borg-standalone borg-linux-glibc231-x86_64
  farkeep-keyserver bundle create --site my-site --to page --paper`,
		Args: usage.Args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			switch {
			case o.Site == "" || o.To == "":
				return usage.Errorf("name the site's folder (--site) and the new folder (--to)")
			case clearly:
				o.Kind = bundle.Clear
			case paper:
				o.Kind = bundle.Paper
				if !cmd.Flags().Changed("volume-key") {
					o.VolumeKey = true
				}
			case passphrase != "":
				o.Kind = bundle.Sealed
			default:
				return usage.Errorf("how shall it be kept? --passphrase seals it, --clear does not, --paper is a page to print")
			}
			if err := noDumps(); err != nil {
				return err
			}
			o.Now = env.Now()
			o.BorgKeys = append(o.BorgKeys, borgKeyFolders(env)...)
			if !bare {
				o.Tools = append(o.Tools, ownPrograms()...)
			}
			if standalone != "" {
				o.Tools = append(o.Tools, standalone)
			}
			if o.Kind == bundle.Sealed {
				words, err := chosenPassphrase(env, passphrase)
				if err != nil {
					return err
				}
				defer words.Wipe()
				if err := bundle.Strong(words); err != nil && !weak {
					return hint.Exit(hint.ExitUsage, err)
				}
				o.Passphrase = words
			}
			r, err := bundle.Create(o)
			if err != nil {
				return err
			}
			for _, d := range r.Manifest.Disks {
				fmt.Fprintf(env.Stdout, "disk of %s, %s: the recovery key opens the header\n", d.Appliance, d.LUKS)
			}
			for _, n := range r.Notes {
				fmt.Fprintf(env.Stderr, "%s: note: %s\n", program, n)
			}
			for _, name := range r.Unknown {
				fmt.Fprintf(env.Stderr, "%s: note: %s: whether it needs a key file is not known here; \"farkeep-keyserver bundle borg-keys\", on its machine, finds out\n", program, name)
			}
			if r.Manifest.KnownBy == "" {
				fmt.Fprintf(env.Stderr, "%s: note: Borg's passphrases are not in the bundle: say for whoever needs it how they are known (--passphrases-known-by)\n", program)
			}
			fmt.Fprintf(env.Stderr, "%s: %s is made. It lies outside the kill switch: whoever has it%s and a disk reads the disk\n", program, o.To, map[bool]string{true: ", its passphrase"}[o.Kind == bundle.Sealed])
			if o.Kind == bundle.Paper && o.VolumeKey {
				fmt.Fprintf(env.Stderr, "%s: note: the page holds the volume keys, for disks whose header is destroyed; such a page is voided by encrypting anew only (--volume-key=false leaves them out)\n", program)
			}
			fmt.Fprintf(env.Stdout, "%s\n", o.To)
			if len(r.Unreadable) > 0 {
				return hint.Exit(hint.ExitPartial, hint.Because(fmt.Errorf("unreadable with this bundle, for want of a key file: %s", strings.Join(r.Unreadable, ", ")),
					"borg key export on the machines that back up into them, then bundle create --replace --borg-keys FOLDER"))
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Site, "site", "", "the site's folder, as farkeep-image site init made it")
	f.StringVar(&o.To, "to", "", "the bundle's folder, which is made")
	passphraseFlag(cmd, &passphrase, "seal it with a passphrase, from")
	f.BoolVar(&clearly, "clear", false, "lay it out in clear, for a safe")
	f.BoolVar(&paper, "paper", false, "make the page to print, and nothing else")
	f.StringArrayVar(&o.BorgKeys, "borg-keys", nil, "folder with exported Borg keys, or made by bundle borg-keys; repeat for several")
	f.StringVar(&o.KnownBy, "passphrases-known-by", "", "how the Borg passphrases are known: printed in the runbook")
	f.StringArrayVar(&o.Tools, "tools", nil, "a program to take along; repeat for several. farkeep-keyserver and farkeep-pusher beside this program are taken anyway")
	f.BoolVar(&bare, "no-tools", false, "take no program along that is not named")
	f.StringVar(&standalone, "borg-standalone", "", "the standalone Borg of the repositories' version")
	f.BoolVar(&o.VolumeKey, "volume-key", false, "print the disks' volume keys too, by which a disk without any header opens; with --paper this is the default")
	f.BoolVar(&o.Replace, "replace", false, "let an older bundle in that folder give way")
	f.BoolVar(&weak, "weak-passphrase", false, "take a passphrase that is too weak")
	cmd.MarkFlagsMutuallyExclusive("passphrase", "clear", "paper")
	return cmd
}

// chosenPassphrase reads a passphrase, twice where a person types it.
func chosenPassphrase(env *Env, from string) (secret.Bytes, error) {
	words, err := readPassphrase(env, from, "Passphrase of the bundle: ")
	if err != nil || from != "terminal" {
		return words, err
	}
	again, err := readPassphrase(env, from, "Once more: ")
	if err != nil {
		words.Wipe()
		return secret.Bytes{}, err
	}
	defer again.Wipe()
	if subtle.ConstantTimeCompare(words.Reveal(), again.Reveal()) != 1 {
		words.Wipe()
		return secret.Bytes{}, usage.Errorf("the two are not the same")
	}
	return words, nil
}

// borgKeyFolders are the places in which this user's Borg keeps key files.
func borgKeyFolders(env *Env) (folders []string) {
	keys := env.Getenv("BORG_KEYS_DIR")
	if keys == "" {
		base, config := env.Getenv("BORG_BASE_DIR"), env.Getenv("XDG_CONFIG_HOME")
		if base == "" {
			base = env.Getenv("HOME")
		}
		if config == "" && base != "" {
			config = filepath.Join(base, ".config")
		}
		if config == "" {
			return nil
		}
		keys = filepath.Join(config, "borg", "keys")
	}
	if _, err := os.Stat(keys); err != nil {
		return nil
	}
	return []string{keys}
}

// ownPrograms are this program and its sisters in the same folder.
func ownPrograms() (files []string) {
	self, err := os.Executable()
	if err != nil {
		return nil
	}
	for _, name := range []string{"farkeep-keyserver", "farkeep-pusher"} {
		for _, ending := range []string{"", "-amd64", "-arm64"} {
			path := filepath.Join(filepath.Dir(self), name+ending)
			if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() {
				files = append(files, path)
			}
		}
	}
	return files
}

func newBundleVerifyCmd(env *Env) *cobra.Command {
	var folder, passphrase string
	var live []string
	cmd := &cobra.Command{
		Use:   "verify BUNDLE",
		Short: "Check that a bundle opens what there is now",
		Long: `Check a bundle: its checksums, that each key opens its header (in memory, without the
disk), and that every repository's key is there. With --site also that the headers are
the live ones, and that runbook and identities are those of the site. The live header's
digest is what site.toml knows, or --live; the appliance tells it at every opening.`,
		Example: `  farkeep-keyserver bundle verify /media/stick/farkeep-bundle --site my-site
  farkeep-keyserver bundle verify /media/stick/farkeep-bundle --site my-site --live 0b6e1f5c-8d1b-4c52-9a57-6a2f0c9d3e11=DIGEST`,
		Args: usage.Args(cobra.ExactArgs(1)),
		RunE: func(_ *cobra.Command, args []string) error {
			digests := map[string]string{}
			for _, l := range live {
				uuid, digest, ok := strings.Cut(l, "=")
				if !ok || !settings.IsLUKSUUID(uuid) || len(digest) != 64 {
					return usage.Errorf("--live %q is not UUID=DIGEST", l)
				}
				digests[uuid] = strings.ToLower(digest)
			}
			c, err := openBundle(env, args[0], passphrase)
			if err != nil {
				return err
			}
			defer c.Wipe()
			v, err := c.Verify(folder, digests)
			if err != nil {
				return err
			}
			fmt.Fprintf(env.Stdout, "bundle of the site %s, made %s, %d days ago\n", v.Manifest.Site, v.Manifest.Created.Format(time.DateOnly), int(env.Now().Sub(v.Manifest.Created).Hours()/24))
			for _, n := range v.Notes {
				fmt.Fprintf(env.Stdout, "%s\n", n)
			}
			for _, err := range v.Problems {
				fmt.Fprintf(env.Stdout, "problem: %v\n", err)
				if next := hint.Of(err); next != "" {
					fmt.Fprintf(env.Stdout, "  hint: %s\n", next)
				}
			}
			if len(v.Problems) > 0 {
				return hint.Exit(hint.ExitFailure, fmt.Errorf("problems found: %d", len(v.Problems)))
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&folder, "site", "", "the site's folder to compare with")
	cmd.Flags().StringArrayVar(&live, "live", nil, "UUID=DIGEST of a live header; repeat for several")
	passphraseFlag(cmd, &passphrase, "where the passphrase of a sealed one comes from")
	return cmd
}

func openBundle(env *Env, path, passphrase string) (*bundle.Contents, error) {
	if err := noDumps(); err != nil {
		return nil, err
	}
	c, err := bundle.Open(path, func() (secret.Bytes, error) { return askPassphrase(env, passphrase) })
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, bundle.ErrFormat) {
		err = hint.Exit(hint.ExitUsage, err)
	}
	return c, err
}

func askPassphrase(env *Env, from string) (secret.Bytes, error) {
	if from == "" {
		from = "terminal"
	}
	return readPassphrase(env, from, "Passphrase of the bundle: ")
}

func newBundleShowCmd(env *Env) *cobra.Command {
	var passphrase string
	cmd := &cobra.Command{
		Use:     "show BUNDLE",
		Short:   "Say what is in a bundle",
		Long:    "Say which disks and repositories a bundle opens, and what files it has. No secret is shown.",
		Example: "  farkeep-keyserver bundle show /media/stick/farkeep-bundle",
		Args:    usage.Args(cobra.ExactArgs(1)),
		RunE: func(_ *cobra.Command, args []string) error {
			c, err := openBundle(env, args[0], passphrase)
			if err != nil {
				return err
			}
			defer c.Wipe()
			m, err := c.Manifest()
			if err != nil {
				return hint.Exit(hint.ExitUsage, err)
			}
			fmt.Fprintf(env.Stdout, "site %s, made %s\n", m.Site, m.Created.Format(time.RFC3339))
			for _, d := range m.Disks {
				fmt.Fprintf(env.Stdout, "disk of %s: %s, header %s\n", d.Appliance, d.LUKS, d.Header)
			}
			for _, r := range m.Repositories {
				fmt.Fprintf(env.Stdout, "repository %s: key %s, in the bundle: %s\n", r.Name, r.Key, orNone(r.Keys))
			}
			if m.KnownBy != "" {
				fmt.Fprintf(env.Stdout, "passphrases: %s\n", m.KnownBy)
			}
			for _, name := range c.Names() {
				fmt.Fprintf(env.Stdout, "  %s\n", name)
			}
			return nil
		},
	}
	passphraseFlag(cmd, &passphrase, "where the passphrase of a sealed one comes from")
	return cmd
}

func orNone(list []string) string {
	if len(list) == 0 {
		return "none"
	}
	return strings.Join(list, ", ")
}

func newBundleOpenCmd(env *Env) *cobra.Command {
	var to, passphrase string
	cmd := &cobra.Command{
		Use:     "open FILE",
		Short:   "Unpack a sealed bundle",
		Long:    "Unpack a sealed bundle into a new folder, as \"age --decrypt FILE | tar -x\" does, for a computer without age. What was changed is found, and nothing is unpacked then.",
		Example: "  farkeep-keyserver bundle open farkeep-home.tar.age --to /root/farkeep/farkeep-bundle",
		Args:    usage.Args(cobra.ExactArgs(1)),
		RunE: func(_ *cobra.Command, args []string) error {
			if to == "" {
				return usage.Errorf("name the new folder with --to")
			}
			if err := noDumps(); err != nil {
				return err
			}
			if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
				return err
			}
			if err := bundle.Unseal(args[0], to, func() (secret.Bytes, error) { return askPassphrase(env, passphrase) }); err != nil {
				return err
			}
			fmt.Fprintf(env.Stdout, "%s\n", to)
			return nil
		},
	}
	cmd.Flags().StringVar(&to, "to", "", "the folder, which is made")
	passphraseFlag(cmd, &passphrase, "where the passphrase comes from")
	return cmd
}

func newBundleBorgKeysCmd(env *Env) *cobra.Command {
	var path, to, host string
	var folders []string
	cmd := &cobra.Command{
		Use:   "borg-keys",
		Short: "Gather Borg's keys, on a machine that has repositories or key files",
		Long: `Write what this machine has of Borg's keys into a new folder, to be carried to the
laptop: which repositories of site.toml are here and where each has its key, second
copies of the keys in repositories, and key files of this user. The keys are under the
repositories' passphrases; handle them as secrets all the same.`,
		Example: `  farkeep-keyserver bundle borg-keys --site /etc/farkeep/site.toml --to keys-of-borg
  farkeep-keyserver bundle borg-keys --to keys-of-anna --keys /home/anna/.config/borg/keys`,
		Args: usage.Args(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			if to == "" {
				return usage.Errorf("name the new folder with --to")
			}
			s, err := site.Read(path)
			if err != nil {
				return hint.Exit(hint.ExitUsage, err)
			}
			v := bundle.Look(s, host, append(folders, borgKeyFolders(env)...))
			defer v.Wipe()
			for _, n := range v.Notes {
				fmt.Fprintf(env.Stderr, "%s: note: %s\n", program, n)
			}
			if len(v.Repositories) == 0 && len(v.Keys) == 0 {
				return errors.New("neither a repository of the site nor a key file is on this machine")
			}
			if err := v.Write(to); err != nil {
				return err
			}
			for _, r := range v.Repositories {
				fmt.Fprintf(env.Stdout, "repository %s: key %s\n", r.Name, r.Key)
			}
			fmt.Fprintf(env.Stdout, "%d keys in %s\n", len(v.Keys), to)
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&path, "site", "/etc/farkeep/site.toml", "the site.toml")
	f.StringVar(&to, "to", "", "the folder, which is made")
	f.StringVar(&host, "host", "", "the pusher that this machine is; home by default")
	f.StringArrayVar(&folders, "keys", nil, "a further folder with Borg's key files; repeat for several")
	return cmd
}
