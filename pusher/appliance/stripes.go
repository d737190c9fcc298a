package appliance

import "time"

// One channel has 2 MiB under way at most (docs/protocol.md). On a line that is long
// enough to hold that, an upload that is longer goes over several.
const (
	channelWindow = 2 << 20
	mostStripes   = 4
	// farAway is the round trip from which it pays: one window each 10 ms is 200 MB/s.
	farAway = 10 * time.Millisecond
)

// stripes is over how many channels, beside its own, an upload of so many bytes should
// go: as many as it takes to have all of it under way at once, if there are so many.
func stripes(roundTrip time.Duration, bytes int64) int {
	if roundTrip < farAway || bytes <= channelWindow {
		return 0
	}
	return int(min((bytes-1)/channelWindow, mostStripes))
}
