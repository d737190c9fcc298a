package part

import (
	"errors"
	"io/fs"
	"path/filepath"
	"testing"
)

func TestMountPoint(t *testing.T) {
	dir := t.TempDir()
	for path, want := range map[string]bool{"/": true, "/proc": true, dir: false, "/proc/self": false} {
		if got, err := MountPoint(path); got != want || err != nil {
			t.Errorf("%s: %v, %v", path, got, err)
		}
	}
	if got, err := MountPoint(filepath.Join(dir, "x")); got || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what is not there: %v, %v", got, err)
	}
}
