package push

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"farkeep/pusher/freeze"
	"farkeep/pusher/listing"
	"farkeep/pusher/progress"
	"farkeep/pusher/repository"
	"farkeep/shared/contentname"
	"farkeep/shared/hint"
	"farkeep/shared/pushwire"
)

// picture is one repository, frozen where that is possible, and its manifest. A
// Borg repository's picture is taken once and shared by all targets; the last one
// that is done with it thaws it.
type picture struct {
	repository repository.Repository
	push       *Push

	mu     sync.Mutex // guards the fields below while the picture is made
	users  int        // targets that are not done with it yet
	made   bool
	err    error
	frozen *freeze.Freeze // nil for plain files
	// freezing is how long that took, most of it for Borg's lock if it was long.
	freezing time.Duration
	list     *list
}

// list is a manifest in a file of its own.
type list struct {
	path string
	listing.Result
}

func (l *list) open() (*os.File, error) { return os.Open(l.path) }

func (l *list) remove() {
	if l != nil {
		os.Remove(l.path)
	}
}

// take makes the picture, or waits for another target that makes it.
func (p *picture) take(ctx context.Context, lane *progress.Lane) (*list, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.made {
		return p.list, p.err
	}
	p.list, p.err = p.make(ctx, lane)
	p.made = true
	return p.list, p.err
}

func (p *picture) make(ctx context.Context, lane *progress.Lane) (*list, error) {
	r := p.repository
	if r.Kind != pushwire.KindBorg1 {
		return p.plain(ctx, lane)
	}
	opt := p.push.Lock
	opt.Log = p.push.Log
	opt.Journal = p.push.state("locks", r.Name)
	begun := p.push.Now()
	var err error
	p.frozen, err = freeze.Take(ctx, r.Path, opt)
	p.freezing = p.push.Now().Sub(begun)
	if err != nil {
		return nil, err
	}
	// The lock settles it: this is the repository that was checked before.
	if borg, err := repository.ReadBorg(r.Path); err != nil || borg.ID != r.ID {
		return nil, errors.Join(fmt.Errorf("repository %s was replaced by another while it was frozen", r.Name), err)
	}
	if p.frozen.Held {
		p.push.Log.Warn("borg's lock is held during the upload: hard links are impossible here", "repository", r.Name, "why", p.frozen.Why)
	} else {
		p.push.Log.Info("frozen", "repository", r.Name, "transaction", p.frozen.Transaction, "lock_held", p.frozen.Locked)
	}
	return p.push.list(ctx, r, p.frozen.Root, listing.Options{Include: p.frozen.Includes, Was: p.frozen.Was}, lane)
}

// fresh lists plain files anew: they may have changed since.
func (p *picture) fresh(ctx context.Context, lane *progress.Lane) (*list, error) {
	return p.plain(ctx, lane)
}

// root is the folder to upload from.
func (p *picture) root() string {
	if p.frozen != nil {
		return p.frozen.Root
	}
	return p.repository.Path
}

// check reports whether what was uploaded may be committed.
func (p *picture) check(ctx context.Context, l *list, lane *progress.Lane) error {
	if p.frozen != nil {
		return p.frozen.Check()
	}
	if p.repository.Layout == contentname.Restic {
		return p.still(l)
	}
	now, err := p.fresh(ctx, lane)
	if err != nil {
		return err
	}
	now.remove()
	if now.Digest != l.Digest {
		return &ChangedError{p.repository.Path}
	}
	return nil
}

// done says that one target is done with the picture.
func (p *picture) done() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.users--
	if p.users > 0 {
		return
	}
	p.list.remove()
	if p.frozen == nil {
		return
	}
	moved, err := p.frozen.Thaw()
	if err == nil {
		err = listing.Moved(p.push.state("cache", p.repository.Name), func(name string) (int64, int64, bool) {
			t, ok := moved[name]
			return t.Before, t.After, ok
		})
	}
	if err != nil {
		p.push.Log.Warn("after the push", "repository", p.repository.Name, "err", err)
	}
}

// state is the path of a repository's file in a folder of the pusher's state.
func (p *Push) state(folder, name string) string { return filepath.Join(p.State, folder, name) }

// list lists root into a new file.
func (p *Push) list(ctx context.Context, r repository.Repository, root string, opt listing.Options, lane *progress.Lane) (*list, error) {
	f, err := os.CreateTemp(filepath.Join(p.State, "work"), r.Name+".manifest-*")
	if err != nil {
		return nil, err
	}
	l := &list{path: f.Name()}
	lane.Begin("reading "+r.Name, 0)
	defer lane.End()
	opt.Cache, opt.Log, opt.Reread, opt.Now = p.state("cache", r.Name), p.Log, p.Reread, p.Now
	opt.Read = func(n int) { lane.Add(int64(n)) }
	l.Result, err = listing.Write(ctx, root, f, opt)
	if closed := f.Close(); err == nil {
		err = closed
	}
	if err != nil {
		l.remove()
		return nil, err
	}
	p.Log.Info("listed", "repository", r.Name, "files", l.Files, "bytes", l.Bytes, "files_read", l.Hashed, "bytes_read", l.HashedBytes)
	if s := l.Skipped; s.Count > 0 {
		p.Log.Warn("not mirrored: no generation can hold them", "repository", r.Name, "count", s.Count, "first", s.First, "kind", s.Kind)
	}
	return l, nil
}

// ChangedError says that a file is not what was listed any more.
type ChangedError struct{ Path string }

func (e *ChangedError) Error() string { return e.Path + " changed during the upload" }

// changedHint explains a file of a frozen Borg repository that changed.
func changedHint(err error) error {
	return hint.Because(err, "committed files of a Borg repository never change: check the disk with smartctl, and borg's version; before 1.1.18 and 1.2.1 borg empties a deleted segment through all its hard links")
}
