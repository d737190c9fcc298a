package suspect

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"farkeep/shared/borgconfig"
	"farkeep/shared/borgsegment"
	"farkeep/shared/generations"
)

// few chunks may always go: in a repository that is hardly older than its second
// archive they are a large share.
const few = 16

// maxEntries bounds the segments' entries that are compared: ten times what a 4 TB
// repository has. They take 512 MB of index and 100 turns of a table.
const maxEntries = 1 << 25

var errTooMany = errors.New("the new segments have more entries than a backup needs")

// named is how many files a reason names.
const named = 3

func (j *Judge) borg(ctx context.Context, c *generations.Candidate, l limits, f *findings) error {
	p, err := look(ctx, c)
	if err != nil {
		return err
	}
	if err := identity(c, p, f); err != nil {
		return err
	}
	hadSegments, _ := p.has(inOld)
	hasSegments, _ := p.has(inNew)
	if hasSegments == 0 {
		if hadSegments > 0 || p.newIndex >= 0 {
			f.add("The folder data/ is gone or empty: there is not one segment file left of %s.", count(hadSegments))
		}
		return nil
	}
	if err := j.marks(ctx, c, p, f); err != nil {
		return err
	}
	changed(p, f)
	p.trim()

	for again := false; ; again = true {
		attempt := &findings{reasons: slices.Clone(f.reasons)}
		err := j.chunks(ctx, c, p, l, attempt)
		if !errors.Is(err, errDamaged) || again {
			*f = *attempt
			return err
		}
		j.log.Warn("the index of segments is damaged and made anew", "repository", c.Repository)
		if err := c.Scratch.RemoveAll(packFile); err != nil {
			return err
		}
	}
}

// identity checks that it is the same repository as before, and says of itself what
// the pusher says of it.
func identity(c *generations.Candidate, p *picture, f *findings) error {
	if !p.config {
		f.add("The file config is gone: without it no borg opens the repository.")
		return nil
	}
	file, err := c.Open("config")
	if err != nil {
		return err
	}
	defer file.Close()
	text, err := io.ReadAll(io.LimitReader(file, borgconfig.MaxSize+1))
	if err != nil {
		return err
	}
	config, err := borgconfig.Parse(text)
	if err != nil {
		f.add("The file config is not one of borg's any more: %.120v.", err)
		return nil
	}
	was := ""
	if c.Current != nil {
		was = c.Current.RepositoryID
	}
	switch {
	case was != "" && config.ID != was:
		f.add("This is another repository: its id is %.16s..., and was %.16s... until now. Somebody put another one in its place, or made it anew.", config.ID, was)
	case c.Offer.RepositoryID != config.ID:
		// The next push is compared with what was offered.
		f.add("The pusher says that the id of this repository is %.16q, and its config says %.16s....", c.Offer.RepositoryID, config.ID)
	}
	return nil
}

// marks finds where the committed part of both generations ends.
func (j *Judge) marks(ctx context.Context, c *generations.Candidate, p *picture, f *findings) (err error) {
	if p.newMark, err = p.committed(ctx, inNew, p.newIndex, c.Open); err != nil {
		return err
	}
	p.oldMark = -1
	if c.Current != nil {
		if p.oldMark, err = p.committed(ctx, inOld, p.oldIndex, c.OpenOld); err != nil {
			return err
		}
	}
	if p.newMark < 0 {
		f.add("Not one segment holds a commit that borg would accept: to borg this repository is empty.")
		return nil
	}
	if p.newMark != p.newIndex {
		return nil // borg was cut before it wrote its index; committed has read the segment
	}
	for i := range p.segments {
		s := &p.segments[i]
		if s.where&inNew != 0 && int64(s.number) == p.newMark {
			ok, err := check(ctx, s, c.Open, borgsegment.EndsWithCommit)
			if err != nil {
				return err
			}
			if !ok {
				f.add("The newest commit is not one of borg's any more: %s does not end as borg ends it.", s.path())
			}
			return nil
		}
	}
	f.add("The segment of the newest commit is gone: there is an index.%d, and no segment %d.", p.newMark, p.newMark)
	return nil
}

// changed looks for committed segments with other bytes than before: borg never
// writes to one again.
func changed(p *picture, f *findings) {
	var n, old int64
	var names []string
	for i := range p.segments {
		s := &p.segments[i]
		if s.where&inOld == 0 || int64(s.number) > p.oldMark {
			continue
		}
		old++
		if s.where == inOld && i+1 < len(p.segments) && p.segments[i+1].number == s.number {
			if n++; len(names) < named {
				names = append(names, s.path())
			}
		}
	}
	if n > 0 {
		f.add("%s of %s that were final have other bytes now (%s). Borg never changes them, except in \"check --repair\": a disk at home is failing, or somebody overwrites the backup.",
			plural(n, "segment"), count(old), some(names, n))
	}
}

// chunks compares what is alive, after it has made sure that there is an index of
// every segment.
func (j *Judge) chunks(ctx context.Context, c *generations.Candidate, p *picture, l limits, f *findings) error {
	k, err := openPack(c.Scratch)
	if err != nil {
		return err
	}
	defer k.close()
	x := &indexer{ctx: ctx, pack: k, candidate: c, most: 2 * j.most}
	before := k.end
	missing, err := x.index(p, j.config.Patience, j.config.Now)
	if err != nil {
		if errors.Is(err, errTooMany) {
			// What it wrote until then must not stay.
			err = errors.Join(err, k.file.Truncate(before))
		}
		return err
	}
	if x.broken > 0 {
		what := "1 new file is no segment"
		if x.broken > 1 {
			what = count(x.broken) + " new files are no segments"
		}
		f.add("%s of borg's (%s): encrypted or overwritten by something else, or the disk at home is failing.", what, some(x.names, x.broken))
	}
	if missing > 0 {
		j.log.Info("segments have no index yet, their chunks are not compared", "repository", c.Repository, "segments", missing)
		fewerBytes(p, l, f)
	}
	old, all := k.total(p.segments, inOld), k.total(p.segments, inOld|inNew)
	if all > j.most {
		if c.Current != nil && old <= j.most {
			f.add("The segments have %s entries now, up from %s, more than this appliance can compare: from here on it only looks at sizes. Is that what your backups do?", count(all), count(old))
		}
		j.log.Warn("too many entries, chunks are not compared", "repository", c.Repository, "entries", all)
		fewerBytes(p, l, f)
		return k.sweep(p.segments)
	}
	as, err := openAnchors(c.Scratch, j.config.Now(), c.Current)
	if err != nil {
		return err
	}
	var fresh *anchor
	if as.due && missing == 0 {
		fresh = newAnchor(j.config.Now(), all)
	}
	var r comparison
	var lost, sampled totals
	err = each(ctx, k, p.segments, j.bits, func(s span, t *table) {
		r.take(t, fresh)
		if s.first == 0 {
			r.oldManifest, r.newManifest = t.manifest[0] != 0, t.manifest[1] != 0
		}
		if as.oldest != nil {
			for _, i := range as.oldest.within(s) {
				sampled.chunks++
				sampled.bytes += int64(i.size)
				if !t.has(i.key, i.size<<32|i.other) {
					lost.chunks++
					lost.bytes += int64(i.size)
				}
			}
		}
	})
	if err != nil {
		return err
	}
	if c.Current != nil {
		if sudden := r.judge(l, f); !sudden && as.oldest != nil {
			slowly(as.oldest, lost, sampled, l, f)
		}
	}
	j.log.Info("compared chunks", "repository", c.Repository, "segments", len(p.segments), "read", x.read, "alive", r.new.chunks, "bytes", r.new.bytes,
		"vanished", r.vanished.chunks, "vanished_bytes", r.vanished.bytes, "rewritten", r.rewritten.chunks, "added", r.added.chunks, "lost_of_sample", lost.chunks, "sample", sampled.chunks)
	if fresh != nil && len(f.reasons) == 0 {
		if err := fresh.save(c.Scratch); err != nil {
			return err
		}
	}
	return k.sweep(p.segments)
}

// take adds one part of the keys.
func (r *comparison) take(t *table, fresh *anchor) {
	for i, key := range t.key {
		if key == 0 {
			continue
		}
		old, new := t.old[i], t.new[i]
		if old != 0 {
			r.old.add(old)
		}
		if new != 0 {
			r.new.add(new)
			if fresh != nil {
				fresh.offer(mix(key, fresh.secret), item{key: key, size: new >> 32, other: new & 0xffffffff})
			}
		}
		switch {
		case old != 0 && new == 0:
			r.vanished.add(old)
		case old == 0 && new != 0:
			r.added.add(new)
		case old != new:
			r.rewritten.add(old)
		}
	}
}

// judge reports whether chunks were lost all at once.
func (r *comparison) judge(l limits, f *findings) (sudden bool) {
	if r.oldManifest && !r.newManifest {
		f.add("The table of archives is gone from the repository: not one archive can be listed any more.")
	}
	// Together: a thief would take some of each.
	lost := totals{r.vanished.chunks + r.rewritten.chunks, r.vanished.bytes + r.rewritten.bytes}
	everything := lost.chunks > 0 && lost.chunks == r.old.chunks
	sudden = everything || lost.chunks > few && (over(lost.chunks, r.old.chunks, l.vanish) || over(lost.bytes, r.old.bytes, l.vanish))
	if sudden && r.vanished.chunks > 0 {
		f.add("%s of %s chunks (%s) that archives used are gone, %s of %s. A usual prune takes less than %d %%: many archives were deleted, or segments are missing.",
			count(r.vanished.chunks), count(r.old.chunks), percent(r.vanished.chunks, r.old.chunks), size(r.vanished.bytes), size(r.old.bytes), l.vanish)
	}
	if sudden && r.rewritten.chunks > 0 {
		f.add("%s of %s chunks (%s) have other data under their old names, %s of %s. Only \"borg recreate --recompress\" does that; otherwise somebody puts junk in their place.",
			count(r.rewritten.chunks), count(r.old.chunks), percent(r.rewritten.chunks, r.old.chunks), size(r.rewritten.bytes), size(r.old.bytes))
	}
	return sudden
}

// slowly judges what was lost since an anchor.
func slowly(a *anchor, lost, sampled totals, l limits, f *findings) {
	limit := l.cumulative()
	if lost.chunks > few && (over(lost.chunks, sampled.chunks, limit) || over(lost.bytes, sampled.bytes, limit)) {
		f.add("Of what archives used on %s, %s of the chunks and %s of the bytes are gone or replaced by now, a part with each push. Within %d days less than %d %% is usual.",
			a.at.UTC().Format("2 January"), percent(lost.chunks, sampled.chunks), percent(lost.bytes, sampled.bytes), int(window/(24*time.Hour)), limit)
	}
}

// fewerBytes is what can be said of segments without an index.
func fewerBytes(p *picture, l limits, f *findings) {
	_, old := p.has(inOld)
	_, new := p.has(inNew)
	if over(old-new, old, l.cumulative()) {
		f.add("The repository shrank from %s to %s. Not all of its chunks could be compared yet, so this may be a compaction after a large prune.", size(old), size(new))
	}
}

// indexer reads segments into the pack.
type indexer struct {
	ctx       context.Context
	pack      *pack
	candidate *generations.Candidate
	readers   [2]*borgsegment.Reader // by mode
	records   []record
	read      int   // segments
	entries   int64 // that were read
	most      int64 // of them
	broken    int64 // new files that are no segments
	names     []string
}

// index makes sure that the pack has every segment of p, and returns how many it
// does not have because patience ended.
//
// What is new to this generation is read whole, whatever it takes: it came over a
// line that is slower than the disk. What is not new and has no index yet is read by
// its headers, and so is everything of a first generation, which may be terabytes:
// there is nothing that it could be compared with.
func (x *indexer) index(p *picture, patience time.Duration, now func() time.Time) (missing int, err error) {
	first := x.candidate.Current == nil
	var later []int
	for i := range p.segments {
		s := &p.segments[i]
		blocks := x.pack.find(s.number, s.id)
		fresh := s.where == inNew && !first
		switch {
		case blocks != nil && (!fresh || blocks[0].flags&(flagChecked|flagBroken) != 0):
			if fresh && blocks[0].flags&flagBroken != 0 {
				x.bad(s, "")
			}
		case fresh:
			if err := x.add(s, borgsegment.Checked); err != nil {
				return 0, err
			}
		default:
			later = append(later, i)
		}
	}
	start := now()
	// The newest first: of a chunk that is known then, all that became of it is
	// known as well, so that what has an index can be compared without the rest.
	for n, i := range slices.Backward(later) {
		if now().Sub(start) > patience {
			missing = n + 1
			break
		}
		if err := x.add(&p.segments[i], borgsegment.Headers); err != nil {
			return 0, err
		}
	}
	if x.pack.unread {
		x.pack.sort()
	}
	return missing, nil
}

// bad notes a new file that is no segment.
func (x *indexer) bad(s *segment, why string) {
	if x.broken++; len(x.names) < named {
		name := s.path()
		if why != "" {
			name += ": " + why
		}
		x.names = append(x.names, name)
	}
}

// add reads one segment.
func (x *indexer) add(s *segment, mode borgsegment.Mode) error {
	if err := x.ctx.Err(); err != nil {
		return err
	}
	open := x.candidate.Open
	if s.where&inNew == 0 {
		open = x.candidate.OpenOld
	}
	file, err := open(s.path())
	if err != nil {
		return err
	}
	defer file.Close()
	err = x.segment(s, file, mode)
	x.read++
	var format *borgsegment.FormatError
	if errors.As(err, &format) {
		if s.where == inNew {
			x.bad(s, fmt.Sprintf("%.60v", format))
		}
		return x.pack.append(block{number: s.number, id: s.id, flags: flagLast | flagBroken}, nil)
	}
	if err != nil {
		return fmt.Errorf("read %s: %w", s.path(), err)
	}
	return nil
}

func (x *indexer) segment(s *segment, file *os.File, mode borgsegment.Mode) error {
	if x.readers[mode] == nil {
		x.readers[mode] = borgsegment.NewReader(mode)
	}
	if x.records == nil {
		x.records = make([]record, 0, maxRecords)
	}
	r := x.readers[mode]
	r.Reset(reader{x.ctx, file}, s.size)
	b := block{number: s.number, id: s.id}
	if mode == borgsegment.Checked {
		b.flags = flagChecked
	}
	records := x.records[:0]
	var e borgsegment.Entry
	for r.Next(&e) {
		if e.Tag == borgsegment.Commit {
			continue
		}
		if len(records) == cap(records) {
			if err := x.pack.append(b, records); err != nil {
				return err
			}
			b.part++
			records = records[:0]
		}
		if x.entries++; x.entries > x.most {
			return errTooMany
		}
		records = append(records, recordOf(&e))
	}
	if err := r.Err(); err != nil {
		return err
	}
	b.flags |= flagLast
	return x.pack.append(b, records)
}
