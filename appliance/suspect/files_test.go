package suspect

import (
	"fmt"
	"strings"
	"testing"

	"farkeep/shared/pushwire"
)

// album is 200 files of 1000 bytes in 10 folders, and a film of 300,000.
func album() tree {
	t := tree{"film": []byte(strings.Repeat("f", 300_000))}
	for i := range 200 {
		t[fmt.Sprintf("album-%d/%03d", i%10, i)] = []byte(strings.Repeat(fmt.Sprintf("%04d", i), 250))
	}
	return t
}

func TestFilesRules(t *testing.T) {
	for _, c := range []struct {
		name string
		do   func(tree)
		want []string
	}{
		{name: "some are new", do: func(t tree) { t["new"] = []byte("x") }},
		{name: "a folder goes", do: func(t tree) {
			for i := 3; i < 200; i += 10 {
				delete(t, fmt.Sprintf("album-3/%03d", i))
			}
		}},
		{name: "half goes", do: func(t tree) {
			for i := range 100 {
				delete(t, fmt.Sprintf("album-%d/%03d", i%10, i))
			}
		}, want: []string{"100 of 201 files (50 %) are gone, with 100 kB of 500 kB (20 %); less than 20 % is usual here. Among them: album-0/000, album-0/010, album-0/020 and 97 more."}},
		{name: "all are renamed", do: func(t tree) {
			for path, content := range album() {
				delete(t, path)
				t["sorted/"+path] = content
			}
		}},
		{name: "all are renamed and encrypted", do: func(t tree) {
			for path, content := range album() {
				delete(t, path)
				t[path+".locked"] = append([]byte("?"), content...)
			}
		}, want: []string{"201 of 201 files (100 %) are gone"}},
		{name: "some change", do: func(t tree) {
			for i := range 80 {
				t[fmt.Sprintf("album-%d/%03d", i%10, i)] = []byte("edited")
			}
		}},
		{name: "encrypted in place", do: func(t tree) {
			for path, content := range album() {
				t[path] = []byte("?" + string(content[1:]))
			}
		}, want: []string{"201 of 201 files (100 %) have other content, 500 kB of 500 kB"}},
		{name: "nothing is left", do: func(t tree) { clear(t) }, want: []string{"Nothing is left: all 201 files"}},
		{name: "files become folders", do: func(t tree) {
			for path := range album() {
				delete(t, path)
				t[path+"/inside"] = []byte("x")
			}
		}, want: []string{"201 of 201 files (100 %) are gone"}},
		{name: "a large file goes, and is small as files go", do: func(t tree) { delete(t, "film") }},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := newDisk(t, Config{})
			d.push(album(), pushwire.KindFiles)
			tr := album()
			c.do(tr)
			v := d.push(tr, pushwire.KindFiles)
			all := strings.Join(v.Reasons, "\n")
			if v.Suspect != (len(c.want) > 0) {
				t.Fatalf("suspect %v: %s", v.Suspect, all)
			}
			for _, want := range c.want {
				if !strings.Contains(all, want) {
					t.Errorf("%q is not in\n%s", want, all)
				}
			}
		})
	}
}

// A tenth a day.
func TestFilesSlowLoss(t *testing.T) {
	for _, c := range []struct {
		name string
		do   func(tree, string)
		day  int
		want string
	}{
		{"removed", func(t tree, path string) { delete(t, path) }, 4, "Of the files of 2 May, 40 % are gone by now"},
		{"encrypted in place", func(t tree, path string) { t[path] = []byte("?" + string(t[path][1:])) }, 8, "Of the files of 2 May, 80 % have other content by now"},
		{"moved", func(t tree, path string) { t["attic/"+path] = t[path]; delete(t, path) }, 0, ""},
	} {
		d := newDisk(t, Config{})
		tr := album()
		delete(tr, "film")
		d.push(tr, pushwire.KindFiles)
		caught := 0
		for day := 1; day <= 8 && caught == 0; day++ {
			tr = tr.clone()
			for i := range 20 {
				i = i*10 + day - 1
				c.do(tr, fmt.Sprintf("album-%d/%03d", i%10, i))
			}
			if v := d.push(tr, pushwire.KindFiles); v.Suspect {
				caught = day
				if !strings.Contains(strings.Join(v.Reasons, "\n"), c.want) {
					t.Errorf("%s: %q", c.name, v.Reasons)
				}
			}
		}
		if caught != c.day {
			t.Errorf("%s: caught on day %d, not %d", c.name, caught, c.day)
		}
	}
}

func TestWords(t *testing.T) {
	for n, want := range map[int64]string{0: "0", 999: "999", 1000: "1,000", 1234567: "1,234,567", -1000: "-1,000"} {
		if got := count(n); got != want {
			t.Errorf("%d: %s", n, got)
		}
	}
	for n, want := range map[int64]string{0: "0 bytes", 999: "999 bytes", 1000: "1.0 kB", 9949: "9.9 kB", 999_400: "999 kB", 999_600: "1.0 MB", 4 << 40: "4.4 TB"} {
		if got := size(n); got != want {
			t.Errorf("%d: %s", n, got)
		}
	}
	for _, c := range []struct {
		part, whole int64
		want        string
	}{{0, 0, "0 %"}, {0, 5, "0 %"}, {1, 1000, "under 1 %"}, {999, 1000, "over 99 %"}, {1000, 1000, "100 %"}, {1, 3, "33 %"}} {
		if got := percent(c.part, c.whole); got != c.want {
			t.Errorf("%d of %d: %s", c.part, c.whole, got)
		}
	}
}
