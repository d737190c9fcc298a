package main

import (
	"context"
	"io"
	"path/filepath"

	"farkeep/appliance/confine"
	"farkeep/appliance/part"
	"farkeep/appliance/supervise"
	"farkeep/shared/settings"

	"golang.org/x/sys/unix"
)

// partEntry is all that the supervisor knows of one part.
type partEntry struct {
	name     string
	required bool // without it the appliance does not do its job
	child    bool // started by another part, not by the supervisor
	routine  bool // started so often that its confinement is not worth a line each time
	run      func(context.Context, *part.Env) error
	// profile is what the part may do; the child asks for it too.
	profile func(part.Header) confine.Profile
	// brief is the part's share of the settings: what it needs, nothing else.
	brief func(*settings.Appliance) any
	// ports are the TCP ports that the settings give it.
	ports func(*settings.Appliance) []uint16
}

func findPart(name string) (partEntry, bool) {
	for _, p := range parts() {
		if p.name == name {
			return p, true
		}
	}
	return partEntry{}, false
}

// specs makes the supervisor's list for this mode.
func specs(h part.Header, s *settings.Appliance) []supervise.Spec {
	var out []supervise.Spec
	for _, p := range parts() {
		if p.child {
			continue
		}
		h := h
		h.Name, h.Host = p.name, s.Name
		if p.ports != nil {
			h.Ports = p.ports(s)
		}
		out = append(out, supervise.Spec{
			Name:     p.name,
			Required: p.required,
			Attr:     p.profile(h).Attr(),
			Brief:    func(w io.Writer) error { return part.Send(w, h, p.brief(s)) },
		})
	}
	return out
}

// folder is one that must exist before the parts start.
type folder struct {
	path     string
	uid, gid int
	mode     uint32
}

// folders lists them, parents first.
func folders(p part.Paths) []folder {
	out := []folder{
		{p.Run, 0, 0, 0o755},
		{p.State, 0, 0, 0o755},
		{p.Media, 0, 0, 0o755},
		{p.Disk(), 0, 0, 0o755},
		{filepath.Join(p.State, "log"), 0, part.ReceiverUID, 0o750},
	}
	for _, f := range []struct {
		name      string
		uid       int
		stateMode uint32
	}{
		{part.Network, part.NetworkUID, 0o700},
		{part.Disk, part.RootUID, 0o755},
		{part.Keeper, part.KeeperUID, 0o755},
		{part.Receiver, part.ReceiverUID, 0},
		{part.Deadman, part.DeadmanUID, 0o755},
		{part.Mail, part.MailUID, 0o700},
	} {
		out = append(out, folder{p.RunDir(f.name), f.uid, f.uid, 0o755})
		if f.stateMode != 0 {
			out = append(out, folder{p.StateDir(f.name), f.uid, f.uid, f.stateMode})
		}
	}
	// What deadman writes there belongs to mail's group.
	return append(out, folder{p.Outbox(), part.DeadmanUID, part.MailUID, 0o750 | unix.S_ISGID})
}
