package main

import "runtime/debug"

// garbage is how much of it, in percent of what is in use, a process collects before
// it clears up. The appliance is seven processes, most of which wait most of the
// time, on a board of 512 MB: at Go's own 100 % each keeps up to 4 MB of garbage.
const garbage = 25

// memoryLimit is what the Go runtime of each process tries to stay below, in bytes:
// the keeper while it judges a large repository needs most, about 20 MB.
const memoryLimit = 24 << 20

// frugal makes this process need little memory, and gives back what its start took.
// A part that works hard sets another share for itself.
func frugal() {
	debug.SetGCPercent(garbage)
	debug.SetMemoryLimit(memoryLimit)
	debug.FreeOSMemory()
}
