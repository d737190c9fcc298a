package main

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"farkeep/appliance/benchtest"
)

// These benchmarks compare a push with rsync over OpenSSH on the loopback
// interface, with the programs that a user runs and ext4 in memory for disks. The
// rivals take turns within each round, so that what else the machine does hits
// all of them; what counts is the median of the rounds' ratios. docs/performance.md
// says what came out. They fail on wrong results, never on slow ones.

// rounds is how often each rival runs.
const rounds = 5

// contender is one way to bring the source over.
type contender struct {
	name string
	run  func(round int) benchtest.Cost
}

// BenchmarkUpload sends what the other side does not have at all: segments as
// Borg writes them, and small files.
func BenchmarkUpload(b *testing.B) {
	for _, data := range []struct {
		name string
		make func(b testing.TB, dir string) int64
	}{
		{"segments", makeSegments},
		{"borg", makeRepository},
		{"small", makeSmall},
	} {
		b.Run(data.name, func(b *testing.B) {
			dir := benchDir(b)
			source, target := filepath.Join(dir, "source"), filepath.Join(dir, "target")
			mountTmpfs(b, source, "3g")
			mountExt4(b, target, 3<<10)
			size := data.make(b, source)
			want := sums(b, source)
			a, sshd := benchmarkAppliance(b, dir), startSSHD(b, dir)

			rsync := func(cipher string) func(int) benchtest.Cost {
				return func(int) benchtest.Cost {
					to := filepath.Join(target, "copy")
					c := sshd.copy(b, source, to, cipher)
					sameFiles(b, want, to)
					must(b, os.RemoveAll(to))
					settle(b, target)
					return c
				}
			}
			pushes := 0
			farkeep := func(int) benchtest.Cost {
				pushes++
				repository := fmt.Sprintf("round-%d", pushes)
				s := a.site(b, filepath.Join(dir, repository), repository, source)
				c := s.push(b, "new")
				generation := s.generation(b, 1)
				sameGeneration(b, want, generation)
				// Only the room: the keeper goes on without noticing.
				must(b, os.RemoveAll(filepath.Join(generation, "files")))
				settle(b, a.paths.Disk())
				return c
			}
			compare(b, size, []contender{
				{"rsync", rsync(defaultCipher)},
				{"rsync-gcm", rsync(quickCipher)},
				{"farkeep", farkeep},
			})
		})
	}
}

// BenchmarkUnchanged pushes 100,000 files of which none has changed, as the
// pusher does on most nights: with the cache of the night before.
func BenchmarkUnchanged(b *testing.B) {
	dir := benchDir(b)
	source, target := filepath.Join(dir, "source"), filepath.Join(dir, "target")
	mountTmpfs(b, source, "3g")
	mountExt4(b, target, 3<<10)
	makeMany(b, source, 100_000)
	want := sums(b, source)
	a, sshd := benchmarkAppliance(b, dir), startSSHD(b, dir)
	to := filepath.Join(target, "copy")
	sshd.copy(b, source, to, defaultCipher)
	sameFiles(b, want, to)
	s := a.site(b, filepath.Join(target, "site"), "many", source)
	s.push(b, "new")
	sameGeneration(b, want, s.generation(b, 1))

	compare(b, 0, []contender{
		{"rsync", func(int) benchtest.Cost { return sshd.copy(b, source, to, defaultCipher) }},
		{"rsync-no-inc", func(int) benchtest.Cost { return sshd.copy(b, source, to, defaultCipher, "--no-inc-recursive") }},
		{"farkeep", func(int) benchtest.Cost { return s.push(b, "unchanged") }},
	})
	s.generation(b, 1)

	// "Unchanged" is worth something only if a change is seen.
	must(b, os.WriteFile(filepath.Join(source, "042", "00042042"), []byte("changed"), 0o644))
	s.push(b, "new")
	sameGeneration(b, sums(b, source), s.generation(b, 2))
}

// compare runs the contenders in turns and reports medians, and for the last one
// its ratios to each of the others: below 1 it took less. size is in bytes; 0
// reports seconds in place of a rate.
func compare(b *testing.B, size int64, all []contender) {
	b.Helper()
	costs := make([][]benchtest.Cost, len(all))
	for b.Loop() {
		for round := range rounds {
			for i := range all {
				// Another one begins each round: none is always the one after the break.
				at := (round + i) % len(all)
				costs[at] = append(costs[at], all[at].run(round))
			}
		}
	}
	b.ReportMetric(0, "ns/op") // it would be the sum of all of them

	const mib = 1 << 20
	var table strings.Builder
	w := tabwriter.NewWriter(&table, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "\tseconds\tMB/s\tCPU s client\tCPU s server\tCPU s/GB\tMiB client\tMiB server\t")
	for i, c := range all {
		seconds := median(costs[i], func(c benchtest.Cost) float64 { return c.Wall.Seconds() })
		client := median(costs[i], func(c benchtest.Cost) float64 { return c.ClientCPU.Seconds() })
		server := median(costs[i], func(c benchtest.Cost) float64 { return c.ServerCPU.Seconds() })
		perGB := median(costs[i], func(c benchtest.Cost) float64 { return c.CPU().Seconds() * 1e9 / float64(size) })
		row := func(rate, perGB string) {
			fmt.Fprintf(w, "%s\t%.2f\t%s\t%.2f\t%.2f\t%s\t", c.name, seconds, rate, client, server, perGB)
		}
		clientPeak := slices.MaxFunc(costs[i], func(a, b benchtest.Cost) int { return cmp.Compare(a.ClientPeak, b.ClientPeak) }).ClientPeak
		serverPeak := slices.MaxFunc(costs[i], func(a, b benchtest.Cost) int { return cmp.Compare(a.ServerPeak, b.ServerPeak) }).ServerPeak
		if size == 0 {
			row("-", "-")
			b.ReportMetric(seconds, c.name+"-s")
		} else {
			rate := float64(size) / 1e6 / seconds
			row(fmt.Sprintf("%.0f", rate), fmt.Sprintf("%.2f", perGB))
			b.ReportMetric(rate, c.name+"-MB/s")
			b.ReportMetric(perGB, c.name+"-cpu-s/GB")
		}
		b.ReportMetric(float64(clientPeak)/mib, c.name+"-client-MiB")
		b.ReportMetric(float64(serverPeak)/mib, c.name+"-server-MiB")
		fmt.Fprintf(w, "%d\t%d\t\n", clientPeak/mib, serverPeak/mib)
	}
	must(b, w.Flush())

	own, name := costs[len(all)-1], all[len(all)-1].name
	for i, c := range all[:len(all)-1] {
		wall, cpu := make([]float64, len(own)), make([]float64, len(own))
		for r := range own {
			wall[r] = own[r].Wall.Seconds() / costs[i][r].Wall.Seconds()
			cpu[r] = own[r].CPU().Seconds() / max(costs[i][r].CPU(), 10*time.Millisecond).Seconds()
		}
		slices.Sort(wall)
		slices.Sort(cpu)
		b.ReportMetric(wall[len(wall)/2], "time/"+c.name)
		b.ReportMetric(cpu[len(cpu)/2], "cpu/"+c.name)
		fmt.Fprintf(&table, "%s/%s: time %.2f (%.2f to %.2f), CPU %.2f (%.2f to %.2f)\n", name, c.name,
			wall[len(wall)/2], wall[0], wall[len(wall)-1], cpu[len(cpu)/2], cpu[0], cpu[len(cpu)-1])
	}
	b.Logf("medians of %d rounds in turns, peaks over all\n%s", len(own), table.String())
}

func median(costs []benchtest.Cost, of func(benchtest.Cost) float64) float64 {
	all := make([]float64, len(costs))
	for i, c := range costs {
		all[i] = of(c)
	}
	slices.Sort(all)
	return all[len(all)/2]
}
