//go:build vm

package main

import (
	"context"
	"time"

	"farkeep/appliance/confine"
	"farkeep/appliance/part"
	"farkeep/shared/settings"
)

// testParts are in builds for tests in the emulator only, where there is no
// shell that could kill a process: one part that panics, one that hangs.
func testParts() []partEntry {
	nothing := func(*settings.Appliance) any { return struct{ Unused bool }{} }
	profile := func(part.Header) confine.Profile { return confine.Profile{UID: 990} }
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
