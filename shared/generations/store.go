package generations

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"farkeep/shared/beneath"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"
	"farkeep/shared/tomlfile"

	"github.com/pelletier/go-toml/v2"
	"golang.org/x/sys/unix"
)

// Owner is who the files shall belong to.
type Owner struct{ UID, GID int }

// Options tune a Store.
type Options struct {
	// Owner is whom everything that the store makes is given to; nil leaves it
	// with the process. It needs root; it is how a disk that is filled at home
	// belongs to the appliance's keeper.
	Owner *Owner
	// Shared lets every user of the machine read the generations (mode 0755 on
	// the folder of generations instead of 0700). The appliance wants it: its
	// receiver reads as another user.
	Shared bool
	// Reserve is how many bytes of the file system pushes leave free. 0 means a
	// fiftieth of it, 4 GiB at most.
	Reserve int64
	// Now is the clock; nil means time.Now. ClockSet says whether it is known to
	// be right; nil means yes.
	Now      func() time.Time
	ClockSet func() bool
	// ReadOnly opens what is there and makes nothing: for List and what else only
	// reads, on a disk that may be mounted read-only.
	ReadOnly bool
	// Judge says at each commit whether the generation is suspect; nil: none is.
	Judge Judge
	Log   *slog.Logger // nil discards
}

// maxReserve bounds the reserve that Options.Reserve 0 stands for.
const maxReserve = 4 << 30

// maxLinks is ext4's EXT4_LINK_MAX; file systems that allow fewer say EMLINK.
const maxLinks = 65000

// maxTOML bounds generation.toml and push.toml, in bytes.
const maxTOML = 64 << 10

const (
	sequenceFile = ".sequence"
	privatePerm  = 0o700
	sharedPerm   = 0o755
)

const readme = `This disk holds backups made by Farkeep: generations of directory trees, most of
them Borg repositories. Nothing but a Linux machine is needed to read them.

  generations/<repository>/<number>-<UTC time>/
      files/           the repository as it was at that time
      SUMS.b2          checksums; inside that folder run:  b2sum -l 256 -c --quiet SUMS.b2
      generation.toml  when it was made, and from what
      MANIFEST         the same list for Farkeep itself, with original modes and times

The highest number is the newest. If generation.toml says suspect = true, something
was odd about it: look at the one before as well.

To use a Borg repository, copy its "files" folder to a disk with room and make the
copy yours and writable (the original stays as it is):

  cp -r generations/<repository>/<number>-<UTC time>/files ~/repository
  chmod -R u+rwX ~/repository
  borg list ~/repository
  borg extract ~/repository::<archive>

Borg may ask about a repository that "was previously located" elsewhere; that is
expected for a copy. The repository's own passphrase or key is needed, and is not on
this disk. Read from the copy, and let nothing write into it (borg create, prune,
compact, check --repair): an encrypted repository that goes on from an older state
uses encryption counters a second time, and whoever sees both copies learns what was
encrypted so, without a key. If backups must go on in it, read docs/recovery.md of
Farkeep before.

A restic repository is read where it is:

  restic -r generations/<repository>/<number>-<UTC time>/files --no-lock restore latest --target ~/restored

Nothing in generations/ should ever be changed. incoming/ holds uploads that were
not finished, staging/ those of stock clients, and .farkeep/going/ generations that
were expired: these may be deleted.
`

// Store is a folder of generations. Its methods are safe for concurrent use.
type Store struct {
	root, generations, incoming *beneath.Dir
	private, going              *beneath.Dir // .farkeep, and going/ in it
	opt                         Options

	mu       sync.Mutex // guards the fields below
	known    map[string]map[string]Generation
	promised map[*Transaction]int64 // bytes that pushes under way may still write

	// gate is held for a moment to begin the use of a generation or of a folder in
	// incoming/, and to rename one away; it guards held, which counts the users of
	// each generation.
	gate sync.Mutex
	held map[string]int

	emptying chan struct{} // holds one token while something in going/ is emptied
	unit     int           // countUnit
	stretch  time.Duration // workStretch
	rest     func(context.Context, time.Duration) error

	rot       rotList
	records   sync.Mutex // one writer of records at a time
	deciding  sync.Mutex // guards standings; taken before records
	standings map[string]map[string]Standing
}

// Open opens the store in the folder at path, which must exist, and makes what is
// not there yet of its layout.
func Open(path string, opt Options) (*Store, error) {
	if opt.Now == nil {
		opt.Now = time.Now
	}
	if opt.ClockSet == nil {
		opt.ClockSet = func() bool { return true }
	}
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	s := &Store{opt: opt, known: map[string]map[string]Generation{}, promised: map[*Transaction]int64{}, held: map[string]int{}, emptying: make(chan struct{}, 1), unit: countUnit, stretch: workStretch, rest: rest}
	if err := s.open(path); err != nil {
		s.Close()
		return nil, fmt.Errorf("open store of generations: %w", err)
	}
	return s, nil
}

func (s *Store) open(path string) (err error) {
	if s.root, err = beneath.Open(path); err != nil {
		return err
	}
	if s.opt.ReadOnly {
		if s.generations, err = s.root.Dir(GenerationsFolder); err != nil {
			return err
		}
		// A reader may not be allowed in there, or the disk be older.
		if s.private, err = s.root.Dir(PrivateFolder); errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
			return nil
		}
		return err
	}
	perm := uint32(privatePerm)
	if s.opt.Shared {
		perm = sharedPerm
	}
	if s.generations, err = s.makeDir(s.root, GenerationsFolder, perm); err != nil {
		return err
	}
	if st, err := s.generations.StatSelf(); err == nil && s.opt.Shared && st.Mode&0o777 != perm {
		// A disk that was filled at home opens up when it arrives.
		if err := s.root.Chmod(GenerationsFolder, perm); err != nil {
			return err
		}
	}
	if s.incoming, err = s.makeDir(s.root, IncomingFolder, privatePerm); err != nil {
		return err
	}
	if s.private, err = s.makeDir(s.root, PrivateFolder, privatePerm); err != nil {
		return err
	}
	if s.going, err = s.makeDir(s.private, goingFolder, privatePerm); err != nil {
		return err
	}
	beats, err := s.makeDir(s.root, HeartbeatFolder, sharedPerm)
	if err != nil {
		return err
	}
	beats.Close()
	if _, err := s.root.Stat(ReadmeFile); errors.Is(err, fs.ErrNotExist) {
		return s.writeFile(s.root, ReadmeFile, []byte(readme), 0o644)
	}
	return nil
}

// Close closes the store. Transactions must have been closed before.
func (s *Store) Close() error {
	return errors.Join(s.going.Close(), s.private.Close(), s.incoming.Close(), s.generations.Close(), s.root.Close())
}

// Space says what the disk has left, the reserve not counted.
func (s *Store) Space() (free, reserve, total int64, err error) {
	sp, err := s.root.Space()
	if err != nil {
		return 0, 0, 0, err
	}
	reserve = s.opt.Reserve
	if reserve == 0 {
		reserve = min(sp.Total/50, maxReserve)
	}
	return max(sp.Free-reserve, 0), reserve, sp.Total, nil
}

// Heartbeat records on the disk when host last said that all is well. host is
// named by the rule of repositories.
func (s *Store) Heartbeat(host string, at time.Time, text string) error {
	if err := pushwire.CheckRepository(host); err != nil {
		return fmt.Errorf("heartbeat: %w", err)
	}
	beats, err := s.root.Dir(HeartbeatFolder)
	if err != nil {
		return err
	}
	defer beats.Close()
	return s.writeFile(beats, host+"-last-success", []byte(at.UTC().Format(time.RFC3339)+"\n"+text), 0o644)
}

// Repositories lists the repositories that have a folder here, sorted.
func (s *Store) Repositories() ([]string, error) {
	var names []string
	err := s.generations.Each(func(e fs.DirEntry) error {
		if e.IsDir() && pushwire.CheckRepository(e.Name()) == nil {
			names = append(names, e.Name())
		}
		return nil
	})
	slices.Sort(names)
	return names, err
}

// List returns the generations of a repository, oldest first; none is no error.
// A generation whose generation.toml cannot be read is listed with its name and
// sequence alone and Format 0. A long history on a cold disk takes seconds, which
// ctx ends.
func (s *Store) List(ctx context.Context, repository string) ([]Generation, error) {
	if err := pushwire.CheckRepository(repository); err != nil {
		return nil, err
	}
	dir, err := s.generations.Dir(repository)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	decided := s.decided(repository)
	var list []Generation
	err = dir.Each(func(e fs.DirEntry) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if _, _, err := ParseName(e.Name()); err != nil {
			return nil
		}
		g, ok := s.generation(dir, repository, e.Name())
		if !ok {
			return nil
		}
		switch d, ok := decided[g.Name]; {
		case g.Format == 0: // nothing is known of it
		case !g.Suspect:
			g.Standing = Good
		case ok:
			g.Standing = d
		default:
			g.Standing = Suspect
		}
		list = append(list, g)
		return nil
	})
	slices.SortFunc(list, func(a, b Generation) int {
		if a.Sequence != b.Sequence {
			return int(min(max(a.Sequence-b.Sequence, -1), 1))
		}
		return strings.Compare(a.Name, b.Name)
	})
	return list, err
}

// generation reads a generation.toml, once. It reports false for one that was
// expired since its name was seen.
func (s *Store) generation(dir *beneath.Dir, repository, name string) (Generation, bool) {
	s.mu.Lock()
	g, ok := s.known[repository][name]
	s.mu.Unlock()
	if ok {
		return g, true
	}
	g, err := readGeneration(dir, repository, name)
	if err != nil {
		if _, gone := dir.Stat(name); errors.Is(gone, fs.ErrNotExist) {
			return g, false
		}
		s.opt.Log.Error("a generation cannot be read", "repository", repository, "generation", name, "err", err)
		return g, true
	}
	s.remember(g)
	return g, true
}

func (s *Store) remember(g Generation) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.known[g.Repository] == nil {
		s.known[g.Repository] = map[string]Generation{}
	}
	s.known[g.Repository][g.Name] = g
}

func readGeneration(dir *beneath.Dir, repository, name string) (Generation, error) {
	sequence, committed, err := ParseName(name)
	bare := Generation{Name: name, Repository: repository, Sequence: sequence, Committed: committed}
	if err != nil {
		return bare, err
	}
	folder, err := dir.Dir(name)
	if err != nil {
		return bare, err
	}
	defer folder.Close()
	return readIn(folder, repository, name)
}

// readIn reads the generation.toml in a generation's folder, wherever that is.
func readIn(folder *beneath.Dir, repository, name string) (Generation, error) {
	sequence, committed, err := ParseName(name)
	bare := Generation{Name: name, Repository: repository, Sequence: sequence, Committed: committed}
	if err != nil {
		return bare, err
	}
	text, err := folder.ReadFile(TOMLFile, maxTOML)
	if err != nil {
		return bare, err
	}
	g := Generation{Name: name}
	if err := tomlfile.Parse(TOMLFile, text, &g); err != nil {
		return bare, err
	}
	if g.Format != 1 || g.Repository != repository || g.Sequence != sequence {
		return bare, fmt.Errorf("%w: %s says format %d, repository %q, sequence %d", ErrDamaged, TOMLFile, g.Format, g.Repository, g.Sequence)
	}
	for _, n := range []int64{g.Bytes, g.NewBytes, g.Overhead} {
		if n < 0 || n > manifest.MaxBytes {
			return bare, fmt.Errorf("%w: %s counts %d bytes", ErrDamaged, TOMLFile, n)
		}
	}
	if g.OldReason != "" {
		g.Reasons, g.OldReason = append(g.Reasons, g.OldReason), ""
	}
	return g, nil
}

// Newest returns the newest generation that can be read, suspect or not, or an
// error that wraps ErrNone.
func (s *Store) Newest(ctx context.Context, repository string) (Generation, error) {
	list, err := s.List(ctx, repository)
	if err != nil {
		return Generation{}, err
	}
	for _, g := range slices.Backward(list) {
		if g.Format != 0 {
			return g, nil
		}
	}
	return Generation{}, fmt.Errorf("%s: %w", repository, ErrNone)
}

// Generation returns one generation by its name.
func (s *Store) Generation(ctx context.Context, repository, name string) (Generation, error) {
	list, err := s.List(ctx, repository)
	if err != nil {
		return Generation{}, err
	}
	for _, g := range list {
		if g.Name == name {
			return g, nil
		}
	}
	return Generation{}, fmt.Errorf("%s has no generation %.64q", repository, name)
}

// makeDir makes a folder and gives it to the owner, if it was not there.
func (s *Store) makeDir(dir *beneath.Dir, name string, perm uint32) (*beneath.Dir, error) {
	sub, made, err := dir.MakeDir(name, perm)
	if err == nil && made && s.opt.Owner != nil {
		if err = dir.Chown(name, s.opt.Owner.UID, s.opt.Owner.GID); err != nil {
			sub.Close()
		}
	}
	if err != nil {
		return nil, err
	}
	return sub, nil
}

func (s *Store) own(f *os.File) error {
	if s.opt.Owner == nil {
		return nil
	}
	return f.Chown(s.opt.Owner.UID, s.opt.Owner.GID)
}

func (s *Store) writeFile(dir *beneath.Dir, name string, data []byte, perm uint32) error {
	return dir.WriteFile(name, data, perm, s.own)
}

// create makes a new file; what had the name is removed.
func (s *Store) create(dir *beneath.Dir, name string, perm uint32) (*os.File, error) {
	f, _, err := dir.OpenWrite(name, unix.O_CREAT|unix.O_EXCL, perm)
	if errors.Is(err, fs.ErrExist) {
		if err := dir.RemoveAll(name); err != nil {
			return nil, err
		}
		f, _, err = dir.OpenWrite(name, unix.O_CREAT|unix.O_EXCL, perm)
	}
	if err != nil {
		return nil, err
	}
	err = f.Chmod(fs.FileMode(perm))
	if err == nil {
		err = s.own(f)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func (s *Store) writeTOML(dir *beneath.Dir, name string, v any, perm uint32) error {
	var text bytes.Buffer
	if err := toml.NewEncoder(&text).Encode(v); err != nil {
		return err
	}
	return s.writeFile(dir, name, text.Bytes(), perm)
}
