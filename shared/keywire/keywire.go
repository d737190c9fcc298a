// Package keywire is the protocol between an appliance and its key servers: exec
// verbs over SSH, so that a stock ssh with the appliance's identity speaks it
// too, and a reader of the answer needs no parser.
//
//	request                            answer on standard output        exit status
//	key UUID [TOKEN] [name=value ...]  the key's bytes, nothing else    0
//	lease UUID [TOKEN] [name=value ...]  one line of JSON, a Lease      0
//	checkin [TOKEN] [name=value ...]   one line of JSON, a Checkin      0
//	dark UUID                          one line of JSON, a Checkin      0
//	refused, held, not yet             nothing                          4 (hint.ExitRefused)
//	no such verb, malformed            nothing                          2 (hint.ExitUsage)
//	server in doubt                    nothing                          1 (hint.ExitFailure), 5 (hint.ExitUnreachable)
//
// With a key comes one line on standard error, "token NEWTOKEN": to be kept, and
// shown with the next request. Otherwise standard error has at most a word for
// people; it never says why, because whoever asks may be a thief. An answer of 1
// or 5 may be tried again, with back-off; so may 4, because a person can change it.
//
// The name=value words are claims, what the appliance says of itself. No server
// may open anything because of a claim; it may refuse, hold or alarm because of
// one. Names that a server does not know are passed over: an appliance may be
// newer than one of its servers.
package keywire

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"farkeep/shared/settings"
)

const (
	// MaxKey bounds a key, in bytes: room for the key of an adopted disk, which
	// may be a file of somebody's own making.
	MaxKey = 8192
	// NewKey is the length in bytes of the keys that Farkeep makes.
	NewKey = 64
	// MaxRequest bounds a request, in bytes. The longest with all claims has 280.
	MaxRequest = 512
	// MaxAnswer bounds the answer to lease and checkin, in bytes.
	MaxAnswer = 1024
)

// Verb is what is asked for.
type Verb string

// The verbs of the protocol.
const (
	Key     Verb = "key"     // the key of one disk
	Renew   Verb = "lease"   // go on keeping the disk open
	CheckIn Verb = "checkin" // I am here
	Dark    Verb = "dark"    // my disk is dark, after a refusal or a lost lease
)

// ErrBadRequest is wrapped by every error of Parse. Such errors quote nothing of
// the request: a token may be in it.
var ErrBadRequest = errors.New("not a request of the key protocol")

// Request is one request.
type Request struct {
	Verb   Verb
	UUID   string // LUKS UUID; "" for CheckIn
	Token  Token  // of the last grant; "" for none; never with Dark
	Claims Claims // all zero with Dark
}

// Parse reads a verb and its arguments, as sshverb hands them over.
func Parse(verb string, args []string) (Request, error) {
	r := Request{Verb: Verb(verb)}
	length := len(verb)
	for _, a := range args {
		length += 1 + len(a)
	}
	if length > MaxRequest {
		return Request{}, fmt.Errorf("%w: longer than %d bytes", ErrBadRequest, MaxRequest)
	}
	switch r.Verb {
	case CheckIn:
	case Key, Renew, Dark:
		if len(args) == 0 || !settings.IsLUKSUUID(args[0]) {
			return Request{}, fmt.Errorf("%w: %s wants a LUKS UUID", ErrBadRequest, verb)
		}
		r.UUID, args = args[0], args[1:]
	default:
		return Request{}, fmt.Errorf("%w: the verbs are %s, %s, %s and %s", ErrBadRequest, Key, Renew, CheckIn, Dark)
	}
	if r.Verb == Dark && len(args) > 0 {
		return Request{}, fmt.Errorf("%w: %s takes a LUKS UUID and nothing else", ErrBadRequest, verb)
	}
	if len(args) > 0 && !strings.Contains(args[0], "=") {
		if !IsToken(args[0]) {
			return Request{}, fmt.Errorf("%w: the token is malformed", ErrBadRequest)
		}
		r.Token, args = Token(args[0]), args[1:]
	}
	var err error
	if r.Claims, err = parseClaims(args); err != nil {
		return Request{}, err
	}
	return r, nil
}

// Line is what to send as an exec request. It holds the token: log Verb and UUID
// instead. Claims whose values the protocol does not allow are left out of it:
// they are a help, and must not cost an appliance its key.
func (r Request) Line() string {
	words := []string{string(r.Verb)}
	if r.UUID != "" && r.Verb != CheckIn {
		words = append(words, r.UUID)
	}
	if r.Verb != Dark {
		if r.Token != "" {
			words = append(words, r.Token.Reveal())
		}
		words = append(words, r.Claims.words()...)
	}
	return strings.Join(words, " ")
}

// String is Line without token and claims, for logs.
func (r Request) String() string { return strings.TrimSuffix(string(r.Verb)+" "+r.UUID, " ") }

// Loggable is what of a request's arguments may be logged: the UUID.
func Loggable(_ string, args []string) []string {
	if len(args) > 0 && settings.IsLUKSUUID(args[0]) {
		return args[:1]
	}
	return nil
}

// Lease is the answer to Renew: the disk may stay open for Seconds from the
// moment at which the request was sent, and the next one is due after Renew.
type Lease struct {
	Seconds int64 `json:"seconds"`
	Renew   int64 `json:"renew,omitempty"` // seconds, at most Seconds; older servers leave it out
}

const (
	// MinLease and MaxLease bound a lease.
	MinLease = time.Minute
	MaxLease = 30 * 24 * time.Hour
	// MaxRenew bounds the time between two renewals of a lease, so that a
	// revocation is heard of soon.
	MaxRenew = 5 * time.Minute
)

// NewLease is the answer for a lease of d, which is cut to whole seconds.
func NewLease(d time.Duration) Lease {
	return Lease{Seconds: int64(d / time.Second), Renew: int64(RenewAfter(d) / time.Second)}
}

// RenewAfter is when a lease of d has to be renewed: after a third of it, so that
// two attempts may fail, and after MaxRenew at most.
func RenewAfter(d time.Duration) time.Duration { return max(min(d/3, MaxRenew), time.Second) }

// Duration is the length of the lease.
func (l Lease) Duration() time.Duration { return time.Duration(l.Seconds) * time.Second }

// Renewal is how long after the request the next one is due.
func (l Lease) Renewal() time.Duration {
	if l.Renew == 0 {
		return RenewAfter(l.Duration())
	}
	return time.Duration(l.Renew) * time.Second
}

// Checkin is the answer to CheckIn and Dark.
type Checkin struct {
	Appliance string `json:"appliance"` // the name under which the key server knows the peer
}

// ParseLease reads the answer to Renew. A lease is from 1 second to MaxLease.
func ParseLease(answer []byte) (Lease, error) {
	var l Lease
	if err := parseAnswer(answer, &l); err != nil {
		return Lease{}, err
	}
	if l.Seconds < 1 || l.Seconds > int64(MaxLease/time.Second) {
		return Lease{}, fmt.Errorf("read a lease: %d seconds make no sense", l.Seconds)
	}
	if l.Renew < 0 || l.Renew > l.Seconds {
		return Lease{}, fmt.Errorf("read a lease: to be renewed after %d of %d seconds makes no sense", l.Renew, l.Seconds)
	}
	return l, nil
}

// ParseCheckin reads the answer to CheckIn and Dark.
func ParseCheckin(answer []byte) (Checkin, error) {
	var c Checkin
	if err := parseAnswer(answer, &c); err != nil {
		return Checkin{}, err
	}
	if !settings.IsName(c.Appliance) {
		return Checkin{}, fmt.Errorf("read the answer to checkin: %q is not a name", c.Appliance)
	}
	return c, nil
}

// parseAnswer accepts keys that it does not know: servers are updated before appliances.
func parseAnswer(answer []byte, v any) error {
	if len(answer) > MaxAnswer {
		return fmt.Errorf("read the key server's answer: longer than %d bytes", MaxAnswer)
	}
	if err := json.Unmarshal(answer, v); err != nil {
		return fmt.Errorf("read the key server's answer: %w", err)
	}
	return nil
}

// KeyFile is the name of the file that holds the key of the disk uuid, in the
// keys folder of a key server: its raw bytes, mode 0600.
func KeyFile(uuid string) string { return uuid + ".key" }

// KeyFileUUID is the inverse of KeyFile.
func KeyFileUUID(name string) (uuid string, ok bool) {
	uuid, found := strings.CutSuffix(name, ".key")
	return uuid, found && settings.IsLUKSUUID(uuid)
}
