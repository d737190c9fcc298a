package listing

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"farkeep/shared/contentname"
)

// BenchmarkNames reads packs for their BLAKE2b, and for what their names say
// beside it; cpu-s/GB is processor time.
func BenchmarkNames(b *testing.B) {
	for _, layout := range []contentname.Layout{contentname.None, contentname.Restic, contentname.Borg2} {
		b.Run("layout="+string(layout), func(b *testing.B) {
			root := b.TempDir()
			const files, size = 16, 16 << 20
			content := make([]byte, size)
			for i := range files {
				content[0] = byte(i)
				// The names are not true: that costs the same.
				path := layout.Path(contentname.Pack, contentname.ID{byte(i)})
				if layout == contentname.None {
					path = fmt.Sprint("plain/", i)
				}
				if err := os.MkdirAll(filepath.Dir(filepath.Join(root, path)), 0o755); err != nil {
					b.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(root, path), content, 0o600); err != nil {
					b.Fatal(err)
				}
			}
			opt := Options{Check: func(name string) Check {
				if c := layout.NewCheck(name); c != nil {
					return c
				}
				return nil
			}}
			before := processorTime()
			b.SetBytes(files * size)
			n := 0
			for b.Loop() {
				Write(b.Context(), root, io.Discard, opt)
				n++
			}
			b.ReportMetric((processorTime()-before).Seconds()*1e9/float64(n*files*size), "cpu-s/GB")
		})
	}
}

func processorTime() time.Duration {
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
