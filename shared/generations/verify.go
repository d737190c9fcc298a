package generations

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"farkeep/shared/beneath"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"

	"golang.org/x/sys/unix"
)

// MaxProblems bounds the problems that a Report lists; Bad counts them all.
const MaxProblems = 1000

// Report is what Verify found.
type Report struct {
	Files, Bytes int64 // read
	Bad          int64
	Problems     []Problem
}

// Problem is one file that is not as it was committed.
type Problem struct {
	Path string
	What string
	Sum  manifest.Sum // what its content should be; zero for a list or a folder
	Size int64
}

func (r *Report) bad(path, format string, args ...any) {
	r.Bad++
	if len(r.Problems) < MaxProblems {
		r.Problems = append(r.Problems, Problem{Path: path, What: fmt.Sprintf(format, args...)})
	}
}

// Verify reads a whole generation from the disk and compares it with the hashes
// that were taken at the source; it also finds files that do not belong there. The
// error is nil when everything could be checked, whatever the Report says.
// progress, which may be nil, is called after every entry. What is rotten is also
// recorded on the disk (Rotten).
func (s *Store) Verify(ctx context.Context, repository, name string, progress func(Report)) (*Report, error) {
	r, err := s.verify(ctx, repository, name, progress)
	s.noteVerified(repository, name, r, err)
	if err != nil {
		return nil, fmt.Errorf("verify %.200s, generation %.64s: %w", repository, name, err)
	}
	return r, nil
}

func (s *Store) verify(ctx context.Context, repository, name string, progress func(Report)) (*Report, error) {
	if err := pushwire.CheckRepository(repository); err != nil {
		return nil, err
	}
	if _, _, err := ParseName(name); err != nil {
		return nil, err
	}
	home, err := s.generations.Dir(repository)
	if err != nil {
		return nil, err
	}
	defer home.Close()
	g, err := readGeneration(home, repository, name)
	if err != nil {
		return nil, err
	}
	dir, err := home.Dir(name)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	v := &verification{ctx: ctx, buf: make([]byte, 256<<10), report: &Report{}, progress: progress}
	if err := v.run(dir, &g); err != nil || v.report.Bad > 0 {
		// Expiry does not wait for readers, or a peer that verifies all day would
		// keep everything. What it took away is no damage.
		if _, gone := home.Stat(name); errors.Is(gone, fs.ErrNotExist) {
			return nil, errors.New("it expired meanwhile")
		}
		if err != nil {
			return nil, err
		}
	}
	return v.report, nil
}

type verification struct {
	ctx      context.Context
	buf      []byte
	report   *Report
	progress func(Report)
	sums     *bufio.Reader // nil once it was found wrong
	line     []byte
	got      []byte

	// The folders from files/ to the current one. An entry is counted in its
	// folder, and when a folder is left the counts must be what lies there.
	stack []counted
}

type counted struct {
	path    string
	dir     *beneath.Dir // nil: missing, reported
	entries int64
}

// badFile notes what is wrong with a file.
func (r *Report) badFile(e *manifest.Entry, format string, args ...any) {
	n := len(r.Problems)
	r.bad(e.Path, format, args...)
	if len(r.Problems) > n {
		r.Problems[n].Sum, r.Problems[n].Size = e.Sum, e.Size
	}
}

func (v *verification) run(dir *beneath.Dir, g *Generation) error {
	f, _, err := dir.Open(ManifestFile)
	if err != nil {
		return err
	}
	defer f.Close()
	sums, _, err := dir.Open(SumsFile)
	if err != nil {
		return err
	}
	defer sums.Close()
	v.sums = bufio.NewReaderSize(sums, 64<<10)
	files, err := dir.Dir(FilesFolder)
	if err != nil {
		return err
	}
	v.stack = append(v.stack, counted{dir: files})
	defer func() {
		for _, c := range v.stack {
			c.dir.Close()
		}
	}()
	list := manifest.NewReader(f)
	for {
		e, err := list.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("%w: %w", ErrDamaged, err)
		}
		if err := v.entry(&e); err != nil {
			return err
		}
		if v.progress != nil {
			v.progress(*v.report)
		}
	}
	for len(v.stack) > 0 {
		if err := v.leave(); err != nil {
			return err
		}
	}
	if d := list.Summary().Digest; d != g.Digest {
		v.report.bad(ManifestFile, "its digest is %v, %s says %v", d, TOMLFile, g.Digest)
	}
	if v.sums == nil {
		return nil
	}
	if _, err := v.sums.ReadByte(); err == nil {
		v.report.bad(SumsFile, "it lists more than %s", ManifestFile)
	}
	return nil
}

func (v *verification) entry(e *manifest.Entry) error {
	if v.ctx.Err() != nil {
		return v.ctx.Err()
	}
	parent, name := split(e.Path)
	for v.stack[len(v.stack)-1].path != parent {
		if err := v.leave(); err != nil {
			return err
		}
	}
	top := &v.stack[len(v.stack)-1]
	if e.Kind == manifest.Folder {
		next := counted{path: e.Path}
		if top.dir != nil {
			top.entries++
			dir, err := top.dir.Dir(name)
			if err != nil {
				v.report.bad(e.Path, "the folder cannot be opened: %v", err)
			}
			next.dir = dir
		}
		v.stack = append(v.stack, next)
		return nil
	}
	v.checkSum(e)
	if top.dir == nil {
		v.report.badFile(e, "missing, with its folder")
		return nil
	}
	top.entries++
	return v.file(top.dir, name, e)
}

// checkSum checks the line of e in SUMS.b2. After the first wrong one the rest of
// that file is not judged.
func (v *verification) checkSum(e *manifest.Entry) {
	if v.sums == nil {
		return
	}
	v.line = appendSum(v.line[:0], e)
	v.got = append(v.got[:0], v.line...)
	if _, err := io.ReadFull(v.sums, v.got); err != nil || !bytes.Equal(v.got, v.line) {
		v.report.bad(SumsFile, "the line of %q is not as it should be", e.Path)
		v.sums = nil
	}
}

func (v *verification) file(dir *beneath.Dir, name string, e *manifest.Entry) error {
	f, st, err := dir.Open(name)
	if err != nil {
		v.report.badFile(e, "cannot be opened: %v", err)
		return nil
	}
	defer f.Close()
	if st.Size != e.Size {
		v.report.badFile(e, "%d bytes instead of %d", st.Size, e.Size)
		return nil
	}
	// What is in memory says nothing about the disk: drop it, then read.
	unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
	h := manifest.NewHash()
	n, err := io.CopyBuffer(h, &contextReader{v.ctx, f}, v.buf)
	unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
	v.report.Bytes += n
	if v.ctx.Err() != nil {
		return v.ctx.Err()
	}
	if err != nil {
		v.report.badFile(e, "cannot be read: %v", err)
		return nil
	}
	v.report.Files++
	if sum := manifest.SumOf(h); sum != e.Sum {
		v.report.badFile(e, "its hash is %v instead of %v", sum, e.Sum)
	}
	return nil
}

// leave checks that the innermost folder holds nothing but what was listed.
func (v *verification) leave() error {
	last := v.stack[len(v.stack)-1]
	v.stack = v.stack[:len(v.stack)-1]
	if last.dir == nil {
		return nil
	}
	defer last.dir.Close()
	var n int64
	err := last.dir.Each(func(fs.DirEntry) error { n++; return v.ctx.Err() })
	if err != nil {
		return err
	}
	if n != last.entries {
		v.report.bad(last.path+"/", "the folder holds %d names, %d are listed", n, last.entries)
	}
	return nil
}

func split(path string) (parent, name string) {
	for i := len(path) - 1; i >= 0; i-- {
		if path[i] == '/' {
			return path[:i], path[i+1:]
		}
	}
	return "", path
}

// contextReader ends a long read when its context ends. It hides ReadFrom and
// WriteTo, which would go past it.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c *contextReader) Read(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, c.ctx.Err()
	}
	return c.r.Read(p)
}

func copyAndHash(ctx context.Context, dst, src *os.File) (manifest.Sum, error) {
	h := manifest.NewHash()
	buf := make([]byte, 256<<10)
	_, err := io.CopyBuffer(io.MultiWriter(dst, h), &contextReader{ctx, src}, buf)
	return manifest.SumOf(h), err
}
