package recipe

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/klauspost/compress/zstd"

	"farkeep/shared/manifest"
)

// FormatError says what is wrong with a stream, and where.
type FormatError struct {
	File   int64 // index of the file in the manifest; -1 before the first
	Offset int64 // bytes of the stream before the mistake
	Err    error
}

func (e *FormatError) Error() string {
	if e.File < 0 {
		return fmt.Sprintf("recipe stream, at byte %d: %v", e.Offset, e.Err)
	}
	return fmt.Sprintf("recipe of file %d, at byte %d of the stream: %v", e.File, e.Offset, e.Err)
}

// Unwrap returns the cause.
func (e *FormatError) Unwrap() error { return e.Err }

// Decoder reads a stream. A stream that ends before its end mark is an error
// that wraps io.ErrUnexpectedEOF. Errors are of type *FormatError and final.
type Decoder struct {
	r      *bufio.Reader
	offset int64
	frames [2][]byte     // the data of the last two operations
	turn   int           // which of them is the newer one
	rest   int64         // of a 'D', what was not returned yet
	packed []byte        // as it came
	zstd   *zstd.Decoder // nil until something packed comes
	source string
	files  int64
	last   int64
	open   bool
	size   int64 // announced for the open file
	done   int64 // bytes that its operations make so far
	first  bool  // no operation yet
	err    error
}

// NewDecoder reads the stream that r holds. It may read ahead of the end mark; what
// it read so, Behind has.
func NewDecoder(r io.Reader) *Decoder {
	return &Decoder{r: bufio.NewReaderSize(r, 64<<10), last: -1}
}

// Behind is what was read from the stream's reader beyond the end mark; nil until
// Next returned io.EOF.
func (d *Decoder) Behind() []byte {
	if d.err != io.EOF {
		return nil
	}
	behind, _ := d.r.Peek(d.r.Buffered())
	return behind
}

// Next returns the manifest index of the next file, or io.EOF after the end
// mark. The caller looks up the file's announced size and then calls Begin.
func (d *Decoder) Next() (index int64, err error) {
	if d.err != nil {
		return 0, d.err
	}
	if d.open {
		return 0, d.fail(errors.New("the next file before the end of this one"))
	}
	if d.offset == 0 {
		var head [len(magic)]byte
		if err := d.full(head[:]); err != nil {
			return 0, d.fail(err)
		}
		if string(head[:]) != magic {
			return 0, d.fail(fmt.Errorf("%q is not a recipe stream of a version that is known here (%s)", head[:], magic))
		}
	}
	tag, err := d.readByte()
	if err != nil {
		return 0, d.fail(err)
	}
	switch tag {
	case tagEnd:
		n, err := d.uvarint(manifest.MaxEntries, "number of files")
		if err == nil && n != d.files {
			err = fmt.Errorf("the end announces %d files, there were %d", n, d.files)
		}
		if err != nil {
			return 0, d.fail(err)
		}
		d.err = io.EOF
		return 0, io.EOF
	case tagFile:
		n, err := d.uvarint(manifest.MaxEntries-1, "file index")
		if err == nil && n <= d.last {
			err = fmt.Errorf("file %d after file %d", n, d.last)
		}
		if err != nil {
			return 0, d.fail(err)
		}
		d.last = n
		d.files++
		return n, nil
	}
	return 0, d.fail(fmt.Errorf("%q where a file or the end should begin", tag))
}

// Begin bounds the file that Next announced: its operations must make exactly
// size bytes.
func (d *Decoder) Begin(size int64) {
	d.open, d.first, d.size, d.done = true, true, size, 0
}

// Op returns the next operation of the file; after End the file is over.
func (d *Decoder) Op() (Op, error) {
	if d.err != nil {
		return Op{}, d.err
	}
	if !d.open {
		return Op{}, d.fail(errors.New("an operation outside of a file"))
	}
	op, err := d.op()
	if err != nil {
		return Op{}, d.fail(err)
	}
	d.first = false
	return op, nil
}

func (d *Decoder) op() (op Op, err error) {
	if d.rest > 0 {
		return d.piece()
	}
	tag, err := d.readByte()
	if err != nil {
		return op, err
	}
	op.Kind = Kind(tag)
	switch op.Kind {
	case Keep:
		if !d.first {
			return op, errors.New("keep after another operation")
		}
		op.Length, err = d.length(d.size)
	case Copy:
		if op.Path, err = d.path(); err != nil {
			return op, err
		}
		if op.Offset, err = d.uvarint(manifest.MaxFileSize, "offset"); err != nil {
			return op, err
		}
		op.Length, err = d.length(d.size)
	case Data:
		if d.rest, err = d.length(MaxFrame); err != nil {
			return op, err
		}
		return d.piece()
	case tagPacked:
		op.Kind = Data
		if op.Length, err = d.length(MaxFrame); err != nil {
			return op, err
		}
		op.Data, err = d.unpack(int(op.Length))
	case End:
		if d.done != d.size {
			return op, fmt.Errorf("the file ends after %d bytes, %d were announced", d.done, d.size)
		}
		d.open = false
		err = d.full(op.Sum[:])
	default:
		return op, fmt.Errorf("%q is not an operation", tag)
	}
	return op, err
}

// maxPiece is how much of a 'D' is one operation, in bytes: the cache of a small
// processor holds it while it is hashed and written.
const maxPiece = 256 << 10

// piece returns new bytes as they come.
func (d *Decoder) piece() (Op, error) {
	n := min(d.rest, maxPiece)
	d.rest -= n
	op := Op{Kind: Data, Length: n, Data: d.room(int(n))}
	return op, d.full(op.Data)
}

// room is where the next data goes. What the operation before returned stays as it is.
func (d *Decoder) room(n int) []byte {
	d.turn ^= 1
	f := slices.Grow(d.frames[d.turn][:0], n)[:n]
	d.frames[d.turn] = f
	return f
}

// unpack reads a compressed piece of n bytes. What it takes of memory does not
// depend on what the piece says of itself: the output has its room before, and the
// window lies in it.
func (d *Decoder) unpack(n int) ([]byte, error) {
	packed, err := d.uvarint(int64(n)-1, "packed length")
	if err != nil {
		return nil, err
	}
	if d.zstd == nil {
		if d.zstd, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxMemory(MaxFrame), zstd.WithDecoderMaxWindow(MaxFrame), zstd.WithDecodeAllCapLimit(true)); err != nil {
			return nil, err
		}
	}
	d.packed = slices.Grow(d.packed[:0], int(packed))[:packed]
	if err := d.full(d.packed); err != nil {
		return nil, err
	}
	var h zstd.Header
	if err := h.Decode(d.packed); err != nil {
		return nil, fmt.Errorf("a packed piece: %w", err)
	}
	if h.Skippable || h.DictionaryID != 0 || !h.HasFCS || h.FrameContentSize != uint64(n) {
		return nil, fmt.Errorf("a packed piece that is not one zstd frame of %d bytes", n)
	}
	got, err := d.zstd.DecodeAll(d.packed, d.room(n)[:0:n])
	if err == nil && len(got) != n {
		err = fmt.Errorf("it has %d bytes", len(got))
	}
	if err != nil {
		return nil, fmt.Errorf("a packed piece of %d bytes: %w", n, err)
	}
	return got, nil
}

// length reads an operation's length and charges it to the file.
func (d *Decoder) length(limit int64) (int64, error) {
	n, err := d.uvarint(limit, "length")
	if err != nil {
		return 0, err
	}
	if n == 0 {
		return 0, errors.New("an operation of no bytes")
	}
	if n > d.size-d.done {
		return 0, fmt.Errorf("the file is longer than the %d bytes that were announced", d.size)
	}
	d.done += n
	return n, nil
}

func (d *Decoder) path() (string, error) {
	n, err := d.uvarint(manifest.MaxPath, "path length")
	if err != nil {
		return "", err
	}
	if n == 0 {
		if d.source == "" {
			return "", errors.New("a copy from the same path as before, and there was none")
		}
		return d.source, nil
	}
	b := make([]byte, n)
	if err := d.full(b); err != nil {
		return "", err
	}
	if string(b) == d.source {
		return "", errors.New("the path of the copy before is repeated")
	}
	if err := manifest.CheckPath(string(b)); err != nil {
		return "", err
	}
	d.source = string(b)
	return d.source, nil
}

func (d *Decoder) fail(err error) error {
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	d.err = &FormatError{File: d.last, Offset: d.offset, Err: err}
	return d.err
}

func (d *Decoder) readByte() (byte, error) {
	b, err := d.r.ReadByte()
	if err == nil {
		d.offset++
	}
	return b, err
}

func (d *Decoder) full(p []byte) error {
	n, err := io.ReadFull(d.r, p)
	d.offset += int64(n)
	return err
}

func (d *Decoder) uvarint(limit int64, what string) (int64, error) {
	v, err := manifest.ReadUvarint(d.readByte)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", what, err)
	}
	if v > uint64(limit) {
		return 0, fmt.Errorf("%s %d is more than %d", what, v, limit)
	}
	return int64(v), nil
}
