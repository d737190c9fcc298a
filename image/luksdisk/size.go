package luksdisk

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"farkeep/image/diskuse"
	"farkeep/shared/retention"
	"farkeep/shared/site"
)

// Wanted is how large a disk the repositories want, with the history that the
// site keeps of each: package diskuse says by how much.
type Wanted struct {
	Repositories int64    // bytes, as they are now
	Disk         int64    // bytes
	Unseen       []string // repositories that are not on this machine, or cannot be read
	UnseenFactor float64  // how many times the size of those to add, at most
}

// Measure adds up the site's repositories, as far as they are on this machine.
func Measure(s *site.Site) (Wanted, error) {
	w := Wanted{}
	f := factors{}
	count := func(repository, path, called string) error {
		factor, err := f.of(s.History.For(repository))
		if err != nil {
			return err
		}
		n, err := treeSize(path)
		if err != nil {
			w.Unseen = append(w.Unseen, called)
			w.UnseenFactor = max(w.UnseenFactor, factor)
		}
		w.Repositories += n
		w.Disk += int64(float64(n) * factor)
		return nil
	}
	for _, r := range s.Repositories {
		if err := count(r.Name, r.Path, r.Name); err != nil {
			return Wanted{}, err
		}
	}
	for _, folder := range s.Folders {
		entries, err := os.ReadDir(folder.Path)
		if err != nil {
			// Counted as one that is not here; its repositories' names are not known.
			if err := count(folder.Prefix, folder.Path, folder.Path); err != nil {
				return Wanted{}, err
			}
		}
		for _, e := range entries {
			path := filepath.Join(folder.Path, e.Name())
			if !e.IsDir() || slices.Contains(folder.Exclude, e.Name()) {
				continue
			}
			if err := count(folder.Prefix+e.Name(), path, path); err != nil {
				return Wanted{}, err
			}
		}
	}
	return w, nil
}

// For is how large a disk repositories of that many bytes together want, with the
// history that the site keeps of a repository without one of its own.
func For(s *site.Site, repositories int64) (Wanted, error) {
	h := s.History
	h.Repositories = nil
	factor, err := factors{}.of(h.For(""))
	if err != nil {
		return Wanted{}, err
	}
	return Wanted{Repositories: repositories, Disk: int64(float64(repositories) * factor)}, nil
}

// factors remembers what was estimated: most repositories have the same rules.
type factors map[retention.Rules]float64

func (f factors) of(rules retention.Rules) (float64, error) {
	if known, ok := f[rules]; ok {
		return known, nil
	}
	e, err := diskuse.For(rules)
	if err != nil {
		return 0, fmt.Errorf("estimate how much disk the history takes: %w", err)
	}
	f[rules] = e.Factor()
	return f[rules], nil
}

// treeSize is what the files below path take on a disk, each once.
func treeSize(path string) (int64, error) {
	var total int64
	seen := map[[2]uint64]bool{}
	var lost error
	err := filepath.WalkDir(path, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			lost = errors.Join(lost, err)
			if d == nil {
				return err
			}
			return nil
		}
		info, err := d.Info()
		if err != nil || !info.Mode().IsRegular() {
			return nil
		}
		if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Nlink > 1 {
			id := [2]uint64{uint64(st.Dev), st.Ino}
			if seen[id] {
				return nil
			}
			seen[id] = true
		}
		total += info.Size()
		return nil
	})
	return total, errors.Join(err, lost)
}

// ParseSize reads a number of bytes with a unit, powers of ten: "500G", "2T".
func ParseSize(s string) (int64, error) {
	units := map[byte]float64{'k': 1e3, 'K': 1e3, 'M': 1e6, 'G': 1e9, 'T': 1e12}
	text := strings.TrimSuffix(strings.TrimSpace(s), "B")
	scale := 1.0
	if text != "" {
		if u, ok := units[text[len(text)-1]]; ok {
			scale, text = u, strings.TrimSpace(text[:len(text)-1])
		}
	}
	v, err := strconv.ParseFloat(text, 64)
	if err != nil || !(v >= 0) || v*scale > 1e18 {
		return 0, fmt.Errorf("%q is not a size: write for instance 500G or 2T", s)
	}
	return int64(v * scale), nil
}

// Advise says how large a disk is wanted, and whether this one is.
func (w Wanted) Advise(out io.Writer, disk int64) {
	if w.Repositories > 0 {
		fmt.Fprintf(out, "The repositories hold %s now; with the history that [history] keeps of them, and a year's growth, they want a disk of %s (%.1f times as much).\n",
			Size(w.Repositories), Size(w.Disk), float64(w.Disk)/float64(w.Repositories))
		if disk < w.Disk {
			fmt.Fprintf(out, "This one has %s: it will fill up sooner. docs/retention.md says which rules take less.\n", Size(disk))
		}
	}
	if len(w.Unseen) > 0 {
		fmt.Fprintf(out, "Not counted, because they are not on this machine: %s. Take %.1f times their size, or give it with --size-for.\n", strings.Join(w.Unseen, ", "), w.UnseenFactor)
	}
}
