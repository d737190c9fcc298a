// Package kmod loads kernel modules: a fixed list first, then what the machine's
// devices ask for by their modalias, now and whenever one is plugged in.
//
// There is no modprobe and no udev in the firmware, and the kernel's own
// requests for modules go nowhere. This package does their part from depmod's
// index files: dependencies before dependants, soft dependencies too, because
// ext4 does not mount without its checksum module, which is only one of these.
// Loading what is loaded is no error.
//
// Formats: modules.dep(5), modprobe.d(5); modinfo(8) for aliases.
package kmod

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"

	"farkeep/shared/modname"
)

// Bounds on index files: Debian's full modules.alias has 25,000 lines.
const (
	maxLine    = 1 << 20
	maxEntries = 200_000
)

// Index is depmod's knowledge about the modules of one kernel.
type Index struct {
	files   map[string]string   // module → file below the modules folder
	deps    map[string][]string // module → modules that it needs, nearest first
	pre     map[string][]string // module → modules to load before it, if there are any
	post    map[string][]string // ... after it
	builtin map[string]bool
	aliases []alias
}

type alias struct{ pattern, module string }

// ReadIndex reads modules.dep, modules.alias and, where they exist,
// modules.softdep and modules.builtin from a modules folder.
func ReadIndex(fsys fs.FS) (*Index, error) {
	ix := &Index{files: map[string]string{}, deps: map[string][]string{}, pre: map[string][]string{}, post: map[string][]string{}, builtin: map[string]bool{}}
	for _, f := range []struct {
		name     string
		optional bool
		line     func(string) error
	}{
		{"modules.dep", false, ix.addDep},
		{"modules.alias", false, ix.addAlias},
		{"modules.softdep", true, ix.addSoft},
		{"modules.builtin", true, func(s string) error { ix.builtin[modname.Canonical(s)] = true; return nil }},
	} {
		r, err := fsys.Open(f.name)
		if f.optional && errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("kernel modules: %w", err)
		}
		err = eachLine(r, f.line)
		r.Close()
		if err != nil {
			return nil, fmt.Errorf("kernel modules: %s: %w", f.name, err)
		}
	}
	return ix, nil
}

// eachLine calls f for every line that is neither empty nor a comment.
func eachLine(r io.Reader, f func(string) error) error {
	sc := bufio.NewScanner(r)
	sc.Buffer(make([]byte, 64<<10), maxLine)
	for n := 1; sc.Scan(); n++ {
		if n > maxEntries {
			return fmt.Errorf("more than %d lines", maxEntries)
		}
		line := strings.TrimSpace(sc.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		if err := f(line); err != nil {
			return fmt.Errorf("line %d: %w", n, err)
		}
	}
	return sc.Err()
}

func (ix *Index) addDep(line string) error {
	file, needs, ok := strings.Cut(line, ":")
	if !ok || !fs.ValidPath(file) || file == "." {
		return fmt.Errorf("%.80q is not a dependency", line)
	}
	name := modname.Canonical(file)
	ix.files[name] = file
	for need := range strings.FieldsSeq(needs) {
		ix.deps[name] = append(ix.deps[name], modname.Canonical(need))
	}
	return nil
}

func (ix *Index) addAlias(line string) error {
	f := strings.Fields(line)
	if len(f) < 3 || f[0] != "alias" {
		return fmt.Errorf("%.80q is not an alias", line)
	}
	// A few patterns have spaces in them.
	ix.aliases = append(ix.aliases, alias{strings.Join(f[1:len(f)-1], " "), modname.Canonical(f[len(f)-1])})
	return nil
}

func (ix *Index) addSoft(line string) error {
	f := strings.Fields(line)
	if len(f) < 3 || f[0] != "softdep" {
		return fmt.Errorf("%.80q is not a soft dependency", line)
	}
	name, into := modname.Canonical(f[1]), ix.pre
	for _, word := range f[2:] {
		switch word {
		case "pre:":
			into = ix.pre
		case "post:":
			into = ix.post
		default:
			into[name] = append(into[name], word)
		}
	}
	return nil
}

// Lookup returns the modules whose aliases fit a modalias, in the index's
// order. A module's own name, or an alias that names another one, as soft
// dependencies use them, fits too.
func (ix *Index) Lookup(modalias string) []string {
	if name := modname.Canonical(modalias); ix.files[name] != "" && !strings.ContainsAny(modalias, ":,/") {
		return []string{name}
	}
	var out []string
	seen := map[string]bool{}
	for _, a := range ix.aliases {
		if !seen[a.module] && modname.Match(a.pattern, modalias) {
			seen[a.module] = true
			out = append(out, a.module)
		}
	}
	return out
}

// Order returns the files to load for a module, in order, ending with the
// module's own unless soft dependencies follow it. A module that is built into
// the kernel needs none; one that is unknown is an error wrapping
// fs.ErrNotExist.
func (ix *Index) Order(module string) ([]string, error) {
	var out []string
	done := map[string]bool{}
	var visit func(name string, soft bool) error
	visit = func(name string, soft bool) error {
		if done[name] || ix.builtin[name] {
			return nil
		}
		done[name] = true // before the dependencies: cycles end here
		file, ok := ix.files[name]
		if !ok && soft {
			return nil
		}
		if !ok {
			return fmt.Errorf("module %s: %w", name, fs.ErrNotExist)
		}
		each := func(names []string, soft bool) error {
			for _, n := range names {
				targets := []string{modname.Canonical(n)}
				if soft && ix.files[modname.Canonical(n)] == "" {
					targets = ix.Lookup(n)
				}
				for _, target := range targets {
					if err := visit(target, soft); err != nil {
						return err
					}
				}
			}
			return nil
		}
		if err := each(ix.pre[name], true); err != nil {
			return err
		}
		// modules.dep lists all dependencies, the one to load first last.
		deps := ix.deps[name]
		for i := len(deps) - 1; i >= 0; i-- {
			if err := visit(deps[i], false); err != nil {
				return err
			}
		}
		out = append(out, file)
		return each(ix.post[name], true)
	}
	if err := visit(modname.Canonical(module), false); err != nil {
		return nil, err
	}
	return out, nil
}
