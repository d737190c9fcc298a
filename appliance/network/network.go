// Package network is the part that connects the appliance: wired links, DHCP or
// a fixed address, name servers, the clock, and then the VPN.
//
// In firmware mode it owns all of that, and does it for ever: cables that are
// pulled, network cards that come later, leases that end, homes that move. In
// service mode the system does it; the part only watches and tells. Either way
// the others read its status file and nothing else.
//
// The local line is hostile. From it the part takes an address, a gateway,
// resolvers and the time, each checked and bounded; VPN addresses are never
// among them (packages dhcp, clock and vpn say how). IPv6 comes from the
// kernel's own autoconfiguration.
//
// It leaves to the supervisor: loading modules, the sysctls that docs/network.md
// lists, and the link from /etc/resolv.conf to the file that it writes.
package network

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"reflect"
	"sync"
	"time"

	"farkeep/appliance/clock"
	"farkeep/appliance/localcall"
	"farkeep/appliance/part"
	"farkeep/appliance/status"
	"farkeep/appliance/vpn"
	"farkeep/shared/settings"

	"github.com/cenkalti/backoff/v5"
)

// Brief is what the part is told.
type Brief struct {
	Network settings.Network
	Clock   settings.Clock
	VPN     settings.VPN
}

const (
	// statusInterval is how often the status is looked at; the file is written
	// when something changed, and every rewriteInterval.
	statusInterval  = 2 * time.Second
	rewriteInterval = time.Minute
)

// The verb of the part's socket, for an admin by way of the receiver.
const verbAcceptClock = "accept-clock"

// network is the part in firmware mode.
type network struct {
	env    *part.Env
	brief  Brief
	sys    string       // "/sys"; tests have their own
	system clock.System // the kernel's; tests have their own
	lan    *lan
	clock  *clock.Keeper // nil if the clock cannot be set at all

	mu    sync.Mutex // guards the fields below
	peers []vpn.Peer

	written status.Network
}

// Run is the part. It returns nil after ctx ended.
func Run(ctx context.Context, env *part.Env) error {
	b, err := part.Brief[Brief](env)
	if err != nil {
		return err
	}
	if !env.Firmware {
		w := &watcher{env: env, brief: b, started: time.Now()}
		return env.Loop(ctx, statusInterval, w.step)
	}
	n := &network{env: env, brief: b, sys: "/sys", system: clock.Kernel{}}
	return n.run(ctx)
}

func (n *network) run(ctx context.Context) error {
	ctx, stop := context.WithCancel(ctx)
	n.lan = newLAN(n.brief, n.sys, filepath.Join(n.env.Paths.RunDir(part.Network), "resolv.conf"), n.env.Log)
	keeper, err := clock.New(clock.Config{
		Path:    filepath.Join(n.env.Paths.StateDir(part.Network), "clock"),
		Servers: n.brief.Clock.Servers,
		System:  n.system,
		Log:     n.env.Log,
	})
	if err != nil {
		// The VPN may still come up, and with it somebody who can help.
		n.env.Log.Error("the clock cannot be set", "err", err)
	} else {
		n.clock = keeper
		n.lan.changed = keeper.Wake
	}

	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	if n.clock != nil {
		wg.Go(func() {
			if err := n.clock.Run(ctx); err != nil {
				n.env.Log.Error("the clock's last known time was not saved", "err", err)
			}
		})
	}
	wg.Go(func() { n.keepVPN(ctx) })
	wg.Go(func() { n.serve(ctx) })
	defer n.lan.wait()
	changes := watchLinks(ctx, n.env.Log)
	tick := time.NewTicker(statusInterval)
	defer tick.Stop()
	for {
		if err := n.lan.reconcile(ctx); err != nil {
			n.env.Log.Error("links", "err", err)
		}
		if err := n.tell(); err != nil {
			n.env.Log.Error("status", "err", err)
		}
		n.env.Alive()
		select {
		case <-ctx.Done():
			return nil
		case <-changes:
		case <-tick.C:
		}
	}
}

// keepVPN runs the tunnel from when the clock is ready until ctx ends.
func (n *network) keepVPN(ctx context.Context) {
	if n.brief.VPN.PrivateKey == "" {
		n.env.Log.Warn("no VPN is configured")
		return
	}
	if n.clock != nil {
		select {
		case <-ctx.Done():
			return
		case <-n.clock.Ready():
		}
	}
	retry := backoff.NewExponentialBackOff()
	retry.InitialInterval, retry.MaxInterval = time.Second, time.Minute
	for {
		started := time.Now()
		err := vpn.New(n.brief.VPN, n.env.Log).Run(ctx, n.setPeers)
		n.setPeers(nil)
		if ctx.Err() != nil {
			return
		}
		n.env.Log.Error("the VPN ended", "err", err)
		if time.Since(started) > time.Minute {
			retry.Reset()
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(retry.NextBackOff()):
		}
	}
}

func (n *network) setPeers(p []vpn.Peer) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.peers = p
}

func (n *network) serve(ctx context.Context) {
	path := n.env.Paths.Socket(part.Network)
	err := localcall.Serve(ctx, path, []uint32{part.RootUID, part.ReceiverUID}, func(_ context.Context, r localcall.Request, _ *localcall.Conn) error {
		if r.Verb != verbAcceptClock {
			return fmt.Errorf("%q is not a verb of the network part", r.Verb)
		}
		if n.clock == nil {
			return errors.New("the clock cannot be set")
		}
		n.clock.Accept()
		return nil
	})
	if err != nil {
		n.env.Log.Error("local calls", "err", err)
	}
}

// tell writes the status file if there is something new to tell.
func (n *network) tell() error {
	s := n.lan.status()
	if n.clock != nil {
		c := n.clock.Status()
		s.ClockSet, s.ClockSource, s.ClockJump = c.Set, c.Source, c.Jump
	}
	n.mu.Lock()
	for _, p := range n.peers {
		s.VPNUp = s.VPNUp || p.Up
		s.Peers = append(s.Peers, status.PeerStatus{Name: p.Name, Endpoint: p.Endpoint, LastHandshake: p.LastHandshake})
	}
	n.mu.Unlock()
	s.Undervoltage = undervoltage(n.sys)
	return publish(n.env, &n.written, s)
}

// publish writes the status file if now differs from what was written, or that
// is rewriteInterval ago.
func publish(env *part.Env, written *status.Network, now status.Network) error {
	at := env.Now()
	now.Updated = written.Updated
	if reflect.DeepEqual(now, *written) && at.Sub(written.Updated).Abs() < rewriteInterval {
		return nil
	}
	now.Updated = at
	if err := status.Write(env.Paths.Status(part.Network), now); err != nil {
		return err
	}
	*written = now
	return nil
}

// usable returns a check of what the LAN offers against the VPN: an address or
// a gateway from there would draw the VPN's traffic to the LAN.
func usable(v settings.VPN) func(addresses ...netip.Addr) error {
	return func(addresses ...netip.Addr) error {
		for _, a := range addresses {
			if a.IsValid() && vpn.Contains(v, a) {
				return errors.New("the LAN offers an address of the VPN: one of the two must use another network")
			}
		}
		return nil
	}
}

// undervoltage reads the Raspberry Pi's own warning (raspberrypi-hwmon's
// in0_lcrit_alarm); a machine without that sensor has none.
func undervoltage(sys string) bool {
	names, err := filepath.Glob(filepath.Join(sys, "class/hwmon/hwmon*/name"))
	if err != nil {
		return false
	}
	for _, name := range names {
		if readLine(name) == "rpi_volt" {
			return readLine(filepath.Join(filepath.Dir(name), "in0_lcrit_alarm")) == "1"
		}
	}
	return false
}
