package torture

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"farkeep/image/torture/witness"
)

// home is where the pushes come from: real Borg repositories with a real life,
// a folder of plain files, and one that a stock sftp client uploads.
type home struct {
	dir      string
	r        *rand.Rand
	archives int
	days     int
}

const (
	borgName  = "notes"
	plainName = "files"
	stockName = "stock" // kept by a stock sftp client, which the pusher knows nothing of
)

func newHome(ctx context.Context, dir string, r *rand.Rand) (*home, error) {
	h := &home{dir: dir, r: r}
	for _, name := range []string{"source", plainName, stockName} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o700); err != nil {
			return nil, err
		}
	}
	if err := h.borg(ctx, "init", "--encryption=repokey-blake2", h.path(borgName)); err != nil {
		return nil, err
	}
	for range 6 {
		if err := h.write("source", 60_000); err != nil {
			return nil, err
		}
	}
	if err := h.plain(); err != nil {
		return nil, err
	}
	return h, h.day(ctx)
}

func (h *home) path(name string) string { return filepath.Join(h.dir, name) }

// repositories are what the pusher is told of: name and path.
func (h *home) repositories() [][2]string {
	return [][2]string{{borgName, h.path(borgName)}, {plainName, h.path(plainName)}}
}

func (h *home) borg(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, "borg", args...)
	cmd.Env = append(os.Environ(), "BORG_BASE_DIR="+filepath.Join(h.dir, "borg-home"), "BORG_PASSPHRASE=not a secret in a torture", "BORG_RELOCATED_REPO_ACCESS_IS_OK=yes")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("borg %s (Debian package borgbackup): %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}

// write puts one file of up to most random bytes in place of one of a dozen.
func (h *home) write(folder string, most int) error {
	data := make([]byte, 1+h.r.IntN(most))
	for i := range data {
		data[i] = byte(h.r.Uint32())
	}
	return os.WriteFile(filepath.Join(h.dir, folder, fmt.Sprintf("file-%02d", h.r.IntN(12))), data, 0o600)
}

// plain changes the plain files a little. It takes no time, so that there is
// always something to push.
func (h *home) plain() error {
	for range 1 + h.r.IntN(3) {
		if err := h.write(plainName, 40_000); err != nil {
			return err
		}
	}
	if h.r.IntN(20) == 0 { // one that takes a while
		data := make([]byte, 3<<20)
		for i := range data {
			data[i] = byte(h.r.Uint32())
		}
		return os.WriteFile(filepath.Join(h.dir, plainName, "large"), data, 0o600)
	}
	return nil
}

// day is a day of a Borg user: change, create, and now and then prune and
// compact.
func (h *home) day(ctx context.Context) error {
	for range 1 + h.r.IntN(4) {
		if err := h.write("source", 120_000); err != nil {
			return err
		}
	}
	h.archives++
	if err := h.borg(ctx, "create", fmt.Sprintf("%s::day-%05d", h.path(borgName), h.archives), h.path("source")); err != nil {
		return err
	}
	if h.days++; h.days%6 != 0 {
		return nil
	}
	if err := h.borg(ctx, "prune", "--keep-last=3", h.path(borgName)); err != nil {
		return err
	}
	return h.borg(ctx, "compact", h.path(borgName))
}

// sums are the contents of what a push of name must have brought: every regular
// file by its path, but for those that Borg makes for itself and the pusher
// leaves out.
func (h *home) sums(name string) (map[string][sha256.Size]byte, error) {
	all := map[string][sha256.Size]byte{}
	root := h.path(name)
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		text, err := os.ReadFile(path)
		all[rel] = sha256.Sum256(text)
		return err
	})
	return all, err
}

// arrived says whether the newest generation of name holds what home holds.
// Borg's own bookkeeping beside the segments may differ; segments, config and
// README may not, and what a generation has home has too.
func (h *home) arrived(ctx context.Context, generations, name string) error {
	want, err := h.sums(name)
	if err != nil {
		return err
	}
	names, err := witness.List(generations)
	if err != nil {
		return err
	}
	var newest witness.ID
	for _, id := range names {
		if id.Repository() == name {
			newest = id
		}
	}
	if newest == "" {
		return fmt.Errorf("there is no generation of %s", name)
	}
	g, err := witness.Read(ctx, filepath.Join(generations, string(newest), "files"))
	if err != nil {
		return err
	}
	if err := same(name, want, g); err != nil {
		return fmt.Errorf("%s is not what was pushed: %w", newest, err)
	}
	return nil
}

// same compares what was pushed with what lies in a generation's files/.
func same(name string, want map[string][sha256.Size]byte, g witness.Generation) error {
	for path, sum := range want {
		essential := name != borgName || path == "config" || path == "README" || strings.HasPrefix(path, "data/")
		if e, ok := g[path]; essential && (!ok || e.Sum != sum) {
			return fmt.Errorf("%s is not what it was at home", path)
		}
	}
	for path, e := range g {
		if _, ok := want[path]; e.Mode.IsRegular() && !ok {
			return fmt.Errorf("%s is there, and home has no such file", path)
		}
	}
	return nil
}

// keepPushing runs push until it succeeds or ctx ends.
func keepPushing(ctx context.Context, push func(context.Context) error) (failures int, err error) {
	var last []error
	for {
		err := push(ctx)
		if err == nil {
			return failures, nil
		}
		if last = append(last, err); len(last) > 3 {
			last = slices.Delete(last, 0, 1)
		}
		failures++
		select {
		case <-ctx.Done():
			return failures, fmt.Errorf("no push went through: %w; the last of %d: %w", context.Cause(ctx), failures, errors.Join(last...))
		case <-time.After(50 * time.Millisecond):
		}
	}
}
