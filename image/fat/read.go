package fat

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"time"
	"unicode/utf16"
)

// FS is a FAT32 volume opened for reading.
type FS struct {
	r     io.ReaderAt
	g     geometry
	Label string
	Time  time.Time // when the volume was made: that of its label, zero for none
	files []entry
}

type entry struct {
	name    string
	cluster uint32
	size    uint32
	dir     bool
}

// Open reads the root directory of the volume that begins at offset 0 of r and
// is at most size bytes long.
func Open(r io.ReaderAt, size int64) (*FS, error) {
	b := make([]byte, sectorSize)
	if _, err := r.ReadAt(b, 0); err != nil {
		return nil, fmt.Errorf("fat volume: read boot sector: %w", err)
	}
	le := binary.LittleEndian
	if b[510] != 0x55 || b[511] != 0xaa || le.Uint16(b[11:]) != sectorSize || le.Uint16(b[17:]) != 0 || le.Uint16(b[22:]) != 0 {
		return nil, errors.New("fat volume: no FAT32 boot sector")
	}
	g := geometry{sectors: le.Uint32(b[32:]), perCluster: uint32(b[13]), perFAT: le.Uint32(b[36:])}
	if g.perCluster == 0 || g.perCluster&(g.perCluster-1) != 0 || b[16] != 2 || le.Uint16(b[14:]) != reserved {
		return nil, errors.New("fat volume: not made by Farkeep (other geometry)")
	}
	head := uint64(reserved) + 2*uint64(g.perFAT)
	if int64(g.sectors) > size/sectorSize || uint64(g.sectors) <= head {
		return nil, errors.New("fat volume: sizes in the boot sector do not fit")
	}
	g.clusters = (g.sectors - uint32(head)) / g.perCluster
	if uint64(g.clusters)+2 > uint64(g.perFAT)*sectorSize/4 {
		return nil, errors.New("fat volume: the file allocation table is too short")
	}
	v := &FS{r: r, g: g}
	root, err := v.chain(le.Uint32(b[44:]), maxRoot*entrySize)
	if err != nil {
		return nil, fmt.Errorf("fat volume: root directory: %w", err)
	}
	return v, v.parse(root)
}

func (v *FS) parse(root []byte) error {
	var long []uint16
	var sum byte
	for o := 0; o+entrySize <= len(root); o += entrySize {
		e := root[o : o+entrySize]
		switch {
		case e[0] == 0:
			return nil
		case e[0] == 0xe5:
			long = nil
			continue
		case e[11]&0x3f == attrLong:
			if e[0]&0x40 != 0 {
				long, sum = nil, e[13]
			}
			part := make([]uint16, 13)
			for i, place := range longPlaces {
				part[i] = binary.LittleEndian.Uint16(e[place:])
			}
			long = append(part, long...)
			if len(long) > 20*13 {
				return errors.New("fat volume: a long name without end")
			}
			continue
		case e[11]&attrVolume != 0:
			v.Label = strings.TrimRight(string(e[:11]), " ")
			v.Time = unstamp(binary.LittleEndian.Uint16(e[24:]), binary.LittleEndian.Uint16(e[22:]))
			long = nil
			continue
		}
		f := entry{
			name:    plainName(e),
			cluster: uint32(binary.LittleEndian.Uint16(e[20:]))<<16 | uint32(binary.LittleEndian.Uint16(e[26:])),
			size:    binary.LittleEndian.Uint32(e[28:]),
			dir:     e[11]&attrDir != 0,
		}
		if long != nil && sum == checksum(string(e[:11])) {
			for i, u := range long {
				if u == 0 {
					long = long[:i]
					break
				}
			}
			f.name = string(utf16.Decode(long))
		}
		long = nil
		v.files = append(v.files, f)
	}
	return nil
}

// plainName turns an 8.3 entry into a name. Bits 3 and 4 of byte 12 say that
// the base or the extension is lower case (Windows NT's and mtools' habit).
func plainName(e []byte) string {
	base, ext := strings.TrimRight(string(e[:8]), " "), strings.TrimRight(string(e[8:11]), " ")
	if e[12]&0x08 != 0 {
		base = strings.ToLower(base)
	}
	if e[12]&0x10 != 0 {
		ext = strings.ToLower(ext)
	}
	if ext == "" {
		return base
	}
	return base + "." + ext
}

func unstamp(date, clock uint16) time.Time {
	return time.Date(1980+int(date>>9), time.Month(date>>5&15), int(date&31),
		int(clock>>11), int(clock>>5&63), int(clock&31)*2, 0, time.UTC)
}

// Names lists the files of the root directory in the order in which they lie there.
func (v *FS) Names() []string {
	var names []string
	for _, f := range v.files {
		if !f.dir {
			names = append(names, f.name)
		}
	}
	return names
}

// ReadFile returns a file of the root directory; names are compared without
// regard to case. A missing file is fs.ErrNotExist.
func (v *FS) ReadFile(name string) ([]byte, error) {
	f, err := v.find(name)
	if err != nil {
		return nil, err
	}
	if f.size == 0 {
		return nil, nil
	}
	if int64(f.size) > MaxFile {
		return nil, fmt.Errorf("fat volume: %s claims %d bytes", f.name, f.size)
	}
	data, err := v.chain(f.cluster, int64(f.size))
	if err != nil {
		return nil, fmt.Errorf("fat volume: %s: %w", f.name, err)
	}
	if len(data) < int(f.size) {
		return nil, fmt.Errorf("fat volume: %s ends after %d of %d bytes", f.name, len(data), f.size)
	}
	return data[:f.size], nil
}

// Locate returns where the first sector of a file lies, in bytes from the
// beginning of the volume, for files that are replaced in place.
func (v *FS) Locate(name string) (offset int64, size uint32, err error) {
	f, err := v.find(name)
	if err != nil {
		return 0, 0, err
	}
	if f.size == 0 || f.cluster < 2 || f.cluster >= v.g.clusters+2 {
		return 0, 0, fmt.Errorf("fat volume: %s has no sectors", f.name)
	}
	return v.at(f.cluster), f.size, nil
}

func (v *FS) find(name string) (entry, error) {
	for _, f := range v.files {
		if !f.dir && strings.EqualFold(f.name, name) {
			return f, nil
		}
	}
	return entry{}, fmt.Errorf("fat volume %s: %s: %w", v.Label, name, fs.ErrNotExist)
}

func (v *FS) at(cluster uint32) int64 {
	return (int64(v.g.dataSector()) + int64(cluster-2)*int64(v.g.perCluster)) * sectorSize
}

// chain reads clusters from first on until the chain ends or limit bytes are there.
func (v *FS) chain(first uint32, limit int64) ([]byte, error) {
	var out []byte
	size := int64(v.g.perCluster) * sectorSize
	cluster := first
	// A chain that visits more clusters than there are has a loop.
	for range v.g.clusters {
		if cluster < 2 || cluster >= v.g.clusters+2 {
			return nil, fmt.Errorf("cluster %d does not exist", cluster)
		}
		// Read a run of neighbours at once: files are nearly always whole runs.
		run, next := uint32(1), uint32(0)
		for {
			var err error
			if next, err = v.next(cluster + run - 1); err != nil {
				return nil, err
			}
			if next != cluster+run || next >= v.g.clusters+2 || int64(len(out))+int64(run)*size >= limit {
				break
			}
			run++
		}
		part := make([]byte, int64(run)*size)
		if _, err := v.r.ReadAt(part, v.at(cluster)); err != nil {
			return nil, fmt.Errorf("read cluster %d: %w", cluster, err)
		}
		out = append(out, part...)
		if int64(len(out)) >= limit || next >= 0x0ffffff8 {
			return out, nil
		}
		cluster = next
	}
	return nil, errors.New("the chain of clusters does not end")
}

func (v *FS) next(cluster uint32) (uint32, error) {
	var b [4]byte
	if _, err := v.r.ReadAt(b[:], reserved*sectorSize+int64(cluster)*4); err != nil {
		return 0, fmt.Errorf("read the allocation of cluster %d: %w", cluster, err)
	}
	return binary.LittleEndian.Uint32(b[:]) & 0x0fffffff, nil
}
