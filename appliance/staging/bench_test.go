package staging

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// fill writes files of 1 KiB into folders of 100.
func fill(b *testing.B, dir string, files int) {
	b.Helper()
	content := make([]byte, 1024)
	for i := range files {
		folder := filepath.Join(dir, fmt.Sprintf("%04d", i/100))
		if i%100 == 0 {
			must(b, os.MkdirAll(folder, 0o755))
		}
		copy(content, fmt.Sprint("file ", i))
		must(b, os.WriteFile(filepath.Join(folder, fmt.Sprintf("%08d", i)), content, 0o644))
	}
}

// spent is the processor time of this process, which other work on the machine does
// not change.
func spent(b *testing.B) time.Duration {
	b.Helper()
	var u unix.Rusage
	must(b, unix.Getrusage(unix.RUSAGE_SELF, &u))
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkCopy measures, for staging copies of many small files: the first commit
// (every file is read and adopted), one of a single change, one of no change, and the first
// access of a key that has no copy yet (every file is linked), and of one that has.
// On memory and on the disk of the temporary folder.
func BenchmarkCopy(b *testing.B) {
	for _, disk := range []string{"memory", "disk"} {
		for _, files := range []int{5_000, 100_000, 250_000} {
			b.Run(fmt.Sprintf("%s/%d", disk, files), func(b *testing.B) {
				for b.Loop() {
					dir := b.TempDir()
					if disk == "memory" {
						dir = tmpfs(b, "6g")
					}
					copies(b, dir, files)
				}
				b.ReportMetric(0, "ns/op")
			})
		}
	}
}

func copies(b *testing.B, dir string, files int) {
	d := openBench(b, dir)
	p := d.peer("home")
	took := func(name string, do func()) {
		start, cpu := time.Now(), spent(b)
		do()
		b.ReportMetric(time.Since(start).Seconds(), name+"-s")
		b.ReportMetric((spent(b) - cpu).Seconds(), name+"-cpu-s")
	}
	visit := func(key string) {
		t, err := d.area.enter(context.Background(), treeID{"photos", key}, true)
		must(b, err)
		t.leave()
	}
	visit("home")
	fill(b, d.copy("photos", "home"), files)
	took("first-commit", func() { d.mustCommit(b, p, "photos") })
	took("same-commit", func() { d.mustCommit(b, p, "photos") })
	changed := filepath.Join(d.copy("photos", "home"), "0000", "new")
	must(b, os.WriteFile(changed, []byte("new"), 0o644))
	took("one-commit", func() { d.mustCommit(b, p, "photos") })
	took("new-copy", func() { visit("shed") })
	took("old-copy", func() { visit("shed") })
	d.area = New(d.dir, d.store, d.area.log)
	took("count", func() {
		t, err := d.area.enter(context.Background(), treeID{"photos", "shed"}, true)
		must(b, err)
		must(b, t.count(context.Background()))
		t.leave()
	})
}
