package generations

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime/debug"
	"strings"
	"unicode"

	"farkeep/shared/beneath"
	"farkeep/shared/manifest"
	"farkeep/shared/pushwire"
)

// Judge compares a generation that is about to be with the current one.
//
// Commit asks it once, when everything is in place but for the name. What it
// reads was chosen by whoever pushed. An error or a panic makes the generation
// suspect, with that as the reason: a judge that stumbles over what it was given
// neither loses a push nor lets it pass. Only when ctx ends is there no
// generation, and the next attempt asks again.
type Judge interface {
	Judge(ctx context.Context, c *Candidate) (Verdict, error)
}

// Candidate is what a Judge judges. Its functions may be called any number of
// times until Judge returns; what they open the judge closes.
type Candidate struct {
	Repository, Pusher string
	Offer              pushwire.Offer
	// Current is the newest generation that counts; nil: there is none. It is not
	// always what the candidate shares its files with, which may be suspect.
	Current *Generation
	// New and Old open the manifests of the candidate and of Current.
	New, Old func() (*manifest.Reader, io.Closer, error)
	// Open and OpenOld open a file of either, read-only, by its path in the manifest.
	Open, OpenOld func(path string) (*os.File, error)
	// Scratch is .farkeep/judge/<repository>, for what can be made anew.
	Scratch *beneath.Dir
}

// Verdict is what a Judge says.
type Verdict struct {
	Suspect bool
	Reasons []string // sentences for a mail; 8 at most, of 300 bytes each: the rest is cut
}

const (
	maxReasons  = 8
	maxReason   = 300
	judgeFolder = "judge" // in .farkeep/
)

// sentence makes text fit for a mail and a log: one line, n bytes at most.
func sentence(text string, n int) string {
	text = strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, text)
	if len(text) > n {
		text = strings.ToValidUTF8(text[:n], "")
	}
	return strings.TrimSpace(text)
}

// judge asks the store's judge about what lies in the staging folder.
func (t *Transaction) judge(ctx context.Context, staging *beneath.Dir) (Verdict, error) {
	if t.store.opt.Judge == nil {
		return Verdict{}, nil
	}
	v, err := t.ask(ctx, staging)
	if ctx.Err() != nil {
		return Verdict{}, context.Cause(ctx)
	}
	if err != nil {
		t.store.opt.Log.Error("a push cannot be judged", "repository", t.req.Repository, "err", err)
		v.Suspect = true
		v.Reasons = append([]string{fmt.Sprintf("It could not be compared with the generation before: %v.", err)}, v.Reasons...)
	}
	v.Reasons = v.Reasons[:min(len(v.Reasons), maxReasons)]
	for i, r := range v.Reasons {
		v.Reasons[i] = sentence(r, maxReason)
	}
	return v, nil
}

func (t *Transaction) ask(ctx context.Context, staging *beneath.Dir) (v Verdict, err error) {
	c := &Candidate{Repository: t.req.Repository, Pusher: t.req.Pusher, Offer: t.req.Offer}
	c.New = func() (*manifest.Reader, io.Closer, error) { return t.openManifest(staging) }
	c.Open = func(path string) (*os.File, error) { return openFile(staging, path) }
	none := fmt.Errorf("%s: %w", t.req.Repository, ErrNone)
	c.Old = func() (*manifest.Reader, io.Closer, error) { return nil, nil, none }
	c.OpenOld = func(string) (*os.File, error) { return nil, none }

	g, err := t.store.Current(ctx, t.req.Repository)
	switch {
	case errors.Is(err, ErrNone):
	case err != nil:
		return v, err
	default:
		old, release, err := t.store.hold(t.req.Repository, g.Name)
		if err != nil {
			return v, err
		}
		defer release()
		c.Current = &g
		c.Old = func() (*manifest.Reader, io.Closer, error) { return t.openManifest(old) }
		c.OpenOld = func(path string) (*os.File, error) { return openFile(old, path) }
	}
	scratches, err := t.store.makeDir(t.store.private, judgeFolder, privatePerm)
	if err != nil {
		return v, err
	}
	defer scratches.Close()
	if c.Scratch, err = t.store.makeDir(scratches, t.req.Repository, privatePerm); err != nil {
		return v, err
	}
	defer c.Scratch.Close()

	defer func() {
		// Else the same push would end the process each time that it is tried.
		if p := recover(); p != nil {
			t.store.opt.Log.Error("the judge broke down", "repository", t.req.Repository, "panic", p, "stack", string(debug.Stack()))
			v, err = Verdict{}, errors.New("the judge broke down over it")
		}
	}()
	return t.store.opt.Judge.Judge(ctx, c)
}

// openFile opens a file of a generation by its path in the manifest.
func openFile(generation *beneath.Dir, path string) (*os.File, error) {
	if manifest.CheckPath(path) != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: fs.ErrInvalid}
	}
	f, _, err := generation.Open(FilesFolder + "/" + path)
	return f, err
}
