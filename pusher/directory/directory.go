// Package directory is a local folder as a target: a NAS mount, or a disk that
// is filled at home before it travels to its appliance. It holds the same
// generations, in the same layout, as an appliance's disk, and the appliance
// carries on from them.
//
// Nobody stands guard over a local folder: whoever owns home can remove
// generations here. It is a copy, not the protected history.
package directory

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"farkeep/pusher/target"
	"farkeep/shared/generations"
	"farkeep/shared/hint"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"
)

// Config says which folder.
type Config struct {
	Name string
	Path string // must exist
	// Used says that pushes were made here before: a folder without generations
	// is then an empty mount point and refused.
	Used bool
	// Pusher is who pushes, for generation.toml.
	Pusher string
	// Judge says whether a generation is suspect; nil: none is. Whoever owns home
	// owns a local folder, so that the pusher sets none.
	Judge generations.Judge
	Now   func() time.Time // nil means time.Now
	Log   *slog.Logger     // nil discards
}

// Directory implements target.Target.
type Directory struct {
	config Config

	mu     sync.Mutex // guards the fields below
	store  *generations.Store
	pushes map[string]*generations.Transaction // by the push's id
}

var _ target.Target = (*Directory)(nil)

// New returns the target without touching the folder.
func New(c Config) *Directory {
	if c.Now == nil {
		c.Now = time.Now
	}
	return &Directory{config: c, pushes: map[string]*generations.Transaction{}}
}

// Name implements target.Target.
func (d *Directory) Name() string { return d.config.Name }

func (d *Directory) wrap(err error) error {
	if err == nil {
		return nil
	}
	err = fmt.Errorf("target %s: %w", d.config.Name, err)
	if errors.Is(err, generations.ErrBusy) {
		err = hint.Exit(hint.ExitUnreachable, err) // it passes by itself, as on an appliance
	}
	return err
}

// Wake implements target.Target: it opens the folder.
func (d *Directory) Wake(context.Context) error {
	_, err := d.open()
	return d.wrap(err)
}

func (d *Directory) open() (*generations.Store, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.store != nil {
		return d.store, nil
	}
	if err := d.there(); err != nil {
		return nil, err
	}
	info, err := os.Stat(d.config.Path)
	if err != nil {
		return nil, err
	}
	opt := generations.Options{Judge: d.config.Judge, Now: d.config.Now, Log: d.config.Log}
	// A disk that was prepared for an appliance belongs to the appliance's user,
	// and so must everything on it.
	if st, ok := info.Sys().(*syscall.Stat_t); ok && os.Geteuid() == 0 && st.Uid != 0 {
		opt.Owner = &generations.Owner{UID: int(st.Uid), GID: int(st.Gid)}
	}
	d.store, err = generations.Open(d.config.Path, opt)
	return d.store, err
}

// there makes sure that the folder is the one that was used before.
func (d *Directory) there() error {
	info, err := os.Stat(d.config.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return hint.Because(fmt.Errorf("%s is not there", d.config.Path), "attach and mount the disk, or make the folder")
	}
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return fmt.Errorf("%s is not a folder", d.config.Path)
	}
	_, err = os.Lstat(filepath.Join(d.config.Path, generations.GenerationsFolder))
	if errors.Is(err, fs.ErrNotExist) && d.config.Used {
		return hint.Because(fmt.Errorf("%s had generations and has none now", d.config.Path), "is its disk mounted? For a new, empty disk give the target another name in site.toml")
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// Far implements target.Target.
func (d *Directory) Far() bool { return false }

// Offer implements target.Target.
func (d *Directory) Offer(ctx context.Context, repository string, offer pushwire.Offer, list target.List) (target.Answer, error) {
	answer, err := d.offer(ctx, repository, offer, list)
	return answer, d.wrap(err)
}

func (d *Directory) offer(ctx context.Context, repository string, offer pushwire.Offer, list target.List) (target.Answer, error) {
	store, err := d.open()
	if err != nil {
		return target.Answer{}, err
	}
	d.drop(func(id string) bool {
		of, err := generations.PushRepository(id)
		return err == nil && of == repository
	})
	answer, tx, err := store.Begin(ctx, generations.Request{Repository: repository, Offer: offer, Pusher: d.config.Pusher})
	if err == nil && answer.Answer == pushwire.AnswerSendManifest {
		answer, err = takeManifest(ctx, tx, list)
	}
	if err != nil {
		if tx != nil {
			tx.Close()
		}
		return target.Answer{}, err
	}
	if tx != nil {
		d.mu.Lock()
		d.pushes[tx.ID()] = tx
		d.mu.Unlock()
	}
	return target.Answer{OfferAnswer: answer.OfferAnswer, Needed: answer.Needed}, nil
}

func takeManifest(ctx context.Context, tx *generations.Transaction, list target.List) (generations.Answer, error) {
	r, err := list.Open("") // nothing is gained by a delta within a machine
	if err != nil {
		return generations.Answer{}, err
	}
	defer r.Close()
	return tx.TakeManifest(ctx, bufio.NewReader(r))
}

// drop closes the pushes whose ids match; what was uploaded for them stays.
func (d *Directory) drop(match func(id string) bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for id, tx := range d.pushes {
		if match(id) {
			tx.Close()
			delete(d.pushes, id)
		}
	}
}

func (d *Directory) push(id string) (*generations.Transaction, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	tx := d.pushes[id]
	if tx == nil {
		return nil, fmt.Errorf("push %.200s is not under way: offer it again", id)
	}
	return tx, nil
}

// Upload implements target.Target.
func (d *Directory) Upload(ctx context.Context, push string, write func(io.Writer) error) (pushwire.UploadAnswer, error) {
	tx, err := d.push(push)
	if err != nil {
		return pushwire.UploadAnswer{}, d.wrap(err)
	}
	answer, err := tx.Upload(ctx, write)
	if err != nil {
		d.drop(func(id string) bool { return id == push })
		return pushwire.UploadAnswer{}, d.wrap(err)
	}
	return answer, nil
}

// Commit implements target.Target.
func (d *Directory) Commit(ctx context.Context, push string) (pushwire.CommitAnswer, error) {
	store, err := d.open()
	if err != nil {
		return pushwire.CommitAnswer{}, d.wrap(err)
	}
	tx, err := d.push(push)
	if err != nil {
		if g, done := store.Committed(ctx, push); done {
			return pushwire.CommitAnswer{Generation: g.Name, Suspect: g.Suspect}, nil
		}
		return pushwire.CommitAnswer{}, d.wrap(err)
	}
	name, err := tx.Commit(ctx)
	d.drop(func(id string) bool { return id == push })
	if err != nil {
		return pushwire.CommitAnswer{}, d.wrap(err)
	}
	return pushwire.CommitAnswer{Generation: name}, nil
}

// Abort implements target.Target.
func (d *Directory) Abort(ctx context.Context, push string) error {
	tx, err := d.push(push)
	if err != nil {
		return d.wrap(err)
	}
	err = tx.Abort(ctx)
	d.drop(func(id string) bool { return id == push })
	return d.wrap(err)
}

// Heartbeat implements target.Target.
func (d *Directory) Heartbeat(ctx context.Context, h pushwire.Heartbeat) error {
	store, err := d.open()
	if err != nil {
		return d.wrap(err)
	}
	for _, r := range h.Repositories {
		newest, err := store.Newest(ctx, r.Name)
		if err != nil {
			return d.wrap(fmt.Errorf("heartbeat: %w", err))
		}
		var said manifest.Sum
		if err := said.UnmarshalText([]byte(r.Digest)); err != nil || said != newest.Digest {
			return d.wrap(fmt.Errorf("heartbeat refused: the newest generation of %s is %s, which is not what the heartbeat says", r.Name, newest.Name))
		}
	}
	return d.wrap(store.Heartbeat(h.Host, h.At, ""))
}

// Status implements target.Target.
func (d *Directory) Status(ctx context.Context) (*pushwire.Status, error) {
	d.mu.Lock()
	opened := d.store != nil
	d.mu.Unlock()
	if !opened {
		// Asking must not make a layout where there is none.
		if err := d.there(); err != nil {
			return nil, d.wrap(err)
		}
		if _, err := os.Lstat(filepath.Join(d.config.Path, generations.GenerationsFolder)); err != nil {
			return nil, d.wrap(hint.Because(fmt.Errorf("%s has no generations yet", d.config.Path), "push to it"))
		}
	}
	store, err := d.open()
	if err != nil {
		return nil, d.wrap(err)
	}
	free, _, total, err := store.Space()
	if err != nil {
		return nil, d.wrap(err)
	}
	s := &pushwire.Status{
		Appliance: d.config.Name,
		Board:     "directory",
		Time:      d.config.Now(),
		ClockSet:  true,
		Disk:      pushwire.DiskState{State: "mounted", Power: true, Unlocked: true, Mounted: true, TotalBytes: total, FreeBytes: free},
	}
	names, err := store.Repositories()
	if err != nil {
		return nil, d.wrap(err)
	}
	for _, name := range names {
		list, err := store.List(ctx, name)
		if err != nil {
			return nil, d.wrap(err)
		}
		if len(list) == 0 {
			continue
		}
		newest := list[len(list)-1]
		s.Repositories = append(s.Repositories, pushwire.RepositoryStatus{
			Name: name, Newest: newest.Name, NewestAt: newest.Committed, Generations: len(list), Suspect: newest.Suspect, Bytes: newest.Bytes,
		})
	}
	return s, nil
}

// Close implements target.Target.
func (d *Directory) Close() error {
	d.drop(func(string) bool { return true })
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.store == nil {
		return nil
	}
	err := d.store.Close()
	d.store = nil
	return d.wrap(err)
}
