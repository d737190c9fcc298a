// Package supervise keeps the appliance's parts running: it starts each as a
// re-executed child, hands it its brief, relays its log, restarts it with
// back-off when it ends, ends it when it has gone silent, and stops all of them
// in order.
//
//	        start              exit, or silent for Silence
//	idle ──────────▶ running ───────────────────────────────▶ waiting
//	  ▲                 │ ▲                                      │
//	  │  stop           │ └──────────────── back-off over ───────┘
//	  └─────────────────┘
//
// It guarantees that no part's end, whatever its kind, ends another part or the
// supervisor, and that a part that ends at once is not started in a tight loop.
// What the parts may do is not its business: package confine.
package supervise

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"syscall"
	"time"

	"farkeep/appliance/part"

	"github.com/cenkalti/backoff/v5"
	"golang.org/x/sys/unix"
)

// Spec describes one part.
type Spec struct {
	Name string
	// Required parts make the appliance healthy: see Supervisor.Failing.
	Required bool
	// Attr is how the child is made: uid, namespaces, capabilities.
	Attr *syscall.SysProcAttr
	// Brief writes the part's brief. It is called at every start.
	Brief func(io.Writer) error
}

// Timing is the supervisor's pace. The zero value of a field means its default.
type Timing struct {
	FirstDelay time.Duration // before the first restart; default 1 s
	MaxDelay   time.Duration // between restarts; default 1 min
	Stable     time.Duration // a part that ran as long starts again at FirstDelay; default 2 min
	Silence    time.Duration // without a sign of life until a part is ended; default 60 s
	Dump       time.Duration // from SIGQUIT, which makes it print its stacks, to SIGKILL; default 5 s
	Stop       time.Duration // from SIGTERM to SIGKILL; default part.StopTimeout
}

func (t Timing) withDefaults() Timing {
	for _, d := range []struct {
		p *time.Duration
		v time.Duration
	}{
		{&t.FirstDelay, time.Second}, {&t.MaxDelay, time.Minute}, {&t.Stable, 2 * time.Minute},
		{&t.Silence, 6 * part.AliveInterval}, {&t.Dump, 5 * time.Second}, {&t.Stop, part.StopTimeout},
	} {
		if *d.p == 0 {
			*d.p = d.v
		}
	}
	return t
}

// Config is what a Supervisor needs.
type Config struct {
	Reaper *Reaper
	Log    *slog.Logger
	Relay  func(part string, stderr io.Reader) // reads a part's log until EOF
	Timing Timing
	// Exec is the program to start, with the arguments "part" and the name;
	// default /proc/self/exe.
	Exec string
}

// State is what the supervisor knows of one part.
type State struct {
	Name     string
	Required bool
	Pid      int // 0: not running
	Restarts int
	LastEnd  string    // how it ended last
	Since    time.Time // running or down since then
	// DownSince is when the part left its last stable run; zero while it is
	// stable. A part that starts and dies again and again stays down.
	DownSince time.Time
}

// Supervisor runs parts. Make it with New.
type Supervisor struct {
	cfg   Config
	specs []Spec

	mu     sync.Mutex // guards the fields below
	states map[string]*State
	change chan struct{} // closed and replaced at every change
}

// New returns a supervisor for parts. They start together, because each waits
// for what it needs anyway; their order is the order in which they stop,
// backwards.
func New(cfg Config, specs []Spec) *Supervisor {
	cfg.Timing = cfg.Timing.withDefaults()
	if cfg.Exec == "" {
		cfg.Exec = "/proc/self/exe"
	}
	s := &Supervisor{cfg: cfg, specs: specs, states: map[string]*State{}, change: make(chan struct{})}
	for _, spec := range specs {
		s.states[spec.Name] = &State{Name: spec.Name, Required: spec.Required}
	}
	return s
}

// Run starts the parts and keeps them running until ctx ends; then it
// stops them in reverse order, each before the next, and returns.
func (s *Supervisor) Run(ctx context.Context) {
	// Not derived from ctx: each part has its turn.
	type running struct {
		stop context.CancelFunc
		done chan struct{}
	}
	var all []running
	for _, spec := range s.specs {
		partCtx, stop := context.WithCancel(context.WithoutCancel(ctx))
		done := make(chan struct{})
		go func() {
			defer close(done)
			s.keep(partCtx, spec)
		}()
		all = append(all, running{stop, done})
	}
	<-ctx.Done()
	for i := len(all) - 1; i >= 0; i-- {
		all[i].stop()
		<-all[i].done
	}
}

// States returns what is known of every part, in order, and a channel
// that is closed when something changes.
func (s *Supervisor) States() ([]State, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []State
	for _, spec := range s.specs {
		out = append(out, *s.states[spec.Name])
	}
	return out, s.change
}

// Failing returns the first required part that has not had a stable run for
// longer than limit, "" if there is none.
func (s *Supervisor) Failing(limit time.Duration) string {
	states, _ := s.States()
	for _, st := range states {
		if st.Required && !st.DownSince.IsZero() && time.Since(st.DownSince) > limit {
			return st.Name
		}
	}
	return ""
}

func (s *Supervisor) update(name string, f func(*State)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(s.states[name])
	close(s.change)
	s.change = make(chan struct{})
}

// keep runs one part again and again until ctx ends.
func (s *Supervisor) keep(ctx context.Context, spec Spec) {
	log := s.cfg.Log.With("child", spec.Name)
	delay := &backoff.ExponentialBackOff{
		InitialInterval:     s.cfg.Timing.FirstDelay,
		MaxInterval:         s.cfg.Timing.MaxDelay,
		Multiplier:          2,
		RandomizationFactor: 0.3,
	}
	delay.Reset()
	for ctx.Err() == nil {
		started := time.Now()
		how, err := s.once(ctx, spec, log)
		if err != nil {
			how = err.Error()
		}
		if ctx.Err() != nil {
			log.Info("stopped", "how", how, "ran", time.Since(started).Round(time.Millisecond))
			s.update(spec.Name, func(st *State) { st.Pid, st.LastEnd, st.Since = 0, how, time.Now() })
			return
		}
		if time.Since(started) >= s.cfg.Timing.Stable {
			delay.Reset()
		}
		wait := delay.NextBackOff()
		s.update(spec.Name, func(st *State) {
			st.Pid, st.LastEnd, st.Since = 0, how, time.Now()
			st.Restarts++
			if st.DownSince.IsZero() {
				st.DownSince = st.Since
			}
		})
		log.Error("part ended; it will be started again", "how", how, "ran", time.Since(started).Round(time.Millisecond), "again_in", wait.Round(time.Millisecond))
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}

// once runs one part to its end and says how it ended.
func (s *Supervisor) once(ctx context.Context, spec Spec, log *slog.Logger) (string, error) {
	p, pipes, err := s.start(spec)
	if err != nil {
		return "", err
	}
	var helpers sync.WaitGroup
	helpers.Go(func() { s.cfg.Relay(spec.Name, pipes.log); pipes.log.Close() })
	beats := make(chan struct{}, 1)
	helpers.Go(func() { listen(pipes.alive, beats); pipes.alive.Close() })
	briefErr := make(chan error, 1)
	helpers.Go(func() { briefErr <- sendBrief(spec, pipes.brief) })

	log.Info("part started", "pid", p.Pid)
	s.update(spec.Name, func(st *State) { st.Pid, st.Since = p.Pid, time.Now() })
	how := s.watch(ctx, p, spec.Name, beats, log)
	// What the part left behind may hold the pipes open.
	pipes.brief.Close()
	deadline := time.Now().Add(2 * time.Second)
	pipes.log.SetReadDeadline(deadline)
	pipes.alive.SetReadDeadline(deadline)
	helpers.Wait()
	if err := <-briefErr; err != nil {
		return fmt.Sprintf("%s (%v)", how, err), nil
	}
	return how, nil
}

func sendBrief(spec Spec, w *os.File) error {
	err := spec.Brief(w)
	return errors.Join(err, ignoreClosed(w.Close()))
}

func ignoreClosed(err error) error {
	if errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}

// watch waits until the process has ended, and ends it when ctx ends or when it
// is silent for too long.
func (s *Supervisor) watch(ctx context.Context, p *Process, name string, beats <-chan struct{}, log *slog.Logger) string {
	t := s.cfg.Timing
	silence := time.NewTimer(t.Silence)
	defer silence.Stop()
	stable := time.NewTimer(t.Stable)
	defer stable.Stop()
	cancelled := ctx.Done()
	var kill <-chan time.Time
	why := ""
	for {
		select {
		case <-p.Done():
			return How(p.Status()) + why
		case <-beats:
			silence.Reset(t.Silence)
		case <-stable.C:
			s.update(name, func(st *State) { st.DownSince = time.Time{} })
		case <-cancelled:
			cancelled = nil
			silence.Stop() // a part that stops may be busy
			p.Kill(unix.SIGTERM)
			kill = time.After(t.Stop)
		case <-silence.C:
			if cancelled == nil {
				continue
			}
			why = fmt.Sprintf(" after %v without a sign of life", t.Silence)
			log.Error("part is silent; its stacks follow", "silence", t.Silence)
			p.Kill(unix.SIGQUIT)
			kill = time.After(t.Dump)
		case <-kill:
			p.Kill(unix.SIGKILL)
		}
	}
}

// listen turns bytes on the liveness pipe into beats.
func listen(r io.Reader, beats chan<- struct{}) {
	buf := make([]byte, 64)
	for {
		n, err := r.Read(buf)
		if n > 0 {
			select {
			case beats <- struct{}{}:
			default:
			}
		}
		if err != nil {
			return
		}
	}
}

// ends are this side's ends of a part's pipes.
type ends struct{ log, brief, alive *os.File }

func (s *Supervisor) start(spec Spec) (*Process, ends, error) {
	var open []*os.File
	fail := func(err error) (*Process, ends, error) {
		for _, f := range open {
			f.Close()
		}
		return nil, ends{}, fmt.Errorf("start part %s: %w", spec.Name, err)
	}
	pipe := func() (r, w *os.File, err error) {
		r, w, err = os.Pipe()
		if err == nil {
			open = append(open, r, w)
		}
		return r, w, err
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return fail(err)
	}
	open = append(open, null)
	logR, logW, err := pipe()
	if err != nil {
		return fail(err)
	}
	briefR, briefW, err := pipe()
	if err != nil {
		return fail(err)
	}
	aliveR, aliveW, err := pipe()
	if err != nil {
		return fail(err)
	}
	p, err := s.cfg.Reaper.Start(s.cfg.Exec, []string{"farkeep-appliance", "part", spec.Name},
		[]*os.File{null, null, logW, briefR, aliveW}, spec.Attr)
	if err != nil {
		return fail(err)
	}
	for _, f := range []*os.File{null, logW, briefR, aliveW} {
		f.Close()
	}
	return p, ends{log: logR, brief: briefW, alive: aliveR}, nil
}
