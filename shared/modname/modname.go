// Package modname has the two rules by which depmod's index files and the
// kernel's devices speak of modules: how a module is named, and which devices
// an alias means.
//
// Formats: modules.dep(5), modprobe.d(5); modinfo(8) for aliases.
package modname

import (
	"path"
	"strings"
)

// Canonical returns the canonical name of a module, given its name or file: "-"
// and "_" are the same in it.
func Canonical(s string) string {
	s = path.Base(s)
	if i := strings.Index(s, ".ko"); i > 0 {
		s = s[:i]
	}
	return strings.ReplaceAll(s, "-", "_")
}

// Match says whether s fits pattern: "*", "?" and "[a-z]" as in fnmatch(3)
// without flags, which is what depmod and modprobe use. It takes at most
// len(pattern)*len(s) steps.
func Match(pattern, s string) bool {
	star, mark := -1, 0 // the last "*", and the end of what it has taken so far
	p, i := 0, 0
	for i < len(s) {
		if p < len(pattern) && pattern[p] == '*' {
			star, mark = p, i
			p++
			continue
		}
		if n := matchOne(pattern[p:], s[i]); n > 0 {
			p, i = p+n, i+1
			continue
		}
		if star < 0 {
			return false
		}
		mark++
		p, i = star+1, mark
	}
	return strings.Trim(pattern[p:], "*") == ""
}

// matchOne returns the length of pattern's first element if c fits it, else 0.
func matchOne(pattern string, c byte) int {
	if pattern == "" {
		return 0
	}
	n, ok := 1, pattern[0] == c
	switch pattern[0] {
	case '?':
		ok = true
	case '[':
		end := strings.IndexByte(pattern, ']')
		if end < 0 {
			break // a plain bracket
		}
		n, ok = end+1, inSet(pattern[1:end], c)
	}
	if !ok {
		return 0
	}
	return n
}

func inSet(set string, c byte) bool {
	for i := 0; i < len(set); i++ {
		if i+2 < len(set) && set[i+1] == '-' {
			if set[i] <= c && c <= set[i+2] {
				return true
			}
			i += 2
		} else if set[i] == c {
			return true
		}
	}
	return false
}
