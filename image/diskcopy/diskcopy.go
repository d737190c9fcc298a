// Package diskcopy copies a whole store of generations, with the links between
// them, from one mounted disk to another: to a larger disk, or off a dying one.
//
// What is copied is what the store promises to keep: every generation bit for
// bit, with modes, owners, times and shared inodes, the repositories' counters,
// heartbeats and the keeper's records. Uploads under way, staging copies and
// generations that were being removed are not. Each file is compared with the
// hash that was taken at its source while it is read, and read back from the new
// disk. A generation gets its name when it is complete and durable; a copy that
// was cut goes on in the middle of the generation where it stopped.
//
// Links are found without a list of inodes: a file that is the same inode as the
// one of the same name in the generation before is linked to the copy of that
// one, and a second name inside a generation is recognised by its content. So
// memory does not grow with the disk.
//
// A copy stops at the first file that cannot be copied. With [Options.Salvage] it
// goes on: what cannot be read, or is not what it should be, is left out and
// named, and taken from any other copy of the same content on the disk. A generation
// of which no list can be read comes over as the disk shows it, and that is told;
// so is a folder that hides whole generations.
//
// Nobody else may use either disk meanwhile. It leaves mounting to its caller.
package diskcopy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"farkeep/shared/beneath"
	"farkeep/shared/generations"
	"farkeep/shared/hint"
	"farkeep/shared/tomlfile"

	"github.com/pelletier/go-toml/v2"
	"golang.org/x/sys/unix"
)

// Options say how to copy.
type Options struct {
	// Salvage goes on past what cannot be copied.
	Salvage bool
	// Trust leaves out the reading back of what was written.
	Trust bool
	// Lost is called for everything that is left out, in a salvage; it may be nil.
	Lost func(Loss)
	// Progress is called now and then; it may be nil.
	Progress func(Progress)
	// Reader is what files of the old disk are read through; nil means the file
	// itself. It is the edge at which tests put a disk that fails.
	Reader func(*os.File) io.Reader
	// Pace is how often what was copied is made durable, and Progress told; 0
	// means ten seconds.
	Pace time.Duration
	Log  *slog.Logger // nil discards
}

// Loss is something that the new disk does not have as it should.
type Loss struct {
	Repository, Generation string // "" if it is about all of them
	Path                   string // below files/, or the name of a list or folder; "" for a repository
	What                   string

	file bool // and no list or folder
}

// Progress is how far a copy has come.
type Progress struct {
	Repository, Generation string
	Generations, Of        int // complete on the new disk, of so many on the old one
	Files, Links           int64
	Bytes                  int64 // read
	Total                  int64 // estimate of what this run reads; 0: not known
	Lost                   int64
}

// Report is how a copy ended.
type Report struct {
	Progress
	Skipped int   // generations that were there from an earlier run
	Found   int64 // files that were taken from another copy
}

const (
	// workFolder is where a generation is put together on the new disk.
	workFolder   = ".copying"
	stageFolder  = "generation"
	progressFile = "progress.toml"
	linkName     = "link"
	batchBytes   = 256 << 20
	batchFiles   = 4096
)

// mark is progress.toml: what of the generation in work is durable.
type mark struct {
	Repository string `toml:"repository"`
	Generation string `toml:"generation"`
	Items      int64  `toml:"items"`
}

type copier struct {
	Options
	ctx      context.Context
	from, to *beneath.Dir
	src, dst *generations.Store
	work     *beneath.Dir
	report   Report
	buf      []byte
	said     time.Time
	why      map[string]string // of losses of this run, by repository/generation/path; bounded
	lists    int64             // of the losses, those that are no files
	rot      []generations.Rot // what the new disk lacks; bounded
	counts   bool              // the old file system counts a folder's folders in its links
	seen     map[string][]generations.Generation
}

// Copy copies the store in the folder from to the folder to, the top of a file
// system of its own. An error that is not about a single file ends it, and it can
// be called again. In a salvage Report.Lost says what is missing in the end.
func Copy(ctx context.Context, from, to string, o Options) (*Report, error) {
	c := &copier{Options: o, ctx: ctx, buf: make([]byte, 1<<20), why: map[string]string{}, seen: map[string][]generations.Generation{}}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Reader == nil {
		c.Reader = func(f *os.File) io.Reader { return f }
	}
	if c.Pace == 0 {
		c.Pace = 10 * time.Second
	}
	err := c.open(from, to)
	if err == nil {
		err = c.run()
	}
	err = errors.Join(err, c.close())
	if errors.Is(err, unix.EPERM) && os.Geteuid() != 0 {
		err = hint.Because(err, "run it as root: it gives files to the users that own them on the old disk")
	}
	if err != nil {
		return &c.report, fmt.Errorf("copy %s to %s: %w", from, to, err)
	}
	return &c.report, nil
}

func (c *copier) open(from, to string) (err error) {
	if err := checkFolders(from, to); err != nil {
		return err
	}
	if c.from, err = beneath.Open(from); err != nil {
		return err
	}
	if c.to, err = beneath.Open(to); err != nil {
		return err
	}
	if err := c.to.Lock(); err != nil {
		return err
	}
	if c.src, err = generations.Open(from, generations.Options{ReadOnly: true, Log: c.Log}); err != nil {
		return hint.Because(err, "name the folder that holds generations/, README.txt and so on: the top of the old disk")
	}
	var system unix.Statfs_t
	c.counts = unix.Statfs(from, &system) == nil && system.Type == unix.EXT4_SUPER_MAGIC
	st, err := c.from.Stat(generations.GenerationsFolder)
	if err != nil {
		return err
	}
	// Before anything else: it says that what lies here is a copy that was cut.
	if c.work, _, err = c.to.MakeDir(workFolder, 0o700); err != nil {
		return err
	}
	if err := c.to.Sync(); err != nil {
		return err
	}
	// What is made new belongs to the keeper, as what is copied does.
	owner := &generations.Owner{UID: int(st.Uid), GID: int(st.Gid)}
	c.dst, err = generations.Open(to, generations.Options{Owner: owner, Shared: st.Mode&0o005 != 0, Log: c.Log})
	return err
}

// checkFolders refuses what can only be a mistake.
func checkFolders(from, to string) error {
	var a, b unix.Stat_t
	if err := unix.Stat(from, &a); err != nil {
		return &fs.PathError{Op: "stat", Path: from, Err: err}
	}
	if err := unix.Stat(to, &b); err != nil {
		return &fs.PathError{Op: "stat", Path: to, Err: err}
	}
	if a.Dev == b.Dev && a.Ino == b.Ino {
		return hint.Exit(hint.ExitUsage, fmt.Errorf("both are the same folder"))
	}
	one, err := filepath.EvalSymlinks(from)
	if err != nil {
		return err
	}
	other, err := filepath.EvalSymlinks(to)
	if err != nil {
		return err
	}
	one, other = filepath.Clean(one)+"/", filepath.Clean(other)+"/"
	if strings.HasPrefix(one, other) || strings.HasPrefix(other, one) {
		return hint.Exit(hint.ExitUsage, fmt.Errorf("one lies in the other"))
	}
	entries, err := os.ReadDir(to)
	if err != nil {
		return err
	}
	ours := map[string]bool{
		generations.GenerationsFolder: true, generations.IncomingFolder: true, generations.HeartbeatFolder: true,
		generations.PrivateFolder: true, generations.ReadmeFile: true, workFolder: true, "lost+found": true,
	}
	begun := false
	for _, e := range entries {
		// A cut while the store was made leaves the beginning of a file.
		half := strings.TrimSuffix(strings.TrimPrefix(e.Name(), "."), ".new")
		if !ours[e.Name()] && half != generations.ReadmeFile {
			err := fmt.Errorf("%s is not empty: it holds %s", to, e.Name())
			return hint.Exit(hint.ExitUsage, hint.Because(err, "copy to the top of a disk that is new, or that an earlier run began"))
		}
		begun = begun || e.Name() == workFolder
	}
	if _, err := os.Stat(filepath.Join(to, generations.GenerationsFolder)); err == nil && !begun {
		err := fmt.Errorf("%s holds a store already, and no copy that was cut", to)
		return hint.Exit(hint.ExitUsage, hint.Because(err, "two stores are not merged: copy to an empty disk"))
	}
	return nil
}

func (c *copier) close() error {
	var err error
	if c.src != nil {
		err = c.src.Close()
	}
	if c.dst != nil {
		err = errors.Join(err, c.dst.Close())
	}
	return errors.Join(err, c.work.Close(), c.from.Close(), c.to.Close())
}

func (c *copier) run() error {
	repositories, err := c.src.Repositories()
	if err == nil {
		err = c.hidden("")
	}
	if err != nil {
		if err := c.lose(err, Loss{Path: generations.GenerationsFolder}); err != nil {
			return err
		}
	}
	if err := c.estimate(repositories); err != nil {
		return err
	}
	for _, r := range repositories {
		if err := c.repository(r); err != nil {
			return fmt.Errorf("%s: %w", r, err)
		}
	}
	if c.Salvage {
		if err := c.mend(repositories); err != nil {
			return err
		}
	}
	if err := c.rest(); err != nil {
		return err
	}
	if err := c.to.SyncFS(); err != nil {
		return err
	}
	// Without the folder it is a store like any other, and no copy goes on here.
	if err := c.to.RemoveAll(workFolder); err != nil {
		return err
	}
	return c.to.Sync()
}

// estimate counts generations, and what there is to read.
func (c *copier) estimate(repositories []string) error {
	for _, r := range repositories {
		list, err := c.list(r)
		if err != nil {
			return fmt.Errorf("%s: %w", r, err)
		}
		c.report.Of += len(list)
		for i, g := range list {
			if c.has(r, g.Name) {
				continue
			}
			// The oldest holds what was shared with those that expired.
			if i == 0 {
				c.report.Total += g.Bytes
			} else {
				c.report.Total += g.NewBytes
			}
		}
	}
	return nil
}

// list returns the generations of a repository, as far as its folder can be read,
// and tells once if that is not to its end.
func (c *copier) list(repository string) ([]generations.Generation, error) {
	if list, ok := c.seen[repository]; ok {
		return list, nil
	}
	list, err := c.src.List(c.ctx, repository)
	if err == nil {
		err = c.hidden(repository)
	}
	if err != nil {
		err = fmt.Errorf("its folder cannot be read to its end, and shows %d generations: %s", len(list), text(err))
		if err := c.lose(err, Loss{Repository: repository}); err != nil {
			return nil, err
		}
	}
	c.seen[repository] = list
	return list, nil
}

// hidden is an error if a repository's folder, or with "" the one of all of them,
// has folders that do not show. ext4 passes over a damaged block of a folder without
// a word where it can, but an inode's links count the folders in it (up to 64998,
// then there is 1).
func (c *copier) hidden(repository string) error {
	dir, err := c.from.Dir(strings.TrimSuffix(generations.GenerationsFolder+"/"+repository, "/"))
	if err != nil {
		return err
	}
	defer dir.Close()
	st, err := dir.StatSelf()
	if err != nil || !c.counts || st.Nlink < 2 {
		return err
	}
	missing := int64(st.Nlink) - 2
	if err := dir.Each(func(e fs.DirEntry) error {
		if e.IsDir() {
			missing--
		}
		return nil
	}); err != nil {
		return err
	}
	if missing > 0 {
		return fmt.Errorf("%d folders in it do not show", missing)
	}
	return nil
}

// has says whether the new disk has a generation.
func (c *copier) has(repository, generation string) bool {
	dir, err := c.dst.OpenGeneration(repository, generation)
	if err != nil {
		return false
	}
	dir.Close()
	return true
}

func (c *copier) repository(name string) error {
	list, err := c.list(name)
	if err != nil {
		return err
	}
	from, err := c.from.Dir(generations.GenerationsFolder + "/" + name)
	if err != nil {
		if c.Salvage && len(list) == 0 {
			return nil // it was told that the folder cannot be read
		}
		return err
	}
	defer from.Close()
	all, err := c.to.Dir(generations.GenerationsFolder)
	if err != nil {
		return err
	}
	defer all.Close()
	to, _, err := all.MakeDir(name, 0o755)
	if err != nil {
		return err
	}
	defer to.Close()
	parent, err := c.from.Dir(generations.GenerationsFolder)
	if err != nil {
		return err
	}
	defer parent.Close()
	if err := c.like(parent, all, name); err != nil {
		return err
	}
	before := ""
	for i := range list {
		g := &list[i]
		if c.ctx.Err() != nil {
			return c.ctx.Err()
		}
		if c.has(name, g.Name) {
			c.report.Skipped++
		} else if err := c.generation(to, name, g, before); err != nil {
			return fmt.Errorf("generation %s: %w", g.Name, err)
		}
		c.report.Generations++
		before = g.Name
	}
	return c.counter(from, to, name, list)
}

// counter copies the last number that a repository used: numbers of generations are
// never used twice.
func (c *copier) counter(from, to *beneath.Dir, repository string, list []generations.Generation) error {
	const counter = ".sequence"
	if _, err := from.Stat(counter); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	data, err := c.readSmall(from, counter)
	if err == nil {
		if _, err = strconv.ParseUint(strings.TrimSpace(string(data)), 10, 63); err == nil {
			return c.small(from, to, counter)
		}
	}
	if err := c.lose(err, Loss{Repository: repository, Path: counter}); err != nil || len(list) == 0 {
		return err
	}
	// As far as the names tell it.
	st, err := from.StatSelf()
	if err != nil {
		return err
	}
	last := fmt.Appendf(nil, "%d\n", list[len(list)-1].Sequence)
	if err := to.WriteFile(counter, last, 0o644, func(f *os.File) error { return chown(f, st) }); err != nil {
		return &targetError{err}
	}
	return nil
}

// rest copies what lies beside the generations.
func (c *copier) rest() error {
	if err := c.records(generations.HeartbeatFolder, 0o755, func(name string) bool { return !strings.HasPrefix(name, ".") }); err != nil {
		return err
	}
	err := c.records(generations.PrivateFolder, 0o700, func(name string) bool {
		return strings.HasSuffix(name, ".toml") && !strings.HasPrefix(name, ".")
	})
	if err != nil {
		return err
	}
	for _, name := range []string{generations.GenerationsFolder, generations.IncomingFolder, generations.HeartbeatFolder, generations.PrivateFolder, generations.ReadmeFile} {
		if err := c.like(c.from, c.to, name); err != nil {
			return err
		}
	}
	if c.Salvage {
		if err := c.noteLost(); err != nil {
			return err
		}
	}
	// The disk's top folder says who may come in, and is the keeper's.
	st, err := c.from.StatSelf()
	if err != nil {
		return err
	}
	path := c.to.Path()
	if err := os.Chown(path, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	return os.Chmod(path, fs.FileMode(st.Mode&0o777))
}

// records copies the plain files of a folder at the top. A record that cannot be
// read ends a copy; a salvage goes on without it.
func (c *copier) records(folder string, perm uint32, wanted func(string) bool) error {
	from, err := c.from.Dir(folder)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return c.lose(err, Loss{Path: folder})
	}
	defer from.Close()
	to, _, err := c.to.MakeDir(folder, perm)
	if err != nil {
		return err
	}
	defer to.Close()
	var names []string
	err = from.Each(func(e fs.DirEntry) error {
		if e.Type().IsRegular() && wanted(e.Name()) {
			names = append(names, e.Name())
		}
		return nil
	})
	if err != nil {
		if err := c.lose(err, Loss{Path: folder}); err != nil {
			return err
		}
	}
	for _, name := range names {
		if err := c.record(from, to, folder, name); err != nil {
			return err
		}
	}
	return nil
}

func (c *copier) record(from, to *beneath.Dir, folder, name string) error {
	path := folder + "/" + name
	data, err := c.readSmall(from, name)
	if err != nil {
		return c.lose(err, Loss{Path: path})
	}
	if strings.HasSuffix(name, ".toml") {
		if err := toml.Unmarshal(data, &map[string]any{}); err != nil {
			if err := c.lose(err, Loss{Path: path}); err != nil {
				return err
			}
			// What is rotten will be found again. The others, damaged as they are,
			// stop what they were there to hold back until the operator decides.
			if name == "rot.toml" {
				return nil
			}
		}
	}
	return c.small(from, to, name)
}

// lose goes on past what cannot be copied, in a salvage.
func (c *copier) lose(err error, l Loss) error {
	if c.ctx.Err() != nil {
		return c.ctx.Err()
	}
	var target *targetError
	if !c.Salvage || errors.As(err, &target) {
		if l.Path == "" {
			return err
		}
		return fmt.Errorf("%s: %w", l.Path, err)
	}
	l.What = text(err)
	c.report.Lost++
	const most = 100_000
	if key := l.Repository + "/" + l.Generation + "/" + l.Path; len(c.why) < most {
		c.why[key] = l.What
	}
	c.Log.Debug("left out", "repository", l.Repository, "generation", l.Generation, "path", l.Path, "what", l.What)
	if l.file {
		return nil // told in the end, when other copies were looked for
	}
	c.lists++
	if c.Lost != nil {
		c.Lost(l)
	}
	return nil
}

// targetError is what the new disk refuses: no reason to go on.
type targetError struct{ err error }

func (e *targetError) Error() string { return e.err.Error() }
func (e *targetError) Unwrap() error { return e.err }

func text(err error) string {
	var path *fs.PathError
	if errors.As(err, &path) {
		return fmt.Sprintf("%s: %v", path.Op, path.Err)
	}
	return err.Error()
}

// maxSmall bounds the files that are copied in one piece, in bytes.
const maxSmall = 4 << 20

// small copies a short file, durably, with its mode and owner.
func (c *copier) small(from, to *beneath.Dir, name string) error {
	data, err := c.readSmall(from, name)
	if err != nil {
		return err
	}
	st, err := from.Stat(name)
	if err != nil {
		return err
	}
	err = to.WriteFile(name, data, st.Mode&0o7777, func(f *os.File) error { return chown(f, st) })
	if err != nil {
		return &targetError{err}
	}
	return nil
}

func (c *copier) readSmall(from *beneath.Dir, name string) ([]byte, error) {
	f, _, err := from.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(c.Reader(f), maxSmall+1))
	if err == nil && len(data) > maxSmall {
		err = fmt.Errorf("more than %d bytes", maxSmall)
	}
	return data, err
}

func chown(f *os.File, st unix.Stat_t) error {
	var now unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &now); err == nil && now.Uid == st.Uid && now.Gid == st.Gid {
		return nil
	}
	return f.Chown(int(st.Uid), int(st.Gid))
}

// like gives a name on the new disk the mode and owner that it has on the old one.
func (c *copier) like(from, to *beneath.Dir, name string) error {
	st, err := from.Stat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return c.lose(err, Loss{Path: name})
	}
	now, err := to.Stat(name)
	if err == nil && (now.Uid != st.Uid || now.Gid != st.Gid) {
		err = to.Chown(name, int(st.Uid), int(st.Gid))
	}
	if err == nil && now.Mode&0o7777 != st.Mode&0o7777 {
		err = to.Chmod(name, st.Mode&0o7777)
	}
	if err != nil {
		return &targetError{err}
	}
	return nil
}

// tell reports the progress.
func (c *copier) tell() {
	if c.Progress != nil {
		c.Progress(c.report.Progress)
	}
}

func (c *copier) readMark() (m mark) {
	data, err := c.work.ReadFile(progressFile, 4096)
	if err == nil {
		err = tomlfile.Parse(progressFile, data, &m)
	}
	if err != nil {
		return mark{}
	}
	return m
}

func (c *copier) writeMark(m mark) error {
	data, err := toml.Marshal(m)
	if err != nil {
		return err
	}
	return c.work.WriteFile(progressFile, data, 0o600, nil)
}
