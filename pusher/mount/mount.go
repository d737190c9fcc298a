// Package mount shows a generation as a read-only file system (FUSE).
//
// Names, sizes, modes and times come from the manifest, so that walking the tree
// costs no exchange with the target. Content is fetched in blocks as it is read,
// ahead of readers that go on, and kept in a bounded cache.
//
// A file that is read from its beginning to its end is compared with the hash
// that was taken at the source; if it differs, the read that would complete it
// fails, and all later ones. Whoever reads only pieces gets them as the target
// sent them: Borg checks every chunk itself, others should restore instead.
// Whatever the target cannot give is EIO.
package mount

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"sync/atomic"
	"syscall"
	"time"

	fusefs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"farkeep/pusher/readback"
	"farkeep/shared/hint"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"
)

// DefaultCache is how much of what was read is kept, in bytes.
const DefaultCache = 64 << 20

// Mount says what is shown where.
type Mount struct {
	Tree       readback.Tree
	Generation pushwire.Generation
	Folder     string // must exist
	Cache      int64  // bytes; 0 means DefaultCache
	// AllowOther lets every user of the machine read, and not the mounting one alone.
	AllowOther bool
	// Deny answers writes with EACCES in place of a read-only mount's EROFS: of the
	// two it is the one that "borg check" takes for a repository that is read-only.
	Deny bool
	Log  *slog.Logger
}

// Mounted is a generation that is shown.
type Mounted struct {
	mount  Mount
	server *fuse.Server
	cache  *cache
	stop   context.CancelFunc
}

// never makes the kernel ask once: nothing here changes.
var never = 24 * time.Hour

// Start shows the generation. The caller must Wait.
func (m Mount) Start(ctx context.Context) (*Mounted, error) {
	if err := Possible(); err != nil {
		return nil, err
	}
	if info, err := os.Stat(m.Folder); err != nil || !info.IsDir() {
		return nil, hint.Exit(hint.ExitUsage, errors.Join(fmt.Errorf("mount on %s: not a folder", m.Folder), err))
	}
	x, err := readIndex(m.Tree, m.Generation)
	if err != nil {
		return nil, fmt.Errorf("read the list of generation %s: %w", m.Generation.Name, err)
	}
	if m.Cache == 0 {
		m.Cache = DefaultCache
	}
	ctx, stop := context.WithCancel(ctx)
	c := newCache(ctx, m.Tree, x, m.Cache, m.Log)
	options := &fusefs.Options{
		EntryTimeout: &never, AttrTimeout: &never, NegativeTimeout: &never,
		NullPermissions: true, UID: uint32(os.Getuid()), GID: uint32(os.Getgid()),
		RootStableAttr: &fusefs.StableAttr{Mode: fuse.S_IFDIR, Ino: 1},
		Logger:         slog.NewLogLogger(m.Log.Handler(), slog.LevelDebug),
	}
	options.MountOptions = fuse.MountOptions{
		FsName: "farkeep:" + m.Generation.Repository + "/" + m.Generation.Name, Name: "farkeep",
		AllowOther: m.AllowOther, DisableXAttrs: true, MaxReadAhead: blockSize, MaxWrite: blockSize,
		Options: []string{"nosuid", "nodev", "noexec"},
	}
	if os.Geteuid() == 0 { // without fusermount3, which need not be installed
		options.DirectMountStrict = true
		options.DirectMountFlags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
		options.Options = nil
		if !m.Deny {
			options.DirectMountFlags |= unix.MS_RDONLY
		}
	} else if !m.Deny {
		options.Options = append(options.Options, "ro")
	}
	server, err := fusefs.Mount(m.Folder, &inode{cache: c}, options)
	if err != nil {
		stop()
		return nil, hint.Because(fmt.Errorf("mount on %s: %w", m.Folder, err), "%s", otherWay)
	}
	return &Mounted{mount: m, server: server, cache: c, stop: stop}, nil
}

const otherWay = `"farkeep-pusher restore" brings the files back without mounting anything`

// Possible says whether this machine can mount: if not, what is missing.
func Possible() error { return possible("/dev/fuse", os.Geteuid() == 0, exec.LookPath) }

func possible(device string, root bool, look func(string) (string, error)) error {
	if _, err := os.Stat(device); errors.Is(err, fs.ErrNotExist) {
		return hint.Because(fmt.Errorf("there is no %s: the kernel's FUSE is not loaded", device), "load it: modprobe fuse (in a container: pass the device in). Or: %s", otherWay)
	}
	if root {
		return nil
	}
	for _, name := range []string{"fusermount3", "fusermount"} {
		if _, err := look(name); err == nil {
			return nil
		}
	}
	return hint.Because(errors.New("there is no fusermount3, with which a user mounts"), "install it: apt install fuse3. Or: %s", otherWay)
}

// alive is how often an idle session is used, so that the appliance does not
// take it for one that was left behind.
const alive = time.Minute

// Wait shows the generation until ctx ends, somebody unmounts it, or the target
// cannot be read any more, which is the only error. It is unmounted then, even
// if somebody still uses it; what they read fails.
func (m *Mounted) Wait(ctx context.Context) error {
	unmounted := make(chan struct{})
	go func() {
		m.server.Wait()
		close(unmounted)
	}()
	tick := time.NewTicker(alive)
	defer tick.Stop()
	defer m.stop()
	for {
		select {
		case <-unmounted:
			m.cache.fetches.Wait()
			return nil
		case <-ctx.Done():
			return m.unmount(unmounted)
		case <-m.mount.Tree.Lost():
			err := hint.Because(errors.New("the line was cut"), "mount it again when the appliance is back")
			return hint.Exit(hint.ExitUnreachable, errors.Join(err, m.unmount(unmounted)))
		case <-tick.C:
			// It may hang with the line: that shows as Lost.
			go func() {
				if f, err := m.mount.Tree.Manifest(); err == nil {
					f.Close()
				}
			}()
		}
	}
}

func (m *Mounted) unmount(unmounted <-chan struct{}) error {
	m.mount.Tree.Close() // frees those who wait for bytes
	if err := m.server.Unmount(); err == nil {
		<-unmounted
		m.cache.fetches.Wait()
		return nil
	}
	// Somebody has a file or folder open. It goes from sight now, and altogether
	// when they let go.
	if err := Detach(m.mount.Folder); err != nil {
		return err
	}
	m.mount.Log.Warn("still in use, detached", "folder", m.mount.Folder)
	return nil
}

// Detach unmounts a folder, whoever still uses it.
func Detach(folder string) error {
	var err error
	if os.Geteuid() == 0 {
		err = unix.Unmount(folder, unix.MNT_DETACH)
	} else {
		err = exec.Command("fusermount3", "-u", "-z", folder).Run()
	}
	if err != nil {
		return hint.Because(fmt.Errorf("unmount %s: %w", folder, err), "umount -l %s", folder)
	}
	return nil
}

// inode is a file or folder as go-fuse knows it.
type inode struct {
	fusefs.Inode
	cache *cache
	at    int32
}

var (
	_ fusefs.NodeLookuper  = (*inode)(nil)
	_ fusefs.NodeReaddirer = (*inode)(nil)
	_ fusefs.NodeGetattrer = (*inode)(nil)
	_ fusefs.NodeOpener    = (*inode)(nil)
	_ fusefs.NodeStatfser  = (*inode)(nil)
	_ fusefs.FileReader    = (*handle)(nil)
)

func stable(at int32, n *node) fusefs.StableAttr {
	mode := uint32(fuse.S_IFREG)
	if n.kind == manifest.Folder {
		mode = fuse.S_IFDIR
	}
	return fusefs.StableAttr{Mode: mode, Ino: uint64(at) + 1}
}

func (i *inode) fill(at int32, out *fuse.Attr) {
	n := &i.cache.index.nodes[at]
	out.Mode = stable(at, n).Mode | n.mode
	out.Size = uint64(n.size)
	out.Blocks = (out.Size + 511) / 512
	out.Blksize = blockSize
	out.Nlink = 1
	t := time.Unix(0, n.mtime)
	out.SetTimes(&t, &t, &t)
}

// Lookup implements fusefs.NodeLookuper.
func (i *inode) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fusefs.Inode, syscall.Errno) {
	x := i.cache.index
	at, ok := x.child(i.at, name)
	if !ok {
		return nil, syscall.ENOENT
	}
	i.fill(at, &out.Attr)
	return i.NewInode(ctx, &inode{cache: i.cache, at: at}, stable(at, &x.nodes[at])), 0
}

// Readdir implements fusefs.NodeReaddirer.
func (i *inode) Readdir(context.Context) (fusefs.DirStream, syscall.Errno) {
	x := i.cache.index
	children := x.nodes[i.at].children
	list := make([]fuse.DirEntry, len(children))
	for n, at := range children {
		s := stable(at, &x.nodes[at])
		list[n] = fuse.DirEntry{Name: x.nodes[at].name, Mode: s.Mode, Ino: s.Ino}
	}
	return fusefs.NewListDirStream(list), 0
}

// Getattr implements fusefs.NodeGetattrer.
func (i *inode) Getattr(_ context.Context, _ fusefs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	i.fill(i.at, &out.Attr)
	return 0
}

// Statfs implements fusefs.NodeStatfser: as large as the generation, and full.
func (i *inode) Statfs(_ context.Context, out *fuse.StatfsOut) syscall.Errno {
	var bytes int64
	for _, n := range i.cache.index.nodes {
		bytes += n.size
	}
	out.Bsize, out.Frsize = 4096, 4096
	out.Blocks = uint64(bytes+4095) / 4096
	out.Files = uint64(len(i.cache.index.nodes))
	out.NameLen = manifest.MaxPart
	return 0
}

// Open implements fusefs.NodeOpener.
func (i *inode) Open(_ context.Context, flags uint32) (fusefs.FileHandle, uint32, syscall.Errno) {
	if flags&syscall.O_ACCMODE != syscall.O_RDONLY {
		return nil, 0, syscall.EACCES
	}
	return &handle{inode: i}, fuse.FOPEN_KEEP_CACHE, 0
}

// handle is a file that somebody has open.
type handle struct {
	*inode
	next  atomic.Int64 // where the last read ended
	ahead atomic.Int64 // blocks to fetch behind it
}

// Read implements fusefs.FileReader.
func (h *handle) Read(ctx context.Context, p []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	// Reads of one reader may come a little out of order: the kernel asks ahead too.
	ahead := h.ahead.Load()
	if gap := off - h.next.Load(); off > 0 && gap > -blockSize && gap < 2*blockSize {
		ahead = min(max(2*ahead, 1), maxAhead)
	} else {
		ahead = 0
	}
	h.ahead.Store(ahead)
	h.next.Store(off + int64(len(p)))
	n, err := h.cache.read(ctx, h.at, p, off, ahead)
	switch {
	case errors.Is(err, context.Canceled):
		return nil, syscall.EINTR
	case err != nil:
		h.cache.log.Warn("read", "path", h.cache.index.path(h.at), "offset", off, "err", err)
		return nil, syscall.EIO
	}
	return fuse.ReadResultData(p[:n]), 0
}
