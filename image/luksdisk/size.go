package luksdisk

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"farkeep/shared/site"
)

// Factor is how many times the repositories' size a disk should hold. One time
// is the newest generation. The rest is history: what changed since, and what
// Borg's compaction moved, which lies on the disk once more as long as the
// generations before it live; over a year of daily pushes and monthly ones kept,
// both together come to about as much again. A fifth is room to grow, and for
// the worst day.
const Factor = 2.2

// Wanted is how large a disk the repositories want.
type Wanted struct {
	Repositories int64    // bytes, as they are now
	Disk         int64    // bytes, Factor times that
	Unseen       []string // repositories that are not on this machine, or cannot be read
}

// Measure adds up the site's repositories, as far as they are on this machine.
func Measure(s *site.Site) Wanted {
	var w Wanted
	count := func(name, path string) {
		n, err := treeSize(path)
		if err != nil {
			w.Unseen = append(w.Unseen, name)
		}
		w.Repositories += n
	}
	for _, r := range s.Repositories {
		count(r.Name, r.Path)
	}
	for _, f := range s.Folders {
		count(f.Path, f.Path)
	}
	w.Disk = For(w.Repositories)
	return w
}

// For is how large a disk repositories of that many bytes want.
func For(repositories int64) int64 { return int64(float64(repositories) * Factor) }

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
		fmt.Fprintf(out, "The repositories hold %s now; with history and room to grow they want a disk of %s (%.1f times as much).\n", Size(w.Repositories), Size(w.Disk), Factor)
		if disk < w.Disk {
			fmt.Fprintf(out, "This one has %s: it will keep less history, and fill up sooner.\n", Size(disk))
		}
	}
	if len(w.Unseen) > 0 {
		fmt.Fprintf(out, "Not counted, because they are not on this machine: %s. Take %.1f times their size, or give it with --size-for.\n", strings.Join(w.Unseen, ", "), Factor)
	}
}
