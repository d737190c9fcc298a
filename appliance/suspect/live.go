package suspect

import (
	"context"
	"fmt"
	"math/bits"
	"math/rand/v2"
)

// tableBits is how large a table is: 1<<tableBits keys of 24 bytes, 6 MB.
const tableBits = 18

// table says of each key how its chunk was before and how it is now: size and CRC
// of its entry, 0 for none.
type table struct {
	key, old, new []uint64
	n, most       int // keys that are there, and may be
	bits          uint
	manifest      [2]uint64 // the same for the table of archives, whose key is 0: before, now
	multiplier    uint64    // odd and secret: whoever chooses the keys cannot make them collide
}

func newTable(bits uint) *table {
	n := 1 << bits
	return &table{key: make([]uint64, n), old: make([]uint64, n), new: make([]uint64, n), bits: bits, most: n / 4 * 3, multiplier: rand.Uint64() | 1}
}

func (t *table) reset() {
	clear(t.key)
	clear(t.old)
	clear(t.new)
	t.n, t.manifest = 0, [2]uint64{}
}

// manifestKey stands for the key of 32 zero bytes. No other begins like it, but by a
// chance that nobody will see.
const manifestKey = 0

// has reports whether the chunk is there now, with that entry.
func (t *table) has(key, entry uint64) bool {
	i := t.slot(key)
	return t.key[i] == key && t.new[i] == entry
}

// slot is where key lies, or where it may be put. No key is 0.
func (t *table) slot(key uint64) int {
	i := int(key * t.multiplier >> (64 - t.bits))
	for t.key[i] != 0 && t.key[i] != key {
		i = (i + 1) & (1<<t.bits - 1)
	}
	return i
}

// set notes an entry. It returns false when the table is full.
func (t *table) set(r record, where side) bool {
	old, new := &t.manifest[0], &t.manifest[1]
	if r.key != manifestKey {
		i := t.slot(r.key)
		if t.key[i] == 0 {
			if t.n == t.most {
				return false
			}
			t.key[i] = r.key
			t.n++
		}
		old, new = &t.old[i], &t.new[i]
	}
	value := uint64(r.size)<<32 | uint64(r.crc)
	if r.size == 0 {
		value = 0
	}
	if where&inOld != 0 {
		*old = value
	}
	if where&inNew != 0 {
		*new = value
	}
	return true
}

// totals counts chunks and their bytes, as they lie in the repository.
type totals struct{ chunks, bytes int64 }

func (t *totals) add(value uint64) {
	t.chunks++
	t.bytes += int64(value >> 32)
}

// comparison is what became of the chunks.
type comparison struct {
	old, new  totals // alive before, and now
	vanished  totals // alive before, and not now
	rewritten totals // alive both times, with other data
	added     totals
	// The table of archives was there before, is there now.
	oldManifest, newManifest bool
}

// span is a part of all keys.
type span struct{ first, last uint64 }

// each replays the segments for one part of the keys after another, in the memory of
// one table of that many bits, and calls done with each.
func each(ctx context.Context, p *pack, segments []segment, bits uint, done func(span, *table)) error {
	t := newTable(bits)
	// Parts are not quite even; one that does not fit is divided.
	parts := p.total(segments, inOld|inNew)/int64(t.most/8*7) + 1
	step := ^uint64(0)/uint64(parts) + 1 // 0 for a single part
	var todo []span
	for i := range uint64(parts) {
		s := span{first: i * step, last: (i+1)*step - 1}
		if i == uint64(parts)-1 {
			s.last = ^uint64(0)
		}
		todo = append(todo, s)
	}
	for len(todo) > 0 {
		s := todo[0]
		t.reset()
		fits, err := fill(ctx, p, segments, t, s)
		if err != nil {
			return err
		}
		if !fits {
			// The keys of a Borg repository are hashes and lie evenly.
			if s.last-s.first < 1<<40 {
				return fmt.Errorf("the keys of the chunks are not what borg makes: more than %d begin alike", t.most)
			}
			middle := s.first + (s.last-s.first)/2
			todo = append([]span{{s.first, middle}, {middle + 1, s.last}}, todo[1:]...)
			continue
		}
		done(s, t)
		todo = todo[1:]
	}
	return nil
}

// fill replays the segments, as borg does when it builds its index, for the keys of
// s. It returns false when there are too many for the table.
func fill(ctx context.Context, p *pack, segments []segment, t *table, s span) (bool, error) {
	for i := range segments {
		if i%64 == 0 && ctx.Err() != nil {
			return false, ctx.Err()
		}
		for _, b := range p.find(segments[i].number, segments[i].id) {
			if b.count == 0 || b.flags&flagBroken != 0 {
				continue
			}
			all, err := p.read(&b)
			if err != nil {
				return false, err
			}
			for k := all.from(s.first); k < all.len(); k++ {
				r := all.at(k)
				if r.key > s.last {
					break
				}
				if !t.set(r, segments[i].where) {
					return false, nil
				}
			}
		}
	}
	return true, nil
}

// mix spreads a key over all values, by a secret.
func mix(key, secret uint64) uint64 {
	high, low := bits.Mul64(key^secret, 0x9e3779b97f4a7c15)
	x := high ^ low ^ secret
	x ^= x >> 32
	x *= 0xd6e8feb86659fd93
	return x ^ x>>32
}
