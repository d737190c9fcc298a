// Package settings is the appliance's one configuration file, farkeep.toml: the
// file that turns a flashed card into one particular appliance.
//
// farkeep-image writes it ([Appliance.Render]), farkeep-appliance reads it
// ([Parse]). It carries the appliance's own identities and its send-only mail
// password, never a LUKS key: that comes from the key server at every opening.
// Parse validates everything, so that whoever holds an *Appliance need not.
package settings

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	"farkeep/shared/history"
	"farkeep/shared/secret"
	"farkeep/shared/span"
	"farkeep/shared/tomlfile"
)

// Appliance is the content of farkeep.toml, validated. It must not be changed.
type Appliance struct {
	Name       string      `toml:"name"`
	Site       string      `toml:"site"`
	Identity   Identity    `toml:"identity"`
	Network    Network     `toml:"network"`
	Clock      Clock       `toml:"clock"`
	VPN        VPN         `toml:"vpn"`
	KeyServers []KeyServer `toml:"key_server"`
	Disk       Disk        `toml:"disk"`
	Receiver   Receiver    `toml:"receiver"`
	History    History     `toml:"history"`
	DeadMan    DeadMan     `toml:"dead_man"`
	Mail       Mail        `toml:"mail"`
}

// History says which generations stay; see package history.
type History = history.Settings

// Identity is what the appliance is known by.
type Identity struct {
	// HostKey is the receiver's SSH host key, an OpenSSH private key (PEM).
	HostKey secret.Text `toml:"host_key"`
	// ClientKey is the key that the appliance shows to key servers.
	ClientKey secret.Text `toml:"client_key"`
}

// Network says how the local line is used. Empty means DHCP on every wired interface.
type Network struct {
	Interface string       `toml:"interface"`           // only this interface; "" means every wired one
	Address   netip.Prefix `toml:"address,omitempty"`   // a fixed address; unset means DHCP
	Gateway   netip.Addr   `toml:"gateway,omitempty"`   // with Address
	Resolvers []netip.Addr `toml:"resolvers,omitempty"` // with Address; added to DHCP's otherwise
}

// Clock lists the time sources, asked before the VPN starts.
type Clock struct {
	Servers []string `toml:"servers"` // host or host:port, NTP; at least two must agree
}

// VPN is the WireGuard interface. In service mode it may be absent: the
// system's own VPN carries the traffic, and Interface alone is used.
type VPN struct {
	Interface  string       `toml:"interface"` // default "farkeep0"
	PrivateKey secret.Text  `toml:"private_key"`
	Address    netip.Prefix `toml:"address"`
	ListenPort int          `toml:"listen_port"` // 0: any
	Peers      []Peer       `toml:"peer"`
}

// Peer is one WireGuard peer, usually home.
type Peer struct {
	Name         string         `toml:"name"`
	PublicKey    string         `toml:"public_key"` // base64, 32 bytes
	PresharedKey secret.Text    `toml:"preshared_key"`
	Endpoints    []string       `toml:"endpoints"` // host:port, tried in turn, resolved again each time
	AllowedIPs   []netip.Prefix `toml:"allowed_ips"`
	Keepalive    Duration       `toml:"keepalive"` // default 25s
}

// KeyServer is one key server; all of them are tried until one gives the key.
type KeyServer struct {
	Name    string `toml:"name"`
	Address string `toml:"address"`  // host:port
	HostKey string `toml:"host_key"` // authorized_keys form, pinned
}

// Disk is the encrypted disk and how its power is switched.
type Disk struct {
	LUKS   string `toml:"luks_uuid"`
	Relay  Relay  `toml:"relay"`
	Window Window `toml:"window"`
	// IdleClose closes the disk outside its window this long after the last session. Default 15m.
	IdleClose Duration `toml:"idle_close"`
}

// Relay is the switch in the disk's supply.
type Relay struct {
	Driver string `toml:"driver"` // "gpio" or "none" (a disk that is always on)
	Chip   string `toml:"chip"`   // GPIO chip label; default "pinctrl-bcm2835" (Pi 3, Zero 2 W) or "pinctrl-bcm2711" (Pi 4): whichever is there
	Line   int    `toml:"line"`   // BCM GPIO number, 0 to 57
	Active string `toml:"active"` // "high" (default) or "low": the level that powers the disk
}

// Window is the daily time in which the disk has power by itself. With Length 0
// there is none: the disk is opened on "wake" alone. "24h" means always.
type Window struct {
	Start  ClockTime `toml:"start"`  // "HH:MM", UTC
	Length Duration  `toml:"length"` // up to 24h
}

// Receiver is the SSH server that takes pushes.
type Receiver struct {
	Port int           `toml:"port"` // default 22
	Keys []ReceiverKey `toml:"key"`
}

// ReceiverKey is one authorised SSH key and what it may do.
type ReceiverKey struct {
	Name         string   `toml:"name"`
	Role         string   `toml:"role"`         // "push", "restore" or "admin"
	PublicKey    string   `toml:"public_key"`   // authorized_keys form
	Repositories []string `toml:"repositories"` // push: names, "*" and a trailing "*" allowed
	QuotaBytes   int64    `toml:"quota_bytes"`  // push: 0 means the whole disk
}

// DeadMan is the dead man's switch.
type DeadMan struct {
	HeartbeatAge     Duration `toml:"heartbeat_age"`     // default 30h
	UnchangedAge     Duration `toml:"unchanged_age"`     // default 192h (8 days); 0 means never
	ReminderInterval Duration `toml:"reminder_interval"` // default 24h
	DiskFullPercent  int      `toml:"disk_full_percent"` // default 95
	UnreachableAfter Duration `toml:"unreachable_after"` // disk missing, cannot unlock, key server out of reach: alarm after; default 1h
	CheckInterval    Duration `toml:"check_interval"`    // default 1m
}

// Mail is the appliance's own way to the operator, never through the VPN.
type Mail struct {
	Server   string      `toml:"server"` // host:port
	TLS      string      `toml:"tls"`    // "implicit" (default for port 465) or "starttls"; never none
	User     string      `toml:"user"`
	Password secret.Text `toml:"password"`
	From     string      `toml:"from"`
	To       []string    `toml:"to"`
	RootCA   string      `toml:"root_ca"` // PEM, in addition to the public roots
}

// Limits on what a settings file may name.
const (
	MaxKeyServers   = 16
	MaxPeers        = 16
	MaxEndpoints    = 16
	MaxReceiverKeys = 64
	MaxClockServers = 16
	MaxRecipients   = 16
)

// Parse reads and validates a settings file; name stands for it in errors,
// which are of type *tomlfile.Error.
func Parse(name string, text []byte) (*Appliance, error) {
	// Before the file is read, so that an explicit 0 stays 0.
	a := &Appliance{History: history.Default(), DeadMan: DefaultDeadMan()}
	if err := tomlfile.Parse(name, text, a); err != nil {
		return nil, err
	}
	a.setDefaults()
	v := validator{tomlfile.NewChecker(name, text)}
	a.validate(v)
	if err := v.Err(); err != nil {
		return nil, err
	}
	return a, nil
}

func (a *Appliance) setDefaults() {
	setDefault(&a.VPN.Interface, "farkeep0")
	for i := range a.VPN.Peers {
		setDefault(&a.VPN.Peers[i].Keepalive, Duration(25*time.Second))
	}
	setDefault(&a.Disk.Relay.Driver, "none")
	setDefault(&a.Disk.Relay.Active, "high")
	setDefault(&a.Disk.IdleClose, Duration(15*time.Minute))
	setDefault(&a.Receiver.Port, 22)
	if a.Mail.TLS == "" {
		a.Mail.TLS = "starttls"
		if strings.HasSuffix(a.Mail.Server, ":465") {
			a.Mail.TLS = "implicit"
		}
	}
}

// DefaultHistory is the history of a file that does not mention it.
func DefaultHistory() History { return history.Default() }

// DefaultDeadMan is the dead man's switch of a file that does not mention it.
func DefaultDeadMan() DeadMan {
	return DeadMan{
		HeartbeatAge:     Duration(30 * time.Hour),
		UnchangedAge:     Duration(8 * 24 * time.Hour),
		ReminderInterval: Duration(24 * time.Hour),
		DiskFullPercent:  95,
		UnreachableAfter: Duration(time.Hour),
		CheckInterval:    Duration(time.Minute),
	}
}

func setDefault[T comparable](p *T, value T) {
	var zero T
	if *p == zero {
		*p = value
	}
}

// Duration is a time span written as Go does ("30h", "15m"), and in days ("8d").
type Duration = span.Duration

// ClockTime is a time of day, as the time since midnight UTC.
type ClockTime time.Duration

// String writes "HH:MM".
func (c ClockTime) String() string {
	m := int(time.Duration(c) / time.Minute)
	return fmt.Sprintf("%02d:%02d", m/60, m%60)
}

// MarshalText implements encoding.TextMarshaler.
func (c ClockTime) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (c *ClockTime) UnmarshalText(text []byte) error {
	t, err := time.Parse("15:04", string(text))
	if err != nil {
		return fmt.Errorf("%q is not a time of day: write HH:MM", text)
	}
	*c = ClockTime(time.Duration(t.Hour())*time.Hour + time.Duration(t.Minute())*time.Minute)
	return nil
}
