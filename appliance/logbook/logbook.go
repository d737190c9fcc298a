// Package logbook takes the log lines of the supervisor and of all parts and
// writes them to where someone may look: the console, the kernel's ring buffer,
// a file of bounded size.
//
// Lines are slog JSON objects; anything else, such as the stack of a panic, is
// wrapped into one. Files get JSON, consoles a short form for people. Nothing
// that reads or writes slowly holds up the caller: every destination has its
// own queue, and what does not fit is dropped and counted. A part that floods
// its log is cut to a rate; the file and its predecessors never outgrow their
// limit.
package logbook

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"time"

	"farkeep/appliance/part"
)

// Limits.
const (
	MaxLine   = 8 << 10 // bytes of one line; more is cut off
	queueSize = 2048    // lines that a slow destination may lag behind
	early     = 512     // lines kept for a destination that is added later

	// A part may log burst lines at once and perSecond in the long run. A burst
	// takes in the stacks of some hundred goroutines.
	burst     = 4000
	perSecond = 50
)

// A record is one line, ready for every kind of destination.
type record struct {
	at    time.Time
	up    time.Duration // since the book was opened: right even when the clock is not
	level slog.Level
	json  []byte
	short string
}

// Book is the log of the whole appliance. Its methods may be called at any time
// from any goroutine.
type Book struct {
	start time.Time

	mu      sync.Mutex // guards the fields below
	sinks   []*sink
	kept    []record // the first lines, for destinations that come later
	budgets map[string]*budget
	closed  bool
}

// New opens a book that has no destination yet.
func New() *Book {
	return &Book{start: time.Now(), budgets: map[string]*budget{}}
}

// Logger returns the supervisor's own logger.
func (b *Book) Logger(level slog.Level) *slog.Logger {
	h := slog.NewJSONHandler(writer{b}, part.LogOptions(level))
	return slog.New(h).With("part", "supervisor")
}

// writer turns the writes of slog's handler, one for each line, into lines.
type writer struct{ b *Book }

func (w writer) Write(p []byte) (int, error) {
	w.b.add("supervisor", bytes.TrimRight(p, "\n"), time.Now())
	return len(p), nil
}

// Relay logs the lines of r, a part's stderr, until EOF.
func (b *Book) Relay(name string, r io.Reader) {
	buf := make([]byte, 0, MaxLine)
	chunk := make([]byte, 4<<10)
	long := false // inside the part of a line that is cut off
	for {
		n, err := r.Read(chunk)
		for _, c := range chunk[:n] {
			switch {
			case c == '\n':
				b.line(name, buf)
				buf, long = buf[:0], false
			case long:
			case len(buf) == MaxLine:
				long = true
			default:
				buf = append(buf, c)
			}
		}
		if err != nil {
			b.line(name, buf)
			return
		}
	}
}

// line logs one line of a part within its budget.
func (b *Book) line(name string, line []byte) {
	if len(bytes.TrimSpace(line)) == 0 {
		return
	}
	now := time.Now()
	b.mu.Lock()
	bu := b.budgets[name]
	if bu == nil {
		bu = &budget{tokens: burst, last: now}
		b.budgets[name] = bu
	}
	ok, lost := bu.take(now)
	b.mu.Unlock()
	if lost > 0 {
		b.add(name, wrap(name, slog.LevelWarn, fmt.Sprintf("%d lines dropped: logging too fast", lost), now), now)
	}
	if ok {
		b.add(name, line, now)
	}
}

// A budget is a token bucket.
type budget struct {
	tokens float64
	last   time.Time
	lost   int
}

// take says whether a line may pass, and how many did not before it.
func (bu *budget) take(now time.Time) (ok bool, lost int) {
	bu.tokens = min(burst, bu.tokens+now.Sub(bu.last).Seconds()*perSecond)
	bu.last = now
	if bu.tokens < 1 {
		bu.lost++
		return false, 0
	}
	bu.tokens--
	lost, bu.lost = bu.lost, 0
	return true, lost
}

func (b *Book) add(name string, line []byte, now time.Time) {
	r := parse(name, line, now)
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return
	}
	r.up = now.Sub(b.start)
	if len(b.kept) < early {
		b.kept = append(b.kept, r)
	}
	for _, s := range b.sinks {
		s.send(r)
	}
}

// parse makes a record of a line that may be anything.
func parse(name string, line []byte, now time.Time) record {
	var fields struct {
		Level slog.Level
		Msg   string
	}
	line = bytes.TrimSpace(line)
	if err := json.Unmarshal(line, &fields); err != nil || fields.Msg == "" || line[0] != '{' {
		// Not from a logger: a panic's stack, a library that prints. Worth seeing.
		return record{at: now, level: slog.LevelWarn, json: wrap(name, slog.LevelWarn, string(line), now), short: name + ": " + printable(string(line))}
	}
	return record{at: now, level: fields.Level, json: bytes.Clone(line), short: short(name, fields.Msg, line)}
}

func wrap(name string, level slog.Level, msg string, now time.Time) []byte {
	var out bytes.Buffer
	h := slog.NewJSONHandler(&out, &slog.HandlerOptions{Level: level})
	r := slog.NewRecord(now, level, msg, 0)
	r.AddAttrs(slog.String("part", name))
	// A handler that writes to memory has no error to give.
	_ = h.Handle(context.Background(), r)
	return bytes.TrimRight(out.Bytes(), "\n")
}

// short writes `part: message key=value ...` with the attributes in the order
// in which they were logged.
func short(name, msg string, line []byte) string {
	var out strings.Builder
	out.WriteString(name + ": " + printable(msg))
	dec := json.NewDecoder(bytes.NewReader(line))
	dec.UseNumber()
	if _, err := dec.Token(); err != nil {
		return out.String()
	}
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			break
		}
		var value json.RawMessage
		if err := dec.Decode(&value); err != nil {
			break
		}
		switch attr := fmt.Sprint(key); attr {
		case slog.TimeKey, slog.LevelKey, slog.MessageKey, "part":
		default:
			var s string
			if json.Unmarshal(value, &s) != nil {
				s = string(value)
			}
			if s == "" || strings.ContainsAny(s, " =\"") {
				s = fmt.Sprintf("%q", s)
			}
			fmt.Fprintf(&out, " %s=%s", printable(attr), printable(s))
		}
	}
	return out.String()
}

// printable keeps what a part logs from steering a terminal or forging lines.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '\t' {
			return ' '
		}
		if r < ' ' || r == 0x7f || (r >= 0x80 && r < 0xa0) {
			return '·'
		}
		return r
	}, s)
}

// Close ends the book after every destination has caught up, or after timeout.
func (b *Book) Close(timeout time.Duration) {
	b.mu.Lock()
	b.closed = true
	sinks := b.sinks
	b.sinks = nil
	b.mu.Unlock()
	limit := time.After(timeout)
	for _, s := range sinks {
		close(s.queue)
	}
	for _, s := range sinks {
		select {
		case <-s.done:
		case <-limit:
			return
		}
	}
}

// A sink is one destination with its queue. send is called under Book.mu.
type sink struct {
	queue chan record
	done  chan struct{}
	lost  int
}

func (s *sink) send(r record) {
	if s.lost > 0 {
		note := record{at: r.at, up: r.up, level: slog.LevelWarn, short: fmt.Sprintf("supervisor: %d lines dropped: this destination is too slow", s.lost)}
		note.json = wrap("supervisor", note.level, fmt.Sprintf("%d lines dropped: the log file is too slow", s.lost), r.at)
		select {
		case s.queue <- note:
			s.lost = 0
		default:
		}
	}
	select {
	case s.queue <- r:
	default:
		s.lost++
	}
}

// attach begins to send lines to write, the early ones first.
func (b *Book) attach(write func(record), end func()) {
	s := &sink{queue: make(chan record, queueSize), done: make(chan struct{})}
	go func() {
		defer close(s.done)
		for r := range s.queue {
			write(r)
		}
		end()
	}()
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, r := range b.kept {
		s.send(r)
	}
	b.sinks = append(b.sinks, s)
}

// ToConsole sends lines of at least level to w in the short form, after the
// seconds since the start. w is one of the machine's terminals.
func (b *Book) ToConsole(w io.Writer, level slog.Level) {
	b.attach(func(r record) {
		if r.level >= level {
			fmt.Fprintf(w, "[%9.3f] %s%s\n", r.up.Seconds(), mark(r.level), r.short)
		}
	}, func() {})
}

// mark makes the lines that matter stand out.
func mark(l slog.Level) string {
	switch {
	case l >= slog.LevelError:
		return "ERROR "
	case l >= slog.LevelWarn:
		return "WARN "
	}
	return ""
}

// ToJournal sends lines to w in the short form with the priority prefixes that
// journald and the kernel's /dev/kmsg understand (sd-daemon(3)). With quiet,
// all are marked as debugging messages: the kernel prints others on the
// console, which gets them from ToConsole already.
func (b *Book) ToJournal(w io.Writer, quiet bool) {
	b.attach(func(r record) {
		priority := 6
		switch {
		case quiet || r.level < slog.LevelInfo:
			priority = 7
		case r.level >= slog.LevelError:
			priority = 3
		case r.level >= slog.LevelWarn:
			priority = 4
		}
		text := r.short
		if len(text) > 900 { // /dev/kmsg takes about 1 KiB and refuses more
			text = strings.ToValidUTF8(text[:900], "")
		}
		// One write for each line: that is what /dev/kmsg wants.
		io.WriteString(w, fmt.Sprintf("<%d>farkeep: %s\n", priority, text))
	}, func() {})
}
