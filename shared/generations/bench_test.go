package generations_test

import (
	"bufio"
	"bytes"
	"cmp"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"testing"
	"time"

	"farkeep/shared/generations"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"
	"farkeep/shared/recipe"

	"golang.org/x/sys/unix"
)

// wide is a repository of n small files in folders of 1000; salt changes the
// first file, and with it the digest.
type wide struct {
	n    int
	salt int
}

func (w wide) content(i int) string {
	if i == 0 {
		return fmt.Sprint("salt ", w.salt)
	}
	return strconv.Itoa(i)
}

// manifest writes the list to a file and returns the offer of it.
func (w wide) manifest(tb testing.TB, path string) pushwire.Offer {
	tb.Helper()
	f, err := os.Create(path)
	if err != nil {
		tb.Fatal(err)
	}
	defer f.Close()
	m := manifest.NewWriter(f)
	h := manifest.NewHash()
	for i := range w.n {
		if i%1000 == 0 {
			if err := m.Add(manifest.Entry{Path: fmt.Sprintf("%05d", i/1000), Kind: manifest.Folder, Mode: 0o755}); err != nil {
				tb.Fatal(err)
			}
		}
		c := w.content(i)
		h.Reset()
		io.WriteString(h, c)
		err := m.Add(manifest.Entry{Path: fmt.Sprintf("%05d/%08d", i/1000, i), Kind: manifest.File, Mode: 0o600, MTime: 1e18, Size: int64(len(c)), Sum: manifest.SumOf(h)})
		if err != nil {
			tb.Fatal(err)
		}
	}
	s, err := m.Close()
	if err != nil {
		tb.Fatal(err)
	}
	return pushwire.Offer{Digest: s.Digest.String(), Entries: s.Entries, Bytes: s.Bytes, Kind: pushwire.KindFiles}
}

// upload writes the recipe of what is needed. The index counts folders too.
func (w wide) upload(out io.Writer, needed *manifest.Set) error {
	e := recipe.NewEncoder(out)
	h := manifest.NewHash()
	for i := range needed.All() {
		c := w.content(int(i - i/1001 - 1))
		h.Reset()
		io.WriteString(h, c)
		if err := e.File(i); err != nil {
			return err
		}
		if _, err := io.WriteString(e, c); err != nil {
			return err
		}
		if err := e.End(manifest.SumOf(h)); err != nil {
			return err
		}
	}
	return e.Close()
}

// offer begins a push with the manifest from a file.
func (w wide) offer(tb testing.TB, s *generations.Store, path string) (generations.Answer, *generations.Transaction) {
	tb.Helper()
	return w.begin(tb, s, path, w.manifest(tb, path))
}

// begin is offer when the manifest is written already.
func (w wide) begin(tb testing.TB, s *generations.Store, path string, offer pushwire.Offer) (generations.Answer, *generations.Transaction) {
	tb.Helper()
	answer, tx, err := s.Begin(tb.Context(), generations.Request{Repository: "wide", Offer: offer, Pusher: "home"})
	if err != nil {
		tb.Fatal(err)
	}
	if answer.Answer == pushwire.AnswerSendManifest {
		f, err := os.Open(path)
		if err != nil {
			tb.Fatal(err)
		}
		defer f.Close()
		if answer, err = tx.TakeManifest(tb.Context(), f); err != nil {
			tb.Fatal(err)
		}
	}
	return answer, tx
}

// benchSizes are the numbers of files; a million wants minutes and gigabytes, and
// is asked for by name.
func benchSizes(tb testing.TB) (sizes []int) {
	for _, s := range strings.Fields(cmp.Or(os.Getenv("FARKEEP_BENCH_FILES"), "5000 250000")) {
		n, err := strconv.Atoi(s)
		if err != nil {
			tb.Fatal(err)
		}
		sizes = append(sizes, n)
	}
	return sizes
}

// resetPeak forgets the peak of resident memory so far (proc_pid_clear_refs(5)).
func resetPeak(tb testing.TB) {
	tb.Helper()
	debug.FreeOSMemory()
	if err := os.WriteFile("/proc/self/clear_refs", []byte("5"), 0); err != nil {
		tb.Fatal(err)
	}
}

func peakMB(tb testing.TB) float64 {
	tb.Helper()
	f, err := os.Open("/proc/self/status")
	if err != nil {
		tb.Fatal(err)
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if rest, ok := strings.CutPrefix(lines.Text(), "VmHWM:"); ok {
			kb, err := strconv.Atoi(strings.TrimSpace(strings.TrimSuffix(rest, "kB")))
			if err != nil {
				tb.Fatal(err)
			}
			return float64(kb) / 1024
		}
	}
	tb.Fatal("no VmHWM in /proc/self/status")
	return 0
}

// BenchmarkLink measures a normal night: one file of many changed. It reports the
// first push too, and the process's peak of resident memory during the night.
func BenchmarkLink(b *testing.B) {
	for _, n := range benchSizes(b) {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			defer debug.SetGCPercent(debug.SetGCPercent(50))
			dir := b.TempDir()
			list := filepath.Join(dir, "list")
			s := open(b, dir, generations.Options{})
			w := wide{n: n}
			begun := time.Now()
			answer, tx := w.offer(b, s, list)
			if _, err := tx.Upload(b.Context(), func(out io.Writer) error { return w.upload(out, answer.Needed) }); err != nil {
				b.Fatal(err)
			}
			if _, err := tx.Commit(b.Context()); err != nil {
				b.Fatal(err)
			}
			tx.Close()
			first := time.Since(begun)
			bare := bareLinks(b, dir, n)
			resetPeak(b)
			var offered, committed time.Duration
			for b.Loop() {
				w.salt++
				b.StopTimer()
				w.manifest(b, list)
				b.StartTimer()
				start := time.Now()
				answer, tx := w.offer(b, s, list)
				offered += time.Since(start)
				if answer.Need != 1 {
					b.Fatalf("%d files are needed", answer.Need)
				}
				if _, err := tx.Upload(b.Context(), func(out io.Writer) error { return w.upload(out, answer.Needed) }); err != nil {
					b.Fatal(err)
				}
				start = time.Now()
				if _, err := tx.Commit(b.Context()); err != nil {
					b.Fatal(err)
				}
				committed += time.Since(start)
				tx.Close()
			}
			b.ReportMetric(first.Seconds(), "s/first-push")
			b.ReportMetric(offered.Seconds()/float64(b.N), "s/offer")
			b.ReportMetric(committed.Seconds()/float64(b.N), "s/commit")
			b.ReportMetric(committed.Seconds()/float64(b.N)/bare.Seconds(), "x-bare-links")
			b.ReportMetric(peakMB(b), "peak-MB")
		})
	}
}

// bareLinks is what n hard links in folders of 1000, and one sync, cost without
// us: the floor of a commit on this machine.
func bareLinks(tb testing.TB, dir string, n int) time.Duration {
	tb.Helper()
	sources, err := filepath.Glob(filepath.Join(dir, "generations/wide/*/files/*/*"))
	if err != nil || len(sources) != n {
		tb.Fatal(len(sources), err)
	}
	to := filepath.Join(dir, "bare")
	start := time.Now()
	for i, source := range sources {
		if i%1000 == 0 {
			if err := os.MkdirAll(fmt.Sprintf("%s/%05d", to, i/1000), 0o755); err != nil {
				tb.Fatal(err)
			}
		}
		if err := os.Link(source, fmt.Sprintf("%s/%05d/%08d", to, i/1000, i)); err != nil {
			tb.Fatal(err)
		}
	}
	f, err := os.Open(to)
	if err != nil {
		tb.Fatal(err)
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		tb.Fatal(err)
	}
	return time.Since(start)
}

// BenchmarkOffer measures a first offer of very many files: what the appliance
// needs of time and memory to take the list and say that it wants all of them.
func BenchmarkOffer(b *testing.B) {
	for _, n := range []int{100_000, 1_000_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			defer debug.SetGCPercent(debug.SetGCPercent(50))
			dir := b.TempDir()
			list := filepath.Join(dir, "list")
			s := open(b, dir, generations.Options{})
			w := wide{n: n}
			resetPeak(b)
			for b.Loop() {
				answer, tx := w.offer(b, s, list)
				if answer.Need != int64(n) {
					b.Fatal(answer.Need)
				}
				if err := tx.Abort(b.Context()); err != nil {
					b.Fatal(err)
				}
				tx.Close()
			}
			b.ReportMetric(peakMB(b), "peak-MB")
		})
	}
}

// BenchmarkSame measures the push of a repository that did not change.
func BenchmarkSame(b *testing.B) {
	s := open(b, b.TempDir(), generations.Options{})
	day := tree{}.add("a", "1")
	push(b, s, "photos", day)
	_, offer := day.manifest(b)
	for b.Loop() {
		answer, _, err := s.Begin(b.Context(), generations.Request{Repository: "photos", Offer: offer, Pusher: "home"})
		if err != nil || answer.Answer != pushwire.AnswerSame {
			b.Fatal(answer, err)
		}
	}
}

// BenchmarkReceive measures what an upload of long files costs: decoding, hashing,
// writing, syncing.
func BenchmarkReceive(b *testing.B) {
	day := tree{}
	for i := range 8 {
		day.add(fmt.Sprint(i), noise(uint64(i), 32<<20))
	}
	dir := b.TempDir()
	s := open(b, dir, generations.Options{})
	answer, tx, err := begin(b, s, "photos", day)
	if err != nil {
		b.Fatal(err)
	}
	var stream bytes.Buffer
	if err := day.write(&stream, answer); err != nil {
		b.Fatal(err)
	}
	tx.Close()
	b.SetBytes(int64(stream.Len()))
	for b.Loop() {
		b.StopTimer()
		_, tx, err := begin(b, s, "photos", day)
		if err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
		if _, err := tx.Receive(b.Context(), bytes.NewReader(stream.Bytes())); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := tx.Abort(b.Context()); err != nil {
			b.Fatal(err)
		}
		tx.Close()
		b.StartTimer()
	}
}
