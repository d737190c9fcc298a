package manifest_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"testing"

	"farkeep/shared/manifest"
)

// writeLarge writes a manifest of n files in folders of 1000.
func writeLarge(tb testing.TB, path string, n int, salt byte) {
	tb.Helper()
	f, err := os.Create(path)
	if err != nil {
		tb.Fatal(err)
	}
	defer f.Close()
	w := manifest.NewWriter(f)
	if err := w.Add(manifest.Entry{Path: "data", Kind: manifest.Folder, Mode: 0o755}); err != nil {
		tb.Fatal(err)
	}
	for i := range n {
		if i%1000 == 0 {
			if err := w.Add(manifest.Entry{Path: fmt.Sprintf("data/%04d", i/1000), Kind: manifest.Folder, Mode: 0o755}); err != nil {
				tb.Fatal(err)
			}
		}
		e := manifest.Entry{Path: fmt.Sprintf("data/%04d/%07d", i/1000, i), Kind: manifest.File, Mode: 0o600, MTime: int64(i) * 1e9, Size: int64(i)}
		e.Sum[0], e.Sum[1], e.Sum[2], e.Sum[3] = byte(i), byte(i>>8), byte(i>>16), salt
		if err := w.Add(e); err != nil {
			tb.Fatal(err)
		}
	}
	if _, err := w.Close(); err != nil {
		tb.Fatal(err)
	}
}

func BenchmarkRead(b *testing.B) {
	for _, n := range []int{100_000, 1_000_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			path := filepath.Join(b.TempDir(), "m")
			writeLarge(b, path, n, 0)
			for b.Loop() {
				f, err := os.Open(path)
				if err != nil {
					b.Fatal(err)
				}
				r := manifest.NewReader(f)
				for err == nil {
					_, err = r.Next()
				}
				if !errors.Is(err, io.EOF) {
					b.Fatal(err)
				}
				f.Close()
			}
			info, _ := os.Stat(path)
			b.ReportMetric(float64(info.Size())/float64(n), "B/entry")
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(n), "ns/entry")
		})
	}
}

func BenchmarkWrite(b *testing.B) {
	const n = 100_000
	path := filepath.Join(b.TempDir(), "m")
	for b.Loop() {
		writeLarge(b, path, n, 0)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/entry")
}

// BenchmarkDiff reports what a comparison of two manifests needs of memory, as
// the most that the heap held.
func BenchmarkDiff(b *testing.B) {
	for _, n := range []int{100_000, 1_000_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			dir := b.TempDir()
			writeLarge(b, dir+"/old", n, 0)
			writeLarge(b, dir+"/new", n, 1)
			defer debug.SetGCPercent(debug.SetGCPercent(50))
			runtime.GC()
			var before, now runtime.MemStats
			runtime.ReadMemStats(&before)
			var peak uint64
			for b.Loop() {
				old, _ := os.Open(dir + "/old")
				new, _ := os.Open(dir + "/new")
				need := manifest.NewSet(int64(n) * 2)
				err := manifest.Diff(manifest.NewReader(old), manifest.NewReader(new), func(c manifest.Change) error {
					if c.Relation == manifest.Changed {
						need.Add(c.Index)
					}
					if c.Index%50_000 == 0 {
						runtime.ReadMemStats(&now)
						peak = max(peak, now.HeapAlloc-min(before.HeapAlloc, now.HeapAlloc))
					}
					return nil
				})
				if err != nil || need.Len() != int64(n) {
					b.Fatal(need.Len(), err)
				}
				old.Close()
				new.Close()
			}
			b.ReportMetric(float64(peak)/1e6, "peak-MB")
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(n), "ns/entry")
		})
	}
}
