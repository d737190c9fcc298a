package generations

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"sync"
	"time"

	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"
)

// Rot is a file on the disk that is not what was committed: other bytes, none,
// or bytes that the disk cannot read.
type Rot struct {
	Repository string `toml:"repository"`
	// Path is one of its paths below files/, or the name of a generation's own
	// list. It is for people: long ones are cut, and what is not printable is
	// quoted.
	Path string `toml:"path"`
	// Sum is what its content should be; zero for a generation's own lists, which
	// no push can bring back.
	Sum  manifest.Sum `toml:"sum"`
	Size int64        `toml:"size"`
	What string       `toml:"what"` // what is wrong, in words
	// Generations are those that share it, oldest first, MaxRotGenerations at most:
	// the newest of them.
	Generations []string  `toml:"generations"`
	Found       time.Time `toml:"found"`
	Seen        time.Time `toml:"seen"`   // last; Found or later
	Healed      time.Time `toml:"healed"` // zero: not yet
	// Lacking is the digest of the newest generation for which it is known that
	// home does not have these bytes any more; "" when that was not found out.
	Lacking string `toml:"home_lacks,omitempty"`
}

// Open says that nobody healed it yet.
func (r *Rot) Open() bool { return r.Healed.IsZero() }

// plausible says that NoteRot can have written it.
func (r *Rot) plausible() bool {
	return pushwire.CheckRepository(r.Repository) == nil && len(r.Path) <= maxRotPath && len(r.What) <= maxRotWhat && len(r.Lacking) <= 64 &&
		len(r.Generations) <= MaxRotGenerations && !slices.ContainsFunc(r.Generations, func(name string) bool { _, _, err := ParseName(name); return err != nil })
}

func (r *Rot) same(o *Rot) bool {
	if r.Repository != o.Repository || r.Sum != o.Sum {
		return false
	}
	return r.Sum != (manifest.Sum{}) || r.Path == o.Path && slices.Equal(r.Generations, o.Generations)
}

// Limits of the record of rot. What is beyond MaxRot is counted, and listed when
// what is listed was healed and the disk is read again.
const (
	MaxRot            = 500
	MaxRotGenerations = 16
	maxRotPath        = 256 // bytes
	maxRotWhat        = 200
	// keepHealed is how long a healed file stays listed.
	keepHealed = 90 * 24 * time.Hour
)

const rotName = "rot"

// rotRecord is .farkeep/rot.toml.
type rotRecord struct {
	Format int   `toml:"format"` // 1
	Beyond int64 `toml:"beyond"` // found and not listed, since the list was last below its limit
	Files  []Rot `toml:"file"`   // oldest first
}

// rotList is the record in memory.
type rotList struct {
	mu     sync.Mutex // guards the fields below, and the order of writes
	loaded bool
	rotRecord
}

func (s *Store) loadRot() error {
	if s.rot.loaded {
		return nil
	}
	var r rotRecord
	err := s.ReadRecord(rotName, &r)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("what is known to be rotten: %w", err)
	}
	// Whoever had the disk in hand may have written anything.
	r.Files = slices.DeleteFunc(r.Files, func(f Rot) bool { return !f.plausible() })
	r.Files = r.Files[:min(len(r.Files), MaxRot)]
	r.Beyond = max(r.Beyond, 0)
	s.rot.rotRecord, s.rot.loaded = r, true
	return nil
}

// saveRot makes next the record. What cannot be written is not remembered
// either: a disk that vanished is not a disk of rotten files.
func (s *Store) saveRot(next rotRecord) error {
	next.Format = 1
	if err := s.WriteRecord(rotName, next); err != nil {
		return err
	}
	s.rot.rotRecord = next
	return nil
}

// Rotten returns the files that were found rotten, those healed lately included,
// oldest first, and how many wait to be healed, listed or not.
func (s *Store) Rotten() (files []Rot, open int64, err error) {
	s.rot.mu.Lock()
	defer s.rot.mu.Unlock()
	if err := s.loadRot(); err != nil {
		return nil, 0, err
	}
	open = s.rot.Beyond
	for _, r := range s.rot.Files {
		if r.Open() {
			open++
		}
	}
	return slices.Clone(s.rot.Files), open, nil
}

// NoteRot records what was found to be rotten, durably. What is known already
// gets the further generations. The list may be empty.
func (s *Store) NoteRot(found []Rot) error {
	if len(found) == 0 {
		return nil
	}
	return s.changeRot(func(r *rotRecord) bool {
		for _, f := range found {
			r.add(f)
		}
		return true
	})
}

func (s *Store) changeRot(change func(*rotRecord) bool) error {
	s.rot.mu.Lock()
	defer s.rot.mu.Unlock()
	if err := s.loadRot(); err != nil {
		return err
	}
	next := s.rot.rotRecord
	next.Files = slices.Clone(next.Files)
	if !change(&next) {
		return nil
	}
	next.trim(s.opt.Now())
	return s.saveRot(next)
}

func (r *rotRecord) add(f Rot) {
	f.Path, f.What = printable(f.Path, maxRotPath), printable(f.What, maxRotWhat)
	f.Generations = newestOf(f.Generations)
	f.Found = f.Found.UTC().Truncate(time.Second)
	f.Seen = f.Found
	i := slices.IndexFunc(r.Files, func(o Rot) bool { return o.Open() && o.same(&f) })
	if i < 0 {
		r.Files = append(r.Files, f)
		return
	}
	known := &r.Files[i]
	known.Generations = newestOf(slices.Concat(known.Generations, f.Generations))
	known.What, known.Seen = f.What, f.Seen
	known.Lacking = cmp.Or(f.Lacking, known.Lacking)
}

// trim drops what was healed long ago and what is beyond the limit: healed ones
// first, then the newest, which the next reading finds again.
func (r *rotRecord) trim(now time.Time) {
	r.Files = slices.DeleteFunc(r.Files, func(f Rot) bool { return !f.Open() && now.Sub(f.Healed) > keepHealed })
	for len(r.Files) > MaxRot {
		i := slices.IndexFunc(r.Files, func(f Rot) bool { return !f.Open() })
		if i < 0 {
			r.Beyond += int64(len(r.Files) - MaxRot)
			r.Files = r.Files[:MaxRot]
			return
		}
		r.Files = slices.Delete(r.Files, i, i+1)
	}
}

// SettleRot is for whoever has just read everything, from the moment begun: what
// was found beyond the limit of the list counts anew from here, and a list of a
// generation's own that was not found wrong again is right.
func (s *Store) SettleRot(begun time.Time) error {
	return s.changeRot(func(r *rotRecord) bool {
		changed := r.Beyond != 0
		r.Beyond = 0
		for i := range r.Files {
			if f := &r.Files[i]; f.Open() && f.Sum == (manifest.Sum{}) && f.Seen.Before(begun.Truncate(time.Second)) {
				f.Healed, changed = s.opt.Now().UTC().Truncate(time.Second), true
			}
		}
		return changed
	})
}

// newestOf sorts names of generations and keeps the newest.
func newestOf(names []string) []string {
	names = slices.Clone(names)
	slices.SortFunc(names, compareNames)
	names = slices.Compact(names)
	return slices.Clone(names[max(len(names)-MaxRotGenerations, 0):])
}

func compareNames(a, b string) int {
	x, _, _ := ParseName(a)
	y, _, _ := ParseName(b)
	return cmp.Or(cmp.Compare(x, y), cmp.Compare(a, b))
}

// printable makes a text of what may be any bytes, limit bytes at most.
func printable(text string, limit int) string {
	q := strconv.Quote(text)
	q = q[1 : len(q)-1]
	if len(q) <= limit {
		return q
	}
	cut := limit - len("...")
	for cut > 0 && q[cut]&0xc0 == 0x80 {
		cut--
	}
	return q[:cut] + "..."
}

// openRot returns the sums of a repository's files that wait to be healed.
func (s *Store) openRot(repository string) (map[manifest.Sum]Rot, error) {
	s.rot.mu.Lock()
	defer s.rot.mu.Unlock()
	if err := s.loadRot(); err != nil {
		return nil, err
	}
	open := map[manifest.Sum]Rot{}
	for _, r := range s.rot.Files {
		if r.Repository == repository && r.Open() && r.Sum != (manifest.Sum{}) {
			open[r.Sum] = r
		}
	}
	return open, nil
}

// isSums says that a SUMS.b2 of the repository waits to be written anew.
func (r *Rot) isSums(repository string) bool {
	return r.Repository == repository && r.Open() && r.Sum == (manifest.Sum{}) && r.Path == SumsFile
}

// openSums returns the generations whose SUMS.b2 waits to be written anew.
func (s *Store) openSums(repository string) (names []string, err error) {
	s.rot.mu.Lock()
	defer s.rot.mu.Unlock()
	if err := s.loadRot(); err != nil {
		return nil, err
	}
	for _, r := range s.rot.Files {
		if r.isSums(repository) {
			names = append(names, r.Generations...)
		}
	}
	return names, nil
}

// noteVerified records what Verify found.
func (s *Store) noteVerified(repository, generation string, r *Report, cause error) {
	if s.opt.ReadOnly {
		return
	}
	var problems []Problem
	switch {
	case cause == nil:
		problems = r.Problems
	case errors.Is(cause, ErrDamaged):
		problems = []Problem{{Path: ManifestFile, What: "it cannot be read"}}
	}
	var found []Rot
	for _, p := range problems {
		if p.Sum == (manifest.Sum{}) && p.Path != ManifestFile && p.Path != SumsFile {
			continue // a folder: what it held is listed by itself
		}
		found = append(found, Rot{
			Repository: repository, Path: p.Path, Sum: p.Sum, Size: p.Size, What: p.What,
			Generations: []string{generation}, Found: s.opt.Now(),
		})
	}
	if err := s.NoteRot(found); err != nil {
		s.opt.Log.Error("what was found to be rotten is not recorded", "repository", repository, "generation", generation, "err", err)
	}
}

// AppendSum appends the line of a file in SUMS.b2, as b2sum -l 256 writes it.
func AppendSum(b []byte, e *manifest.Entry) []byte { return appendSum(b, e) }

// FilePerm is the mode that a file gets on the disk, by its mode at the source.
func FilePerm(mode uint32) uint32 { return filePerm(mode) }

// RottenRepositories names the repositories with files that wait to be healed.
func (s *Store) RottenRepositories(context.Context) ([]string, error) {
	files, _, err := s.Rotten()
	var names []string
	for _, r := range files {
		if r.Open() && (r.Sum != (manifest.Sum{}) || r.Path == SumsFile) && pushwire.CheckRepository(r.Repository) == nil {
			names = append(names, r.Repository)
		}
	}
	slices.Sort(names)
	return slices.Compact(names), err
}
