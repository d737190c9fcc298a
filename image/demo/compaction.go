package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"time"
)

// Of a compaction day: one file of each segment goes, so that all the others move.
// What is new is a fifth of what the new segments hold.
const (
	segmentFiles = 8
	segmentSize  = segmentFiles * firstSize // of notes, in bytes
	firstFiles   = 160
	firstSize    = 12_500
	newFiles     = 20
	newSize      = 20_000
	newBytes     = newFiles * newSize
)

// compaction is a day on which Borg moves most of a repository.
type compaction struct {
	before   map[string]int64 // segments and their sizes, as they were pushed last
	segments int              // new ones
	length   int64            // of the new ones, in bytes
	started  uint64           // what the VPN had carried before the push
	copied   int64            // by attempts that did not reach the end, in bytes
}

// segments of a repository, with their sizes.
func (b *borg) segments() (map[string]int64, error) {
	all := map[string]int64{}
	data := os.DirFS(filepath.Join(b.path, "data"))
	return all, fs.WalkDir(data, ".", func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		all[path] = info.Size()
		return nil
	})
}

// compactionDay takes a file out of every segment, has Borg move what is left
// there, and brings new files.
func (d *show) compactionDay(ctx context.Context) (c compaction, err error) {
	if c.before, err = d.notes.segments(); err != nil {
		return c, err
	}
	for i := 0; i < firstFiles; i += segmentFiles {
		if err := os.Remove(filepath.Join(d.notes.source, fileName("first", i))); err != nil {
			return c, err
		}
	}
	if err := d.notes.create(ctx, "wednesday"); err != nil {
		return c, err
	}
	if err := d.notes.run(ctx, "prune", "--keep-last=1", d.notes.path); err != nil {
		return c, err
	}
	if err := d.notes.run(ctx, "compact", d.notes.path); err != nil {
		return c, err
	}
	if err := d.notes.write("third", newFiles, newSize); err != nil {
		return c, err
	}
	if err := d.notes.create(ctx, "thursday"); err != nil {
		return c, err
	}
	now, err := d.notes.segments()
	if err != nil {
		return c, err
	}
	kept := 0
	for path, size := range now {
		if _, was := c.before[path]; was {
			kept++
			continue
		}
		c.segments++
		c.length += size
	}
	d.say("%d of %d segments are gone, %d are new: %d kB, of which %d kB were never pushed", len(c.before)-kept, len(c.before), c.segments, c.length/1000, newBytes/1000)
	if c.length < 4*newBytes {
		return c, errors.New("too little was moved: nothing would be shown")
	}
	c.started, err = d.s.Sent(d.vault.Name)
	return c, err
}

// interrupted begins a push and has stop end it once bytes have gone out. The
// push has a limit, so that little is under way at that moment, and much is still to come.
func (d *show) interrupted(ctx context.Context, c *compaction, bytes uint64, stop func() error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type end struct {
		out string
		err error
	}
	pushed := make(chan end, 1)
	d.vault.Pi.Mark()
	go func() {
		out, err := d.s.Push(ctx, "--target", d.vault.Name, "--json", "--rate-limit", "50000")
		pushed <- end{out, err}
	}()
	// What is still on its way of an earlier push counts for nothing.
	if err := errors.Join(d.says(ctx, offerTaken), d.uploading(ctx, d.vault, bytes)); err != nil {
		cancel()
		return errors.Join(err, (<-pushed).err)
	}
	if err := stop(); err != nil {
		return err
	}
	cancel() // without its target the pusher would go on trying for a while
	e := <-pushed
	if e.err == nil {
		return errors.New("the push had ended before it was interrupted: nothing was shown")
	}
	p, err := reported(e.out)
	c.copied += p.Copied
	d.say("until then it had sent %d kB, and had %d kB copied from the generation before", p.Sent/1000, p.Copied/1000)
	return err
}

// What the Pi says on its console: an offer was answered, and an upload that was cut
// off has been made durable as far as it came.
var (
	offerTaken = regexp.MustCompile(`keeper: done verb=offer`)
	uploadCut  = regexp.MustCompile(`keeper: refused or failed verb=upload`)
)

// says waits until the Pi says so, since its console was marked.
func (d *show) says(ctx context.Context, what *regexp.Regexp) error {
	return within(ctx, 5*time.Minute, func(ctx context.Context) error {
		_, err := d.vault.Pi.WaitLine(ctx, what)
		return err
	})
}

// resumed checks the push that went to the end, by what it reports.
func (d *show) resumed(c *compaction, out string) error {
	p, err := reported(out)
	if err != nil {
		return err
	}
	now, err := d.s.Sent(d.vault.Name)
	if err != nil {
		return err
	}
	line := int64(now - c.started)
	d.say("%s: %d files were still to come, of %d segments and the index; %d kB were sent, %d kB copied", p.Generation, p.Files, c.segments, p.Sent/1000, p.Copied/1000)
	d.say("through the VPN went %d kB in all, with every attempt and every handshake; the new segments have %d kB", line/1000, c.length/1000)
	if line > c.length/2 {
		return errors.New("that is more than half of them")
	}
	// What is copied comes first in these segments: it was complete when the first
	// attempt ended, and is not asked for again. Of the second attempt the Pi may have
	// lost everything with its power: it lasted for less than a batch does.
	if c.copied < c.length/2 || p.Copied > c.length/4 || p.Files > int64(c.segments)/2 {
		return fmt.Errorf("%d bytes were copied before the interruption; after it %d, and %d files came: the push did not go on where it was", c.copied, p.Copied, p.Files)
	}
	return nil
}

// pushed is what "farkeep-pusher push --json" tells of one push.
type pushed struct {
	Generation string `json:"generation"`
	Files      int64  `json:"files"`
	Sent       int64  `json:"sent"`   // bytes
	Copied     int64  `json:"copied"` // bytes
}

func reported(out string) (pushed, error) {
	var report struct {
		Pushes []pushed `json:"pushes"`
	}
	if err := json.Unmarshal([]byte(out), &report); err != nil || len(report.Pushes) != 1 {
		return pushed{}, fmt.Errorf("the pusher reports %q, %v", out, err)
	}
	return report.Pushes[0], nil
}
