package generations

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"

	"farkeep/shared/beneath"
	"farkeep/shared/hint"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"
	"farkeep/shared/tomlfile"
)

// The files of incoming/<repository>/, one push at a time:
//
//	push.toml   which push this is; valid only with the MANIFEST of its digest
//	MANIFEST    what was offered
//	objects/    complete files, verified and durable, named by their hash
//	building/   files that are being written, named by the hash they shall have
//	checkpoint  how much of half-built files is durable
//	distrust    hashes that the newest generation should have, and has not
//	generation/ what becomes the generation; only during a commit
//
// Files are named by their hash and not by their path, so that a push that was
// cut helps the next one even when the repository has changed in between: the
// first push of a terabyte takes weeks, and Borg goes on every night.
const (
	pushFile       = "push.toml"
	objectsFolder  = "objects"
	buildingFolder = "building"
	checkpointFile = "checkpoint"
	distrustFile   = "distrust"
	stagingFolder  = "generation"
	newManifest    = ".MANIFEST.new"
)

// MinResume is the size in bytes from which a half-built file is kept.
const MinResume = 4 << 20

// MaxRepositories bounds the repositories of one store.
const MaxRepositories = 1024

// maxDistrust bounds the file distrust, in hashes; what is beyond is found by
// the next push.
const maxDistrust = 10000

// Request is what a pusher asks for.
type Request struct {
	Repository string
	Offer      pushwire.Offer
	Pusher     string // the name of its key
	Quota      int64  // bytes; 0 for none
}

// Answer is what an offer was answered with.
type Answer struct {
	pushwire.OfferAnswer
	// Needed are the files to upload, by their index in the offered manifest; nil
	// unless the answer is "send".
	Needed *manifest.Set
}

// checkOffer refuses an offer that no manifest can keep, and returns its digest.
func checkOffer(o pushwire.Offer) (digest manifest.Sum, err error) {
	if err := digest.UnmarshalText([]byte(o.Digest)); err != nil {
		return digest, fmt.Errorf("offer: %w", err)
	}
	if o.Entries < 0 || o.Entries > manifest.MaxEntries {
		return digest, fmt.Errorf("offer of %d entries: 0 to %d are possible", o.Entries, manifest.MaxEntries)
	}
	if o.Bytes < 0 || o.Bytes > manifest.MaxBytes {
		return digest, fmt.Errorf("offer of %d bytes: 0 to %d are possible", o.Bytes, int64(manifest.MaxBytes))
	}
	if o.Kind != pushwire.KindBorg1 && o.Kind != pushwire.KindFiles {
		return digest, fmt.Errorf("offer of kind %.32q: %s and %s are known", o.Kind, pushwire.KindBorg1, pushwire.KindFiles)
	}
	if len(o.RepositoryID) > 64 || strings.Trim(o.RepositoryID, "0123456789abcdef") != "" {
		return digest, errors.New("offer with a repository id that is not up to 64 hexadecimal digits")
	}
	return digest, nil
}

// incomingPush is push.toml.
type incomingPush struct {
	Format   int          `toml:"format"` // 1
	Push     string       `toml:"push"`
	Pusher   string       `toml:"pusher"`
	Digest   manifest.Sum `toml:"digest"`
	Entries  int64        `toml:"entries"`
	Bytes    int64        `toml:"bytes"`
	NewBytes int64        `toml:"new_bytes"` // not in the generation before, overhead included; counts for the quota
}

// readPush reads the push.toml of incoming/<repository>.
func readPush(dir *beneath.Dir) (p incomingPush, err error) {
	text, err := dir.ReadFile(pushFile, maxTOML)
	if err == nil {
		err = tomlfile.Parse(pushFile, text, &p)
	}
	if err == nil && (p.Format != 1 || p.NewBytes < 0) {
		err = fmt.Errorf("%w: %s/%s", ErrDamaged, dir.Path(), pushFile)
	}
	return p, err
}

// Transaction is one push under way. It holds the repository's lock until it is
// closed. It is not safe for concurrent use.
type Transaction struct {
	store  *Store
	req    Request
	dir    *beneath.Dir // incoming/<repository>
	id     string
	state  txState
	digest manifest.Sum // what was offered

	base       Generation // Name "" for none
	release    func()     // of the hold on base; nil for none
	missing    *manifest.Set
	partials   map[manifest.Sum]int64 // half-built files that the answer offered to resume
	durable    map[manifest.Sum]int64 // the content of the file checkpoint
	distrusted map[manifest.Sum]bool
	overhead   int64  // bytes of lists and folders
	used       int64  // of the quota, this push included
	behind     []byte // what came behind the last stream

	healing *Generation // whose rotten files this push brings; nil for a push that makes a generation
	healed  int
}

// A transaction's states, each entered from the one before:
//
//	offered → planned → committed
//	   │         └── Receive, any number of times; after one the plan may be used up
//	   └── TakeManifest
type txState int

const (
	offered txState = iota
	planned
	used // a Receive failed: only a new Begin knows what is missing now
	committed
)

// PushRepository returns the repository that a push's id belongs to.
func PushRepository(id string) (string, error) {
	repository, random, ok := strings.Cut(id, "/")
	if err := pushwire.CheckRepository(repository); err != nil || !ok || len(random) != 16 {
		return "", fmt.Errorf("%.200q is not the id of a push", id)
	}
	return repository, nil
}

// Begin starts a push, or finds that there is nothing to do.
//
// "same": the newest generation is what is offered; the Transaction is nil.
// "send-manifest": the caller calls TakeManifest next. "send": a push of just this
// offer was cut earlier; Receive is next. Errors wrap ErrBusy, *SpaceError or
// *QuotaError where they apply.
func (s *Store) Begin(ctx context.Context, req Request) (Answer, *Transaction, error) {
	answer, t, err := s.begin(ctx, req)
	if err != nil {
		return Answer{}, nil, fmt.Errorf("push %.200s: %w", req.Repository, err)
	}
	return answer, t, nil
}

func (s *Store) begin(ctx context.Context, req Request) (Answer, *Transaction, error) {
	if err := pushwire.CheckRepository(req.Repository); err != nil {
		return Answer{}, nil, err
	}
	digest, err := checkOffer(req.Offer)
	if err != nil {
		return Answer{}, nil, err
	}
	newest, err := s.Newest(ctx, req.Repository)
	if err != nil && !errors.Is(err, ErrNone) {
		return Answer{}, nil, err
	}
	// What the operator rejected is not confirmed: who offers it again is judged again.
	same := err == nil && newest.Digest == digest && newest.Standing != Rejected
	if same && (newest.Entries != req.Offer.Entries || newest.Bytes != req.Offer.Bytes) {
		return Answer{}, nil, fmt.Errorf("%w: the digest is that of %s, the counts are not", ErrOffer, newest.Name)
	}
	if err := s.countRepositories(req.Repository); err != nil {
		return Answer{}, nil, err
	}
	t := &Transaction{store: s, req: req, digest: digest}
	locked, err := t.lock()
	if err != nil {
		return Answer{}, nil, err
	}
	if err := locked; err != nil {
		t.Close()
		if same {
			return Answer{OfferAnswer: pushwire.OfferAnswer{Answer: pushwire.AnswerSame, Generation: newest.Name}}, nil, nil
		}
		if errors.Is(err, beneath.ErrLocked) {
			err = hint.Because(ErrBusy, "wait for it to end; one that is stalled ends by itself in some minutes")
		}
		return Answer{}, nil, err
	}
	if same {
		answer, ok, err := t.beginHeal(ctx, &newest)
		if ctx.Err() != nil {
			t.Close()
			return Answer{}, nil, ctx.Err()
		}
		if err != nil {
			// What is rotten stays so for today; that nothing changed is true all the same.
			s.opt.Log.Error("rotten files cannot be asked for", "repository", req.Repository, "err", err)
		}
		if ok {
			return answer, t, nil
		}
		defer t.Close()
		return Answer{OfferAnswer: pushwire.OfferAnswer{Answer: pushwire.AnswerSame, Generation: newest.Name}}, nil, t.discard()
	}
	answer, err := t.resume(ctx)
	if err != nil {
		t.Close()
		return Answer{}, nil, err
	}
	return answer, t, nil
}

// countRepositories refuses one repository too many: a key that may push "*" must
// not fill the disk with names.
func (s *Store) countRepositories(name string) error {
	if _, err := s.incoming.Stat(name); err == nil {
		return nil
	}
	n := 0
	err := s.incoming.Each(func(fs.DirEntry) error { n++; return nil })
	if err == nil && n >= MaxRepositories {
		err = fmt.Errorf("there are %d repositories already, which is the most that a disk holds", n)
	}
	return err
}

// prepare makes the folders that a push needs, and removes what a commit that was
// cut left.
func (t *Transaction) prepare() error {
	for _, name := range []string{objectsFolder, buildingFolder} {
		sub, err := t.store.makeDir(t.dir, name, privatePerm)
		if err != nil {
			return err
		}
		sub.Close()
	}
	return t.dir.RemoveAll(stagingFolder)
}

// resume goes on with the push that lies in incoming/, if it is of this offer.
func (t *Transaction) resume(ctx context.Context) (Answer, error) {
	if err := t.prepare(); err != nil {
		return Answer{}, err
	}
	p, err := readPush(t.dir)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			t.store.opt.Log.Warn("an interrupted push cannot be read and begins anew", "repository", t.req.Repository, "err", err)
		}
		return t.wantManifest(ctx)
	}
	h := t.req.Offer
	if p.Digest != t.digest || p.Entries != h.Entries || p.Bytes != h.Bytes || p.Pusher != t.req.Pusher {
		return t.wantManifest(ctx)
	}
	t.id = p.Push
	answer, err := t.plan(ctx)
	var space *SpaceError
	var quota *QuotaError
	if err != nil && ctx.Err() == nil && !errors.As(err, &space) && !errors.As(err, &quota) {
		// Whatever is wrong with it, a manifest taken anew finds out or mends it.
		t.store.opt.Log.Warn("an interrupted push cannot be resumed and begins anew", "repository", t.req.Repository, "err", err)
		return t.wantManifest(ctx)
	}
	return answer, err
}

// wantManifest asks for the manifest, or for a delta of the newest one that is here.
func (t *Transaction) wantManifest(ctx context.Context) (Answer, error) {
	answer := Answer{OfferAnswer: pushwire.OfferAnswer{Answer: pushwire.AnswerSendManifest}}
	list, err := t.store.List(ctx, t.req.Repository)
	for _, g := range slices.Backward(list) {
		if g.Format != 0 {
			answer.BaseDigest = g.Digest.String()
			break
		}
	}
	return answer, err
}

// TakeManifest reads the manifest that was offered, or a delta that makes it out of
// the manifest of a generation that is here, to the end of r, and answers "send".
// Whatever does not match the offer is refused as soon as it is seen.
func (t *Transaction) TakeManifest(ctx context.Context, r io.Reader) (Answer, error) {
	answer, err := t.takeManifest(ctx, r)
	if err != nil {
		return Answer{}, fmt.Errorf("push %s: %w", t.req.Repository, err)
	}
	return answer, nil
}

func (t *Transaction) takeManifest(ctx context.Context, r io.Reader) (Answer, error) {
	if t.state != offered {
		return Answer{}, errors.New("a manifest that was not asked for")
	}
	f, err := t.store.create(t.dir, newManifest, 0o444)
	if err != nil {
		return Answer{}, err
	}
	defer f.Close()
	in := bufio.NewReader(r)
	if head, _ := in.Peek(len(manifest.DeltaMagic)); string(head) == manifest.DeltaMagic {
		made, done := t.applyDelta(ctx, in)
		err = t.copyManifest(ctx, made, f)
		if wrong := done(); err == nil {
			err = wrong
		}
	} else {
		err = t.copyManifest(ctx, in, f)
	}
	if err == nil {
		err = f.Sync()
	}
	if err != nil {
		var space *SpaceError
		if errors.As(err, &space) {
			t.noRoom(ctx, space)
		}
		// It may be gigabytes, which no quota counts.
		return Answer{}, errors.Join(err, t.dir.Remove(newManifest))
	}
	var random [8]byte
	rand.Read(random[:])
	t.id = t.req.Repository + "/" + hex.EncodeToString(random[:])
	// The plan writes push.toml when the push is admitted. Until then an older one
	// does not match MANIFEST, and whoever resumes from it asks for a manifest.
	if err := t.dir.Rename(newManifest, t.dir, ManifestFile); err != nil {
		return Answer{}, err
	}
	answer, err := t.plan(ctx)
	var space *SpaceError
	var quota *QuotaError
	if errors.As(err, &space) || errors.As(err, &quota) {
		// Nor may a list of what is refused stay.
		err = errors.Join(err, t.dir.Remove(ManifestFile))
	}
	return answer, err
}

// applyDelta returns the manifest that a delta makes, as it is made, and a function
// that ends that and returns what was wrong with the delta.
func (t *Transaction) applyDelta(ctx context.Context, delta io.Reader) (io.Reader, func() error) {
	r, w := io.Pipe()
	result := make(chan error, 1)
	go func() {
		_, err := manifest.ApplyDelta(w, delta, func(digest manifest.Sum) (io.ReadCloser, error) { return t.manifestOf(ctx, digest) })
		w.CloseWithError(err)
		result <- err
	}()
	return r, func() error {
		r.CloseWithError(errStopped)
		err := <-result
		if errors.Is(err, errStopped) {
			err = nil // whoever stopped it knows why
		}
		return err
	}
}

var errStopped = errors.New("stopped")

// manifestOf opens the manifest of the newest generation with that digest.
func (t *Transaction) manifestOf(ctx context.Context, digest manifest.Sum) (io.ReadCloser, error) {
	list, err := t.store.List(ctx, t.req.Repository)
	if err != nil {
		return nil, err
	}
	for _, g := range slices.Backward(list) {
		if g.Format == 0 || g.Digest != digest {
			continue
		}
		dir, release, err := t.store.hold(t.req.Repository, g.Name)
		if err != nil {
			return nil, err
		}
		f, _, err := dir.Open(ManifestFile)
		// An open file stays, whatever becomes of its generation.
		release()
		return f, err
	}
	return nil, fmt.Errorf("%w: no generation has the digest %v", manifest.ErrDelta, digest)
}

// copyManifest writes the manifest to f as it is checked.
func (t *Transaction) copyManifest(ctx context.Context, r io.Reader, f *os.File) error {
	// No manifest is larger than its entries can be, and none may eat the reserve.
	free, reserve, _, err := t.store.Space()
	if err != nil {
		return err
	}
	const frame = 64 // magic and end
	room := min(free, frame+t.req.Offer.Entries*int64(manifest.MaxEntry))
	var over error = &SpaceError{What: "bytes", Needs: room, Has: free, Reserve: reserve}
	if t.req.Quota > 0 {
		used, err := t.store.stored(ctx, t.req.Pusher, t.req.Repository)
		if err != nil {
			return err
		}
		// The list counts for the quota as well, at more than its size (cost.entry).
		if left := max(t.req.Quota-used, 0) + frame; left < room {
			room, over = left, &QuotaError{Key: t.req.Pusher, Quota: t.req.Quota, Used: used, Needs: left + 1}
		}
	}
	w := bufio.NewWriterSize(f, 256<<10)
	m := manifest.NewReader(io.TeeReader(&limitReader{r: r, left: room, err: over}, w))
	for {
		if m.Index()%1024 == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		_, err := m.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if s := m.Summary(); s.Entries > t.req.Offer.Entries || s.Bytes > t.req.Offer.Bytes {
			return fmt.Errorf("%w: it holds more than the %d entries and %d bytes of the offer", ErrOffer, t.req.Offer.Entries, t.req.Offer.Bytes)
		}
	}
	if err := t.matches(m.Summary()); err != nil {
		return err
	}
	return w.Flush()
}

func (t *Transaction) matches(s manifest.Summary) error {
	h := t.req.Offer
	if s.Digest != t.digest || s.Entries != h.Entries || s.Bytes != h.Bytes {
		return fmt.Errorf("%w: %d entries, %d bytes, digest %v; offered were %d, %d, %v", ErrOffer, s.Entries, s.Bytes, s.Digest, h.Entries, h.Bytes, t.digest)
	}
	return nil
}

// limitReader fails with err instead of reading more than left bytes.
type limitReader struct {
	r    io.Reader
	left int64
	err  error
}

func (l *limitReader) Read(p []byte) (int, error) {
	if l.left <= 0 {
		return 0, l.err
	}
	n, err := l.r.Read(p[:min(int64(len(p)), l.left)])
	l.left -= int64(n)
	return n, err
}

// ID is the push's id, "" before there is a plan.
func (t *Transaction) ID() string { return t.id }

// Abort gives the push up and discards what was uploaded. The transaction
// must still be closed.
func (t *Transaction) Abort(context.Context) error {
	if t.state == committed {
		return errors.New("abort a push that was committed")
	}
	t.state = used
	return t.discard()
}

// discard empties incoming/<repository>.
func (t *Transaction) discard() error {
	// push.toml first: without it the rest means nothing.
	if err := t.dir.Remove(pushFile); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return t.dir.Clear()
}

// lock makes the folder of the repository's pushes, and takes its lock.
func (t *Transaction) lock() (locked, err error) {
	// Whoever removes such folders has their locks for a moment.
	t.store.gate.Lock()
	defer t.store.gate.Unlock()
	if t.dir, err = t.store.makeDir(t.store.incoming, t.req.Repository, privatePerm); err != nil {
		return nil, err
	}
	return t.dir.Lock(), nil
}

// leaveBase lets the base go.
func (t *Transaction) leaveBase() {
	if t.release != nil {
		t.release()
		t.release = nil
	}
}

// Close ends the transaction and frees the repository. What was uploaded stays
// for the next push.
func (t *Transaction) Close() error {
	t.leaveBase()
	t.store.mu.Lock()
	delete(t.store.promised, t)
	t.store.mu.Unlock()
	return t.dir.Close()
}

func (t *Transaction) openManifest(dir *beneath.Dir) (*manifest.Reader, io.Closer, error) {
	f, _, err := dir.Open(ManifestFile)
	if err != nil {
		return nil, nil, err
	}
	return manifest.NewReader(f), f, nil
}
