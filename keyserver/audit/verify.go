package audit

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Summary is what Verify found.
type Summary struct {
	Records uint64
	First   uint64 // sequence number of the oldest record; above 1 where old files were removed
	Head    string // hash of the newest line; "" for an empty log
	Torn    int    // lines that a power cut left unfinished and the log owns up to
	Heads   int    // how many of the expected heads are in the chain
	// Noted is whether the head was noted beside the log. Without that a change of
	// the end does not show; a log of an older version has none until its next record.
	Noted bool
}

// Verify checks the whole chain in dir. expect names heads that were noted
// elsewhere: each must be in the chain. An error that wraps ErrDamaged names the
// file and the line.
func Verify(dir string, expect ...string) (Summary, error) {
	unlock, err := lockForReading(dir)
	if err != nil {
		return Summary{}, err
	}
	defer unlock()
	noted, err := readHead(dir)
	if err != nil {
		return Summary{}, err
	}
	var s Summary
	wanted := map[string]bool{}
	for _, h := range expect {
		wanted[h] = true
	}
	since := -1 // records after the noted head
	err = read(dir, func(line []byte, r Record) error {
		if s.Records == 0 {
			s.First = r.Seq
			if r.Prev == noted.head {
				since = 0 // the head that was noted went with an older file
			}
		}
		s.Records++
		if r.Event == eventTorn {
			s.Torn++
		}
		s.Head = hash(line)
		if wanted[s.Head] {
			delete(wanted, s.Head)
			s.Heads++
		}
		switch {
		case s.Head == noted.head:
			since = 0
		case since >= 0:
			since++
		}
		return nil
	})
	s.Noted = noted.head != ""
	switch {
	case err != nil:
	case s.Noted && since < 0:
		err = fmt.Errorf("%w: the head that was noted in %s is not in it: its end was cut off or changed", ErrDamaged, headName)
	case s.Noted && since > max(2, noted.batch+1):
		// What a crash leaves that is not noted yet: one record or a batch that was
		// announced, and one that owns up to a line that was cut off.
		err = fmt.Errorf("%w: %d records come after the head that was noted in %s", ErrDamaged, since, headName)
	case len(wanted) > 0:
		err = fmt.Errorf("%w: %d of the %d heads noted elsewhere are not in it: its end was cut off, or it was written anew", ErrDamaged, len(wanted), len(expect))
	}
	return s, err
}

// Read calls f for every record, oldest first, and checks the chain on the way.
// line is valid during the call. An unfinished line at the very end is passed
// over: the next Append owns up to it.
func Read(dir string, f func(line []byte, r Record) error) error {
	unlock, err := lockForReading(dir)
	if err != nil {
		return err
	}
	defer unlock()
	return read(dir, f)
}

// lockForReading waits for writers. Before the first record there is nothing to lock.
func lockForReading(dir string) (unlock func(), err error) {
	if _, err := os.Stat(filepath.Join(dir, lockName)); err != nil {
		return func() {}, nil
	}
	return lock(dir, unix.LOCK_SH)
}

func read(dir string, f func(line []byte, r Record) error) error {
	names, err := files(dir)
	if err != nil {
		return err
	}
	c := &chain{f: f}
	for _, name := range names {
		if err := c.file(name, filepath.Base(name) == current); err != nil {
			return err
		}
	}
	return nil
}

// chain follows the records through the files.
type chain struct {
	f    func([]byte, Record) error
	seq  uint64 // of the last record; 0 before the first
	prev string // hash of the last record's line
	// bad is a line that does not follow, and doubt says so; the record after
	// it may own up to it. nil for none.
	bad   []byte
	doubt error
}

func (c *chain) file(name string, last bool) error {
	file, err := os.Open(name)
	if err != nil {
		return fmt.Errorf("read the audit log: %w", err)
	}
	defer file.Close()
	in := bufio.NewReaderSize(file, 3*MaxLine)
	for n := 1; ; n++ {
		line, err := in.ReadSlice('\n')
		switch {
		case errors.Is(err, io.EOF):
			if len(line) > 0 && !last {
				return fmt.Errorf("%w: %s:%d is not finished", ErrDamaged, name, n)
			}
			return c.doubt
		case err != nil:
			return fmt.Errorf("%w: %s:%d: %v", ErrDamaged, name, n, err)
		}
		if err := c.line(bytes.TrimSuffix(line, []byte("\n")), name, n); err != nil {
			return err
		}
		// A file is named by its first record, so that lines cut off its beginning
		// do not look like older files that somebody put away.
		if n == 1 && !last && c.bad == nil && filepath.Base(name) != fileName(c.seq) {
			return fmt.Errorf("%w: %s:%d: it begins with record %d", ErrDamaged, name, n, c.seq)
		}
	}
}

func (c *chain) line(line []byte, name string, n int) error {
	r, err := c.next(line)
	if c.bad != nil {
		if err != nil || r.Event != eventTorn || r.Torn != hash(c.bad) {
			return c.doubt
		}
		c.bad, c.doubt = nil, nil
	} else if err != nil {
		c.bad, c.doubt = bytes.Clone(line), fmt.Errorf("%w: %s:%d: %w", ErrDamaged, name, n, err)
		return nil
	}
	c.seq, c.prev = r.Seq, hash(line)
	return c.f(line, r)
}

// next reads the line that should come next in the chain.
func (c *chain) next(line []byte) (Record, error) {
	var r Record
	if err := json.Unmarshal(line, &r); err != nil {
		return r, errors.New("this is no record")
	}
	switch {
	case r.Seq == 0, c.seq != 0 && r.Seq != c.seq+1:
		return r, fmt.Errorf("record %d comes after record %d", r.Seq, c.seq)
	case c.seq == 0 && r.Seq == 1 && r.Prev != origin, c.seq != 0 && r.Prev != c.prev:
		return r, fmt.Errorf("record %d does not follow the one before it: something was changed, removed or put in between", r.Seq)
	}
	return r, nil
}
