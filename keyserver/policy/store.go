package policy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"farkeep/shared/atomicfile"
	"farkeep/shared/settings"

	"golang.org/x/sys/unix"
)

// Store keeps one state file per appliance in a folder. It is safe for several
// processes: the server and the command line change the same files.
type Store struct{ dir string }

// Open names the folder. What is needed in it is made when something is first written.
func Open(dir string) *Store { return &Store{dir: filepath.Join(dir, "appliances")} }

// lockWait bounds how long Update waits for another process.
const lockWait = 30 * time.Second

// Read returns what is remembered about an appliance; with nothing on file, a
// state that holds its name and no standing.
func (s *Store) Read(name string) (State, error) {
	if !settings.IsName(name) {
		return State{}, fmt.Errorf("%q is not the name of an appliance", name)
	}
	path := s.path(name)
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return State{Version: version, Appliance: name}, nil
	}
	if err != nil {
		return State{}, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxState+1))
	if err != nil {
		return State{}, fmt.Errorf("read %s: %w", path, err)
	}
	state, err := Parse(name, text)
	if err != nil {
		return State{}, fmt.Errorf("read %s: %w", path, err)
	}
	return state, nil
}

// Update changes what is remembered about an appliance. No other process changes
// it meanwhile (flock(2) on a file beside it), and what do returns is durable
// when Update returns nil. An error of do leaves everything as it was and is returned.
func (s *Store) Update(name string, do func(State) (State, error)) error {
	if !settings.IsName(name) {
		return fmt.Errorf("%q is not the name of an appliance", name)
	}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return fmt.Errorf("change the state of %s: %w", name, err)
	}
	unlock, err := s.lock(name)
	if err != nil {
		return err
	}
	defer unlock()
	before, err := s.Read(name)
	if err != nil {
		return err
	}
	after, err := do(before.clone())
	if err != nil {
		return err
	}
	after.Version, after.Appliance = version, name
	if err := after.check(); err != nil {
		return fmt.Errorf("change the state of %s: %w", name, err)
	}
	was, err := json.Marshal(before)
	if err != nil {
		return fmt.Errorf("change the state of %s: %w", name, err)
	}
	text, err := json.Marshal(after)
	if err != nil {
		return fmt.Errorf("change the state of %s: %w", name, err)
	}
	if bytes.Equal(was, text) {
		return nil
	}
	return atomicfile.Write(s.path(name), append(text, '\n'), 0o600)
}

// lock takes the lock of one appliance. Its file is never removed or replaced:
// a lock on a file that somebody else no longer sees would lock nothing.
func (s *Store) lock(name string) (unlock func(), err error) {
	path := filepath.Join(s.dir, name+".lock")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock the state of %s: %w", name, err)
	}
	taken := make(chan error, 1)
	go func() { taken <- flock(int(f.Fd())) }() // the kernel lets waiters in one after the other
	patience := time.NewTimer(lockWait)
	defer patience.Stop()
	select {
	case err = <-taken:
	case <-patience.C:
		go func() { <-taken; f.Close() }()
		return nil, fmt.Errorf("lock %s: another process has held it for %v", path, lockWait)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return func() { f.Close() }, nil
}

func flock(fd int) error {
	for {
		if err := unix.Flock(fd, unix.LOCK_EX); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func (s *Store) path(name string) string { return filepath.Join(s.dir, name+".json") }
