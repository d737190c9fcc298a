// Package scrub reads everything on the disk, slowly and for ever, and compares
// it with the hashes that were taken at the source: rot is found while home
// still has the bytes, and not on the day of a restore.
//
// A round reads every inode once, however many generations link it: generations
// are read oldest first, and a name that is the same inode in the generation
// before is passed over. A round begins every [Config.Every] and is paced to end
// at three quarters of that, by what is left to read and by the share of the time
// in which the disk could be read lately: a disk that is open for an hour a night
// is read faster than one that never sleeps, and none faster than it must be.
//
// What it promises: it goes on where it stopped, after a dark night, a crash or a
// power cut, and loses a minute of work at most, in the middle of a long file
// too; it reads nothing while [Config.Busy] says that somebody needs the disk;
// memory is bounded, whatever lies on the disk; what it read does not stay in the
// page cache; generations may come and go meanwhile. Every wrong hash, every
// missing name and everything that the disk cannot read is recorded with
// [generations.Store.NoteRot]; a disk that vanished is an error and no rot.
//
// It leaves to its caller when the disk is open, and who is told.
package scrub

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"runtime"
	"slices"
	"strconv"
	"time"

	"farkeep/shared/generations"

	"golang.org/x/sys/unix"
)

// Config says what to scrub.
type Config struct {
	Store *generations.Store
	// Every is the time in which everything is read once; a round that lasts
	// longer is overdue. 0: nothing is ever read.
	Every time.Duration
	// Busy says why the disk is not for the scrub at the moment; "" when it is.
	Busy func() string
	// Report is called when something changed, from the goroutine of Run, and by
	// nobody else. It may be nil.
	Report func(Progress)
	Now    func() time.Time
	// Sleep waits; nil means a timer. Tests let the time pass with it.
	Sleep func(context.Context, time.Duration) error
	// Reader is what a file is read through; nil means the file itself. It is the
	// edge at which tests put a disk that fails.
	Reader func(*os.File) io.Reader
	Log    *slog.Logger // nil discards
}

// Progress is how far the reading has come.
type Progress struct {
	Started  time.Time // the round that runs, or the last one; zero: none yet
	LastFull time.Time // when the last whole round ended; zero: never
	Running  bool
	Done     float64 // of the round, 0 to 1
	Bytes    int64   // read in the round
	Paused   string  // "" or why it does not read at the moment
	Overdue  bool    // the round has taken longer than Every already
}

const (
	recordName = "scrub"
	// checkpointEvery bounds the work that a crash costs.
	checkpointEvery = 30 * time.Second
	// seek is what opening a file costs, in bytes that could have been read.
	seek = 64 << 10
	// A batch is what is read in the order of the disk before the place is noted.
	batchFiles = 256
	batchBytes = 16 << 20
	chunk      = 256 << 10
	// dropEvery is how much of a file may lie in the page cache.
	dropEvery = 8 << 20
	// minRate is the slowest pace, in bytes per second: below it the hours of a
	// disk that is on anyway would go to waste.
	minRate = 1 << 20
	// pausePoll is how often a pause asks whether it is over.
	pausePoll = time.Second
	// maxSleep bounds a wait, so that a pace that was set long ago is set anew.
	maxSleep = 5 * time.Second
	maxKept  = 1000 // findings between two notes
)

// record is .farkeep/scrub.toml.
type record struct {
	Format     int       `toml:"format"` // 1
	Started    time.Time `toml:"started"`
	LastFull   time.Time `toml:"last_full"`
	Running    bool      `toml:"running"`
	Repository string    `toml:"repository"` // what is being read
	Generation string    `toml:"generation"`
	Path       string    `toml:"path"`  // the last one that was read, as strconv.Quote writes it; "" for none
	Bytes      int64     `toml:"bytes"` // read in this round
	Spent      int64     `toml:"spent"` // bytes and seeks, as the pace counts them
	// The share of the time in which the disk could be read.
	Worked   time.Duration `toml:"worked"` // in this round
	Share    float64       `toml:"share"`  // in the round before
	Findings int64         `toml:"findings"`
	Long     long          `toml:"long"`
	// Corrected is the correction of the file system that this round knows of.
	Corrected string `toml:"corrected"`
}

// long is a file in whose middle the reading stopped.
type long struct {
	Path   string `toml:"path"` // quoted; "" for none
	Inode  uint64 `toml:"inode"`
	Offset int64  `toml:"offset"`
	Hash   string `toml:"hash"` // the state of BLAKE2b, hex
}

func (r *record) path() string {
	path, err := strconv.Unquote(cmp.Or(r.Path, `""`))
	if err != nil {
		return "" // the generation is read from its beginning
	}
	return path
}

// Scrub is one run over the time that a disk is open.
type Scrub struct {
	cfg   Config
	r     record
	buf   []byte
	found []generations.Rot // not noted yet
	total int64             // estimate of what a round costs

	noted    time.Time // of the last checkpoint
	worked   time.Time // up to here Worked counts
	due      time.Time // when the pace lets the next byte be read
	rate     float64   // bytes per second; 0: as fast as it goes
	paced    time.Time // when rate was set
	paused   string
	lastGood place // a file that could be read, to ask whether the disk is there
	seen     []uint64
	said     time.Time
}

type place struct{ repository, generation, path string }

// ErrVanished: nothing can be read any more, so nothing can be said about files.
var ErrVanished = errors.New("the disk does not answer any more")

// Run scrubs until ctx ends or the disk fails, with the lowest priority. It
// returns ctx's error, or what is wrong with the disk.
func Run(ctx context.Context, cfg Config) error {
	if cfg.Every <= 0 {
		<-ctx.Done()
		return ctx.Err()
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Sleep == nil {
		cfg.Sleep = sleep
	}
	if cfg.Busy == nil {
		cfg.Busy = func() string { return "" }
	}
	if cfg.Reader == nil {
		cfg.Reader = func(f *os.File) io.Reader { return f }
	}
	done := make(chan error, 1)
	go func() {
		// Priorities belong to a thread. It is never unlocked: it ends with the
		// goroutine, and so does its priority.
		runtime.LockOSThread()
		lowerPriority(cfg.Log)
		s := &Scrub{cfg: cfg, buf: make([]byte, chunk), seen: make([]uint64, 1<<18)}
		done <- s.run(ctx)
	}()
	return <-done
}

// ioprio_set(2): the class "idle" is served when nobody else wants the disk.
const (
	ioprioWhoProcess = 1
	ioprioClassIdle  = 3 << 13
)

func lowerPriority(log *slog.Logger) {
	// A who of 0 is the calling thread, on Linux (setpriority(2), "C library/kernel
	// differences").
	if err := unix.Setpriority(unix.PRIO_PROCESS, 0, 19); err != nil {
		log.Warn("the scrub runs with the priority of everything else", "err", err)
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOPRIO_SET, ioprioWhoProcess, 0, ioprioClassIdle); errno != 0 {
		log.Warn("the scrub reads with the priority of everything else", "err", errno)
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

func (s *Scrub) run(ctx context.Context) error {
	err := s.cfg.Store.ReadRecord(recordName, &s.r)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		// Where it stopped is lost, and no more: a round begins anew.
		s.cfg.Log.Warn("where the scrub stopped cannot be read: it begins anew", "err", err)
		s.r = record{}
	}
	s.r.Format = 1
	s.begin()
	s.noted, s.worked = s.cfg.Now(), s.cfg.Now()
	for {
		if err := s.wait(ctx); err != nil {
			return err
		}
		err := s.round(ctx)
		if err == nil {
			err = s.finish(ctx)
		}
		if err != nil {
			// Where it stopped: a minute less to read again tomorrow. When the disk
			// is gone this fails too, and says nothing new.
			if noteErr := s.checkpoint(); ctx.Err() != nil && noteErr != nil {
				s.cfg.Log.Warn("where the scrub stopped is not noted", "err", noteErr)
			}
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return fmt.Errorf("scrub: %w", err)
		}
	}
}

// wait waits for the next round to be due, and begins it.
func (s *Scrub) wait(ctx context.Context) error {
	for !s.r.Running {
		now := s.cfg.Now()
		left := s.r.Started.Add(s.cfg.Every).Sub(now)
		// A clock that went back must not put the next round off for longer.
		if s.r.Started.IsZero() || left <= 0 || left > s.cfg.Every {
			share := s.r.Share
			if s.r.Worked > 0 {
				share = s.share(s.r.LastFull)
			}
			s.r = record{Format: 1, Started: now.UTC(), LastFull: s.r.LastFull, Running: true, Share: share, Corrected: s.r.Corrected}
			s.worked = now
			s.cfg.Log.Info("everything on the disk is read once more", "within", s.cfg.Every)
			return s.checkpoint()
		}
		s.report(true)
		if err := s.cfg.Sleep(ctx, min(left, 10*time.Minute)); err != nil {
			return err
		}
	}
	return ctx.Err()
}

func (s *Scrub) finish(ctx context.Context) error {
	if err := s.note(); err != nil {
		return err
	}
	if err := s.cfg.Store.SettleRot(s.r.Started); err != nil {
		return err
	}
	// What was found in earlier rounds may have another copy by now, or read well.
	rotten, err := s.cfg.Store.RottenRepositories(ctx)
	if err != nil {
		return err
	}
	for _, repository := range rotten {
		if err := s.heal(ctx, repository); err != nil {
			return err
		}
	}
	s.r.Share = s.share(s.cfg.Now())
	s.r.Running, s.r.LastFull = false, s.cfg.Now().UTC()
	s.r.Repository, s.r.Generation, s.r.Path, s.r.Long = "", "", "", long{}
	s.cfg.Log.Info("everything on the disk was read", "bytes", s.r.Bytes, "since", s.r.Started, "findings", s.r.Findings)
	return s.checkpoint()
}

// share is the part of the time until now in which the disk could be read, with
// the round before, or an hour a day, as the first guess.
func (s *Scrub) share(now time.Time) float64 {
	const day = 24 * time.Hour
	guess := cmp.Or(s.r.Share, 1.0/24)
	wall := max(now.Sub(s.r.Started), 0)
	return min((s.r.Worked.Seconds()+guess*day.Seconds())/(wall+day).Seconds(), 1)
}

// round reads what the round has left.
func (s *Scrub) round(ctx context.Context) error {
	repositories, err := s.cfg.Store.Repositories()
	if err != nil {
		return err
	}
	for _, repository := range repositories {
		if repository < s.r.Repository {
			continue
		}
		if err := s.repository(ctx, repository); err != nil {
			return err
		}
	}
	return nil
}

func (s *Scrub) repository(ctx context.Context, repository string) error {
	if repository != s.r.Repository {
		s.r.Repository, s.r.Generation, s.r.Path, s.r.Long = repository, "", "", long{}
	}
	for {
		// Listed anew each time: generations come and go.
		list, err := s.cfg.Store.List(ctx, repository)
		if err != nil {
			return err
		}
		i := slices.IndexFunc(list, func(g generations.Generation) bool { return !before(g.Name, s.r.Generation) })
		if i < 0 {
			return nil
		}
		g := &list[i]
		if g.Name != s.r.Generation {
			s.r.Generation, s.r.Path, s.r.Long = g.Name, "", long{}
		}
		found := s.r.Findings
		if err := s.generation(ctx, g, list[:i]); err != nil {
			return err
		}
		if err := s.note(); err != nil {
			return err
		}
		if s.r.Findings > found {
			if err := s.heal(ctx, repository); err != nil {
				return err
			}
		}
		if i+1 == len(list) {
			return nil
		}
		s.r.Generation, s.r.Path, s.r.Long = list[i+1].Name, "", long{}
		if err := s.tick(); err != nil {
			return err
		}
	}
}

// before orders names of generations as they were made; "" is before all.
func before(a, b string) bool {
	x, _, _ := generations.ParseName(a)
	y, _, _ := generations.ParseName(b)
	return x < y || x == y && a < b
}

// heal names every generation of what was found, and heals what another copy on
// this disk can heal. The rest waits for home.
func (s *Scrub) heal(ctx context.Context, repository string) error {
	healed, err := s.cfg.Store.Heal(ctx, repository)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, generations.ErrBusy):
		return nil // the push's commit heals
	case err != nil:
		s.cfg.Log.Error("rotten files could not be healed", "repository", repository, "err", err)
	}
	if healed > 0 {
		s.report(true)
	}
	return nil
}

// tick makes a checkpoint when it is time for one.
func (s *Scrub) tick() error {
	now := s.cfg.Now()
	if d := now.Sub(s.noted); d >= 0 && d < checkpointEvery {
		return nil
	}
	return s.checkpoint()
}

// checkpoint makes durable how far the reading has come.
func (s *Scrub) checkpoint() error {
	if err := s.note(); err != nil {
		return err
	}
	s.count()
	s.noted = s.cfg.Now()
	if err := s.cfg.Store.WriteRecord(recordName, &s.r); err != nil {
		return err
	}
	s.report(true)
	return nil
}

// count adds the time since the last call to that in which the disk could be read.
func (s *Scrub) count() {
	now := s.cfg.Now()
	if d := now.Sub(s.worked); d > 0 && d < time.Hour && s.r.Running {
		s.r.Worked += d
	}
	s.worked = now
}

// note records what was found.
func (s *Scrub) note() error {
	if len(s.found) == 0 {
		return nil
	}
	for _, f := range s.found {
		s.cfg.Log.Error("a file on the disk is rotten", "repository", f.Repository, "generation", f.Generations[0], "file", f.Path, "what", f.What)
	}
	if err := s.cfg.Store.NoteRot(s.found); err != nil {
		return err
	}
	s.found = nil
	s.report(true)
	return nil
}

func (s *Scrub) report(always bool) {
	now := s.cfg.Now()
	if d := now.Sub(s.said); s.cfg.Report == nil || !always && d >= 0 && d < 10*time.Second {
		return
	}
	s.said = now
	p := Progress{Started: s.r.Started, LastFull: s.r.LastFull, Running: s.r.Running, Bytes: s.r.Bytes, Paused: s.paused}
	if s.r.Running {
		p.Done = min(float64(s.r.Spent)/float64(max(s.total, s.r.Spent+1)), 1)
		p.Overdue = now.Sub(s.r.Started) > s.cfg.Every
	} else if !s.r.LastFull.IsZero() {
		p.Done = 1
	}
	s.cfg.Report(p)
}

// estimate says what a round costs, in the units of Spent.
func (s *Scrub) estimate(ctx context.Context) error {
	holdings, err := s.cfg.Store.Holdings(ctx)
	if err != nil {
		return err
	}
	s.total = 0
	for _, h := range holdings {
		s.total += h.Bytes + seek
	}
	return nil
}

// spend waits until n more bytes may be read, and while the disk is not for us.
func (s *Scrub) spend(ctx context.Context, n int64) error {
	if err := s.pause(ctx); err != nil {
		return err
	}
	s.r.Spent += n
	now := s.cfg.Now()
	if d := now.Sub(s.paced); s.paced.IsZero() || d < 0 || d > time.Minute {
		if err := s.pace(ctx, now); err != nil {
			return err
		}
	}
	if s.rate == 0 {
		return ctx.Err()
	}
	if s.due.Before(now.Add(-time.Second)) || s.due.After(now.Add(time.Minute)) {
		s.due = now // what was not used is lost, and a clock that jumped stops nothing
	}
	s.due = s.due.Add(time.Duration(float64(n) / s.rate * float64(time.Second)))
	for {
		left := s.due.Sub(s.cfg.Now())
		if left < 50*time.Millisecond {
			return ctx.Err()
		}
		if err := s.cfg.Sleep(ctx, min(left, maxSleep)); err != nil {
			return err
		}
		s.report(false)
		if err := s.tick(); err != nil {
			return err
		}
	}
}

// pace sets the rate.
func (s *Scrub) pace(ctx context.Context, now time.Time) error {
	if err := s.estimate(ctx); err != nil {
		return err
	}
	s.count()
	s.paced = now
	left := s.r.Started.Add(s.cfg.Every * 3 / 4).Sub(now)
	if left <= 0 {
		s.rate = 0
		return nil
	}
	s.rate = max(float64(max(s.total-s.r.Spent, 0))/(left.Seconds()*s.share(now)), minRate)
	return nil
}

// pause waits while somebody else needs the disk.
func (s *Scrub) pause(ctx context.Context) error {
	for {
		why := s.cfg.Busy()
		if why != s.paused {
			if why != "" {
				s.count()
			}
			s.paused = why
			s.report(true)
		}
		if why == "" {
			return ctx.Err()
		}
		if err := s.cfg.Sleep(ctx, pausePoll); err != nil {
			return err
		}
		s.worked = s.cfg.Now() // a pause is no time in which it could be read
		s.report(false)
	}
}
