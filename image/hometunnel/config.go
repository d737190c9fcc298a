package hometunnel

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"farkeep/shared/identity"
	"farkeep/shared/secret"
)

// maxPeers bounds a configuration file.
const maxPeers = 1000

// ParseConfig reads a wg-quick(8) configuration file, such as the one that "farkeep-image site init" writes for
// home. It takes what a tunnel end needs and passes over what is for wg-quick alone (DNS, MTU, Table, PreUp and the
// like); a key that neither knows is an error. Errors name the line and never quote a key.
func ParseConfig(text []byte) (Config, error) {
	var c Config
	section := ""
	for i, line := range strings.Split(string(text), "\n") {
		line, _, _ = strings.Cut(line, "#")
		line = strings.TrimSpace(line)
		if line == "" {
			continue
		}
		if strings.HasPrefix(line, "[") {
			section = strings.ToLower(line)
			switch section {
			case "[interface]":
			case "[peer]":
				if len(c.Peers) == maxPeers {
					return Config{}, fmt.Errorf("line %d: more than %d peers", i+1, maxPeers)
				}
				c.Peers = append(c.Peers, Peer{})
			default:
				return Config{}, fmt.Errorf("line %d: section %.40q, want [Interface] or [Peer]", i+1, line)
			}
			continue
		}
		name, value, ok := strings.Cut(line, "=")
		name, value = strings.ToLower(strings.TrimSpace(name)), strings.TrimSpace(value)
		if !ok {
			return Config{}, fmt.Errorf("line %d: want NAME = VALUE", i+1)
		}
		var err error
		switch section {
		case "[interface]":
			err = c.setInterface(name, value)
		case "[peer]":
			err = c.Peers[len(c.Peers)-1].set(name, value)
		default:
			err = fmt.Errorf("%.40q stands before any section", name)
		}
		if err != nil {
			return Config{}, fmt.Errorf("line %d: %w", i+1, err)
		}
	}
	switch {
	case c.PrivateKey == "":
		return Config{}, errors.New("no PrivateKey in [Interface]")
	case !c.Address.IsValid():
		return Config{}, errors.New("no Address in [Interface]")
	}
	for i, p := range c.Peers {
		if p.PublicKey == "" {
			return Config{}, fmt.Errorf("no PublicKey in [Peer] number %d", i+1)
		}
	}
	return c, nil
}

func (c *Config) setInterface(name, value string) error {
	switch name {
	case "privatekey":
		if _, err := identity.ParseWireGuard(value); err != nil {
			return fmt.Errorf("set PrivateKey: %w", err)
		}
		c.PrivateKey = secret.Text(value)
	case "listenport":
		port, err := strconv.ParseUint(value, 10, 16)
		if err != nil {
			return fmt.Errorf("set ListenPort: %.40q is no port", value)
		}
		c.ListenPort = uint16(port)
	case "address":
		// With several addresses the first one counts.
		first, _, _ := strings.Cut(value, ",")
		prefix, err := parsePrefix(first)
		if err != nil {
			return fmt.Errorf("set Address: %w", err)
		}
		if !c.Address.IsValid() {
			c.Address = prefix.Addr()
		}
	case "dns", "mtu", "table", "preup", "postup", "predown", "postdown", "saveconfig", "fwmark":
	default:
		return fmt.Errorf("%.40q is unknown in [Interface]", name)
	}
	return nil
}

func (p *Peer) set(name, value string) error {
	switch name {
	case "publickey":
		if _, err := identity.ParseWireGuard(value); err != nil {
			return fmt.Errorf("set PublicKey: %w", err)
		}
		p.PublicKey = value
	case "presharedkey":
		if _, err := identity.ParseWireGuard(value); err != nil {
			return fmt.Errorf("set PresharedKey: %w", err)
		}
		p.PresharedKey = secret.Text(value)
	case "allowedips":
		for word := range strings.SplitSeq(value, ",") {
			prefix, err := parsePrefix(word)
			if err != nil {
				return fmt.Errorf("set AllowedIPs: %w", err)
			}
			p.AllowedIPs = append(p.AllowedIPs, prefix)
		}
	case "endpoint":
		// Names are for the real home; here a peer is found by its own handshake.
		if a, err := netip.ParseAddrPort(value); err == nil {
			p.Endpoint = a
		}
	case "persistentkeepalive":
		if value == "off" {
			return nil
		}
		n, err := strconv.ParseUint(value, 10, 16)
		if err != nil {
			return fmt.Errorf("set PersistentKeepalive: %.40q is no number of seconds", value)
		}
		p.Keepalive = time.Duration(n) * time.Second
	default:
		return fmt.Errorf("%.40q is unknown in [Peer]", name)
	}
	return nil
}

// parsePrefix reads an address with or without its length.
func parsePrefix(s string) (netip.Prefix, error) {
	s = strings.TrimSpace(s)
	if prefix, err := netip.ParsePrefix(s); err == nil {
		return prefix, nil
	}
	a, err := netip.ParseAddr(s)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("%.60q is no address", s)
	}
	return netip.PrefixFrom(a, a.BitLen()), nil
}
