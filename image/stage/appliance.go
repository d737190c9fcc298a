package stage

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"farkeep/image/emulate"
	"farkeep/shared/pushwire"
)

// Boot switches the appliance on.
func (a *Appliance) Boot(ctx context.Context) error {
	pi, err := emulate.Start(ctx, emulate.Config{
		Machine: a.Machine, Image: a.Card, Disk: a.Disk, DiskServer: a.DiskServer, Relay: a.Relay,
		// The emulated Pi 3's own watchdog resets the machine as soon as it is opened.
		// When that one fires, on a host that has no time for its machine, a board
		// boots again.
		Append: "farkeep.watchdog=softdog", FollowRestarts: true, HostForward: a.Forward, Console: a.stage.o.Console, Logger: a.stage.o.Log,
	})
	if err != nil {
		return err
	}
	a.Pi = pi
	return nil
}

// CutPower switches it off in the middle of whatever it does.
func (a *Appliance) CutPower() error {
	if a.Pi == nil {
		return nil
	}
	err := a.Pi.CutPower()
	a.Pi = nil
	return err
}

// SSH runs a stock ssh with one of the site's identities and returns what it
// printed. identity is a path below the site folder.
func (a *Appliance) SSH(ctx context.Context, identity string, verb ...string) (string, error) {
	args, err := a.sshOptions(identity, "-p")
	if err != nil {
		return "", err
	}
	return a.stage.Run(ctx, "ssh", append(append(args, "127.0.0.1"), verb...)...)
}

// SFTP runs a stock sftp with the operator's restore key; batch is a file of
// its commands.
func (a *Appliance) SFTP(ctx context.Context, batch string) (string, error) {
	args, err := a.sshOptions("operator/restore_key", "-P")
	if err != nil {
		return "", err
	}
	return a.stage.Run(ctx, "sftp", append(append(args, "-b", batch), "127.0.0.1")...)
}

// sshOptions are what a user would write into ~/.ssh/config: the identity and
// the pinned host key.
func (a *Appliance) sshOptions(identity, portFlag string) ([]string, error) {
	host, port, err := net.SplitHostPort(a.At)
	if err != nil {
		return nil, err
	}
	described, err := a.stage.described(a.Name)
	if err != nil {
		return nil, err
	}
	known := filepath.Join(a.stage.o.Dir, a.Name+".known_hosts")
	if err := os.WriteFile(known, fmt.Appendf(nil, "[%s]:%s %s\n", host, port, described.HostKey), 0o600); err != nil {
		return nil, err
	}
	return []string{"-F", "none", "-i", filepath.Join(a.stage.Site, identity), portFlag, port,
		"-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes", "-o", "ConnectTimeout=60", "-o", "UserKnownHostsFile=" + known}, nil
}

// Status asks the appliance how it is, with the pusher's key.
func (a *Appliance) Status(ctx context.Context) (pushwire.Status, error) {
	var s pushwire.Status
	text, err := a.SSH(ctx, "home/pusher/ssh_key", "status", "--json")
	if err != nil {
		return s, err
	}
	err = json.Unmarshal([]byte(text), &s)
	return s, err
}

// Await asks for the status until it is as wanted, every second.
func (a *Appliance) Await(ctx context.Context, what string, ok func(pushwire.Status) bool) (pushwire.Status, error) {
	for {
		attempt, cancel := context.WithTimeout(ctx, 30*time.Second)
		s, err := a.Status(attempt)
		cancel()
		if err == nil && ok(s) {
			return s, nil
		}
		select {
		case <-ctx.Done():
			return s, fmt.Errorf("%s did not come to be %s: %w (last answer: %+v, %v)", a.Name, what, ctx.Err(), s.Disk, err)
		case <-time.After(time.Second):
		}
	}
}

// Mounted waits until the disk is open.
func (a *Appliance) Mounted(ctx context.Context) (pushwire.Status, error) {
	return a.Await(ctx, "mounted", func(s pushwire.Status) bool { return s.Disk.Mounted })
}
