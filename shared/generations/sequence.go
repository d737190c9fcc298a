package generations

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"

	"farkeep/shared/beneath"
)

// The last number that a repository used is in generations/<repository>/.sequence,
// and for one that was retired in the record "numbers": a number names one
// generation for ever, in mails and in the operator's decisions.

const numbersRecord = "numbers"

type numbers struct {
	Retired []retired `toml:"retired"`
}

type retired struct {
	Repository string `toml:"repository"`
	Last       int64  `toml:"last"`
}

// maxRetired bounds the record: each took an operator's command.
const maxRetired = 4096

// lastSequence returns the highest number that a repository ever used.
func (s *Store) lastSequence(ctx context.Context, home *beneath.Dir, repository string) (int64, error) {
	list, err := s.List(ctx, repository)
	if err != nil {
		return 0, err
	}
	var last int64
	if len(list) > 0 {
		last = list[len(list)-1].Sequence
	}
	n, err := readSequence(home)
	if errors.Is(err, fs.ErrNotExist) {
		n, err = s.retiredNumber(repository)
	}
	return max(last, n), err
}

func readSequence(home *beneath.Dir) (int64, error) {
	text, err := home.ReadFile(sequenceFile, 32)
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	if err != nil || n < 0 || n > 1<<53 {
		return 0, fmt.Errorf("%w: %s/%s holds %q, not a number", ErrDamaged, home.Path(), sequenceFile, text)
	}
	return n, nil
}

func (s *Store) writeSequence(home *beneath.Dir, n int64) error {
	return s.writeFile(home, sequenceFile, fmt.Appendf(nil, "%d\n", n), 0o644)
}

// keepSequence makes sure that the number n is known when its generation is gone.
func (s *Store) keepSequence(home *beneath.Dir, n int64) error {
	known, err := readSequence(home)
	if err == nil && known >= n {
		return nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return s.writeSequence(home, n)
}

func (s *Store) retiredNumber(repository string) (int64, error) {
	var n numbers
	if err := s.ReadRecord(numbersRecord, &n); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	for _, r := range n.Retired {
		if r.Repository == repository {
			return r.Last, nil
		}
	}
	return 0, nil
}

// retireNumber notes the last number of a repository that goes.
func (s *Store) retireNumber(repository string, last int64) error {
	var n numbers
	if err := s.ReadRecord(numbersRecord, &n); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	n.Retired = slices.DeleteFunc(n.Retired, func(r retired) bool { return r.Repository == repository })
	n.Retired = append(n.Retired, retired{repository, last})
	n.Retired = n.Retired[max(len(n.Retired)-maxRetired, 0):]
	return s.WriteRecord(numbersRecord, n)
}
