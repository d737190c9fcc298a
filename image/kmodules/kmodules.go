// Package kmodules picks from a kernel's modules exactly those that a set of
// hardware and features needs, closed over hard and soft dependencies, and
// writes depmod's index files anew for the few that are left. A root that
// neither a module nor a built-in provides is an error, so that a kernel update
// cannot silently drop a driver.
//
// Formats: depmod(8), modules.dep(5), modprobe.d(5); module names treat "-" and
// "_" alike.
package kmodules

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/ulikunitz/xz"

	"farkeep/shared/modname"
)

// maxModule bounds a decompressed module.
const maxModule = 64 << 20

// Index is what depmod and the kernel's build say about one kernel's modules.
type Index struct {
	source  Source
	paths   map[string]string   // module → path relative to the modules directory
	deps    map[string][]string // module → modules it needs, as modules.dep lists them
	soft    map[string][]string // module → names it would like (pre and post)
	aliases []alias
	builtin map[string]bool
	// builtinAliases come from modules.builtin.modinfo.
	builtinAliases []alias
}

type alias struct{ pattern, module string }

// Source reads a file of a modules directory (lib/modules/VERSION).
type Source func(name string) ([]byte, error)

// Dir is the modules directory at path.
func Dir(path string) Source {
	fsys := os.DirFS(path)
	return func(name string) ([]byte, error) { return fs.ReadFile(fsys, name) }
}

// Memory is a modules directory as Files makes it.
func Memory(files []File) Source {
	return func(name string) ([]byte, error) {
		for _, f := range files {
			if f.Path == name {
				return f.Data, nil
			}
		}
		return nil, fmt.Errorf("%s: %w", name, fs.ErrNotExist)
	}
}

// Load reads the index of a modules directory after depmod has run on it.
func Load(source Source) (*Index, error) {
	ix := &Index{
		source: source, paths: map[string]string{}, deps: map[string][]string{},
		soft: map[string][]string{}, builtin: map[string]bool{},
	}
	if err := eachLine(source, "modules.dep", ix.addDep); err != nil {
		return nil, err
	}
	err := eachLine(source, "modules.alias", func(line string) error {
		// Some sound drivers have patterns with spaces in them.
		f := strings.Fields(line)
		if len(f) < 3 || f[0] != "alias" {
			return fmt.Errorf("%q is not an alias", line)
		}
		ix.aliases = append(ix.aliases, alias{strings.Join(f[1:len(f)-1], " "), modname.Canonical(f[len(f)-1])})
		return nil
	})
	if err != nil {
		return nil, err
	}
	err = eachLine(source, "modules.softdep", func(line string) error {
		f := strings.Fields(line)
		if len(f) < 3 || f[0] != "softdep" {
			return fmt.Errorf("%q is not a soft dependency", line)
		}
		for _, word := range f[2:] {
			if word != "pre:" && word != "post:" {
				ix.soft[modname.Canonical(f[1])] = append(ix.soft[modname.Canonical(f[1])], word)
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	err = eachLine(source, "modules.builtin", func(line string) error {
		ix.builtin[modname.Canonical(line)] = true
		return nil
	})
	if err != nil {
		return nil, err
	}
	return ix, ix.loadModinfo()
}

func (ix *Index) addDep(line string) error {
	file, needs, ok := strings.Cut(line, ":")
	if !ok || !fs.ValidPath(file) {
		return fmt.Errorf("%q is not a dependency", line)
	}
	name := modname.Canonical(file)
	if other, ok := ix.paths[name]; ok {
		return fmt.Errorf("module %s is there twice: %s and %s", name, other, file)
	}
	ix.paths[name] = file
	for need := range strings.FieldsSeq(needs) {
		ix.deps[name] = append(ix.deps[name], modname.Canonical(need))
	}
	return nil
}

// loadModinfo reads "module.key=value" records that each end in a NUL byte.
func (ix *Index) loadModinfo() error {
	data, err := ix.source("modules.builtin.modinfo")
	if err != nil {
		return fmt.Errorf("kernel modules: %w", err)
	}
	for record := range bytes.SplitSeq(data, []byte{0}) {
		module, rest, ok := strings.Cut(string(record), ".")
		if !ok {
			continue
		}
		// modules.builtin leaves out drivers that cannot be built as modules.
		ix.builtin[modname.Canonical(module)] = true
		if pattern, isAlias := strings.CutPrefix(rest, "alias="); isAlias {
			ix.builtinAliases = append(ix.builtinAliases, alias{pattern, modname.Canonical(module)})
		}
	}
	return nil
}

func eachLine(source Source, file string, each func(string) error) error {
	data, err := source(file)
	if err != nil {
		return fmt.Errorf("kernel modules: %w", err)
	}
	n := 0
	for line := range strings.Lines(string(data)) {
		n++
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		if err := each(line); err != nil {
			return fmt.Errorf("kernel modules: %s:%d: %w", file, n, err)
		}
	}
	return nil
}

// Lookup returns the modules and the built-in drivers that claim a modalias,
// or that go by that name.
func (ix *Index) Lookup(modalias string) (modules, builtin []string) {
	name := modname.Canonical(modalias)
	if _, ok := ix.paths[name]; ok {
		modules = append(modules, name)
	}
	if ix.builtin[name] {
		builtin = append(builtin, name)
	}
	for _, a := range ix.aliases {
		if modname.Match(a.pattern, modalias) && !slices.Contains(modules, a.module) {
			modules = append(modules, a.module)
		}
	}
	for _, a := range ix.builtinAliases {
		if modname.Match(a.pattern, modalias) && !slices.Contains(builtin, a.module) {
			builtin = append(builtin, a.module)
		}
	}
	return modules, builtin
}

// Builtin says whether a driver is part of the kernel image.
func (ix *Index) Builtin(name string) bool { return ix.builtin[modname.Canonical(name)] }

// Path returns a module's file relative to the modules directory, "" if there is none.
func (ix *Index) Path(name string) string { return ix.paths[modname.Canonical(name)] }

// Closure returns roots and everything that they need, sorted. A root is a
// module's name or a modalias.
func (ix *Index) Closure(roots []string) ([]string, error) {
	done := map[string]bool{}
	var visit func(module string)
	visit = func(module string) {
		if done[module] {
			return
		}
		done[module] = true
		for _, need := range ix.deps[module] {
			visit(need)
		}
		for _, wish := range ix.soft[module] {
			// A soft dependency that this kernel does not have is no error: modprobe says the same.
			modules, _ := ix.Lookup(wish)
			for _, m := range modules {
				visit(m)
			}
		}
	}
	for _, root := range roots {
		modules, builtin := ix.Lookup(root)
		if len(modules)+len(builtin) == 0 {
			return nil, fmt.Errorf("kernel modules: nothing provides %s", root)
		}
		for _, m := range modules {
			visit(m)
		}
	}
	names := make([]string, 0, len(done))
	for name := range done {
		if ix.paths[name] == "" {
			return nil, fmt.Errorf("kernel modules: %s is needed, but modules.dep does not know it", name)
		}
		names = append(names, name)
	}
	slices.Sort(names)
	return names, nil
}

// File is a file of a modules directory.
type File struct {
	Path string
	Data []byte
}

// Files returns the modules directory reduced to the given modules: the modules
// themselves, decompressed, depmod's index files for them, and the lists of
// built-in drivers as they are.
func (ix *Index) Files(modules []string) ([]File, error) {
	in := map[string]bool{}
	for _, m := range modules {
		in[m] = true
	}
	var files []File
	var dep, aliases, soft bytes.Buffer
	for _, m := range modules {
		data, err := ix.read(ix.paths[m])
		if err != nil {
			return nil, err
		}
		files = append(files, File{plain(ix.paths[m]), data})
		fmt.Fprintf(&dep, "%s:", plain(ix.paths[m]))
		for _, need := range ix.deps[m] {
			if !in[need] {
				return nil, fmt.Errorf("kernel modules: %s needs %s, which is left out", m, need)
			}
			fmt.Fprintf(&dep, " %s", plain(ix.paths[need]))
		}
		dep.WriteByte('\n')
		if len(ix.soft[m]) > 0 {
			fmt.Fprintf(&soft, "softdep %s pre: %s\n", m, strings.Join(ix.soft[m], " "))
		}
	}
	for _, a := range ix.aliases {
		if in[a.module] {
			fmt.Fprintf(&aliases, "alias %s %s\n", a.pattern, a.module)
		}
	}
	for _, name := range []string{"modules.builtin", "modules.builtin.modinfo"} {
		data, err := ix.source(name)
		if err != nil {
			return nil, fmt.Errorf("kernel modules: %w", err)
		}
		files = append(files, File{name, data})
	}
	return append(files,
		File{"modules.dep", dep.Bytes()},
		File{"modules.alias", aliases.Bytes()},
		File{"modules.softdep", soft.Bytes()},
	), nil
}

// plain is the path of a module once it is decompressed.
func plain(file string) string { return strings.TrimSuffix(file, ".xz") }

func (ix *Index) read(file string) ([]byte, error) {
	data, err := ix.source(file)
	if err != nil {
		return nil, fmt.Errorf("kernel modules: %w", err)
	}
	switch {
	case strings.HasSuffix(file, ".ko"):
		return data, nil
	case strings.HasSuffix(file, ".ko.xz"):
		r, err := xz.NewReader(bytes.NewReader(data))
		if err != nil {
			return nil, fmt.Errorf("kernel modules: %s: %w", file, err)
		}
		out, err := io.ReadAll(io.LimitReader(r, maxModule+1))
		if err != nil {
			return nil, fmt.Errorf("kernel modules: decompress %s: %w", file, err)
		}
		if len(out) > maxModule {
			return nil, fmt.Errorf("kernel modules: %s is larger than %d bytes", file, maxModule)
		}
		return out, nil
	}
	return nil, fmt.Errorf("kernel modules: %s: unknown compression", file)
}

// OF returns the modalias of a device tree node with the given "compatible"
// names, as the kernel makes it (drivers/of/module.c).
func OF(compatible []string) string {
	return "of:NTC" + strings.Join(compatible, "C")
}
