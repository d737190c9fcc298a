package main

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"farkeep/keyserver/audit"
	"farkeep/keyserver/keystore"
	"farkeep/keyserver/seal"
	"farkeep/shared/atomicfile"
	"farkeep/shared/hint"
	"farkeep/shared/secret"
	"farkeep/shared/usage"

	"github.com/spf13/cobra"
)

func newSealCmd(env *Env, where *places) *cobra.Command {
	var to []string
	var newIdentity, passphrase string
	var id identityFlags
	cmd := &cobra.Command{
		Use:   "seal",
		Short: "Seal the stored keys with age",
		Long: `Seal every stored key, and every key that is added from now on, for the recipients
named with --to or for a new identity. Each sealed key is opened again and compared
before the one in clear goes, so the identity has to be at hand once. Done again, it
seals for other recipients; name the old and the new identity then.

Keep the identity where a thief of this machine does not find it: in its TPM
(systemd-creds), behind a passphrase, on a stick that is not left in it. A second
recipient, whose identity lies with the bundle, keeps a broken TPM from costing the keys.

A key that was stored in clear before may survive in the flash memory or in backups
of this machine: to be sure, give the disks new keys (farkeep-image disk rekey).`,
		Example: `  farkeep-keyserver seal --new-identity /root/keys.identity --passphrase
  farkeep-keyserver seal --to age1... --to age1... --identity /run/keys.identity`,
		Args: usage.Args(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) (err error) {
			if newIdentity == "" && len(to) == 0 {
				return usage.Errorf("for whom? --new-identity FILE, or --to RECIPIENT")
			}
			if passphrase != "" && newIdentity == "" {
				return usage.Errorf("--passphrase goes with --new-identity")
			}
			if err := noDumps(); err != nil {
				return err
			}
			known, err := id.load(env)
			if err != nil {
				return err
			}
			if newIdentity != "" {
				// Who mistyped a folder is not left with an identity that opens nothing.
				if _, err := keystore.Open(where.keysDir()); err != nil {
					return err
				}
				made, recipient, err := makeIdentity(env, newIdentity, passphrase)
				if err != nil {
					return err
				}
				to = append(to, recipient)
				if known == nil {
					known = made
				} else {
					known = known.Join(made)
				}
				fmt.Fprintf(env.Stderr, "%s: identity %s made; who loses it loses the keys\n", program, newIdentity)
			}
			r, err := seal.ParseRecipients(strings.Join(to, "\n"))
			if err != nil {
				return hint.Exit(hint.ExitUsage, fmt.Errorf("--to: %w", err))
			}
			back, err := asOwner(where.keysDir())
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, back()) }()
			keys, records, err := where.openSealing(env, known)
			if err != nil {
				return err
			}
			n, err := keys.Seal(r)
			if err != nil {
				return hint.Because(err, "nothing is lost; the same command goes on where this one stopped")
			}
			if err := recordKeys(records, env, "seal", fmt.Sprintf("%d keys, for %s", n, strings.Join(r.Names(), ", "))); err != nil {
				return err
			}
			fmt.Fprintf(env.Stderr, "%s: %d keys are sealed; serve needs the identity from now on: restart it with --identity or --identity-credential\n", program, n)
			for _, name := range r.Names() {
				fmt.Fprintln(env.Stdout, name)
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.StringArrayVar(&to, "to", nil, "age recipient (age1...); repeat for several")
	f.StringVar(&newIdentity, "new-identity", "", "make an identity, write it to this file, and seal for it")
	f.StringVar(&passphrase, "passphrase", "", "seal the new identity with a passphrase, from: terminal, fd:N or credential:NAME")
	f.Lookup("passphrase").NoOptDefVal = "terminal"
	id.register(cmd)
	return cmd
}

// makeIdentity makes an identity and its file.
func makeIdentity(env *Env, path, passphrase string) (*seal.Identity, string, error) {
	text, recipient, err := seal.New()
	if err != nil {
		return nil, "", err
	}
	defer text.Wipe()
	id, err := seal.ParseIdentity(text)
	if err != nil {
		return nil, "", err
	}
	file := text.Reveal()
	if passphrase != "" {
		words, err := readNewPassphrase(env, passphrase)
		if err != nil {
			return nil, "", err
		}
		defer words.Wipe()
		p, err := seal.NewPassphrase(words)
		if err != nil {
			return nil, "", hint.Exit(hint.ExitUsage, err)
		}
		if file, err = p.SealFile(text); err != nil {
			return nil, "", err
		}
	}
	if err := atomicfile.Create(path, file, 0o600); err != nil {
		if errors.Is(err, fs.ErrExist) {
			err = hint.Because(err, "an identity is never overwritten: name another file, or use this one: --to $(age-keygen -y %s) --identity %s", path, path)
		}
		return nil, "", err
	}
	return id, recipient, nil
}

// readNewPassphrase reads a passphrase that is about to seal something: at a terminal, twice.
func readNewPassphrase(env *Env, from string) (secret.Bytes, error) {
	words, err := readPassphrase(env, from, "New passphrase: ")
	if err != nil || from != "terminal" {
		return words, err
	}
	again, err := readPassphrase(env, from, "The same again: ")
	if err != nil {
		return secret.Bytes{}, err
	}
	defer again.Wipe()
	if string(words.Reveal()) != string(again.Reveal()) {
		words.Wipe()
		return secret.Bytes{}, usage.Errorf("the two passphrases differ")
	}
	return words, nil
}

// openSealing opens the keys, with the identity that opens those that are sealed
// (nil for none), and the log for what becomes of them.
func (p *places) openSealing(env *Env, known *seal.Identity) (*keystore.Store, *audit.Log, error) {
	keys, err := p.openKeys()
	if err != nil {
		return nil, nil, err
	}
	_, records, err := p.openState(env.Now)
	if err == nil && known != nil {
		err = keys.Use(known)
	}
	return keys, records, err
}

func newUnsealCmd(env *Env, where *places) *cobra.Command {
	var id identityFlags
	cmd := &cobra.Command{
		Use:   "unseal",
		Short: "Store the keys in clear again",
		Long: `Store every key in clear again, and seal none from now on. Each key in clear is
read again and compared before the sealed one goes.`,
		Example: "  farkeep-keyserver unseal --identity /root/keys.identity",
		Args:    usage.Args(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) (err error) {
			if err := noDumps(); err != nil {
				return err
			}
			known, err := id.load(env)
			if err != nil {
				return err
			}
			back, err := asOwner(where.keysDir())
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, back()) }()
			keys, records, err := where.openSealing(env, known)
			if err != nil {
				return err
			}
			n, err := keys.Unseal()
			if err != nil {
				return hint.Because(err, "nothing is lost; the same command goes on where this one stopped")
			}
			if err := recordKeys(records, env, "unseal", fmt.Sprintf("%d keys", n)); err != nil {
				return err
			}
			fmt.Fprintf(env.Stderr, "%s: %d keys are stored in clear\n", program, n)
			return nil
		},
	}
	id.register(cmd)
	return cmd
}

func recordKeys(records *audit.Log, env *Env, event, what string) error {
	if _, err := records.Append(audit.Record{Event: event, Decision: "done", Reason: what, By: who(env)}); err != nil {
		return fmt.Errorf("it is done, but not on record: %w", err)
	}
	return nil
}

// needIdentity refuses to serve sealed keys that nobody could open.
func needIdentity(keys *keystore.Store, id *seal.Identity) error {
	r, sealed, err := keys.Recipients()
	if err != nil {
		return err
	}
	if sealed && id == nil {
		return hint.Exit(hint.ExitUsage, hint.Because(fmt.Errorf("the keys are sealed for %s, and no identity is named", strings.Join(r.Names(), ", ")),
			"--identity FILE or --identity-credential NAME"))
	}
	if id == nil {
		return nil
	}
	return keys.Use(id)
}

// checkSealed says for whom the keys are sealed, and tries that each opens where an
// identity is named.
func checkSealed(env *Env, where *places, id *identityFlags) error {
	keys, err := where.openKeys()
	if err != nil {
		return nil // said already
	}
	r, sealed, err := keys.Recipients()
	if err != nil {
		return err
	}
	opener, err := id.load(env)
	if err == nil && opener != nil {
		err = keys.Use(opener)
	}
	if err != nil || !sealed {
		return err
	}
	entries, _, err := keys.List()
	if err != nil {
		return err
	}
	fmt.Fprintf(env.Stdout, "keys: sealed for %s\n", strings.Join(r.Names(), ", "))
	var failed []error
	for _, e := range entries {
		switch {
		case e.Err != nil: // said already
		case !e.Sealed:
			failed = append(failed, hint.Because(fmt.Errorf("the key of %s lies in clear in a sealed store", e.UUID), "run farkeep-keyserver seal again: it goes on where it was cut off"))
		case opener != nil:
			k, err := keys.Get(e.UUID)
			if err != nil {
				failed = append(failed, err)
				continue
			}
			k.Release()
		}
	}
	if opener == nil {
		fmt.Fprintln(env.Stdout, "note: whether they open was not tried: --identity FILE")
	}
	return errors.Join(failed...)
}
