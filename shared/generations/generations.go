// Package generations keeps repositories' history in a folder of plain files: the
// appliance's disk, or a directory target that the pusher fills at home.
//
// A [Store] takes pushes and makes generations of them:
//
//	Begin ──"same"──────────────────────────▶ confirmed, nothing to do
//	  │
//	  ├─"send-manifest"─▶ TakeManifest ─┐
//	  │                                 ▼
//	  └─"send" (resumed) ───────────▶ Receive ──▶ Commit ──▶ generation
//
// After a cut the pusher begins again, and is asked only for what is missing.
//
// What it guarantees: a generation, once Commit returned, is complete, its files
// were hashed while they were written, and nothing here changes or removes it. A
// push that is cut at any instant, by power even, leaves every generation as it
// was, and loses at most seconds of upload to the next attempt. Two pushes of
// one repository never run at once. Nothing a pusher sends, and no symbolic link
// that someone with the disk in hand planted, names a file outside the store.
//
// What it leaves to callers: who may push what, for how long a transaction may
// stall, when to expire. See docs/protocol.md for the layout on the disk.
package generations

import (
	"errors"
	"fmt"
	"strconv"
	"time"

	"farkeep/shared/manifest"
)

// Generation is what generation.toml says of one generation.
type Generation struct {
	// Name is the folder's: sequence and time of commit, NameFormat.
	Name string `toml:"-"`
	// Standing is what is thought of it now; List, Newest and Generation fill it in.
	Standing Standing `toml:"-"`

	Format       int          `toml:"format"` // 1
	Repository   string       `toml:"repository"`
	Sequence     int64        `toml:"sequence"`  // orders the generations; never used twice
	Committed    time.Time    `toml:"committed"` // UTC, by the clock of the machine that holds the disk
	ClockSet     bool         `toml:"clock_set"` // that clock was known to be right
	Pusher       string       `toml:"pusher"`    // the name of the key that pushed
	RepositoryID string       `toml:"repository_id,omitempty"`
	Kind         string       `toml:"kind"`
	Digest       manifest.Sum `toml:"digest"` // of the manifest
	Entries      int64        `toml:"entries"`
	Files        int64        `toml:"files"`
	Bytes        int64        `toml:"bytes"`
	NewFiles     int64        `toml:"new_files"` // not shared with the generation before
	NewBytes     int64        `toml:"new_bytes"`
	Overhead     int64        `toml:"overhead_bytes"` // what its lists and folders take, roughly
	Base         string       `toml:"base,omitempty"` // the generation that unchanged files were shared with; it may be gone
	Push         string       `toml:"push"`           // the id of the push
	Suspect      bool         `toml:"suspect"`
	Reasons      []string     `toml:"suspect_reasons,omitempty"`
	OldReason    string       `toml:"suspect_reason,omitempty"` // as it was written once; empty once read
}

// The files of a generation.
const (
	FilesFolder  = "files"
	SumsFile     = "SUMS.b2"
	ManifestFile = "MANIFEST"
	TOMLFile     = "generation.toml"
)

// The folders at the top of a store.
const (
	GenerationsFolder = "generations"
	IncomingFolder    = "incoming"
	HeartbeatFolder   = ".heartbeat"
	PrivateFolder     = ".farkeep"
	StagingFolder     = "staging" // of stock clients, made by others; safe to lose
	ReadmeFile        = "README.txt"
)

const nameTime = "20060102T150405Z"

// Name is the folder of a generation: the sequence orders, the time informs.
func Name(sequence int64, committed time.Time) string {
	return fmt.Sprintf("%06d-%s", sequence, committed.UTC().Format(nameTime))
}

// ParseName takes a generation's folder name apart.
func ParseName(name string) (sequence int64, committed time.Time, err error) {
	if len(name) < 6+1+len(nameTime) || len(name) > 18+1+len(nameTime) {
		return 0, time.Time{}, fmt.Errorf("%.64q is not a generation's name", name)
	}
	cut := len(name) - len(nameTime) - 1
	sequence, err = strconv.ParseInt(name[:cut], 10, 64)
	if err == nil {
		committed, err = time.Parse(nameTime, name[cut+1:])
	}
	if err != nil || sequence < 1 || Name(sequence, committed) != name {
		return 0, time.Time{}, fmt.Errorf("%q is not a generation's name", name)
	}
	return sequence, committed, nil
}

// Errors that callers tell apart.
var (
	// ErrNone: the repository has no generation.
	ErrNone = errors.New("no generation yet")
	// ErrBusy: another push of the repository is under way.
	ErrBusy = errors.New("another push of this repository is under way")
	// ErrHeld: a generation cannot go now, because a push builds on it or it is
	// being read.
	ErrHeld = errors.New("in use")
	// ErrKept: a generation never goes this way, because history needs it.
	ErrKept = errors.New("history needs it")
	// ErrIncomplete: a commit before everything was uploaded.
	ErrIncomplete = errors.New("the upload is not complete")
	// ErrOffer: the manifest is not the one that was offered.
	ErrOffer = errors.New("the manifest is not what was offered")
	// ErrDamaged: something on the disk is not as it was written.
	ErrDamaged = errors.New("damaged on the disk")
)

// SpaceError refuses a push that would not fit, before it starts.
type SpaceError struct {
	Repository string
	What       string // "bytes", "inodes"
	Needs      int64  // for this push, those under way included
	Has        int64  // free, the reserve not counted
	Reserve    int64
	// Own and Most are the generations that hold most, five at most: of this
	// repository, and of all. A pusher may not learn the names of the others, so
	// Error tells of Own alone.
	Own, Most []Holding
}

func (e *SpaceError) Error() string {
	text := fmt.Sprintf("the disk has no room for this push: it needs %d %s, %d are free beside the reserve of %d", e.Needs, e.What, e.Has, e.Reserve)
	for i, h := range e.Own {
		if i == 0 {
			text += "; of " + e.Repository
		}
		text += fmt.Sprintf(", %s holds %d bytes", h.Generation, h.Bytes)
	}
	return text
}

// QuotaError refuses a push over its key's quota.
type QuotaError struct {
	Key                string
	Quota, Used, Needs int64 // bytes
}

func (e *QuotaError) Error() string {
	return fmt.Sprintf("over the quota of key %s: %d bytes allowed, %d used, %d more needed", e.Key, e.Quota, e.Used, e.Needs)
}
