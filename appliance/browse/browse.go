// Package browse shows the generations on the disk over SFTP (draft-ietf-secsh-
// filexfer-02, as OpenSSH speaks it), read-only:
//
//	/REPOSITORY/GENERATION/files/...
//
// There is no request that writes, renames, links, removes or changes a mode:
// each is answered with "permission denied". Paths are resolved by os.Root, so
// no name and no symbolic link on the disk leads out of the generations folder.
package browse

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"farkeep/appliance/listing"

	"github.com/pkg/sftp"
)

// A Disk is the generations folder of an open disk.
type Disk struct {
	root  *os.Root
	allow func(repository string) bool
	open  atomic.Int64
}

// MaxOpen bounds the files that one peer may hold open.
const MaxOpen = 256

// Open opens the generations folder at dir. Repositories that allow refuses do
// not exist for the peer. The caller must Close the Disk.
func Open(dir string, allow func(repository string) bool) (*Disk, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	return &Disk{root: root, allow: allow}, nil
}

// Close closes the folder. Serve must have returned.
func (d *Disk) Close() error { return d.root.Close() }

// Idle is how long a peer may think before its next request. The disk has power
// meanwhile; but somebody at sftp's prompt looks for a file, and must not lose the
// session over it. A line that is dead is found by SSH itself, much sooner.
const Idle = 15 * time.Minute

// Serve speaks SFTP until the peer hangs up: in is what it sends, out takes the
// answers. When no request came for idle, end is called, which must end the
// session and so in. All files that were opened are closed when Serve returns.
func (d *Disk) Serve(in io.Reader, out io.WriteCloser, idle time.Duration, end func()) error {
	rw := struct {
		io.Reader
		io.WriteCloser
	}{&patient{in, idle, end}, out}
	server := sftp.NewRequestServer(rw, sftp.Handlers{FileGet: d, FilePut: d, FileCmd: d, FileList: d}, sftp.WithRSAllocator())
	err := server.Serve()
	server.Close()
	// Peers hang up with files open, too: package sftp says io.ErrUnexpectedEOF then.
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return nil
	}
	return err
}

// patient waits for a peer, but not for ever.
type patient struct {
	r    io.Reader
	idle time.Duration
	end  func()
}

func (p *patient) Read(b []byte) (int, error) {
	defer time.AfterFunc(p.idle, p.end).Stop()
	return p.r.Read(b)
}

// local turns a request's path, absolute and cleaned by package sftp, into one
// below the root, "." for the top.
func (d *Disk) local(name string) (string, error) {
	name = strings.TrimPrefix(path.Clean("/"+name), "/")
	if name == "" {
		return ".", nil
	}
	repository, _, _ := strings.Cut(name, "/")
	if !d.allow(repository) {
		return "", sftp.ErrSSHFxNoSuchFile
	}
	return name, nil
}

// Fileread implements sftp.FileReader.
func (d *Disk) Fileread(r *sftp.Request) (io.ReaderAt, error) {
	name, err := d.local(r.Filepath)
	if err != nil {
		return nil, err
	}
	if d.open.Add(1) > MaxOpen {
		d.open.Add(-1)
		return nil, sftp.ErrSSHFxFailure
	}
	f, err := d.root.Open(name)
	if err != nil {
		d.open.Add(-1)
		return nil, status(err)
	}
	h := &handle{File: f, open: &d.open}
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		h.Close()
		return nil, sftp.ErrSSHFxFailure
	}
	return h, nil
}

// handle is an open file that counts itself.
type handle struct {
	*os.File
	open *atomic.Int64
}

// Close closes the file.
func (h *handle) Close() error {
	h.open.Add(-1)
	return h.File.Close()
}

// Filewrite implements sftp.FileWriter: it refuses.
func (d *Disk) Filewrite(*sftp.Request) (io.WriterAt, error) {
	return nil, sftp.ErrSSHFxPermissionDenied
}

// Filecmd implements sftp.FileCmder: it refuses.
func (d *Disk) Filecmd(*sftp.Request) error { return sftp.ErrSSHFxPermissionDenied }

// Filelist implements sftp.FileLister for List, Stat and Readlink.
func (d *Disk) Filelist(r *sftp.Request) (sftp.ListerAt, error) {
	name, err := d.local(r.Filepath)
	if err != nil {
		return nil, err
	}
	switch r.Method {
	case "List":
		return d.list(name)
	case "Stat":
		info, err := d.root.Stat(name)
		if err != nil {
			return nil, status(err)
		}
		return listing.Entries{info}, nil
	}
	return nil, sftp.ErrSSHFxOpUnsupported
}

// Lstat implements sftp.LstatFileLister.
func (d *Disk) Lstat(r *sftp.Request) (sftp.ListerAt, error) {
	name, err := d.local(r.Filepath)
	if err != nil {
		return nil, err
	}
	info, err := d.root.Lstat(name)
	if err != nil {
		return nil, status(err)
	}
	return listing.Entries{info}, nil
}

func (d *Disk) list(name string) (sftp.ListerAt, error) {
	f, err := d.root.Open(name)
	if err != nil {
		return nil, status(err)
	}
	if name != "." {
		return &folder{f: f}, nil
	}
	// The top is short, and what the peer may not see is left out of it.
	defer f.Close()
	all, err := f.Readdir(-1)
	if err != nil {
		return nil, status(err)
	}
	all = slices.DeleteFunc(all, func(i fs.FileInfo) bool { return !d.allow(i.Name()) })
	slices.SortFunc(all, func(a, b fs.FileInfo) int { return strings.Compare(a.Name(), b.Name()) })
	return listing.Entries(all), nil
}

// folder reads a folder as it is asked for, whatever its size: package sftp
// asks for one batch after the other.
type folder struct {
	f    *os.File
	next int64
}

func (l *folder) ListAt(out []fs.FileInfo, offset int64) (int, error) {
	if offset != l.next {
		return 0, sftp.ErrSSHFxFailure
	}
	batch, err := l.f.Readdir(len(out))
	n := copy(out, batch)
	l.next += int64(n)
	return n, err
}

func (l *folder) Close() error { return l.f.Close() }

// status maps an error to one that says nothing about the appliance's insides.
func status(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return sftp.ErrSSHFxNoSuchFile
	case errors.Is(err, fs.ErrPermission):
		return sftp.ErrSSHFxPermissionDenied
	}
	return sftp.ErrSSHFxFailure
}
