// Package mountnstest is for tests that run in a mount namespace of their own. Such a
// namespace begins with a copy of every mount of the machine, and as long as a copy
// lives, a file system does: one that a test of another package has unmounted, and
// checks, would still be written to.
package mountnstest

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Private keeps what is mounted from now on inside the mount namespace of this
// process, which must not be the machine's own, and lets go of everything that tests
// of other packages have mounted below the folder for temporary files.
func Private() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make the mounts private: %w", err)
	}
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for _, point := range below(string(table), os.TempDir()) {
		if err := unix.Unmount(point, unix.MNT_DETACH); err != nil && err != unix.EINVAL {
			return fmt.Errorf("let go of %s: %w", point, err)
		}
	}
	return nil
}

// below is where something is mounted below dir, by /proc/self/mountinfo, what was
// mounted last first.
func below(table, dir string) (points []string) {
	octal := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`) // proc_pid_mountinfo(5)
	for line := range strings.Lines(table) {
		words := strings.Fields(line)
		if len(words) < 5 {
			continue
		}
		if point := octal.Replace(words[4]); strings.HasPrefix(point, filepath.Clean(dir)+"/") {
			points = append(points, point)
		}
	}
	slices.Reverse(points)
	return points
}
