package staging

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/pkg/sftp"
)

// names are those that a sequence of operations plays with: few, so that they
// meet, two of them in folders.
var names = []string{"/photos/a", "/photos/b", "/photos/d", "/photos/d/a", "/photos/d/e", "/photos/d/e/f", "/photos/g", "/photos/../photos/a"}

// player carries out a sequence of operations that bytes describe.
type player struct {
	t       *testing.T
	b       *bench
	script  []byte
	clients []*sftp.Client
	open    []*sftp.File
	history witness
	commits int
}

func (p *player) next() byte {
	if len(p.script) == 0 {
		return 0
	}
	n := p.script[0]
	p.script = p.script[1:]
	return n
}

func (p *player) name() string { return names[int(p.next())%len(names)] }

// step does one thing; that it is refused is as good as that it is done.
func (p *player) step() {
	c := p.clients[int(p.next())%len(p.clients)]
	when := time.Unix(int64(p.next())*1e6, 0)
	switch op := p.next() % 20; op {
	case 0, 1, 2, 3:
		flags := []int{
			os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_CREATE, os.O_RDWR | os.O_CREATE | os.O_TRUNC,
			os.O_WRONLY | os.O_CREATE | os.O_TRUNC, os.O_WRONLY | os.O_APPEND, os.O_WRONLY | os.O_CREATE | os.O_EXCL, os.O_RDONLY,
		}[int(p.next())%8]
		if f, err := c.OpenFile(p.name(), flags); err == nil {
			p.open = append(p.open, f)
		}
	case 4, 5, 6:
		if len(p.open) > 0 {
			f := p.open[int(p.next())%len(p.open)]
			f.WriteAt(bytes.Repeat([]byte{p.next()}, int(p.next())), int64(p.next())*16)
		}
	case 7:
		if len(p.open) > 0 {
			f := p.open[int(p.next())%len(p.open)]
			f.Truncate(int64(p.next()) * 8)
		}
	case 8, 9:
		if len(p.open) > 0 {
			i := int(p.next()) % len(p.open)
			p.open[i].Close()
			p.open = append(p.open[:i], p.open[i+1:]...)
		}
	case 10:
		c.Truncate(p.name(), int64(p.next())*8)
	case 11:
		c.Chtimes(p.name(), when, when)
	case 12:
		c.Chmod(p.name(), os.FileMode(p.next())<<1)
	case 13:
		c.Rename(p.name(), p.name())
	case 14:
		c.PosixRename(p.name(), p.name())
	case 15:
		c.Remove(p.name())
	case 16:
		c.Mkdir(p.name())
	case 17:
		c.RemoveDirectory(p.name())
	case 18:
		if op := p.next(); op%4 == 0 {
			c.Link(p.name(), p.name())
		} else {
			c.ReadDir(p.name())
		}
	case 19:
		p.commit()
	}
}

// commit commits one key's copy. Afterwards everything that was ever committed is
// as it was, and the generation is what the clients see.
func (p *player) commit() {
	key := []string{"home", "shed"}[int(p.next())%2]
	name, _, err := p.b.commit(p.t, p.b.peer(key), "photos")
	p.history.look(p.t, p.b)
	switch {
	case err == nil:
		p.commits++
		// After the commit the copy and the generation are the same.
		if diff := cmp.Diff(treeOf(p.t, p.b.generation("photos", name)), treeOf(p.t, p.b.copy("photos", key))); diff != "" {
			p.t.Fatalf("%s's copy is not what was committed: %s", key, diff)
		}
	case !errors.Is(err, ErrWriting) && !errors.Is(err, errNoCopy):
		p.t.Fatalf("commit: %v", err)
	}
}

// FuzzOperations plays sequences of operations of two keys over three connections,
// with commits between them: no committed file ever changes its inode, content,
// mode, time or size, every commit that is taken is what the clients see, and what
// is remembered of a copy is what lies on the disk.
func FuzzOperations(f *testing.F) {
	f.Add([]byte{})
	// Open without truncation, commit (refused), write, close, commit.
	f.Add([]byte{0, 0, 0, 0, 0, 0, 0, 19, 0, 0, 0, 4, 0, 'x', 200, 0, 0, 0, 8, 0, 0, 0, 19, 0, 0, 0, 19, 1})
	// Two handles, rename over it, write to both, close, commit, truncate, commit.
	f.Add([]byte{0, 0, 0, 1, 0, 1, 0, 0, 1, 0, 2, 0, 14, 1, 0, 0, 0, 4, 0, 'a', 9, 0, 0, 0, 4, 1, 'b', 9, 1, 0, 0, 8, 0, 0, 0, 8, 0, 0, 0, 19, 0, 0, 0, 10, 0, 1, 0, 0, 19, 0})
	// Every operation once, for either key.
	var all []byte
	for op := range byte(20) {
		all = append(all, op%3, op, op, op*7, op, op*3, op+1)
	}
	f.Add(all)
	f.Add(bytes.Repeat([]byte{1, 9, 12, 0, 77, 2, 3, 11, 3, 0, 8, 19, 1}, 8))
	disk := tmpfs(f, "256m")
	f.Fuzz(func(t *testing.T, script []byte) { play(t, disk, script[:min(len(script), 600)]) })
}

// TestOperations plays long sequences of operations, each named by its seed.
func TestOperations(t *testing.T) {
	disk := tmpfs(t, "256m")
	commits := 0
	for seed := range uint64(40) {
		script := make([]byte, 1500)
		rand.NewChaCha8([32]byte{byte(seed)}).Read(script)
		commits += play(t, disk, script)
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
	t.Logf("%d commits between the operations", commits)
	if commits < 100 {
		t.Error("these sequences try too few commits")
	}
}

// play plays a sequence on a disk of its own, and returns how many commits it
// had.
func play(t *testing.T, disk string, script []byte) (commits int) {
	dir, err := os.MkdirTemp(disk, "")
	must(t, err)
	defer os.RemoveAll(dir)
	b := openBench(t, dir)
	p := &player{t: t, b: b, script: script, history: witness{}}
	var hangUps []func()
	for _, key := range []string{"home", "home", "shed"} {
		c, hangUp := b.client(t, b.peer(key))
		p.clients, hangUps = append(p.clients, c), append(hangUps, hangUp)
	}
	put(t, p.clients[0], "/photos/a", "the first")
	put(t, p.clients[0], "/photos/b", "the first")
	put(t, p.clients[0], "/photos/d/a", "deep")
	b.mustCommit(t, b.peer("home"), "photos")
	p.history.look(t, b)
	if _, err := p.clients[2].ReadDir("/photos"); err != nil {
		t.Fatal(err)
	}
	for len(p.script) > 0 {
		p.step()
	}
	p.history.look(t, b)
	for _, hangUp := range hangUps {
		hangUp()
	}
	for _, key := range []string{"home", "shed"} {
		b.accounts(t, "photos", key)
		b.mustCommit(t, b.peer(key), "photos")
		p.history.look(t, b)
		b.accounts(t, "photos", key)
	}
	return p.commits
}

// recorder keeps what a client sends.
type recorder struct {
	net.Conn
	sent bytes.Buffer
}

func (r *recorder) Write(p []byte) (int, error) {
	r.sent.Write(p)
	return r.Conn.Write(p)
}

// record plays a real client's session and returns its bytes.
func record(f *testing.F, play func(c *sftp.Client)) []byte {
	f.Helper()
	b := openBench(f, f.TempDir())
	ours, theirs := net.Pipe()
	done := make(chan error, 1)
	go func() { done <- b.area.Serve(f.Context(), b.peer("home"), theirs) }()
	r := &recorder{Conn: ours}
	c, err := sftp.NewClientPipe(ours, r)
	must(f, err)
	play(c)
	ours.Close()
	c.Close()
	must(f, <-done)
	return r.sent.Bytes()
}

// FuzzPackets sends raw bytes as SFTP packets: nothing panics, the session ends,
// and history is as it was.
func FuzzPackets(f *testing.F) {
	f.Add(record(f, func(c *sftp.Client) {
		c.MkdirAll("/photos/d")
		if w, err := c.Create("/photos/d/a"); err == nil {
			w.Write([]byte("text"))
			w.Stat()
			w.Chmod(0o600)
			w.Truncate(2)
			w.Close()
		}
		c.PosixRename("/photos/d/a", "/photos/b")
		c.Chtimes("/photos/b", time.Unix(1, 0), time.Unix(1, 0))
		c.StatVFS("/photos")
		c.ReadDir("/photos")
		c.Symlink("a", "/photos/l")
		c.Remove("/photos/b")
	}))
	f.Add([]byte{0, 0, 0, 5, 1, 0, 0, 0, 3})
	f.Add([]byte{255, 255, 255, 255})
	f.Add([]byte{0, 0, 0, 1, 3})
	// An open whose attributes are cut off, a setstat with flags and no attributes.
	open := func(kind byte, rest ...byte) []byte {
		body := append([]byte{kind, 0, 0, 0, 1, 0, 0, 0, 9}, "/photos/a"...)
		body = append(body, rest...)
		return append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...)
	}
	f.Add(open(3, 0, 0, 0, 0x1a, 0, 0, 0, 4))
	f.Add(open(9, 255, 255, 255, 255))
	f.Add(append(open(3, 0, 0, 0, 0x0a, 0, 0, 0, 0), 0, 0, 0, 26, 6, 0, 0, 0, 2, 0, 0, 0, 1, '2', 255, 255, 255, 255, 255, 255, 255, 255, 0, 0, 0, 3, 'a', 'b', 'c'))
	// One store for all: what they leave in the copy is part of the next one's world.
	b := openBench(f, tmpfs(f, "256m"))
	c, hangUp := b.client(f, b.peer("home"))
	put(f, c, "/photos/a", "committed")
	b.mustCommit(f, b.peer("home"), "photos")
	hangUp()
	history := witness{}
	history.look(f, b)
	f.Fuzz(func(t *testing.T, data []byte) {
		ours, theirs := net.Pipe()
		done := make(chan error, 1)
		go func() { done <- b.area.Serve(t.Context(), b.peer("home"), theirs) }()
		go io.Copy(io.Discard, ours)
		ours.Write(data)
		ours.Close()
		<-done
		history.look(t, b)
		b.area.mu.Lock()
		for _, tr := range b.area.trees {
			if tr.users != 0 || tr.writers != 0 {
				t.Errorf("%d users and %d writers are left", tr.users, tr.writers)
			}
		}
		b.area.mu.Unlock()
		if size := sizeOf(t, filepath.Join(b.dir, Folder)); size > 1<<20 {
			os.RemoveAll(filepath.Join(b.dir, Folder)) // a fresh world, now and then
			b.area = New(b.dir, b.store, b.area.log)
		}
	})
}

func sizeOf(t *testing.T, dir string) (bytes int64) {
	for _, text := range treeOf(t, dir) {
		bytes += int64(len(text))
	}
	return bytes
}
