package suspect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"farkeep/shared/beneath"
	"farkeep/shared/generations"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"
)

func scratch(t testing.TB) (*beneath.Dir, string) {
	dir := t.TempDir()
	d, err := beneath.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d, dir
}

func open(t testing.TB, d *beneath.Dir) *pack {
	p, err := openPack(d)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.close() })
	return p
}

func idOf(n uint32) (i id) {
	binary.LittleEndian.PutUint32(i[:], n+1)
	return i
}

// Whatever the segments hold, replaying them part by part in small tables gives
// what a map gives.
func TestReplay(t *testing.T) {
	for seed := range uint64(30) {
		r := rand.New(rand.NewPCG(seed, 9))
		d, _ := scratch(t)
		p := open(t, d)
		type state struct{ old, new uint64 }
		want := map[uint64]*state{}
		var segments []segment
		for n := range uint32(12) {
			s := segment{number: n, id: idOf(n), where: side(1 + r.IntN(3))}
			segments = append(segments, s)
			for part := range uint32(1 + r.IntN(3)) {
				var records []record
				for range r.IntN(40) {
					rec := record{key: mix(uint64(r.IntN(120)), 7), size: uint32(r.IntN(3)) * 100, crc: uint32(r.IntN(5))}
					if r.IntN(30) == 0 {
						rec.key = manifestKey
					}
					if want[rec.key] == nil {
						want[rec.key] = &state{}
					}
					value := uint64(rec.size)<<32 | uint64(rec.crc)
					if rec.size == 0 {
						value = 0
					}
					if s.where&inOld != 0 {
						want[rec.key].old = value
					}
					if s.where&inNew != 0 {
						want[rec.key].new = value
					}
					records = append(records, rec)
				}
				if err := p.append(block{number: n, part: part, id: s.id}, records); err != nil {
					t.Fatal(err)
				}
			}
			if err := p.append(block{number: n, part: p.blocks[len(p.blocks)-1].part + 1, id: s.id, flags: flagLast}, nil); err != nil {
				t.Fatal(err)
			}
		}
		p.sort()
		got, parts := map[uint64]state{}, 0
		err := each(t.Context(), p, segments, 4, func(s span, tab *table) {
			parts++
			if s.first == 0 {
				got[manifestKey] = state{tab.manifest[0], tab.manifest[1]}
			}
			for i, key := range tab.key {
				if key == 0 {
					continue
				}
				if _, twice := got[key]; twice || key < s.first || key > s.last {
					t.Errorf("seed %d: key %x in part %x", seed, key, s)
				}
				if !tab.has(key, tab.new[i]) || tab.has(key, 3) {
					t.Errorf("seed %d: key %x", seed, key)
				}
				got[key] = state{tab.old[i], tab.new[i]}
			}
		})
		if err != nil || parts < 5 {
			t.Fatalf("seed %d: %d parts, %v", seed, parts, err)
		}
		for key, w := range want {
			if got[key] != *w {
				t.Errorf("seed %d: key %x is %v, want %v", seed, key, got[key], *w)
			}
		}
	}
}

func TestKeysThatBeginAlike(t *testing.T) {
	d, _ := scratch(t)
	p := open(t, d)
	var records []record
	for i := range 100 {
		records = append(records, record{key: 77<<32 + uint64(i), size: 50})
	}
	if err := p.append(block{number: 1, id: idOf(1), flags: flagLast}, records); err != nil {
		t.Fatal(err)
	}
	p.sort()
	err := each(t.Context(), p, []segment{{number: 1, id: idOf(1), where: inNew}}, 4, func(span, *table) {})
	if err == nil || !strings.Contains(err.Error(), "not what borg makes") {
		t.Errorf("%v", err)
	}
}

// Of attempts that were cut the last whole one counts.
func TestFind(t *testing.T) {
	d, _ := scratch(t)
	p := open(t, d)
	add := func(number, part, flags, size uint32) {
		t.Helper()
		if err := p.append(block{number: number, part: part, flags: flags, id: idOf(number)}, []record{{key: 5, size: size}}); err != nil {
			t.Fatal(err)
		}
	}
	add(3, 0, 0, 1) // cut
	add(9, 0, flagLast, 1)
	add(3, 0, 0, 2)
	add(3, 1, flagLast, 3)
	add(3, 0, 0, 4) // cut
	add(5, 0, 0, 1) // cut
	add(6, 1, flagLast, 1)
	check := func(p *pack) {
		t.Helper()
		b := p.find(3, idOf(3))
		if len(b) != 2 || b[0].part != 0 || b[1].part != 1 {
			t.Fatalf("%+v", b)
		}
		for i, want := range []uint32{2, 3} {
			r, err := p.read(&b[i])
			if err != nil || r.len() != 1 || r.at(0).size != want {
				t.Errorf("%v %v", r, err)
			}
		}
		for _, n := range []uint32{4, 5, 6} {
			if b := p.find(n, idOf(n)); b != nil {
				t.Errorf("%d: %+v", n, b)
			}
		}
		if b := p.find(3, idOf(4)); b != nil {
			t.Errorf("another content: %+v", b)
		}
	}
	p.sort()
	check(p)
	check(open(t, d))
}

func TestSweep(t *testing.T) {
	d, dir := scratch(t)
	p := open(t, d)
	records := make([]record, maxRecords)
	var keep []segment
	for n := range uint32(40) {
		for i := range records {
			records[i] = record{key: uint64(i) << 20, size: n + 1}
		}
		if err := p.append(block{number: n, id: idOf(n), flags: flagLast}, records); err != nil {
			t.Fatal(err)
		}
		if n%4 == 0 {
			keep = append(keep, segment{number: n, id: idOf(n), where: inNew})
		}
	}
	p.sort()
	before := p.end
	if err := p.sweep(keep); err != nil {
		t.Fatal(err)
	}
	p = open(t, d)
	if p.end*3 > before {
		t.Errorf("%d bytes of %d are left", p.end, before)
	}
	for _, s := range keep {
		b := p.find(s.number, s.id)
		if len(b) != 1 {
			t.Fatalf("%d is gone", s.number)
		}
		if r, err := p.read(&b[0]); err != nil || r.len() != maxRecords || r.at(7).size != s.number+1 {
			t.Errorf("%d: %v", s.number, err)
		}
	}
	if p.find(1, idOf(1)) != nil {
		t.Error("what belongs to no segment is still there")
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("%v %v", left, err)
	}
}

// Whatever lies in the file: it opens, what it finds is sorted or says that it is
// damaged, and it takes new blocks.
func FuzzPack(f *testing.F) {
	d, dir := scratch(f)
	p := open(f, d)
	for n := range uint32(3) {
		if err := p.append(block{number: n, id: idOf(n), flags: flagLast}, []record{{9, 100, 1}, {3, 0, 0}, {9, 50, 2}}); err != nil {
			f.Fatal(err)
		}
	}
	whole, err := os.ReadFile(filepath.Join(dir, packFile))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole)
	f.Add(whole[:len(whole)-5])
	f.Add(append(slices.Clone(whole), whole[8:]...))
	f.Add([]byte(packMagic))
	f.Add([]byte("else"))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		d, dir := scratch(t)
		if err := os.WriteFile(filepath.Join(dir, packFile), b, 0o600); err != nil {
			t.Fatal(err)
		}
		p := open(t, d)
		check := func(number uint32, of id) {
			for _, b := range p.find(number, of) {
				r, err := p.read(&b)
				if err != nil {
					if !errors.Is(err, errDamaged) {
						t.Fatal(err)
					}
					continue
				}
				if r.len() != int(b.count) {
					t.Fatalf("%d records of %d", r.len(), b.count)
				}
			}
		}
		for _, b := range slices.Clone(p.blocks) {
			check(b.number, b.id)
		}
		if err := p.append(block{number: 99, id: idOf(99), flags: flagLast}, []record{{2, 1, 1}, {1, 1, 1}}); err != nil {
			t.Fatal(err)
		}
		p = open(t, d)
		found := p.find(99, idOf(99))
		if len(found) != 1 {
			t.Fatal("what was written is not found")
		}
		if r, err := p.read(&found[0]); err != nil || r.len() != 2 || r.key(0) != 1 || r.from(2) != 1 {
			t.Fatalf("%v %v", r, err)
		}
	})
}

func TestAnchors(t *testing.T) {
	d, dir := scratch(t)
	now := time.Date(2026, 5, 20, 3, 0, 0, 0, time.UTC)
	save := func(age time.Duration, keys ...uint64) {
		t.Helper()
		a := newAnchor(now.Add(-age), 100)
		for _, k := range keys {
			a.offer(mix(k, a.secret), item{key: k, other: k + 1, size: k * 10})
		}
		if err := a.save(d); err != nil {
			t.Fatal(err)
		}
	}
	const day = 24 * time.Hour
	save(9*day, 1)
	save(-day, 2)
	save(7*day, 9, 3, 5)
	save(3*day, 4)
	as, err := openAnchors(d, now, nil)
	if err != nil || as.oldest == nil || !as.oldest.at.Equal(now.Add(-7*day)) || !as.due {
		t.Fatalf("%+v %v", as, err)
	}
	if got := as.oldest.within(span{4, 9}); len(got) != 2 || got[0] != (item{5, 6, 50}) || got[1].key != 9 {
		t.Errorf("%v", got)
	}
	if left, _ := os.ReadDir(dir); len(left) != 3 {
		t.Errorf("%v", left)
	}
	if err := os.Remove(filepath.Join(dir, anchorName(now.Add(day)))); err != nil {
		t.Errorf("the one from tomorrow: %v", err)
	}
	// Accepted four days ago: what was before does not count any more.
	accepted := &generations.Generation{Standing: generations.Accepted, Committed: now.Add(-4 * day)}
	if as, err = openAnchors(d, now, accepted); err != nil || as.oldest == nil || !as.oldest.at.Equal(now.Add(-3*day)) {
		t.Fatalf("%+v %v", as, err)
	}
	save(time.Hour, 7)
	if as, err = openAnchors(d, now, nil); err != nil || as.due {
		t.Errorf("%+v %v", as, err)
	}
	// A damaged one is passed over and goes.
	if err := os.WriteFile(filepath.Join(dir, anchorName(now.Add(-3*day))), []byte(anchorMagic+"?"), 0o600); err != nil {
		t.Fatal(err)
	}
	if as, err = openAnchors(d, now, nil); err != nil || as.oldest == nil || !as.oldest.at.Equal(now.Add(-time.Hour)) {
		t.Errorf("%+v %v", as, err)
	}
	if left, _ := os.ReadDir(dir); len(left) != 1 {
		t.Errorf("%v", left)
	}
}

// The sample is about as large as it should be, and another one each time.
func TestSample(t *testing.T) {
	const n = 2_000_000
	a, b := newAnchor(time.Now(), n), newAnchor(time.Now(), n)
	r := rand.New(rand.NewPCG(1, 1))
	for range n {
		k := r.Uint64()
		a.offer(mix(k, a.secret), item{key: k})
		b.offer(mix(k, b.secret), item{key: k})
	}
	for _, x := range []*anchor{a, b} {
		if len(x.items) < maxSample/4 || len(x.items) > maxSample*3/4 {
			t.Errorf("%d of %d", len(x.items), n)
		}
	}
	in := map[uint64]bool{}
	for _, i := range a.items {
		in[i.key] = true
	}
	both := 0
	for _, i := range b.items {
		if in[i.key] {
			both++
		}
	}
	if both > len(a.items)/10 {
		t.Errorf("%d of %d are in both samples", both, len(a.items))
	}
}

func FuzzAnchor(f *testing.F) {
	d, dir := scratch(f)
	a := newAnchor(time.Unix(1e9, 0), 10)
	for k := range uint64(5) {
		a.offer(k, item{key: k * 7, other: k, size: 100})
	}
	if err := a.save(d); err != nil {
		f.Fatal(err)
	}
	whole, err := os.ReadFile(filepath.Join(dir, anchorName(a.at)))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole)
	f.Add(whole[:40])
	f.Add([]byte(anchorMagic))
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := parseAnchor(b)
		if err != nil {
			return
		}
		if !slices.IsSortedFunc(a.items, func(x, y item) int { return int(min(max(int64(x.key>>1)-int64(y.key>>1), -1), 1)) }) {
			t.Fatal("not sorted")
		}
		d, dir := scratch(t)
		a.at = time.Unix(1e9, 0)
		if err := a.save(d); err != nil {
			t.Fatal(err)
		}
		again, err := os.ReadFile(filepath.Join(dir, anchorName(a.at)))
		if err != nil || string(again) != string(b) {
			t.Fatalf("written again it differs: %v", err)
		}
	})
}

// BenchmarkJudgement measures a repository of 3 million chunks in 8000 segments,
// which is 4 TB as borg makes them: a night with 20 new segments, and one on which
// compaction has moved a tenth of everything. The chunks that are new have 1000
// bytes here, so that the time is that of the comparison; a real night also reads
// what is new, at the speed of the disk (see shared/borgsegment's benchmark).
func BenchmarkJudgement(b *testing.B) {
	const (
		segments = 8000
		each     = 375
	)
	for _, c := range []struct {
		name       string
		gone, more int // segments
	}{{"night", 0, 20}, {"compaction", 900, 800}} {
		b.Run(c.name, func(b *testing.B) {
			d := newDisk(b, Config{})
			d.judge.bits = tableBits
			p := open(b, d.scratch)
			records := make([]record, each)
			old := tree{"config": borg()["config"]}
			sums := map[string]manifest.Entry{}
			for n := range segments {
				path := fmt.Sprintf("data/%d/%d", n/1000, n)
				content := []byte(fmt.Sprint("segment ", n))
				e := manifest.Entry{Path: path, Kind: manifest.File, Mode: 0o600, Size: 500 << 20, Sum: sum(content)}
				sums[path] = e
				for i := range records {
					k := key(uint64(n*each + i + 1))
					records[i] = record{key: binary.BigEndian.Uint64(k[:]), size: 1_300_000, crc: uint32(n)}
				}
				if err := p.append(block{number: uint32(n), id: id(e.Sum[:16]), flags: flagLast | flagChecked}, records); err != nil {
					b.Fatal(err)
				}
			}
			write := func(number int, tr tree, has func(n int) bool) {
				var all []manifest.Entry
				for _, folder := range []string{"data", "data/0", "data/1", "data/2", "data/3", "data/4", "data/5", "data/6", "data/7", "data/8"} {
					all = append(all, manifest.Entry{Path: folder, Kind: manifest.Folder, Mode: 0o700})
				}
				for n := range segments {
					if has(n) {
						all = append(all, sums[fmt.Sprintf("data/%d/%d", n/1000, n)])
					}
				}
				for path, content := range tr {
					all = append(all, manifest.Entry{Path: path, Kind: manifest.File, Mode: 0o600, Size: int64(len(content)), Sum: sum(content)})
					d.files[fmt.Sprint(number)+"/"+path] = d.object(content)
				}
				slices.SortFunc(all, func(a, b manifest.Entry) int { return manifest.ComparePaths(a.Path, b.Path) })
				folder := filepath.Join(d.dir, fmt.Sprint(number))
				if err := os.Mkdir(folder, 0o755); err != nil {
					b.Fatal(err)
				}
				f, err := os.Create(filepath.Join(folder, "MANIFEST"))
				if err != nil {
					b.Fatal(err)
				}
				defer f.Close()
				w := manifest.NewWriter(f)
				for _, e := range all {
					if err := w.Add(e); err != nil {
						b.Fatal(err)
					}
				}
				if _, err := w.Close(); err != nil {
					b.Fatal(err)
				}
			}
			old["data/8/8000"], old["index.8000"] = segmentOf(archives(1), commit), []byte("index")
			write(1, old, func(int) bool { return true })
			fresh := tree{"config": old["config"], "data/8/8000": old["data/8/8000"]}
			// What lived in the segments that are gone, but for a tenth of it, lies in new ones.
			next := uint64(0)
			for n := range c.more {
				var ops []op
				for range each {
					next++
					k := next
					if c.gone == 0 {
						k += 10_000_000
					}
					ops = append(ops, put(k, 1000))
				}
				fresh[fmt.Sprint("data/8/", 8001+n)] = segmentOf(ops...)
			}
			last := 8001 + c.more
			fresh[fmt.Sprint("data/8/", last)], fresh[fmt.Sprint("index.", last)] = segmentOf(archives(2), commit), []byte("index")
			write(2, fresh, func(n int) bool { return n >= c.gone })

			g := &generations.Generation{Name: generations.Name(1, d.clock), Kind: pushwire.KindBorg1, Committed: d.clock, RepositoryID: repositoryID, Standing: generations.Good}
			candidate := &generations.Generation{Name: generations.Name(2, d.clock), Kind: pushwire.KindBorg1}
			offer := pushwire.Offer{Kind: pushwire.KindBorg1, RepositoryID: repositoryID}
			pristine := p.end
			old, fresh, sums, records = nil, nil, nil, nil
			defer debug.SetGCPercent(debug.SetGCPercent(50))
			runtime.GC()
			var peak uint64
			stop, stopped := make(chan struct{}), make(chan struct{})
			go func() {
				defer close(stopped)
				var m runtime.MemStats
				tick := time.NewTicker(5 * time.Millisecond)
				defer tick.Stop()
				for {
					select {
					case <-stop:
						return
					case <-tick.C:
						runtime.ReadMemStats(&m)
						peak = max(peak, m.HeapInuse)
					}
				}
			}()
			var before, after syscall.Rusage
			syscall.Getrusage(syscall.RUSAGE_SELF, &before)
			b.ResetTimer()
			for range b.N {
				if err := os.Truncate(filepath.Join(d.dir, "scratch", packFile), pristine); err != nil {
					b.Fatal(err)
				}
				d.current = g
				d.clock = d.clock.Add(24 * time.Hour)
				v, err := d.judgeIt(b.Context(), candidate, offer, "2")
				if err != nil || v.Suspect {
					b.Fatal(v, err)
				}
			}
			b.StopTimer()
			syscall.Getrusage(syscall.RUSAGE_SELF, &after)
			close(stop)
			<-stopped
			cpu := time.Duration(after.Utime.Nano() - before.Utime.Nano() + after.Stime.Nano() - before.Stime.Nano())
			b.ReportMetric(cpu.Seconds()/float64(b.N), "cpu-s/op")
			b.ReportMetric(float64(peak)/1e6, "heap-peak-MB")
			b.ReportMetric(float64(pristine)/1e6, "index-MB")
		})
	}
}
