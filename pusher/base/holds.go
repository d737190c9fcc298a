package base

import (
	"errors"
	"io"
	"io/fs"
	"os"

	"farkeep/shared/manifest"
)

// Holds returns those of the paths in now that target's newest generation has with
// another content than now says, as far as KeepManifest kept its manifest: the files that can be had back
// from there.
func (m *Memory) Holds(target, repository string, now map[string]manifest.Sum) (paths []string, err error) {
	in, err := os.Open(m.manifest(target, repository))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer in.Close()
	r := manifest.NewReader(in)
	for {
		e, err := r.Next()
		if errors.Is(err, io.EOF) {
			return paths, nil
		}
		if err != nil {
			return nil, err
		}
		if sum, ok := now[e.Path]; ok && e.Kind == manifest.File && e.Sum != sum {
			paths = append(paths, e.Path)
		}
	}
}
