package main

import (
	"cmp"
	"crypto/rand"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"text/tabwriter"
	"time"
)

// These benchmarks compare a push with rsync over OpenSSH on the loopback
// interface, with the programs that a user runs and memory for disks. The
// rivals take turns within each round, so that what else the machine does hits
// all of them; what counts is the median of the rounds' ratios. docs/performance.md
// says what came out. They fail on wrong results, never on slow ones.

// rounds is how often each rival runs.
const rounds = 5

// contender is one way to bring the source over.
type contender struct {
	name string
	run  func(round int) cost
}

// BenchmarkUpload sends what the other side does not have at all: segments as
// Borg writes them, and small files.
func BenchmarkUpload(b *testing.B) {
	for _, data := range []struct {
		name string
		make func(b *testing.B, dir string) int64
	}{
		{"segments", makeSegments},
		{"small", makeSmall},
	} {
		b.Run(data.name, func(b *testing.B) {
			dir := benchDir(b)
			source, target := filepath.Join(dir, "source"), filepath.Join(dir, "target")
			mountTmpfs(b, source, "3g")
			mountTmpfs(b, target, "3g")
			size := data.make(b, source)
			want := sums(b, source)
			a, sshd := benchmarkAppliance(b, dir), startSSHD(b, dir)

			rsync := func(cipher string) func(int) cost {
				return func(int) cost {
					to := filepath.Join(target, "copy")
					c := sshd.copy(b, source, to, cipher)
					sameFiles(b, want, to)
					must(b, os.RemoveAll(to))
					return c
				}
			}
			pushes := 0
			farkeep := func(int) cost {
				pushes++
				repository := fmt.Sprintf("round-%d", pushes)
				s := a.site(b, filepath.Join(target, repository), repository, source)
				c := s.push(b, "new")
				generation := s.generation(b, 1)
				sameGeneration(b, want, generation)
				// Only the room: the keeper goes on without noticing.
				must(b, os.RemoveAll(filepath.Join(generation, "files")))
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
	mountTmpfs(b, target, "3g")
	makeMany(b, source)
	want := sums(b, source)
	a, sshd := benchmarkAppliance(b, dir), startSSHD(b, dir)
	to := filepath.Join(target, "copy")
	sshd.copy(b, source, to, defaultCipher)
	sameFiles(b, want, to)
	s := a.site(b, filepath.Join(target, "site"), "many", source)
	s.push(b, "new")
	sameGeneration(b, want, s.generation(b, 1))

	compare(b, 0, []contender{
		{"rsync", func(int) cost { return sshd.copy(b, source, to, defaultCipher) }},
		{"rsync-no-inc", func(int) cost { return sshd.copy(b, source, to, defaultCipher, "--no-inc-recursive") }},
		{"farkeep", func(int) cost { return s.push(b, "unchanged") }},
	})
	s.generation(b, 1)

	// "Unchanged" is worth something only if a change is seen.
	must(b, os.WriteFile(filepath.Join(source, "042", "00042042"), []byte("changed"), 0o644))
	s.push(b, "new")
	sameGeneration(b, sums(b, source), s.generation(b, 2))
}

// makeSegments writes 512 MiB that do not compress, in files from 16 to 64 MiB.
func makeSegments(b *testing.B, dir string) (size int64) {
	b.Helper()
	folder := filepath.Join(dir, "data", "0")
	must(b, os.MkdirAll(folder, 0o755))
	for i, mib := range []int64{64, 16, 48, 32, 64, 64, 24, 64, 56, 64, 16} {
		f, err := os.Create(filepath.Join(folder, fmt.Sprint(i)))
		must(b, err)
		n, err := io.CopyN(f, rand.Reader, mib<<20)
		must(b, err)
		must(b, f.Close())
		size += n
	}
	return size
}

// makeSmall writes 500 files of 20 KB.
func makeSmall(b *testing.B, dir string) (size int64) {
	b.Helper()
	for i := range 500 {
		content := make([]byte, 20_000)
		rand.Read(content)
		must(b, os.WriteFile(filepath.Join(dir, fmt.Sprintf("%05d", i)), content, 0o644))
		size += int64(len(content))
	}
	return size
}

// makeMany writes 100,000 files into 100 folders.
func makeMany(b *testing.B, dir string) {
	b.Helper()
	for i := range 100_000 {
		folder := filepath.Join(dir, fmt.Sprintf("%03d", i%100))
		if i < 100 {
			must(b, os.Mkdir(folder, 0o755))
		}
		must(b, os.WriteFile(filepath.Join(folder, fmt.Sprintf("%08d", i)), fmt.Append(nil, "content of ", i), 0o644))
	}
}

// compare runs the contenders in turns and reports medians, and for the last one
// its ratios to each of the others: below 1 it took less. size is in bytes; 0
// reports seconds in place of a rate.
func compare(b *testing.B, size int64, all []contender) {
	b.Helper()
	costs := make([][]cost, len(all))
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
		seconds := median(costs[i], func(c cost) float64 { return c.wall.Seconds() })
		client := median(costs[i], func(c cost) float64 { return c.clientCPU.Seconds() })
		server := median(costs[i], func(c cost) float64 { return c.serverCPU.Seconds() })
		perGB := median(costs[i], func(c cost) float64 { return c.cpu().Seconds() * 1e9 / float64(size) })
		row := func(rate, perGB string) {
			fmt.Fprintf(w, "%s\t%.2f\t%s\t%.2f\t%.2f\t%s\t", c.name, seconds, rate, client, server, perGB)
		}
		clientPeak := slices.MaxFunc(costs[i], func(a, b cost) int { return cmp.Compare(a.clientPeak, b.clientPeak) }).clientPeak
		serverPeak := slices.MaxFunc(costs[i], func(a, b cost) int { return cmp.Compare(a.serverPeak, b.serverPeak) }).serverPeak
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
			wall[r] = own[r].wall.Seconds() / costs[i][r].wall.Seconds()
			cpu[r] = own[r].cpu().Seconds() / max(costs[i][r].cpu(), 10*time.Millisecond).Seconds()
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

func median(costs []cost, of func(cost) float64) float64 {
	all := make([]float64, len(costs))
	for i, c := range costs {
		all[i] = of(c)
	}
	slices.Sort(all)
	return all[len(all)/2]
}
