package main

import (
	"errors"
	"fmt"
	"io/fs"

	"farkeep/keyserver/orders"
	"farkeep/keyserver/wgpeer"
	"farkeep/shared/hint"
	"farkeep/shared/identity"
	"farkeep/shared/site"

	"github.com/spf13/pflag"
)

// tunnel is home's end of the VPN, where a WireGuard peer can be taken out.
type tunnel struct{ iface, conf string }

func (t *tunnel) register(f *pflag.FlagSet) {
	f.StringVar(&t.iface, "wg-interface", "farkeep", "WireGuard interface for --void")
	f.StringVar(&t.conf, "wg-conf", "", "file of wg-quick for --void (default /etc/wireguard/INTERFACE.conf)")
}

func (t *tunnel) path() string {
	if t.conf != "" {
		return t.conf
	}
	return "/etc/wireguard/" + t.iface + ".conf"
}

// void prints what a thief of the appliance still has besides its disk's key, and
// with carryOut makes the SSH key and the WireGuard peer worthless.
func (d *desk) void(a *site.Appliance, t *tunnel, carryOut bool) error {
	var failed []error
	if carryOut {
		failed = append(failed, d.voidKey(a), d.voidPeer(a, t))
	}
	d.printVoids(a, t, carryOut)
	return errors.Join(failed...)
}

func (d *desk) voidKey(a *site.Appliance) error {
	fingerprint, err := clientFingerprint(a)
	if err != nil {
		return err
	}
	known, err := d.book.VoidKey(d.order(a.Name, "revoke --void"), fingerprint)
	switch {
	case err != nil:
		return err
	case known:
		d.say("its SSH key %s was void here already", fingerprint)
	default:
		d.say("its SSH key %s is void here", fingerprint)
	}
	return nil
}

func clientFingerprint(a *site.Appliance) (string, error) {
	key, err := identity.ParsePublic(a.ClientKey)
	if err != nil {
		return "", fmt.Errorf("client key of %s: %w", a.Name, err)
	}
	return identity.Fingerprint(key), nil
}

// voidPeer takes the appliance out of the tunnel that ends here.
func (d *desk) voidPeer(a *site.Appliance, t *tunnel) error {
	if a.VPNKey == "" {
		return nil // the VPN is not ours; printVoids says what to do
	}
	if err := d.back(); err != nil {
		return err
	}
	next := "run it as root on the machine where the tunnel ends, or name the interface with --wg-interface and --wg-conf"
	// The file first: if the second step fails, the next start carries it out.
	struck, err := wgpeer.Strike(t.path(), a.VPNKey)
	if errors.Is(err, fs.ErrNotExist) {
		err = hint.Because(err, "%s", next)
	}
	cut, cutErr := wgpeer.Cut(t.iface, a.VPNKey)
	if cutErr != nil {
		cutErr = hint.Because(cutErr, "%s", next)
	}
	if struck && err == nil {
		d.say("its WireGuard peer is out of %s", t.path())
	}
	if cut && cutErr == nil {
		d.say("its WireGuard peer is out of the interface %s: it cannot be told anything any more", t.iface)
	}
	if !struck && !cut && err == nil && cutErr == nil {
		d.say("%s and %s have no peer %s", t.iface, t.path(), a.VPNKey)
	}
	return errors.Join(err, cutErr)
}

func (d *desk) printVoids(a *site.Appliance, t *tunnel, done bool) {
	p := func(format string, args ...any) { fmt.Fprintf(d.env.Stdout, format+"\n", args...) }
	p("What a thief of %s may have besides the disk, and how to void it:", a.Name)
	p("")
	if a.VPNKey == "" {
		p("VPN: take %s out of your VPN (Tailscale: remove the machine in the admin console).", a.Name)
	} else {
		p("WireGuard peer %s: it reaches the key servers' port through the VPN.", a.VPNKey)
		if done {
			p("  On every other machine where the tunnel ends:")
		}
		p("  wg set %s peer %s remove", t.iface, a.VPNKey)
		p("  and take its [Peer] section out of %s", t.path())
		if !done {
			p("  (revoke --void does both, as root. The appliance can then not be told any more; its lease ends it.)")
		}
	}
	p("")
	if fingerprint, err := clientFingerprint(a); err == nil {
		p("SSH client key %s: it may ask the key servers, which refuse it.", fingerprint)
		if !done {
			p("  (revoke --void gives it no session any more, here.)")
		}
	}
	if host, err := identity.ParsePublic(a.HostKey); err == nil {
		p("SSH host key %s: whoever holds it can play the appliance and be sent pushes.", identity.Fingerprint(host))
		p("  On the Borg server: take [[appliance]] %q out of site.toml.", a.Name)
	}
	p("")
	if m := d.site.Mail; m.Server != "" {
		account := m.User
		if account == "" {
			account = m.From
		}
		p("Mail password of %s at %s: it sends mail in your name.", account, m.Server)
		p("  Change it at the provider, then, on the laptop: farkeep-image site init my-site --mail-password-file FILE,")
		p("  write the other appliances' cards anew (farkeep-image personalise), and put it into each key server's mail_password.")
		p("")
	}
	p("A new card for the same appliance gets new keys of all these kinds: docs/operations.md.")
}

// unvoid says that the key is void, or takes it again.
func (d *desk) unvoid(a *site.Appliance, takeBack bool) error {
	fingerprint, err := clientFingerprint(a)
	if err != nil {
		return err
	}
	void, err := orders.IsVoid(d.where.state, a.Name, fingerprint)
	if err != nil || !void {
		return err
	}
	if !takeBack {
		d.say("its SSH key %s is void: it gets no session until it has a new one, or until allow --unvoid", fingerprint)
		return nil
	}
	if _, err := d.book.UnvoidKey(d.order(a.Name, "allow --unvoid"), fingerprint); err != nil {
		return err
	}
	d.say("its SSH key %s is taken again; its WireGuard peer is not put back by this", fingerprint)
	return nil
}
