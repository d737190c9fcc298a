// Package keywire is the protocol between an appliance and its key servers: exec
// verbs over SSH, so that a stock ssh with the appliance's identity speaks it
// too, and a reader of the answer needs no parser.
//
//	request          answer on standard output        exit status
//	key UUID         the key's bytes, nothing else    0
//	lease UUID       one line of JSON, a Lease        0
//	checkin          one line of JSON, a Checkin      0
//	anything refused nothing                          4 (hint.ExitRefused)
//	no such verb     nothing                          2 (hint.ExitUsage)
//	server in doubt  nothing                          1 (hint.ExitFailure)
//
// A request may carry one more word, the token of the last grant. Standard
// error has at most a word for people; it never says why, because whoever asks
// may be a thief. An answer of 1 may be tried again, with back-off; so may 4,
// because a person can change it.
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
	// MaxRequest bounds a request, in bytes.
	MaxRequest = 160
	// MaxAnswer bounds the answer to lease and checkin, in bytes.
	MaxAnswer = 1024
	// MaxToken bounds a token, in bytes.
	MaxToken = 64
)

// Verb is what is asked for.
type Verb string

// The verbs of the protocol.
const (
	Key     Verb = "key"     // the key of one disk
	Renew   Verb = "lease"   // go on keeping the disk open
	CheckIn Verb = "checkin" // I am here
)

// ErrBadRequest is wrapped by every error of Parse.
var ErrBadRequest = errors.New("not a request of the key protocol")

// Request is one request.
type Request struct {
	Verb  Verb
	UUID  string // LUKS UUID; "" for CheckIn
	Token string // of the last grant; "" for none
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
	case Key, Renew:
		if len(args) == 0 || !settings.IsLUKSUUID(args[0]) {
			return Request{}, fmt.Errorf("%w: %s wants a LUKS UUID", ErrBadRequest, verb)
		}
		r.UUID, args = args[0], args[1:]
	default:
		return Request{}, fmt.Errorf("%w: the verbs are %s, %s and %s", ErrBadRequest, Key, Renew, CheckIn)
	}
	if len(args) > 0 {
		if !isToken(args[0]) {
			return Request{}, fmt.Errorf("%w: the token is malformed", ErrBadRequest)
		}
		r.Token, args = args[0], args[1:]
	}
	if len(args) > 0 {
		return Request{}, fmt.Errorf("%w: %s takes no more arguments", ErrBadRequest, verb)
	}
	return r, nil
}

// isToken accepts what base64 for URLs is made of.
func isToken(s string) bool {
	return s != "" && len(s) <= MaxToken && !strings.ContainsFunc(s, func(r rune) bool {
		return !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || r == '_' || r == '-' || r == '=')
	})
}

// String is the line to send as an exec request. It holds the token: log
// Verb and UUID instead.
func (r Request) String() string {
	s := string(r.Verb)
	for _, word := range []string{r.UUID, r.Token} {
		if word != "" {
			s += " " + word
		}
	}
	return s
}

// Lease is the answer to Renew: the disk may stay open for Seconds from now.
type Lease struct {
	Seconds int64 `json:"seconds"`
}

// Duration is the length of the lease.
func (l Lease) Duration() time.Duration { return time.Duration(l.Seconds) * time.Second }

// Checkin is the answer to CheckIn.
type Checkin struct {
	Appliance string `json:"appliance"` // the name under which the key server knows the peer
}

// ParseLease reads the answer to Renew. A lease is from 1 second to 400 days.
func ParseLease(answer []byte) (Lease, error) {
	var l Lease
	if err := parseAnswer(answer, &l); err != nil {
		return Lease{}, err
	}
	if l.Seconds < 1 || l.Seconds > 400*24*3600 {
		return Lease{}, fmt.Errorf("read a lease: %d seconds make no sense", l.Seconds)
	}
	return l, nil
}

// ParseCheckin reads the answer to CheckIn.
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
