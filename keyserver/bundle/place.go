package bundle

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"farkeep/shared/hint"
	"farkeep/shared/site"
)

// Placement refuses a place for a bundle that a repository or a target of the site
// covers: the bundle would be mirrored to the very disk that it opens, or lie where
// home's enemy looks first. Warnings are what is unwise, and what cannot be known.
func Placement(s *site.Site, to string) (warnings []string, err error) {
	place, err := real(to)
	if err != nil {
		return nil, err
	}
	type source struct{ what, path string }
	var sources []source
	for _, r := range s.Repositories {
		sources = append(sources, source{"the repository " + r.Name, r.Path})
	}
	for _, f := range s.Folders {
		sources = append(sources, source{"the folder of repositories", f.Path})
	}
	for _, d := range s.Directories {
		sources = append(sources, source{"the target " + d.Name, d.Path})
	}
	parent := place
	for {
		if _, err := os.Stat(parent); err == nil || parent == "/" {
			break
		}
		parent = filepath.Dir(parent)
	}
	var shared []string
	for _, src := range sources {
		at, err := real(src.path)
		if err != nil {
			at = filepath.Clean(src.path)
		}
		if below(place, at) || below(at, place) {
			return nil, hint.Exit(hint.ExitUsage, hint.Because(fmt.Errorf("%s lies in %s, %s of the site", to, src.path, src.what),
				"a bundle never lies where a backup takes it along: use a stick, or a folder that nothing mirrors"))
		}
		if _, err := os.Stat(at); err == nil && device(at) == device(parent) {
			shared = append(shared, src.path)
		}
	}
	if len(shared) > 0 {
		warnings = append(warnings, fmt.Sprintf("the bundle is on the same file system as %s: what destroys them destroys it", strings.Join(shared, ", ")))
	}
	if name, err := os.Hostname(); err == nil && name == s.Home.Name {
		warnings = append(warnings, "this machine is the site's Borg server: carry the bundle away from home, and leave no copy here")
	}
	warnings = append(warnings, "which folders Borg backs up is not known here: see that none of them holds the bundle or the site folder")
	return warnings, nil
}

// real is the path without links, as far as it exists.
func real(path string) (string, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	rest := ""
	for {
		resolved, err := filepath.EvalSymlinks(path)
		if err == nil {
			return filepath.Join(resolved, rest), nil
		}
		if !errors.Is(err, fs.ErrNotExist) || path == "/" {
			return "", fmt.Errorf("find %s: %w", path, err)
		}
		if _, err := os.Lstat(path); err == nil {
			return "", fmt.Errorf("%s is a link that leads nowhere", path)
		}
		rest = filepath.Join(filepath.Base(path), rest)
		path = filepath.Dir(path)
	}
}

func below(path, root string) bool {
	return path == root || root == "/" || strings.HasPrefix(path, root+"/")
}

func device(path string) uint64 {
	var st syscall.Stat_t
	if syscall.Stat(path, &st) != nil {
		return 0
	}
	return st.Dev
}
