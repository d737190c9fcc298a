// Package locked gives memory for secrets: pages of their own that are never
// swapped out (mlock(2)), never in a core dump (MADV_DONTDUMP), and zero when
// they are given back. The Go runtime neither moves nor copies them.
//
// What a caller copies out of them is the caller's affair.
package locked

import (
	"fmt"
	"os"

	"farkeep/shared/hint"

	"golang.org/x/sys/unix"
)

// Memory is a piece of such memory. It is not safe for concurrent use.
type Memory struct {
	pages []byte
	size  int
}

// New returns size bytes, all zero. The caller must Release them.
func New(size int) (*Memory, error) {
	page := os.Getpagesize()
	pages, err := unix.Mmap(-1, 0, (max(size, 1)+page-1)/page*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("get memory for a secret: %w", err)
	}
	m := &Memory{pages: pages, size: size}
	if err := unix.Mlock(pages); err != nil {
		m.Release()
		return nil, hint.Because(fmt.Errorf("keep a secret out of swap: %w", err), "allow the service to lock memory: LimitMEMLOCK=8M in its unit")
	}
	if err := unix.Madvise(pages, unix.MADV_DONTDUMP); err != nil {
		m.Release()
		return nil, fmt.Errorf("keep a secret out of core dumps: %w", err)
	}
	return m, nil
}

// Bytes is the memory itself. It is void after Release.
func (m *Memory) Bytes() []byte {
	if m.pages == nil {
		return nil
	}
	return m.pages[:m.size:m.size]
}

// Release wipes the memory and gives it back. It may be called more than once.
func (m *Memory) Release() {
	if m.pages == nil {
		return
	}
	clear(m.pages)
	// Munmap unlocks as well. It cannot fail on pages that we mapped ourselves.
	_ = unix.Munmap(m.pages)
	m.pages = nil
}

// Check reports whether memory can be locked at all.
func Check() error {
	m, err := New(1)
	if err != nil {
		return err
	}
	m.Release()
	return nil
}
