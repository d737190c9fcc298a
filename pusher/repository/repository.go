// Package repository finds what is to be mirrored and makes sure that it is what
// it was.
//
// Repositories are named in site.toml, or found: in a folder every Borg 1.x
// repository is one. [Find] reports both, and what lies beside them in such a
// folder and is neither mirrored nor excluded. [Memory] remembers, after the first
// push, where a repository was mounted and which Borg id it has, so that an empty
// mount point or a swapped repository is noticed before anything is pushed.
//
// A Borg 1.x repository that is named is recognised as one; every other tree is
// mirrored as plain files. Among these, repositories of restic and Borg 2 are
// recognised as well ([ReadNamed]): their files are named by their content.
package repository

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"farkeep/shared/contentname"
	"farkeep/shared/hint"
	"farkeep/shared/pushwire"
	"farkeep/shared/site"
)

// Repository is one directory tree to mirror.
type Repository struct {
	Name string `json:"name"`
	Path string `json:"path"`
	Kind string `json:"kind"` // pushwire.KindBorg1 or KindFiles
	// Layout is what kind of files, of KindFiles, and Mark tells one repository of that
	// layout from another. No target is told: it looks at the names itself.
	Layout contentname.Layout `json:"layout,omitempty"`
	Mark   string             `json:"mark,omitempty"`
	ID     string             `json:"id,omitempty"`     // Borg's, hex; "" for files
	Folder string             `json:"folder,omitempty"` // the repository folder it was found in; "" if it is named
	// MountedAt is the mount point of the file system that Path lies on.
	MountedAt string `json:"mounted_at"`
}

// What says what the repository is, in a word.
func (r Repository) What() string {
	if r.Layout != contentname.None {
		return string(r.Layout)
	}
	return r.Kind
}

// Beside is something in a repository folder that is not mirrored, though
// nobody said that it should not be.
type Beside struct {
	Path string `json:"path"`
	Why  string `json:"why"`
}

// Problem is a repository, or a folder of them, that cannot be mirrored as it is.
type Problem struct {
	Name string // of the repository, or the folder's path
	Err  error
}

// Found is what a site's repositories and folders hold.
type Found struct {
	Repositories []Repository // in the order of their names
	Beside       []Beside
	Problems     []Problem
}

// Find looks at every repository and folder of the site. One that cannot be
// mirrored is a Problem and does not keep others from being found.
func Find(s *site.Site) Found {
	var f Found
	mounts, err := readMounts()
	if err != nil {
		f.Problems = append(f.Problems, Problem{"repositories", err})
		return f
	}
	for _, r := range s.Repositories {
		if err := f.named(mounts, r); err != nil {
			f.Problems = append(f.Problems, Problem{r.Name, err})
		}
	}
	for _, folder := range s.Folders {
		if err := f.folder(mounts, folder); err != nil {
			f.Problems = append(f.Problems, Problem{folder.Path, err})
		}
	}
	f.refuseTwins()
	slices.SortFunc(f.Repositories, func(a, b Repository) int { return strings.Compare(a.Name, b.Name) })
	return f
}

func (f *Found) named(mounts mountTable, r site.Repository) error {
	path, at, err := mounts.locate(r.Path, r.Mount)
	if err != nil {
		return err
	}
	found := Repository{Name: r.Name, Path: path, Kind: pushwire.KindBorg1, MountedAt: at}
	borg, err := ReadBorg(path)
	switch {
	case err == nil:
		found.ID = borg.ID
	case errors.Is(err, ErrNotBorg):
		found.Kind = pushwire.KindFiles
		if found.Layout, found.Mark, err = ReadNamed(path); err != nil {
			return err
		}
	default:
		return unreadable(err, path)
	}
	f.Repositories = append(f.Repositories, found)
	return nil
}

func (f *Found) folder(mounts mountTable, s site.Folder) error {
	folder, at, err := mounts.locate(s.Path, s.Mount)
	if err != nil {
		return err
	}
	entries, err := os.ReadDir(folder)
	if err != nil {
		return fmt.Errorf("look for repositories: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(folder, e.Name())
		if slices.Contains(s.Exclude, e.Name()) || e.Name() == "lost+found" {
			continue
		}
		if e.Type()&fs.ModeSymlink != 0 {
			f.Beside = append(f.Beside, Beside{path, "a symbolic link: name what it points to as a repository"})
			continue
		}
		if !e.IsDir() {
			f.Beside = append(f.Beside, Beside{path, "not a folder"})
			continue
		}
		borg, err := ReadBorg(path)
		if errors.Is(err, ErrNotBorg) {
			why := "not a Borg 1.x repository: name it as a repository to mirror it as plain files"
			if layout, _, err := ReadNamed(path); err == nil && layout != contentname.None {
				why = layout.String() + ": name it as a repository to mirror it"
			}
			f.Beside = append(f.Beside, Beside{path, why})
			continue
		}
		name := s.Prefix + e.Name()
		if err != nil {
			err = unreadable(err, path)
		} else {
			err = pushwire.CheckRepository(name)
		}
		if err != nil {
			f.Problems = append(f.Problems, Problem{name, err})
			continue
		}
		f.Repositories = append(f.Repositories, Repository{Name: name, Path: path, Kind: pushwire.KindBorg1, ID: borg.ID, Folder: s.Path, MountedAt: mounts.mountOf(path, at)})
	}
	return nil
}

// unreadable says what to do about a repository at path that could not be read. A
// hint that err has already stays.
func unreadable(err error, path string) error {
	switch {
	case hint.Of(err) != "":
		return err
	case errors.Is(err, fs.ErrPermission):
		return hint.Because(err, "run it as the owner of the repositories, or as root")
	}
	return hint.Because(err, `run "borg check %s"`, path)
}

// refuseTwins takes out repositories that share a name: one would overwrite the
// other's history. A path that is both named and found is mirrored once, under
// the name that it was given.
func (f *Found) refuseTwins() {
	named := map[string]bool{}
	for _, r := range f.Repositories {
		if r.Folder == "" {
			named[r.Path] = true
		}
	}
	f.Repositories = slices.DeleteFunc(f.Repositories, func(r Repository) bool { return r.Folder != "" && named[r.Path] })
	paths := map[string][]string{}
	for _, r := range f.Repositories {
		paths[r.Name] = append(paths[r.Name], r.Path)
	}
	f.Repositories = slices.DeleteFunc(f.Repositories, func(r Repository) bool { return len(paths[r.Name]) > 1 })
	for name, at := range paths {
		if len(at) > 1 {
			err := fmt.Errorf("repositories at %s share the name %s", strings.Join(at, " and "), name)
			f.Problems = append(f.Problems, Problem{name, hint.Because(err, "give one of the repository folders a prefix in site.toml")})
		}
	}
	slices.SortFunc(f.Problems, func(a, b Problem) int { return strings.Compare(a.Name, b.Name) })
}
