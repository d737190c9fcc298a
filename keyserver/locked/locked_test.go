package locked_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"farkeep/keyserver/locked"
	"farkeep/shared/hint"

	"golang.org/x/sys/unix"
)

func TestMemory(t *testing.T) {
	for _, size := range []int{0, 1, 4096, 4097, 100000} {
		m, err := locked.New(size)
		if err != nil {
			t.Fatal(err)
		}
		b := m.Bytes()
		if len(b) != size || cap(b) != size || !bytes.Equal(b, make([]byte, size)) {
			t.Errorf("%d bytes: %d of %d, or not zero", size, len(b), cap(b))
		}
		for i := range b {
			b[i] = 1
		}
		m.Release()
		m.Release()
		if m.Bytes() != nil {
			t.Error("released memory has bytes")
		}
	}
	if err := locked.Check(); err != nil {
		t.Error(err)
	}
}

// A limit that is too low is an error with a way out, not a key in swap.
func TestLimit(t *testing.T) {
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &old); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: 0, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &old); err != nil {
			t.Error(err)
		}
	}()
	m, err := locked.New(1)
	if err == nil {
		// Whoever has CAP_IPC_LOCK, as root has, knows no limit (mlock(2)).
		m.Release()
		return
	}
	if !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.ENOMEM) || !strings.Contains(hint.Of(err), "LimitMEMLOCK") {
		t.Errorf("got %v, hint %q", err, hint.Of(err))
	}
}
