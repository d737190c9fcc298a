package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"
)

// asOwner lets a command that root runs act as the owner of dir, so that the
// service can read what the command writes; back makes it root again. Whoever is
// not root stays who he is, and so does root where there is no such folder yet.
func asOwner(dir string) (back func() error, err error) {
	stay := func() error { return nil }
	if os.Geteuid() != 0 {
		return stay, nil
	}
	info, err := os.Stat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return stay, nil
	}
	if err != nil {
		return nil, err
	}
	owner, ok := info.Sys().(*syscall.Stat_t)
	if !ok || owner.Uid == 0 {
		return stay, nil
	}
	// The saved ids stay root's: the way back. All threads of the process change.
	if err := syscall.Setresgid(-1, int(owner.Gid), -1); err != nil {
		return nil, fmt.Errorf("act as the owner of %s: %w", dir, err)
	}
	if err := syscall.Setresuid(-1, int(owner.Uid), -1); err != nil {
		return nil, fmt.Errorf("act as the owner of %s: %w", dir, err)
	}
	return func() error {
		if err := errors.Join(syscall.Setresuid(-1, 0, -1), syscall.Setresgid(-1, 0, -1)); err != nil {
			return fmt.Errorf("act as root again: %w", err)
		}
		return nil
	}, nil
}
