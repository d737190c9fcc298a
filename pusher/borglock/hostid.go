package borglock

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"time"
)

// HostID is the name by which borg knows this host: FQDN@NODE, unless the
// environment sets BORG_HOST_ID. FQDN is the canonical name of the host name;
// NODE is the hardware address that Python's uuid.getnode finds, as a decimal
// number: on Linux that of the first network interface, in the kernel's order,
// that has an IPv4 address and a hardware address.
//
// A host without such an interface gets a new random NODE with every borg
// process, so that borg never finds a lock of its own stale there. HostID then
// returns NODE 0, which no interface has. A host id that differs from borg's
// does no harm: locks work, only a stale one is not recognised.
func HostID(ctx context.Context, getenv func(string) string) (string, error) {
	if id := getenv("BORG_HOST_ID"); id != "" {
		return id, nil
	}
	name, err := os.Hostname()
	if err != nil {
		return "", fmt.Errorf("find this host's name: %w", err)
	}
	node, err := node()
	if err != nil {
		return "", fmt.Errorf("find this host's hardware address: %w", err)
	}
	return canonical(ctx, name) + "@" + strconv.FormatUint(node, 10), nil
}

// canonical does what getaddrinfo(3) does for AI_CANONNAME with the usual
// "hosts: files dns": the first name on the line of /etc/hosts that has the
// name, or else what DNS says within a few seconds, or else the name itself.
func canonical(ctx context.Context, name string) string {
	if f, err := os.Open("/etc/hosts"); err == nil {
		defer f.Close()
		b, _ := io.ReadAll(io.LimitReader(f, 1<<20))
		if found := canonicalIn(b, name); found != "" {
			return found
		}
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if found, err := net.DefaultResolver.LookupCNAME(ctx, name); err == nil && found != "" {
		return strings.TrimSuffix(found, ".")
	}
	return name
}

func canonicalIn(hosts []byte, name string) string {
	lines := bufio.NewScanner(bytes.NewReader(hosts))
	for lines.Scan() {
		line, _, _ := strings.Cut(lines.Text(), "#")
		fields := strings.Fields(line)
		if len(fields) < 2 || net.ParseIP(fields[0]) == nil {
			continue
		}
		for _, f := range fields[1:] {
			if strings.EqualFold(f, name) {
				return fields[1]
			}
		}
	}
	return ""
}

func node() (uint64, error) {
	interfaces, err := net.Interfaces()
	if err != nil {
		return 0, err
	}
	for _, i := range interfaces {
		if len(i.HardwareAddr) != 6 || bytes.Equal(i.HardwareAddr, make([]byte, 6)) {
			continue
		}
		addrs, err := i.Addrs()
		if err != nil {
			return 0, err
		}
		for _, a := range addrs {
			if n, ok := a.(*net.IPNet); ok && n.IP.To4() != nil {
				var v uint64
				for _, b := range i.HardwareAddr {
					v = v<<8 | uint64(b)
				}
				return v, nil
			}
		}
	}
	return 0, nil
}
