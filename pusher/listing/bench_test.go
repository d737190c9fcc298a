package listing

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// BenchmarkUnchanged lists folders of which nothing changed: the 8,000 segments of a
// Borg repository of 4 TB, whose length costs nothing, and 100,000 small files.
// FARKEEP_BENCH_FILES="1000000" is for other numbers.
func BenchmarkUnchanged(b *testing.B) {
	numbers := "8000 100000"
	if text, ok := os.LookupEnv("FARKEEP_BENCH_FILES"); ok {
		numbers = text
	}
	for _, text := range strings.Fields(numbers) {
		b.Run(text, func(b *testing.B) {
			files, err := strconv.Atoi(text)
			if err != nil {
				b.Fatal(err)
			}
			root := b.TempDir()
			opt := Options{Cache: filepath.Join(b.TempDir(), "cache")}
			manifest := filepath.Join(b.TempDir(), "manifest")
			for i := range files {
				path := filepath.Join(root, fmt.Sprintf("data/%d/%d", i/1000, i))
				if i%1000 == 0 {
					if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
						b.Fatal(err)
					}
				}
				if err := os.WriteFile(path, []byte("x"), 0o644); err != nil {
					b.Fatal(err)
				}
				old := time.Unix(1e9, 0)
				if err := os.Chtimes(path, old, old); err != nil {
					b.Fatal(err)
				}
			}
			list := func() Result {
				f, err := os.Create(manifest)
				if err != nil {
					b.Fatal(err)
				}
				defer f.Close()
				r, err := Write(b.Context(), root, f, opt)
				if err != nil {
					b.Fatal(err)
				}
				return r
			}
			list()
			debug.FreeOSMemory()
			if err := os.WriteFile("/proc/self/clear_refs", []byte("5"), 0); err != nil { // the peak begins here
				b.Fatal(err)
			}
			cpu := cpuTime(b)
			b.ResetTimer()
			for range b.N {
				if r := list(); r.Hashed != 0 {
					b.Fatalf("%d files read again", r.Hashed)
				}
			}
			b.StopTimer()
			b.ReportMetric((cpuTime(b)-cpu).Seconds()/float64(b.N), "cpu-s/op")
			b.ReportMetric(float64(peak(b))/1e6, "MB-peak")
		})
	}
}

func cpuTime(b *testing.B) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// peak is the most memory that this process had, in bytes.
func peak(b *testing.B) int64 {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		b.Fatal(err)
	}
	m := regexp.MustCompile(`VmHWM:\s+(\d+) kB`).FindSubmatch(status)
	n, err := strconv.ParseInt(string(bytes.TrimSpace(m[1])), 10, 64)
	if err != nil {
		b.Fatal(err)
	}
	return n << 10
}

func BenchmarkHash(b *testing.B) {
	root := b.TempDir()
	const size = 64 << 20
	if err := os.WriteFile(filepath.Join(root, "a"), make([]byte, size), 0o644); err != nil {
		b.Fatal(err)
	}
	b.SetBytes(size)
	for b.Loop() {
		if _, err := Write(b.Context(), root, io.Discard, Options{}); err != nil {
			b.Fatal(err)
		}
	}
}
