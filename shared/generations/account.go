package generations

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"farkeep/shared/beneath"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"
	"farkeep/shared/tomlfile"
)

// Who is charged with what.
//
// A file that several generations share is one inode. It is charged to the oldest
// of them that is still there: to the one that brought it (new_bytes in its
// generation.toml), and when that goes, to its successor, if it has it as well.
// The charges of all generations are so, at any time, what their files take on the
// disk: whoever makes many generations of few bytes pays for the bytes, once, and
// nobody gets room for free by waiting until the first of them is gone.
//
// What moves on is known when the last file of a generation is removed: what it
// was charged with, less the bytes of those inodes of which it had the last name.
// It is noted in generations/<repository>/.moved before generation.toml, which
// says what the old charge was, is removed. Until then what is on its way out is
// charged in full to the one who pushed it.

// movedFile lies beside the generations of a repository.
const movedFile = ".moved"

// maxMoves bounds its notes. Each takes less than 150 bytes, so that the file stays
// below tomlfile.MaxSize.
const maxMoves = 6000

type moves struct {
	Moved []move `toml:"moved"`
}

// move charges the generation To with bytes that From was charged with.
type move struct {
	From  string `toml:"from,omitempty"` // empty: several that are gone for good
	To    string `toml:"to"`
	Bytes int64  `toml:"bytes"`
}

func readMoves(home *beneath.Dir) (moves, error) {
	text, err := home.ReadFile(movedFile, tomlfile.MaxSize)
	if errors.Is(err, fs.ErrNotExist) {
		return moves{}, nil
	}
	if err != nil {
		return moves{}, err
	}
	return parseMoves(text)
}

func parseMoves(text []byte) (m moves, err error) {
	if err := tomlfile.Parse(movedFile, text, &m); err != nil {
		return moves{}, err
	}
	for _, n := range m.Moved {
		if n.Bytes < 0 || n.Bytes > manifest.MaxBytes {
			return moves{}, fmt.Errorf("%w: %s charges %.40q with %d bytes", ErrDamaged, movedFile, n.To, n.Bytes)
		}
	}
	return m, nil
}

// to is what the generation name is charged with besides what it brought.
func (m *moves) to(name string) (bytes int64) {
	for _, n := range m.Moved {
		if n.To == name {
			bytes = min(bytes+n.Bytes, manifest.MaxBytes)
		}
	}
	return bytes
}

// from reports whether it is settled what name's files leave behind.
func (m *moves) from(name string) bool {
	return slices.ContainsFunc(m.Moved, func(n move) bool { return n.From == name })
}

// charge is what g's files count for, its lists and folders not included. No
// generation can hold more than it shows, whatever was noted.
func (m *moves) charge(g *Generation) int64 {
	return min(g.NewBytes+m.to(g.Name), max(g.Bytes, g.NewBytes))
}

// account reads what a repository's generations are charged with: those that are
// there, by name, and those that are on their way out.
type account struct {
	there []Generation
	going []Generation // readable, and not settled
	moves moves
}

func (s *Store) account(ctx context.Context, repository string, going []string) (*account, error) {
	a := &account{}
	var err error
	if a.there, err = s.List(ctx, repository); err != nil {
		return nil, err
	}
	home, err := s.generations.Dir(repository)
	if err == nil {
		defer home.Close()
		// A record that is damaged must not stop the pushes; what was noted there is
		// lost, and counts for nobody.
		if a.moves, err = readMoves(home); err != nil {
			s.opt.Log.Error("what expired generations left to others cannot be read", "repository", repository, "err", err)
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, entry := range going {
		r, name, ok := goingGeneration(entry)
		if !ok || r != repository || a.moves.from(name) {
			continue
		}
		if g, err := s.readGoing(entry); err == nil {
			a.going = append(a.going, g)
		}
	}
	return a, nil
}

// successor is who is charged with what g leaves behind: the next generation that
// can be read. Files are linked from one generation to the next, so it has all of
// g's that any later one has. nil: nobody.
func (a *account) successor(g *Generation) *Generation {
	var next *Generation
	for _, list := range [][]Generation{a.there, a.going} {
		for i := range list {
			if o := &list[i]; o.Format != 0 && o.Sequence > g.Sequence && (next == nil || o.Sequence < next.Sequence) {
				next = o
			}
		}
	}
	return next
}

// inherit notes what g, whose files are gone, leaves to its successor: what it was
// charged with, less what was freed. It may be repeated.
func (s *Store) inherit(ctx context.Context, g *Generation, freed int64) error {
	home, err := s.generations.Dir(g.Repository)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // the whole repository goes
	}
	if err != nil {
		return err
	}
	defer home.Close()
	going, err := s.listGoing()
	if err != nil {
		return err
	}
	a, err := s.account(ctx, g.Repository, going)
	if err != nil {
		return err
	}
	to := a.successor(g)
	if a.moves.from(g.Name) || to == nil {
		return nil
	}
	left := a.moves.charge(g) - freed
	if left <= 0 {
		return nil
	}
	a.moves.Moved = append(a.moves.Moved, move{From: g.Name, To: to.Name, Bytes: left})
	a.compact(going)
	return s.writeTOML(home, movedFile, &a.moves, 0o644)
}

// compact drops what is charged to nobody any more, and adds up what need not be
// told apart.
func (a *account) compact(going []string) {
	left := map[string]int64{}
	var list []move
	for _, n := range a.moves.Moved {
		named := func(g Generation) bool { return g.Name == n.To }
		if !slices.ContainsFunc(a.there, named) && !slices.ContainsFunc(a.going, named) {
			continue
		}
		if n.From != "" && slices.ContainsFunc(going, func(entry string) bool { _, name, _ := goingGeneration(entry); return name == n.From }) {
			list = append(list, n)
			continue
		}
		left[n.To] += n.Bytes
	}
	for to, bytes := range left {
		list = append(list, move{To: to, Bytes: bytes})
	}
	if len(list) > maxMoves { // there are not so many generations; the least goes uncharged
		slices.SortFunc(list, func(x, y move) int { return cmp.Compare(y.Bytes, x.Bytes) })
		list = list[:maxMoves]
	}
	slices.SortFunc(list, func(x, y move) int { return cmp.Or(cmp.Compare(x.To, y.To), cmp.Compare(x.From, y.From)) })
	a.moves.Moved = list
}

// stored is how much of a key's quota is used: what its generations are charged
// with, their lists and folders, and what its pushes under way may add, but for
// the one of repository except. What is on its way out counts until it is gone.
func (s *Store) stored(ctx context.Context, pusher, except string) (bytes int64, err error) {
	repositories, going, err := s.accounted()
	if err != nil {
		return 0, err
	}
	for _, r := range repositories {
		a, err := s.account(ctx, r, going)
		if err != nil {
			return 0, err
		}
		for _, list := range [][]Generation{a.there, a.going} {
			for i := range list {
				if g := &list[i]; g.Pusher == pusher {
					bytes += a.moves.charge(g) + g.Overhead
				}
			}
		}
	}
	err = s.incoming.Each(func(e fs.DirEntry) error {
		if e.Name() == except || pushwire.CheckRepository(e.Name()) != nil {
			return nil
		}
		dir, err := s.incoming.Dir(e.Name())
		if err != nil {
			return err
		}
		defer dir.Close()
		if p, err := readPush(dir); err == nil && p.Pusher == pusher {
			bytes += p.NewBytes
		}
		return nil
	})
	return bytes, err
}

// accounted lists the repositories that have generations here or in going/, and
// what is in going/.
func (s *Store) accounted() (repositories, going []string, err error) {
	if repositories, err = s.Repositories(); err != nil {
		return nil, nil, err
	}
	if going, err = s.listGoing(); err != nil {
		return nil, nil, err
	}
	for _, entry := range going {
		if r, _, ok := goingGeneration(entry); ok && !slices.Contains(repositories, r) {
			repositories = append(repositories, r)
		}
	}
	return repositories, going, nil
}

// Holding is what a generation holds on the disk: the bytes of its files that no
// older one has, and its lists and folders. Not all of it is free once it goes:
// its successor inherits what it has as well.
type Holding struct {
	Repository, Generation string
	Bytes                  int64
}

// Holdings returns what every generation holds, the most first. Those that are
// being removed are not among them.
func (s *Store) Holdings(ctx context.Context) ([]Holding, error) {
	repositories, err := s.Repositories()
	if err != nil {
		return nil, err
	}
	var all []Holding
	for _, r := range repositories {
		a, err := s.account(ctx, r, nil)
		if err != nil {
			return nil, err
		}
		for i := range a.there {
			g := &a.there[i]
			all = append(all, Holding{r, g.Name, a.moves.charge(g) + g.Overhead})
		}
	}
	slices.SortStableFunc(all, func(x, y Holding) int { return cmp.Compare(y.Bytes, x.Bytes) })
	return all, nil
}

// mostHeld is how many holdings a SpaceError names.
const mostHeld = 5

// noRoom makes a SpaceError say who has the room. When that cannot be found out,
// it says the numbers alone.
func (t *Transaction) noRoom(ctx context.Context, e *SpaceError) {
	e.Repository = t.req.Repository
	all, err := t.store.Holdings(ctx)
	if err != nil {
		return
	}
	e.Most = all[:min(len(all), mostHeld)]
	for _, h := range all {
		if h.Repository == e.Repository && len(e.Own) < mostHeld {
			e.Own = append(e.Own, h)
		}
	}
}
