// Package status holds the parts' status files: what each part tells the others
// and, by way of the receiver, the operator.
//
// A part writes `<run>/<part>/status.json` whenever something changed; a reader
// sees the old file or the new one. A file that is missing means "unknown",
// never "good". Readers do not trust writers: a part that was taken over may
// put a pipe, a link or a gigabyte in place of its status, and must not stop or
// mislead the reader by it.
package status

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"farkeep/shared/atomicfile"
	"farkeep/shared/plainfile"
)

// MaxSize bounds a status file, in bytes.
const MaxSize = 1 << 20

// Boot is the supervisor's own status (Paths.Boot).
type Boot struct {
	Version   string
	BootID    string // the kernel's random boot id
	Board     string
	Slot      string // "a", "b", or "" in service mode
	StartedAt time.Time
	Uptime    time.Duration // since the machine's start, at Updated; whatever the clock did
	FirstBoot bool          // the state partition had never been used
	Degraded  []string      // boot steps and parts that do not work, with their errors
	StateLost bool          // the state partition is not usable: state is in RAM until power-off
	Restarts  map[string]int
	Updated   time.Time
}

// Network is the network part's status.
type Network struct {
	Interface    string
	Addresses    []string
	Carrier      bool
	ClockSet     bool   // the clock was set from outside since the start
	ClockSource  string // which sources agreed, or "last known time"
	ClockJump    string // "" or what jumped; expiry is frozen while it is not ""
	VPNUp        bool
	Peers        []PeerStatus
	Undervoltage bool
	Updated      time.Time
}

// PeerStatus is one VPN peer.
type PeerStatus struct {
	Name          string
	Endpoint      string
	LastHandshake time.Time // zero: never
}

// The disk's states, in order from dark to open.
const (
	DiskOff      = "off"
	DiskPowered  = "powered"
	DiskUnlocked = "unlocked"
	DiskMounted  = "mounted"
	DiskClosing  = "closing"
	DiskFailed   = "failed"
)

// What is wrong with the disk.
const (
	ErrorMissing     = "missing"
	ErrorRefused     = "unlock-refused"
	ErrorUnreachable = "key-server-unreachable"
	ErrorWrongKey    = "wrong-key"
	ErrorBadHeader   = "bad-header"
	ErrorFileSystem  = "fsck"
	ErrorHung        = "hung"
	// The disk was closed for lack of consent and stays dark: see Disk.Dark.
	ErrorLeaseRefused = "lease-refused"
	ErrorLeaseExpired = "lease-expired"
)

// Why a disk that was open, or would be, is kept dark.
const (
	DarkRefused = "refused" // a key server refuses
	DarkExpired = "expired" // none renewed the lease in time
)

// Refusal is a key server that refuses. Until it grants again no other server's
// key opens the disk.
type Refusal struct {
	Server string
	Since  time.Time
}

// Disk is the disk part's status.
type Disk struct {
	State           string
	Power           bool
	Unlocked        bool
	Mounted         bool
	Since           time.Time
	ExposureMinutes int // since power on
	Error           string
	ErrorKind       string // "" or one of the Error constants
	FailingSince    time.Time
	TotalBytes      int64
	FreeBytes       int64
	HeaderDigest    string
	Sessions        int
	// LeaseUntil is when the disk will be closed if no key server renews the lease,
	// and LeaseServer the one that renewed it last; zero while it is not unlocked.
	LeaseUntil  time.Time
	LeaseServer string
	// LeaseEnds is LeaseUntil by CLOCK_BOOTTIME: for a later run of the disk part.
	LeaseEnds time.Duration
	// Dark is "" or why the disk is kept dark; "" again when it was opened.
	Dark    string
	Refused []Refusal // by the names of the servers
	Updated time.Time
}

// Bounds of the lists in Keeper, in entries, and of each of their texts, in
// bytes. The keeper keeps to them; readers cut what does not.
const (
	MaxSuspects = 8
	MaxReasons  = 8
	MaxFrozen   = 8
	MaxRot      = 50
	MaxUntrue   = 8
	MaxRetiring = 32
	MaxEvents   = 32
	MaxText     = 300
)

// Keeper is the keeper's status.
type Keeper struct {
	DiskReady    bool
	Repositories []RepositoryStatus
	Heartbeats   []Heartbeat
	// Frozen says in words why nothing expires, <= MaxFrozen; empty: it does.
	Frozen []string
	// FrozenSince is when expiry froze as a whole or for a repository; zero: it did not.
	FrozenSince time.Time
	// ClockDoubt is why the time that the machine believes in does not fit what
	// the disk remembers; "": it does, or the machine believes in none.
	ClockDoubt string
	Room       *Room  // nil: not known yet
	Scrub      *Scrub // nil: not known yet
	Rot        []Rot  // newest first, <= MaxRot
	RotCount   int    // rotten files that are not healed, listed in Rot or not
	Retiring   []Retiring
	Untrue     []Untrue // newest first, <= MaxUntrue
	// Events are the last things that were decided: by the admin key, and by
	// the keeper itself where an operator must hear of it. Oldest first.
	Events []Event
	// Curated is when the keeper last looked for what may go.
	Curated time.Time
	Updated time.Time
}

// Room is what the disk has left for history, in bytes.
type Room struct {
	Free     int64
	Reserve  int64     // what pushes leave free: at least WorstDay
	WorstDay int64     // the most that one day added lately
	PerDay   int64     // what a day adds on average, less what expired
	FullOn   time.Time // when pushes will be refused at this pace; zero: not foreseen
}

// Scrub is how far the reading of everything has come.
type Scrub struct {
	Started  time.Time // the round that runs; zero: none
	LastFull time.Time // when the last whole round ended; zero: never
	Done     float64   // of the round, 0 to 1
	Bytes    int64     // read in the round
	Paused   string    // "" or why it does not read at the moment
	Every    time.Duration
}

// Rot is a file whose bytes are not what was committed, or cannot be read.
type Rot struct {
	Repository  string
	Path        string // one of its paths
	Sum         string // what its BLAKE2b-256 should be, hex
	What        string
	Generations []string // that share it
	Found       time.Time
	Healed      time.Time // zero: not yet
}

// Retiring is a repository that was asked to leave.
type Retiring struct {
	Repository string
	By         string // the admin key's name
	Asked      time.Time
	Due        time.Time // not before this moment by the appliance's clock
}

// Untrue is a heartbeat that claimed what was not committed.
type Untrue struct {
	Host string
	At   time.Time // received, by the appliance's clock
	What string
}

// Kinds of Event.
const (
	EventAccepted      = "accepted"
	EventRejected      = "rejected"
	EventRetire        = "retire"  // asked for
	EventKept          = "kept"    // a retirement was cancelled
	EventRetired       = "retired" // carried out
	EventClockAccepted = "clock-accepted"
	EventFloor         = "floor"
	EventThinned       = "thinned" // expired early to make room
)

// Event is something that was decided and must be mailed once.
type Event struct {
	ID         string // unique
	Kind       string
	At         time.Time
	By         string // the key's name; "" for the keeper itself
	Repository string
	Generation string
	Text       string // in words, <= MaxText
}

// RepositoryStatus is what the keeper knows of one repository, disk or no disk.
type RepositoryStatus struct {
	Name        string
	Newest      string // the newest generation's folder
	NewestAt    time.Time
	ConfirmedAt time.Time // last offer or heartbeat that it is still the newest
	ChangedAt   time.Time
	Generations int
	Suspect     bool
	Suspects    []SuspectStatus // not decided yet, oldest first, <= MaxSuspects
	Bytes       int64
}

// SuspectStatus is a generation that nobody has accepted or rejected yet.
type SuspectStatus struct {
	Generation string
	At         time.Time
	Reasons    []string // <= MaxReasons
}

// Heartbeat is the last word of one pusher.
type Heartbeat struct {
	Host       string
	At         time.Time // by the pusher's clock
	ReceivedAt time.Time // by the appliance's
}

// Receiver is the receiver's status.
type Receiver struct {
	Listening bool
	Address   string
	Sessions  int
	Updated   time.Time
}

// Mail is the mail part's status.
type Mail struct {
	Queued    int
	LastSent  time.Time
	LastError string
	Updated   time.Time
}

// Deadman is the dead man's switch's status.
type Deadman struct {
	Alarms  []Alarm
	Updated time.Time
}

// Alarm is one alarm that is raised.
type Alarm struct {
	Kind    string
	Subject string
	// Repository is the one that it is about, and whose name only those may learn
	// who may use it; "": it is about something else.
	Repository string
	Since      time.Time
}

// Write replaces the status file at path.
func Write(path string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("status %s: %w", path, err)
	}
	if len(data) > MaxSize {
		return fmt.Errorf("status %s: %d bytes, more than %d", path, len(data), MaxSize)
	}
	return atomicfile.Write(path, append(data, '\n'), 0o644)
}

// Read reads a status file into a T. It returns nil and no error when there is
// none: nothing is known then. It never blocks and follows no symbolic link in
// the last part of path.
func Read[T any](path string) (*T, error) {
	data, err := plainfile.Read(path, MaxSize+1) // and the newline
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("status: %w", err)
	}
	v := new(T)
	if err := json.Unmarshal(data, v); err != nil {
		return nil, fmt.Errorf("status %s: %w", path, err)
	}
	return v, nil
}
