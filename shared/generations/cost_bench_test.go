package generations_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"farkeep/shared/beneath"
	"farkeep/shared/generations"
	"farkeep/shared/pushwire"

	"golang.org/x/sys/unix"
)

// toll is what a device was asked for.
type toll struct{ writes, bytes, flushes int64 }

func (t toll) since(o toll) toll {
	return toll{t.writes - o.writes, t.bytes - o.bytes, t.flushes - o.flushes}
}

// ext4 mounts an empty ext4 of so many MiB behind a loop device, and returns its
// folder and a function that returns what was written to the device.
func ext4(tb testing.TB, mb int64) (dir string, written func() toll) {
	tb.Helper()
	if os.Getuid() != 0 {
		tb.Fatal("this makes and mounts a file system: run it as root")
	}
	image := filepath.Join(tb.TempDir(), "image")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, mb<<20)); err != nil {
		tb.Fatal(err)
	}
	tool(tb, "e2fsprogs", "mke2fs", "-q", "-t", "ext4", "-i", "8192", "-E", "lazy_itable_init=0,lazy_journal_init=0", image)
	loop := tool(tb, "mount", "losetup", "--find", "--show", image)
	tb.Cleanup(func() { tool(tb, "mount", "losetup", "--detach", loop) })
	dir = tb.TempDir()
	if err := unix.Mount(loop, dir, "ext4", 0, ""); err != nil {
		tb.Fatal("mount: ", err)
	}
	tb.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			tb.Error("unmount: ", err)
		}
	})
	return dir, func() toll {
		stat, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(loop), "stat"))
		if err != nil {
			tb.Fatal(err)
		}
		var n []int64 // Documentation/block/stat.rst
		for _, field := range strings.Fields(string(stat)) {
			v, err := strconv.ParseInt(field, 10, 64)
			if err != nil {
				tb.Fatal(err)
			}
			n = append(n, v)
		}
		if len(n) < 17 {
			tb.Fatal("this kernel does not count flushes: Linux 5.5 does")
		}
		return toll{writes: n[4], bytes: n[6] * 512, flushes: n[15]}
	}
}

// BenchmarkReceiveDisk counts what an upload asks of a disk: how often it must
// flush its cache, which is where a USB hard disk loses its time, and in what
// pieces it is written to.
func BenchmarkReceiveDisk(b *testing.B) {
	for _, c := range []struct {
		name  string
		files int
		size  int
	}{{"long", 8, 64 << 20}, {"small", 5000, 20 << 10}} {
		b.Run(c.name, func(b *testing.B) {
			day := tree{}
			for i := range c.files {
				day.add(fmt.Sprintf("%05d", i), noise(uint64(i), c.size))
			}
			dir, written := ext4(b, 2048)
			s := open(b, dir, generations.Options{})
			var all toll
			for b.Loop() {
				b.StopTimer()
				answer, tx, err := begin(b, s, "photos", day)
				if err != nil {
					b.Fatal(err)
				}
				before := written()
				b.StartTimer()
				if _, err := tx.Upload(b.Context(), func(w io.Writer) error { return day.write(w, answer) }); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				t := written().since(before)
				all = toll{all.writes + t.writes, all.bytes + t.bytes, all.flushes + t.flushes}
				if err := tx.Abort(b.Context()); err != nil {
					b.Fatal(err)
				}
				tx.Close()
				b.StartTimer()
			}
			gb := float64(b.N) * float64(c.files) * float64(c.size) / 1e9
			b.SetBytes(int64(c.files) * int64(c.size))
			b.ReportMetric(float64(all.flushes)/gb, "flushes/GB")
			b.ReportMetric(float64(all.bytes)/float64(all.writes)/1024, "KiB/write")
			b.ReportMetric(float64(all.bytes)/1e9/gb, "written/GB")
		})
	}
}

// samples are what one step cost, time after time.
type samples struct{ seconds, cpu, mb []float64 }

// cpuSeconds is what this process and its ended children have used of the
// processors, the kernel's work for them included.
func cpuSeconds(tb testing.TB) (s float64) {
	tb.Helper()
	for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
		var r unix.Rusage
		if err := unix.Getrusage(who, &r); err != nil {
			tb.Fatal(err)
		}
		s += float64(r.Utime.Nano()+r.Stime.Nano()) / 1e9
	}
	return s
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}

// BenchmarkGeneration measures what one more generation costs on an ext4, and what
// it costs to expire one: time, bytes written to the device, memory. One file in it
// changed. In turns with them cp -al and rm -rf do the same without any promise.
// Everything includes the sync at its end; the caches are warm.
func BenchmarkGeneration(b *testing.B) {
	for _, n := range benchSizes(b) {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			defer debug.SetGCPercent(debug.SetGCPercent(50))
			dir, written := ext4(b, int64(n)/60+512)
			list := filepath.Join(b.TempDir(), "list")
			s := open(b, dir, generations.Options{})
			var rested time.Duration
			s.RestWith(generations.WorkStretch, func(ctx context.Context, d time.Duration) error {
				rested += d
				return ctx.Err()
			})
			w := wide{n: n}
			root, err := beneath.Open(dir)
			if err != nil {
				b.Fatal(err)
			}
			defer root.Close()
			measure := func(to *samples, f func()) {
				if err := root.SyncFS(); err != nil {
					b.Fatal(err)
				}
				before, cpu, start := written(), cpuSeconds(b), time.Now()
				f()
				if err := root.SyncFS(); err != nil {
					b.Fatal(err)
				}
				to.seconds = append(to.seconds, time.Since(start).Seconds())
				to.cpu = append(to.cpu, cpuSeconds(b)-cpu)
				to.mb = append(to.mb, float64(written().since(before).bytes)/1e6)
			}
			var names []string
			var offer pushwire.Offer
			push := func() {
				answer, tx := w.begin(b, s, list, offer)
				defer tx.Close()
				if _, err := tx.Upload(b.Context(), func(out io.Writer) error { return w.upload(out, answer.Needed) }); err != nil {
					b.Fatal(err)
				}
				name, err := tx.Commit(b.Context())
				if err != nil {
					b.Fatal(err)
				}
				names = append(names, name)
			}
			for range 2 {
				w.salt++
				offer = w.manifest(b, list)
				push()
			}
			var commit, expire, cp, rm samples
			var restedFor []float64
			peak := 0.0
			for b.Loop() {
				w.salt++
				offer = w.manifest(b, list) // the pusher's work
				resetPeak(b)
				measure(&commit, push)
				peak = max(peak, peakMB(b))
				copied := filepath.Join(dir, "copy")
				newest := filepath.Join(dir, "generations/wide", names[len(names)-1], "files")
				measure(&cp, func() { tool(b, "coreutils", "cp", "-al", newest, copied) })
				resetPeak(b)
				rested = 0
				measure(&expire, func() {
					if err := s.Remove(b.Context(), "wide", names[0]); err != nil {
						b.Fatal(err)
					}
				})
				restedFor = append(restedFor, rested.Seconds())
				peak = max(peak, peakMB(b))
				names = names[1:]
				measure(&rm, func() { tool(b, "coreutils", "rm", "-rf", copied) })
			}
			ratio := func(of, to []float64) float64 {
				var r []float64
				for i := range of {
					r = append(r, of[i]/to[i])
				}
				return median(r)
			}
			b.ReportMetric(median(commit.seconds), "s/make")
			b.ReportMetric(median(commit.mb), "MB-written/make")
			b.ReportMetric(median(cp.seconds), "s/cp-al")
			b.ReportMetric(median(cp.mb), "MB-written/cp-al")
			b.ReportMetric(ratio(commit.seconds, cp.seconds), "x-cp-al")
			b.ReportMetric(median(commit.cpu), "cpu-s/make")
			b.ReportMetric(median(cp.cpu), "cpu-s/cp-al")
			b.ReportMetric(ratio(commit.cpu, cp.cpu), "x-cpu-cp-al")
			b.ReportMetric(median(expire.seconds), "s/expire")
			b.ReportMetric(median(restedFor), "s-rest/expire")
			b.ReportMetric(median(expire.mb), "MB-written/expire")
			b.ReportMetric(median(rm.seconds), "s/rm-rf")
			b.ReportMetric(median(rm.mb), "MB-written/rm-rf")
			b.ReportMetric(ratio(expire.seconds, rm.seconds), "x-rm-rf")
			b.ReportMetric(ratio(expire.cpu, rm.cpu), "x-cpu-rm-rf")
			b.ReportMetric(peak, "peak-MB")
		})
	}
}
