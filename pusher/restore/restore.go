// Package restore brings a generation, or a part of one, into a local folder.
//
// What arrives is compared with the hashes in the generation's manifest before it
// gets its name, and every name comes through package manifest and is opened by
// package beneath: a source that lies, or links that somebody planted below the
// folder, make errors and nothing else.
//
// A restore that was cut goes on in the same folder:
//
//	FOLDER/.farkeep-restore-DIGEST/MANIFEST    what is being restored
//	                               wanted      the part of it, if not all
//	                               N           the beginning of the file at index N
//	FOLDER/...                                 files that are complete
//
// It reads what is there, and fetches what is not or has another hash. The
// first folder goes away at the end, when everything was found right.
package restore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/cenkalti/backoff/v5"
	"golang.org/x/sys/unix"

	"farkeep/pusher/progress"
	"farkeep/pusher/readback"
	"farkeep/pusher/target"
	"farkeep/shared/beneath"
	"farkeep/shared/hint"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"
)

// MaxBad bounds the problems that a Report lists; Bad counts them all.
const MaxBad = 1000

// Restore says what goes where.
type Restore struct {
	Source     readback.Source
	Generation pushwire.Generation
	// Paths are files and folders of the generation; none means everything.
	Paths []string
	// To is the folder: empty, not there yet, or left by a restore of the same.
	To string
	// GiveUp ends the restore when nothing has come for so long; 0 means 30 minutes.
	GiveUp time.Duration
	Lane   *progress.Lane // may be nil
	Log    *slog.Logger
}

// Report is what was done.
type Report struct {
	Files, Bytes int64 // right in the folder now
	Kept         int64 // of these bytes, those that were there before
	Bad          int64 // files that could not be restored
	Problems     []Problem
}

// Problem is a file that could not be restored.
type Problem struct {
	Path string
	Err  error
}

// run is a restore under way.
type run struct {
	Restore
	root  *beneath.Dir
	state *beneath.Dir // .farkeep-restore-DIGEST
	name  string       // its name
	done  *indexes     // files that need nothing more in this run
	moved chan struct{}

	report shared
}

// Run restores. The Report is there whatever the error says; a restore in which
// files are bad ends with an error of code hint.ExitPartial.
func (o Restore) Run(ctx context.Context) (Report, error) {
	if o.GiveUp == 0 {
		o.GiveUp = 30 * time.Minute
	}
	r := &run{Restore: o, name: ".farkeep-restore-" + digestStart(o.Generation), moved: make(chan struct{}, 1)}
	err := r.run(ctx)
	report := r.report.get()
	if err == nil && report.Bad > 0 {
		err = hint.Because(fmt.Errorf("%d files of generation %s could not be restored", report.Bad, o.Generation.Name),
			`the rest is there. "verify" asks the appliance for the same; once it has healed the files, or with another generation, run this again`)
		err = hint.Exit(hint.ExitPartial, err)
	}
	return report, err
}

// digestStart names a generation's content in 16 characters. A generation cannot
// hold a file that is named by its own digest.
func digestStart(g pushwire.Generation) string {
	var sum manifest.Sum
	if sum.UnmarshalText([]byte(g.Digest)) != nil {
		return "unknown"
	}
	return sum.String()[:16]
}

func (r *run) run(ctx context.Context) error {
	if r.Generation.Digest == "" {
		return fmt.Errorf("generation %s cannot be read by the target itself", r.Generation.Name)
	}
	for _, p := range r.Paths {
		if err := manifest.CheckPath(p); err != nil {
			return hint.Exit(hint.ExitUsage, fmt.Errorf("path %q: %w", p, err))
		}
	}
	if err := r.claim(); err != nil {
		return err
	}
	defer r.root.Close()
	defer r.state.Close()

	retry := backoff.NewExponentialBackOff()
	retry.MaxInterval = time.Minute
	last := time.Now()
	for {
		err := r.attempt(ctx)
		select {
		case <-r.moved:
			last = time.Now()
			retry.Reset()
		default:
		}
		if ctx.Err() != nil {
			return hint.Because(ctx.Err(), "run the same command again: it goes on where it was")
		}
		if !target.Temporary(err) {
			return full(r.To, err)
		}
		if time.Since(last) > r.GiveUp {
			return hint.Because(err, "run the same command again when it is back: what is there stays")
		}
		wait := retry.NextBackOff()
		r.Log.Warn("cut off, trying again", "target", r.Source.Name(), "err", err, "in", wait.Round(time.Second))
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
	}
}

// full explains a disk that has no room.
func full(where string, err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return hint.Because(err, "make room there and run the same command again: what is there stays, in %s", where)
	}
	return err
}

// claim opens the folder, makes sure that it is ours, and locks it.
func (r *run) claim() (err error) {
	err = os.Mkdir(r.To, 0o700)
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return hint.Exit(hint.ExitUsage, err)
	}
	if r.root, err = beneath.Open(r.To); err != nil {
		return hint.Exit(hint.ExitUsage, err)
	}
	defer func() {
		if err != nil {
			r.state.Close()
			r.root.Close()
		}
	}()
	if err = r.root.Lock(); err != nil {
		return hint.Because(fmt.Errorf("restore to %s: %w", r.To, err), "another restore works there: wait for it, or name another folder")
	}
	foreign, other := "", false
	err = r.root.Each(func(e fs.DirEntry) error {
		switch name := e.Name(); {
		case name == r.name:
			other = false
			foreign = ""
			return errFound
		case name == "lost+found": // a new file system has it
		case strings.HasPrefix(name, ".farkeep-restore-"):
			other = true
		default:
			foreign = name
		}
		return nil
	})
	if err != nil && !errors.Is(err, errFound) {
		return err
	}
	switch {
	case other:
		err = fmt.Errorf("%s holds a restore of another generation that was not finished", r.To)
		return hint.Exit(hint.ExitUsage, hint.Because(err, "finish that one, remove the folder, or name another"))
	case foreign != "":
		err = fmt.Errorf("%s is not empty: there is %q", r.To, foreign)
		return hint.Exit(hint.ExitUsage, hint.Because(err, "name a folder that is empty or does not exist: what lies there is never mixed with a restore"))
	}
	if r.state, _, err = r.root.MakeDir(r.name, 0o700); err != nil {
		return err
	}
	return r.sameWish()
}

var errFound = errors.New("found")

// sameWish makes sure that an unfinished restore is continued with the same paths.
func (r *run) sameWish() error {
	const file = "wanted"
	wish := []byte(strings.Join(slices.Sorted(slices.Values(r.Paths)), "\n"))
	was, err := r.state.ReadFile(file, 16<<20)
	if errors.Is(err, fs.ErrNotExist) {
		return full(r.To, r.state.WriteFile(file, wish, 0o600, nil))
	}
	if err == nil && !bytes.Equal(was, wish) {
		err = fmt.Errorf("%s holds an unfinished restore of other paths of this generation", r.To)
		err = hint.Exit(hint.ExitUsage, hint.Because(err, "finish that one with the same paths, or name another folder"))
	}
	return err
}

// attempt goes through everything once, on one connection.
func (r *run) attempt(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	wake, stop := context.WithTimeout(ctx, r.GiveUp)
	err := r.Source.Wake(wake)
	stop()
	if err != nil {
		return err
	}
	tree, err := r.Source.Open(ctx, r.Generation.Repository, r.Generation.Name)
	if err != nil {
		return err
	}
	defer tree.Close()
	list, err := r.fetchList(tree)
	if err != nil {
		return err
	}
	defer list.Close()
	if r.done == nil {
		if err := r.plan(list); err != nil {
			return err
		}
	}
	if err := r.content(ctx, tree, list); err != nil {
		return err
	}
	if r.report.get().Bad > 0 {
		return r.root.SyncFS()
	}
	return r.finish(list)
}

// fetchList brings the manifest over, unless it is there.
func (r *run) fetchList(tree readback.Tree) (*os.File, error) {
	check := func(f io.Reader) error {
		_, err := readback.Entries(f, r.Generation, func(manifest.Entry) error { return nil })
		return err
	}
	f, _, err := r.state.Open("MANIFEST")
	if err == nil {
		if err = check(f); err == nil {
			return f, nil
		}
		f.Close()
	}
	source, err := tree.Manifest()
	if err != nil {
		return nil, fmt.Errorf("read the list of generation %s: %w", r.Generation.Name, err)
	}
	defer source.Close()
	f, _, err = r.state.OpenWrite("MANIFEST", unix.O_CREAT|unix.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	// Checked while it comes: a source without end ends at the first wrong byte.
	if err = check(io.TeeReader(source, f)); err != nil {
		f.Close()
		r.state.Remove("MANIFEST")
		return nil, fmt.Errorf("the list of generation %s: %w", r.Generation.Name, err)
	}
	return f, nil
}

// each goes through the entries that are wanted, in order.
func (r *run) each(list *os.File, do func(index int64, e manifest.Entry) error) error {
	if _, err := list.Seek(0, io.SeekStart); err != nil {
		return err
	}
	index := int64(-1)
	_, err := readback.Entries(list, r.Generation, func(e manifest.Entry) error {
		index++
		if !r.wanted(e) {
			return nil
		}
		return do(index, e)
	})
	return err
}

// wanted says whether an entry is one of Paths, lies in one, or leads to one.
func (r *run) wanted(e manifest.Entry) bool {
	if len(r.Paths) == 0 {
		return true
	}
	return slices.ContainsFunc(r.Paths, func(p string) bool {
		return e.Path == p || strings.HasPrefix(e.Path, p+"/") || e.Kind == manifest.Folder && strings.HasPrefix(p, e.Path+"/")
	})
}

// plan makes sure that the wish can be fulfilled before anything is fetched.
func (r *run) plan(list *os.File) error {
	var files, entries, total int64
	found := make([]bool, len(r.Paths))
	err := r.each(list, func(index int64, e manifest.Entry) error {
		if top, _, _ := strings.Cut(e.Path, "/"); top == r.name {
			return fmt.Errorf("the generation holds %q, a name that its own restore needs", e.Path)
		}
		for i, p := range r.Paths {
			found[i] = found[i] || e.Path == p
		}
		if e.Kind == manifest.File {
			files++
			total += e.Size
		}
		entries = index + 1
		return nil
	})
	if err != nil {
		return err
	}
	for i, p := range r.Paths {
		if !found[i] {
			err := fmt.Errorf("generation %s has no %q", r.Generation.Name, p)
			return hint.Exit(hint.ExitUsage, hint.Because(err, "paths are relative to the repository, without a slash at the beginning or the end"))
		}
	}
	if err := r.room(list, total); err != nil {
		return err
	}
	r.done = newIndexes(entries)
	r.Log.Debug("restoring", "generation", r.Generation.Name, "files", files, "bytes", total)
	if r.Lane != nil {
		r.Lane.Begin(r.Generation.Repository, total)
	}
	return nil
}

// room refuses what does not fit. What an earlier run left counts as fitting.
func (r *run) room(list *os.File, total int64) error {
	space, err := r.root.Space()
	if err != nil {
		return err
	}
	if total <= space.Free {
		return nil
	}
	var there int64
	err = r.each(list, func(index int64, e manifest.Entry) error {
		if e.Kind != manifest.File {
			return nil
		}
		if f, st, err := r.root.Open(e.Path); err == nil {
			f.Close()
			there += min(st.Size, e.Size)
		} else if st, err := r.state.Stat(partName(index)); err == nil {
			there += min(st.Size, e.Size)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if total-there > space.Free {
		err := fmt.Errorf("%s has no room: %s more are needed, %s are free", r.To, progress.Bytes(total-there), progress.Bytes(space.Free))
		return hint.Because(err, "make room there, or name a folder on another disk")
	}
	return nil
}

// finish gives the folders their modes and times and removes what the restore
// needed itself.
func (r *run) finish(list *os.File) error {
	var folders []manifest.Entry
	err := r.each(list, func(_ int64, e manifest.Entry) error {
		if e.Kind == manifest.Folder {
			folders = append(folders, e)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, e := range slices.Backward(folders) {
		parent, name, err := r.parent(e.Path)
		if err != nil {
			return err
		}
		at := unix.NsecToTimespec(e.MTime)
		err = errors.Join(parent.SetTimes(name, at, at), parent.Chmod(name, e.Mode&^unix.S_ISUID))
		r.leave(parent)
		if err != nil {
			return err
		}
	}
	if err := r.root.SyncFS(); err != nil {
		return err
	}
	if err := r.root.RemoveAll(r.name); err != nil {
		return err
	}
	return r.root.Sync()
}

// parent opens the folder in which p lies.
func (r *run) parent(p string) (*beneath.Dir, string, error) {
	folder, name := path.Split(p)
	if folder == "" {
		return r.root, name, nil
	}
	d, err := r.root.Dir(strings.TrimSuffix(folder, "/"))
	return d, name, err
}

// leave closes what parent opened.
func (r *run) leave(d *beneath.Dir) {
	if d != r.root {
		d.Close()
	}
}
