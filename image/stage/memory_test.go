package stage

import (
	"bytes"
	"crypto/rand"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestOccurrences(t *testing.T) {
	a, b, c := make([]byte, 32), make([]byte, 16), make([]byte, 33)
	for _, needle := range [][]byte{a, b, c} {
		rand.Read(needle)
	}
	path := filepath.Join(t.TempDir(), "memory")
	var text bytes.Buffer
	text.Write(make([]byte, 4*block-10))
	text.Write(a) // across the first two blocks
	text.Write(a)
	text.Write(b)
	text.Write(make([]byte, 9*block-7-text.Len()))
	text.Write(b) // again across
	text.Write(a[:31])
	text.Write(make([]byte, block))
	text.Write(a)
	if err := os.WriteFile(path, text.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := Occurrences(t.Context(), path, a, b, c)
	if err != nil || !slices.Equal(got, []int{3, 2, 0}) {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := Occurrences(t.Context(), path, a[:15]); err == nil {
		t.Error("what is found by chance was counted")
	}
	if forms := Forms(a); len(forms) != 4 || !bytes.Equal(append(bytes.Clone(forms[0]), forms[2]...), a) || len(forms[1]) != 32 {
		t.Errorf("%d forms", len(forms))
	}
}
