package clock

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"farkeep/shared/atomicfile"
	"farkeep/shared/plainfile"
)

const maxState = 4 << 10

// saved is the state file's content.
type saved struct {
	Time     time.Time     `json:"time"`     // Knowledge.Time
	Gained   time.Duration `json:"gained"`   // Knowledge.Gained
	Unsynced time.Duration `json:"unsynced"` // Knowledge.Unsynced
	Clock    time.Time     `json:"clock"`    // what the clock showed; later than Time while a jump is not accepted
	Jump     string        `json:"jump,omitempty"`
}

func parseState(data []byte) (saved, error) {
	var s saved
	if err := json.Unmarshal(data, &s); err != nil {
		return saved{}, fmt.Errorf("last known time: %w", err)
	}
	latest := Earliest.AddDate(200, 0, 0)
	for _, t := range []time.Time{s.Time, s.Clock} {
		if t.Before(Earliest) || t.After(latest) {
			return saved{}, fmt.Errorf("last known time: %s is not plausible", t.UTC().Format(time.RFC3339))
		}
	}
	if s.Gained < 0 || s.Gained > MaxGain || s.Unsynced < 0 || len(s.Jump) > 500 {
		return saved{}, errors.New("last known time: out of range")
	}
	// A clock that is not where the knowledge says was thrown; a file that says
	// otherwise was not written by us.
	if s.Clock.Sub(s.Time) > MaxSet+MaxGain {
		return saved{}, errors.New("last known time: the clock is too far from it")
	}
	return s, nil
}

// readState returns the zero value and no error when there is no file.
func readState(path string) (saved, error) {
	data, err := plainfile.Read(path, maxState)
	if errors.Is(err, fs.ErrNotExist) {
		return saved{}, nil
	}
	if err != nil {
		return saved{}, fmt.Errorf("last known time: %w", err)
	}
	return parseState(data)
}

func writeState(path string, s saved) error {
	data, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("last known time: %w", err)
	}
	return atomicfile.Write(path, append(data, '\n'), 0o600)
}
