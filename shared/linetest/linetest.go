// Package linetest is a home's line for tests: a TCP proxy on the loopback
// interface, behind which a server is as far away, and as slow to reach, as a test
// wants it. It counts what crosses.
//
// It guarantees:
//   - a byte arrives no sooner than Delay after it was sent, and a connection
//     opens no sooner than TCP's handshake would have crossed the line;
//   - each direction carries its rate and no more, whatever the number of
//     connections: there is one queue in front of it, of 50 ms of its rate;
//   - as much is under way as the line holds, rate times delay; a sender who waits
//     for answers is as slow as on a real line, and one who does not fills it;
//   - a receiver who does not read stops the sender, after a bounded number of bytes.
//
// It does not emulate loss, jitter, or what TCP makes of a line: its slow start,
// congestion control and windows. Each of the two hops is the loopback interface's
// own TCP, which has none of these to speak of, so everyone fares better than on a
// real line, and with several connections no better than with one. Headers of TCP
// and IP are neither counted nor do they take time: on a real line they are 3 to 5 %.
package linetest

import (
	"bytes"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Line says what is between client and server. The zero value counts, and is in
// nobody's way.
type Line struct {
	// Delay is what a byte takes one way. A round trip is twice that.
	Delay time.Duration
	// Up and Down are bytes per second, from client to server and back; 0: as
	// quick as the machine.
	Up, Down int64
}

const (
	// queue is how much of a line's time may wait in front of it. It is longer than
	// the pauses that the scheduler of a busy machine makes us, or the line would
	// stand idle in them.
	queue = 50 * time.Millisecond
	// window is what a connection may have read of its sender beyond what the line
	// holds, when its receiver does not read.
	window = 1 << 20
	// loose is window for a line without a rate: 850 MB/s at 75 ms.
	loose = 64 << 20
	// pieceMax is the most that is read at once, and pieceMin the least that is
	// asked for.
	pieceMax, pieceMin = 64 << 10, 512
)

// Proxy is a line to one server. Its methods may be called at any time.
type Proxy struct {
	listener net.Listener
	target   string
	delay    time.Duration
	up, down direction

	mu     sync.Mutex
	open   map[net.Conn]bool // nil after the end
	active sync.WaitGroup
}

// Start opens a line to target, a TCP address. The test's end closes it, and every
// connection through it.
func Start(t testing.TB, target string, line Line) *Proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &Proxy{
		listener: l, target: target, delay: line.Delay, open: map[net.Conn]bool{},
		up: direction{rate: line.Up, delay: line.Delay}, down: direction{rate: line.Down, delay: line.Delay},
	}
	p.active.Go(p.accept)
	t.Cleanup(p.close)
	return p
}

// Addr is where clients find the server, as host:port.
func (p *Proxy) Addr() string { return p.listener.Addr().String() }

// Sent is how many bytes were put on the line since Start or the last Reset: the
// payload of TCP, of all connections. It is complete once they have ended.
func (p *Proxy) Sent() (up, down int64) { return p.up.sent.Load(), p.down.sent.Load() }

// Reset makes Sent count from zero.
func (p *Proxy) Reset() {
	p.up.sent.Store(0)
	p.down.sent.Store(0)
}

func (p *Proxy) accept() {
	for {
		c, err := p.listener.Accept()
		if err != nil {
			return // closed
		}
		if p.keep(c) {
			p.active.Go(func() { p.serve(c.(*net.TCPConn)) })
		}
	}
}

// keep has close end the connection; false if that has been called.
func (p *Proxy) keep(c net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.open == nil {
		c.Close()
		return false
	}
	p.open[c] = true
	return true
}

func (p *Proxy) drop(c net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.open, c)
	c.Close()
}

func (p *Proxy) close() {
	p.listener.Close()
	p.mu.Lock()
	for c := range p.open {
		c.Close()
	}
	p.open = nil
	p.mu.Unlock()
	p.active.Wait()
}

// serve carries one connection. The client's kernel has said "connected" already;
// on a line it would have after a round trip, and the server would know after one
// and a half.
func (p *Proxy) serve(client *net.TCPConn) {
	defer p.drop(client)
	begun := time.Now()
	sleep(begun.Add(2 * p.delay))
	var up, down flight
	var ways sync.WaitGroup
	defer ways.Wait()
	if !p.up.plain() {
		ways.Go(func() { p.up.load(client, &up) })
	}
	sleep(begun.Add(3 * p.delay))
	c, err := net.Dial("tcp", p.target)
	if err != nil || !p.keep(c) {
		up.fail()
		client.SetLinger(0) // a refusal, as the server's would be
		client.Close()
		return
	}
	defer p.drop(c)
	server := c.(*net.TCPConn)
	way := func(d *direction, from, to *net.TCPConn, f *flight) {
		if d.plain() {
			ways.Go(func() { d.splice(from, to) })
			return
		}
		if d == &p.down {
			ways.Go(func() { d.load(from, f) })
		}
		ways.Go(func() {
			if err := f.deliver(to); err != nil {
				from.Close()
			}
		})
	}
	way(&p.up, client, server, &up)
	way(&p.down, server, client, &down)
	ways.Wait()
}

// direction is one way of the line, which all connections share.
type direction struct {
	rate  int64
	delay time.Duration
	sent  atomic.Int64

	mu   sync.Mutex
	free time.Time // when all that was put on the line has left
}

// plain says that there is nothing to wait for.
func (d *direction) plain() bool { return d.rate == 0 && d.delay == 0 }

// splice moves bytes without looking at them, in the kernel (splice(2), by way of
// net.TCPConn.ReadFrom): the proxy shall take little of the processors on which
// programs are compared.
func (d *direction) splice(from, to *net.TCPConn) {
	for {
		n, err := io.CopyN(to, from, pieceMax)
		d.sent.Add(n)
		switch {
		case errors.Is(err, io.EOF):
			to.CloseWrite()
			return
		case err != nil:
			from.Close()
			to.Close()
			return
		}
	}
}

// piece is how much is read at once: a millisecond of the line, so that nothing
// waits long for what was read with it.
func (d *direction) piece() int {
	if d.rate == 0 {
		return pieceMax
	}
	return int(min(max(d.rate/1000, pieceMin), pieceMax))
}

// hold is how many bytes one connection may have under way.
func (d *direction) hold() int {
	if d.rate == 0 {
		return loose
	}
	return window + int(d.delay.Seconds()*float64(d.rate))
}

// put sends n bytes, and returns when the last of them arrives.
func (d *direction) put(n int) time.Time {
	d.sent.Add(int64(n))
	now := time.Now()
	if d.rate == 0 {
		return now.Add(d.delay)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.free.Before(now) {
		d.free = now
	}
	d.free = d.free.Add(time.Duration(float64(n) / float64(d.rate) * float64(time.Second)))
	return d.free.Add(d.delay)
}

// room waits until the queue has room.
func (d *direction) room() {
	if d.rate == 0 {
		return
	}
	for {
		d.mu.Lock()
		at := d.free.Add(-queue)
		d.mu.Unlock()
		if !time.Now().Before(at) {
			return
		}
		sleep(at)
	}
}

// load puts on the line what from sends, until it ends.
func (d *direction) load(from *net.TCPConn, f *flight) {
	size, hold := d.piece(), d.hold()
	if d.rate != 0 {
		// What waits in the kernel is one more queue. It must not be a long one, or a
		// keystroke after a megabyte would wait for that megabyte.
		from.SetReadBuffer(256 << 10)
	}
	buf := make([]byte, size)
	for {
		d.room()
		n, err := from.Read(buf)
		if n > 0 && !f.add(piece{data: bytes.Clone(buf[:n]), due: d.put(n)}, hold) {
			return
		}
		if err != nil {
			f.add(piece{due: d.put(0), end: err}, hold)
			return
		}
	}
}

// A piece of a connection's stream is under way until due. The last one has no
// bytes but the reason for the end.
type piece struct {
	data []byte
	due  time.Time
	end  error
}

// flight is what of one connection is under way in one direction. The zero value is
// ready.
type flight struct {
	mu     sync.Mutex
	change sync.Cond
	pieces []piece
	bytes  int
	broken bool // nobody delivers any more
}

func (f *flight) lock() {
	f.mu.Lock()
	f.change.L = &f.mu
}

// add waits until there is room for the piece; false if it will not arrive.
func (f *flight) add(p piece, hold int) bool {
	f.lock()
	defer f.mu.Unlock()
	for f.bytes+len(p.data) > hold && !f.broken {
		f.change.Wait()
	}
	if f.broken {
		return false
	}
	f.pieces = append(f.pieces, p)
	f.bytes += len(p.data)
	f.change.Broadcast()
	return true
}

func (f *flight) next() piece {
	f.lock()
	defer f.mu.Unlock()
	for len(f.pieces) == 0 {
		f.change.Wait()
	}
	p := f.pieces[0]
	f.pieces = f.pieces[1:]
	return p
}

func (f *flight) done(n int) {
	f.lock()
	defer f.mu.Unlock()
	f.bytes -= n
	f.change.Broadcast()
}

func (f *flight) fail() {
	f.lock()
	defer f.mu.Unlock()
	f.broken = true
	f.change.Broadcast()
}

// deliver writes what arrives, when it arrives.
func (f *flight) deliver(to *net.TCPConn) error {
	for {
		p := f.next()
		sleep(p.due)
		if errors.Is(p.end, io.EOF) {
			return to.CloseWrite()
		}
		err := p.end
		if err == nil {
			_, err = to.Write(p.data)
		}
		if err != nil {
			f.fail()
			to.Close()
			return err
		}
		f.done(len(p.data))
	}
}

// sleep waits as exactly as the kernel can. Timers of Go are a millisecond late
// where the network is polled, which is 5 % of a short line's delay.
func sleep(until time.Time) {
	for d := time.Until(until); d > 0; d = time.Until(until) {
		left := unix.NsecToTimespec(int64(d))
		// Go's own signals end it early.
		_ = unix.ClockNanosleep(unix.CLOCK_MONOTONIC, 0, &left, nil)
	}
}
