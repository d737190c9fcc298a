package scrub_test

import (
	"fmt"
	"io"
	"os"
	"runtime"
	"testing"
	"time"

	"farkeep/appliance/scrub"
	"farkeep/shared/generations/generationstest"

	"golang.org/x/sys/unix"
)

// BenchmarkScrub measures whole rounds without a pace: what is read for the
// first time, memory, and what the shared rest costs. -benchtime 1x
func BenchmarkScrub(b *testing.B) {
	for _, tt := range []struct{ count, files, size int }{
		{1, 64, 32 << 20}, {1, 1_000_000, 0}, {1, 50_000, 4096}, {60, 5_000, 4096}, {60, 50_000, 4096},
	} {
		b.Run(fmt.Sprintf("%dx%d files of %d", tt.count, tt.files, tt.size), func(b *testing.B) {
			dir := b.TempDir()
			generationstest.HandMade(b, dir, tt.count, tt.files, tt.size)
			for b.Loop() {
				bench := &bench{TB: b, dir: dir, now: time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC), read: map[uint64]int64{}}
				bench.open()
				bench.cfg.Every = time.Nanosecond // overdue from the start: as fast as it goes
				bench.cfg.Reader = func(f *os.File) io.Reader { return f }
				bench.cfg.Now = time.Now
				bench.cfg.Sleep = nil
				runtime.GC()
				var peak uint64
				seen := false
				begun, used := time.Now(), processor()
				bench.until(func(p scrub.Progress) bool {
					var m runtime.MemStats
					runtime.ReadMemStats(&m)
					peak = max(peak, m.HeapInuse+m.StackInuse)
					seen = seen || p.Running
					return seen && !p.LastFull.IsZero()
				})
				took := time.Since(begun)
				cpu := processor() - used
				bench.want()
				b.ReportMetric(float64(tt.files*tt.size)/took.Seconds()/1e6, "MB/s")
				b.ReportMetric(float64(peak)/(1<<20), "MiB-heap")
				b.ReportMetric(cpu.Seconds()/float64(tt.count*tt.files)*1e6, "cpu-us/name")
				if tt.size > 0 {
					b.ReportMetric(cpu.Seconds()/float64(tt.files*tt.size)*1e9, "cpu-s/GB")
				}
			}
		})
	}
}

// processor is the processor time that this process has used: the wall clock says
// little of something with the lowest priority.
func processor() time.Duration {
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		return 0
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}
