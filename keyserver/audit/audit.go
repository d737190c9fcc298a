// Package audit is the key server's memory of what it decided: files of one
// JSON object per line, only ever appended to.
//
// Every line carries the BLAKE2b-256 hash of the line before it, and the hash of
// the newest line, the head, is noted in a file beside, audit.head. So [Verify]
// finds a line that was removed, changed or put in, at the end too. What no log
// of its own can show is that somebody who may write to its folder has written
// the rest of it anew, head and all: for that a head ([Log.Append] returns it,
// the server logs it) has to be noted on another machine and shown to [Verify].
//
// Append returns nil only when line and head are on the disk. The caller must
// then, and only then, do what the line says: no record, no key.
//
// The current file is audit.log. At [MaxFile] bytes it is renamed to
// audit-SEQUENCE.log, by its first record, and the chain goes on in a new one.
// Nothing here deletes a file; a person may remove the oldest ones, and Verify
// then says from which record on the chain is whole. A record is about 400
// bytes, and callers bound how many an attacker can cause.
package audit

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"sync"
	"time"

	"farkeep/shared/atomicfile"
	"farkeep/shared/plainfile"

	"golang.org/x/crypto/blake2b"
	"golang.org/x/sys/unix"
)

const (
	// MaxLine bounds a line, in bytes with its newline.
	MaxLine = 4096
	// MaxFile is the size, in bytes, at which a file is closed and the next begun.
	MaxFile = 8 << 20

	current  = "audit.log"
	headName = "audit.head"
	lockName = "audit.lock"
	// minFree is how much room Check wants, in bytes: some hundred records.
	minFree = 256 << 10
	// eventTorn follows the rest of a line that a power cut left unfinished.
	eventTorn = "torn"
)

// origin is the Prev of the first record ever.
var origin = strings.Repeat("0", 64)

// ErrDamaged is wrapped by errors that mean: somebody or something has altered
// the log.
var ErrDamaged = errors.New("the audit log is damaged")

// Record is one decision. Its texts are this program's words, or bounded and
// quoted when printed; a token is in none of them.
type Record struct {
	Seq       uint64    `json:"seq"`                 // from 1; set by Append
	Time      time.Time `json:"time"`                // UTC
	Event     string    `json:"event"`               // key, lease, checkin, dark, connect, request; an order; add, seal, start, repeated
	Decision  string    `json:"decision"`            // granted, held, refused, later, failed, done
	Reason    string    `json:"reason,omitempty"`    // why
	Appliance string    `json:"appliance,omitempty"` // its name in site.toml
	UUID      string    `json:"uuid,omitempty"`      // the disk
	Remote    string    `json:"remote,omitempty"`    // address and port
	Place     string    `json:"place,omitempty"`     // where the VPN says that it is
	Token     string    `json:"token,omitempty"`     // how the shown token stands: none, accepted, mismatch, ignored
	Claims    string    `json:"claims,omitempty"`    // what the appliance said of itself
	Waiting   string    `json:"waiting,omitempty"`   // id of the waiting request
	Identity  string    `json:"identity,omitempty"`  // fingerprint of the SSH key
	By        string    `json:"by,omitempty"`        // who typed the command
	Count     int       `json:"count,omitempty"`     // repeated: how often more
	Torn      string    `json:"torn,omitempty"`      // torn: hash of the unfinished line
	Prev      string    `json:"prev"`                // hash of the line before; set by Append
}

// Log appends to the audit log of one folder. Several processes may do so at once.
type Log struct {
	// RotateAt is MaxFile; set another size before the first Append.
	RotateAt int64

	dir string
	now func() time.Time

	mu      sync.Mutex
	waiting []*entry // in the order in which they came
	writing bool     // somebody is committing, and looks at waiting when he is done
	commits int      // how often the disk was waited for
}

// entry is a record on its way to the disk.
type entry struct {
	record Record
	head   string
	err    error
	// turn tells whoever waits that the record is done (true), or that he is to
	// commit what is waiting, his own record first (false).
	turn chan bool
}

// Open prepares appending to the log in dir, which must exist.
func Open(dir string, now func() time.Time) (*Log, error) {
	info, err := os.Stat(dir)
	if err != nil {
		return nil, fmt.Errorf("open the audit log: %w", err)
	}
	if !info.IsDir() {
		return nil, fmt.Errorf("open the audit log: %s is not a folder", dir)
	}
	return &Log{RotateAt: MaxFile, dir: dir, now: now}, nil
}

// Append makes r the next record, durably, and returns the new head: the hash
// that the next record will carry. Time is set where it is zero.
//
// Records that come while others are being written wait and are then made durable
// together: after a power cut hundreds of appliances ask at once, and a slow
// disk syncs thirty times a second.
func (l *Log) Append(r Record) (head string, err error) {
	e := &entry{record: r, turn: make(chan bool, 1)}
	l.mu.Lock()
	l.waiting = append(l.waiting, e)
	if l.writing {
		l.mu.Unlock()
		if done := <-e.turn; done {
			return e.head, e.err
		}
		l.mu.Lock()
	}
	l.writing = true
	l.commits++
	batch := l.waiting[:min(len(l.waiting), maxBatch)]
	l.waiting = l.waiting[len(batch):]
	l.mu.Unlock()
	l.commit(batch) // e is the first of it
	for _, other := range batch[1:] {
		other.turn <- true
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.writing = len(l.waiting) > 0; l.writing {
		l.waiting[0].turn <- false
	}
	return e.head, e.err
}

// maxBatch bounds how many records are written at once, and with that how many
// a crash can leave that are on the disk and not noted beside the log.
const maxBatch = 32

// commit writes records and makes them durable, all or none of them.
func (l *Log) commit(batch []*entry) {
	fail := func(err error) {
		for _, e := range batch {
			e.head, e.err = "", err
		}
	}
	unlock, err := lock(l.dir, unix.LOCK_EX)
	if err != nil {
		fail(err)
		return
	}
	defer unlock()
	f, size, err := l.openCurrent()
	if err != nil {
		fail(err)
		return
	}
	defer f.Close()
	lines, last, noted, err := l.settle(f, size)
	if err != nil {
		fail(err)
		return
	}
	begun := len(lines)
	for _, e := range batch {
		line, bare, err := l.next(e.record, last)
		if err != nil {
			e.err = err // this one alone
			continue
		}
		lines, last, e.head = append(lines, line...), bare, hash(bare)
	}
	if len(lines) == begun {
		return
	}
	if len(batch) > 1 && noted != "" {
		if err := l.writeHead(noted, len(batch)); err != nil {
			fail(err)
			return
		}
	}
	if err := write(f, lines, size); err != nil {
		fail(fmt.Errorf("append to the audit log: %w", err))
		return
	}
	if err := l.writeHead(hash(last), 0); err != nil {
		fail(err) // nothing may be granted; the next Append sets it right first
		return
	}
	if size+int64(len(lines)) >= l.RotateAt {
		// The records are durable; that the file stays too large for a while is no failure of it.
		_ = l.rotate()
	}
}

// settle looks at the end of the log: last is its last record's line, nil for
// none, lines are what has to be written before the next one, and noted is the
// head beside the log, "" where the log is empty.
func (l *Log) settle(f *os.File, size int64) (lines, last []byte, noted string, err error) {
	t, err := tail(f, size)
	if err != nil {
		return nil, nil, "", err
	}
	if t.last == nil {
		before, err := l.endOfPredecessor()
		if err != nil {
			return nil, nil, "", err
		}
		t.before, t.last = before.before, before.last
	}
	if err := l.matchHead(t); err != nil {
		return nil, nil, "", err
	}
	if t.last != nil {
		noted = hash(t.last)
	}
	switch {
	case len(t.torn) == 0:
		return nil, t.last, noted, nil
	case follows(t.torn, t.last): // only its newline is missing
		return []byte("\n"), t.torn, noted, nil
	}
	torn := Record{Event: eventTorn, Decision: "done", Reason: fmt.Sprintf("a line of %d bytes was cut off, by a power cut or a full disk", len(t.torn)), Torn: hash(t.torn)}
	line, last, err := l.next(torn, t.last)
	if err != nil {
		return nil, nil, "", err
	}
	return append([]byte("\n"), line...), last, noted, nil // the newline ends the unfinished line
}

// Newest is the number of the newest record, 0 for none.
func (l *Log) Newest() (uint64, error) {
	unlock, err := lockForReading(l.dir)
	if err != nil {
		return 0, err
	}
	defer unlock()
	t, err := l.end()
	if err != nil || t.last == nil {
		return 0, err
	}
	var r Record
	if err := json.Unmarshal(t.last, &r); err != nil || r.Seq == 0 {
		return 0, fmt.Errorf("%w: its last line is not a record", ErrDamaged)
	}
	return r.Seq, nil
}

// tailOf is how the file at path ends.
func tailOf(path string) (ending, error) {
	f, err := os.Open(path)
	if err != nil {
		return ending{}, fmt.Errorf("read the audit log: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return ending{}, fmt.Errorf("read the audit log: %w", err)
	}
	return tail(f, info.Size())
}

// end is how the log ends.
func (l *Log) end() (ending, error) {
	t, err := tailOf(filepath.Join(l.dir, current))
	if errors.Is(err, fs.ErrNotExist) || err == nil && t.last == nil {
		return l.endOfPredecessor()
	}
	return t, err
}

// Check reports what would keep the next record from being written, as far as
// that shows beforehand: a damaged end, rights, a disk without room.
func (l *Log) Check() error {
	unlock, err := lock(l.dir, unix.LOCK_EX)
	if err != nil {
		return err
	}
	defer unlock()
	t, err := l.end()
	if err != nil {
		return err
	}
	if err := l.matchHead(t); err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(l.dir, current), os.O_WRONLY|os.O_APPEND, 0)
	switch {
	case err == nil:
		f.Close()
	case !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("append to the audit log: %w", err)
	}
	var disk unix.Statfs_t
	if err := unix.Statfs(l.dir, &disk); err != nil {
		return fmt.Errorf("look at the audit log's disk: %w", err)
	}
	if free := disk.Bavail * uint64(disk.Bsize); free < minFree {
		return fmt.Errorf("the audit log's disk has %d bytes left: without a record there is no key", free)
	}
	return nil
}

// follows reports whether line is the record after last.
func follows(line, last []byte) bool {
	c := chain{}
	if last != nil {
		var before Record
		if json.Unmarshal(last, &before) != nil {
			return false
		}
		c.seq, c.prev = before.Seq, hash(last)
	}
	r, err := c.next(line)
	return err == nil && r.Seq == c.seq+1
}

// next completes r as the record after last and returns its line, with and
// without the newline.
func (l *Log) next(r Record, last []byte) (line, bare []byte, err error) {
	r.Seq, r.Prev = 1, origin
	if last != nil {
		var before Record
		if err := json.Unmarshal(last, &before); err != nil || before.Seq == 0 {
			return nil, nil, fmt.Errorf("%w: its last line is not a record", ErrDamaged)
		}
		r.Seq, r.Prev = before.Seq+1, hash(last)
	}
	if r.Time.IsZero() {
		r.Time = l.now()
	}
	r.Time = r.Time.UTC().Truncate(time.Millisecond)
	for _, s := range []*string{&r.Reason, &r.Remote, &r.Place, &r.Token, &r.Claims, &r.Waiting, &r.By, &r.Appliance, &r.UUID, &r.Identity} {
		*s = clip(*s, 300)
	}
	bare, err = json.Marshal(r)
	if err != nil {
		return nil, nil, fmt.Errorf("write an audit record: %w", err)
	}
	if len(bare)+1 > MaxLine {
		return nil, nil, fmt.Errorf("write an audit record: %d bytes are more than %d", len(bare)+1, MaxLine)
	}
	return append(bytes.Clone(bare), '\n'), bare, nil
}

func clip(s string, n int) string {
	if len(s) > n {
		s = strings.ToValidUTF8(s[:n], "")
	}
	return s
}

// write appends lines to f, which is size bytes long, all or nothing.
func write(f *os.File, lines []byte, size int64) error {
	if _, err := f.Write(lines); err != nil {
		// A full disk may have taken part of it.
		return errors.Join(err, f.Truncate(size))
	}
	if err := f.Sync(); err != nil {
		return errors.Join(err, f.Truncate(size))
	}
	return nil
}

func (l *Log) openCurrent() (*os.File, int64, error) {
	path := filepath.Join(l.dir, current)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_APPEND, 0)
	if errors.Is(err, fs.ErrNotExist) {
		if f, err = os.OpenFile(path, os.O_RDWR|os.O_APPEND|os.O_CREATE|os.O_EXCL, 0o600); err == nil {
			err = atomicfile.SyncDir(l.dir)
		}
	}
	if err != nil {
		return nil, 0, fmt.Errorf("open the audit log: %w", err)
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, 0, fmt.Errorf("open the audit log: %w", err)
	}
	return f, info.Size(), nil
}

// ending is how a file ends: the line before the last complete one and that one,
// nil for none, and what follows.
type ending struct{ before, last, torn []byte }

func tail(f *os.File, size int64) (ending, error) {
	n := min(size, 4*MaxLine)
	b := make([]byte, n)
	if _, err := f.ReadAt(b, size-n); err != nil && !errors.Is(err, io.EOF) {
		return ending{}, fmt.Errorf("read the audit log: %w", err)
	}
	end := bytes.LastIndexByte(b, '\n')
	t := ending{torn: b[end+1:]}
	if end < 0 {
		if size > n {
			return ending{}, fmt.Errorf("%w: it ends in a line of more than %d bytes", ErrDamaged, n)
		}
		return t, nil
	}
	b = b[:end]
	start := bytes.LastIndexByte(b, '\n') + 1
	t.last = b[start:]
	if start > 0 {
		b = b[:start-1]
		t.before = b[bytes.LastIndexByte(b, '\n')+1:]
	}
	return t, nil
}

// endOfPredecessor is how the newest file that is full ends; empty where there
// is none.
func (l *Log) endOfPredecessor() (ending, error) {
	names, err := files(l.dir)
	if err != nil {
		return ending{}, err
	}
	for i := len(names) - 1; i >= 0; i-- {
		if filepath.Base(names[i]) == current {
			continue
		}
		t, err := tailOf(names[i])
		if err == nil && (t.last == nil || len(t.torn) > 0) {
			err = fmt.Errorf("%w: %s does not end in a record", ErrDamaged, names[i])
		}
		return t, err
	}
	return ending{}, nil
}

// rotate gives the current file its final name. The next Append begins a new one.
func (l *Log) rotate() error {
	path := filepath.Join(l.dir, current)
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	line, err := bufio.NewReaderSize(f, MaxLine).ReadSlice('\n')
	if err != nil {
		return err
	}
	var first Record
	if err := json.Unmarshal(line, &first); err != nil {
		return err
	}
	if err := os.Rename(path, filepath.Join(l.dir, fileName(first.Seq))); err != nil {
		return err
	}
	return atomicfile.SyncDir(l.dir)
}

func fileName(first uint64) string { return fmt.Sprintf("audit-%012d.log", first) }

// files are the log's files, oldest first.
func files(dir string) ([]string, error) {
	old, err := filepath.Glob(filepath.Join(dir, "audit-*.log"))
	if err != nil {
		return nil, err
	}
	sort.Strings(old)
	if _, err := os.Stat(filepath.Join(dir, current)); err == nil {
		old = append(old, filepath.Join(dir, current))
	}
	return old, nil
}

// matchHead checks that the log ends where it ended last. A crash, or a head that
// could not be written, leaves one record more, or two where the first owns up to
// an unfinished line; then the head is brought up to date before anything else is
// appended.
func (l *Log) matchHead(t ending) error {
	noted, err := readHead(l.dir)
	if err != nil || noted.head == "" {
		return err // none was written yet
	}
	if t.last == nil {
		return fmt.Errorf("%w: it is empty and was not", ErrDamaged)
	}
	is := hash(t.last)
	if noted.head == is {
		return nil
	}
	var last, before Record
	if json.Unmarshal(t.last, &last) == nil && last.Prev == noted.head ||
		json.Unmarshal(t.before, &before) == nil && before.Event == eventTorn && before.Prev == noted.head && last.Prev == hash(t.before) ||
		l.reaches(noted) {
		return l.writeHead(is, 0)
	}
	return fmt.Errorf("%w: its end is not the one that was noted in %s", ErrDamaged, headName)
}

// reaches reports whether a chain leads from the log's end back to the head
// noted, over no more records than were announced, and one that owns up to a line
// that was cut off.
func (l *Log) reaches(noted note) bool {
	if noted.batch == 0 {
		return false
	}
	f, err := os.Open(filepath.Join(l.dir, current))
	if err != nil {
		return false
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return false
	}
	n := min(info.Size(), int64(noted.batch+3)*MaxLine)
	text := make([]byte, n)
	if _, err := f.ReadAt(text, info.Size()-n); err != nil {
		return false
	}
	lines := bytes.Split(text, []byte("\n"))
	lines = lines[:len(lines)-1] // without what is unfinished
	at := map[string]int{}
	for i, line := range lines {
		at[hash(line)] = i
	}
	for i, ok, steps := len(lines)-1, len(lines) > 0, 0; ok && steps <= noted.batch; steps++ {
		var r Record
		if json.Unmarshal(lines[i], &r) != nil {
			return false
		}
		if r.Prev == noted.head {
			return true
		}
		before := i
		i, ok = at[r.Prev]
		ok = ok && i < before
	}
	return false
}

// A note is what lies beside the log: its head, and how many records are about
// to be written at once after it; 0 but for a crash in the middle of that.
type note struct {
	head  string
	batch int
}

// readHead reads the note that lies beside the log; its head is "" where there is
// none.
func readHead(dir string) (note, error) {
	data, err := plainfile.Read(filepath.Join(dir, headName), MaxLine)
	if errors.Is(err, fs.ErrNotExist) {
		return note{}, nil
	}
	if err != nil {
		return note{}, fmt.Errorf("read the audit log's head: %w", err)
	}
	var n note
	var count string
	n.head, count, _ = strings.Cut(strings.TrimSuffix(string(data), "\n"), "\n+")
	raw, err := hex.DecodeString(n.head)
	if err == nil && count != "" {
		n.batch, err = strconv.Atoi(count)
	}
	if err != nil || len(raw) != blake2b.Size256 || n.batch < 0 || n.batch > maxBatch {
		return note{}, fmt.Errorf("%w: %s holds no head", ErrDamaged, headName)
	}
	return n, nil
}

// writeHead notes the head durably, and how many records are about to follow at
// once: 0 for one, which needs no announcement. It writes in place: 70 bytes lie in
// one sector, which a disk writes whole or not at all, and a full disk has them already.
func (l *Log) writeHead(head string, batch int) error {
	text := head + "\n"
	if batch > 0 {
		text += fmt.Sprintf("+%d\n", batch)
	}
	path := filepath.Join(l.dir, headName)
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		err = atomicfile.Create(path, []byte(text), 0o600)
		if err == nil {
			return nil
		}
	}
	if err == nil {
		_, err = f.WriteAt([]byte(text), 0)
		err = errors.Join(err, f.Truncate(int64(len(text))), f.Sync(), f.Close())
	}
	if err != nil {
		return fmt.Errorf("note the audit log's head: %w", err)
	}
	return nil
}

func lock(dir string, how int) (unlock func(), err error) {
	flags := os.O_RDWR | os.O_CREATE
	if how == unix.LOCK_SH {
		flags = os.O_RDONLY // a reader may have no right to write
	}
	f, err := os.OpenFile(filepath.Join(dir, lockName), flags, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock the audit log: %w", err)
	}
	// Every holder is done within milliseconds, so this waits without a bound of its own.
	for err = unix.EINTR; err == unix.EINTR; {
		err = unix.Flock(int(f.Fd()), how)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock the audit log: %w", err)
	}
	return func() { f.Close() }, nil
}

func hash(line []byte) string {
	sum := blake2b.Sum256(line)
	return hex.EncodeToString(sum[:])
}
