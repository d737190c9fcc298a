package suspect

import (
	"cmp"
	"context"
	"encoding/binary"
	"slices"
	"time"

	"farkeep/shared/contentname"
	"farkeep/shared/generations"
	"farkeep/shared/manifest"

	"golang.org/x/crypto/blake2b"
)

// little is how many bytes may always vanish or change, when the files are few.
const little = 64 << 20

// maxGone bounds the contents that are looked for elsewhere, in items of 24 bytes;
// what is beyond counts as vanished.
const maxGone = 1 << 18

// trees is what became of a tree's files. Sizes are the old ones.
type trees struct {
	old, new, gone, changed tally
	examples                [2][]string // of gone and of changed
	contents                []content   // of what is gone
}

type tally struct{ files, bytes int64 }

func (t *tally) add(n int64) {
	t.files++
	t.bytes += n
}

// content is a file that is gone from its place.
type content struct {
	sum   uint64 // of its bytes, the beginning
	size  int64
	found bool
}

func (j *Judge) files(ctx context.Context, c *generations.Candidate, l limits, f *findings) error {
	as, err := openAnchors(c.Scratch, j.config.Now(), c.Current)
	if err != nil {
		return err
	}
	var fresh *anchor
	if as.due {
		fresh = newAnchor(j.config.Now(), c.Offer.Entries)
	}
	n, err := j.survey(ctx, c, as)
	if err != nil {
		return err
	}
	if n != nil && n.is.Layout() == n.layout && (c.Current == nil || n.was.Layout() == n.layout) {
		return j.named(ctx, c, n, l, f)
	}
	w := newWitness(as.oldest)
	var t trees
	var was contentname.Recognizer
	err = diff(ctx, c, func(d manifest.Change) error {
		if d.Relation != manifest.New {
			was.See(d.Old.Path, d.Old.Kind == manifest.Folder)
		}
		if d.New.Kind == manifest.File {
			t.new.add(d.New.Size)
			w.see(&d.New)
			if fresh != nil {
				// Drawn by the name: of files with the same content, such as none, there may be many.
				name := nameKey(fresh.secret, d.New.Path)
				fresh.offer(name, item{key: sumKey(&d.New), other: name, size: uint64(d.New.Size)})
			}
		}
		t.take(&d)
		return nil
	})
	if err != nil {
		return err
	}
	is := contentname.None
	if n != nil && n.is.Layout() == n.layout {
		is = n.layout
	}
	switch old := was.Layout(); {
	case old != contentname.None:
		f.add("Until now this was %s, and what was pushed is %s.", old, is)
	case is != contentname.None:
		// A folder became a repository: there is nothing to compare it with, but its names.
		if _, _, err := j.checkNames(ctx, c, n, f); err != nil {
			return err
		}
	}
	if c.Current != nil {
		if t.suspicious(l) {
			// Before anybody is woken: moved is not gone.
			if err := t.findMoved(ctx, c); err != nil {
				return err
			}
		}
		known := len(f.reasons)
		if t.judge(l, f); len(f.reasons) == known {
			w.judge(l, f)
		}
	}
	j.log.Info("compared files", "repository", c.Repository, "files", t.old.files, "gone", t.gone.files, "gone_bytes", t.gone.bytes, "changed", t.changed.files, "changed_bytes", t.changed.bytes)
	if len(f.reasons) == 0 && fresh != nil {
		return fresh.save(c.Scratch)
	}
	return nil
}

func (t *trees) take(d *manifest.Change) {
	if d.Old.Kind != manifest.File {
		return
	}
	t.old.add(d.Old.Size)
	switch {
	case d.Relation == manifest.Gone, d.Relation == manifest.Changed && d.New.Kind != manifest.File:
		t.gone.add(d.Old.Size)
		t.example(0, d.Old.Path)
		if len(t.contents) < maxGone {
			t.contents = append(t.contents, content{sum: sumKey(&d.Old), size: d.Old.Size})
		}
	case d.Relation == manifest.Changed:
		t.changed.add(d.Old.Size)
		t.example(1, d.Old.Path)
	}
}

func (t *trees) example(of int, path string) {
	if len(t.examples[of]) < named {
		if len(path) > 60 {
			path = "..." + path[len(path)-57:]
		}
		t.examples[of] = append(t.examples[of], path)
	}
}

func sumKey(e *manifest.Entry) uint64 { return binary.BigEndian.Uint64(e.Sum[:]) }

// heavy reports whether part is a share of the whole that counts.
func heavy(part, whole tally, percent int) bool {
	return part.files > few && over(part.files, whole.files, percent) ||
		(part.files > few || part.bytes > little) && over(part.bytes, whole.bytes, percent)
}

func (t *trees) suspicious(l limits) bool {
	return t.new.files == 0 || heavy(t.gone, t.old, l.vanish)
}

// findMoved takes out of what is gone the contents that lie elsewhere now.
func (t *trees) findMoved(ctx context.Context, c *generations.Candidate) error {
	slices.SortFunc(t.contents, func(a, b content) int { return cmp.Or(cmp.Compare(a.sum, b.sum), cmp.Compare(a.size, b.size)) })
	return diff(ctx, c, func(d manifest.Change) error {
		if d.New.Kind != manifest.File || d.Relation == manifest.Unchanged {
			return nil
		}
		sum := sumKey(&d.New)
		i, _ := slices.BinarySearchFunc(t.contents, sum, func(c content, sum uint64) int { return cmp.Compare(c.sum, sum) })
		for ; i < len(t.contents) && t.contents[i].sum == sum; i++ {
			if k := &t.contents[i]; k.size == d.New.Size && !k.found {
				k.found = true
				t.gone.files--
				t.gone.bytes -= k.size
			}
		}
		return nil
	})
}

func (t *trees) judge(l limits, f *findings) {
	switch {
	case t.old.files > 0 && t.new.files == 0:
		f.add("Nothing is left: all %s of the generation before are gone.", plural(t.old.files, "file"))
		return
	case heavy(t.gone, t.old, l.vanish):
		f.add("%s of %s files (%s) are gone, with %s of %s (%s); less than %d %% is usual here. Among them: %s.",
			count(t.gone.files), count(t.old.files), percent(t.gone.files, t.old.files), size(t.gone.bytes), size(t.old.bytes), percent(t.gone.bytes, t.old.bytes), l.vanish, some(t.examples[0], t.gone.files))
	}
	if heavy(t.changed, t.old, l.change) {
		f.add("%s of %s files (%s) have other content, %s of %s; less than %d %% is usual here. So it looks when files are encrypted where they lie. Among them: %s.",
			count(t.changed.files), count(t.old.files), percent(t.changed.files, t.old.files), size(t.changed.bytes), size(t.old.bytes), l.change, some(t.examples[1], t.changed.files))
	}
}

// nameKey is a path's hash; by the secret nobody finds two paths with the same.
func nameKey(secret uint64, path string) uint64 {
	var buf [256]byte // a path is rarely longer: no garbage for each of a million
	b := binary.LittleEndian.AppendUint64(buf[:0], secret)
	sum := blake2b.Sum256(append(b, path...))
	return binary.LittleEndian.Uint64(sum[:])
}

// witness follows the files of an anchor.
type witness struct {
	a     *anchor // nil: there is none, and nothing to say
	names []place
	where []bool // the name is there
	bytes []bool // the content is there, anywhere
}

// place is a name of the anchor, and whose it is.
type place struct {
	name  uint64
	index int32
}

func newWitness(a *anchor) *witness {
	w := &witness{a: a}
	if a == nil {
		return w
	}
	w.where, w.bytes, w.names = make([]bool, len(a.items)), make([]bool, len(a.items)), make([]place, 0, len(a.items))
	for i, item := range a.items {
		w.names = append(w.names, place{item.other, int32(i)})
	}
	slices.SortFunc(w.names, func(a, b place) int { return cmp.Compare(a.name, b.name) })
	return w
}

// see notes a file of the candidate.
func (w *witness) see(e *manifest.Entry) {
	if w.a == nil {
		return
	}
	sum := sumKey(e)
	i, _ := slices.BinarySearchFunc(w.a.items, sum, func(i item, sum uint64) int { return cmp.Compare(i.key, sum) })
	// All that have these bytes are noted with the first: there may be as many as the
	// sample has, for every file of the candidate.
	for ; i < len(w.a.items) && w.a.items[i].key == sum && !w.bytes[i]; i++ {
		w.bytes[i] = true
	}
	name := nameKey(w.a.secret, e.Path)
	if i, ok := slices.BinarySearchFunc(w.names, name, func(n place, name uint64) int { return cmp.Compare(n.name, name) }); ok {
		w.where[w.names[i].index] = true
	}
}

// judge says what became of the anchor's files since its day.
func (w *witness) judge(l limits, f *findings) {
	if w.a == nil {
		return
	}
	var all, gone, changed tally
	for i, item := range w.a.items {
		n := int64(item.size)
		all.add(n)
		switch {
		case w.bytes[i]:
		case w.where[i]:
			changed.add(n)
		default:
			gone.add(n)
		}
	}
	day, days := w.a.at.UTC().Format("2 January"), int(window/(24*time.Hour))
	if limit := l.cumulative(); heavy(gone, all, limit) {
		f.add("Of the files of %s, %s are gone by now, a part with each push, and %s of the bytes. Within %d days less than %d %% is usual here.",
			day, percent(gone.files, all.files), percent(gone.bytes, all.bytes), days, limit)
	}
	// Names alone: one large file that changes every day is no sign of anything.
	if limit := (100 + l.change) / 2; changed.files > few && over(changed.files, all.files, limit) {
		f.add("Of the files of %s, %s have other content by now, a part with each push. Within %d days less than %d %% is usual here.",
			day, percent(changed.files, all.files), days, limit)
	}
}
