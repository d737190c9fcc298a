package main

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"farkeep/pusher/appliance"
	"farkeep/shared/linetest"
	"farkeep/shared/sshverb"
)

// crossings is a line that goes by rounds: what both sides sent crosses when neither
// has more to send, all at once. The rounds of a conversation are how often
// somebody had to wait for a crossing, so two are a round trip; they do not depend
// on any delay. TCP's own handshake is not in them.
type crossings struct {
	// quiet is how long neither side has sent anything when it has no more to send. A
	// side that is slower makes a crossing more.
	quiet time.Duration

	mu    sync.Mutex
	since time.Time // when something was last sent
	ends  []*end
	count int
	bytes [2]int // up, down
}

// end is one direction of one connection.
type end struct {
	to      net.Conn
	up      bool
	waiting []byte
	over    bool // nothing more comes
}

func (r *crossings) dial(ctx context.Context, network, address string) (net.Conn, error) {
	far, err := (&net.Dialer{}).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	near, client := net.Pipe()
	var ways sync.WaitGroup
	for _, e := range []struct {
		from net.Conn
		end  *end
	}{{near, &end{to: far, up: true}}, {far, &end{to: near}}} {
		r.mu.Lock()
		r.ends = append(r.ends, e.end)
		r.mu.Unlock()
		ways.Go(func() { r.collect(e.from, e.end) })
	}
	over := make(chan bool)
	go func() { ways.Wait(); close(over) }()
	go r.cross(over)
	return client, nil
}

func (r *crossings) collect(from net.Conn, e *end) {
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		r.mu.Lock()
		e.waiting = append(e.waiting, buf[:n]...)
		r.since = time.Now()
		e.over = err != nil
		r.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// cross lets what is waiting cross whenever it is quiet.
func (r *crossings) cross(over <-chan bool) {
	tick := time.NewTicker(r.quiet / 8)
	defer tick.Stop()
	for {
		select {
		case <-over:
			return
		case <-tick.C:
		}
		r.mu.Lock()
		var going [][]byte
		var to []net.Conn
		if time.Since(r.since) >= r.quiet {
			for _, e := range r.ends {
				if len(e.waiting) > 0 {
					going, to = append(going, e.waiting), append(to, e.to)
					if e.up {
						r.bytes[0] += len(e.waiting)
					} else {
						r.bytes[1] += len(e.waiting)
					}
					e.waiting = nil
				} else if e.over {
					e.to.Close()
				}
			}
		}
		if len(going) > 0 {
			r.count++
		}
		r.mu.Unlock()
		for i, p := range going {
			to[i].Write(p) // fails where the other side is gone
		}
	}
}

// What a push waits for is counted, not timed: round trips beyond the connection's
// own, and bytes.
func TestRoundTripsOfAPush(t *testing.T) {
	a := startAppliance(t, benchDir(t), program(t), "256m")
	// A busy machine may make more of them: the best of some tries counts, each with
	// more patience than the one before.
	least := func(what string, most int, f func(r *crossings) *crossings) *crossings {
		t.Helper()
		var best *crossings
		for patience := 40 * time.Millisecond; patience < 3*time.Second; patience = patience * 3 / 2 {
			if r := f(&crossings{quiet: patience}); best == nil || r.count < best.count {
				best = r
			}
			if best.count <= most {
				break
			}
		}
		t.Logf("%s: %d crossings, %d bytes up, %d down", what, best.count, best.bytes[0], best.bytes[1])
		if best.count > most {
			t.Errorf("%s: %d crossings, want %d", what, best.count, most)
		}
		return best
	}
	through := func(r *crossings, do func(to *appliance.Appliance)) *crossings {
		to := appliance.New(appliance.Config{
			Name: "attic", Address: a.address(), HostKey: a.pinned(t), Identity: a.identity(t),
			WakeWait: 20 * time.Second, Log: slog.New(slog.DiscardHandler), DialContext: r.dial,
		})
		do(to)
		to.Close()
		return r
	}
	// What a connection costs that asks for nothing: versions, keys, service, and three
	// for a login that begins without a key and shows one before it signs.
	bare := least("a connection", 12, func(r *crossings) *crossings {
		c, err := sshverb.Dial(t.Context(), sshverb.Peer{Address: a.address(), User: "farkeep", Identity: a.identity(t), HostKey: a.pinned(t), DialContext: r.dial})
		must(t, err)
		c.Close()
		return r
	})

	var beyond []int
	for i, n := range []int{3, 3000} {
		h := newHome(t, nil)
		files := map[string]string{}
		for f := range n {
			files[fmt.Sprintf("%04d", f)] = fmt.Sprint("content of ", f)
		}
		h.write(files)
		changed := 0
		// The session, the offer with the manifest, the upload with commit and heartbeat.
		least(fmt.Sprintf("a push of %d files", n), bare.count+2*3+2*i, func(r *crossings) *crossings {
			changed++
			h.write(map[string]string{"0001": fmt.Sprint("changed, ", changed)})
			return through(r, func(to *appliance.Appliance) { h.to = to; h.push() })
		})
		// The session, the offer, the heartbeat.
		unchanged := least(fmt.Sprintf("%d unchanged files", n), bare.count+2*3, func(r *crossings) *crossings {
			return through(r, func(to *appliance.Appliance) {
				h.to = to
				if o := h.push(); o.New {
					t.Error("what is unchanged made a generation")
				}
			})
		})
		beyond = append(beyond, unchanged.bytes[0]+unchanged.bytes[1]-bare.bytes[0]-bare.bytes[1])
	}
	t.Logf("an unchanged repository: %v bytes beyond those of a connection", beyond)
	for _, n := range beyond {
		if n > 2000 || n > beyond[0]+100 {
			t.Errorf("%v bytes for an unchanged repository of 3 and of 3000 files; want less than 2 KB, and the same", beyond)
		}
	}

	// Five windows of new files take no more round trips than one: they go over five
	// channels, which were opened beside the offer.
	h, tries := newHome(t, nil), 0
	least("a push of 10 MB in 500 new files", bare.count+2*3, func(r *crossings) *crossings {
		tries++
		files := map[string]string{}
		for f := range 500 {
			files[fmt.Sprintf("%04d", f)] = noise(uint64(500*tries+f), 20_000)
		}
		h.write(files)
		return through(r, func(to *appliance.Appliance) { h.to = to; h.push() })
	})
}

// However often the line is cut, little crosses it twice: what was in the windows and
// on its way to the disk, and the beginning of one file that is not long enough to be
// resumed.
func TestCutsCostLittleOverSSH(t *testing.T) {
	a := startAppliance(t, benchDir(t), program(t), "256m")
	t.Run("near, by one channel", func(t *testing.T) {
		cutsCostLittle(t, a, "near", &line{}, 1)
	})
	t.Run("20 ms away, by several", func(t *testing.T) {
		far := linetest.Start(t, a.address(), linetest.Line{Delay: 10 * time.Millisecond})
		cutsCostLittle(t, a, "far", &line{by: far.Addr()}, 5)
	})
}

func cutsCostLittle(t *testing.T, a *benchAppliance, repository string, l *line, channels int64) {
	to := a.client(t, l)
	must(t, to.Wake(t.Context()))
	s := source{}
	size := int64(0)
	r := rand.New(rand.NewPCG(3, 4))
	for i := range 60 { // from some bytes to 12 MiB
		n := 1 + r.IntN(1<<(8+r.IntN(16)))
		s[fmt.Sprintf("%02d", i)] = noise(uint64(i), n)
		size += int64(n)
	}
	const cuts = 8
	begun := l.sent.Load()
	for n := 0; ; n++ {
		answer, err := s.offer(t, to, repository)
		must(t, err)
		l.cutAfter.Store(0)
		if n < cuts && answer.NeedBytes > 1 {
			l.cutAfter.Store(l.sent.Load() + 1 + r.Int64N(answer.NeedBytes*2/3))
		}
		_, err = s.upload(t, to, answer)
		if err != nil {
			l.cutAfter.Store(0)
			continue
		}
		c, err := to.Commit(t.Context(), answer.Push)
		must(t, err)
		s.lies(t, a, repository, c.Generation)
		sent := l.sent.Load() - begun
		twice := sent - size
		t.Logf("%d bytes, cut %d times: %d bytes crossed twice, %d for each cut", size, n, twice, twice/int64(max(n, 1)))
		// The windows of 2 MiB, what the kernel and the receiver hold, and 4 MiB of a file.
		if most := int64(n)*(6<<20+channels*(2<<20)) + size/50; n < cuts/2 || twice > most {
			t.Errorf("%d cuts cost %d bytes, want %d at most", n, twice, most)
		}
		return
	}
}

// The rate limit holds on the line, SSH's own bytes included: they are less than a
// hundredth.
func TestRateLimitOnTheLine(t *testing.T) {
	const rate, size = 1_500_000, 4 << 20
	a := startAppliance(t, benchDir(t), program(t), "64m")
	l := &line{}
	h := newHome(t, a.client(t, l))
	h.rate = func(string, time.Time) int64 { return rate }
	h.write(map[string]string{"noise": noise(1, size)})
	begun := time.Now()
	o := h.push()
	took := time.Since(begun)
	up := l.sent.Load()
	t.Logf("%d bytes for %d of content in %v: %.1f %% of the limit", up, o.Bytes, took, 100*float64(up)/took.Seconds()/rate)
	if o.Bytes != size || up > size+size/100+8<<10 {
		t.Errorf("%d bytes crossed for %d of content", up, o.Bytes)
	}
	// A tenth of a second may be made up for.
	if least := size*time.Second/rate - 150*time.Millisecond; took < least {
		t.Errorf("%d bytes took %v, and may not take less than %v", size, took, least)
	}
}

// BenchmarkFarLine says how much of a long, wide line one upload fills: 100 Mbit/s
// and 150 ms there and back, by way of linetest.
func BenchmarkFarLine(b *testing.B) {
	const rate = 12_500_000
	a := startAppliance(b, benchDir(b), program(b), "3g")
	p := linetest.Start(b, fmt.Sprintf("127.0.0.1:%d", a.port), linetest.Line{Delay: 75 * time.Millisecond, Up: rate, Down: rate})
	to := a.through(b, p.Addr())
	n, least, all, sent := 0, 100.0, 0.0, int64(0)
	for b.Loop() {
		n++
		s := source{"noise": noise(uint64(n), 64<<20)}
		answer, err := s.offer(b, to, fmt.Sprint("far-", n))
		must(b, err)
		p.Reset()
		begun := time.Now()
		_, err = s.upload(b, to, answer)
		must(b, err)
		took := time.Since(begun)
		up, _ := p.Sent()
		share := 100 * float64(64<<20) / took.Seconds() / rate
		least, all, sent = min(least, share), all+share, sent+up
	}
	b.ReportMetric(all/float64(n), "%-of-the-line")
	b.ReportMetric(least, "%-at-least")
	b.ReportMetric(100*float64(sent)/float64(n*64<<20)-100, "%-overhead")
	b.ReportMetric(0, "ns/op")
}

// through is the pusher's view of the appliance at another address.
func (a *benchAppliance) through(tb testing.TB, address string) *appliance.Appliance {
	tb.Helper()
	to := appliance.New(appliance.Config{
		Name: "attic", Address: address, HostKey: a.pinned(tb), Identity: a.identity(tb),
		WakeWait: 20 * time.Second, Log: slog.New(slog.DiscardHandler),
	})
	tb.Cleanup(func() { to.Close() })
	return to
}
