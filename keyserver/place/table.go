package place

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
)

const (
	maxTable = 128 << 20
	maxRows  = 4_000_000
)

// Table says which autonomous system announces an address.
type Table struct{ rows []row }

type row struct {
	from, to netip.Addr
	as       uint32
}

// ReadTable reads a table from a file.
func ReadTable(path string) (*Table, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	t, err := ParseTable(f)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return t, nil
}

// ParseTable reads lines of the form
//
//	first address <tab> last address <tab> AS number [<tab> anything]
//	prefix <space> AS number
//
// The first is the format of iptoasn.com's files, whose AS number 0 means "not
// announced". Lines that are empty or begin with # are passed over. Ranges must
// not overlap: which of two says the truth?
func ParseTable(r io.Reader) (*Table, error) {
	t := &Table{}
	lines := bufio.NewScanner(io.LimitReader(r, maxTable))
	lines.Buffer(make([]byte, 4096), 4096)
	n, size := 0, 0
	for lines.Scan() {
		n++
		text := lines.Text()
		if size += len(text) + 1; size >= maxTable || len(t.rows) >= maxRows {
			return nil, errors.New("the table is too large")
		}
		if text = strings.TrimSuffix(text, "\r"); text == "" || strings.HasPrefix(text, "#") {
			continue
		}
		one, err := parseRow(text)
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		if one.as != 0 {
			t.rows = append(t.rows, one)
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("line %d: %w", n+1, err)
	}
	slices.SortFunc(t.rows, func(a, b row) int { return cmp.Or(a.from.Compare(b.from), a.to.Compare(b.to)) })
	for i := 1; i < len(t.rows); i++ {
		if a, b := t.rows[i-1], t.rows[i]; a.to.BitLen() == b.from.BitLen() && a.to.Compare(b.from) >= 0 {
			return nil, fmt.Errorf("%v lies in the range of AS%d and in that of AS%d", b.from, a.as, b.as)
		}
	}
	return t, nil
}

func parseRow(text string) (row, error) {
	var one row
	words := strings.SplitN(text, "\t", 4)
	number := ""
	if len(words) >= 3 {
		var err1, err2 error
		one.from, err1 = netip.ParseAddr(words[0])
		one.to, err2 = netip.ParseAddr(words[1])
		if err1 != nil || err2 != nil {
			return row{}, errors.New("the range is none")
		}
		number = words[2]
	} else {
		prefix, as, found := strings.Cut(strings.Join(words, " "), " ")
		p, err := netip.ParsePrefix(prefix)
		if !found || err != nil || p.Masked() != p {
			return row{}, errors.New("neither a range nor a prefix with an AS number")
		}
		one.from, one.to, number = p.Addr(), lastOf(p), as
	}
	as, err := strconv.ParseUint(strings.TrimPrefix(number, "AS"), 10, 32)
	if err != nil {
		return row{}, fmt.Errorf("%.20q is no AS number", number)
	}
	one.as = uint32(as)
	one.from, one.to = one.from.Unmap(), one.to.Unmap()
	if one.from.Zone() != "" || one.to.Zone() != "" || one.from.BitLen() != one.to.BitLen() || one.from.Compare(one.to) > 0 {
		return row{}, errors.New("the range is none")
	}
	return one, nil
}

// lastOf is the last address of a prefix.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// AS is the autonomous system that announces a, 0 if none is on file.
func (t *Table) AS(a netip.Addr) uint32 {
	a = a.Unmap().WithZone("")
	// Of all ranges that begin at a or before, only the last can hold it.
	i, found := slices.BinarySearchFunc(t.rows, a, func(r row, a netip.Addr) int { return r.from.Compare(a) })
	if !found {
		i--
	}
	if i < 0 || t.rows[i].to.BitLen() != a.BitLen() || t.rows[i].to.Compare(a) < 0 {
		return 0
	}
	return t.rows[i].as
}

// Len is the number of ranges.
func (t *Table) Len() int { return len(t.rows) }
