package peers

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"farkeep/shared/atomicfile"
	"farkeep/shared/settings"

	"golang.org/x/sys/unix"
)

// Pending is an order that another key server has not taken yet.
type Pending struct {
	Peer   string    `json:"peer"`
	Order  Order     `json:"order"`
	Queued time.Time `json:"queued"`
	Tries  int       `json:"tries"`
	Last   time.Time `json:"last"`  // of the last try; zero for none
	Error  string    `json:"error"` // what came of it
}

// queue keeps what is pending in files PEER/APPLIANCE.json. The service and the command line
// both work on it, under a lock.
type queue struct{ dir string }

// maxFile bounds a file of the queue, in bytes.
const maxFile = 16 << 10

// maxError bounds what is kept of an error, in bytes.
const maxError = 500

func (q queue) path(peer, appliance string) string {
	return filepath.Join(q.dir, peer, appliance+".json")
}

// lock keeps other processes, and other goroutines, out.
func (q queue) lock() (unlock func(), err error) {
	if err := os.MkdirAll(q.dir, 0o700); err != nil {
		return nil, fmt.Errorf("queue of revocations: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(q.dir, ".lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock the queue of revocations: %w", err)
	}
	// Every holder is done within milliseconds.
	for err = unix.EINTR; err == unix.EINTR; {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock the queue of revocations: %w", err)
	}
	return func() { f.Close() }, nil
}

// put queues an order for peers, durably. A newer order takes the place of one
// about the same appliance.
func (q queue) put(names []string, o Order, now time.Time) error {
	unlock, err := q.lock()
	if err != nil {
		return err
	}
	defer unlock()
	var failed []error
	for _, peer := range names {
		failed = append(failed, q.write(Pending{Peer: peer, Order: o, Queued: now.UTC().Truncate(time.Second)}))
	}
	if err := errors.Join(failed...); err != nil {
		return err
	}
	return atomicfile.SyncDir(q.dir)
}

func (q queue) write(p Pending) error {
	if !settings.IsName(p.Peer) {
		return fmt.Errorf("%q is not the name of a key server", p.Peer)
	}
	if err := p.Order.check(); err != nil {
		return err
	}
	text, err := json.MarshalIndent(p, "", "  ")
	if err != nil {
		return fmt.Errorf("queue a revocation: %w", err)
	}
	if err := os.MkdirAll(filepath.Join(q.dir, p.Peer), 0o700); err != nil {
		return fmt.Errorf("queue a revocation: %w", err)
	}
	return atomicfile.Write(q.path(p.Peer, p.Order.Appliance), append(text, '\n'), 0o600)
}

// note keeps what came of a try; taken removes the order. An order that was
// replaced meanwhile stays as it is.
func (q queue) note(p Pending, taken bool, err error, now time.Time) error {
	unlock, lockErr := q.lock()
	if lockErr != nil {
		return lockErr
	}
	defer unlock()
	current, readErr := q.read(p.Peer, p.Order.Appliance)
	if errors.Is(readErr, fs.ErrNotExist) || readErr == nil && current.Order.ID != p.Order.ID {
		return nil
	}
	if readErr != nil {
		return readErr
	}
	if taken {
		return q.remove(p.Peer, p.Order.Appliance)
	}
	current.Tries++
	current.Last = now.UTC().Truncate(time.Second)
	current.Error = ""
	if err != nil {
		current.Error = clip(err.Error())
		if len(current.Error) > maxError {
			current.Error = current.Error[:maxError]
		}
	}
	return q.write(current)
}

func (q queue) remove(peer, appliance string) error {
	if err := os.Remove(q.path(peer, appliance)); err != nil {
		return err
	}
	return atomicfile.SyncDir(filepath.Join(q.dir, peer))
}

// withdraw removes the orders about an appliance and returns for whom they were.
func (q queue) withdraw(appliance string) ([]string, error) {
	unlock, err := q.lock()
	if err != nil {
		return nil, err
	}
	defer unlock()
	all, err := q.list()
	if err != nil {
		return nil, err
	}
	var from []string
	for _, p := range all {
		if p.Order.Appliance != appliance {
			continue
		}
		if err := q.remove(p.Peer, appliance); err != nil {
			return from, err
		}
		from = append(from, p.Peer)
	}
	return from, nil
}

// list returns what is pending, oldest first.
func (q queue) list() ([]Pending, error) {
	files, err := filepath.Glob(filepath.Join(q.dir, "*", "*.json"))
	if err != nil {
		return nil, err
	}
	var all []Pending
	for _, path := range files {
		peer, appliance := filepath.Base(filepath.Dir(path)), strings.TrimSuffix(filepath.Base(path), ".json")
		if !settings.IsName(peer) || !settings.IsName(appliance) {
			continue // the temporary file of a write that a power cut left
		}
		p, err := q.read(peer, appliance)
		if errors.Is(err, fs.ErrNotExist) {
			continue // taken meanwhile
		}
		if err != nil {
			return nil, err
		}
		all = append(all, p)
	}
	sort.SliceStable(all, func(i, j int) bool { return all[i].Queued.Before(all[j].Queued) })
	return all, nil
}

func (q queue) read(peer, appliance string) (Pending, error) {
	path := q.path(peer, appliance)
	f, err := os.Open(path)
	if err != nil {
		return Pending{}, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(text) > maxFile {
		err = fmt.Errorf("larger than %d bytes", maxFile)
	}
	var p Pending
	if err == nil {
		err = json.NewDecoder(bytes.NewReader(text)).Decode(&p)
	}
	if err == nil && (p.Peer != peer || p.Order.Appliance != appliance) {
		err = errors.New("it is about something else")
	}
	if err == nil {
		err = p.Order.check()
	}
	if err != nil {
		return Pending{}, fmt.Errorf("read %s: %w", path, err)
	}
	return p, nil
}
