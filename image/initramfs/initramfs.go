// Package initramfs writes the archive that the kernel unpacks into RAM as the
// appliance's whole userland. Everything in it belongs to root, times are
// fixed, entries are sorted: the same tree gives the same bytes. Device nodes
// need no root, because they are only written down, not made.
//
// Source: Linux Documentation/driver-api/early-userspace/buffer-format.rst
// (the "newc" format).
package initramfs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"
)

// File types of st_mode.
const (
	typeDir    = 0o040000
	typeFile   = 0o100000
	typeChar   = 0o020000
	headerSize = 110
	trailer    = "TRAILER!!!"
)

// Tree is what the archive will hold. The zero value is an empty tree.
type Tree struct {
	nodes map[string]node
}

type node struct {
	mode         uint32
	data         []byte
	major, minor uint32
}

func (n node) isDir() bool { return n.mode&^0o7777 == typeDir }

func (t *Tree) add(name string, n node) error {
	clean := path.Clean("/" + name)[1:]
	if clean == "" || clean != strings.Trim(name, "/") || strings.ContainsRune(name, 0) {
		return fmt.Errorf("initramfs: name %q", name)
	}
	if t.nodes == nil {
		t.nodes = make(map[string]node)
	}
	if dir := path.Dir(clean); dir != "." {
		if parent, ok := t.nodes[dir]; !ok {
			if err := t.Dir(dir, 0o755); err != nil {
				return err
			}
		} else if !parent.isDir() {
			return fmt.Errorf("initramfs: %s is not a directory", dir)
		}
	}
	if old, ok := t.nodes[clean]; ok && (old.mode != n.mode || !n.isDir()) {
		return fmt.Errorf("initramfs: %s is there twice", clean)
	}
	t.nodes[clean] = n
	return nil
}

// Dir adds a directory; parents that are missing are made with mode 0755.
func (t *Tree) Dir(name string, perm uint32) error {
	return t.add(name, node{mode: typeDir | perm})
}

// File adds a regular file. The tree keeps data; it must not change afterwards.
func (t *Tree) File(name string, perm uint32, data []byte) error {
	if int64(len(data)) > 1<<32-1 {
		return fmt.Errorf("initramfs: %s is too large", name)
	}
	return t.add(name, node{mode: typeFile | perm, data: data})
}

// Char adds a character device.
func (t *Tree) Char(name string, perm, major, minor uint32) error {
	return t.add(name, node{mode: typeChar | perm, major: major, minor: minor})
}

// Write writes the uncompressed archive; every entry gets the time mtime.
func (t *Tree) Write(w io.Writer, mtime time.Time) error {
	names := make([]string, 0, len(t.nodes))
	for name := range t.nodes {
		names = append(names, name)
	}
	slices.Sort(names) // parents sort before what they hold
	var b bytes.Buffer
	for i, name := range names {
		n := t.nodes[name]
		links := uint32(1)
		if n.isDir() {
			links = 2
		}
		entry(&b, name, n, uint32(i+1), links, uint32(mtime.Unix()))
		if _, err := b.WriteTo(w); err != nil {
			return fmt.Errorf("initramfs: write %s: %w", name, err)
		}
	}
	entry(&b, trailer, node{}, 0, 1, 0)
	if _, err := b.WriteTo(w); err != nil {
		return fmt.Errorf("initramfs: write the trailer: %w", err)
	}
	return nil
}

func entry(b *bytes.Buffer, name string, n node, inode, links, mtime uint32) {
	b.WriteString("070701")
	for _, field := range []uint32{
		inode, n.mode, 0, 0, links, mtime, uint32(len(n.data)),
		0, 0, n.major, n.minor, uint32(len(name) + 1), 0,
	} {
		fmt.Fprintf(b, "%08x", field)
	}
	b.WriteString(name)
	b.WriteByte(0)
	pad(b, headerSize+len(name)+1)
	b.Write(n.data)
	pad(b, len(n.data))
}

func pad(b *bytes.Buffer, length int) {
	b.Write(make([]byte, (4-length%4)%4))
}

// Compress returns the archive as one zstd frame, which kernels with
// CONFIG_RD_ZSTD unpack. One thread, so that the bytes depend on the tree alone.
func (t *Tree) Compress(mtime time.Time) ([]byte, error) {
	var plain bytes.Buffer
	if err := t.Write(&plain, mtime); err != nil {
		return nil, err
	}
	if plain.Len() == 0 {
		return nil, errors.New("initramfs: empty")
	}
	enc, err := zstd.NewWriter(nil,
		zstd.WithEncoderConcurrency(1),
		zstd.WithEncoderLevel(zstd.SpeedBestCompression),
		zstd.WithWindowSize(8<<20))
	if err != nil {
		return nil, fmt.Errorf("initramfs: %w", err)
	}
	defer enc.Close()
	return enc.EncodeAll(plain.Bytes(), nil), nil
}
