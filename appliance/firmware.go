package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"sync/atomic"
	"time"

	"farkeep/appliance/board"
	"farkeep/appliance/boot"
	"farkeep/appliance/logbook"
	"farkeep/appliance/part"
	"farkeep/appliance/status"
	"farkeep/appliance/supervise"

	"golang.org/x/sys/unix"
)

// brokenPause is how long a machine that cannot boot shows why before it tries
// again.
const brokenPause = time.Hour

// firmware is the whole life of PID 1. It never returns: a PID 1 that ends is
// a kernel panic. When it comes to its end, or panics, the machine restarts.
func firmware(Env) {
	var powerOff atomic.Bool
	defer func() {
		if r := recover(); r != nil {
			fmt.Fprintf(os.Stderr, "farkeep: supervisor: PANIC: %v\n%s\n", r, debug.Stack())
			time.Sleep(10 * time.Second) // no tight loop, and time to read it
		}
		unix.Sync()
		how := unix.LINUX_REBOOT_CMD_RESTART
		if powerOff.Load() {
			how = unix.LINUX_REBOOT_CMD_POWER_OFF
		}
		// Returns only if the kernel cannot do it.
		err := unix.Reboot(how)
		fmt.Fprintln(os.Stderr, "farkeep: supervisor: restart:", err)
		select {} // the watchdog's turn
	}()

	// Before anything that may be signalled. The kernel must not restart the
	// machine on Ctrl-Alt-Del by itself, but ask.
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGUSR2, unix.SIGPWR)
	cadErr := unix.Reboot(unix.LINUX_REBOOT_CMD_CAD_OFF)

	life, end := context.WithCancel(context.Background())
	defer end()
	ctx, stop := context.WithCancel(life)
	go func() {
		sig := <-signals
		powerOff.Store(sig == unix.SIGUSR2 || sig == unix.SIGPWR)
		stop()
	}()

	s := &system{book: logbook.New(), header: part.Header{Paths: part.FirmwarePaths(), Firmware: true}}
	// Until the kernel's words are known; parts are told whether to debug.
	s.log = s.book.Logger(slog.LevelDebug)
	if cadErr != nil {
		s.log.Warn("Ctrl-Alt-Del restarts at once", "err", cadErr)
	}
	s.run(ctx, life)
	s.shutdown()
}

// run boots and supervises until ctx ends or a restart is due.
func (s *system) run(ctx, life context.Context) {
	s.log.Info("starting", "version", version(), "uptime", boot.Uptime().Round(time.Millisecond))
	var err error
	if s.reaper, err = supervise.NewReaper(life); err != nil {
		s.log.Error("orphans stay", "err", err)
		return
	}
	console := false
	m := &boot.Machine{
		Log: s.log, Version: version(), Paths: s.header.Paths, Run: s.reaper.Run,
		OpenLog: func(dir string) error { return s.book.ToFile(dir, part.ReceiverUID) },
		OpenConsole: func(debug bool) error {
			console = true
			level := slog.LevelInfo
			if debug {
				level = slog.LevelDebug
			}
			s.header.Debug = debug
			s.book.ToConsole(os.Stderr, level)
			return s.openKernelLog()
		},
		Folders: s.makeFolders,
		Healthy: s.healthy,
		Expect:  s.expect,
	}
	// The watchdog is fed for as long as the machine lives, shutdown included.
	if err := boot.Run(life, m, boot.Steps()); err != nil {
		if !console { // it failed that early
			s.book.ToConsole(os.Stderr, slog.LevelDebug)
		}
		s.broken(ctx, m, err)
		return
	}
	s.mu.Lock()
	s.boot = status.Boot{
		Version: m.Version, BootID: boot.BootID(), Board: m.Board.Name, Slot: m.Words.Slot,
		FirstBoot: m.FirstBoot, Degraded: m.Problems, StateLost: m.StateLost != nil,
	}
	s.mu.Unlock()
	s.log.Info("booted", "uptime", boot.Uptime().Round(time.Millisecond), "problems", len(m.Problems), "first_boot", m.FirstBoot)
	if err := s.supervise(ctx, m.Settings); err != nil {
		s.log.Error("the parts were stopped", "err", err)
	}
}

// openKernelLog repeats the log in the kernel's ring buffer, where it stands
// beside what the kernel said at the time.
func (s *system) openKernelLog() error {
	f, err := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("kernel log: %w", err)
	}
	s.book.ToJournal(f, true)
	return nil
}

// broken shows a person what keeps the machine from working, and waits before
// the restart: for someone to correct the card, or for what was passing to pass.
func (s *system) broken(ctx context.Context, m *boot.Machine, cause error) {
	pattern := board.BootFailed
	var step *boot.Error
	if errors.As(cause, &step) {
		switch step.Step {
		case "settings":
			pattern, cause = board.BadSettings, step.Err
		case "board":
			pattern, cause = board.UnsupportedBoard, step.Err
		}
	}
	s.log.Error("this machine cannot work", "err", cause, "led_blinks", int(pattern), "restart_in", brokenPause)
	if err := m.Explain(cause); err != nil {
		s.log.Error("the error is not on the boot partition", "err", err)
	} else {
		s.log.Info("the error is on the boot partition")
	}
	ctx, cancel := context.WithTimeout(ctx, brokenPause)
	defer cancel()
	go func() {
		if err := board.Blink(ctx, "/", pattern); err != nil && !errors.Is(err, fs.ErrNotExist) {
			s.log.Warn("the LED does not blink", "err", err)
		}
	}()
	tick := time.NewTicker(loopInterval)
	defer tick.Stop()
	for ctx.Err() == nil {
		s.beat()
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
}

// shutdown ends what the parts left running and lets go of the card. The parts
// themselves have ended in order, the disk is closed. A shutdown that hangs is
// cut short by the watchdog.
func (s *system) shutdown() {
	s.expect(stuckAfter)
	s.log.Info("shutting down", "uptime", boot.Uptime().Round(time.Second))
	for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGKILL} {
		if err := supervise.KillOthers(sig); err != nil {
			s.log.Warn("other processes stay", "err", err)
		}
		time.Sleep(500 * time.Millisecond)
	}
	s.book.Close(5 * time.Second)
	unix.Sync()
	if err := unix.Unmount(s.header.Paths.State, 0); err != nil && !errors.Is(err, unix.EINVAL) {
		// What holds it open is gone with this process.
		if err := unix.Mount("", s.header.Paths.State, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
			fmt.Fprintln(os.Stderr, "farkeep: supervisor: the state partition stays mounted:", err)
		}
	}
}
