// Package readback says what reading generations back needs of the place that
// keeps them: an appliance, or a local folder.
//
// What is read is another machine's word. A [Tree]'s manifest carries a hash of
// every file; whoever writes or shows files of a Tree compares (packages restore
// and mount), and takes no name but those that package manifest lets through.
package readback

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"time"

	"farkeep/shared/hint"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"
)

// Source keeps generations. Its methods are safe for concurrent use.
type Source interface {
	// Name is the target's name in site.toml.
	Name() string
	// Wake makes the source ready, and waits for that as long as ctx allows.
	Wake(ctx context.Context) error
	// Generations lists the generations of a repository, "" for those of all,
	// oldest first in each.
	Generations(ctx context.Context, repository string) ([]pushwire.Generation, error)
	// Open opens a generation for as long as ctx lasts, and until Close of the
	// Tree. As long as one is open the source lets none of its generations expire.
	Open(ctx context.Context, repository, generation string) (Tree, error)
	// Close ends the connection.
	Close() error
}

// Tree is one generation. It is safe for concurrent use. An error of it that is
// target.Temporary means that the Tree is lost: Open another. Every other error
// is about the one file.
type Tree interface {
	// Manifest reads the generation's MANIFEST.
	Manifest() (io.ReadCloser, error)
	// File opens a file by its path in the manifest.
	File(path string) (File, error)
	// Lost is closed when the Tree cannot be read any more.
	Lost() <-chan struct{}
	// Close closes the Tree. Reads that are under way fail.
	Close() error
}

// File is an open file of a Tree.
type File interface {
	io.ReaderAt
	io.Closer
}

// ReadManifest hands every entry of a generation's manifest to each, in order.
// The list is complete, and is the one with g's digest, when the error is nil: do
// nothing with the entries before.
func ReadManifest(t Tree, g pushwire.Generation, each func(manifest.Entry) error) (manifest.Summary, error) {
	f, err := t.Manifest()
	if err != nil {
		return manifest.Summary{}, err
	}
	defer f.Close()
	return Entries(f, g, each)
}

// Entries is ReadManifest for a manifest that was fetched already.
func Entries(f io.Reader, g pushwire.Generation, each func(manifest.Entry) error) (manifest.Summary, error) {
	r := manifest.NewReader(bufio.NewReaderSize(f, 256<<10))
	for {
		e, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err == nil {
			err = each(e)
		}
		if err != nil {
			return manifest.Summary{}, err
		}
	}
	s := r.Summary()
	if g.Digest != "" && s.Digest.String() != g.Digest {
		return s, fmt.Errorf("the list of generation %s of %s has the digest %v, announced was %.64s", g.Name, g.Repository, s.Digest, g.Digest)
	}
	return s, nil
}

// Wanted says which generation somebody wants: by Name, by number, "latest" or
// "" for the newest; or, if At is set, the newest that is not younger.
type Wanted struct {
	Name string
	At   time.Time
	// EvenSuspect takes generations that are suspect or rejected as well.
	EvenSuspect bool
}

// Doubtful reports whether g is one that nobody should restore unawares.
func Doubtful(g pushwire.Generation) bool {
	switch g.Standing {
	case "good", "accepted":
		return false
	case "":
		return g.Suspect
	}
	return true
}

// Choose picks from a repository's generations, as Generations lists them.
// passed are newer ones that would have been picked if they were not doubtful.
func Choose(all []pushwire.Generation, w Wanted) (chosen pushwire.Generation, passed []pushwire.Generation, err error) {
	if len(all) == 0 {
		return chosen, nil, errors.New("there is no generation of it")
	}
	hinted := func(err error) error {
		return hint.Because(err, `"farkeep-pusher generations" lists them`)
	}
	if w.Name != "" && w.Name != "latest" {
		if !w.At.IsZero() {
			return chosen, nil, hint.Exit(hint.ExitUsage, errors.New("a generation and a time were given: one of the two is enough"))
		}
		i := slices.IndexFunc(all, func(g pushwire.Generation) bool { return names(g, w.Name) })
		if i < 0 {
			return chosen, nil, hint.Exit(hint.ExitUsage, hinted(fmt.Errorf("there is no generation %.64q", w.Name)))
		}
		if Doubtful(all[i]) && !w.EvenSuspect {
			return chosen, nil, doubt(all[i])
		}
		return all[i], nil, nil
	}
	for _, g := range slices.Backward(all) {
		switch {
		case !w.At.IsZero() && g.Committed.After(w.At):
		case Doubtful(g) && !w.EvenSuspect:
			passed = append(passed, g)
		default:
			return g, passed, nil
		}
	}
	if len(passed) > 0 {
		return chosen, passed, doubt(passed[0])
	}
	return chosen, nil, hint.Exit(hint.ExitUsage, hinted(fmt.Errorf("no generation is as old as %s: the oldest is of %s", w.At.Format(time.RFC3339), all[0].Committed.UTC().Format(time.RFC3339))))
}

// names reports whether text is g's name or its number.
func names(g pushwire.Generation, text string) bool {
	if g.Name == text {
		return true
	}
	number, err := strconv.ParseUint(text, 10, 63)
	if err != nil {
		return false
	}
	for i, c := range []byte(g.Name) {
		if c == '-' {
			own, err := strconv.ParseUint(g.Name[:i], 10, 63)
			return err == nil && own == number
		}
	}
	return false
}

// doubt is the refusal of a doubtful generation.
func doubt(g pushwire.Generation) error {
	standing := g.Standing
	if standing == "" {
		standing = "suspect"
	}
	err := fmt.Errorf("generation %s of %s is %s", g.Name, g.Repository, standing)
	for _, reason := range g.Reasons {
		err = fmt.Errorf("%w: %s", err, reason)
	}
	return hint.Exit(hint.ExitRefused, hint.Because(err, "take an older one, or this one all the same: --even-suspect"))
}
