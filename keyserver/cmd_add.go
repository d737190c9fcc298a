package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"farkeep/keyserver/audit"
	"farkeep/shared/hint"
	"farkeep/shared/keywire"
	"farkeep/shared/secret"
	"farkeep/shared/settings"
	"farkeep/shared/usage"

	"github.com/spf13/cobra"
)

func newAddCmd(env *Env, where *places) *cobra.Command {
	var file string
	var stdin bool
	cmd := &cobra.Command{
		Use:   "add UUID",
		Short: "Take in the key of a disk",
		Long: `Take in the key of a disk, byte by byte as it is: a newline at its end is part of
it, as it is for cryptsetup --key-file. A key that is there already stays.`,
		Example: `  farkeep-keyserver add 0b6e1f5c-8d1b-4c52-9a57-6a2f0c9d3e11 --key-file disk.key
  farkeep-keyserver add 0b6e1f5c-8d1b-4c52-9a57-6a2f0c9d3e11 --stdin < disk.key`,
		Args: usage.Args(cobra.ExactArgs(1)),
		RunE: func(_ *cobra.Command, args []string) error {
			uuid := args[0]
			if !settings.IsLUKSUUID(uuid) {
				return hint.Exit(hint.ExitUsage, hint.Because(fmt.Errorf("%q is not a LUKS UUID", uuid), "cryptsetup luksUUID DEVICE prints it"))
			}
			s, err := where.readSite()
			if err != nil {
				return err
			}
			key, err := readKey(env, file)
			if err != nil {
				return err
			}
			defer key.Wipe()
			// From here on as the service, which has to read what is written.
			if _, err := asOwner(where.state); err != nil {
				return err
			}
			keys, err := where.openKeys()
			if err != nil {
				return err
			}
			_, records, err := where.openState(env.Now)
			if err != nil {
				return err
			}
			owner := ""
			for _, a := range s.Appliances {
				if a.LUKS == uuid {
					owner = a.Name
				}
			}
			if err := keys.Add(uuid, key); err != nil {
				if errors.Is(err, fs.ErrExist) {
					return hint.Because(fmt.Errorf("there is a key of %s already", uuid), "a key is never replaced in passing: remove %s/%s first if you are sure", where.keysDir(), keywire.KeyFile(uuid))
				}
				return err
			}
			// The key is safe to have without a record; a record without the key would lie.
			if _, err := records.Append(audit.Record{Event: "add", Decision: "done", Appliance: owner, UUID: uuid, By: who(env)}); err != nil {
				return fmt.Errorf("the key is stored, but not on record: %w", err)
			}
			if bytes.HasSuffix(key.Reveal(), []byte("\n")) {
				fmt.Fprintf(env.Stderr, "%s: the key ends in a newline, which is part of it; is it meant to be?\n", program)
			}
			if owner == "" {
				fmt.Fprintf(env.Stderr, "%s: no appliance in %s has this disk yet: nobody gets the key until one has\n", program, where.site)
			}
			fmt.Fprintf(env.Stderr, "%s: key of %s stored, %d bytes\n", program, uuid, key.Len())
			return nil
		},
	}
	cmd.Flags().StringVar(&file, "key-file", "", "file that holds the key")
	cmd.Flags().BoolVar(&stdin, "stdin", false, "read the key from standard input")
	cmd.MarkFlagsMutuallyExclusive("key-file", "stdin")
	cmd.MarkFlagsOneRequired("key-file", "stdin")
	return cmd
}

// readKey reads a key from file, or from standard input where file is "".
func readKey(env *Env, file string) (secret.Bytes, error) {
	in := env.Stdin
	if file != "" {
		f, err := os.Open(file)
		if err != nil {
			return secret.Bytes{}, err
		}
		defer f.Close()
		if info, err := f.Stat(); err == nil && info.Mode().IsRegular() && info.Mode().Perm()&0o077 != 0 {
			fmt.Fprintf(env.Stderr, "%s: %s has mode %04o: others could read the key there\n", program, file, info.Mode().Perm())
		}
		in = f
	}
	key, err := secret.ReadAll(io.Reader(in), keywire.MaxKey)
	if errors.Is(err, secret.ErrTooLong) {
		return secret.Bytes{}, usage.Errorf("this is longer than %d bytes: not a key", keywire.MaxKey)
	}
	if err != nil {
		return secret.Bytes{}, fmt.Errorf("read the key: %w", err)
	}
	if key.Len() == 0 {
		return secret.Bytes{}, usage.Errorf("the key is empty")
	}
	return key, nil
}
