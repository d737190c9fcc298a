// Package borglock speaks the lock protocol of Borg 1.x, so that a repository
// can be held still for some seconds without running borg: "borg with-lock"
// writes new segments and leaves a transaction open while its command runs.
//
// The protocol, as borg's locking.py has it: whoever holds "lock.exclusive", a
// folder in the repository with one empty file HOST.PID-THREAD in it, may read
// and write "lock.roster", a JSON file with the holders of shared and exclusive
// locks. A writer (create, prune, compact, check, delete) keeps lock.exclusive
// for as long as it runs and enters only when the roster has no shared holder; a
// reader holds it for a moment, to enter itself as a shared holder and later to
// leave.
//
// [Shared] makes the caller a reader: writers wait, other readers do not. It
// removes another's lock only where borg itself would: the entry names this
// host, by borg's own host id, and a process that does not exist. It leaves to
// callers to keep the time of holding short: by default borg waits one second
// for a lock and then gives up.
package borglock

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/cenkalti/backoff/v5"
	"golang.org/x/sys/unix"
)

const (
	exclusiveName = "lock.exclusive"
	rosterName    = "lock.roster"

	// maxHolders bounds what is read of lock.exclusive: borg never puts more
	// than one file there.
	maxHolders = 64

	// leaveWait is how long Release waits for lock.exclusive. Borg's writers,
	// while a shared holder exists, take it for milliseconds at a time.
	leaveWait = time.Minute
)

var (
	// ErrReadOnly says that the repository lies on a read-only file system, where
	// nobody can take a lock, and nobody can write from this host.
	ErrReadOnly = errors.New("read-only file system")
	// ErrBroken says that the lock was removed by somebody else while it was
	// held, for instance with "borg break-lock".
	ErrBroken = errors.New("lock was broken by somebody else")
)

// HeldError says that the lock could not be had in time.
type HeldError struct {
	Repository string
	Waited     time.Duration
	Holders    []Entry
	Foreign    []string // names in lock.exclusive that are not borg's
	Alive      bool     // a holder is a living process of this host
}

func (e *HeldError) Error() string {
	var who []string
	for _, h := range e.Holders {
		who = append(who, h.String())
	}
	who = append(who, e.Foreign...)
	if len(who) == 0 {
		who = append(who, "somebody")
	}
	return fmt.Sprintf("wait %s for borg's lock on %s: held by %s", e.Waited.Round(time.Millisecond), e.Repository, strings.Join(who, ", "))
}

// Options tune [Shared].
type Options struct {
	// Wait is how long to wait for the lock; 0 means one attempt.
	Wait time.Duration
	// HostID is how borg names this host, see [HostID].
	HostID string
	// Journal, unless "", is a file in which the lock is noted while it is held.
	// An entry found there at the next attempt was left by a run that crashed and
	// is removed, even where its process number is in use again or borg's host id
	// has changed. The caller guarantees that no two processes share a journal.
	Journal string
	Log     *slog.Logger
}

// Lock is a shared lock that is held.
type Lock struct {
	repository string
	self       Entry
	opt        Options
}

// Shared takes a shared lock on the Borg repository in folder repository. It
// polls with jitter until opt.Wait has passed and then returns a *[HeldError];
// ErrReadOnly and a cancelled ctx end it at once.
func Shared(ctx context.Context, repository string, opt Options) (*Lock, error) {
	if opt.HostID == "" || strings.ContainsAny(opt.HostID, "/\x00\n") {
		return nil, fmt.Errorf("lock %s: host id %q cannot be part of a file name", repository, opt.HostID)
	}
	l := &Lock{
		repository: repository,
		self:       Entry{Host: opt.HostID, PID: os.Getpid()},
		opt:        opt,
	}
	if l.opt.Log == nil {
		l.opt.Log = slog.New(slog.DiscardHandler)
	}
	dead, err := readJournal(opt.Journal)
	if err != nil {
		return nil, err
	}
	// Before the lock exists: a crash at any later instant leaves it on record.
	if err := writeJournal(opt.Journal, append(dead, l.self)); err != nil {
		return nil, err
	}
	err = l.exclusively(ctx, opt.Wait, dead, func(r *roster) error {
		r.add(l.self)
		return nil
	})
	if err != nil {
		return nil, errors.Join(err, writeJournal(opt.Journal, dead))
	}
	return l, nil
}

// Held reports whether the lock is still ours: nil, [ErrBroken], or what kept it
// from looking. A picture taken under the lock is good only if Held says so
// afterwards.
func (l *Lock) Held() error {
	r, err := readRoster(filepath.Join(l.repository, rosterName))
	if err != nil {
		return fmt.Errorf("look after borg's lock on %s: %w", l.repository, err)
	}
	if !r.has(l.self) {
		return fmt.Errorf("borg's lock on %s: %w", l.repository, ErrBroken)
	}
	return nil
}

// Release gives the lock back. It does so even when the context that took it is
// cancelled. The error wraps [ErrBroken] when the lock was no longer ours.
func (l *Lock) Release() error {
	err := l.exclusively(context.Background(), leaveWait, nil, func(r *roster) error {
		if !r.remove(l.self) {
			return ErrBroken
		}
		return nil
	})
	if err != nil {
		err = fmt.Errorf("release borg's lock on %s: %w", l.repository, err)
	}
	if err == nil || errors.Is(err, ErrBroken) {
		err = errors.Join(err, writeJournal(l.opt.Journal, nil))
	}
	return err
}

// exclusively runs change on the roster while it holds lock.exclusive. Entries
// of processes known to be dead are gone from the roster that change sees.
func (l *Lock) exclusively(ctx context.Context, wait time.Duration, dead []Entry, change func(*roster) error) (err error) {
	owner, err := ownerOf(l.repository)
	if err != nil {
		return fmt.Errorf("lock %s: %w", l.repository, err)
	}
	defer owner.close()
	if err := l.enter(ctx, wait, owner, dead); err != nil {
		return err
	}
	defer func() {
		if left := l.leave(); left != nil && err == nil {
			err = left
		}
	}()
	r, err := readRoster(filepath.Join(l.repository, rosterName))
	if err != nil {
		return err
	}
	r.drop(func(e Entry) bool {
		stale := l.stale(e, dead)
		if stale {
			l.opt.Log.Warn("removed a stale entry from borg's lock roster", "repository", l.repository, "holder", e.String())
		}
		return stale
	})
	if err := change(r); err != nil {
		return err
	}
	return r.write(owner)
}

// enter takes lock.exclusive. The folder is made whole under another name and
// then renamed, so that no other process ever sees it without its holder; borg
// does the same.
func (l *Lock) enter(ctx context.Context, wait time.Duration, owner owner, dead []Entry) error {
	var suffix [6]byte
	rand.Read(suffix[:])
	made := exclusiveName + "." + hex.EncodeToString(suffix[:]) + ".tmp"
	if err := owner.mkdir(made); err != nil {
		if errors.Is(err, unix.EROFS) {
			return fmt.Errorf("lock %s: %w", l.repository, ErrReadOnly)
		}
		return fmt.Errorf("lock %s: %w", l.repository, err)
	}
	entry := filepath.Join(made, l.self.fileName())
	defer func() {
		// After the rename these are gone under their old names.
		owner.root.Remove(entry)
		owner.root.Remove(made)
	}()
	if err := owner.create(entry, nil); err != nil {
		return fmt.Errorf("lock %s: %w", l.repository, err)
	}

	held := filepath.Join(l.repository, exclusiveName)
	pause := backoff.NewExponentialBackOff()
	pause.InitialInterval = 20 * time.Millisecond
	pause.Multiplier = 1.3
	pause.MaxInterval = 500 * time.Millisecond
	start := time.Now()
	wasEmpty := false
	for {
		err := renameNew(filepath.Join(l.repository, made), held)
		if err == nil {
			return nil
		}
		if !errors.Is(err, fs.ErrExist) && !errors.Is(err, unix.ENOTEMPTY) {
			return fmt.Errorf("lock %s: %w", l.repository, err)
		}
		names, err := readNames(held)
		if err != nil {
			return fmt.Errorf("lock %s: %w", l.repository, err)
		}
		// A folder without a holder is what a release that was cut leaves behind.
		// An old borg makes it an instant before it enters its name, so it counts
		// as left behind only when it is still empty at the second look.
		if l.evict(held, names, dead, wasEmpty) {
			continue
		}
		wasEmpty = len(names) == 0
		left := wait - time.Since(start)
		if left <= 0 {
			return l.heldError(names, time.Since(start))
		}
		timer := time.NewTimer(min(pause.NextBackOff(), left))
		select {
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("wait for borg's lock on %s: %w", l.repository, context.Cause(ctx))
		case <-timer.C:
		}
	}
}

// evict removes lock.exclusive if every holder in it is provably dead.
func (l *Lock) evict(held string, names []string, dead []Entry, wasEmpty bool) bool {
	if len(names) == 0 {
		return wasEmpty && os.Remove(held) == nil
	}
	for _, name := range names {
		e, ok := parseFileName(name)
		if !ok || !l.stale(e, dead) {
			return false
		}
	}
	for _, name := range names {
		l.opt.Log.Warn("removed a stale borg lock", "repository", l.repository, "holder", name)
		os.Remove(filepath.Join(held, name))
	}
	return os.Remove(held) == nil
}

func (l *Lock) leave() error {
	held := filepath.Join(l.repository, exclusiveName)
	if err := os.Remove(filepath.Join(held, l.self.fileName())); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return ErrBroken
		}
		return err
	}
	if err := os.Remove(held); err != nil && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, fs.ErrExist) && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// stale applies borg's rule, and the journal's.
func (l *Lock) stale(e Entry, dead []Entry) bool {
	for _, d := range dead {
		if e == d {
			return true
		}
	}
	if e == l.self {
		return false
	}
	return e.Host == l.self.Host && e.Thread == 0 && !processExists(e.PID)
}

func (l *Lock) heldError(names []string, waited time.Duration) error {
	e := &HeldError{Repository: l.repository, Waited: waited}
	for _, name := range names {
		if entry, ok := parseFileName(name); ok {
			e.Holders = append(e.Holders, entry)
			e.Alive = e.Alive || entry.Host == l.self.Host && processExists(entry.PID)
		} else {
			e.Foreign = append(e.Foreign, strconv.Quote(name))
		}
	}
	return e
}

// processExists is borg's test: a signal 0 that finds nobody. A process that may
// not be signalled exists.
func processExists(pid int) bool {
	return pid > 0 && !errors.Is(unix.Kill(pid, 0), unix.ESRCH)
}

// renameNew renames a folder to a name that must not exist. Plain rename(2)
// would replace an empty folder, which another process may be about to fill.
func renameNew(from, to string) error {
	err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		// NFS and some FUSE file systems have no RENAME_NOREPLACE; there we do
		// exactly what borg does.
		return os.Rename(from, to)
	}
	return err
}

func readNames(dir string) ([]string, error) {
	d, err := os.Open(dir)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(maxHolders)
	if len(names) > 0 {
		return names, nil
	}
	if errors.Is(err, io.EOF) {
		return nil, nil
	}
	return nil, err
}

// owner is who the files of the lock should belong to: the repository's owner. A
// pusher that runs as root must not leave files behind that borg, run as the
// repository's user, cannot write or remove.
//
// That user may put a symbolic link in the place of whatever was just made here,
// so everything is made below root: a pusher that runs as root must not be led to
// give away another folder's files.
type owner struct {
	root     *os.Root // the repository
	uid, gid int
	group    bool // the repository is shared with its group
}

func ownerOf(repository string) (owner, error) {
	root, err := os.OpenRoot(repository)
	if err != nil {
		return owner{}, err
	}
	var st unix.Stat_t
	if err := unix.Stat(repository, &st); err != nil {
		root.Close()
		return owner{}, &fs.PathError{Op: "stat", Path: repository, Err: err}
	}
	return owner{root, int(st.Uid), int(st.Gid), st.Mode&0o020 != 0}, nil
}

func (o owner) close() { o.root.Close() }

// mkdir makes a folder in the repository.
func (o owner) mkdir(name string) error {
	if err := o.root.Mkdir(name, 0o700); err != nil {
		return err
	}
	if o.group {
		if err := o.root.Chmod(name, 0o770); err != nil {
			return err
		}
	}
	return o.give(name)
}

// create writes a new file in the repository.
func (o owner) create(name string, data []byte) error {
	f, err := o.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil && o.group {
		err = f.Chmod(0o660)
	}
	if closed := f.Close(); err == nil {
		err = closed
	}
	if err == nil {
		err = o.give(name)
	}
	return err
}

func (o owner) give(name string) error {
	if os.Geteuid() != 0 {
		return nil
	}
	err := o.root.Lchown(name, o.uid, o.gid)
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EOPNOTSUPP) {
		// A root without CAP_CHOWN, or a file system without owners.
		return nil
	}
	return err
}
