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
	"strings"
	"time"

	"farkeep/keyserver/audit"
	"farkeep/keyserver/keystore"
	"farkeep/keyserver/place"
	"farkeep/keyserver/policy"
	"farkeep/shared/hint"
	"farkeep/shared/identity"
	"farkeep/shared/secret"
	"farkeep/shared/settings"
	"farkeep/shared/site"
	"farkeep/shared/usage"

	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"
)

const program = "farkeep-keyserver"

// Env is what the commands know of the world, so that tests can run them in
// their own process.
type Env struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Getenv         func(string) string
	Now            func() time.Time
}

// Logger writes to standard error, where the journal or a terminal reads it.
func (e *Env) Logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(e.Stderr, nil))
}

// run executes one command line and returns the exit code.
func run(ctx context.Context, args []string, env *Env) int {
	root := newRootCmd(env)
	root.SetArgs(args)
	return hint.Report(env.Stderr, program, root.ExecuteContext(ctx))
}

func newRootCmd(env *Env) *cobra.Command {
	where := &places{}
	root := &cobra.Command{
		Use:   program,
		Short: "Hold the keys of the appliances' disks and decide who gets them",
		Long: `farkeep-keyserver gives an appliance the key of its disk, as long as nobody has
revoked it, and writes down every decision before it acts on it.

` + usage.ExitCodes,
		Example: `  farkeep-keyserver check
  farkeep-keyserver serve
  farkeep-keyserver list
  farkeep-keyserver revoke attic --reason "stolen"`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          usage.Args(cobra.NoArgs),
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetIn(env.Stdin)
	root.SetOut(env.Stdout)
	root.SetErr(env.Stderr)
	root.SetFlagErrorFunc(usage.Flags)
	f := root.PersistentFlags()
	f.StringVar(&where.site, "site", "/etc/farkeep/site.toml", "the site")
	f.StringVar(&where.secrets, "secrets", "/etc/farkeep/keyserver", "folder with ssh_host_key and keys/")
	f.StringVar(&where.state, "state", "/var/lib/farkeep-keyserver", "folder with what is known of each appliance, and the audit log")
	root.AddCommand(
		newServeCmd(env, where),
		newAddCmd(env, where),
		newSealCmd(env, where),
		newUnsealCmd(env, where),
		newExportCmd(env, where),
		newImportCmd(env, where),
		newListCmd(env, where),
		newWaitingCmd(env, where),
		newApproveCmd(env, where),
		newDenyCmd(env, where),
		newExpectCmd(env, where),
		newRevokeCmd(env, where),
		newAllowCmd(env, where),
		newEndpointsCmd(env),
		newCheckCmd(env, where),
		newAuditCmd(env, where),
		newBundleCmd(env),
		newDrillCmd(env),
	)
	return root
}

// places are where a key server's files are.
type places struct{ site, secrets, state, endpoints string }

func (p *places) registerEndpoints(cmd *cobra.Command) {
	cmd.Flags().StringVar(&p.endpoints, "endpoints", place.DefaultPath, "what \"farkeep-keyserver endpoints\" writes")
}

// mail is the account that alarms go by, with its password; zero with an error
// where there is none.
func (p *places) mail(s *site.Site) (settings.Mail, error) {
	m := s.Mail
	if m.Server == "" {
		return settings.Mail{}, hint.Because(errors.New("site.toml has no [mail]: alarms go to the log only"), "name a mail server in site.toml")
	}
	account := settings.Mail{Server: m.Server, TLS: m.TLS, User: m.User, From: m.From, To: m.To, RootCA: m.RootCA}
	if m.User == "" { // a mail server in one's own network may need none
		return account, nil
	}
	path := filepath.Join(p.secrets, "mail_password")
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrPermission) {
		return settings.Mail{}, hint.Because(fmt.Errorf("read the mail password: %w", err), "run it as root, or as the user of the service")
	}
	if err != nil {
		return settings.Mail{}, hint.Because(fmt.Errorf("read the mail password: %w", err), "copy mail_password from the site folder (keyserver-NAME)")
	}
	defer f.Close()
	info, err := f.Stat()
	if err == nil && info.Mode().Perm()&0o077 != 0 {
		err = hint.Because(fmt.Errorf("%s has mode %04o: others can read the password", path, info.Mode().Perm()), "chmod 600 %s", path)
	}
	if err != nil {
		return settings.Mail{}, err
	}
	text, err := secret.ReadAll(f, 4096)
	if err != nil {
		return settings.Mail{}, fmt.Errorf("read %s: %w", path, err)
	}
	account.Password = secret.Text(strings.TrimRight(string(text.Reveal()), "\r\n"))
	return account, nil
}

func (p *places) keysDir() string     { return filepath.Join(p.secrets, "keys") }
func (p *places) hostKeyPath() string { return filepath.Join(p.secrets, "ssh_host_key") }

func (p *places) readSite() (*site.Site, error) {
	s, err := site.Read(p.site)
	if errors.Is(err, fs.ErrNotExist) {
		err = hint.Because(err, "copy site.toml from the site folder that farkeep-image site init made, or name it with --site")
	}
	return s, hint.Exit(hint.ExitUsage, err)
}

func (p *places) openKeys() (*keystore.Store, error) { return keystore.Open(p.keysDir()) }

// openState opens what the key server remembers, and makes the folder when it
// is the first to look.
func (p *places) openState(now func() time.Time) (*policy.Store, *audit.Log, error) {
	if err := os.Mkdir(p.state, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, nil, hint.Because(fmt.Errorf("make the state folder: %w", err), "run as the user of the service, or name another folder with --state")
	}
	log, err := audit.Open(p.state, now)
	return policy.Open(p.state), log, err
}

// self finds out which key server of the site this one is, by its host key.
func (p *places) self(s *site.Site) (ssh.Signer, *site.KeyServer, error) {
	signer, err := identity.ReadSigner(p.hostKeyPath())
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = hint.Because(err, "copy ssh_host_key from the site folder (keyserver-NAME), or name its folder with --secrets")
		}
		return nil, nil, hint.Exit(hint.ExitUsage, err)
	}
	line := identity.Line(signer.PublicKey(), "")
	for i, k := range s.KeyServers {
		if identity.SamePublic(line, k.HostKey) {
			return signer, &s.KeyServers[i], nil
		}
	}
	return nil, nil, hint.Exit(hint.ExitUsage, hint.Because(fmt.Errorf("the host key %s (%s) is no key server of the site %s: every appliance would refuse it",
		p.hostKeyPath(), identity.Fingerprint(signer.PublicKey()), s.Name), "copy site.toml and ssh_host_key from the same site folder"))
}

// who names the person at the terminal for the audit log.
func who(env *Env) string {
	for _, name := range []string{"SUDO_USER", "USER", "LOGNAME"} {
		if v := env.Getenv(name); v != "" {
			return v
		}
	}
	return fmt.Sprintf("uid %d", os.Getuid())
}

// known finds an appliance by the name that a person typed.
func known(s *site.Site, name string) (*site.Appliance, error) {
	if a, ok := s.Appliance(name); ok {
		return a, nil
	}
	var names []string
	for _, a := range s.Appliances {
		names = append(names, a.Name)
	}
	list := "the site has none"
	if len(names) > 0 {
		list = "the site has " + strings.Join(names, ", ")
	}
	return nil, hint.Exit(hint.ExitUsage, hint.Because(fmt.Errorf("there is no appliance %q", name), "%s", list))
}
