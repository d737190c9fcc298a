package policy

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"farkeep/keyserver/moment"
	"farkeep/keyserver/place"
	"farkeep/shared/settings"
)

// Limits of a state: whatever an appliance does, its file stays small.
const (
	maxKeys     = 1440 // one grant a minute for a day; site.toml allows no more
	maxNetworks = 256
	maxWaiting  = 8
	maxWarned   = 16
	maxText     = 300 // bytes of a reason, or of who gave it
	maxState    = 512 << 10
)

// version is the format of the file.
const version = 1

// State is everything that a key server remembers about one appliance. Its zero
// value, with a name, is an appliance of which nothing was ever heard.
type State struct {
	Version   int      `json:"version"`
	Appliance string   `json:"appliance"`
	Standing  Standing `json:"standing"`

	Keys     []moment.Moment `json:"keys,omitempty"` // grants in the last 24 hours, oldest first
	LastKey  moment.Moment   `json:"last_key"`       // zero: never
	LastSeen moment.Moment   `json:"last_seen"`      // last request that was as it should be
	Absent   bool            `json:"absent,omitempty"`
	Anchor   moment.Moment   `json:"anchor"` // the first request in this boot of the key server

	Tokens   Tokens         `json:"tokens"`
	Networks []KnownNetwork `json:"networks,omitempty"`
	Trusted  TrustedPlace   `json:"trusted"`
	Unplaced moment.Moment  `json:"unplaced"` // since when the VPN does not say where it is; zero: it does
	Serial   string         `json:"serial,omitempty"`
	Waiting  []Waiting      `json:"waiting,omitempty"`
	Approval *Approval      `json:"approval,omitempty"`
	Expected *Expectation   `json:"expected,omitempty"`
	Warned   []Warning      `json:"warned,omitempty"`
	Header   Header         `json:"header"`
	Told     moment.Moment  `json:"told"` // the appliance was told that it is revoked
	Dark     moment.Moment  `json:"dark"` // the appliance said that its disk is dark
}

// Values of Standing.State.
const (
	Enabled = "enabled"
	Revoked = "revoked" // sticky: until a person allows it again
)

// Standing is what a person has ordered about an appliance.
type Standing struct {
	State  string    `json:"state"` // Enabled, Revoked; "" where nobody has said anything yet
	Reason string    `json:"reason,omitempty"`
	By     string    `json:"by,omitempty"`
	Since  time.Time `json:"since"`
}

// Tokens are the digests of the two tokens that are accepted: the one that was
// shown last, and the one that was issued last, which a power cut may have lost
// on its way. Both empty: none is on file, and none is asked for.
type Tokens struct {
	Shown  string `json:"shown,omitempty"` // "" beside an Issued one: the appliance had none then
	Issued string `json:"issued,omitempty"`
}

// onFile reports whether a token is asked for.
func (t Tokens) onFile() bool { return t != Tokens{} }

// KnownNetwork is a network from which the appliance was accepted.
type KnownNetwork struct {
	place.Network
	First time.Time `json:"first"`
	Last  time.Time `json:"last"`
	How   string    `json:"how"` // "first", "followed", "approved", "expected", "alike", "unasked"
}

// TrustedPlace is where the appliance was when it was last accepted, and what it
// then called its boot.
type TrustedPlace struct {
	Network place.Network `json:"network"`
	Boot    string        `json:"boot,omitempty"`
	Up      time.Duration `json:"up,omitempty"` // as claimed
	At      moment.Moment `json:"at"`
}

// Waiting is a request that a person is asked about.
type Waiting struct {
	ID       string        `json:"id"`
	Verb     string        `json:"verb"`
	Asks     []string      `json:"asks"` // why it was held
	Endpoint string        `json:"endpoint,omitempty"`
	Network  place.Network `json:"network"`
	Token    string        `json:"token,omitempty"` // digest of the token that it showed
	Boot     string        `json:"boot,omitempty"`  // claims
	Serial   string        `json:"serial,omitempty"`
	First    moment.Moment `json:"first"`
	Last     moment.Moment `json:"last"`
	Count    int           `json:"count"`
}

// Approval lets one request through that is like the waiting one, and its repetition.
type Approval struct {
	Of    Waiting       `json:"of"`
	By    string        `json:"by"`
	Why   string        `json:"why"`
	Given moment.Moment `json:"given"`
	// Earliest is when it may have been given, should the wall clock have been set before.
	Earliest time.Time `json:"earliest"`
	// Used is when a key went out by it, to the machine that Of then names; zero: none
	// did. That machine may repeat its request for a while.
	Used moment.Moment `json:"used,omitzero"`
}

// Expectation lets the appliance come back from somewhere else, once.
type Expectation struct {
	Until time.Time     `json:"until"` // as the person wrote it
	For   time.Duration `json:"for"`   // what that was ahead; it is what counts
	By    string        `json:"by"`
	Why   string        `json:"why"`
	Given moment.Moment `json:"given"`
	// Earliest is when it may have been given, should the wall clock have been set before.
	Earliest time.Time `json:"earliest"`
}

// Warning remembers that a person was told, so that the same is not said each time.
type Warning struct {
	What string        `json:"what"`
	At   moment.Moment `json:"at"`
}

// Header is what the appliance last said of its LUKS header.
type Header struct {
	Digest string `json:"digest,omitempty"`
	Damage string `json:"damage,omitempty"`
	Slots  int    `json:"slots,omitempty"`
}

// Parse reads a state file, which must be that of the appliance name. What it
// does not understand is an error: a newer program's rules are not known here.
func Parse(name string, text []byte) (State, error) {
	if len(text) > maxState {
		return State{}, fmt.Errorf("larger than %d bytes", maxState)
	}
	var s State
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&s); err != nil {
		return State{}, err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return State{}, errors.New("there is something behind the state")
	}
	if s.Appliance != name {
		return State{}, errors.New("it is the state of another appliance")
	}
	return s, s.check()
}

// check refuses what no program of ours would have written.
func (s State) check() error {
	type must struct {
		ok   bool
		what string
	}
	rules := []must{
		{s.Version == version, fmt.Sprintf("version %d, this program knows %d", s.Version, version)},
		{settings.IsName(s.Appliance), "the name is none"},
		{slices.Contains([]string{"", Enabled, Revoked}, s.Standing.State), "the standing is neither enabled nor revoked"},
		{len(s.Keys) <= maxKeys, "too many grants"},
		{len(s.Networks) <= maxNetworks, "too many networks"},
		{len(s.Waiting) <= maxWaiting, "too many waiting requests"},
		{len(s.Warned) <= maxWarned, "too many warnings"},
		{isDigest(s.Tokens.Shown) && isDigest(s.Tokens.Issued), "a token's digest is none"},
		{s.Trusted.Network.Name == "" || s.Trusted.Network.Valid(), "the trusted network is none"},
	}
	for _, n := range s.Networks {
		rules = append(rules, must{n.Valid(), "a network is none"})
	}
	waiting := s.Waiting
	if s.Approval != nil {
		waiting = append(slices.Clone(waiting), s.Approval.Of)
	}
	for _, w := range waiting {
		rules = append(rules,
			must{w.ID != "" && len(w.Asks) > 0 && len(w.Asks) <= len(allAsks), "a waiting request is none"},
			must{w.Network.Name == "" || w.Network.Valid(), "the network of a waiting request is none"},
			must{isDigest(w.Token), "the digest of a waiting request's token is none"})
	}
	for _, r := range rules {
		if !r.ok {
			return errors.New(r.what)
		}
	}
	return nil
}

func isDigest(s string) bool {
	raw, err := hex.DecodeString(s)
	return err == nil && (len(raw) == 0 || len(raw) == 32)
}

// anchor notes what the wall clock showed when this boot of the key server was
// first heard of.
func (s *State) anchor(at moment.Moment) {
	if at.Boot == "" || s.Anchor.Boot != at.Boot {
		s.Anchor = at
	}
}

// unset is the time that the wall clock would show had nobody set it since then.
func (s *State) unset(at moment.Moment) time.Time { return s.Anchor.Wall.Add(at.Up - s.Anchor.Up) }

// earliest and latest are at with the wall clock as it is, or as it would be had
// nobody set it. After a restart only the wall clock is left to measure by; then
// what was noted must not seem more recent, or longer ago, than it was.
func (s *State) earliest(at moment.Moment) moment.Moment {
	if w := s.unset(at); w.Before(at.Wall) {
		at.Wall = w
	}
	return at
}

func (s *State) latest(at moment.Moment) moment.Moment {
	if w := s.unset(at); w.After(at.Wall) {
		at.Wall = w
	}
	return at
}

// clone makes a deep copy: Decide and the orders never change what they were given.
func (s State) clone() State {
	s.Keys = slices.Clone(s.Keys)
	s.Networks = slices.Clone(s.Networks)
	s.Waiting = slices.Clone(s.Waiting)
	for i := range s.Waiting {
		s.Waiting[i].Asks = slices.Clone(s.Waiting[i].Asks)
	}
	s.Warned = slices.Clone(s.Warned)
	if s.Approval != nil {
		a := *s.Approval
		s.Approval = &a
	}
	if s.Expected != nil {
		e := *s.Expected
		s.Expected = &e
	}
	return s
}
