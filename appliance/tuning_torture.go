//go:build torture

package main

import (
	"time"

	"farkeep/appliance/supervise"
)

// timing is for a build whose parts are killed hundreds of times: they come back
// at once, so that what is measured is how they come back.
func timing() supervise.Timing {
	return supervise.Timing{FirstDelay: 20 * time.Millisecond, MaxDelay: 200 * time.Millisecond}
}
