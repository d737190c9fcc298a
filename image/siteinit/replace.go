package siteinit

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"farkeep/shared/atomicfile"
	"farkeep/shared/hint"
	"farkeep/shared/identity"
	"farkeep/shared/site"
)

// Void is what the lost card of an appliance still has, until home and the key
// servers have the new site.toml.
type Void struct {
	HostKey, ClientKey string // fingerprints of the SSH identities
	VPNKey             string // public; "" where the VPN is not ours
	MailUser           string // whose password is on the card; "" for none
}

// Folders of an appliance while it gets another identity.
const (
	freshIdentity = "identity.new"    // complete, not in use yet
	halfIdentity  = "identity.making" // not complete
	lostIdentity  = "identity.lost"   // what the lost card has
)

// ReplaceIdentity gives an appliance other identities, because its card was lost:
// SSH host key, SSH client key, WireGuard key and preshared key, whichever it had.
// Its name, its address and its disk stay. The old private keys are removed.
//
//	new identities durable in identity.new
//	  ── identity becomes identity.lost, identity.new becomes identity
//	  ── their public halves in site.toml, and all files that follow from it
//	  ── identity.lost removed
//
// A call that was cut is finished by the next.
func (d *Dir) ReplaceIdentity(name string) (*Report, *Void, error) {
	v := &Void{}
	folder := filepath.Join("appliances", name)
	r, err := d.change(func(doc *site.Document, r *Report) error {
		a, ok := doc.Site().Appliance(name)
		if !ok {
			return usage(hint.Because(fmt.Errorf("%s has no appliance %q", d.SitePath(), name), "farkeep-image site show --dir %s lists them", d.path))
		}
		*v = Void{HostKey: fingerprint(a.HostKey), ClientKey: fingerprint(a.ClientKey), VPNKey: a.VPNKey}
		if doc.Site().Mail.User != "" {
			v.MailUser = doc.Site().Mail.User
		}
		if err := d.swapIdentity(folder, *a, r); err != nil {
			return err
		}
		fresh, err := d.publicHalves(filepath.Join(folder, "identity"), *a, r)
		if err != nil {
			return err
		}
		return doc.SetIdentity(name, fresh.HostKey, fresh.ClientKey, fresh.VPNKey)
	})
	if err != nil {
		return nil, nil, err
	}
	return r, v, d.drop(filepath.Join(folder, lostIdentity))
}

// swapIdentity puts another identity in the place of the one that site.toml knows.
func (d *Dir) swapIdentity(folder string, a site.Appliance, r *Report) error {
	at := func(name string) string { return filepath.Join(d.path, folder, name) }
	own := at("identity")
	switch _, err := os.Lstat(own); {
	case err == nil:
		now, err := d.publicHalves(filepath.Join(folder, "identity"), a, &Report{})
		if err != nil {
			return err
		}
		if !identity.SamePublic(now.ClientKey, a.ClientKey) && exists(at(lostIdentity)) {
			return nil // cut before site.toml knew
		}
		// What is there now is in use, so an older one is nobody's.
		if err := d.drop(filepath.Join(folder, lostIdentity)); err != nil {
			return err
		}
		if err := d.makeIdentity(folder, a, r); err != nil {
			return err
		}
		if err := os.Rename(own, at(lostIdentity)); err != nil {
			return fmt.Errorf("set the identity of %s aside: %w", a.Name, err)
		}
	case !errors.Is(err, fs.ErrNotExist):
		return err
	case !exists(at(freshIdentity)):
		return lost(own)
	}
	if err := os.Rename(at(freshIdentity), own); err != nil {
		return fmt.Errorf("put the new identity of %s in place: %w", a.Name, err)
	}
	return atomicfile.SyncDir(filepath.Join(d.path, folder))
}

// makeIdentity makes identity.new, unless an earlier call came as far as that.
func (d *Dir) makeIdentity(folder string, a site.Appliance, r *Report) error {
	if exists(filepath.Join(d.path, folder, freshIdentity)) {
		return nil
	}
	making := filepath.Join(folder, halfIdentity)
	if err := d.drop(making); err != nil {
		return err
	}
	in := &Report{}
	if _, err := d.publicHalves(making, a, in); err != nil {
		return err
	}
	if a.VPNKey != "" {
		if err := d.preshared(filepath.Join(making, "wireguard_preshared_key"), in); err != nil {
			return err
		}
	}
	for _, name := range in.Made {
		r.Made = append(r.Made, filepath.Join(folder, "identity", filepath.Base(name)))
	}
	// A mail password of its own goes along: farkeep.toml wants one, and the
	// operator is told to change it.
	password, err := d.read(filepath.Join(folder, "identity", "mail_password"))
	if err == nil && password != "" {
		err = d.create(filepath.Join(making, "mail_password"), password, &Report{})
	}
	if err != nil {
		return err
	}
	if err := os.Rename(filepath.Join(d.path, making), filepath.Join(d.path, folder, freshIdentity)); err != nil {
		return fmt.Errorf("make another identity for %s: %w", a.Name, err)
	}
	return atomicfile.SyncDir(filepath.Join(d.path, folder))
}

// publicHalves returns the public keys of an identity, and makes what is missing.
func (d *Dir) publicHalves(own string, a site.Appliance, r *Report) (site.Appliance, error) {
	made := site.Appliance{}
	var err error
	if made.HostKey, err = d.ssh(filepath.Join(own, "ssh_host_key"), "appliance "+a.Name, r); err != nil {
		return made, err
	}
	if made.ClientKey, err = d.ssh(filepath.Join(own, "ssh_client_key"), "appliance "+a.Name+" to key servers", r); err != nil {
		return made, err
	}
	if a.VPNKey != "" {
		made.VPNKey, err = d.wireGuard(filepath.Join(own, "wireguard_key"), r)
	}
	return made, err
}

// drop removes a folder of secrets. What is left on the disk's free blocks is void
// once home has the new site.toml.
func (d *Dir) drop(name string) error {
	if err := os.RemoveAll(filepath.Join(d.path, name)); err != nil {
		return fmt.Errorf("remove %s: %w", filepath.Join(d.path, name), err)
	}
	return nil
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func fingerprint(public string) string {
	key, err := identity.ParsePublic(public)
	if err != nil {
		return public
	}
	return identity.Fingerprint(key)
}
