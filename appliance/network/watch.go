package network

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"time"

	"farkeep/appliance/clock"
	"farkeep/appliance/part"
	"farkeep/appliance/status"
)

// watcher is the part in service mode.
type watcher struct {
	env     *part.Env
	brief   Brief
	started time.Time
	blind   bool // reading the clock's state was refused, and that was said
	written status.Network
}

// step looks once. What cannot be read is unknown and not an error: the next
// look may succeed.
func (w *watcher) step(context.Context) error {
	var s status.Network
	s.VPNUp = isUp(w.brief.VPN.Interface)
	links, err := net.Interfaces()
	if err != nil {
		w.env.Log.Warn("list the links", "err", err)
	}
	for _, l := range links {
		if l.Name == w.brief.VPN.Interface || l.Flags&net.FlagLoopback != 0 || l.Flags&net.FlagUp == 0 {
			continue
		}
		addresses, err := l.Addrs()
		if err != nil {
			continue // just gone
		}
		for _, a := range addresses {
			if n, ok := a.(*net.IPNet); ok && n.IP.IsGlobalUnicast() {
				s.Addresses = append(s.Addresses, n.String())
				if s.Interface == "" {
					s.Interface = l.Name
				}
			}
		}
		s.Carrier = s.Carrier || l.Flags&net.FlagRunning != 0
	}
	s.ClockSet, s.ClockSource = w.clock()
	s.Undervoltage = undervoltage("/sys")
	if err := publish(w.env, &w.written, s); err != nil {
		w.env.Log.Error("status", "err", err)
	}
	return nil
}

// clock believes the system: the kernel knows whether something synchronises
// it. Without that, a clock that runs is what there is after a minute.
func (w *watcher) clock() (set bool, source string) {
	set, err := clock.Synchronised()
	if err != nil && !w.blind {
		w.blind = true
		w.env.Log.Warn("whether the clock is synchronised is unknown", "err", err)
	}
	switch {
	case set:
		return true, "the system's time service"
	case time.Since(w.started) < clock.FallbackAfter:
		return false, ""
	default:
		return false, "the system's clock, not synchronised"
	}
}

func isUp(name string) bool {
	l, err := net.InterfaceByName(name)
	return err == nil && l.Flags&net.FlagUp != 0
}

// readLine returns the first line of a small file, "" if there is none.
func readLine(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, 256))
	if err != nil && !errors.Is(err, io.EOF) {
		return ""
	}
	line, _, _ := strings.Cut(string(data), "\n")
	return strings.TrimSpace(line)
}
