package demo

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"slices"

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
		if err := os.WriteFile(filepath.Join(b.source, fileName(prefix, i)), data, 0o600); err != nil {
			return err
		}
	}
	return nil
}

func fileName(prefix string, i int) string { return fmt.Sprintf("%s-%03d", prefix, i) }

func (b *borg) create(ctx context.Context, archive string) error {
	return b.run(ctx, "create", b.path+"::"+archive, b.source)
}

// at is the same repository in another place, for a Borg that never saw it: one
// that remembered a newer state would call the copy an attack.
func (b *borg) at(path string) *borg {
	other := *b
	other.path = path
	other.env = append(slices.Clone(b.env), "BORG_BASE_DIR="+path+".borg-home")
	return &other
}

// verify is Borg's own full check.
func (b *borg) verify(ctx context.Context) error {
	// Generations are read-only, and Borg wants to lock what it reads.
	if _, err := b.stage.Run(ctx, "chmod", "-R", "u+rwX", b.path); err != nil {
		return err
	}
	return b.run(ctx, "check", "--verify-data", b.path)
}
