// Package transfer makes a second key server like the first: a file with the
// keys, with what is remembered about each appliance, and with the rules
// (site.toml). The caller seals it.
//
// Tokens stay where they are: each key server has its own with every appliance. So
// does what a person was asked, allowed or told to expect. What is taken in never
// replaces a key, never enables what is revoked, and always revokes what is
// revoked in the file.
package transfer

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"time"

	"farkeep/keyserver/keystore"
	"farkeep/keyserver/moment"
	"farkeep/keyserver/orders"
	"farkeep/keyserver/policy"
	"farkeep/shared/keywire"
	"farkeep/shared/secret"
	"farkeep/shared/settings"
	"farkeep/shared/site"
)

const (
	format  = "farkeep key server"
	version = 1

	// MaxFile bounds a file, in bytes.
	MaxFile = 256 << 20
	// maxEntries bounds how many keys, and how many appliances, are in it.
	maxEntries = 20000
	// maxSite bounds site.toml, in bytes.
	maxSite = 4 << 20
)

// ErrBadFile is wrapped by every error about the content of a file.
var ErrBadFile = errors.New("this is not the export of a key server")

// File is an export.
type File struct {
	Format  string          `json:"format"`
	Version int             `json:"version"`
	Site    string          `json:"site"` // its name
	From    string          `json:"from"` // the key server that made it
	Created time.Time       `json:"created"`
	Rules   string          `json:"rules"` // its site.toml, for comparison
	Keys    []Key           `json:"keys"`
	States  []policy.State  `json:"-"`
	Raw     json.RawMessage `json:"states"`
}

// Key is the key of one disk.
type Key struct {
	UUID  string `json:"uuid"`
	Bytes []byte `json:"key"`
}

// Wipe overwrites the keys.
func (f *File) Wipe() {
	for _, k := range f.Keys {
		clear(k.Bytes)
	}
}

// Make reads everything that goes into a file. The caller wipes it.
func Make(s *site.Site, rules []byte, from string, keys *keystore.Store, policies *policy.Store, now time.Time) (*File, error) {
	f := &File{Format: format, Version: version, Site: s.Name, From: from, Created: now.UTC().Truncate(time.Second), Rules: string(rules)}
	entries, _, err := keys.List()
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		k, err := keys.Get(e.UUID)
		if err != nil {
			f.Wipe()
			return nil, err
		}
		f.Keys = append(f.Keys, Key{e.UUID, bytes.Clone(k.Reveal())})
		k.Release()
	}
	for _, a := range s.Appliances {
		state, err := policies.Read(a.Name)
		if err != nil {
			f.Wipe()
			return nil, err
		}
		f.States = append(f.States, portable(state))
	}
	return f, nil
}

// portable is what another key server may know of a state.
func portable(s policy.State) policy.State {
	s.Tokens, s.Approval, s.Expected = policy.Tokens{}, nil, nil
	s.Waiting, s.Warned = nil, nil
	s.Anchor, s.Told, s.Dark = moment.Moment{}, moment.Moment{}, moment.Moment{}
	return s
}

// Write writes the file, in clear: w seals it.
func (f *File) Write(w io.Writer) error {
	raw, err := json.Marshal(f.States)
	if err == nil {
		f.Raw = raw
		err = json.NewEncoder(w).Encode(f)
	}
	if err != nil {
		return fmt.Errorf("write the export: %w", err)
	}
	return nil
}

// Parse reads a file that was opened. Whatever is wrong anywhere in it makes all
// of it worthless. The caller wipes it.
func Parse(r io.Reader) (*File, error) {
	text, err := io.ReadAll(io.LimitReader(r, MaxFile+1))
	if err != nil {
		return nil, fmt.Errorf("read the export: %w", err)
	}
	defer clear(text)
	if len(text) > MaxFile {
		return nil, fmt.Errorf("%w: larger than %d bytes", ErrBadFile, MaxFile)
	}
	f := &File{}
	if err := strictly(text, f); err != nil {
		f.Wipe()
		return nil, fmt.Errorf("%w: %w", ErrBadFile, err)
	}
	if err := f.check(); err != nil {
		f.Wipe()
		return nil, fmt.Errorf("%w: %w", ErrBadFile, err)
	}
	return f, nil
}

func strictly(text []byte, v any) error {
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields() // made by a newer program: what it means is not known here
	if err := dec.Decode(v); err != nil {
		// An error of the decoder may quote what it read.
		return fmt.Errorf("byte %d makes no sense", dec.InputOffset())
	}
	if dec.More() {
		return fmt.Errorf("something follows at byte %d", dec.InputOffset())
	}
	return nil
}

func (f *File) check() error {
	switch {
	case f.Format != format:
		return errors.New("it says that it is something else")
	case f.Version != version:
		return fmt.Errorf("version %d, this program knows %d", f.Version, version)
	case !settings.IsName(f.Site) || !settings.IsName(f.From):
		return errors.New("it does not say where it is from")
	case len(f.Rules) > maxSite || len(f.Keys) > maxEntries:
		return errors.New("there is too much in it")
	}
	seen := map[string]bool{}
	for i, k := range f.Keys {
		switch {
		case !settings.IsLUKSUUID(k.UUID):
			return fmt.Errorf("key %d is of no disk", i+1)
		case seen[k.UUID]:
			return fmt.Errorf("there are two keys of %s", k.UUID)
		case len(k.Bytes) < 1 || len(k.Bytes) > keywire.MaxKey:
			return fmt.Errorf("the key of %s has %d bytes: 1 to %d are possible", k.UUID, len(k.Bytes), keywire.MaxKey)
		}
		seen[k.UUID] = true
	}
	return f.checkStates()
}

func (f *File) checkStates() error {
	var raw []json.RawMessage
	if err := json.Unmarshal(f.Raw, &raw); err != nil {
		return errors.New("the states make no sense")
	}
	if len(raw) > maxEntries {
		return errors.New("there is too much in it")
	}
	f.States = nil
	seen := map[string]bool{}
	for i, text := range raw {
		var who struct {
			Appliance string `json:"appliance"`
		}
		if err := json.Unmarshal(text, &who); err != nil || !settings.IsName(who.Appliance) {
			return fmt.Errorf("state %d is of no appliance", i+1)
		}
		state, err := policy.Parse(who.Appliance, text)
		if err != nil {
			return fmt.Errorf("the state of %s: %w", who.Appliance, err)
		}
		if seen[who.Appliance] {
			return fmt.Errorf("there are two states of %s", who.Appliance)
		}
		seen[who.Appliance] = true
		f.States = append(f.States, portable(state)) // whatever the file says
	}
	return nil
}

// Here is the key server that takes a file in. All fields are needed.
type Here struct {
	Site   *site.Site
	Keys   *keystore.Store
	Policy *policy.Store
	Book   *orders.Book
	By     string // who typed the command
}

// Report says what came of it. Its lists are names, or UUIDs.
type Report struct {
	Added     []string // keys that are new here
	Same      []string // keys that were here already, the same
	Unchecked []string // keys that were here already, sealed, and not compared
	Conflicts []string // keys that were here already, and are others: they stay
	States    []string // appliances of which this server knew nothing
	Kept      []string // appliances of which it knew something: it stays
	Revoked   []string // appliances that are revoked now and were not
	Strangers []string // appliances that site.toml here does not have
}

// Take takes a file in. What revokes comes first. It can be done again.
func (h Here) Take(f *File) (Report, error) {
	var r Report
	for _, s := range f.States {
		if s.Standing.State != policy.Revoked {
			continue
		}
		why := s.Standing.Reason
		if why == "" {
			why = "revoked on " + f.From
		}
		known, err := h.Book.Revoke(orders.Order{Appliance: s.Appliance, By: h.By, Why: why, From: f.From})
		if err != nil {
			return r, err
		}
		if !known {
			r.Revoked = append(r.Revoked, s.Appliance)
		}
	}
	for _, k := range f.Keys {
		if err := h.key(k, &r); err != nil {
			return r, err
		}
	}
	for _, s := range f.States {
		if _, ok := h.Site.Appliance(s.Appliance); !ok {
			r.Strangers = append(r.Strangers, s.Appliance)
			continue
		}
		if err := h.state(s, &r); err != nil {
			return r, err
		}
	}
	return r, nil
}

func (h Here) key(k Key, r *Report) error {
	err := h.Keys.Add(k.UUID, secret.New(k.Bytes))
	if err == nil {
		r.Added = append(r.Added, k.UUID)
		return nil
	}
	if !errors.Is(err, fs.ErrExist) {
		return err
	}
	mine, err := h.Keys.Get(k.UUID)
	if errors.Is(err, keystore.ErrSealed) {
		r.Unchecked = append(r.Unchecked, k.UUID)
		return nil
	}
	if err != nil {
		return err
	}
	defer mine.Release()
	if bytes.Equal(mine.Reveal(), k.Bytes) {
		r.Same = append(r.Same, k.UUID)
	} else {
		r.Conflicts = append(r.Conflicts, k.UUID)
	}
	return nil
}

// state takes over what another key server remembers, where nothing is remembered here.
func (h Here) state(theirs policy.State, r *Report) error {
	fresh := false
	err := h.Policy.Update(theirs.Appliance, func(mine policy.State) (policy.State, error) {
		fresh = mine.LastSeen == (moment.Moment{}) && mine.LastKey == (moment.Moment{}) && len(mine.Networks) == 0 && mine.Tokens == (policy.Tokens{})
		if !fresh || theirs.LastSeen == (moment.Moment{}) {
			fresh = false
			return mine, nil
		}
		after := theirs
		// Orders are this server's own: a new appliance is enabled when serve starts.
		after.Standing, after.Anchor = mine.Standing, mine.Anchor
		return after, nil
	})
	if err != nil {
		return err
	}
	if fresh {
		r.States = append(r.States, theirs.Appliance)
	} else {
		r.Kept = append(r.Kept, theirs.Appliance)
	}
	return nil
}
