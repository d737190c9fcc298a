// Package part is what every part of the appliance shares: how a part is told
// what it is (its brief), where its folders are, and how it shows that it is
// alive.
//
// A part is a re-executed child of the same binary, `farkeep-appliance part
// NAME`, with these open files:
//
//	0  /dev/null
//	1  /dev/null
//	2  its log: one slog JSON object per line
//	3  the brief, a pipe: gob of Header and then of the part's own brief, then EOF
//	4  liveness, a pipe: a byte now and then (see Env.Alive)
//	5  the result, a pipe: one JSON line; only of parts that package spawn starts
//
// The brief is the only way in which secrets reach a part: never by argument,
// environment or file. It holds what the part needs and nothing else, so that
// whoever takes over the receiver does not learn the mail password. SIGTERM
// ends a part in order; after StopTimeout it is killed.
package part

import (
	"bytes"
	"context"
	"encoding/gob"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"regexp"
	"sync"
	"time"
)

// The fixed file descriptors of a part.
const (
	BriefFD  = 3
	AliveFD  = 4
	ResultFD = 5
)

const (
	// MaxBrief bounds what crosses BriefFD, in bytes.
	MaxBrief = 1 << 20
	// MaxResult bounds the line on ResultFD, in bytes.
	MaxResult = 64 << 10
	// AliveInterval is how often a part's main loop must call Env.Alive at the
	// least; the supervisor ends a part that is silent for six times as long.
	AliveInterval = 10 * time.Second
	// StopTimeout is how long a part may take to end after SIGTERM.
	StopTimeout = 30 * time.Second
)

// The parts' names, which are also the names of their folders.
const (
	Network  = "network"
	Disk     = "disk"
	Unlock   = "unlock"
	Consent  = "consent"
	Keeper   = "keeper"
	Receiver = "receiver"
	Deadman  = "deadman"
	Mail     = "mail"
)

// The parts' fixed user (and group) ids. Disk and unlock mount and map, so
// they are root.
const (
	RootUID     = 0
	NetworkUID  = 901
	KeeperUID   = 902
	ReceiverUID = 903
	DeadmanUID  = 904
	MailUID     = 905
)

// Paths says where the folders are. The parts' own folders below them exist
// before a part starts.
type Paths struct {
	Run   string // a tmpfs: status files, sockets
	State string // survives a reboot
	Media string // the disk is mounted below it
}

// FirmwarePaths are the folders where this program is the whole system.
func FirmwarePaths() Paths {
	return Paths{Run: "/run/farkeep", State: "/state", Media: "/media"}
}

// ServicePaths are the folders under another system's systemd.
func ServicePaths() Paths {
	return Paths{Run: "/run/farkeep", State: "/var/lib/farkeep", Media: "/var/lib/farkeep/media"}
}

// RunDir is a part's own folder for status and socket; any part may read it.
func (p Paths) RunDir(part string) string { return filepath.Join(p.Run, part) }

// StateDir is a part's own folder that survives a reboot.
func (p Paths) StateDir(part string) string { return filepath.Join(p.State, part) }

// Status is a part's status file.
func (p Paths) Status(part string) string { return filepath.Join(p.Run, part, "status.json") }

// Socket is where a part answers local calls.
func (p Paths) Socket(part string) string { return filepath.Join(p.Run, part, "sock") }

// Boot is the supervisor's status file.
func (p Paths) Boot() string { return filepath.Join(p.Run, "boot.json") }

// Outbox holds the mails that wait: written by deadman, emptied by mail.
func (p Paths) Outbox() string { return filepath.Join(p.State, Deadman, "outbox") }

// Disk is where the disk is mounted.
func (p Paths) Disk() string { return filepath.Join(p.Media, "disk") }

// Header is what every part is told.
type Header struct {
	Name     string // the part's name
	Host     string // the appliance's name, for mails
	Paths    Paths
	Firmware bool // this program is the whole system
	Debug    bool // log at debug level
	// Ports are the TCP ports that the part's confinement leaves it.
	Ports []uint16
}

var namePattern = regexp.MustCompile(`^[a-z]{1,16}$`)

func (h Header) check() error {
	if !namePattern.MatchString(h.Name) {
		return fmt.Errorf("%q is not the name of a part", h.Name)
	}
	for _, dir := range []string{h.Paths.Run, h.Paths.State, h.Paths.Media} {
		if !filepath.IsAbs(dir) {
			return fmt.Errorf("%q is not an absolute folder", dir)
		}
	}
	return nil
}

// Env is what a part's Run gets.
type Env struct {
	Header
	Log *slog.Logger
	Now func() time.Time

	brief  []byte // gob of the part's own brief
	result io.Writer

	mu        sync.Mutex // guards the fields below
	alive     io.Writer
	lastAlive time.Time
}

// New makes an Env as a part gets it, with its brief passed through gob. It is
// for tests; alive may be nil.
func New(h Header, brief any, log *slog.Logger, alive io.Writer) (*Env, error) {
	var b bytes.Buffer
	if err := Send(&b, h, brief); err != nil {
		return nil, err
	}
	e, err := Receive(&b)
	if err != nil {
		return nil, err
	}
	e.Log, e.alive = log, alive
	return e, nil
}

// envelope is the one gob value on BriefFD.
type envelope struct {
	Header Header
	Brief  []byte
}

// Send writes a brief as Receive reads it. brief is a struct of the part's own
// package; its unexported fields are lost.
func Send(w io.Writer, h Header, brief any) error {
	if err := h.check(); err != nil {
		return fmt.Errorf("brief: %w", err)
	}
	var inner, outer bytes.Buffer
	defer func() { wipe(&inner); wipe(&outer) }()
	if err := gob.NewEncoder(&inner).Encode(brief); err != nil {
		return fmt.Errorf("brief %s: %w", h.Name, err)
	}
	if err := gob.NewEncoder(&outer).Encode(envelope{h, inner.Bytes()}); err != nil {
		return fmt.Errorf("brief %s: %w", h.Name, err)
	}
	if outer.Len() > MaxBrief {
		return fmt.Errorf("brief %s: %d bytes, more than %d", h.Name, outer.Len(), MaxBrief)
	}
	if _, err := w.Write(outer.Bytes()); err != nil {
		return fmt.Errorf("brief %s: %w", h.Name, err)
	}
	return nil
}

// wipe clears the whole buffer, including what it no longer counts as content.
func wipe(b *bytes.Buffer) {
	all := b.Bytes()
	clear(all[:cap(all)])
}

// Receive reads a brief until EOF. The Env has no logger yet.
func Receive(r io.Reader) (*Env, error) {
	data, err := io.ReadAll(io.LimitReader(r, MaxBrief+1))
	if err != nil {
		return nil, fmt.Errorf("read the brief: %w", err)
	}
	if len(data) > MaxBrief {
		return nil, fmt.Errorf("read the brief: more than %d bytes", MaxBrief)
	}
	var in envelope
	if err := gob.NewDecoder(bytes.NewReader(data)).Decode(&in); err != nil {
		return nil, fmt.Errorf("read the brief: %w", err)
	}
	clear(data)
	if err := in.Header.check(); err != nil {
		return nil, fmt.Errorf("read the brief: %w", err)
	}
	return &Env{Header: in.Header, Now: time.Now, Log: slog.New(slog.DiscardHandler), brief: in.Brief}, nil
}

// errTaken is returned by the second Brief of one Env.
var errTaken = errors.New("the brief was already taken")

// Brief returns a part's own brief, once: the encoded form is wiped.
func Brief[T any](e *Env) (T, error) {
	var v T
	if e.brief == nil {
		return v, fmt.Errorf("brief %s: %w", e.Name, errTaken)
	}
	err := gob.NewDecoder(bytes.NewReader(e.brief)).Decode(&v)
	clear(e.brief)
	e.brief = nil
	if err != nil {
		return v, fmt.Errorf("brief %s: %w", e.Name, err)
	}
	return v, nil
}

// Attach builds the Env of this process from its descriptors and logs to w.
// Parts that package spawn starts have no liveness pipe and need none: they are
// short-lived and their parent waits for them with a timeout.
func Attach(name string, w io.Writer) (*Env, error) {
	in := inherited(BriefFD, "brief")
	if in == nil {
		return nil, errors.New("no brief on descriptor 3: parts are started by the supervisor, not by hand")
	}
	defer in.Close()
	e, err := Receive(in)
	if err != nil {
		return nil, err
	}
	if e.Name != name {
		return nil, fmt.Errorf("the brief is for %s, not for %s", e.Name, name)
	}
	// Not assigned directly: a nil *os.File is not a nil io.Writer.
	if f := inherited(AliveFD, "alive"); f != nil {
		e.alive = f
	}
	if f := inherited(ResultFD, "result"); f != nil {
		e.result = f
	}
	level := slog.LevelInfo
	if e.Debug {
		level = slog.LevelDebug
	}
	e.Log = slog.New(slog.NewJSONHandler(w, LogOptions(level))).With("part", name)
	return e, nil
}

// LogOptions is how all parts log: time spans as people write them, not as
// numbers of nanoseconds.
func LogOptions(level slog.Leveler) *slog.HandlerOptions {
	return &slog.HandlerOptions{Level: level, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Value.Kind() == slog.KindDuration {
			a.Value = slog.StringValue(a.Value.Duration().String())
		}
		return a
	}}
}

// Alive tells the supervisor that the part's main loop turns. Call it from that
// loop, never from a goroutine of its own, which would go on when the loop
// hangs. It is cheap: at most one write a second.
func (e *Env) Alive() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.alive == nil {
		return
	}
	now := time.Now() // monotonic, whatever the clock part does to the wall clock
	if !e.lastAlive.IsZero() && now.Sub(e.lastAlive) < time.Second {
		return
	}
	e.lastAlive = now
	if _, err := e.alive.Write([]byte{'.'}); err != nil {
		e.alive = nil
		e.Log.Warn("liveness cannot be reported", "err", err)
	}
}

// Loop calls step at once and then every interval until ctx ends or step fails,
// and reports liveness each time: the main loop of a part that has no events of
// its own. interval is cut to AliveInterval.
func (e *Env) Loop(ctx context.Context, interval time.Duration, step func(context.Context) error) error {
	tick := time.NewTicker(min(interval, AliveInterval))
	defer tick.Stop()
	for {
		if err := step(ctx); err != nil {
			return err
		}
		e.Alive()
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// Result gives v to the process that started this part by package spawn, as one JSON
// line. v must not hold secrets of the redacting types: they arrive redacted.
func (e *Env) Result(v any) error {
	if e.result == nil {
		return fmt.Errorf("part %s: nobody waits for a result", e.Name)
	}
	line, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("part %s: result: %w", e.Name, err)
	}
	if len(line) >= MaxResult {
		return fmt.Errorf("part %s: result: %d bytes, more than %d", e.Name, len(line), MaxResult)
	}
	if _, err := e.result.Write(append(line, '\n')); err != nil {
		return fmt.Errorf("part %s: result: %w", e.Name, err)
	}
	return nil
}
