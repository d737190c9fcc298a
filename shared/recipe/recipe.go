// Package recipe is the stream in which a push uploads: for every file that the
// receiver needs, how to build it out of ranges that it already holds and of new
// bytes, and the hash that the result must have.
//
// [Encoder] writes a stream, [Decoder] reads one, [Build] carries out one file's
// recipe. The decoder trusts nothing: a file that grows beyond its announced
// size, an operation that adds nothing, a frame over its limit, files out of
// order or a stream without its end mark is an error at once. It holds one
// operation and one frame of data, whatever the length of the stream.
//
// The format (integers are minimal unsigned varints, as in package manifest):
//
//	"FKRECIP1"                      magic and version
//	'F' index                       a file: its index in the offered manifest; ascending
//	'K' length                      keep the first bytes of the half-built file that
//	                                the receiver offered to resume; only right after 'F'
//	'C' path offset length          copy a range of a file of the base generation;
//	                                path: its length, and its bytes; length 0 means
//	                                the path of the previous 'C' of this stream
//	'D' length bytes                new bytes, 1 to 1 MiB
//	'P' length packed bytes         new bytes, 2 to 1 MiB, compressed: packed is the
//	                                length of what follows, less than length; it is
//	                                one zstd frame (RFC 8878) without a dictionary
//	'E' sum                         the file's end: BLAKE2b-256 of all of it
//	'Z' files                       the stream's end, and how many files there were
//
// An unknown operation is an error, so a new one needs a new version or a
// receiver that announced it.
package recipe

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"

	"farkeep/shared/manifest"
)

// MaxFrame is the most bytes that one DATA operation carries.
const MaxFrame = 1 << 20

const magic = "FKRECIP1"

// Kind is an operation's kind.
type Kind byte

// The operations within a file.
const (
	Keep Kind = 'K'
	Copy Kind = 'C'
	Data Kind = 'D'
	End  Kind = 'E'
)

const (
	tagFile   = 'F'
	tagPacked = 'P'
	tagEnd    = 'Z'
)

const (
	// packLeast is the shortest piece that is tried, in bytes.
	packLeast = 256
	// packPause is how many pieces of a file are not tried after one that did not
	// shrink by a tenth.
	packPause = 15
)

// Op is one operation. Which fields are set depends on Kind.
type Op struct {
	Kind   Kind
	Path   string       // Copy
	Offset int64        // Copy
	Length int64        // Keep, Copy, Data
	Data   []byte       // Data, unpacked if it was packed; valid until the next call of the decoder
	Sum    manifest.Sum // End
}

// Encoder writes a stream. Its methods must be called in the order File, Keep
// (at most once), any number of Copy and Write, End, then File again or Close.
// The first error is final.
type Encoder struct {
	w        *bufio.Writer
	buf      []byte
	frame    []byte // data that was written but not framed yet
	source   string
	files    int64
	last     int64
	open     bool
	started  bool // the open file has an operation
	finished bool
	err      error

	pays   func() bool // nil: nothing is packed
	zstd   *zstd.Encoder
	packed []byte
	pause  int   // pieces of the open file that are not tried yet
	spared int64 // by packing
}

// NewEncoder starts a stream on w. It buffers; Flush and Close flush.
func NewEncoder(w io.Writer) *Encoder {
	e := &Encoder{w: bufio.NewWriterSize(w, 64<<10), last: -1}
	_, e.err = e.w.WriteString(magic)
	return e
}

// Pack compresses new bytes from now on, where that makes a piece shorter by a
// tenth. pays is asked for each piece whether it is worth the processor's time. A
// file is tried with its first piece, and if that did not shrink, again after
// 15 MiB. The encoder takes about 5 MiB of memory for it.
func (e *Encoder) Pack(pays func() bool) { e.pays = pays }

// Spared is how many bytes less were written because they were compressed.
func (e *Encoder) Spared() int64 { return e.spared }

// fail records and returns the first error.
func (e *Encoder) fail(err error) error {
	if e.err == nil {
		e.err = err
	}
	return e.err
}

func (e *Encoder) inFile(what string) error {
	if e.err == nil && !e.open {
		e.err = fmt.Errorf("recipe: %s outside of a file", what)
	}
	return e.err
}

// File begins the file with that index of the manifest.
func (e *Encoder) File(index int64) error {
	if e.err != nil {
		return e.err
	}
	if e.open || e.finished || index <= e.last || index >= manifest.MaxEntries {
		return e.fail(fmt.Errorf("recipe: file %d after file %d, or before that one's end", index, e.last))
	}
	e.open, e.started, e.last, e.pause = true, false, index, 0
	e.files++
	return e.put(binary.AppendUvarint(append(e.buf[:0], tagFile), uint64(index)))
}

// Keep says that the first n bytes of the half-built file are right.
func (e *Encoder) Keep(n int64) error {
	if err := e.inFile("keep"); err != nil {
		return err
	}
	if e.started || n < 1 {
		return e.fail(fmt.Errorf("recipe: keep %d bytes, after other operations or none", n))
	}
	e.started = true
	return e.put(binary.AppendUvarint(append(e.buf[:0], byte(Keep)), uint64(n)))
}

// Copy takes n bytes at offset of a file of the base generation.
func (e *Encoder) Copy(path string, offset, n int64) error {
	if err := e.inFile("copy"); err != nil {
		return err
	}
	if err := manifest.CheckPath(path); err != nil {
		return e.fail(fmt.Errorf("recipe: copy: %w", err))
	}
	if offset < 0 || n < 1 || offset > manifest.MaxFileSize || n > manifest.MaxFileSize {
		return e.fail(fmt.Errorf("recipe: copy %d bytes at %d", n, offset))
	}
	if err := e.flushFrame(); err != nil {
		return err
	}
	e.started = true
	b := append(e.buf[:0], byte(Copy))
	if path == e.source {
		b = append(b, 0)
	} else {
		b = binary.AppendUvarint(b, uint64(len(path)))
		b = append(b, path...)
		e.source = path
	}
	b = binary.AppendUvarint(b, uint64(offset))
	return e.put(binary.AppendUvarint(b, uint64(n)))
}

// Write adds new bytes to the file. Small writes are gathered into frames.
func (e *Encoder) Write(p []byte) (int, error) {
	if err := e.inFile("data"); err != nil {
		return 0, err
	}
	if len(p) > 0 {
		e.started = true
	}
	written := 0
	for len(p) > 0 {
		// A full frame needs no copy when nothing waits before it.
		if len(e.frame) == 0 && len(p) >= MaxFrame {
			if err := e.putFrame(p[:MaxFrame]); err != nil {
				return written, err
			}
			p, written = p[MaxFrame:], written+MaxFrame
			continue
		}
		if e.frame == nil {
			e.frame = make([]byte, 0, MaxFrame)
		}
		n := min(len(p), MaxFrame-len(e.frame))
		e.frame = append(e.frame, p[:n]...)
		p, written = p[n:], written+n
		if len(e.frame) == MaxFrame {
			if err := e.flushFrame(); err != nil {
				return written, err
			}
		}
	}
	return written, nil
}

// End ends the file; sum is the hash of all its bytes.
func (e *Encoder) End(sum manifest.Sum) error {
	if err := e.inFile("end"); err != nil {
		return err
	}
	if err := e.flushFrame(); err != nil {
		return err
	}
	e.open = false
	return e.put(append(append(e.buf[:0], byte(End)), sum[:]...))
}

// Flush hands everything that was encoded so far to the underlying writer.
func (e *Encoder) Flush() error {
	if e.err != nil {
		return e.err
	}
	if err := e.flushFrame(); err != nil {
		return err
	}
	e.err = e.w.Flush()
	return e.err
}

// Close ends the stream. It does not close the underlying writer. A stream that
// is not closed is refused by the decoder, after its complete files were taken.
func (e *Encoder) Close() error {
	if e.err != nil {
		return e.err
	}
	if e.open || e.finished {
		return e.fail(errors.New("recipe: close within a file, or twice"))
	}
	e.finished = true
	if err := e.put(binary.AppendUvarint(append(e.buf[:0], tagEnd), uint64(e.files))); err != nil {
		return err
	}
	e.err = e.w.Flush()
	return e.err
}

func (e *Encoder) put(b []byte) error {
	e.buf = b[:0]
	if e.err == nil {
		_, e.err = e.w.Write(b)
	}
	return e.err
}

func (e *Encoder) putFrame(p []byte) error {
	if z := e.pack(p); z != nil {
		e.spared += int64(len(p) - len(z))
		b := binary.AppendUvarint(append(e.buf[:0], tagPacked), uint64(len(p)))
		if err := e.put(binary.AppendUvarint(b, uint64(len(z)))); err != nil {
			return err
		}
		_, e.err = e.w.Write(z)
		return e.err
	}
	if err := e.put(binary.AppendUvarint(append(e.buf[:0], byte(Data)), uint64(len(p)))); err != nil {
		return err
	}
	_, e.err = e.w.Write(p)
	return e.err
}

// pack compresses a piece; nil: it stays as it is.
func (e *Encoder) pack(p []byte) []byte {
	if e.pays == nil || e.err != nil || len(p) < packLeast {
		return nil
	}
	if e.pause > 0 {
		e.pause--
		return nil
	}
	if !e.pays() {
		return nil
	}
	if e.zstd == nil {
		// No checksum: the whole file has one.
		e.zstd, e.err = zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithLowerEncoderMem(true),
			zstd.WithWindowSize(MaxFrame), zstd.WithEncoderCRC(false), zstd.WithEncoderLevel(zstd.SpeedDefault))
		if e.err != nil {
			return nil
		}
	}
	e.packed = e.zstd.EncodeAll(p, e.packed[:0])
	if len(e.packed) > len(p)-len(p)/10 {
		e.pause = packPause
		return nil
	}
	return e.packed
}

func (e *Encoder) flushFrame() error {
	if len(e.frame) == 0 {
		return e.err
	}
	err := e.putFrame(e.frame)
	e.frame = e.frame[:0]
	return err
}
