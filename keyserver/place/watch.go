package place

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"farkeep/keyserver/moment"
)

const (
	// DefaultEvery is how often WireGuard is asked. A request waits for the next
	// look, and must still be the newest that was heard then: a copy of a card sends
	// with the same key. A look at 500 peers takes milliseconds.
	DefaultEvery = 250 * time.Millisecond
	// TailscaleEvery is how often both are asked where Tailscale runs, whose answer
	// is larger.
	TailscaleEvery = time.Second
	// MaxEvery keeps the file from being stale between two looks.
	MaxEvery = LookWait - time.Second
)

// A Look is one VPN that can be asked.
type Look struct {
	Source  string
	Observe func(context.Context) ([]Observation, error)
}

// Watch is the part that runs as root. All fields but Table are needed.
type Watch struct {
	Looks []Look
	Path  string        // of the file
	Table string        // of the table of autonomous systems; "" for none
	Every time.Duration // up to MaxEvery
	Now   func() (moment.Moment, error)
	Log   *slog.Logger
}

// Run looks and writes until ctx ends. A VPN that does not answer is logged when
// that begins and ends. It gives up only where nothing can be written.
func (w *Watch) Run(ctx context.Context) error {
	now, err := w.Now()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(w.Path), 0o755); err != nil {
		return err
	}
	before, err := ReadFile(w.Path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		w.Log.Warn("where the peers were before is not known", "err", err)
	}
	t := &lazyTable{path: w.Table, log: w.Log}
	recorder := NewRecorder(now.Boot, before, t.as)
	broken := map[string]bool{}
	tick := time.NewTicker(w.Every)
	defer tick.Stop()
	for {
		t.refresh()
		if err := w.look(ctx, recorder, broken); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// look takes one look and writes it. The time is read before the VPN is asked: it
// must never say that it saw more than it did.
func (w *Watch) look(ctx context.Context, recorder *Recorder, broken map[string]bool) error {
	now, err := w.Now()
	if err != nil {
		return err
	}
	var all []Observation
	var silent []string
	for _, l := range w.Looks {
		ctx, cancel := context.WithTimeout(ctx, w.Every)
		seen, err := l.Observe(ctx)
		cancel()
		if err != nil {
			silent = append(silent, l.Source)
		}
		if failed := err != nil; failed != broken[l.Source] {
			broken[l.Source] = failed
			if failed {
				w.Log.Error("the VPN does not say where its peers are", "vpn", l.Source, "err", err)
			} else {
				w.Log.Info("the VPN says again where its peers are", "vpn", l.Source)
			}
		}
		all = append(all, seen...)
	}
	if ctx.Err() != nil {
		return nil
	}
	if err := recorder.Observe(now.Up, all, silent...).Write(w.Path); err != nil {
		return fmt.Errorf("say where the peers are: %w", err)
	}
	return nil
}

// lazyTable is a table that is read again when its file was replaced.
type lazyTable struct {
	path  string
	log   *slog.Logger
	info  os.FileInfo
	table *Table
}

func (t *lazyTable) as(a netip.Addr) uint32 {
	if t.table == nil {
		return 0
	}
	return t.table.AS(a)
}

// refresh keeps the table that it has where a newer one cannot be read.
func (t *lazyTable) refresh() {
	if t.path == "" {
		return
	}
	info, err := os.Stat(t.path)
	if err == nil && t.info != nil && os.SameFile(info, t.info) && info.ModTime().Equal(t.info.ModTime()) && info.Size() == t.info.Size() {
		return
	}
	if err != nil {
		if t.info != nil || t.table == nil && !errors.Is(err, fs.ErrNotExist) {
			t.log.Warn("the table of networks is gone", "err", err)
		}
		t.info = nil
		return
	}
	t.info = info
	table, err := ReadTable(t.path)
	if err != nil {
		t.log.Error("the table of networks cannot be read", "err", err)
		return
	}
	t.table = table
	t.log.Info("table of networks", "path", t.path, "ranges", table.Len())
}

// Once looks once and prints what is seen.
func (w *Watch) Once(ctx context.Context, to io.Writer) error {
	t := &lazyTable{path: w.Table, log: w.Log}
	t.refresh()
	for _, l := range w.Looks {
		seen, err := l.Observe(ctx)
		if err != nil {
			return err
		}
		for _, o := range seen {
			where := "nothing heard yet"
			switch {
			case o.Endpoint.IsValid():
				n := NetworkOf(o.Endpoint.Addr())
				n.AS = t.as(o.Endpoint.Addr())
				where = o.Endpoint.String() + " in " + n.String()
			case o.Relay != "":
				where = RelayOf(o.Relay).String()
			}
			fmt.Fprintf(to, "%s %s %v: %s\n", o.Source, o.Peer, o.Allowed, where)
		}
	}
	return nil
}
