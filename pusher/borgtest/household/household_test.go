package household_test

import (
	"crypto/sha256"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"farkeep/pusher/borgtest/household"
)

func digest(t *testing.T, dir string) (sum string, size int64) {
	t.Helper()
	h := sha256.New()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, path)
		size += int64(len(data))
		fmt.Fprintf(h, "%s %d %x\n", name, len(data), sha256.Sum256(data))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return string(h.Sum(nil)), size
}

func TestSameSeedSameHousehold(t *testing.T) {
	live := func(seed uint64, days int) (string, int64, int64) {
		dir := t.TempDir()
		h, err := household.New(dir, seed)
		if err != nil {
			t.Fatal(err)
		}
		_, first := digest(t, dir)
		for range days {
			if err := h.Next(); err != nil {
				t.Fatal(err)
			}
		}
		if h.Day() != days || h.Date() != household.Start.AddDate(0, 0, days) {
			t.Errorf("day %d, %v", h.Day(), h.Date())
		}
		sum, last := digest(t, dir)
		return sum, first, last
	}
	a, first, last := live(1, 40)
	b, _, _ := live(1, 40)
	c, _, _ := live(2, 40)
	if a != b {
		t.Error("one seed made two households")
	}
	if a == c {
		t.Error("two seeds made one household")
	}
	if first < 50e6 || first > 75e6 || last < first || last > first*5/4 {
		t.Errorf("%d bytes grew to %d in 40 days", first, last)
	}
}

func TestErrorsAreReported(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := household.New(file, 1); err == nil {
		t.Error("a household in a file")
	}
	dir := t.TempDir()
	h, err := household.New(dir, 1)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, "mail/inbox")); err != nil {
		t.Fatal(err)
	}
	if err := h.Next(); err == nil {
		t.Error("a mail file that is gone was not noticed")
	}
}
