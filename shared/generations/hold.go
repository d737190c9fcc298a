package generations

import (
	"fmt"

	"farkeep/shared/beneath"
)

// hold opens a generation's folder and keeps it from being expired until release
// is called. Whoever reads a generation for longer than a moment holds it: half a
// folder would look like damage.
func (s *Store) hold(repository, name string) (dir *beneath.Dir, release func(), err error) {
	if _, _, err := ParseName(name); err != nil {
		return nil, nil, err
	}
	s.gate.Lock()
	defer s.gate.Unlock()
	dir, err = s.generations.Dir(repository + "/" + name)
	if err != nil {
		return nil, nil, fmt.Errorf("generation %s of %s: %w", name, repository, err)
	}
	key := repository + "/" + name
	s.held[key]++
	return dir, func() {
		dir.Close()
		s.gate.Lock()
		defer s.gate.Unlock()
		if s.held[key]--; s.held[key] == 0 {
			delete(s.held, key)
		}
	}, nil
}
