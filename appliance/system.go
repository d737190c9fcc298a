package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"farkeep/appliance/boot"
	"farkeep/appliance/logbook"
	"farkeep/appliance/part"
	"farkeep/appliance/status"
	"farkeep/appliance/supervise"
	"farkeep/shared/atomicfile"
	"farkeep/shared/settings"

	"golang.org/x/sys/unix"
)

// system is what firmware and service mode share: the supervisor with its
// status and its judgement of health.
type system struct {
	book   *logbook.Book
	log    *slog.Logger
	reaper *supervise.Reaper
	header part.Header

	// deadline is the uptime, in nanoseconds, until which the machine counts as
	// healthy without another sign; 0 before the first.
	deadline atomic.Int64

	mu   sync.Mutex // guards the fields below
	boot status.Boot
	sup  *supervise.Supervisor // nil before the parts start
}

const (
	// loopInterval is how often the main loop turns at the least.
	loopInterval = 5 * time.Second
	// stuckAfter is how long the main loop may take for one turn.
	stuckAfter = 45 * time.Second
	// failingAfter is how long a required part may fail before the machine
	// restarts, in the hope that this helps.
	failingAfter = 30 * time.Minute
	// restartPause is the least time between two such restarts.
	restartPause = 24 * time.Hour
)

// errFailing ends the main loop when a required part fails for too long.
var errFailing = errors.New("a required part keeps failing")

// healthy is what the watchdog asks. It looks at this program alone: not at the
// network, and not at single parts, which are restarted by themselves.
func (s *system) healthy() error {
	deadline := time.Duration(s.deadline.Load())
	if late := boot.Uptime() - deadline; deadline != 0 && late > 0 {
		return fmt.Errorf("the supervisor is stuck: its next sign is %v late", late.Round(time.Second))
	}
	return nil
}

// expect says that the next sign of the supervisor comes within d.
func (s *system) expect(d time.Duration) { s.deadline.Store(int64(boot.Uptime() + d)) }

// beat is the main loop's sign.
func (s *system) beat() { s.expect(stuckAfter) }

// makeFolders makes the parts' folders. A disk that is still mounted, because the
// supervisor before this one was killed, belongs to whom the part disk gave it.
func (s *system) makeFolders() error {
	for _, f := range folders(s.header.Paths) {
		if f.path == s.header.Paths.Disk() {
			// What cannot be looked at is left alone as well: a disk that has gone
			// answers with an error, and is the part disk's to close.
			mounted, err := part.MountPoint(f.path)
			if mounted || err != nil && !errors.Is(err, fs.ErrNotExist) {
				continue
			}
		}
		if err := os.MkdirAll(f.path, 0o700); err != nil {
			return fmt.Errorf("make the parts' folders: %w", err)
		}
		// Chown first: it clears the set-group-id bit.
		err := errors.Join(os.Chown(f.path, f.uid, f.gid), unix.Chmod(f.path, f.mode))
		if err != nil {
			return fmt.Errorf("make the parts' folders: %w", err)
		}
	}
	return nil
}

// supervise runs the parts until ctx ends, or until a required one has failed
// for too long and a restart is due: then the error is errFailing. The parts
// have ended when it returns.
func (s *system) supervise(ctx context.Context, cfg *settings.Appliance) error {
	frugal()
	sup := supervise.New(supervise.Config{Reaper: s.reaper, Log: s.log, Relay: s.book.Relay, Timing: timing()}, specs(s.header, cfg))
	s.mu.Lock()
	s.sup = sup
	s.mu.Unlock()

	supCtx, stop := context.WithCancel(context.WithoutCancel(ctx))
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		sup.Run(supCtx)
	}()
	err := s.loop(ctx, sup)
	stop()
	// Parts may take their time to stop, but not for ever: one that even SIGKILL
	// does not end hangs in the kernel, which is the watchdog's case.
	states, _ := sup.States()
	s.expect(time.Duration(len(states)) * (part.StopTimeout + 10*time.Second))
	<-ended
	return err
}

// loop writes the status and watches over the required parts until ctx ends.
func (s *system) loop(ctx context.Context, sup *supervise.Supervisor) error {
	tick := time.NewTicker(loopInterval)
	defer tick.Stop()
	var written time.Time
	var last map[string]int
	up := false
	for {
		s.beat()
		states, change := sup.States()
		restarts := map[string]int{}
		running := 0
		for _, st := range states {
			restarts[st.Name] = st.Restarts
			if st.Pid != 0 {
				running++
			}
		}
		if !up && running == len(states) {
			up = true
			s.log.Info("all parts are up", "parts", running, "uptime", boot.Uptime().Round(time.Millisecond))
		}
		if !maps.Equal(last, restarts) || time.Since(written) > time.Minute {
			last, written = restarts, time.Now()
			s.report(restarts)
		}
		if name := sup.Failing(failingAfter); name != "" && s.mayRestart() {
			s.log.Error("restarting, because a required part keeps failing", "child", name, "for", failingAfter)
			return fmt.Errorf("%s: %w", name, errFailing)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-change:
		case <-tick.C:
		}
	}
}

func (s *system) report(restarts map[string]int) {
	s.mu.Lock()
	b := s.boot
	s.mu.Unlock()
	b.Restarts, b.Uptime, b.Updated = restarts, boot.Uptime(), time.Now()
	// Right as soon as the clock is: not remembered from before it was set.
	b.StartedAt = b.Updated.Add(-b.Uptime)
	b.Degraded = slices.Clone(b.Degraded)
	if err := status.Write(s.header.Paths.Boot(), b); err != nil {
		s.log.Error("status is not written", "err", err)
	}
}

// restartFile remembers the last restart for a failing part, across restarts.
func (s *system) restartFile() string {
	return filepath.Join(s.header.Paths.State, "supervisor", "last-restart")
}

// mayRestart says whether the last restart for a failing part is long enough
// ago, and remembers this one if so. A machine whose state is lost, or whose
// clock lies before that restart, stays up: a restart loop helps nobody.
func (s *system) mayRestart() bool {
	if !s.header.Firmware {
		return false // systemd decides about the machine
	}
	now := time.Now()
	old, err := os.ReadFile(s.restartFile())
	if err == nil {
		at, err := time.Parse(time.RFC3339, strings.TrimSpace(string(old)))
		if err == nil && now.Before(at.Add(restartPause)) {
			return false
		}
	}
	if boot.Uptime() < failingAfter {
		return false
	}
	if err := atomicfile.Write(s.restartFile(), []byte(now.UTC().Format(time.RFC3339)+"\n"), 0o600); err != nil {
		s.log.Error("no restart, because it could not be remembered", "err", err)
		return false
	}
	return true
}
