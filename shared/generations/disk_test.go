package generations_test

import (
	"fmt"
	"io"
	"testing"
	"time"

	"farkeep/shared/generations"
)

// What an upload asks of the disk: long files are written in pieces as long as the
// kernel makes them, nothing is written twice, and the disk's cache is flushed for
// a batch of files, not for each.
func TestUploadIsEasyOnTheDisk(t *testing.T) {
	for _, c := range []struct {
		name    string
		files   int
		size    int
		batches int64
		least   int64   // bytes of a write, on average
		written float64 // of what is sent
	}{
		{"long files", 5, 64 << 20, 2, 256 << 10, 1.05},
		{"small files", 2100, 8 << 10, 5, 16 << 10, 1.6},
	} {
		t.Run(c.name, func(t *testing.T) {
			day := tree{}
			for i := range c.files {
				day.add(fmt.Sprintf("%05d", i), noise(uint64(i), c.size))
			}
			dir, written := ext4(t, 1024)
			// By this clock no time passes, and no batch ends early.
			noon := time.Now()
			s := open(t, dir, generations.Options{Now: func() time.Time { return noon }})
			answer, tx, err := begin(t, s, "photos", day)
			if err != nil {
				t.Fatal(err)
			}
			defer tx.Close()
			before, start := written(), time.Now()
			if _, err := tx.Upload(t.Context(), func(w io.Writer) error { return day.write(w, answer) }); err != nil {
				t.Fatal(err)
			}
			// The kernel's journal commits every 5 s besides, if there is something (ext4(5)).
			own := int64(time.Since(start) / (5 * time.Second))
			got := written().since(before)
			bytes := int64(c.files) * int64(c.size)
			t.Logf("%d flushes, %d writes of %d KiB, %.3f of what was sent", got.flushes, got.writes, got.bytes/max(got.writes, 1)>>10, float64(got.bytes)/float64(bytes))
			if most := 4 * (c.batches + own + 1); got.flushes > most || got.flushes == 0 {
				t.Errorf("%d flushes for %d batches; want %d at most", got.flushes, c.batches, most)
			}
			if got.bytes/max(got.writes, 1) < c.least {
				t.Errorf("%d writes of %d bytes", got.writes, got.bytes)
			}
			if got.bytes < bytes || float64(got.bytes) > c.written*float64(bytes) {
				t.Errorf("%d bytes were written for %d", got.bytes, bytes)
			}
		})
	}
}
