package generations

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"

	"farkeep/shared/beneath"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"

	"golang.org/x/sys/unix"
)

// plan compares what is offered with the newest generation and with what lies in
// incoming/, and says what has to be uploaded. It removes from incoming/ what is
// of no use any more.
func (t *Transaction) plan(ctx context.Context) (Answer, error) {
	list, err := t.store.List(ctx, t.req.Repository)
	if err != nil {
		return Answer{}, err
	}
	if err := t.readDistrust(); err != nil {
		return Answer{}, err
	}
	rotten, err := t.store.openRot(t.req.Repository)
	if err != nil {
		return Answer{}, err
	}
	for sum := range rotten {
		t.distrusted[sum] = true
	}
	// A generation whose own list is damaged is no base. The one before is, and
	// costs more upload, but the push goes through.
	for _, g := range slices.Backward(list) {
		if g.Format == 0 {
			continue
		}
		answer, err := t.planOn(ctx, g)
		var side *manifest.SideError
		if errors.As(err, &side) && side.Old || errors.Is(err, ErrDamaged) {
			t.store.opt.Log.Error("a generation's list is damaged: planning without it", "repository", t.req.Repository, "generation", g.Name, "err", err)
			continue
		}
		return answer, err
	}
	return t.planOn(ctx, Generation{})
}

func (t *Transaction) planOn(ctx context.Context, base Generation) (Answer, error) {
	t.leaveBase()
	t.base = base
	var old *manifest.Reader
	if base.Name != "" {
		// It stays until the push is over, even if that takes weeks.
		dir, release, err := t.store.hold(t.req.Repository, base.Name)
		if err != nil {
			return Answer{}, fmt.Errorf("%w: %w", ErrDamaged, err)
		}
		t.release = release
		files, err := dir.Dir(FilesFolder)
		if err != nil {
			return Answer{}, fmt.Errorf("%w: %w", ErrDamaged, err)
		}
		files.Close()
		r, closer, err := t.openManifest(dir)
		if err != nil {
			return Answer{}, fmt.Errorf("%w: %w", ErrDamaged, err)
		}
		defer closer.Close()
		old = r
	}
	objects, err := t.dir.Dir(objectsFolder)
	if err != nil {
		return Answer{}, err
	}
	defer objects.Close()
	there, err := listObjects(objects)
	if err != nil {
		return Answer{}, err
	}
	halves, err := t.listBuilding()
	if err != nil {
		return Answer{}, err
	}
	new, closer, err := t.openManifest(t.dir)
	if err != nil {
		return Answer{}, err
	}
	defer closer.Close()

	t.missing = manifest.NewSet(t.req.Offer.Entries)
	t.partials = map[manifest.Sum]int64{}
	var cost cost
	var newBytes int64
	var finished []finishedFile
	answer := Answer{OfferAnswer: pushwire.OfferAnswer{Answer: pushwire.AnswerSend, Push: t.id, Base: base.Name}}
	err = manifest.Diff(old, new, func(c manifest.Change) error {
		if c.Relation == manifest.Gone {
			return nil
		}
		if c.Index >= t.req.Offer.Entries {
			return ErrOffer
		}
		if c.Index%1024 == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		e := &c.New
		if t.healing == nil {
			cost.entry(e)
		}
		switch {
		case e.Kind == manifest.Folder:
		case c.Relation == manifest.Unchanged && !t.distrusted[e.Sum]:
			if filePerm(c.Old.Mode) != filePerm(e.Mode) {
				cost.file(e.Size) // cannot share an inode: a copy
				newBytes += e.Size
			}
		case there.use(objects, e):
			newBytes += e.Size
			answer.Kept++
		default:
			t.missing.Add(c.Index)
			cost.file(e.Size)
			newBytes += e.Size
			half, ok := halves[e.Sum]
			switch {
			case !ok:
			case half.size == e.Size:
				finished = append(finished, finishedFile{*e, c.Index})
				delete(halves, e.Sum)
			case half.durable < e.Size && half.durable >= MinResume && len(answer.Resume) < pushwire.MaxPartials:
				answer.Resume = append(answer.Resume, pushwire.Partial{Index: c.Index, Have: half.durable})
				t.partials[e.Sum] = half.durable
				cost.bytes -= half.durable
				answer.NeedBytes -= half.durable
				delete(halves, e.Sum)
			}
			answer.NeedBytes += e.Size
		}
		return nil
	})
	if err != nil {
		return Answer{}, err
	}
	if err := t.matches(new.Summary()); err != nil {
		return Answer{}, err
	}
	if old != nil && old.Summary().Digest != base.Digest {
		return Answer{}, fmt.Errorf("%w: the MANIFEST of %s is not the one that its %s names", ErrDamaged, base.Name, TOMLFile)
	}
	if err := t.dropUseless(objects, there, halves); err != nil {
		return Answer{}, err
	}
	if err := t.adopt(ctx, objects, finished, &answer); err != nil {
		return Answer{}, err
	}
	if t.healing != nil {
		newBytes = 0 // they take the place of bytes that are counted already
	}
	if err := t.admit(ctx, &cost, newBytes+cost.overhead); err != nil {
		return Answer{}, err
	}
	if err := t.checkLinks(); err != nil {
		return Answer{}, err
	}
	t.overhead = cost.overhead
	h := t.req.Offer
	p := incomingPush{Format: 1, Push: t.id, Pusher: t.req.Pusher, Digest: t.digest, Entries: h.Entries, Bytes: h.Bytes, NewBytes: newBytes + cost.overhead}
	if err := t.store.writeTOML(t.dir, pushFile, p, 0o600); err != nil {
		return Answer{}, err
	}
	answer.Need, answer.Needed = t.missing.Len(), t.missing
	if base.Name != "" && len(t.distrusted) == 0 {
		// Without it nothing is copied from the base: a copy of what is rotten would
		// only be refused.
		answer.BaseDigest = base.Digest.String()
	}
	t.state = planned
	return answer, nil
}

// cost estimates what a push adds to the disk. The overhead, lists and folders,
// is a part of the bytes.
type cost struct{ bytes, overhead, inodes int64 }

const block = 4096

func (c *cost) file(size int64) {
	c.bytes += (size + block - 1) / block * block
	c.inodes++
}

// entry counts what every entry costs in a generation, linked or not: its place
// in a folder, and its lines in MANIFEST and SUMS.b2.
func (c *cost) entry(e *manifest.Entry) {
	n := 3*int64(len(e.Path)) + 160
	if e.Kind == manifest.Folder {
		n += block
		c.inodes++
	}
	c.bytes += n
	c.overhead += n
}

// admit checks quota and room, and takes note of what the push may write.
func (t *Transaction) admit(ctx context.Context, c *cost, newBytes int64) error {
	if t.req.Quota > 0 && t.healing == nil {
		used, err := t.store.stored(ctx, t.req.Pusher, t.req.Repository)
		if err != nil {
			return err
		}
		if used+newBytes > t.req.Quota {
			return &QuotaError{Key: t.req.Pusher, Quota: t.req.Quota, Used: used, Needs: newBytes}
		}
		t.used = used + newBytes
	}
	free, reserve, _, err := t.store.Space()
	if err != nil {
		return err
	}
	space, err := t.store.root.Space()
	if err != nil {
		return err
	}
	if over := t.promise(c, &space, free, reserve); over != nil {
		t.noRoom(ctx, over)
		return over
	}
	return nil
}

// more admits a copy of n bytes that the plan did not know of, unless it was made.
func (t *Transaction) more(ctx context.Context, n int64, made bool) error {
	if made {
		return nil
	}
	if t.req.Quota > 0 && t.used+n > t.req.Quota {
		return &QuotaError{Key: t.req.Pusher, Quota: t.req.Quota, Used: t.used, Needs: n}
	}
	t.used += n
	free, reserve, _, err := t.store.Space()
	if err != nil {
		return err
	}
	if n > free {
		over := &SpaceError{What: "bytes", Needs: n, Has: free, Reserve: reserve}
		t.noRoom(ctx, over)
		return over
	}
	return nil
}

// promise takes note of what the push may write, if there is room.
func (t *Transaction) promise(c *cost, space *beneath.Space, free, reserve int64) *SpaceError {
	t.store.mu.Lock()
	defer t.store.mu.Unlock()
	var others int64
	for other, bytes := range t.store.promised {
		if other != t {
			others += bytes
		}
	}
	if c.bytes+others > free {
		return &SpaceError{What: "bytes", Needs: c.bytes + others, Has: free, Reserve: reserve}
	}
	if space.Inodes >= 0 && c.inodes+16 > space.Inodes {
		return &SpaceError{What: "inodes", Needs: c.inodes + 16, Has: space.Inodes}
	}
	t.store.promised[t] = c.bytes
	return nil
}

// wrote takes n bytes off what the push may still write.
func (t *Transaction) wrote(n int64) {
	t.store.mu.Lock()
	defer t.store.mu.Unlock()
	if left, ok := t.store.promised[t]; ok {
		t.store.promised[t] = max(left-n, 0)
	}
}

// checkLinks makes sure now, and not after a week of upload, that the file
// system has hard links.
func (t *Transaction) checkLinks() error {
	const probe = ".links"
	if err := t.dir.RemoveAll(probe); err != nil {
		return err
	}
	if err := t.dir.Link(t.dir, ManifestFile, probe); err != nil {
		return fmt.Errorf("this file system cannot hold generations, it has no hard links: %w", err)
	}
	return t.dir.Remove(probe)
}

// objectList is what lies in objects/, by the first 64 bits of the hash: a
// million objects cost 8 MB and not 32. That two hashes share 64 bits is caught
// by use, which asks for the whole name.
type objectList struct {
	keys   []uint64
	wanted []bool
}

func listObjects(dir *beneath.Dir) (*objectList, error) {
	l := &objectList{}
	err := dir.Each(func(e fs.DirEntry) error {
		sum, err := sumOfName(e.Name())
		if err != nil {
			return dir.RemoveAll(e.Name())
		}
		l.keys = append(l.keys, binary.BigEndian.Uint64(sum[:8]))
		return nil
	})
	slices.Sort(l.keys)
	l.wanted = make([]bool, len(l.keys))
	return l, err
}

func (l *objectList) find(sum manifest.Sum) (int, bool) {
	return slices.BinarySearch(l.keys, binary.BigEndian.Uint64(sum[:8]))
}

// use reports whether the object for e is there, and marks it as wanted.
func (l *objectList) use(dir *beneath.Dir, e *manifest.Entry) bool {
	i, ok := l.find(e.Sum)
	if !ok || !regularOfSize(dir, e.Sum.String(), e.Size) {
		return false
	}
	l.wanted[i] = true
	return true
}

func sumOfName(name string) (sum manifest.Sum, err error) {
	err = sum.UnmarshalText([]byte(name))
	if err == nil && sum.String() != name {
		err = errors.New("not in small letters")
	}
	return sum, err
}

// dropUseless removes complete and half-built files that the offer has no use for.
func (t *Transaction) dropUseless(objects *beneath.Dir, there *objectList, halves map[manifest.Sum]half) error {
	if slices.Contains(there.wanted, false) {
		err := objects.Each(func(e fs.DirEntry) error {
			sum, err := sumOfName(e.Name())
			if err != nil {
				return nil
			}
			if i, ok := there.find(sum); ok && there.wanted[i] {
				return nil
			}
			return objects.RemoveAll(e.Name())
		})
		if err != nil {
			return err
		}
	}
	building, err := t.dir.Dir(buildingFolder)
	if err != nil {
		return err
	}
	defer building.Close()
	for sum := range halves {
		if err := building.RemoveAll(sum.String()); err != nil {
			return err
		}
	}
	return nil
}

// maxHalf bounds how many half-built files are considered: a batch that a power
// cut caught between its sync and its renames, and what was cut.
const maxHalf = 2*batchFiles + pushwire.MaxPartials

// half is a file in building/.
type half struct {
	size    int64
	durable int64 // of it, what a power cut cannot have touched
}

// listBuilding returns the half-built files.
func (t *Transaction) listBuilding() (map[manifest.Sum]half, error) {
	building, err := t.dir.Dir(buildingFolder)
	if err != nil {
		return nil, err
	}
	defer building.Close()
	if t.durable, err = t.readCheckpoints(); err != nil {
		return nil, err
	}
	files := map[manifest.Sum]half{}
	err = building.Each(func(e fs.DirEntry) error {
		sum, err := sumOfName(e.Name())
		if err != nil || len(files) == maxHalf || !e.Type().IsRegular() {
			return building.RemoveAll(e.Name())
		}
		st, err := building.Stat(e.Name())
		files[sum] = half{st.Size, min(t.durable[sum], st.Size)}
		return err
	})
	return files, err
}

// finishedFile lies in building/ with its full size.
type finishedFile struct {
	manifest.Entry
	index int64
}

// adopt takes files that were complete when the last push was cut, but not yet
// filed: it hashes what the disk has of them, and files those that are right. The
// page cache cannot be asked: when a write-out failed it keeps the bytes that the
// disk does not have, and whoever opens the file system afterwards is not told.
func (t *Transaction) adopt(ctx context.Context, objects *beneath.Dir, files []finishedFile, answer *Answer) error {
	if len(files) == 0 {
		return nil
	}
	building, err := t.dir.Dir(buildingFolder)
	if err != nil {
		return err
	}
	defer building.Close()
	if err := t.dir.SyncFS(); err != nil {
		return err
	}
	good := files[:0]
	buf := make([]byte, 256<<10)
	for _, f := range files {
		err := readBack(ctx, building, &f.Entry, buf)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			if err := building.RemoveAll(f.Sum.String()); err != nil {
				return err
			}
			continue
		}
		good = append(good, f)
	}
	for _, f := range good {
		if err := building.Rename(f.Sum.String(), objects, f.Sum.String()); err != nil {
			return err
		}
		t.missing.Remove(f.index)
		answer.NeedBytes -= f.Size
		answer.Kept++
	}
	return nil
}

// readBack compares a file with what it should be, as it is on the disk: what was
// written to it must have been synced.
func readBack(ctx context.Context, dir *beneath.Dir, e *manifest.Entry, buf []byte) error {
	f, st, err := dir.Open(e.Sum.String())
	if err != nil {
		return err
	}
	defer f.Close()
	if st.Size != e.Size {
		return fmt.Errorf("%w: %s has %d bytes, not %d", ErrDamaged, f.Name(), st.Size, e.Size)
	}
	unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
	return ReadSum(ctx, f, e.Size, e.Sum, buf)
}

// readCheckpoints loads the durable lengths of half-built files.
func (t *Transaction) readCheckpoints() (map[manifest.Sum]int64, error) {
	lengths := map[manifest.Sum]int64{}
	data, err := t.dir.ReadFile(checkpointFile, 64<<10)
	if errors.Is(err, fs.ErrNotExist) {
		return lengths, nil
	}
	if err != nil {
		return nil, err
	}
	for line := range bytes.Lines(data) {
		name, length, _ := bytes.Cut(bytes.TrimSuffix(line, []byte("\n")), []byte(" "))
		sum, err := sumOfName(string(name))
		n, nerr := strconv.ParseInt(string(length), 10, 64)
		if err == nil && nerr == nil && n > 0 {
			lengths[sum] = n
		}
	}
	return lengths, nil
}

// checkpoint takes note that the first n bytes of a half-built file are durable.
func (t *Transaction) checkpoint(sum manifest.Sum, n int64) error {
	if _, ok := t.durable[sum]; !ok && len(t.durable) > pushwire.MaxPartials {
		clear(t.durable) // as many as are offered to resume are enough
	}
	t.durable[sum] = n
	var text []byte
	for sum, n := range t.durable {
		text = fmt.Appendf(text, "%v %d\n", sum, n)
	}
	return t.store.writeFile(t.dir, checkpointFile, text, 0o600)
}

// readDistrust loads the hashes that may not be linked from the base.
func (t *Transaction) readDistrust() error {
	t.distrusted = map[manifest.Sum]bool{}
	data, err := t.dir.ReadFile(distrustFile, maxDistrust*65)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	for line := range bytes.Lines(data) {
		sum, err := sumOfName(string(bytes.TrimSuffix(line, []byte("\n"))))
		if err == nil {
			t.distrusted[sum] = true
		}
	}
	return nil
}

// distrust takes note that the base no longer holds the right bytes of e: the
// next offer asks for them.
func (t *Transaction) distrust(sums map[manifest.Sum]bool) error {
	var text []byte
	for sum := range sums {
		if len(text) >= maxDistrust*65 {
			break
		}
		text = append(hex.AppendEncode(text, sum[:]), '\n')
	}
	return t.store.writeFile(t.dir, distrustFile, text, 0o600)
}
