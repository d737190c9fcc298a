// Package upgrade carries over what earlier versions of the key server kept of
// each appliance: standing/NAME.json (enabled or revoked) and history/NAME.json
// (keys of the last day, last seen).
//
// A file goes only when what it says is durable in the new state, so a crash at
// any point repeats the work and loses nothing. A file that cannot be read stays
// and is an error: it may be a revocation.
package upgrade

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"farkeep/keyserver/moment"
	"farkeep/keyserver/policy"
	"farkeep/shared/atomicfile"
	"farkeep/shared/hint"
	"farkeep/shared/settings"
)

// maxFile bounds an old file: 1440 grants of 40 bytes and room.
const maxFile = 128 << 10

// standing and history are the old files.
type standing struct {
	Appliance string    `json:"appliance"`
	State     string    `json:"state"`
	Reason    string    `json:"reason"`
	By        string    `json:"by"`
	Since     time.Time `json:"since"`
}

type history struct {
	Appliance string      `json:"appliance"`
	Keys      []time.Time `json:"keys"`
	LastKey   time.Time   `json:"last_key"`
	LastSeen  time.Time   `json:"last_seen"`
}

// Pending reports for which appliances the folder dir holds old files.
func Pending(dir string) ([]string, error) {
	seen := map[string]bool{}
	var names []string
	for _, kind := range []string{"standing", "history"} {
		entries, err := os.ReadDir(filepath.Join(dir, kind))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		for _, e := range entries {
			if name, ok := strings.CutSuffix(e.Name(), ".json"); ok && settings.IsName(name) && !seen[name] {
				seen[name] = true
				names = append(names, name)
			}
		}
	}
	return names, nil
}

// Migrate carries over the files of all appliances in dir. It returns the names
// of those that were, and an error that joins what was wrong with the others.
func Migrate(dir string, store *policy.Store) (done []string, err error) {
	names, err := Pending(dir)
	if err != nil {
		return nil, fmt.Errorf("carry over the state of an earlier version: %w", err)
	}
	var wrong []error
	for _, name := range names {
		if err := migrate(dir, store, name); err != nil {
			wrong = append(wrong, err)
			continue
		}
		done = append(done, name)
	}
	return done, errors.Join(wrong...)
}

// Read is the state of an appliance as it will be after Migrate; nothing is changed.
func Read(dir string, store *policy.Store, name string) (policy.State, error) {
	s, err := store.Read(name)
	if err != nil {
		return s, err
	}
	return merge(dir, name, s)
}

func migrate(dir string, store *policy.Store, name string) error {
	err := store.Update(name, func(s policy.State) (policy.State, error) { return merge(dir, name, s) })
	if err != nil {
		return err
	}
	for _, kind := range []string{"standing", "history"} {
		folder := filepath.Join(dir, kind)
		err := os.Remove(filepath.Join(folder, name+".json"))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			err = atomicfile.SyncDir(folder)
		}
		if err != nil {
			return fmt.Errorf("remove what an earlier version kept of %s: %w", name, err)
		}
		// The folder goes with its last file; until then this fails.
		_ = os.Remove(folder)
	}
	return nil
}

// merge adds the old files to a state. A standing that somebody has given since
// then stays, but for this: a revocation is never undone by an upgrade.
func merge(dir, name string, s policy.State) (policy.State, error) {
	if s.Standing.State == policy.Revoked {
		return s, nil
	}
	var old standing
	found, err := read(dir, "standing", name, &old)
	if err == nil && found && (old.Appliance != name || old.State != policy.Enabled && old.State != policy.Revoked) {
		err = errors.New("it is not the standing of this appliance")
	}
	if err != nil {
		return s, hint.Because(fmt.Errorf("%s: carry over its standing from an earlier version: %w", name, err),
			"was it revoked? then: farkeep-keyserver revoke %s; otherwise remove %s", name, filepath.Join(dir, "standing", name+".json"))
	}
	if found && s.Standing.State == "" {
		s.Standing = policy.Standing{State: old.State, Reason: old.Reason, By: old.By, Since: old.Since}
	}
	var h history
	found, err = read(dir, "history", name, &h)
	if err == nil && found && h.Appliance != name {
		err = errors.New("it is the history of another appliance")
	}
	if err != nil {
		return s, hint.Because(fmt.Errorf("%s: carry over its history from an earlier version: %w", name, err),
			"remove %s: the keys of the last day are then not counted", filepath.Join(dir, "history", name+".json"))
	}
	if found && s.LastSeen.IsZero() && len(s.Keys) == 0 {
		for _, at := range h.Keys {
			s.Keys = append(s.Keys, moment.Moment{Wall: at})
		}
		if !h.LastKey.IsZero() {
			s.LastKey = moment.Moment{Wall: h.LastKey}
		}
		if !h.LastSeen.IsZero() {
			s.LastSeen = moment.Moment{Wall: h.LastSeen}
		}
	}
	return s, nil
}

func read(dir, kind, name string, v any) (found bool, err error) {
	f, err := os.Open(filepath.Join(dir, kind, name+".json"))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return false, err
	}
	if len(text) > maxFile {
		return false, fmt.Errorf("larger than %d bytes", maxFile)
	}
	return true, json.Unmarshal(text, v)
}
