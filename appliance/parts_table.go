package main

import (
	"path/filepath"

	"farkeep/appliance/confine"
	"farkeep/appliance/part"
	"farkeep/appliance/receiver"
	"farkeep/appliance/unlock"
	"farkeep/shared/settings"

	"golang.org/x/sys/unix"
)

// parts is the table of all parts, in the order in which they are listed and,
// backwards, stopped: mail goes last but for the disk and the network.
func parts() []partEntry {
	return append([]partEntry{
		{
			name: part.Unlock, child: true, run: unlock.Run, profile: unlockProfile,
		},
		{
			name: part.Receiver, required: true, run: receiver.Run, profile: receiverProfile,
			brief: receiverBrief,
			ports: func(s *settings.Appliance) []uint16 { return []uint16{uint16(s.Receiver.Port)} },
		},
	}, testParts()...)
}

// unlockProfile: a child of disk, with less than disk has. It reads the disk,
// asks key servers over the VPN and makes the mapping.
func unlockProfile(h part.Header) confine.Profile {
	return confine.Profile{
		Caps:    []uintptr{unix.CAP_SYS_ADMIN, unix.CAP_IPC_LOCK, unix.CAP_DAC_OVERRIDE},
		Network: confine.WholeNetwork,
		Read:    []string{"/proc", "/sys", "/etc", h.Paths.Run},
		Devices: []string{"/dev"},
	}
}

func receiverProfile(h part.Header) confine.Profile {
	return confine.Profile{
		UID:     part.ReceiverUID,
		Caps:    []uintptr{unix.CAP_NET_BIND_SERVICE},
		Network: confine.TCPPorts,
		Bind:    h.Ports,
		Read:    []string{h.Paths.Run, h.Paths.Media, filepath.Join(h.Paths.State, "log"), "/proc/sys/net/core"},
		Write:   []string{h.Paths.RunDir(part.Receiver)},
	}
}

func receiverBrief(s *settings.Appliance) any {
	b := receiver.Brief{
		Appliance: s.Name,
		HostKey:   s.Identity.HostKey,
		Interface: s.VPN.Interface,
		Port:      s.Receiver.Port,
	}
	for _, k := range s.Receiver.Keys {
		b.Keys = append(b.Keys, receiver.Key{
			Name: k.Name, Role: k.Role, PublicKey: k.PublicKey, Repositories: k.Repositories, Quota: k.QuotaBytes,
		})
	}
	return b
}
