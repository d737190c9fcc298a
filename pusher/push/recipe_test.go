package push

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"farkeep/pusher/base"
	"farkeep/pusher/borgtest"
	"farkeep/pusher/borgtest/household"
	"farkeep/pusher/target"
	"farkeep/shared/borgsegment"
	"farkeep/shared/manifest"
	"farkeep/shared/site"
)

// compacted is a repository that was pushed, and of which then an archive was
// deleted and half of what is left was moved.
func compacted(t *testing.T, encryption string) (*bench, *borgtest.Repository, string) {
	b := newBench(t)
	disk := t.TempDir()
	b.directory("disk", disk)
	r := borgtest.Init(t, b.repos, "photos", encryption)
	r.Set(t, "max_segment_size", "3000000")
	r.Fill(t, 8, 150_000)
	r.Create(t, "old")
	r.Fill(t, 20, 150_000)
	r.Create(t, "one")
	b.mustPush()
	old, err := filepath.Glob(filepath.Join(r.Source, "001-*"))
	if err != nil || len(old) != 8 {
		t.Fatal(old, err)
	}
	for _, name := range old {
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
	r.Fill(t, 2, 150_000)
	r.Create(t, "two")
	r.Run(t, "delete", r.Path+"::old", r.Path+"::one")
	r.Run(t, "compact", "--threshold=0", r.Path)
	return b, r, disk
}

func TestMovedChunksCrossOnce(t *testing.T) {
	for _, encryption := range []string{"none", "repokey"} {
		t.Run(encryption, func(t *testing.T) {
			t.Parallel()
			b, r, disk := compacted(t, encryption)
			o := b.mustPush().Outcomes[0]
			// 300 kB are new, and the list of an archive; 1.2 MB were moved.
			if o.Bytes > 320_000 || o.Copied < 1_200_000 {
				t.Errorf("%d bytes crossed the line, %d were copied", o.Bytes, o.Copied)
			}
			verify(t, r, files(disk, "photos", o.Generation), map[string]string{"two": r.Source})
			if same := b.mustPush().Outcomes[0]; same.New || same.Bytes+same.Copied > 0 {
				t.Errorf("unchanged: %+v", same)
			}
		})
	}
}

// Notes that are lost cost one push, and are made anew by it; also by one that
// finds nothing to do.
func TestNotesAreLost(t *testing.T) {
	t.Parallel()
	b, r, disk := compacted(t, "none")
	notes := filepath.Join(b.state, "base")
	if err := os.RemoveAll(notes); err != nil {
		t.Fatal(err)
	}
	if o := b.mustPush().Outcomes[0]; o.Copied != 0 || o.Bytes < 1_500_000 {
		t.Errorf("without notes: %+v", o)
	}
	if err := os.RemoveAll(notes); err != nil {
		t.Fatal(err)
	}
	if o := b.mustPush().Outcomes[0]; o.New {
		t.Errorf("unchanged: %+v", o)
	}
	r.Fill(t, 1, 150_000)
	r.Create(t, "three")
	r.Run(t, "delete", r.Path+"::two")
	r.Run(t, "compact", "--threshold=0", r.Path)
	o := b.mustPush().Outcomes[0]
	if o.Bytes > 300_000 || o.Copied == 0 {
		t.Errorf("with notes: %+v", o)
	}
	verify(t, r, files(disk, "photos", o.Generation), map[string]string{"three": r.Source})
}

// Notes that are wrong, for whatever reason, cannot make a wrong file: the target
// finds it out, and whole files are sent.
func TestNotesAreWrong(t *testing.T) {
	t.Parallel()
	b, r, disk := compacted(t, "none")
	first := filepath.Join(disk, "generations", "photos")
	generations, err := filepath.Glob(filepath.Join(first, "0*"))
	if err != nil || len(generations) != 1 {
		t.Fatal(generations, err)
	}
	raw, err := os.ReadFile(filepath.Join(generations[0], "MANIFEST"))
	if err != nil {
		t.Fatal(err)
	}
	in := manifest.NewReader(bytes.NewReader(raw))
	for err == nil {
		_, err = in.Next()
	}
	if !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	// The same digest, and in each segment every chunk where another is.
	lie := t.TempDir()
	m := base.Open(filepath.Join(b.state, "base"), b.log)
	if err := m.Forget("disk", "photos"); err != nil {
		t.Fatal(err)
	}
	err = m.Remember(t.Context(), "disk", "photos", in.Summary().Digest, bytes.NewReader(raw), func(path string) (*os.File, error) {
		content, err := os.ReadFile(filepath.Join(generations[0], "files", path))
		if err != nil {
			return nil, err
		}
		mixUp(content)
		to := filepath.Join(lie, strings.ReplaceAll(path, "/", "-"))
		if err := os.WriteFile(to, content, 0o600); err != nil {
			return nil, err
		}
		return os.Open(to)
	})
	if err != nil {
		t.Fatal(err)
	}
	o := b.mustPush().Outcomes[0]
	if !strings.Contains(b.said.String(), "sending whole files") {
		t.Error("the lie was not found out: it was none")
	}
	verify(t, r, files(disk, "photos", o.Generation), map[string]string{"two": r.Source})
}

// mixUp gives every large entry of a segment the CRC and the key of the one before.
func mixUp(segment []byte) {
	r := borgsegment.NewReader(borgsegment.Headers)
	r.Reset(bytes.NewReader(segment), int64(len(segment)))
	var e borgsegment.Entry
	var before []byte
	for r.Next(&e) {
		if e.Size > 100_000 {
			head := segment[e.Offset:]
			mine := bytes.Clone(head[:borgsegment.KeyedSize])
			if before != nil {
				copy(head[:4], before[:4])
				copy(head[borgsegment.HeaderSize:borgsegment.KeyedSize], before[borgsegment.HeaderSize:])
			}
			before = mine
		}
	}
}

// TestLineBytes lives with real Borg for some weeks, and counts what crosses the
// line: our upload, and what rsync would send, of which only the differences
// count as well. FARKEEP_SIMULATE=300 is the long form.
func TestLineBytes(t *testing.T) {
	days, keep := 6, "--keep-daily=2"
	if text, long := os.LookupEnv("FARKEEP_SIMULATE"); long {
		var err error
		if days, err = strconv.Atoi(text); err != nil || days < 2 {
			t.Fatalf("FARKEEP_SIMULATE=%q is no number of days", text)
		}
		keep = "--keep-daily=7"
	}
	t.Parallel()
	b := newBench(t)
	disk, mirror := t.TempDir(), t.TempDir()
	var ours int64
	w := b.wrapped(disk)
	w.onUpload = func(out io.Writer) io.Writer {
		return writerFunc(func(p []byte) (int, error) {
			ours += int64(len(p))
			return out.Write(p)
		})
	}
	r := borgtest.Init(t, b.repos, "home", "repokey")
	r.Set(t, "max_segment_size", "5000000")
	home, err := household.New(r.Source, 1)
	if err != nil {
		t.Fatal(err)
	}
	ledger := newLedger(r.Path)
	var total, steady bytesSent
	for day := range days + 1 {
		if day > 0 {
			if err := home.Next(); err != nil {
				t.Fatal(err)
			}
		}
		date := home.Date().Format("2006-01-02T15:04:05")
		r.Run(t, "create", "--chunker-params=buzhash,13,17,14,4095", "--timestamp", date, r.Path+"::"+home.Date().Format(time.DateOnly), r.Source)
		r.Run(t, "prune", keep, "--keep-weekly=4", "--keep-monthly=6", r.Path)
		r.Run(t, "compact", r.Path)
		ours = 0
		o := b.mustPush().Outcomes[0]
		rsync := rsync(t, r.Path, mirror)
		fresh, index := ledger.night(t)
		if day == 0 {
			continue // everything is new to everybody
		}
		tonight := bytesSent{ours: ours, rsync: rsync, least: fresh + index}
		total.add(tonight)
		if day > steadyDay {
			steady.add(tonight)
		}
		if days > 20 && day%10 == 0 || days <= 20 {
			t.Logf("day %d: we %d (copied %d), rsync %d, new chunks %d, index differences %d", day, ours, o.Copied, rsync, fresh, index)
		}
		if days > 20 {
			// History is not the subject, and takes room.
			old, _ := filepath.Glob(filepath.Join(disk, "generations", "home", "0*"))
			for _, g := range old[:max(0, len(old)-2)] {
				if err := os.RemoveAll(g); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	t.Logf("%d days: %v", days, total)
	if total.ours > total.least/100*105 {
		t.Errorf("%d days: %v", days, total)
	}
	if days >= steadyDay+30 {
		t.Logf("from day %d on: %v", steadyDay, steady)
		if steady.ours > steady.least/100*105 || steady.ours > steady.rsync/100*32 {
			t.Errorf("from day %d on: %v", steadyDay, steady)
		}
	}
	got, err := exec.Command("diff", "-r", "--exclude=lock*", "--exclude=.farkeep-freeze", r.Path, filepath.Join(newest(t, disk), "files")).CombinedOutput()
	if err != nil {
		t.Errorf("the copy differs:\n%s", got)
	}
}

// steadyDay is when monthly archives begin to expire, with six of them kept: from
// then on as much goes as comes, and compaction moves much of what stays.
const steadyDay = 200

// bytesSent is what nights took on the line.
type bytesSent struct{ ours, rsync, least int64 }

func (b *bytesSent) add(o bytesSent) {
	b.ours += o.ours
	b.rsync += o.rsync
	b.least += o.least
}

func (b bytesSent) String() string {
	return fmt.Sprintf("we sent %d bytes, rsync %d, new chunks and index differences are %d: %.3f of them, %.3f of rsync",
		b.ours, b.rsync, b.least, float64(b.ours)/float64(b.least), float64(b.ours)/float64(b.rsync))
}

func newest(t *testing.T, disk string) string {
	t.Helper()
	all, err := filepath.Glob(filepath.Join(disk, "generations", "home", "0*"))
	if err != nil || len(all) == 0 {
		t.Fatal(all, err)
	}
	return all[len(all)-1]
}

var sent = regexp.MustCompile(`(?m)^Total bytes sent: ([\d,]+)$`)

// rsync mirrors as over a line, and says how many bytes it sent.
func rsync(t *testing.T, from, to string) int64 {
	t.Helper()
	out, err := exec.Command("rsync", "-a", "--delete", "--no-whole-file", "--stats", "--exclude=/.farkeep-freeze", from+"/", to).CombinedOutput()
	if err != nil {
		t.Fatalf("rsync: %v\n%s", err, out)
	}
	m := sent.FindSubmatch(out)
	if m == nil {
		t.Fatalf("rsync says not what it sent:\n%s", out)
	}
	n, err := strconv.ParseInt(strings.ReplaceAll(string(m[1]), ",", ""), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// ledger knows what nobody can send less of: the entries that were never there
// the night before, and the bytes in which the index and its companions differ
// from the version before. It is no part of the pusher, and shares nothing with it
// but the reader of segments.
type ledger struct {
	path    string
	entries map[string]bool // key, CRC and size of all of last night's
	small   map[string][]byte
}

func newLedger(path string) *ledger { return &ledger{path: path} }

func (l *ledger) night(t *testing.T) (fresh, differ int64) {
	t.Helper()
	now, small := map[string]bool{}, map[string][]byte{}
	reader := borgsegment.NewReader(borgsegment.Headers)
	err := fs.WalkDir(os.DirFS(l.path), ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			if d != nil && d.Name() == ".farkeep-freeze" {
				return fs.SkipDir
			}
			return err
		}
		name := filepath.Join(l.path, path)
		if _, ok := borgsegment.PathNumber(path); !ok {
			stem, _, _ := strings.Cut(path, ".")
			if stem == "index" || stem == "hints" || stem == "integrity" {
				small[stem], err = os.ReadFile(name)
			}
			return err
		}
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		info, err := f.Stat()
		if err != nil {
			return err
		}
		reader.Reset(f, info.Size())
		var e borgsegment.Entry
		for reader.Next(&e) {
			id := fmt.Sprintf("%d %x %d %d", e.Tag, e.Key, e.CRC, e.Size)
			if !now[id] && !l.entries[id] && e.Tag == borgsegment.Put {
				fresh += int64(e.Size)
			}
			now[id] = true
		}
		return reader.Err()
	})
	if err != nil {
		t.Fatal(err)
	}
	for stem, content := range small {
		was := l.small[stem]
		for i, b := range content {
			if i >= len(was) || was[i] != b {
				differ++
			}
		}
	}
	l.entries, l.small = now, small
	return fresh, differ
}

// Of a manifest that the target has the one before of, what differs is sent; and
// the whole one where what is kept here is not what the target has.
func TestManifestDelta(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	source, disk := t.TempDir(), t.TempDir()
	for i := range 2000 {
		if err := os.WriteFile(filepath.Join(source, fmt.Sprintf("%04d", i)), []byte(fmt.Sprint(i)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	b.site.Folders = nil
	b.site.Repositories = []site.Repository{{Name: "papers", Path: source}}
	w := b.wrapped(disk)
	var base string
	var listed [][]byte
	w.list = func(list target.List) target.List {
		return target.List{Open: func(string) (io.ReadCloser, error) {
			r, err := list.Open(base)
			if err != nil {
				return nil, err
			}
			defer r.Close()
			got, err := io.ReadAll(r)
			listed = append(listed, got)
			return io.NopCloser(bytes.NewReader(got)), err
		}}
	}
	// push changes a file, pushes, and says how the manifest went.
	push := func(content string) (sizes []int) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(source, "1000"), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		listed = nil
		o := b.mustPush().Outcomes[0]
		base = o.digest
		got, err := os.ReadFile(filepath.Join(disk, "generations", "papers", o.Generation, "MANIFEST"))
		if err != nil {
			t.Fatal(err)
		}
		kept, err := os.ReadFile(filepath.Join(b.state, "base", "papers", "disk.manifest"))
		if err != nil || !bytes.Equal(got, kept) {
			t.Errorf("what is kept, %d bytes, is not the generation's, %d bytes; %v", len(kept), len(got), err)
		}
		for _, l := range listed {
			sizes = append(sizes, len(l))
		}
		return sizes
	}
	first := push("one")
	if len(first) != 1 || first[0] < 50_000 {
		t.Fatalf("the first manifest: %v bytes", first)
	}
	if second := push("two"); len(second) != 1 || second[0] > 200 {
		t.Errorf("one file of 2,000 changed: %v bytes", second)
	}
	// The same content, other times: the digest cannot tell, the target can.
	path := filepath.Join(b.state, "base", "papers", "disk.manifest")
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var touched bytes.Buffer
	in, out := manifest.NewReader(bytes.NewReader(raw)), manifest.NewWriter(&touched)
	for {
		e, err := in.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if e.Path == "0007" {
			e.MTime += 1000
		}
		if err := out.Add(e); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := out.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, touched.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	if third := push("three"); len(third) != 2 || third[1] < 50_000 {
		t.Errorf("with another manifest kept: %v bytes", third)
	}
	if err := os.WriteFile(path, []byte("damaged"), 0o600); err != nil {
		t.Fatal(err)
	}
	if fourth := push("four"); len(fourth) != 1 || fourth[0] < 50_000 {
		t.Errorf("with nothing kept: %v bytes", fourth)
	}
	if fifth := push("five"); len(fifth) != 1 || fifth[0] > 200 {
		t.Errorf("in the end: %v bytes", fifth)
	}
}
