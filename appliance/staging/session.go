package staging

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"iter"
	"log/slog"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"farkeep/appliance/listing"
	"farkeep/shared/beneath"
	"farkeep/shared/pushwire"

	"github.com/pkg/sftp"
	"golang.org/x/sys/unix"
)

// Session is one sftp connection of a peer.
type Session struct {
	area *Area
	peer Peer
	ctx  context.Context
	log  *slog.Logger

	mu    sync.Mutex // guards the fields below
	trees map[string]*tree
	open  int
	last  string // what was said last
	said  int
	noted int
}

// maxSaid bounds the lines that a session says to a person, and those of the log.
const maxSaid = 100

// Serve speaks SFTP (draft-ietf-secsh-filexfer-02, as OpenSSH does) on rw until the
// peer hangs up, is silent for too long, or ctx ends. It closes rw. When it returns,
// nothing of the disk is held open for the peer. The copy stays as it is: the end of
// a connection means nothing.
func (a *Area) Serve(ctx context.Context, p Peer, rw io.ReadWriteCloser) error {
	defer rw.Close()
	leave, err := a.join(p.Key)
	if err != nil {
		return err
	}
	defer leave()
	idle := p.IdleTimeout
	if idle == 0 {
		idle = IdleTimeout
	}
	s := &Session{area: a, peer: p, ctx: ctx, log: a.log.With("key", p.Key), trees: map[string]*tree{}}
	var silent atomic.Bool
	silence := time.AfterFunc(idle, func() {
		silent.Store(true)
		s.say("nothing was asked for " + idle.String() + ": the connection ends; the staging copy stays as it is")
		rw.Close()
	})
	defer silence.Stop()
	defer context.AfterFunc(ctx, func() { rw.Close() })()
	in := struct {
		io.Reader
		io.WriteCloser
	}{readerFunc(func(b []byte) (int, error) {
		n, err := rw.Read(b)
		silence.Reset(idle)
		return n, err
	}), rw}
	server := sftp.NewRequestServer(in, sftp.Handlers{FileGet: s, FilePut: s, FileCmd: s, FileList: s}, sftp.WithRSAllocator())
	err = server.Serve()
	server.Close()
	s.end()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if silent.Load() || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return nil // with files open or not: the peer is gone
	}
	return err
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// end lets go of the copies.
func (s *Session) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, t := range s.trees {
		t.mu.Lock()
		delete(t.changed, s)
		t.signal()
		t.mu.Unlock()
		t.leave()
	}
}

// say tells a person something, once in a row.
func (s *Session) say(text string) {
	s.mu.Lock()
	repeated := s.last == text || s.said >= maxSaid
	s.last = text
	s.said++
	s.mu.Unlock()
	if s.peer.Say != nil && !repeated {
		s.peer.Say(text)
	}
}

// complain says what a refusal says: most clients show SFTP's number alone, and for
// all of these that is "Failure".
func (s *Session) complain(err error) {
	var told *refusal
	if errors.As(err, &told) && !told.quiet {
		s.say(told.text)
	}
}

// note logs what was refused, as far as one session may fill the log.
func (s *Session) note(method, path string, err error) {
	s.mu.Lock()
	s.noted++
	n := s.noted
	s.mu.Unlock()
	switch {
	case n < maxSaid:
		s.log.Info("staging: refused", "method", method, "path", path, "err", err)
	case n == maxSaid:
		s.log.Warn("staging: this session's further refusals are not logged")
	}
}

// fail turns an error into the answer to a request, and logs what that leaves
// out.
func (s *Session) fail(r *sftp.Request, err error) error {
	if err == nil {
		return nil
	}
	out := answer(err)
	var told *refusal
	if !errors.Is(out, sftp.ErrSSHFxNoSuchFile) && !(errors.As(out, &told) && told.quiet) {
		s.note(r.Method, r.Filepath, err)
	}
	s.complain(out)
	return out
}

// place is what a path means: "/" if repository is "", a repository if rel is.
type place struct{ repository, rel string }

// resolve takes a request's path apart, which package sftp has made absolute and
// clean. What the peer may not use does not exist.
func (s *Session) resolve(name string) (place, error) {
	name = strings.TrimPrefix(path.Clean("/"+name), "/")
	if name == "" {
		return place{}, nil
	}
	repository, rel, _ := strings.Cut(name, "/")
	if pushwire.CheckRepository(repository) != nil || !s.peer.Sees(repository) {
		return place{}, fs.ErrNotExist
	}
	if rel != "" {
		if err := check(rel); err != nil {
			return place{}, err
		}
	}
	return place{repository, rel}, nil
}

// exists says whether a repository that the peer may use is there.
func (s *Session) exists(repository string) error {
	s.mu.Lock()
	_, entered := s.trees[repository]
	s.mu.Unlock()
	if entered {
		return nil
	}
	names, err := s.area.repositories(&s.peer)
	if err == nil && !slices.Contains(names, repository) {
		err = fs.ErrNotExist
	}
	return err
}

// tree opens the copy of a repository, for as long as the session lasts.
func (s *Session) tree(repository string) (*tree, error) {
	s.mu.Lock()
	t := s.trees[repository]
	s.mu.Unlock()
	if t != nil {
		return t, nil
	}
	if err := s.exists(repository); err != nil {
		return nil, err
	}
	return s.begin(repository)
}

func (s *Session) begin(repository string) (*tree, error) {
	t, err := s.area.enter(s.ctx, treeID{repository, s.peer.Key}, true)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if other := s.trees[repository]; other != nil {
		t.leave()
		return other, nil
	}
	s.trees[repository] = t
	return t, nil
}

// inside is for requests about something in a repository.
func (s *Session) inside(name string) (*tree, string, error) {
	p, err := s.resolve(name)
	if err != nil {
		return nil, "", err
	}
	if p.rel == "" {
		return nil, "", deny("the folders at the top are the repositories: they stay as they are")
	}
	t, err := s.tree(p.repository)
	return t, p.rel, err
}

// take counts a handle.
func (s *Session) take() (release func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open >= MaxOpen {
		return nil, refuse("%d files are open already, which is the most", s.open)
	}
	s.open++
	return sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.open--
	}), nil
}

// Fileread implements sftp.FileReader.
func (s *Session) Fileread(r *sftp.Request) (io.ReaderAt, error) {
	f, err := s.read(r)
	if err != nil {
		return nil, s.fail(r, err)
	}
	return f, nil
}

func (s *Session) read(r *sftp.Request) (io.ReaderAt, error) {
	t, rel, err := s.inside(r.Filepath)
	if err != nil {
		return nil, err
	}
	release, err := s.take()
	if err != nil {
		return nil, err
	}
	f, _, err := t.files.Open(rel)
	if err != nil {
		release()
		return nil, err
	}
	return &reader{f, release}, nil
}

// reader is a handle that is open for reading.
type reader struct {
	*os.File
	release func()
}

// Close closes the file.
func (r *reader) Close() error {
	r.release()
	return r.File.Close()
}

// Filewrite implements sftp.FileWriter.
func (s *Session) Filewrite(r *sftp.Request) (io.WriterAt, error) {
	w, err := s.write(r)
	if err != nil {
		return nil, s.fail(r, err)
	}
	return w, nil
}

// OpenFile implements sftp.OpenFileWriter.
func (s *Session) OpenFile(r *sftp.Request) (sftp.WriterAtReaderAt, error) {
	w, err := s.write(r)
	if err != nil {
		return nil, s.fail(r, err)
	}
	return w, nil
}

func (s *Session) write(r *sftp.Request) (*writer, error) {
	t, rel, err := s.inside(r.Filepath)
	if err != nil {
		return nil, err
	}
	perm := uint32(0o644)
	// Package sftp drops the flags that say which attributes come with an open (its
	// Request.Flags are the flags of the open itself). Four bytes are a mode: size,
	// owner and times have eight each.
	if len(r.Attrs) == 4 {
		if mode := binary.BigEndian.Uint32(r.Attrs) & 0o777; mode != 0 {
			perm = mode
		}
	}
	release, err := s.take()
	if err != nil {
		return nil, err
	}
	w, err := t.openWrite(s, rel, r.Pflags(), perm)
	if err != nil {
		release()
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.holder = release
	return w, nil
}

// Filecmd implements sftp.FileCmder.
func (s *Session) Filecmd(r *sftp.Request) error { return s.fail(r, s.command(r)) }

// PosixRename implements sftp.PosixRenameFileCmder (posix-rename@openssh.com).
func (s *Session) PosixRename(r *sftp.Request) error { return s.fail(r, s.rename(r, true)) }

func (s *Session) command(r *sftp.Request) error {
	switch r.Method {
	case "Link", "Symlink":
		return errLinks
	case "Rename":
		return s.rename(r, false)
	case "Setstat", "Remove", "Rmdir", "Mkdir":
	default:
		return sftp.ErrSSHFxOpUnsupported
	}
	p, err := s.resolve(r.Filepath)
	if err != nil {
		return err
	}
	a := r.Attributes()
	if a == nil {
		return sftp.ErrSSHFxBadMessage
	}
	if r.Method == "Mkdir" && p.repository != "" && p.rel == "" {
		// The peer may use that name. Its copy begins now, and so becomes visible.
		if s.exists(p.repository) == nil {
			return fs.ErrExist
		}
		_, err := s.begin(p.repository)
		return err
	}
	if r.Method == "Setstat" && p.repository != "" && p.rel == "" {
		return s.exists(p.repository) // the top folder has no attributes of its own
	}
	t, rel, err := s.inside(r.Filepath)
	if err != nil {
		return err
	}
	switch r.Method {
	case "Remove":
		return t.remove(s, rel)
	case "Rmdir":
		return t.rmdir(s, rel)
	case "Mkdir":
		perm := uint32(0o755)
		if r.AttrFlags().Permissions {
			perm = a.Mode
		}
		return t.mkdir(s, rel, perm)
	default:
		return t.setAttributes(s, rel, r.AttrFlags(), a)
	}
}

func (s *Session) rename(r *sftp.Request, replace bool) error {
	t, from, err := s.inside(r.Filepath)
	if err != nil {
		return err
	}
	u, to, err := s.inside(r.Target)
	if err != nil {
		return err
	}
	if t != u {
		return refuse("a file cannot move from one repository to another: upload it there")
	}
	return t.rename(s, from, to, replace)
}

// StatVFS implements sftp.StatVFSFileCmder (statvfs@openssh.com): what "df" shows is
// what the peer could upload.
func (s *Session) StatVFS(r *sftp.Request) (*sftp.StatVFS, error) {
	if _, err := s.resolve(r.Filepath); err != nil {
		return nil, s.fail(r, err)
	}
	room, inodes, err := s.area.store.Room()
	if err != nil {
		return nil, s.fail(r, err)
	}
	_, _, total, err := s.area.store.Space()
	if err != nil {
		return nil, s.fail(r, err)
	}
	if s.peer.Quota > 0 {
		used, err := s.area.usedBy(s.ctx, s.peer.Key)
		if err != nil {
			return nil, s.fail(r, err)
		}
		total = min(total, s.peer.Quota)
		room = max(min(room, s.peer.Quota-used-s.area.held(s.peer.Key)), 0)
	}
	const block = 4096
	free, files := uint64(room/block), uint64(max(inodes, 0))
	return &sftp.StatVFS{Bsize: block, Frsize: block, Blocks: uint64(total / block), Bfree: free, Bavail: free, Files: MaxEntries, Ffree: files, Favail: files, Namemax: 255}, nil
}

// Filelist implements sftp.FileLister.
func (s *Session) Filelist(r *sftp.Request) (sftp.ListerAt, error) {
	var l sftp.ListerAt
	var err error
	switch r.Method {
	case "List":
		l, err = s.list(r.Filepath)
	case "Stat":
		l, err = s.stat(r.Filepath)
	default:
		err = sftp.ErrSSHFxOpUnsupported
	}
	if err != nil {
		return nil, s.fail(r, err)
	}
	return l, nil
}

// Lstat implements sftp.LstatFileLister: there are no links that it could differ
// for.
func (s *Session) Lstat(r *sftp.Request) (sftp.ListerAt, error) {
	l, err := s.stat(r.Filepath)
	if err != nil {
		return nil, s.fail(r, err)
	}
	return l, nil
}

func (s *Session) stat(name string) (sftp.ListerAt, error) {
	p, err := s.resolve(name)
	switch {
	case err != nil:
		return nil, err
	case p.repository == "":
		return listing.Entries{topFolder("/")}, nil
	case p.rel == "":
		if err := s.exists(p.repository); err != nil {
			return nil, err
		}
		return listing.Entries{topFolder(p.repository)}, nil
	}
	t, err := s.tree(p.repository)
	if err != nil {
		return nil, err
	}
	st, err := t.stat(p.rel)
	if err != nil {
		return nil, err
	}
	return listing.Entries{&info{path.Base(p.rel), st}}, nil
}

func (s *Session) list(name string) (sftp.ListerAt, error) {
	p, err := s.resolve(name)
	if err != nil {
		return nil, err
	}
	if p.repository == "" {
		names, err := s.area.repositories(&s.peer)
		if err != nil {
			return nil, err
		}
		var all listing.Entries
		for _, n := range names {
			all = append(all, topFolder(n))
		}
		return all, nil
	}
	t, err := s.tree(p.repository)
	if err != nil {
		return nil, err
	}
	at := p.rel
	if at == "" {
		at = "."
	}
	dir, err := t.files.Dir(at)
	if err != nil {
		return nil, err
	}
	release, err := s.take()
	if err != nil {
		dir.Close()
		return nil, err
	}
	l := &lister{dir: dir, release: release}
	l.next, l.stop = iter.Pull2(l.each)
	return l, nil
}

// topFolder is a folder that is not on the disk as such.
func topFolder(name string) fs.FileInfo {
	return &info{name, unix.Stat_t{Mode: unix.S_IFDIR | 0o755, Nlink: 2}}
}

// info is a file as the peer sees it.
type info struct {
	name string
	st   unix.Stat_t
}

func (i *info) Name() string { return i.name }

func (i *info) Size() int64 { return i.st.Size }

func (i *info) Mode() fs.FileMode {
	mode := fs.FileMode(shownMode(&i.st))
	if i.st.Mode&unix.S_IFMT == unix.S_IFDIR {
		mode |= fs.ModeDir
	}
	return mode
}

func (i *info) ModTime() time.Time { return time.Unix(i.st.Mtim.Unix()) }

func (i *info) IsDir() bool { return i.Mode().IsDir() }

func (i *info) Sys() any { return nil }

// lister reads a folder as it is asked for, whatever its size.
type lister struct {
	dir     *beneath.Dir
	release func()
	next    func() (*info, error, bool)
	stop    func()
}

func (l *lister) each(yield func(*info, error) bool) {
	errEnough := errors.New("enough")
	err := l.dir.Each(func(e fs.DirEntry) error {
		st, err := l.dir.Stat(e.Name())
		if errors.Is(err, fs.ErrNotExist) {
			return nil // removed meanwhile
		}
		if !yield(&info{e.Name(), st}, err) {
			return errEnough
		}
		return nil
	})
	if err != nil && !errors.Is(err, errEnough) {
		yield(nil, err)
	}
}

// ListAt implements sftp.ListerAt; package sftp asks for one batch after the other.
func (l *lister) ListAt(out []fs.FileInfo, _ int64) (n int, err error) {
	for n < len(out) {
		i, err, ok := l.next()
		if !ok {
			return n, io.EOF
		}
		if err != nil {
			return n, answer(err)
		}
		out[n] = i
		n++
	}
	return n, nil
}

// Close implements io.Closer.
func (l *lister) Close() error {
	l.release()
	l.stop()
	return l.dir.Close()
}
