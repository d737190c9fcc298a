// Package faulty is a disk that behaves as disks do when their power is cut, and
// as they do when they die: what it was not told to flush may be lost, in any
// order and in the middle of a write; reads and writes of some places, or of all,
// fail; and it can refuse every write.
//
// It speaks the NBD protocol (github.com/NetworkBlockDevice/nbd,
// doc/proto.md; fixed newstyle, simple replies), which QEMU takes for a disk. The
// durable content is a plain file. It serves one emulator at a time.
package faulty

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"sync"
)

const (
	sector = 512
	// cacheSize is how many bytes wait in the disk's cache at most; what is older
	// goes to the platter. Real disks have 16 to 256 MiB.
	cacheSize = 16 << 20
	// maxRequest bounds one request of the emulator, in bytes.
	maxRequest = 32 << 20
)

// Fault is what goes wrong. The zero value is nothing.
type Fault struct {
	Reads, Writes bool
	From, To      int64 // bytes of the disk; To 0: to its end
}

func (f Fault) hits(write bool, at, n int64) bool {
	if write && !f.Writes || !write && !f.Reads {
		return false
	}
	return at+n > f.From && (f.To == 0 || at < f.To)
}

// Disk is one disk.
type Disk struct {
	file     *os.File
	size     int64
	listener net.Listener
	group    sync.WaitGroup

	mu      sync.Mutex       // guards the fields below
	conn    net.Conn         // nil: no emulator
	unused  chan struct{}    // closed when conn became nil
	pending []write          // not flushed, oldest first
	waiting int64            // their bytes
	overlay map[int64][]byte // sector to its newest content that is not flushed
	fault   Fault
	figures Figures
}

type write struct {
	at   int64
	data []byte
}

// Figures is what the disk has seen.
type Figures struct {
	Writes, Flushes int
	Refused         int // requests that failed because of a Fault
	Lost            int // writes that power cuts took, whole or in part
}

// Open serves the content of the file at path at the unix socket.
func Open(path, socket string) (*Disk, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	if info.Size()%sector != 0 {
		f.Close()
		return nil, fmt.Errorf("%s has %d bytes, which is not a number of sectors", path, info.Size())
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		f.Close()
		return nil, err
	}
	d := &Disk{file: f, size: info.Size(), listener: l, overlay: map[int64][]byte{}}
	d.group.Go(d.accept)
	return d, nil
}

// Close ends the service. What was not flushed is lost: PowerCut with a keep of
// everything comes before it where that is not meant.
func (d *Disk) Close() error {
	err := d.listener.Close()
	d.mu.Lock()
	if d.conn != nil {
		d.conn.Close()
	}
	d.mu.Unlock()
	d.group.Wait()
	return errors.Join(err, d.file.Close())
}

// Unused waits until no emulator is connected: what one had sent before it died
// has then been written.
func (d *Disk) Unused() {
	d.mu.Lock()
	unused := d.unused
	d.mu.Unlock()
	if unused != nil {
		<-unused
	}
}

// Figures returns them.
func (d *Disk) Figures() Figures {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.figures
}

// Fail makes the disk fail so from now on.
func (d *Disk) Fail(f Fault) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fault = f
}

// PowerCut decides what of the cache is on the platter after a power cut: for
// each write that was not flushed chance draws whether it was written whole, not
// at all, or up to one of its sectors. It returns how many were lost, whole or in
// part. The emulator must be gone: see Unused.
func (d *Disk) PowerCut(r *rand.Rand) (lost int, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	// Sometimes the disk was quick, sometimes it had not even begun.
	keep := []float64{0, 0.1, 0.5, 0.9, 1}[r.IntN(5)]
	for _, w := range d.pending {
		data := w.data
		switch {
		case r.Float64() < keep:
		case r.IntN(8) == 0:
			data = data[:r.IntN(len(data)/sector)*sector]
			lost++
		default:
			data = nil
			lost++
		}
		if len(data) > 0 {
			if _, err := d.file.WriteAt(data, w.at); err != nil {
				return lost, err
			}
		}
	}
	d.pending, d.waiting = nil, 0
	clear(d.overlay)
	d.figures.Lost += lost
	return lost, nil
}

func (d *Disk) accept() {
	for {
		conn, err := d.listener.Accept()
		if err != nil {
			return
		}
		unused := make(chan struct{})
		d.mu.Lock()
		d.conn, d.unused = conn, unused
		d.mu.Unlock()
		// The emulator's end of the connection says that it is over.
		_ = d.serve(conn)
		conn.Close()
		d.mu.Lock()
		d.conn = nil
		d.mu.Unlock()
		close(unused)
	}
}

// Numbers of the protocol.
const (
	magicServer   = 0x4e42444d41474943
	magicOption   = 0x49484156454f5054
	magicReply    = 0x0003e889045565a9
	magicRequest  = 0x25609513
	magicResponse = 0x67446698

	optionExport = 1
	optionAbort  = 2
	optionGo     = 7

	replyAck         = 1
	replyInfo        = 3
	replyUnsupported = 1<<31 + 1

	// Has flags, flush and force unit access.
	exportFlags = 1 | 4 | 8

	commandRead  = 0
	commandWrite = 1
	commandEnd   = 2
	commandFlush = 3
	flagForce    = 1

	errorIO      = 5
	errorInvalid = 22
)

func (d *Disk) serve(conn net.Conn) error {
	if err := d.negotiate(conn); err != nil {
		return err
	}
	head := make([]byte, 28)
	for {
		if _, err := io.ReadFull(conn, head); err != nil {
			return err
		}
		if binary.BigEndian.Uint32(head) != magicRequest {
			return errors.New("not an NBD request")
		}
		flags, command := binary.BigEndian.Uint16(head[4:]), binary.BigEndian.Uint16(head[6:])
		at, n := int64(binary.BigEndian.Uint64(head[16:])), int64(binary.BigEndian.Uint32(head[24:]))
		var data []byte
		if command == commandRead || command == commandWrite {
			if n > maxRequest {
				return fmt.Errorf("a request of %d bytes", n)
			}
			data = make([]byte, n)
		}
		if command == commandWrite {
			if _, err := io.ReadFull(conn, data); err != nil {
				return err
			}
		}
		if command == commandEnd {
			return nil
		}
		code := d.do(command, flags, at, data)
		answer := binary.BigEndian.AppendUint32(nil, magicResponse)
		answer = binary.BigEndian.AppendUint32(answer, code)
		answer = append(answer, head[8:16]...) // the request's own name
		if command == commandRead && code == 0 {
			answer = append(answer, data...)
		}
		if _, err := conn.Write(answer); err != nil {
			return err
		}
	}
}

func (d *Disk) negotiate(conn net.Conn) error {
	hello := binary.BigEndian.AppendUint64(nil, magicServer)
	hello = binary.BigEndian.AppendUint64(hello, magicOption)
	hello = binary.BigEndian.AppendUint16(hello, 1|2) // fixed newstyle, no zeroes
	if _, err := conn.Write(hello); err != nil {
		return err
	}
	head := make([]byte, 16)
	if _, err := io.ReadFull(conn, head[:4]); err != nil {
		return err
	}
	for {
		if _, err := io.ReadFull(conn, head); err != nil {
			return err
		}
		if binary.BigEndian.Uint64(head) != magicOption {
			return errors.New("not an NBD option")
		}
		option, n := binary.BigEndian.Uint32(head[8:]), binary.BigEndian.Uint32(head[12:])
		if n > 64<<10 {
			return fmt.Errorf("an option of %d bytes", n)
		}
		if _, err := io.CopyN(io.Discard, conn, int64(n)); err != nil {
			return err
		}
		reply := func(kind uint32, data []byte) error {
			b := binary.BigEndian.AppendUint64(nil, magicReply)
			b = binary.BigEndian.AppendUint32(b, option)
			b = binary.BigEndian.AppendUint32(b, kind)
			b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
			_, err := conn.Write(append(b, data...))
			return err
		}
		export := binary.BigEndian.AppendUint64(nil, uint64(d.size))
		export = binary.BigEndian.AppendUint16(export, exportFlags)
		switch option {
		case optionExport:
			_, err := conn.Write(export)
			return err
		case optionGo:
			if err := reply(replyInfo, append([]byte{0, 0}, export...)); err != nil {
				return err
			}
			return reply(replyAck, nil)
		case optionAbort:
			return errors.Join(reply(replyAck, nil), io.EOF)
		default:
			if err := reply(replyUnsupported, nil); err != nil {
				return err
			}
		}
	}
}

// do carries out one request and returns the protocol's error number.
func (d *Disk) do(command, flags uint16, at int64, data []byte) uint32 {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := int64(len(data))
	if at < 0 || at+n > d.size || at%sector != 0 || n%sector != 0 {
		return errorInvalid
	}
	switch command {
	case commandRead:
		if d.fault.hits(false, at, n) {
			d.figures.Refused++
			return errorIO
		}
		if _, err := d.file.ReadAt(data, at); err != nil {
			return errorIO
		}
		for i := int64(0); i < n; i += sector {
			if s, ok := d.overlay[(at+i)/sector]; ok {
				copy(data[i:], s)
			}
		}
	case commandWrite:
		if d.fault.hits(true, at, n) {
			d.figures.Refused++
			return errorIO
		}
		d.figures.Writes++
		d.pending, d.waiting = append(d.pending, write{at, data}), d.waiting+n
		for i := int64(0); i < n; i += sector {
			d.overlay[(at+i)/sector] = data[i : i+sector]
		}
		if flags&flagForce != 0 || d.waiting > cacheSize {
			if d.flush() != nil {
				return errorIO
			}
		}
	case commandFlush:
		d.figures.Flushes++
		if d.fault.Writes {
			d.figures.Refused++
			return errorIO
		}
		if d.flush() != nil {
			return errorIO
		}
	default:
		return errorInvalid
	}
	return 0
}

// flush brings everything to the platter. A write with "force unit access" may
// take others with it: that is allowed, and only makes the disk kinder.
func (d *Disk) flush() error {
	for _, w := range d.pending {
		if _, err := d.file.WriteAt(w.data, w.at); err != nil {
			return err
		}
	}
	d.pending, d.waiting = slices.Delete(d.pending, 0, len(d.pending)), 0
	clear(d.overlay)
	return nil
}
