package suspect

import (
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"farkeep/shared/beneath"
	"farkeep/shared/contentname"
	"farkeep/shared/generations"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"
)

// BenchmarkNamed judges a night of a restic repository of so many packs, of which
// 64 of 4 MiB are new; all that it reads of the others is their names.
func BenchmarkNamed(b *testing.B) {
	for _, packs := range []int{1000, 250_000} {
		b.Run(fmt.Sprint(packs), func(b *testing.B) { benchmarkNamed(b, packs) })
	}
}

func benchmarkNamed(b *testing.B, packs int) {
	const added, packSize = 64, 4 << 20
	dir := b.TempDir()
	content := make([]byte, packSize)
	fresh := map[string]string{}
	var all []manifest.Entry
	add := func(path string, size int64, sum [32]byte) {
		all = append(all, manifest.Entry{Path: path, Kind: manifest.File, Mode: 0o400, Size: size, Sum: manifest.Sum(sum)})
	}
	for i := range packs + added {
		binary.LittleEndian.PutUint64(content, uint64(i))
		id := sha256.Sum256(content[:8])
		if i >= packs {
			id = sha256.Sum256(content)
			path := filepath.Join(dir, fmt.Sprint(i))
			if err := os.WriteFile(path, content, 0o600); err != nil {
				b.Fatal(err)
			}
			fresh[contentname.Restic.Path(contentname.Pack, id)] = path
		}
		add(contentname.Restic.Path(contentname.Pack, id), packSize, id)
	}
	for i := range 256 {
		all = append(all, manifest.Entry{Path: fmt.Sprintf("data/%02x", i), Kind: manifest.Folder, Mode: 0o700})
	}
	for _, folder := range []string{"data", "index", "keys", "snapshots"} {
		all = append(all, manifest.Entry{Path: folder, Kind: manifest.Folder, Mode: 0o700})
	}
	add("config", 155, sha256.Sum256(nil))
	add(contentname.Restic.Path(contentname.Key, sha256.Sum256([]byte("key"))), 3, sha256.Sum256(nil))
	fresh["config"] = filepath.Join(dir, "old")
	slices.SortFunc(all, func(a, b manifest.Entry) int { return manifest.ComparePaths(a.Path, b.Path) })
	var sums manifest.Summary
	for _, name := range []string{"old", "new"} {
		f, err := os.Create(filepath.Join(dir, name))
		if err != nil {
			b.Fatal(err)
		}
		buffered := bufio.NewWriter(f)
		w := manifest.NewWriter(buffered)
		for _, e := range all {
			if name == "old" && fresh[e.Path] != "" && e.Path != "config" {
				continue
			}
			if err := w.Add(e); err != nil {
				b.Fatal(err)
			}
		}
		if sums, err = w.Close(); err != nil {
			b.Fatal(err)
		}
		if err := buffered.Flush(); err != nil {
			b.Fatal(err)
		}
		f.Close()
	}
	list := func(name string) func() (*manifest.Reader, io.Closer, error) {
		return func() (*manifest.Reader, io.Closer, error) {
			f, err := os.Open(filepath.Join(dir, name))
			if err != nil {
				return nil, nil, err
			}
			return manifest.NewReader(f), f, nil
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "scratch"), 0o700); err != nil {
		b.Fatal(err)
	}
	scratch, err := beneath.Open(filepath.Join(dir, "scratch"))
	if err != nil {
		b.Fatal(err)
	}
	defer scratch.Close()
	now := time.Date(2026, 5, 1, 3, 0, 0, 0, time.UTC)
	c := &generations.Candidate{
		Repository: "photos", Pusher: "home", Scratch: scratch,
		Offer:   pushwire.Offer{Digest: sums.Digest.String(), Entries: sums.Entries, Bytes: sums.Bytes, Kind: pushwire.KindFiles},
		Current: &generations.Generation{Name: generations.Name(1, now), Kind: pushwire.KindFiles, Committed: now, Standing: generations.Good},
		New:     list("new"), Old: list("old"),
		Open: func(path string) (*os.File, error) { return os.Open(fresh[path]) },
	}
	j := New(Config{}, nil)
	b.SetBytes(added * packSize)
	b.ReportAllocs()
	for b.Loop() {
		v, err := j.Judge(b.Context(), c)
		if err != nil || v.Suspect {
			b.Fatalf("%v %q", err, v.Reasons)
		}
	}
}
