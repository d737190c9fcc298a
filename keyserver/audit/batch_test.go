package audit_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"farkeep/keyserver/audit"

	"golang.org/x/sys/unix"
)

// Records that come while the disk is busy are written together, each is in the
// chain, and each caller gets the head of its own.
func TestRecordsAreWrittenTogether(t *testing.T) {
	l, dir := open(t)
	fill(t, l, 1)
	// Another process holds the log: as if the disk took its time.
	busy, err := os.OpenFile(filepath.Join(dir, "audit.lock"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(busy.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	const many = 200
	heads := make([]string, many)
	var all sync.WaitGroup
	for i := range many {
		all.Go(func() {
			var err error
			if heads[i], err = l.Append(audit.Record{Event: "key", Decision: "granted", Appliance: fmt.Sprintf("a%d", i)}); err != nil {
				t.Error(err)
			}
		})
	}
	for deadline := time.Now().Add(time.Minute); l.Waiting() < many-1; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d records wait", l.Waiting())
		}
	}
	before := l.Commits()
	busy.Close()
	all.Wait()
	// The first was begun alone; the others come by 32.
	if n := l.Commits() - before; n != 7 {
		t.Errorf("%d records were written in %d goes; want 7", many-1, n)
	}
	if s, err := audit.Verify(dir, heads...); err != nil || s.Records != many+1 || s.Heads != many {
		t.Errorf("%+v, %v", s, err)
	}
}

// A record that cannot be written does not take the others of its batch with it.
func TestOneBadRecordInABatch(t *testing.T) {
	l, dir := open(t)
	fill(t, l, 1)
	var all sync.WaitGroup
	for i := range 50 {
		all.Go(func() {
			r := audit.Record{Event: "key"}
			if i%7 == 0 {
				r.Event = strings.Repeat("x", audit.MaxLine)
			}
			if head, err := l.Append(r); (err != nil) != (i%7 == 0) || (head == "") != (err != nil) {
				t.Errorf("record %d: head %q, %v", i, head, err)
			}
		})
	}
	all.Wait()
	if s, err := audit.Verify(dir); err != nil || s.Records != 1+50-8 {
		t.Errorf("%+v, %v", s, err)
	}
}

// A crash in the middle of a batch: what is there of it stays, and no more than
// was announced is believed.
func TestCrashInABatch(t *testing.T) {
	for _, tt := range []struct {
		name      string
		announced string
		written   int  // whole lines after the noted head
		torn      bool // and half a line
		whole     bool
	}{
		{"nothing", "+5", 0, false, true},
		{"nothing but half a line", "+5", 0, true, true},
		{"some", "+5", 3, false, true},
		{"some and a half", "+5", 3, true, true},
		{"all", "+5", 5, false, true},
		{"more than announced", "+5", 7, false, false},
		{"not announced", "", 3, false, false},
		{"a number that nobody wrote", "+33", 3, false, false},
		{"no number", "+x", 0, false, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l, dir := open(t)
			heads := fill(t, l, 10)
			path := filepath.Join(dir, "audit.log")
			text, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			lines := bytes.SplitAfter(text, []byte("\n"))
			text = bytes.Join(lines[:3+tt.written], nil)
			if tt.torn {
				text = append(text, lines[3+tt.written][:20]...)
			}
			if err := os.WriteFile(path, text, 0o600); err != nil {
				t.Fatal(err)
			}
			noted := heads[2]
			if tt.announced != "" {
				noted += "\n" + tt.announced
			}
			note(t, dir, noted)
			if _, err := audit.Verify(dir); (err == nil) != tt.whole || err != nil && !errors.Is(err, audit.ErrDamaged) {
				t.Errorf("verify: %v", err)
			}
			_, err = l.Append(audit.Record{Event: "start"})
			if (err == nil) != tt.whole || err != nil && !errors.Is(err, audit.ErrDamaged) {
				t.Fatalf("append: %v", err)
			}
			if !tt.whole {
				return
			}
			if s, err := audit.Verify(dir); err != nil || s.Torn > 1 || (s.Torn == 1) != tt.torn || s.Records != uint64(3+tt.written+s.Torn+1) {
				t.Errorf("verify after: %+v, %v", s, err)
			}
		})
	}
}
