package generations

import (
	"context"
	"time"
)

// CountEvery makes the store note its progress at emptying for each n files, so
// that a small generation is as long as a large one.
func (s *Store) CountEvery(n int) { s.unit = n }

// RestWith has the rests while something is emptied taken by f.
func (s *Store) RestWith(f func(context.Context, time.Duration) error) { s.rest = f }
