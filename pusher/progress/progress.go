// Package progress shows how far several uploads are: on a terminal one line
// that changes, elsewhere a line a minute for each upload under way.
package progress

import (
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"time"
)

const (
	// redraw is how often the terminal's line changes.
	redraw = 500 * time.Millisecond
	// logged is how often an upload is logged.
	logged = time.Minute
	// span is the time over which the rate is an average.
	span = 15 * time.Second
)

// Board shows lanes. The zero value is not useful; see [New].
type Board struct {
	w        io.Writer // the terminal; nil: the log instead
	log      *slog.Logger
	columns  func() int
	now      func() time.Time
	stop     chan struct{}
	finished sync.WaitGroup

	mu    sync.Mutex // guards the fields below, those of all lanes included
	lanes []*Lane
	drawn bool
}

// Lane is one target's progress. Its methods are safe for concurrent use.
type Lane struct {
	board       *Board
	name        string
	what        string // "" while nothing is under way
	total, done int64
	begun       time.Time
	samples     []sample // of the last span
	nextLog     time.Time
}

type sample struct {
	at   time.Time
	done int64
}

// New returns a board for a terminal that is columns() wide, or, where w is nil,
// for a log.
func New(w io.Writer, columns func() int, log *slog.Logger, now func() time.Time) *Board {
	return &Board{w: w, columns: columns, log: log, now: now}
}

// Start begins to show. Stop must be called.
func (b *Board) Start() {
	b.stop = make(chan struct{})
	b.finished.Add(1)
	go func() {
		defer b.finished.Done()
		tick := time.NewTicker(redraw)
		defer tick.Stop()
		for {
			select {
			case <-b.stop:
				return
			case <-tick.C:
				b.show()
			}
		}
	}()
}

// Stop ends showing and clears the terminal's line.
func (b *Board) Stop() {
	close(b.stop)
	b.finished.Wait()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.clear()
}

// Lane adds a lane.
func (b *Board) Lane(name string) *Lane {
	b.mu.Lock()
	defer b.mu.Unlock()
	l := &Lane{board: b, name: name}
	b.lanes = append(b.lanes, l)
	return l
}

// Begin says what is under way now, and how many bytes it has; 0 for unknown.
func (l *Lane) Begin(what string, total int64) {
	l.board.mu.Lock()
	defer l.board.mu.Unlock()
	now := l.board.now()
	l.what, l.total, l.done, l.begun = what, total, 0, now
	l.samples, l.nextLog = []sample{{now, 0}}, now.Add(logged)
}

// Add says that n more bytes are done.
func (l *Lane) Add(n int64) {
	l.board.mu.Lock()
	defer l.board.mu.Unlock()
	l.done += n
}

// End says that nothing is under way.
func (l *Lane) End() {
	l.board.mu.Lock()
	defer l.board.mu.Unlock()
	l.what = ""
}

func (b *Board) show() {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := b.now()
	var parts []string
	for _, l := range b.lanes {
		if l.what == "" {
			continue
		}
		l.sample(now)
		if b.w == nil {
			if !now.Before(l.nextLog) {
				l.nextLog = now.Add(logged)
				b.log.Info("progress", "target", l.name, "what", l.what, "done", Bytes(l.done), "of", Bytes(l.total), "rate", Bytes(l.rate())+"/s", "left", l.left())
			}
			continue
		}
		parts = append(parts, l.String())
	}
	if b.w == nil || len(parts) == 0 {
		return
	}
	line := strings.Join(parts, " | ")
	if n := b.columns() - 1; n > 0 && len(line) > n {
		line = line[:n]
	}
	fmt.Fprintf(b.w, "\r\x1b[K%s", line)
	b.drawn = true
}

// clear wipes the line, for those who write something else.
func (b *Board) clear() {
	if b.drawn {
		fmt.Fprint(b.w, "\r\x1b[K")
		b.drawn = false
	}
}

// Writer returns a writer for whole lines that do not collide with the board's.
func (b *Board) Writer(w io.Writer) io.Writer { return &tidy{b, w} }

type tidy struct {
	b *Board
	w io.Writer
}

func (t *tidy) Write(p []byte) (int, error) {
	t.b.mu.Lock()
	defer t.b.mu.Unlock()
	t.b.clear()
	return t.w.Write(p)
}

// sample notes where the lane is, and forgets what is older than span.
func (l *Lane) sample(now time.Time) {
	l.samples = append(l.samples, sample{now, l.done})
	for len(l.samples) > 2 && now.Sub(l.samples[1].at) >= span {
		l.samples = l.samples[1:]
	}
}

// rate is in bytes per second.
func (l *Lane) rate() int64 {
	first, last := l.samples[0], l.samples[len(l.samples)-1]
	passed := last.at.Sub(first.at).Seconds()
	if passed <= 0 {
		return 0
	}
	return int64(float64(last.done-first.done) / passed)
}

// left is the time that the rest will take, "" for unknown.
func (l *Lane) left() string {
	rate := l.rate()
	if rate <= 0 || l.total <= 0 || l.done >= l.total {
		return ""
	}
	d := time.Duration(float64(l.total-l.done) / float64(rate) * float64(time.Second))
	switch {
	case d < time.Minute:
		return d.Round(time.Second).String()
	case d < 48*time.Hour:
		return strings.TrimSuffix(d.Round(time.Minute).String(), "0s")
	default:
		return fmt.Sprintf("%d days", int(d.Hours()/24))
	}
}

func (l *Lane) String() string {
	s := fmt.Sprintf("%s: %s %s", l.name, l.what, Bytes(l.done))
	if l.total > 0 {
		s += " of " + Bytes(l.total)
	}
	s += ", " + Bytes(l.rate()) + "/s"
	if left := l.left(); left != "" {
		s += ", " + left + " left"
	}
	return s
}

// Bytes writes a size as people read it: 3 digits and a binary unit.
func Bytes(n int64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	v, unit := float64(n), 0
	for v >= 999.5 && unit < 6 {
		v /= 1024
		unit++
	}
	digits := 0
	if v < 9.995 {
		digits = 2
	} else if v < 99.95 {
		digits = 1
	}
	return fmt.Sprintf("%.*f %ciB", digits, v, " KMGTPE"[unit])
}
