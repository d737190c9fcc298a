package scrub

import (
	"bufio"
	"bytes"
	"context"
	"encoding"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"

	"farkeep/shared/beneath"
	"farkeep/shared/generations"
	"farkeep/shared/manifest"

	"golang.org/x/sys/unix"
)

// pass reads one generation.
type pass struct {
	*Scrub
	ctx      context.Context
	g        *generations.Generation
	dir      *beneath.Dir // the generation's folder
	files    *beneath.Dir
	oldFiles *beneath.Dir // files/ of the generation before; nil for none
	from     string       // what was read already: up to here
	stack    []level
	sums     *bufio.Reader // nil once SUMS.b2 was found wrong
	line     []byte
	got      []byte
	batch    []file
	bytes    int64 // in the batch
}

// level is a folder on the way to the current one, here and in the generation
// before.
type level struct {
	path     string
	dir, old *beneath.Dir // nil: cannot be opened
	noOld    bool
}

// file is what a batch holds of a file.
type file struct {
	path string
	size int64
	sum  manifest.Sum
	ino  uint64
}

// errList: the list of the generation itself is damaged, and was reported.
var errList = errors.New("the generation's list is damaged")

// generation reads what the generations before do not share.
func (s *Scrub) generation(ctx context.Context, g *generations.Generation, before []generations.Generation) error {
	clear(s.seen)
	if g.Format == 0 {
		return s.list(ctx, g, generations.TOMLFile, "it cannot be read, or says something else than the folder's name")
	}
	for {
		var old *generations.Generation
		for len(before) > 0 && old == nil {
			if o := &before[len(before)-1]; o.Format != 0 {
				old = o
			}
			before = before[:len(before)-1]
		}
		err := s.compare(ctx, g, old)
		var side *manifest.SideError
		if errors.As(err, &side) && side.Old && ctx.Err() == nil {
			// Reported when it was its turn. The one before it must do.
			continue
		}
		if errors.Is(err, errList) {
			return nil
		}
		return err
	}
}

// list notes that one of a generation's own lists is damaged.
func (s *Scrub) list(ctx context.Context, g *generations.Generation, name, what string) error {
	return s.find(ctx, g, generations.Rot{Path: name, What: what}, nil)
}

// find notes that something is wrong, if there is still a disk, and a generation.
func (s *Scrub) find(ctx context.Context, g *generations.Generation, r generations.Rot, cause error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	dir, err := s.cfg.Store.OpenGeneration(g.Repository, g.Name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // it expired meanwhile
	}
	if err == nil {
		dir.Close()
	}
	if cause != nil && !errors.Is(cause, generations.ErrRotten) && !errors.Is(cause, fs.ErrNotExist) && !s.alive(ctx) {
		return fmt.Errorf("%w: %w", ErrVanished, cause)
	}
	r.Repository, r.Generations, r.Found = g.Repository, []string{g.Name}, s.cfg.Now()
	s.found = append(s.found, r)
	s.r.Findings++
	if len(s.found) >= maxKept {
		return s.note()
	}
	return nil
}

// alive asks the disk for something that it had a moment ago, or for anything.
func (s *Scrub) alive(ctx context.Context) bool {
	try := func(p place) bool {
		dir, err := s.cfg.Store.OpenGeneration(p.repository, p.generation)
		if err != nil {
			return false
		}
		defer dir.Close()
		f, st, err := dir.Open(p.path)
		if err != nil || st.Size == 0 {
			return false
		}
		defer f.Close()
		unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
		_, err = s.cfg.Reader(f).Read(s.buf[:1])
		return err == nil
	}
	if s.lastGood != (place{}) && try(s.lastGood) {
		return true
	}
	repositories, err := s.cfg.Store.Repositories()
	if err != nil {
		return false
	}
	for _, r := range repositories {
		list, err := s.cfg.Store.List(ctx, r)
		if err != nil {
			return false
		}
		for _, g := range slices.Backward(list[max(len(list)-4, 0):]) {
			if try(place{r, g.Name, generations.ManifestFile}) {
				return true
			}
		}
	}
	return false
}

// compare goes through a generation, next to the one before.
func (s *Scrub) compare(ctx context.Context, g, old *generations.Generation) error {
	p := &pass{Scrub: s, ctx: ctx, g: g, from: s.r.path()}
	defer p.close()
	var err error
	if p.dir, err = s.cfg.Store.OpenGeneration(g.Repository, g.Name); err != nil {
		return gone(err)
	}
	// Nothing is judged by a list before all of it was seen to be right: one bit in
	// it would be as many wrong words about good files.
	if err := p.checkList(); err != nil {
		return p.damaged(generations.ManifestFile, err)
	}
	list, listFile, err := p.manifest(p.dir)
	if err != nil {
		return p.damaged(generations.ManifestFile, err)
	}
	defer listFile.Close()
	if p.files, err = p.dir.Dir(generations.FilesFolder); err != nil {
		return p.damaged(generations.FilesFolder, err)
	}
	sums, _, err := p.dir.Open(generations.SumsFile)
	if err == nil {
		defer sums.Close()
		p.sums = bufio.NewReaderSize(s.cfg.Reader(sums), 64<<10)
	} else if err := s.find(ctx, g, generations.Rot{Path: generations.SumsFile, What: text(err)}, err); err != nil {
		return err
	}
	var oldList *manifest.Reader
	if old != nil {
		dir, err := s.cfg.Store.OpenGeneration(g.Repository, old.Name)
		if err == nil {
			defer dir.Close()
			p.oldFiles, err = dir.Dir(generations.FilesFolder)
		}
		if err == nil {
			var f *os.File
			if oldList, f, err = p.manifest(dir); err == nil {
				defer f.Close()
			}
		}
		if err != nil {
			return &manifest.SideError{Old: true, Err: err}
		}
	}
	first := level{dir: p.files, old: p.oldFiles, noOld: p.oldFiles == nil}
	p.stack = append(p.stack, first)
	err = manifest.Diff(oldList, list, p.step)
	var side *manifest.SideError
	if errors.As(err, &side) && !side.Old && ctx.Err() == nil {
		if err := p.flush(); err != nil {
			return err
		}
		return p.damaged(generations.ManifestFile, side.Err)
	}
	if err == nil {
		err = p.flush()
	}
	if err != nil {
		return err
	}
	if p.sums != nil {
		if _, err := p.sums.ReadByte(); err == nil {
			return s.list(ctx, g, generations.SumsFile, "it lists more than "+generations.ManifestFile)
		}
	}
	return nil
}

// checkList reads the generation's manifest, to its end and its digest.
func (p *pass) checkList() error {
	list, f, err := p.manifest(p.dir)
	if err != nil {
		return err
	}
	defer f.Close()
	for {
		if list.Index()%1024 == 0 && p.ctx.Err() != nil {
			return p.ctx.Err()
		}
		_, err := list.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
	}
	if d := list.Summary().Digest; d != p.g.Digest {
		return fmt.Errorf("%w: its digest is %v, %s says %v", generations.ErrRotten, d, generations.TOMLFile, p.g.Digest)
	}
	return nil
}

// gone makes nothing of a generation that expired meanwhile.
func gone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func (p *pass) damaged(name string, err error) error {
	if p.ctx.Err() != nil {
		return p.ctx.Err()
	}
	if err := p.find(p.ctx, p.g, generations.Rot{Path: name, What: text(err)}, err); err != nil {
		return err
	}
	return errList
}

// text is an error without the disk's own paths.
func text(err error) string {
	var path *fs.PathError
	if errors.As(err, &path) {
		return fmt.Sprintf("%s: %v", path.Op, path.Err)
	}
	return strings.TrimPrefix(err.Error(), generations.ErrRotten.Error()+": ")
}

func (p *pass) manifest(dir *beneath.Dir) (*manifest.Reader, *os.File, error) {
	f, _, err := dir.Open(generations.ManifestFile)
	if err != nil {
		return nil, nil, err
	}
	return manifest.NewReader(p.cfg.Reader(f)), f, nil
}

func (p *pass) close() {
	for _, l := range p.stack {
		if l.dir != p.files {
			l.dir.Close()
		}
		if l.old != p.oldFiles {
			l.old.Close()
		}
	}
	p.files.Close()
	p.oldFiles.Close()
	p.dir.Close()
}

// step takes one entry of the generation.
func (p *pass) step(c manifest.Change) error {
	if c.Relation == manifest.Gone {
		return nil
	}
	if c.Index%256 == 0 {
		if p.ctx.Err() != nil {
			return p.ctx.Err()
		}
		if err := p.pause(p.ctx); err != nil {
			return err
		}
	}
	e := &c.New
	parent, name := split(e.Path)
	for p.stack[len(p.stack)-1].path != parent {
		p.leave()
	}
	top := &p.stack[len(p.stack)-1]
	if e.Kind == manifest.Folder {
		next := level{path: e.Path, noOld: top.noOld || c.Relation != manifest.Unchanged}
		if top.dir != nil {
			next.dir, _ = top.dir.Dir(name)
		}
		p.stack = append(p.stack, next)
		return nil
	}
	if err := p.checkSum(e); err != nil {
		return err
	}
	if p.from != "" && manifest.ComparePaths(e.Path, p.from) <= 0 {
		return nil
	}
	return p.entry(top, name, &c)
}

func (p *pass) leave() {
	last := p.stack[len(p.stack)-1]
	p.stack = p.stack[:len(p.stack)-1]
	last.dir.Close()
	last.old.Close()
}

// checkSum compares the line of e in SUMS.b2, which is what people without
// Farkeep go by.
func (p *pass) checkSum(e *manifest.Entry) error {
	if p.sums == nil {
		return nil
	}
	p.line = generations.AppendSum(p.line[:0], e)
	p.got = append(p.got[:0], p.line...)
	_, err := io.ReadFull(p.sums, p.got)
	if err == nil && bytes.Equal(p.got, p.line) {
		return nil
	}
	p.sums = nil
	if err == nil || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return p.list(p.ctx, p.g, generations.SumsFile, fmt.Sprintf("the line of %q is not as it should be", e.Path))
	}
	return p.find(p.ctx, p.g, generations.Rot{Path: generations.SumsFile, What: text(err)}, err)
}

// entry looks at a name, and puts the file into the batch if it must be read.
func (p *pass) entry(top *level, name string, c *manifest.Change) error {
	e := &c.New
	var st unix.Stat_t
	err := error(&fs.PathError{Op: "open its folder", Err: fs.ErrNotExist})
	if top.dir != nil {
		st, err = top.dir.Stat(name)
	}
	if err == nil && (st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size != e.Size) {
		err = fmt.Errorf("%w: %d bytes instead of %d, mode %o", generations.ErrRotten, st.Size, e.Size, st.Mode)
	}
	if err != nil {
		return p.rotten(&file{path: e.Path, size: e.Size, sum: e.Sum}, err)
	}
	if st.Nlink > 1 {
		if c.Relation == manifest.Unchanged && p.shared(top, name, st.Ino) {
			return nil
		}
		// A second name of the same content in this generation. The table forgets,
		// and then a file is read twice.
		slot := &p.seen[st.Ino%uint64(len(p.seen))]
		if *slot == st.Ino {
			return nil
		}
		*slot = st.Ino
	}
	f := file{e.Path, e.Size, e.Sum, st.Ino}
	if e.Size >= batchBytes {
		// A long file is a batch of its own, so that it can be gone on with.
		if err := p.flush(); err != nil {
			return err
		}
	}
	p.batch = append(p.batch, f)
	p.bytes += e.Size
	if len(p.batch) >= batchFiles || p.bytes >= batchBytes {
		return p.flush()
	}
	return nil
}

// shared says whether the generation before has the same inode under that name.
// That one was read in this round, or will not be needed any more.
func (p *pass) shared(top *level, name string, ino uint64) bool {
	if top.old == nil && !top.noOld {
		// The folders above may not have been needed: ask by the whole path.
		old, err := p.oldFiles.Dir(top.path)
		if err != nil {
			top.noOld = true
			return false
		}
		top.old = old
	}
	if top.noOld {
		return false
	}
	st, err := top.old.Stat(name)
	return err == nil && st.Ino == ino
}

func (p *pass) rotten(f *file, cause error) error {
	if errors.Is(cause, fs.ErrNotExist) {
		cause = fmt.Errorf("%w: missing", generations.ErrRotten)
	}
	return p.find(p.ctx, p.g, generations.Rot{Path: f.path, Sum: f.sum, Size: f.size, What: text(cause)}, cause)
}

// flush reads the batch, in the order of the inodes: ext4 puts data near their
// inode, and files that were made together together.
func (p *pass) flush() error {
	if len(p.batch) == 0 {
		return nil
	}
	last := p.batch[len(p.batch)-1].path
	slices.SortFunc(p.batch, func(a, b file) int {
		switch {
		case a.ino < b.ino:
			return -1
		case a.ino > b.ino:
			return 1
		}
		return 0
	})
	for i := range p.batch {
		f := &p.batch[i]
		err := p.read(f)
		if p.ctx.Err() != nil {
			return p.ctx.Err()
		}
		var disk *diskError
		if errors.As(err, &disk) {
			err = p.rotten(f, disk.err)
		}
		if err != nil {
			return err
		}
		p.r.Long = long{}
	}
	p.batch, p.bytes = p.batch[:0], 0
	p.r.Path = strconv.Quote(last)
	p.report(false)
	return p.tick()
}

// diskError is what the disk says of a file.
type diskError struct{ err error }

func (e *diskError) Error() string { return e.err.Error() }
func (e *diskError) Unwrap() error { return e.err }

// read reads a file and compares it with its hash.
func (p *pass) read(f *file) error {
	if err := p.spend(p.ctx, seek); err != nil {
		return err
	}
	in, st, err := p.files.Open(f.path)
	if err != nil {
		return &diskError{err}
	}
	defer in.Close()
	if st.Size != f.size {
		return &diskError{fmt.Errorf("%w: %d bytes instead of %d", generations.ErrRotten, st.Size, f.size)}
	}
	// What is in memory says nothing about the disk: drop it, then read.
	unix.Fadvise(int(in.Fd()), 0, 0, unix.FADV_DONTNEED)
	defer unix.Fadvise(int(in.Fd()), 0, 0, unix.FADV_DONTNEED)
	h := manifest.NewHash()
	offset := p.goOn(f, in, h)
	src := p.cfg.Reader(in)
	dropped := offset
	for {
		n, err := src.Read(p.buf)
		h.Write(p.buf[:n])
		offset += int64(n)
		p.r.Bytes += int64(n)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return &diskError{fmt.Errorf("read at byte %d: %w", offset, err)}
		}
		if offset-dropped >= dropEvery {
			unix.Fadvise(int(in.Fd()), dropped, offset-dropped, unix.FADV_DONTNEED)
			dropped = offset
			if f.size >= batchBytes {
				p.stopHere(f, offset, h)
			}
		}
		if err := p.spend(p.ctx, int64(n)); err != nil {
			return err
		}
	}
	if offset != f.size {
		return &diskError{fmt.Errorf("%w: %d bytes instead of %d", generations.ErrRotten, offset, f.size)}
	}
	if sum := manifest.SumOf(h); sum != f.sum {
		return &diskError{fmt.Errorf("%w: its hash is %v instead of %v", generations.ErrRotten, sum, f.sum)}
	}
	if f.size > 0 {
		p.lastGood = place{p.g.Repository, p.g.Name, generations.FilesFolder + "/" + f.path}
	}
	return nil
}

// stopHere makes the next checkpoint one in the middle of a long file.
func (p *pass) stopHere(f *file, offset int64, h hash.Hash) {
	state, err := h.(encoding.BinaryMarshaler).MarshalBinary()
	if err != nil {
		return
	}
	p.r.Long = long{Path: strconv.Quote(f.path), Inode: f.ino, Offset: offset, Hash: hex.EncodeToString(state)}
}

// goOn returns where the reading of f goes on, and brings h there.
func (p *pass) goOn(f *file, in *os.File, h hash.Hash) int64 {
	l := &p.r.Long
	if l.Path != strconv.Quote(f.path) || l.Inode != f.ino || l.Offset <= 0 || l.Offset > f.size {
		return 0
	}
	state, err := hex.DecodeString(l.Hash)
	if err == nil {
		err = h.(encoding.BinaryUnmarshaler).UnmarshalBinary(state)
	}
	if err == nil {
		_, err = in.Seek(l.Offset, io.SeekStart)
	}
	if err != nil {
		h.Reset()
		in.Seek(0, io.SeekStart)
		return 0
	}
	return l.Offset
}

func split(path string) (parent, name string) {
	if i := strings.LastIndexByte(path, '/'); i >= 0 {
		return path[:i], path[i+1:]
	}
	return "", path
}
