package generations_test

import (
	"bytes"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"farkeep/shared/generations"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"
	"farkeep/shared/recipe"

	"golang.org/x/sys/unix"
)

// tree is a repository in memory: path to content; a nil content is a folder.
type tree map[string]file

type file struct {
	folder  bool
	mode    uint32
	mtime   int64
	content string
}

// add puts a file into the tree, with its folders.
func (t tree) add(path, content string) tree {
	t[path] = file{mode: 0o600, mtime: 1_600_000_000_123456789, content: content}
	for dir := filepath.Dir(path); dir != "."; dir = filepath.Dir(dir) {
		if _, ok := t[dir]; !ok {
			t[dir] = file{folder: true, mode: 0o700}
		}
	}
	return t
}

func (t tree) entries() []manifest.Entry {
	var list []manifest.Entry
	for path, f := range t {
		e := manifest.Entry{Path: path, Kind: manifest.Folder, Mode: f.mode, MTime: f.mtime}
		if !f.folder {
			h := manifest.NewHash()
			io.WriteString(h, f.content)
			e.Kind, e.Size, e.Sum = manifest.File, int64(len(f.content)), manifest.SumOf(h)
		}
		list = append(list, e)
	}
	slices.SortFunc(list, func(a, b manifest.Entry) int { return manifest.ComparePaths(a.Path, b.Path) })
	return list
}

func (t tree) manifest(tb testing.TB) ([]byte, pushwire.Offer) {
	tb.Helper()
	var b bytes.Buffer
	w := manifest.NewWriter(&b)
	for _, e := range t.entries() {
		if err := w.Add(e); err != nil {
			tb.Fatal(err)
		}
	}
	s, err := w.Close()
	if err != nil {
		tb.Fatal(err)
	}
	return b.Bytes(), pushwire.Offer{Digest: s.Digest.String(), Entries: s.Entries, Bytes: s.Bytes, Kind: pushwire.KindFiles}
}

// write sends the whole recipe of what answer asks for.
func (t tree) write(w io.Writer, answer generations.Answer) error {
	list := t.entries()
	have := map[int64]int64{}
	for _, p := range answer.Resume {
		have[p.Index] = p.Have
	}
	e := recipe.NewEncoder(w)
	for i := range answer.Needed.All() {
		content := t[list[i].Path].content
		if err := e.File(i); err != nil {
			return err
		}
		if n := have[i]; n > 0 {
			if err := e.Keep(n); err != nil {
				return err
			}
			content = content[n:]
		}
		if _, err := io.WriteString(e, content); err != nil {
			return err
		}
		if err := e.End(list[i].Sum); err != nil {
			return err
		}
	}
	return e.Close()
}

// begin offers the tree, with the manifest if it is wanted. The transaction is nil
// when there is nothing to do.
func begin(tb testing.TB, s *generations.Store, repository string, t tree) (generations.Answer, *generations.Transaction, error) {
	tb.Helper()
	list, offer := t.manifest(tb)
	answer, tx, err := s.Begin(tb.Context(), generations.Request{Repository: repository, Offer: offer, Pusher: "home"})
	if err == nil && answer.Answer == pushwire.AnswerSendManifest {
		if answer, err = tx.TakeManifest(tb.Context(), bytes.NewReader(list)); err != nil {
			tx.Close()
			tx = nil
		}
	}
	return answer, tx, err
}

// push pushes the tree as a pusher would, and returns the generation's name and
// what was uploaded.
func push(tb testing.TB, s *generations.Store, repository string, t tree) (string, pushwire.UploadAnswer) {
	tb.Helper()
	answer, tx, err := begin(tb, s, repository, t)
	if err != nil {
		tb.Fatal(err)
	}
	if tx == nil {
		return answer.Generation, pushwire.UploadAnswer{}
	}
	defer tx.Close()
	got, err := tx.Upload(tb.Context(), func(w io.Writer) error { return t.write(w, answer) })
	if err != nil {
		tb.Fatal(err)
	}
	name, err := tx.Commit(tb.Context())
	if err != nil {
		tb.Fatal(err)
	}
	return name, got
}

func open(tb testing.TB, dir string, opt generations.Options) *generations.Store {
	tb.Helper()
	if opt.Reserve == 0 {
		opt.Reserve = 1
	}
	s, err := generations.Open(dir, opt)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { s.Close() })
	return s
}

// compare checks a generation from outside: the files are the tree's, byte for
// byte, and b2sum agrees with SUMS.b2.
func compare(tb testing.TB, dir, repository, name string, want tree) {
	tb.Helper()
	base := filepath.Join(dir, generations.GenerationsFolder, repository, name)
	got := tree{}
	root := filepath.Join(base, generations.FilesFolder)
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == root {
			return err
		}
		rel, _ := filepath.Rel(root, path)
		f := file{folder: d.IsDir()}
		if !f.folder {
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			f.content = string(data)
		}
		got[rel] = f
		return nil
	})
	if err != nil {
		tb.Fatal(err)
	}
	for path, f := range want {
		if g, ok := got[path]; !ok || g.folder != f.folder || g.content != f.content {
			tb.Errorf("%s/%s: %q is not as it was pushed (there: %v)", repository, name, path, ok)
		}
		delete(got, path)
	}
	for path := range got {
		tb.Errorf("%s/%s: %q was never pushed", repository, name, path)
	}
	files := 0
	for _, f := range want {
		if !f.folder {
			files++
		}
	}
	sums, err := os.ReadFile(filepath.Join(base, generations.SumsFile))
	if err != nil || bytes.Count(sums, []byte("\n")) != files {
		tb.Errorf("%s/%s: %s has %d lines, %v; want one for each of %d files", repository, name, generations.SumsFile, bytes.Count(sums, []byte("\n")), err, files)
	}
	if files == 0 {
		return // b2sum calls an empty list an error
	}
	cmd := exec.Command("b2sum", "-l", "256", "--strict", "--quiet", "-c", generations.SumsFile)
	cmd.Dir = base
	if out, err := cmd.CombinedOutput(); err != nil {
		tb.Errorf("b2sum (package coreutils) in %s: %v\n%s", base, err, out)
	}
}

// noise is incompressible and repeatable.
func noise(seed uint64, n int) string {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16)})
	r.Read(b)
	return string(b)
}

func names(list []generations.Generation) string {
	var s []string
	for _, g := range list {
		s = append(s, g.Name)
	}
	return strings.Join(s, " ")
}

func inodeOf(tb testing.TB, path string) uint64 {
	tb.Helper()
	info, err := os.Lstat(path)
	if err != nil {
		tb.Fatal(err)
	}
	return info.Sys().(*syscall.Stat_t).Ino
}

// clone copies a tree, so that a later day can differ from an earlier one.
func (t tree) clone() tree { return maps.Clone(t) }

// tmpfs mounts a file system of so many bytes.
func tmpfs(tb testing.TB, size string) string {
	tb.Helper()
	if os.Getuid() != 0 {
		tb.Fatal("this test mounts a tmpfs: run it as root")
	}
	dir := tb.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		tb.Fatal("mount a tmpfs: ", err)
	}
	tb.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

// upload sends the recipe up to so many bytes of it; a negative limit sends all.
func upload(tb testing.TB, tx *generations.Transaction, t tree, answer generations.Answer, limit int) (pushwire.UploadAnswer, error) {
	tb.Helper()
	var b bytes.Buffer
	if err := t.write(&b, answer); err != nil {
		tb.Fatal(err)
	}
	data := b.Bytes()
	if limit >= 0 {
		data = data[:min(limit, len(data))]
	}
	return tx.Receive(tb.Context(), bytes.NewReader(data))
}
