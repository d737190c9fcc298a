// Package policy decides who gets a key. [Decide] is a pure function of the
// standing rules (site.toml), of what a person has ordered ([Standing]), of what
// happened lately ([History]) and of the request; [Store] keeps the latter two,
// one small file each per appliance, so that they survive restarts and crashes.
//
// Whatever is missing, unreadable or contradictory means no.
package policy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"farkeep/shared/atomicfile"
	"farkeep/shared/keywire"
	"farkeep/shared/settings"
	"farkeep/shared/site"
)

// States of an appliance.
const (
	Enabled = "enabled"
	Revoked = "revoked" // sticky: until a person allows it again
)

// Standing is what a person has ordered about an appliance.
type Standing struct {
	Appliance string    `json:"appliance"`
	State     string    `json:"state"` // Enabled or Revoked
	Reason    string    `json:"reason"`
	By        string    `json:"by,omitempty"`
	Since     time.Time `json:"since"`
}

// History is what an appliance did lately.
type History struct {
	Appliance string      `json:"appliance"`
	Keys      []time.Time `json:"keys"`      // grants in the last 24 hours, oldest first
	LastKey   time.Time   `json:"last_key"`  // zero: never
	LastSeen  time.Time   `json:"last_seen"` // last request that was granted
}

// Reasons for a decision. They are part of the audit log's vocabulary.
const (
	ReasonExpected     = "as expected"
	ReasonNoStanding   = "no standing on file"
	ReasonRevoked      = "revoked"
	ReasonNoDisk       = "no disk in site.toml"
	ReasonForeignDisk  = "another appliance's disk, or nobody's"
	ReasonForeignPlace = "not from its VPN address"
	ReasonTooOften     = "too many keys in 24 hours"
)

// Decision is the answer to a request.
type Decision struct {
	Granted bool
	Reason  string
}

func no(reason string) Decision { return Decision{Reason: reason} }

// Decide judges a request of the appliance a from address from at time now.
// standing is nil where none is on file.
func Decide(a site.Appliance, standing *Standing, h History, r keywire.Request, from netip.Addr, now time.Time) Decision {
	switch {
	case standing == nil, standing.Appliance != a.Name:
		return no(ReasonNoStanding)
	case standing.State != Enabled:
		return no(ReasonRevoked)
	case a.KeyPolicy.Source != "any" && (!a.VPNAddress.IsValid() || from.Unmap() != a.VPNAddress):
		return no(ReasonForeignPlace)
	}
	if r.Verb == keywire.CheckIn {
		return Decision{true, ReasonExpected}
	}
	switch {
	case a.LUKS == "":
		return no(ReasonNoDisk)
	case r.UUID != a.LUKS:
		return no(ReasonForeignDisk)
	}
	if r.Verb == keywire.Key && len(recent(h.Keys, now)) >= a.KeyPolicy.KeysPerDay {
		return no(ReasonTooOften)
	}
	return Decision{true, ReasonExpected}
}

// recent drops grants older than a day. Grants that lie in the future, because
// the clock was set back, stay: a clock opens nothing.
func recent(keys []time.Time, now time.Time) []time.Time {
	return slices.DeleteFunc(slices.Clone(keys), func(t time.Time) bool { return now.Sub(t) >= 24*time.Hour })
}

// After is the history after a granted request.
func (h History) After(verb keywire.Verb, now time.Time) History {
	now = now.UTC()
	h.LastSeen = now
	h.Keys = recent(h.Keys, now)
	if verb == keywire.Key {
		h.Keys = append(h.Keys, now)
		h.LastKey = now
	}
	return h
}

// Store keeps standings and histories in a folder, each in a file of its own.
type Store struct{ dir string }

// Open names the folder. It is made when something is first written.
func Open(dir string) *Store { return &Store{dir: dir} }

// Standing returns what was ordered about an appliance, nil for nothing yet.
func (s *Store) Standing(name string) (*Standing, error) {
	var v Standing
	found, err := s.read("standing", name, &v)
	if err != nil || !found {
		return nil, err
	}
	if v.Appliance != name || v.State != Enabled && v.State != Revoked {
		return nil, fmt.Errorf("read %s: it is not the standing of %s", s.path("standing", name), name)
	}
	return &v, nil
}

// SetStanding records an order, durably.
func (s *Store) SetStanding(v Standing) error {
	v.Since = v.Since.UTC().Truncate(time.Second)
	return s.write("standing", v.Appliance, v)
}

// History returns what an appliance did lately.
func (s *Store) History(name string) (History, error) {
	h := History{Appliance: name}
	if _, err := s.read("history", name, &h); err != nil {
		return History{}, err
	}
	if h.Appliance != name {
		return History{}, fmt.Errorf("read %s: it is the history of another appliance", s.path("history", name))
	}
	return h, nil
}

// SetHistory records what an appliance did, durably.
func (s *Store) SetHistory(h History) error { return s.write("history", h.Appliance, h) }

func (s *Store) path(kind, name string) string { return filepath.Join(s.dir, kind, name+".json") }

// maxFile bounds a state file: 1440 grants of 40 bytes and room.
const maxFile = 128 << 10

func (s *Store) read(kind, name string, v any) (found bool, err error) {
	if !settings.IsName(name) {
		return false, fmt.Errorf("%q is not the name of an appliance", name)
	}
	path := s.path(kind, name)
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return false, fmt.Errorf("read %s: %w", path, err)
	}
	if len(text) > maxFile {
		return false, fmt.Errorf("read %s: larger than %d bytes", path, maxFile)
	}
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields() // written by a newer program: its rules are not known here
	if err := dec.Decode(v); err != nil {
		return false, fmt.Errorf("read %s: %w", path, err)
	}
	return true, nil
}

func (s *Store) write(kind, name string, v any) error {
	if !settings.IsName(name) {
		return fmt.Errorf("%q is not the name of an appliance", name)
	}
	text, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("write %s: %w", s.path(kind, name), err)
	}
	if err := os.MkdirAll(filepath.Join(s.dir, kind), 0o700); err != nil {
		return fmt.Errorf("write %s: %w", s.path(kind, name), err)
	}
	return atomicfile.Write(s.path(kind, name), append(text, '\n'), 0o600)
}
