package linetest

import (
	"bytes"
	"errors"
	"io"
	"net"
	"testing"
	"time"
)

// What is never too soon or too much is asserted of every try. That it is not too
// late or too little is asserted of the best of many: other work on the machine
// can only make it worse.
const tries = 40

// server answers connections with f, and returns its address.
func server(t *testing.T, f func(c *net.TCPConn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				f(c.(*net.TCPConn))
			}()
		}
	}()
	return l.Addr().String()
}

func echo(c *net.TCPConn)    { io.Copy(c, c) }
func discard(c *net.TCPConn) { io.Copy(io.Discard, c); c.Write([]byte("!")) }

func dial(t *testing.T, p *Proxy) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", p.Addr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	return c.(*net.TCPConn)
}

// exchange sends p and reads as much back.
func exchange(t *testing.T, c net.Conn, p []byte) []byte {
	t.Helper()
	if _, err := c.Write(p); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(p))
	if _, err := io.ReadFull(c, got); err != nil {
		t.Fatal(err)
	}
	return got
}

// best asserts that nothing takes less than least, and that something takes no
// more than most.
func best(t *testing.T, what string, least, most time.Duration, f func()) {
	t.Helper()
	quickest := time.Hour
	for range tries {
		begun := time.Now()
		f()
		took := time.Since(begun)
		if took < least {
			t.Fatalf("%s took %v, and cannot take less than %v", what, took, least)
		}
		if quickest = min(quickest, took); quickest <= most {
			return
		}
	}
	t.Errorf("%s took %v at best, and should take %v", what, quickest, least)
}

func TestDelay(t *testing.T) {
	const delay = 20 * time.Millisecond
	for _, rate := range []int64{0, 2_500_000} {
		p := Start(t, server(t, echo), Line{Delay: delay, Up: rate, Down: rate})
		c := dial(t, p)
		exchange(t, c, []byte("open"))
		best(t, "a round trip", 2*delay, 2*delay+2*time.Millisecond, func() { exchange(t, c, []byte("x")) })
	}
}

// A connection costs a round trip before the first byte, and so does the first
// exchange. A server who speaks first is heard after two.
func TestHandshake(t *testing.T) {
	const delay = 10 * time.Millisecond
	p := Start(t, server(t, echo), Line{Delay: delay})
	best(t, "connecting, and one exchange", 4*delay, 4*delay+4*time.Millisecond, func() { exchange(t, dial(t, p), []byte("x")) })
	p = Start(t, server(t, func(c *net.TCPConn) { c.Write([]byte("SSH")) }), Line{Delay: delay})
	best(t, "a greeting", 4*delay, 4*delay+4*time.Millisecond, func() {
		if got, err := io.ReadAll(dial(t, p)); err != nil || string(got) != "SSH" {
			t.Fatalf("%q, %v", got, err)
		}
	})
}

func TestRate(t *testing.T) {
	for _, tt := range []struct {
		name string
		line Line
		rate float64 // of an upload
	}{
		{"20 Mbit/s", Line{Up: 2_500_000}, 2_500_000},
		{"100 Mbit/s", Line{Up: 12_500_000}, 12_500_000},
		{"100 Mbit/s, 10 ms", Line{Up: 12_500_000, Down: 12_500_000, Delay: 5 * time.Millisecond}, 12_500_000},
		{"slow answers", Line{Up: 5_000_000, Down: 1_000}, 5_000_000},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := Start(t, server(t, discard), tt.line)
			data := make([]byte, int(tt.rate/4))
			line := time.Duration(float64(len(data)) / tt.rate * float64(time.Second))
			// The handshake, the last byte's way and the answer's.
			around := 4 * tt.line.Delay
			best(t, "an upload", line+around, line+around+line*3/100+2*time.Millisecond, func() {
				c := dial(t, p)
				if _, err := c.Write(data); err != nil {
					t.Fatal(err)
				}
				c.CloseWrite()
				if got, err := io.ReadAll(c); err != nil || string(got) != "!" {
					t.Fatalf("%q, %v", got, err)
				}
			})
		})
	}
}

// Connections share the line: two take as long as one that sends as much.
func TestShared(t *testing.T) {
	t.Parallel()
	const rate = 5_000_000
	p := Start(t, server(t, func(c *net.TCPConn) {
		c.Write(make([]byte, rate/10))
	}), Line{Down: rate})
	best(t, "two downloads", time.Second/5, time.Second/5+10*time.Millisecond, func() {
		got := make(chan int64, 2)
		for range 2 {
			c := dial(t, p)
			go func() {
				n, _ := io.Copy(io.Discard, c)
				got <- n
			}()
		}
		if a, b := <-got, <-got; a+b != rate/5 {
			t.Fatalf("%d and %d bytes arrived", a, b)
		}
	})
}

// Who waits for an answer after each 100 kB gets 100 kB in a round trip, whatever
// the line could carry; who has twice the line's content under way fills it.
func TestWindow(t *testing.T) {
	t.Parallel()
	const (
		rate  = 12_500_000
		delay = 25 * time.Millisecond
		long  = 2 * rate / 20 // twice what a round trip holds
	)
	p := Start(t, server(t, echo), Line{Delay: delay, Up: rate})
	c := dial(t, p)
	exchange(t, c, []byte("open"))
	message := make([]byte, 100_000)
	line := time.Duration(float64(len(message)) / rate * float64(time.Second))
	// The echo may begin with the first bytes, but ends after the last.
	best(t, "100 kB and their echo", line+2*delay, line+2*delay+4*time.Millisecond, func() { exchange(t, c, message) })

	// The first echoes come after a round trip; from then on one piece goes out for
	// each that comes back.
	const pieces = 20
	piece := make([]byte, long/10)
	line = time.Duration(float64(pieces*len(piece)) / rate * float64(time.Second))
	best(t, "a full line", line, line+2*delay+line*3/100+4*time.Millisecond, func() {
		credit := make(chan bool, pieces)
		for range 10 {
			credit <- true
		}
		failed := make(chan error, 1)
		go func() {
			for range pieces {
				<-credit
				if _, err := c.Write(piece); err != nil {
					failed <- err
					return
				}
			}
			failed <- nil
		}()
		echoed := make([]byte, len(piece))
		for range pieces {
			if _, err := io.ReadFull(c, echoed); err != nil {
				t.Fatal(err)
			}
			credit <- true
		}
		if err := <-failed; err != nil {
			t.Fatal(err)
		}
	})
}

func TestSent(t *testing.T) {
	for _, line := range []Line{{}, {Up: 1 << 30, Down: 1 << 30}, {Delay: time.Millisecond}} {
		p := Start(t, server(t, func(c *net.TCPConn) {
			got, _ := io.ReadAll(c)
			c.Write(got[:len(got)/2])
		}), line)
		content := bytes.Repeat([]byte("0123456789"), 100_000)
		for range 3 {
			c := dial(t, p)
			if _, err := c.Write(content); err != nil {
				t.Fatal(err)
			}
			c.CloseWrite() // and the other direction stays open
			if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, content[:len(content)/2]) {
				t.Fatalf("%d bytes came back, %v", len(got), err)
			}
		}
		if up, down := p.Sent(); up != 3_000_000 || down != 1_500_000 {
			t.Errorf("%+v: %d up, %d down", line, up, down)
		}
		p.Reset()
		if up, down := p.Sent(); up != 0 || down != 0 {
			t.Errorf("%+v: %d up, %d down after a reset", line, up, down)
		}
	}
}

// A server that reads nothing stops its client.
func TestBounded(t *testing.T) {
	stuck := make(chan bool)
	p := Start(t, server(t, func(c *net.TCPConn) { <-stuck }), Line{Delay: time.Millisecond, Up: 500_000_000})
	t.Cleanup(func() { close(stuck) })
	c := dial(t, p)
	// The kernel's own buffers hold some megabytes too.
	c.SetWriteDeadline(time.Now().Add(time.Second))
	n, err := c.Write(make([]byte, 256<<20))
	if !errors.Is(err, net.ErrClosed) && !isTimeout(err) {
		t.Errorf("writing ended with %v", err)
	}
	if n > 64<<20 {
		t.Errorf("%d bytes are under way to a server that reads none", n)
	}
}

func isTimeout(err error) bool {
	var e net.Error
	return errors.As(err, &e) && e.Timeout()
}

// What ends a connection on one side ends it on the other.
func TestEnds(t *testing.T) {
	for _, line := range []Line{{}, {Delay: time.Millisecond, Up: 1 << 30, Down: 1 << 30}} {
		ended := make(chan error, 1)
		p := Start(t, server(t, func(c *net.TCPConn) {
			_, err := io.Copy(io.Discard, c)
			ended <- err
		}), line)
		c := dial(t, p)
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		c.SetLinger(0) // a reset
		c.Close()
		<-ended

		p = Start(t, server(t, func(c *net.TCPConn) {
			io.ReadFull(c, make([]byte, 1))
			c.SetLinger(0)
		}), line)
		c = dial(t, p)
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if n, err := io.Copy(io.Discard, c); n != 0 || isTimeout(err) {
			t.Errorf("the server is gone: %d bytes, %v", n, err)
		}
	}

	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	c := dial(t, Start(t, l.Addr().String(), Line{Delay: time.Millisecond}))
	if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil || isTimeout(err) {
		t.Errorf("nobody listens: %d bytes, %v", n, err)
	}
}
