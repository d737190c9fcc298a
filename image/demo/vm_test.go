//go:build vm

package demo_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"farkeep/image/demo"
	"farkeep/image/stage/stagetest"
)

// TestDemo is "make demo": every step of the demonstration holds.
func TestDemo(t *testing.T) {
	bin, dir := stagetest.Programs(t), t.TempDir()
	var story bytes.Buffer
	err := demo.Run(t.Context(), demo.Options{Bin: bin, Dir: dir, Out: &story})
	t.Logf("%s", story.Bytes())
	if err != nil {
		log, _ := os.ReadFile(filepath.Join(dir, "demo.log"))
		t.Fatalf("%v\n%s", err, log[max(0, len(log)-60_000):])
	}
}
