// Package staging lets stock sftp clients (OpenSSH's sftp and scp, rclone, restic)
// fill a repository. What they do happens in a staging copy, one for each key
// and repository, that persists on the disk next to the generations:
//
//	staging/<repository>/<key>/
//	    files/     what the client sees as /REPOSITORY
//	    MANIFEST   the list that the last commit made
//	    work/      files on their way into files/
//	    base, files.new/   while the copy is being made
//
// A new copy begins as hard links of the current generation's files, so that
// clients send differences only. Nothing here ever writes to a file that has a
// second name: writing, truncating and setting attributes give the name a file
// of its own first. A commit ([Area.Freeze]) happens only while nobody writes, and
// makes an ordinary push of the copy ([Frozen]): unchanged files are the base's, the
// others become objects of the push by a hard link. From then on they have two
// names, and the next write to one breaks the link again. So nothing that a peer
// can ask for changes a committed byte.
//
// What it leaves to callers: who a peer is, one push of a repository at a time,
// what becomes of a commit's answer.
package staging

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"farkeep/shared/beneath"
	"farkeep/shared/generations"
	"farkeep/shared/pushwire"
)

// Folder is where the copies lie, at the top of the disk.
const Folder = generations.StagingFolder

// Limits.
const (
	MaxSessions = 10        // sftp sessions at once
	MaxPerKey   = 8         // of them by one key
	MaxOpen     = 128       // files and folders that a session holds open
	MaxEntries  = 1_000_000 // files and folders of a copy
	MaxCopies   = 1024      // on one disk
	// IdleTimeout ends a session that asks for nothing: a person at a prompt may
	// think for a while, but the disk stays open for them.
	IdleTimeout = 15 * time.Minute
	// Quiet is how long a connection that stays open must not have changed
	// anything for a commit to take the copy for complete.
	Quiet = 10 * time.Second
)

// settle is how long a commit waits for sessions that are about to end.
const settle = 3 * time.Second

// Peer is whoever works on staging copies.
type Peer struct {
	Key          string
	Quota        int64                        // bytes, of generations and copies together; 0: none
	Sees         func(repository string) bool // which repositories exist for it
	Named        []string                     // those that exist for it even while they are empty
	Say          func(text string)            // tells a person in words what SFTP says with a number; may be nil
	IdleTimeout  time.Duration                // 0: IdleTimeout
	CommitQuiet  time.Duration                // 0: Quiet
	CommitSettle time.Duration                // 0: some seconds
}

// Area is the staging copies of one disk. It holds nothing open while nobody works
// on a copy. It is safe for concurrent use.
type Area struct {
	disk  string
	store *generations.Store
	log   *slog.Logger

	mu       sync.Mutex // guards the fields below
	trees    map[treeID]*tree
	sessions map[string]int // by key
	counted  map[string]bool
	used     map[string]usage
}

type treeID struct{ repository, key string }

// usage is what a key's generations take, as it was some seconds ago.
type usage struct {
	bytes int64
	at    time.Time
}

// usageAge is how old a usage may be: only commits change it.
const usageAge = 5 * time.Second

// New returns the copies of the disk that store lies on.
func New(disk string, store *generations.Store, log *slog.Logger) *Area {
	return &Area{
		disk: disk, store: store, log: log,
		trees: map[treeID]*tree{}, sessions: map[string]int{}, counted: map[string]bool{}, used: map[string]usage{},
	}
}

// HeldBy is what the copies of a key hold alone, in bytes: it counts for the key's
// quota.
func (a *Area) HeldBy(ctx context.Context, key string) (int64, error) {
	if err := a.countAll(ctx, key); err != nil {
		return 0, err
	}
	return a.held(key), nil
}

// held is what is known of that; of all keys for "".
func (a *Area) held(key string) int64 {
	var sum int64
	for _, t := range a.of(key) {
		sum += t.held()
	}
	return sum
}

func (a *Area) of(key string) (all []*tree) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for id, t := range a.trees {
		if id.key == key || key == "" {
			all = append(all, t)
		}
	}
	return all
}

// open opens staging/, and makes it if that is wanted.
func (a *Area) open(create bool) (*beneath.Dir, error) {
	if !create {
		return beneath.Open(filepath.Join(a.disk, Folder))
	}
	root, err := beneath.Open(a.disk)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	top, _, err := root.MakeDir(Folder, 0o700)
	return top, err
}

// copies lists the repositories of which there is a copy; of one key, or "" for all.
func (a *Area) copies(key string) (names []string, err error) {
	top, err := a.open(false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer top.Close()
	err = top.Each(func(e fs.DirEntry) error {
		if pushwire.CheckRepository(e.Name()) != nil {
			return nil
		}
		if key != "" {
			dir, err := top.Dir(e.Name())
			if err != nil {
				return err
			}
			defer dir.Close()
			if _, err := dir.Stat(key); err != nil {
				return nil
			}
		}
		names = append(names, e.Name())
		return nil
	})
	return names, err
}

// repositories lists what exists for a peer, sorted.
func (a *Area) repositories(p *Peer) ([]string, error) {
	committed, err := a.store.Repositories()
	if err != nil {
		return nil, err
	}
	staged, err := a.copies(p.Key)
	if err != nil {
		return nil, err
	}
	names := slices.Concat(p.Named, committed, staged)
	names = slices.DeleteFunc(names, func(n string) bool { return pushwire.CheckRepository(n) != nil || !p.Sees(n) })
	slices.Sort(names)
	return slices.Compact(names), nil
}

// errNoCopy: there is nothing to commit or discard.
var errNoCopy = errors.New("nothing was uploaded by sftp")

// enter opens a copy; leave must be called. Without begin there must be one
// already.
func (a *Area) enter(ctx context.Context, id treeID, begin bool) (*tree, error) {
	if err := errors.Join(pushwire.CheckRepository(id.repository), pushwire.CheckRepository(id.key)); err != nil {
		return nil, err
	}
	if !begin {
		names, err := a.copies(id.key)
		if err != nil {
			return nil, err
		}
		if !slices.Contains(names, id.repository) {
			return nil, fmt.Errorf("%s: %w", id.repository, errNoCopy)
		}
	}
	a.mu.Lock()
	t := a.trees[id]
	if t == nil {
		if len(a.trees) >= MaxCopies {
			a.mu.Unlock()
			return nil, refuse("there are %d staging copies already, which is the most", MaxCopies)
		}
		t = &tree{area: a, treeID: id, nodes: map[uint64]*node{}, changed: map[*Session]time.Time{}, free: make(chan struct{})}
		a.trees[id] = t
	}
	a.mu.Unlock()
	return t, t.enter(ctx, begin)
}

// countAll counts what the copies of a key hold, those included that nobody has
// opened yet.
func (a *Area) countAll(ctx context.Context, key string) error {
	a.mu.Lock()
	done := a.counted[key]
	a.mu.Unlock()
	if done {
		return nil
	}
	names, err := a.copies(key)
	if err != nil {
		return err
	}
	for _, name := range names {
		t, err := a.enter(ctx, treeID{name, key}, false)
		if errors.Is(err, errNoCopy) {
			continue
		}
		if err != nil {
			return err
		}
		err = t.count(ctx)
		t.leave()
		if err != nil {
			return err
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.counted[key] = true
	return nil
}

// usedBy is what the key's generations take.
func (a *Area) usedBy(ctx context.Context, key string) (int64, error) {
	a.mu.Lock()
	u, ok := a.used[key]
	a.mu.Unlock()
	if ok && time.Since(u.at) < usageAge {
		return u.bytes, nil
	}
	bytes, err := a.store.Used(ctx, key)
	if err != nil {
		return 0, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.used[key] = usage{bytes, time.Now()}
	return bytes, nil
}

// forgetUsage makes the next question look again.
func (a *Area) forgetUsage(key string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.used, key)
}

// join counts a session; the returned func ends it.
func (a *Area) join(key string) (func(), error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	total := 0
	for _, n := range a.sessions {
		total += n
	}
	if total >= MaxSessions || a.sessions[key] >= MaxPerKey {
		return nil, refuse("too many sftp connections at once: %d are possible, %d of one key", MaxSessions, MaxPerKey)
	}
	a.sessions[key]++
	return func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.sessions[key]--; a.sessions[key] == 0 {
			delete(a.sessions, key)
		}
	}, nil
}
