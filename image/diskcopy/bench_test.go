package diskcopy_test

import (
	"fmt"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"farkeep/image/diskcopy"
	"farkeep/shared/generations/generationstest"
)

// BenchmarkCopy measures a copy with many names for few inodes. -benchtime 1x
func BenchmarkCopy(b *testing.B) {
	for _, tt := range []struct{ count, files, size int }{{1, 1_000_000, 0}, {60, 5_000, 4096}, {60, 50_000, 4096}} {
		b.Run(fmt.Sprintf("%dx%d files of %d", tt.count, tt.files, tt.size), func(b *testing.B) {
			from := filepath.Join(b.TempDir(), "from")
			generationstest.HandMade(b, from, tt.count, tt.files, tt.size)
			for b.Loop() {
				var peak uint64
				runtime.GC()
				begun := time.Now()
				r, err := diskcopy.Copy(b.Context(), from, b.TempDir(), diskcopy.Options{Pace: time.Second, Progress: func(diskcopy.Progress) {
					var m runtime.MemStats
					runtime.ReadMemStats(&m)
					peak = max(peak, m.HeapInuse+m.StackInuse)
				}})
				if err != nil || r.Files+r.Links != int64(tt.count*tt.files) {
					b.Fatalf("%+v, %v", r, err)
				}
				b.ReportMetric(float64(tt.count*tt.files)/time.Since(begun).Seconds(), "names/s")
				b.ReportMetric(float64(peak)/(1<<20), "MiB-heap")
			}
		})
	}
}
