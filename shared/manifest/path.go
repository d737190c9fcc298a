package manifest

import (
	"errors"
	"fmt"
	"strings"
)

// Limits on names. MaxPath and MaxPart are Linux's own (PATH_MAX, NAME_MAX);
// MaxDepth bounds the folders that a receiver must hold open at once.
const (
	MaxPath  = 4095
	MaxPart  = 255
	MaxDepth = 100
)

// ErrPath is wrapped by every error of CheckPath.
var ErrPath = errors.New("not a path that a generation can hold")

// CheckPath is the one door for names: no path that it refuses reaches a file
// system, on either side. A path is relative to its repository, its parts are
// separated by single slashes, and it may hold any bytes but NUL and newline;
// it need not be UTF-8, because file names on Linux need not be. Refused are the
// empty path, absolute ones, the parts "", "." and "..", and what passes the
// limits above. The error quotes the path.
func CheckPath(p string) error {
	if p == "" {
		return fmt.Errorf("%w: it is empty", ErrPath)
	}
	if len(p) > MaxPath {
		return fmt.Errorf("%w: %.64q... has %d bytes, %d are allowed", ErrPath, p, len(p), MaxPath)
	}
	if p[0] == '/' {
		return fmt.Errorf("%w: %s is absolute", ErrPath, quote(p))
	}
	if strings.IndexByte(p, 0) >= 0 || strings.IndexByte(p, '\n') >= 0 {
		return fmt.Errorf("%w: %s holds a NUL or a newline", ErrPath, quote(p))
	}
	depth := 0
	for rest, more := p, true; more; {
		var part string
		part, rest, more = strings.Cut(rest, "/")
		depth++
		switch {
		case part == "":
			return fmt.Errorf("%w: %s has an empty part", ErrPath, quote(p))
		case part == "." || part == "..":
			return fmt.Errorf("%w: %s has the part %q", ErrPath, quote(p), part)
		case len(part) > MaxPart:
			return fmt.Errorf("%w: %s has a part of %d bytes, %d are allowed", ErrPath, quote(p), len(part), MaxPart)
		case depth > MaxDepth:
			return fmt.Errorf("%w: %s is more than %d folders deep", ErrPath, quote(p), MaxDepth)
		}
	}
	return nil
}

// quote shortens what a hostile peer may have made long.
func quote(p string) string {
	if len(p) > 200 {
		return fmt.Sprintf("%.200q...", p)
	}
	return fmt.Sprintf("%q", p)
}

// ComparePaths is the order of a manifest: bytewise, with the slash before
// every other byte. So a folder's content follows it at once ("a", "a/b",
// "a.b"), which is the order of a walk that sorts each folder's names, and which
// lets a reader check with one path of memory that every parent is a folder.
func ComparePaths(a, b string) int {
	n := min(len(a), len(b))
	i := 0
	for i < n && a[i] == b[i] {
		i++
	}
	switch {
	case i < n && a[i] == '/':
		return -1
	case i < n && b[i] == '/':
		return 1
	case i < n && a[i] < b[i]:
		return -1
	case i < n:
		return 1
	case len(a) < len(b):
		return -1
	case len(a) > len(b):
		return 1
	}
	return 0
}
