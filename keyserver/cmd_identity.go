package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"farkeep/keyserver/seal"
	"farkeep/shared/secret"
	"farkeep/shared/usage"

	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// identityFlags name the identity that opens sealed keys.
type identityFlags struct {
	files, credentials []string
	passphrase         string
}

func (i *identityFlags) register(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringArrayVar(&i.files, "identity", nil, "age identity file that opens the sealed keys; repeat for several")
	f.StringArrayVar(&i.credentials, "identity-credential", nil, "the same, as a credential that systemd gave the service (LoadCredential)")
	f.StringVar(&i.passphrase, "identity-passphrase", "terminal", "where its passphrase comes from, if it has one: terminal, fd:N or credential:NAME")
	f.Lookup("identity-passphrase").NoOptDefVal = "terminal"
}

// load reads the identity, nil where none is named.
func (i *identityFlags) load(env *Env) (*seal.Identity, error) {
	return seal.Source{
		Files: i.files, Credentials: i.credentials, Directory: env.Getenv("CREDENTIALS_DIRECTORY"),
		Passphrase: func(file string) (secret.Bytes, error) {
			return readPassphrase(env, i.passphrase, "Passphrase of "+file+": ")
		},
	}.Load()
}

// readPassphrase reads a passphrase from where a flag says. The caller wipes it.
func readPassphrase(env *Env, from, prompt string) (secret.Bytes, error) {
	if name, ok := strings.CutPrefix(from, "credential:"); ok {
		return seal.ReadCredential(env.Getenv("CREDENTIALS_DIRECTORY"), name)
	}
	if number, ok := strings.CutPrefix(from, "fd:"); ok {
		fd, err := strconv.ParseUint(number, 10, 16)
		if err != nil {
			return secret.Bytes{}, usage.Errorf("%q is not a file descriptor: fd:3, for instance", from)
		}
		f := os.NewFile(uintptr(fd), from)
		if f == nil {
			return secret.Bytes{}, usage.Errorf("there is no file descriptor %d", fd)
		}
		defer f.Close()
		text, err := secret.ReadAll(f, 4096)
		if err != nil {
			return secret.Bytes{}, fmt.Errorf("read the passphrase from %s: %w", from, err)
		}
		return secret.New(seal.TrimLine(text.Reveal())), nil
	}
	if from != "terminal" {
		return secret.Bytes{}, usage.Errorf("%q is not where a passphrase can come from: terminal, fd:N or credential:NAME", from)
	}
	in, ok := env.Stdin.(*os.File)
	if !ok || !term.IsTerminal(int(in.Fd())) {
		return secret.Bytes{}, usage.Errorf("a passphrase is needed, and standard input is no terminal: say fd:N or credential:NAME")
	}
	fmt.Fprint(env.Stderr, prompt)
	typed, err := term.ReadPassword(int(in.Fd()))
	fmt.Fprintln(env.Stderr)
	if err != nil {
		return secret.Bytes{}, fmt.Errorf("read the passphrase: %w", err)
	}
	return secret.New(typed), nil
}
