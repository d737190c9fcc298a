// Package watchdog arms the hardware watchdog and feeds it while the appliance
// is healthy, so that a machine that hangs is reset.
//
//	closed ──Open──▶ armed ──Feed while healthy──▶ armed
//	                   │ healthy says no, or nobody feeds: reset after Timeout
//	                   └──Close──▶ armed still: a shutdown that hangs is cut short
//
// Healthy means local liveness only. That the internet, the VPN or home are
// away is no reason to reset a machine that waits for them.
//
// Source: Linux Documentation/watchdog/watchdog-api.rst.
package watchdog

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Timeout is how long the watchdog waits. The Pi's counts to 15 s at most.
const Timeout = 15 * time.Second

// interval leaves two feeds to be missed.
const interval = Timeout / 4

// software is the identity of softdog, which a hanging kernel hangs with it:
// the last choice.
const software = "Software Watchdog"

// Device is a watchdog that the kernel offers.
type Device struct {
	Identity string
	Path     string
}

// Find lists the machine's watchdogs, hardware first. root is normally "/".
func Find(root string) ([]Device, error) {
	dirs, err := filepath.Glob(filepath.Join(root, "sys/class/watchdog/watchdog*"))
	if err != nil {
		return nil, fmt.Errorf("watchdog: %w", err)
	}
	var out []Device
	for _, dir := range dirs {
		id, err := os.ReadFile(filepath.Join(dir, "identity"))
		if err != nil {
			return nil, fmt.Errorf("watchdog: %w", err)
		}
		out = append(out, Device{strings.TrimSpace(string(id)), filepath.Join(root, "dev", filepath.Base(dir))})
	}
	slices.SortStableFunc(out, func(a, b Device) int {
		return soft(a) - soft(b)
	})
	return out, nil
}

func soft(d Device) int {
	if d.Identity == software {
		return 1
	}
	return 0
}

// ErrNone is returned by Choose when there is no watchdog, or none is wanted.
var ErrNone = errors.New("no watchdog")

// Choose picks one of Find's devices. word is the kernel word farkeep.watchdog:
// "" for the best one, "softdog" for the kernel's own (an emulated Pi resets at
// once when its real one is opened), "none".
func Choose(devices []Device, word string) (Device, error) {
	for _, d := range devices {
		switch {
		case word == "none":
		case word == "softdog" && soft(d) == 0:
		default:
			return d, nil
		}
	}
	return Device{}, ErrNone
}

// Watchdog is an armed watchdog.
type Watchdog struct {
	f   *os.File
	log *slog.Logger
}

// Open arms a device: from now on it must be fed.
func Open(d Device, log *slog.Logger) (*Watchdog, error) {
	f, err := os.OpenFile(d.Path, os.O_WRONLY, 0)
	if err != nil {
		return nil, fmt.Errorf("watchdog %s: %w", d.Identity, err)
	}
	w := &Watchdog{f: f, log: log}
	if err := unix.IoctlSetPointerInt(int(f.Fd()), unix.WDIOC_SETTIMEOUT, int(Timeout/time.Second)); err != nil {
		// Its own timeout may be shorter than ours: feeding at our pace could
		// be too slow. Closing leaves it armed or not, as the driver has it.
		if _, werr := f.WriteString("V"); werr != nil {
			err = errors.Join(err, werr)
		}
		f.Close()
		return nil, fmt.Errorf("watchdog %s: set its timeout to %v: %w", d.Identity, Timeout, err)
	}
	return w, nil
}

// Feed feeds the watchdog until ctx ends. It does not while healthy returns an
// error, which it logs when it changes. healthy must not block; if it does,
// that is a hang too.
func (w *Watchdog) Feed(ctx context.Context, healthy func() error) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	feed(ctx, tick.C, healthy, w.pet, w.log)
}

func (w *Watchdog) pet() error {
	_, err := w.f.Write([]byte{0}) // anything but 'V', which would disarm it
	return err
}

func feed(ctx context.Context, tick <-chan time.Time, healthy, pet func() error, log *slog.Logger) {
	last := ""
	for {
		err := healthy()
		if err == nil {
			err = pet()
		} else {
			err = fmt.Errorf("unhealthy: %w", err)
		}
		text := ""
		if err != nil {
			text = err.Error()
		}
		switch {
		case text == last:
		case err != nil:
			log.Error("the watchdog is not fed; a reset may follow", "err", err)
		default:
			log.Info("the watchdog is fed again")
		}
		last = text
		select {
		case <-ctx.Done():
			return
		case <-tick:
		}
	}
}

// Close stops feeding for good and leaves the watchdog armed.
func (w *Watchdog) Close() error {
	// One last time, so that an orderly shutdown has the whole timeout.
	return errors.Join(w.pet(), w.f.Close())
}
