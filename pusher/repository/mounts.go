package repository

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"farkeep/shared/hint"
)

// maxMounts bounds /proc/self/mountinfo, in bytes.
const maxMounts = 16 << 20

// mountTable is the mount points of this process, the later of two at the same
// place being the one that is seen.
type mountTable map[string]string // mount point to file system type

func readMounts() (mountTable, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	t, err := parseMounts(io.LimitReader(f, maxMounts))
	if err != nil {
		return nil, fmt.Errorf("read /proc/self/mountinfo: %w", err)
	}
	return t, nil
}

// parseMounts reads proc_pid_mountinfo(5): the fifth field is the mount point,
// and the file system's type follows a dash.
func parseMounts(r io.Reader) (mountTable, error) {
	t := mountTable{}
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		before, after, ok := strings.Cut(lines.Text(), " - ")
		fields, kind := strings.Fields(before), strings.Fields(after)
		if !ok || len(fields) < 6 || len(kind) < 1 {
			return nil, fmt.Errorf("%.80q is not understood", lines.Text())
		}
		t[unescape(fields[4])] = kind[0]
	}
	return t, lines.Err()
}

// unescape undoes the kernel's \ooo for space, tab, newline and backslash.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// locate resolves path and makes sure that it lies on a file system mounted at
// mount, unless mount is "". It returns the path without symbolic links, and the
// mount point that it lies below.
func (t mountTable) locate(path, mount string) (real, at string, err error) {
	real, err = filepath.EvalSymlinks(path)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = hint.Because(fmt.Errorf("%s is not there", path), "is its disk mounted? If it was removed for good, take it out of site.toml")
		}
		return "", "", err
	}
	info, err := os.Stat(real)
	if err != nil {
		return "", "", err
	}
	if !info.IsDir() {
		return "", "", fmt.Errorf("%s is not a folder", path)
	}
	at = t.mountOf(real, "")
	if mount == "" {
		return real, at, nil
	}
	point, err := filepath.EvalSymlinks(mount)
	if err != nil {
		return "", "", hint.Because(fmt.Errorf("mount point of %s: %w", path, err), "mount it, then push again")
	}
	// An automounter's own mount is only the promise of one.
	if kind, mounted := t[point]; !mounted || kind == "autofs" {
		return "", "", hint.Because(fmt.Errorf("nothing is mounted at %s, where %s should be", mount, path), "mount it, then push again")
	}
	if !below(real, point) {
		return "", "", fmt.Errorf("%s does not lie below its mount point %s", path, mount)
	}
	return real, at, nil
}

// mountOf finds the longest mount point above path, or path itself.
func (t mountTable) mountOf(path, known string) string {
	for p := path; p != "/" && p != known; p = filepath.Dir(p) {
		if _, ok := t[p]; ok {
			return p
		}
	}
	if known != "" {
		return known
	}
	return "/"
}

func below(path, root string) bool {
	return path == root || root == "/" || strings.HasPrefix(path, root+"/")
}
