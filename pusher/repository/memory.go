package repository

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"farkeep/shared/atomicfile"
	"farkeep/shared/contentname"
	"farkeep/shared/hint"
	"farkeep/shared/pushwire"
)

// maxMemory bounds a remembered repository's file, in bytes.
const maxMemory = 64 << 10

// Memory remembers repositories from one push to the next, one small file for
// each in a folder of the pusher's state.
type Memory struct{ dir string }

// Remembered is what a repository was like when it was last pushed.
type Remembered struct {
	Repository
	First time.Time `json:"first"` // when it was first pushed
	// Pushed is, for every target by name, the last push that ended well.
	Pushed map[string]Push `json:"pushed,omitempty"`
}

// Push is one push that ended well.
type Push struct {
	At         time.Time `json:"at"`
	Generation string    `json:"generation"`
	Digest     string    `json:"digest"`
	New        bool      `json:"new"` // false: the newest generation was confirmed
}

// NewMemory is the memory in folder dir. Only Pushed needs the folder to be there.
func NewMemory(dir string) *Memory { return &Memory{dir} }

func (m *Memory) file(name string) string { return filepath.Join(m.dir, name+".json") }

// Get returns what is remembered of a repository; ok is false for nothing.
func (m *Memory) Get(name string) (r Remembered, ok bool, err error) {
	if err := pushwire.CheckRepository(name); err != nil {
		return r, false, err
	}
	text, err := readSome(m.file(name), maxMemory)
	if errors.Is(err, fs.ErrNotExist) {
		return r, false, nil
	}
	if err == nil {
		err = json.Unmarshal(text, &r)
	}
	if err == nil && r.Name != name {
		err = fmt.Errorf("it is about %.80q", r.Name)
	}
	if err != nil {
		err = fmt.Errorf("recall repository %s: %s: %w", name, m.file(name), err)
		return r, false, hint.Because(err, `run "farkeep-pusher forget %s" to begin anew with what is there now`, name)
	}
	return r, true, nil
}

// All returns every remembered repository, in the order of their names.
func (m *Memory) All() ([]Remembered, error) {
	entries, err := os.ReadDir(m.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, hint.Because(fmt.Errorf("recall what was pushed: %w", err), "run as the user who pushes, or name another folder: --state DIR")
	}
	var all []Remembered
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok || pushwire.CheckRepository(name) != nil {
			continue
		}
		r, ok, err := m.Get(name)
		if err != nil {
			return nil, err
		}
		if ok {
			all = append(all, r)
		}
	}
	return all, nil
}

// Pushed records a push that ended well, and with it what the repository is.
func (m *Memory) Pushed(r Repository, target string, p Push) error {
	old, ok, err := m.Get(r.Name)
	if err != nil {
		return err
	}
	if !ok {
		old.First = p.At
	}
	old.Repository = r
	if old.Pushed == nil {
		old.Pushed = map[string]Push{}
	}
	old.Pushed[target] = p
	text, err := json.MarshalIndent(old, "", "\t")
	if err != nil {
		return err
	}
	return atomicfile.Write(m.file(r.Name), append(text, '\n'), 0o600)
}

// Forget drops what is remembered of a repository; the error wraps
// fs.ErrNotExist if that is nothing.
func (m *Memory) Forget(name string) error {
	if err := pushwire.CheckRepository(name); err != nil {
		return err
	}
	return os.Remove(m.file(name))
}

// Check compares a repository with what is remembered of it.
func (m *Memory) Check(r Repository) error {
	was, ok, err := m.Get(r.Name)
	if !ok || err != nil {
		return err
	}
	advice := func(err error) error {
		return hint.Because(err, `nothing was pushed. If this is meant to be, run "farkeep-pusher forget %s"`, r.Name)
	}
	switch {
	case r.MountedAt != was.MountedAt:
		err := fmt.Errorf("repository %s was on the file system at %s and is now on the one at %s", r.Name, was.MountedAt, r.MountedAt)
		return hint.Because(err, `is %s mounted? If the move is meant to be, run "farkeep-pusher forget %s"`, was.MountedAt, r.Name)
	case r.Kind != was.Kind && was.Kind == pushwire.KindBorg1:
		return advice(fmt.Errorf("repository %s at %s was a Borg repository and is none any more", r.Name, r.Path))
	case r.Kind != was.Kind:
		return advice(fmt.Errorf("repository %s at %s was a tree of plain files and is a Borg repository now", r.Name, r.Path))
	case was.Layout != contentname.None && r.Layout != was.Layout:
		return advice(fmt.Errorf("repository %s at %s was %s and is %s now", r.Name, r.Path, was.Layout, r.Layout))
	case was.Mark != "" && r.Mark != was.Mark:
		err := fmt.Errorf("repository %s at %s has another id than it had: it is another repository", r.Name, r.Path)
		if r.Layout == contentname.Restic {
			err = fmt.Errorf("repository %s at %s has another config than it had: it is another repository, its config is damaged, or restic migrated it", r.Name, r.Path)
		}
		return advice(err)
	case r.ID != was.ID:
		return advice(fmt.Errorf("repository %s at %s has the id %s, and had %s: it is another repository", r.Name, r.Path, r.ID, was.ID))
	}
	return nil
}

// Missing returns a Problem for every repository that was found in one of the
// folders before and is not there any more, and is not a Problem already.
func (m *Memory) Missing(f Found, folders []string) ([]Problem, error) {
	all, err := m.All()
	if err != nil {
		return nil, err
	}
	var missing []Problem
	for _, was := range all {
		if was.Folder == "" || !slices.Contains(folders, was.Folder) {
			continue
		}
		there := slices.ContainsFunc(f.Repositories, func(r Repository) bool { return r.Name == was.Name }) ||
			slices.ContainsFunc(f.Problems, func(p Problem) bool { return p.Name == was.Name || p.Name == was.Folder })
		if !there {
			err := fmt.Errorf("repository %s is gone from %s", was.Name, was.Path)
			missing = append(missing, Problem{was.Name, hint.Because(err, `is its disk mounted? If it was removed for good, run "farkeep-pusher forget %s"; its generations stay`, was.Name)})
		}
	}
	return missing, nil
}
