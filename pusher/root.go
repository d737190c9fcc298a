package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"
	"golang.org/x/term"

	"farkeep/pusher/appliance"
	"farkeep/pusher/borgcopy"
	"farkeep/pusher/directory"
	"farkeep/pusher/repository"
	"farkeep/pusher/target"
	"farkeep/shared/hint"
	"farkeep/shared/identity"
	"farkeep/shared/secret"
	"farkeep/shared/site"
	"farkeep/shared/tomlfile"
	"farkeep/shared/usage"
)

const program = "farkeep-pusher"

// Env is what the commands know of the world, so that tests can run them in
// their own process.
type Env struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Terminal       func() int // the width of the terminal behind Stderr; nil if there is none
	Getenv         func(string) string
	Environ        func() []string
	Now            func() time.Time
	// Passphrase asks a person for the passphrase of a key file; nil if there is nobody.
	Passphrase func(file string) (secret.Bytes, error)
}

// askPassphrase returns what asks at the terminal in, nil if it is none.
func askPassphrase(in *os.File, out io.Writer) func(string) (secret.Bytes, error) {
	if !term.IsTerminal(int(in.Fd())) {
		return nil
	}
	return func(file string) (secret.Bytes, error) {
		fmt.Fprintf(out, "Passphrase of %s: ", file)
		typed, err := term.ReadPassword(int(in.Fd()))
		fmt.Fprintln(out)
		return secret.New(typed), err
	}
}

// terminalOf returns what tells a terminal's width, nil if f is none.
func terminalOf(f *os.File) func() int {
	if !term.IsTerminal(int(f.Fd())) {
		return nil
	}
	return func() int {
		width, _, err := term.GetSize(int(f.Fd()))
		if err != nil {
			return 80
		}
		return width
	}
}

// run executes one command line and returns the exit code.
func run(ctx context.Context, args []string, env *Env) int {
	root := newRootCmd(env)
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	var ended *borgcopy.ExitError
	if errors.As(err, &ended) { // borg has said itself what is wrong
		return ended.Code
	}
	return hint.Report(env.Stderr, program, err)
}

// places are where things are, as the flags say.
type places struct {
	site, identity, state string
	verbose               bool
}

func newRootCmd(env *Env) *cobra.Command {
	at := &places{}
	root := &cobra.Command{
		Use:   program,
		Short: "Carry Borg repositories to appliances elsewhere",
		Long: `farkeep-pusher mirrors the repositories of a Borg server to its appliances, as
generations that nobody at home can alter. Borg goes on meanwhile: a repository
is locked for a moment only.

` + usage.ExitCodes,
		Example: `  farkeep-pusher check
  farkeep-pusher push
  farkeep-pusher status
  farkeep-pusher restore vault photos latest --to ./photos`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          usage.Args(cobra.NoArgs),
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetOut(env.Stdout)
	root.SetErr(env.Stderr)
	root.SetFlagErrorFunc(usage.Flags)
	f := root.PersistentFlags()
	f.StringVar(&at.site, "site", "/etc/farkeep/site.toml", "the site")
	f.StringVar(&at.identity, "identity", "/etc/farkeep/pusher/ssh_key", "the pusher's SSH key")
	f.StringVar(&at.state, "state", "/var/lib/farkeep-pusher", "folder of what the pusher remembers")
	f.BoolVarP(&at.verbose, "verbose", "v", false, "say more")
	root.AddCommand(newPushCmd(env, at), newStatusCmd(env, at), newCheckCmd(env, at), newForgetCmd(env, at),
		newGenerationsCmd(env, at), newRestoreCmd(env, at), newMountCmd(env, at), newBorgCmd(env, at))
	return root
}

func (at *places) logger(w io.Writer) *slog.Logger {
	level := slog.LevelInfo
	if at.verbose {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: level}))
}

// self is the pusher that this one is.
type self struct {
	name string // as heartbeats carry it
	// site is the site with this pusher's own sources and directory targets.
	site *site.Site
	// foreign reports whether a repository name is another pusher's.
	foreign func(repository string) bool
}

// readSelf reads the site and finds out which of its pushers this one is. Only
// a site of several needs the identity for that.
func (at *places) readSelf() (*self, error) {
	s, err := at.readSite()
	if err != nil {
		return nil, err
	}
	host, name := "", s.Home.Name
	if len(s.Pushers) > 0 {
		signer, err := at.readIdentity(s)
		if err != nil {
			return nil, err
		}
		public := identity.Line(signer.PublicKey(), "")
		for _, p := range s.Pushers {
			if identity.SamePublic(public, p.PushKey) {
				host, name = p.Name, p.Name
			}
		}
	}
	return &self{name: name, site: s.Of(host), foreign: func(repository string) bool { return s.Owner(repository) != host }}, nil
}

// readSite reads the site.
func (at *places) readSite() (*site.Site, error) {
	s, err := site.Read(at.site)
	var bad *tomlfile.Error
	switch {
	case err == nil:
		return s, nil
	case errors.Is(err, fs.ErrNotExist):
		return nil, hint.Exit(hint.ExitUsage, hint.Because(err, `"farkeep-image site init" makes it on the operator's laptop; copy it here, or name it: --site FILE`))
	case errors.As(err, &bad):
		return nil, hint.Exit(hint.ExitUsage, err)
	default:
		return nil, err
	}
}

// readIdentity reads the push key and makes sure that it is one of the site's:
// home's, or that of a further pusher.
func (at *places) readIdentity(s *site.Site) (ssh.Signer, error) {
	signer, err := identity.ReadSigner(at.identity)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = hint.Because(err, `copy the folder home/pusher of the site's secrets here, or pushers/NAME/pusher for a further pusher; or name the key: --identity FILE`)
		}
		return nil, hint.Exit(hint.ExitUsage, err)
	}
	public := identity.Line(signer.PublicKey(), "")
	if identity.SamePublic(public, s.Home.PushKey) ||
		slices.ContainsFunc(s.Pushers, func(p site.Pusher) bool { return identity.SamePublic(public, p.PushKey) }) {
		return signer, nil
	}
	err = fmt.Errorf("the key %s is not the push_key of %s, nor of a [[pusher]] there", at.identity, at.site)
	return nil, hint.Exit(hint.ExitUsage, hint.Because(err, "both must come from the same site folder: copy site.toml and the key from there again"))
}

// targets makes the targets with these names; none, or "all", means all.
func (at *places) targets(me *self, names []string, memory *repository.Memory, env *Env, log *slog.Logger) ([]target.Target, error) {
	s := me.site
	wanted := func(name string) bool {
		return len(names) == 0 || slices.Contains(names, "all") || slices.Contains(names, name)
	}
	var all []target.Target
	known := []string{"all"}
	var signer ssh.Signer
	for _, a := range s.Appliances {
		known = append(known, a.Name)
		if !wanted(a.Name) {
			continue
		}
		if signer == nil {
			var err error
			if signer, err = at.readIdentity(s); err != nil {
				return nil, err
			}
		}
		key, err := identity.ParsePublic(a.HostKey)
		if err != nil {
			return nil, hint.Exit(hint.ExitUsage, fmt.Errorf("%s: host key of %s: %w", at.site, a.Name, err))
		}
		all = append(all, appliance.New(appliance.Config{
			Name: a.Name, Address: a.Address, HostKey: key, Identity: signer,
			WakeWait: time.Duration(s.Push.WakeWait), Log: log,
		}))
	}
	used, err := usedTargets(memory)
	if err != nil {
		return nil, err
	}
	for _, d := range s.Directories {
		known = append(known, d.Name)
		if wanted(d.Name) {
			all = append(all, directory.New(directory.Config{Name: d.Name, Path: d.Path, Used: used[d.Name], Pusher: me.name, Now: env.Now, Log: log}))
		}
	}
	if err := at.knows(known, names, "one of %s"); err != nil {
		return nil, err
	}
	if len(all) == 0 {
		return nil, hint.Exit(hint.ExitUsage, hint.Because(fmt.Errorf("%s names no target", at.site), `"farkeep-image site add appliance" adds one`))
	}
	return all, nil
}

// usedTargets are those that took a push before.
func usedTargets(m *repository.Memory) (map[string]bool, error) {
	all, err := m.All()
	if err != nil {
		return nil, err
	}
	used := map[string]bool{}
	for _, r := range all {
		for name := range r.Pushed {
			used[name] = true
		}
	}
	return used, nil
}

// find looks for the site's repositories and compares them with what is
// remembered. What fails is a problem of the result.
func find(me *self, memory *repository.Memory) (repository.Found, error) {
	found := repository.Find(me.site)
	var good []repository.Repository
	for _, r := range found.Repositories {
		if me.foreign(r.Name) {
			// A folder's repositories have their names from whoever makes one there.
			err := hint.Because(fmt.Errorf("%s has the name of another pusher's repository", r.Path), "rename it, or give its folder a prefix in site.toml")
			found.Problems = append(found.Problems, repository.Problem{Name: r.Name, Err: err})
			continue
		}
		if err := memory.Check(r); err != nil {
			found.Problems = append(found.Problems, repository.Problem{Name: r.Name, Err: err})
			continue
		}
		good = append(good, r)
	}
	found.Repositories = good
	var folders []string
	for _, f := range me.site.Folders {
		folders = append(folders, f.Path)
	}
	missing, err := memory.Missing(found, folders)
	if err != nil {
		return found, err
	}
	found.Problems = append(found.Problems, missing...)
	return found, nil
}

func (at *places) memory() *repository.Memory {
	return repository.NewMemory(filepath.Join(at.state, "repositories"))
}

// knows refuses a name that is none of the site's targets; advice has room for theirs.
func (at *places) knows(known, names []string, advice string) error {
	for _, name := range names {
		if !slices.Contains(known, name) {
			return hint.Exit(hint.ExitUsage, hint.Because(fmt.Errorf("%s names no target %q", at.site, name), advice, strings.Join(known, ", ")))
		}
	}
	return nil
}
