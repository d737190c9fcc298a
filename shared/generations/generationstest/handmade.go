package generationstest

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"farkeep/shared/generations"
	"farkeep/shared/manifest"

	"golang.org/x/sys/unix"
)

// HandMade writes generations of photos as a store would, without the pushes: files of so
// many bytes in folders of 500, all of them shared by all generations.
func HandMade(b testing.TB, dir string, count, files, size int) {
	b.Helper()
	if err := os.MkdirAll(dir, 0o711); err != nil {
		b.Fatal(err)
	}
	s, err := generations.Open(dir, generations.Options{Reserve: 1})
	if err != nil {
		b.Fatal(err)
	}
	s.Close()
	content := make([]byte, size)
	home := filepath.Join(dir, generations.GenerationsFolder, "photos")
	for g := range count {
		name := generations.Name(int64(g+1), time.Date(2026, 1, 1, 0, g, 0, 0, time.UTC))
		base := filepath.Join(home, name)
		if err := os.MkdirAll(filepath.Join(base, "files"), 0o755); err != nil {
			b.Fatal(err)
		}
		list, err := os.Create(filepath.Join(base, generations.ManifestFile))
		if err != nil {
			b.Fatal(err)
		}
		sums, err := os.Create(filepath.Join(base, generations.SumsFile))
		if err != nil {
			b.Fatal(err)
		}
		m := manifest.NewWriter(list)
		var line, all []byte
		for i := range files {
			folder := fmt.Sprintf("%06d", i/500)
			if i%500 == 0 {
				if err := os.Mkdir(filepath.Join(base, "files", folder), 0o755); err != nil {
					b.Fatal(err)
				}
				if err := m.Add(manifest.Entry{Path: folder, Kind: manifest.Folder, Mode: 0o755}); err != nil {
					b.Fatal(err)
				}
			}
			path := fmt.Sprintf("%s/%08d", folder, i)
			clear(content)
			copy(content, strconv.Itoa(i)+" ")
			h := manifest.NewHash()
			h.Write(content)
			e := manifest.Entry{Path: path, Kind: manifest.File, Mode: 0o644, Size: int64(size), Sum: manifest.SumOf(h)}
			if err := m.Add(e); err != nil {
				b.Fatal(err)
			}
			line = generations.AppendSum(line[:0], &e)
			all = append(all, line...)
			at := filepath.Join(base, "files", path)
			if g == 0 {
				err = os.WriteFile(at, content, 0o444)
			} else {
				err = os.Link(filepath.Join(home, generations.Name(1, time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)), "files", path), at)
			}
			if err != nil {
				b.Fatal(err)
			}
		}
		sum, err := m.Close()
		if err != nil {
			b.Fatal(err)
		}
		if _, err := sums.Write(all); err != nil {
			b.Fatal(err)
		}
		list.Close()
		sums.Close()
		toml := fmt.Sprintf("format = 1\nrepository = 'photos'\nsequence = %d\ncommitted = 2026-01-01T00:00:00Z\nclock_set = true\npusher = 'home'\nkind = 'files'\ndigest = '%v'\nentries = %d\nfiles = %d\nbytes = %d\nnew_files = 0\nnew_bytes = 0\noverhead_bytes = 0\npush = 'photos/x'\nsuspect = false\n",
			g+1, sum.Digest, sum.Entries, files, sum.Bytes)
		if err := os.WriteFile(filepath.Join(base, generations.TOMLFile), []byte(toml), 0o444); err != nil {
			b.Fatal(err)
		}
	}
	unix.Sync()
}
