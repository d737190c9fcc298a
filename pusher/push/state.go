package push

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"farkeep/shared/hint"
)

// maxNote bounds what is read of the lock file, in bytes.
const maxNote = 256

// State is the pusher's state, held for one process:
//
//	STATE/lock           who pushes
//	STATE/repositories/  what each repository was like (package repository)
//	STATE/cache/         hash caches (package listing)
//	STATE/locks/         borg's locks that are held (package borglock)
//	STATE/work/          manifests of the push under way
//	STATE/base/          what the targets hold (package base)
type State struct{ lock *os.File }

// Open takes the state folder at dir for this process, and makes what is not
// there yet. A second process is told who has it.
func Open(dir string, now time.Time) (*State, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, hint.Because(fmt.Errorf("make the state folder: %w", err), "name one that you may write: --state DIR")
	}
	path := filepath.Join(dir, "lock")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, hint.Because(fmt.Errorf("open the state folder: %w", err), "run the pusher as the user who ran it before, or name another folder: --state DIR")
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		defer f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			note, _ := io.ReadAll(io.LimitReader(f, maxNote))
			who := strings.TrimSpace(string(note))
			if who == "" {
				who = "somebody"
			}
			return nil, hint.Because(fmt.Errorf("another push is under way: %s", who), "wait for it to end")
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	note := fmt.Sprintf("process %d, since %s\n", os.Getpid(), now.Format(time.DateTime))
	err = f.Truncate(0)
	if err == nil {
		_, err = f.WriteAt([]byte(note), 0)
	}
	// What a crash left of a push under way is of no use.
	if err == nil {
		err = os.RemoveAll(filepath.Join(dir, "work"))
	}
	for _, name := range []string{"repositories", "cache", "locks", "work"} {
		if err == nil {
			err = os.MkdirAll(filepath.Join(dir, name), 0o700)
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("prepare the state folder: %w", err)
	}
	return &State{f}, nil
}

// Close lets other processes in.
func (s *State) Close() error { return s.lock.Close() }
