package keeper

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"farkeep/appliance/status"
	"farkeep/shared/atomicfile"
	"farkeep/shared/generations"
	"farkeep/shared/hint"
	"farkeep/shared/pushwire"
)

// memory is what the keeper knows while the disk is dark. It lies in the
// keeper's folder on the state partition:
//
//	repositories.json        map of name to repository
//	heartbeats/HOST.json     the last heartbeat of each host
//	history.json             what must be told of history (ledger)
//
// All may be lost with the SD card: repositories and history are read again from
// the disk, heartbeats come with the next push. The first key that sends a host's
// heartbeat owns the host's name until then.
type memory struct {
	dir string
	log *slog.Logger

	mu           sync.Mutex // guards the fields below
	repositories map[string]repository
	heartbeats   map[string]beatFile
	fresh        map[string]bool // confirmed since the disk came: newer than what refresh reads
	read         bool            // a disk was read since the start: what it has not is nowhere
	recent       map[string]recentBeat
	ledger       ledger
	written      []byte // the ledger's file
}

// recentBeat is the last heartbeat of a host that was written down.
type recentBeat struct {
	at      time.Time // by this process's own count
	digests string
}

// repository is what is remembered of one.
type repository struct {
	Newest      string
	Digest      string
	NewestAt    time.Time
	ConfirmedAt time.Time
	Generations int
	Suspect     bool // of what is told: Suspects may be fewer than there are
	Suspects    []status.SuspectStatus
	Bytes       int64
}

// beatFile is heartbeats/HOST.json.
type beatFile struct {
	Host       string
	Key        string // whose heartbeats these are: no other key can send them
	At         time.Time
	ReceivedAt time.Time
}

// Limits of what is remembered, in hosts and bytes of a file.
const (
	maxHosts      = 64
	maxMemory     = 1 << 20
	heartbeatsDir = "heartbeats"
)

func openMemory(dir string, log *slog.Logger) (*memory, error) {
	m := &memory{dir: dir, log: log, repositories: map[string]repository{}, heartbeats: map[string]beatFile{}, fresh: map[string]bool{}, recent: map[string]recentBeat{}}
	if err := os.Mkdir(filepath.Join(dir, heartbeatsDir), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("keeper's memory: %w", err)
	}
	// What cannot be read is forgotten, and known again by tomorrow: an appliance
	// that does not start for it would be the greater harm.
	if err := readJSON(filepath.Join(dir, "repositories.json"), &m.repositories); err != nil {
		log.Error("what was known of repositories is lost", "err", err)
		m.repositories = map[string]repository{}
	}
	if err := readJSON(filepath.Join(dir, ledgerFile), &m.ledger); err != nil {
		log.Error("what was known of history is lost", "err", err)
		m.ledger = ledger{}
	}
	files, err := os.ReadDir(filepath.Join(dir, heartbeatsDir))
	if err != nil {
		return nil, fmt.Errorf("keeper's memory: %w", err)
	}
	for _, f := range files {
		host, ok := strings.CutSuffix(f.Name(), ".json")
		if !ok || pushwire.CheckRepository(host) != nil || len(m.heartbeats) == maxHosts {
			continue
		}
		var b beatFile
		if err := readJSON(filepath.Join(dir, heartbeatsDir, f.Name()), &b); err != nil || b.Host != host {
			log.Error("a heartbeat is lost", "host", host, "err", err)
			continue
		}
		m.heartbeats[host] = b
	}
	return m, nil
}

func readJSON(path string, v any) error {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Size() > maxMemory {
		return fmt.Errorf("%s has %d bytes, %d are the most", path, info.Size(), maxMemory)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// writeJSON replaces a file of the memory.
func writeJSON(path string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return atomicfile.Write(path, append(data, '\n'), 0o644)
}

func (m *memory) saveRepositories() error {
	return writeJSON(filepath.Join(m.dir, "repositories.json"), m.told())
}

// maxTold bounds the suspect generations that are told of in detail, over all
// repositories.
const maxTold = 32

// told is what is known of repositories, with details of so many suspect
// generations that it fits into a file. Those of the longest histories come first:
// whoever may push under any name must not crowd out what happened to others.
// m.mu is held.
func (m *memory) told() map[string]repository {
	names := slices.SortedFunc(maps.Keys(m.repositories), func(a, b string) int {
		return cmp.Or(m.repositories[b].Generations-m.repositories[a].Generations, strings.Compare(a, b))
	})
	out, left := map[string]repository{}, maxTold
	for _, name := range names {
		r := m.repositories[name]
		r.Suspect = r.Suspect || len(r.Suspects) > 0
		r.Suspects = r.Suspects[:min(len(r.Suspects), left)]
		left -= len(r.Suspects)
		out[name] = r
	}
	return out
}

// newDisk forgets that anything was confirmed on the disk that comes now.
func (m *memory) newDisk() {
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.fresh)
}

// refresh takes over what the disk says of all repositories. Reading a long
// history takes its time, so the lock is held only afterwards.
func (m *memory) refresh(ctx context.Context, store *generations.Store) error {
	names, err := store.Repositories()
	if err != nil {
		return err
	}
	next := map[string]repository{}
	for _, name := range names {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		r, err := look(ctx, store, name)
		if errors.Is(err, generations.ErrNone) {
			continue
		}
		if err != nil {
			return err
		}
		next[name] = r
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for name, old := range m.repositories {
		r, ok := next[name]
		switch {
		case !ok && !slices.Contains(names, name):
			m.log.Warn("a repository that was known is not on this disk", "repository", name)
		case ok:
			next[name] = m.remembered(name, r)
		case old.Newest != "":
			m.log.Warn("a repository that was known has no generation on this disk", "repository", name)
		}
	}
	m.read = true
	if reflect.DeepEqual(m.repositories, next) {
		return nil // spare the SD card
	}
	m.repositories = next
	return m.saveRepositories()
}

// look reads one repository's state from the disk, as if it was last confirmed by
// its commit.
func look(ctx context.Context, store *generations.Store, name string) (repository, error) {
	list, err := store.List(ctx, name)
	if err != nil {
		return repository{}, err
	}
	newest, err := store.Newest(ctx, name)
	if err != nil {
		return repository{}, err
	}
	r := repository{
		Newest: newest.Name, Digest: newest.Digest.String(), NewestAt: newest.Committed.UTC(), ConfirmedAt: newest.Committed.UTC(),
		Generations: len(list), Bytes: newest.Bytes,
	}
	for _, g := range list {
		if g.Standing == generations.Suspect && len(r.Suspects) < status.MaxSuspects {
			r.Suspects = append(r.Suspects, status.SuspectStatus{Generation: g.Name, At: g.Committed.UTC(), Reasons: bounded(g.Reasons)})
		}
	}
	return r, nil
}

// remembered adds to what the disk says when it was confirmed, and keeps what a
// commit has said since the disk was read. m.mu is held.
func (m *memory) remembered(name string, r repository) repository {
	old, ok := m.repositories[name]
	if !ok {
		return r
	}
	switch {
	case old.Newest == r.Newest && old.Digest == r.Digest:
		r.ConfirmedAt = old.ConfirmedAt
	case m.fresh[name]:
		return old
	}
	return r
}

// confirm takes note that the newest generation was offered or committed at now.
func (m *memory) confirm(ctx context.Context, store *generations.Store, name string, now time.Time) error {
	r, err := look(ctx, store, name)
	if err != nil {
		return err
	}
	r.ConfirmedAt = now.UTC()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.repositories[name] = r
	m.fresh[name] = true
	return m.saveRepositories()
}

// reread takes over what the disk says of one repository.
func (m *memory) reread(ctx context.Context, store *generations.Store, name string) error {
	r, err := look(ctx, store, name)
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.repositories[name] = m.remembered(name, r)
	return m.saveRepositories()
}

// beat records a heartbeat, if it is true: every repository that it names must
// have just that content in its newest generation. When the pusher's clock says it was
// is told to people, never judged by. One that says the same as the last of that
// host, less than HeartbeatInterval ago, is not written down again.
func (m *memory) beat(key string, b pushwire.Heartbeat, now time.Time) (written bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	old, ok := m.heartbeats[b.Host]
	if ok && old.Key != key {
		err := fmt.Errorf("heartbeat refused: those of %s come with another key", b.Host)
		return false, hint.Exit(hint.ExitRefused, hint.Because(err, "if the key was replaced, keep its name in the appliance's farkeep.toml"))
	}
	if !ok && len(m.heartbeats) >= maxHosts {
		return false, hint.Exit(hint.ExitRefused, fmt.Errorf("heartbeat refused: %d hosts are known already, which is the most", maxHosts))
	}
	for _, r := range b.Repositories {
		known, found := m.repositories[r.Name]
		switch {
		case found && known.Digest == r.Digest:
			continue
		case !found && !m.read:
			err := fmt.Errorf("heartbeat of %s: nothing is known of %s while the disk is dark", b.Host, r.Name)
			return false, hint.Exit(hint.ExitUnreachable, hint.Because(err, "push it again: the appliance's card is new, and its disk was not read yet"))
		}
		has := "there is none"
		if found {
			has = fmt.Sprintf("its newest generation %s has %.16s…", known.Newest, known.Digest)
		}
		// A host that nobody knows could have any name: then it is the key's.
		from := b.Host
		if !ok {
			from = key
		}
		m.claimed(from, fmt.Sprintf("host %s, key %s: repository %s has the content %.16q…, and %s", b.Host, key, r.Name, r.Digest, has), now)
		if err := m.saveLedger(); err != nil {
			m.log.Error("what is known of history cannot be written down", "err", err)
		}
		err := fmt.Errorf("heartbeat refused: the newest generation of %s is not what the heartbeat says", r.Name)
		return false, hint.Exit(hint.ExitRefused, hint.Because(err, "push %s first: a heartbeat means that everything is here", r.Name))
	}
	digests, err := json.Marshal(b.Repositories)
	if err != nil {
		return false, err
	}
	if last, ok := m.recent[b.Host]; ok && last.digests == string(digests) && time.Since(last.at) < HeartbeatInterval {
		return false, nil
	}
	file := beatFile{Host: b.Host, Key: key, At: b.At.UTC(), ReceivedAt: now.UTC()}
	if err := writeJSON(filepath.Join(m.dir, heartbeatsDir, b.Host+".json"), file); err != nil {
		return false, err
	}
	m.heartbeats[b.Host] = file
	m.recent[b.Host] = recentBeat{at: time.Now(), digests: string(digests)}
	for _, r := range b.Repositories {
		known := m.repositories[r.Name]
		known.ConfirmedAt = now.UTC()
		m.repositories[r.Name] = known
	}
	return true, m.saveRepositories()
}

// status is the memory as the status file shows it.
func (m *memory) status() status.Keeper {
	m.mu.Lock()
	defer m.mu.Unlock()
	var s status.Keeper
	told := m.told()
	for _, name := range slices.Sorted(maps.Keys(told)) {
		r := told[name]
		s.Repositories = append(s.Repositories, status.RepositoryStatus{
			Name: name, Newest: r.Newest, NewestAt: r.NewestAt, ConfirmedAt: r.ConfirmedAt, ChangedAt: r.NewestAt,
			Generations: r.Generations, Suspect: r.Suspect, Suspects: r.Suspects, Bytes: r.Bytes,
		})
	}
	for _, host := range slices.Sorted(maps.Keys(m.heartbeats)) {
		b := m.heartbeats[host]
		s.Heartbeats = append(s.Heartbeats, status.Heartbeat{Host: b.Host, At: b.At, ReceivedAt: b.ReceivedAt})
	}
	return s
}
