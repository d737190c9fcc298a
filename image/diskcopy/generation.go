package diskcopy

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"farkeep/shared/beneath"
	"farkeep/shared/generations"
	"farkeep/shared/manifest"

	"golang.org/x/sys/unix"
)

// work is the copying of one generation.
type work struct {
	*copier
	repository string
	g          *generations.Generation
	before     string
	stage      *beneath.Dir
	stack      []level
	done       int64 // items that an earlier run made durable
	item       int64
	twins      *twins
	lost       map[uint64]string // inodes that cannot be read, with the reason; bounded
	bare       bool              // no list of it is whole: the new disk will not say what it lacks

	// What is not durable yet.
	fresh []fresh
	bytes int64
	since time.Time
}

// level is a folder on the way to the current one: on both disks, in this
// generation and in the one before.
type level struct {
	path                string
	src, dst, old, twin *beneath.Dir // twin: of old, on the new disk; old and twin may be nil
}

// fresh is a file that was written and is to be read back.
type fresh struct {
	path string // in the stage
	size int64
	sum  manifest.Sum
}

// item is one name of a generation.
type item struct {
	path   string
	folder bool
	sum    manifest.Sum
	known  bool   // the sum is what it must be
	perm   uint32 // on the disk; 0: not known
}

// generation copies g into the folder to, next to the generation before, "" for none.
func (c *copier) generation(to *beneath.Dir, repository string, g *generations.Generation, before string) error {
	w := &work{copier: c, repository: repository, g: g, before: before, lost: map[uint64]string{}, since: time.Now()}
	c.report.Repository, c.report.Generation = repository, g.Name
	c.tell()
	src, err := c.src.OpenGeneration(repository, g.Name)
	if err != nil {
		return w.leaveOut(err, generations.FilesFolder)
	}
	defer src.Close()
	if m := c.readMark(); m.Repository == repository && m.Generation == g.Name {
		w.done = m.Items
	} else {
		if err := c.work.RemoveAll(stageFolder); err != nil {
			return err
		}
		if err := c.writeMark(mark{Repository: repository, Generation: g.Name}); err != nil {
			return err
		}
	}
	if w.stage, _, err = c.work.MakeDir(stageFolder, 0o755); err != nil {
		return err
	}
	defer w.stage.Close()
	if err := w.run(src); err != nil {
		return err
	}
	parent, err := c.from.Dir(generations.GenerationsFolder + "/" + repository)
	if err != nil {
		return err
	}
	defer parent.Close()
	st, err := parent.Stat(g.Name)
	if err != nil {
		return err
	}
	if err := c.owned(c.work, stageFolder, st); err != nil {
		return err
	}
	if err := c.work.RenameNew(stageFolder, to, g.Name); err != nil {
		return &targetError{err}
	}
	c.tell()
	return to.Sync()
}

// leaveOut is lose for what belongs to this generation.
func (w *work) leaveOut(err error, path string) error {
	return w.lose(err, Loss{Repository: w.repository, Generation: w.g.Name, Path: path})
}

// leaveFile is leaveOut for a file, which another copy may still bring if a list
// names it, or for a folder of files.
func (w *work) leaveFile(err error, path string) error {
	return w.lose(err, Loss{Repository: w.repository, Generation: w.g.Name, Path: path, file: !w.bare})
}

func (w *work) run(src *beneath.Dir) error {
	list, sums, err := w.lists(src)
	if err != nil {
		return err
	}
	files, err := src.Dir(generations.FilesFolder)
	if err != nil && !w.bare { // else eachFound tells
		// Its files may be those of other generations.
		if err := w.leaveFile(err, generations.FilesFolder); err != nil {
			return err
		}
	}
	dst, _, err := w.stage.MakeDir(generations.FilesFolder, 0o755)
	if err != nil {
		files.Close()
		return &targetError{err}
	}
	if files != nil {
		if err := w.like(src, w.stage, generations.FilesFolder); err != nil {
			return err
		}
	}
	first := level{src: files, dst: dst}
	if w.before != "" {
		if old, err := w.copier.src.OpenGeneration(w.repository, w.before); err == nil {
			first.old, _ = old.Dir(generations.FilesFolder)
			old.Close()
		}
		if twin, err := w.copier.dst.OpenGeneration(w.repository, w.before); err == nil {
			first.twin, _ = twin.Dir(generations.FilesFolder)
			twin.Close()
		}
	}
	w.stack = append(w.stack, first)
	defer func() {
		for len(w.stack) > 0 {
			w.leave()
		}
	}()
	if err := list(w.take); err != nil {
		return err
	}
	if err := w.flush(true); err != nil {
		return err
	}
	for _, name := range []string{generations.SumsFile, generations.ManifestFile, generations.TOMLFile} {
		if err := w.copyList(src, name, sums[name]); err != nil {
			return err
		}
	}
	if err := w.to.SyncFS(); err != nil {
		return &targetError{err}
	}
	return nil
}

// lists looks at the generation's own lists before anything is believed of them,
// and returns how to go through its names, and which lists are good.
func (w *work) lists(src *beneath.Dir) (each func(func(item) error) error, good map[string]bool, err error) {
	good = map[string]bool{generations.TOMLFile: w.g.Format != 0}
	if w.g.Format == 0 {
		if err := w.leaveOut(errors.New("it cannot be read, or says something else than the folder's name"), generations.TOMLFile); err != nil {
			return nil, nil, err
		}
	}
	w.twins = &twins{bits: make([]uint64, twinBits/64), dup: map[uint64]struct{}{}, first: map[uint64][]twin{}}
	err = w.eachManifest(src, true, func(i item) error {
		w.twins.count(&i)
		return nil
	})
	if err == nil {
		good[generations.ManifestFile] = true
		if err := w.sumsAgree(src); err != nil {
			if err := w.leaveOut(err, generations.SumsFile); err != nil {
				return nil, nil, err
			}
		} else {
			good[generations.SumsFile] = true
		}
		return func(take func(item) error) error { return w.eachManifest(src, false, take) }, good, nil
	}
	if err := w.leaveOut(err, generations.ManifestFile); err != nil {
		return nil, nil, err
	}
	// Next best: the list for people.
	w.twins = nil
	good[generations.SumsFile] = true
	_, err = w.eachSum(src, func(item) error { return nil })
	var damaged *sumsError
	if !errors.As(err, &damaged) {
		return func(take func(item) error) error { return second(w.eachSum(src, take)) }, good, err
	}
	good[generations.SumsFile] = false
	w.bare, w.done = true, 0
	if err := w.leaveOut(damaged.err, generations.SumsFile); err != nil {
		return nil, nil, err
	}
	// And then what the disk shows.
	return func(take func(item) error) error {
		last, err := w.eachSum(src, take)
		if err != nil && !errors.As(err, &damaged) {
			return err
		}
		return w.eachFound(src, last, take)
	}, good, nil
}

// eachManifest calls take for each entry. check makes sure that the list is the
// one that generation.toml names.
func (w *work) eachManifest(src *beneath.Dir, check bool, take func(item) error) error {
	f, _, err := src.Open(generations.ManifestFile)
	if err != nil {
		return err
	}
	defer f.Close()
	r := manifest.NewReader(w.Reader(f))
	for {
		if w.ctx.Err() != nil {
			return w.ctx.Err()
		}
		e, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		i := item{path: e.Path, folder: e.Kind == manifest.Folder, sum: e.Sum, known: true, perm: generations.FilePerm(e.Mode)}
		if err := take(i); err != nil {
			return err
		}
	}
	if d := r.Summary().Digest; check && w.g.Format != 0 && d != w.g.Digest {
		return fmt.Errorf("%w: %v, %s says %v", errDigest, d, generations.TOMLFile, w.g.Digest)
	}
	return nil
}

var errDigest = errors.New("its digest is another one")

// sumsAgree compares SUMS.b2 with the manifest.
func (w *work) sumsAgree(src *beneath.Dir) error {
	f, _, err := src.Open(generations.SumsFile)
	if err != nil {
		return err
	}
	defer f.Close()
	r := bufio.NewReaderSize(w.Reader(f), 256<<10)
	var line, got []byte
	err = w.eachManifest(src, false, func(i item) error {
		if i.folder {
			return nil
		}
		line = generations.AppendSum(line[:0], &manifest.Entry{Path: i.path, Sum: i.sum})
		got = append(got[:0], line...)
		if _, err := io.ReadFull(r, got); err != nil {
			return err
		}
		if !bytes.Equal(got, line) {
			return fmt.Errorf("the line of %q is not as it should be", i.path)
		}
		return nil
	})
	if err == nil {
		if _, end := r.ReadByte(); end == nil {
			err = fmt.Errorf("it lists more than %s", generations.ManifestFile)
		}
	}
	return err
}

// sumsError: SUMS.b2 cannot be read, or not be believed, from some line on.
type sumsError struct{ err error }

func (e *sumsError) Error() string { return e.err.Error() }

// eachSum calls take for each file in SUMS.b2, and for the folders above them, and
// returns the last that it could read.
func (w *work) eachSum(src *beneath.Dir, take func(item) error) (last string, err error) {
	f, _, err := src.Open(generations.SumsFile)
	if err != nil {
		return "", &sumsError{err}
	}
	defer f.Close()
	lines := bufio.NewScanner(w.Reader(f))
	lines.Buffer(make([]byte, 64<<10), 64<<10)
	for lines.Scan() {
		if w.ctx.Err() != nil {
			return last, w.ctx.Err()
		}
		i, err := parseSum(lines.Text())
		if err == nil && last != "" && manifest.ComparePaths(last, i.path) >= 0 {
			err = fmt.Errorf("%q comes after %q", i.path, last)
		}
		if err != nil {
			return last, &sumsError{err}
		}
		for at := range len(i.path) {
			if i.path[at] != '/' || strings.HasPrefix(last, i.path[:at+1]) {
				continue
			}
			if err := take(item{path: i.path[:at], folder: true}); err != nil {
				return last, err
			}
		}
		last = i.path
		if err := take(i); err != nil {
			return last, err
		}
	}
	if err := lines.Err(); err != nil {
		return last, &sumsError{err}
	}
	return last, nil
}

// eachFound calls take for each name after last that the disk shows, in the order
// of a list: what there is where no list says what there should be. Nothing can be
// compared with anything then, and that is told.
func (w *work) eachFound(src *beneath.Dir, last string, take func(item) error) error {
	found := 0
	files, err := src.Dir(generations.FilesFolder)
	if err == nil {
		err = w.walk(files, "", last, func(i item) error {
			if !i.folder {
				found++
			}
			return take(i)
		})
		files.Close()
		if err != nil {
			return err
		}
		err = errors.New("no list says what else belongs to it")
	}
	err = fmt.Errorf("%s; %d files came over as the disk shows them, compared with nothing", text(err), found)
	return w.leaveOut(err, generations.FilesFolder)
}

// walk is eachFound for a folder. It holds the names of the folders on the way.
func (w *work) walk(dir *beneath.Dir, path, last string, take func(item) error) error {
	var entries []fs.DirEntry
	err := dir.Each(func(e fs.DirEntry) error {
		entries = append(entries, e)
		return w.ctx.Err()
	})
	if err != nil {
		if err := w.leaveOut(err, path); err != nil {
			return err
		}
	}
	slices.SortFunc(entries, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	for _, e := range entries {
		below := e.Name()
		if path != "" {
			below = path + "/" + below
		}
		if manifest.CheckPath(below) != nil {
			continue // no push made it
		}
		after := last == "" || manifest.ComparePaths(last, below) < 0
		if !e.IsDir() {
			if !after {
				continue
			}
			if err := take(item{path: below}); err != nil {
				return err
			}
			continue
		}
		if !after && !strings.HasPrefix(last, below+"/") {
			continue
		}
		if err := take(item{path: below, folder: true}); err != nil {
			return err
		}
		sub, err := dir.Dir(e.Name())
		if err != nil {
			continue // told by take
		}
		err = w.walk(sub, below, last, take)
		sub.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// parseSum reads a line as b2sum writes it (coreutils 9, "file name escaping").
func parseSum(text string) (i item, err error) {
	line, escaped := strings.CutPrefix(text, `\`)
	sum, path, ok := strings.Cut(line, "  "+generations.FilesFolder+"/")
	if !ok || len(sum) != 2*len(i.sum) {
		return i, fmt.Errorf("%.80q is not a line of %s", line, generations.SumsFile)
	}
	if _, err := hex.Decode(i.sum[:], []byte(sum)); err != nil {
		return i, fmt.Errorf("%.80q is not a line of %s", line, generations.SumsFile)
	}
	if escaped {
		path = strings.NewReplacer(`\\`, `\`, `\r`, "\r", `\n`, "\n").Replace(path)
	}
	i.path, i.known = path, true
	if err := manifest.CheckPath(path); err != nil {
		return i, err
	}
	if again := generations.AppendSum(nil, &manifest.Entry{Path: path, Sum: i.sum}); string(again) != text+"\n" {
		return i, fmt.Errorf("%.80q is not how %s writes that name", text, generations.SumsFile)
	}
	return i, nil
}

// copyList copies one of the generation's own lists. A SUMS.b2 that is not good is
// written anew from the manifest.
func (w *work) copyList(src *beneath.Dir, name string, good bool) error {
	if err := w.stage.RemoveAll(name); err != nil {
		return &targetError{err}
	}
	st, err := src.Stat(name)
	if err != nil {
		st = unix.Stat_t{Mode: 0o444, Uid: uint32(os.Geteuid()), Gid: uint32(os.Getegid())}
		if good {
			return w.leaveOut(err, name)
		}
	}
	dst, _, err := w.stage.OpenWrite(name, unix.O_CREAT|unix.O_EXCL, 0o600)
	if err != nil {
		return &targetError{err}
	}
	defer dst.Close()
	if !good && name == generations.SumsFile {
		out := bufio.NewWriter(dst)
		var line []byte
		err := w.eachManifest(src, false, func(i item) error {
			if i.folder {
				return nil
			}
			line = generations.AppendSum(line[:0], &manifest.Entry{Path: i.path, Sum: i.sum})
			_, err := out.Write(line)
			return err
		})
		// Without a manifest: what there is, as far as it goes.
		if err == nil {
			err = out.Flush()
		}
		if err == nil {
			return w.seal(dst, st)
		}
		if err := errors.Join(dst.Truncate(0), second(dst.Seek(0, io.SeekStart))); err != nil {
			return &targetError{err}
		}
	}
	in, _, err := src.Open(name)
	if err == nil {
		defer in.Close()
		_, err = io.CopyBuffer(onlyWriter{dst}, onlyReader{w.Reader(in)}, w.buf)
	}
	if err != nil {
		// It was told already, when it was looked at.
		if good {
			return w.leaveOut(err, name)
		}
		return w.stage.RemoveAll(name)
	}
	return w.seal(dst, st)
}

func second[T any](_ T, err error) error { return err }

// onlyReader and onlyWriter keep io.Copy on our buffer, and the reader's hook in use.
type onlyReader struct{ io.Reader }
type onlyWriter struct{ io.Writer }

// seal gives a new file mode, owner and times of the old one.
func (w *work) seal(f *os.File, st unix.Stat_t) error {
	err := f.Chmod(fs.FileMode(st.Mode & 0o777))
	if err == nil {
		err = chown(f, st)
	}
	if err == nil {
		ts := []unix.Timespec{st.Mtim, st.Mtim}
		err = unix.UtimesNanoAt(int(f.Fd()), "", ts, unix.AT_EMPTY_PATH)
	}
	if err != nil {
		return &targetError{err}
	}
	return nil
}

// owned gives a folder mode and owner.
func (c *copier) owned(dir *beneath.Dir, name string, st unix.Stat_t) error {
	err := dir.Chmod(name, st.Mode&0o7777)
	if err == nil {
		now, statErr := dir.Stat(name)
		if err = statErr; err == nil && (now.Uid != st.Uid || now.Gid != st.Gid) {
			err = dir.Chown(name, int(st.Uid), int(st.Gid))
		}
	}
	if err != nil {
		return &targetError{err}
	}
	return nil
}

func (w *work) leave() {
	l := w.stack[len(w.stack)-1]
	w.stack = w.stack[:len(w.stack)-1]
	for _, d := range []*beneath.Dir{l.src, l.dst, l.old, l.twin} {
		d.Close()
	}
}

// take copies one name.
func (w *work) take(i item) error {
	w.item++
	parent, name := split(i.path)
	for w.stack[len(w.stack)-1].path != parent {
		w.leave()
	}
	top := &w.stack[len(w.stack)-1]
	if i.folder {
		return w.folder(top, &i, name)
	}
	if err := w.file(top, &i, name); err != nil {
		if err := w.leaveFile(err, i.path); err != nil {
			return err
		}
	}
	return w.flush(false)
}

func (w *work) folder(top *level, i *item, name string) error {
	next := level{path: i.path}
	var err error
	if top.src != nil {
		if next.src, err = top.src.Dir(name); err != nil {
			if err := w.leaveFile(err, i.path); err != nil {
				return err
			}
		}
	}
	if next.dst, _, err = top.dst.MakeDir(name, 0o755); err != nil {
		next.src.Close()
		return &targetError{err}
	}
	if top.old != nil && top.twin != nil {
		next.old, _ = top.old.Dir(name)
		next.twin, _ = top.twin.Dir(name)
	}
	w.stack = append(w.stack, next)
	if next.src == nil {
		return nil
	}
	return w.like(top.src, top.dst, name)
}

// maxLostInodes bounds the inodes that are not tried a second time.
const maxLostInodes = 1 << 20

func (w *work) file(top *level, i *item, name string) error {
	if top.src == nil {
		return errors.New("its folder cannot be read")
	}
	st, err := top.src.Stat(name)
	if err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return errors.New("not a regular file")
	}
	if w.item <= w.done {
		// Durable since an earlier run, or lost then.
		if now, err := top.dst.Stat(name); err == nil && now.Size == st.Size {
			w.twins.made(i, &st)
			return nil
		}
	}
	if err := top.dst.RemoveAll(name); err != nil {
		return &targetError{err}
	}
	if st.Nlink > 1 {
		if ok, err := w.link(top, i, name, &st); ok || err != nil {
			return err
		}
		if why, ok := w.lost[st.Ino]; ok {
			return errors.New(why)
		}
	}
	if err := w.copy(top, i, name, &st); err != nil {
		if st.Nlink > 1 && len(w.lost) < maxLostInodes {
			w.lost[st.Ino] = text(err)
		}
		return errors.Join(err, cleanup(top.dst, name))
	}
	w.twins.made(i, &st)
	return nil
}

func cleanup(dir *beneath.Dir, name string) error {
	if err := dir.RemoveAll(name); err != nil {
		return &targetError{err}
	}
	return nil
}

// link makes a name of an inode that the new disk has already: in the generation
// before, or under another name in this one.
func (w *work) link(top *level, i *item, name string, st *unix.Stat_t) (bool, error) {
	try := func(from *beneath.Dir, old string) (bool, error) {
		now, err := from.Stat(old)
		if err != nil || now.Size != st.Size || now.Mode != st.Mode {
			return false, nil // lost there, or cut
		}
		err = top.dst.Link(from, old, name)
		if errors.Is(err, unix.EMLINK) {
			return false, nil
		}
		if err != nil {
			return false, &targetError{err}
		}
		w.report.Links++
		return true, nil
	}
	if top.old != nil && top.twin != nil {
		if old, err := top.old.Stat(name); err == nil && old.Ino == st.Ino {
			if ok, err := try(top.twin, name); ok || err != nil {
				return ok, err
			}
		}
	}
	if t, ok := w.twins.find(i, st); ok {
		parent, old := split(t.path)
		dir := w.stack[0].dst
		if parent != "" {
			sub, err := dir.Dir(parent)
			if err != nil {
				return false, &targetError{err}
			}
			defer sub.Close()
			dir = sub
		}
		return try(dir, old)
	}
	return false, nil
}

// copy copies a file's bytes, and compares them with the hash.
func (w *work) copy(top *level, i *item, name string, st *unix.Stat_t) error {
	src, _, err := top.src.Open(name)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, _, err := top.dst.OpenWrite(name, unix.O_CREAT|unix.O_EXCL, 0o600)
	if err != nil {
		return &targetError{err}
	}
	defer dst.Close()
	if st.Size >= 1<<20 {
		err := unix.Fallocate(int(dst.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, st.Size)
		if errors.Is(err, unix.ENOSPC) {
			return &targetError{fmt.Errorf("%s: %w", i.path, err)}
		}
	}
	h := manifest.NewHash()
	in := w.Reader(src)
	var n, dropped int64
	for {
		if w.ctx.Err() != nil {
			return w.ctx.Err()
		}
		m, err := in.Read(w.buf)
		if m > 0 {
			h.Write(w.buf[:m])
			n += int64(m)
			w.report.Bytes += int64(m)
			if _, err := dst.Write(w.buf[:m]); err != nil {
				return &targetError{err}
			}
			if n-dropped >= 32<<20 {
				unix.Fadvise(int(src.Fd()), dropped, n-dropped, unix.FADV_DONTNEED)
				dropped = n
				w.slow()
			}
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
	}
	unix.Fadvise(int(src.Fd()), 0, 0, unix.FADV_DONTNEED)
	sum := manifest.SumOf(h)
	if i.known && sum != i.sum {
		return fmt.Errorf("its hash is %v instead of %v", sum, i.sum)
	}
	if n != st.Size {
		return fmt.Errorf("%d bytes instead of %d", n, st.Size)
	}
	if err := w.seal(dst, *st); err != nil {
		return err
	}
	w.report.Files++
	w.fresh = append(w.fresh, fresh{generations.FilesFolder + "/" + i.path, n, sum})
	w.bytes += n
	return nil
}

// slow tells of a long file.
func (w *work) slow() {
	if time.Since(w.said) >= w.Pace {
		w.said = time.Now()
		w.tell()
	}
}

// flush makes durable what was copied, reads it back, and notes how far the copy
// has come. It does so now and then, or always.
func (w *work) flush(always bool) error {
	if !always && len(w.fresh) < batchFiles && w.bytes < batchBytes && time.Since(w.since) < w.Pace {
		return nil
	}
	if err := w.to.SyncFS(); err != nil {
		return &targetError{err}
	}
	if !w.Trust {
		for _, f := range w.fresh {
			if err := w.readBack(&f); err != nil {
				return err
			}
		}
	}
	w.fresh, w.bytes, w.since = w.fresh[:0], 0, time.Now()
	m := mark{Repository: w.repository, Generation: w.g.Name, Items: w.item}
	if w.bare {
		m.Items = 0 // a later run that can read a list must not believe what this one could not compare
	}
	if err := w.writeMark(m); err != nil {
		return &targetError{err}
	}
	w.tell()
	return nil
}

func (w *work) readBack(f *fresh) error {
	in, _, err := w.stage.Open(f.path)
	if err != nil {
		return &targetError{err}
	}
	defer in.Close()
	// What is in memory says nothing about the disk.
	unix.Fadvise(int(in.Fd()), 0, 0, unix.FADV_DONTNEED)
	defer unix.Fadvise(int(in.Fd()), 0, 0, unix.FADV_DONTNEED)
	if err := generations.ReadSum(w.ctx, in, f.size, f.sum, w.buf); err != nil {
		return &targetError{fmt.Errorf("the new disk does not hold what was written to it: %s: %w", f.path, err)}
	}
	return nil
}

func split(path string) (parent, name string) {
	if i := strings.LastIndexByte(path, '/'); i >= 0 {
		return path[:i], path[i+1:]
	}
	return "", path
}

// twins recognises files of one generation with the same content. Two bits for
// each hash in a table of a fixed size find those that may have one, exactly or
// not; only they are remembered.
type twins struct {
	bits  []uint64
	dup   map[uint64]struct{} // first 64 bits of hashes that came twice, or look so
	first map[uint64][]twin
}

type twin struct {
	path string
	ino  uint64
}

const (
	twinBits = 1 << 26 // 8 MiB
	maxTwins = 1 << 20
	// maxInodes bounds the inodes of one content that are remembered.
	maxInodes = 16
)

func twinKey(i *item) uint64 { return binary.BigEndian.Uint64(i.sum[:8]) }

// count takes note of a hash, in a first walk over the list.
func (t *twins) count(i *item) {
	if i.folder {
		return
	}
	key := twinKey(i)
	bit := key % twinBits
	if t.bits[bit/64]&(1<<(bit%64)) == 0 {
		t.bits[bit/64] |= 1 << (bit % 64)
		return
	}
	if len(t.dup) < maxTwins {
		t.dup[key] = struct{}{}
	}
}

// made takes note of the first file of a content that was seen twice.
func (t *twins) made(i *item, st *unix.Stat_t) {
	if t == nil || st.Nlink == 1 {
		return
	}
	key := twinKey(i)
	if _, ok := t.dup[key]; !ok {
		return
	}
	// One content has several inodes where modes differ, or links ran out.
	if len(t.first[key]) < maxInodes {
		t.first[key] = append(t.first[key], twin{i.path, st.Ino})
	}
}

// find returns an earlier name of the same inode.
func (t *twins) find(i *item, st *unix.Stat_t) (twin, bool) {
	if t == nil {
		return twin{}, false
	}
	for _, f := range t.first[twinKey(i)] {
		if f.ino == st.Ino {
			return f, true
		}
	}
	return twin{}, false
}
