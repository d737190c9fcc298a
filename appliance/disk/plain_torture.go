//go:build torture

package disk

import (
	"context"
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"time"

	"farkeep/appliance/consent"
	"farkeep/appliance/unlock"
	"farkeep/shared/keywire"
)

// system is what the part works on in builds that are tortured on a machine
// without dm-crypt: a loop device with an ext4 file system in the clear. All
// else is as in the field: the state machine, e2fsck, mounting, letting go.
func system(l *linux) System { return &plain{linux: l} }

type plain struct {
	*linux
	node string // of the loop device; set by Find
}

// Find looks for a loop device whose file system has the UUID that the settings
// give to the LUKS header.
func (p *plain) Find(uuid string) (Device, error) {
	all, err := filepath.Glob(filepath.Join(p.sys, "class/block/loop*"))
	if err != nil {
		return Device{}, err
	}
	for _, dir := range all {
		name := filepath.Base(dir)
		f, err := os.Open(filepath.Join("/dev", name))
		if err != nil {
			continue
		}
		id := make([]byte, 16)
		_, err = f.ReadAt(id, superblockAt+0x68) // s_uuid
		f.Close()
		if err == nil && hex.EncodeToString(id) == strings.ReplaceAll(uuid, "-", "") {
			p.node = filepath.Join("/dev", name)
			return p.describe(name, p.node)
		}
	}
	return Device{}, errNotFound
}

// Mapping: a disk in the clear that is mounted was opened.
func (p *plain) Mapping() (string, error) {
	mounted, err := p.Mounted()
	if err != nil || !mounted {
		return "", err
	}
	return "in the clear", nil
}

func (p *plain) Unlock(context.Context, Device, map[string]keywire.Token, []string) (unlock.Result, error) {
	return unlock.Result{OK: true, HeaderDigest: "in the clear", Server: "nobody"}, nil
}

// Consent: nobody guards a disk in the clear.
func (p *plain) Consent(context.Context, consent.Round) (consent.Result, error) {
	now := consent.Boottime()
	return consent.Result{Answers: []consent.Answer{{Server: "nobody", Granted: true, Until: now + 24*time.Hour, Renew: now + time.Hour}}}, nil
}

func (p *plain) NeedsCheck(_ string, now time.Time) (Care, string, error) {
	return p.linux.NeedsCheck(p.node, now)
}

func (p *plain) Check(ctx context.Context, _ string, full bool) error {
	return p.linux.Check(ctx, p.node, full)
}

func (p *plain) Mount(string) error { return p.linux.Mount(p.node) }

func (p *plain) Unmap(bool) error { return nil }

func (p *plain) Flush(Device, bool) error { return nil }
