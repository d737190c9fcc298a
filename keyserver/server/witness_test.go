package server

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"farkeep/keyserver/audit"
)

// What a stolen appliance can make the audit log grow by, in the worst case that
// the records allow: every kind of request with every outcome, as fast as it
// likes. The docs promise less than 12 MB a day.
func TestGrowthUnderAFlood(t *testing.T) {
	dir, err := os.MkdirTemp("/dev/shm", "farkeep-witness-") // a thousand records, each synced
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	clock := func() time.Time { return now }
	l, err := audit.Open(dir, clock)
	if err != nil {
		t.Fatal(err)
	}
	w := newWitness(l, slog.New(slog.DiscardHandler), clock)
	const hours = 3
	sent := 0
	for range hours * 60 {
		for range 5 {
			for _, event := range []string{"key", "lease", "checkin", "dark", "request", "connect"} {
				for _, decision := range []string{granted, held, refused, later, failed} {
					if event == "key" && decision == granted {
						continue // always written, and bounded by keys_per_day
					}
					sent++
					if err := w.record(audit.Record{
						Event: event, Decision: decision, Appliance: "attic", Reason: strings.Repeat("r", 100), UUID: strings.Repeat("0", 36),
						Remote: "[2001:db8:1111:2222:3333:4444:5555:6666]:65535", Place: "2001:db8:1111:2222:3333:4444:5555:6666 in 2001:db8:1111::/48",
						Identity: strings.Repeat("f", 50), Claims: strings.Repeat("c", 180), Token: "mismatch",
					}); err != nil {
						t.Fatal(err)
					}
				}
			}
		}
		now = now.Add(time.Minute)
	}
	// The flood is over; its counts are written all the same.
	now = now.Add(repeatWindow)
	w.flush(func(p *repeats) bool { return now.Sub(p.since) >= repeatWindow })
	files, err := filepath.Glob(filepath.Join(dir, "audit*.log"))
	if err != nil {
		t.Fatal(err)
	}
	var size int64
	for _, name := range files {
		info, err := os.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		size += info.Size()
	}
	counted := 0
	if err := audit.Read(dir, func(_ []byte, r audit.Record) error { counted += max(r.Count, 1); return nil }); err != nil {
		t.Fatal(err)
	}
	if counted != sent {
		t.Errorf("%d of %d requests are on record", counted, sent)
	}
	if day := size * 24 / hours; day > 12_000_000 {
		t.Errorf("%d bytes a day", day)
	}
}
