package place

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"time"

	"farkeep/keyserver/moment"
)

// LookWait bounds how long Look waits for the look that comes after a request.
const LookWait = 5 * time.Second

// readerPoll is how often Look looks for it.
const readerPoll = 100 * time.Millisecond

// Reader reads the file for the key server. It is safe for concurrent use.
type Reader struct {
	path string
	now  func() (moment.Moment, error)

	mu   sync.Mutex
	info os.FileInfo // of the file that was read last
	file File
}

// NewReader reads the file at path when it is asked; now is the machine's clock.
func NewReader(path string, now func() (moment.Moment, error)) *Reader {
	return &Reader{path: path, now: now}
}

// Look says where the peer with an address in the VPN is. It waits for a look
// that was taken after it was called: the one before may be of another machine,
// which sent with the same key a moment ago. After LookWait, or when ctx ends,
// it gives up, and nothing is known.
func (r *Reader) Look(ctx context.Context, source string, from netip.Addr) (Sighting, error) {
	asked, err := r.now()
	if err != nil {
		return Sighting{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, LookWait)
	defer cancel()
	tick := time.NewTicker(readerPoll)
	defer tick.Stop()
	for {
		f, err := r.read()
		if err == nil {
			switch {
			case f.Boot != asked.Boot:
				err = fmt.Errorf("read %s: it is of another boot", r.path)
			case f.Taken >= asked.Up:
				return f.Sighting(source, from), nil
			default:
				err = fmt.Errorf("read %s: it is %v old", r.path, (asked.Up - f.Taken).Round(time.Second))
			}
		}
		select {
		case <-ctx.Done():
			return Sighting{}, errors.Join(errors.New("the VPN's endpoints are not known: is farkeep-keyserver endpoints running?"), err)
		case <-tick.C:
		}
	}
}

// Age is how old the newest look is: for the health of the service.
func (r *Reader) Age() (time.Duration, error) {
	now, err := r.now()
	if err != nil {
		return 0, err
	}
	f, err := r.read()
	if err != nil {
		return 0, err
	}
	if f.Boot != now.Boot {
		return 0, fmt.Errorf("read %s: it is of another boot", r.path)
	}
	return max(now.Up-f.Taken, 0), nil
}

// read reads the file, once for each time that it was replaced.
func (r *Reader) read() (File, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	info, err := os.Stat(r.path)
	if err != nil {
		return File{}, err
	}
	if r.info != nil && os.SameFile(r.info, info) && r.info.ModTime().Equal(info.ModTime()) && r.info.Size() == info.Size() {
		return r.file, nil
	}
	f, err := ReadFile(r.path)
	if err != nil {
		return File{}, err
	}
	r.info, r.file = info, f
	return f, nil
}
