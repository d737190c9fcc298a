package demo

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"

	"farkeep/image/stage"
)

// borg is one real Borg repository with a source folder of real data.
type borg struct {
	stage  *stage.Stage
	path   string
	source string
	env    []string
}

func newBorg(ctx context.Context, s *stage.Stage, dir, name string) (*borg, error) {
	b := &borg{stage: s, path: filepath.Join(dir, "borg", name), source: filepath.Join(dir, "source", name)}
	b.env = []string{
		"BORG_BASE_DIR=" + filepath.Join(dir, "borg-home"),
		"BORG_PASSPHRASE=not a secret in a demonstration",
		"BORG_RELOCATED_REPO_ACCESS_IS_OK=yes",
	}
	for _, folder := range []string{filepath.Dir(b.path), b.source} {
		if err := os.MkdirAll(folder, 0o700); err != nil {
			return nil, err
		}
	}
	return b, b.run(ctx, "init", "--encryption=repokey-blake2", b.path)
}

func (b *borg) run(ctx context.Context, args ...string) error {
	_, err := b.stage.RunWith(ctx, b.env, "borg", args...)
	return err
}

// write puts files of random bytes, which no compression shrinks, into the source.
func (b *borg) write(prefix string, files, size int) error {
	data := make([]byte, size)
	for i := range files {
		rand.Read(data)
		if err := os.WriteFile(filepath.Join(b.source, fmt.Sprintf("%s-%03d", prefix, i)), data, 0o600); err != nil {
			return err
		}
	}
	return nil
}

func (b *borg) create(ctx context.Context, archive string) error {
	return b.run(ctx, "create", b.path+"::"+archive, b.source)
}

// at is the same repository in another place.
func (b *borg) at(path string) *borg {
	other := *b
	other.path = path
	return &other
}
