package keeper

import (
	"bytes"
	"encoding/json"
	"path/filepath"
	"slices"
	"time"

	"farkeep/appliance/curator"
	"farkeep/appliance/status"
)

// ledger is what must be told of history, also while the disk is dark: the
// memory's file history.json. What decides about history lies on the disk.
type ledger struct {
	curator.State
	Events   []status.Event // oldest first
	Untrue   []status.Untrue
	Scrub    *status.Scrub
	Rot      []status.Rot
	RotCount int
	Curated  time.Time
}

// note changes the ledger, and writes it down if that made a difference. Who
// counts something up should not do so often: it lies on an SD card.
func (m *memory) note(change func(*ledger)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	change(&m.ledger)
	if err := m.saveLedger(); err != nil {
		m.log.Error("what is known of history cannot be written down", "err", err)
	}
}

// saveLedger writes the ledger down if it changed. m.mu is held.
func (m *memory) saveLedger() error {
	data, err := json.Marshal(m.ledger)
	if err != nil || bytes.Equal(data, m.written) {
		return err
	}
	if err := writeJSON(filepath.Join(m.dir, ledgerFile), m.ledger); err != nil {
		return err
	}
	m.written = data
	return nil
}

const ledgerFile = "history.json"

// tell puts the ledger into a status.
func (m *memory) tell(s *status.Keeper) {
	m.mu.Lock()
	defer m.mu.Unlock()
	l := m.ledger
	s.Frozen, s.FrozenSince, s.ClockDoubt = slices.Clone(l.Frozen), l.FrozenSince, l.ClockDoubt
	s.Room, s.Retiring = l.Room, slices.Clone(l.Retiring)
	s.Events, s.Untrue = slices.Clone(l.Events), slices.Clone(l.Untrue)
	s.Curated = l.Curated
	s.Scrub, s.Rot, s.RotCount = l.Scrub, slices.Clone(l.Rot), l.RotCount
}

// claimed takes note of a heartbeat that was not true. m.mu is held.
func (m *memory) claimed(host, what string, now time.Time) {
	u := status.Untrue{Host: host, At: now.UTC(), What: bounded([]string{what})[0]}
	rest := slices.DeleteFunc(slices.Clone(m.ledger.Untrue), func(o status.Untrue) bool { return o.Host == host && o.What == u.What })
	m.ledger.Untrue = slices.Insert(rest, 0, u)
	m.ledger.Untrue = m.ledger.Untrue[:min(len(m.ledger.Untrue), status.MaxUntrue)]
}

// bounded cuts texts that go into status files and mails.
func bounded(texts []string) []string {
	texts = slices.Clone(texts[:min(len(texts), status.MaxReasons)])
	for i, s := range texts {
		texts[i] = s[:min(len(s), status.MaxText)]
	}
	return texts
}
