package keeper

import (
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"

	"farkeep/appliance/status"
	"farkeep/shared/generations"
)

// As many repositories as a disk holds, each with as many suspect generations as
// are told of, fit into the status and the memory, and the longest history's are
// among those that are told.
func TestMemoryIsBounded(t *testing.T) {
	dir := t.TempDir()
	m, err := openMemory(dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	var suspects []status.SuspectStatus
	for range status.MaxSuspects {
		s := status.SuspectStatus{Generation: generations.Name(1, m.repositories["x"].NewestAt)}
		for range status.MaxReasons {
			s.Reasons = append(s.Reasons, strings.Repeat("<", status.MaxText))
		}
		suspects = append(suspects, s)
	}
	for i := range generations.MaxRepositories {
		m.repositories[fmt.Sprint(strings.Repeat("a", 120), i)] = repository{Digest: strings.Repeat("0", 64), Generations: 2, Suspects: suspects}
	}
	m.repositories["photos"] = repository{Generations: 9, Suspects: suspects[:1]}
	if err := m.saveRepositories(); err != nil {
		t.Fatal(err)
	}
	s := m.status()
	if err := status.Write(filepath.Join(dir, "status.json"), s); err != nil {
		t.Fatal(err)
	}
	again, err := openMemory(dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if len(again.repositories) != len(m.repositories) || len(again.repositories["photos"].Suspects) != 1 {
		t.Errorf("%d repositories were read back", len(again.repositories))
	}
	for _, r := range s.Repositories {
		if !r.Suspect {
			t.Errorf("%s is not told to be suspect", r.Name)
		}
	}
}
