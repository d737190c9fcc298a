package suspect

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"farkeep/shared/beneath"
	"farkeep/shared/borgsegment"
	"farkeep/shared/generations"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"
)

const repositoryID = "57d6c1d52ce76a836b532b0e42e677dec6af9fca3673db511279358828a21ed6"

// tree is a repository: path to content. A path with a slash at its end is a folder.
type tree map[string][]byte

func (t tree) clone() tree { return maps.Clone(t) }

// disk plays a store with one repository: the current generation and a scratch
// folder.
type disk struct {
	t       testing.TB
	dir     string
	scratch *beneath.Dir
	judge   *Judge
	clock   time.Time
	n       int
	current *generations.Generation
	opened  []string // what the judge opened of the candidate

	objects map[manifest.Sum]string // where a content lies
	files   map[string]string       // a generation's file, FOLDER/PATH, to where its content lies
}

func newDisk(t testing.TB, config Config) *disk {
	d := &disk{t: t, dir: t.TempDir(), clock: time.Date(2026, 5, 1, 3, 0, 0, 0, time.UTC), objects: map[manifest.Sum]string{}, files: map[string]string{}}
	if err := os.Mkdir(filepath.Join(d.dir, "scratch"), 0o700); err != nil {
		t.Fatal(err)
	}
	var err error
	if d.scratch, err = beneath.Open(filepath.Join(d.dir, "scratch")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.scratch.Close() })
	if config.Now == nil {
		config.Now = func() time.Time { return d.clock }
	}
	d.judge = New(config, slog.New(slog.NewTextHandler(logWriter{t}, nil)))
	d.judge.bits = 10
	return d
}

type logWriter struct{ t testing.TB }

func (w logWriter) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

// write makes a generation of tr.
func (d *disk) write(tr tree, kind string) (*generations.Generation, pushwire.Offer) {
	d.t.Helper()
	d.n++
	dir := filepath.Join(d.dir, fmt.Sprint(d.n))
	folders := map[string]bool{}
	var all []manifest.Entry
	for path, content := range tr {
		if path, folder := strings.CutSuffix(path, "/"); folder {
			if !folders[path] {
				folders[path] = true
				all = append(all, manifest.Entry{Path: path, Kind: manifest.Folder, Mode: 0o700})
			}
			continue
		}
		for dir := filepath.Dir(path); dir != "." && !folders[dir]; dir = filepath.Dir(dir) {
			folders[dir] = true
			all = append(all, manifest.Entry{Path: dir, Kind: manifest.Folder, Mode: 0o700})
		}
		all = append(all, manifest.Entry{Path: path, Kind: manifest.File, Mode: 0o600, Size: int64(len(content)), Sum: sum(content)})
		d.files[fmt.Sprint(d.n)+"/"+path] = d.object(content)
	}
	slices.SortFunc(all, func(a, b manifest.Entry) int { return manifest.ComparePaths(a.Path, b.Path) })
	if err := os.MkdirAll(dir, 0o755); err != nil {
		d.t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(dir, "MANIFEST"))
	if err != nil {
		d.t.Fatal(err)
	}
	defer f.Close()
	w := manifest.NewWriter(f)
	for _, e := range all {
		if err := w.Add(e); err != nil {
			d.t.Fatal(err)
		}
	}
	s, err := w.Close()
	if err != nil {
		d.t.Fatal(err)
	}
	offer := pushwire.Offer{Digest: s.Digest.String(), Entries: s.Entries, Bytes: s.Bytes, Kind: kind}
	if kind == pushwire.KindBorg1 {
		offer.RepositoryID = repositoryID
	}
	g := &generations.Generation{Name: generations.Name(int64(d.n), d.clock), Kind: kind, Committed: d.clock, RepositoryID: offer.RepositoryID, Standing: generations.Good}
	return g, offer
}

// object writes a content, once.
func (d *disk) object(content []byte) string {
	s := sum(content)
	if d.objects[s] == "" {
		d.objects[s] = filepath.Join(d.dir, s.String())
		if err := os.WriteFile(d.objects[s], content, 0o600); err != nil {
			d.t.Fatal(err)
		}
	}
	return d.objects[s]
}

func (d *disk) open(folder, path string) (*os.File, error) {
	at, ok := d.files[folder+"/"+path]
	if !ok {
		return nil, &os.PathError{Op: "open", Path: path, Err: os.ErrNotExist}
	}
	return os.Open(at)
}

func sum(b []byte) manifest.Sum {
	h := manifest.NewHash()
	h.Write(b)
	return manifest.SumOf(h)
}

// push judges tr against the current generation. What is not suspect becomes it.
func (d *disk) push(tr tree, kind string) generations.Verdict {
	d.t.Helper()
	v, err := d.try(context.Background(), tr, kind)
	if err != nil {
		d.t.Fatal(err)
	}
	return v
}

func (d *disk) try(ctx context.Context, tr tree, kind string) (generations.Verdict, error) {
	d.t.Helper()
	d.clock = d.clock.Add(24 * time.Hour)
	g, offer := d.write(tr, kind)
	return d.judgeIt(ctx, g, offer, fmt.Sprint(d.n))
}

func (d *disk) judgeIt(ctx context.Context, g *generations.Generation, offer pushwire.Offer, folder string) (generations.Verdict, error) {
	list := func(folder string) func() (*manifest.Reader, io.Closer, error) {
		return func() (*manifest.Reader, io.Closer, error) {
			f, err := os.Open(filepath.Join(d.dir, folder, "MANIFEST"))
			if err != nil {
				return nil, nil, err
			}
			return manifest.NewReader(f), f, nil
		}
	}
	d.opened = nil
	c := &generations.Candidate{
		Repository: "photos", Pusher: "home", Offer: offer, Current: d.current, Scratch: d.scratch,
		New: list(folder),
		Open: func(path string) (*os.File, error) {
			d.opened = append(d.opened, path)
			return d.open(folder, path)
		},
	}
	if d.current != nil {
		old := fmt.Sprint(sequence(d.current))
		c.Old = list(old)
		c.OpenOld = func(path string) (*os.File, error) {
			d.opened = append(d.opened, "old/"+path)
			return d.open(old, path)
		}
	}
	v, err := d.judge.Judge(ctx, c)
	if err == nil && !v.Suspect {
		d.current = g
	}
	return v, err
}

func sequence(g *generations.Generation) int64 {
	n, _, err := generations.ParseName(g.Name)
	if err != nil {
		panic(err)
	}
	return n
}

// op is one entry to write.
type op struct {
	tag  borgsegment.Tag
	key  uint64
	size int // of the data
	salt byte
}

func key(n uint64) (k borgsegment.Key) {
	if n != 0 {
		binary.BigEndian.PutUint64(k[:], mix(n, 12345))
		binary.BigEndian.PutUint64(k[8:], n)
	}
	return k
}

func put(n uint64, size int) op { return op{borgsegment.Put, n, size, 0} }
func del(n uint64) op           { return op{tag: borgsegment.Delete, key: n} }

// table is the manifest's PUT: another one with each salt.
func archives(salt byte) op { return op{borgsegment.Put, 0, 200, salt} }

var commit = op{tag: borgsegment.Commit}

func segmentOf(ops ...op) []byte {
	b := []byte(borgsegment.Magic)
	for _, o := range ops {
		at := len(b)
		b = append(b, 0, 0, 0, 0, 0, 0, 0, 0, byte(o.tag))
		if o.tag != borgsegment.Commit {
			k := key(o.key)
			b = append(b, k[:]...)
		}
		if o.tag == borgsegment.Put {
			b = append(b, bytes.Repeat([]byte{byte(o.key) ^ o.salt}, o.size)...)
		}
		binary.LittleEndian.PutUint32(b[at+4:], uint32(len(b)-at))
		binary.LittleEndian.PutUint32(b[at:], crc32.ChecksumIEEE(b[at+4:]))
	}
	return b
}

// borg is a repository of 400 chunks in segments 0 to 9, the last commit in 10.
func borg() tree {
	t := tree{"config": []byte("[repository]\nversion = 1\nid = " + repositoryID + "\n"), "README": []byte("This is a Borg Backup repository.\n")}
	for s := range 10 {
		var ops []op
		for i := range 40 {
			ops = append(ops, put(uint64(s*40+i+1), 1000))
		}
		t[fmt.Sprintf("data/0/%d", s)] = segmentOf(ops...)
	}
	return t.commit(10, archives(1))
}

// commit ends a transaction in segment n.
func (t tree) commit(n int, ops ...op) tree {
	for path := range t {
		if strings.HasPrefix(path, "index.") || strings.HasPrefix(path, "hints.") {
			delete(t, path)
		}
	}
	t[fmt.Sprintf("data/0/%d", n)] = segmentOf(append(ops, commit)...)
	t[fmt.Sprintf("index.%d", n)] = []byte("an index")
	t[fmt.Sprintf("hints.%d", n)] = []byte("hints")
	return t
}

func ops(of func(uint64) op, keys ...uint64) (all []op) {
	for _, k := range keys {
		all = append(all, of(k))
	}
	return all
}

func between(first, last uint64) (all []uint64) {
	for k := first; k <= last; k++ {
		all = append(all, k)
	}
	return all
}

func TestBorgRules(t *testing.T) {
	for _, c := range []struct {
		name string
		do   func(tree) tree
		want []string // each in the reasons; none: not suspect
		kind string
	}{
		{name: "nothing new but the archive list", do: func(t tree) tree { return t.commit(11, archives(2)) }},
		{name: "a usual backup", do: func(t tree) tree {
			return t.commit(11, append([]op{put(1000, 5000), put(1001, 100)}, archives(2))...)
		}},
		{name: "compaction drops half of the files and moves what lives", do: func(t tree) tree {
			var moved []op
			for s := range 5 {
				delete(t, fmt.Sprint("data/0/", s))
				for i := range 40 {
					if i%8 != 0 {
						moved = append(moved, put(uint64(s*40+i+1), 1000))
					}
				}
			}
			return t.commit(11, append(moved, archives(2))...)
		}},
		{name: "one archive of ten is deleted", do: func(t tree) tree {
			return t.commit(11, append(ops(del, between(1, 40)...), archives(2))...)
		}},
		{name: "a third of the chunks is deleted", do: func(t tree) tree {
			return t.commit(11, append(ops(del, between(1, 130)...), archives(2))...)
		}, want: []string{"130 of 400 chunks (32 %) that archives used are gone, 135 kB of 416 kB", "A usual prune takes less than 20 %"}},
		{name: "deleted and put again under the same names", do: func(t tree) tree {
			return t.commit(11, slices.Concat(ops(del, between(1, 130)...), ops(func(k uint64) op { return put(k, 1000) }, between(1, 130)...), []op{archives(2)})...)
		}},
		{name: "everything is deleted", do: func(t tree) tree {
			return t.commit(11, append(ops(del, between(1, 400)...), archives(2))...)
		}, want: []string{"400 of 400 chunks (100 %)"}},
		{name: "few chunks with most of the bytes", do: func(t tree) tree {
			var big []op
			for k := range uint64(20) {
				big = append(big, put(2000+k, 50_000))
			}
			t.commit(11, append(big, archives(2))...)
			return t
		}},
		{name: "the archive list is deleted", do: func(t tree) tree { return t.commit(11, del(0)) },
			want: []string{"The table of archives is gone"}},
		{name: "junk under the old names", do: func(t tree) tree {
			var junk []op
			for k := range uint64(300) {
				junk = append(junk, op{borgsegment.Put, k + 1, 1000, 77})
			}
			return t.commit(11, append(junk, archives(2))...)
		}, want: []string{"300 of 400 chunks (75 %) have other data under their old names, 312 kB of 416 kB"}},
		{name: "some go and some are replaced", do: func(t tree) tree {
			var junk []op
			for k := range uint64(40) {
				junk = append(junk, op{borgsegment.Put, k + 1, 1000, 77})
			}
			return t.commit(11, slices.Concat(junk, ops(del, between(101, 140)...), []op{archives(2)})...)
		}, want: []string{"40 of 400 chunks (10 %) that archives used", "40 of 400 chunks (10 %) have other data"}},
		{name: "recreate --recompress of a part", do: func(t tree) tree {
			var again []op
			for k := range uint64(60) {
				again = append(again, put(k+1, 800))
			}
			return t.commit(11, append(again, archives(2))...)
		}},
		{name: "segments are missing", do: func(t tree) tree {
			for _, s := range []int{2, 3, 4} {
				delete(t, fmt.Sprint("data/0/", s))
			}
			return t.commit(11, archives(2))
		}, want: []string{"120 of 400 chunks (30 %)"}},
		{name: "segments are emptied", do: func(t tree) tree {
			for _, s := range []int{2, 3, 4} {
				t[fmt.Sprint("data/0/", s)] = nil
			}
			return t.commit(11, archives(2))
		}, want: []string{"120 of 400 chunks (30 %)"}},
		{name: "segments are renamed", do: func(t tree) tree {
			for s := range 10 {
				from := fmt.Sprint("data/0/", s)
				t[from+".locked"] = t[from]
				delete(t, from)
			}
			return t
		}, want: []string{"400 of 400 chunks"}},
		{name: "one byte of a committed segment", do: func(t tree) tree {
			b := bytes.Clone(t["data/0/3"])
			b[500] ^= 1
			t["data/0/3"] = b
			return t.commit(11, archives(2))
		}, want: []string{"1 segment of 11 that were final have other bytes now (data/0/3)", "1 new file is no segment of borg's (data/0/3: at byte 8: the CRC"}},
		{name: "every segment encrypted", do: func(t tree) tree {
			for s := range 11 {
				b := bytes.Repeat([]byte{byte(s), 0xA7}, len(t[fmt.Sprint("data/0/", s)])/2)
				t[fmt.Sprint("data/0/", s)] = b
			}
			return t
		}, want: []string{"does not end as borg ends it", "11 segments of 11 that were final", "and 8 more", "11 new files are no segments", "400 of 400 chunks"}},
		{name: "a committed segment is another one, well formed", do: func(t tree) tree {
			t["data/0/3"] = segmentOf(ops(func(k uint64) op { return put(k, 999) }, between(121, 160)...)...)
			return t.commit(11, archives(2))
		}, want: []string{"1 segment of 11 that were final"}},
		{name: "a new segment is cut", do: func(t tree) tree {
			t["data/0/11"] = segmentOf(put(1000, 5000))[:3000]
			return t.commit(12, archives(2))
		}, want: []string{"1 new file is no segment of borg's (data/0/11: at byte 8"}},
		{name: "a new segment is junk", do: func(t tree) tree {
			t["data/0/11"] = bytes.Repeat([]byte("junk"), 1000)
			return t.commit(12, archives(2))
		}, want: []string{"data/0/11: at byte 0: does not begin with BORG_SEG"}},
		{name: "what follows the last commit does not count", do: func(t tree) tree {
			t.commit(11, archives(2))
			t["data/0/12"] = segmentOf(ops(del, between(1, 400)...)...)
			t["data/0/13"] = []byte("half a segme")
			return t
		}},
		{name: "a commit that has no index yet counts", do: func(t tree) tree {
			t["data/0/11"] = segmentOf(append(ops(del, between(1, 130)...), archives(2), commit)...)
			return t
		}, want: []string{"130 of 400 chunks"}},
		{name: "the last commit is gone", do: func(t tree) tree {
			delete(t, "data/0/10")
			return t
		}, want: []string{"there is an index.10, and no segment 10", "The table of archives is gone"}},
		{name: "no index and no commit", do: func(t tree) tree {
			delete(t, "data/0/10")
			delete(t, "index.10")
			return t
		}, want: []string{"to borg this repository is empty", "400 of 400 chunks"}},
		{name: "config is gone", do: func(t tree) tree {
			delete(t, "config")
			return t.commit(11, archives(2))
		}, want: []string{"The file config is gone"}},
		{name: "config is junk", do: func(t tree) tree {
			t["config"] = bytes.Repeat([]byte{0xEE}, 500)
			return t.commit(11, archives(2))
		}, want: []string{"config is not one of borg's"}},
		{name: "another id", do: func(t tree) tree {
			t["config"] = []byte("[repository]\nversion = 1\nid = " + strings.Repeat("ab", 32) + "\n")
			return t.commit(11, archives(2))
		}, want: []string{"another repository: its id is abababababababab"}},
		{name: "data/ is gone", do: func(t tree) tree {
			maps.DeleteFunc(t, func(path string, _ []byte) bool { return strings.HasPrefix(path, "data/") })
			return t
		}, want: []string{"data/ is gone or empty", "11"}},
		{name: "pushed as files", do: func(t tree) tree { return t }, kind: pushwire.KindFiles,
			want: []string{"was a Borg repository, and what was pushed is a plain folder"}},
		{name: "keys that all begin alike, and nothing else wrong", do: func(t tree) tree {
			b := []byte(borgsegment.Magic)
			for i := range 5000 {
				e := segmentOf(put(uint64(i+1), 0))[len(borgsegment.Magic):]
				copy(e[borgsegment.HeaderSize:], "the same")
				binary.LittleEndian.PutUint32(e, crc32.ChecksumIEEE(e[4:]))
				b = append(b, e...)
			}
			t["data/0/11"] = b
			return t.commit(12, archives(2))
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := newDisk(t, Config{})
			if v := d.push(borg(), pushwire.KindBorg1); v.Suspect {
				t.Fatalf("the first: %q", v.Reasons)
			}
			kind := c.kind
			if kind == "" {
				kind = pushwire.KindBorg1
			}
			v := d.push(c.do(borg()), kind)
			all := strings.Join(v.Reasons, "\n")
			if v.Suspect != (len(c.want) > 0) {
				t.Fatalf("suspect %v: %s", v.Suspect, all)
			}
			for _, want := range c.want {
				if !strings.Contains(all, want) {
					t.Errorf("%q is not in\n%s", want, all)
				}
			}
			for _, r := range v.Reasons {
				if len(r) > 300 {
					t.Errorf("%d bytes: %s", len(r), r)
				}
			}
			if v.Suspect && !strings.Contains(v.Reasons[len(v.Reasons)-1], d.current.Name) {
				t.Errorf("no advice: %s", all)
			}
		})
	}
}

// What the pusher says of the id is what the next push is compared with.
func TestOfferedID(t *testing.T) {
	for _, offered := range []string{"", strings.Repeat("cd", 32)} {
		d := newDisk(t, Config{})
		d.push(borg(), pushwire.KindBorg1)
		g, offer := d.write(borg().commit(11, archives(2)), pushwire.KindBorg1)
		offer.RepositoryID = offered
		v, err := d.judgeIt(t.Context(), g, offer, fmt.Sprint(d.n))
		if err != nil || !v.Suspect || !strings.Contains(v.Reasons[0], "The pusher says") {
			t.Errorf("%q: %+v %v", offered, v, err)
		}
	}
}

// A run that was killed leaves segments after the last commit, and the next one
// writes others under their numbers. The pusher never sends them; sftp may.
func TestUncommittedNumbersAreUsedAgain(t *testing.T) {
	d := newDisk(t, Config{})
	killed := borg()
	killed["data/0/11"] = segmentOf(ops(func(k uint64) op { return put(k, 100) }, between(500, 900)...)...)
	killed["data/0/12"] = segmentOf(put(950, 100))[:60]
	if v := d.push(killed, pushwire.KindBorg1); v.Suspect {
		t.Fatalf("%q", v.Reasons)
	}
	next := borg()
	next["data/0/11"] = segmentOf(put(1000, 100))
	next.commit(12, archives(2))
	if v := d.push(next, pushwire.KindBorg1); v.Suspect {
		t.Fatalf("%q", v.Reasons)
	}
	// Killed after the commit and before the index: that segment is final.
	late := next.clone()
	late["data/0/13"] = segmentOf(put(1001, 100), archives(3), commit)
	if v := d.push(late, pushwire.KindBorg1); v.Suspect {
		t.Fatalf("%q", v.Reasons)
	}
	other := next.clone()
	other.commit(13, put(1001, 100), archives(4))
	if v := d.push(other, pushwire.KindBorg1); !v.Suspect || !strings.Contains(v.Reasons[0], "data/0/13") {
		t.Fatalf("a committed segment was changed: %q", v.Reasons)
	}
}

// On a normal night only what is new is opened.
func TestOnlyNewSegmentsAreRead(t *testing.T) {
	d := newDisk(t, Config{})
	d.push(borg(), pushwire.KindBorg1)
	next := borg().commit(11, put(1000, 10), archives(2))
	if v := d.push(next, pushwire.KindBorg1); v.Suspect {
		t.Fatal(v.Reasons)
	}
	for _, path := range d.opened {
		if path != "config" && path != "data/0/11" {
			t.Errorf("opened %s", path)
		}
	}
	if len(d.opened) > 3 {
		t.Errorf("opened %q", d.opened)
	}
}

// The scratch folder may be lost or damaged at any time: the verdict is the same.
func TestScratchIsNoTruth(t *testing.T) {
	bad := borg().commit(11, append(ops(del, between(1, 130)...), archives(2))...)
	good := borg().commit(11, append(ops(del, between(1, 30)...), archives(2))...)
	random := rand.New(rand.NewPCG(3, 4))
	for i := range 40 {
		d := newDisk(t, Config{})
		d.push(borg(), pushwire.KindBorg1)
		pack := filepath.Join(d.dir, "scratch", packFile)
		b, err := os.ReadFile(pack)
		if err != nil || len(b) < 400*recordSize {
			t.Fatalf("%d bytes, %v", len(b), err)
		}
		switch i {
		case 0:
			err = os.Remove(pack)
		case 1:
			err = os.RemoveAll(filepath.Join(d.dir, "scratch"))
			if err == nil {
				err = os.Mkdir(filepath.Join(d.dir, "scratch"), 0o700)
			}
			d.scratch, _ = beneath.Open(filepath.Join(d.dir, "scratch"))
		case 2:
			err = os.WriteFile(pack, []byte("something else"), 0o600)
		case 3, 4, 5, 6:
			err = os.Truncate(pack, random.Int64N(int64(len(b))))
		default:
			b[random.IntN(len(b))] ^= 1 << random.IntN(8)
			err = os.WriteFile(pack, b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		if v := d.push(bad, pushwire.KindBorg1); !v.Suspect || !strings.Contains(v.Reasons[0], "130 of 400 chunks") {
			t.Errorf("damage %d: %q", i, v.Reasons)
		}
		if v := d.push(good, pushwire.KindBorg1); v.Suspect {
			t.Errorf("damage %d: %q", i, v.Reasons)
		}
	}
}

// Without the time to read what has no index, sizes must do, and later pushes go on.
func TestPatience(t *testing.T) {
	clock := time.Date(2026, 5, 1, 3, 0, 0, 0, time.UTC)
	d := newDisk(t, Config{Patience: 2500 * time.Millisecond, Now: func() time.Time {
		clock = clock.Add(time.Second)
		return clock
	}})
	d.push(borg(), pushwire.KindBorg1)
	if n := len(d.opened); n >= 11 {
		t.Errorf("%d files were opened", n)
	}
	bad := borg().commit(11, append(ops(del, between(271, 400)...), archives(2))...)
	small := borg().commit(11, archives(2))
	for s := range 6 {
		delete(small, fmt.Sprint("data/0/", s))
	}
	if v := d.push(small, pushwire.KindBorg1); !v.Suspect || !strings.Contains(v.Reasons[0], "shrank") {
		t.Errorf("%q", v.Reasons)
	}
	// What is known already is compared without the rest.
	if v := d.push(bad, pushwire.KindBorg1); !v.Suspect || strings.Contains(v.Reasons[0], "of 400 chunks") {
		t.Errorf("%q", v.Reasons)
	}
	for i := range 8 {
		if v := d.push(borg().commit(11, archives(byte(i+2))), pushwire.KindBorg1); v.Suspect && i == 0 {
			t.Errorf("%q", v.Reasons)
		}
	}
	if v := d.push(bad, pushwire.KindBorg1); !v.Suspect || !strings.Contains(strings.Join(v.Reasons, " "), "130 of 400 chunks") {
		t.Errorf("the index never became complete: %q", v.Reasons)
	}
}

// A tenth a day, each time with as much junk put in its place: as other chunks, or
// under the old names.
func TestSlowLoss(t *testing.T) {
	t.Run("deleted", func(t *testing.T) { slowLoss(t, false) })
	t.Run("replaced", func(t *testing.T) { slowLoss(t, true) })
}

func slowLoss(t *testing.T, replace bool) {
	d := newDisk(t, Config{})
	tr := borg()
	d.push(tr, pushwire.KindBorg1)
	caught := 0
	for day := 1; day <= 8 && caught == 0; day++ {
		first := uint64(day-1)*40 + 1
		var junk []op
		for k := range uint64(40) {
			junk = append(junk, put(uint64(day)*10_000+k, 1000))
		}
		gone := ops(del, between(first, first+39)...)
		if replace {
			junk, gone = nil, ops(func(k uint64) op { return op{borgsegment.Put, k, 1000, 77} }, between(first, first+39)...)
		}
		tr = tr.clone().commit(10+day, slices.Concat(gone, junk, []op{archives(byte(day + 1))})...)
		v := d.push(tr, pushwire.KindBorg1)
		if v.Suspect {
			caught = day
			if !strings.Contains(v.Reasons[0], "Of what archives used on 2 May, 40 % of the chunks") {
				t.Errorf("%q", v.Reasons)
			}
		}
	}
	if caught != 4 {
		t.Fatalf("caught on day %d", caught)
	}
	// A person accepts it: comparison starts there.
	g, _ := d.write(tr, pushwire.KindBorg1)
	g.Standing, d.current = generations.Accepted, g
	if v := d.push(tr.clone().commit(20, archives(99)), pushwire.KindBorg1); v.Suspect {
		t.Errorf("%q", v.Reasons)
	}
}

// What goes little by little as an ordinary prune takes it, for months.
func TestOrdinaryTurnover(t *testing.T) {
	d := newDisk(t, Config{})
	tr := borg()
	d.push(tr, pushwire.KindBorg1)
	for day := range uint64(60) {
		first := day*12 + 1
		if day >= 33 {
			first = 10_000 + (day-33)*12
		}
		var fresh []op
		for k := range uint64(12) {
			fresh = append(fresh, put(10_000+day*12+k, 1000))
		}
		tr = tr.clone().commit(int(11+day), slices.Concat(ops(del, between(first, first+11)...), fresh, []op{archives(byte(day + 2))})...)
		if v := d.push(tr, pushwire.KindBorg1); v.Suspect {
			t.Fatalf("day %d: %q", day, v.Reasons)
		}
	}
}

func TestSmallRepository(t *testing.T) {
	d := newDisk(t, Config{})
	tr := tree{"config": borg()["config"]}
	tr.commit(0, append(ops(func(k uint64) op { return put(k, 100) }, between(1, 30)...), archives(1))...)
	d.push(tr, pushwire.KindBorg1)
	half := tr.clone().commit(1, append(ops(del, between(1, 15)...), archives(2))...)
	if v := d.push(half, pushwire.KindBorg1); v.Suspect {
		t.Errorf("a second archive: %q", v.Reasons)
	}
	if v := d.push(half.clone().commit(2, append(ops(del, between(16, 30)...), archives(3))...), pushwire.KindBorg1); !v.Suspect {
		t.Error("everything went unseen")
	}
}

func TestLimits(t *testing.T) {
	for _, c := range []struct {
		vanish  int
		deleted uint64
		want    bool
	}{{20, 79, false}, {20, 80, true}, {50, 199, false}, {50, 200, true}, {100, 399, false}, {100, 400, true}, {5, 20, true}} {
		d := newDisk(t, Config{Limits: func(string) (int, int) { return c.vanish, 50 }})
		d.push(borg(), pushwire.KindBorg1)
		v := d.push(borg().commit(11, append(ops(del, between(1, c.deleted)...), archives(2))...), pushwire.KindBorg1)
		if v.Suspect != c.want {
			t.Errorf("%d %%, %d of 400: %v %q", c.vanish, c.deleted, v.Suspect, v.Reasons)
		}
	}
}

// Neither the index nor the time grows with what somebody makes up.
func TestTooManyEntries(t *testing.T) {
	d := newDisk(t, Config{})
	d.judge.most = 600
	d.push(borg(), pushwire.KindBorg1)
	size := func() int64 {
		info, err := os.Stat(filepath.Join(d.dir, "scratch", packFile))
		if err != nil {
			t.Fatal(err)
		}
		return info.Size()
	}
	before := size()
	flood := borg().commit(11, append(ops(del, between(1, 130)...), archives(2))...)
	flood["data/0/12"] = segmentOf(ops(del, between(10_000, 12_000)...)...)
	flood.commit(13, archives(3))
	if v, err := d.try(t.Context(), flood, pushwire.KindBorg1); !errors.Is(err, errTooMany) {
		t.Errorf("%+v %v", v, err)
	}
	if after := size(); after != before {
		t.Errorf("the index has grown from %d to %d bytes", before, after)
	}
	many := borg()
	many["data/0/12"] = segmentOf(ops(del, between(10_000, 10_500)...)...)
	many.commit(13, archives(3))
	v := d.push(many, pushwire.KindBorg1)
	if !v.Suspect || !strings.Contains(v.Reasons[0], "903 entries now, up from 401") {
		t.Errorf("%q", v.Reasons)
	}
	// Accepted, it is how this repository is; sizes are still compared.
	g, _ := d.write(many, pushwire.KindBorg1)
	g.Standing, d.current = generations.Accepted, g
	if v := d.push(many.clone().commit(14, archives(4)), pushwire.KindBorg1); v.Suspect {
		t.Errorf("%q", v.Reasons)
	}
	for s := range 8 {
		delete(many, fmt.Sprint("data/0/", s))
	}
	if v := d.push(many.commit(15, archives(5)), pushwire.KindBorg1); !v.Suspect || !strings.Contains(v.Reasons[0], "shrank") {
		t.Errorf("%q", v.Reasons)
	}
}

func TestCancelled(t *testing.T) {
	d := newDisk(t, Config{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := d.try(ctx, borg(), pushwire.KindBorg1); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	d.judge.turn <- struct{}{} // another judgement is under way
	ctx, cancel = context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, err := d.try(ctx, borg(), pushwire.KindBorg1); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
}

// A file that cannot be read is an error, which package generations takes for
// suspicion.
func TestUnreadable(t *testing.T) {
	d := newDisk(t, Config{})
	d.push(borg(), pushwire.KindBorg1)
	tr := borg().commit(11, archives(2))
	g, offer := d.write(tr, pushwire.KindBorg1)
	delete(d.files, fmt.Sprint(d.n)+"/data/0/11")
	if v, err := d.judgeIt(t.Context(), g, offer, fmt.Sprint(d.n)); err == nil {
		t.Errorf("%+v", v)
	}
}
