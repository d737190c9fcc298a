// Package keepercall is what the receiver says to the keeper: who the peer is,
// as SSH proved it, and which verb of package pushwire it wants. The peer's
// bytes follow raw and the keeper alone reads them.
//
// The answers are reply lines of package localcall, each an [Answer] whose Out
// the receiver hands to the peer as a line. An error ends the verb; its code,
// text and hint are fit for the peer.
package keepercall

import "encoding/json"

// The keeper's verbs; those of the disk part first.
const (
	Attach      = "attach"      // the disk is mounted
	Release     = "release"     // close everything on it, take no more work
	Offer       = "offer"       // Args.Repository; raw: offer line, manifest
	Upload      = "upload"      // Args.Push; raw: recipe stream
	Commit      = "commit"      // Args.Push, or the repository of a staging copy
	Abort       = "abort"       // the same
	Heartbeat   = "heartbeat"   // Args.Host; raw: heartbeat line
	Generations = "generations" // Args.Repository, or "" for all that the caller may see
	Verify      = "verify"      // Args.Repository, Args.Generation
	SFTP        = "sftp"        // out: Session; then SFTP, raw, both ways, until either side ends it
	Words       = "words"       // Args.Session; what the session has to say in words, lines until it ends

	// Reading keeps everything where it is until the caller hangs up. For keys
	// that restore, and admins.
	Reading = "reading"

	// What follows is for admins.
	Accept      = "accept"       // Args.Repository, Args.Generation, Args.Why
	Reject      = "reject"       // the same
	Retire      = "retire"       // Args.Repository
	Keep        = "keep"         // Args.Repository
	AcceptClock = "accept-clock" // nothing
	Floor       = "floor"        // Args.Number generations, Args.Age
)

// Args come with every verb of the receiver.
type Args struct {
	Key          string   // the authorised key's name
	Role         string   // "push", "restore" or "admin"
	Repositories []string // names that the key may use; a trailing "*" matches the rest
	Quota        int64    // bytes; 0 means none
	Repository   string   `json:",omitempty"`
	Generation   string   `json:",omitempty"`
	Push         string   `json:",omitempty"`
	Host         string   `json:",omitempty"`
	Session      string   `json:",omitempty"` // of SFTP
	Why          string   `json:",omitempty"` // the admin's words
	Number       int      `json:",omitempty"`
	Age          string   `json:",omitempty"` // as in settings: "14d"
}

// What follows an Answer.
const (
	ThenLine = "line" // another Answer
	ThenRaw  = "raw"  // raw bytes until EOF, for the peer
	ThenEnd  = "end"  // nothing: the verb is done
)

// Answer is one reply of the keeper.
type Answer struct {
	Out  json.RawMessage // the line for the peer
	Then string
}

// Session answers SFTP before it begins.
type Session struct {
	Session string // for Words
}
