package manifest_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"testing"

	"farkeep/shared/manifest"
)

// opener opens old and nothing else.
func opener(old []byte, digest manifest.Sum) func(manifest.Sum) (io.ReadCloser, error) {
	return func(d manifest.Sum) (io.ReadCloser, error) {
		if d != digest {
			return nil, fmt.Errorf("there is no %v", d)
		}
		return io.NopCloser(bytes.NewReader(old)), nil
	}
}

// some makes a list of files out of n possible ones, of which a few differ from
// those of another call.
func some(r *rand.Rand, n int) []manifest.Entry {
	all := []manifest.Entry{folder("data")}
	for i := range n {
		if r.IntN(8) == 0 {
			continue
		}
		e := file(fmt.Sprintf("data/%04d", i))
		e.Size, e.MTime, e.Mode = int64(i), int64(i), 0o644
		if r.IntN(8) == 0 {
			e.Size += r.Int64N(2)
			e.Sum[0] = byte(r.IntN(2))
			e.MTime += r.Int64N(2)
		}
		all = append(all, e)
	}
	return all
}

func TestDelta(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	for range 200 {
		old, was := encode(t, some(r, r.IntN(100))...)
		new, is := encode(t, some(r, r.IntN(100))...)
		var delta, got bytes.Buffer
		if err := manifest.WriteDelta(&delta, bytes.NewReader(old), bytes.NewReader(new)); err != nil {
			t.Fatal(err)
		}
		s, err := manifest.ApplyDelta(&got, bytes.NewReader(delta.Bytes()), opener(old, was.Digest))
		if err != nil || s != is || !bytes.Equal(got.Bytes(), new) {
			t.Fatalf("%+v, %v; want %+v", s, err, is)
		}
	}
	// What does not change costs nothing, however much it is.
	entries := some(r, 9000)
	old, was := encode(t, entries...)
	entries = slices.Delete(entries, 100, 101)
	entries[5000].MTime++
	new, _ := encode(t, entries...)
	var delta, got bytes.Buffer
	if err := manifest.WriteDelta(&delta, bytes.NewReader(old), bytes.NewReader(new)); err != nil {
		t.Fatal(err)
	}
	if delta.Len() > 200 {
		t.Errorf("two changes in %d entries cost %d bytes", len(entries), delta.Len())
	}
	if _, err := manifest.ApplyDelta(&got, &delta, opener(old, was.Digest)); err != nil || !bytes.Equal(got.Bytes(), new) {
		t.Error(err)
	}
}

func TestDeltaRefused(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 0))
	old, was := encode(t, some(r, 50)...)
	new, _ := encode(t, some(r, 50)...)
	var b bytes.Buffer
	if err := manifest.WriteDelta(&b, bytes.NewReader(old), bytes.NewReader(new)); err != nil {
		t.Fatal(err)
	}
	delta := b.Bytes()
	for n := range delta {
		if _, err := manifest.ApplyDelta(io.Discard, bytes.NewReader(delta[:n]), opener(old, was.Digest)); !errors.Is(err, manifest.ErrDelta) {
			t.Fatalf("%d of %d bytes: %v", n, len(delta), err)
		}
	}
	head := delta[:8+32+32]
	for name, tail := range map[string]string{
		"more than the old one has": "K\xff\x01Z", "nothing": "K\x00Z", "unknown": "?", "behind the end": "ZZ",
		"the same twice": "K\x01D\x00\x04data\xed\x03\x00Z", "an absolute path": "D\x00\x05/data\xed\x03\x00Z", "a shared path": "D\x01\x04data\xed\x03\x00Z",
	} {
		bad := append(bytes.Clone(head), tail...)
		if _, err := manifest.ApplyDelta(io.Discard, bytes.NewReader(bad), opener(old, was.Digest)); !errors.Is(err, manifest.ErrDelta) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// The same content with other times has the same digest, and is another manifest.
	entries := some(rand.New(rand.NewPCG(1, 0)), 50)
	entries[7].MTime += 1000
	touched, s := encode(t, entries...)
	if s.Digest != was.Digest {
		t.Fatal("times are part of the digest")
	}
	if _, err := manifest.ApplyDelta(io.Discard, bytes.NewReader(delta), opener(touched, was.Digest)); !errors.Is(err, manifest.ErrDelta) {
		t.Errorf("on another manifest of the same digest: %v", err)
	}
	gone := errors.New("gone")
	if _, err := manifest.ApplyDelta(io.Discard, bytes.NewReader(delta), func(manifest.Sum) (io.ReadCloser, error) { return nil, gone }); !errors.Is(err, gone) || errors.Is(err, manifest.ErrDelta) {
		t.Errorf("an old manifest that cannot be opened: %v", err)
	}
}

func FuzzDelta(f *testing.F) {
	r := rand.New(rand.NewPCG(1, 0))
	old, was := encode(f, some(r, 20)...)
	new, _ := encode(f, some(r, 20)...)
	var b bytes.Buffer
	if err := manifest.WriteDelta(&b, bytes.NewReader(old), bytes.NewReader(new)); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Add(append(bytes.Clone(b.Bytes()[:72]), 'Z'))
	f.Fuzz(func(t *testing.T, delta []byte) {
		var out bytes.Buffer
		s, err := manifest.ApplyDelta(&out, bytes.NewReader(delta), opener(old, was.Digest))
		if err != nil {
			return
		}
		// What it makes is a manifest, of which nothing is from nowhere.
		if _, got, err := decode(out.Bytes()); err != nil || got != s {
			t.Fatalf("%+v, %v; announced %+v", got, err, s)
		}
		if out.Len() > len(old)+2*len(delta) {
			t.Fatalf("%d bytes out of %d and %d", out.Len(), len(old), len(delta))
		}
	})
}
