// Package fat writes and reads the card's FAT32 volumes in pure Go, so that an
// image can be built and personalised without root, without loop devices and
// on any system. The same volume description and files give the same bytes.
//
// A volume holds files in its root directory and nothing else: that is all
// that the Raspberry Pi's boot loader needs. Reading accepts what other systems
// write: directories are passed over, and damaged chains or names are errors,
// never loops. It leaves checking to fsck.vfat, which the tests run.
//
// Source: Microsoft, "FAT32 File System Specification", version 1.03.
package fat

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode/utf16"
)

const (
	sectorSize  = 512
	reserved    = 32 // sectors before the first FAT
	entrySize   = 32
	rootCluster = 2
	// minClusters is the least that makes a volume FAT32 by definition (65525),
	// with the margin that the specification recommends.
	minClusters = 65525 + 16
	endOfChain  = 0x0fffffff
	attrVolume  = 0x08
	attrDir     = 0x10
	attrArchive = 0x20
	attrLong    = 0x0f
	// maxRoot bounds the root directory while reading: entries of 32 bytes.
	maxRoot = 65536
	// MaxFile bounds what ReadFile returns; the largest file of a card is the
	// kernel with about 40 MB.
	MaxFile = 256 << 20
)

// Volume describes a file system to be made.
type Volume struct {
	Label  string    // at most 11 upper-case characters
	Serial uint32    // the volume id
	Time   time.Time // of every file, taken as UTC; years 1980 to 2107
	Size   int64     // bytes, a multiple of 512
	Offset int64     // where the volume begins on its disk, in bytes: the "hidden sectors" field
}

// File is a file in the root directory.
type File struct {
	Name string // ASCII, 1 to 255 characters
	Data []byte
}

type geometry struct {
	sectors, perCluster, perFAT, clusters uint32
}

func (g geometry) dataSector() uint32 { return reserved + 2*g.perFAT }

func plan(size int64) (geometry, error) {
	if size%sectorSize != 0 || size <= 0 || size/sectorSize > 1<<31 {
		return geometry{}, fmt.Errorf("fat volume of %d bytes: the size must be a multiple of %d and below 1 TiB", size, sectorSize)
	}
	sectors := uint32(size / sectorSize)
	for perCluster := uint32(64); perCluster >= 1; perCluster /= 2 {
		// Each cluster takes its sectors and 4 bytes in each of the two FATs.
		perFAT := uint32((uint64(sectors-reserved)*4/uint64(perCluster) + sectorSize + 1) / sectorSize)
		if sectors <= reserved+2*perFAT {
			continue
		}
		g := geometry{sectors: sectors, perCluster: perCluster, perFAT: perFAT}
		g.clusters = (sectors - g.dataSector()) / perCluster
		if g.clusters >= minClusters {
			return g, nil
		}
	}
	return geometry{}, fmt.Errorf("fat volume of %d bytes: too small for FAT32, which needs about 34 MiB", size)
}

// Format writes a volume with files to w at offset 0. It assumes that w holds
// zeros over the volume's whole size, and writes only what is not zero.
func Format(w io.WriterAt, v Volume, files []File) error {
	g, err := plan(v.Size)
	if err != nil {
		return err
	}
	if len(v.Label) > 11 || v.Label != strings.ToUpper(v.Label) || !isASCII(v.Label) {
		return fmt.Errorf("fat label %q: at most 11 upper-case characters", v.Label)
	}
	if y := v.Time.UTC().Year(); y < 1980 || y > 2107 {
		return fmt.Errorf("fat volume %s: time %v cannot be written", v.Label, v.Time)
	}

	root, err := directory(v, files)
	if err != nil {
		return err
	}
	// The root directory comes first, then the files, each in one run.
	clusterBytes := int64(g.perCluster) * sectorSize
	clustersOf := func(n int) uint32 { return uint32((int64(n) + clusterBytes - 1) / clusterBytes) }
	table := []uint32{0x0ffffff8, endOfChain}
	addChain := func(n uint32) error {
		if uint64(len(table))+uint64(n) > uint64(g.clusters)+2 {
			return fmt.Errorf("fat volume %s: the files do not fit into %d bytes", v.Label, v.Size)
		}
		for range n {
			table = append(table, uint32(len(table))+1)
		}
		if n > 0 {
			table[len(table)-1] = endOfChain
		}
		return nil
	}
	if err := addChain(clustersOf(len(root))); err != nil {
		return err
	}
	at := func(cluster uint32) int64 {
		return int64(g.dataSector())*sectorSize + int64(cluster-2)*clusterBytes
	}
	var writes []chunk
	for i, f := range files {
		if len(f.Data) == 0 {
			continue
		}
		first := uint32(len(table))
		if err := addChain(clustersOf(len(f.Data))); err != nil {
			return fmt.Errorf("%s: %w", f.Name, err)
		}
		setFirstCluster(root, i, first)
		writes = append(writes, chunk{at(first), f.Data})
	}
	writes = append(writes, chunk{at(rootCluster), root})

	fatBytes := make([]byte, len(table)*4)
	for i, n := range table {
		binary.LittleEndian.PutUint32(fatBytes[i*4:], n)
	}
	boot := bootSector(v, g)
	info := infoSector(g.clusters-uint32(len(table)-2), uint32(len(table)))
	writes = append(writes,
		chunk{0, boot}, chunk{sectorSize, info},
		chunk{6 * sectorSize, boot}, chunk{7 * sectorSize, info},
		chunk{reserved * sectorSize, fatBytes},
		chunk{int64(reserved+g.perFAT) * sectorSize, fatBytes})
	for _, c := range writes {
		if _, err := w.WriteAt(c.data, c.offset); err != nil {
			return fmt.Errorf("fat volume %s: %w", v.Label, err)
		}
	}
	return nil
}

type chunk struct {
	offset int64
	data   []byte
}

func bootSector(v Volume, g geometry) []byte {
	b := make([]byte, sectorSize)
	le := binary.LittleEndian
	copy(b, []byte{0xeb, 0x58, 0x90})
	copy(b[3:], "FARKEEP ")
	le.PutUint16(b[11:], sectorSize)
	b[13] = byte(g.perCluster)
	le.PutUint16(b[14:], reserved)
	b[16] = 2    // number of FATs
	b[21] = 0xf8 // fixed disk
	le.PutUint16(b[24:], 63)
	le.PutUint16(b[26:], 255)
	le.PutUint32(b[28:], uint32(v.Offset/sectorSize))
	le.PutUint32(b[32:], g.sectors)
	le.PutUint32(b[36:], g.perFAT)
	le.PutUint32(b[44:], rootCluster)
	le.PutUint16(b[48:], 1) // information sector
	le.PutUint16(b[50:], 6) // backup of the boot sector
	b[64] = 0x80
	b[66] = 0x29
	le.PutUint32(b[67:], v.Serial)
	copy(b[71:], fmt.Sprintf("%-11s", v.Label))
	copy(b[82:], "FAT32   ")
	// The boot code's place: stop, should a PC ever try to boot from it.
	copy(b[90:], []byte{0xf4, 0xeb, 0xfd})
	b[510], b[511] = 0x55, 0xaa
	return b
}

func infoSector(free, next uint32) []byte {
	b := make([]byte, sectorSize)
	le := binary.LittleEndian
	le.PutUint32(b, 0x41615252)
	le.PutUint32(b[484:], 0x61417272)
	le.PutUint32(b[488:], free)
	le.PutUint32(b[492:], next)
	le.PutUint32(b[508:], 0xaa550000)
	return b
}

// directory returns the root directory's bytes, with every first cluster still 0.
func directory(v Volume, files []File) ([]byte, error) {
	var out []byte
	if v.Label != "" {
		e := make([]byte, entrySize)
		copy(e, fmt.Sprintf("%-11s", v.Label))
		e[11] = attrVolume
		stamp(e, v.Time)
		out = append(out, e...)
	}
	short, seen := map[string]bool{}, map[string]bool{}
	for _, f := range files {
		if err := checkName(f.Name); err != nil {
			return nil, err
		}
		if seen[strings.ToUpper(f.Name)] {
			return nil, fmt.Errorf("fat volume %s: two files named %q", v.Label, f.Name)
		}
		seen[strings.ToUpper(f.Name)] = true
		if int64(len(f.Data)) > MaxFile {
			return nil, fmt.Errorf("fat volume %s: %s is larger than %d bytes", v.Label, f.Name, MaxFile)
		}
		name, exact, err := shortName(f.Name, short)
		if err != nil {
			return nil, err
		}
		short[name] = true
		if !exact {
			out = append(out, longEntries(f.Name, name)...)
		}
		e := make([]byte, entrySize)
		copy(e, name)
		e[11] = attrArchive
		stamp(e, v.Time)
		binary.LittleEndian.PutUint32(e[28:], uint32(len(f.Data)))
		out = append(out, e...)
	}
	if len(out) == 0 {
		out = make([]byte, entrySize)
	}
	return out, nil
}

// setFirstCluster fills in where the i-th file's data begins.
func setFirstCluster(root []byte, i int, cluster uint32) {
	for o := 0; o < len(root); o += entrySize {
		e := root[o : o+entrySize]
		if e[11] == attrLong || e[11]&attrVolume != 0 {
			continue
		}
		if i == 0 {
			binary.LittleEndian.PutUint16(e[20:], uint16(cluster>>16))
			binary.LittleEndian.PutUint16(e[26:], uint16(cluster))
			return
		}
		i--
	}
}

func stamp(e []byte, t time.Time) {
	t = t.UTC()
	date := uint16((t.Year()-1980)<<9 | int(t.Month())<<5 | t.Day())
	clock := uint16(t.Hour()<<11 | t.Minute()<<5 | t.Second()/2)
	le := binary.LittleEndian
	le.PutUint16(e[14:], clock) // created
	le.PutUint16(e[16:], date)
	le.PutUint16(e[18:], date) // read
	le.PutUint16(e[22:], clock)
	le.PutUint16(e[24:], date) // written
}

func isASCII(s string) bool {
	return strings.IndexFunc(s, func(r rune) bool { return r < ' ' || r > '~' }) < 0
}

func checkName(name string) error {
	if name == "" || len(name) > 255 || !isASCII(name) || strings.ContainsAny(name, `"*/:<>?\|`) ||
		strings.HasSuffix(name, ".") || strings.HasSuffix(name, " ") || strings.HasPrefix(name, " ") {
		return fmt.Errorf("fat file name %q cannot be written", name)
	}
	return nil
}

const shortChars = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!#$%&'()-@^_`{}~"

// shortName makes the 8.3 name (11 bytes, padded) for a file. exact says that
// it is the whole truth and no long name is needed.
func shortName(name string, taken map[string]bool) (short string, exact bool, err error) {
	base, ext := name, ""
	if dot := strings.LastIndexByte(name, '.'); dot > 0 {
		base, ext = name[:dot], name[dot+1:]
	}
	keep := func(s string) string {
		return strings.Map(func(r rune) rune {
			if strings.ContainsRune(shortChars, r) {
				return r
			}
			if r == '.' || r == ' ' {
				return -1
			}
			return '_'
		}, strings.ToUpper(s))
	}
	b, e := keep(base), keep(ext)
	fits := strings.EqualFold(b, base) && strings.EqualFold(e, ext) && len(b) <= 8 && len(e) <= 3 && b != ""
	e = e[:min(3, len(e))]
	if fits {
		if s := fmt.Sprintf("%-8s%-3s", b, e); !taken[s] {
			return s, b == base && e == ext, nil
		}
	}
	for n := 1; n < 1000000; n++ {
		tail := fmt.Sprintf("~%d", n)
		if s := fmt.Sprintf("%-8s%-3s", b[:min(8-len(tail), len(b))]+tail, e); !taken[s] {
			return s, false, nil
		}
	}
	return "", false, errors.New("fat volume: too many similar names")
}

func checksum(short string) byte {
	var sum byte
	for i := range 11 {
		sum = (sum>>1 | sum<<7) + short[i]
	}
	return sum
}

// longPlaces is where an entry of a long name keeps its 13 UTF-16 units.
var longPlaces = [13]int{1, 3, 5, 7, 9, 14, 16, 18, 20, 22, 24, 28, 30}

func longEntries(name, short string) []byte {
	units := utf16.Encode([]rune(name))
	if len(units)%13 != 0 {
		units = append(units, 0)
	}
	for len(units)%13 != 0 {
		units = append(units, 0xffff)
	}
	count := len(units) / 13
	out := make([]byte, 0, count*entrySize)
	for n := count; n >= 1; n-- { // the last part comes first
		e := make([]byte, entrySize)
		e[0] = byte(n)
		if n == count {
			e[0] |= 0x40
		}
		e[11] = attrLong
		e[13] = checksum(short)
		for i, place := range longPlaces {
			binary.LittleEndian.PutUint16(e[place:], units[(n-1)*13+i])
		}
		out = append(out, e...)
	}
	return out
}
