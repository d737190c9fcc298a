package sshverb

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
)

// What is under way in a channel is bounded by its window, 2 MiB, which
// golang.org/x/crypto/ssh fixes (as OpenSSH does). A long line holds more, so one
// stream can be dealt over several channels: block by block, in turn,
//
//	channel 0:  block 0   block 3   end
//	channel 1:  block 1   block 4
//	channel 2:  block 2   block 5
//
// Each block is its length, four bytes, big endian, and as many bytes. A block of
// length 0 is the end of the stream, and every channel must end there: a stream of
// which a channel was cut off never looks whole.

// What is held until the peer reads it is held as it came, packet by packet. One with
// packetRoom bytes and the nine before them (RFC 4254 §5.2) fits into 32 KiB; the
// largest that SSH allows are a little longer, and take a quarter more of memory.
const packetRoom = 32<<10 - 9

// maxBlock bounds a block, in bytes without its length.
const maxBlock = 2*packetRoom - 4

// ErrDealt is wrapped by errors of a reader whose channels do not make one stream.
var ErrDealt = errors.New("the channels do not make one stream")

// lane is one of the channels, as its sender has it.
type lane interface {
	io.Writer
	CloseWrite() error
}

// dealer writes one stream into several channels. It holds back less than a block of
// what is written in long pieces; a piece shorter than a packet goes at once, and what
// was held back with it.
type dealer struct {
	to     []lane
	next   int
	block  [4 + maxBlock]byte
	held   int  // bytes of the block
	broken bool // a block is incomplete: there is no end to tell any more
}

func (d *dealer) Write(p []byte) (n int, err error) {
	prompt := len(p) < packetRoom
	for len(p) > 0 {
		more := copy(d.block[4+d.held:], p)
		d.held, n, p = d.held+more, n+more, p[more:]
		if d.held < maxBlock && !prompt {
			break
		}
		if err := d.send(); err != nil {
			return n - more, err
		}
	}
	return n, nil
}

// send sends what is held, as a block.
func (d *dealer) send() error {
	if d.broken {
		return io.ErrClosedPipe
	}
	to, block := d.to[d.next], d.block[:4+d.held]
	binary.BigEndian.PutUint32(block, uint32(d.held))
	d.next, d.held = (d.next+1)%len(d.to), 0
	for packet := range slices.Chunk(block, packetRoom) {
		if _, err := to.Write(packet); err != nil {
			d.broken = true
			return err
		}
	}
	return nil
}

// CloseWrite ends the stream, or, after an error of Write, cuts it off.
func (d *dealer) CloseWrite() error {
	var all []error
	if d.held > 0 && !d.broken {
		all = append(all, d.send())
	}
	if !d.broken {
		all = append(all, d.send())
	}
	for _, to := range d.to {
		all = append(all, to.CloseWrite())
	}
	return errors.Join(all...)
}

// joined reads what a dealer wrote. A stream that ended sooner than its sender meant,
// on whatever channel, is an error that wraps ErrDealt and never io.EOF.
type joined struct {
	from []io.Reader
	next int
	left int // of the block that is being read
	err  error
}

func (j *joined) Read(p []byte) (int, error) {
	if j.err != nil || len(p) == 0 {
		return 0, j.err
	}
	if j.left == 0 {
		if j.err = j.begin(); j.err != nil {
			return 0, j.err
		}
	}
	n, err := j.from[j.next].Read(p[:min(len(p), j.left)])
	if j.left -= n; j.left == 0 {
		j.next = (j.next + 1) % len(j.from)
		return n, nil // what else there is to say about the channel, its next block says
	}
	if err != nil {
		j.err = j.cut(err)
	}
	return n, j.err
}

// begin reads the length of the next block.
func (j *joined) begin() error {
	var length [4]byte
	if _, err := io.ReadFull(j.from[j.next], length[:]); err != nil {
		return j.cut(err)
	}
	n := binary.BigEndian.Uint32(length[:])
	if n > maxBlock {
		return fmt.Errorf("%w: a block of %d bytes, %d are allowed", ErrDealt, n, maxBlock)
	}
	if n == 0 {
		return j.end()
	}
	j.left = int(n)
	return nil
}

// end returns io.EOF if no channel has more to say.
func (j *joined) end() error {
	for i, from := range j.from {
		var one [1]byte
		switch n, err := io.ReadFull(from, one[:]); {
		case n > 0:
			return fmt.Errorf("%w: channel %d goes on behind the end", ErrDealt, i)
		case !errors.Is(err, io.EOF):
			return j.cut(err)
		}
	}
	return io.EOF
}

func (j *joined) cut(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: channel %d ended before the stream did", ErrDealt, j.next)
	}
	return err
}
