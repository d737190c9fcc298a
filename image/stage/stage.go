// Package stage sets up a whole Farkeep on one machine: a site, home with its
// key server and its end of the VPN, a mail provider, time servers, and
// emulated appliances booted from the very image that a user would flash.
//
// Everything is done with the programs as a user runs them, by their command
// lines; the stage only plays what surrounds them. The demonstration and the
// end-to-end tests stand on it. Nothing here is for a real site: time, mail and
// VPN live on the host's loopback.
package stage

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"farkeep/image/emulate"
	"farkeep/image/freeport"
	"farkeep/image/hometunnel"
	"farkeep/image/mailsink"
	"farkeep/image/ntpserver"
	"farkeep/shared/secret"
	"farkeep/shared/site"
)

// Options say what stage to set up.
type Options struct {
	Dir     string    // an empty folder for everything
	Bin     string    // the folder with the four programs and farkeep-appliance-arm64
	Image   string    // a built image; "" builds one
	Out     io.Writer // command lines and what they print; nil for nowhere
	Console io.Writer // the appliances' serial consoles; nil for nowhere
	Log     *slog.Logger

	// The dead man's switch, in the time of a demonstration. Zero means the defaults.
	HeartbeatAge     time.Duration
	UnreachableAfter time.Duration
	ReminderInterval time.Duration
}

// Stage is a Farkeep on one machine.
type Stage struct {
	o       Options
	Site    string // the operator's site folder
	Image   string // the image before it is personalised
	Mail    *mailsink.Sink
	Clocks  []*ntpserver.Server
	home    *hometunnel.Home
	keys    *process // the key server
	keysAt  string
	udpPort uint16
	cast    map[string]*Appliance
}

// Cast says what an appliance is made of.
type Cast struct {
	Name     string
	Machine  emulate.Machine
	DiskSize int64 // bytes, of the sparse disk image
	Relay    emulate.Relay
	Window   string                   // length of its daily window, for instance "24h"; "" for none
	Settings func(text string) string // a last change to site.toml's text; nil for none
	Forward  []emulate.Forward        // ports of its LAN side, made reachable for attacks
}

// Appliance is one emulated appliance.
type Appliance struct {
	Cast
	Card string      // its personal SD image
	Disk string      // its disk image
	Pi   *emulate.Pi // nil while it is off
	// DiskServer, if set before Boot, stands before Disk: see emulate.Config.
	DiskServer string
	At         string // host:port on the loopback where its receiver is reached through the VPN
	LUKS       string

	stage *Stage
}

const (
	clocks       = 3
	mailUser     = "vault"
	mailPassword = "only for this demonstration"
	passphrase   = "not a secret in a demonstration"
)

// New sets up home: time, mail, a site, the home end of the VPN. The caller must Close it.
func New(ctx context.Context, o Options) (_ *Stage, err error) {
	if o.Out == nil {
		o.Out = io.Discard
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	s := &Stage{o: o, Site: filepath.Join(o.Dir, "site"), Image: o.Image, cast: map[string]*Appliance{}}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	// Where a package's installation would have made them.
	for _, program := range []string{"keyserver", "pusher"} {
		if err := os.MkdirAll(s.StateDir(program), 0o700); err != nil {
			return nil, err
		}
	}
	for range clocks {
		clock, err := ntpserver.Listen("127.0.0.1:0", nil)
		if err != nil {
			return nil, err
		}
		s.Clocks = append(s.Clocks, clock)
	}
	s.Mail, err = mailsink.Start(mailsink.Config{
		Address: "127.0.0.1:0", Names: []string{emulate.HostAddress}, User: mailUser, Password: mailPassword, Logger: o.Log,
	})
	if err != nil {
		return nil, err
	}
	if s.udpPort, err = freeport.UDP(); err != nil {
		return nil, err
	}
	return s, s.makeSite(ctx)
}

func (s *Stage) makeSite(ctx context.Context) error {
	passwordFile, passphraseFile := filepath.Join(s.o.Dir, "mail.password"), filepath.Join(s.o.Dir, "admin.passphrase")
	if err := errors.Join(
		os.WriteFile(passwordFile, []byte(mailPassword+"\n"), 0o600),
		os.WriteFile(passphraseFile, []byte(passphrase+"\n"), 0o600),
	); err != nil {
		return err
	}
	_, err := s.Run(ctx, "farkeep-image", "site", "init", s.Site, "--name", "demo", "--home-name", "home",
		"--endpoint", fmt.Sprintf("%s:%d", emulate.HostAddress, s.udpPort),
		"--mail-server", fmt.Sprintf("%s:%d", emulate.HostAddress, s.Mail.Addr().Port),
		"--mail-user", mailUser, "--mail-from", "vault@demo.example", "--mail-to", "operator@demo.example",
		"--mail-password-file", passwordFile, "--admin-passphrase-file", passphraseFile)
	if err != nil {
		return err
	}
	servers := make([]string, len(s.Clocks))
	for i, c := range s.Clocks {
		servers[i] = fmt.Sprintf("%q", fmt.Sprintf("%s:%d", emulate.HostAddress, c.Addr().Port))
	}
	return s.EditSite(ctx, func(text string) string {
		text = set(text, "clock", "servers", "["+strings.Join(servers, ", ")+"]")
		text = set(text, "history", "commit_interval", `"0s"`) // what a stage pushes, it pushes at once
		text = set(text, "mail", "root_ca", "\"\"\"\n"+string(s.Mail.CA())+"\"\"\"")
		for key, d := range map[string]time.Duration{
			"heartbeat_age": s.o.HeartbeatAge, "unreachable_after": s.o.UnreachableAfter, "reminder_interval": s.o.ReminderInterval,
		} {
			if d != 0 {
				text = set(text, "dead_man", key, fmt.Sprintf("%q", d))
			}
		}
		if s.o.HeartbeatAge != 0 {
			text = set(text, "dead_man", "check_interval", `"2s"`)
		}
		return text
	})
}

// set writes key = value into a table of site.toml, as a user would with an editor.
func set(text, table, key, value string) string {
	line := regexp.MustCompile(`(?m)^(# ?)?` + key + ` = .*$`)
	start := strings.Index(text, "\n["+table+"]\n") + 1
	end := len(text)
	if next := strings.Index(text[start+1:], "\n["); next >= 0 {
		end = start + 1 + next
	}
	body := text[start:end]
	if line.MatchString(body) {
		body = line.ReplaceAllLiteralString(body, key+" = "+value)
	} else {
		body = strings.TrimRight(body, "\n") + "\n" + key + " = " + value + "\n"
	}
	return text[:start] + body + text[end:]
}

// ShortLease is a Cast's Settings with which a revocation reaches an open disk
// within a minute.
func ShortLease(site string) string {
	return strings.ReplaceAll(site, "\nlease = \"24h\"", "\nlease = \"2m\"")
}

// EditSite changes site.toml and brings every machine's files in line with it.
func (s *Stage) EditSite(ctx context.Context, edit func(text string) string) error {
	path := filepath.Join(s.Site, "site.toml")
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := os.WriteFile(path, []byte(edit(string(text))), 0o644); err != nil {
		return err
	}
	_, err = s.Run(ctx, "farkeep-image", "site", "init", s.Site)
	return err
}

// Run runs one of the four programs, or another from the path, and returns what
// it printed on standard output. The error holds what it printed on the other.
func (s *Stage) Run(ctx context.Context, program string, args ...string) (string, error) {
	return s.RunWith(ctx, nil, program, args...)
}

// RunWith is Run with additions to the environment.
func (s *Stage) RunWith(ctx context.Context, environment []string, program string, args ...string) (string, error) {
	fmt.Fprintf(s.o.Out, "$ %s\n", shellLine(program, args))
	cmd := s.command(ctx, program, args...)
	cmd.Env = append(os.Environ(), environment...)
	var out, diagnostics bytes.Buffer
	cmd.Stdout = io.MultiWriter(&out, s.o.Out)
	cmd.Stderr = io.MultiWriter(&diagnostics, s.o.Out)
	if err := cmd.Run(); err != nil {
		return out.String(), &CommandError{Line: shellLine(program, args), Diagnostics: strings.TrimSpace(diagnostics.String()), Err: err}
	}
	return out.String(), nil
}

func (s *Stage) command(ctx context.Context, program string, args ...string) *exec.Cmd {
	path := program
	if strings.HasPrefix(program, "farkeep-") {
		path = filepath.Join(s.o.Bin, program)
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = time.Minute // what is interrupted may still have to report, on a host that is busy
	return cmd
}

// CommandError is a command that ended with another status than 0.
type CommandError struct {
	Line        string
	Diagnostics string
	Err         error
}

func (e *CommandError) Error() string {
	return fmt.Sprintf("%s: %v\n%s", e.Line, e.Err, e.Diagnostics)
}

func (e *CommandError) Unwrap() error { return e.Err }

// Code is the command's exit status, -1 if it has none.
func (e *CommandError) Code() int {
	var exit *exec.ExitError
	if errors.As(e.Err, &exit) {
		return exit.ExitCode()
	}
	return -1
}

func shellLine(program string, args []string) string {
	words := append([]string{program}, args...)
	for i, w := range words {
		if strings.ContainsAny(w, " \t\n'\"") {
			words[i] = "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
		}
	}
	return strings.Join(words, " ")
}

// BuildImage builds the image that a user would flash, unless Options named one.
func (s *Stage) BuildImage(ctx context.Context) error {
	if s.Image != "" {
		return nil
	}
	s.Image = filepath.Join(s.o.Dir, "farkeep.img")
	_, err := s.Run(ctx, "farkeep-image", "build", "--appliance", filepath.Join(s.o.Bin, "farkeep-appliance-arm64"), "--out", s.Image)
	return err
}

// Add adds an appliance to the site, prepares its disk and personalises its card.
// It does not boot yet.
func (s *Stage) Add(ctx context.Context, c Cast) (*Appliance, error) {
	port, err := freeport.TCP()
	if err != nil {
		return nil, err
	}
	a := &Appliance{Cast: c, stage: s, At: fmt.Sprintf("127.0.0.1:%d", port), Card: filepath.Join(s.o.Dir, c.Name+".img"), Disk: filepath.Join(s.o.Dir, c.Name+".disk")}
	board := "pi3"
	if c.Machine == emulate.Generic {
		board = "virt"
	}
	add := []string{"site", "add", "appliance", c.Name, "--board", board, "--address", a.At, "--dir", s.Site,
		"--place", "none"} // the key server of a stage answers on the loopback: no WireGuard sees who asks
	if !c.Relay.None {
		active := "high"
		if c.Relay.ActiveLow {
			active = "low"
		}
		add = append(add, "--relay-line", fmt.Sprint(c.Relay.Line), "--relay-active", active)
	}
	if c.Window != "" {
		add = append(add, "--window-length", c.Window)
	}
	if _, err := s.Run(ctx, "farkeep-image", add...); err != nil {
		return nil, err
	}
	if c.Settings != nil {
		if err := s.EditSite(ctx, c.Settings); err != nil {
			return nil, err
		}
	}
	disk, err := os.Create(a.Disk)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(disk.Truncate(c.DiskSize), disk.Close()); err != nil {
		return nil, err
	}
	if _, err := s.Run(ctx, "farkeep-image", "disk", "prepare", a.Disk, "--dir", s.Site, "--appliance", c.Name, "--yes"); err != nil {
		return nil, err
	}
	described, err := s.described(c.Name)
	if err != nil {
		return nil, err
	}
	a.LUKS = described.LUKS
	if a.LUKS == "" {
		return nil, fmt.Errorf("the disk of %s was prepared, and site.toml does not name it", c.Name)
	}
	if _, err := s.Run(ctx, "farkeep-image", "personalise", "--image", s.Image, "--settings", s.SettingsOf(c.Name), "--out", a.Card); err != nil {
		return nil, err
	}
	s.cast[c.Name] = a
	return a, nil
}

// SettingsOf is the farkeep.toml of an appliance in the site folder.
func (s *Stage) SettingsOf(name string) string {
	return filepath.Join(s.Site, "appliances", name, "farkeep.toml")
}

// OpenHome starts the key server, and home's end of the VPN for all appliances
// added so far.
func (s *Stage) OpenHome(ctx context.Context) error {
	if err := s.StartKeyServer(ctx); err != nil {
		return err
	}
	described, err := site.Read(filepath.Join(s.Site, "site.toml"))
	if err != nil {
		return err
	}
	private, err := readKey(filepath.Join(s.Site, "home", "wireguard", "farkeep.key"))
	if err != nil {
		return err
	}
	config := hometunnel.Config{PrivateKey: private, ListenPort: s.udpPort, Address: described.Home.VPNAddress, Logger: s.o.Log}
	for _, a := range described.Appliances {
		shared, err := readKey(filepath.Join(s.Site, "appliances", a.Name, "identity", "wireguard_preshared_key"))
		if err != nil {
			return err
		}
		config.Peers = append(config.Peers, hometunnel.Peer{
			PublicKey: a.VPNKey, PresharedKey: shared, AllowedIPs: []netip.Prefix{netip.PrefixFrom(a.VPNAddress, a.VPNAddress.BitLen())},
		})
	}
	if s.home, err = hometunnel.Start(config); err != nil {
		return err
	}
	keyServer, err := netip.ParseAddrPort(described.KeyServers[0].Address)
	if err != nil {
		return err
	}
	if err := s.home.Forward(keyServer.Port(), s.keysAt); err != nil {
		return err
	}
	for _, a := range described.Appliances {
		if _, err := s.home.Expose(a.Address, netip.AddrPortFrom(a.VPNAddress, 22)); err != nil {
			return err
		}
	}
	return nil
}

func readKey(path string) (secret.Text, error) {
	text, err := os.ReadFile(path)
	return secret.Text(strings.TrimSpace(string(text))), err
}

// StateDir is where a program of home keeps its state.
func (s *Stage) StateDir(program string) string { return filepath.Join(s.o.Dir, "state", program) }

// KeyServerSecrets is the key server's secrets folder.
func (s *Stage) KeyServerSecrets() string { return filepath.Join(s.Site, "keyserver-home") }

// StartKeyServer starts the key server on a port of the loopback that stays the
// same for the stage's life.
func (s *Stage) StartKeyServer(ctx context.Context) error {
	if s.keysAt == "" {
		port, err := freeport.TCP()
		if err != nil {
			return err
		}
		s.keysAt = fmt.Sprintf("127.0.0.1:%d", port)
	}
	args := append([]string{"serve", "--listen", s.keysAt}, s.KeyServerFlags()...)
	fmt.Fprintf(s.o.Out, "$ %s &\n", shellLine("farkeep-keyserver", args))
	var err error
	s.keys, err = start(s.command(ctx, "farkeep-keyserver", args...), filepath.Join(s.o.Dir, "keyserver.log"))
	if err != nil {
		return err
	}
	return s.keys.awaitPort(ctx, s.keysAt)
}

// KeyServerFlags are the flags that every command of the key server takes here.
func (s *Stage) KeyServerFlags() []string {
	return []string{"--site", filepath.Join(s.Site, "site.toml"), "--secrets", s.KeyServerSecrets(), "--state", s.StateDir("keyserver")}
}

// KeyServerAt is where the key server listens on the loopback, once it was started.
func (s *Stage) KeyServerAt() string { return s.keysAt }

// StopKeyServer ends the key server.
func (s *Stage) StopKeyServer() error {
	if s.keys == nil {
		return nil
	}
	err := s.keys.stop()
	s.keys = nil
	return err
}

// PusherFlags are the flags that every command of the pusher takes here.
func (s *Stage) PusherFlags() []string {
	return []string{"--site", filepath.Join(s.Site, "site.toml"), "--identity", filepath.Join(s.Site, "home", "pusher", "ssh_key"), "--state", s.StateDir("pusher")}
}

// Push runs the pusher once.
func (s *Stage) Push(ctx context.Context, more ...string) (string, error) {
	return s.Run(ctx, "farkeep-pusher", append(append([]string{"push"}, s.PusherFlags()...), more...)...)
}

// CloseHome ends the key server and home's end of the VPN: the house burns, and what
// stands elsewhere goes on.
func (s *Stage) CloseHome() error {
	err := s.StopKeyServer()
	if s.home != nil {
		err = errors.Join(err, s.home.Close())
		s.home = nil
	}
	return err
}

// Close ends everything that still runs.
func (s *Stage) Close() error {
	var errs []error
	for _, a := range s.cast {
		errs = append(errs, a.CutPower())
	}
	errs = append(errs, s.StopKeyServer())
	if s.home != nil {
		errs = append(errs, s.home.Close())
	}
	if s.Mail != nil {
		errs = append(errs, s.Mail.Close())
	}
	for _, c := range s.Clocks {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

// described is what site.toml says of an appliance.
func (s *Stage) described(name string) (*site.Appliance, error) {
	whole, err := site.Read(filepath.Join(s.Site, "site.toml"))
	if err != nil {
		return nil, err
	}
	a, ok := whole.Appliance(name)
	if !ok {
		return nil, fmt.Errorf("site.toml names no appliance %s", name)
	}
	return a, nil
}

// Sent is how many bytes home's end of the VPN has sent to an appliance.
func (s *Stage) Sent(name string) (uint64, error) {
	a, err := s.described(name)
	if err != nil {
		return 0, err
	}
	peers, err := s.home.Peers()
	if err != nil {
		return 0, err
	}
	for _, p := range peers {
		if p.PublicKey == a.VPNKey {
			return p.Sent, nil
		}
	}
	return 0, fmt.Errorf("home's end of the VPN has no peer %s", name)
}
