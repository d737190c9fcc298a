package push

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"farkeep/pusher/listing"
	"farkeep/pusher/progress"
	"farkeep/pusher/repository"
	"farkeep/shared/contentname"
	"farkeep/shared/hint"
	"farkeep/shared/manifest"
)

// beginnings are the files of a restic repository from which all others are
// reached, by their names: its snapshots, and then its index.
//
// restic writes packs first, then the index that tells of them, then the snapshot;
// and it removes the old index before the packs that only it tells of. So a list
// that has these names, all packs that were there later, and no other snapshot or
// index, is a whole repository, also while a backup adds to it; unless one of these
// names went while the list was made.
type beginnings struct {
	root  string
	names map[string]bool
}

// maxBeginnings bounds the names; each is held in memory.
const maxBeginnings = 1 << 20

// readBeginnings reads them in the order that the rule above asks for.
func readBeginnings(root string) (*beginnings, error) {
	b := &beginnings{root, map[string]bool{}}
	for _, folder := range []string{"snapshots", "index"} {
		entries, err := os.ReadDir(filepath.Join(root, folder))
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			b.names[folder+"/"+e.Name()] = true
		}
		if len(b.names) > maxBeginnings {
			return nil, fmt.Errorf("%s has more than %d snapshots and index files", root, maxBeginnings)
		}
	}
	return b, nil
}

// includes reports whether a file belongs to the list.
func (b *beginnings) includes(name string) bool {
	if strings.HasPrefix(name, "snapshots/") || strings.HasPrefix(name, "index/") {
		return b.names[name]
	}
	return true
}

// check reports the first of them that is not there any more.
func (b *beginnings) check() error {
	for name := range b.names {
		if _, err := os.Lstat(filepath.Join(b.root, name)); errors.Is(err, fs.ErrNotExist) {
			return &ChangedError{name}
		} else if err != nil {
			return err
		}
	}
	return nil
}

// plain lists what is not frozen.
func (p *picture) plain(ctx context.Context, lane *progress.Lane) (*list, error) {
	r := p.repository
	if r.Layout == contentname.None {
		return p.push.list(ctx, r, r.Path, listing.Options{}, lane)
	}
	for round := 1; ; round++ {
		l, err := p.named(ctx, lane)
		var changed *ChangedError
		switch {
		case !errors.As(err, &changed):
			return l, err
		case round == rounds:
			return nil, busy(r, err)
		}
		p.push.Log.Info("listing again", "repository", r.Name, "why", err)
	}
}

// named lists a repository whose files are named by their content, and compares
// both in the same reading.
func (p *picture) named(ctx context.Context, lane *progress.Lane) (*list, error) {
	r := p.repository
	var first *beginnings
	if r.Layout == contentname.Restic {
		var err error
		if first, err = readBeginnings(r.Path); err != nil {
			return nil, fmt.Errorf("list %s: %w", r.Path, err)
		}
	}
	l, err := p.push.list(ctx, r, r.Path, listing.Options{
		Include: func(name string) bool {
			return !r.Layout.Passing(name) && (first == nil || first.includes(name))
		},
		Check: func(name string) listing.Check {
			if c := r.Layout.NewCheck(name); c != nil {
				return c
			}
			return nil
		},
	}, lane)
	var wrong *listing.WrongError
	if errors.As(err, &wrong) {
		return nil, p.push.wrongNames(r, wrong)
	}
	if err != nil || first == nil {
		return l, err
	}
	if err := first.check(); err != nil {
		l.remove()
		return nil, err
	}
	return l, nil
}

// still reports whether what was listed of a restic repository is still there. What
// came meanwhile does not matter: the list is a whole repository without it.
func (p *picture) still(l *list) error {
	in, err := l.open()
	if err != nil {
		return err
	}
	defer in.Close()
	for m := manifest.NewReader(in); ; {
		e, err := m.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if e.Kind != manifest.File {
			continue
		}
		info, err := os.Lstat(filepath.Join(p.repository.Path, e.Path))
		if errors.Is(err, fs.ErrNotExist) || err == nil && (!info.Mode().IsRegular() || info.Size() != e.Size || info.ModTime().UnixNano() != e.MTime) {
			return &ChangedError{e.Path}
		}
		if err != nil {
			return err
		}
	}
}

// busy explains a repository that never stood still.
func busy(r repository.Repository, err error) error {
	if r.Layout == contentname.None {
		return hint.Because(err, "push when nothing writes to it, or from a snapshot")
	}
	program := "restic prune"
	if r.Layout == contentname.Borg2 {
		program = "borg"
	}
	// What a lock says is encrypted; that there is one, and since when, is not.
	locks, lockErr := os.ReadDir(filepath.Join(r.Path, "locks"))
	var newest time.Time
	for _, e := range locks {
		if info, err := e.Info(); err == nil && info.ModTime().After(newest) {
			newest = info.ModTime()
		}
	}
	if lockErr == nil && !newest.IsZero() {
		return hint.Because(err, "a lock from %s lies in %s: push when no %s runs", newest.Format(time.DateTime), filepath.Join(r.Path, "locks"), program)
	}
	return hint.Because(err, "push when no %s runs", program)
}

// wrongNames says which files are not what their names say, and who has them as
// they were. The generation that has them stays the newest good one: nothing of this goes anywhere.
func (p *Push) wrongNames(r repository.Repository, wrong *listing.WrongError) error {
	for _, w := range wrong.First[1:] {
		p.Log.Error("not what its name says", "repository", r.Name, "file", w.Path, "err", w.Err)
	}
	err := fmt.Errorf("repository %s: %w; nothing was pushed", r.Name, wrong)
	disk := "it was damaged by its disk or overwritten: look at the machine first (smartctl -a, restic check --read-data; is anything else changed?)"
	if r.Layout == contentname.Borg2 {
		disk = "it was damaged by its disk or overwritten: look at the machine first (smartctl -a, borg check; is anything else changed?)"
	}
	now := map[string]manifest.Sum{}
	for _, w := range wrong.First {
		now[w.Path] = w.Sum
	}
	remembered, ok, memoryErr := p.Memory.Get(r.Name)
	if memoryErr != nil || !ok {
		return hint.Because(err, "%s", disk)
	}
	// The target that has the most of them; by name, where they are equal.
	var has []string
	from, generation := "", ""
	for _, target := range slices.Sorted(maps.Keys(remembered.Pushed)) {
		paths, holdErr := p.bases.Holds(target, r.Name, now)
		if holdErr == nil && len(paths) > len(has) {
			has, from, generation = paths, target, remembered.Pushed[target].Generation
		}
	}
	if len(has) == 0 {
		return hint.Because(err, "%s. No target is known to have it as it was: \"restic repair packs\" saves what is left of a pack", disk)
	}
	of := ""
	if int64(len(has)) < wrong.Count {
		of = fmt.Sprintf(" %d of them", len(has))
	}
	return hint.Because(err, "%s. %s has%s as pushed before: farkeep-pusher restore %s %s %s %s --to /tmp/%s-good, then put it in its place", disk, from, of, from, r.Name, generation, strings.Join(has, " "), r.Name)
}
