package mount

import (
	"fmt"
	"math"
	"slices"
	"strings"

	"farkeep/pusher/readback"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"
)

// node is a file or folder of the generation.
type node struct {
	name     string
	parent   int32
	kind     manifest.Kind
	mode     uint32
	mtime    int64
	size     int64
	sum      manifest.Sum
	children []int32 // of a folder, sorted by name
}

// index is a generation's manifest in memory; nodes[0] is its top.
type index struct{ nodes []node }

func readIndex(t readback.Tree, g pushwire.Generation) (*index, error) {
	x := &index{nodes: []node{{kind: manifest.Folder, mode: 0o755, mtime: g.Committed.UnixNano()}}}
	// The folders from the top to the one that entries go into. A manifest lists a
	// folder's content right after it.
	type level struct {
		path string
		at   int32
	}
	stack := []level{{"", 0}}
	_, err := readback.ReadManifest(t, g, func(e manifest.Entry) error {
		if len(x.nodes) == math.MaxInt32 {
			return fmt.Errorf("more than %d files and folders", math.MaxInt32)
		}
		cut := strings.LastIndexByte(e.Path, '/')
		for stack[len(stack)-1].path != e.Path[:max(cut, 0)] {
			stack = stack[:len(stack)-1]
		}
		parent := stack[len(stack)-1].at
		at := int32(len(x.nodes))
		// Cloned, so that a short name does not hold a long path.
		x.nodes = append(x.nodes, node{
			name: strings.Clone(e.Path[cut+1:]), parent: parent, kind: e.Kind, mode: e.Mode, mtime: e.MTime, size: e.Size, sum: e.Sum,
		})
		x.nodes[parent].children = append(x.nodes[parent].children, at)
		if e.Kind == manifest.Folder {
			stack = append(stack, level{e.Path, at})
		}
		return nil
	})
	return x, err
}

// child finds a name in a folder. A manifest's order is bytewise within a folder.
func (x *index) child(folder int32, name string) (int32, bool) {
	children := x.nodes[folder].children
	i, ok := slices.BinarySearchFunc(children, name, func(at int32, name string) int {
		return strings.Compare(x.nodes[at].name, name)
	})
	if !ok {
		return 0, false
	}
	return children[i], true
}

// path is a node's path in the manifest.
func (x *index) path(at int32) string {
	var parts []string
	for ; at != 0; at = x.nodes[at].parent {
		parts = append(parts, x.nodes[at].name)
	}
	slices.Reverse(parts)
	return strings.Join(parts, "/")
}
