package directory

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"path/filepath"
	"sync"

	"farkeep/pusher/readback"
	"farkeep/shared/beneath"
	"farkeep/shared/generations"
	"farkeep/shared/hint"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"
)

// Reader is a folder of generations to read from. It writes nothing, and needs
// no more than a disk that is mounted read-only.
type Reader struct {
	name, path string
}

var _ readback.Source = (*Reader)(nil)

// NewReader returns the reader of the folder at path without touching it.
func NewReader(name, path string) *Reader { return &Reader{name, path} }

// Name implements readback.Source.
func (r *Reader) Name() string { return r.name }

// Wake implements readback.Source.
func (r *Reader) Wake(context.Context) error {
	store, err := r.open()
	if err != nil {
		return err
	}
	return store.Close()
}

// Close implements readback.Source.
func (r *Reader) Close() error { return nil }

func (r *Reader) wrap(err error) error { return (&Directory{config: Config{Name: r.name}}).wrap(err) }

func (r *Reader) open() (*generations.Store, error) {
	store, err := generations.Open(r.path, generations.Options{ReadOnly: true})
	if errors.Is(err, fs.ErrNotExist) {
		err = hint.Because(err, "is its disk mounted? The folder is the one that holds %q", generations.GenerationsFolder)
	}
	return store, r.wrap(err)
}

// Generations implements readback.Source.
func (r *Reader) Generations(ctx context.Context, repository string) ([]pushwire.Generation, error) {
	store, err := r.open()
	if err != nil {
		return nil, err
	}
	defer store.Close()
	names := []string{repository}
	if repository == "" {
		if names, err = store.Repositories(); err != nil {
			return nil, r.wrap(err)
		}
	}
	var all []pushwire.Generation
	for _, name := range names {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		list, err := store.List(ctx, name)
		if err != nil {
			return nil, r.wrap(err)
		}
		for _, g := range list {
			all = append(all, wire(g))
		}
	}
	return all, nil
}

func wire(g generations.Generation) pushwire.Generation {
	w := pushwire.Generation{
		Repository: g.Repository, Name: g.Name, Committed: g.Committed, Entries: g.Entries, Bytes: g.Bytes, NewBytes: g.NewBytes, Suspect: g.Suspect,
		Standing: string(g.Standing), Reasons: g.Reasons,
	}
	if g.Format != 0 {
		w.Digest = g.Digest.String()
	}
	return w
}

// Open implements readback.Source.
func (r *Reader) Open(ctx context.Context, repository, generation string) (readback.Tree, error) {
	if err := pushwire.CheckRepository(repository); err != nil {
		return nil, hint.Exit(hint.ExitUsage, err)
	}
	if _, _, err := generations.ParseName(generation); err != nil {
		return nil, hint.Exit(hint.ExitUsage, err)
	}
	top, err := beneath.Open(r.path)
	if err != nil {
		return nil, r.wrap(err)
	}
	defer top.Close()
	dir, err := top.Dir(filepath.Join(generations.GenerationsFolder, repository, generation))
	if err != nil {
		return nil, r.wrap(err)
	}
	t := &tree{dir: dir, lost: make(chan struct{})}
	context.AfterFunc(ctx, func() { t.Close() })
	return t, nil
}

// tree is a generation in a local folder. No link in it is followed.
type tree struct {
	mu   sync.RWMutex // held by whoever uses dir, exclusively to close it
	dir  *beneath.Dir
	lost chan struct{}
	once sync.Once
}

// Manifest implements readback.Tree.
func (t *tree) Manifest() (io.ReadCloser, error) { return t.file(generations.ManifestFile) }

// File implements readback.Tree.
func (t *tree) File(path string) (readback.File, error) {
	if err := manifest.CheckPath(path); err != nil {
		return nil, err
	}
	return t.file(generations.FilesFolder + "/" + path)
}

func (t *tree) file(path string) (interface {
	readback.File
	io.Reader
}, error) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if t.dir == nil {
		return nil, context.Canceled
	}
	f, _, err := t.dir.Open(path)
	if err != nil {
		return nil, err
	}
	return f, nil
}

// Lost implements readback.Tree.
func (t *tree) Lost() <-chan struct{} { return t.lost }

// Close implements readback.Tree.
func (t *tree) Close() error {
	t.once.Do(func() { close(t.lost) })
	t.mu.Lock()
	defer t.mu.Unlock()
	dir := t.dir
	t.dir = nil
	return dir.Close()
}
