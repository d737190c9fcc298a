package mount

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"log/slog"
	"sync"

	"farkeep/pusher/readback"
	"farkeep/shared/manifest"
)

const (
	// blockSize is what is asked for at once. Borg reads chunks of some 100 KB all
	// over its segments: larger blocks would bring more that nobody wants.
	blockSize = 128 << 10
	// maxAhead blocks follow a reader that goes from one to the next: 2 MiB, as
	// much as an SSH channel holds.
	maxAhead = 16
	// maxIdle files stay open at the other end while nobody reads them. Together
	// with those that are read it must not pass the bound of package browse.
	maxIdle = 64
	// maxChecks files are hashed at a time as they are read.
	maxChecks = 64
)

var errWrong = errors.New("the target sent other bytes than those that were pushed")

type blockKey struct {
	node  int32
	block int64
}

// block is a piece of a file, once done is closed.
type block struct {
	key  blockKey
	done chan struct{}
	data []byte
	err  error
	turn *list.Element // in cache.order
}

// remote is a file that is open at the other end.
type remote struct {
	node  int32
	ready chan struct{} // closed when file or err is there
	file  readback.File
	err   error
	users int
	turn  *list.Element // in cache.idle; nil while there are users
}

// check hashes a file as its blocks come, in order, as far as they come so.
type check struct {
	next int64
	sum  hash.Hash
}

// cache holds blocks of files, the last used ones, and fetches others.
type cache struct {
	ctx   context.Context
	tree  readback.Tree
	index *index
	limit int // blocks
	log   *slog.Logger

	fetches sync.WaitGroup

	mu     sync.Mutex // guards the fields below
	blocks map[blockKey]*block
	order  *list.List // of *block, the last used first
	open   map[int32]*remote
	idle   *list.List // of *remote, the last used first
	checks map[int32]*check
	wrong  map[int32]bool
}

func newCache(ctx context.Context, tree readback.Tree, x *index, bytes int64, log *slog.Logger) *cache {
	return &cache{
		ctx: ctx, tree: tree, index: x, limit: int(max(bytes/blockSize, 2*maxAhead)), log: log,
		blocks: map[blockKey]*block{}, order: list.New(), open: map[int32]*remote{}, idle: list.New(),
		checks: map[int32]*check{}, wrong: map[int32]bool{},
	}
}

// read fills p from a file at off; a short count means its end. ahead blocks
// behind those are fetched without waiting.
func (c *cache) read(ctx context.Context, at int32, p []byte, off int64, ahead int64) (int, error) {
	size := c.index.nodes[at].size
	if off >= size {
		return 0, nil
	}
	p = p[:min(int64(len(p)), size-off)]
	first, last := off/blockSize, (off+int64(len(p))-1)/blockSize
	end := (size - 1) / blockSize
	wanted := make([]*block, 0, last-first+1)
	c.mu.Lock()
	for n := first; n <= min(last+ahead, end); n++ {
		b := c.want(blockKey{at, n})
		if n <= last {
			wanted = append(wanted, b)
		}
	}
	c.mu.Unlock()
	n := 0
	for _, b := range wanted {
		select {
		case <-b.done:
		case <-ctx.Done():
			return 0, ctx.Err()
		}
		if b.err != nil {
			return 0, b.err
		}
		n += copy(p[n:], b.data[off+int64(n)-b.key.block*blockSize:])
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.wrong[at] {
		return 0, errWrong
	}
	return n, nil
}

// want returns a block, which it asks for if need be. c.mu is held.
func (c *cache) want(key blockKey) *block {
	if b, ok := c.blocks[key]; ok {
		c.order.MoveToFront(b.turn)
		return b
	}
	b := &block{key: key, done: make(chan struct{})}
	b.turn = c.order.PushFront(b)
	c.blocks[key] = b
	for c.order.Len() > c.limit {
		c.drop(c.order.Back().Value.(*block)) // whoever waits for it still has it
	}
	c.fetches.Go(func() { c.fetch(b) })
	return b
}

// drop forgets a block. c.mu is held.
func (c *cache) drop(b *block) {
	if c.blocks[b.key] == b {
		delete(c.blocks, b.key)
		c.order.Remove(b.turn)
	}
}

func (c *cache) fetch(b *block) {
	n := &c.index.nodes[b.key.node]
	off := b.key.block * blockSize
	data := make([]byte, min(blockSize, n.size-off))
	err := c.readAt(b.key.node, data, off)
	c.mu.Lock()
	defer c.mu.Unlock()
	defer close(b.done)
	if err != nil {
		b.err = err
		c.drop(b) // another attempt may succeed
		return
	}
	b.data = data
	c.compare(b)
}

// compare hashes the file on, as far as its blocks are here one after the other,
// and remembers it as wrong if the end shows that it is. c.mu is held.
func (c *cache) compare(last *block) {
	at := last.key.node
	n := &c.index.nodes[at]
	k := c.checks[at]
	if k == nil {
		if last.key.block != 0 {
			return
		}
		for other := range c.checks {
			if len(c.checks) < maxChecks {
				break
			}
			delete(c.checks, other)
		}
		k = &check{sum: manifest.NewHash()}
		c.checks[at] = k
	}
	for {
		b := c.blocks[blockKey{at, k.next}]
		if last.key.block == k.next {
			b = last
		}
		if b == nil || b.data == nil {
			return
		}
		k.sum.Write(b.data)
		k.next++
		if k.next*blockSize < n.size {
			continue
		}
		delete(c.checks, at)
		if manifest.SumOf(k.sum) != n.sum {
			c.wrong[at] = true
			c.log.Error("a file is not what was pushed", "path", c.index.path(at))
		}
		return
	}
}

// readAt reads exactly p.
func (c *cache) readAt(at int32, p []byte, off int64) error {
	r := c.use(at)
	defer c.release(r)
	<-r.ready
	if r.err != nil {
		return r.err
	}
	n, err := r.file.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: it ends after %d bytes", errWrong, off+int64(n))
	}
	return err
}

// use returns a file, opened or being so, and counts a user of it.
func (c *cache) use(at int32) *remote {
	c.mu.Lock()
	r, ok := c.open[at]
	if ok {
		if r.turn != nil {
			c.idle.Remove(r.turn)
			r.turn = nil
		}
		r.users++
		c.mu.Unlock()
		return r
	}
	r = &remote{node: at, ready: make(chan struct{}), users: 1}
	c.open[at] = r
	path := c.index.path(at)
	c.mu.Unlock()
	r.file, r.err = c.tree.File(path)
	close(r.ready)
	return r
}

func (c *cache) release(r *remote) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if r.users--; r.users > 0 {
		return
	}
	if r.err != nil {
		delete(c.open, r.node)
		return
	}
	r.turn = c.idle.PushFront(r)
	for c.idle.Len() > maxIdle {
		old := c.idle.Remove(c.idle.Back()).(*remote)
		delete(c.open, old.node)
		old.file.Close()
	}
}
