// Package pushwire is what a pusher and an appliance say to each other around
// the verbs of package sshverb: JSON lines, each bounded by MaxLine, and raw
// bytes where a verb's description says so. docs/protocol.md tells it in order.
//
//	offer REPOSITORY   → Offer            ← OfferAnswer (same | send-manifest)
//	                   → the manifest     ← OfferAnswer (send), then Needed
//	upload PUSH        → recipe stream    ← UploadAnswer
//	                   [→ Ending          ← CommitAnswer, then {} for a heartbeat]
//	commit PUSH|REPOSITORY                ← CommitAnswer
//	abort PUSH|REPOSITORY                 ← {}
//	sftp                                  a subsystem: staging copies for stock clients
//	heartbeat HOST     → Heartbeat        ← {}
//	generations [--text] [REPOSITORY]     ← one Generation per line, or text
//	verify REPOSITORY GENERATION          ← VerifyAnswer
//	status [--json]                       ← text, or Status
//	wake [--wait=SECONDS]                 ← DiskState
//	sleep                                 ← DiskState
//
// With an admin key:
//
//	accept REPOSITORY GENERATION [WHY]    ← {}
//	reject REPOSITORY GENERATION [WHY]    ← {}
//	retire REPOSITORY                     ← Retiring
//	keep REPOSITORY                       ← {}
//	accept-clock                          ← ClockAnswer
//	floor GENERATIONS AGE                 ← {}
package pushwire

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"time"
)

// MaxLine bounds a JSON line, in bytes, newline included.
const MaxLine = 64 << 10

// Answers to an offer.
const (
	AnswerSame         = "same"          // the newest generation is just that: confirmed, done
	AnswerSendManifest = "send-manifest" // the digest is news: send the manifest now
	AnswerSend         = "send"          // upload what Needed lists, as push Push
)

// Kinds of repositories.
const (
	KindBorg1 = "borg1" // a Borg 1.x repository
	KindFiles = "files" // any other tree of files
)

// Offer opens a push.
type Offer struct {
	Digest       string `json:"digest"`        // of the manifest, hex
	Entries      int64  `json:"entries"`       // in the manifest
	Bytes        int64  `json:"bytes"`         // sum of the files' sizes
	Kind         string `json:"kind"`          // KindBorg1 or KindFiles
	RepositoryID string `json:"repository_id"` // Borg's, hex; "" for files
}

// OfferAnswer is what the appliance makes of an offer.
type OfferAnswer struct {
	Answer     string `json:"answer"`
	Generation string `json:"generation,omitempty"` // AnswerSame: the confirmed generation
	Push       string `json:"push,omitempty"`       // AnswerSend: the name for upload, commit and abort
	Need       int64  `json:"need,omitempty"`       // AnswerSend: files to upload
	NeedBytes  int64  `json:"need_bytes,omitempty"` // AnswerSend: their size
	Kept       int64  `json:"kept,omitempty"`       // AnswerSend: files already there from a push that was cut
	Base       string `json:"base,omitempty"`       // AnswerSend: the generation that recipes copy from; "" for none
	// BaseDigest is the digest of a manifest that is here, hex. AnswerSendManifest:
	// a delta of it will do (package manifest). AnswerSend: it is Base's, and the
	// pusher knows by it whether it remembers what Base holds; "" while copies of Base
	// would only be refused.
	BaseDigest string    `json:"base_digest,omitempty"`
	Resume     []Partial `json:"resume,omitempty"` // AnswerSend: files of which the beginning is there
	// Heal says that nothing changed: what is needed are files of the newest
	// generation that the disk lost, and the commit makes no generation.
	Heal bool `json:"heal,omitempty"`
}

// Partial is a file of which the appliance has the first Have bytes.
type Partial struct {
	Index int64 `json:"index"` // in the offered manifest
	Have  int64 `json:"have"`
}

// MaxPartials bounds OfferAnswer.Resume.
const MaxPartials = 16

// UploadAnswer ends an upload.
type UploadAnswer struct {
	Files int64 `json:"files"`
	Bytes int64 `json:"bytes"` // written; DATA and COPY together
	// Took is from the first byte of the stream to the last one's sync, in
	// nanoseconds; Waited what of it went by waiting for the next byte.
	Took   time.Duration `json:"took"`
	Waited time.Duration `json:"waited"`
}

// KnowsEnding is a word of sshverb.Server.Knows.
const KnowsEnding = "ending"

// Ending may follow the stream of an upload: what is to be done once all of it is
// there, so that nobody waits for the upload's answer before asking for it. It is
// carried out in order and ends with the first error. It is sent only to an appliance
// whose SSH version says KnowsEnding: an older one may end the verb in the middle of it.
type Ending struct {
	Commit string `json:"commit"` // the push, again
	// Heartbeat is judged after the commit, and not at all if that is refused.
	Heartbeat *Heartbeat `json:"heartbeat,omitempty"`
}

// CommitAnswer ends a push.
type CommitAnswer struct {
	Generation string `json:"generation"`
	Suspect    bool   `json:"suspect,omitempty"`
	// Same says that a staging copy was just that generation already.
	Same bool `json:"same,omitempty"`
}

// Heartbeat is the pusher's word that the offsite copy is up to date.
type Heartbeat struct {
	Host         string             `json:"host"`
	At           time.Time          `json:"at"` // by the pusher's clock: told, never judged by
	Repositories []RepositoryDigest `json:"repositories"`
}

// RepositoryDigest is what the newest generation of a repository must be.
type RepositoryDigest struct {
	Name   string `json:"name"`
	Digest string `json:"digest"`
}

// Generation describes one generation.
type Generation struct {
	Repository string    `json:"repository"`
	Name       string    `json:"name"` // SEQUENCE-TIME, the folder's name
	Committed  time.Time `json:"committed"`
	Entries    int64     `json:"entries"`
	Bytes      int64     `json:"bytes"`
	NewBytes   int64     `json:"new_bytes,omitempty"` // not shared with the generation before
	Digest     string    `json:"digest"`
	Suspect    bool      `json:"suspect,omitempty"` // was so at its commit; see Standing
	// Standing is "good", "suspect", "accepted" or "rejected".
	Standing string   `json:"standing,omitempty"`
	Reasons  []string `json:"reasons,omitempty"` // why it was suspect, in sentences
	// Keep says whether it stays for now, and Why: "weekly #3", "floor", "suspect".
	Keep bool   `json:"keep,omitempty"`
	Why  string `json:"why,omitempty"`
	// Goes is when it expires if nothing new comes and nothing is frozen; zero:
	// never, or not foreseeable.
	Goes time.Time `json:"goes,omitzero"`
}

// VerifyAnswer ends a verify.
type VerifyAnswer struct {
	Files int64    `json:"files"`
	Bytes int64    `json:"bytes"`
	Bad   []string `json:"bad,omitempty"` // the first files whose content is not what SUMS.b2 says
}

// ClockAnswer ends an accept-clock.
type ClockAnswer struct {
	Was time.Time `json:"was"` // the latest time that the disk had seen
	// Now is the time that was accepted; zero: the one that the time sources agree
	// on next will be, within an hour.
	Now time.Time `json:"now,omitzero"`
}

// DiskState is the answer to wake and sleep, and a part of Status.
type DiskState struct {
	State           string    `json:"state"` // off, powered, unlocked, mounted, closing, failed
	Power           bool      `json:"power"`
	Unlocked        bool      `json:"unlocked"`
	Mounted         bool      `json:"mounted"`
	Since           time.Time `json:"since"`
	ExposureMinutes int       `json:"exposure_minutes"` // since power on
	Error           string    `json:"error,omitempty"`
	TotalBytes      int64     `json:"total_bytes"`
	FreeBytes       int64     `json:"free_bytes"`
	// HeaderDigest is the fingerprint of the LUKS header (luksheader) when it was
	// last opened.
	HeaderDigest string    `json:"header_digest,omitempty"`
	LeaseUntil   time.Time `json:"lease_until,omitzero"`   // closed then, unless a key server renews it
	LeaseServer  string    `json:"lease_server,omitempty"` // the one that renewed it last
	Dark         string    `json:"dark,omitempty"`         // "refused" or "expired": kept dark for lack of consent
	RefusedBy    []string  `json:"refused_by,omitempty"`   // key servers, until they grant again
}

// Status is what an appliance says of itself.
type Status struct {
	Appliance    string             `json:"appliance"`
	Version      string             `json:"version"`
	Board        string             `json:"board"`
	Slot         string             `json:"slot,omitempty"`
	Time         time.Time          `json:"time"` // by the appliance's clock
	ClockSet     bool               `json:"clock_set"`
	Started      time.Time          `json:"started"`
	Disk         DiskState          `json:"disk"`
	Repositories []RepositoryStatus `json:"repositories"` // those that the asking key may see
	Heartbeats   []HeartbeatStatus  `json:"heartbeats"`
	Alarms       []Alarm            `json:"alarms"`
	MailQueued   int                `json:"mail_queued"`
	MailError    string             `json:"mail_error,omitempty"`
	MailSent     time.Time          `json:"mail_sent,omitzero"` // when its provider took the last one
	VPN          *VPNState          `json:"vpn,omitempty"`
	Degraded     []string           `json:"degraded,omitempty"`
	Restarts     map[string]int     `json:"restarts,omitempty"`
	Frozen       []string           `json:"frozen,omitempty"` // why nothing expires, in words
	Room         *Room              `json:"room,omitempty"`
	Scrub        *Scrub             `json:"scrub,omitempty"`
	Rot          []Rot              `json:"rot,omitempty"` // the newest
	RotCount     int                `json:"rot_count,omitempty"`
	Retiring     []Retiring         `json:"retiring,omitempty"`
	Untrue       []Untrue           `json:"untrue,omitempty"` // heartbeats that claimed what was not committed
}

// VPNState is how an appliance reaches home, where the tunnel is its own.
type VPNState struct {
	Addresses     []string  `json:"addresses"` // its own in the network where it stands, ADDRESS/BITS
	Endpoint      string    `json:"endpoint"`  // where it reaches home, ADDRESS:PORT
	LastHandshake time.Time `json:"last_handshake,omitzero"`
}

// Room is what the disk has left for history, in bytes.
type Room struct {
	Free     int64     `json:"free"`
	Reserve  int64     `json:"reserve"`          // what pushes leave free
	WorstDay int64     `json:"worst_day"`        // the most that one day added lately
	PerDay   int64     `json:"per_day"`          // what a day adds on average, less what expired
	FullOn   time.Time `json:"full_on,omitzero"` // zero: not foreseen
}

// Scrub is how far the reading of everything has come.
type Scrub struct {
	Started  time.Time `json:"started,omitzero"`
	LastFull time.Time `json:"last_full,omitzero"`
	Done     float64   `json:"done"` // 0 to 1
	Bytes    int64     `json:"bytes"`
	Paused   string    `json:"paused,omitempty"`
}

// Rot is a file whose bytes are not what was committed, or cannot be read.
type Rot struct {
	Repository  string    `json:"repository"`
	Path        string    `json:"path"`
	Sum         string    `json:"sum"` // what its BLAKE2b-256 should be, hex
	What        string    `json:"what"`
	Generations []string  `json:"generations"`
	Found       time.Time `json:"found"`
	Healed      time.Time `json:"healed,omitzero"`
}

// Retiring is a repository that was asked to leave.
type Retiring struct {
	Repository string    `json:"repository"`
	By         string    `json:"by"`
	Asked      time.Time `json:"asked"`
	Due        time.Time `json:"due"`
}

// Untrue is a heartbeat that claimed what was not committed.
type Untrue struct {
	Host string    `json:"host"`
	At   time.Time `json:"at"`
	What string    `json:"what"`
}

// RepositoryStatus is one repository as the appliance knows it, disk or no disk.
type RepositoryStatus struct {
	Name        string    `json:"name"`
	Newest      string    `json:"newest"`
	NewestAt    time.Time `json:"newest_at"`
	ConfirmedAt time.Time `json:"confirmed_at"`
	Generations int       `json:"generations"`
	Suspect     bool      `json:"suspect,omitempty"`
	Suspects    []Suspect `json:"suspects,omitempty"` // not decided yet
	Bytes       int64     `json:"bytes"`
}

// Suspect is a generation that nobody has accepted or rejected yet.
type Suspect struct {
	Generation string    `json:"generation"`
	At         time.Time `json:"at"`
	Reasons    []string  `json:"reasons"`
}

// HeartbeatStatus is the last heartbeat of one host.
type HeartbeatStatus struct {
	Host       string    `json:"host"`
	ReceivedAt time.Time `json:"received_at"` // by the appliance's clock
}

// Alarm is an alarm that is on.
type Alarm struct {
	Kind    string    `json:"kind"`
	Subject string    `json:"subject"`
	Since   time.Time `json:"since"`
}

var repositoryName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)

// CheckRepository says whether name can be a repository's: it becomes a folder.
func CheckRepository(name string) error {
	if !repositoryName.MatchString(name) {
		return fmt.Errorf("%q is not a repository name: letters, digits, dots, dashes and underscores, 128 at most, not a dot first", name)
	}
	return nil
}

// ErrLine is wrapped by ReadLine for a line that is too long, cut off or not
// the expected JSON.
var ErrLine = errors.New("not an expected line")

// ReadLine reads one JSON line into v, which must know every key of it. r must
// have a buffer of at least MaxLine bytes ([NewReader]). io.EOF means that there
// was no line at all.
func ReadLine(r *bufio.Reader, v any) error {
	line, err := r.ReadSlice('\n')
	if err != nil {
		if errors.Is(err, io.EOF) && len(line) == 0 {
			return io.EOF
		}
		return fmt.Errorf("%w: no line end within %d bytes: %w", ErrLine, MaxLine, err)
	}
	dec := json.NewDecoder(bytes.NewReader(line))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return fmt.Errorf("%w: %w", ErrLine, err)
	}
	return nil
}

// NewReader returns a reader that ReadLine can use.
func NewReader(r io.Reader) *bufio.Reader { return bufio.NewReaderSize(r, MaxLine) }

// WriteLine writes v as one JSON line.
func WriteLine(w io.Writer, v any) error {
	line, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(line) >= MaxLine {
		return fmt.Errorf("%w: longer than %d bytes", ErrLine, MaxLine)
	}
	_, err = w.Write(append(line, '\n'))
	return err
}
