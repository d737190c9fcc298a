package suspect

import (
	"bufio"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"farkeep/shared/beneath"
	"farkeep/shared/generations"
)

// An anchor is a sample of what was alive on one day, so that a loss that is spread
// over several pushes is seen as what it is. The sample is drawn by a secret that
// never leaves the scratch folder: nobody at home can tell what must stay for the
// sample to be whole.
//
// File anchor-SECONDS, little endian: "FKANCH01", secret uint64, rate uint64, count
// uint32, count × (key, other, size uint64), CRC-32C of all that. It is sorted by key. An item
// is a chunk, with its entry's CRC as other, or a file, whose content's sum is the key
// and whose name's hash is other.
type anchor struct {
	at     time.Time
	secret uint64
	limit  uint64 // of the lots that are in the sample
	items  []item
}

type item struct{ key, other, size uint64 }

const (
	anchorPrefix = "anchor-"
	anchorMagic  = "FKANCH01"
	itemSize     = 24
	anchorHeader = len(anchorMagic) + 8 + 8 + 4
	// maxSample bounds an anchor, in items of 24 bytes.
	maxSample = 1 << 16
	// A new anchor is taken once a day, and counts for window.
	anchorEvery = 20 * time.Hour
	window      = 8 * 24 * time.Hour
	// maxAnchors bounds the files, whatever the clock does.
	maxAnchors = 16
)

// newAnchor begins a sample of about n keys.
func newAnchor(at time.Time, n int64) *anchor {
	a := &anchor{at: at, secret: rand.Uint64(), limit: math.MaxUint64, items: make([]item, 0, min(max(n, 0), maxSample))}
	if n > maxSample/2 {
		a.limit = math.MaxUint64 / uint64(n/(maxSample/2))
	}
	return a
}

// offer adds an item to the sample if its lot, which comes of the secret, says so.
func (a *anchor) offer(lot uint64, i item) {
	if len(a.items) < maxSample && lot <= a.limit {
		a.items = append(a.items, i)
	}
}

// within are the items whose keys lie in s. The anchor must be sorted.
func (a *anchor) within(s span) []item {
	from, _ := slices.BinarySearchFunc(a.items, s.first, func(i item, k uint64) int { return cmp.Compare(i.key, k) })
	to, found := slices.BinarySearchFunc(a.items, s.last, func(i item, k uint64) int { return cmp.Compare(i.key, k) })
	if found {
		to++
	}
	return a.items[from:to]
}

func (a *anchor) sort() {
	slices.SortFunc(a.items, func(x, y item) int { return cmp.Compare(x.key, y.key) })
}

func anchorName(at time.Time) string { return anchorPrefix + strconv.FormatInt(at.Unix(), 10) }

// save writes the anchor. It may be lost in a power cut: then its CRC says so.
func (a *anchor) save(scratch *beneath.Dir) error {
	a.sort()
	b := make([]byte, 0, anchorHeader+len(a.items)*itemSize+4)
	b = append(b, anchorMagic...)
	b = binary.LittleEndian.AppendUint64(b, a.secret)
	b = binary.LittleEndian.AppendUint64(b, a.limit)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(a.items)))
	for _, i := range a.items {
		b = binary.LittleEndian.AppendUint64(b, i.key)
		b = binary.LittleEndian.AppendUint64(b, i.other)
		b = binary.LittleEndian.AppendUint64(b, i.size)
	}
	b = binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
	f, _, err := scratch.OpenWrite(anchorName(a.at), os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	w := bufio.NewWriter(f)
	w.Write(b)
	return w.Flush()
}

func loadAnchor(scratch *beneath.Dir, at time.Time) (*anchor, error) {
	name := anchorName(at)
	b, err := scratch.ReadFile(name, int64(anchorHeader+itemSize*maxSample+4))
	if err != nil {
		return nil, err
	}
	a, err := parseAnchor(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	a.at = at
	return a, nil
}

func parseAnchor(b []byte) (*anchor, error) {
	if len(b) < anchorHeader+4 || string(b[:len(anchorMagic)]) != anchorMagic {
		return nil, errors.New("is no anchor")
	}
	body, sum := b[:len(b)-4], binary.LittleEndian.Uint32(b[len(b)-4:])
	if crc32.Checksum(body, castagnoli) != sum {
		return nil, errors.New("is damaged")
	}
	a := &anchor{secret: binary.LittleEndian.Uint64(b[8:]), limit: binary.LittleEndian.Uint64(b[16:])}
	n := binary.LittleEndian.Uint32(b[24:])
	items := body[anchorHeader:]
	if n > maxSample || len(items) != int(n)*itemSize {
		return nil, errors.New("is damaged")
	}
	a.items = make([]item, n)
	for i := range a.items {
		b := items[i*itemSize:]
		a.items[i] = item{binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:]), binary.LittleEndian.Uint64(b[16:])}
		if i > 0 && a.items[i].key < a.items[i-1].key {
			return nil, errors.New("is damaged")
		}
	}
	return a, nil
}

// anchors is what the scratch folder has of them.
type anchors struct {
	scratch *beneath.Dir
	oldest  *anchor // that still counts; nil: none
	due     bool    // a new one may be taken
}

// openAnchors reads the oldest anchor that counts and removes those that do not any
// more: older than window, or from before a person accepted the
// current generation: what was lost until then is known. One from the future is left
// out: the clock may be wrong.
func openAnchors(scratch *beneath.Dir, now time.Time, current *generations.Generation) (*anchors, error) {
	as := &anchors{scratch: scratch, due: true}
	var times []time.Time
	var gone []string
	future := 0
	err := scratch.Each(func(e fs.DirEntry) error {
		digits, ok := strings.CutPrefix(e.Name(), anchorPrefix)
		if !ok {
			return nil
		}
		seconds, err := strconv.ParseInt(digits, 10, 64)
		at := time.Unix(seconds, 0)
		accepted := current != nil && current.Standing == generations.Accepted && !at.After(current.Committed)
		if err != nil || now.Sub(at) > window || accepted || len(times)+future >= maxAnchors {
			gone = append(gone, e.Name())
			return nil
		}
		if at.After(now) {
			future++
			return nil
		}
		times = append(times, at)
		as.due = as.due && now.Sub(at) >= anchorEvery
		return nil
	})
	if err != nil {
		return nil, err
	}
	slices.SortFunc(times, time.Time.Compare)
	for _, at := range times {
		a, err := loadAnchor(scratch, at)
		if err == nil {
			as.oldest = a
			break
		}
		if !errors.Is(err, io.EOF) && !errors.Is(err, fs.ErrNotExist) {
			gone = append(gone, anchorName(at))
		}
	}
	for _, name := range gone {
		if err := scratch.RemoveAll(name); err != nil {
			return nil, err
		}
	}
	return as, nil
}
