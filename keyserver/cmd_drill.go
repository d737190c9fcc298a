package main

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"path/filepath"
	"strconv"
	"strings"

	"farkeep/keyserver/drill"
	"farkeep/shared/atomicfile"
	"farkeep/shared/hint"
	"farkeep/shared/identity"
	"farkeep/shared/site"
	"farkeep/shared/usage"

	"github.com/spf13/cobra"
)

func newDrillCmd(env *Env) *cobra.Command {
	var folder, path, passphrase, key, sample string
	var addresses []string
	cmd := &cobra.Command{
		Use:   "drill",
		Short: "Rehearse a recovery on the real site, without touching a disk",
		Long: `Rehearse a recovery, from the operator's laptop: check the bundle, open each header in
it with its recovery key, and of each repository's newest and oldest generation fetch
files drawn by lot over the line, with the restore key, and compare them with the sums
that were taken at the source. The appliances open their disks for it and close them again.

When all is well the date goes into site.toml, [bundle] drilled; status warns
when the last drill is long ago. The commands of the runbook themselves are run by
"farkeep-image drill", on a stock Debian in an emulated machine.

Exit codes: 0 passed, 1 problems were found, 2 wrong arguments.`,
		Example: `  farkeep-keyserver drill --site my-site --bundle /media/stick/farkeep-bundle
  farkeep-keyserver drill --site my-site --bundle /media/stick/farkeep-bundle --sample 1G --address attic=127.0.0.1:2022`,
		Args: usage.Args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if folder == "" || path == "" {
				return usage.Errorf("name the site's folder (--site) and the bundle (--bundle)")
			}
			c := drill.Config{Folder: folder, Addresses: map[string]string{}, Random: rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64()))}
			var err error
			if c.Sample, err = parseBytes(sample); err != nil {
				return err
			}
			doc, err := site.ReadDocument(filepath.Join(folder, "site.toml"))
			if err != nil {
				if errors.Is(err, fs.ErrNotExist) {
					err = hint.Because(err, "--site names the folder that farkeep-image site init made")
				}
				return hint.Exit(hint.ExitUsage, err)
			}
			c.Site = doc.Site()
			for _, a := range addresses {
				name, address, ok := strings.Cut(a, "=")
				if _, _, err := net.SplitHostPort(address); !ok || err != nil {
					return usage.Errorf("--address %q is not NAME=HOST:PORT", a)
				}
				if _, err := known(c.Site, name); err != nil {
					return err
				}
				c.Addresses[name] = address
			}
			if key == "" {
				key = filepath.Join(folder, "operator", "restore_key")
			}
			if c.RestoreKey, err = identity.ReadSigner(key); err != nil {
				return hint.Exit(hint.ExitUsage, hint.Because(err, "--restore-key names the operator's key for reading back; a sealed one is opened by ssh-keygen -p"))
			}
			if c.Bundle, err = openBundle(env, path, passphrase); err != nil {
				return err
			}
			defer c.Bundle.Wipe()
			began := env.Now()
			c.Said = func(s drill.Step) {
				fmt.Fprintf(env.Stdout, "%8.1f s  %s", s.Took.Seconds(), s.What)
				if s.Detail != "" {
					fmt.Fprintf(env.Stdout, ": %s", s.Detail)
				}
				fmt.Fprintln(env.Stdout)
			}
			r, err := drill.Run(cmd.Context(), c)
			if err != nil {
				return err
			}
			for _, err := range r.Problems {
				fmt.Fprintf(env.Stdout, "problem: %v\n", err)
				if next := hint.Of(err); next != "" {
					fmt.Fprintf(env.Stdout, "  hint: %s\n", next)
				}
			}
			fmt.Fprintf(env.Stdout, "%8.1f s  in all; %d files, %d bytes were fetched and compared\n", env.Now().Sub(began).Seconds(), r.Files, r.Bytes)
			if !r.Passed() {
				if len(r.Problems) == 0 {
					return hint.Exit(hint.ExitFailure, errors.New("nothing could be fetched, so nothing is known"))
				}
				return hint.Exit(hint.ExitFailure, fmt.Errorf("problems found: %d", len(r.Problems)))
			}
			// Anew: the drill may have taken an hour.
			if doc, err = site.ReadDocument(filepath.Join(folder, "site.toml")); err != nil {
				return err
			}
			b := doc.Site().Bundle
			b.Drilled = env.Now()
			if err := doc.SetBundle(b); err != nil {
				return hint.Because(err, "the drill passed; its date is not noted")
			}
			if err := atomicfile.Write(filepath.Join(folder, "site.toml"), doc.Text(), 0o644); err != nil {
				return hint.Because(err, "the drill passed; its date is not noted")
			}
			fmt.Fprintf(env.Stderr, "%s: passed, and noted in site.toml: copy it to the Borg server, whose status shows the date\n", program)
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&folder, "site", "", "the site's folder, as farkeep-image site init made it")
	f.StringVar(&path, "bundle", "", "the bundle: its folder, or the sealed file")
	passphraseFlag(cmd, &passphrase, "where the passphrase of a sealed one comes from")
	f.StringVar(&key, "restore-key", "", "the key for reading back (default operator/restore_key in the site's folder)")
	f.StringVar(&sample, "sample", "64M", "bytes to fetch of each repository, with K, M, G or T")
	f.StringArrayVar(&addresses, "address", nil, "NAME=HOST:PORT where an appliance is reached instead; repeat for several")
	return cmd
}

// parseBytes reads a size: digits, and one of K, M, G, T (of 1024).
func parseBytes(text string) (int64, error) {
	digits := strings.TrimRight(text, "KMGT")
	shift := 0
	if unit := strings.TrimPrefix(text, digits); len(unit) == 1 {
		shift = 10 * (1 + strings.Index("KMGT", unit))
	} else if unit != "" {
		return 0, usage.Errorf("--sample %q is not a size: 64M, 2G", text)
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || n < 1 || n > 1<<20<<20>>shift {
		return 0, usage.Errorf("--sample %q is not a size between 1 and 1T: 64M, 2G", text)
	}
	return n << shift, nil
}
