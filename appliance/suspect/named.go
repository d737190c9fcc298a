package suspect

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"farkeep/shared/contentname"
	"farkeep/shared/generations"
	"farkeep/shared/manifest"
)

// maxFresh bounds the files whose names are compared with their content in one
// judgement, 40 bytes each: a random choice if there are more.
const maxFresh = 1 << 15

// file is one whose name is a hash.
type file struct {
	id   contentname.ID
	role contentname.Role
}

// draw is a random choice of files, each as likely as the others (reservoir sampling).
type draw struct {
	files []file
	seen  int64
}

func (d *draw) add(f file) {
	d.seen++
	if len(d.files) < maxFresh {
		d.files = append(d.files, f)
	} else if i := rand.Int64N(d.seen); i < maxFresh {
		d.files[i] = f
	}
}

// packs is what became of a repository whose files are named by their content.
type packs struct {
	layout contentname.Layout
	was    contentname.Recognizer // the generation before
	is     contentname.Recognizer
	since  *witness                       // of the packs of an earlier day
	sample *anchor                        // of those of today; nil: none is due
	fresh  draw                           // new names
	other  draw                           // names that were there, with other content
	bytes  struct{ old, new, gone tally } // of packs
	starts struct{ old, new, gone int64 } // snapshots, archives
	marks  []string                       // files that say which repository it is, and are not as they were
}

// survey goes through a repository of which a look at two names says that it may be
// one of restic or Borg 2; nil for any other. Whether it is one the whole tells.
func (j *Judge) survey(ctx context.Context, c *generations.Candidate, as *anchors) (*packs, error) {
	n := &packs{layout: contentname.Borg2, since: newWitness(as.oldest)}
	for _, probe := range []string{"config/id", "config"} {
		f, err := c.Open(probe)
		if err == nil {
			f.Close()
			break
		}
		if n.layout = contentname.Restic; probe == "config" {
			return nil, nil
		}
	}
	if as.due {
		n.sample = newAnchor(j.config.Now(), c.Offer.Entries)
	}
	err := diff(ctx, c, func(d manifest.Change) error {
		role, ok := n.take(&d)
		if d.New.Kind != manifest.File {
			return nil
		}
		n.since.see(&d.New)
		if ok && role == contentname.Pack && n.sample != nil {
			name := nameKey(n.sample.secret, d.New.Path)
			n.sample.offer(name, item{key: sumKey(&d.New), other: name, size: uint64(d.New.Size)})
		}
		return nil
	})
	return n, err
}

// named judges a repository of restic or Borg 2. What its programs do all the time
// and would be a sign of evil in a plain folder is none here: a prune rewrites the whole index, a
// backup leaves a few small packs that the next prune puts together. So packs
// count by their bytes. What they never do is a sign after one file: a name that is not
// the hash of its content.
func (j *Judge) named(ctx context.Context, c *generations.Candidate, n *packs, l limits, f *findings) error {
	checked, wrong, err := j.checkNames(ctx, c, n, f)
	if err != nil {
		return err
	}
	if c.Current != nil {
		if sudden := n.judge(l, f); !sudden {
			n.since.judgeBytes(l, f)
		}
	}
	j.log.Info("compared names with contents", "repository", c.Repository, "layout", string(n.layout), "new", n.fresh.seen, "changed", n.other.seen, "checked", checked, "wrong", wrong,
		"packs", n.bytes.new.files, "bytes", n.bytes.new.bytes, "gone", n.bytes.gone.files, "gone_bytes", n.bytes.gone.bytes)
	if len(f.reasons) == 0 && n.sample != nil {
		return n.sample.save(c.Scratch)
	}
	return nil
}

func (n *packs) take(d *manifest.Change) (role contentname.Role, ok bool) {
	if d.Relation != manifest.New {
		n.was.See(d.Old.Path, d.Old.Kind == manifest.Folder)
	}
	if d.Relation != manifest.Gone {
		n.is.See(d.New.Path, d.New.Kind == manifest.Folder)
	}
	path := d.New.Path
	if d.Relation == manifest.Gone {
		path = d.Old.Path
	}
	id, role, ok := n.layout.Claim(path)
	old, new := d.Old.Kind == manifest.File, d.New.Kind == manifest.File
	switch role {
	case contentname.Pack:
		if old {
			n.bytes.old.add(d.Old.Size)
		}
		if new {
			n.bytes.new.add(d.New.Size)
		}
		if old && !new {
			n.bytes.gone.add(d.Old.Size)
		}
	case contentname.Snapshot:
		if old {
			n.starts.old++
		}
		if new {
			n.starts.new++
		}
		if old && !new {
			n.starts.gone++
		}
	case contentname.Identity:
		if old && d.Relation != manifest.Unchanged {
			n.marks = append(n.marks, path)
		}
	}
	if !ok || !new || d.Relation == manifest.Unchanged {
		return role, ok
	}
	if old {
		n.other.add(file{id, role})
	} else {
		n.fresh.add(file{id, role})
	}
	return role, ok
}

// checkNames reads the new files, as far as the judge's patience reaches, and says
// which of them are not what their names say. Old ones were read when they were new.
func (j *Judge) checkNames(ctx context.Context, c *generations.Candidate, n *packs, f *findings) (checked, wrong int64, err error) {
	r := &nameReader{ctx: ctx, candidate: c, layout: n.layout, buf: make([]byte, 256<<10)}
	end := j.config.Now().Add(j.config.Patience)
	r.late = func() bool { return !j.config.Now().Before(end) }

	// One that was there and has other content now was, or is, not what its name
	// says. That it is right now and was rotten until now is good news, but for what
	// there is no time to read.
	for _, one := range n.other.files {
		ok, err := r.check(one)
		if err != nil && !errors.Is(err, errLate) {
			return checked, wrong, err
		}
		if checked++; !ok {
			wrong++
			f.add("%s, named by what is in them, have other content than before (such as %s). %s never changes a file: they were encrypted or overwritten, or the disk at home is failing.",
				plural(n.other.seen, "file"), short(n.layout.Path(one.role, one.id)), n.program())
			break
		}
	}

	// Few and small ones first, then in an order that nobody at home can foresee.
	rand.Shuffle(len(n.fresh.files), func(i, k int) { n.fresh.files[i], n.fresh.files[k] = n.fresh.files[k], n.fresh.files[i] })
	small := func(f file) bool { return f.role == contentname.Key || f.role == contentname.Snapshot }
	slices.SortStableFunc(n.fresh.files, func(a, b file) int {
		switch {
		case small(a) == small(b):
			return 0
		case small(a):
			return -1
		}
		return 1
	})
	var read, bad int64
	var names []string
	for _, one := range n.fresh.files {
		ok, err := r.check(one)
		if errors.Is(err, errLate) {
			break
		}
		if err != nil {
			return checked, wrong, err
		}
		if read++; !ok {
			if bad++; len(names) < namesOfFew {
				names = append(names, short(n.layout.Path(one.role, one.id)))
			}
		}
	}
	if bad > 0 {
		of := count(read)
		if read < n.fresh.seen {
			of = fmt.Sprintf("%s that were read, of %s,", of, count(n.fresh.seen))
		}
		f.add("%s of %s new files are not what their names say (%s): they were encrypted or overwritten, or the disk at home is failing.", count(bad), of, some(names, bad))
	} else if read < n.fresh.seen {
		j.log.Warn("not all new files were compared with their names: a random choice was", "repository", c.Repository, "new", n.fresh.seen, "checked", read)
	}
	return checked + read, wrong + bad, nil
}

// namesOfFew is how many of the long names a reason shows.
const namesOfFew = 2

// short is a path whose hash is cut to what a person needs to find it.
func short(path string) string {
	if i := strings.LastIndexByte(path, '/') + 1; len(path)-i > 16 {
		return path[:i+16] + "..."
	}
	return path
}

func (n *packs) program() string {
	if n.layout == contentname.Borg2 {
		return "Borg"
	}
	return "restic"
}

// nameReader compares contents with names.
type nameReader struct {
	ctx       context.Context
	candidate *generations.Candidate
	layout    contentname.Layout
	late      func() bool // patience is at its end
	likely    int         // the hash that the last names were made by
	buf       []byte
}

// errLate ends the reading, in the middle of a file too: nothing bounds its size.
var errLate = errors.New("no time is left to read it")

// check reads a file of the candidate, more than once where it is not known by which
// hash it was named: on a board the reading costs less than a hash.
func (r *nameReader) check(f file) (bool, error) {
	path := r.layout.Path(f.role, f.id)
	in, err := r.candidate.Open(path)
	if err != nil {
		return false, err
	}
	defer in.Close()
	hashes := r.layout.Hashes()
	for i := range hashes {
		n := (r.likely + i) % hashes
		if _, err := in.Seek(0, io.SeekStart); err != nil {
			return false, err
		}
		check := r.layout.NewCheck(path, n)
		for {
			if r.ctx.Err() != nil {
				return false, context.Cause(r.ctx)
			}
			if r.late() {
				return false, errLate
			}
			k, err := in.Read(r.buf)
			check.Write(r.buf[:k])
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				return false, fmt.Errorf("read %s: %w", path, err)
			}
		}
		if check.OK() {
			r.likely = n
			return true, nil
		}
	}
	return false, nil
}

// judge reports whether packs were lost all at once.
func (n *packs) judge(l limits, f *findings) (sudden bool) {
	if len(n.marks) > 0 {
		f.add("Changed or gone: %s. This is another repository, or one that cannot be opened any more: %s writes it once, and again only to migrate a repository.",
			some(n.marks[:1], int64(len(n.marks))), n.program())
	}
	start := "snapshot"
	if n.layout == contentname.Borg2 {
		start = "archive"
	}
	if n.starts.old > 0 && n.starts.new == 0 {
		f.add("Not one %s is left, of %s.", start, count(n.starts.old))
	} else if n.starts.old > 2 && n.starts.gone == n.starts.old {
		f.add("Of the %s of the generation before not one is left.", plural(n.starts.old, start))
	}
	p := &n.bytes
	// A prune may well put the few packs of a young repository together.
	sudden = p.old.files > 0 && p.new.files == 0 ||
		(p.gone.files > few || p.gone.bytes > little) && (p.gone.files == p.old.files || over(p.gone.bytes, p.old.bytes, l.vanish))
	if sudden {
		f.add("%s of %s packs are gone, %s of %s of backups (%s); less than %d %% is usual here. A prune puts together what is little used, and takes what nothing uses.",
			count(p.gone.files), count(p.old.files), size(p.gone.bytes), size(p.old.bytes), percent(p.gone.bytes, p.old.bytes), l.vanish)
	}
	return sudden
}

// judgeBytes says what became of the packs of an anchor since its day.
func (w *witness) judgeBytes(l limits, f *findings) {
	if w.a == nil {
		return
	}
	var all, gone tally
	for i, item := range w.a.items {
		all.add(int64(item.size))
		if !w.bytes[i] {
			gone.add(int64(item.size))
		}
	}
	if limit := l.cumulative(); (gone.files > few || gone.bytes > little) && over(gone.bytes, all.bytes, limit) {
		f.add("Of the packs of %s, %s of the bytes are gone by now, a part with each push. Within %d days less than %d %% is usual here.",
			w.a.at.UTC().Format("2 January"), percent(gone.bytes, all.bytes), int(window/(24*time.Hour)), limit)
	}
}
