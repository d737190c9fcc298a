package main

import (
	"net"
	"path/filepath"
	"slices"
	"strconv"

	"farkeep/appliance/confine"
	"farkeep/appliance/consent"
	"farkeep/appliance/deadman"
	"farkeep/appliance/disk"
	"farkeep/appliance/keeper"
	"farkeep/appliance/mail"
	"farkeep/appliance/network"
	"farkeep/appliance/part"
	"farkeep/appliance/receiver"
	"farkeep/appliance/unlock"
	"farkeep/shared/settings"

	"golang.org/x/sys/unix"
)

// parts is the table of all parts. They stop in the order from last to first:
// who writes to the disk before the disk, and the network at the very end.
func parts() []partEntry {
	return append([]partEntry{
		{
			name: part.Network, required: true, run: network.Run, profile: networkProfile,
			brief: func(s *settings.Appliance) any {
				return network.Brief{Network: s.Network, Clock: s.Clock, VPN: s.VPN}
			},
		},
		{
			name: part.Disk, required: true, run: disk.Run, profile: diskProfile,
			brief: func(s *settings.Appliance) any {
				return disk.Brief{Disk: s.Disk, Identity: s.Identity.ClientKey, KeyServers: s.KeyServers}
			},
			ports: keyServerPorts, // for its children
		},
		{
			name: part.Keeper, required: true, run: keeper.Run, profile: keeperProfile,
			brief: func(s *settings.Appliance) any { return keeper.Brief{History: s.History} },
		},
		{
			name: part.Unlock, child: true, run: unlock.Run, profile: unlockProfile,
		},
		{
			name: part.Consent, child: true, routine: true, run: consent.Run, profile: consentProfile,
		},
		{
			name: part.Receiver, required: true, run: receiver.Run, profile: receiverProfile,
			brief: receiverBrief,
			ports: func(s *settings.Appliance) []uint16 { return []uint16{uint16(s.Receiver.Port)} },
		},
		{
			name: part.Deadman, required: true, run: deadman.Run, profile: deadmanProfile,
			brief: func(s *settings.Appliance) any {
				return deadman.Brief{DeadMan: s.DeadMan, From: s.Mail.From, To: s.Mail.To}
			},
		},
		{
			name: part.Mail, required: true, run: mail.Run, profile: mailProfile, brief: mailBrief, ports: mailPorts,
		},
	}, testParts()...)
}

// networkProfile: it speaks to whoever is on the LAN, and in firmware steers
// interfaces, routes, WireGuard and the clock. In service mode it only looks.
func networkProfile(h part.Header) confine.Profile {
	p := confine.Profile{
		UID:     part.NetworkUID,
		Network: confine.WholeNetwork,
		Clock:   true, // also to ask whether the system keeps it
		Read:    []string{h.Paths.Run, "/etc", "/proc", "/sys"},
		Write:   []string{h.Paths.RunDir(part.Network), h.Paths.StateDir(part.Network)},
	}
	if h.Firmware {
		p.Caps = []uintptr{unix.CAP_NET_ADMIN, unix.CAP_NET_RAW, unix.CAP_SYS_TIME}
	}
	return p
}

// diskProfile: mounting and mapping need root, and Landlock forbids mounting. It
// keeps the network for its child, the part unlock, and opens no socket itself
// but unix ones.
func diskProfile(h part.Header) confine.Profile {
	return confine.Profile{
		Caps: []uintptr{
			unix.CAP_SYS_ADMIN, unix.CAP_IPC_LOCK, unix.CAP_DAC_OVERRIDE, unix.CAP_SYS_RAWIO,
			unix.CAP_CHOWN, unix.CAP_FOWNER, unix.CAP_KILL,
		},
		Network: confine.WholeNetwork,
		Mounts:  true,
		Exec:    true,
	}
}

// keeperProfile: everything on the open disk and its own state, no network.
func keeperProfile(h part.Header) confine.Profile {
	return confine.Profile{
		UID:   part.KeeperUID,
		Read:  []string{h.Paths.Run},
		Write: []string{h.Paths.RunDir(part.Keeper), h.Paths.StateDir(part.Keeper), h.Paths.Media},
	}
}

// deadmanProfile: it reads what the others say of themselves and writes mails
// that another part sends.
func deadmanProfile(h part.Header) confine.Profile {
	return confine.Profile{
		UID:   part.DeadmanUID,
		Read:  []string{h.Paths.Run, "/proc/sys/kernel/random"},
		Write: []string{h.Paths.RunDir(part.Deadman), h.Paths.StateDir(part.Deadman)},
	}
}

// mailProfile: it may connect to the mail server's port and to name servers. It
// cannot alter the mails that it sends.
func mailProfile(h part.Header) confine.Profile {
	return confine.Profile{
		UID:     part.MailUID,
		Network: confine.TCPPorts,
		Connect: h.Ports,
		Read:    []string{h.Paths.Run, "/etc", h.Paths.Outbox()},
		Write:   []string{h.Paths.RunDir(part.Mail), h.Paths.StateDir(part.Mail)},
	}
}

func mailBrief(s *settings.Appliance) any {
	b := mail.Brief{Mail: s.Mail}
	if s.VPN.Address.IsValid() {
		b.VPN = append(b.VPN, s.VPN.Address.Masked())
	}
	for _, peer := range s.VPN.Peers {
		b.VPN = append(b.VPN, peer.AllowedIPs...)
	}
	return b
}

func mailPorts(s *settings.Appliance) []uint16 {
	// 53: answers of name servers that are too long for UDP.
	return append([]uint16{53}, portOf(s.Mail.Server)...)
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

// consentProfile: a child of disk that asks key servers and does nothing else.
// It is root by birth, and may do what root may not be denied: lock its memory.
func consentProfile(h part.Header) confine.Profile {
	return confine.Profile{
		Caps:    []uintptr{unix.CAP_IPC_LOCK},
		Network: confine.TCPPorts,
		Connect: append([]uint16{53}, h.Ports...), // answers of name servers that are too long for UDP
		Read:    []string{"/etc", h.Paths.Run},    // firmware's resolv.conf is a link to the network part's
	}
}

func keyServerPorts(s *settings.Appliance) []uint16 {
	var ports []uint16
	for _, k := range s.KeyServers {
		ports = append(ports, portOf(k.Address)...)
	}
	slices.Sort(ports)
	return slices.Compact(ports)
}

// portOf is the port of an address host:port, as the settings have them.
func portOf(address string) []uint16 {
	_, text, err := net.SplitHostPort(address)
	if err != nil {
		return nil
	}
	port, err := strconv.ParseUint(text, 10, 16)
	if err != nil {
		return nil
	}
	return []uint16{uint16(port)}
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
		Window:    s.Disk.Window,
	}
	for _, k := range s.Receiver.Keys {
		b.Keys = append(b.Keys, receiver.Key{
			Name: k.Name, Role: k.Role, PublicKey: k.PublicKey, Repositories: k.Repositories, Quota: k.QuotaBytes,
		})
	}
	return b
}
