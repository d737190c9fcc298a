package generations

// CountEvery makes the store note its progress at emptying for each n files, so
// that a small generation is as long as a large one.
func (s *Store) CountEvery(n int) { s.unit = n }
