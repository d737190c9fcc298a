// Package outbox is the queue between the part that writes mails and the part
// that delivers them: a folder with one file per mail, complete RFC 5322 text,
// and the list of those that were accepted by the mail server.
//
// The writer puts and prunes, the deliverer lists and reads, and writes the list
// of what was sent in a folder of its own: neither can alter what the other
// wrote. A mail is put under a name that its cause determines, so that putting
// it again after a crash changes nothing. Everything is bounded, and neither
// side believes the other farther than the file names and sizes say.
package outbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"

	"farkeep/shared/atomicfile"
	"farkeep/shared/plainfile"
)

const (
	// MaxMails is how many mails wait at most.
	MaxMails = 256
	// MaxSize bounds one mail, in bytes.
	MaxSize = 64 << 10
	// maxSent bounds the list of sent mails: what is pruned leaves the list, so
	// it never holds many more than wait.
	maxSent     = 2 * MaxMails
	maxSentSize = 64 << 10
	suffix      = ".eml"
)

// ErrFull is returned by Put when MaxMails wait already.
var ErrFull = errors.New("the outbox is full")

// An id orders the mails of one appliance, names their kind and tells apart
// appliances, and state partitions, that count from the beginning again.
var idPattern = regexp.MustCompile(`^[0-9]{8}-[a-z][a-z-]{0,39}-[0-9a-f]{8}$`)

// CheckID reports whether id is one.
func CheckID(id string) error {
	if !idPattern.MatchString(id) {
		return fmt.Errorf("%.60q is not the id of a mail", id)
	}
	return nil
}

// ID makes the id of the mail with this serial number.
func ID(serial uint64, kind string, nonce uint32) string {
	return fmt.Sprintf("%08d-%s-%08x", serial%100000000, kind, nonce)
}

// Put queues a mail durably, readable for the folder's group. One that waits
// already under this id is left as it is.
func Put(dir, id string, text []byte) error {
	if err := CheckID(id); err != nil {
		return err
	}
	if len(text) > MaxSize {
		return fmt.Errorf("queue mail %s: %d bytes, more than %d", id, len(text), MaxSize)
	}
	waiting, err := List(dir)
	if err != nil {
		return err
	}
	if len(waiting) >= MaxMails {
		return fmt.Errorf("queue mail %s: %w", id, ErrFull)
	}
	err = atomicfile.Create(filepath.Join(dir, id+suffix), text, 0o640)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	return err
}

// List returns the ids of the mails that wait, oldest first, MaxMails at most.
// Whatever else lies in the folder is not looked at.
func List(dir string) ([]string, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("outbox: %w", err)
	}
	defer f.Close()
	var ids []string
	for {
		names, err := f.Readdirnames(MaxMails)
		for _, name := range names {
			id := name[:max(0, len(name)-len(suffix))]
			if id+suffix == name && CheckID(id) == nil {
				ids = append(ids, id)
			}
		}
		if errors.Is(err, io.EOF) || len(ids) > 4*MaxMails {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("outbox: %w", err)
		}
	}
	slices.Sort(ids)
	return ids[:min(len(ids), MaxMails)], nil
}

// Read returns the text of a mail.
func Read(dir, id string) ([]byte, error) {
	if err := CheckID(id); err != nil {
		return nil, err
	}
	text, err := plainfile.Read(filepath.Join(dir, id+suffix), MaxSize)
	if err != nil {
		return nil, fmt.Errorf("read mail %s: %w", id, err)
	}
	return text, nil
}

// Prune removes mails that were sent. An id that does not wait is no error.
func Prune(dir string, ids []string) error {
	removed := false
	for _, id := range ids {
		if CheckID(id) != nil {
			continue
		}
		switch err := os.Remove(filepath.Join(dir, id+suffix)); {
		case err == nil:
			removed = true
		case !errors.Is(err, fs.ErrNotExist):
			return fmt.Errorf("prune mail %s: %w", id, err)
		}
	}
	if !removed {
		return nil
	}
	return atomicfile.SyncDir(dir)
}

// ReadSent reads a list of sent mails; there is none before the first.
func ReadSent(path string) ([]string, error) {
	data, err := plainfile.Read(path, maxSentSize)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list of sent mails: %w", err)
	}
	return parseSent(data)
}

func parseSent(data []byte) ([]string, error) {
	var ids []string
	if err := json.Unmarshal(data, &ids); err != nil {
		return nil, fmt.Errorf("list of sent mails: %w", err)
	}
	if len(ids) > maxSent {
		return nil, fmt.Errorf("list of sent mails: %d entries, more than %d", len(ids), maxSent)
	}
	for _, id := range ids {
		if err := CheckID(id); err != nil {
			return nil, fmt.Errorf("list of sent mails: %w", err)
		}
	}
	return ids, nil
}

// WriteSent replaces a list of sent mails durably; of more than it can hold it
// keeps the last.
func WriteSent(path string, ids []string) error {
	if ids == nil {
		ids = []string{}
	}
	data, err := json.Marshal(ids[max(0, len(ids)-maxSent):])
	if err != nil {
		return fmt.Errorf("list of sent mails: %w", err)
	}
	return atomicfile.Write(path, append(data, '\n'), 0o644)
}
