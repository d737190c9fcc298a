package generations

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"farkeep/shared/beneath"
	"farkeep/shared/hint"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"
	"farkeep/shared/recipe"

	"golang.org/x/sys/unix"
)

// A file counts as received when it is durable. Files are made durable in
// batches with one syncfs(2): on a journaling file system that is one journal
// commit and one cache flush for the batch, where fsync costs both for each file.
// A batch ends at any of these, so that a power cut costs seconds of upload. The
// disk is the store's own, so nothing else is synced along.
const (
	batchFiles = 512
	batchBytes = 256 << 20
	batchDirty = 64 << 20 // of them, what waits in memory: short files, and the ends of long ones
	batchTime  = 5 * time.Second
)

// stride is the piece of a growing file whose write-out is started at once, and
// waited for one piece later: the disk is always busy, and no more than two
// pieces of memory are dirty, however slow it is (sync_file_range(2)).
const stride = 8 << 20

// Receive takes a recipe stream from r, to its end mark, and files what it holds.
// After an error what was complete is kept, and the beginning of a long file that was
// being written; the transaction then only serves to be closed.
func (t *Transaction) Receive(ctx context.Context, r io.Reader) (pushwire.UploadAnswer, error) {
	if t.state != planned {
		return pushwire.UploadAnswer{}, fmt.Errorf("push %s: an upload that was not asked for", t.req.Repository)
	}
	t.state = used
	got, err := t.receive(ctx, r)
	if err != nil {
		if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
			free, reserve, _, _ := t.store.Space()
			err = hint.Because(fmt.Errorf("%w (%d bytes are free beside the reserve of %d)", err, free, reserve),
				"the disk filled up during the push; every generation is intact: make room, then push again, which goes on where it stopped")
		}
		return got, fmt.Errorf("push %s: %w", t.req.Repository, err)
	}
	t.state = planned
	return got, nil
}

func (t *Transaction) receive(ctx context.Context, r io.Reader) (got pushwire.UploadAnswer, err error) {
	now := t.store.opt.Now
	begun, input := now(), &waiting{r: r, now: now}
	defer func() { got.Took, got.Waited = now().Sub(begun), input.waited }()
	list, closer, err := t.openManifest(t.dir)
	if err != nil {
		return got, err
	}
	defer closer.Close()
	w, err := t.openWorkshop(ctx)
	if err != nil {
		return got, err
	}
	defer w.close()
	d := recipe.NewDecoder(input)
	for {
		index, err := d.Next()
		if errors.Is(err, io.EOF) {
			t.behind = slices.Clone(d.Behind())
			return w.got, w.flush()
		}
		if err == nil {
			err = w.file(d, list, index)
		}
		if err != nil {
			// The peer's mistake or a cut line must not cost what is complete.
			return w.got, errors.Join(err, w.flush())
		}
	}
}

// Behind is what the last Receive read beyond the end mark of its stream.
func (t *Transaction) Behind() []byte { return t.behind }

// waiting counts the time that reads take.
type waiting struct {
	r      io.Reader
	now    func() time.Time
	waited time.Duration
}

func (w *waiting) Read(p []byte) (int, error) {
	begun := w.now()
	n, err := w.r.Read(p)
	w.waited += w.now().Sub(begun)
	return n, err
}

// workshop is where an upload's files are built (recipe.Workshop).
type workshop struct {
	t                 *Transaction
	ctx               context.Context
	building, objects *beneath.Dir
	base              *beneath.Dir // files/ of the base; nil for none
	buf               []byte
	got               pushwire.UploadAnswer

	// The file that is being built.
	sum     manifest.Sum
	name    string // in building/: the sum, or for a twin another one
	twin    bool   // a file of the same content is in the batch
	size    int64  // announced
	f       *os.File
	written int64     // length
	pushed  int64     // write-out was started up to here
	settled int64     // and finished up to here
	noted   time.Time // of the last checkpoint, or of the start

	source     *os.File // of the last copy
	sourcePath string

	// Complete files that are not durable yet.
	batch struct {
		files []batched
		bytes int64
		dirty int64 // of bytes: their write-out has not begun
		since time.Time
	}
}

type batched struct {
	name  string // in building/ and objects/: the sum
	index int64
	size  int64
	twin  bool // the file is that of one before it in the batch
}

const twinSuffix = ".twin"

func (t *Transaction) openWorkshop(ctx context.Context) (*workshop, error) {
	w := &workshop{t: t, ctx: ctx, buf: make([]byte, 256<<10)}
	err := w.open()
	if err != nil {
		w.close()
		return nil, err
	}
	return w, nil
}

func (w *workshop) open() (err error) {
	if w.building, err = w.t.dir.Dir(buildingFolder); err != nil {
		return err
	}
	if w.objects, err = w.t.dir.Dir(objectsFolder); err != nil {
		return err
	}
	if w.t.base.Name != "" {
		w.base, err = w.t.store.generations.Dir(w.t.req.Repository + "/" + w.t.base.Name + "/" + FilesFolder)
	}
	return err
}

func (w *workshop) close() {
	if w.f != nil {
		w.f.Close()
	}
	if w.source != nil {
		w.source.Close()
	}
	w.base.Close()
	w.objects.Close()
	w.building.Close()
}

// file builds the file that the stream announced.
func (w *workshop) file(d *recipe.Decoder, list *manifest.Reader, index int64) error {
	if !w.t.missing.Has(index) {
		return fmt.Errorf("file %d was not asked for, or came already", index)
	}
	var e manifest.Entry
	for list.Index() < index {
		var err error
		if e, err = list.Next(); err != nil {
			return err
		}
	}
	w.sum, w.name, w.size = e.Sum, e.Sum.String(), e.Size
	// The same content twice: the second is checked, and is no further file. Some
	// trees have thousands of empty ones; a sync for each would take hours.
	w.twin = slices.ContainsFunc(w.batch.files, func(b batched) bool { return b.name == w.name })
	if w.twin {
		w.name += twinSuffix
	}
	w.written, w.pushed, w.settled, w.noted = 0, 0, 0, w.t.store.opt.Now()
	err := recipe.Build(d, e, w, w.buf)
	if err == nil && w.f == nil {
		err = w.start() // an empty file
	}
	if err == nil {
		err = w.finish(index)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("receive %q: %w", e.Path, err), w.cut(err))
	}
	return nil
}

// start makes the file that is being built.
func (w *workshop) start() (err error) {
	w.f, err = w.t.store.create(w.building, w.name, 0o600)
	return err
}

// reserve claims the room of a long file: in one piece, and with the error now.
func (w *workshop) reserve() error {
	if w.size < stride {
		return nil
	}
	err := unix.Fallocate(int(w.f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, w.size)
	if err == unix.EOPNOTSUPP || err == unix.ENOSYS || err == unix.EINTR {
		return nil
	}
	if err != nil {
		return fmt.Errorf("reserve %d bytes: %w", w.size, err)
	}
	return nil
}

// Write implements recipe.Workshop.
func (w *workshop) Write(p []byte) (int, error) {
	if w.ctx.Err() != nil {
		return 0, w.ctx.Err()
	}
	if w.f == nil {
		if err := w.start(); err != nil {
			return 0, err
		}
		if err := w.reserve(); err != nil {
			return 0, err
		}
	}
	n, err := w.f.Write(p)
	w.written += int64(n)
	if err == nil && w.written-w.pushed >= stride {
		err = w.push()
	}
	return n, err
}

// push starts the write-out of what is new and waits for that of the piece before.
func (w *workshop) push() error {
	fd := int(w.f.Fd())
	end := w.written &^ (1<<20 - 1)
	err := syncRange(fd, w.pushed, end-w.pushed, unix.SYNC_FILE_RANGE_WRITE)
	if err == nil && w.pushed > w.settled {
		err = syncRange(fd, w.settled, w.pushed-w.settled,
			unix.SYNC_FILE_RANGE_WAIT_BEFORE|unix.SYNC_FILE_RANGE_WRITE|unix.SYNC_FILE_RANGE_WAIT_AFTER)
		if err == nil {
			// Nobody reads it soon; leave the memory to the folders' metadata.
			unix.Fadvise(fd, w.settled, w.pushed-w.settled, unix.FADV_DONTNEED)
		}
		w.settled = w.pushed
	}
	w.pushed = end
	if err == nil && !w.twin && w.t.store.opt.Now().Sub(w.noted) >= batchTime {
		err = w.note()
	}
	return err
}

// note makes a checkpoint. The size of a file that was growing when the power
// went is no proof: ext4 may have recorded it before the bytes that it covers.
func (w *workshop) note() error {
	if err := w.f.Sync(); err != nil {
		return err
	}
	w.noted = w.t.store.opt.Now()
	return w.t.checkpoint(w.sum, w.written)
}

// syncRange hands errors of the disk on and ignores a file system that cannot do
// it: the sync at the end of the batch is what counts.
func syncRange(fd int, offset, n int64, flags int) error {
	err := unix.SyncFileRange(fd, offset, n, flags)
	if err == unix.ENOSYS || err == unix.EINVAL || err == unix.ESPIPE || err == unix.EINTR {
		return nil
	}
	return err
}

// Kept implements recipe.Workshop.
func (w *workshop) Kept(n int64) (io.Reader, error) {
	if w.twin || n > w.t.partials[w.sum] {
		return nil, errors.New("so much was not offered")
	}
	f, _, err := w.building.OpenWrite(w.name, 0, 0)
	if err != nil {
		return nil, err
	}
	w.f = f
	if err := f.Truncate(n); err != nil {
		return nil, err
	}
	if err := w.reserve(); err != nil {
		return nil, err
	}
	if _, err := f.Seek(n, io.SeekStart); err != nil {
		return nil, err
	}
	w.written, w.pushed, w.settled = n, n, n
	return io.NewSectionReader(f, 0, n), nil
}

// Source implements recipe.Workshop.
func (w *workshop) Source(path string) (io.ReaderAt, error) {
	if w.source != nil && w.sourcePath == path {
		return w.source, nil
	}
	if w.base == nil {
		return nil, errors.New("there is no generation to copy from")
	}
	f, _, err := w.base.Open(path)
	if err != nil {
		return nil, err
	}
	if w.source != nil {
		w.source.Close()
	}
	w.source, w.sourcePath = f, path
	return f, nil
}

// finish puts the complete file into the batch.
func (w *workshop) finish(index int64) error {
	f := w.f
	w.f = nil
	if err := f.Close(); err != nil {
		return err
	}
	delete(w.t.partials, w.sum)
	if w.twin {
		if err := w.building.Remove(w.name); err != nil {
			return err
		}
	}
	if len(w.batch.files) == 0 {
		w.batch.since = w.t.store.opt.Now()
	}
	w.batch.files = append(w.batch.files, batched{w.sum.String(), index, w.size, w.twin})
	w.batch.bytes += w.size
	w.batch.dirty += w.size - w.pushed
	w.got.Files++
	w.got.Bytes += w.size
	if len(w.batch.files) >= batchFiles || w.batch.bytes >= batchBytes || w.batch.dirty >= batchDirty || w.t.store.opt.Now().Sub(w.batch.since) >= batchTime {
		return w.flush()
	}
	return nil
}

// cut decides what happens to the file at which the upload stopped because of
// cause: the beginning of a long one is worth keeping, unless it is known to be
// wrong, or the disk needs the room.
func (w *workshop) cut(cause error) error {
	if w.f == nil {
		return nil
	}
	defer func() {
		w.f.Close()
		w.f = nil
	}()
	keep := !w.twin && w.written >= MinResume && !errors.Is(cause, recipe.ErrSum) && !errors.Is(cause, unix.ENOSPC) && !errors.Is(cause, unix.EDQUOT)
	if keep && w.note() == nil {
		return nil
	}
	return w.building.RemoveAll(w.name)
}

// flush makes the batch durable and only then gives its files the names under
// which they count.
func (w *workshop) flush() error {
	batch := w.batch.files
	w.batch.files, w.batch.bytes, w.batch.dirty = nil, 0, 0
	if len(batch) == 0 {
		return nil
	}
	if err := w.t.dir.SyncFS(); err != nil {
		// After a failed write-out the kernel may drop the bytes and report
		// nothing the next time: none of these files can be believed.
		for _, b := range batch {
			err = errors.Join(err, w.building.RemoveAll(b.name))
		}
		return err
	}
	for _, b := range batch {
		if !b.twin {
			if err := w.building.Rename(b.name, w.objects, b.name); err != nil {
				return err
			}
		}
		w.t.missing.Remove(b.index)
		w.t.wrote(b.size)
	}
	return nil
}

// Upload is Receive for a pusher in the same process: write makes the stream.
func (t *Transaction) Upload(ctx context.Context, write func(io.Writer) error) (pushwire.UploadAnswer, error) {
	r, w := io.Pipe()
	wrote := make(chan error, 1)
	go func() {
		err := write(w)
		w.CloseWithError(err)
		wrote <- err
	}()
	got, err := t.Receive(ctx, r)
	r.CloseWithError(errClosed)
	if werr := <-wrote; werr != nil && !errors.Is(werr, errClosed) {
		return got, werr
	}
	return got, err
}

var errClosed = errors.New("the upload was refused")

// regularOfSize reports whether name is a regular file of that size.
func regularOfSize(dir *beneath.Dir, name string, size int64) bool {
	st, err := dir.Stat(name)
	return err == nil && st.Mode&unix.S_IFMT == unix.S_IFREG && st.Size == size
}
