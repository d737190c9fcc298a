// Package boot turns a bare kernel into a machine that the parts can run on:
// mounts, modules, the card, the settings, the state partition.
//
// The way there is data: [Steps] lists what is done in which order, `farkeep-appliance
// steps` prints it, and every step is logged with the time that it took. A
// required step that fails ends the boot: nothing after it would work, and what
// is wrong is shown where a person can find it ([Machine.Explain]). An optional
// one is noted and the boot goes on; the appliance says so in its status.
package boot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"text/tabwriter"
	"time"

	"farkeep/appliance/kmod"
	"farkeep/appliance/part"
	"farkeep/appliance/watchdog"
	"farkeep/shared/card"
	"farkeep/shared/settings"
)

// Machine is what the steps know and find out.
type Machine struct {
	Log     *slog.Logger
	Version string
	Paths   part.Paths
	// Run runs a program to its end, as supervise.Reaper does.
	Run func(ctx context.Context, out *os.File, file string, args ...string) (int, error)
	// OpenConsole begins to write the log to the console and the kernel's ring
	// buffer; more of it with debug.
	OpenConsole func(debug bool) error
	// OpenLog begins to write the log into a folder.
	OpenLog func(dir string) error
	// Folders makes the parts' own folders.
	Folders func() error
	// Healthy feeds the watchdog while it returns nil.
	Healthy func() error
	// Expect is told within which time the boot will go on: a step that ignores
	// its timeout, because the kernel hangs, is the watchdog's case.
	Expect func(time.Duration)

	// What the steps find out.
	Words     Words
	Board     card.Board
	Card      Card
	Settings  *settings.Appliance
	StateLost error // the state partition cannot be used; state is in RAM
	FirstBoot bool
	Loader    *kmod.Loader
	Hotplug   *kmod.Hotplug
	Watchdog  *watchdog.Watchdog
	Problems  []string // optional steps that failed

	ctx context.Context // of the machine's whole life, for what a step leaves running
}

// Step is one thing to do at boot.
type Step struct {
	Name     string
	Required bool
	About    string
	Timeout  time.Duration
	do       func(context.Context, *Machine) error
}

// Steps returns what is done at boot, in order.
func Steps() []Step {
	const quick = 20 * time.Second
	return []Step{
		{"mounts", true, "proc, sys, dev, run and tmp, each with as few rights as it can have", quick, mounts},
		{"kernel words", true, "read farkeep.* from the kernel's command line", quick, words},
		{"console", false, "write the log to the console and to the kernel's ring buffer", quick, openConsole},
		{"loopback", false, "bring up the interface lo", quick, loopback},
		{"sysctls", false, "restart after a panic, hide kernel addresses, forward nothing", quick, sysctls},
		{"modules", false, "load the modules of /etc/farkeep-modules in their order", 60 * time.Second, modules},
		{"devices", false, "load modules for the devices that are there, by modalias, and from now on for new ones", 60 * time.Second, devices},
		{"watchdog", false, "arm the hardware watchdog and feed it while the parts are healthy", quick, armWatchdog},
		{"random numbers", true, "wait until the kernel has gathered enough randomness for keys", 2 * time.Minute, randomness},
		{"card", true, "find the card that the machine started from, by its signature", 60 * time.Second, findCard},
		{"board", true, "refuse a board that this image was not built for", quick, checkBoard},
		{"settings", true, "read farkeep.toml from the boot partition", quick, readSettings},
		{"relay file", false, "have the boot loader hold the relay at the idle level that the settings name", quick, relayFile},
		{"state", false, "check and mount the state partition; without it, state lives in RAM", 6 * time.Minute, mountState},
		{"log file", false, "write the log to the state partition", quick, openLog},
		{"folders", true, "make the parts' folders, each owned by its part", quick, folders},
		{"resolvers", false, "link /etc/resolv.conf to the file that the network part writes", quick, resolvers},
		{"host name", false, "take the appliance's name", quick, hostName},
	}
}

// Print writes the steps as a table.
func Print(w io.Writer, steps []Step) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for i, s := range steps {
		kind := "optional"
		if s.Required {
			kind = "required"
		}
		fmt.Fprintf(tw, "%d\t%s\t%s\t%s\n", i+1, s.Name, kind, s.About)
	}
	return tw.Flush()
}

// Error is a required step that failed.
type Error struct {
	Step string
	Err  error
}

func (e *Error) Error() string { return fmt.Sprintf("%s: %v", e.Step, e.Err) }
func (e *Error) Unwrap() error { return e.Err }

// Run does the steps. ctx is the machine's whole life: what a step leaves
// running ends with it. The error is an *Error.
func Run(ctx context.Context, m *Machine, steps []Step) error {
	m.ctx = ctx
	for _, s := range steps {
		start := time.Now()
		m.Expect(s.Timeout + stepSlack)
		stepCtx, cancel := context.WithTimeout(ctx, s.Timeout)
		err := s.do(stepCtx, m)
		cancel()
		log := m.Log.With("step", s.Name, "took", time.Since(start).Round(time.Millisecond))
		switch {
		case err == nil:
			log.Info("boot step done")
		case s.Required:
			log.Error("boot step failed", "err", err)
			return &Error{s.Name, err}
		default:
			log.Warn("boot step failed; going on without it", "err", err)
			m.Problems = append(m.Problems, fmt.Sprintf("%s: %v", s.Name, err))
		}
	}
	return nil
}

func openConsole(_ context.Context, m *Machine) error {
	// The kernel throttles /dev/kmsg; a boot writes more, and the log has limits
	// of its own.
	return errors.Join(sysctl("kernel/printk_devkmsg", "on"), m.OpenConsole(m.Words.Debug))
}

// stepSlack is how much longer than its timeout a step may take to notice it.
const stepSlack = time.Minute

func openLog(_ context.Context, m *Machine) error {
	dir := filepath.Join(m.Paths.State, "log")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("make %s: %w", dir, err)
	}
	return m.OpenLog(dir)
}

func folders(_ context.Context, m *Machine) error { return m.Folders() }

// resolvers links to a file that does not exist yet: the network part, which
// writes it, may not write to /etc.
func resolvers(_ context.Context, m *Machine) error {
	if err := os.Symlink(filepath.Join(m.Paths.RunDir(part.Network), "resolv.conf"), "/etc/resolv.conf"); err != nil {
		return fmt.Errorf("link the resolvers' file: %w", err)
	}
	return nil
}

func armWatchdog(_ context.Context, m *Machine) error {
	devices, err := watchdog.Find("/")
	if err != nil {
		return err
	}
	d, err := watchdog.Choose(devices, m.Words.Watchdog)
	if errors.Is(err, watchdog.ErrNone) && m.Words.Watchdog == "none" {
		m.Log.Warn("no watchdog, as the kernel words say")
		return nil
	}
	if err != nil {
		return err
	}
	w, err := watchdog.Open(d, m.Log)
	if err != nil {
		return err
	}
	m.Watchdog = w
	m.Log.Info("watchdog armed", "identity", d.Identity, "timeout", watchdog.Timeout)
	go w.Feed(m.ctx, m.Healthy)
	return nil
}
