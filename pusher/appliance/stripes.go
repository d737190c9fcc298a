package appliance

import "time"

// One channel has 2 MiB under way at most (docs/protocol.md). On a line that is long
// enough to hold that, an upload that is longer goes over several.
const (
	channelWindow = 2 << 20
	// mostStripes makes an upload go all at once.
	mostStripes = 4
	// lastingStripes are for an upload that is longer than that. More of them, kept full
	// for minutes by a disk that is slower than the line, cost the appliance twice the
	// CPU: it has little memory, and would clear up all the time.
	lastingStripes = 2
	// farAway is the round trip from which it pays: one window each 10 ms is 200 MB/s.
	farAway = 10 * time.Millisecond
)

// stripes is over how many channels, beside its own, an upload of so many bytes goes.
func stripes(roundTrip time.Duration, bytes int64) int {
	if n := windows(roundTrip, bytes); n <= mostStripes {
		return n
	}
	return lastingStripes
}

// stripesAhead is how many to open beside the offer of so many bytes, of which nobody
// knows yet how many will be needed.
func stripesAhead(roundTrip time.Duration, bytes int64) int {
	return min(windows(roundTrip, bytes), mostStripes)
}

// windows is how many it takes, beside the first, to have so many bytes under way at
// once where that pays; mostStripes+1 stands for more.
func windows(roundTrip time.Duration, bytes int64) int {
	if roundTrip < farAway || bytes <= 0 {
		return 0
	}
	return int(min((bytes-1)/channelWindow, mostStripes+1))
}
