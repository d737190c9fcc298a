// Package fdt reads flattened device trees far enough to say which hardware a
// board announces: the "compatible" names of every node that is not disabled.
// It reads untrusted bytes safely: every offset is checked and nesting is
// bounded.
//
// Source: Devicetree Specification 0.4, chapter 5.
package fdt

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
)

const (
	magic     = 0xd00dfeed
	beginNode = 1
	endNode   = 2
	property  = 3
	nop       = 4
	end       = 9
	maxDepth  = 64
)

// Node is a device that a tree announces.
type Node struct {
	Path       string
	Compatible []string // most specific first
}

// Parse returns every enabled node that has a "compatible" property, in the
// tree's order; the first is the root. Nodes below a disabled one do not count.
func Parse(dtb []byte) ([]Node, error) {
	if len(dtb) < 40 || binary.BigEndian.Uint32(dtb) != magic {
		return nil, errors.New("device tree: no header")
	}
	field := func(i int) uint64 { return uint64(binary.BigEndian.Uint32(dtb[i*4:])) }
	total, structAt, stringsAt := field(1), field(2), field(3)
	stringsSize, structSize := field(8), field(9)
	if total > uint64(len(dtb)) || structAt+structSize > total || stringsAt+stringsSize > total {
		return nil, errors.New("device tree: the header points outside the file")
	}
	p := parser{rest: dtb[structAt : structAt+structSize], names: dtb[stringsAt : stringsAt+stringsSize]}
	return p.tree()
}

type parser struct {
	rest, names []byte
}

func (p *parser) word() (uint32, error) {
	if len(p.rest) < 4 {
		return 0, errors.New("device tree: the structure ends early")
	}
	w := binary.BigEndian.Uint32(p.rest)
	p.rest = p.rest[4:]
	return w, nil
}

// take returns n bytes and skips to the next multiple of four.
func (p *parser) take(n int) ([]byte, error) {
	padded := (n + 3) &^ 3
	if n < 0 || padded > len(p.rest) {
		return nil, errors.New("device tree: a value ends outside the structure")
	}
	v := p.rest[:n]
	p.rest = p.rest[padded:]
	return v, nil
}

type open struct {
	path     string
	index    int // of its place in the result; -1 while it has no compatible
	disabled bool
	names    []string
}

func (p *parser) tree() ([]Node, error) {
	var nodes []Node
	var stack []open
	// A node's properties come before its children (chapter 5.4.1), so it is
	// complete when the first child begins or when it ends.
	settle := func() {
		if n := len(stack) - 1; n >= 0 && stack[n].index < 0 && !stack[n].disabled && stack[n].names != nil {
			stack[n].index = len(nodes)
			nodes = append(nodes, Node{Path: stack[n].path, Compatible: stack[n].names})
		}
	}
	for {
		token, err := p.word()
		if err != nil {
			return nil, err
		}
		switch token {
		case beginNode:
			settle()
			length := bytes.IndexByte(p.rest, 0)
			name, err := p.take(length + 1)
			if err != nil || length < 0 {
				return nil, errors.New("device tree: a node's name does not end")
			}
			if len(stack) == maxDepth {
				return nil, fmt.Errorf("device tree: more than %d levels", maxDepth)
			}
			n := open{path: "/", index: -1}
			if len(stack) > 0 {
				parent := stack[len(stack)-1]
				n.disabled = parent.disabled
				n.path = parent.path + string(name[:length])
				if parent.path != "/" {
					n.path = parent.path + "/" + string(name[:length])
				}
			}
			stack = append(stack, n)
		case endNode:
			if len(stack) == 0 {
				return nil, errors.New("device tree: a node ends that never began")
			}
			settle()
			stack = stack[:len(stack)-1]
		case property:
			size, err := p.word()
			if err != nil {
				return nil, err
			}
			nameAt, err := p.word()
			if err != nil {
				return nil, err
			}
			if size > 1<<24 {
				return nil, errors.New("device tree: a value of more than 16 MiB")
			}
			value, err := p.take(int(size))
			if err != nil {
				return nil, err
			}
			if len(stack) == 0 {
				return nil, errors.New("device tree: a property outside a node")
			}
			top := &stack[len(stack)-1]
			switch p.name(nameAt) {
			case "compatible":
				top.names = stringList(value)
			case "status":
				if s := stringList(value); len(s) > 0 && s[0] != "okay" && s[0] != "ok" {
					top.disabled = true
				}
			}
		case nop:
		case end:
			if len(stack) != 0 {
				return nil, errors.New("device tree: it ends inside a node")
			}
			return nodes, nil
		default:
			return nil, fmt.Errorf("device tree: unknown token %d", token)
		}
	}
}

func (p *parser) name(at uint32) string {
	if uint64(at) >= uint64(len(p.names)) {
		return ""
	}
	name, _, _ := bytes.Cut(p.names[at:], []byte{0})
	return string(name)
}

func stringList(value []byte) []string {
	var list []string
	for s := range bytes.SplitSeq(value, []byte{0}) {
		if len(s) > 0 {
			list = append(list, string(s))
		}
	}
	return list
}
