// Package generationstest fills stores of generations for the tests of what reads
// them.
package generationstest

import (
	"bytes"
	"io"
	"math/rand/v2"
	"path"
	"slices"
	"testing"

	"farkeep/shared/generations"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"
	"farkeep/shared/recipe"
)

// Tree is a repository in memory: content by path. Folders are made as they are
// needed; a path that ends in .x is a file that can be executed.
type Tree map[string]string

// Noise is incompressible and repeatable.
func Noise(seed uint64, n int) string {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16)}).Read(b)
	return string(b)
}

func (t Tree) entries() (list []manifest.Entry) {
	folders := map[string]bool{}
	for name, content := range t {
		for dir := path.Dir(name); dir != "." && !folders[dir]; dir = path.Dir(dir) {
			folders[dir] = true
			list = append(list, manifest.Entry{Path: dir, Kind: manifest.Folder, Mode: 0o700})
		}
		h := manifest.NewHash()
		io.WriteString(h, content)
		mode := uint32(0o600)
		if path.Ext(name) == ".x" {
			mode = 0o700
		}
		list = append(list, manifest.Entry{Path: name, Kind: manifest.File, Mode: mode, Size: int64(len(content)), Sum: manifest.SumOf(h)})
	}
	slices.SortFunc(list, func(a, b manifest.Entry) int { return manifest.ComparePaths(a.Path, b.Path) })
	return list
}

// Push makes a generation of t, and returns its name.
func Push(tb testing.TB, s *generations.Store, repository string, t Tree) string {
	tb.Helper()
	var text bytes.Buffer
	w := manifest.NewWriter(&text)
	list := t.entries()
	for _, e := range list {
		if err := w.Add(e); err != nil {
			tb.Fatal(err)
		}
	}
	sum, err := w.Close()
	if err != nil {
		tb.Fatal(err)
	}
	offer := pushwire.Offer{Digest: sum.Digest.String(), Entries: sum.Entries, Bytes: sum.Bytes, Kind: pushwire.KindFiles}
	answer, tx, err := s.Begin(tb.Context(), generations.Request{Repository: repository, Offer: offer, Pusher: "home"})
	if err != nil || tx == nil {
		tb.Fatal(answer, err)
	}
	defer tx.Close()
	if answer.Needed == nil {
		if answer, err = tx.TakeManifest(tb.Context(), &text); err != nil {
			tb.Fatal(err)
		}
	}
	_, err = tx.Upload(tb.Context(), func(w io.Writer) error {
		e := recipe.NewEncoder(w)
		for i := range answer.Needed.All() {
			if err := e.File(i); err != nil {
				return err
			}
			if _, err := io.WriteString(e, t[list[i].Path]); err != nil {
				return err
			}
			if err := e.End(list[i].Sum); err != nil {
				return err
			}
		}
		return e.Close()
	})
	if err != nil {
		tb.Fatal(err)
	}
	name, err := tx.Commit(tb.Context())
	if err != nil {
		tb.Fatal(err)
	}
	return name
}
