package appliance

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"

	"github.com/pkg/sftp"

	"farkeep/pusher/readback"
	storage "farkeep/shared/generations"
	"farkeep/shared/hint"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"
	"farkeep/shared/sshverb"
)

var _ readback.Source = (*Appliance)(nil)

// maxGenerations bounds a list of generations.
const maxGenerations = 1_000_000

// silence is how long the appliance may owe an answer without sending a byte. Its
// disk may have to retry a bad sector for a minute.
const silence = 3 * time.Minute

// window is how many requests of 32 KiB are under way for one file: as much as
// x/crypto/ssh lets a channel hold (2 MiB). More would wait in a queue.
const window = 64

// Generations implements readback.Source.
func (a *Appliance) Generations(ctx context.Context, repository string) ([]pushwire.Generation, error) {
	if repository != "" {
		if err := pushwire.CheckRepository(repository); err != nil {
			return nil, hint.Exit(hint.ExitUsage, err)
		}
	}
	client, err := a.connected(ctx)
	if err != nil {
		return nil, err
	}
	all, err := generations(ctx, client, repository)
	return all, a.ended(client, err)
}

func generations(ctx context.Context, client *sshverb.Client, repository string) (all []pushwire.Generation, err error) {
	verb := "generations"
	if repository != "" {
		verb += " " + repository
	}
	d, err := client.Start(ctx, verb)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	d.Stdin.Close()
	r := pushwire.NewReader(d.Stdout)
	for {
		var g pushwire.Generation
		err := pushwire.ReadLine(r, &g)
		if errors.Is(err, io.EOF) && !errors.Is(err, pushwire.ErrLine) {
			return all, d.Wait()
		}
		if err != nil {
			return nil, broken(d, err)
		}
		// These names become paths and file system names, and people see the words.
		_, _, nameErr := storage.ParseName(g.Name)
		if len(all) == maxGenerations || repository != "" && g.Repository != repository || errors.Join(nameErr, pushwire.CheckRepository(g.Repository)) != nil {
			return nil, fmt.Errorf("%s: the answer is not the list that was asked for", verb)
		}
		g.Standing, g.Why = printable(g.Standing), printable(g.Why)
		for i := range g.Reasons {
			g.Reasons[i] = printable(g.Reasons[i])
		}
		all = append(all, g)
	}
}

// printable makes an appliance's words safe for a terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, s)
}

// Open implements readback.Source.
func (a *Appliance) Open(ctx context.Context, repository, generation string) (readback.Tree, error) {
	client, err := a.connected(ctx)
	if err != nil {
		return nil, err
	}
	t := &tree{
		name: a.config.Name, top: "/" + repository + "/" + generation,
		lost: make(chan struct{}), closed: make(chan struct{}),
	}
	if t.stream, err = client.Subsystem(ctx, "sftp"); err != nil {
		return nil, a.ended(client, err)
	}
	heard := readerFunc(func(p []byte) (int, error) {
		n, err := t.stream.Read(p)
		t.heard.Add(1)
		return n, err
	})
	t.watch.Go(t.watchSilence) // the greeting may be waited for as well
	t.waiting.Add(1)
	t.sftp, err = sftp.NewClientPipe(heard, t.stream, sftp.MaxConcurrentRequestsPerFile(window))
	t.waiting.Add(-1)
	if err != nil {
		if told := t.told(err); hint.Code(told) != hint.ExitFailure {
			err = told
		} else {
			err = hint.Exit(hint.ExitUnreachable, fmt.Errorf("start sftp: %w", err))
		}
		t.Close()
		return nil, a.ended(client, err)
	}
	t.watch.Go(func() {
		t.sftp.Wait()
		close(t.lost)
	})
	return t, nil
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// tree is a generation over SFTP, in a session of its own.
type tree struct {
	name, top string
	stream    *sshverb.Stream
	sftp      *sftp.Client
	watch     sync.WaitGroup
	lost      chan struct{}
	closed    chan struct{}
	once      sync.Once

	waiting, heard atomic.Int64 // answers that are owed; packets that came
}

// watchSilence cuts a session whose peer owes an answer and sends nothing, though
// its SSH may still answer keepalives.
func (t *tree) watchSilence() {
	const step = silence / 12
	tick := time.NewTicker(step)
	defer tick.Stop()
	var last int64
	var quiet time.Duration
	for {
		select {
		case <-t.closed:
			return
		case <-tick.C:
		}
		now := t.heard.Load()
		if now != last || t.waiting.Load() == 0 {
			last, quiet = now, 0
			continue
		}
		if quiet += step; quiet >= silence {
			t.stream.Close()
			return
		}
	}
}

// Manifest implements readback.Tree.
func (t *tree) Manifest() (io.ReadCloser, error) {
	f, err := t.open(t.top + "/MANIFEST")
	if errors.Is(err, os.ErrNotExist) {
		err = hint.Because(err, "a push key sees no generation over sftp: take the restore key. Or it expired just now: list them again")
		return nil, hint.Exit(hint.ExitRefused, err)
	}
	if err != nil {
		return nil, err
	}
	return &struct {
		io.Reader
		io.Closer
	}{io.NewSectionReader(f, 0, manifest.MaxEntries*int64(manifest.MaxEntry)), f}, nil
}

// File implements readback.Tree.
func (t *tree) File(path string) (readback.File, error) {
	if err := manifest.CheckPath(path); err != nil {
		return nil, err
	}
	return t.open(t.top + "/files/" + path)
}

func (t *tree) open(path string) (*file, error) {
	t.waiting.Add(1)
	defer t.waiting.Add(-1)
	f, err := t.sftp.Open(path)
	if err != nil {
		return nil, t.told(err)
	}
	return &file{t, f}, nil
}

// Lost implements readback.Tree.
func (t *tree) Lost() <-chan struct{} { return t.lost }

// Close implements readback.Tree.
func (t *tree) Close() error {
	t.once.Do(func() {
		close(t.closed)
		t.stream.Close()
		if t.sftp != nil {
			t.sftp.Close()
		}
	})
	t.watch.Wait()
	return nil
}

// told tells an error of one file, which the appliance speaks of, from the end of
// the session.
func (t *tree) told(err error) error {
	var status *sftp.StatusError
	if errors.Is(err, io.EOF) || errors.Is(err, sftp.ErrSSHFxConnectionLost) || errors.Is(err, sftp.ErrSSHFxNoConnection) || !errors.As(err, &status) && !isFileError(err) {
		select {
		case <-t.closed:
			return hint.Exit(hint.ExitCancelled, fmt.Errorf("appliance %s: %w", t.name, context.Canceled))
		default:
		}
		t.stream.Close()
		if why := t.stream.Wait(); why != nil && hint.Code(why) != hint.ExitUnreachable {
			return fmt.Errorf("appliance %s: %w", t.name, why)
		}
		return hint.Exit(hint.ExitUnreachable, fmt.Errorf("appliance %s: the line to its files was cut: %w", t.name, err))
	}
	return fmt.Errorf("appliance %s: %w", t.name, err)
}

// isFileError knows the errors into which package sftp turns the codes for a
// missing and a forbidden file.
func isFileError(err error) bool {
	return errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission)
}

// file is an open file of a tree.
type file struct {
	t *tree
	f *sftp.File
}

// ReadAt implements io.ReaderAt.
func (f *file) ReadAt(p []byte, off int64) (int, error) {
	f.t.waiting.Add(1)
	n, err := f.f.ReadAt(p, off)
	f.t.waiting.Add(-1)
	if err != nil && !errors.Is(err, io.EOF) {
		err = f.t.told(err)
	}
	return n, err
}

// Close closes the file, without waiting for the appliance's word.
func (f *file) Close() error {
	go f.f.Close()
	return nil
}
