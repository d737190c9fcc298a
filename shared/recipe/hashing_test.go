package recipe_test

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"runtime"
	"testing"
	"testing/synctest"

	"farkeep/shared/manifest"
	"farkeep/shared/recipe"
)

// A long file is hashed beside the rest, in pieces of two buffers that take turns:
// no byte is hashed that was overwritten meanwhile, whatever comes between, and
// whatever ends it, nothing goes on.
func TestHashedBeside(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(2))
	raw := make([]byte, 5<<20)
	rand.NewChaCha8([32]byte{}).Read(raw)
	long := string(raw)
	content := long[:3<<20] + base["old/a"] + long[3<<20:] + base["old/b"] + "end"
	kept := long[:1<<20]
	s := stream(t, begin(1), keep(int64(len(kept))), data(long[len(kept):3<<20]), copies("old/a", 0, 10), data(long[3<<20:]), copies("old/b", 0, 3<<20), data("end"), end(content))
	right := map[int64]manifest.Entry{1: announced(content)}
	wrong := map[int64]manifest.Entry{1: {Path: "new", Kind: manifest.File, Size: int64(len(content)), Sum: sum("other")}}
	synctest.Test(t, func(t *testing.T) {
		got, err := build(s, right, kept)
		if err != nil || got[1] != content {
			t.Errorf("%v, %d bytes, want %d", err, len(got[1]), len(content))
		}
		if _, err := build(s, wrong, kept); !errors.Is(err, recipe.ErrSum) {
			t.Errorf("another sum: %v", err)
		}
		for _, n := range []int{40, 100_000, 2<<20 + 1, len(s) - 40} {
			if _, err := build(s[:n], right, kept); !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("cut after %d bytes: %v", n, err)
			}
		}
		full := errors.New("the disk is full")
		d := recipe.NewDecoder(bytes.NewReader(s))
		if _, err := d.Next(); err != nil {
			t.Fatal(err)
		}
		if err := recipe.Build(d, right[1], &limited{shop: shop{half: kept}, left: 700 << 10, err: full}, make([]byte, 64<<10)); !errors.Is(err, full) {
			t.Errorf("a disk that fills up: %v", err)
		}
	})
}

// limited takes so many bytes.
type limited struct {
	shop
	left int
	err  error
}

func (l *limited) Write(p []byte) (int, error) {
	if l.left -= len(p); l.left < 0 {
		return 0, l.err
	}
	return l.shop.Write(p)
}
