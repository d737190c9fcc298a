package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"farkeep/keyserver/moment"
	"farkeep/keyserver/orders"
	"farkeep/keyserver/seal"
	"farkeep/keyserver/transfer"
	"farkeep/shared/hint"
	"farkeep/shared/usage"

	"github.com/spf13/cobra"
	"golang.org/x/term"
)

func newExportCmd(env *Env, where *places) *cobra.Command {
	var to []string
	var passphrase string
	var id identityFlags
	cmd := &cobra.Command{
		Use:   "export",
		Short: "Write keys, states and rules, sealed, for another key server",
		Long: `Write to standard output what makes another key server like this one: every key,
what is remembered about each appliance, and site.toml. It is an age file, for the
recipients named with --to or with a passphrase; there is no way to get it in clear.
Tokens are not in it: each key server has its own.`,
		Example: `  farkeep-keyserver export --passphrase > keys.age
  farkeep-keyserver export --to age1... --identity /root/keys.identity | ssh other farkeep-keyserver import -`,
		Args: usage.Args(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) (err error) {
			if (len(to) == 0) == (passphrase == "") {
				return usage.Errorf("for whom? --to RECIPIENT, or --passphrase")
			}
			if out, ok := env.Stdout.(*os.File); ok && term.IsTerminal(int(out.Fd())) {
				return usage.Errorf("this is no text for a terminal: farkeep-keyserver export ... > keys.age")
			}
			if err := noDumps(); err != nil {
				return err
			}
			var writer func(io.Writer) (io.WriteCloser, error)
			if passphrase != "" {
				words, err := readNewPassphrase(env, passphrase)
				if err != nil {
					return err
				}
				defer words.Wipe()
				p, err := seal.NewPassphrase(words)
				if err != nil {
					return hint.Exit(hint.ExitUsage, err)
				}
				writer = p.Writer
			} else {
				r, err := seal.ParseRecipients(strings.Join(to, "\n"))
				if err != nil {
					return hint.Exit(hint.ExitUsage, fmt.Errorf("--to: %w", err))
				}
				writer = r.Writer
			}
			opener, err := id.load(env)
			if err != nil {
				return err
			}
			back, err := asOwner(where.keysDir())
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, back()) }()
			s, err := where.readSite()
			if err != nil {
				return err
			}
			rules, err := os.ReadFile(where.site)
			if err != nil {
				return err
			}
			_, me, err := where.self(s)
			if err != nil {
				return err
			}
			keys, err := where.openKeys()
			if err == nil {
				err = needIdentity(keys, opener)
			}
			if err != nil {
				return err
			}
			policies, records, err := where.openState(env.Now)
			if err != nil {
				return err
			}
			f, err := transfer.Make(s, rules, me.Name, keys, policies, env.Now())
			if err != nil {
				return err
			}
			defer f.Wipe()
			// The record first: keys leave the house.
			if err := recordKeys(records, env, "export", fmt.Sprintf("%d keys, for %s", len(f.Keys), forWhom(to))); err != nil {
				return err
			}
			w, err := writer(env.Stdout)
			if err != nil {
				return err
			}
			if err := f.Write(w); err != nil {
				return err
			}
			if err := w.Close(); err != nil {
				return fmt.Errorf("write the export: %w", err)
			}
			fmt.Fprintf(env.Stderr, "%s: %d keys, %d appliances\n", program, len(f.Keys), len(f.States))
			return nil
		},
	}
	f := cmd.Flags()
	f.StringArrayVar(&to, "to", nil, "age recipient (age1...); repeat for several")
	f.StringVar(&passphrase, "passphrase", "", "seal it with a passphrase, from: terminal, fd:N or credential:NAME")
	f.Lookup("passphrase").NoOptDefVal = "terminal"
	id.register(cmd)
	return cmd
}

func forWhom(to []string) string {
	if len(to) == 0 {
		return "a passphrase"
	}
	return strings.Join(to, ", ")
}

func newImportCmd(env *Env, where *places) *cobra.Command {
	var passphrase string
	var id identityFlags
	cmd := &cobra.Command{
		Use:   "import FILE",
		Short: "Take in what export wrote",
		Long: `Take in what "export" wrote on another key server of the site; - is standard input.
A key that is here stays, also where the file has another one. What is revoked in
the file is revoked here; what is revoked here stays revoked. What this server knows
of an appliance stays; where it knows nothing, it takes over. It can be done again.

site.toml is not replaced: differences are said.`,
		Example: `  farkeep-keyserver import keys.age --passphrase
  farkeep-keyserver import keys.age --identity /root/keys.identity`,
		Args: usage.Args(cobra.ExactArgs(1)),
		RunE: func(_ *cobra.Command, args []string) (err error) {
			if err := noDumps(); err != nil {
				return err
			}
			opener, err := id.load(env)
			if err != nil {
				return err
			}
			if opener == nil && passphrase == "" {
				return usage.Errorf("what opens it? --passphrase, or --identity FILE")
			}
			f, err := openExport(env, args[0], passphrase, opener)
			if err != nil {
				return err
			}
			defer f.Wipe()
			back, err := asOwner(where.keysDir())
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, back()) }()
			s, err := where.readSite()
			if err != nil {
				return err
			}
			if f.Site != s.Name {
				return hint.Exit(hint.ExitUsage, fmt.Errorf("%s is of the site %s, and this is %s", args[0], f.Site, s.Name))
			}
			keys, err := where.openKeys()
			if err != nil {
				return err
			}
			if _, sealed, err := keys.Recipients(); err != nil {
				return err
			} else if sealed && opener != nil {
				// It may be the file's and not the store's: then keys are not compared.
				_ = keys.Use(opener)
			}
			policies, records, err := where.openState(env.Now)
			if err != nil {
				return err
			}
			if err := recordKeys(records, env, "import", fmt.Sprintf("%d keys, %d appliances, from %s", len(f.Keys), len(f.States), f.From)); err != nil {
				return err
			}
			book := &orders.Book{Dir: where.state, Policy: policies, Audit: records, Now: func() (moment.Moment, error) { return moment.Now(env.Now) }}
			r, err := transfer.Here{Site: s, Keys: keys, Policy: policies, Book: book, By: who(env)}.Take(f)
			if err != nil {
				return hint.Because(err, "what was taken in stays; the same command goes on")
			}
			sayImport(env, f, r)
			if rules, err := os.ReadFile(where.site); err == nil && string(rules) != f.Rules {
				fmt.Fprintf(env.Stderr, "%s: site.toml on %s was another one on %s: copy the newer to both\n", program, f.From, f.Created.Format("2006-01-02"))
			}
			if len(r.Conflicts) > 0 {
				return hint.Because(fmt.Errorf("%d keys here are others than those in the file: %s", len(r.Conflicts), strings.Join(r.Conflicts, ", ")),
					"find out which one opens the disk (cryptsetup open --test-passphrase); the ones here stay")
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&passphrase, "passphrase", "", "what it is sealed with, from: terminal, fd:N or credential:NAME")
	cmd.Flags().Lookup("passphrase").NoOptDefVal = "terminal"
	id.register(cmd)
	return cmd
}

func openExport(env *Env, path, passphrase string, opener *seal.Identity) (*transfer.File, error) {
	in := env.Stdin
	if path != "-" {
		file, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		defer file.Close()
		in = file
	}
	var plain io.Reader
	var err error
	if passphrase != "" {
		words, err := readPassphrase(env, passphrase, "Passphrase of "+path+": ")
		if err != nil {
			return nil, err
		}
		defer words.Wipe()
		p, err := seal.NewPassphrase(words)
		if err != nil {
			return nil, hint.Exit(hint.ExitUsage, err)
		}
		plain, err = p.Reader(in)
		if err != nil {
			return nil, fmt.Errorf("open %s: %w", path, err)
		}
	} else if plain, err = opener.Reader(in); err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	f, err := transfer.Parse(plain)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	return f, nil
}

func sayImport(env *Env, f *transfer.File, r transfer.Report) {
	fmt.Fprintf(env.Stderr, "%s: from %s, %s: %d keys new, %d here already\n", program, f.From, f.Created.Format("2006-01-02 15:04 MST"), len(r.Added), len(r.Same)+len(r.Unchecked)+len(r.Conflicts))
	for _, line := range []struct {
		what  string
		names []string
	}{
		{"revoked now, because it is revoked there", r.Revoked},
		{"taken over what is known of", r.States},
		{"known here already, left as it is", r.Kept},
		{"not in site.toml here", r.Strangers},
		{"here already, sealed, not compared", r.Unchecked},
	} {
		if len(line.names) > 0 {
			fmt.Fprintf(env.Stderr, "%s: %s: %s\n", program, line.what, strings.Join(line.names, ", "))
		}
	}
}
