package keeper

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"

	"farkeep/appliance/keepercall"
	"farkeep/appliance/staging"
	"farkeep/shared/generations"
	"farkeep/shared/hint"
	"farkeep/shared/pushwire"
)

// copies are the staging copies of stock sftp clients on the disk that is there.
type copies struct {
	of   *generations.Store
	area *staging.Area
	// words are what sessions say to people, by session.
	words map[string]chan string
}

// maxWords is how many lines may wait for somebody to take them; more are lost.
const maxWords = 16

// area returns the staging copies of the disk that store lies on.
func (c *call) area(store *generations.Store) *staging.Area {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.copies.of != store {
		c.copies.of, c.copies.area = store, staging.New(c.env.Paths.Disk(), store, c.env.Log)
	}
	return c.copies.area
}

// peer is the caller, as package staging wants it.
func (c *call) peer(say func(string)) staging.Peer {
	return staging.Peer{
		Key: c.args.Key, Quota: c.args.Quota, Sees: c.sees, Say: say,
		Named: slices.DeleteFunc(slices.Clone(c.args.Repositories), func(n string) bool { return strings.HasSuffix(n, "*") }),
	}
}

// quota is what the key may still have besides its staging copies, for a push.
func (c *call) quota(ctx context.Context, store *generations.Store) (int64, error) {
	if c.args.Quota == 0 {
		return 0, nil
	}
	held, err := c.area(store).HeldBy(ctx, c.args.Key)
	return max(c.args.Quota-held, 1), err
}

// sftp serves a stock client: what follows its answer is SFTP, both ways.
func sftp(ctx context.Context, c *call) error {
	if err := c.pushKey(); err != nil {
		return err
	}
	ctx, store, leave, err := c.enter(ctx)
	if err != nil {
		return err
	}
	defer leave()
	session, words := c.newSession()
	defer c.endSession(session, words)
	if err := c.answer(keepercall.Session{Session: session}, keepercall.ThenRaw); err != nil {
		return err
	}
	err = c.area(store).Serve(ctx, c.peer(func(text string) {
		c.log.Info("told the sftp client", "text", text)
		select {
		case words <- text:
		default:
		}
	}), c.conn)
	if err != nil && !errors.Is(err, errClosing) {
		// It cannot be an answer any more: the answer was that SFTP begins.
		select {
		case words <- err.Error():
		default:
		}
	}
	return err
}

func (c *call) newSession() (id string, words chan string) {
	var random [8]byte
	rand.Read(random[:])
	id, words = hex.EncodeToString(random[:]), make(chan string, maxWords)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.copies.words == nil {
		c.copies.words = map[string]chan string{}
	}
	c.copies.words[id] = words
	return id, words
}

func (c *call) endSession(id string, words chan string) {
	c.mu.Lock()
	delete(c.copies.words, id)
	c.mu.Unlock()
	close(words)
}

// words tells what an sftp session has to say in words, as lines, until the
// session ends. It answers once when it has begun to listen.
func words(ctx context.Context, c *call) error {
	if err := c.pushKey(); err != nil {
		return err
	}
	c.mu.Lock()
	lines := c.copies.words[c.args.Session]
	c.mu.Unlock()
	if lines == nil {
		return errors.New("no sftp session has that number")
	}
	if err := c.answer(struct{}{}, keepercall.ThenLine); err != nil {
		return err
	}
	for lines != nil {
		select {
		case text, ok := <-lines:
			if !ok {
				lines = nil
				break
			}
			if err := c.answer(text, keepercall.ThenLine); err != nil {
				return err
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return c.over()
}

// isCopy says whether the argument of commit or abort is a repository, whose staging
// copy is meant, and not a push.
func isCopy(arg string) bool { return !strings.Contains(arg, "/") }

// commitCopy makes a generation of a staging copy, by an ordinary push: judge,
// quota, room and the pace of commits apply as to any.
func commitCopy(ctx context.Context, c *call) error {
	repository := c.args.Push
	if err := errors.Join(c.pushKey(), c.allowed(repository)); err != nil {
		return err
	}
	ctx, store, leave, err := c.enter(ctx)
	if err != nil {
		return err
	}
	defer leave()
	if err := c.stays(repository); err != nil {
		return err
	}
	ctx, p, err := c.claim(ctx, repository)
	if err != nil {
		return err
	}
	defer c.done(p, false)
	// Reading many files sends nothing for minutes, and is not silent.
	working := p.working(c.brief.Takeover / 4)
	defer working()
	frozen, err := c.area(store).Freeze(ctx, c.peer(nil), repository)
	if err != nil {
		return err
	}
	defer frozen.Release()
	name, same, err := c.pushCopy(ctx, store, p, frozen)
	if err != nil {
		return c.whoHolds(ctx, store, err)
	}
	g, err := store.Generation(ctx, repository, name)
	if err != nil {
		return err
	}
	if err := frozen.Committed(ctx, g); err != nil {
		// The generation is there. What stays stored twice is found by the next commit.
		c.log.Warn("the staging copy cannot be joined with its generation", "repository", repository, "generation", name, "err", err)
	}
	if err := c.confirmed(ctx, store, repository); err != nil {
		return err
	}
	c.tellRot(store)
	if !same {
		c.committed(repository)
		c.log.Info("a new generation", "repository", repository, "generation", name, "files", g.Files, "new_files", g.NewFiles, "new_bytes", g.NewBytes)
	}
	return c.answer(pushwire.CommitAnswer{Generation: name, Suspect: g.Suspect, Same: same}, keepercall.ThenEnd)
}

// pushCopy offers the frozen copy and commits it. A second attempt adopts every
// file: the base that the copy was listed against may have turned out to be damaged.
func (c *call) pushCopy(ctx context.Context, store *generations.Store, p *push, frozen *staging.Frozen) (name string, same bool, err error) {
	for _, all := range []bool{false, true} {
		answer, tx, err := store.Begin(ctx, frozen.Request())
		if err != nil {
			return "", false, err
		}
		if tx == nil {
			return answer.Generation, true, nil
		}
		if answer.Heal {
			// The copy is the newest generation, of which the disk lost files. It shares
			// those: only an upload by farkeep-pusher brings them back.
			newest, err := store.Newest(ctx, p.repository)
			return newest.Name, true, errors.Join(err, tx.Close())
		}
		c.mu.Lock()
		p.tx = tx
		c.mu.Unlock()
		if err = c.tooSoon(ctx, store, p.repository); err == nil && answer.Answer == pushwire.AnswerSendManifest {
			answer, err = takeCopy(ctx, tx, frozen, all)
		}
		if err == nil && answer.Need == 0 {
			name, err = tx.Commit(ctx)
			if err == nil {
				return name, false, nil
			}
		}
		if ctx.Err() != nil {
			// The disk is wanted back: there is no time to undo. The next commit finds in the
			// copy's own list which modes the adopted files had.
			return "", false, err
		}
		// What is adopted takes no room, but keeps the copy's files shared.
		undo := tx.Abort(ctx)
		c.mu.Lock()
		p.tx = nil
		c.mu.Unlock()
		undo = errors.Join(undo, tx.Close(), frozen.Undo(ctx))
		if err = errors.Join(err, undo); err != nil {
			return "", false, err
		}
	}
	return "", false, hint.Because(fmt.Errorf("%w: files of the staging copy are missing", generations.ErrIncomplete), "the appliance's log says which; a push by farkeep-pusher mends a damaged generation")
}

func takeCopy(ctx context.Context, tx *generations.Transaction, frozen *staging.Frozen, all bool) (generations.Answer, error) {
	if err := frozen.Adopt(ctx, tx, all); err != nil {
		return generations.Answer{}, err
	}
	list, err := frozen.List()
	if err != nil {
		return generations.Answer{}, err
	}
	defer list.Close()
	return tx.TakeManifest(ctx, list)
}

// abortCopy discards a staging copy.
func abortCopy(ctx context.Context, c *call) error {
	if err := errors.Join(c.pushKey(), c.allowed(c.args.Push)); err != nil {
		return err
	}
	ctx, store, leave, err := c.enter(ctx)
	if err != nil {
		return err
	}
	defer leave()
	if err := c.area(store).Discard(ctx, c.peer(nil), c.args.Push); err != nil {
		return err
	}
	return c.answer(struct{}{}, keepercall.ThenEnd)
}
