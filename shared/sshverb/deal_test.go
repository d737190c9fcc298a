package sshverb

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"testing"
	"testing/iotest"
)

// channel is a lane that keeps what it carries.
type channel struct {
	bytes.Buffer
	ended bool
	room  int // fails when it is used up; 0: never
}

func (c *channel) Write(p []byte) (int, error) {
	if c.room > 0 && c.Len()+len(p) > c.room {
		return 0, io.ErrClosedPipe
	}
	return c.Buffer.Write(p)
}

func (c *channel) CloseWrite() error {
	c.ended = true
	return nil
}

func channels(n int) (all []*channel, lanes []lane) {
	for range n {
		c := &channel{}
		all, lanes = append(all, c), append(lanes, c)
	}
	return all, lanes
}

func readers(all []*channel) (from []io.Reader) {
	for _, c := range all {
		from = append(from, bytes.NewReader(c.Bytes()))
	}
	return from
}

// Whatever is written, in whatever pieces and over however many channels, is what is
// read, however little each read gives.
func TestDealing(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		n := 1 + r.IntN(6)
		all, lanes := channels(n)
		d := &dealer{to: lanes}
		var want []byte
		for range r.IntN(12) {
			p := make([]byte, r.IntN(1<<r.IntN(19)))
			for i := range p {
				p[i] = byte(r.Uint32())
			}
			if written, err := d.Write(p); err != nil || written != len(p) {
				t.Fatalf("Write: %d of %d: %v", written, len(p), err)
			}
			want = append(want, p...)
		}
		if err := d.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		from := readers(all)
		for i, c := range all {
			if !c.ended {
				t.Fatalf("channel %d of %d does not end", i, n)
			}
			switch r.IntN(3) {
			case 0:
				from[i] = iotest.HalfReader(from[i])
			case 1:
				from[i] = iotest.DataErrReader(from[i])
			}
		}
		got, err := io.ReadAll(&joined{from: from})
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%d bytes of %d over %d channels: %v", len(got), len(want), n, err)
		}
	}
}

// Blocks lie on the channels in turn: their windows become full together.
func TestDealingIsEven(t *testing.T) {
	all, lanes := channels(4)
	d := &dealer{to: lanes}
	if _, err := d.Write(make([]byte, 40*maxBlock)); err != nil {
		t.Fatal(err)
	}
	for i, c := range all {
		if want := 10 * (maxBlock + 4); c.Len() != want {
			t.Errorf("channel %d carries %d bytes, want %d", i, c.Len(), want)
		}
	}
}

// A stream that lacks anything, or has too much of it, is not one.
func TestHalfAStream(t *testing.T) {
	whole := func() []*channel {
		all, lanes := channels(3)
		d := &dealer{to: lanes}
		for range 7 {
			d.Write([]byte("some block"))
		}
		d.CloseWrite()
		return all
	}
	read := func(from []io.Reader) error {
		_, err := io.ReadAll(&joined{from: from})
		return err
	}
	if err := read(readers(whole())); err != nil {
		t.Fatal(err)
	}
	// Every channel, cut after every byte.
	for i := range 3 {
		for n := range whole()[i].Len() {
			all := whole()
			all[i].Truncate(n)
			if err := read(readers(all)); !errors.Is(err, ErrDealt) {
				t.Fatalf("channel %d cut after %d bytes: %v", i, n, err)
			}
		}
		all := whole()
		all[i].WriteByte(0)
		if err := read(readers(all)); !errors.Is(err, ErrDealt) {
			t.Errorf("channel %d with one byte more: %v", i, err)
		}
		// The reader of a connection that broke may say so.
		from := readers(whole())
		from[i] = iotest.TimeoutReader(iotest.OneByteReader(from[i]))
		if err := read(from); !errors.Is(err, iotest.ErrTimeout) {
			t.Errorf("channel %d that fails: %v", i, err)
		}
	}
	from := readers(whole())
	if err := read([]io.Reader{from[1], from[0], from[2]}); err == nil {
		t.Error("two channels in each other's place make a stream")
	}
	if err := read(append(readers(whole()), bytes.NewReader(nil))); !errors.Is(err, ErrDealt) {
		t.Errorf("with a channel too many: %v", err)
	}
	long := binary.BigEndian.AppendUint32(nil, maxBlock+1)
	if err := read([]io.Reader{bytes.NewReader(append(long, make([]byte, maxBlock+1)...))}); !errors.Is(err, ErrDealt) {
		t.Errorf("a long block: %v", err)
	}
}

// A dealer that could not write a block to its end does not tell an end.
func TestABrokenDealerHasNoEnd(t *testing.T) {
	all, lanes := channels(2)
	d := &dealer{to: lanes}
	d.Write([]byte("one"))
	all[1].room = 5
	if _, err := d.Write([]byte("two")); !errors.Is(err, io.ErrClosedPipe) {
		t.Fatalf("a channel that is closed: %v", err)
	}
	d.CloseWrite()
	for i, c := range all {
		if !c.ended {
			t.Errorf("channel %d stays open", i)
		}
	}
	if got, err := io.ReadAll(&joined{from: readers(all)}); !errors.Is(err, ErrDealt) {
		t.Errorf("read %q: %v", got, err)
	}
}

// What joined accepts, a dealer could have written: the same stream, dealt again in
// blocks of the same lengths, lies on the channels as it did.
func FuzzJoined(f *testing.F) {
	seed := func(pieces ...string) {
		all, lanes := channels(3)
		d := &dealer{to: lanes}
		for _, p := range pieces {
			io.WriteString(d, p)
		}
		d.CloseWrite()
		f.Add(all[0].Bytes(), all[1].Bytes(), all[2].Bytes())
	}
	seed()
	seed("a")
	seed("some", "blocks", "of a stream", "in turn")
	f.Add([]byte{0, 0, 0, 9, 1}, []byte{}, []byte{})
	f.Add([]byte{255, 255, 255, 255}, []byte{0}, []byte{0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, a, b, c []byte) {
		given := [][]byte{a, b, c}
		j := &joined{}
		for _, p := range given {
			j.from = append(j.from, bytes.NewReader(p))
		}
		all, lanes := channels(3)
		d := &dealer{to: lanes}
		p := make([]byte, maxBlock)
		for {
			n, err := j.Read(p)
			if n > 0 {
				d.Write(p[:n])
			}
			if d.held > 0 {
				d.send()
			}
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				if !errors.Is(err, ErrDealt) {
					t.Fatalf("an error of another kind: %v", err)
				}
				return
			}
		}
		d.CloseWrite()
		for i, c := range all {
			if !bytes.Equal(c.Bytes(), given[i]) {
				t.Fatalf("channel %d was % x, dealt again it is % x", i, given[i], c.Bytes())
			}
		}
	})
}
