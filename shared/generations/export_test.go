package generations

import (
	"context"
	"time"
)

// CountEvery makes the store note its progress at emptying for each n files, so
// that a small generation is as long as a large one.
func (s *Store) CountEvery(n int) { s.unit = n }

// RestWith has the rests while something is emptied taken by f, after stretches of
// work of that length.
func (s *Store) RestWith(stretch time.Duration, f func(context.Context, time.Duration) error) {
	s.stretch, s.rest = stretch, f
}

// WorkStretch is the usual length.
const WorkStretch = workStretch

// Charge is what a generation of so many bytes, all of them new, is charged with by
// the text of a file .moved.
func Charge(text []byte, name string, bytes int64) (int64, error) {
	m, err := parseMoves(text)
	return m.charge(&Generation{Name: name, Bytes: bytes, NewBytes: bytes / 2}), err
}

// GoingGeneration takes the name of a folder in going/ apart.
func GoingGeneration(entry string) (repository, name string, ok bool) { return goingGeneration(entry) }
