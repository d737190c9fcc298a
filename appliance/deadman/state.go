package deadman

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"farkeep/appliance/status"
	"farkeep/shared/atomicfile"
	"farkeep/shared/letter"
	"farkeep/shared/outbox"
	"farkeep/shared/plainfile"
)

// Limits of what is remembered.
const (
	maxState  = 8 << 20
	maxAlarms = 256
	maxHosts  = 64
)

// Moment is a point in time that survives both reboots and a clock that is set
// later: the machine's uptime within one boot, and the wall clock if that could
// be trusted.
type Moment struct {
	Boot   string        `json:"boot,omitempty"`
	Uptime time.Duration `json:"uptime,omitempty"`
	Wall   time.Time     `json:"wall"`
	Sure   bool          `json:"sure,omitempty"` // Wall was taken from a clock that was set
}

// State is everything that the dead man's switch remembers. It is replaced as a
// whole, and with it the mails that follow from it: a crash loses neither and
// doubles neither.
type State struct {
	Serial     uint64            `json:"serial"` // of the next mail
	Nonce      uint32            `json:"nonce"`  // of this installation's mails
	Installed  Moment            `json:"installed"`
	Hosts      map[string]Host   `json:"hosts,omitempty"`
	KeeperBoot string            `json:"keeper_boot,omitempty"` // in which the keeper's word was last seen
	Alarms     map[string]Alarm  `json:"alarms,omitempty"`      // by kind and subject
	Restarts   map[string]Window `json:"restarts,omitempty"`    // by part
	Welcomed   bool              `json:"welcomed,omitempty"`    // the first mail was queued
	LastProof  Moment            `json:"last_proof"`            // of the monthly mail, or the first one
	Dropped    int               `json:"dropped,omitempty"`     // mails that found no room in the outbox
	Pending    []Mail            `json:"pending,omitempty"`     // decided, perhaps not in the outbox yet
	Told       []string          `json:"told,omitempty"`        // the keeper's events that were mailed and are still listed
}

// Host is the last heartbeat of one.
type Host struct {
	At         time.Time `json:"at"`          // by its own clock; only for people
	ReceivedAt time.Time `json:"received_at"` // as the keeper tells it
	Arrived    Moment    `json:"arrived"`
	Stale      bool      `json:"stale,omitempty"` // until the next one
}

// Alarm is one that is raised, or may soon be.
type Alarm struct {
	Kind      string `json:"kind"`
	Subject   string `json:"subject"`
	Seen      Moment `json:"seen"` // since when it is so
	Gone      Moment `json:"gone"` // since when it is not so any more; the zero Moment: it is
	Raised    bool   `json:"raised,omitempty"`
	Since     Moment `json:"since"`
	Last      Moment `json:"last"` // mail about it
	Reminders int    `json:"reminders,omitempty"`
	MailID    string `json:"mail_id,omitempty"` // the last mail's
}

// Window counts one part's restarts.
type Window struct {
	From  Moment `json:"from"`
	Count int    `json:"count"` // when it began
}

// Mail is a mail as it was decided on.
type Mail struct {
	ID      string    `json:"id"`
	Kind    string    `json:"kind"`
	Subject string    `json:"subject"`
	Body    string    `json:"body"`
	Date    time.Time `json:"date"`
}

func (m Mail) letter() letter.Letter {
	return letter.Letter{ID: m.ID, Subject: m.Subject, Body: m.Body, Date: m.Date}
}

func parseState(data []byte) (State, error) {
	var s State
	if err := json.Unmarshal(data, &s); err != nil {
		return State{}, fmt.Errorf("state of the dead man's switch: %w", err)
	}
	if len(s.Alarms) > maxAlarms || len(s.Hosts) > maxHosts || len(s.Restarts) > maxHosts || len(s.Pending) > maxAlarms || len(s.Told) > status.MaxEvents || s.Dropped < 0 {
		return State{}, errors.New("state of the dead man's switch: more than it can hold")
	}
	for _, a := range s.Alarms {
		if _, ok := entryOf(a.Kind); !ok {
			return State{}, fmt.Errorf("state of the dead man's switch: %.40q is no kind of alarm", a.Kind)
		}
	}
	for _, m := range s.Pending {
		if err := outbox.CheckID(m.ID); err != nil {
			return State{}, fmt.Errorf("state of the dead man's switch: %w", err)
		}
	}
	return s, nil
}

// readState returns a new State when there is none.
func readState(path string) (State, error) {
	data, err := plainfile.Read(path, maxState)
	if errors.Is(err, fs.ErrNotExist) {
		return State{}, nil
	}
	if err != nil {
		return State{}, fmt.Errorf("state of the dead man's switch: %w", err)
	}
	return parseState(data)
}

func writeState(path string, s State) error {
	data, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("state of the dead man's switch: %w", err)
	}
	return atomicfile.Write(path, append(data, '\n'), 0o600)
}
