//go:build !torture

package main

import "farkeep/appliance/supervise"

// timing is the supervisor's: its own defaults.
func timing() supervise.Timing { return supervise.Timing{} }
