package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"farkeep/image/emulate"
	"farkeep/image/hometunnel"
	"farkeep/image/sdcard"
	"farkeep/shared/card"
	"farkeep/shared/hint"
	"farkeep/shared/settings"
	"farkeep/shared/usage"
)

// emulation is what the flags of "emulate" say.
type emulation struct {
	image, disk, machine    string
	write                   bool
	relayLine               int
	relayActiveLow, noRelay bool
	home                    string
	expose, serve, forward  []string
	words                   string
}

func newEmulateCmd(env *Env) *cobra.Command {
	var e emulation
	cmd := &cobra.Command{
		Use:   "emulate",
		Short: "Boot an image on an emulated Raspberry Pi 3B",
		Long: `Boot an image on an emulated Raspberry Pi 3B, or on a generic arm64 machine, to try
it before it is flashed. The serial console comes on standard output.

The image stays as it is: the machine gets a copy, which is deleted afterwards, unless
--write says otherwise. The disk is written to. The relay is the one in the image's
farkeep.toml, unless a flag says otherwise: when its line closes it, the disk appears.

With --home, the home end of the VPN runs in this process; the appliance finds it
if 10.0.2.2 is among its endpoints, with the port that the file names.

Ctrl-C switches the machine off. A line on standard input plays a mishap: "unplug" and
"plug" (the disk's cable), "cut" (power cut, and on again), "off".`,
		Example: `  farkeep-image emulate --image vault.img --disk usb.img
  farkeep-image emulate --image vault.img --disk usb.img --home secrets/home/wireguard/farkeep.conf \
      --serve 7022:127.0.0.1:7022 --expose 2222:10.77.0.2:22`,
		Args: usage.Args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if e.image == "" {
				return usage.Flags(cmd, errors.New("--image is missing: which image shall boot?"))
			}
			return e.run(cmd.Context(), env, cmd.Flags().Changed("relay-line"))
		},
	}
	f := cmd.Flags()
	f.StringVar(&e.image, "image", "", "the image to boot")
	f.StringVar(&e.disk, "disk", "", "raw image of the USB disk")
	f.StringVar(&e.machine, "machine", string(emulate.RaspberryPi3), "raspi3b or virt")
	f.BoolVar(&e.write, "write", false, "let the machine write to the image itself")
	f.IntVar(&e.relayLine, "relay-line", 0, "GPIO line of the relay (default: from farkeep.toml)")
	f.BoolVar(&e.relayActiveLow, "relay-active-low", false, "with --relay-line: a low line closes the relay")
	f.BoolVar(&e.noRelay, "no-relay", false, "the disk has power as long as the machine")
	f.StringVar(&e.home, "home", "", "home's WireGuard configuration (wg-quick's form): play the home end of the VPN")
	f.StringArrayVar(&e.serve, "serve", nil, "with --home: PORT:ADDRESS, let the appliance reach a server of this machine at home's VPN address")
	f.StringArrayVar(&e.expose, "expose", nil, "with --home: PORT:ADDRESS, make an address in the VPN reachable at a port of this machine's loopback")
	f.StringArrayVar(&e.forward, "forward", nil, "[udp:]PORT:PORT, reach a port of the appliance from its LAN side at a port of this machine's loopback")
	f.StringVar(&e.words, "append", "", "further words for the kernel's command line")
	cmd.MarkFlagsMutuallyExclusive("relay-line", "no-relay")
	return cmd
}

func (e *emulation) run(ctx context.Context, env *Env, lineGiven bool) error {
	cfg := emulate.Config{
		Machine:        emulate.Machine(e.machine),
		Image:          e.image,
		Disk:           e.disk,
		Append:         e.words,
		Console:        env.Stdout,
		FollowRestarts: true,
		Logger:         env.Logger(),
	}
	if (e.home == "") && len(e.serve)+len(e.expose) > 0 {
		return misused(errors.New("--serve and --expose go through the VPN"), "name home's WireGuard configuration with --home")
	}
	if e.relayActiveLow && !lineGiven {
		return misused(errors.New("--relay-active-low says nothing without a line"), "name the line with --relay-line")
	}
	for _, s := range e.forward {
		fw, err := parseForward(s)
		if err != nil {
			return err
		}
		cfg.HostForward = append(cfg.HostForward, fw)
	}
	a, err := imageSettings(e.image)
	if err != nil {
		return err
	}
	switch {
	case lineGiven:
		cfg.Relay = emulate.Relay{Line: e.relayLine, ActiveLow: e.relayActiveLow}
	case e.noRelay || a == nil || a.Disk.Relay.Driver != "gpio":
		cfg.Relay = emulate.Relay{None: true}
	default:
		cfg.Relay = emulate.Relay{Line: a.Disk.Relay.Line, ActiveLow: a.Disk.Relay.Active == "low"}
	}
	if a == nil {
		fmt.Fprintf(env.Stderr, "%s: the image has no %s: the appliance will say so and wait; see \"%[1]s personalise --help\"\n", program, card.SettingsFile)
	}
	fmt.Fprintf(env.Stderr, "%s: relay: %v\n", program, cfg.Relay)

	if !e.write {
		dir, err := os.MkdirTemp("", "farkeep-emulate-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(dir)
		cfg.Image = filepath.Join(dir, "sd.img")
		if err := emulate.Copy(ctx, e.image, cfg.Image); err != nil {
			return err
		}
	}
	if e.home != "" {
		home, err := e.startHome(env, a)
		if err != nil {
			return err
		}
		defer home.Close()
	}
	return play(ctx, env, cfg)
}

func misused(err error, next string) error {
	return hint.Exit(hint.ExitUsage, hint.Because(err, "%s", next))
}

// imageSettings reads the farkeep.toml on an image, nil if there is none.
func imageSettings(image string) (*settings.Appliance, error) {
	f, err := os.Open(image)
	if err != nil {
		return nil, fmt.Errorf("image: %w", err)
	}
	defer f.Close()
	selector, err := sdcard.OpenPartition(f, card.Selector)
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", image, err)
	}
	for _, name := range card.SettingsNames() {
		text, err := selector.ReadFile(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("image %s: %w", image, err)
		}
		a, err := settings.Parse(name, text)
		if err != nil {
			return nil, fmt.Errorf("image %s: %w", image, err)
		}
		return a, nil
	}
	return nil, nil
}

// startHome brings the home end of the VPN up, and what goes through it.
func (e *emulation) startHome(env *Env, a *settings.Appliance) (*hometunnel.Home, error) {
	text, err := os.ReadFile(e.home)
	if err != nil {
		return nil, fmt.Errorf("home's WireGuard configuration: %w", err)
	}
	cfg, err := hometunnel.ParseConfig(text)
	if err != nil {
		return nil, fmt.Errorf("home's WireGuard configuration %s: %w", e.home, err)
	}
	cfg.Logger = env.Logger()
	home, err := hometunnel.Start(cfg)
	if err != nil {
		return nil, err
	}
	at := fmt.Sprintf("%s:%d", emulate.HostAddress, home.Port())
	fmt.Fprintf(env.Stderr, "%s: home is at %s for the appliance\n", program, at)
	if a != nil && !slices.ContainsFunc(a.VPN.Peers, func(p settings.Peer) bool { return slices.Contains(p.Endpoints, at) }) {
		fmt.Fprintf(env.Stderr, "%s: the image's %s does not name that among its endpoints, so the appliance will look for the real home; "+
			"add %q to a peer's endpoints to try this one\n", program, card.SettingsFile, at)
	}
	if err := e.mapPorts(env, home); err != nil {
		home.Close()
		return nil, err
	}
	return home, nil
}

func (e *emulation) mapPorts(env *Env, home *hometunnel.Home) error {
	for _, s := range e.serve {
		port, address, err := parseMapping(s)
		if err != nil {
			return err
		}
		if err := home.Forward(port, address); err != nil {
			return err
		}
	}
	for _, s := range e.expose {
		port, address, err := parseMapping(s)
		if err != nil {
			return err
		}
		to, err := netip.ParseAddrPort(address)
		if err != nil {
			return misused(fmt.Errorf("%q: %w", s, err), "write --expose PORT:ADDRESS, as in --expose 2222:10.77.0.2:22")
		}
		at, err := home.Expose(fmt.Sprintf("127.0.0.1:%d", port), to)
		if err != nil {
			return err
		}
		fmt.Fprintf(env.Stderr, "%s: %s is at %s\n", program, to, at)
	}
	return nil
}

// parseMapping reads PORT:ADDRESS:PORT.
func parseMapping(s string) (port uint16, address string, err error) {
	first, address, ok := strings.Cut(s, ":")
	n, err := strconv.ParseUint(first, 10, 16)
	if !ok || err != nil || !strings.Contains(address, ":") {
		return 0, "", misused(fmt.Errorf("%q is no PORT:ADDRESS", s), "an address has a port too, as in 7022:127.0.0.1:7022")
	}
	return uint16(n), address, nil
}

// parseForward reads [tcp:|udp:]HOSTPORT:GUESTPORT.
func parseForward(s string) (emulate.Forward, error) {
	rest, udp := strings.CutPrefix(s, "udp:")
	rest = strings.TrimPrefix(rest, "tcp:")
	a, b, _ := strings.Cut(rest, ":")
	host, err1 := strconv.ParseUint(a, 10, 16)
	guest, err2 := strconv.ParseUint(b, 10, 16)
	if err1 != nil || err2 != nil {
		return emulate.Forward{}, misused(fmt.Errorf("--forward %q is no pair of ports", s), "write [udp:]PORT:PORT, as in 8022:22")
	}
	return emulate.Forward{UDP: udp, HostPort: uint16(host), GuestPort: uint16(guest)}, nil
}

// play runs the machine until it is off or ctx ends, and carries out what standard input says.
func play(ctx context.Context, env *Env, cfg emulate.Config) error {
	// The machine outlives ctx by the moment that an orderly end takes.
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	stop := context.AfterFunc(ctx, end) // Start may wait for long
	pi, err := emulate.Start(life, cfg)
	stop()
	if err != nil {
		return err
	}
	orders := readOrders(life, env.Stdin)
	for {
		select {
		case <-ctx.Done():
			fmt.Fprintf(env.Stderr, "%s: switching the machine off\n", program)
			return off(life, pi)
		case <-pi.Done():
			ending, err := pi.Wait()
			fmt.Fprintf(env.Stderr, "%s: %s\n", program, ending)
			return err
		case order := <-orders:
			switch order {
			case "":
			case "plug":
				pi.PlugDisk()
			case "unplug":
				if err := pi.UnplugDisk(ctx); err != nil {
					fmt.Fprintf(env.Stderr, "%s: %v\n", program, err)
				}
			case "cut":
				fmt.Fprintf(env.Stderr, "%s: power cut\n", program)
				if err := pi.CutPower(); err != nil {
					return err
				}
				if pi, err = emulate.Start(life, pi.Config()); err != nil {
					return err
				}
			case "off":
				return off(life, pi)
			default:
				fmt.Fprintf(env.Stderr, "%s: %q: say plug, unplug, cut or off\n", program, order)
			}
		}
	}
}

func off(ctx context.Context, pi *emulate.Pi) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	return pi.PowerOff(ctx)
}

// readOrders hands over the lines of r until ctx or r ends. A read that waits for a terminal cannot be called off, so
// the goroutine may live as long as the process.
func readOrders(ctx context.Context, r io.Reader) <-chan string {
	orders := make(chan string)
	if r == nil {
		return orders
	}
	go func() {
		scan := bufio.NewScanner(r)
		for scan.Scan() {
			select {
			case orders <- strings.TrimSpace(scan.Text()):
			case <-ctx.Done():
				return
			}
		}
	}()
	return orders
}
