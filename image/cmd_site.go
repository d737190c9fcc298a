package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"farkeep/image/siteinit"
	"farkeep/shared/secret"
	"farkeep/shared/settings"
	"farkeep/shared/site"
	"farkeep/shared/usage"
)

// defaultSiteDir is where the site folder is looked for without --dir.
const defaultSiteDir = "farkeep-site"

// minPassphrase is the least length of the admin key's passphrase, in bytes.
// bcrypt slows a guess down to about 0.1 s; four words make it hopeless.
const minPassphrase = 10

func newSiteCmd(env *Env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "site",
		Short: "Make a site: site.toml and one secrets folder per machine",
		Long: `Make and extend a site on the operator's laptop: site.toml, and one folder for
every machine with its identities and what it needs to know of the others. No
command makes a new identity for an old name, and every command may be run again.`,
		Example: `  farkeep-image site init my-site
  farkeep-image site add appliance attic --board pi4 --relay-line 17 --relay-active low --dir my-site
  farkeep-image site add repository photos /srv/borg/photos --dir my-site
  farkeep-image site show --dir my-site`,
		Args: usage.Args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	add := &cobra.Command{
		Use:     "add",
		Short:   "Add an appliance, a pusher, a key server or a repository to a site",
		Example: "  farkeep-image site add appliance attic --board pi4 --dir my-site",
		Args:    usage.Args(cobra.NoArgs),
		RunE:    func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	add.AddCommand(newSiteAddApplianceCmd(env), newSiteAddPusherCmd(env), newSiteAddKeyServerCmd(env), newSiteAddRepositoryCmd(env))
	cmd.AddCommand(newSiteInitCmd(env), add, newSiteShowCmd(env))
	return cmd
}

func newSiteInitCmd(env *Env) *cobra.Command {
	var o siteinit.Options
	var network, keyServerAddress, mailTo, passwordFile, passphraseFile string
	cmd := &cobra.Command{
		Use:   "init DIR",
		Short: "Make a site folder, or complete one",
		Long: `Make a site folder. What the flags do not say is asked, on a terminal. In a folder
that has a site already, flags may repeat what site.toml says but not contradict
it, and all files are brought in line with site.toml.`,
		Example: `  farkeep-image site init my-site
  farkeep-image site init my-site --name home --home-name borg --endpoint home.example.net:51820 \
    --mail-server smtp.example.net:465 --mail-user attic --mail-from attic@example.net --mail-to me@example.net \
    --mail-password-file mail.password --admin-passphrase-file admin.passphrase`,
		Args: usage.Args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			var err error
			ask := newPrompt(env)
			_, statErr := os.Stat(args[0] + "/site.toml")
			fresh := errors.Is(statErr, os.ErrNotExist)
			if fresh {
				if err := askSite(ask, &o, &network, &mailTo, passwordFile != ""); err != nil {
					return err
				}
			}
			if network != "" {
				if o.Network, err = netip.ParsePrefix(network); err != nil {
					return usage.Errorf("--vpn-network: %q is not a network: write for instance 10.77.0.0/24", network)
				}
			}
			if keyServerAddress != "" {
				if o.KeyServerAddr, err = netip.ParseAddrPort(keyServerAddress); err != nil {
					return usage.Errorf("--key-server-address: %q is not an IP address and port: write for instance 10.77.0.1:%d", keyServerAddress, siteinit.KeyServerPort)
				}
			}
			if mailTo != "" {
				o.MailTo = strings.FieldsFunc(mailTo, func(r rune) bool { return r == ',' || r == ' ' })
			}
			switch {
			case passwordFile != "":
				password, err := readLine(passwordFile, "--mail-password-file")
				if err != nil {
					return err
				}
				o.MailPassword = secret.Text(password.Reveal())
			case fresh && o.MailUser != "":
				password, err := ask.secret("--mail-password-file", "Password of the mail user "+o.MailUser)
				if err != nil {
					return err
				}
				o.MailPassword = secret.Text(password.Reveal())
			}
			o.AdminPassphrase = func() (secret.Bytes, error) { return adminPassphrase(ask, passphraseFile) }
			_, report, err := siteinit.Init(args[0], o)
			return printReport(env, args[0], report, err)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Name, "name", "", "name of the site")
	f.StringVar(&o.HomeName, "home-name", "", "name of the Borg server")
	f.StringArrayVar(&o.Endpoints, "endpoint", nil, "host:port at which the appliances find home; repeat for several")
	f.StringVar(&network, "vpn-network", "", "network of the VPN (default 10.77.0.0/24)")
	f.IntVar(&o.ListenPort, "vpn-port", 0, "home's UDP port (default 51820)")
	f.StringVar(&o.KeyServer, "key-server", "", "name of the key server (default the Borg server's name)")
	f.StringVar(&keyServerAddress, "key-server-address", "", "its address and port as appliances reach it (default home's VPN address, port 4022)")
	f.StringVar(&o.MailServer, "mail-server", "", "host:port of the mail provider's server for sending")
	f.StringVar(&o.MailUser, "mail-user", "", "user name there")
	f.StringVar(&passwordFile, "mail-password-file", "", "file with that user's password in its first line")
	f.StringVar(&o.MailFrom, "mail-from", "", "sender of the appliances' mails")
	f.StringVar(&mailTo, "mail-to", "", "recipients, separated by commas")
	f.StringVar(&passphraseFile, "admin-passphrase-file", "", "file with the admin key's passphrase in its first line")
	return cmd
}

// askSite asks for what a new site needs and the flags did not say.
func askSite(ask *prompt, o *siteinit.Options, network, mailTo *string, havePassword bool) error {
	endpoints := strings.Join(o.Endpoints, ",")
	const none = "none" // a mail server in one's own network may need no user
	for _, q := range []struct {
		flag, question, fallback string
		value                    *string
	}{
		{"--name", "Name of the site", "home", &o.Name},
		{"--home-name", "Name of the Borg server", "home", &o.HomeName},
		{"--endpoint", "Where do appliances find home from outside (host:port, several with commas)", "", &endpoints},
		{"--vpn-network", "Network of the VPN", "10.77.0.0/24", network},
		{"--mail-server", "Mail provider's server for sending (host:port)", "", &o.MailServer},
		{"--mail-user", "User name there", none, &o.MailUser},
		{"--mail-from", "Sender of the appliances' mails", "", &o.MailFrom},
		{"--mail-to", "Recipients of alarms (several with commas)", "", mailTo},
	} {
		if *q.value != "" {
			continue
		}
		answer, err := ask.line(q.flag, q.question, q.fallback)
		if err != nil {
			return err
		}
		*q.value = answer
	}
	if o.MailUser == none {
		if havePassword {
			return usage.Errorf("--mail-password-file is for a user: name it with --mail-user")
		}
		o.MailUser = ""
	}
	o.Endpoints = strings.FieldsFunc(endpoints, func(r rune) bool { return r == ',' || r == ' ' })
	return nil
}

func adminPassphrase(ask *prompt, file string) (secret.Bytes, error) {
	var p secret.Bytes
	var err error
	if file != "" {
		p, err = readLine(file, "--admin-passphrase-file")
	} else {
		p, err = ask.newSecret("--admin-passphrase-file", "Passphrase for the admin key (four words or more)")
	}
	if err != nil {
		return secret.Bytes{}, err
	}
	if p.Len() < minPassphrase {
		p.Wipe()
		return secret.Bytes{}, usage.Errorf("the passphrase of the admin key has less than %d characters", minPassphrase)
	}
	return p, nil
}

func newSiteAddApplianceCmd(env *Env) *cobra.Command {
	var dir, active, start, length string
	var line int
	var n siteinit.NewAppliance
	cmd := &cobra.Command{
		Use:   "appliance NAME",
		Short: "Add an appliance",
		Long: `Add an appliance: its identities, its address in the VPN, its place in home's
WireGuard configuration and firewall rules. Without --relay-line its disk is always
on. Without --window-length its disk opens only when a push or a person wakes it.`,
		Example: `  farkeep-image site add appliance attic --board pi4 --dir my-site
  farkeep-image site add appliance attic --board pi3 --relay-line 17 --relay-active low --window-start 01:30 --window-length 4h
  farkeep-image site add appliance nas --board service --own-vpn --address nas.tail1234.ts.net:2222`,
		Args: usage.Args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			n.Name = args[0]
			f := cmd.Flags()
			if f.Changed("relay-active") && !f.Changed("relay-line") {
				return usage.Errorf("--relay-active says how a relay switches, and there is none: name its GPIO with --relay-line")
			}
			if f.Changed("window-start") && !f.Changed("window-length") {
				return usage.Errorf("--window-start opens a window that never ends: say how long with --window-length")
			}
			if f.Changed("relay-line") {
				n.Relay = settings.Relay{Driver: "gpio", Line: line, Active: active}
				if key, text := n.Relay.Mistake(); key != "" {
					return usage.Errorf("--relay-%s: %s", key, text)
				}
			}
			if err := n.Window.Start.UnmarshalText([]byte(start)); err != nil {
				return usage.Errorf("--window-start: %v", err)
			}
			if err := n.Window.Length.UnmarshalText([]byte(length)); err != nil {
				return usage.Errorf("--window-length: %v", err)
			}
			if key, text := n.Window.Mistake(); key != "" {
				return usage.Errorf("--window-%s: %s", key, text)
			}
			d, err := siteinit.Open(dir)
			if err != nil {
				return err
			}
			report, err := d.AddAppliance(n)
			return printReport(env, dir, report, err)
		},
	}
	f := cmd.Flags()
	dirFlag(cmd, &dir)
	f.StringVar(&n.Board, "board", "", strings.Join(site.Boards(), ", "))
	f.StringVar(&n.Address, "address", "", "host:port at which home reaches its receiver (default its VPN address, port 22)")
	f.BoolVar(&n.OwnVPN, "own-vpn", false, "with --board service: a VPN of its own, for instance Tailscale, carries the traffic")
	f.StringVar(&n.Place, "place", "", "what tells the key server where it is: wireguard, tailscale or none (default wireguard, without --own-vpn)")
	f.IntVar(&line, "relay-line", 0, "BCM number of the GPIO that switches the disk's supply")
	f.StringVar(&active, "relay-active", "high", "level that powers the disk: high or low")
	f.StringVar(&start, "window-start", "00:00", "when the disk opens by itself, HH:MM in UTC")
	f.StringVar(&length, "window-length", "0s", "for how long, up to 24h")
	return cmd
}

func newSiteAddPusherCmd(env *Env) *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:   "pusher NAME",
		Short: "Add a further Borg server of the same home",
		Long: `Add a further Borg server of the same home, with a farkeep-pusher of its own. It
reaches the appliances through home, and they take repositories from it whose
names begin with its own name and a dash.`,
		Example: `  farkeep-image site add pusher tower --dir my-site
  farkeep-image site add repository tower-mail /srv/borg/mail --host tower --dir my-site`,
		Args: usage.Args(cobra.ExactArgs(1)),
		RunE: func(_ *cobra.Command, args []string) error {
			d, err := siteinit.Open(dir)
			if err != nil {
				return err
			}
			report, err := d.AddPusher(args[0])
			return printReport(env, dir, report, err)
		},
	}
	dirFlag(cmd, &dir)
	return cmd
}

func newSiteAddKeyServerCmd(env *Env) *cobra.Command {
	var dir, address string
	cmd := &cobra.Command{
		Use:     "keyserver NAME",
		Short:   "Add a key server",
		Example: "  farkeep-image site add keyserver shed --address 192.168.1.7:4022 --dir my-site",
		Args:    usage.Args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			at, err := netip.ParseAddrPort(address)
			if err != nil {
				return usage.Errorf("--address: %q is not an IP address and port: write for instance 192.168.1.7:%d", address, siteinit.KeyServerPort)
			}
			d, err := siteinit.Open(dir)
			if err != nil {
				return err
			}
			report, err := d.AddKeyServer(args[0], at)
			return printReport(env, dir, report, err)
		},
	}
	dirFlag(cmd, &dir)
	cmd.Flags().StringVar(&address, "address", "", "IP address and port as the appliances reach it")
	return cmd
}

func newSiteAddRepositoryCmd(env *Env) *cobra.Command {
	var dir, folder, prefix, mount, host string
	var exclude []string
	cmd := &cobra.Command{
		Use:   "repository NAME PATH | repository --folder PATH",
		Short: "Add a repository, or a folder in which every Borg repository is one",
		Example: `  farkeep-image site add repository photos /srv/borg/photos --mount /srv/borg --dir my-site
  farkeep-image site add repository --folder /srv/borg --exclude lost+found --dir my-site
  farkeep-image site add repository --folder /srv/borg --prefix tower- --host tower --dir my-site`,
		Args: usage.Args(cobra.MaximumNArgs(2)),
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case folder != "" && len(args) > 0:
				return usage.Errorf("--folder names every repository by its own folder: leave out %q", strings.Join(args, " "))
			case folder == "" && len(args) != 2:
				return usage.Errorf("name the repository and its path, or a folder of repositories with --folder")
			case folder == "" && (prefix != "" || len(exclude) > 0):
				return usage.Errorf("--prefix and --exclude go with --folder")
			}
			d, err := siteinit.Open(dir)
			if err != nil {
				return err
			}
			var report *siteinit.Report
			if folder != "" {
				report, err = d.AddFolder(site.Folder{Path: folder, Prefix: prefix, Exclude: exclude, Mount: mount, Host: host})
			} else {
				report, err = d.AddRepository(site.Repository{Name: args[0], Path: args[1], Mount: mount, Host: host})
			}
			return printReport(env, dir, report, err)
		},
	}
	f := cmd.Flags()
	dirFlag(cmd, &dir)
	f.StringVar(&folder, "folder", "", "folder in which every Borg repository is one")
	f.StringVar(&prefix, "prefix", "", "with --folder: put before each repository's name")
	f.StringArrayVar(&exclude, "exclude", nil, "with --folder: a name in it to leave out; repeat for several")
	f.StringVar(&host, "host", "", "the pusher that it is on (default home)")
	f.StringVar(&mount, "mount", "", "mount point that must be mounted for the path to be trusted")
	return cmd
}

func newSiteShowCmd(env *Env) *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:     "show",
		Short:   "Show a site, and what is still missing",
		Example: "  farkeep-image site show --dir my-site",
		Args:    usage.Args(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			d, err := siteinit.Open(dir)
			if err != nil {
				return err
			}
			return showSite(env.Stdout, d)
		},
	}
	dirFlag(cmd, &dir)
	return cmd
}

func showSite(w io.Writer, d *siteinit.Dir) error {
	s := d.Site()
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "site\t%s\nhome\t%s\t%s\n", s.Name, s.Home.Name, address(s.Home.VPNAddress))
	if s.VPN.Network.IsValid() {
		fmt.Fprintf(t, "vpn\t%v\t%s\n", s.VPN.Network, strings.Join(s.VPN.Endpoints, " "))
	}
	for _, k := range s.KeyServers {
		fmt.Fprintf(t, "key server\t%s\t%s\n", k.Name, k.Address)
	}
	for _, a := range s.Appliances {
		disk, relay := "disk not prepared", "always on"
		if a.LUKS != "" {
			disk = "disk " + a.LUKS
		}
		if a.Relay.Driver == "gpio" {
			relay = fmt.Sprintf("relay on GPIO %d, active %s", a.Relay.Line, a.Relay.Active)
		}
		fmt.Fprintf(t, "appliance\t%s\t%s\t%s\t%s\t%s\n", a.Name, a.Address, a.Board, disk, relay)
	}
	for _, p := range s.Pushers {
		fmt.Fprintf(t, "pusher\t%s\t%s\n", p.Name, address(p.VPNAddress))
	}
	for _, r := range s.Repositories {
		fmt.Fprintf(t, "repository\t%s\t%s\n", r.Name, onHost(r.Path, r.Host))
	}
	for _, f := range s.Folders {
		fmt.Fprintf(t, "repositories in\t%s\n", onHost(f.Path, f.Host))
	}
	if s.Mail.Server != "" {
		fmt.Fprintf(t, "mail\t%s\t%s to %s\n", s.Mail.Server, s.Mail.From, strings.Join(s.Mail.To, " "))
	}
	for _, next := range d.Missing() {
		fmt.Fprintf(t, "missing\t%s\n", next)
	}
	return t.Flush()
}

// onHost is a path, with the pusher that has it unless that is home's.
func onHost(path, host string) string {
	if host == "" {
		return path
	}
	return path + " on " + host
}

func address(a netip.Addr) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}

func dirFlag(cmd *cobra.Command, dir *string) {
	cmd.Flags().StringVar(dir, "dir", defaultSiteDir, "the site folder")
}

// printReport tells the operator what a command did and what comes next.
func printReport(env *Env, dir string, r *siteinit.Report, err error) error {
	if err != nil {
		return err
	}
	for _, name := range r.Made {
		fmt.Fprintf(env.Stderr, "%s: made %s/%s\n", program, dir, name)
	}
	for _, name := range r.Changed {
		fmt.Fprintf(env.Stderr, "%s: brought in line %s/%s\n", program, dir, name)
	}
	if len(r.Made)+len(r.Changed) == 0 {
		fmt.Fprintf(env.Stderr, "%s: everything is in place already\n", program)
	}
	for _, next := range r.Next {
		fmt.Fprintf(env.Stderr, "%s: next: %s\n", program, next)
	}
	return nil
}

// readLine reads a secret from the first line of a file.
func readLine(path, flag string) (secret.Bytes, error) {
	f, err := os.Open(path)
	if err != nil {
		return secret.Bytes{}, fmt.Errorf("%s: %w", flag, err)
	}
	defer f.Close()
	all, err := secret.ReadAll(f, 4096)
	if err != nil {
		return secret.Bytes{}, fmt.Errorf("%s: read %s: %w", flag, path, err)
	}
	line, _, _ := bytes.Cut(all.Reveal(), []byte("\n"))
	line = bytes.TrimSuffix(line, []byte("\r"))
	if len(line) == 0 {
		return secret.Bytes{}, usage.Errorf("%s: the first line of %s is empty", flag, path)
	}
	return secret.New(line), nil
}
