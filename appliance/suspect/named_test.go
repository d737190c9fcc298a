package suspect

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"farkeep/shared/contentname"
	"farkeep/shared/pushwire"

	"lukechampine.com/blake3"
)

// keep writes a content under the name that it has by the layout.
func (t tree) keep(layout contentname.Layout, role contentname.Role, content string) string {
	id := contentname.ID(sha256.Sum256([]byte(content)))
	path := layout.Path(role, id)
	t[path] = []byte(content)
	return path
}

// pack is the content of a pack of a thousand bytes.
func pack1000(i int) string { return strings.Repeat(fmt.Sprintf("%04d", i), 250) }

// resticTree is a repository of n packs and ten snapshots, in its form.
func resticTree(n int) tree {
	t := tree{"config": []byte("encrypted"), "data/": nil, "index/": nil, "snapshots/": nil, "locks/": nil}
	t.keep(contentname.Restic, contentname.Key, `{"kdf":"scrypt"}`)
	for i := range n {
		t.keep(contentname.Restic, contentname.Pack, pack1000(i))
	}
	for i := range 10 {
		t.keep(contentname.Restic, contentname.Snapshot, fmt.Sprint("snapshot ", i))
		t.keep(contentname.Restic, contentname.Index, fmt.Sprint("index ", i))
	}
	return t
}

func borg2Tree(n int) tree {
	t := tree{
		"config/readme": []byte("This is a Borg Backup repository."), "config/id": []byte(repositoryID), "config/version": []byte("4"),
		"config/manifest": []byte("0"), "packs/": nil, "archives/": nil, "locks/": nil, "cache/": nil,
	}
	for i := range n {
		// One of the older kind among them, as if a repository could hold both.
		sum := blake3.Sum256([]byte(pack1000(i)))
		if i == 0 {
			sum = sha256.Sum256([]byte(pack1000(i)))
		}
		t[contentname.Borg2.Path(contentname.Pack, sum)] = []byte(pack1000(i))
	}
	for i := range 10 {
		sum := sha256.Sum256([]byte(fmt.Sprint("a MAC ", i)))
		t["archives/"+hex.EncodeToString(sum[:])] = []byte("an archive")
	}
	return t
}

// read are the files that the judge read, without those at which it looks to see what
// the repository may be.
func (d *disk) read() []string {
	return slices.DeleteFunc(slices.Sorted(slices.Values(d.opened)), func(path string) bool { return strings.HasPrefix(path, "config") })
}

// paths are those of a role, in order.
func (t tree) paths(layout contentname.Layout, role contentname.Role) []string {
	var all []string
	for path := range t {
		if _, r, _ := layout.Claim(path); r == role && !strings.HasSuffix(path, "/") {
			all = append(all, path)
		}
	}
	slices.Sort(all)
	return all
}

func TestNamedRules(t *testing.T) {
	restic, borg2 := contentname.Restic, contentname.Borg2
	drop := func(layout contentname.Layout, role contentname.Role, n int) func(tree) {
		return func(t tree) {
			for _, path := range t.paths(layout, role)[:n] {
				delete(t, path)
			}
		}
	}
	for _, c := range []struct {
		name   string
		layout contentname.Layout
		do     func(tree)
		want   []string // all of them, but for the advice
	}{
		{name: "a backup", do: func(t tree) {
			for i := range 30 {
				t.keep(restic, contentname.Pack, pack1000(1000+i))
			}
			t.keep(restic, contentname.Index, "new")
			t.keep(restic, contentname.Snapshot, "new")
		}},
		{name: "a prune writes the whole index anew, and puts small packs together", do: func(t tree) {
			drop(restic, contentname.Index, 10)(t)
			drop(restic, contentname.Pack, 19)(t)
			drop(restic, contentname.Snapshot, 9)(t)
			t.keep(restic, contentname.Index, "all")
			t.keep(restic, contentname.Pack, strings.Repeat("all", 10_000))
		}},
		{name: "a new passphrase", do: func(t tree) {
			drop(restic, contentname.Key, 1)(t)
			t.keep(restic, contentname.Key, `{"kdf":"scrypt","salt":"other"}`)
		}},
		{name: "a lock, and what belongs to nobody", do: func(t tree) {
			t["locks/"+strings.Repeat("ab", 32)] = []byte("lock")
			t["data/notes"] = []byte("hm")
		}},
		{name: "one bit of a new pack", do: func(t tree) {
			path := t.keep(restic, contentname.Pack, pack1000(500))
			t[path][77] ^= 4
		}, want: []string{"1 of 1 new files are not what their names say (data/"}},
		{name: "new packs are encrypted", do: func(t tree) {
			for i := range 40 {
				path := t.keep(restic, contentname.Pack, pack1000(1000+i))
				if i%4 == 0 {
					t[path] = []byte("?" + string(t[path]))
				}
			}
		}, want: []string{"10 of 40 new files are not what their names say (data/"}},
		{name: "one old pack has other bytes", do: func(t tree) {
			t[t.paths(restic, contentname.Pack)[5]] = []byte("x")
		}, want: []string{"1 file, named by what is in them, have other content than before (such as data/"}},
		{name: "all are encrypted where they lie", do: func(t tree) {
			for path := range t {
				if !strings.HasSuffix(path, "/") {
					t[path] = append([]byte("?"), t[path]...)
				}
			}
		}, want: []string{"121 files, named by what is in them, have other content than before", "Changed or gone: config. This is another repository"}},
		{name: "all are encrypted and renamed", do: func(t tree) {
			for path, content := range maps.Clone(t) {
				if !strings.HasSuffix(path, "/") {
					delete(t, path)
					t[path+".locked"] = append([]byte("?"), content...)
				}
			}
		}, want: []string{"Until now this was a restic repository, and what was pushed is a plain folder of files.", "122 of 122 files (100 %) are gone"}},
		{name: "a fifth of the packs goes", do: drop(restic, contentname.Pack, 20),
			want: []string{"20 of 100 packs are gone, 20 kB of 100 kB of backups (20 %); less than 20 % is usual here"}},
		{name: "less of them goes", do: drop(restic, contentname.Pack, 19)},
		{name: "all packs go", do: drop(restic, contentname.Pack, 100), want: []string{"100 of 100 packs are gone"}},
		{name: "all snapshots go", do: drop(restic, contentname.Snapshot, 10), want: []string{"Not one snapshot is left, of 10."}},
		{name: "all snapshots are others", do: func(t tree) {
			drop(restic, contentname.Snapshot, 10)(t)
			t.keep(restic, contentname.Snapshot, "mine")
		}, want: []string{"Of the 10 snapshots of the generation before not one is left."}},
		{name: "no key is left", do: drop(restic, contentname.Key, 1), want: []string{"Until now this was a restic repository"}},
		{name: "another config", do: func(t tree) { t["config"] = []byte("?") }, want: []string{"Changed or gone: config."}},
		{name: "nothing is left", do: func(t tree) { clear(t) }, want: []string{"Until now this was a restic repository", "Nothing is left: all 122 files"}},
		{name: "another program's", do: func(t tree) { clear(t); maps.Copy(t, borg2Tree(100)) }, want: []string{"Until now this was a restic repository, and what was pushed is a Borg 2 repository."}},

		{name: "Borg 2, a backup", layout: borg2, do: func(t tree) {
			sum := blake3.Sum256([]byte("new"))
			t[borg2.Path(contentname.Pack, sum)] = []byte("new")
			t["config/manifest"] = []byte("1")
			t["archives/"+hex.EncodeToString(sum[:])] = []byte("a MAC is its name")
		}},
		{name: "Borg 2, one bit of a new pack", layout: borg2, do: func(t tree) {
			sum := blake3.Sum256([]byte("new"))
			t[borg2.Path(contentname.Pack, sum)] = []byte("neW")
		}, want: []string{"1 of 1 new files are not what their names say (packs/"}},
		{name: "Borg 2, one old pack has other bytes", layout: borg2, do: func(t tree) {
			t[t.paths(borg2, contentname.Pack)[5]] = []byte("x")
		}, want: []string{"Borg never changes a file"}},
		{name: "Borg 2, all archives go", layout: borg2, do: drop(borg2, contentname.Snapshot, 10), want: []string{"Not one archive is left, of 10."}},
		{name: "Borg 2, another id", layout: borg2, do: func(t tree) { t["config/id"] = []byte(strings.Repeat("ab", 32)) }, want: []string{"Changed or gone: config/id."}},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := newDisk(t, Config{})
			make := resticTree
			if c.layout == borg2 {
				make = borg2Tree
			}
			if v := d.push(make(100), pushwire.KindFiles); v.Suspect {
				t.Fatalf("the first is suspect: %q", v.Reasons)
			}
			tr := make(100)
			for path, content := range tr {
				tr[path] = slices.Clone(content)
			}
			c.do(tr)
			v := d.push(tr, pushwire.KindFiles)
			if v.Suspect != (len(c.want) > 0) {
				t.Fatalf("suspect %v: %q", v.Suspect, v.Reasons)
			}
			for _, want := range c.want {
				if !slices.ContainsFunc(v.Reasons, func(r string) bool { return strings.HasPrefix(r, want) || strings.Contains(r, want) }) {
					t.Errorf("%q is not among %q", want, v.Reasons)
				}
			}
			for _, r := range v.Reasons {
				if len(r) > 300 {
					t.Errorf("%d bytes are more than a mail takes: %s", len(r), r)
				}
			}
		})
	}
}

// What is not right from the first day on is said on the first day.
func TestNamedFirst(t *testing.T) {
	d := newDisk(t, Config{})
	tr := resticTree(10)
	tr[tr.paths(contentname.Restic, contentname.Pack)[3]] = []byte("torn")
	if v := d.push(tr, pushwire.KindFiles); !v.Suspect || !strings.Contains(v.Reasons[0], "1 of 31 new files are not what their names say") {
		t.Errorf("%q", v.Reasons)
	}
	// A folder becomes a repository.
	d = newDisk(t, Config{})
	d.push(tree{"notes": []byte("x")}, pushwire.KindFiles)
	tr["notes"] = []byte("x")
	if v := d.push(tr, pushwire.KindFiles); !v.Suspect || !strings.Contains(v.Reasons[0], "1 of 31 new files") {
		t.Errorf("%q", v.Reasons)
	}
}

// What is old is not read again, what is new once; and a pack that was rotten until
// now and has come right is no reason.
func TestNamedReads(t *testing.T) {
	d := newDisk(t, Config{})
	tr := resticTree(100)
	rotten := tr.paths(contentname.Restic, contentname.Pack)[3]
	good := tr[rotten]
	tr[rotten] = []byte("torn")
	if v := d.push(tr, pushwire.KindFiles); !v.Suspect || len(d.read()) != 121 {
		t.Fatalf("suspect %v, %d files were read", v.Suspect, len(d.read()))
	}
	// Somebody accepts it, and it becomes the norm.
	g, _ := d.write(tr, pushwire.KindFiles)
	d.current = g
	tr = maps.Clone(tr)
	tr[rotten] = good
	added := tr.keep(contentname.Restic, contentname.Pack, "one more")
	if v := d.push(tr, pushwire.KindFiles); v.Suspect {
		t.Errorf("%q", v.Reasons)
	}
	if want := []string{added, rotten}; !slices.Equal(d.read(), slices.Sorted(slices.Values(want))) {
		t.Errorf("read were %q", d.read())
	}
	if v := d.push(tr, pushwire.KindFiles); v.Suspect || len(d.read()) != 0 {
		t.Errorf("suspect %v, %d files were read", v.Suspect, len(d.read()))
	}
}

// Patience ends, and what is read until then is a choice that nobody can foresee.
func TestNamedPatience(t *testing.T) {
	now := time.Date(2026, 5, 1, 3, 0, 0, 0, time.UTC)
	d := newDisk(t, Config{Patience: time.Minute, Now: func() time.Time {
		now = now.Add(time.Second)
		return now
	}})
	first := map[string]bool{}
	for i := range 3 {
		d.current = nil
		if v := d.push(resticTree(500), pushwire.KindFiles); v.Suspect {
			t.Fatalf("%q", v.Reasons)
		}
		if n := len(d.read()); n < 20 || n > 60 {
			t.Fatalf("%d of 521 files were read", n)
		}
		// Those that everything hangs on are always read.
		var few int
		for _, path := range d.opened {
			if strings.HasPrefix(path, "keys/") || strings.HasPrefix(path, "snapshots/") {
				few++
			}
		}
		if few != 11 {
			t.Errorf("%d of 11 keys and snapshots were read", few)
		}
		last := d.opened[len(d.opened)-1]
		if first[last] && i == 2 && len(first) == 1 {
			t.Errorf("the same choice, three times: %s", last)
		}
		first[last] = true
	}
	tr := resticTree(500)
	for _, path := range tr.paths(contentname.Restic, contentname.Pack) {
		tr[path] = []byte("?")
	}
	d.current = nil
	if v := d.push(tr, pushwire.KindFiles); !v.Suspect || !strings.Contains(v.Reasons[0], "that were read, of 521, new files are not what") {
		t.Errorf("%q", v.Reasons)
	}

	// One file without end does not hold it up for ever.
	tr = resticTree(0)
	path := tr.keep(contentname.Restic, contentname.Pack, "short")
	tr[path] = make([]byte, 20<<20)
	d.current = nil
	if v := d.push(tr, pushwire.KindFiles); v.Suspect {
		t.Errorf("%q", v.Reasons)
	}
	// But what was there, and is another now, needs no reading.
	tr = tr.clone()
	tr[path] = make([]byte, 21<<20)
	if v := d.push(tr, pushwire.KindFiles); !v.Suspect || !strings.Contains(v.Reasons[0], "1 file, named by what is in them") {
		t.Errorf("%q", v.Reasons)
	}
}

func TestNamedEnds(t *testing.T) {
	d := newDisk(t, Config{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := d.try(ctx, resticTree(10), pushwire.KindFiles); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	// Small steps, each below the limit: over a week they are not small.
	d = newDisk(t, Config{})
	d.push(resticTree(200), pushwire.KindFiles)
	for day := 1; ; day++ {
		if day > 8 {
			t.Fatal("a repository was eaten up in steps")
		}
		tr := resticTree(200)
		for i := range day * 30 {
			delete(tr, tr.paths(contentname.Restic, contentname.Pack)[0])
			tr.keep(contentname.Restic, contentname.Pack, pack1000(5000+i))
		}
		if v := d.push(tr, pushwire.KindFiles); v.Suspect {
			if day < 3 || !strings.Contains(v.Reasons[0], "Of the packs of 2 May") {
				t.Errorf("day %d: %q", day, v.Reasons)
			}
			return
		}
	}
}
