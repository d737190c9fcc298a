//go:build vm

package main

import (
	"context"
	"os"
	"strings"
	"time"

	"farkeep/appliance/confine"
	"farkeep/appliance/part"
	"farkeep/shared/settings"

	"golang.org/x/sys/unix"
)

// testParts are in builds for tests in the emulator only, where there is no
// shell that could kill a process: one part that panics, one that hangs.
func testParts() []partEntry {
	nothing := func(*settings.Appliance) any { return struct{ Unused bool }{} }
	profile := func(part.Header) confine.Profile { return confine.Profile{UID: 990} }
	words, err := os.ReadFile("/proc/cmdline")
	if err != nil || !strings.Contains(string(words), "farkeep.card=") {
		return nil // tests of the service run in this build too, on the host
	}
	// A machine that is told to restart itself does only that.
	if strings.Contains(string(words), "farkeep.test=restart") {
		root := func(part.Header) confine.Profile {
			return confine.Profile{Caps: []uintptr{unix.CAP_KILL}, Mounts: true}
		}
		return []partEntry{{name: "restarts", profile: root, brief: nothing, run: func(_ context.Context, e *part.Env) error {
			e.Alive()
			time.Sleep(5 * time.Second)
			return unix.Kill(1, unix.SIGTERM)
		}}}
	}
	return []partEntry{
		{name: "panics", profile: profile, brief: nothing, run: func(_ context.Context, e *part.Env) error {
			e.Alive()
			time.Sleep(2 * time.Second)
			var nobody *part.Env
			return nobody.Result(nil)
		}},
		{name: "hangs", profile: profile, brief: nothing, run: func(_ context.Context, e *part.Env) error {
			e.Alive()
			select {}
		}},
	}
}
