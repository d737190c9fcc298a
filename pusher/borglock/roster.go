package borglock

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"

	"farkeep/shared/atomicfile"
)

const (
	// maxRoster bounds lock.roster, in bytes. One entry takes about 60.
	maxRoster = 1 << 20
	// maxPID is the largest process number Linux hands out (PID_MAX_LIMIT).
	maxPID = 1 << 22
)

// Entry names a process that holds a lock.
type Entry struct {
	Host   string // borg's host id, see [HostID]
	PID    int
	Thread int64 // borg always writes 0
}

func (e Entry) String() string { return fmt.Sprintf("process %d of %s", e.PID, e.Host) }

// fileName is how the entry is called in lock.exclusive.
func (e Entry) fileName() string { return fmt.Sprintf("%s.%d-%x", e.Host, e.PID, e.Thread) }

func parseFileName(name string) (Entry, bool) {
	i := strings.LastIndexByte(name, '-')
	if i < 0 {
		return Entry{}, false
	}
	thread, err := strconv.ParseInt(name[i+1:], 16, 64)
	if err != nil || thread < 0 {
		return Entry{}, false
	}
	host, pid, err := cutPID(name[:i])
	if err != nil {
		return Entry{}, false
	}
	return Entry{host, pid, thread}, true
}

func cutPID(s string) (string, int, error) {
	i := strings.LastIndexByte(s, '.')
	if i <= 0 {
		return "", 0, errors.New("no process number")
	}
	pid, err := strconv.Atoi(s[i+1:])
	if err != nil || pid < 1 || pid > maxPID {
		return "", 0, errors.New("no process number")
	}
	return s[:i], pid, nil
}

// MarshalJSON writes the entry as borg does: [host, pid, thread].
func (e Entry) MarshalJSON() ([]byte, error) { return json.Marshal([]any{e.Host, e.PID, e.Thread}) }

// UnmarshalJSON reads an entry as borg writes it.
func (e *Entry) UnmarshalJSON(b []byte) error {
	var raw []json.RawMessage
	if err := json.Unmarshal(b, &raw); err != nil {
		return err
	}
	if len(raw) != 3 {
		return fmt.Errorf("a holder has 3 fields, not %d", len(raw))
	}
	for i, v := range []any{&e.Host, &e.PID, &e.Thread} {
		if err := json.Unmarshal(raw[i], v); err != nil {
			return err
		}
	}
	if e.Host == "" || e.PID < 1 || e.PID > maxPID || e.Thread < 0 {
		return fmt.Errorf("holder %q, process %d, thread %d is impossible", e.Host, e.PID, e.Thread)
	}
	return nil
}

type roster struct {
	Shared    []Entry `json:"shared"`
	Exclusive []Entry `json:"exclusive"`
}

// parseRoster reads a roster. What is no JSON at all (a crash while borg wrote
// it) counts as empty, as it does for borg; JSON of another shape is an error,
// because it may hold something that we do not understand.
func parseRoster(b []byte) (*roster, error) {
	r := &roster{}
	if len(b) > maxRoster {
		return nil, fmt.Errorf("%s is larger than %d bytes", rosterName, maxRoster)
	}
	if !json.Valid(b) {
		return r, nil
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(r); err != nil {
		return nil, fmt.Errorf("%s has a form that borg 1.x does not write: %w", rosterName, err)
	}
	return r, nil
}

func readRoster(path string) (*roster, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return &roster{}, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxRoster+1))
	if err != nil {
		return nil, err
	}
	return parseRoster(b)
}

// write replaces the roster, or removes it when nobody is in it, as borg does.
// It is not synced: after a power cut all its processes are gone anyway.
func (r *roster) write(o owner) error {
	if len(r.Shared) == 0 && len(r.Exclusive) == 0 {
		if err := o.root.Remove(rosterName); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	if r.Shared == nil {
		r.Shared = []Entry{}
	}
	if r.Exclusive == nil {
		r.Exclusive = []Entry{}
	}
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	// Only the holder of lock.exclusive comes here, so that a leftover of this
	// name is nobody's.
	const made = rosterName + ".farkeep"
	if err := o.root.Remove(made); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := o.create(made, b); err != nil {
		return err
	}
	return o.root.Rename(made, rosterName)
}

func (r *roster) has(e Entry) bool { return slices.Contains(r.Shared, e) }

func (r *roster) add(e Entry) {
	if !r.has(e) {
		r.Shared = append(r.Shared, e)
	}
}

func (r *roster) remove(e Entry) bool {
	n := len(r.Shared)
	r.Shared = slices.DeleteFunc(r.Shared, func(x Entry) bool { return x == e })
	return len(r.Shared) < n
}

func (r *roster) drop(stale func(Entry) bool) {
	r.Shared = slices.DeleteFunc(r.Shared, stale)
	r.Exclusive = slices.DeleteFunc(r.Exclusive, stale)
}

// The journal is a roster in a file of ours, of the lock that is held and of
// those that crashed runs left; there is none while there is nothing to note.

func readJournal(path string) ([]Entry, error) {
	if path == "" {
		return nil, nil
	}
	r, err := readRoster(path)
	if err != nil {
		return nil, fmt.Errorf("read the lock journal %s: %w", path, err)
	}
	return r.Shared, nil
}

func writeJournal(path string, entries []Entry) error {
	if path == "" {
		return nil
	}
	if len(entries) == 0 {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	b, err := json.Marshal(roster{Shared: entries, Exclusive: []Entry{}})
	if err != nil {
		return err
	}
	return atomicfile.Write(path, b, 0o600)
}
