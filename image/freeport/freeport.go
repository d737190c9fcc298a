// Package freeport finds ports of the loopback for servers that are started later, by
// a program that must be told its port. They stay free: the kernel gives none of them
// to a socket that takes any port, as every connection to another server does. Only
// who asks for that very number can come in between. Nor can a client that tries again
// until its server is there be connected with itself.
package freeport

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
)

const (
	// lowest is the first port that is given. Below lie those of known services.
	lowest = 10_000
	// rangeFile says which ports the kernel gives to sockets that take any (Linux,
	// Documentation/networking/ip-sysctl.rst).
	rangeFile = "/proc/sys/net/ipv4/ip_local_port_range"
	// tries is how many ports may be in use one after the other.
	tries = 100
)

// TCP is a port on which nobody listens at 127.0.0.1.
func TCP() (uint16, error) {
	return find(func(address string) error {
		l, err := net.Listen("tcp4", address)
		if err != nil {
			return err
		}
		return l.Close()
	})
}

// UDP is a port to which no socket of 127.0.0.1 is bound.
func UDP() (uint16, error) {
	return find(func(address string) error {
		c, err := net.ListenPacket("udp4", address)
		if err != nil {
			return err
		}
		return c.Close()
	})
}

func find(try func(address string) error) (uint16, error) {
	text, err := os.ReadFile(rangeFile)
	if err != nil {
		return 0, err
	}
	var first, last int
	if _, err := fmt.Sscan(string(text), &first, &last); err != nil {
		return 0, fmt.Errorf("read %s, which holds %q: %w", rangeFile, text, err)
	}
	low, high := between(first, last)
	for range tries {
		port := low + rand.IntN(high-low)
		if err = try(fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
			return uint16(port), nil
		}
	}
	return 0, fmt.Errorf("%d ports of the loopback from %d to %d are in use: %w", tries, low, high-1, err)
}

// between is where to look, high excluded, on a machine that gives the ports from
// first to last to anybody. One that gives nearly all of them leaves no better place.
func between(first, last int) (low, high int) {
	const enough = 1000
	switch {
	case first-lowest >= enough:
		return lowest, min(first, 1<<16)
	case 1<<16-(last+1) >= enough:
		return max(lowest, last+1), 1 << 16
	default:
		return lowest, 1 << 16
	}
}
