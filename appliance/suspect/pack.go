package suspect

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"slices"

	"farkeep/shared/beneath"
	"farkeep/shared/borgsegment"
)

// A pack is the index of segments' entries, one file in the scratch folder:
//
//	"FKPACK01", then blocks:
//	  number part count flags                   4 × uint32, little endian
//	  id                                        16 bytes: whose entries these are
//	  crc                                       CRC-32C of the block but these 4 bytes
//	  count × (key uint64, size uint32, crc uint32)
//
// A segment has one block for each maxRecords of its entries, in their order; in a
// block there is one record for a key, the last, and they are sorted by key. The
// key is the first 8 bytes of Borg's, big endian; a size of 0 is a DELETE.
//
// Blocks are only appended. One that was cut ends the file, one that is damaged
// is found by its CRC when it is read: then the pack is thrown away and made anew.
// It is not synced: after a power cut the same holds.
type pack struct {
	scratch *beneath.Dir
	file    *os.File
	end     int64
	blocks  []block // sorted by number, id, offset
	unread  bool    // blocks were appended since they were sorted
	buf     []byte
}

const (
	packFile    = "entries"
	packNew     = "entries.new"
	packMagic   = "FKPACK01"
	blockHeader = 4*4 + len(id{}) + 4
	recordSize  = 16
	maxRecords  = 1 << 15 // half a megabyte
	// minSweep is how much garbage is not worth a rewriting, in bytes.
	minSweep = 4 << 20
)

// The flags of a block.
const (
	flagLast    = 1 << iota // of its segment
	flagChecked             // every CRC of the segment was compared
	flagBroken              // it is no segment: its entries do not count
	flagsAll    = flagLast | flagChecked | flagBroken
)

type block struct {
	number, part, count, flags uint32
	id                         id
	offset                     int64
}

// record is one entry of a segment.
type record struct {
	key       uint64
	size, crc uint32
}

// errDamaged says that the pack must be made anew.
var errDamaged = errors.New("the index of segments is damaged")

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// openPack opens the pack of a scratch folder; a missing or foreign one is empty.
func openPack(scratch *beneath.Dir) (*pack, error) {
	f, st, err := scratch.OpenWrite(packFile, os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	p := &pack{scratch: scratch, file: f}
	if err := p.load(st.Size); err != nil {
		f.Close()
		return nil, fmt.Errorf("read the index of segments: %w", err)
	}
	return p, nil
}

func (p *pack) close() error { return p.file.Close() }

func (p *pack) load(size int64) error {
	head := make([]byte, len(packMagic))
	n, err := p.file.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if string(head[:n]) != packMagic {
		return p.reset()
	}
	p.end = int64(len(packMagic))
	// Blocks are a few kilobytes: to read over them beats to seek.
	r := bufio.NewReaderSize(io.NewSectionReader(p.file, p.end, size-p.end), 256<<10)
	var h [blockHeader]byte
	for {
		if _, err := io.ReadFull(r, h[:]); err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				break
			}
			return err
		}
		b := parseBlock(&h)
		body := int64(b.count) * recordSize
		if b.count > maxRecords || b.flags&^flagsAll != 0 || p.end+int64(blockHeader)+body > size || len(p.blocks) >= 2*maxSegments {
			break
		}
		b.offset = p.end
		if _, err := r.Discard(int(body)); err != nil {
			return err
		}
		p.blocks = append(p.blocks, b)
		p.end += int64(blockHeader) + body
	}
	if p.end < size {
		if err := p.file.Truncate(p.end); err != nil {
			return err
		}
	}
	p.sort()
	return nil
}

func parseBlock(h *[blockHeader]byte) (b block) {
	b.number = binary.LittleEndian.Uint32(h[0:])
	b.part = binary.LittleEndian.Uint32(h[4:])
	b.count = binary.LittleEndian.Uint32(h[8:])
	b.flags = binary.LittleEndian.Uint32(h[12:])
	copy(b.id[:], h[16:])
	return b
}

// reset empties the pack.
func (p *pack) reset() error {
	p.blocks, p.unread = nil, false
	if err := p.file.Truncate(0); err != nil {
		return err
	}
	p.end = int64(len(packMagic))
	_, err := p.file.WriteAt([]byte(packMagic), 0)
	return err
}

func (p *pack) sort() {
	slices.SortFunc(p.blocks, func(a, b block) int { return cmp.Or(sameSegment(a, b), cmp.Compare(a.offset, b.offset)) })
	p.unread = false
}

// find returns the blocks of a segment in their order, nil unless all are there.
// Blocks that were appended are found only after sort.
func (p *pack) find(number uint32, of id) []block {
	from, ok := slices.BinarySearchFunc(p.blocks, block{number: number, id: of}, sameSegment)
	if !ok {
		return nil
	}
	// A segment may have been indexed more than once: when an attempt was cut, or
	// read only the headers. The blocks of one attempt follow one another; the last
	// whole attempt counts.
	var found []block
	start := from
	for i := from; i < len(p.blocks) && sameSegment(p.blocks[i], p.blocks[from]) == 0; i++ {
		b := &p.blocks[i]
		if b.part == 0 {
			start = i
		}
		if int(b.part) != i-start {
			start = len(p.blocks) // the beginning is missing: nothing fits before the next
			continue
		}
		if b.flags&flagLast != 0 {
			found = p.blocks[start : i+1]
		}
	}
	return found
}

func sameSegment(a, b block) int {
	return cmp.Or(cmp.Compare(a.number, b.number), bytes.Compare(a.id[:], b.id[:]))
}

// append adds one block. The records are sorted in place.
func (p *pack) append(b block, records []record) error {
	slices.SortStableFunc(records, func(a, b record) int { return cmp.Compare(a.key, b.key) })
	kept := records[:0]
	for i, r := range records {
		if i+1 < len(records) && records[i+1].key == r.key {
			continue // a later entry of the same key is the one that counts
		}
		kept = append(kept, r)
	}
	b.count, b.offset = uint32(len(kept)), p.end
	buf := append(p.buf[:0], make([]byte, blockHeader)...)
	binary.LittleEndian.PutUint32(buf[0:], b.number)
	binary.LittleEndian.PutUint32(buf[4:], b.part)
	binary.LittleEndian.PutUint32(buf[8:], b.count)
	binary.LittleEndian.PutUint32(buf[12:], b.flags)
	copy(buf[16:], b.id[:])
	for _, r := range kept {
		buf = binary.LittleEndian.AppendUint64(buf, r.key)
		buf = binary.LittleEndian.AppendUint32(buf, r.size)
		buf = binary.LittleEndian.AppendUint32(buf, r.crc)
	}
	binary.LittleEndian.PutUint32(buf[blockHeader-4:], blockSum(buf))
	p.buf = buf
	if _, err := p.file.WriteAt(buf, p.end); err != nil {
		return fmt.Errorf("write the index of segments: %w", err)
	}
	p.end += int64(len(buf))
	p.blocks, p.unread = append(p.blocks, b), true
	return nil
}

func blockSum(raw []byte) uint32 {
	return crc32.Update(crc32.Checksum(raw[:blockHeader-4], castagnoli), castagnoli, raw[blockHeader:])
}

// records is a block's content, valid until the next read.
type records []byte

func (r records) len() int         { return len(r) / recordSize }
func (r records) key(i int) uint64 { return binary.LittleEndian.Uint64(r[i*recordSize:]) }
func (r records) at(i int) record {
	b := r[i*recordSize:]
	return record{binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint32(b[8:]), binary.LittleEndian.Uint32(b[12:])}
}

// from is the index of the first record whose key is at least key.
func (r records) from(key uint64) int {
	low, high := 0, r.len()
	for low < high {
		if mid := (low + high) / 2; r.key(mid) < key {
			low = mid + 1
		} else {
			high = mid
		}
	}
	return low
}

// read reads one block. An error that wraps errDamaged says that it is not as it
// was written.
func (p *pack) read(b *block) (records, error) {
	n := blockHeader + int(b.count)*recordSize
	if cap(p.buf) < n {
		p.buf = make([]byte, blockHeader+maxRecords*recordSize)
	}
	raw := p.buf[:n]
	if _, err := p.file.ReadAt(raw, b.offset); err != nil {
		if errors.Is(err, io.EOF) {
			err = errDamaged
		}
		return nil, fmt.Errorf("read the index of segments: %w", err)
	}
	have := parseBlock((*[blockHeader]byte)(raw))
	have.offset = b.offset
	if have != *b || blockSum(raw) != binary.LittleEndian.Uint32(raw[blockHeader-4:]) {
		return nil, errDamaged
	}
	return records(raw[blockHeader:]), nil
}

// total is how many records the blocks of one generation's segments have, or of both.
func (p *pack) total(segments []segment, where side) (n int64) {
	for i := range segments {
		if segments[i].where&where == 0 {
			continue
		}
		for _, b := range p.find(segments[i].number, segments[i].id) {
			n += int64(b.count)
		}
	}
	return n
}

// sweep rewrites the pack without what belongs to no segment, when that is more
// than half of it.
func (p *pack) sweep(segments []segment) error {
	var kept []block
	size := int64(len(packMagic))
	for i := range segments {
		for _, b := range p.find(segments[i].number, segments[i].id) {
			kept = append(kept, b)
			size += int64(blockHeader) + int64(b.count)*recordSize
		}
	}
	if garbage := p.end - size; garbage < minSweep || garbage < size {
		return nil
	}
	if err := p.scratch.Remove(packNew); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, _, err := p.scratch.OpenWrite(packNew, os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	w := bufio.NewWriterSize(f, 256<<10)
	w.WriteString(packMagic)
	for i := range kept {
		if _, err := p.read(&kept[i]); err != nil {
			return err
		}
		w.Write(p.buf[:blockHeader+int(kept[i].count)*recordSize])
	}
	if err := w.Flush(); err != nil {
		return fmt.Errorf("rewrite the index of segments: %w", err)
	}
	return p.scratch.Rename(packNew, p.scratch, packFile)
}

// recordOf is what the pack keeps of an entry.
func recordOf(e *borgsegment.Entry) record {
	r := record{key: binary.BigEndian.Uint64(e.Key[:])}
	if e.Tag == borgsegment.Put {
		r.size, r.crc = e.Size, e.CRC
	}
	return r
}
